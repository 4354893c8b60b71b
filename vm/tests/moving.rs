//! Moves of the real test guest (`tests/guest`) between two real keepers on the real `/dev/kvm`,
//! driven as a session drives them: track, rounds while it runs, pause, save, last round, load,
//! activate, release. The guest checks all of its memory by itself and says so on its console.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use decamp_shared::keeper::{ExitRecord, KeeperClient, Phase, switched_for};
use decamp_shared::pages::{PageRange, PageReader, PageSet, PageWriter, SpaceId};
use decamp_shared::workload::{Backend, HostTools, Place, PlacedTree, SourceWorkload};
use decamp_vm::{VmBackend, VmSpec};

/// Pages copied in one go.
const BATCH: u64 = 64;

/// A directory with places for keepers, and the guest.
struct Bench {
    dir: tempfile::TempDir,
    backend: VmBackend,
    spec: serde_json::Value,
}

impl Bench {
    fn new(memory: u64, cmdline: &str) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let kernel = dir.path().join("guest.elf");
        build_guest(&kernel);
        let tools = HostTools {
            decamp: keeper_program(),
            criu: PathBuf::new(),
            runc: PathBuf::new(),
            crun: PathBuf::new(),
            resume_after: Duration::from_secs(2),
            methods: Default::default(),
            bridges: Default::default(),
            users: Default::default(),
        };
        let spec = VmSpec {
            kernel,
            initrd: None,
            cmdline: cmdline.into(),
            cpus: 1,
            memory_bytes: memory,
            cpu_baseline: None,
            vsock: None,
            disks: Vec::new(),
            net: Vec::new(),
        };
        let spec = serde_json::to_value(spec).expect("spec");
        let backend = VmBackend::new(tools);
        assert_eq!(backend.check(&spec), []);
        Self { dir, backend, spec }
    }

    fn place(&self, number: usize) -> Place {
        let dir = self.dir.path().join("workloads").join(format!("place{number}"));
        // Control groups are everybody's.
        let own = self.dir.path().file_name().and_then(|name| name.to_str()).expect("a name");
        let name = format!("moving{}-{number}", own.replace('.', "-"));
        Place { name, uuid: format!("uuid-{number}"), dir }
    }

    /// Starts the guest and waits until it has filled its memory.
    fn run(&self) -> Place {
        let place = self.place(0);
        self.backend.run(&self.spec, &place).expect("run");
        wait_for("the first report", || log(&place).contains("count="));
        place
    }
}

impl Drop for Bench {
    /// No keeper outlives its test, also when that failed.
    fn drop(&mut self) {
        for number in 0..10 {
            let place = self.place(number);
            if let Ok(mut keeper) = KeeperClient::connect(&place) {
                let _ = keeper.stop(Duration::ZERO).or_else(|_| keeper.discard());
            }
            if place.dir.exists() {
                wait_for("its keeper to end", || KeeperClient::connect(&place).is_err());
                let _ = self.backend.sweep(&self.spec, &place);
            }
        }
    }
}

/// What one move took.
#[derive(Debug, Default)]
struct Times {
    first_harvest: Duration,
    first_round: Duration,
    harvest: Duration,
    pause: Duration,
    last_round: Duration,
    save: Duration,
    load: Duration,
    activate: Duration,
    downtime: Duration,
    last_pages: u64,
}

/// Moves the guest from `from` to a fresh keeper at `to`, as a session would.
fn migrate(bench: &Bench, from: &Place, to: &Place, rounds: usize) -> Times {
    let mut times = Times::default();
    let mut source = bench.backend.source(&bench.spec, from).expect("source");
    let manifest = source.manifest().expect("manifest");
    let trees: Vec<_> = manifest
        .files
        .iter()
        .map(|tree| PlacedTree { tree: tree.clone(), path: PathBuf::from(&tree.path) })
        .collect();
    assert_eq!(bench.backend.preflight(&manifest, &trees), []);
    let spec = bench.backend.respec(&manifest, &trees).expect("respec");
    let mut destination = bench.backend.prepare(&manifest, &spec, to).expect("prepare");
    let writer = destination.writer(&manifest.spaces).expect("writer");
    let reader = source.reader().expect("reader");

    source.track().expect("track");
    let start = Instant::now();
    let mut everything = PageSet::new();
    source.harvest(&mut everything).expect("first harvest");
    times.first_harvest = start.elapsed();
    copy(&everything, &*reader, &*writer);
    times.first_round = start.elapsed();
    for _ in 1..rounds {
        copy_dirty(&mut *source, &*reader, &*writer);
    }
    let stopped = Instant::now();
    source.pause().expect("pause");
    times.pause = stopped.elapsed();
    let start = Instant::now();
    let sections = source.save().expect("save");
    times.save = start.elapsed();
    let start = Instant::now();
    let mut dirty = PageSet::new();
    source.harvest(&mut dirty).expect("last harvest");
    times.harvest = start.elapsed();
    copy(&dirty, &*reader, &*writer);
    times.last_pages = dirty.len();
    times.last_round = start.elapsed();
    source.fence(1).expect("fence");
    let start = Instant::now();
    destination.load(sections).expect("load");
    times.load = start.elapsed();
    let start = Instant::now();
    destination.activate(1).expect("activate");
    times.activate = start.elapsed();
    times.downtime = stopped.elapsed();
    source.release().expect("release");
    times
}

/// Copies what was written since the last harvest.
fn copy_dirty(source: &mut dyn SourceWorkload, reader: &dyn PageReader, writer: &dyn PageWriter) {
    let mut dirty = PageSet::new();
    source.harvest(&mut dirty).expect("harvest");
    copy(&dirty, reader, writer);
}

fn copy(pages: &PageSet, reader: &dyn PageReader, writer: &dyn PageWriter) {
    let mut buffer = vec![0; BATCH as usize * 4096];
    for range in pages.ranges() {
        let mut first = range.first;
        while first < range.end() {
            let part = PageRange::new(range.space, first, BATCH.min(range.end() - first));
            let bytes = &mut buffer[..part.bytes()];
            reader.read(part, bytes).expect("read");
            writer.write(part, bytes).expect("write");
            first = part.end();
        }
    }
}

/// Has the guest check everything and end, and gives what it said last.
fn verdict(place: &Place) -> String {
    let mut console = UnixStream::connect(place.console()).expect("console");
    console.write_all(b"q").expect("type");
    wait_for("the guest to end", || place.exit_record().exists());
    let record = ended(place);
    assert_eq!(record.status, 0, "{}", record.text);
    let log = log(place);
    let line = log.lines().rfind(|line| line.starts_with("verified"));
    line.unwrap_or_else(|| panic!("no verdict in {log}")).to_owned()
}

/// How the guest ended.
fn ended(place: &Place) -> ExitRecord {
    let record = fs::read(place.exit_record()).expect("exit record");
    serde_json::from_slice(&record).expect("exit record")
}

fn log(place: &Place) -> String {
    fs::read(place.log()).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
}

/// The last `count=` that the guest reported at `place`.
fn count(place: &Place) -> u64 {
    let log = log(place);
    let line = log.lines().rfind(|line| line.starts_with("count=") && line.contains("verdict"));
    let number = line.and_then(|line| line.strip_prefix("count=")?.split(' ').next()?.parse().ok());
    number.unwrap_or(0)
}

fn wait_for(what: &str, done: impl FnMut() -> bool) {
    wait_until(Instant::now() + Duration::from_secs(180), what, done);
}

/// For what an emulated machine does slowly.
fn wait_long(what: &str, done: impl FnMut() -> bool) {
    wait_until(Instant::now() + Duration::from_secs(300), what, done);
}

fn wait_until(limit: Instant, what: &str, mut done: impl FnMut() -> bool) {
    while !done() {
        assert!(Instant::now() < limit, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the keeper at `place` has ended and its sockets are gone, which follows.
fn wait_for_end(place: &Place) {
    wait_for("the keeper to end", || KeeperClient::connect(place).is_err());
    wait_for("its sockets to go", || !place.socket().exists() && !place.console().exists());
}

/// What was read of a descriptor or thread of a process at work; nothing if that is gone since it was listed.
fn unless_gone<T>(read: std::io::Result<T>) -> Option<T> {
    match read {
        Ok(read) => Some(read),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        // A thread's files say that when they were opened before it ended.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => None,
        Err(error) => panic!("{error}"),
    }
}

/// Builds the test guest, or takes the one that is there for machines without a compiler.
fn build_guest(kernel: &Path) {
    if let Some(built) = std::env::var_os("DECAMP_TEST_GUEST") {
        fs::copy(&built, kernel).expect("copy the test guest");
        return;
    }
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/guest/build");
    let built = Command::new(build).arg(kernel).status().expect("run tests/guest/build");
    assert!(built.success(), "tests/guest/build failed");
}

/// The example of this crate, which Cargo builds beside its tests.
fn keeper_program() -> PathBuf {
    let mut path = std::env::current_exe().expect("own path");
    path.pop();
    path.pop();
    path.push("examples/keeper");
    assert!(path.exists(), "{} is not built", path.display());
    path
}

#[test]
fn a_busy_guest_moves_back_and_forth_and_finds_nothing_wrong() {
    let bench = Bench::new(128 << 20, "fill=64 hot=4 rate=0 seed=7 report=50");
    let mut here = bench.run();
    let mut counted = 0;
    for number in 1..=6 {
        let there = bench.place(number);
        migrate(&bench, &here, &there, 3);
        wait_for("the source's keeper to end", || KeeperClient::connect(&here).is_err());
        wait_for("a report after the move", || count(&there) > counted);
        counted = count(&there);
        assert!(!log(&there).contains("BAD"), "{}", log(&there));
        here = there;
    }
    let verdict = verdict(&here);
    assert!(verdict.ends_with("bad=0 verdict=clean"), "{verdict}");
}

#[test]
fn a_move_that_fails_late_leaves_the_source_running_and_nothing_at_the_destination() {
    let bench = Bench::new(64 << 20, "fill=16 hot=2 rate=0 report=50");
    let here = bench.run();
    let there = bench.place(1);
    let mut source = bench.backend.source(&bench.spec, &here).expect("source");
    let manifest = source.manifest().expect("manifest");
    let mut destination = bench.backend.prepare(&manifest, &bench.spec, &there).expect("prepare");
    let writer = destination.writer(&manifest.spaces).expect("writer");
    let reader = source.reader().expect("reader");
    source.track().expect("track");
    copy_dirty(&mut *source, &*reader, &*writer);
    source.throttle(90).expect("throttle");
    source.pause().expect("pause");
    let mut sections = source.save().expect("save");
    sections[0].bytes.truncate(3);
    assert!(destination.load(sections).is_err());
    assert!(destination.activate(1).is_err(), "nothing that was not loaded runs");
    destination.discard().expect("discard");
    source.resume().expect("resume");
    wait_for("the destination's keeper to end", || KeeperClient::connect(&there).is_err());
    assert_eq!(log(&there), "", "no instruction has run there");
    let before = count(&here);
    wait_for("the source to go on", || count(&here) > before);
    drop(source);
    assert!(verdict(&here).ends_with("verdict=clean"));
}

#[test]
fn a_paused_guest_that_loses_its_agent_goes_on_by_itself() {
    let bench = Bench::new(64 << 20, "fill=16 hot=2 rate=0 report=50");
    let here = bench.run();
    let mut source = bench.backend.source(&bench.spec, &here).expect("source");
    source.track().expect("track");
    source.pause().expect("pause");
    let stood = count(&here);
    drop(source);
    wait_for("the guest to go on", || count(&here) > stood + 1);
    let phase = KeeperClient::connect(&here).and_then(|mut keeper| keeper.phase());
    assert_eq!(phase.expect("phase"), Phase::Running);
    bench.backend.stop(&bench.spec, &here, None).expect("stop");
    wait_for_end(&here);
    let record = ended(&here);
    assert_eq!(record.status, 137);
    assert!(record.text.contains("by force: it does not listen to its power button"), "{record:?}");
}

#[test]
fn a_kernel_that_cannot_boot_is_said_by_the_keeper() {
    let bench = Bench::new(64 << 20, "");
    let mut spec = bench.spec.clone();
    spec["kernel"] = serde_json::json!("/etc/hostname");
    let place = bench.place(0);
    let error = bench.backend.run(&spec, &place).expect_err("no kernel");
    assert!(error.to_string().contains("ELF"), "{error}");
    assert!(!place.log().exists() && !place.console().exists());
}

#[test]
fn memory_above_the_device_hole_moves_too() {
    // 3 GiB below the hole, 384 MiB above. Only the hot pages are ever written, scattered over
    // everything, so that the host needs little of it.
    let cmdline = "fill=3300 hot=4 rate=0 touch=none place=spread sweep=1000 report=50";
    let bench = Bench::new((3072 + 384) << 20, cmdline);
    let here = bench.run();
    let there = bench.place(1);
    let mut source = bench.backend.source(&bench.spec, &here).expect("source");
    source.track().expect("track");
    let mut all = PageSet::new();
    source.harvest(&mut all).expect("harvest");
    wait_for("the guest to write", || {
        let mut dirty = PageSet::new();
        source.harvest(&mut dirty).expect("harvest");
        dirty.ranges().any(|range| range.first >= (4 << 30) / 4096)
    });
    assert!(all.ranges().all(|range| range.end() <= 0xc0000 || range.first >= 0x10_0000));
    source.resume().expect("resume");
    drop(source);
    migrate(&bench, &here, &there, 2);
    wait_for("reports after the move", || count(&there) > count(&here));
    assert!(!log(&there).contains("BAD"), "{}", log(&there));
    bench.backend.stop(&bench.spec, &there, None).expect("stop");
}

/// A Linux guest whose init prints `tick N` for ever, on a KVM that can boot one: kernel and ramdisk
/// are named by the environment.
#[test]
#[ignore = "needs DECAMP_TEST_KERNEL and DECAMP_TEST_INITRD, and a KVM that boots Linux"]
fn a_linux_guest_moves_while_it_runs() {
    let file = |name: &str| PathBuf::from(std::env::var_os(name).expect(name));
    let mut bench = Bench::new(256 << 20, "");
    bench.spec["kernel"] = serde_json::json!(file("DECAMP_TEST_KERNEL"));
    bench.spec["initrd"] = serde_json::json!(file("DECAMP_TEST_INITRD"));
    bench.spec["cmdline"] = serde_json::json!("console=ttyS0 panic=-1 reboot=k");
    let mut here = bench.place(0);
    bench.backend.run(&bench.spec, &here).expect("run");
    wait_long("the guest to boot", || log(&here).contains("tick 3"));
    for number in 1..=3 {
        let there = bench.place(number);
        let times = migrate(&bench, &here, &there, 3);
        println!("{times:?}");
        wait_long("ticks after the move", || log(&there).matches("tick").count() > 5);
        here = there;
    }
    println!("{}", log(&here));
    bench.backend.stop(&bench.spec, &here, None).expect("stop");
}

/// Prints what a move takes: `cargo test -p decamp-vm --release --test moving -- --ignored --nocapture`.
#[test]
#[ignore = "measures, takes half a minute"]
fn what_a_move_of_one_gib_takes() {
    let bench = Bench::new(1280 << 20, "fill=1024 hot=32 rate=10000 report=200");
    let mut here = bench.run();
    for number in 1..=5 {
        let there = bench.place(number);
        let times = migrate(&bench, &here, &there, 4);
        println!("{times:?}");
        wait_for("a report after the move", || count(&there) > 0);
        here = there;
    }
    println!("{}", log(&here).lines().last().unwrap_or_default());
    let verdict = verdict(&here);
    assert!(verdict.ends_with("verdict=clean"), "{verdict}");
}

/// A line of `/proc/PID/status`.
fn status(pid: u64, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("a status");
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).trim().to_owned()
}

fn facts(place: &Place) -> serde_json::Value {
    KeeperClient::connect(place).and_then(|mut keeper| keeper.facts()).expect("facts")
}

/// The process that was forked off by the keeper `pid`.
fn monitor_of(pid: u64) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("children");
    let children: Vec<u64> = text.split_whitespace().filter_map(|it| it.parse().ok()).collect();
    assert_eq!(children.len(), 1, "{text}");
    assert_eq!(status(children[0], "Name"), "decamp-monitor");
    children[0]
}

/// That the keeper at `place` has nothing that it does not need; the user that it runs as.
fn assert_confined(place: &Place) -> u64 {
    let facts = facts(place);
    let how = &facts["confinement"];
    assert_eq!(how["lacks"], serde_json::json!([]), "{how}");
    let (pid, user) =
        (facts["pid"].as_u64().expect("a pid"), how["user"].as_u64().expect("a user"));
    assert!(user >= 0x7000_0000);
    for key in ["Uid", "Gid"] {
        assert_eq!(status(pid, key), [user; 4].map(|id| id.to_string()).join("\t"));
    }
    assert_eq!(status(pid, "Groups"), "");
    for key in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, key), "0".repeat(16), "{key}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).expect("a link");
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
        // All of its threads, which do the work.
        for task in fs::read_dir(format!("/proc/{pid}/task")).expect("threads") {
            let task = task.expect("a thread").path();
            let its = unless_gone(fs::read_link(task.join("ns").join(namespace)));
            let text = unless_gone(fs::read_to_string(task.join("status")));
            let (Some(its), Some(text)) = (its, text) else { continue };
            assert_eq!(its, of(&pid.to_string()), "{}", task.display());
            assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
        }
    }
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    assert_eq!(fs::read_dir(&root).expect("its root").count(), 0, "its root is empty");
    let within = fs::read_link(&root).expect("where that is");
    assert_eq!(within, Path::new("/nothing"), "so it makes no user namespaces");
    fs::write(root.join("x"), "").expect_err("nothing can be made there");
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("groups");
    let own = format!(":/decamp/{}", place.name);
    let count = groups.lines().filter(|line| line.ends_with(&own)).count();
    assert!(count > 0, "{groups}");
    let monitor = monitor_of(pid);
    assert_eq!(status(monitor, "Uid"), "0\t0\t0\t0");
    let words = fs::read_to_string(format!("/proc/{monitor}/cmdline")).expect("its words");
    assert_eq!(words.trim_end_matches('\0'), format!("decamp monitor of VM {}", place.name));
    // Standard streams, its socket, its keeper, the lock: neither guest memory nor a disk.
    // What it has opened for its keeper, and just handed over, it closes a moment later.
    let open = || {
        let all = fs::read_dir(format!("/proc/{monitor}/fd")).expect("descriptors");
        let links =
            all.filter_map(|it| unless_gone(fs::read_link(it.expect("a descriptor").path())));
        links.collect::<Vec<_>>()
    };
    let limit = Instant::now() + Duration::from_secs(20);
    while open().len() != 6 {
        assert!(Instant::now() < limit, "{:?}", open());
        std::thread::sleep(Duration::from_millis(5));
    }
    user
}

#[test]
fn keepers_have_nothing_that_they_do_not_need() {
    let bench = Bench::new(64 << 20, "fill=16 hot=2 rate=0 report=50");
    // Whatever its agent has open is not its own.
    let secret = bench.dir.path().join("secret");
    let open = fs::File::create(&secret).expect("made");
    let passed_on = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty());
    nix::fcntl::fcntl(&open, passed_on).expect("set");
    let here = bench.run();
    drop(open);
    let pid = facts(&here)["pid"].as_u64().expect("a pid");
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors") {
        let link = unless_gone(fs::read_link(descriptor.expect("one").path()));
        assert_ne!(link.as_ref(), Some(&secret));
    }
    let first = assert_confined(&here);
    let (there, other) = (bench.place(1), bench.place(2));
    bench.backend.run(&bench.spec, &other).expect("another runs");
    let second = assert_confined(&other);
    assert_ne!(first, second, "each has a user of its own");
    let monitor = monitor_of(facts(&here)["pid"].as_u64().expect("a pid"));
    migrate(&bench, &here, &there, 2);
    wait_for_end(&here);
    let third = assert_confined(&there);
    assert_ne!(third, second);
    let gone = || !Path::new(&format!("/proc/{monitor}/ns/net")).exists();
    wait_for("its monitor to end", gone);
    bench.backend.sweep(&bench.spec, &here).expect("swept");
    let groups = Command::new("find").args(["/sys/fs/cgroup", "-name", &here.name]).output();
    assert_eq!(String::from_utf8_lossy(&groups.expect("find").stdout), "", "groups are left");
    assert!(verdict(&there).ends_with("verdict=clean"));
    assert_eq!(ended(&there).text, "powered off");
}

#[test]
fn a_guest_whose_monitor_is_killed_runs_on_and_is_not_moved() {
    let bench = Bench::new(64 << 20, "fill=16 hot=2 rate=0 report=50");
    let here = bench.run();
    let how = || facts(&here)["confinement"].clone();
    assert_eq!(how()["monitor"], "runs");
    let monitor = monitor_of(facts(&here)["pid"].as_u64().expect("a pid"));
    let mut source = bench.backend.source(&bench.spec, &here).expect("source");
    let killed = Command::new("kill").args(["-KILL", &monitor.to_string()]).status();
    assert!(killed.expect("kill").success());
    wait_for("it to be gone, and nothing of it left", || {
        !Path::new(&format!("/proc/{monitor}")).exists()
    });
    let error = match source.reader() {
        Ok(_) => panic!("there is nobody to open its memory"),
        Err(error) => std::error::Error::source(&error).map(ToString::to_string),
    };
    let error = error.expect("a cause");
    assert!(error.contains("monitor of this VM's keeper is gone"), "{error}");
    drop(source);
    let how = how();
    let lacks = how["lacks"].as_array().expect("a list");
    let said =
        |lack: &serde_json::Value| lack.as_str().is_some_and(|it| it.contains("its monitor"));
    assert!(lacks.iter().any(said), "{how}");
    assert_eq!(how["monitor"], "ended");
    let refused = bench.backend.source(&bench.spec, &here).map(drop).expect_err("no move begins");
    assert!(refused.to_string().contains("moved again once"), "{refused}");
    let before = count(&here);
    wait_for("the guest to go on", || count(&here) > before + 1);
    bench.backend.stop(&bench.spec, &here, None).expect("it can be stopped");
}

/// Whether nobody has a lock that keeps others from writing the disk at `path`.
fn is_free(path: &Path) -> bool {
    let file = fs::File::options().read(true).write(true).open(path).expect("a disk");
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_GETLK(&mut lock)).expect("asked");
    i32::from(lock.l_type) == libc::F_UNLCK
}

#[test]
fn a_disk_of_a_confined_vmm_moves_alone_and_is_handed_over_from_there() {
    const MIGRATION: &str = "5f0c7a1e-0b7d-4f7e-9a51-2f3c6d8e9b01";
    let mut bench = Bench::new(64 << 20, "fill=16 hot=2 rate=0 report=50");
    let [old, new] = ["old", "new"].map(|name| bench.dir.path().join(name));
    fs::write(&old, [7; 64 << 10]).expect("a disk");
    bench.spec["disks"] = serde_json::json!([{ "path": old }]);
    let here = bench.run();
    assert_confined(&here);
    let file = fs::File::options().read(true).write(true).create_new(true).open(&new);
    let file = file.expect("made");
    let copy = file.try_clone().expect("a descriptor");
    let mut keeper = KeeperClient::connect(&here).expect("a keeper");
    keeper.mirror(SpaceId(1), &new, file.into()).expect("mirrored");
    let mut dirty = PageSet::new();
    keeper.harvest(&mut dirty).expect("harvested");
    assert_eq!(dirty.len(), 16, "all of the disk, and no memory");
    copy.write_all_at(&fs::read(&old).expect("read"), 0).expect("copied");
    keeper.hold().expect("held");
    // What is no migration is not noted.
    keeper.switch("../switched").expect_err("no name of one");
    assert!(!switched_for(&here, MIGRATION).expect("looked"));
    keeper.switch(MIGRATION).expect("switched");
    assert!(switched_for(&here, MIGRATION).expect("looked"));
    keeper.resume(0).expect("as ever");
    drop((keeper, copy));
    assert_eq!(facts(&here)["disks"][0]["path"], serde_json::json!(new));
    assert!(is_free(&old) && !is_free(&new));
    // Handed over, as shared storage is, it comes back at first: its monitor opens the new file again.
    bench.spec["disks"][0]["path"] = serde_json::json!(new);
    let mut source = bench.backend.source(&bench.spec, &here).expect("source");
    source.pause().expect("pause");
    source.save().expect("save");
    source.fence(1).expect("fenced");
    assert!(is_free(&new), "the monitor keeps no lock");
    source.resume().expect("its own again");
    drop(source);
    assert!(!is_free(&new));
    let there = bench.place(1);
    migrate(&bench, &here, &there, 1);
    assert_confined(&there);
    assert!(!is_free(&new));
    assert!(verdict(&there).ends_with("verdict=clean"));
    assert_eq!(ended(&there).text, "powered off");
}
