//! The ways that a container's memory can go, each forced by the configuration and each tried with
//! programs that know all of their memory.

use decamp_shared::methods::{HidingChoice, Methods, RestoreChoice, TrackerChoice};
use decamp_shared::pages::PageSet;
use decamp_shared::workload::{Backend, Liveness, PlacedTree};

use super::support::{self, Case, Host, Moved, Spot};

pub(crate) const CASES: [Case; 12] = [
    Case { name: "changes_move_by_page_hash", run: changes_move_by_page_hash },
    Case { name: "kinds_move_by_page_hash", run: kinds_move_by_page_hash },
    Case { name: "changes_move_by_soft_dirty", run: changes_move_by_soft_dirty },
    Case { name: "kinds_move_by_soft_dirty", run: kinds_move_by_soft_dirty },
    Case { name: "what_comes_back_moves_by_write_protect", run: comes_back_by_write_protect },
    Case { name: "what_comes_back_moves_by_soft_dirty", run: comes_back_by_soft_dirty },
    Case { name: "who_clears_bits_itself_moves_by_soft_dirty", run: rival_by_soft_dirty },
    Case { name: "what_comes_back_moves_by_page_hash", run: comes_back_by_page_hash },
    Case { name: "page_hash_sends_only_what_differs", run: page_hash_sends_only_what_differs },
    Case { name: "every_way_of_dump_and_restore_moves", run: every_way_of_dump_and_restore_moves },
    Case { name: "live_moves_restored_eagerly", run: live_moves_restored_eagerly },
    Case {
        name: "what_is_forced_and_cannot_be_is_refused",
        run: what_is_forced_and_cannot_be_is_refused,
    },
];

fn changes_move_by_page_hash(host: &Host) {
    live(host, "churn", TrackerChoice::PageHash, 6);
}

fn kinds_move_by_page_hash(host: &Host) {
    live(host, "memory", TrackerChoice::PageHash, 6);
}

fn changes_move_by_soft_dirty(host: &Host) {
    live(host, "churn", TrackerChoice::SoftDirty, 12);
}

fn kinds_move_by_soft_dirty(host: &Host) {
    live(host, "memory", TrackerChoice::SoftDirty, 6);
}

fn comes_back_by_write_protect(host: &Host) {
    comes_back(host, TrackerChoice::WriteProtect, "");
}

fn comes_back_by_soft_dirty(host: &Host) {
    comes_back(host, TrackerChoice::SoftDirty, "");
}

/// Whose bits they are: neither does it lose what it does with them, nor we what it wrote.
fn rival_by_soft_dirty(host: &Host) {
    comes_back(host, TrackerChoice::SoftDirty, "clears");
}

fn comes_back_by_page_hash(host: &Host) {
    comes_back(host, TrackerChoice::PageHash, "");
}

/// Memory that is at two looks where it was, was something else in between, and was sent then.
fn comes_back(host: &Host, tracker: TrackerChoice, argument: &str) {
    let name = format!("cb{}-{}", argument.len(), tracker.word());
    let Some(here) = host.program_with(&name, "returning", argument) else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_log("at 0");
    host.methods.set(Methods { tracker, ..Methods::default() });
    if lacks(&here, tracker.word()) {
        here.stop();
        return host.skip("the kernel has no such tracker");
    }
    let step = |number: u32| {
        let file = here.bundle().join(format!("rootfs/step{number}"));
        std::fs::write(file, "").expect("a file");
        here.await_log(&format!("at {number}"));
    };
    let there = here.twin(&format!("{name}2"));
    let mut source = here.source();
    let mut destination = there.prepare(&mut *source);
    source.track().expect("track");
    let mut dirty = PageSet::new();
    source.harvest(&mut dirty).expect("harvest");
    step(1);
    source.harvest(&mut dirty).expect("harvest");
    step(2);
    // Of what was written before the first look, this is what is sent.
    support::copy(&dirty, &mut *source, &mut *destination);
    step(3);
    let mut since = PageSet::new();
    source.harvest(&mut since).expect("harvest");
    since = support::copy(&since, &mut *source, &mut *destination);
    source.pause().expect("pause");
    source.harvest(&mut since).expect("harvest");
    support::copy(&since, &mut *source, &mut *destination);
    destination.load(source.save().expect("save")).expect("load");
    assert_eq!(support::tracker_of(&*source), tracker.word());
    source.fence(1).expect("fence");
    destination.activate(1).expect("activate");
    source.release().expect("release");
    there.await_rounds(here.rounds() + 3);
    drop((source, destination));
    there.stop();
    host.assert_nothing_left(&format!("{name}2"));
}

/// Moves a program from place to place by one tracker.
fn live(host: &Host, program: &str, tracker: TrackerChoice, turns: u32) {
    let name = format!("{}-{program}", tracker.word());
    let Some(mut here) = host.program(&format!("{name}0"), program) else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    host.methods.set(Methods { tracker, ..Methods::default() });
    if lacks(&here, tracker.word()) {
        here.stop();
        return host.skip("the kernel has no such tracker");
    }
    for turn in 1..=turns {
        let there = here.twin(&format!("{name}{turn}"));
        let moved = here.move_live(&there, 5);
        assert_eq!(moved.tracker, tracker.word());
        let before = here.rounds();
        there.await_rounds(before + 3);
        here = there;
    }
    here.stop();
    host.assert_nothing_left(&format!("{name}{turns}"));
}

/// Whether the source says that it cannot do what `word` forces.
fn lacks(place: &Spot<'_>, word: &str) -> bool {
    let needs = String::from_utf8(place.source().manifest().expect("a manifest").needs);
    needs.expect("text").contains(&format!("tracker = \\\"{word}\\\""))
}

/// What was sent and not written since is not sent again, neither in a round nor in the stop.
fn page_hash_sends_only_what_differs(host: &Host) {
    let Some(here) = host.program("ph", "memory") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    // It has written all of its largest region once more since it forked, and shares none of it with its child.
    here.await_rounds(9);
    let tracker = TrackerChoice::PageHash;
    host.methods.set(Methods { tracker, ..Methods::default() });
    let there = here.twin("ph2");
    let mut source = here.source();
    let mut destination = there.prepare(&mut *source);
    source.track().expect("track");
    let mut all = PageSet::new();
    source.harvest(&mut all).expect("harvest");
    support::copy(&all, &mut *source, &mut *destination);
    source.pause().expect("pause");
    let mut last = PageSet::new();
    source.harvest(&mut last).expect("harvest");
    assert!(source.look() > std::time::Duration::ZERO, "it says nothing of how long that took");
    // It writes all of its largest region every eight rounds, which may be in between, and of the others a word of
    // shared memory, a counter, stacks, and what it says.
    const LARGEST: u64 = 4096;
    const OTHERS: u64 = 64;
    assert!(last.len() <= LARGEST + OTHERS, "{} of {} pages again", last.len(), all.len());
    assert!(all.len() > LARGEST + 1500, "{} pages", all.len());
    support::copy(&last, &mut *source, &mut *destination);
    destination.load(source.save().expect("save")).expect("load");
    source.fence(1).expect("fence");
    destination.activate(1).expect("activate");
    source.release().expect("release");
    let before = here.rounds();
    there.await_rounds(before + 9);
    drop((source, destination));
    there.stop();
}

/// Stopped and copied, with memory hidden from CRIU and without, restored late and at once.
fn every_way_of_dump_and_restore_moves(host: &Host) {
    let Some(mut here) = host.program("x0", "memory") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    let mut turn = 0;
    let ways = [
        (HidingChoice::None, RestoreChoice::Auto, "criu", "eager"),
        (HidingChoice::Hidden, RestoreChoice::Eager, "hidden", "eager"),
        (HidingChoice::None, RestoreChoice::Eager, "criu", "eager"),
        (HidingChoice::Hidden, RestoreChoice::Lazy, "hidden", "lazy"),
        (HidingChoice::None, RestoreChoice::Lazy, "criu", "eager"),
        (HidingChoice::Auto, RestoreChoice::Auto, "hidden", "lazy"),
    ];
    for (hiding, restore, dumped, restored) in ways {
        turn += 1;
        host.methods.set(Methods { hiding, restore, ..Methods::default() });
        let there = here.twin(&format!("x{turn}"));
        let moved = here.move_to(&there);
        assert_eq!(moved.left.dump.as_deref(), Some(dumped), "{hiding:?}, {restore:?}");
        assert_eq!(moved.arrived.restore.as_deref(), Some(restored), "{hiding:?}, {restore:?}");
        assert_eq!(moved.pages > 0, dumped == "hidden", "{} pages beside CRIU", moved.pages);
        assert_reasons(&moved);
        let before = here.rounds();
        there.await_rounds(before + 3);
        here = there;
    }
    here.stop();
    host.assert_nothing_left(&format!("x{turn}"));
}

/// A way that is not the best has its reason.
fn assert_reasons(moved: &Moved) {
    let eager = moved.arrived.restore.as_deref() == Some("eager");
    assert_eq!(moved.arrived.fallbacks.len(), usize::from(eager), "{:?}", moved.arrived);
    let criu = moved.left.dump.as_deref() == Some("criu");
    assert!(!criu || moved.left.fallbacks[0].contains("hiding = \"none\""), "{:?}", moved.left);
}

/// Copied while it runs, and all of its memory in its place before it runs again.
fn live_moves_restored_eagerly(host: &Host) {
    for (program, tracker) in
        [("churn", TrackerChoice::WriteProtect), ("memory", TrackerChoice::PageHash)]
    {
        let name = format!("y-{program}");
        let Some(mut here) = host.program(&format!("{name}0"), program) else {
            return host.skip("needs cc (tests/setup)");
        };
        here.run();
        here.await_rounds(3);
        let restore = RestoreChoice::Eager;
        host.methods.set(Methods { tracker, restore, ..Methods::default() });
        if lacks(&here, tracker.word()) {
            here.stop();
            return host.skip("the kernel has no such tracker");
        }
        for turn in 1..=4 {
            let there = here.twin(&format!("{name}{turn}"));
            let moved = here.move_live(&there, 4);
            assert_eq!(moved.arrived.restore.as_deref(), Some("eager"));
            assert!(moved.arrived.fallbacks[0].contains("restore = \"eager\""));
            let before = here.rounds();
            there.await_rounds(before + 3);
            here = there;
        }
        here.stop();
        host.assert_nothing_left(&format!("{name}4"));
    }
}

/// A tracker that the configuration forces and the kernel does not have: refused before anything is
/// touched. A choice of the moment it is that counts, not that of the keeper's start.
fn what_is_forced_and_cannot_be_is_refused(host: &Host) {
    let here = host.counter("fo");
    here.run();
    here.await_count(2);
    let tracker = TrackerChoice::SoftDirty;
    host.methods.set(Methods { tracker, ..Methods::default() });
    if !lacks(&here, "soft-dirty") {
        here.stop();
        return host.skip("the kernel has every tracker");
    }
    let mut source = here.source();
    assert!(matches!(source.liveness(), Liveness::StopOnly { .. }));
    let manifest = source.manifest().expect("a manifest");
    let trees: Vec<_> = manifest
        .files
        .iter()
        .map(|tree| PlacedTree { tree: tree.clone(), path: tree.path.clone().into() })
        .collect();
    let refusals = here.twin("fo2").backend().preflight(&manifest, &trees);
    let said = refusals.iter().filter(|refusal| refusal.text.contains("soft-dirty")).count();
    assert_eq!(said, 1, "{refusals:?}");
    drop(source);
    host.methods.take();
    assert!(matches!(here.source().liveness(), Liveness::Tracked { .. }));
    here.await_count(here.last_count() + 2);
    here.stop();
}
