//! The reading end: an archive is gone through from its first byte to its last, everything in it held to
//! the header and to the sums. It is done twice: to find out that all is well, and then to restore.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::error::{ArchiveError, Result};
use super::header::{HEADER, Header, JSON_MOST, PartInfo, SUMS, Sums, hex};
use super::tarred::{BLOCK, Counting, decoder, must_end, next_before, next_file, open, said};

/// An archive whose header has been read.
#[derive(Debug)]
pub struct Archive {
    file: File,
    path: PathBuf,
    header: Header,
    /// Whether another program wrote it: then its header was made of its entries, and it has no sums.
    foreign: bool,
    /// SHA-256 of each part, the header's first, in hexadecimal digits: once it was verified.
    sums: Vec<String>,
}

/// Names of parts, and their sums in hexadecimal digits.
type NamedSums = Vec<(String, String)>;

/// Takes a part; what it does not read is passed over.
pub type Take<'a> = dyn FnMut(&PartInfo, &mut dyn Read) -> Result<()> + 'a;

impl Archive {
    /// Opens `path` and reads its header. Touches nothing.
    ///
    /// # Errors
    /// When it is no checkpoint, or of another version, or its header lies.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open(path)?;
        let refused = |what: String| ArchiveError::Refused { path: path.to_owned(), what };
        let header = read_header(&file).map_err(refused)?;
        Ok(Self { file, path: path.to_owned(), header, foreign: false, sums: Vec::new() })
    }

    /// An archive that another program wrote, whose entries make up `header`.
    ///
    /// # Errors
    /// When a header of decamp's could not say what it says.
    pub(super) fn foreign(file: File, path: PathBuf, header: Header) -> Result<Self> {
        if let Err(what) = header.check() {
            return Err(ArchiveError::Refused { path, what });
        }
        Ok(Self { file, path, header, foreign: true, sums: Vec::new() })
    }

    /// What it says of itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Goes through all of it and checks it against header and sums. `look` is shown each part.
    ///
    /// # Errors
    /// [`ArchiveError::Refused`] when not all of it is there as it was written.
    pub fn verify(&mut self, look: &mut Take<'_>) -> Result<()> {
        let (found, said) = self.walk(look)?;
        if let Some(said) = said {
            let wrong = found
                .iter()
                .zip(&said.sha256)
                .find(|((name, sum), said)| *name != said.name || *sum != said.sum);
            if let Some(((name, _), _)) = wrong {
                return Err(self.refused(format!("part {name} is damaged: its sum is another one")));
            }
            if said.sha256.len() != found.len() {
                return Err(self.refused("its sums are not those of its parts"));
            }
        }
        self.sums = found.into_iter().map(|(_, sum)| sum).collect();
        Ok(())
    }

    /// Goes through it once more; it was verified.
    ///
    /// # Errors
    /// When `take` fails, or the file is not any more what was verified.
    pub fn unpack(&self, take: &mut Take<'_>) -> Result<()> {
        let (found, _) = self.walk(take)?;
        let same = found.iter().map(|(_, sum)| sum).eq(&self.sums);
        if same { Ok(()) } else { Err(self.refused("it was changed while it was being restored")) }
    }

    /// SHA-256 of a part, in hexadecimal digits; nothing before [`Archive::verify`].
    pub fn sum_of(&self, name: &str) -> Option<&str> {
        let at = self.header.parts.iter().position(|part| part.name == name)?;
        self.sums.get(at + usize::from(!self.foreign)).map(String::as_str)
    }

    fn refused(&self, what: impl Into<String>) -> ArchiveError {
        ArchiveError::Refused { path: self.path.clone(), what: what.into() }
    }

    /// Gives the sums that the parts have, and those that the archive says they have, if it says any.
    fn walk(&self, take: &mut Take<'_>) -> Result<(NamedSums, Option<Sums>)> {
        let damaged = |error: io::Error| self.refused(said(&error));
        let mut tar = tar::Archive::new(Counting::new(decoder(&self.file).map_err(damaged)?));
        let mut entries = tar.entries().map_err(damaged)?.raw(true);
        let mut found = Vec::new();
        let mut sums = Vec::new();
        let header = PartInfo { name: HEADER.to_owned(), size: JSON_MOST };
        let last = PartInfo { name: SUMS.to_owned(), size: JSON_MOST };
        let ours = |part| (!self.foreign).then_some(part);
        let promised = ours(&header).into_iter().chain(&self.header.parts).chain(ours(&last));
        let (mut end, mut passed) = (0, 0);
        for part in promised {
            let missing = || self.refused(format!("it ends before part {}", part.name));
            let entry = match self.foreign {
                true => next_file(&mut entries, &mut passed).map_err(|what| self.refused(what))?,
                false => next_before(&mut entries, &part.name).map_err(damaged)?,
            };
            let entry = entry.ok_or_else(missing)?;
            let size = self.expect(&entry, part)?;
            end = entry.raw_file_position() + size.next_multiple_of(BLOCK);
            let mut content = Content { from: entry, sum: Sha256::new(), left: size, fault: None };
            let taken = match part.name.as_str() {
                HEADER => self.same_header(&mut content),
                SUMS => content.read_to_end(&mut sums).map(drop).map_err(damaged),
                _ => take(part, &mut content),
            };
            // What was not read is read for its sum. Damage says more than what came of it.
            let rest = if taken.is_ok() { content.pass_over() } else { Ok(()) };
            if let Some(fault) = content.fault.take() {
                return Err(damaged(fault));
            }
            taken?;
            rest.map_err(damaged)?;
            let sum = hex(&content.sum.finalize().into());
            if part.name != SUMS {
                found.push((part.name.clone(), sum));
            }
        }
        let more = match self.foreign {
            true => {
                next_file(&mut entries, &mut passed).map_err(|what| self.refused(what))?.is_some()
            }
            false => entries.next().is_some(),
        };
        if more {
            return Err(self.refused("it has more parts than its header says"));
        }
        must_end(tar.into_inner(), end).map_err(|what| self.refused(what))?;
        if self.foreign {
            return Ok((found, None));
        }
        let sums = serde_json::from_slice(&sums)
            .map_err(|error| self.refused(format!("its sums cannot be read: {error}")))?;
        Ok((found, Some(sums)))
    }

    /// Whether the next entry is the one that was promised; gives its size.
    fn expect<R: Read>(&self, entry: &tar::Entry<'_, R>, part: &PartInfo) -> Result<u64> {
        let name = entry.path_bytes();
        let shown = String::from_utf8_lossy(&name);
        if *name != *part.name.as_bytes() {
            return Err(self.refused(format!("it has {shown:?} where {} should be", part.name)));
        }
        if entry.header().entry_type() != tar::EntryType::Regular {
            return Err(self.refused(format!("its part {shown} is no file")));
        }
        let size = entry.size();
        let json = matches!(part.name.as_str(), HEADER | SUMS);
        let right = if json { size <= JSON_MOST } else { size == part.size };
        if right {
            Ok(size)
        } else {
            Err(self
                .refused(format!("its part {shown} has {size} bytes, which is not what it says")))
        }
    }

    fn same_header(&self, content: &mut dyn Read) -> Result<()> {
        let mut bytes = Vec::new();
        let read = content.take(JSON_MOST).read_to_end(&mut bytes);
        match read.map_err(|error| said(&error)).and_then(|_| Header::parse(&bytes)) {
            Ok(header) if header == self.header => Ok(()),
            Ok(_) => Err(self.refused("it was changed while it was being read")),
            Err(what) => Err(self.refused(what)),
        }
    }
}

fn read_header(file: &File) -> std::result::Result<Header, String> {
    let broken = |error: io::Error| said(&error);
    let mut tar = tar::Archive::new(decoder(file).map_err(broken)?);
    let mut entries = tar.entries().map_err(broken)?.raw(true);
    let first = entries.next().ok_or("it is an empty archive")?;
    let mut first = first.map_err(broken)?;
    let is_header = *first.path_bytes() == *HEADER.as_bytes()
        && first.header().entry_type() == tar::EntryType::Regular;
    if !is_header {
        return Err(format!("it does not begin with {HEADER}, as a checkpoint of decamp's does"));
    }
    if first.size() > JSON_MOST {
        return Err("its header is longer than any".to_owned());
    }
    let mut bytes = Vec::new();
    first.read_to_end(&mut bytes).map_err(broken)?;
    if bytes.len() as u64 != first.size() {
        return Err("it ends within its header".to_owned());
    }
    Header::parse(&bytes)
}

/// What a part is read through.
struct Content<R> {
    from: R,
    sum: Sha256,
    left: u64,
    /// What the archive's own bytes had to say; whoever reads may have other words for it.
    fault: Option<io::Error>,
}

impl<R: Read> Content<R> {
    fn pass_over(&mut self) -> io::Result<()> {
        io::copy(self, &mut io::sink()).map(drop)
    }
}

impl<R: Read> Read for Content<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 || into.is_empty() {
            return Ok(0);
        }
        match self.from.read(into) {
            Ok(0) => {
                self.fault = Some(io::ErrorKind::UnexpectedEof.into());
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Ok(read) => {
                self.sum.update(&into[..read]);
                self.left -= read as u64;
                Ok(read)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let kind = error.kind();
                self.fault = Some(error);
                Err(kind.into())
            }
        }
    }
}
