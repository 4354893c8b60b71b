//! A machine on the real `/dev/kvm`, running the tiny guest of [`crate::testing`].

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use decamp_shared::console::{KEPT, LogReader};
use decamp_shared::keeper::ExitRecord;
use decamp_shared::pages::{PageRange, PageReader};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{GUEST_MEMORY, discard};
use crate::reader::GuestReader;
use crate::spec::VsockSpec;
use crate::state::vm::VmState;
use crate::testing::{
    COUNTER, OTHERS, PATIENCE, WRITTEN, WRITTEN_PAGES, elf, guest_spec, wait_for,
};
use crate::vcpu::{Event, Reset};

/// A machine in a directory of its own.
struct Bench {
    machine: Machine,
    told: Arc<Mutex<Vec<Event>>>,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(boots: bool) -> Self {
        Self::with_cpus(1, boots)
    }

    fn with_cpus(cpus: u32, boots: bool) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let spec = VmSpec { cpus, ..guest_spec(dir.path()) };
        let console = ConsolePaths {
            log: dir.path().join("console.log"),
            socket: dir.path().join("console.sock"),
        };
        let told = Arc::new(Mutex::new(Vec::new()));
        let events = told.clone();
        let on_event: OnEvent = Arc::new(move |event| events.lock().expect("events").push(event));
        let machine = Machine::build(&spec, Outfit::own(&console, Vec::new()), on_event, boots)
            .expect("machine");
        Self { machine, told, dir }
    }

    /// What the guest did by itself since the last call.
    fn told(&self) -> Vec<Event> {
        std::mem::take(&mut *self.told.lock().expect("events"))
    }

    /// Types `bytes` and waits for what the guest does by itself then.
    fn type_and_see(&self, bytes: &[u8]) -> Vec<Event> {
        assert_eq!(self.machine.ports.serial().type_in(bytes), bytes.len());
        wait_for("the guest to do something", || !self.told.lock().expect("events").is_empty());
        self.told()
    }

    /// How far the other vCPUs have counted.
    fn others(&self) -> u32 {
        self.machine.memory().map().read_obj(GuestAddress(OTHERS)).expect("counter")
    }

    fn running() -> Self {
        let mut bench = Self::new(true);
        bench.machine.run().expect("run");
        bench.wait_for_count(1);
        bench
    }

    fn count(&self) -> u64 {
        let map = self.machine.memory().map();
        map.read_obj(GuestAddress(COUNTER)).expect("counter")
    }

    fn wait_for_count(&self, more_than: u64) {
        wait_for("the guest to count", || {
            assert_eq!(*self.told.lock().expect("events"), []);
            self.count() > more_than
        });
    }

    /// A fresh machine with this one's memory.
    fn destination(&self) -> Self {
        let other = Self::with_cpus(self.machine.vcpus.len() as u32, false);
        for (start, length) in self.machine.memory().ranges() {
            let mut bytes = vec![0u8; length as usize];
            let from = self.machine.memory().map();
            from.read_slice(&mut bytes, GuestAddress(start)).expect("copy out");
            let to = other.machine.memory().map();
            to.write_slice(&bytes, GuestAddress(start)).expect("copy in");
        }
        other
    }
}

#[test]
fn a_guest_boots_pauses_and_resumes() {
    let mut bench = Bench::running();
    bench.machine.pause().expect("pause");
    let stood = bench.count();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bench.count(), stood, "a paused guest stands still");
    bench.machine.resume().expect("resume");
    bench.wait_for_count(stood);
}

#[test]
fn a_guest_moves_into_a_fresh_machine_and_goes_on() {
    let mut source = Bench::running();
    source.machine.pause().expect("pause");
    let stood = source.count();
    let sections = source.machine.save().expect("save");
    let mut destination = source.destination();
    destination.machine.load(&sections).expect("load");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(destination.count(), stood, "a loaded guest has not run");
    destination.machine.run().expect("activate");
    destination.wait_for_count(stood + 100_000);
    destination.machine.pause().expect("pause");
    // Registers and memory went on together: the guest writes the pages in turn, so that each
    // holds one of the last 64 counts, and the count that belongs to its place.
    let now = destination.count();
    for place in 0..WRITTEN_PAGES {
        let address = GuestAddress(WRITTEN + place * 4096);
        let value: u64 = destination.machine.memory().map().read_obj(address).expect("page");
        assert!(value % WRITTEN_PAGES == place && value <= now && value + WRITTEN_PAGES >= now);
    }
    source.machine.resume().expect("the source rolls back");
    source.wait_for_count(stood);
}

#[test]
fn what_was_saved_loads_and_saves_the_same() {
    let mut source = Bench::running();
    source.machine.pause().expect("pause");
    let sections = source.machine.save().expect("save");
    let mut destination = source.destination();
    destination.machine.load(&sections).expect("load");
    let again = destination.machine.save().expect("save again");
    let find = |sections: &[Section], kind: &str| {
        sections.iter().find(|section| section.kind == kind).expect("section").clone()
    };
    assert_eq!(find(&sections, "serial"), find(&again, "serial"));
    let vm = |sections| {
        let mut state = VmState::decode(&find(sections, "vm")).expect("vm");
        // The clock ran on in between, and the timer's counts began when they were loaded.
        state.clock = ClockState::default();
        for channel in 0..3 {
            state.timer[channel * 24 + 16..channel * 24 + 24].fill(0);
        }
        state
    };
    assert_eq!(vm(&sections), vm(&again));
    let (before, after) = (find(&sections, "vcpu/0"), find(&again, "vcpu/0"));
    let before = VcpuState::decode(&before).expect("vcpu");
    let after = VcpuState::decode(&after).expect("vcpu");
    assert_eq!(before.differences(&after), Vec::<String>::new());
}

#[test]
fn time_goes_on_across_a_move() {
    let mut source = Bench::running();
    // Made before the stop, as ever.
    let mut destination = source.destination();
    source.machine.pause().expect("pause");
    let begun = Instant::now();
    let sections = source.machine.save().expect("save");
    let saved = VmState::decode(sections.last().expect("vm")).expect("vm").clock;
    std::thread::sleep(Duration::from_millis(200));
    destination.machine.load(&sections).expect("load");
    let here = ClockState::read(destination.machine.guest.vm()).expect("clock");
    let passed = Duration::from_nanos(here.nanoseconds - saved.nanoseconds);
    if saved.is_complete() {
        assert!(passed >= Duration::from_millis(200), "{passed:?}");
    }
    // No more than has passed out here, but for what clocks are corrected by.
    assert!(passed < begun.elapsed() + Duration::from_secs(1), "{passed:?}");
}

#[test]
fn the_dirty_log_has_what_the_guest_writes_and_no_more() {
    let mut bench = Bench::running();
    bench.wait_for_count(WRITTEN_PAGES);
    bench.machine.track().expect("track");
    let mut first = PageSet::new();
    bench.machine.harvest(&mut first).expect("first harvest");
    let mut populated = PageSet::new();
    bench.machine.memory().populated(&mut populated).expect("populated");
    assert_eq!(first, populated, "the first harvest is everything that exists");

    let stood = bench.count();
    bench.wait_for_count(stood + 10_000);
    let mut dirty = PageSet::new();
    bench.machine.harvest(&mut dirty).expect("harvest");
    let expected: PageSet = [
        PageRange::new(GUEST_MEMORY, COUNTER / 4096, 1),
        PageRange::new(GUEST_MEMORY, WRITTEN / 4096, WRITTEN_PAGES),
    ]
    .into_iter()
    .collect();
    // With nested paging the processor's walks count as writes to the guest's page tables.
    let tables: PageSet = [PageRange::new(GUEST_MEMORY, 0x10, 3)].into_iter().collect();
    dirty.subtract(&tables);
    assert_eq!(dirty, expected);

    bench.machine.pause().expect("pause");
    let mut last = PageSet::new();
    bench.machine.harvest(&mut last).expect("harvest while paused");
    let mut unexpected = last;
    unexpected.subtract(&expected);
    unexpected.subtract(&tables);
    assert!(unexpected.is_empty(), "{unexpected:?}");
    bench.machine.save().expect("save");
    let own = 0x70_0000;
    bench.machine.memory().map().write_obj(1u8, GuestAddress(own)).expect("the VMM writes");
    let mut tail = PageSet::new();
    bench.machine.harvest(&mut tail).expect("harvest after saving");
    assert!(tail.contains(GUEST_MEMORY, own / 4096), "the VMM's own write is found");
    assert_eq!(tail.len(), 1, "nothing else was written: {tail:?}");

    bench.machine.resume().expect("roll back");
    bench.machine.track().expect("track again");
    let mut again = PageSet::new();
    bench.machine.harvest(&mut again).expect("first harvest again");
    assert!(again.len() >= first.len(), "after a failed attempt everything counts again");
}

#[test]
fn a_page_written_between_harvests_is_never_lost() {
    // Each page holds the last count that was written into it. What a reader that follows the
    // harvests has must, once the guest stands and the last harvest is read, be what the guest has.
    let mut bench = Bench::running();
    bench.wait_for_count(WRITTEN_PAGES);
    bench.machine.track().expect("track");
    let map = bench.machine.memory().map().clone();
    let mut copy = std::collections::BTreeMap::new();
    let mut follow = |dirty: &PageSet| {
        for range in dirty.ranges() {
            for page in range.first..range.end() {
                let value: u64 = map.read_obj(GuestAddress(page * 4096)).expect("read");
                copy.insert(page, value);
            }
        }
    };
    for _ in 0..200 {
        let mut dirty = PageSet::new();
        bench.machine.harvest(&mut dirty).expect("harvest");
        follow(&dirty);
    }
    bench.machine.pause().expect("pause");
    let mut dirty = PageSet::new();
    bench.machine.harvest(&mut dirty).expect("last harvest");
    follow(&dirty);
    for page in WRITTEN / 4096..WRITTEN / 4096 + WRITTEN_PAGES {
        let now: u64 = map.read_obj(GuestAddress(page * 4096)).expect("read");
        assert_eq!(copy.get(&page), Some(&now), "page {page:#x}");
    }
}

#[test]
fn pages_given_back_do_not_travel_and_those_used_again_do() {
    let mut bench = Bench::running();
    bench.wait_for_count(WRITTEN_PAGES);
    let map = bench.machine.memory().map().clone();
    let (free, free_bytes) = (0x80_0000, 0x20_0000);
    let fill = || map.write_slice(&vec![0xd5; free_bytes as usize], GuestAddress(free));
    fill().expect("memory that is in use");
    discard(&map, free, free_bytes).expect("given back");
    let descriptor = bench.machine.memory().descriptor(false).expect("descriptor");
    let reader = GuestReader::new(descriptor, bench.machine.memory().page_limit());
    // Another host, which has what the harvests told it, as it was read when they did.
    let mut there = vec![0; 16 << 20];
    let mut with_contents = 0;
    let mut follow = |dirty: &PageSet| {
        for range in dirty.ranges() {
            let at = range.address() as usize;
            let page = &mut there[at..at + range.bytes()];
            reader.read(range, page).expect("read");
            with_contents += page.chunks(4096).filter(|page| **page != [0; 4096]).count();
        }
        std::mem::take(&mut with_contents)
    };
    bench.machine.track().expect("track");
    let mut first = PageSet::new();
    bench.machine.harvest(&mut first).expect("first harvest");
    let mut reported = first.clone();
    reported.intersect(&[PageRange::new(GUEST_MEMORY, free / 4096, 512)].into_iter().collect());
    assert!(reported.is_empty(), "pages that were given back are not even read: {reported:?}");
    assert!(follow(&first) < 200, "of 512 and those of the guest");

    // In use again, sent, given back after that.
    fill().expect("in use again");
    let mut dirty = PageSet::new();
    bench.machine.harvest(&mut dirty).expect("harvest");
    assert!(follow(&dirty) >= 512);
    discard(&map, free, free_bytes).expect("given back");
    let mut dirty = PageSet::new();
    bench.machine.harvest(&mut dirty).expect("harvest");
    assert!(dirty.contains(GUEST_MEMORY, free / 4096), "the other host has to forget them");
    assert!(follow(&dirty) <= WRITTEN_PAGES as usize + 4, "they are sent as zeros");

    // The guest writes again what is taken from it, all the time.
    for round in 0..300 {
        let page = round % (WRITTEN_PAGES - 1);
        discard(&map, WRITTEN + page * 4096, 8192).expect("given back");
        let mut dirty = PageSet::new();
        bench.machine.harvest(&mut dirty).expect("harvest");
        follow(&dirty);
    }
    bench.machine.pause().expect("pause");
    let mut dirty = PageSet::new();
    bench.machine.harvest(&mut dirty).expect("last harvest");
    follow(&dirty);
    let mut here = vec![0; 16 << 20];
    let all = PageRange::new(GUEST_MEMORY, 0, 4096);
    reader.read(all, &mut here).expect("read");
    let differs = (0..4096).find(|page| {
        let page = page * 4096..(page + 1) * 4096;
        here[page.clone()] != there[page]
    });
    assert_eq!(differs, None, "the first page that differs");
}

#[test]
fn a_throttled_guest_gets_its_share_and_recovers() {
    // By the thread's own processor time and sleeps, which say the same on a busy machine.
    let mut bench = Bench::running();
    let thread = bench.machine.vcpu_threads()[0];
    let observe = || {
        let proc = |file| std::fs::read_to_string(format!("/proc/self/task/{thread}/{file}"));
        let text = proc("schedstat").expect("schedstat");
        let nanoseconds = text.split(' ').next().and_then(|word| word.parse().ok());
        let text = proc("status").expect("status");
        let sleeps = text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let sleeps: Option<u64> = sleeps.and_then(|word| word.trim().parse().ok());
        (Duration::from_nanos(nanoseconds.expect("number")), sleeps.expect("number"))
    };
    // The share of a processor that it had, and how often it slept.
    let since = |(time, sleeps): (Duration, u64), start: Instant| {
        let (time_now, sleeps_now) = observe();
        let share = (time_now - time).as_secs_f64() / start.elapsed().as_secs_f64();
        (share, sleeps_now - sleeps)
    };
    bench.machine.throttle(80).expect("throttle");
    // On a busy machine it takes long to get to its naps.
    let (begun, mut seen, mut share) = (observe(), 0, 0.0);
    let start = Instant::now();
    wait_for("a guest that naps", || {
        (share, seen) = since(begun, start);
        start.elapsed() >= Duration::from_millis(400) && seen >= 5
    });
    assert!(share < 0.4, "{share} of a processor at a throttle of 80 percent, {seen} naps");
    bench.machine.throttle(0).expect("no throttle");
    let counted = bench.count();
    // A guest that is throttled naps all the time; one that is not may wait for something now and then.
    let fewest = (0..5).map(|_| {
        let (begun, start) = (observe(), Instant::now());
        std::thread::sleep(Duration::from_millis(400));
        since(begun, start).1
    });
    let fewest = fewest.min().expect("some");
    assert!(fewest < 5, "{fewest} naps without a throttle");
    bench.wait_for_count(counted);
    bench.machine.throttle(99).expect("throttle");
    bench.machine.pause().expect("a napping guest pauses");
}

#[test]
fn the_console_is_logged_and_typed_into_and_a_guest_switches_itself_off() {
    let bench = Bench::running();
    let mut client = UnixStream::connect(bench.dir.path().join("console.sock")).expect("connect");
    client.set_read_timeout(Some(PATIENCE)).expect("timeout");
    client.write_all(b"abc").expect("type");
    let mut seen = [0; 3];
    client.read_exact(&mut seen).expect("echo");
    assert_eq!(&seen, b"abc");
    let log = std::fs::read(bench.dir.path().join("console.log")).expect("log");
    assert_eq!(log, b"abc");
    client.write_all(b"q").expect("type");
    wait_for("the guest to end", || !bench.told.lock().expect("events").is_empty());
    let off = ExitRecord { status: 0, text: "powered off".into() };
    assert_eq!(bench.told(), [Event::Ended(off)]);
}

#[test]
fn a_guest_that_resets_itself_begins_anew() {
    let mut bench = Bench::running();
    assert_eq!(bench.type_and_see(b"xr"), [Event::Reset(Reset::Asked)]);
    let stood = bench.count();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bench.count(), stood, "it waits for its reset");
    bench.machine.memory().map().write_obj(7u64, GuestAddress(0x80_0000)).expect("write");
    bench.machine.reset_if_asked().expect("reset");
    bench.wait_for_count(1000);
    let left: u64 = bench.machine.memory().map().read_obj(GuestAddress(0x80_0000)).expect("read");
    assert_eq!(left, 0, "what it had is gone");
    // And it can do everything again.
    assert_eq!(bench.type_and_see(b"r"), [Event::Reset(Reset::Asked)]);
    bench.machine.reset_if_asked().expect("reset");
    bench.machine.reset_if_asked().expect("nobody asked again");
    bench.wait_for_count(1000);
    let off = ExitRecord { status: 0, text: "powered off".into() };
    assert_eq!(bench.type_and_see(b"q"), [Event::Ended(off)]);
    assert!(bench.machine.run().is_err(), "a guest that ended does not run");
    let log = std::fs::read(bench.dir.path().join("console.log")).expect("log");
    assert_eq!(log, b"x");
}

#[test]
fn a_reset_during_a_move_moves_what_the_guest_is_then() {
    let mut source = Bench::running();
    source.wait_for_count(WRITTEN_PAGES);
    source.machine.track().expect("track");
    let mut destination = Bench::new(false);
    let follow = |source: &mut Bench, destination: &Bench| {
        let mut dirty = PageSet::new();
        source.machine.harvest(&mut dirty).expect("harvest");
        let mut page = [0u8; 4096];
        for range in dirty.ranges() {
            for number in range.first..range.end() {
                let at = GuestAddress(number * 4096);
                source.machine.memory().map().read_slice(&mut page, at).expect("copy out");
                destination.machine.memory().map().write_slice(&page, at).expect("copy in");
            }
        }
    };
    follow(&mut source, &destination);
    let left = GuestAddress(0x80_0000);
    source.machine.memory().map().write_obj(7u64, left).expect("write");
    follow(&mut source, &destination);
    assert_eq!(source.type_and_see(b"r"), [Event::Reset(Reset::Asked)]);
    // Nobody got round to it before the pause.
    source.machine.pause().expect("pause");
    assert!(source.count() == 0, "it was reset, and has not run since");
    let sections = source.machine.save().expect("save");
    follow(&mut source, &destination);
    let gone: u64 = destination.machine.memory().map().read_obj(left).expect("read");
    assert_eq!(gone, 0, "pages that were emptied count as written");
    destination.machine.load(&sections).expect("load");
    destination.machine.run().expect("activate");
    destination.wait_for_count(1000);
    // What came can be reset here too.
    assert_eq!(destination.type_and_see(b"r"), [Event::Reset(Reset::Asked)]);
    destination.machine.reset_if_asked().expect("reset");
    destination.wait_for_count(1000);
    source.machine.resume().expect("roll back");
    source.wait_for_count(1000);
}

/// The destination's CPU is another one: what its empty machine had is not what the guest goes back to.
#[test]
fn a_guest_that_came_from_another_cpu_is_reset_as_what_it_is() {
    const ARCH_CAPABILITIES: u32 = 0x10a;
    const PERF_CAPABILITIES: u32 = 0x345;
    const PERF_GLOBAL_CTRL: u32 = 0x38f;
    const MISC_ENABLE: u32 = 0x1a0;
    let mut source = Bench::running();
    source.machine.pause().expect("pause");
    let sections = source.machine.save().expect("save");
    let mut destination = source.destination();
    let own = destination.machine.first.vcpus[0].clone();
    let altered = [ARCH_CAPABILITIES, PERF_CAPABILITIES, PERF_GLOBAL_CTRL, MISC_ENABLE];
    let altered = altered.map(|index| destination.machine.first.vcpus[0].flip_msr(index));
    assert!(altered.contains(&true), "this host lists none of them");
    destination.machine.load(&sections).expect("load");
    let first = &mut destination.machine.first.vcpus[0];
    assert_eq!(own.differences(first), Vec::<String>::new(), "the guest's CPU is the same");
    // What cannot be written once it has run is left alone.
    let features = destination.machine.host.features.clone();
    assert!(!features.is_empty(), "this KVM does not say what is a feature");
    let flipped = features.iter().filter(|index| first.flip_msr(**index)).count();
    assert!(flipped > 0, "this host keeps no register that is a feature");
    destination.machine.run().expect("activate");
    destination.wait_for_count(1000);
    assert_eq!(destination.type_and_see(b"r"), [Event::Reset(Reset::Asked)]);
    destination.machine.reset_if_asked().expect("reset");
    destination.wait_for_count(1000);
}

#[test]
fn a_reset_without_the_kernel_it_came_from_says_so() {
    let mut bench = Bench::running();
    std::fs::remove_file(bench.dir.path().join("guest.elf")).expect("remove");
    assert_eq!(bench.type_and_see(b"r"), [Event::Reset(Reset::Asked)]);
    let error = bench.machine.reset_if_asked().expect_err("no kernel").to_string();
    assert!(error.contains("guest.elf"), "{error}");
    assert!(bench.machine.pause().is_err(), "nor can it be moved");
    let error = bench.machine.reset_if_asked().expect_err("no kernel").to_string();
    assert!(error.contains("guest.elf"), "the reason is kept: {error}");
    assert!(bench.machine.run().is_err() && bench.machine.resume().is_err());
}

#[test]
fn several_vcpus_pause_move_and_are_reset_together() {
    let mut source = Bench::with_cpus(2, true);
    source.machine.run().expect("run");
    source.wait_for_count(1000);
    wait_for("the other vCPU", || source.others() > 0);
    source.machine.throttle(50).expect("throttle");
    let (count, others) = (source.count(), source.others());
    wait_for("both under a throttle", || source.count() > count && source.others() > others);
    source.machine.pause().expect("pause");
    assert!(source.machine.throttle.is_none(), "nobody kicks who stands");
    let (count, others) = (source.count(), source.others());
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((source.count(), source.others()), (count, others), "both stand");
    let sections = source.machine.save().expect("save");
    let offsets: Vec<_> = sections
        .iter()
        .filter(|section| section.kind.starts_with("vcpu/"))
        .map(|section| VcpuState::decode(section).expect("vcpu").tsc_offset())
        .collect();
    assert_eq!(offsets.len(), 2);
    let mut destination = source.destination();
    destination.machine.load(&sections).expect("load");
    destination.machine.run().expect("activate");
    destination.wait_for_count(count + 1000);
    wait_for("the other vCPU", || destination.others() > others);
    assert_eq!(destination.type_and_see(b"r"), [Event::Reset(Reset::Asked)]);
    destination.machine.reset_if_asked().expect("reset");
    destination.wait_for_count(1000);
    wait_for("the other vCPU", || destination.others() > 0);
    let off = ExitRecord { status: 0, text: "powered off".into() };
    assert_eq!(destination.type_and_see(b"q"), [Event::Ended(off)]);
    destination.machine.halt();
    let others = destination.others();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(destination.others(), others, "nothing of it runs on");
    source.machine.resume().expect("roll back");
    source.wait_for_count(count);
}

#[test]
fn nothing_of_a_guest_that_ended_runs_on() {
    let stands = |bench: &Bench| {
        std::thread::sleep(Duration::from_millis(20));
        let others = bench.others();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(bench.others(), others, "its other vCPU runs");
    };
    let running = || {
        let mut bench = Bench::with_cpus(2, true);
        bench.machine.run().expect("run");
        wait_for("the other vCPU", || bench.others() > 0);
        bench
    };
    // One that switched itself off is paused before anybody halted it.
    let mut bench = running();
    let off = ExitRecord { status: 0, text: "powered off".into() };
    assert_eq!(bench.type_and_see(b"q"), [Event::Ended(off)]);
    let error = bench.machine.pause().expect_err("it has ended").to_string();
    assert!(error.contains("powered off"), "{error}");
    stands(&bench);
    assert!(bench.machine.resume().is_err() && bench.machine.run().is_err());
    stands(&bench);
    // One that was halted while all of it could have run.
    let mut bench = running();
    bench.machine.halt();
    assert!(bench.machine.pause().is_err() && bench.machine.resume().is_err());
    stands(&bench);
    // One whose reset failed.
    let mut bench = running();
    std::fs::remove_file(bench.dir.path().join("guest.elf")).expect("remove");
    assert_eq!(bench.type_and_see(b"r"), [Event::Reset(Reset::Asked)]);
    assert!(bench.machine.pause().is_err() && bench.machine.resume().is_err());
    stands(&bench);
}

#[test]
fn a_vcpu_that_was_never_started_travels_as_such() {
    // The boot vCPU is paused before it starts anybody.
    let mut source = Bench::with_cpus(3, true);
    source.machine.pause().expect("pause");
    let sections = source.machine.save().expect("save");
    let mut destination = source.destination();
    destination.machine.load(&sections).expect("load");
    destination.machine.run().expect("activate");
    destination.wait_for_count(1000);
    wait_for("the others", || destination.others() > 0);
}

#[test]
fn typed_bytes_that_were_not_read_travel() {
    let mut source = Bench::running();
    source.machine.pause().expect("pause");
    source.machine.ports.serial().type_in(&[b'z'; 100]);
    let sections = source.machine.save().expect("save");
    let mut destination = source.destination();
    destination.machine.load(&sections).expect("load");
    destination.machine.run().expect("run");
    let log = destination.dir.path().join("console.log");
    wait_for("100 echoes", || std::fs::read(&log).expect("log") == [b'z'; 100]);
}

#[test]
fn what_is_typed_while_it_stands_is_for_when_it_runs() {
    let mut bench = Bench::running();
    let socket = bench.dir.path().join("console.sock");
    let mut client = UnixStream::connect(&socket).expect("connect");
    bench.machine.pause().expect("pause");
    let sections = bench.machine.save().expect("save");
    let mut destination = bench.destination();
    client.write_all(b"zz").expect("type");
    let Machine { ports, output, gate, .. } = &bench.machine;
    let keyboard = keyboard(ports, output, Typing::new().expect("typing"), gate);
    assert_eq!(keyboard(b"z"), 0, "it stands");
    let port = |sections: &[Section]| {
        sections.iter().find(|section| section.kind == "serial").expect("section").clone()
    };
    assert_eq!(port(&bench.machine.save().expect("save")), port(&sections));
    // As after a move that failed; the client need not type anything more.
    bench.machine.resume().expect("resume");
    assert_eq!(keyboard(b"z"), 1, "it runs");
    let log = bench.dir.path().join("console.log");
    wait_for("all echoes", || std::fs::read(&log).expect("log") == b"zzz");
    // Where it arrives, what was typed early is for when it runs there.
    let there = destination.dir.path().join("console.sock");
    UnixStream::connect(there).expect("connect").write_all(b"z").expect("type");
    destination.machine.load(&sections).expect("load");
    destination.machine.run().expect("run");
    let log = destination.dir.path().join("console.log");
    wait_for("an echo", || std::fs::read(&log).expect("log") == b"z");
}

/// The driver of the virtio device in `slot`, as far as it takes one to spoil its first queue.
struct Spoiler<'a> {
    bench: &'a Bench,
    slot: Slot,
}

impl Spoiler<'_> {
    /// Where the rings of its device are: in memory that the guest has no use for.
    fn rings(&self) -> u64 {
        0x80_0000 + (self.slot.address & 0xf_f000)
    }

    fn write(&self, offset: u64, value: u32) {
        let virtio = self.bench.machine.ports.virtio();
        assert!(virtio.write(self.slot.address + offset, &value.to_le_bytes()));
    }

    fn status(&self) -> u32 {
        let mut word = [0; 4];
        let virtio = self.bench.machine.ports.virtio();
        assert!(virtio.read(self.slot.address + 0x70, &mut word));
        u32::from_le_bytes(word)
    }

    fn is_broken(&self) -> bool {
        self.status() & 64 != 0
    }

    /// Resets the device and sets it up, its queues one after the other, 1024 bytes each.
    fn start(&self) {
        let memory = self.bench.machine.memory().map();
        memory.write_slice(&[0; 0x1000], GuestAddress(self.rings())).expect("rings");
        self.write(0x70, 0);
        self.write(0x70, 3);
        // VIRTIO_F_VERSION_1 alone.
        for (half, features) in [(0, 0), (1, 1)] {
            self.write(0x24, half);
            self.write(0x20, features);
        }
        self.write(0x70, 3 | 8);
        for queue in 0..4u32 {
            self.write(0x30, queue);
            self.write(0x38, 8);
            for (register, part) in [(0x80, 0), (0x90, 256), (0xa0, 512)] {
                self.write(register, self.rings() as u32 + queue * 1024 + part);
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
        }
        self.write(0x70, 3 | 8 | 4);
    }

    /// Says that `offered` chains wait in the first queue, and has the device look.
    fn offer(&self, offered: u16) {
        let memory = self.bench.machine.memory().map();
        memory.write_obj(offered, GuestAddress(self.rings() + 256 + 2)).expect("the ring");
        self.write(0x50, 0);
    }
}

#[test]
fn who_spoils_the_rings_of_a_device_loses_that_device_alone() {
    let mut bench = Bench::running();
    let slots = bench.machine.ports.virtio().slots();
    let spoilers: Vec<_> =
        slots.iter().map(|slot| Spoiler { bench: &bench, slot: *slot }).collect();
    spoilers.iter().for_each(Spoiler::start);
    assert!(!spoilers.iter().any(Spoiler::is_broken));
    for broken in 0..spoilers.len() {
        spoilers[broken].offer(0x7fff);
        wait_for("the device to give up", || spoilers[broken].is_broken());
        for (number, other) in spoilers.iter().enumerate() {
            assert_eq!(other.is_broken(), number == broken, "device {number}");
        }
        let stood = bench.count();
        bench.wait_for_count(stood + 10_000);
        spoilers[broken].start();
    }
    // The first gives random bytes, where another is broken too.
    let (rng, other) = (&spoilers[0], &spoilers[1]);
    other.offer(0x7fff);
    wait_for("the device to give up", || other.is_broken());
    let memory = bench.machine.memory().map();
    let buffer = GuestAddress(0x90_0000);
    let descriptor = [&buffer.0.to_le_bytes()[..], &[64, 0, 0, 0, 2, 0, 0, 0]].concat();
    memory.write_slice(&descriptor, GuestAddress(rng.rings())).expect("a descriptor");
    rng.offer(1);
    wait_for("random bytes", || memory.read_obj::<u64>(buffer).expect("read") != 0);
    drop(spoilers);
    // It travels as it is.
    bench.machine.pause().expect("pause");
    let sections = bench.machine.save().expect("save");
    let mut destination = bench.destination();
    destination.machine.load(&sections).expect("load");
    destination.machine.run().expect("run");
    let there: Vec<_> =
        slots.iter().map(|slot| Spoiler { bench: &destination, slot: *slot }).collect();
    let broken: Vec<_> = there.iter().map(Spoiler::is_broken).collect();
    assert_eq!(broken, [false, true, false]);
    there[1].start();
    assert!(!there[1].is_broken(), "a reset helps");
    let stood = destination.count();
    destination.wait_for_count(stood + 10_000);
}

/// Registers that only vCPU `number` has written, as far as its host's end is concerned.
fn use_register(bench: &Bench, number: usize, index: u32, value: u64) {
    let fd = bench.machine.vcpus[number].fd();
    let one = [msrs::Msr { index, value }];
    msrs::write(&fd, number as u32, &one, &bench.machine.host.msrs).expect("written");
}

#[test]
fn registers_are_read_from_all_vcpus_while_they_run_and_it_runs_on() {
    /// IA32_SYSENTER_CS.
    const SYSENTER_CS: u32 = 0x174;
    let mut bench = Bench::with_cpus(2, true);
    let fresh = bench.machine.registers().expect("as it stands");
    assert!(!fresh.used.contains(&SYSENTER_CS), "{fresh:x?}");
    assert!(fresh.told.iter().any(|one| one.index == 0x10a), "{fresh:x?}");
    use_register(&bench, 1, SYSENTER_CS, 8);
    bench.machine.run().expect("run");
    bench.wait_for_count(1);
    for _ in 0..100 {
        let stood = bench.count();
        let now = bench.machine.registers().expect("while it runs");
        assert!(now.used.contains(&SYSENTER_CS), "{now:x?}");
        assert_eq!(now.told, fresh.told);
        wait_for("the guest to count", || bench.count() > stood);
    }
    // One that naps lets visitors in too, and one that is parked. Who waits for the end of a nap waits for one of 20 ms
    // nearly every time.
    let visits = |machine: &Machine| {
        let visit = |_| {
            let begun = Instant::now();
            machine.registers().expect("let in");
            begun.elapsed()
        };
        let mut visits: Vec<_> = (0..100).map(visit).collect();
        visits.sort();
        visits
    };
    let (awake, naps) = (visits(&bench.machine), {
        bench.machine.throttle(99).expect("throttled");
        visits(&bench.machine)
    });
    assert!(naps[25] < awake[75] + Duration::from_millis(10), "{naps:?} and {awake:?}");
    bench.machine.throttle(0).expect("not throttled");
    bench.machine.pause().expect("pause");
    let stood = bench.count();
    assert!(bench.machine.registers().expect("as it stands").used.contains(&SYSENTER_CS));
    assert_eq!(bench.count(), stood, "it ran");
    bench.machine.resume().expect("resume");
    bench.wait_for_count(stood);
}

#[test]
fn visitors_and_who_stops_it_do_not_wait_for_each_other_for_ever() {
    let mut bench = Bench::running();
    let vcpus = bench.machine.vcpus.clone();
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let visitors: Vec<_> = (0..3)
        .map(|_| {
            let (vcpus, done) = (vcpus.clone(), done.clone());
            let map = bench.machine.memory().map().clone();
            std::thread::spawn(move || {
                let mut visits = 0;
                while !done.load(std::sync::atomic::Ordering::SeqCst) {
                    let count = || map.read_obj::<u64>(GuestAddress(COUNTER)).expect("counter");
                    let stood = count();
                    vcpus[0].visit(|fd| fd.get_tsc_khz()).expect("let in").expect("a number");
                    visits += 1;
                    // Who comes again at once, and all the time, has it stand.
                    wait_for("the guest to count", || count() != stood);
                }
                visits
            })
        })
        .collect();
    for _ in 0..50 {
        let stood = bench.count();
        bench.machine.pause().expect("pause");
        bench.machine.resume().expect("resume");
        bench.wait_for_count(stood);
    }
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(visitors.into_iter().all(|one| one.join().expect("no panic") > 0));
}

#[test]
fn a_full_log_is_cut_by_the_confined_thread_that_prints() {
    let dir = tempfile::tempdir().expect("directory");
    let console =
        ConsolePaths { log: dir.path().join("log"), socket: dir.path().join("console.sock") };
    let almost = 2 * KEPT - 50;
    std::fs::write(&console.log, vec![b'x'; almost as usize]).expect("a log");
    let spec = guest_spec(dir.path());
    let mut machine =
        Machine::boot(&spec, &console, Vec::new(), Arc::new(|_| ())).expect("machine");
    machine.run().expect("run");
    UnixStream::connect(&console.socket).expect("connect").write_all(&[b'z'; 100]).expect("type");
    let log = || std::fs::metadata(&console.log).expect("log");
    wait_for("all echoes", || log().len() == almost + 100);
    assert!(log().blocks() * 512 <= KEPT + (128 << 10), "{} blocks are left", log().blocks());
    assert_eq!(machine.console_losses(), 0);
    let mut reader = LogReader::open(&console.log).expect("log");
    let text = String::from_utf8(reader.next_piece(20 << 20).expect("read")).expect("text");
    assert!(text.contains("earlier bytes were dropped") && text.ends_with(&"z".repeat(100)));
}

#[test]
fn sockets_are_there_when_the_spec_says_so_and_go_with_the_machine() {
    let dir = tempfile::tempdir().expect("directory");
    let console =
        ConsolePaths { log: dir.path().join("log"), socket: dir.path().join("console.sock") };
    let socket = dir.path().join("vsock.sock");
    let mut spec = guest_spec(dir.path());
    let make = |spec: &VmSpec| {
        Machine::boot(spec, &console, Vec::new(), Arc::new(|_| ())).expect("machine")
    };
    let mut machine = make(&spec);
    let without = machine.save().expect("save");
    assert!(!socket.exists());
    drop(machine);
    spec.vsock = Some(VsockSpec { cid: 5 });
    machine = make(&spec);
    let mut client = UnixStream::connect(&socket).expect("connect");
    client.write_all(b"CONNECT 1\n").expect("ask");
    let error = machine.load(&without).expect_err("another machine").to_string();
    assert!(error.contains("virtio/vsock") && error.contains("did not come"), "{error}");
    drop(machine);
    assert_eq!(client.read(&mut [0]).unwrap_or(0), 0, "nobody is there any more");
    assert!(!socket.exists());
}

#[test]
fn what_is_typed_goes_to_the_device_that_printed_last() {
    let mut source = Bench::running();
    source.machine.output.hear(Voice::Virtio);
    let socket = source.dir.path().join("console.sock");
    let mut client = UnixStream::connect(socket).expect("connect");
    client.write_all(b"typed at hvc0").expect("type");
    // The guest has no driver for it: the bytes wait, and travel.
    let mut sections = Vec::new();
    wait_for("the bytes to be in the section", || {
        source.machine.run().expect("run");
        source.machine.pause().expect("pause");
        sections = source.machine.save().expect("save");
        let console = sections.iter().find(|section| section.kind == "virtio/console");
        console.expect("section").bytes.windows(13).any(|bytes| bytes == b"typed at hvc0")
    });
    let mut destination = source.destination();
    destination.machine.load(&sections).expect("load");
    assert_eq!(destination.machine.output.heard(), Voice::Virtio);
    assert_eq!(destination.machine.save().expect("save")[..3], sections[..3]);
    assert!(std::fs::read(source.dir.path().join("console.log")).expect("log").is_empty());
}

#[test]
fn sections_that_do_not_fit_are_refused() {
    let mut source = Bench::running();
    source.machine.pause().expect("pause");
    let sections = source.machine.save().expect("save");
    let refuses = |change: &dyn Fn(&mut Vec<Section>)| {
        let mut changed = sections.clone();
        change(&mut changed);
        let mut destination = Bench::new(false);
        destination.machine.load(&changed).expect_err("refused").to_string()
    };
    assert!(refuses(&|all| drop(all.pop())).contains("did not come"));
    assert!(refuses(&|all| all.push(all[0].clone())).contains("twice"));
    assert!(refuses(&|all| all[0].version = 9).contains("version 9"));
    let unknown = Section { kind: "tpm".into(), version: 1, bytes: Vec::new() };
    assert!(refuses(&|all| all.push(unknown.clone())).contains("tpm"));
    let running = Bench::running();
    assert!(running.machine.save().is_err(), "a running guest cannot be saved");
}

#[test]
fn a_kernel_that_cannot_boot_says_why() {
    let dir = tempfile::tempdir().expect("directory");
    let mut spec = guest_spec(dir.path());
    let console = ConsolePaths { log: dir.path().join("log"), socket: dir.path().join("socket") };
    let refusal = |bytes: &[u8]| {
        std::fs::write(&spec.kernel, bytes).expect("write");
        let error =
            Machine::boot(&spec, &console, Vec::new(), Arc::new(|_| ())).expect_err("no kernel");
        assert!(!console.log.exists(), "nothing was made");
        error.to_string()
    };
    assert!(refusal(b"#!/bin/sh\n").contains("ELF"));
    assert!(refusal(b"").contains("ELF"));
    assert!(refusal(&elf(&[0xf4], None)).contains("PVH"));
    spec.initrd = Some(dir.path().join("no-such-file"));
    let guest = crate::testing::write_guest(dir.path());
    spec.kernel = guest;
    let error =
        Machine::boot(&spec, &console, Vec::new(), Arc::new(|_| ())).expect_err("no initrd");
    assert!(error.to_string().contains("no-such-file"));
}

#[test]
fn a_guest_that_faults_three_times_is_reset() {
    let dir = tempfile::tempdir().expect("directory");
    let mut spec = guest_spec(dir.path());
    spec.kernel = dir.path().join("fault.elf");
    // ud2 without an interrupt table.
    std::fs::write(&spec.kernel, elf(&[0x0f, 0x0b], Some(0x10_0000))).expect("write");
    let console = ConsolePaths { log: dir.path().join("log"), socket: dir.path().join("socket") };
    let (told, events) = std::sync::mpsc::channel();
    let on_event: OnEvent = Arc::new(move |event| drop(told.send(event)));
    let mut machine = Machine::boot(&spec, &console, Vec::new(), on_event).expect("machine");
    machine.run().expect("run");
    for _ in 0..3 {
        let event = events.recv_timeout(PATIENCE).expect("a fault");
        assert_eq!(event, Event::Reset(Reset::Fault));
        machine.reset_if_asked().expect("reset");
    }
}
