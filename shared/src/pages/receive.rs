//! The receiving end of the page engine: one thread a stream decodes straight into place.
//!
//! Batches are hostile until checked: a stream that lies ends the whole pool with an error. A
//! thread that has reached the end of a round waits until every stream has, so no page of one round
//! is written after a page of the next. Who may send, and what spaces there are, is decided
//! elsewhere.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::PageWriter;
use super::address::{PAGE_SIZE, SpaceId};
use super::batch::{
    BatchError, BatchHeader, BatchKind, ENTRY_LEN, Encoding, Entry, HEADER_LEN, MAX_ENTRIES,
    MAX_RUN, decode_table,
};
use super::encode::{DecodeError, Decoder};
use crate::transport::{Canceller, PageStream, TransportError};
use crate::workload::{SpaceInfo, WorkloadError};

/// Bytes of payload read at a time; small entries are read together.
const GROUP: usize = MAX_RUN as usize * PAGE_SIZE;

/// Totals of this many rounds are kept.
const TOTALS: u32 = 1024;

/// What one round brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundReceived {
    /// Pages, zero markers included.
    pub pages: u64,
    /// Bytes of batches, headers included, TLS not.
    pub bytes: u64,
}

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

/// Why pages could not be received.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReceiveError {
    /// A stream failed; all are cancelled then.
    #[error("Page stream {index} failed")]
    Stream {
        /// Which.
        index: u32,
        /// How.
        #[source]
        source: Arc<StreamError>,
    },
    /// A round took too long.
    #[error("Round {round} did not arrive within {} ms", after.as_millis())]
    Deadline {
        /// Which.
        round: u32,
        /// How long was allowed.
        after: Duration,
    },
    /// The streams did not end in time.
    #[error("The source did not end its page streams within {} ms", .0.as_millis())]
    NotEnded(Duration),
    /// A stream of a number that is taken or too high.
    #[error("There is no place for page stream {index}: {streams} are expected, each once")]
    Index {
        /// Its number.
        index: u32,
        /// How many streams the pool has.
        streams: u32,
    },
    /// A thread could not be started.
    #[error("Could not start the thread of page stream {index}")]
    Thread {
        /// Which.
        index: u32,
        /// Why not.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// Cancelled from this side.
    #[error("Receiving pages was cancelled")]
    Cancelled,
}

/// Threads that receive pages, one a stream.
#[derive(Debug)]
pub struct ReceivePool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What all threads of a pool share.
#[derive(Debug)]
struct Shared {
    streams: u32,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    spaces: Option<Arc<Spaces>>,
    /// The last round that was let in.
    opened: u32,
    /// For each stream that was added: the last round that it ended, and whether it ended itself.
    progress: BTreeMap<u32, Progress>,
    cancellers: Vec<Canceller>,
    totals: BTreeMap<u32, RoundReceived>,
    error: Option<ReceiveError>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    round: u32,
    ended: bool,
}

/// The spaces of a workload and where their pages go.
struct Spaces {
    limits: BTreeMap<SpaceId, u64>,
    writer: Arc<dyn PageWriter>,
}

impl std::fmt::Debug for Spaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spaces").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// Cancels all streams of a pool, from any thread.
#[derive(Clone, Debug)]
pub struct ReceiveCanceller(Arc<Shared>);

impl ReceiveCanceller {
    /// Makes everything that waits for pages end with [`ReceiveError::Cancelled`].
    pub fn cancel(&self) {
        self.0.fail(ReceiveError::Cancelled);
    }
}

impl ReceivePool {
    /// A pool that expects `streams` streams, numbered from 0.
    pub fn new(streams: u32) -> Self {
        let (state, changed) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { streams, state, changed });
        Self { shared, threads: Mutex::default() }
    }

    /// Starts receiving on a stream, whose number is that of its join.
    ///
    /// # Errors
    /// When its number is taken or too high, the pool has failed, or no thread can be started.
    pub fn add_stream(&self, stream: PageStream) -> Result<(), ReceiveError> {
        let (index, streams) = (stream.index(), self.shared.streams);
        let mut state = self.shared.lock();
        if let Some(error) = &state.error {
            return Err(error.clone());
        }
        if index >= streams || state.progress.contains_key(&index) {
            return Err(ReceiveError::Index { index, streams });
        }
        let canceller = stream.canceller();
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("receive-{index}"))
            .spawn(move || StreamReceiver::new(stream, shared).serve())
            .map_err(|e| ReceiveError::Thread { index, source: Arc::new(e) })?;
        state.progress.insert(index, Progress::default());
        state.cancellers.push(canceller);
        drop(state);
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// Lets round `round` in: which spaces there are and where their pages go. All spaces are named
    /// each time. Streams that are ahead of this wait, so a source need not know when it happens.
    pub fn open_round(&self, round: u32, spaces: &[SpaceInfo], writer: Arc<dyn PageWriter>) {
        let limits = spaces.iter().map(|s| (SpaceId(s.id), s.page_limit)).collect();
        let mut state = self.shared.lock();
        state.spaces = Some(Arc::new(Spaces { limits, writer }));
        state.opened = round;
        self.shared.changed.notify_all();
    }

    /// Waits up to `limit` until round `round` has been written, all of it, from all streams.
    ///
    /// # Errors
    /// At once when a stream failed or lied, or the pool was cancelled; or when time is up. Totals
    /// are kept of the last thousand rounds.
    pub fn wait_round(&self, round: u32, limit: Duration) -> Result<RoundReceived, ReceiveError> {
        let late = ReceiveError::Deadline { round, after: limit };
        self.shared.wait(limit, late, |state, shared| {
            shared
                .all_passed(state, round)
                .then(|| state.totals.get(&round).copied().unwrap_or_default())
        })
    }

    /// A handle that cancels everything from another thread.
    pub fn canceller(&self) -> ReceiveCanceller {
        ReceiveCanceller(self.shared.clone())
    }

    /// Waits up to `limit` until the source has ended every stream, and ends the threads.
    ///
    /// # Errors
    /// As [`ReceivePool::wait_round`].
    pub fn finish(self, limit: Duration) -> Result<(), ReceiveError> {
        let late = ReceiveError::NotEnded(limit);
        self.shared.wait(limit, late, |state, shared| {
            let ended = state.progress.values().filter(|p| p.ended).count();
            (ended == shared.streams as usize).then_some(())
        })
    }
}

impl Drop for ReceivePool {
    fn drop(&mut self) {
        self.shared.fail(ReceiveError::Cancelled);
        let threads = self.threads.get_mut().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // A thread that panicked has told `Abandoned`, and so everybody.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the first error and ends all streams.
    fn fail(&self, error: ReceiveError) {
        let mut state = self.lock();
        state.error.get_or_insert(error);
        state.cancellers.iter().for_each(Canceller::cancel);
        self.changed.notify_all();
    }

    fn all_passed(&self, state: &State, round: u32) -> bool {
        let passed = state.progress.values().filter(|p| p.round >= round).count();
        passed == self.streams as usize
    }

    /// Waits until `ready` gives something.
    fn wait<T>(
        &self,
        limit: Duration,
        late: ReceiveError,
        ready: impl Fn(&State, &Self) -> Option<T>,
    ) -> Result<T, ReceiveError> {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(result) = ready(&state, self) {
                return Ok(result);
            }
            if let Some(error) = &state.error {
                return Err(error.clone());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(late);
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until round `round` is let in. False: the pool is over.
    fn opened(&self, round: u32) -> bool {
        let mut state = self.lock();
        while state.error.is_none() && state.opened < round {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.error.is_none()
    }

    /// Notes that a stream ended a round, and waits for the others. False: the pool is over.
    fn barrier(&self, index: u32, round: u32, received: RoundReceived) -> bool {
        let mut state = self.lock();
        let total = state.totals.entry(round).or_default();
        total.pages += received.pages;
        total.bytes += received.bytes;
        state.totals = state.totals.split_off(&round.saturating_sub(TOTALS));
        if let Some(progress) = state.progress.get_mut(&index) {
            progress.round = round;
        }
        self.changed.notify_all();
        while state.error.is_none() && !self.all_passed(&state, round) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.error.is_none()
    }
}

/// One thread's stream and memory.
struct StreamReceiver {
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
    fn new(stream: PageStream, shared: Arc<Shared>) -> Self {
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

    fn serve(mut self) {
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
