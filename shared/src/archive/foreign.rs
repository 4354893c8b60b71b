//! An archive that another program wrote: a plain tar, compressed by zstd or not at all, that begins with no
//! header of ours and ends with no sums. It is gone through once to find what is in it; from then on it is
//! an [`Archive`] like any other, with a header that was made here. That it stays the same from one reading
//! to the next is seen by sums that are made here too; that it is what was written, by the sums of zstd alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::error::{ArchiveError, Result};
use super::header::{Described, FORMAT, HEADER, Header, PartInfo, VERSION};
use super::read::Archive;
use super::tarred::{BLOCK, Counting, decoder, must_end, next_file, open, said};

/// Bytes of a part that is kept, and of all of them, at most.
const KEPT_MOST: u64 = 16 << 20;
const ALL_KEPT_MOST: u64 = 64 << 20;
/// Parts at most.
const PARTS_MOST: usize = 1 << 17;

/// What is in an archive of another program's.
#[derive(Debug)]
pub struct Foreign {
    file: File,
    path: PathBuf,
    parts: Vec<PartInfo>,
    kept: BTreeMap<String, Vec<u8>>,
}

impl Foreign {
    /// Whether the file at `path` is a tar that begins with something else than a header of ours.
    ///
    /// # Errors
    /// When it is no tar that can be read.
    pub fn is_at(path: &Path) -> Result<bool> {
        let file = open(path)?;
        let refused = |what: String| ArchiveError::Refused { path: path.to_owned(), what };
        let decoder = decoder(&file).map_err(|error| refused(said(&error)))?;
        let mut tar = tar::Archive::new(decoder);
        let mut entries = tar.entries().map_err(|error| refused(said(&error)))?.raw(true);
        match entries.next() {
            Some(Ok(first)) => Ok(*first.path_bytes() != *HEADER.as_bytes()),
            // Whoever reads on says what is wrong.
            _ => Ok(false),
        }
    }

    /// Finds out what is in the archive at `path`, which unpacked must not be longer than `most` bytes, and
    /// keeps the contents of those parts whose names `keep` wants. Touches nothing.
    ///
    /// # Errors
    /// When not all of it is there, or it holds what no honest one does.
    pub fn survey(path: &Path, most: u64, keep: &dyn Fn(&str) -> bool) -> Result<Self> {
        let file = open(path)?;
        let refused = |what: String| ArchiveError::Refused { path: path.to_owned(), what };
        let (mut parts, mut kept) = (Vec::new(), BTreeMap::new());
        let mut look = || -> std::result::Result<(), String> {
            let decoder = decoder(&file).map_err(|error| said(&error))?;
            let mut tar = tar::Archive::new(Counting::new(decoder));
            let mut entries = tar.entries().map_err(|error| said(&error))?.raw(true);
            let (mut end, mut total, mut in_memory, mut passed) = (0u64, 0u64, 0u64, 0u64);
            while let Some(mut entry) = next_file(&mut entries, &mut passed)? {
                let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                if entry.header().entry_type() != tar::EntryType::Regular {
                    return Err(format!("its part {name:?} is no file"));
                }
                let size = entry.size();
                total = total.saturating_add(size);
                if total > most {
                    return Err(format!(
                        "it holds {total} bytes and more, and memory and disk here have room for {most}"
                    ));
                }
                if parts.len() == PARTS_MOST {
                    return Err(format!("it has more than {PARTS_MOST} parts"));
                }
                end = entry.raw_file_position() + size.next_multiple_of(BLOCK);
                if keep(&name) {
                    in_memory += size;
                    if size > KEPT_MOST || in_memory > ALL_KEPT_MOST {
                        return Err(format!("its part {name} has {size} bytes, more than any"));
                    }
                    let mut bytes = Vec::new();
                    entry.read_to_end(&mut bytes).map_err(|error| said(&error))?;
                    if kept.insert(name.clone(), bytes).is_some() {
                        return Err(format!("it has part {name} twice"));
                    }
                }
                parts.push(PartInfo { name, size });
            }
            must_end(tar.into_inner(), end)
        };
        look().map_err(refused)?;
        Ok(Self { file, path: path.to_owned(), parts, kept })
    }

    /// Its parts, in their order.
    pub fn parts(&self) -> &[PartInfo] {
        &self.parts
    }

    /// The content of a part that was kept.
    pub fn kept(&self, name: &str) -> Option<&[u8]> {
        self.kept.get(name).map(Vec::as_slice)
    }

    /// All that was kept, by name.
    pub fn all_kept(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.kept.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }

    /// As an archive of what `workload` says.
    ///
    /// # Errors
    /// When it has parts that no archive may have.
    pub fn into_archive(self, workload: Described) -> Result<Archive> {
        let header = Header {
            format: FORMAT.to_owned(),
            version: VERSION,
            decamp: String::new(),
            host: String::new(),
            created_ms: 0,
            workload,
            parts: self.parts,
        };
        Archive::foreign(self.file, self.path, header)
    }
}
