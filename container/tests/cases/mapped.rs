//! Containers in a user namespace: whoever is root in them is nobody on the host.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use decamp_shared::pages::PageSet;
use serde_json::json;

use crate::runtimes::{crun_starts, does, says};
use crate::support::{Case, Host, Spot};

pub(crate) const CASES: [Case; 2] = [
    Case { name: "a_user_namespace_moves_under_runc", run: under_runc },
    Case { name: "a_user_namespace_moves_under_crun", run: under_crun },
];

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
    for (program, rounds) in [("memory", 3), ("segments", 8)] {
        moves(host, runtime, program, rounds);
    }
}

fn moves(host: &Host, runtime: &str, program: &str, rounds: u64) {
    let name = |turn: u32| format!("un-{runtime}-{program}{turn}");
    let Some(mut here) = host.program(&name(0), program) else {
        return host.skip("needs cc (tests/setup)");
    };
    here.spec["runtime"] = json!(runtime);
    map(host, &here);
    close(&here);
    here.run();
    here.await_rounds(3);
    // runc 1.1 executes nothing beside a network namespace that is not of its user namespace.
    let executed = execute(runtime, &here);
    assert!(runtime == "runc" || executed == Some("0".to_owned()), "{executed:?}");
    for turn in 1..=2 {
        let there = here.twin(&name(turn));
        close(&there);
        let moved = here.move_live(&there, 4);
        assert_eq!(moved.arrived.restore.as_deref(), Some("eager"), "{:?}", moved.arrived);
        there.await_rounds(here.rounds() + rounds);
        here = there;
        assert_mapped(runtime, &here);
        assert_eq!(execute(runtime, &here), executed);
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
    host.assert_nothing_left(&name(2));
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
        // Whose network namespace is not its own may not see a sysfs.
        let mounts = config["mounts"].as_array_mut().expect("mounts");
        mounts.retain(|mount| mount["type"] != "sysfs");
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
}

/// Which user a program that the runtime executes in it is there, if it can.
fn execute(runtime: &str, spot: &Spot<'_>) -> Option<String> {
    let arguments = ["exec", spot.place.name.as_str(), "/bin/busybox", "id", "-u"];
    let said = Command::new(runtime).args(arguments).output().expect(runtime);
    said.status.success().then(|| String::from_utf8_lossy(&said.stdout).trim().to_owned())
}
