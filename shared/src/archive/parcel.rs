//! Parts as a backend gives them to an archive, and takes them out of one.

use std::io::{Read, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::{ArchiveError, Result};
use super::header::PartInfo;
use super::read::Archive;
use crate::files::Landing;
use crate::pages::{PageReader, PageSet};
use crate::workload::{DestinationWorkload, Manifest, Section};

/// The part that says which parts are state sections.
pub const SECTIONS: &str = "decamp/sections.json";
/// State sections at most.
const SECTIONS_MOST: usize = 1 << 16;
/// Bytes of that list at most.
const LIST_MOST: u64 = 16 << 20;
/// Bytes read at once.
const PIECE: usize = 256 << 10;

/// A workload that stands still, as it goes into an archive.
pub struct Frozen {
    /// What it is.
    pub manifest: Manifest,
    /// Its state.
    pub sections: Vec<Section>,
    /// Pages that exist and hold anything but zeros.
    pub pages: PageSet,
    /// Reads them.
    pub reader: Arc<dyn PageReader>,
}

/// Gives the bytes of a part.
pub type Fill = Box<dyn FnOnce(&mut dyn Write) -> Result<()> + Send>;

/// A part that is to be written.
pub struct Parcel {
    /// Its name and its bytes.
    pub info: PartInfo,
    /// Its content, exactly as long.
    pub fill: Fill,
}

/// Takes a workload out of an archive: shown all parts, then, when all is well, given them again.
/// Sections are told from other parts by the backend itself, with a [`SectionList`].
pub trait Unpacking: Send {
    /// First time: a part is looked at. Touches nothing.
    ///
    /// # Errors
    /// When it is not what it should be.
    fn look(&mut self, part: &PartInfo, content: &mut dyn Read) -> Result<()>;
    /// Between the two: everything was seen, and the sums are right. Touches nothing.
    ///
    /// # Errors
    /// Whatever keeps it from being restored here.
    fn check(&mut self, archive: &Archive) -> Result<()>;
    /// Second time: memory goes to `destination`, files to their places.
    ///
    /// # Errors
    /// When that fails; all that was made is taken away again by the caller.
    fn take(
        &mut self,
        part: &PartInfo,
        content: &mut dyn Read,
        destination: &mut dyn DestinationWorkload,
        landing: &Landing,
    ) -> Result<()>;
    /// All parts were taken: places files that are in none of them, and gives the state sections.
    ///
    /// # Errors
    /// When some are missing, or files cannot be placed.
    fn finish(&mut self, landing: &Landing) -> Result<Vec<Section>>;
}

impl Parcel {
    /// A part of `size` bytes that `fill` gives.
    pub fn filled(
        name: impl Into<String>,
        size: u64,
        fill: impl FnOnce(&mut dyn Write) -> Result<()> + Send + 'static,
    ) -> Self {
        Self { info: PartInfo { name: name.into(), size }, fill: Box::new(fill) }
    }

    /// A part whose bytes are at hand.
    pub fn bytes(name: impl Into<String>, bytes: Vec<u8>) -> Self {
        let name = name.into();
        let part = name.clone();
        Self::filled(name, bytes.len() as u64, move |to| {
            to.write_all(&bytes).map_err(|error| cannot_write(&part, &error))
        })
    }

    /// A part that is `value` as JSON.
    ///
    /// # Errors
    /// When it is none.
    pub fn json(name: &str, value: &impl Serialize) -> Result<Self> {
        let bytes = serde_json::to_vec_pretty(value)
            .map_err(|error| ArchiveError::part(name, format!("cannot be written: {error}")))?;
        Ok(Self::bytes(name, bytes))
    }
}

/// That a part could not be written on; the archive itself knows better why.
pub fn cannot_write(part: &str, error: &std::io::Error) -> ArchiveError {
    ArchiveError::part(part, format!("cannot be written: {error}"))
}

/// That a part could not be read on; the archive itself knows better why.
pub fn cannot_read(part: &str, error: &std::io::Error) -> ArchiveError {
    ArchiveError::part(part, format!("cannot be read: {error}"))
}

/// All of a part, which is small.
///
/// # Errors
/// When it is longer than `most`.
pub fn read_whole(part: &PartInfo, most: u64, content: &mut dyn Read) -> Result<Vec<u8>> {
    if part.size > most {
        return Err(ArchiveError::part(&part.name, format!("is longer than {most} bytes")));
    }
    // Grows with what is really there, whatever was promised.
    let mut bytes = Vec::with_capacity((part.size as usize).min(PIECE));
    content.read_to_end(&mut bytes).map_err(|error| cannot_read(&part.name, &error))?;
    Ok(bytes)
}

/// Which parts are state sections, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SectionList {
    sections: Vec<Listed>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    part: String,
    kind: String,
    version: u32,
}

impl SectionList {
    /// Notes that the part `part` is a section.
    pub fn add(&mut self, part: &str, kind: &str, version: u32) {
        self.sections.push(Listed { part: part.to_owned(), kind: kind.to_owned(), version });
    }

    /// As a part.
    ///
    /// # Errors
    /// Never for a list that was made here.
    pub fn parcel(&self) -> Result<Parcel> {
        Parcel::json(SECTIONS, self)
    }

    /// From a part.
    ///
    /// # Errors
    /// When it is none, or names a part twice.
    pub fn read(part: &PartInfo, content: &mut dyn Read) -> Result<Self> {
        let bytes = read_whole(part, LIST_MOST, content)?;
        let list: Self = serde_json::from_slice(&bytes)
            .map_err(|error| ArchiveError::part(SECTIONS, format!("cannot be read: {error}")))?;
        let names: std::collections::BTreeSet<_> =
            list.sections.iter().map(|one| &one.part).collect();
        if names.len() != list.sections.len() || names.len() > SECTIONS_MOST {
            return Err(ArchiveError::part(SECTIONS, "names a part twice, or too many"));
        }
        Ok(list)
    }

    /// The empty section that part `part` is, if it is one.
    pub fn section_of(&self, part: &str) -> Option<Section> {
        let listed = self.sections.iter().find(|listed| listed.part == part)?;
        Some(Section { kind: listed.kind.clone(), version: listed.version, bytes: Vec::new() })
    }

    /// The names of their parts.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.sections.iter().map(|listed| listed.part.as_str())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sections.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }
}
