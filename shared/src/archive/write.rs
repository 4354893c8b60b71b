//! The writing end: parts one after another, exactly as long as they were promised, through tar and zstd,
//! each with its sum. Nothing is kept in memory but the sums.

use std::io::{self, Write};

use sha2::{Digest, Sha256};

use super::error::{ArchiveError, Result};
use super::header::{HEADER, Header, SUMS, Sum, Sums, hex};

/// Compression level: what a disk takes.
const LEVEL: i32 = 1;
/// Where the header is, and all that only we read.
const OURS: &str = "decamp";
/// Bytes of a tar block.
const BLOCK: u64 = 512;

/// An archive that is being written.
pub struct ArchiveWriter<W: Write> {
    out: zstd::Encoder<'static, W>,
    sums: Sums,
    /// The directory that the last part was in.
    directory: String,
}

impl<W: Write> ArchiveWriter<W> {
    /// Begins an archive on `to` with `header`, whose parts must follow in its order.
    ///
    /// # Errors
    /// When `to` takes no more.
    pub fn begin(to: W, header: &Header) -> Result<Self> {
        let failed = |source| ArchiveError::Io { what: "begin", path: HEADER.into(), source };
        let mut out = zstd::Encoder::new(to, LEVEL).map_err(failed)?;
        out.include_checksum(true).map_err(failed)?;
        let directory = OURS.to_owned();
        let mut writer = Self { out, sums: Sums::default(), directory };
        let bytes = serde_json::to_vec_pretty(header).map_err(|error| failed(error.into()))?;
        writer.part(HEADER, bytes.len() as u64, |to| to.write_all(&bytes).map_err(failed))?;
        Ok(writer)
    }

    /// Writes the part `name`, for which `fill` gives exactly `size` bytes.
    ///
    /// # Errors
    /// When it gives more or less, or fails, or nothing more can be written.
    pub fn part(
        &mut self,
        name: &str,
        size: u64,
        fill: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        let failed = |source| ArchiveError::Io { what: "write part", path: name.into(), source };
        // Some tools look for a directory before what is in it. None of them looks for ours.
        if let Some((directory, _)) = name.rsplit_once('/')
            && ![OURS, self.directory.as_str()].contains(&directory)
        {
            directory.clone_into(&mut self.directory);
            let head = head(&format!("{directory}/"), tar::EntryType::Directory, 0);
            self.out.write_all(&head.map_err(failed)?).map_err(failed)?;
        }
        let head = head(name, tar::EntryType::Regular, size).map_err(failed)?;
        self.out.write_all(&head).map_err(failed)?;
        let mut content =
            Content { out: &mut self.out, sum: Sha256::new(), left: size, fault: None };
        let filled = fill(&mut content);
        let Content { sum, left, fault, .. } = content;
        if let Some(source) = fault {
            return Err(failed(source));
        }
        filled?;
        if left != 0 {
            return Err(ArchiveError::part(name, format!("is {left} bytes too short")));
        }
        let padding = size.next_multiple_of(BLOCK) - size;
        self.out.write_all(&[0; BLOCK as usize][..padding as usize]).map_err(failed)?;
        let sum = hex(&sum.finalize().into());
        self.sums.sha256.push(Sum { name: name.to_owned(), sum });
        Ok(())
    }

    /// Writes the sums and the end, and gives back what was written to.
    ///
    /// # Errors
    /// When nothing more can be written.
    pub fn finish(mut self) -> Result<W> {
        let failed = |source| ArchiveError::Io { what: "write part", path: SUMS.into(), source };
        let bytes = serde_json::to_vec(&self.sums).map_err(|error| failed(error.into()))?;
        self.part(SUMS, bytes.len() as u64, |to| to.write_all(&bytes).map_err(failed))?;
        self.out.write_all(&[0; 2 * BLOCK as usize]).map_err(failed)?;
        self.out.finish().map_err(failed)
    }
}

/// The block that stands before a part.
fn head(name: &str, kind: tar::EntryType, size: u64) -> io::Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name)?;
    header.set_entry_type(kind);
    header.set_mode(if kind == tar::EntryType::Directory { 0o700 } else { 0o600 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    Ok(header.as_bytes().to_vec())
}

/// What a part is filled through.
struct Content<'a, W: Write> {
    out: &'a mut zstd::Encoder<'static, W>,
    sum: Sha256,
    left: u64,
    /// What the archive's own file had to say; whoever fills may have other words for it.
    fault: Option<io::Error>,
}

impl<W: Write> Write for Content<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.left {
            return Err(io::Error::other("it is longer than it was promised to be"));
        }
        match self.out.write(bytes) {
            Ok(taken) => {
                self.sum.update(&bytes[..taken]);
                self.left -= taken as u64;
                Ok(taken)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let kind = error.kind();
                self.fault = Some(error);
                Err(kind.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
