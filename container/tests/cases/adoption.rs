//! Containers that a runtime started by itself: adopted, moved, given back, and refused with every reason.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use decamp_shared::workload::Backend;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::json;

use crate::runtimes::{assert_listed, crun_can_start, crun_starts, does, says};
use crate::support::redis::Redis;
use crate::support::{Host, Spot, await_that};

/// A container that a runtime started by itself, and its output. Deleted when dropped.
pub(crate) struct Stranger<'a> {
    runtime: &'static str,
    pub(crate) spot: Spot<'a>,
    /// Who reads what it says.
    reader: Option<Child>,
}

impl<'a> Stranger<'a> {
    /// Has `runtime` start the bundle of `spot`, whose output a file gets through a pipe.
    pub(crate) fn start(runtime: &'static str, spot: Spot<'a>) -> Self {
        let mut reader = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(File::create(Self::output_of(&spot)).expect("a file"))
            .spawn()
            .expect("cat");
        let pipe: OwnedFd = reader.stdin.take().expect("a pipe").into();
        let mut stranger = Self::start_with(runtime, spot, &[], pipe);
        stranger.reader = Some(reader);
        stranger
    }

    fn start_with(
        runtime: &'static str,
        spot: Spot<'a>,
        more: &[&str],
        output: impl Into<OwnedFd>,
    ) -> Self {
        let (bundle, output) = (spot.bundle().display().to_string(), output.into());
        let status = Command::new(runtime)
            .args(["run", "--detach", "--bundle", &bundle])
            .args(more)
            .arg(&spot.place.name)
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("copied"))
            .stderr(output)
            .status();
        assert!(status.expect(runtime).success());
        Self { runtime, spot, reader: None }
    }

    /// The same with what `input` says as its standard input, a pipe.
    fn start_reading(runtime: &'static str, spot: Spot<'a>, input: impl Into<OwnedFd>) -> Self {
        let output = File::create(Self::output_of(&spot)).expect("a file");
        let bundle = spot.bundle().display().to_string();
        let mut reader =
            Command::new("cat").stdin(Stdio::piped()).stdout(output).spawn().expect("cat");
        let output: OwnedFd = reader.stdin.take().expect("a pipe").into();
        let status = Command::new(runtime)
            .args(["run", "--detach", "--bundle", &bundle, &spot.place.name])
            .stdin(input.into())
            .stdout(output.try_clone().expect("copied"))
            .stderr(output)
            .status();
        assert!(status.expect(runtime).success());
        Self { runtime, spot, reader: Some(reader) }
    }

    fn output_of(spot: &Spot<'_>) -> PathBuf {
        spot.bundle().join("output")
    }

    fn id(&self) -> &str {
        &self.spot.place.name
    }

    pub(crate) fn what(&self) -> String {
        format!("{}:{}", self.runtime, self.id())
    }

    fn pid(&self) -> String {
        let state = says(self.runtime, &["state", self.id()]);
        let state: serde_json::Value = serde_json::from_str(&state).expect("JSON");
        state["pid"].to_string()
    }

    /// The last number that it said to its own reader.
    pub(crate) fn last_count(&self) -> u64 {
        let text = fs::read_to_string(Self::output_of(&self.spot)).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().filter_map(|line| line.parse().ok()).next_back().unwrap_or(0)
    }

    /// Waits until it has said this to its own reader.
    pub(crate) fn await_said(&self, text: &str) {
        let said = || fs::read_to_string(Self::output_of(&self.spot)).unwrap_or_default();
        await_that(text, || said().contains(text));
    }

    pub(crate) fn await_count(&self, count: u64) {
        await_that(&format!("it to count to {count}"), || self.last_count() >= count);
    }

    /// Waits until its own reader has had all that it ever says here.
    fn await_last_words(&mut self) {
        let reader = self.reader.as_mut().expect("it has one");
        await_that("the end of what it says", || reader.try_wait().expect("a child").is_some());
    }

    /// Every reason why it cannot be adopted.
    fn reasons(&self) -> Vec<String> {
        let found = self.spot.backend().find_foreign(&self.what());
        let refusals = found.expect_err("it was not refused");
        refusals.into_iter().map(|refusal| refusal.text).collect()
    }

    pub(crate) fn adopt(&mut self) {
        let backend = self.spot.backend();
        let found = backend.find_foreign(&self.what()).expect("nothing against it");
        assert_eq!(found.name, self.id());
        self.spot.spec = found.spec;
        backend.adopt(&self.spot.spec, &self.spot.place).expect("adopted");
    }
}

impl Drop for Stranger<'_> {
    fn drop(&mut self) {
        let null = || Stdio::null();
        let mut delete = Command::new(self.runtime);
        delete.args(["delete", "--force", self.id()]).stdout(null()).stderr(null());
        let _ = delete.status();
        if let Some(reader) = &mut self.reader {
            let _ = reader.kill().and_then(|()| reader.wait());
        }
    }
}

/// What nobody has read of a pipe goes along, twice, and its end comes after it; before that whoever reads
/// waits.
pub(crate) fn adopted_input_goes_along(host: &Host) {
    let line = "i=0; while [ ! -e /data/go ]; do i=$((i+1)); echo $i; usleep 100000; done; \
        while read word; do echo got $word; done; echo end; while :; do usleep 100000; done";
    for ended in [false, true] {
        let name = format!("in-{}", u8::from(ended));
        let (input, mut writer) = std::io::pipe().expect("a pipe");
        writer.write_all(b"one\ntwo\n").expect("written");
        let spot = host.shell(&name, line);
        let mut stranger = Stranger::start_reading("runc", spot, input);
        let writer = (!ended).then_some(writer);
        stranger.await_count(3);
        stranger.adopt();
        let there = stranger.spot.twin(&format!("{name}b"));
        stranger.spot.move_to(&there);
        there.await_count(stranger.last_count() + 3);
        let again = there.twin(&format!("{name}c"));
        there.move_to(&again);
        again.await_count(there.last_count() + 3);
        fs::write(again.bundle().join("rootfs/data/go"), "").expect("written");
        again.await_log("got one\ngot two\n");
        if ended {
            again.await_log("got two\nend\n");
        } else {
            thread::sleep(Duration::from_millis(300));
            let said = fs::read_to_string(again.place.log()).expect("a log");
            assert!(!said.contains("end"), "{said}");
        }
        drop(writer);
        again.stop();
        host.assert_nothing_left(&format!("{name}c"));
    }
}

fn adopted_moves(host: &Host, runtime: &'static str) {
    let mut stranger = Stranger::start(runtime, host.counter(&format!("ad-{runtime}")));
    stranger.await_count(3);
    stranger.adopt();
    let before = stranger.last_count();
    stranger.await_count(before + 3);
    assert_listed(runtime, stranger.id(), "running");
    // Another one has no part in it.
    let reasons = stranger.reasons();
    assert!(reasons.len() == 1 && reasons[0].contains("adopted already"), "{reasons:?}");
    let there = stranger.spot.twin(&format!("ad-{runtime}-2"));
    stranger.spot.move_live(&there, 2);
    stranger.await_last_words();
    let before = stranger.last_count();
    there.await_count(before + 3);
    let first = there.counts()[0];
    // Every number is said once, here or there: one that ran on while it was ended would say some twice.
    assert_eq!(first, before + 1, "went on at {first} after {before}");
    assert_eq!(stranger.last_count(), before, "it runs twice");
    host.assert_nothing_left(stranger.id());
    let freezer = PathBuf::from("/sys/fs/cgroup/freezer").join(stranger.id());
    assert!(!freezer.exists(), "its cgroup stayed");
    // There it is like any other, and in its runtime's hands too.
    let id = there.place.name.clone();
    assert_listed(runtime, &id, "running");
    let said = says(runtime, &["exec", &id, "/bin/busybox", "cat", "/data/count"]);
    assert!(said.trim().parse::<u64>().expect("a number") >= before);
    // And back, under the name that it had.
    let home = there.twin(stranger.id());
    there.move_to(&home);
    home.await_count(there.last_count() + 2);
    does(runtime, &["kill", stranger.id(), "KILL"]);
    home.await_exit();
    assert_eq!(home.exit_record()["status"], 137);
    host.assert_nothing_left(&id);
}

pub(crate) fn adopted_from_runc_moves(host: &Host) {
    adopted_moves(host, "runc");
}

pub(crate) fn adopted_from_crun_moves(host: &Host) {
    if crun_starts(host) {
        adopted_moves(host, "crun");
    }
}

/// With an interface that somebody made, an address, and a client that stays connected.
pub(crate) fn adopted_redis_keeps_its_connection(host: &Host) {
    let spot = host.redis("adr", "10.99.0.9/24", &[]);
    let null = File::options().write(true).open("/dev/null").expect("opens");
    let mut stranger = Stranger::start_with("runc", spot, &[], null);
    let pid = stranger.pid();
    let inside = |arguments: &str| {
        let line = format!("-t {pid} -n ip {arguments}");
        does("nsenter", &line.split(' ').collect::<Vec<_>>());
    };
    let add = format!("link add adr0 type veth peer name eth0 netns {pid}");
    host.ip(&add.split(' ').collect::<Vec<_>>());
    host.ip(&["link", "set", "adr0", "master", "br0", "up"]);
    inside("address add 10.99.0.9/24 dev eth0");
    inside("link set eth0 up");
    inside("link set lo up");
    let mut redis = Redis::connect("10.99.0.9:6379");
    redis.fill(16 << 20, 5);
    let digest = redis.ask(&["DEBUG", "DIGEST"]);
    stranger.adopt();
    assert_eq!(stranger.spot.spec["net"]["bridge"], "br0");
    assert_eq!(stranger.spot.spec["net"]["ip"], "10.99.0.9/24");
    // Rolled back it is as it was.
    let mut source = stranger.spot.source();
    source.pause().expect("pause");
    source.save().expect("save");
    source.resume().expect("resume");
    drop(source);
    assert_eq!(redis.ask(&["PING"]), "PONG");
    let there = stranger.spot.twin("adr2");
    stranger.spot.move_live(&there, 2);
    assert_eq!(redis.ask(&["DEBUG", "DIGEST"]), digest);
    assert_eq!(redis.ask(&["SET", "after", "1"]), "OK");
    assert_eq!(host.links().len(), 1, "the interface of the source stayed");
    there.stop();
    host.assert_nothing_left("adr2");
    assert_eq!(host.links().len(), 0);
}

/// What somebody else started is not ended with what is decamp's.
pub(crate) fn given_back_it_runs_on(host: &Host) {
    let mut stranger = Stranger::start("runc", host.counter("gb"));
    stranger.await_count(2);
    let backend = stranger.spot.backend();
    stranger.adopt();
    backend.let_go(&stranger.spot.place).expect("let go");
    let before = stranger.last_count();
    stranger.await_count(before + 3);
    assert_listed("runc", stranger.id(), "running");
    assert!(!stranger.spot.place.dir.join("container.claim").exists());
    // A keeper that is killed takes nothing with it.
    stranger.adopt();
    stranger.spot.kill_keeper();
    backend.sweep(&stranger.spot.spec, &stranger.spot.place).expect("sweep");
    let before = stranger.last_count();
    stranger.await_count(before + 3);
    assert_listed("runc", stranger.id(), "running");
    // Stopped it is for its runtime to delete, or to look at.
    stranger.adopt();
    backend.stop(&stranger.spot.spec, &stranger.spot.place, None).expect("stop");
    backend.sweep(&stranger.spot.spec, &stranger.spot.place).expect("sweep");
    assert_listed("runc", stranger.id(), "stopped");
    let again = backend.check(&stranger.spot.spec);
    assert!(again.iter().any(|refusal| refusal.text.contains("adopt it again")), "{again:?}");
    let reasons = stranger.reasons();
    assert!(reasons[0].contains("has stopped"), "{reasons:?}");
}

/// One whose keeper was killed while it stood still may run elsewhere: it does not run here again.
pub(crate) fn held_it_does_not_run_again(host: &Host) {
    let mut stranger = Stranger::start("runc", host.counter("ah"));
    stranger.await_count(2);
    stranger.adopt();
    let mut source = stranger.spot.source();
    source.pause().expect("pause");
    let before = stranger.spot.noted();
    stranger.spot.kill_keeper();
    drop(source);
    let backend = stranger.spot.backend();
    backend.sweep(&stranger.spot.spec, &stranger.spot.place).expect("sweep");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(stranger.spot.noted(), before, "it ran again");
    stranger.await_last_words();
    assert!(stranger.last_count() <= before + 1, "it ran again");
    host.assert_nothing_left("ah");
}

/// A cgroup that it makes during a move does not go along, and what would be left in it is not.
pub(crate) fn a_cgroup_below_its_own_keeps_it_here(host: &Host) {
    let mut stranger = Stranger::start("runc", host.counter("ac"));
    stranger.await_count(2);
    stranger.adopt();
    let mut source = stranger.spot.source();
    source.track().expect("track");
    let below = PathBuf::from("/sys/fs/cgroup/freezer").join(stranger.id()).join("below");
    fs::create_dir(&below).expect("a cgroup");
    let error = source.pause().expect_err("it is left in a cgroup of its own");
    assert!(error.to_string().contains("cgroups of its own"), "{error}");
    let before = stranger.last_count();
    stranger.await_count(before + 3);
    assert!(!stranger.spot.place.dir.join("container.held").exists(), "it would be swept");
    fs::remove_dir(&below).expect("removed");
    source.pause().expect("pause");
    assert!(stranger.spot.place.dir.join("container.held").exists(), "it may run elsewhere");
    source.resume().expect("resume");
    assert!(!stranger.spot.place.dir.join("container.held").exists(), "it would be swept");
    drop(source);
    // Whoever ended it may have taken its cgroups away too, while its end was told.
    stranger.spot.stop();
    assert_listed("runc", stranger.id(), "stopped");
}

/// Its end is told, although it is nobody's child here.
pub(crate) fn the_end_of_an_adopted_one_is_told(host: &Host) {
    let mut stranger = Stranger::start("runc", host.counter("ae"));
    stranger.await_count(2);
    stranger.adopt();
    does("runc", &["kill", stranger.id(), "KILL"]);
    stranger.spot.await_exit();
    let record = stranger.spot.exit_record();
    let text = record["text"].as_str().expect("a text").to_owned();
    match record["status"].as_i64() {
        Some(137) => assert_eq!(text, "killed by SIGKILL"),
        // Before Linux 6.15, or where nobody reaps it.
        status => assert!(status == Some(1) && text.contains("parent alone"), "{record}"),
    }
    assert_listed("runc", stranger.id(), "stopped");
}

/// The master of its terminal is somebody else's; at the destination it is the keeper's.
pub(crate) fn adopted_terminal_goes_along(host: &Host) {
    let spot = host.shell(
        "at",
        "stty rows 21 cols 43; n=0; while :; do n=$((n+1)); echo \"$n $(stty size)\"; usleep 100000; done",
    );
    spot.change_config(|config| config["process"]["terminal"] = json!(true));
    let path = spot.bundle().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("listens");
    let taker = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("accepts");
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut name = [0; 256];
        let mut parts = [std::io::IoSliceMut::new(&mut name)];
        let message =
            recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty());
        let message = message.expect("a message");
        let mut control = message.cmsgs().expect("control messages");
        match control.next() {
            Some(ControlMessageOwned::ScmRights(numbers)) => numbers[0],
            other => panic!("no descriptor: {other:?}"),
        }
    });
    let null = File::options().write(true).open("/dev/null").expect("opens");
    let socket = path.display().to_string();
    let mut stranger = Stranger::start_with("runc", spot, &["--console-socket", &socket], null);
    let master = taker.join().expect("a master");
    stranger.adopt();
    assert_eq!(stranger.spot.spec["tty"], true);
    let there = stranger.spot.twin("at2");
    stranger.spot.move_live(&there, 2);
    there.await_log("21 43");
    let log = fs::read_to_string(there.place.log()).expect("a log");
    let first = log.lines().find(|line| line.ends_with("21 43")).expect("a line");
    let count: u64 = first.split(' ').next().and_then(|word| word.parse().ok()).expect("a number");
    assert!(count >= 2, "it began anew: {log}");
    assert!(there.place.dir.join("console.sock").exists());
    there.stop();
    nix::unistd::close(master).expect("closed");
    host.assert_nothing_left("at2");
}

/// Its runtime waits for it, and so does whoever may start it again.
fn waited_for(host: &Host, runtime: &'static str) {
    let spot = host.counter(&format!("na6-{runtime}"));
    let (bundle, id) = (spot.bundle().display().to_string(), spot.place.name.clone());
    let mut waits = Command::new(runtime)
        .args(["run", "--bundle", &bundle, &id])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect(runtime);
    let stranger = Stranger { runtime, spot, reader: None };
    let begun = Instant::now();
    let reasons = loop {
        let reasons = stranger.reasons();
        let waiting = reasons.iter().any(|reason| reason.contains("waits for the container"));
        if waiting || begun.elapsed() > Duration::from_secs(120) {
            break reasons;
        }
        thread::sleep(Duration::from_millis(50));
    };
    assert!(reasons.iter().any(|it| it.contains("waits for the container")), "{reasons:?}");
    drop(stranger);
    waits.wait().expect("the runtime ended");
}

/// Whatever speaks against it is said at once, and it is not touched.
pub(crate) fn what_cannot_be_adopted(host: &Host) {
    let backend = host.counter("na").backend();
    let one = |what: &str| -> String {
        let refusals = backend.find_foreign(what).expect_err("it was not refused");
        assert_eq!(refusals.len(), 1, "{refusals:?}");
        refusals[0].text.clone()
    };
    assert!(one("runc:decamp-moves-nobody").contains("runc has no container"));
    assert!(one("crun:../runc/x").contains("is no name of a container"));
    assert!(one("kata:web").contains("cannot be adopted in this version"));

    // Its output goes to a file of the host's, its network is the host's, its bundle is gone.
    let spot = host.counter("na1");
    spot.change_config(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("namespaces");
        namespaces.retain(|namespace| namespace["type"] != "network");
        config["mounts"].as_array_mut().expect("mounts").retain(|mount| mount["type"] != "sysfs");
    });
    let output = File::create(Stranger::output_of(&spot)).expect("a file");
    let stranger = Stranger::start_with("runc", spot, &[], output);
    stranger.await_count(2);
    let away = stranger.spot.bundle().with_extension("away");
    fs::rename(stranger.spot.bundle(), &away).expect("renamed");
    let reasons = stranger.reasons();
    fs::rename(&away, stranger.spot.bundle()).expect("renamed back");
    for text in ["is gone or damaged", "standard output is", "the host's network namespace"] {
        assert_eq!(reasons.iter().filter(|reason| reason.contains(text)).count(), 1, "{reasons:?}");
    }
    let before = stranger.last_count();
    stranger.await_count(before + 2);
    drop(stranger);

    // Somebody else is in its network namespace.
    let stranger = Stranger::start("runc", host.counter("na5"));
    let mut sharer = Command::new("nsenter")
        .args(["--target", &stranger.pid(), "--net", "sleep", "600"])
        .spawn()
        .expect("nsenter");
    stranger.await_count(2);
    let reasons = stranger.reasons();
    sharer.kill().and_then(|()| sharer.wait()).expect("ended");
    assert!(
        reasons.len() == 1 && reasons[0].contains("is in the container's network namespace"),
        "{reasons:?}"
    );
    drop(stranger);
    let both: &[&'static str] = if crun_can_start() { &["runc", "crun"] } else { &["runc"] };
    both.iter().for_each(|runtime| waited_for(host, runtime));

    // Paused, and not started.
    let stranger = Stranger::start("runc", host.counter("na2"));
    does("runc", &["pause", stranger.id()]);
    let reasons = stranger.reasons();
    assert!(reasons.len() == 1 && reasons[0].contains("is paused"), "{reasons:?}");
    does("runc", &["resume", stranger.id()]);
    drop(stranger);
    for &runtime in both {
        let spot = host.counter(&format!("na3-{runtime}"));
        let bundle = spot.bundle().display().to_string();
        does(runtime, &["create", "--bundle", &bundle, &spot.place.name]);
        let stranger = Stranger { runtime, spot, reader: None };
        let reasons = stranger.reasons();
        assert!(reasons.len() == 1 && reasons[0].contains("not started"), "{reasons:?}");
    }

    // One that is decamp's own, whoever asks.
    let ours = host.counter("na4");
    ours.run();
    ours.await_count(2);
    let name = ours.place.name.clone();
    let refusals = backend.find_foreign(&format!("runc:{name}")).expect_err("it is ours");
    assert!(refusals.iter().any(|refusal| refusal.text.contains("of an agent of decamp already")));
    ours.stop();
}
