//! One thread of the sending end: reads a piece of a round, leaves out or marks what is zero,
//! encodes the rest, writes a batch; ends the round on its stream with a barrier.
//!
//! What the piece is, and what becomes of an error, is the pool's business ([`super::send`]).

use std::io::IoSlice;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};

use super::address::{PAGE_SIZE, PageRange, SpaceId};
use super::batch::{BatchHeader, BatchKind, Encoding, Entry, HEADER_LEN, MAX_RUN};
use super::encode::{Encoder, is_zero};
use super::send::{Order, Outcome, PIECE, Round, SendCounters, SendError, SendOptions};
use crate::sys;
use crate::transport::{PageStream, TransportError};

/// One thread's stream and memory.
pub(super) struct StreamSender {
    stream: PageStream,
    counters: Arc<SendCounters>,
    encoder: Encoder,
    pages: Box<[u8]>,
    entries: Vec<Planned>,
    since: Instant,
    niceness: Niceness,
}

/// How nice a thread is that gives way to a workload: it gets a tenth of what that gets, if that wants it.
const GIVES_WAY: i32 = 10;

/// How nice this thread is (sched(7)).
#[derive(Default)]
struct Niceness {
    now: i32,
    /// Known once it was tried: who may not take back what it gave is never nice.
    may_take_back: Option<bool>,
}

impl Niceness {
    /// Only in the thread that it is of.
    fn set(&mut self, wanted: i32) {
        if wanted == self.now {
            return;
        }
        let may = || sys::be_nice(1).is_ok() && sys::be_nice(0).is_ok();
        if *self.may_take_back.get_or_insert_with(may) && sys::be_nice(wanted).is_ok() {
            self.now = wanted;
        }
    }
}

/// An entry and where its payload is.
struct Planned {
    entry: Entry,
    /// Offset of its pages in the piece.
    at: usize,
    encoded: std::ops::Range<usize>,
}

/// Tells the pool if a thread panicked (a reader of somebody else runs in it).
struct Abandoned<'a>(&'a Sender<Result<Outcome, SendError>>);

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Nobody listens any more when the pool was dropped.
            let _ = self.0.send(Err(SendError::Failed));
        }
    }
}

impl StreamSender {
    pub(super) fn new(
        stream: PageStream,
        options: SendOptions,
        counters: Arc<SendCounters>,
    ) -> Self {
        let bytes = PIECE as usize * PAGE_SIZE;
        Self {
            stream,
            counters,
            encoder: Encoder::new(options.compression, bytes),
            pages: vec![0; bytes].into_boxed_slice(),
            entries: Vec::with_capacity(PIECE as usize),
            since: Instant::now(),
            niceness: Niceness::default(),
        }
    }

    /// Does what it is told and reports what came of it, until the pool is over.
    pub(super) fn serve(
        &mut self,
        inbox: &Receiver<Order>,
        report: &Sender<Result<Outcome, SendError>>,
    ) {
        let _abandoned = Abandoned(report);
        for order in inbox {
            let (outcome, last) = match order {
                Order::Round(round) => (self.round(&round), false),
                Order::Finish => (self.finish(), true),
            };
            // Nobody listens any more when the pool was dropped.
            if report.send(outcome).is_err() || last {
                return;
            }
        }
    }

    fn round(&mut self, round: &Round) -> Result<Outcome, SendError> {
        let mut outcome = Outcome::default();
        let mut piece = Vec::new();
        self.since = Instant::now();
        self.niceness.set(if round.gives_way { GIVES_WAY } else { 0 });
        while round.wants(self.stream.index()) && round.take(&mut piece) {
            self.read(round, &piece)?;
            self.plan(round, &piece, &mut outcome);
            if !self.entries.is_empty() {
                outcome.sent.wire_bytes += self.send(round.number, piece[0].space)?;
            }
        }
        let pages = outcome.sent.pages;
        outcome.sent.wire_bytes += self.mark(BatchKind::Barrier, round.number, pages)?;
        Ok(outcome)
    }

    fn finish(&mut self) -> Result<Outcome, SendError> {
        self.mark(BatchKind::End, 0, 0)?;
        self.stream.end_writing().map_err(|e| self.failed(e))?;
        Ok(Outcome::default())
    }

    fn read(&mut self, round: &Round, piece: &[PageRange]) -> Result<(), SendError> {
        let mut at = 0;
        for range in piece {
            let into = &mut self.pages[at..at + range.bytes()];
            round
                .reader
                .read(*range, into)
                .map_err(|source| SendError::Read { range: *range, source })?;
            at += range.bytes();
        }
        self.counters.read_bytes.fetch_add(at as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Fills `entries` with what must be sent of the piece that was read.
    fn plan(&mut self, round: &Round, piece: &[PageRange], outcome: &mut Outcome) {
        self.entries.clear();
        self.encoder.begin();
        let mut at = 0;
        for range in piece {
            let mut page = range.first;
            while page < range.end() {
                let longest = u64::from(MAX_RUN).min(range.end() - page);
                let bytes = &self.pages[at..at + longest as usize * PAGE_SIZE];
                let (zero, count) = run_of_likes(bytes);
                let run = PageRange::new(range.space, page, count);
                if zero {
                    self.plan_zero(round, run, outcome);
                } else {
                    self.plan_data(run, at, outcome);
                }
                page += count;
                at += run.bytes();
            }
        }
    }

    fn plan_zero(&mut self, round: &Round, run: PageRange, outcome: &mut Outcome) {
        self.counters.zero.fetch_add(run.count, Ordering::Relaxed);
        let mut page = run.first;
        while let Some(had) = round.sent.next_run(run.space, page, run.end() - page) {
            if had.space != run.space || had.first >= run.end() {
                return;
            }
            let had = PageRange::new(had.space, had.first, had.count.min(run.end() - had.first));
            outcome.zeroed.insert(had);
            outcome.sent.pages += had.count;
            let count = had.count as u16;
            let entry = Entry { first: had.first, length: 0, count, encoding: Encoding::Zero };
            self.entries.push(Planned { entry, at: 0, encoded: 0..0 });
            page = had.end();
            if page == run.end() {
                return;
            }
        }
    }

    fn plan_data(&mut self, run: PageRange, at: usize, outcome: &mut Outcome) {
        let (encoding, encoded) = self.encoder.run(&self.pages[at..at + run.bytes()]);
        let (counter, length) = match encoding {
            Encoding::Lz4 => (&self.counters.lz4, encoded.len()),
            Encoding::Zstd => (&self.counters.zstd, encoded.len()),
            Encoding::Raw | Encoding::Zero => (&self.counters.raw, run.bytes()),
        };
        counter.fetch_add(run.count, Ordering::Relaxed);
        outcome.stored.insert(run);
        outcome.sent.pages += run.count;
        let (length, count) = (length as u32, run.count as u16);
        let entry = Entry { first: run.first, length, count, encoding };
        self.entries.push(Planned { entry, at, encoded });
    }

    /// Writes one batch; gives its length.
    fn send(&mut self, round: u32, space: SpaceId) -> Result<u64, SendError> {
        let header = BatchHeader {
            kind: BatchKind::Pages,
            entries: self.entries.len() as u16,
            round,
            space,
            pages: self.entries.iter().map(|p| u64::from(p.entry.count)).sum(),
            payload: self.entries.iter().map(|p| p.entry.length).sum(),
        };
        let mut head = Vec::with_capacity(HEADER_LEN + header.table_len());
        head.extend_from_slice(&header.encode());
        self.entries.iter().for_each(|p| head.extend_from_slice(&p.entry.encode()));
        let wire = head.len() as u64 + u64::from(header.payload);
        let mut slices = vec![IoSlice::new(&head)];
        // Raw runs that lie side by side in the piece go out as one slice.
        let mut raw = 0..0;
        for planned in &self.entries {
            let length = planned.entry.length as usize;
            match planned.entry.encoding {
                Encoding::Zero => {}
                Encoding::Raw if raw.end == planned.at => raw.end += length,
                Encoding::Raw => {
                    push(&mut slices, &self.pages[raw]);
                    raw = planned.at..planned.at + length;
                }
                Encoding::Lz4 | Encoding::Zstd => {
                    push(&mut slices, &self.pages[raw]);
                    raw = 0..0;
                    slices.push(IoSlice::new(self.encoder.payload(planned.encoded.clone())));
                }
            }
        }
        push(&mut slices, &self.pages[raw]);
        let start = Instant::now();
        let written = self.stream.write_slices(&mut slices);
        written.map_err(|e| self.failed(e))?;
        let end = Instant::now();
        self.encoder.chooser.written(wire, end - start, end - self.since);
        self.since = end;
        self.counters.wire_bytes.fetch_add(wire, Ordering::Relaxed);
        let by_space = &self.counters.by_space;
        *by_space.lock().unwrap_or_else(PoisonError::into_inner).entry(space).or_default() += wire;
        Ok(wire)
    }

    /// Writes a batch without pages; gives its length.
    fn mark(&mut self, kind: BatchKind, round: u32, pages: u64) -> Result<u64, SendError> {
        let header = BatchHeader { kind, entries: 0, round, space: SpaceId(0), pages, payload: 0 };
        let bytes = header.encode();
        self.stream.write_all(&bytes).map_err(|e| self.failed(e))?;
        self.counters.wire_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes.len() as u64)
    }

    fn failed(&self, source: TransportError) -> SendError {
        match source {
            TransportError::Cancelled { .. } => SendError::Cancelled,
            source => SendError::Stream { index: self.stream.index(), source },
        }
    }
}

/// Whether the first page is zero, and how many pages from there on are like it.
fn run_of_likes(bytes: &[u8]) -> (bool, u64) {
    let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
    let mut pages = pages.iter().map(|page| is_zero(page));
    let first = pages.next().unwrap_or(false);
    (first, 1 + pages.take_while(|zero| *zero == first).count() as u64)
}

fn push<'a>(slices: &mut Vec<IoSlice<'a>>, bytes: &'a [u8]) {
    if !bytes.is_empty() {
        slices.push(IoSlice::new(bytes));
    }
}
