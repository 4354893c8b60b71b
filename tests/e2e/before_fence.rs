//! Failures before the fence, in every phase: exit code 4, the workload runs on where it was, and nothing
//! is left behind on either host.

use std::fs;

use crate::failures::{Failure, Living, Served, arm, hold, report};
use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, Hosts, hosts};
use crate::redis::Redis;
use crate::running::Ran;
use crate::snapshot::Snapshot;
use crate::{Needs, Test};

/// Where a move of a virtual machine can be held before its fence.
const PHASES: [&str; 7] = [
    "source.negotiate",
    "source.prepare",
    "destination.prepare",
    "source.pre-copy",
    "source.pause",
    "source.final",
    "destination.load",
];

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("before_fence::cancelled_in_each_phase", Needs::Kvm, cancelled),
        Test::new("before_fence::destination_killed_in_each_phase", Needs::Kvm, destination_killed),
        Test::new("before_fence::connections_reset_in_each_phase", Needs::Kvm, reset),
        Test::new("before_fence::connections_cut", Needs::Kvm, cut),
        Test::new("before_fence::step_fails_in_each_phase", Needs::Kvm, step_fails),
        Test::new("before_fence::container", Needs::Containers, container),
        Test::new("before_fence::downtime_out_of_reach", Needs::Kvm, downtime_out_of_reach),
        Test::new("before_fence::destination_disk_full", Needs::Containers, disk_full),
        Test::new("before_fence::destination_state_disk_full", Needs::Kvm, state_disk_full),
    ]
}

fn cancelled() {
    guest_through(Failure::Cancel, &PHASES);
}

fn destination_killed() {
    guest_through(Failure::KillDestination, &PHASES);
}

fn reset() {
    guest_through(Failure::Reset, &PHASES);
}

/// Without a word from the peer it takes 15 s to notice: two phases stand for all.
fn cut() {
    guest_through(Failure::Cut, &["source.pre-copy", "source.final"]);
}

fn step_fails() {
    guest_through(Failure::Error, &PHASES);
}

/// One guest lives through all of them.
fn guest_through(failure: Failure, points: &[&str]) {
    let hosts = hosts();
    hosts.mend();
    let mut guest = Guest::start(hosts, ALPHA, "tough", "256M", "fill=64 hot=8 report=50");
    for point in points {
        fails(hosts, &mut guest, point, failure);
    }
    hosts.mend();
    guest.verify(ALPHA);
}

/// Breaks a move from alpha and checks all that is promised.
fn fails(hosts: &'static Hosts, workload: &mut dyn Living, point: &str, failure: Failure) {
    println!("{point}: {failure}");
    arm(hosts, ALPHA, point, failure);
    let before = Snapshot::take(hosts);
    let held = hold(hosts, ALPHA, workload.name(), point, &[]);
    held.inflict(failure);
    let ran = held.ended();
    workload.lives(ALPHA);
    hosts.hosts(&["heal", BETA]).expect(0);
    if failure == Failure::KillDestination {
        hosts.start_agent(BETA, "");
    }
    before.is_restored();
    runs_on(hosts, workload, &ran, wanted_code(point, failure));
}

/// Nothing has been touched while the two still talk: a refusal, unless the user called it off.
fn wanted_code(point: &str, failure: Failure) -> i32 {
    if point == "source.negotiate" && failure != Failure::Cancel { 3 } else { 4 }
}

/// The end of a move that came to nothing: told well, and the workload where it was.
fn runs_on(hosts: &'static Hosts, workload: &mut dyn Living, ran: &Ran, code: i32) {
    let ran = ran.clone().expect(code);
    let report = report(&ran).unwrap_or_else(|| panic!("no report\n{ran}"));
    let reason = report["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("runs on at alpha"), "{ran}");
    let there = hosts.state(BETA, workload.name());
    assert!(there.is_none() || there.as_deref() == Some("moved"), "on beta: {there:?}\n{ran}");
    assert_eq!(hosts.state(ALPHA, workload.name()).as_deref(), Some("running"), "{ran}");
    workload.lives(ALPHA);
}

/// A sample of the same with a container: its client's connection lives through it all.
fn container() {
    let hosts = hosts();
    hosts.mend();
    let redis = Redis::start(hosts, ALPHA, "held", 20);
    let mut served = Served { name: "held", client: redis.client(16, 500) };
    for (point, failure) in [
        ("source.prepare", Failure::Cancel),
        ("source.pause", Failure::Cancel),
        ("source.final", Failure::Reset),
        ("source.final", Failure::KillDestination),
        ("destination.load", Failure::KillDestination),
        ("destination.load", Failure::Cancel),
        ("destination.load", Failure::Error),
    ] {
        fails(hosts, &mut served, point, failure);
    }
    hosts.mend();
    served.client.finish();
}

fn downtime_out_of_reach() {
    let hosts = hosts();
    hosts.mend();
    let options = "fill=256 hot=128 rate=0 report=50";
    let mut guest = Guest::start(hosts, ALPHA, "busy", "512M", options);
    let before = Snapshot::take(hosts);
    let words = ["migrate", "busy", "--to", "beta", "--json"];
    let limits = ["--max-downtime", "1ms", "--timeout", "5s"];
    let ran = hosts.decamp(ALPHA, &[&words[..], &limits].concat());
    before.is_restored();
    runs_on(hosts, &mut guest, &ran, 4);
    let report = report(&ran).expect("a report");
    let reason = report["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("--max-downtime") || reason.contains("--timeout"), "{ran}");
    guest.verify(ALPHA);
}

/// The destination's disk has room when it is asked, and fills up then: while the files travel, and while
/// what changed in them is sent with the workload stopped.
fn disk_full() {
    let hosts = hosts();
    hosts.mend();
    let redis = Redis::start(hosts, ALPHA, "fat", 21);
    let mut served = Served { name: "fat", client: redis.client(8, 500) };
    let disk = hosts.small_disk(BETA, "/srv", "64m");
    for point in ["source.prepare", "source.pause"] {
        arm(hosts, ALPHA, point, Failure::Cancel);
        let before = Snapshot::take(hosts);
        let held = hold(hosts, ALPHA, "fat", point, &[]);
        // What the container writes at the last moment.
        let late = hosts.path(ALPHA, "srv/fat/rootfs/data/late");
        fs::write(&late, noise(8 << 20)).expect("a file in the bundle");
        // Ends when the disk is full.
        hosts.exec(BETA, &["dd", "if=/dev/zero", "of=/srv/filler", "bs=64k"]);
        let ran = held.ended();
        served.lives(ALPHA);
        hosts.exec(BETA, &["rm", "/srv/filler"]).expect(0);
        fs::remove_file(late).expect("the file is ours");
        before.is_restored();
        runs_on(hosts, &mut served, &ran, 4);
        let reason = report(&ran).expect("a report")["reason"].to_string().to_lowercase();
        assert!(reason.contains("no room is left"), "{ran}");
    }
    drop(disk);
    hosts.mend();
    served.client.finish();
}

/// Bytes that do not compress.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(step).take(count).collect()
}

/// The destination cannot write its journal.
fn state_disk_full() {
    let hosts = hosts();
    hosts.mend();
    let mut guest = Guest::start(hosts, ALPHA, "light", "128M", "fill=16 hot=2 report=50");
    let disk = hosts.small_disk(BETA, "/var/lib/decamp", "4m");
    arm(hosts, ALPHA, "source.prepare", Failure::Cancel);
    let before = Snapshot::take(hosts);
    let held = hold(hosts, ALPHA, "light", "source.prepare", &[]);
    hosts.exec(BETA, &["dd", "if=/dev/zero", "of=/var/lib/decamp/filler", "bs=4k"]);
    let ran = held.ended();
    hosts.exec(BETA, &["rm", "/var/lib/decamp/filler"]).expect(0);
    before.is_restored();
    runs_on(hosts, &mut guest, &ran, 4);
    // With room again it works.
    hosts.mend();
    hosts.decamp(ALPHA, &["migrate", "light", "--to", "beta"]).expect(0);
    hosts.decamp(BETA, &["migrate", "light", "--to", "alpha"]).expect(0);
    drop(disk);
    guest.verify(ALPHA);
}
