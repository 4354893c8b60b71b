//! What looks as if it spoke against moving a container, and does not: nothing is said of it, CRIU takes it
//! along, and at the other end it works.

use std::fs;
use std::time::{Duration, Instant};

use decamp_shared::workload::{Backend, FileTree, PlacedTree, Storage};

use super::obstacles::{made, obstacles_of, with};
use super::support::{self, Case, Host, Spot};

pub(crate) const CASES: [Case; 3] = [
    Case { name: "what_criu_can_do_is_no_obstacle", run: what_criu_can_do_is_no_obstacle },
    Case { name: "what_is_no_obstacle_works_elsewhere", run: what_is_no_obstacle_works_elsewhere },
    Case { name: "locks_of_what_is_shared_are_refused", run: locks_of_what_is_shared_are_refused },
];

/// What CRIU dumps and restores.
const HARMLESS: [&str; 22] = [
    "epoll",
    "timers",
    "signalfd",
    "inotify",
    "pipes",
    "locks",
    "lease",
    "deleted",
    "deleted-cwd",
    "unix",
    "inet",
    "filter",
    "netlink",
    "pty",
    "mounts",
    "proc",
    "memory",
    "guards",
    "sealed",
    "zombie",
    "threads",
    "daemon",
];

fn what_criu_can_do_is_no_obstacle(host: &Host) {
    let Some(place) = with(host, "ok", "harmless", &HARMLESS) else {
        return host.skip("needs cc (tests/setup)");
    };
    place.run();
    let (made, lacking) = made(&place);
    assert_eq!((made.len(), lacking), (HARMLESS.len(), Vec::new()));
    assert_eq!(obstacles_of(&place), [""; 0]);
    let ticks = place.ticks();
    let mut source = place.source();
    source.pause().expect("nothing speaks against it");
    source.save().expect("and CRIU takes all of it");
    source.resume().expect("resume");
    place.await_log(&format!("tick {}\n", ticks + 3));
    assert_all_work(host, &place, &HARMLESS);
    drop(source);
    place.stop();
    host.assert_nothing_left("ok");
}

/// All of it at once, there and back, with the files beside it as between two hosts.
fn what_is_no_obstacle_works_elsewhere(host: &Host) {
    let Some(mut here) = with(host, "hl0", "harmless", &HARMLESS) else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    let (made, lacking) = made(&here);
    assert_eq!((made.len(), lacking), (HARMLESS.len(), Vec::new()));
    assert_all_work(host, &here, &HARMLESS);
    for turn in 1..=2 {
        let there = here.twin_with_files(&format!("hl{turn}"));
        // Copied while it runs, and while it stands still.
        here.move_with_files(&there, turn - 1);
        let ticks = here.ticks();
        there.await_log(&format!("tick {}\n", ticks + 3));
        assert_all_work(host, &there, &HARMLESS);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("hl2");
}

/// What both hosts have cannot be locked twice: that is refused, and whoever locks it later ends the move,
/// long before anybody would call CRIU stuck.
fn locks_of_what_is_shared_are_refused(host: &Host) {
    let Some(place) = with(host, "lk", "harmless", &["locks"]) else {
        return host.skip("needs cc (tests/setup)");
    };
    place.run();
    made(&place);
    let mut source = place.source();
    let there = place.twin("lk2");
    let mut said = |storage: Storage| -> Vec<String> {
        let mut manifest = source.manifest().expect("a manifest");
        manifest.name = there.place.name.clone();
        let trees = manifest.files.iter().map(|tree| PlacedTree {
            tree: FileTree { storage: storage.into(), ..tree.clone() },
            path: tree.path.clone().into(),
        });
        let trees: Vec<_> = trees.collect();
        let found = there.backend().preflight(&manifest, &trees);
        found.into_iter().map(|refusal| refusal.text).collect()
    };
    assert_eq!(said(Storage::Copy), [""; 0]);
    let said = said(Storage::Shared);
    for file in ["flock", "posix", "ofd"] {
        let wanted = format!("has locked {}/data/locks.{file}, which", rootfs(&place));
        let right = |text: &String| text.starts_with("Process ") && text.contains(&wanted);
        assert!(said.iter().any(right), "{wanted}: {said:#?}");
    }
    assert_eq!(said.len(), 3, "{said:#?}");
    // Nobody was asked whether it is shared.
    let mut destination = there.prepare(&mut *source);
    source.pause().expect("pause");
    support::copy_pages(&mut *source, &mut *destination);
    let sections = source.save().expect("save");
    let begun = Instant::now();
    let error = destination.load(sections).expect_err("it is locked");
    let took = begun.elapsed();
    assert!(error.to_string().contains("waits for a lock of /data/locks."), "{error}");
    // It is called stuck after 20 s.
    assert!(took < Duration::from_secs(18), "{took:?}");
    destination.discard().expect("discard");
    host.assert_nothing_left("lk2");
    let ticks = place.ticks();
    source.resume().expect("resume");
    place.await_log(&format!("tick {}\n", ticks + 3));
    assert_all_work(host, &place, &["locks"]);
    drop((source, destination));
    place.stop();
    host.assert_nothing_left("lk");
}

fn rootfs(place: &Spot<'_>) -> String {
    place.bundle().join("rootfs").display().to_string()
}

/// Each says by itself that what it holds works.
fn assert_all_work(host: &Host, place: &Spot<'_>, names: &[&str]) {
    let said = || fs::read_to_string(place.place.log()).unwrap_or_default();
    let before = said().matches("checked all").count();
    host.runc(&["kill", &place.place.name, "HUP"]);
    support::await_that("everything to be checked", || {
        said().matches("checked all").count() > before
    });
    let said = said();
    let last: Vec<&str> = said.lines().filter(|line| line.starts_with("checked ")).collect();
    let last = &last[last.len() - names.len() - 1..last.len() - 1];
    for (name, line) in names.iter().zip(last) {
        assert!(line.starts_with(&format!("checked {name} fine")), "{last:#?}");
    }
}
