//! Containers in a user namespace: whoever is root in them is nobody on the host.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use decamp_shared::methods::{ForkedChoice, Methods};
use decamp_shared::pages::{PageRange, PageSet, SpaceId};
use decamp_shared::workload::Backend;
use serde_json::json;

use crate::adoption::Stranger;
use crate::filters::{ALLOWED, profile};
use crate::forked::assert_all_fine;
use crate::runtimes::{crun_starts, does, says};
use crate::segments;
use crate::support::redis::{Busy, Redis};
use crate::support::{self, Case, HUNGRY, Host, Spot};

pub(crate) const CASES: [Case; 11] = [
    Case { name: "a_user_namespace_moves_under_runc", run: under_runc },
    Case { name: "a_user_namespace_moves_under_crun", run: under_crun },
    Case { name: "mapped_redis_keeps_its_connection_under_runc", run: redis_under_runc },
    Case { name: "mapped_redis_keeps_its_connection_under_crun", run: redis_under_crun },
    Case { name: "adopted_with_a_user_namespace", run: adopted },
    Case { name: "mapped_out_of_a_file", run: out_of_a_file },
    Case { name: "mapped_and_forked", run: forked },
    Case { name: "mapped_and_filtered", run: filtered },
    Case { name: "mapped_withheld_page_is_noticed", run: withheld_page_is_noticed },
    Case { name: "mapped_without_a_bridge_it_stays", run: without_a_bridge_it_stays },
    Case { name: "mapped_keeper_dead_in_a_filling", run: keeper_dead_in_a_filling },
];

/// A setting of its network namespace.
const PORTS: &str = "net.ipv4.ip_unprivileged_port_start";
/// The host's user that is root in the container.
const ROOT: u32 = 100_000;

fn under_runc(host: &Host) {
    moves_under(host, "runc");
}

fn under_crun(host: &Host) {
    if crun_starts(host) {
        moves_under(host, "crun");
    }
}

fn moves_under(host: &Host, runtime: &str) {
    // With threads and a child; with shared memory of all kinds.
    for (program, rounds) in [("memory", 3), ("segments", 8), ("shared_files", 8)] {
        moves(host, runtime, program, rounds);
    }
}

fn redis_under_runc(host: &Host) {
    redis(host, "runc", "10.99.0.23");
}

fn redis_under_crun(host: &Host) {
    if crun_starts(host) {
        redis(host, "crun", "10.99.0.24");
    }
}

/// Its connection is taken up again by who is root in the user namespace alone, there and back.
fn redis(host: &Host, runtime: &str, ip: &str) {
    let name = |turn: u32| format!("mr-{runtime}{turn}");
    let mut here = host.redis(&name(0), &format!("{ip}/24"), &[]);
    here.spec["runtime"] = json!(runtime);
    map(host, &here);
    close(&here);
    here.run();
    let address = format!("{ip}:6379");
    let mut redis = Redis::connect(&address);
    redis.fill(32 << 20, 7);
    let digest = redis.ask(&["DEBUG", "DIGEST"]);
    for turn in 1..=4 {
        let there = here.twin(&name(turn));
        close(&there);
        let busy = Busy::begin(&address);
        let moved = here.move_live(&there, 3);
        busy.end().assert_no_longer_than(&moved);
        assert_eq!(moved.arrived.restore.as_deref(), Some("lazy"), "{:?}", moved.arrived);
        assert_eq!(redis.ask(&["DEL", "busy"]), "1");
        assert_eq!(redis.ask(&["DEBUG", "DIGEST"]), digest);
        here = there;
    }
    assert_eq!(Redis::connect(&address).ask(&["DBSIZE"]), redis.ask(&["DBSIZE"]));
    here.stop();
    host.assert_nothing_left(&name(4));
}

fn moves(host: &Host, runtime: &str, program: &str, rounds: u64) {
    let name = |turn: u32| format!("un-{runtime}-{program}{turn}");
    let Some(mut here) = host.program(&name(0), program) else {
        return host.skip("needs cc (tests/setup)");
    };
    here.spec["runtime"] = json!(runtime);
    map(host, &here);
    close(&here);
    here.change_config(|config| config["linux"]["sysctl"] = json!({PORTS: "77"}));
    here.run();
    here.await_rounds(3);
    assert_eq!(execute(runtime, &here).as_deref(), Some("0"));
    assert_eq!(first_port(runtime, &here), "77");
    for turn in 1..=3 {
        let there = here.twin(&name(turn));
        close(&there);
        if program == "segments" {
            assert_eq!(segments::names(&here), segments::MOVED, "before move {turn}");
        }
        let moved = here.move_live(&there, 4);
        assert_eq!(moved.arrived.restore.as_deref(), Some("lazy"), "{:?}", moved.arrived);
        there.await_rounds(here.rounds() + rounds);
        here = there;
        assert_mapped(runtime, &here);
        assert_eq!(execute(runtime, &here).as_deref(), Some("0"));
        assert_eq!(first_port(runtime, &here), "77", "its configuration sets it");
    }
    // Rolled back it runs on.
    let mut source = here.source();
    source.pause().expect("pause");
    source.harvest(&mut PageSet::new()).expect("harvest");
    source.save().expect("save");
    source.resume().expect("resume");
    drop(source);
    here.await_rounds(here.rounds() + rounds);
    here.stop();
    host.assert_nothing_left(&name(3));
}

/// A program in a user namespace, which runs and has checked its memory.
fn program<'a>(host: &'a Host, name: &str, program: &str, argument: &str) -> Option<Spot<'a>> {
    let spot = host.program_with(name, program, argument)?;
    map(host, &spot);
    close(&spot);
    Some(spot)
}

/// Started by the runtime, with a network namespace that is its own from the beginning.
fn adopted(host: &Host) {
    let spot = host.counter("ma0");
    map(host, &spot);
    close(&spot);
    let mut stranger = Stranger::start("runc", spot);
    stranger.await_count(2);
    stranger.adopt();
    let there = stranger.spot.twin("ma1");
    close(&there);
    let before = stranger.last_count();
    let moved = stranger.spot.move_live(&there, 3);
    assert_eq!(moved.arrived.restore.as_deref(), Some("lazy"), "{:?}", moved.arrived);
    there.await_count(before + 2);
    assert_mapped("runc", &there);
    there.stop();
    drop(stranger);
    host.assert_nothing_left("ma1");
}

/// Images that are for a file name a network namespace from outside, which the runtime would have made.
fn out_of_a_file(host: &Host) {
    let here = host.redis("mo0", "10.99.0.25/24", &[]);
    map(host, &here);
    close(&here);
    here.run();
    let mut redis = Redis::connect("10.99.0.25:6379");
    redis.fill(8 << 20, 7);
    let digest = redis.ask(&["DEBUG", "DIGEST"]);
    let there = here.twin("mo1");
    close(&there);
    let mut source = here.backend().source_for_file(&here.spec, &here.place).expect("a source");
    let mut destination = there.prepare(&mut *source);
    source.pause().expect("pause");
    support::copy_pages(&mut *source, &mut *destination);
    let sections = source.save().expect("save");
    assert!(sections.iter().any(|section| section.kind.starts_with("criu/netns-")));
    destination.load(sections).expect("load");
    source.fence(1).expect("fence");
    destination.activate(1).expect("activate");
    source.release().expect("release");
    drop((source, destination));
    assert_eq!(redis.ask(&["DEBUG", "DIGEST"]), digest);
    there.stop();
    host.assert_nothing_left("mo1");
}

/// Nine processes with memory in common: each is given its own, or CRIU shares it again.
fn forked(host: &Host) {
    let Some(mut here) = program(host, "mf0", "forked", "16") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    for (turn, forked) in [(1, ForkedChoice::Apart), (2, ForkedChoice::Shared)] {
        let there = here.twin(&format!("mf{turn}"));
        close(&there);
        host.methods.set(Methods { forked, ..Methods::default() });
        let moved = here.move_live(&there, 5);
        assert_eq!(moved.arrived.restore.as_deref(), Some("lazy"), "{:?}", moved.arrived);
        assert_all_fine(&there);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("mf2");
}

fn filtered(host: &Host) {
    let Some(here) = program(host, "ml0", "memory", "") else {
        return host.skip("needs cc (tests/setup)");
    };
    let allow = profile("SCMP_ACT_ERRNO", ALLOWED, "SCMP_ACT_ALLOW");
    here.change_config(|config| config["linux"]["seccomp"] = allow);
    here.run();
    here.await_rounds(3);
    let there = here.twin("ml1");
    close(&there);
    let moved = here.move_live(&there, 3);
    assert_eq!(moved.arrived.restore.as_deref(), Some("lazy"), "{:?}", moved.arrived);
    there.await_rounds(here.rounds() + 3);
    there.stop();
    host.assert_nothing_left("ml1");
}

/// The tests above can fail: without one page of many the program says which.
fn withheld_page_is_noticed(host: &Host) {
    let Some(here) = program(host, "mw0", "memory", "") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    let there = here.twin("mw1");
    close(&there);
    let one = |of: PageRange| PageRange::new(of.space, of.first + 1000, 1);
    here.run_without(&there, SpaceId(1), one, || there.await_log("BAD"));
    here.stop();
}

/// Its interface is made when CRIU restores already: what fails then fails the restore, and nothing else.
fn without_a_bridge_it_stays(host: &Host) {
    let here = host.redis("mb0", "10.99.0.26/24", &[]);
    map(host, &here);
    close(&here);
    here.run();
    let mut redis = Redis::connect("10.99.0.26:6379");
    let there = here.twin("mb1");
    close(&there);
    let mut source = here.source();
    let mut destination = there.prepare(&mut *source);
    source.pause().expect("pause");
    support::copy_pages(&mut *source, &mut *destination);
    let sections = source.save().expect("save");
    host.ip(&["link", "set", "br0", "name", "br-away"]);
    let loaded = destination.load(sections);
    host.ip(&["link", "set", "br-away", "name", "br0"]);
    let error = loaded.expect_err("no bridge").to_string();
    assert!(error.contains("br0"), "{error}");
    destination.discard().expect("discard");
    host.assert_nothing_left("mb1");
    source.resume().expect("resume");
    assert_eq!(redis.ask(&["PING"]), "PONG");
    drop(source);
    here.stop();
    host.assert_nothing_left("mb0");
}

/// Whoever wants memory that has not come waits when the keeper dies, and never reads zeros.
fn keeper_dead_in_a_filling(host: &Host) {
    if !cfg!(feature = "failpoints") {
        return host.skip("needs --features failpoints");
    }
    let Some(here) = program(host, "mz0", "memory", "") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    let there = here.twin(HUNGRY);
    close(&there);
    here.move_live(&there, 2);
    let before = there.settled_rounds();
    there.kill_keeper();
    std::thread::sleep(Duration::from_millis(1000));
    let bad = here.bundle().join("rootfs/data/BAD");
    assert!(!bad.exists(), "memory that was missing was read");
    assert_eq!(there.rounds(), before, "it ran without its memory");
    there.backend().sweep(&there.spec, &there.place).expect("sweep");
    host.assert_nothing_left(&there.place.name);
    host.await_no_holder();
    assert!(!bad.exists(), "memory that was missing was read in a sweep");
}

/// Makes the directory of a workload as an agent does, for root alone.
fn close(spot: &Spot<'_>) {
    fs::create_dir_all(&spot.place.dir).expect("a directory");
    fs::set_permissions(&spot.place.dir, fs::Permissions::from_mode(0o700)).expect("closed");
}

/// Gives the container of `spot` a user namespace, and its root file system to who is root there.
fn map(host: &Host, spot: &Spot<'_>) {
    spot.change_config(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("namespaces");
        namespaces.push(json!({"type": "user"}));
        let mounts = config["mounts"].as_array().expect("mounts");
        assert!(mounts.iter().any(|mount| mount["type"] == "sysfs"), "it has the rights for that");
        for kind in ["uidMappings", "gidMappings"] {
            config["linux"][kind] = json!([{"containerID": 0, "hostID": ROOT, "size": 65536}]);
        }
    });
    // It has to find its way to its files.
    fs::set_permissions(host.directory(), fs::Permissions::from_mode(0o711)).expect("open");
    let rootfs = spot.bundle().join("rootfs");
    does("chown", &["-R", &format!("{ROOT}:{ROOT}"), rootfs.to_str().expect("UTF-8")]);
}

/// Whether the runtime knows it, and who it is in there and out here.
fn assert_mapped(runtime: &str, spot: &Spot<'_>) {
    let name = spot.place.name.as_str();
    let state: serde_json::Value =
        serde_json::from_str(&says(runtime, &["state", name])).expect("a state");
    let status = fs::read_to_string(format!("/proc/{}/status", state["pid"])).expect("a status");
    assert!(status.contains(&format!("Uid:\t{ROOT}\t")), "{status}");
    // What CRIU was told for the restore does not stay.
    assert!(status.contains("THP_enabled:\t1"), "{status}");
}

/// Which user a program that the runtime executes in it is there, if it can.
fn execute(runtime: &str, spot: &Spot<'_>) -> Option<String> {
    let arguments = ["exec", spot.place.name.as_str(), "/bin/busybox", "id", "-u"];
    let said = Command::new(runtime).args(arguments).output().expect(runtime);
    said.status.success().then(|| String::from_utf8_lossy(&said.stdout).trim().to_owned())
}

/// What that is in it.
fn first_port(runtime: &str, spot: &Spot<'_>) -> String {
    let path = format!("/proc/sys/{}", PORTS.replace('.', "/"));
    says(runtime, &["exec", &spot.place.name, "/bin/busybox", "cat", &path]).trim().to_owned()
}
