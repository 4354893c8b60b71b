//! Containers of podman: adopted, moved into the charge of podman again, given back, and stopped.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use decamp_shared::workload::{Backend, FileTree, PlacedTree};
use serde_json::{Value, json};

use crate::runtimes::{crun_starts, does, says};
use crate::segments::{MOVED, names};
use crate::support::redis::Redis;
use crate::support::{Host, Spot, await_that};

/// Counts to its standard output, and in a file: on a tmpfs, which goes along as it is in the stop, whole at any
/// time, and written by another process, so that the first one's streams are what they are.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; \
    /bin/busybox sh -c \"echo $i >/dev/shm/new; /bin/busybox mv /dev/shm/new /dev/shm/count\"; \
    sleep 0.1; done";

/// Gives `host` a podman of its own, with one image that has a shell.
pub(crate) fn set_up(host: &Host) {
    if !host.directory().join("podman").exists() {
        fixture(host, &["--storage"]);
        import(host, "shell", &host.shell("image", "true"), &[]);
    }
}

/// Adds to the podman of `host` what the arguments say.
fn fixture(host: &Host, arguments: &[&str]) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/podman");
    let directory = host.directory().join("podman").display().to_string();
    says(script, &[&[directory.as_str()], arguments].concat());
}

/// An image of what is in the bundle of `spot`, and more.
pub(crate) fn import(host: &Host, name: &str, spot: &Spot<'_>, more: &[&str]) {
    let rootfs = spot.bundle().join("rootfs").display().to_string();
    fixture(host, &[more, &["--image", name, &rootfs]].concat());
}

/// An image that holds nothing, under the name that a file of ours has for it.
pub(crate) fn import_empty() {
    let import = "tar -cf - -T /dev/null | podman import - localhost/decamp/empty";
    does("sh", &["-c", import]);
}

/// Does something that may fail.
pub(crate) fn does_quietly(program: &str, arguments: &[&str]) {
    let _ = Command::new(program).args(arguments).output();
}

/// A bridge for a network of podman's, which takes it away with the last container in it; `net` is the first
/// three numbers of its addresses.
pub(crate) fn make_bridge(host: &Host, bridge: &str, net: &str) {
    does_quietly("ip", &["link", "delete", bridge]);
    host.ip(&["link", "add", bridge, "address", "02:00:00:00:00:01", "type", "bridge"]);
    host.ip(&["address", "add", &format!("{net}.1/24"), "dev", bridge]);
    host.ip(&["link", "set", bridge, "up"]);
}

/// A network of podman's on it.
pub(crate) fn write_network(number: usize, name: &str, bridge: &str, net: &str) {
    let network = json!({
        "name": name, "id": format!("{number:064x}"), "driver": "bridge",
        "network_interface": bridge, "created": "2026-01-01T00:00:00Z",
        "subnets": [{"subnet": format!("{net}.0/24"), "gateway": format!("{net}.1")}],
        "ipv6_enabled": false, "internal": false, "dns_enabled": false,
        "ipam_options": {"driver": "host-local"},
    });
    let directory = Path::new("/etc/containers/networks");
    fs::create_dir_all(directory).expect("a directory");
    fs::write(directory.join(format!("{name}.json")), network.to_string()).expect("a network");
}

/// A container that podman started. Deleted when dropped.
pub(crate) struct Pod<'a> {
    pub(crate) spot: Spot<'a>,
}

impl<'a> Pod<'a> {
    pub(crate) fn start(host: &'a Host, name: &str, more: &[&str], line: &str) -> Self {
        Self::start_by(host, "runc", name, more, line)
    }

    fn start_by(host: &'a Host, runtime: &str, name: &str, more: &[&str], line: &str) -> Self {
        set_up(host);
        let spot = host.shell(name, "true");
        let by = format!("--runtime={runtime}");
        let first = [&by, "run", "--detach", "--network=none", "--name", &spot.place.name];
        let last = ["localhost/shell", "/bin/sh", "-c", line];
        does("podman", &[&first[..], more, &last[..]].concat());
        Self { spot }
    }

    pub(crate) fn name(&self) -> &str {
        &self.spot.place.name
    }

    pub(crate) fn adopt(&mut self) {
        let backend = self.spot.backend();
        let found = backend.find_foreign(&format!("podman:{}", self.name()));
        let found = found.expect("nothing against it");
        assert_eq!(found.name, self.name());
        self.spot.spec = found.spec;
        backend.adopt(&self.spot.spec, &self.spot.place).expect("adopted");
    }

    /// What a next host that is this one says against it, with its volumes at `volumes`.
    pub(crate) fn refused_there(&self, volumes: &Path) -> Vec<String> {
        let mut source = self.spot.source();
        let mut manifest = source.manifest().expect("a manifest");
        manifest.name.push_str("-next");
        let placed = |tree: &FileTree| {
            let is_volume = tree.role().is_volume();
            let place = self.spot.bundle().with_extension("there");
            let path = if is_volume { volumes.to_owned() } else { place };
            PlacedTree { tree: tree.clone(), path }
        };
        let trees: Vec<_> = manifest.files.iter().map(placed).collect();
        let against = self.spot.backend().preflight(&manifest, &trees);
        against.into_iter().map(|refusal| refusal.text).collect()
    }

    fn reasons(&self) -> Vec<String> {
        let found = self.spot.backend().find_foreign(&format!("podman:{}", self.name()));
        found.expect_err("it was not refused").into_iter().map(|refusal| refusal.text).collect()
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        remove(self.name());
    }
}

fn remove(name: &str) {
    let _ = Command::new("podman").args(["rm", "-f", "-t", "0", "--ignore", name]).output();
}

/// What was exchanged for an arrival is gone.
pub(crate) fn no_commands_left() {
    let left = fs::read_dir("/run/decamp-podman").into_iter().flatten().count();
    assert_eq!(left, 0, "directories of arrivals were left");
}

pub(crate) fn inspect(name: &str) -> Value {
    let said: Value =
        serde_json::from_str(&says("podman", &["container", "inspect", name])).expect("JSON");
    said[0].clone()
}

pub(crate) fn last_count(name: &str) -> u64 {
    let said = says("podman", &["logs", name]);
    said.lines().filter_map(|line| line.trim().parse().ok()).next_back().unwrap_or(0)
}

pub(crate) fn await_count(name: &str, count: u64) {
    let begun = Instant::now();
    while last_count(name) < count {
        assert!(begun.elapsed() < Duration::from_secs(120), "{name} does not count to {count}");
        thread::sleep(Duration::from_millis(50));
    }
}

pub(crate) fn await_status(name: &str, status: &str) {
    let begun = Instant::now();
    while inspect(name)["State"]["Status"] != status {
        assert!(begun.elapsed() < Duration::from_secs(120), "{}", inspect(name)["State"]);
        thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn podman_is_in_charge_elsewhere(host: &Host) {
    in_charge(host, "runc", "private");
}

pub(crate) fn podman_with_crun_is_in_charge_elsewhere(host: &Host) {
    if crun_starts(host) {
        in_charge(host, "crun", "host");
    }
}

/// The next podman lists and controls what comes, and this one knows that it has left.
fn in_charge(host: &Host, runtime: &str, cgroup_namespace: &str) {
    let cgroup_namespace = format!("--cgroupns={cgroup_namespace}");
    let more = [
        &cgroup_namespace,
        "--label=a=b",
        "--env=X=a b",
        "--restart=always",
        "--stop-timeout=3",
        "--memory=64m",
    ];
    let (here, elsewhere) = (format!("pa-{runtime}"), format!("pb-{runtime}"));
    let mut pod = Pod::start_by(host, runtime, &here, &more, COUNTER);
    await_count(pod.name(), 3);
    pod.adopt();
    let cgroups = |name: &str| {
        let all = says("podman", &["exec", name, "/bin/busybox", "cat", "/proc/1/cgroup"]);
        let paths = all.lines().filter_map(|line| line.rsplit(':').next());
        let has_own = paths.clone().all(|path| path == "/");
        let id = inspect(name)["Id"].as_str().expect("an id").to_owned();
        assert_eq!(has_own, !all.contains(&id), "{all}");
        has_own
    };
    let had_own = cgroups(pod.name());
    let there = pod.spot.twin(&elsewhere);
    let moved = pod.spot.move_live(&there, 2);
    eprintln!("    {:.1?}", moved.times);
    // podman's own filter of system calls is on it.
    assert_eq!(moved.left.dump.as_deref(), Some("hidden-by-mounts"));
    let name = there.place.name.as_str();
    // Its monitor has had all that it said by then.
    await_status(pod.name(), "exited");
    let before = last_count(pod.name());
    await_status(name, "running");
    await_count(name, before + 3);
    assert_eq!(last_count(pod.name()), before, "it runs twice");
    let first = says("podman", &["logs", name]).lines().next().expect("a line").parse::<u64>();
    // Every number is said once, here or there: one that ran on while it was ended would say some twice.
    assert_eq!(first.expect("a number"), before + 1, "it stopped at {before}");
    let said = inspect(name);
    assert_eq!(said["Config"]["Labels"]["a"], "b");
    assert_eq!(said["HostConfig"]["RestartPolicy"]["Name"], "always");
    assert_eq!(said["HostConfig"]["Memory"], 64 << 20);
    assert_eq!((cgroups(name), had_own), (had_own, cgroup_namespace.ends_with("private")));
    let environment = says("podman", &["exec", name, "/bin/busybox", "env"]);
    assert!(environment.lines().any(|line| line == "X=a b"), "{environment}");
    let status = says("podman", &["exec", name, "/bin/busybox", "cat", "/proc/1/status"]);
    assert!(status.lines().any(|line| line == "Seccomp:\t2"), "{status}");
    let count = says("podman", &["exec", name, "/bin/busybox", "cat", "/dev/shm/count"]);
    assert!(count.trim().parse::<u64>().expect("a number") >= before);
    assert_eq!(says("podman", &["exec", name, "/bin/busybox", "cat", "/proc/1/comm"]).trim(), "sh");
    host.assert_nothing_left(&here);
    // What podman stops it knows the end of, and what it starts again is its own.
    does("podman", &["stop", name]);
    there.await_exit();
    let state = inspect(name)["State"].clone();
    assert_eq!((&state["Status"], &state["ExitCode"]), (&"exited".into(), &137.into()), "{state}");
    does("podman", &["start", name]);
    await_status(name, "running");
    does("podman", &["rm", "-f", "-t", "0", name]);
}

/// Shared memory of every kind, under podman's own filter of system calls. So many MiB of each that stand idle
/// as the environment says, to measure with.
pub(crate) fn podman_shared_memory_moves_live(host: &Host) {
    set_up(host);
    let size = std::env::var("DECAMP_MEASURE_SHARED_MIB").unwrap_or_else(|_| "8".to_owned());
    let Some(spot) = host.program("ps", "segments") else {
        return host.skip("needs cc (tests/setup)");
    };
    import(host, "segments", &spot, &[]);
    let name = spot.place.name.clone();
    let first = ["run", "--detach", "--network=none", "--shm-size=1g", "--name", &name];
    does("podman", &[&first[..], &["localhost/segments", "/bin/segments", &size]].concat());
    let mut pod = Pod { spot };
    await_round(pod.name(), 3);
    pod.adopt();
    let shared = names(&pod.spot);
    let large = ["large", " shm /dev/shm/large", "System V", "/dev/zero"];
    let large = large.iter().chain(&MOVED);
    large.for_each(|name| assert!(shared.iter().any(|one| one.ends_with(name)), "{shared:?}"));
    assert_eq!(shared.len(), MOVED.len() + 4);
    let there = pod.spot.twin("ps2");
    let moved = pod.spot.move_live(&there, 3);
    eprintln!("    4 times {size} MiB: stop {:.0} ms, {:.1?}", moved.downtime(), moved.times);
    assert_eq!(moved.left.dump.as_deref(), Some("hidden-by-mounts"));
    assert_eq!(moved.left.fallbacks, [""; 0]);
    let name = there.place.name.as_str();
    await_round(name, last_round(pod.name()) + 400);
    let status = says("podman", &["exec", name, "/bin/busybox", "cat", "/proc/1/status"]);
    assert!(status.lines().any(|line| line == "Seccomp:\t2"), "{status}");
    does("podman", &["rm", "-f", "-t", "0", name]);
    there.await_exit();
    host.assert_nothing_left("ps");
}

/// The last round in which all processes of a program found all as it must be.
fn last_round(name: &str) -> u64 {
    let said = says("podman", &["logs", name]);
    assert!(!said.contains("BAD"), "{said}");
    let last = said.lines().rfind(|line| line.starts_with("ok ")).unwrap_or("ok 0");
    last[3..].split(' ').next().and_then(|round| round.parse().ok()).unwrap_or(0)
}

fn await_round(name: &str, round: u64) {
    let begun = Instant::now();
    while last_round(name) < round {
        assert!(begun.elapsed() < Duration::from_secs(180), "{name} does not check {round} rounds");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Given back it is podman's as before; stopped it is stopped for podman too.
pub(crate) fn podman_has_it_back(host: &Host) {
    let more = ["--security-opt=seccomp=unconfined", "--restart=always"];
    let mut pod = Pod::start(host, "pg", &more, COUNTER);
    await_count(pod.name(), 2);
    pod.adopt();
    assert!(pod.reasons()[0].contains("adopted already"), "{:?}", pod.reasons());
    let backend = pod.spot.backend();
    backend.let_go(&pod.spot.place).expect("let go");
    await_count(pod.name(), last_count(pod.name()) + 3);
    assert_eq!(inspect(pod.name())["State"]["Status"], "running");
    pod.adopt();
    // Rolled back it runs on.
    let mut source = pod.spot.source();
    source.pause().expect("pause");
    source.save().expect("save");
    source.resume().expect("resume");
    drop(source);
    await_count(pod.name(), last_count(pod.name()) + 3);
    backend.stop(&pod.spot.spec, &pod.spot.place, None).expect("stop");
    await_status(pod.name(), "exited");
    thread::sleep(Duration::from_millis(300));
    assert_eq!(inspect(pod.name())["State"]["Status"], "exited", "its policy started it again");
    assert!(pod.reasons()[0].contains("only one that runs"), "{:?}", pod.reasons());
    host.assert_nothing_left("pg");
}

/// With an interface that podman made, its address, and a client that stays connected.
pub(crate) fn podman_redis_keeps_its_connection(host: &Host) {
    set_up(host);
    make_bridge(host, "br7", "10.98.0");
    let spot = host.redis("pr", "10.98.0.9/24", &[]);
    let config = fs::read(spot.bundle().join("config.json")).expect("a config");
    let config: Value = serde_json::from_slice(&config).expect("JSON");
    let arguments = config["process"]["args"].as_array().expect("arguments").iter();
    let arguments: Vec<&str> = arguments.map(|word| word.as_str().expect("a word")).collect();
    // Two hosts would have one of the same name; an address is given once in each network.
    let net = |name, id| ["--network", name, "br7", "10.98.0.0/24", "10.98.0.1", id];
    import(host, "redis", &spot, &[net("one", "1"), net("two", "2")].concat());
    let name = spot.place.name.clone();
    let directory = format!("--workdir={}", config["process"]["cwd"].as_str().expect("a path"));
    let network = "--network=one:ip=10.98.0.9,mac=02:00:00:00:00:09";
    let first = ["run", "--detach", network, &directory, "--name", &name, "localhost/redis"];
    does("podman", &[&first[..], &arguments].concat());
    let mut pod = Pod { spot };
    let mut redis = Redis::connect("10.98.0.9:6379");
    redis.fill(16 << 20, 5);
    let digest = redis.ask(&["DEBUG", "DIGEST"]);
    pod.adopt();
    assert_eq!(pod.spot.spec["podman"]["network"]["name"], "one");
    pod.spot.spec["podman"]["network"]["name"] = json!("two");
    let there = pod.spot.twin("pr2");
    pod.spot.move_live(&there, 2);
    assert_eq!(redis.ask(&["DEBUG", "DIGEST"]), digest);
    assert_eq!(redis.ask(&["SET", "after", "1"]), "OK");
    let name = there.place.name.as_str();
    await_status(name, "running");
    await_status(pod.name(), "exited");
    assert_eq!(inspect(name)["NetworkSettings"]["Networks"]["two"]["IPAddress"], "10.98.0.9");
    assert_eq!(host.links().len(), 1, "{:?}", host.links());
    assert_eq!(redis.ask(&["GET", "after"]), "1");
    does("podman", &["stop", name]);
    there.await_exit();
    assert_eq!(inspect(name)["State"]["ExitCode"], 0);
    does("podman", &["rm", name]);
    assert_eq!(host.links().len(), 0, "{:?}", host.links());
    let _ = Command::new("ip").args(["link", "delete", "br7"]).output();
}

/// One whose keeper was killed while it stood still may run elsewhere: not even its policy starts it again.
pub(crate) fn podman_does_not_start_what_was_held(host: &Host) {
    let more = ["--security-opt=seccomp=unconfined", "--restart=always"];
    let mut pod = Pod::start(host, "ph", &more, COUNTER);
    await_count(pod.name(), 2);
    pod.adopt();
    let pid = inspect(pod.name())["State"]["Pid"].as_u64().expect("a process");
    let mut source = pod.spot.source();
    source.pause().expect("pause");
    // What it said last, or the number before: what it says goes through a pipe, whose reader may be late.
    let noted = fs::read_to_string(format!("/proc/{pid}/root/dev/shm/count"));
    let before = noted.expect("a count").trim().parse::<u64>().expect("a number");
    pod.spot.kill_keeper();
    drop(source);
    pod.spot.backend().sweep(&pod.spot.spec, &pod.spot.place).expect("sweep");
    await_status(pod.name(), "exited");
    thread::sleep(Duration::from_millis(300));
    assert_eq!(inspect(pod.name())["State"]["Status"], "exited");
    let after = last_count(pod.name());
    assert!(after <= before + 1, "it ran again, from {before} to {after}");
    host.assert_nothing_left("ph");
}

/// A move that comes to nothing leaves nothing of it with the next podman.
pub(crate) fn podman_forgets_what_did_not_come(host: &Host) {
    let mut pod = Pod::start(host, "pf", &["--security-opt=seccomp=unconfined"], COUNTER);
    await_count(pod.name(), 2);
    pod.adopt();
    for load in [false, true] {
        let there = pod.spot.twin("pn");
        let mut source = pod.spot.source();
        let mut destination = there.prepare(&mut *source);
        assert_eq!(inspect(&there.place.name)["State"]["Status"], "created");
        if load {
            source.pause().expect("pause");
            crate::support::copy_pages(&mut *source, &mut *destination);
            destination.load(source.save().expect("save")).expect("load");
        }
        destination.discard().expect("discard");
        drop(destination);
        source.resume().expect("resume");
        drop(source);
        let exists =
            Command::new("podman").args(["container", "exists", &there.place.name]).status();
        assert!(!exists.expect("podman").success(), "podman kept it");
        host.assert_nothing_left("pn");
        no_commands_left();
        await_count(pod.name(), last_count(pod.name()) + 2);
    }
}

/// While podman does not remove what did not come, it stays ours, and is removed by who sweeps.
pub(crate) fn podman_that_forgets_nothing_is_asked_again(host: &Host) {
    let mut pod = Pod::start(host, "pr", &["--security-opt=seccomp=unconfined"], COUNTER);
    await_count(pod.name(), 2);
    pod.adopt();
    let there = pod.spot.twin("pt");
    let mut source = pod.spot.source();
    let mut destination = there.prepare(&mut *source);
    let name = there.place.name.clone();
    let other = format!("{name}-other");
    let by = format!("--pid=container:{name}");
    does("podman", &["create", "--name", &other, &by, "localhost/shell", "/bin/true"]);
    let mark = there.place.dir.join("container.claim");
    destination.discard().expect("all but podman's record of it is taken away");
    drop(destination);
    for _ in 0..2 {
        assert!(mark.exists(), "nobody would try it again");
        assert_eq!(inspect(&name)["State"]["Status"], "created");
        let error =
            there.backend().sweep(&there.spec, &there.place).expect_err("another depends on it");
        assert!(error.to_string().contains("rm --force"), "{error}");
    }
    does("podman", &["rm", &other]);
    there.backend().sweep(&there.spec, &there.place).expect("swept");
    let exists = Command::new("podman").args(["container", "exists", &name]).status();
    assert!(!exists.expect("podman").success(), "podman kept it");
    assert!(!mark.exists());
    source.resume().expect("resume");
    drop(source);
    host.assert_nothing_left("pt");
    no_commands_left();
    await_count(pod.name(), last_count(pod.name()) + 2);
}

/// A podman that gives its start up does so before anything runs: the container goes on where it was.
pub(crate) fn podman_that_gave_up_is_asked_for_nothing(host: &Host) {
    let mut pod = Pod::start(host, "pi", &["--security-opt=seccomp=unconfined"], COUNTER);
    await_count(pod.name(), 2);
    pod.adopt();
    let there = pod.spot.twin("pj");
    let mut source = pod.spot.source();
    let mut destination = there.prepare(&mut *source);
    let id = inspect(&there.place.name)["Id"].as_str().expect("an id").to_owned();
    source.pause().expect("pause");
    crate::support::copy_pages(&mut *source, &mut *destination);
    destination.load(source.save().expect("save")).expect("load");
    let line = ["podman", "start", "--", &id, ""].join("\0");
    let entries = fs::read_dir("/proc").expect("processes").flatten();
    let mut starting =
        entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|it| it == line.as_bytes())
        });
    let pid = starting.next().expect("podman waits to hear that it runs").to_string();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    let keeper = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("a parent");
    let threads = format!("/proc/{}/task", keeper.trim());
    let waits = |entry: fs::DirEntry| {
        fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.trim() == "podman")
    };
    let somebody_waits = || fs::read_dir(&threads).expect("threads").flatten().any(waits);
    assert!(somebody_waits());
    does("kill", &["-KILL", &pid]);
    await_that("its keeper to know", || !somebody_waits());
    let error = destination.activate(1).expect_err("podman knows nothing of it");
    assert!(error.to_string().contains("podman"), "{error}");
    destination.discard().expect("discard");
    drop(destination);
    source.resume().expect("resume");
    drop(source);
    await_count(pod.name(), last_count(pod.name()) + 2);
    host.assert_nothing_left("pj");
    no_commands_left();
}

/// A keeper that died before it knew what podman called the container leaves nothing of it either; and what has
/// run is never taken for that.
pub(crate) fn podman_forgets_what_was_not_noted(host: &Host) {
    let mut pod = Pod::start(host, "pk", &["--security-opt=seccomp=unconfined"], COUNTER);
    await_count(pod.name(), 2);
    pod.adopt();
    let there = pod.spot.twin("pl");
    let mut source = pod.spot.source();
    let destination = there.prepare(&mut *source);
    let name = there.place.name.clone();
    let rootfs = inspect(&name)["Rootfs"].clone();
    let mark = there.place.dir.join("container.claim");
    let text = fs::read(&mark).expect("a mark");
    let mut said: Value = serde_json::from_slice(&text).expect("JSON");
    assert_eq!(said["arriving"]["rootfs"], rootfs);
    there.kill_keeper();
    drop((destination, source));
    said.as_object_mut().expect("a mark").remove("arriving");
    for (name, goes) in [(pod.name(), false), (&name, true)] {
        said["coming"] = json!({"name": name, "rootfs": rootfs, "volumes": []});
        fs::write(&mark, said.to_string()).expect("written");
        let swept = there.backend().sweep(&there.spec, &there.place);
        swept.expect("swept");
        let exists = Command::new("podman").args(["container", "exists", name]).status();
        assert_eq!(exists.expect("podman").success(), !goes, "{name}");
    }
    no_commands_left();
    await_count(pod.name(), last_count(pod.name()) + 2);
}

/// Volumes with options, and one that others have there, are refused.
pub(crate) fn podman_says_what_does_not_go_along(host: &Host) {
    set_up(host);
    does("podman", &["volume", "create", "--opt=o=uid=5", "ps-own"]);
    let mut pod = Pod::start(host, "pq", &["--volume=ps-own:/vol"], COUNTER);
    await_count(pod.name(), 1);
    let against = pod.reasons();
    assert!(against.len() == 1 && against[0].contains("options of its own"), "{against:?}");
    remove(pod.name());
    pod = Pod::start(host, "pp", &["--volume=ps-data:/vol"], COUNTER);
    await_count(pod.name(), 1);
    pod.adopt();
    let data = Path::new("/var/lib/containers/storage/volumes/ps-data/_data");
    let against = pod.refused_there(data);
    let said = |text: &str| against.iter().any(|refusal| refusal.contains(text));
    assert!(said(&format!("that of another container there ({})", pod.name())), "{against:?}");
    pod.spot.backend().let_go(&pod.spot.place).expect("let go");
    drop(pod);
    does("podman", &["volume", "rm", "ps-own", "ps-data"]);
}
