//! Moves of containers whose processes share memory since they forked: it travels once, and is shared again
//! where that is wanted.

use std::io::Write as _;

use decamp_shared::methods::{ForkedChoice, Methods, RestoreChoice, TrackerChoice};
use decamp_shared::pages::{PAGE_SIZE, PageRange, SpaceId};

use crate::support::{Case, Host, Moved, Spot};

pub(crate) const CASES: [Case; 7] = [
    Case { name: "forked_memory_travels_once", run: forked_memory_travels_once },
    Case { name: "forked_memory_is_shared_again", run: forked_memory_is_shared_again },
    Case { name: "forked_memory_moves_in_every_way", run: forked_memory_moves_in_every_way },
    Case { name: "forked_memory_within_a_limit", run: forked_memory_within_a_limit },
    Case { name: "forked_memory_beyond_a_limit", run: forked_memory_beyond_a_limit },
    Case { name: "forked_withheld_page_is_noticed", run: forked_withheld_page_is_noticed },
    Case { name: "measure_forked", run: measure_forked },
];

/// The program's memory that its nine processes share, but for what they write.
const MIB: u64 = 64;
const PROCESSES: u64 = 9;
/// What of a move is not that memory: what is written in the meantime, and all that else is.
const BESIDE: u64 = 16;

fn forked_memory_travels_once(host: &Host) {
    let Some(here) = host.program_with("fo0", "forked", &MIB.to_string()) else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    set(host, TrackerChoice::Auto, ForkedChoice::Apart);
    let there = here.twin("fo1");
    let moved = here.move_live(&there, 5);
    assert_travelled_once(&moved);
    assert!(moved.arrived.fallbacks.iter().any(|text| text.contains("own now")), "{moved:?}");
    assert_all_fine(&there);
    let memory = proportional_mib(host, &there);
    assert!(memory > (PROCESSES - 1) * MIB, "they share {memory} MiB again, as nobody asked");
    there.stop();
    host.assert_nothing_left("fo1");
}

/// Several times: what was shared again can be shared again.
fn forked_memory_is_shared_again(host: &Host) {
    let Some(mut here) = host.program_with("fs0", "forked", &MIB.to_string()) else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    set(host, TrackerChoice::Auto, ForkedChoice::Shared);
    for turn in 1..=3 {
        let there = here.twin(&format!("fs{turn}"));
        let moved = here.move_live(&there, 5);
        assert_travelled_once(&moved);
        assert!(moved.arrived.fallbacks[0].contains("MiB again"), "{moved:?}");
        assert_all_fine(&there);
        let memory = proportional_mib(host, &there);
        assert!(memory < MIB + BESIDE, "{memory} MiB after move {turn}");
        here = there;
    }
    here.stop();
    host.assert_nothing_left("fs3");
}

/// By every tracker and none, restored late and at once.
fn forked_memory_moves_in_every_way(host: &Host) {
    let Some(mut here) = host.program_with("fw0", "forked", "16") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    let mut turn = 0;
    for (tracker, restore, forked) in [
        (TrackerChoice::PageHash, RestoreChoice::Lazy, ForkedChoice::Apart),
        (TrackerChoice::PageHash, RestoreChoice::Lazy, ForkedChoice::Shared),
        (TrackerChoice::WriteProtect, RestoreChoice::Eager, ForkedChoice::Auto),
        (TrackerChoice::None, RestoreChoice::Lazy, ForkedChoice::Apart),
        (TrackerChoice::None, RestoreChoice::Lazy, ForkedChoice::Shared),
        (TrackerChoice::WriteProtect, RestoreChoice::Lazy, ForkedChoice::Each),
    ] {
        turn += 1;
        host.methods.set(Methods { tracker, restore, forked, ..Methods::default() });
        let there = here.twin(&format!("fw{turn}"));
        let moved = match tracker {
            TrackerChoice::None => here.move_to(&there),
            _ => here.move_live(&there, 4),
        };
        // Those before it left some of them with their own.
        eprintln!("    {tracker:?} {restore:?} {forked:?}: {} pages", moved.sent);
        assert_all_fine(&there);
        here = there;
    }
    here.stop();
    host.assert_nothing_left(&format!("fw{turn}"));
}

/// Each of them with its own would be killed for want of memory.
fn forked_memory_within_a_limit(host: &Host) {
    let Some(here) = limited(host, "fl0", "") else {
        return host.skip("needs cc (tests/setup)");
    };
    set(host, TrackerChoice::Auto, ForkedChoice::Auto);
    let there = here.twin("fl1");
    let moved = here.move_live(&there, 3);
    assert!(moved.arrived.fallbacks[0].contains("MiB again"), "{moved:?}");
    assert_all_fine(&there);
    assert!(proportional_mib(host, &there) < MIB + BESIDE);
    there.stop();
    host.assert_nothing_left("fl1");
}

/// What CRIU cannot share again is not let run into its limit.
fn forked_memory_beyond_a_limit(host: &Host) {
    let Some(here) = limited(host, "fb0", "split") else {
        return host.skip("needs cc (tests/setup)");
    };
    set(host, TrackerChoice::Auto, ForkedChoice::Auto);
    for tracked in [true, false] {
        let mut source = here.source();
        if tracked {
            source.track().expect("track");
            source.harvest(&mut Default::default()).expect("harvest");
        }
        let error = source.pause().expect_err("beyond its limit").to_string();
        assert!(error.contains("limit is 256 MiB"), "{error}");
        source.resume().expect("as if nothing had been");
        drop(source);
        here.await_rounds(here.rounds() + 5);
    }
    here.stop();
    host.assert_nothing_left("fb0");
}

/// The tests above can fail: without pages of the one that they are sent for, others miss them too.
fn forked_withheld_page_is_noticed(host: &Host) {
    let Some(here) = host.program_with("fn0", "forked", "16") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    for (turn, forked) in [ForkedChoice::Apart, ForkedChoice::Shared].into_iter().enumerate() {
        set(host, TrackerChoice::Auto, forked);
        let there = here.twin(&format!("fn{}", turn + 1));
        let two = |of: PageRange| PageRange::new(of.space, of.first, of.count.min(2));
        here.run_without(&there, SpaceId(1), two, || {
            (0..PROCESSES).for_each(|process| there.await_log(&format!("BAD process {process} ")));
        });
        here.await_rounds(here.rounds() + 8);
    }
    here.stop();
}

/// Not a test that can pass or fail: what memory a tree of forked processes has, which shares what it had
/// before it forked, before and after a move, and what a move costs.
fn measure_forked(host: &Host) {
    let Ok(size) = std::env::var("DECAMP_MEASURE_FORKED_MIB") else {
        return host.skip("set DECAMP_MEASURE_FORKED_MIB to a size (128) to measure");
    };
    for forked in [ForkedChoice::Each, ForkedChoice::Apart, ForkedChoice::Shared] {
        let name = format!("mf{forked:?}").to_lowercase();
        let Some(mut here) = host.program_with(&name, "forked", &size) else {
            return host.skip("needs cc (tests/setup)");
        };
        set(host, TrackerChoice::Auto, forked);
        here.run();
        here.await_rounds(3);
        // What was shared is not any more after a move that does not share it again.
        let turns = if forked == ForkedChoice::Shared { 5 } else { 1 };
        for turn in 0..turns {
            let before = proportional_mib(host, &here);
            let there = here.twin(&format!("{name}{turn}"));
            let moved = here.move_live(&there, 3);
            there.await_rounds(here.rounds() + 20);
            let after = proportional_mib(host, &there);
            let line = format!(
                "    {forked:?}: {before} MiB before, {after} MiB after, {} MiB sent, downtime {:.0} ms \
                 (harvest {:.1}, load {:.1})",
                mib(moved.sent),
                moved.downtime(),
                moved.times["harvest"],
                moved.times["load"],
            );
            writeln!(std::io::stderr(), "{line}").expect("stderr");
            here = there;
        }
        here.stop();
    }
}

fn set(host: &Host, tracker: TrackerChoice, forked: ForkedChoice) {
    host.methods.set(Methods { tracker, forked, ..Methods::default() });
}

/// The program with a limit that its memory fits in, but not that of nine of them.
fn limited<'a>(host: &'a Host, name: &str, option: &str) -> Option<Spot<'a>> {
    let here = host.program_with(name, "forked", &format!("{MIB} {option}"))?;
    here.change_config(|config| {
        config["linux"]["resources"]["memory"] = serde_json::json!({"limit": 256 << 20});
    });
    here.run();
    here.await_rounds(3);
    Some(here)
}

fn mib(pages: u64) -> u64 {
    (pages * PAGE_SIZE as u64) >> 20
}

fn assert_travelled_once(moved: &Moved) {
    let sent = mib(moved.sent);
    assert!((MIB..MIB + BESIDE).contains(&sent), "{sent} MiB were sent: {moved:?}");
}

/// Every process has checked what it has, several times, once all of its memory is there.
pub(crate) fn assert_all_fine(spot: &Spot<'_>) {
    spot.await_rounds(1);
    spot.await_rounds(spot.rounds() + 20);
    (1..PROCESSES).for_each(|child| spot.await_log(&format!("child {child} fine")));
    spot.rounds();
}

/// Memory of all processes of a container, each page once.
fn proportional_mib(host: &Host, spot: &Spot<'_>) -> u64 {
    let processes = std::fs::read_to_string(host.cgroup(&spot.place.name).join("cgroup.procs"));
    let proportional = |pid: &str| -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    processes.expect("processes").lines().map(proportional).sum::<u64>() / 1024
}
