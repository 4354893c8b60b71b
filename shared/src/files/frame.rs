//! The frames of a file stream: a kind, a length, a payload, and the flow of archive bytes in them.
//! Lengths are checked against the kind's cap before anything is allocated. What the frames mean to
//! a tree is the business of the sender and the receiver.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::FileCounters;
use super::channel::FileChannel;
use super::error::{FileError, Result};

/// Length of a frame's header: kind, then the payload's length as a little-endian u32.
const HEADER: usize = 5;
/// Archive bytes in one frame at most.
pub(super) const CHUNK: usize = 256 << 10;
/// Archive bytes that may be under way before the receiver has said that it consumed them: how
/// long a sender goes on writing when the receiver has failed.
pub(super) const WINDOW: u64 = 32 << 20;
/// The receiver says how far it is each time it has consumed this much.
const STEP: u64 = 4 << 20;
/// Bytes that are gathered before they are handed to the stream.
const GATHER: usize = 256 << 10;
/// Bytes read and thrown away after an error, so that the peer gets to read about it.
const DRAIN: u64 = 1 << 30;
/// Bytes of an error's text.
const TEXT: usize = 4096;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum FrameKind {
    /// A pass over one tree begins.
    Begin = 1,
    /// A piece of the index.
    Index = 2,
    /// The index is complete.
    IndexEnd = 3,
    /// A bitmap of the entries that the receiver has something alike of: it asks for their SHA-256.
    AskHash = 4,
    /// SHA-256 sums of entries asked for, one after another.
    Hash = 5,
    /// A bitmap of the entries whose content the receiver wants.
    Wanted = 6,
    /// The archive begins; one byte says how it is encoded.
    Content = 7,
    /// Bytes of the archive.
    Data = 8,
    /// The archive is complete.
    ContentEnd = 9,
    /// Archive bytes of this pass that the receiver consumed, as a little-endian u64.
    Consumed = 10,
    /// The pass is in place and on disk.
    Done = 11,
    /// The sender has no more.
    End = 12,
    /// Text of an error that ends the stream.
    Error = 13,
}

impl FrameKind {
    fn from_byte(byte: u8) -> Option<Self> {
        use FrameKind::*;
        let all = [
            Begin, Index, IndexEnd, AskHash, Hash, Wanted, Content, Data, ContentEnd, Consumed,
            Done, End, Error,
        ];
        all.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// Bytes of payload at most.
    pub(super) fn cap(self) -> usize {
        match self {
            Self::Begin => 64,
            Self::Index | Self::Data => CHUNK,
            Self::Wanted | Self::AskHash => super::index::ENTRIES_MOST / 8,
            Self::Hash => 32 << 10,
            Self::Content => 1,
            Self::Consumed => 8,
            Self::Error => TEXT,
            Self::IndexEnd | Self::ContentEnd | Self::Done | Self::End => 0,
        }
    }
}

/// A file stream as frames. Small writes are gathered and leave before anything is read.
pub(super) struct Frames<S> {
    stream: S,
    out: Vec<u8>,
    payload: Vec<u8>,
    counters: Option<Arc<FileCounters>>,
    /// Why an archive's reader or writer failed; `io::Error` could not carry it.
    fault: Option<FileError>,
    /// Archive bytes of this pass, sent or consumed.
    flowed: u64,
    /// Those of them that the receiver confirmed, or that this receiver told of.
    confirmed: u64,
}

impl<S: FileChannel> Frames<S> {
    pub(super) fn new(stream: S, counters: Option<Arc<FileCounters>>) -> Self {
        Self {
            stream,
            out: Vec::with_capacity(GATHER + CHUNK + 2 * HEADER),
            payload: Vec::new(),
            counters,
            fault: None,
            flowed: 0,
            confirmed: 0,
        }
    }

    /// Sends a frame, perhaps later: [`Frames::flush`] or the next read makes it leave.
    pub(super) fn send(&mut self, kind: FrameKind, payload: &[u8]) -> Result<()> {
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|_| payload.len() <= kind.cap())
            .ok_or_else(|| FileError::protocol(format!("too long a frame {kind:?}")))?;
        self.out.push(kind as u8);
        self.out.extend_from_slice(&length.to_le_bytes());
        self.out.extend_from_slice(payload);
        if self.out.len() >= GATHER { self.flush() } else { Ok(()) }
    }

    /// Hands everything to the stream.
    pub(super) fn flush(&mut self) -> Result<()> {
        if self.out.is_empty() {
            return Ok(());
        }
        let written = self.stream.put(&self.out);
        if let Some(counters) = &self.counters {
            counters.wire_bytes.fetch_add(self.out.len() as u64, Ordering::Relaxed);
        }
        self.out.clear();
        written.map_err(|source| FileError::Stream { doing: "writing", source })
    }

    /// The next frame; its payload stays valid until the one after. An error that the peer reports
    /// is an error here.
    pub(super) fn next(&mut self) -> Result<(FrameKind, &[u8])> {
        let kind = self.next_kind()?;
        Ok((kind, &self.payload))
    }

    /// A frame of this kind and nothing else.
    pub(super) fn expect(&mut self, kind: FrameKind) -> Result<&[u8]> {
        let (found, _) = self.next()?;
        if found == kind { Ok(&self.payload) } else { Err(out_of_turn(found)) }
    }

    fn next_kind(&mut self) -> Result<FrameKind> {
        self.flush()?;
        let mut header = [0; HEADER];
        let read = |source| FileError::Stream { doing: "reading", source };
        if !self.stream.fill_next(&mut header).map_err(read)? {
            return Err(read(io::Error::from(io::ErrorKind::UnexpectedEof).into()));
        }
        let [kind, length @ ..] = header;
        let kind = FrameKind::from_byte(kind)
            .ok_or_else(|| FileError::protocol(format!("an unknown frame ({kind})")))?;
        let length = u32::from_le_bytes(length) as usize;
        if length > kind.cap() {
            return Err(FileError::protocol(format!("a frame {kind:?} of {length} bytes")));
        }
        self.payload.resize(length, 0);
        self.stream.fill(&mut self.payload).map_err(read)?;
        match kind {
            FrameKind::Error => Err(FileError::Peer { text: readable(&self.payload) }),
            kind => Ok(kind),
        }
    }

    /// Forgets what flowed: a new pass begins.
    pub(super) fn begin_pass(&mut self) {
        (self.flowed, self.confirmed, self.fault) = (0, 0, None);
    }

    /// Waits until the receiver has the pass in place.
    pub(super) fn await_done(&mut self) -> Result<()> {
        loop {
            match self.next()? {
                (FrameKind::Consumed, _) => {}
                (FrameKind::Done, _) => return Ok(()),
                (other, _) => return Err(out_of_turn(other)),
            }
        }
    }

    /// The receiver's word on how far it is.
    fn await_consumed(&mut self) -> Result<()> {
        let payload = self.expect(FrameKind::Consumed)?;
        let consumed = payload.try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
        if consumed <= self.confirmed || consumed > self.flowed {
            return Err(FileError::protocol("a count of bytes that cannot be"));
        }
        self.confirmed = consumed;
        Ok(())
    }

    /// What really went wrong beneath an archive, if it was the stream.
    pub(super) fn take_fault(&mut self) -> Option<FileError> {
        self.fault.take()
    }

    /// Tells the peer why this side stops, as far as it can be told.
    pub(super) fn tell(&mut self, error: &FileError) {
        if !error.is_local() {
            return;
        }
        let text = error.text();
        let text = &text.as_bytes()[..text.len().min(TEXT)];
        if let Err(error) = self.send(FrameKind::Error, text).and_then(|()| self.flush()) {
            tracing::debug!(%error, "The peer cannot be told why the files do not travel");
        }
    }

    /// Reads and throws away until the peer ends: it may be in the middle of writing, and a
    /// connection closed on it would lose what it was told.
    pub(super) fn drain(&mut self) {
        let mut left = DRAIN;
        self.payload.resize(CHUNK, 0);
        while left > 0 && self.stream.fill(&mut self.payload[..HEADER]).is_ok() {
            let [kind, length @ ..] = [0, 1, 2, 3, 4].map(|at| self.payload[at]);
            let length = u32::from_le_bytes(length) as usize;
            if kind == FrameKind::End as u8
                || length > CHUNK
                || self.stream.fill(&mut self.payload[..length]).is_err()
            {
                return;
            }
            left = left.saturating_sub((HEADER + length) as u64);
        }
    }

    /// Nothing more will be written.
    pub(super) fn end(&mut self) -> Result<()> {
        self.send(FrameKind::End, &[])?;
        self.flush()?;
        // The peer may have read that already and hung up.
        if let Err(error) = self.stream.end() {
            tracing::debug!(%error, "The file stream ended before it was closed");
        }
        Ok(())
    }
}

/// A frame that does not belong here.
pub(super) fn out_of_turn(kind: FrameKind) -> FileError {
    FileError::protocol(format!("a frame {kind:?} out of turn"))
}

/// A peer's text without anything that would disturb a terminal.
fn readable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control()).collect()
}

/// Writes archive bytes as frames, no further ahead of the receiver than the window.
pub(super) struct DataWriter<'a, S> {
    frames: &'a mut Frames<S>,
    chunk: Vec<u8>,
}

impl<'a, S: FileChannel> DataWriter<'a, S> {
    pub(super) fn new(frames: &'a mut Frames<S>) -> Self {
        Self { frames, chunk: Vec::with_capacity(CHUNK) }
    }

    fn send_chunk(&mut self) -> Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        self.frames.send(FrameKind::Data, &self.chunk)?;
        self.frames.flowed += self.chunk.len() as u64;
        self.chunk.clear();
        while self.frames.flowed - self.frames.confirmed > WINDOW {
            self.frames.await_consumed()?;
        }
        Ok(())
    }

    fn guarded(&mut self) -> io::Result<()> {
        if self.frames.fault.is_some() {
            return Err(broken());
        }
        self.send_chunk().map_err(|error| {
            self.frames.fault = Some(error);
            broken()
        })
    }
}

impl<S: FileChannel> Write for DataWriter<'_, S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..taken]);
        if self.chunk.len() == CHUNK {
            self.guarded()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.guarded()
    }
}

/// Reads archive bytes out of frames; ends where the sender says that the archive is complete.
pub(super) struct DataReader<'a, S> {
    frames: &'a mut Frames<S>,
    at: usize,
    ended: bool,
}

impl<'a, S: FileChannel> DataReader<'a, S> {
    pub(super) fn new(frames: &'a mut Frames<S>) -> Self {
        frames.payload.clear();
        Self { frames, at: 0, ended: false }
    }

    fn next_chunk(&mut self) -> Result<()> {
        self.frames.flowed += self.frames.payload.len() as u64;
        if self.frames.flowed - self.frames.confirmed >= STEP {
            self.frames.confirmed = self.frames.flowed;
            let consumed = self.frames.flowed.to_le_bytes();
            self.frames.send(FrameKind::Consumed, &consumed)?;
        }
        self.at = 0;
        match self.frames.next()? {
            (FrameKind::Data, _) => Ok(()),
            (FrameKind::ContentEnd, _) => {
                self.ended = true;
                Ok(())
            }
            (other, _) => Err(out_of_turn(other)),
        }
    }
}

impl<S: FileChannel> Read for DataReader<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.frames.payload.len() && !self.ended {
            if self.frames.fault.is_some() {
                return Err(broken());
            }
            if let Err(error) = self.next_chunk() {
                self.frames.fault = Some(error);
                return Err(broken());
            }
        }
        let rest = &self.frames.payload[self.at..];
        let taken = rest.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&rest[..taken]);
        self.at += taken;
        Ok(taken)
    }
}

fn broken() -> io::Error {
    io::Error::other("the file stream is broken")
}
