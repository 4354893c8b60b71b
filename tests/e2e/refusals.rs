//! Bad input: exit code 2 or 3, one clear message that says what to do, the workload untouched and running,
//! nothing left behind on either host.

use std::fs;

use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, Hosts, Reconfigured, hosts};
use crate::redis::{Redis, make_bundle};
use crate::running::Ran;
use crate::snapshot::Snapshot;
use crate::{Needs, Test};

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("refusals::unknown_workload", Needs::Hosts, unknown_workload),
        Test::new("refusals::unknown_host", Needs::Kvm, unknown_host),
        Test::new("refusals::to_itself", Needs::Kvm, to_itself),
        Test::new("refusals::bad_usage", Needs::Kvm, bad_usage),
        Test::new("refusals::name_taken_there", Needs::Kvm, name_taken_there),
        Test::new("refusals::name_taken_here", Needs::Kvm, name_taken_here),
        Test::new("refusals::no_memory_there", Needs::Kvm, no_memory),
        Test::new("refusals::no_disk_there", Needs::Containers, no_disk),
        Test::new("refusals::path_taken_there", Needs::Containers, path_taken),
        Test::new("refusals::no_bridge_there", Needs::Containers, no_bridge),
        Test::new("refusals::no_runc_there", Needs::Containers, no_runc),
        Test::new("refusals::no_criu_there", Needs::Containers, no_criu),
        Test::new("refusals::old_criu_there", Needs::Containers, old_criu),
        Test::new("refusals::every_reason_at_once", Needs::Containers, every_reason),
        Test::new("refusals::onto_itself", Needs::Containers, onto_itself),
        Test::new("refusals::no_kernel", Needs::Kvm, no_kernel),
        Test::new("refusals::no_bundle", Needs::Containers, no_bundle),
    ]
}

/// A guest that has nothing to do but to run on.
pub(crate) fn idle(hosts: &'static Hosts) -> Guest {
    Guest::start(hosts, ALPHA, "idle", "128M", "fill=16 hot=1 report=50")
}

/// Panics unless it was refused with one message that has these words.
#[track_caller]
pub(crate) fn refused(ran: Ran, says: &[&str]) {
    exits(ran, 3, says);
}

/// Panics unless it ended so, with one message that has these words.
#[track_caller]
fn exits(ran: Ran, code: i32, says: &[&str]) {
    let ran = ran.expect(code);
    let text = format!("{}{}", ran.stdout, ran.stderr);
    for word in says {
        assert!(text.contains(word), "not a word of {word:?}\n{ran}");
    }
    let first: Vec<_> =
        text.lines().filter(|line| says.iter().any(|word| line.contains(word))).collect();
    let mut once = first.clone();
    once.dedup();
    assert_eq!(first, once, "it says it twice\n{ran}");
    assert!(!text.contains("panicked") && !text.contains("RUST_BACKTRACE"), "{ran}");
}

/// Does something with an idle guest on alpha that is to change nothing at all.
#[track_caller]
pub(crate) fn untouched(act: impl FnOnce(&'static Hosts, &Guest)) {
    let hosts = hosts();
    hosts.mend();
    let guest = idle(hosts);
    let before = Snapshot::take(hosts);
    act(hosts, &guest);
    before.is_restored();
    assert_eq!(hosts.state(ALPHA, "idle").as_deref(), Some("running"));
    guest.runs_clean(ALPHA);
}

/// Tries to move a container that is to stay where it is, untouched, its client's connection alive.
#[track_caller]
pub(crate) fn stays(
    hosts: &'static Hosts,
    name: &'static str,
    last: u8,
    options: &[&str],
    says: &[&str],
) {
    let redis = Redis::start(hosts, ALPHA, name, last);
    let mut client = redis.client(4, 500);
    let before = Snapshot::take(hosts);
    let words = [&["migrate", name, "--to", BETA], options].concat();
    let ran = hosts.decamp(ALPHA, &words);
    before.is_restored();
    refused(ran, says);
    assert_eq!(hosts.state(ALPHA, name).as_deref(), Some("running"));
    client.is_served();
    client.finish();
}

fn unknown_workload() {
    let hosts = hosts();
    hosts.mend();
    let before = Snapshot::take(hosts);
    refused(hosts.decamp(ALPHA, &["migrate", "nobody", "--to", BETA]), &["nobody", "decamp ls"]);
    before.is_restored();
}

fn unknown_host() {
    untouched(|hosts, _| {
        let ran = hosts.decamp(ALPHA, &["migrate", "idle", "--to", "nowhere"]);
        refused(ran, &["nowhere", "[hosts]", "beta"]);
    });
}

fn to_itself() {
    untouched(|hosts, _| {
        refused(
            hosts.decamp(ALPHA, &["migrate", "idle", "--to", ALPHA]),
            &["alpha", "this very host"],
        );
    });
}

fn bad_usage() {
    untouched(|hosts, _| {
        for (words, says) in [
            (&["migrate", "idle"][..], "--to"),
            (&["migrate", "idle", "--to", "beta", "--max-downtime", "soon"], "soon"),
            (&["migrate", "idle", "--to", "beta", "--streams", "0"], "streams"),
            (&["migrate", "idle", "--to", "beta", "--path", "a=b"], "a=b"),
            (&["migrate", "../x", "--to", "beta"], "../x"),
        ] {
            exits(hosts.decamp(ALPHA, words), 2, &[says]);
        }
    });
}

fn name_taken_there() {
    let hosts = hosts();
    hosts.mend();
    let here = idle(hosts);
    let words = ["run", "vm", "idle", "--kernel", "/srv/guest.elf", "--memory", "128M"];
    hosts.decamp(BETA, &[&words[..], &["--cmdline", "fill=16 hot=1 report=50"]].concat()).expect(0);
    let before = Snapshot::take(hosts);
    refused(hosts.decamp(ALPHA, &["migrate", "idle", "--to", BETA]), &["idle", "taken on beta"]);
    before.is_restored();
    here.runs_clean(ALPHA);
    here.runs_clean(BETA);
}

fn name_taken_here() {
    untouched(|hosts, _| {
        let words = ["run", "vm", "idle", "--kernel", "/srv/guest.elf"];
        refused(hosts.decamp(ALPHA, &words), &["idle", "taken"]);
    });
}

/// Beta believes that it has 64 MiB.
fn no_memory() {
    let hosts = hosts();
    hosts.mend();
    let guest = idle(hosts);
    let meminfo = "MemTotal: 131072 kB\nMemFree: 65536 kB\nMemAvailable: 65536 kB\n";
    let file = hosts.path(BETA, "conf/meminfo");
    fs::write(&file, meminfo).expect("written");
    let before = Snapshot::take(hosts);
    hosts
        .exec(BETA, &["mount", "-n", "--bind", "/run/decamp-host/meminfo", "/proc/meminfo"])
        .expect(0);
    let ran = hosts.decamp(ALPHA, &["migrate", "idle", "--to", BETA]);
    hosts.exec(BETA, &["umount", "-n", "/proc/meminfo"]).expect(0);
    before.is_restored();
    refused(ran, &["128 MiB", "64 MiB", "memory"]);
    guest.runs_clean(ALPHA);
}

fn no_disk() {
    let hosts = hosts();
    hosts.mend();
    let disk = hosts.small_disk(BETA, "/srv", "1m");
    stays(hosts, "big", 50, &[], &["Not enough room", "/srv", "beta"]);
    drop(disk);
}

/// Something else stands where the bundle would go; with another place it works.
fn path_taken() {
    let hosts = hosts();
    hosts.mend();
    let redis = Redis::start(hosts, ALPHA, "placed", 51);
    let client = redis.client(4, 500);
    hosts.exec(BETA, &["mkdir", "-p", "/srv/placed/mine"]).expect(0);
    let before = Snapshot::take(hosts);
    let ran = hosts.decamp(ALPHA, &["migrate", "placed", "--to", BETA]);
    before.is_restored();
    refused(ran, &["/srv/placed", "--path"]);
    let words = ["migrate", "placed", "--to", BETA, "--path", "/srv/placed=/srv/place2"];
    hosts.decamp(ALPHA, &words).expect(0);
    assert!(hosts.path(BETA, "srv/placed/mine").exists(), "somebody's files are gone");
    client.finish();
    hosts.exec(BETA, &["rm", "-r", "/srv/placed"]).expect(0);
    hosts.decamp(BETA, &["stop", "placed"]).expect(0);
    hosts.decamp(BETA, &["rm", "placed", "--yes"]).expect(0);
    hosts.exec(BETA, &["rm", "-r", "/srv/place2"]).expect(0);
}

/// The container's bridge is one that only alpha has.
fn no_bridge() {
    let hosts = hosts();
    hosts.mend();
    hosts.exec(ALPHA, &["ip", "link", "add", "br7", "type", "bridge"]).expect(0);
    make_bundle(hosts, ALPHA, "/srv/bridged");
    let words = ["run", "container", "bridged", "--bundle", "/srv/bridged", "--net"];
    hosts.decamp(ALPHA, &[&words[..], &["bridge=br7,ip=10.78.0.5/24"]].concat()).expect(0);
    let before = Snapshot::take(hosts);
    let ran = hosts.decamp(ALPHA, &["migrate", "bridged", "--to", BETA]);
    before.is_restored();
    refused(ran, &["bridge br7"]);
    assert_eq!(hosts.state(ALPHA, "bridged").as_deref(), Some("running"));
    hosts.decamp(ALPHA, &["stop", "bridged"]).expect(0);
    hosts.decamp(ALPHA, &["rm", "bridged", "--yes"]).expect(0);
    hosts.exec(ALPHA, &["rm", "-r", "/srv/bridged"]).expect(0);
    hosts.exec(ALPHA, &["ip", "link", "delete", "br7"]).expect(0);
}

/// Beta's agent is told of another tool.
fn with_tool(hosts: &'static Hosts, key: &str, path: &str) -> Reconfigured<'static> {
    hosts.reconfigure(BETA, |text| {
        let set = |line: &str| match line.starts_with(&format!("{key} = ")) {
            true => format!("{key} = \"{path}\""),
            false => line.to_owned(),
        };
        text.lines().map(set).collect::<Vec<_>>().join("\n")
    })
}

fn no_runc() {
    let hosts = hosts();
    hosts.mend();
    let changed = with_tool(hosts, "runc", "/nowhere/runc");
    stays(hosts, "runless", 52, &[], &["no runc", "/nowhere/runc"]);
    drop(changed);
}

fn no_criu() {
    let hosts = hosts();
    hosts.mend();
    let changed = with_tool(hosts, "criu", "/nowhere/criu");
    stays(hosts, "criuless", 53, &[], &["no CRIU", "/nowhere/criu"]);
    drop(changed);
}

fn old_criu() {
    use std::os::unix::fs::PermissionsExt;
    let hosts = hosts();
    hosts.mend();
    let script = hosts.path(BETA, "conf/old-criu");
    fs::write(&script, "#!/bin/sh\necho 'Version: 3.17.1'\n").expect("written");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("executable");
    let changed = with_tool(hosts, "criu", "/run/decamp-host/old-criu");
    stays(hosts, "aged", 54, &[], &["3.17", "4.1"]);
    drop(changed);
}

/// Two things are wrong, and both are said.
fn every_reason() {
    let hosts = hosts();
    hosts.mend();
    let changed = with_tool(hosts, "runc", "/nowhere/runc");
    let disk = hosts.small_disk(BETA, "/srv", "1m");
    stays(hosts, "doomed", 55, &[], &["no runc", "Not enough room"]);
    drop(disk);
    drop(changed);
}

/// The bundle is in a directory that both hosts share: it would be written onto itself.
fn onto_itself() {
    let hosts = hosts();
    hosts.mend();
    let bundle = hosts.shared().join("bundle").display().to_string();
    make_bundle(hosts, ALPHA, &bundle);
    let net = "bridge=br0,ip=10.77.1.56/16";
    let words = ["run", "container", "self", "--bundle", &bundle, "--net", net];
    hosts.decamp(ALPHA, &words).expect(0);
    let before = Snapshot::take(hosts);
    let ran = hosts.decamp(ALPHA, &["migrate", "self", "--to", BETA]);
    before.is_restored();
    refused(ran, &["very same place", "--path"]);
    assert_eq!(hosts.state(ALPHA, "self").as_deref(), Some("running"));
    assert!(hosts.shared().join("bundle/config.json").exists());
    hosts.decamp(ALPHA, &["stop", "self"]).expect(0);
    hosts.decamp(ALPHA, &["rm", "self", "--yes"]).expect(0);
    hosts.exec(ALPHA, &["rm", "-r", &bundle]).expect(0);
}

fn no_kernel() {
    let hosts = hosts();
    hosts.mend();
    fs::write(hosts.path(ALPHA, "srv/text"), "no kernel\n").expect("written");
    let before = Snapshot::take(hosts);
    for (kernel, says) in [("/srv/text", "ELF"), ("/bin/true", "PVH"), ("/srv/none", "/srv/none")] {
        let ran = hosts.decamp(ALPHA, &["run", "vm", "odd", "--kernel", kernel]);
        refused(ran, &[kernel, says]);
    }
    before.is_restored();
    assert_eq!(hosts.state(ALPHA, "odd"), None);
    fs::remove_file(hosts.path(ALPHA, "srv/text")).expect("ours");
}

fn no_bundle() {
    let hosts = hosts();
    hosts.mend();
    hosts.exec(ALPHA, &["mkdir", "-p", "/srv/empty"]).expect(0);
    make_bundle(hosts, ALPHA, "/srv/rootless");
    hosts.exec(ALPHA, &["rm", "-r", "/srv/rootless/rootfs"]).expect(0);
    let before = Snapshot::take(hosts);
    for (bundle, says) in [("/srv/empty", "config.json"), ("/srv/rootless", "rootfs")] {
        let ran = hosts.decamp(ALPHA, &["run", "container", "odd", "--bundle", bundle]);
        refused(ran, &[bundle, says]);
    }
    before.is_restored();
    hosts.exec(ALPHA, &["rm", "-r", "/srv/empty", "/srv/rootless"]).expect(0);
}
