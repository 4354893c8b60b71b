//! One thread of the receiving end: reads batches, checks them, decodes them straight into place.
//!
//! Batches are hostile until checked. When rounds begin and end over all streams is the pool's
//! business ([`super::receive`]).

use std::sync::Arc;

use super::address::{PAGE_SIZE, SpaceId};
use super::batch::{
    BatchError, BatchHeader, BatchKind, ENTRY_LEN, Encoding, Entry, HEADER_LEN, MAX_ENTRIES,
    MAX_RUN, decode_table,
};
use super::encode::{DecodeError, Decoder};
use super::receive::{ReceiveError, RoundReceived, Shared, Spaces};
use crate::transport::{PageStream, TransportError};
use crate::workload::WorkloadError;

/// Bytes of payload read at a time; small entries are read together.
const GROUP: usize = MAX_RUN as usize * PAGE_SIZE;

/// Why one stream cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The connection failed or ended too early.
    #[error("The connection failed")]
    Transport(#[source] TransportError),
    /// A batch that breaks the protocol.
    #[error("The source sent a wrong batch")]
    Batch(#[source] BatchError),
    /// Compressed pages that are none.
    #[error("The source sent pages that cannot be decoded")]
    Decode(#[source] DecodeError),
    /// Pages of a space that was not announced.
    #[error("The source sent pages of {0}, which was not announced")]
    UnknownSpace(SpaceId),
    /// A batch of another round than is under way.
    #[error("The source sent a batch of round {got} during round {wanted}")]
    Round {
        /// The batch's round.
        got: u32,
        /// The round under way.
        wanted: u32,
    },
    /// A barrier that does not agree with what came before it.
    #[error("The source says it sent {said} pages in this round, and {came} came")]
    Barrier {
        /// What the barrier says.
        said: u64,
        /// What came.
        came: u64,
    },
    /// The stream ended in the middle of a round.
    #[error("The source ended the stream within round {0}")]
    EndWithinRound(u32),
    /// Something follows what was to be the last batch.
    #[error("The source sent something after the end of the stream")]
    AfterEnd,
    /// The workload did not take the pages.
    #[error("The workload's memory could not be written")]
    Write(#[source] WorkloadError),
}

/// One thread's stream and memory.
pub(super) struct StreamReceiver {
    index: u32,
    stream: PageStream,
    shared: Arc<Shared>,
    decoder: Decoder,
    table: Box<[u8]>,
    entries: Vec<Entry>,
    payload: Box<[u8]>,
    round: u32,
    received: RoundReceived,
}

/// Tells the pool if a thread ends without having said why.
struct Abandoned<'a>(&'a Shared);

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(ReceiveError::Cancelled);
        }
    }
}

impl StreamReceiver {
    pub(super) fn new(stream: PageStream, shared: Arc<Shared>) -> Self {
        Self {
            index: stream.index(),
            stream,
            shared,
            decoder: Decoder::new(),
            table: vec![0; usize::from(MAX_ENTRIES) * ENTRY_LEN].into_boxed_slice(),
            entries: Vec::with_capacity(usize::from(MAX_ENTRIES)),
            payload: vec![0; GROUP].into_boxed_slice(),
            round: 1,
            received: RoundReceived::default(),
        }
    }

    /// Receives until the stream ends or the pool is over, and tells the pool which it was.
    pub(super) fn serve(mut self) {
        let shared = self.shared.clone();
        let _abandoned = Abandoned(&shared);
        match self.run() {
            Ok(false) => {}
            Ok(true) => {
                let mut state = shared.lock();
                if let Some(progress) = state.progress.get_mut(&self.index) {
                    progress.ended = true;
                }
                shared.changed.notify_all();
            }
            Err(StreamError::Transport(TransportError::Cancelled { .. })) => {
                shared.fail(ReceiveError::Cancelled);
            }
            Err(error) => {
                let (index, source) = (self.index, Arc::new(error));
                shared.fail(ReceiveError::Stream { index, source });
            }
        }
    }

    /// Receives batches until the stream ends in good order, or the pool is over (false).
    fn run(&mut self) -> Result<bool, StreamError> {
        let mut bytes = [0; HEADER_LEN];
        loop {
            if !self.stream.read_next(&mut bytes).map_err(StreamError::Transport)? {
                let (peer, doing) = (self.stream.peer().name.clone(), "sending pages");
                return Err(StreamError::Transport(TransportError::Ended { peer, doing }));
            }
            let header = BatchHeader::decode(&bytes).map_err(StreamError::Batch)?;
            if header.kind == BatchKind::End {
                return self.end();
            }
            if header.round != self.round {
                return Err(StreamError::Round { got: header.round, wanted: self.round });
            }
            if !self.shared.opened(self.round) {
                return Ok(false);
            }
            self.received.bytes += HEADER_LEN as u64;
            match header.kind {
                BatchKind::Pages => self.pages(&header)?,
                _ => {
                    let came = self.received.pages;
                    if header.pages != came {
                        return Err(StreamError::Barrier { said: header.pages, came });
                    }
                    let received = std::mem::take(&mut self.received);
                    if !self.shared.barrier(self.index, self.round, received) {
                        return Ok(false);
                    }
                    self.round += 1;
                }
            }
        }
    }

    /// After the last batch: the stream's own end is awaited, so that closing it here throws
    /// nothing away that the source still has to say on it.
    fn end(&mut self) -> Result<bool, StreamError> {
        if self.received.bytes != 0 {
            return Err(StreamError::EndWithinRound(self.round));
        }
        match self.stream.read_next(&mut [0]).map_err(StreamError::Transport)? {
            true => Err(StreamError::AfterEnd),
            false => Ok(true),
        }
    }

    fn pages(&mut self, header: &BatchHeader) -> Result<(), StreamError> {
        let spaces = self.shared.lock().spaces.clone();
        let unknown = StreamError::UnknownSpace(header.space);
        let Some(spaces) = spaces else { return Err(unknown) };
        let Some(limit) = spaces.limits.get(&header.space) else { return Err(unknown) };
        let table = &mut self.table[..header.table_len()];
        self.stream.read_exact(table).map_err(StreamError::Transport)?;
        decode_table(header, table, *limit, &mut self.entries).map_err(StreamError::Batch)?;
        let mut from = 0;
        while from < self.entries.len() {
            let (to, bytes) = group(&self.entries, from);
            let payload = &mut self.payload[..bytes];
            self.stream.read_exact(payload).map_err(StreamError::Transport)?;
            self.store(&spaces, header.space, from..to)?;
            from = to;
        }
        self.received.pages += header.pages;
        self.received.bytes += header.table_len() as u64 + u64::from(header.payload);
        Ok(())
    }

    /// Puts the entries of one group into place.
    fn store(
        &mut self,
        spaces: &Spaces,
        space: SpaceId,
        group: std::ops::Range<usize>,
    ) -> Result<(), StreamError> {
        let mut rest = &self.payload[..];
        for entry in &self.entries[group] {
            let range = entry.range(space);
            let bytes;
            (bytes, rest) = rest.split_at(entry.length as usize);
            let stored = match entry.encoding {
                Encoding::Zero => spaces.writer.zero(range),
                Encoding::Raw => spaces.writer.write(range, bytes),
                encoding @ (Encoding::Lz4 | Encoding::Zstd) => {
                    let pages = self
                        .decoder
                        .run(encoding, bytes, range.bytes())
                        .map_err(StreamError::Decode)?;
                    spaces.writer.write(range, pages)
                }
            };
            stored.map_err(StreamError::Write)?;
        }
        Ok(())
    }
}

/// As many entries from `from` on as fit into one read, at least one: (end, bytes).
fn group(entries: &[Entry], from: usize) -> (usize, usize) {
    let mut bytes = 0;
    let fitting = entries[from..].iter().take_while(|entry| {
        bytes += entry.length as usize;
        bytes <= GROUP
    });
    let to = from + fitting.count();
    (to, entries[from..to].iter().map(|entry| entry.length as usize).sum())
}
