//! The page engine as a whole, over real sockets: what arrives, what is refused, how it ends.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;

use super::batch::{BatchError, BatchHeader, BatchKind, Encoding, Entry, HEADER_LEN};
use super::receive::StreamError;
use super::*;
use crate::sys;
use crate::transport::testing::{stream_pairs, takes_less_than_a_second};
use crate::transport::{PageStream, Role, TransportError};
use crate::workload::{Result as WorkResult, SpaceInfo, WorkloadError};

const LIMIT: Duration = Duration::from_secs(60);
const A: SpaceId = SpaceId(0);
const B: SpaceId = SpaceId(9);

/// Memory of a few spaces, a memfd each, as keepers have it.
struct Memory(Vec<(SpaceId, u64, File)>);

impl Memory {
    fn new(spaces: &[(SpaceId, u64)]) -> Arc<Self> {
        let spaces = spaces.iter().map(|(space, pages)| {
            let file = File::from(memfd_create("pages", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
            file.set_len(pages * PAGE_SIZE as u64).expect("its length");
            (*space, *pages, file)
        });
        Arc::new(Self(spaces.collect()))
    }

    fn infos(&self) -> Vec<SpaceInfo> {
        let info = |(space, limit, _): &(SpaceId, u64, File)| SpaceInfo {
            id: space.0,
            page_limit: *limit,
            label: "test".into(),
            process: 0,
        };
        self.0.iter().map(info).collect()
    }

    fn file(&self, space: SpaceId) -> WorkResult<&File> {
        let found = self.0.iter().find(|(id, ..)| *id == space);
        found.map(|(.., file)| file).ok_or_else(|| WorkloadError::plain("No such space"))
    }

    fn bytes(&self, range: PageRange) -> Vec<u8> {
        let mut bytes = vec![0; range.bytes()];
        self.read(range, &mut bytes).expect("memory is readable");
        bytes
    }

    fn assert_equals(&self, other: &Self) {
        for (space, pages, _) in &self.0 {
            for page in 0..*pages {
                let range = PageRange::new(*space, page, 1);
                assert!(self.bytes(range) == other.bytes(range), "{range} differ");
            }
        }
    }
}

impl PageReader for Memory {
    fn read(&self, range: PageRange, into: &mut [u8]) -> WorkResult<()> {
        let file = self.file(range.space)?;
        file.read_exact_at(into, range.address()).map_err(|e| WorkloadError::new("Read", e))
    }

    fn take_missed(&self) -> PageSet {
        PageSet::new()
    }
}

impl PageWriter for Memory {
    fn write(&self, range: PageRange, bytes: &[u8]) -> WorkResult<()> {
        assert_eq!(bytes.len(), range.bytes());
        let file = self.file(range.space)?;
        file.write_all_at(bytes, range.address()).map_err(|e| WorkloadError::new("Write", e))
    }

    fn zero(&self, range: PageRange) -> WorkResult<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (at, length) = (range.address() as i64, range.bytes() as i64);
        fallocate(self.file(range.space)?, mode, at, length)
            .map_err(|e| WorkloadError::new("Punch", e))
    }
}

/// Both ends of `count` streams.
fn ends(encrypted: bool, count: u32) -> (Vec<PageStream>, Vec<PageStream>) {
    stream_pairs(Role::Page, encrypted, count).into_iter().unzip()
}

fn receiving(streams: Vec<PageStream>, into: &Arc<Memory>) -> ReceivePool {
    let pool = ReceivePool::new(streams.len() as u32);
    pool.open_round(u32::MAX, &into.infos(), into.clone());
    streams.into_iter().for_each(|stream| pool.add_stream(stream).expect("room for the stream"));
    pool
}

fn sending(streams: Vec<PageStream>, compression: Compression) -> SendPool {
    SendPool::start(streams, SendOptions { compression }).expect("threads")
}

fn noise(seed: u64, bytes: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
}

#[derive(Clone, Debug)]
enum Change {
    Zero,
    Text(u8),
    Noise(u64),
    Untouched,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        Just(Change::Zero),
        any::<u8>().prop_map(Change::Text),
        any::<u64>().prop_map(Change::Noise),
        Just(Change::Untouched),
    ]
}

fn apply(memory: &Memory, range: PageRange, change: &Change) {
    let mut bytes = vec![0; range.bytes()];
    match change {
        Change::Zero => {}
        Change::Text(seed) => {
            bytes.iter_mut().enumerate().for_each(|(i, b)| *b = seed.wrapping_add((i / 97) as u8));
        }
        Change::Noise(seed) => noise(*seed, &mut bytes),
        Change::Untouched => return,
    }
    memory.write(range, &bytes).expect("source written");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn after_each_round_the_destination_is_the_source(
        encrypted in any::<bool>(),
        streams in 1u32..4,
        gives_way in any::<bool>(),
        compression in prop::sample::select(vec![
            Compression::Auto, Compression::None, Compression::Lz4, Compression::Zstd,
        ]),
        rounds in prop::collection::vec(
            prop::collection::vec((any::<bool>(), 0u64..600, 1u64..200, change()), 0..12),
            1..5,
        ),
    ) {
        let spaces = [(A, 600), (B, 300)];
        let (source, destination) = (Memory::new(&spaces), Memory::new(&spaces));
        let (ours, theirs) = ends(encrypted, streams);
        let mut pool = sending(ours, compression);
        let incoming = receiving(theirs, &destination);
        let mut dirty_total = 0;
        let last = rounds.len();
        for (number, changes) in rounds.iter().enumerate() {
            let number = number as u32 + 1;
            let mut dirty = PageSet::new();
            for (second, first, count, change) in changes {
                let (space, limit) = spaces[usize::from(*second)];
                let first = first % limit;
                let range = PageRange::new(space, first, (*count).min(limit - first));
                apply(&source, range, change);
                dirty.insert(range);
            }
            dirty_total += dirty.len();
            pool.give_way(gives_way && number as usize != last);
            let sent = pool.round(number, source.clone(), &dirty).expect("sent");
            let received = incoming.wait_round(number, LIMIT).expect("received");
            prop_assert_eq!((sent.pages, sent.wire_bytes), (received.pages, received.bytes));
            source.assert_equals(&destination);
        }
        let counters = pool.counters();
        let parts = [&counters.zero, &counters.raw, &counters.lz4, &counters.zstd];
        let counted: u64 = parts.iter().map(|part| part.load(Relaxed)).sum();
        prop_assert_eq!(counted, dirty_total);
        prop_assert_eq!(counters.read_bytes.load(Relaxed), dirty_total * PAGE_SIZE as u64);
        pool.finish().expect("streams ended");
        incoming.finish(LIMIT).expect("streams ended");
    }
}

#[test]
fn zero_pages_are_left_out_until_they_must_be_said() {
    let spaces = [(A, 100)];
    let (source, destination) = (Memory::new(&spaces), Memory::new(&spaces));
    let (ours, theirs) = ends(false, 2);
    let mut pool = sending(ours, Compression::Auto);
    let incoming = receiving(theirs, &destination);
    let all: PageSet = [PageRange::new(A, 0, 100)].into_iter().collect();
    apply(&source, PageRange::new(A, 10, 5), &Change::Text(1));
    let mut round = |number| {
        let sent = pool.round(number, source.clone(), &all).expect("sent").pages;
        incoming.wait_round(number, LIMIT).expect("received");
        source.assert_equals(&destination);
        sent
    };
    assert_eq!(round(1), 5);
    apply(&source, PageRange::new(A, 0, 100), &Change::Zero);
    assert_eq!(round(2), 5, "markers for what the destination has, and no more");
    assert_eq!(round(3), 0, "what is zero there already needs no marker");
    assert_eq!(pool.counters().zero.load(Relaxed), 95 + 100 + 100);
}

#[test]
fn bytes_on_the_wire_are_told_apart_by_space() {
    let spaces = [(A, 100), (B, 100)];
    let (source, destination) = (Memory::new(&spaces), Memory::new(&spaces));
    let (ours, theirs) = ends(false, 1);
    let mut pool = sending(ours, Compression::None);
    let incoming = receiving(theirs, &destination);
    apply(&source, PageRange::new(A, 0, 10), &Change::Noise(1));
    apply(&source, PageRange::new(B, 50, 30), &Change::Noise(2));
    let all = [PageRange::new(A, 0, 100), PageRange::new(B, 0, 100)].into_iter().collect();
    let sent = pool.round(1, source.clone(), &all).expect("sent").wire_bytes;
    incoming.wait_round(1, LIMIT).expect("received");
    let of = |spaces: &[SpaceId]| pool.counters().wire_bytes_of(spaces);
    let content = |pages: u64| pages * PAGE_SIZE as u64;
    for (space, pages) in [(A, 10), (B, 30)] {
        assert!((content(pages)..content(pages + 1)).contains(&of(&[space])), "{space}");
    }
    assert_eq!(of(&[SpaceId(1)]), 0);
    // What is left is the barrier.
    assert_eq!(of(&[A, B]) + HEADER_LEN as u64, sent);
}

/// Reads nothing but zeros, and notes which threads did, and how nice they were.
struct Watched {
    seen: Mutex<BTreeSet<(String, i32)>>,
    changed: Condvar,
    /// How many threads are expected.
    threads: usize,
}

impl PageReader for Watched {
    fn read(&self, _: PageRange, into: &mut [u8]) -> WorkResult<()> {
        into.fill(0);
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        let mut seen = self.seen.lock().expect("no panic");
        seen.insert((name, sys::niceness().expect("a thread")));
        self.changed.notify_all();
        // So that whoever takes part gets some, however late it comes to run.
        let all = |seen: &mut BTreeSet<_>| seen.len() < self.threads;
        drop(self.changed.wait_timeout_while(seen, LIMIT, all).expect("no panic"));
        std::thread::sleep(Duration::from_millis(1));
        Ok(())
    }

    fn take_missed(&self) -> PageSet {
        PageSet::default()
    }
}

#[test]
fn a_running_workload_comes_before_those_who_copy_it() {
    const STREAMS: usize = 4;
    let memory = Memory::new(&[(A, 20_000)]);
    let (ours, theirs) = ends(false, STREAMS as u32);
    let mut pool = sending(ours, Compression::None);
    let incoming = receiving(theirs, &memory);
    let all: PageSet = [PageRange::new(A, 0, 20_000)].into_iter().collect();
    let half = (std::thread::available_parallelism().expect("known").get() / 2).max(1);
    // Who may not take it back is never nice.
    let may = sys::be_nice(1).is_ok() && sys::be_nice(0).is_ok();
    for (number, gives_way, threads) in [(1, true, half.min(STREAMS)), (2, false, STREAMS)] {
        let (seen, changed) = (Mutex::default(), Condvar::new());
        let reader = Arc::new(Watched { seen, changed, threads });
        pool.give_way(gives_way);
        pool.round(number, reader.clone(), &all).expect("sent");
        incoming.wait_round(number, LIMIT).expect("received");
        let seen = std::mem::take(&mut *reader.seen.lock().expect("no panic"));
        assert_eq!(seen.len(), threads, "{seen:?}");
        assert!(seen.iter().all(|(_, nice)| (*nice > 0) == (gives_way && may)), "{seen:?}");
    }
}

#[test]
fn spaces_can_grow_between_rounds() {
    let small = Memory::new(&[(A, 10)]);
    let large = Memory::new(&[(A, 10), (B, 20)]);
    let source = Memory::new(&[(A, 10), (B, 20)]);
    apply(&source, PageRange::new(A, 0, 10), &Change::Noise(1));
    apply(&source, PageRange::new(B, 0, 20), &Change::Noise(2));
    let (ours, theirs) = ends(true, 2);
    let mut pool = sending(ours, Compression::Auto);
    let incoming = receiving(theirs, &small);
    let first: PageSet = [PageRange::new(A, 0, 10)].into_iter().collect();
    let second: PageSet = [PageRange::new(B, 0, 20)].into_iter().collect();
    pool.round(1, source.clone(), &first).expect("sent");
    incoming.wait_round(1, LIMIT).expect("received");
    incoming.open_round(u32::MAX, &large.infos(), large.clone());
    pool.round(2, source.clone(), &second).expect("sent");
    assert_eq!(incoming.wait_round(2, LIMIT).expect("received").pages, 20);
    let ten = PageRange::new(A, 0, 10);
    let twenty = PageRange::new(B, 0, 20);
    assert!(small.bytes(ten) == source.bytes(ten) && large.bytes(twenty) == source.bytes(twenty));
    assert!(matches!(
        pool.round(4, source, &second),
        Err(SendError::RoundOrder { asked: 4, last: 2 })
    ));
}

/// Notes the order in which pages are written.
#[derive(Default)]
struct Notes(Mutex<Vec<u64>>);

impl PageWriter for Notes {
    fn write(&self, range: PageRange, _: &[u8]) -> WorkResult<()> {
        self.0.lock().expect("notes").push(range.first);
        Ok(())
    }
    fn zero(&self, range: PageRange) -> WorkResult<()> {
        self.write(range, &[])
    }
}

fn zero_batch(round: u32, page: u64) -> Vec<u8> {
    let entry = Entry { first: page, length: 0, count: 1, encoding: Encoding::Zero };
    batch(BatchHeader { round, ..pages_header() }, &[entry], &[])
}

fn mark(kind: BatchKind, round: u32, pages: u64) -> Vec<u8> {
    BatchHeader { kind, entries: 0, round, space: SpaceId(0), pages, payload: 0 }.encode().to_vec()
}

fn pages_header() -> BatchHeader {
    let kind = BatchKind::Pages;
    BatchHeader { kind, entries: 1, round: 1, space: A, pages: 1, payload: 0 }
}

fn batch(header: BatchHeader, entries: &[Entry], payload: &[u8]) -> Vec<u8> {
    let mut bytes = header.encode().to_vec();
    entries.iter().for_each(|entry| bytes.extend_from_slice(&entry.encode()));
    bytes.extend_from_slice(payload);
    bytes
}

#[test]
fn no_page_of_a_round_is_written_before_all_streams_ended_the_one_before() {
    let (mut ours, theirs) = ends(false, 2);
    let notes = Arc::new(Notes::default());
    let pool = ReceivePool::new(2);
    pool.open_round(u32::MAX, &Memory::new(&[(A, 10)]).infos(), notes.clone());
    theirs.into_iter().for_each(|stream| pool.add_stream(stream).expect("room"));
    let early = [zero_batch(1, 1), mark(BatchKind::Barrier, 1, 1), zero_batch(2, 7)].concat();
    ours[0].write_all(&early).expect("written");
    let begun = Instant::now();
    while notes.0.lock().expect("notes").is_empty() {
        assert!(begun.elapsed() < LIMIT, "no page of the first round comes");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Stream 0 is at its barrier now; the page behind it must not get through.
    assert!(matches!(
        pool.wait_round(1, Duration::from_millis(200)),
        Err(ReceiveError::Deadline { round: 1, .. })
    ));
    assert_eq!(*notes.0.lock().expect("notes"), [1]);
    ours[1]
        .write_all(&[zero_batch(1, 7), mark(BatchKind::Barrier, 1, 1)].concat())
        .expect("written");
    assert_eq!(pool.wait_round(1, LIMIT).expect("received").pages, 2);
    ours[0].write_all(&mark(BatchKind::Barrier, 2, 1)).expect("written");
    ours[1].write_all(&mark(BatchKind::Barrier, 2, 0)).expect("written");
    pool.wait_round(2, LIMIT).expect("received");
    assert_eq!(*notes.0.lock().expect("notes"), [1, 7, 7]);
}

/// Sends `bytes` to a pool that knows 100 pages of space 0; gives what the pool says.
fn refused(bytes: &[u8]) -> Arc<StreamError> {
    let (mut ours, theirs) = ends(false, 1);
    let pool = receiving(theirs, &Memory::new(&[(A, 100)]));
    ours[0].write_all(bytes).expect("written");
    // The test would wait this long only if the lie were believed.
    match pool.wait_round(3, LIMIT) {
        Err(ReceiveError::Stream { index: 0, source }) => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn batches_that_lie_are_refused() {
    let raw = Entry { first: 0, length: 4096, count: 1, encoding: Encoding::Raw };
    let header = BatchHeader { payload: 4096, ..pages_header() };
    let page = [1; 4096];
    macro_rules! refuses {
        ($bytes:expr, $pattern:pat) => {
            let error = refused(&$bytes);
            assert!(matches!(&*error, $pattern), "{error:?}");
        };
    }
    refuses!([0; 32], StreamError::Batch(BatchError::Magic));
    let foreign = BatchHeader { space: SpaceId(5), ..header };
    refuses!(batch(foreign, &[raw], &page), StreamError::UnknownSpace(SpaceId(5)));
    let beyond = Entry { first: 100, ..raw };
    refuses!(batch(header, &[beyond], &page), StreamError::Batch(BatchError::Beyond { .. }));
    let wrapping = Entry { first: u64::MAX, ..raw };
    refuses!(batch(header, &[wrapping], &page), StreamError::Batch(BatchError::Beyond { .. }));
    let many = BatchHeader { entries: u16::MAX, ..header };
    refuses!(many.encode(), StreamError::Batch(BatchError::Entries(u16::MAX)));
    let huge = BatchHeader { payload: u32::MAX, ..header };
    refuses!(huge.encode(), StreamError::Batch(BatchError::Payload(u32::MAX)));
    let short = BatchHeader { payload: 4095, ..header };
    refuses!(batch(short, &[raw], &page), StreamError::Batch(BatchError::Sum));
    let more = BatchHeader { pages: 2, ..header };
    refuses!(batch(more, &[raw], &page), StreamError::Batch(BatchError::Sum));
    let twice = BatchHeader { entries: 2, pages: 2, payload: 8192, ..header };
    refuses!(batch(twice, &[raw, raw], &page), StreamError::Batch(BatchError::Order(0)));
    for encoding in [Encoding::Lz4, Encoding::Zstd] {
        let header = BatchHeader { payload: 100, ..header };
        let entry = Entry { length: 100, encoding, ..raw };
        refuses!(batch(header, &[entry], &[0xee; 100]), StreamError::Decode(_));
    }
    let later = BatchHeader { round: 2, ..header };
    refuses!(batch(later, &[raw], &page), StreamError::Round { got: 2, wanted: 1 });
    refuses!(mark(BatchKind::Barrier, 2, 0), StreamError::Round { got: 2, wanted: 1 });
    refuses!(mark(BatchKind::Barrier, 1, 1), StreamError::Barrier { said: 1, came: 0 });
    let again = [mark(BatchKind::Barrier, 1, 0), mark(BatchKind::Barrier, 1, 0)].concat();
    refuses!(again, StreamError::Round { got: 1, wanted: 2 });
    let within = [zero_batch(1, 1), mark(BatchKind::End, 0, 0)].concat();
    refuses!(within, StreamError::EndWithinRound(1));
    let after = [mark(BatchKind::End, 0, 0), mark(BatchKind::End, 0, 0)].concat();
    refuses!(after, StreamError::AfterEnd);
}

#[test]
fn a_stream_ahead_of_the_destination_waits_until_the_round_is_let_in() {
    let (mut ours, theirs) = ends(false, 1);
    let notes = Arc::new(Notes::default());
    let pool = ReceivePool::new(1);
    theirs.into_iter().for_each(|stream| pool.add_stream(stream).expect("room"));
    let early = [zero_batch(1, 1), mark(BatchKind::Barrier, 1, 1), zero_batch(2, 7)].concat();
    ours[0].write_all(&[early, mark(BatchKind::Barrier, 2, 1)].concat()).expect("written");
    let little = Duration::from_millis(100);
    assert!(matches!(pool.wait_round(1, little), Err(ReceiveError::Deadline { .. })));
    assert!(notes.0.lock().expect("notes").is_empty());
    let spaces = Memory::new(&[(A, 10)]).infos();
    pool.open_round(1, &spaces, notes.clone());
    pool.wait_round(1, LIMIT).expect("received");
    assert!(matches!(pool.wait_round(2, little), Err(ReceiveError::Deadline { .. })));
    assert_eq!(*notes.0.lock().expect("notes"), [1]);
    pool.open_round(2, &spaces, notes.clone());
    pool.wait_round(2, LIMIT).expect("received");
    assert_eq!(*notes.0.lock().expect("notes"), [1, 7]);
    // A pool that is given up does not leave a stream waiting.
    ours[0].write_all(&zero_batch(3, 1)).expect("written");
    let start = Instant::now();
    drop(pool);
    // A stream that was waited for would stall for 30 s.
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn streams_have_their_numbers_once() {
    let (_ours, theirs) = ends(false, 3);
    let pool = ReceivePool::new(2);
    let (_again, twice) = ends(false, 1);
    let results: Vec<_> =
        theirs.into_iter().chain(twice).map(|stream| pool.add_stream(stream).is_ok()).collect();
    assert_eq!(results, [true, true, false, false]);
    assert!(matches!(
        SendPool::start(Vec::new(), SendOptions::default()),
        Err(SendError::NoStreams)
    ));
}

#[test]
fn a_stream_cut_in_the_middle_is_an_error_on_both_ends() {
    for encrypted in [true, false] {
        let whole = [zero_batch(1, 1), zero_batch(1, 2)].concat();
        for length in [0, 10, 32, 40, 48, 60] {
            let (mut ours, theirs) = ends(encrypted, 2);
            let pool = receiving(theirs, &Memory::new(&[(A, 100)]));
            ours[1].write_all(&whole[..length]).expect("written");
            drop(ours);
            match pool.wait_round(1, LIMIT) {
                Err(ReceiveError::Stream { source, .. }) => assert!(
                    matches!(*source, StreamError::Transport(TransportError::Ended { .. })),
                    "{source:?} after {length} bytes"
                ),
                other => panic!("{other:?}"),
            }
        }
        let memory = Memory::new(&[(A, 20_000)]);
        apply(&memory, PageRange::new(A, 0, 20_000), &Change::Noise(3));
        let all: PageSet = [PageRange::new(A, 0, 20_000)].into_iter().collect();
        let (ours, mut theirs) = ends(encrypted, 2);
        theirs.pop();
        let mut pool = sending(ours, Compression::None);
        let error = pool.round(1, memory.clone(), &all).expect_err("stream 1 is gone");
        assert!(matches!(error, SendError::Stream { index: 1, .. }), "{error:?}");
        assert!(matches!(pool.round(1, memory, &all), Err(SendError::Failed)));
    }
}

#[test]
fn cancelling_ends_everything_within_a_second() {
    for encrypted in [true, false] {
        let memory = Memory::new(&[(A, 20_000)]);
        apply(&memory, PageRange::new(A, 0, 20_000), &Change::Noise(4));
        let all: PageSet = [PageRange::new(A, 0, 20_000)].into_iter().collect();
        // Nobody reads at the other end, so the round blocks in the sockets.
        takes_less_than_a_second(|| {
            let (ours, theirs) = ends(encrypted, 2);
            let mut pool = sending(ours, Compression::None);
            let canceller = pool.canceller();
            let (memory, all) = (memory.clone(), all.clone());
            let blocked = std::thread::spawn(move || pool.round(1, memory, &all));
            std::thread::sleep(Duration::from_millis(200));
            assert!(!blocked.is_finished());
            let start = Instant::now();
            canceller.cancel();
            let result = blocked.join().expect("the round's thread");
            let took = start.elapsed();
            assert!(matches!(result, Err(SendError::Cancelled)), "{result:?}");
            drop(theirs);
            took
        });
        takes_less_than_a_second(|| {
            let (ours, theirs) = ends(encrypted, 2);
            let pool = receiving(theirs, &Memory::new(&[(A, 1)]));
            let canceller = pool.canceller();
            let waiting = std::thread::spawn(move || pool.wait_round(1, LIMIT));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waiting.is_finished());
            let start = Instant::now();
            canceller.cancel();
            let result = waiting.join().expect("the waiting thread");
            let took = start.elapsed();
            assert!(matches!(result, Err(ReceiveError::Cancelled)), "{result:?}");
            drop(ours);
            took
        });
    }
}

/// Fails, or panics, at page 5.
struct Faulty(bool);

impl PageReader for Faulty {
    fn read(&self, range: PageRange, _: &mut [u8]) -> WorkResult<()> {
        assert!(!self.0, "a reader that panics, as the test wants it");
        Err(WorkloadError::plain(format!("No memory at {range}")))
    }

    fn take_missed(&self) -> PageSet {
        PageSet::new()
    }
}

#[test]
fn memory_that_cannot_be_read_or_written_is_an_error() {
    let some: PageSet = [PageRange::new(A, 5, 1)].into_iter().collect();
    let (ours, _theirs) = ends(false, 2);
    let mut pool = sending(ours, Compression::Auto);
    let error = pool.round(1, Arc::new(Faulty(false)), &some).expect_err("unreadable");
    assert!(matches!(error, SendError::Read { range, .. } if range.first == 5), "{error:?}");
    let (ours, _theirs) = ends(false, 2);
    let mut pool = sending(ours, Compression::Auto);
    let error = pool.round(1, Arc::new(Faulty(true)), &some).expect_err("a panic");
    assert!(matches!(error, SendError::Failed | SendError::Stream { .. }), "{error:?}");

    let (mut ours, theirs) = ends(false, 1);
    let pool = ReceivePool::new(1);
    // The pool believes in space B, the writer does not.
    let wrong = Memory::new(&[(B, 10)]);
    pool.open_round(u32::MAX, &wrong.infos(), Memory::new(&[(A, 10)]));
    theirs.into_iter().for_each(|stream| pool.add_stream(stream).expect("room"));
    let entry = Entry { first: 1, length: 0, count: 1, encoding: Encoding::Zero };
    ours[0]
        .write_all(&batch(BatchHeader { space: B, ..pages_header() }, &[entry], &[]))
        .expect("sent");
    match pool.wait_round(1, LIMIT) {
        Err(ReceiveError::Stream { source, .. }) => {
            assert!(matches!(*source, StreamError::Write(_)), "{source:?}");
        }
        other => panic!("{other:?}"),
    }
}

/// Prints rates over loopback. `cargo test --release -p decamp-shared -- --ignored --nocapture rates`
#[test]
#[ignore = "a measurement; needs a release build and a quiet machine"]
fn rates() {
    let page = [0u8; PAGE_SIZE];
    let start = Instant::now();
    let scans = 2_000_000;
    let zeros = (0..scans).filter(|_| super::encode::is_zero(std::hint::black_box(&page))).count();
    assert_eq!(zeros, scans);
    let gigabytes = (scans * PAGE_SIZE) as f64 / 1e9;
    println!("zero detection: {:.1} GB/s", gigabytes / start.elapsed().as_secs_f64());

    let pages = (1u64 << 30) / PAGE_SIZE as u64;
    let all: PageSet = [PageRange::new(A, 0, pages)].into_iter().collect();
    let (source, destination) = (Memory::new(&[(A, pages)]), Memory::new(&[(A, pages)]));
    for first in (0..pages).step_by(1024) {
        let range = PageRange::new(A, first, 1024);
        apply(&source, range, &Change::Noise(first + 1));
        apply(&destination, range, &Change::Noise(first + 2));
    }
    for compression in [Compression::None, Compression::Auto] {
        for encrypted in [false, true] {
            for streams in [1, 2, 4] {
                let (ours, theirs) = ends(encrypted, streams);
                let mut pool = sending(ours, compression);
                let incoming = receiving(theirs, &destination);
                let rates: Vec<String> = (1..=4)
                    .map(|round| {
                        let start = Instant::now();
                        pool.round(round, source.clone(), &all).expect("sent");
                        incoming.wait_round(round, LIMIT).expect("received");
                        format!("{:.2}", 1.073_741_824 / start.elapsed().as_secs_f64())
                    })
                    .collect();
                let (raw, lz4) = (&pool.counters().raw, &pool.counters().lz4);
                println!(
                    "{compression:?}, {}, {streams} streams: {} GB/s (raw {}, lz4 {})",
                    if encrypted { "TLS" } else { "plain" },
                    rates.join(" "),
                    raw.load(Relaxed),
                    lz4.load(Relaxed),
                );
            }
        }
    }
}
