//! Every kind of memory of a process, moved in a stop and live, and proof that a page that is missing would
//! be noticed.

use decamp_shared::pages::{PageRange, PageSet, SpaceId};

use super::support::{self, Case, Host};

pub(crate) const CASES: [Case; 5] = [
    Case { name: "every_kind_of_memory_survives", run: every_kind_of_memory_survives },
    Case { name: "withheld_page_is_noticed", run: withheld_page_is_noticed },
    Case { name: "memory_that_changes_moves_live", run: memory_that_changes_moves_live },
    Case { name: "every_kind_of_memory_moves_live", run: every_kind_of_memory_moves_live },
    Case { name: "unharvested_write_is_noticed", run: unharvested_write_is_noticed },
];

fn every_kind_of_memory_survives(host: &Host) {
    let Some(mut here) = host.program("k0", "memory") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    for turn in 1..=6 {
        let there = here.twin(&format!("k{turn}"));
        here.move_to(&there);
        let before = here.rounds();
        // The child and the second thread go on as well as the first.
        there.await_rounds(before + 3);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("k6");
}

/// The test above can fail: without one page of many the program says which.
fn withheld_page_is_noticed(host: &Host) {
    let Some(here) = host.program("w", "memory") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    let there = here.twin("w2");
    // Of the first process, which checks all that it has; its child does not.
    let one = |of: PageRange| PageRange::new(of.space, of.first + 1000, 1);
    here.run_without(&there, SpaceId(1), one, || there.await_log("BAD"));
    here.stop();
}

fn memory_that_changes_moves_live(host: &Host) {
    let Some(mut here) = host.program("v0", "churn") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    for turn in 1..=8 {
        let there = here.twin(&format!("v{turn}"));
        here.move_live(&there, 6);
        let before = here.rounds();
        there.await_rounds(before + 2);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("v8");
}

fn every_kind_of_memory_moves_live(host: &Host) {
    let Some(mut here) = host.program("n0", "memory") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    for turn in 1..=6 {
        let there = here.twin(&format!("n{turn}"));
        here.move_live(&there, 4);
        let before = here.rounds();
        there.await_rounds(before + 3);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("n6");
}

/// The tests above can fail: without what one harvest found the program says what is stale.
fn unharvested_write_is_noticed(host: &Host) {
    let Some(here) = host.program("u", "memory") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    let there = here.twin("u2");
    let mut source = here.source();
    let mut destination = there.prepare(&mut *source);
    source.track().expect("track");
    support::copy_pages(&mut *source, &mut *destination);
    // All of its largest region is written anew every eight rounds.
    here.await_rounds(here.rounds() + 9);
    let mut lost = PageSet::new();
    source.harvest(&mut lost).expect("harvest");
    assert!(lost.len() >= 4096, "only {} pages were found written", lost.len());
    source.pause().expect("pause");
    support::copy_pages(&mut *source, &mut *destination);
    destination.load(source.save().expect("save")).expect("load");
    destination.activate(1).expect("activate");
    there.await_log("BAD");
    source.resume().expect("resume");
    here.await_rounds(here.rounds() + 3);
    drop((source, destination));
    there.stop();
    here.stop();
}
