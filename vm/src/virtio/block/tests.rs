//! The block device as a driver meets it: every request, what bad ones get, and a model that random requests are
//! held against.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use decamp_shared::pages::PageSet;
use proptest::prelude::*;

use super::super::conformance::{Driver, conforms};
use super::*;
use crate::spec::DiskSpec;

const QUEUE: usize = 0;
const SECTORS: u64 = 64;
const OK: u8 = virtio::VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = virtio::VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = virtio::VIRTIO_BLK_S_UNSUPP as u8;
const FLUSH: u64 = 1 << virtio::VIRTIO_BLK_F_FLUSH;

/// A driver of a block device on a file of its own.
struct Bench {
    driver: Driver,
    disk: Arc<Disk>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn disk(dir: &tempfile::TempDir, readonly: bool) -> Arc<Disk> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let path = dir.path().join(format!("disk-{}", NUMBER.fetch_add(1, Ordering::SeqCst)));
    let content: Vec<u8> = (0..SECTORS * SECTOR).map(|at| (at / SECTOR) as u8 + 1).collect();
    fs::write(&path, content).expect("written");
    let disk = Disk::new(3, &DiskSpec { path, readonly, shared: false });
    disk.open(Duration::ZERO).expect("opened");
    Arc::new(disk)
}

impl Bench {
    fn new(readonly: bool, features: u64) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let disk = disk(&dir, readonly);
        let driver = Driver::of(Box::new(Block::new(disk.clone())));
        driver.start(features);
        Self { driver, path: disk.path(), disk, _dir: dir }
    }

    /// A request, with what comes back: status and data.
    fn ask(&self, kind: u32, sector: u64, data: &[u8], writable: usize) -> (u8, Vec<u8>) {
        self.request(&[&header(kind, sector), data], writable)
    }

    /// The same, however it is put.
    fn request(&self, readable: &[&[u8]], writable: usize) -> (u8, Vec<u8>) {
        let offer = self.driver.offer(QUEUE, readable, &[writable + 1]);
        self.driver.kick(QUEUE);
        let (head, length) = self.driver.take(QUEUE);
        assert_eq!(head, offer.head);
        let mut got = self.driver.written(&offer, writable as u32 + 1);
        let status = got.pop().expect("a status");
        // What is told to be written begins at the first byte.
        assert!(length as usize == writable + 1 || (length == 0 && status != OK && writable > 0));
        (status, got)
    }

    fn read(&self, sector: u64, sectors: usize) -> (u8, Vec<u8>) {
        self.request(&[&header(virtio::VIRTIO_BLK_T_IN, sector)], sectors * 512)
    }

    fn write(&self, sector: u64, data: &[u8]) -> u8 {
        self.ask(virtio::VIRTIO_BLK_T_OUT, sector, data, 0).0
    }

    fn ranges(&self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let row = |(sector, count, flags): &(u64, u32, u32)| {
            [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        self.ask(kind, 0, &ranges.iter().flat_map(row).collect::<Vec<_>>(), 0).0
    }

    fn content(&self) -> Vec<u8> {
        fs::read(&self.path).expect("read")
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

#[test]
fn it_is_a_virtio_device() {
    let dir = tempfile::tempdir().expect("directory");
    for readonly in [false, true] {
        conforms(|| Box::new(Block::new(disk(&dir, readonly))));
    }
}

#[test]
fn what_is_written_is_read_and_is_in_the_file() {
    let bench = Bench::new(false, FLUSH);
    assert_eq!(bench.read(2, 2), (OK, [[3; 512], [4; 512]].concat()));
    assert_eq!(bench.write(3, &[9; 1024]), OK);
    assert_eq!(bench.read(2, 4).1, [[3; 512], [9; 512], [9; 512], [6; 512]].concat());
    assert_eq!(bench.content()[3 * 512..5 * 512], [9; 1024]);
    assert_eq!(bench.ask(virtio::VIRTIO_BLK_T_FLUSH, 0, &[], 0), (OK, vec![]));
    let (status, name) = bench.ask(virtio::VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((status, &name[..6]), (OK, &b"disk3\0"[..]));
    assert_eq!(bench.read(0, 0), (OK, vec![]));
    assert_eq!(bench.write(SECTORS - 1, &[7; 512]), OK, "the last sector");
}

#[test]
fn what_is_out_of_bounds_or_unknown_is_answered_and_changes_nothing() {
    let bench = Bench::new(false, FLUSH);
    let before = bench.content();
    let (discard, zero) = (virtio::VIRTIO_BLK_T_DISCARD, virtio::VIRTIO_BLK_T_WRITE_ZEROES);
    for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(bench.read(sector, 2).0, IOERR, "{sector}");
        assert_eq!(bench.write(sector, &[1; 1024]), IOERR, "{sector}");
        for kind in [discard, zero] {
            assert_eq!(bench.ranges(kind, &[(0, 0, 0), (sector, 2, 0)]), IOERR, "{sector}");
            assert_eq!(bench.ranges(kind, &[(0, 8, 0), (sector, 2, 0)]), IOERR, "{sector}");
        }
    }
    assert_eq!(bench.write(0, &[1; 513]), IOERR);
    assert_eq!(bench.request(&[&header(virtio::VIRTIO_BLK_T_IN, 0)], 511).0, IOERR);
    assert_eq!(bench.request(&[&[0; 15]], 0).0, IOERR, "no whole header");
    assert_eq!(bench.request(&[], 512).0, IOERR, "no header at all");
    assert_eq!(bench.ask(virtio::VIRTIO_BLK_T_IN, 0, &[1; 512], 512).0, IOERR);
    for kind in [3, 5, 9, 12, virtio::VIRTIO_BLK_T_SECURE_ERASE, u32::MAX] {
        assert_eq!(bench.ask(kind, 0, &[0; 512], 0).0, UNSUPP, "{kind}");
    }
    assert_eq!(bench.ranges(discard, &[(0, 8, 1)]), UNSUPP);
    assert_eq!(bench.ranges(zero, &[(0, 8, 2)]), UNSUPP);
    assert_eq!(bench.ranges(zero, &[]), IOERR);
    assert_eq!(bench.ranges(zero, &[(0, 1, 0); 33]), IOERR);
    assert_eq!(bench.ranges(zero, &[(0, u32::MAX, 0)]), IOERR);
    assert_eq!(bench.ask(zero, 0, &[0; 17], 0).0, IOERR);
    assert_eq!(bench.content(), before);
    assert!(!bench.driver.needs_reset());
}

#[test]
fn a_request_without_room_for_its_status_breaks_the_device_alone() {
    let bench = Bench::new(false, FLUSH);
    let before = bench.content();
    bench.driver.offer(QUEUE, &[&header(virtio::VIRTIO_BLK_T_OUT, 0), &[1; 512]], &[]);
    bench.driver.kick(QUEUE);
    crate::testing::wait_for("the device to give up", || bench.driver.needs_reset());
    assert_eq!(bench.content(), before);
    bench.driver.start(FLUSH);
    assert_eq!(bench.read(0, 1).0, OK);
}

#[test]
fn buffers_may_be_cut_anywhere() {
    let bench = Bench::new(false, FLUSH);
    let whole = [header(virtio::VIRTIO_BLK_T_OUT, 5), vec![8; 1024]].concat();
    let parts: Vec<&[u8]> = vec![&whole[..3], &whole[3..20], &whole[20..21], &whole[21..]];
    assert_eq!(bench.driver.request(QUEUE, &parts, 1), [OK]);
    assert_eq!(bench.content()[5 * 512..7 * 512], [8; 1024]);
    let offer =
        bench.driver.offer(QUEUE, &[&header(virtio::VIRTIO_BLK_T_IN, 4)], &[1, 1500, 36, 0]);
    bench.driver.kick(QUEUE);
    let (_, length) = bench.driver.take(QUEUE);
    assert_eq!(length, 1537);
    let expected = [vec![5; 512], vec![8; 1024], vec![OK]].concat();
    assert_eq!(bench.driver.written(&offer, length), expected);
}

/// A vCPU that reads a register cannot be stopped before it has, and whoever pauses the device waits, too.
#[test]
fn who_waits_for_the_device_waits_for_one_request() {
    let bench = Bench::new(false, FLUSH);
    bench.driver.bus.pause();
    let shared = bench.driver.bus.shared(0);
    let work = || {
        let mut core = shared.lock();
        shared.work(&mut core, |device, io| device.on_queue(QUEUE, io));
        bench.driver.back(QUEUE)
    };
    for sector in 0..4 {
        let header = header(virtio::VIRTIO_BLK_T_OUT, sector);
        bench.driver.offer(QUEUE, &[&header, &[0xee; 512]], &[1]);
    }
    shared.waiting.any.fetch_add(1, Ordering::SeqCst);
    for done in 1..=2 {
        assert_eq!(work(), done);
        assert_eq!(bench.content()[done as usize * 512], done as u8 + 1, "not begun");
    }
    shared.waiting.any.fetch_sub(1, Ordering::SeqCst);
    // What was put back travels, or is done here.
    let there = bench.driver.moved_to(Box::new(Block::new(bench.disk.clone()))).expect("moved");
    there.bus.resume();
    crate::testing::wait_for("the rest", || there.back(QUEUE) == 4);
    assert_eq!(bench.content()[..4 * 512], [0xee; 4 * 512]);
    assert_eq!(bench.content()[4 * 512], 5);
}

/// Ranges that were begun are begun again: for who looks at the device once, for who pauses it always.
#[test]
fn a_long_request_is_put_off_and_not_forgotten() {
    let bench = Bench::new(false, FLUSH);
    bench.driver.bus.pause();
    let shared = bench.driver.bus.shared(0);
    let work = || {
        let mut core = shared.lock();
        shared.work(&mut core, |device, io| device.on_queue(QUEUE, io));
        bench.driver.back(QUEUE)
    };
    let offer = || {
        let range = |sector: u64| {
            [&sector.to_le_bytes()[..], &1u32.to_le_bytes(), &0u32.to_le_bytes()].concat()
        };
        let header = header(virtio::VIRTIO_BLK_T_DISCARD, 0);
        bench.driver.offer(QUEUE, &[&header, &range(8), &range(9)], &[1]);
    };
    offer();
    shared.waiting.any.fetch_add(1, Ordering::SeqCst);
    assert_eq!((work(), work()), (0, 1));
    offer();
    shared.waiting.to_pause.store(true, Ordering::SeqCst);
    assert_eq!((work(), work(), work()), (1, 1, 1));
    shared.waiting.to_pause.store(false, Ordering::SeqCst);
    shared.waiting.any.fetch_sub(1, Ordering::SeqCst);
    assert_eq!(work(), 2);
    assert!(!bench.driver.needs_reset());
}

#[test]
fn nobody_writes_a_disk_that_is_read_only() {
    let bench = Bench::new(true, FLUSH);
    assert_ne!(bench.driver.offered() & 1 << virtio::VIRTIO_BLK_F_RO, 0);
    let before = bench.content();
    assert_eq!(bench.read(0, 1), (OK, vec![1; 512]));
    assert_eq!(bench.write(0, &[1; 512]), IOERR);
    for kind in [virtio::VIRTIO_BLK_T_DISCARD, virtio::VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(bench.ranges(kind, &[(0, 1, 0)]), IOERR);
    }
    assert_eq!(bench.ask(virtio::VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
    assert_eq!(bench.content(), before);
}

#[test]
fn a_file_that_is_cut_costs_the_guest_errors_and_never_grows_again() {
    let bench = Bench::new(false, FLUSH);
    File::options().write(true).open(&bench.path).expect("open").set_len(4096).expect("cut");
    assert_eq!(bench.read(0, 8).0, OK);
    assert_eq!(bench.read(7, 2).0, IOERR);
    assert_eq!(bench.write(7, &[1; 1024]), IOERR);
    assert_eq!(bench.ranges(virtio::VIRTIO_BLK_T_WRITE_ZEROES, &[(7, 2, 1)]), IOERR);
    assert_eq!(bench.content().len(), 4096);
    bench.driver.bus.pause();
    assert!(bench.disk.check_size().is_err());
    bench.driver.bus.resume();
}

#[test]
fn what_is_discarded_takes_no_room() {
    use std::os::unix::fs::MetadataExt;
    let bench = Bench::new(false, FLUSH);
    let blocks = || fs::metadata(&bench.path).expect("there").blocks();
    let full = blocks();
    assert_eq!(bench.ranges(virtio::VIRTIO_BLK_T_DISCARD, &[(0, 16, 0), (32, 8, 0)]), OK);
    assert!(blocks() <= full - 24, "{} of {full}", blocks());
    assert_eq!(bench.read(0, 17).1, [vec![0; 16 * 512], vec![17; 512]].concat());
    assert_eq!(bench.ranges(virtio::VIRTIO_BLK_T_WRITE_ZEROES, &[(20, 1, 0), (22, 1, 1)]), OK);
    assert_eq!(bench.read(20, 3).1, [[0; 512], [22; 512], [0; 512]].concat());
    assert_eq!(bench.content().len() as u64, SECTORS * SECTOR);
}

#[test]
fn the_driver_says_whether_there_is_a_cache() {
    let wce = 1 << virtio::VIRTIO_BLK_F_CONFIG_WCE;
    let mut block = Block::new(Arc::new(Disk::new(0, &DiskSpec::default())));
    assert!(block.stores_at_once(0) && !block.stores_at_once(FLUSH));
    assert!(!block.stores_at_once(FLUSH | wce));
    block.write_config(WRITEBACK, &[0]);
    assert!(block.stores_at_once(FLUSH | wce) && !block.stores_at_once(FLUSH));
    assert_eq!(block.config()[WRITEBACK as usize], 0);
    block.reset();
    assert_eq!(block.config()[WRITEBACK as usize], 1);
    assert_eq!(block.config().len(), 60);
}

#[test]
fn a_disk_of_another_size_or_kind_does_not_take_over() {
    let dir = tempfile::tempdir().expect("directory");
    let state = Block::new(disk(&dir, false)).save();
    Block::new(disk(&dir, false)).load(&state, 0).expect("the same");
    assert!(Block::new(disk(&dir, true)).load(&state, 0).is_err(), "it was written");
    for capacity in [0, SECTORS - 1, SECTORS + 1, u64::MAX] {
        let mut other = state.clone();
        other[..8].copy_from_slice(&capacity.to_le_bytes());
        assert!(Block::new(disk(&dir, false)).load(&other, 0).is_err(), "{capacity}");
    }
    // One that is not open yet is as large as it says.
    let closed = Arc::new(Disk::new(0, &DiskSpec::default()));
    Block::new(closed.clone()).load(&state, 0).expect("loaded");
    assert_eq!(closed.bytes(), SECTORS * SECTOR);
}

/// Whoever harvests and then reads, over and over, has everything in the end: no write falls between a note that
/// was taken and the read that follows.
#[test]
fn no_write_is_lost_between_harvest_and_read() {
    let bench = Bench::new(false, FLUSH);
    bench.disk.track();
    let reader = File::from(bench.disk.descriptor(false).expect("a descriptor"));
    let mut copy = vec![0; (SECTORS * SECTOR) as usize];
    let harvest = |all: bool, copy: &mut Vec<u8>| {
        let mut set = PageSet::new();
        bench.disk.harvest(all, &mut set).expect("harvest");
        for range in set.ranges() {
            let at = range.first as usize * 4096;
            reader.read_exact_at(&mut copy[at..at + range.bytes()], at as u64).expect("read");
        }
        set.len()
    };
    harvest(true, &mut copy);
    let stop = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    let (disk, stop, writes) = (&bench.disk, &stop, &writes);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut bytes = vec![0; 3 * 512];
            let mut number = 0u64;
            while !stop.load(Ordering::SeqCst) {
                number += 1;
                bytes.fill(number as u8);
                let slice = unaliased(&mut bytes);
                disk.write(number * 7 % (SECTORS - 2) * SECTOR, &[slice]).expect("written");
                if number.is_multiple_of(5) {
                    disk.write_zeros(number % 50 * SECTOR, 512, number.is_multiple_of(2), &|| {
                        false
                    })
                    .expect("zeros");
                }
                writes.store(number, Ordering::SeqCst);
            }
        });
        // However the threads come to run: until they were at it together often enough.
        let began = std::time::Instant::now();
        let (mut rounds, mut many) = (0, 0);
        while began.elapsed() < Duration::from_millis(700) || rounds <= 20 || many <= 100 {
            rounds += harvest(false, &mut copy).min(1);
            many = writes.load(Ordering::SeqCst);
            if began.elapsed() > Duration::from_secs(120) {
                stop.store(true, Ordering::SeqCst);
                panic!("{rounds} rounds with anything, {many} writes");
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    harvest(false, &mut copy);
    assert!(copy == bench.content(), "the copy is not what the disk is");
}

/// The driver notices nothing: what it asks for while the device is held is done after, in the new file.
#[test]
fn a_disk_goes_over_to_another_file_between_two_requests() {
    let bench = Bench::new(false, FLUSH);
    let (disk, driver) = (&bench.disk, &bench.driver);
    let there = bench.path.with_extension("new");
    let file = File::options().read(true).write(true).create_new(true).open(&there).expect("made");
    let copy = file.try_clone().expect("a descriptor");
    disk.give_next(file, &there).expect("given");
    assert_eq!(copy.metadata().expect("there").len(), SECTORS * SECTOR);
    disk.track();
    let reader = File::from(disk.descriptor(false).expect("a descriptor"));
    let harvest = |all: bool| {
        let mut set = PageSet::new();
        disk.harvest(all, &mut set).expect("harvest");
        for range in set.ranges() {
            let (at, mut bytes) = (range.address(), vec![0; range.bytes()]);
            reader.read_exact_at(&mut bytes, at).expect("read");
            copy.write_all_at(&bytes, at).expect("written");
        }
    };
    harvest(true);
    for number in 0..64u8 {
        assert_eq!(bench.write(u64::from(number) * 7 % SECTORS, &[number ^ 0x55; 512]), OK);
        if number % 5 == 0 {
            harvest(false);
        }
    }
    assert!(!driver.bus.hold("another"));
    assert!(driver.bus.hold("it"));
    let text = disk.check_next().expect_err("not all was copied").to_string();
    assert!(text.contains("was written since"), "{text}");
    let back = driver.back(QUEUE);
    let offer = driver.offer(QUEUE, &[&header(virtio::VIRTIO_BLK_T_OUT, 3), &[0xab; 512]], &[1]);
    driver.kick(QUEUE);
    harvest(false);
    // As a guest that is reset does with all of its devices.
    driver.bus.pause();
    driver.bus.resume();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(driver.back(QUEUE), back, "it is held");
    disk.check_next().expect("it can go over");
    let old = bench.content();
    assert!(fs::read(&there).expect("read") == old, "they differ");
    disk.go_over();
    disk.stop_tracking();
    driver.bus.let_go_on();
    assert_eq!(driver.take(QUEUE).0, offer.head);
    assert_eq!(fs::read(&there).expect("read")[3 * 512..4 * 512], [0xab; 512]);
    assert!(bench.content() == old, "the old file is written");
    assert_eq!(bench.read(3, 1), (OK, vec![0xab; 512]));
    assert_eq!(disk.path(), there);
    crate::disk::lock::check(&there, false).expect_err("it is this VM's");
    crate::disk::lock::check(&bench.path, false).expect("it is nobody's");
}

fn unaliased(bytes: &mut [u8]) -> VolatileSlice<'_> {
    VolatileSlice::from(bytes)
}

#[derive(Clone, Debug)]
enum Op {
    Read(u64, usize),
    Write(u64, usize, u8),
    Discard(u64, u32),
    Zero(u64, u32, bool),
    Flush,
    Move,
}

fn op() -> impl Strategy<Value = Op> {
    let place = || 0..SECTORS + 2;
    prop_oneof![
        3 => (place(), 0usize..20).prop_map(|(at, count)| Op::Read(at, count)),
        4 => (place(), 0usize..20, 1u8..).prop_map(|(at, count, with)| Op::Write(at, count, with)),
        1 => (place(), 0u32..20).prop_map(|(at, count)| Op::Discard(at, count)),
        1 => (place(), 0u32..20, any::<bool>()).prop_map(|(at, count, unmap)| Op::Zero(at, count, unmap)),
        1 => Just(Op::Flush),
        1 => Just(Op::Move),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Random requests, with moves to another device on the same disk between them, against a plain array.
    #[test]
    fn it_does_what_a_disk_does(ops in prop::collection::vec(op(), 1..60)) {
        let mut bench = Bench::new(false, FLUSH);
        let mut model = bench.content();
        let bytes = |at: u64, count: usize| {
            let (start, length) = (at as usize * 512, count * 512);
            (at + count as u64 <= SECTORS).then_some(start..start + length)
        };
        for op in ops {
            match op {
                Op::Read(at, count) => {
                    let (status, data) = bench.read(at, count);
                    match bytes(at, count) {
                        Some(range) => prop_assert_eq!((status, &data[..]), (OK, &model[range])),
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Op::Write(at, count, with) => {
                    let status = bench.write(at, &vec![with; count * 512]);
                    match bytes(at, count) {
                        Some(range) => { model[range].fill(with); prop_assert_eq!(status, OK) }
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Op::Discard(at, count) => {
                    let status = bench.ranges(virtio::VIRTIO_BLK_T_DISCARD, &[(at, count, 0)]);
                    match bytes(at, count as usize) {
                        Some(range) => { model[range].fill(0); prop_assert_eq!(status, OK) }
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Op::Zero(at, count, unmap) => {
                    let range = [(at, count, unmap.into())];
                    let status = bench.ranges(virtio::VIRTIO_BLK_T_WRITE_ZEROES, &range);
                    match bytes(at, count as usize) {
                        Some(range) => { model[range].fill(0); prop_assert_eq!(status, OK) }
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Op::Flush => {
                    prop_assert_eq!(bench.ask(virtio::VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
                }
                Op::Move => {
                    let there = Box::new(Block::new(bench.disk.clone()));
                    bench.driver = bench.driver.moved_to(there).expect("moved");
                    bench.driver.bus.resume();
                }
            }
        }
        prop_assert_eq!(bench.content(), model);
    }
}
