//! The archive of file contents as the source writes it: tar, entries named by their number in the
//! index, through zstd where a sample says that it is worth it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::FileCounters;
use super::beneath::Root;
use super::channel::FileChannel;
use super::error::{Doing, FileError, Result};
use super::frame::{DataWriter, FrameKind, Frames};
use super::index::{Entry, as_path};

/// How an archive is encoded, as the byte on the wire.
pub(super) const PLAIN: u8 = 0;
/// See [`PLAIN`].
pub(super) const ZSTD: u8 = 1;
/// Compression level: fast enough for a fast link.
const LEVEL: i32 = 1;
/// Files looked at to choose an encoding, and bytes of each.
const SAMPLES: usize = 16;
const SAMPLE: usize = 32 << 10;
/// Share of its size that a sample must shrink to for compression to be worth it.
const WORTH: f64 = 0.9;
/// Bytes read from a file at once.
const READ: usize = 256 << 10;

/// What the source sends content from.
pub(super) struct Packing<'a> {
    pub(super) root: &'a Root,
    pub(super) entries: &'a [Entry],
    /// The workload stands still: a file that is not as the index says is an error.
    pub(super) paused: bool,
    pub(super) counters: &'a FileCounters,
}

impl Packing<'_> {
    /// Sends the contents of the entries `wanted`, in their order. Gives the numbers of those that
    /// had vanished.
    pub(super) fn send<S: FileChannel>(
        &self,
        frames: &mut Frames<S>,
        wanted: &[usize],
    ) -> Result<Vec<usize>> {
        let encoding = if self.paused || self.compresses(wanted)? { ZSTD } else { PLAIN };
        frames.send(FrameKind::Content, &[encoding])?;
        let mut vanished = Vec::new();
        let mut fault = None;
        let data = DataWriter::new(frames);
        let written = match encoding {
            PLAIN => self
                .write(data, wanted, &mut vanished, &mut fault)
                .and_then(|mut data| data.flush()),
            _ => zstd::Encoder::new(data, LEVEL)
                .and_then(|encoder| self.write(encoder, wanted, &mut vanished, &mut fault))
                .and_then(zstd::Encoder::finish)
                .and_then(|mut data| data.flush()),
        };
        if let Some(fault) = fault.or(frames.take_fault()) {
            return Err(fault);
        }
        written.doing("pack", &self.root.shown(b""))?;
        frames.send(FrameKind::ContentEnd, &[])?;
        Ok(vanished)
    }

    /// Writes the archive. An error in `fault` says more than the one that is returned.
    fn write<W: Write>(
        &self,
        to: W,
        wanted: &[usize],
        vanished: &mut Vec<usize>,
        fault: &mut Option<FileError>,
    ) -> io::Result<W> {
        let mut builder = tar::Builder::new(to);
        let mut buffer = vec![0; READ];
        for &number in wanted {
            let entry = &self.entries[number];
            let path = self.root.shown(&entry.path);
            match self.open(entry, &path) {
                Ok(Some(file)) => {
                    let mut content = Content {
                        file,
                        entry,
                        packing: self,
                        path: &path,
                        at: 0,
                        have: 0..0,
                        buffer: &mut buffer,
                        fault,
                    };
                    builder.append(&header(number, entry.size)?, &mut content)?;
                }
                Ok(None) => vanished.push(number),
                Err(error) => {
                    *fault = Some(error);
                    return Err(io::Error::other("a file cannot be read"));
                }
            }
        }
        builder.into_inner()
    }

    /// Copies the content of one entry of a tree that stands still.
    pub(super) fn copy(&self, entry: &Entry, to: &mut dyn Write) -> Result<()> {
        let path = self.root.shown(&entry.path);
        let changed = || FileError::ChangedWhilePaused { path: path.clone() };
        let file = self.open(entry, &path)?.ok_or_else(changed)?;
        let mut fault = None;
        let mut content = Content {
            file,
            entry,
            packing: self,
            path: &path,
            at: 0,
            have: 0..0,
            buffer: &mut vec![0; READ],
            fault: &mut fault,
        };
        let copied = io::copy(&mut content, to);
        match fault {
            Some(fault) => Err(fault),
            None => copied.map(drop).doing("pack", &path),
        }
    }

    fn open(&self, entry: &Entry, path: &Path) -> Result<Option<File>> {
        let Some(file) = self.root.open_file(&entry.path).doing("open", path)? else {
            return match self.paused {
                true => Err(FileError::ChangedWhilePaused { path: path.to_owned() }),
                false => Ok(None),
            };
        };
        if self.paused && file.metadata().doing("look at", path)?.len() != entry.size {
            return Err(FileError::ChangedWhilePaused { path: path.to_owned() });
        }
        Ok(Some(file))
    }

    /// Whether a sample of what is wanted shrinks.
    fn compresses(&self, wanted: &[usize]) -> Result<bool> {
        let (mut before, mut after) = (0, 0);
        let mut block = vec![0; SAMPLE];
        for &number in wanted.iter().step_by(wanted.len().div_ceil(SAMPLES).max(1)) {
            let entry = &self.entries[number];
            let path = self.root.shown(&entry.path);
            let Some(file) = self.root.open_file(&entry.path).doing("open", &path)? else {
                continue;
            };
            let at = entry.size.saturating_sub(SAMPLE as u64) / 2;
            let count = file.read_at(&mut block, at).doing("read", &path)?;
            before += count;
            after += zstd::bulk::compress(&block[..count], LEVEL).doing("compress", &path)?.len();
        }
        Ok((after as f64) < before as f64 * WORTH)
    }
}

/// The archive's header of entry `number`.
fn header(number: usize, size: u64) -> io::Result<tar::Header> {
    let mut header = tar::Header::new_ustar();
    header.set_path(as_path(number.to_string().as_bytes()))?;
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(0);
    header.set_size(size);
    header.set_cksum();
    Ok(header)
}

/// Exactly as many bytes of a file as its index entry promised: a file that shrinks meanwhile is
/// padded, one that grows is cut. Either has a new fingerprint and is sent again.
struct Content<'a> {
    file: File,
    entry: &'a Entry,
    packing: &'a Packing<'a>,
    path: &'a Path,
    /// How far the file was read.
    at: u64,
    /// What of the buffer is still to be given.
    have: std::ops::Range<usize>,
    buffer: &'a mut [u8],
    fault: &'a mut Option<FileError>,
}

impl Content<'_> {
    fn refill(&mut self) -> Result<()> {
        let most = (self.buffer.len() as u64).min(self.entry.size - self.at) as usize;
        let part = &mut self.buffer[..most];
        let mut filled = 0;
        while filled < most {
            match self.file.read_at(&mut part[filled..], self.at + filled as u64) {
                Ok(0) if self.packing.paused => {
                    return Err(FileError::ChangedWhilePaused { path: self.path.to_owned() });
                }
                Ok(0) => {
                    part[filled..].fill(0);
                    filled = most;
                }
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).doing("read", self.path),
            }
        }
        self.at += most as u64;
        self.have = 0..most;
        self.packing.counters.sent_bytes.fetch_add(most as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Read for Content<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.have.is_empty()
            && self.at < self.entry.size
            && let Err(error) = self.refill()
        {
            *self.fault = Some(error);
            return Err(io::Error::other("a file cannot be read"));
        }
        let count = self.have.len().min(into.len());
        into[..count].copy_from_slice(&self.buffer[self.have.start..self.have.start + count]);
        self.have.start += count;
        Ok(count)
    }
}
