//! A machine on the real `/dev/kvm`, running the tiny guest of [`crate::testing`].

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use decamp_shared::keeper::ExitRecord;
use decamp_shared::pages::PageRange;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::GUEST_MEMORY;
use crate::testing::{COUNTER, WRITTEN, WRITTEN_PAGES, elf, guest_spec, wait_for};

/// A machine in a directory of its own.
struct Bench {
    machine: Machine,
    ended: Arc<Mutex<Option<ExitRecord>>>,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(boots: bool) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let spec = guest_spec(dir.path());
        let console = ConsolePaths {
            log: dir.path().join("console.log"),
            socket: dir.path().join("console.sock"),
        };
        let ended = Arc::new(Mutex::new(None));
        let told = ended.clone();
        let on_end: OnEnd = Arc::new(move |record| *told.lock().expect("record") = Some(record));
        let machine = Machine::build(&spec, &console, on_end, boots).expect("machine");
        Self { machine, ended, dir }
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
            assert_eq!(*self.ended.lock().expect("record"), None);
            self.count() > more_than
        });
    }

    /// A fresh machine with this one's memory.
    fn destination(&self) -> Self {
        let other = Self::new(false);
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
    source.machine.pause().expect("pause");
    let sections = source.machine.save().expect("save");
    let saved = VmState::decode(sections.last().expect("vm")).expect("vm").clock;
    let mut destination = source.destination();
    std::thread::sleep(Duration::from_millis(200));
    destination.machine.load(&sections).expect("load");
    let here = ClockState::read(destination.machine.guest.vm()).expect("clock");
    let passed = Duration::from_nanos(here.nanoseconds - saved.nanoseconds);
    if saved.is_complete() {
        assert!(passed >= Duration::from_millis(200), "{passed:?}");
    }
    assert!(passed < Duration::from_secs(10), "{passed:?}");
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
    let during = |wall: Duration| {
        let ((time, sleeps), start) = (observe(), Instant::now());
        std::thread::sleep(wall);
        let (time_after, sleeps_after) = observe();
        let share = (time_after - time).as_secs_f64() / start.elapsed().as_secs_f64();
        (share, sleeps_after - sleeps)
    };
    bench.machine.throttle(80).expect("throttle");
    let (share, sleeps) = during(Duration::from_millis(400));
    assert!(share < 0.4, "{share} of a processor at a throttle of 80 percent");
    assert!(sleeps >= 5, "{sleeps} naps");
    bench.machine.throttle(0).expect("no throttle");
    let counted = bench.count();
    let (_, sleeps) = during(Duration::from_millis(400));
    assert!(sleeps < 5, "{sleeps} naps without a throttle");
    bench.wait_for_count(counted);
    bench.machine.throttle(99).expect("throttle");
    bench.machine.pause().expect("a napping guest pauses");
}

#[test]
fn the_console_is_logged_and_typed_into_and_a_reset_ends_the_guest() {
    let bench = Bench::running();
    let mut client = UnixStream::connect(bench.dir.path().join("console.sock")).expect("connect");
    client.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
    client.write_all(b"abc").expect("type");
    let mut seen = [0; 3];
    client.read_exact(&mut seen).expect("echo");
    assert_eq!(&seen, b"abc");
    let log = std::fs::read(bench.dir.path().join("console.log")).expect("log");
    assert_eq!(log, b"abc");
    client.write_all(b"q").expect("type");
    wait_for("the guest to end", || bench.ended.lock().expect("record").is_some());
    let record = bench.ended.lock().expect("record").clone().expect("record");
    assert_eq!(record, ExitRecord { status: 0, text: "reset by the guest".into() });
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
        let error = Machine::boot(&spec, &console, Arc::new(|_| ())).expect_err("no kernel");
        assert!(!console.log.exists(), "nothing was made");
        error.to_string()
    };
    assert!(refusal(b"#!/bin/sh\n").contains("ELF"));
    assert!(refusal(b"").contains("ELF"));
    assert!(refusal(&elf(&[0xf4], None)).contains("PVH"));
    spec.initrd = Some(dir.path().join("no-such-file"));
    let guest = crate::testing::write_guest(dir.path());
    spec.kernel = guest;
    let error = Machine::boot(&spec, &console, Arc::new(|_| ())).expect_err("no initrd");
    assert!(error.to_string().contains("no-such-file"));
}

#[test]
fn a_guest_that_faults_three_times_ends() {
    let dir = tempfile::tempdir().expect("directory");
    let mut spec = guest_spec(dir.path());
    spec.kernel = dir.path().join("fault.elf");
    // ud2 without an interrupt table.
    std::fs::write(&spec.kernel, elf(&[0x0f, 0x0b], Some(0x10_0000))).expect("write");
    let console = ConsolePaths { log: dir.path().join("log"), socket: dir.path().join("socket") };
    let (told, ended) = std::sync::mpsc::channel();
    let on_end: OnEnd = Arc::new(move |record| drop(told.send(record)));
    let mut machine = Machine::boot(&spec, &console, on_end).expect("machine");
    machine.run().expect("run");
    let record = ended.recv_timeout(Duration::from_secs(10)).expect("an end");
    assert_eq!((record.status, record.text.as_str()), (1, "triple fault"));
    assert!(machine.pause().is_err(), "a guest that ended cannot be paused");
    assert!(machine.resume().is_err(), "nor resumed");
}
