//! The receiving end of the page engine: one thread a stream, held together by rounds.
//!
//! A thread that has reached the end of a round waits until every stream has, so no page of one
//! round is written after a page of the next; a stream that fails or lies ends the whole pool. What
//! a thread does with a batch is [`super::receiver`]'s business. Who may send, and what spaces there
//! are, is decided elsewhere.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::PageWriter;
use super::address::SpaceId;
pub use super::receiver::StreamError;
use super::receiver::StreamReceiver;
use crate::transport::{Canceller, PageStream};
use crate::workload::SpaceInfo;

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
pub(super) struct Shared {
    streams: u32,
    state: Mutex<State>,
    pub(super) changed: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) spaces: Option<Arc<Spaces>>,
    /// The last round that was let in.
    opened: u32,
    /// For each stream that was added: the last round that it ended, and whether it ended itself.
    pub(super) progress: BTreeMap<u32, Progress>,
    cancellers: Vec<Canceller>,
    totals: BTreeMap<u32, RoundReceived>,
    error: Option<ReceiveError>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    round: u32,
    pub(super) ended: bool,
}

/// The spaces of a workload and where their pages go.
pub(super) struct Spaces {
    pub(super) limits: BTreeMap<SpaceId, u64>,
    pub(super) writer: Arc<dyn PageWriter>,
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
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the first error and ends all streams.
    pub(super) fn fail(&self, error: ReceiveError) {
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
    pub(super) fn opened(&self, round: u32) -> bool {
        let mut state = self.lock();
        while state.error.is_none() && state.opened < round {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.error.is_none()
    }

    /// Notes that a stream ended a round, and waits for the others. False: the pool is over.
    pub(super) fn barrier(&self, index: u32, round: u32, received: RoundReceived) -> bool {
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
