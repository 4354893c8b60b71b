//! The sending end of the page engine: one thread a stream, all fed from one queue.
//!
//! A round is a set of pages. Threads take small pieces of it until there is none left; what they do
//! with a piece is [`super::sender`]'s business. Which pages exist and when a round is due is decided
//! elsewhere.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::address::{PageRange, SpaceId};
use super::choose::Compression;
use super::sender::StreamSender;
use super::{PageReader, PageSet};
use crate::transport::{Canceller, PageStream, TransportError};
use crate::workload::WorkloadError;

/// Pages that a thread takes from the queue at a time: 512 KiB stay in a core's own cache between
/// being read, encoded and written.
pub(super) const PIECE: u64 = 128;

/// How pages are sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendOptions {
    /// How they are compressed.
    pub compression: Compression,
}

/// What has been sent so far, over all streams and rounds. Grows only; for progress and report.
#[derive(Debug, Default)]
pub struct SendCounters {
    /// Pages found zero, whether left out or sent as a marker.
    pub zero: AtomicU64,
    /// Pages sent as a reference to content that the destination has.
    pub same: AtomicU64,
    /// Pages sent as a difference to the copy sent before.
    pub delta: AtomicU64,
    /// Pages sent in LZ4 blocks.
    pub lz4: AtomicU64,
    /// Pages sent in zstd frames.
    pub zstd: AtomicU64,
    /// Pages sent as they are.
    pub raw: AtomicU64,
    /// Bytes of batches, headers included, TLS not.
    pub wire_bytes: AtomicU64,
    /// Of those, the bytes of batches with pages of each space.
    pub(super) by_space: Mutex<BTreeMap<SpaceId, u64>>,
    /// Bytes read from the workload.
    pub read_bytes: AtomicU64,
}

impl SendCounters {
    /// Of `wire_bytes`, the bytes of batches with pages of these spaces.
    pub fn wire_bytes_of(&self, spaces: &[SpaceId]) -> u64 {
        let by_space = self.by_space.lock().unwrap_or_else(PoisonError::into_inner);
        spaces.iter().filter_map(|space| by_space.get(space)).sum()
    }
}

/// What one round came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundSent {
    /// Pages in batches, zero markers included. The barriers say the same number.
    pub pages: u64,
    /// Bytes of batches, headers included, TLS not.
    pub wire_bytes: u64,
}

/// Why pages could not be sent. The pool is of no more use after any of these.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// A stream failed.
    #[error("Page stream {index} failed")]
    Stream {
        /// Which.
        index: u32,
        /// How.
        #[source]
        source: TransportError,
    },
    /// The workload's memory could not be read.
    #[error("Could not read {range}")]
    Read {
        /// Which pages.
        range: PageRange,
        /// Why not.
        #[source]
        source: WorkloadError,
    },
    /// A thread could not be started.
    #[error("Could not start the thread of page stream {index}")]
    Thread {
        /// Which.
        index: u32,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Rounds are numbered from 1 without gaps.
    #[error("Round {asked} cannot follow round {last}")]
    RoundOrder {
        /// What was asked for.
        asked: u32,
        /// The round before.
        last: u32,
    },
    /// Cancelled from this side.
    #[error("Sending pages was cancelled")]
    Cancelled,
    /// An earlier round failed, or a thread panicked.
    #[error("The page streams have failed before")]
    Failed,
    /// There is nothing to send on.
    #[error("There are no page streams")]
    NoStreams,
}

/// Threads that send pages, one a stream.
#[derive(Debug)]
pub struct SendPool {
    workers: Vec<Worker>,
    outcomes: Receiver<Result<Outcome, SendError>>,
    counters: Arc<SendCounters>,
    canceller: SendCanceller,
    sent: Arc<PageSet>,
    round: u32,
    gives_way: bool,
    failed: bool,
}

#[derive(Debug)]
struct Worker {
    orders: Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

/// Cancels all streams of a pool, from any thread.
#[derive(Clone, Debug)]
pub struct SendCanceller {
    cancelled: Arc<AtomicBool>,
    streams: Arc<[Canceller]>,
}

impl SendCanceller {
    /// Makes the round under way, and every later one, end with [`SendError::Cancelled`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        self.streams.iter().for_each(Canceller::cancel);
    }
}

pub(super) enum Order {
    Round(Arc<Round>),
    Finish,
}

/// What one thread did of a round, or of the end (everything zero then).
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) sent: RoundSent,
    /// Pages that the destination now has with content other than zero.
    pub(super) stored: PageSet,
    /// Pages that it had and that are zero again.
    pub(super) zeroed: PageSet,
}

/// One round as all threads share it.
pub(super) struct Round {
    pub(super) number: u32,
    pub(super) reader: Arc<dyn PageReader>,
    pages: PageSet,
    /// Pages that the destination has from earlier rounds.
    pub(super) sent: Arc<PageSet>,
    at: Mutex<(SpaceId, u64)>,
    stop: AtomicBool,
    /// Whether the workload runs meanwhile, and comes first.
    pub(super) gives_way: bool,
}

impl Round {
    /// Whether the thread of stream `index` takes part. Where the workload comes first it is left half of the
    /// processors, for each page that is sent costs its receiver as much, if not more.
    pub(super) fn wants(&self, index: u32) -> bool {
        !self.gives_way || index < (processors() / 2).max(1)
    }

    /// Takes the next piece from the queue, all of one space; false when the queue is empty.
    pub(super) fn take(&self, piece: &mut Vec<PageRange>) -> bool {
        piece.clear();
        if self.stop.load(Ordering::Relaxed) {
            return false;
        }
        let mut at: MutexGuard<'_, _> = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left = PIECE;
        while left > 0 {
            match self.pages.next_run(at.0, at.1, left) {
                Some(run) if piece.last().is_none_or(|last| last.space == run.space) => {
                    *at = (run.space, run.end());
                    left -= run.count;
                    piece.push(run);
                }
                _ => break,
            }
        }
        !piece.is_empty()
    }
}

/// Processors that this process may use.
fn processors() -> u32 {
    std::thread::available_parallelism().map_or(1, |number| number.get() as u32)
}

impl SendPool {
    /// Starts a thread for each stream.
    ///
    /// # Errors
    /// When there are no streams, or a thread cannot be started.
    pub fn start(streams: Vec<PageStream>, options: SendOptions) -> Result<Self, SendError> {
        if streams.is_empty() {
            return Err(SendError::NoStreams);
        }
        let canceller = SendCanceller {
            cancelled: Arc::default(),
            streams: streams.iter().map(PageStream::canceller).collect(),
        };
        let counters = Arc::new(SendCounters::default());
        let (report, outcomes) = unbounded();
        let mut pool = Self {
            workers: Vec::with_capacity(streams.len()),
            outcomes,
            counters: counters.clone(),
            canceller,
            sent: Arc::default(),
            round: 0,
            gives_way: false,
            failed: false,
        };
        for stream in streams {
            let index = stream.index();
            let (orders, inbox) = bounded(1);
            let mut sender = StreamSender::new(stream, options, counters.clone());
            let report = report.clone();
            let thread = std::thread::Builder::new()
                .name(format!("send-{index}"))
                .spawn(move || sender.serve(&inbox, &report))
                .map_err(|source| SendError::Thread { index, source })?;
            pool.workers.push(Worker { orders, thread: Some(thread) });
        }
        Ok(pool)
    }

    /// Sends `pages` as round `round` (1 at first, then one more each time). Returns when all of it,
    /// barriers included, was handed to the sockets.
    ///
    /// Zero pages that were never sent are left out; those that the destination has are marked.
    ///
    /// # Errors
    /// The first thing that went wrong on any stream; all streams are cancelled then.
    pub fn round(
        &mut self,
        round: u32,
        reader: Arc<dyn PageReader>,
        pages: &PageSet,
    ) -> Result<RoundSent, SendError> {
        if round != self.round + 1 {
            return Err(SendError::RoundOrder { asked: round, last: self.round });
        }
        let work = Arc::new(Round {
            number: round,
            reader,
            pages: pages.clone(),
            sent: self.sent.clone(),
            at: Mutex::default(),
            stop: AtomicBool::new(false),
            gives_way: self.gives_way,
        });
        let outcomes = self.order(|| Order::Round(work.clone()), Some(&work))?;
        drop(work);
        self.round = round;
        let mut total = RoundSent::default();
        // Alone with it by now: the round that shared it is gone.
        let sent = Arc::make_mut(&mut self.sent);
        for outcome in outcomes {
            sent.union(&outcome.stored);
            sent.subtract(&outcome.zeroed);
            total.pages += outcome.sent.pages;
            total.wire_bytes += outcome.sent.wire_bytes;
        }
        Ok(total)
    }

    /// Whether the workload comes first in the rounds that follow: then they take longer where processors are
    /// few. Otherwise they are to be over as soon as can be.
    pub fn give_way(&mut self, gives_way: bool) {
        self.gives_way = gives_way;
    }

    /// What was sent so far.
    pub fn counters(&self) -> Arc<SendCounters> {
        self.counters.clone()
    }

    /// A handle that cancels everything from another thread.
    pub fn canceller(&self) -> SendCanceller {
        self.canceller.clone()
    }

    /// Says on each stream that nothing more comes, and ends the threads.
    ///
    /// # Errors
    /// When that could not be said on every stream.
    pub fn finish(mut self) -> Result<(), SendError> {
        self.order(|| Order::Finish, None).map(drop)
    }

    /// Gives an order to all threads and awaits what came of it.
    fn order(
        &mut self,
        order: impl Fn() -> Order,
        round: Option<&Round>,
    ) -> Result<Vec<Outcome>, SendError> {
        if self.canceller.cancelled.load(Ordering::SeqCst) && !self.failed {
            self.failed = true;
            return Err(SendError::Cancelled);
        }
        if self.failed {
            return Err(SendError::Failed);
        }
        let mut outcomes = Vec::with_capacity(self.workers.len());
        let mut first_error = None;
        let told = self.workers.iter().filter(|w| w.orders.send(order()).is_ok()).count();
        for _ in 0..told {
            match self.outcomes.recv() {
                Ok(Ok(outcome)) => outcomes.push(outcome),
                Ok(Err(error)) if first_error.is_none() => {
                    let cancelled = self.canceller.cancelled.load(Ordering::SeqCst);
                    first_error = Some(if cancelled { SendError::Cancelled } else { error });
                    if let Some(round) = round {
                        round.stop.store(true, Ordering::Relaxed);
                    }
                    self.canceller.streams.iter().for_each(Canceller::cancel);
                }
                Ok(Err(_)) => {}
                Err(_) => break,
            }
        }
        if outcomes.len() == self.workers.len() {
            return Ok(outcomes);
        }
        self.failed = true;
        Err(first_error.unwrap_or(SendError::Failed))
    }
}

impl Drop for SendPool {
    fn drop(&mut self) {
        let finished = !self.failed
            && self.workers.iter().all(|w| w.thread.as_ref().is_none_or(JoinHandle::is_finished));
        if !finished {
            self.canceller.streams.iter().for_each(Canceller::cancel);
        }
        for worker in &mut self.workers {
            // A closed inbox ends a thread that waits for an order.
            worker.orders = bounded(0).0;
            if let Some(thread) = worker.thread.take() {
                // A thread that panicked has reported nothing, and was counted as failed.
                let _ = thread.join();
            }
        }
    }
}
