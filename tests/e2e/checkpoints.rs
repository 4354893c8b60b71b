//! Checkpoints in files: both kinds go into one and come out of it as they were, damage and lies are refused
//! before anything is touched, and a checkpoint that fails leaves the workload running.

use std::fs;
use std::path::PathBuf;

use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, Hosts, hosts};
use crate::redis::Redis;
use crate::refusals::{refused, untouched};
use crate::running::Ran;
use crate::snapshot::Snapshot;
use crate::{Needs, Test};

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("checkpoints::vm_to_another_host", Needs::Kvm, vm),
        Test::new("checkpoints::vm_that_runs_on_and_its_copy", Needs::Kvm, copy),
        Test::new("checkpoints::container_to_another_host", Needs::Containers, container),
        Test::new("checkpoints::container_that_runs_on", Needs::Containers, container_runs_on),
        Test::new("checkpoints::damaged_files", Needs::Kvm, damaged),
        Test::new("checkpoints::names_and_places_that_are_taken", Needs::Kvm, taken),
        Test::new("checkpoints::bad_requests", Needs::Kvm, bad_requests),
        Test::new("checkpoints::no_room_for_the_file", Needs::Kvm, no_room),
        Test::new("checkpoints::container_resumes_after_a_failure", Needs::Containers, resumes),
        Test::new("checkpoints::restore_that_fails_leaves_nothing", Needs::Both, fails_half_way),
        Test::new("checkpoints::agent_killed_while_writing", Needs::Kvm, agent_killed),
    ]
}

/// A file in the directory that both hosts see, gone when this is dropped.
pub(crate) struct File(PathBuf);

impl File {
    pub(crate) fn new(hosts: &Hosts, name: &str) -> Self {
        let path = hosts.shared().join(name);
        let _ = fs::remove_file(&path);
        Self(path)
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().expect("a plain path")
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[track_caller]
fn checkpoint(hosts: &Hosts, name: &str, file: &File, options: &[&str]) -> Ran {
    let words = ["checkpoint", name, "--output", file.path(), "--json"];
    hosts.decamp(ALPHA, &[&words[..], options].concat())
}

/// It is stopped here, continues there, and its memory is right.
fn vm() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "web", "512M", "fill=128 hot=8 report=50");
    let file = File::new(hosts, "web.tar.zst");
    let made = checkpoint(hosts, "web", &file, &[]).expect(0).json();
    assert_eq!(made["left_running"], false);
    // Sparse: of 512 MiB the guest has touched little more than 128.
    let bytes = made["bytes"].as_u64().expect("a number");
    assert!((128 << 20..160 << 20).contains(&bytes), "{made}");
    assert_eq!(hosts.state(ALPHA, "web").as_deref(), Some("stopped"));
    let detail = hosts.decamp(ALPHA, &["inspect", "web", "--json"]).expect(0).json();
    assert_eq!(detail["exit"]["text"], format!("checkpointed to {}", file.path()));
    let restored = hosts.decamp(BETA, &["restore", file.path(), "--json"]).expect(0).json();
    assert_eq!(restored["state"], "running");
    guest.verify(BETA);
    // It can be moved like any other.
    hosts.decamp(ALPHA, &["rm", "web", "--yes"]).expect(0);
    hosts.decamp(BETA, &["migrate", "web", "--to", "alpha"]).expect(0);
    guest.verify(ALPHA);
}

/// With --leave-running it runs on, and its copy is another workload of the same host.
fn copy() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "web", "128M", "fill=32 hot=4 report=50");
    let file = File::new(hosts, "web.tar.zst");
    checkpoint(hosts, "web", &file, &["--leave-running"]).expect(0);
    guest.verify(ALPHA);
    let words = ["restore", file.path(), "--name", "web-2", "--json"];
    let copy = hosts.decamp(ALPHA, &words).expect(0).json();
    let original = hosts.decamp(ALPHA, &["inspect", "web", "--json"]).expect(0).json();
    assert_ne!(copy["uuid"], original["uuid"], "a copy is another workload");
    guest.verify(ALPHA);
    let copy = Guest::found(hosts, "web-2");
    copy.verify(ALPHA);
}

/// A Redis with its values, its client's connection and its files.
fn container() {
    let hosts = hosts();
    hosts.mend();
    let redis = Redis::start(hosts, ALPHA, "redis", 40);
    let mut client = redis.client(64, 500);
    client.report();
    hosts.exec(ALPHA, &["sh", "-c", "echo kept > /srv/redis/rootfs/data/note"]).expect(0);
    let file = File::new(hosts, "redis.tar.zst");
    let before = hosts.state(BETA, "redis");
    assert_eq!(before, None);
    checkpoint(hosts, "redis", &file, &[]).expect(0);
    assert_eq!(hosts.state(ALPHA, "redis").as_deref(), Some("stopped"));
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &fs::metadata(&file.0).expect("a file").permissions(),
    );
    assert_eq!(mode & 0o777, 0o600, "it holds all of its memory");
    hosts.decamp(BETA, &["restore", file.path()]).expect(0);
    // The very same connection goes on, and every value is as it was.
    client.is_served();
    client.finish();
    let note = hosts.exec(BETA, &["cat", "/srv/redis/rootfs/data/note"]).expect(0);
    assert_eq!(note.stdout, "kept\n");
}

/// The client notices a silence and nothing else.
fn container_runs_on() {
    let hosts = hosts();
    hosts.mend();
    let redis = Redis::start(hosts, ALPHA, "redis", 41);
    let mut client = redis.client(32, 500);
    let file = File::new(hosts, "redis.tar.zst");
    let before = Snapshot::take(hosts);
    checkpoint(hosts, "redis", &file, &["--leave-running"]).expect(0);
    client.is_served();
    let bytes = fs::read(&file.0).expect("a file");
    fs::remove_file(&file.0).expect("removed");
    before.is_restored();
    fs::write(&file.0, bytes).expect("written");
    let before = Snapshot::take(hosts);
    // Its copy needs a name and a place of its own, and says so.
    let ran = hosts.decamp(ALPHA, &["restore", file.path()]);
    refused(ran, &["The name redis is taken", "--path /srv/redis=NEW"]);
    before.is_restored();
    client.finish();
}

/// A file that was cut or spoiled anywhere is refused, and nothing is touched.
fn damaged() {
    untouched(|hosts, guest| {
        let file = File::new(hosts, "idle.tar.zst");
        checkpoint(hosts, guest.name(), &file, &["--leave-running"]).expect(0);
        let whole = fs::read(&file.0).expect("a file");
        let bad = File::new(hosts, "bad.tar.zst");
        let restore = |bytes: &[u8], says: &str| {
            fs::write(&bad.0, bytes).expect("written");
            let ran = hosts.decamp(BETA, &["restore", bad.path(), "--name", "bad"]);
            refused(ran, &[says]);
            assert_eq!(hosts.state(BETA, "bad"), None);
        };
        restore(&[], "it is empty");
        restore(b"no checkpoint at all", "not compressed by zstd");
        for tenth in 1..10 {
            restore(&whole[..whole.len() * tenth / 10], "cut short");
        }
        restore(&whole[..whole.len() - 1], "cut short");
        for tenth in 1..10 {
            let mut spoiled = whole.clone();
            spoiled[whole.len() * tenth / 10] ^= 0x10;
            restore(&spoiled, "cannot be restored");
        }
        let more = [&whole[..], b"x"].concat();
        restore(&more, "cannot be restored");
        refused(hosts.decamp(BETA, &["restore", "/nowhere.tar.zst"]), &["Cannot open"]);
        refused(hosts.decamp(BETA, &["restore", "/srv"]), &["it is no file"]);
    });
}

fn taken() {
    untouched(|hosts, guest| {
        let file = File::new(hosts, "idle.tar.zst");
        checkpoint(hosts, guest.name(), &file, &["--leave-running"]).expect(0);
        let ran = hosts.decamp(ALPHA, &["restore", file.path()]);
        refused(ran, &["The name idle is taken", "--name"]);
        // A file that is there is never replaced.
        let before = fs::read(&file.0).expect("a file");
        let ran = checkpoint(hosts, guest.name(), &file, &["--leave-running"]);
        refused(ran, &["exists already"]);
        assert!(fs::read(&file.0).expect("a file") == before);
        // Neither is another kernel that stands where the guest's should.
        hosts.exec(BETA, &["sh", "-c", "echo other > /srv/other.elf"]).expect(0);
        let words = ["restore", file.path(), "--path", "/srv/guest.elf=/srv/other.elf"];
        refused(hosts.decamp(BETA, &words), &["another file stands there"]);
        hosts.exec(BETA, &["rm", "/srv/other.elf"]).expect(0);
        let words = ["restore", file.path(), "--path", "/srv/guest.elf=/proc/x"];
        refused(hosts.decamp(BETA, &words), &["no place for files"]);
    });
}

fn bad_requests() {
    untouched(|hosts, guest| {
        let none = ["checkpoint", "none", "--output", "/srv/x"];
        refused(hosts.decamp(ALPHA, &none), &["no workload none"]);
        let nowhere = ["checkpoint", guest.name(), "--output", "/none/at/all"];
        refused(hosts.decamp(ALPHA, &nowhere), &["no directory"]);
        hosts.decamp(ALPHA, &["checkpoint", guest.name()]).expect(2);
        hosts.decamp(ALPHA, &["restore"]).expect(2);
        hosts.decamp(ALPHA, &["restore", "/srv/x", "--name", "No/Name"]).expect(2);
    });
}

/// The disk is full before the file is: exit code 4, the guest runs on, nothing is left of the file.
fn no_room() {
    untouched(|hosts, guest| {
        hosts.exec(ALPHA, &["mkdir", "/srv/small"]).expect(0);
        {
            let _disk = hosts.small_disk(ALPHA, "/srv/small", "4M");
            let words = ["checkpoint", guest.name(), "--output", "/srv/small/x.tar.zst"];
            let ran = hosts.decamp(ALPHA, &words).expect(4);
            assert!(ran.stderr.contains("No space left on device"), "{ran}");
            assert!(ran.stderr.contains("was resumed and runs on"), "{ran}");
            assert_eq!(hosts.exec(ALPHA, &["ls", "-A", "/srv/small"]).expect(0).stdout, "");
            guest.runs_clean(ALPHA);
        }
        hosts.exec(ALPHA, &["rmdir", "/srv/small"]).expect(0);
    });
}

/// Whatever fails on the way, the container and its connection live on.
fn resumes() {
    let hosts = hosts();
    hosts.mend();
    let redis = Redis::start(hosts, ALPHA, "redis", 42);
    let mut client = redis.client(8, 500);
    let file = File::new(hosts, "redis.tar.zst");
    for failpoint in ["checkpoint-paused=return", "checkpoint-part=return"] {
        hosts.with_failpoints(ALPHA, failpoint);
        let before = Snapshot::take(hosts);
        let ran = checkpoint(hosts, "redis", &file, &[]).expect(4);
        assert!(ran.stderr.contains("was resumed and runs on"), "{ran}");
        client.is_served();
        before.is_restored();
        assert!(!file.0.exists());
        assert_eq!(hosts.state(ALPHA, "redis").as_deref(), Some("running"));
    }
    hosts.mend();
    client.finish();
}

/// What could not be loaded is taken away again, files included.
fn fails_half_way() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "web", "128M", "fill=16 hot=1 report=50");
    let redis = Redis::start(hosts, ALPHA, "redis", 43);
    let client = redis.client(8, 500);
    let files = [File::new(hosts, "web.tar.zst"), File::new(hosts, "redis.tar.zst")];
    for (file, name) in files.iter().zip(["web", "redis"]) {
        checkpoint(hosts, name, file, &["--leave-running"]).expect(0);
    }
    for failpoint in [
        "restore-part=return",
        "vm-load=return;container-load=return",
        "vm-activate=return;container-activate=return",
    ] {
        hosts.with_failpoints(BETA, failpoint);
        let before = Snapshot::take(hosts);
        for file in &files {
            let ran = hosts.decamp(BETA, &["restore", file.path()]).expect(1);
            assert!(ran.stderr.contains("nothing is left of it here"), "{ran}");
            before.is_restored();
        }
    }
    hosts.mend();
    guest.runs_clean(ALPHA);
    client.finish();
}

/// The keeper lets the guest run on when nobody comes back, and the file is not there.
fn agent_killed() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "web", "128M", "fill=16 hot=1 report=50");
    let file = File::new(hosts, "web.tar.zst");
    hosts.with_failpoints(ALPHA, "checkpoint-part=pause");
    let words = ["checkpoint", "web", "--output", file.path()];
    let waiting = hosts.begin(ALPHA, &words);
    crate::running::until("the guest to stand still", std::time::Duration::from_secs(120), || {
        !guest.advances(ALPHA)
    });
    hosts.hosts(&["agent", ALPHA, "kill"]).expect(0);
    waiting.ended(std::time::Duration::from_secs(120)).expect(1);
    hosts.start_agent(ALPHA, "");
    guest.runs_clean(ALPHA);
    assert_eq!(hosts.state(ALPHA, "web").as_deref(), Some("running"));
    assert!(!file.0.exists(), "a file is there whole or not at all");
    for left in fs::read_dir(hosts.shared()).expect("a directory").flatten() {
        let name = left.file_name().to_string_lossy().into_owned();
        assert!(name.starts_with(".web.tar.zst."), "{name}");
        fs::remove_file(left.path()).expect("removed");
    }
}
