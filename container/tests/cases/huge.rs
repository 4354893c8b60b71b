//! Moves of containers with huge pages (hugetlbfs), by programs that know all of them.

use std::fs;
use std::io::Write as _;

use decamp_shared::methods::{Methods, RestoreChoice, TrackerChoice};
use decamp_shared::pages::{PageRange, PageSet, SpaceId};
use decamp_shared::workload::{Backend, PlacedTree};

use super::segments;
use super::support::{Case, Host, Spot};

pub(crate) const CASES: [Case; 8] = [
    Case { name: "huge_pages_move", run: huge_pages_move },
    Case {
        name: "withheld_shared_huge_page_is_noticed",
        run: withheld_shared_huge_page_is_noticed,
    },
    Case { name: "private_huge_pages_move_live", run: private_huge_pages_move_live },
    Case { name: "private_huge_pages_survive_a_stop", run: private_huge_pages_survive_a_stop },
    Case { name: "private_huge_pages_restored_eagerly", run: private_huge_pages_restored_eagerly },
    Case { name: "withheld_huge_page_is_noticed", run: withheld_huge_page_is_noticed },
    Case { name: "too_few_huge_pages_are_refused", run: too_few_huge_pages_are_refused },
    Case { name: "measure_huge", run: measure_huge },
];

const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Pages that the smallest program maps in one process, and in both.
const OF_ONE: u64 = 8 + 2 + 8 + 6 + 2 + 1;
const OF_BOTH: u64 = 2 * OF_ONE;
/// Pages that the smallest program writes, moves, gives back or reads for the first time between two looks, however
/// far apart those are: two that count, two stacks, two that are moved about, one given back, one read.
const WRITTEN: u64 = 2 + 2 + 2 + 1 + 1;
/// Ordinary pages in a huge one.
const PAGES: u64 = 512;
/// Ordinary pages that two small processes write at most between two looks.
const ORDINARY: u64 = 64;

/// Huge pages that are there for a test.
struct Pool(String);

impl Pool {
    /// Nothing where the kernel does not have so many.
    fn of(pages: u64) -> Option<Self> {
        let before = fs::read_to_string(POOL).ok()?;
        let pool = Self(before);
        fs::write(POOL, pages.to_string()).ok()?;
        let there: u64 = fs::read_to_string(POOL).ok()?.trim().parse().ok()?;
        (there >= pages).then_some(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(POOL, self.0.trim());
    }
}

/// A program with private huge pages that runs, of `mib` MiB and some more.
fn begun<'h>(host: &'h Host, name: &str, mib: u64) -> Option<(Pool, Spot<'h>)> {
    begun_with(host, name, "huge_private", mib)
}

/// A program that runs, and the pages that both ends of a move want.
fn begun_with<'h>(host: &'h Host, name: &str, program: &str, mib: u64) -> Option<(Pool, Spot<'h>)> {
    let pages = 2 * (OF_BOTH - 16 + mib) + 8;
    let Some(pool) = Pool::of(pages) else {
        host.skip("needs more huge pages than the kernel can make (vm.nr_hugepages)");
        return None;
    };
    let Some(here) = host.program_with(&format!("{name}0"), program, &mib.to_string()) else {
        host.skip("needs cc (tests/setup)");
        return None;
    };
    here.run();
    here.await_rounds(3);
    Some((pool, here))
}

/// What of the program's memory is shared and of huge pages.
const SHARED: [&str; 2] =
    ["shared huge pages of 2048 KiB /anon_hugepage", "shared huge pages of 2048 KiB huge"];

/// Private and shared ones, and in a memory file, of two processes.
fn huge_pages_move(host: &Host) {
    let Some((_pool, mut here)) = begun_with(host, "h", "huge", 8) else { return };
    for turn in 1..=4 {
        let there = here.twin(&format!("h{turn}"));
        let names = segments::names(&here);
        assert!(SHARED.iter().all(|name| names.iter().any(|one| one == name)), "{names:?}");
        let moved = here.move_live(&there, 3);
        // Of these single ordinary pages are sent again.
        assert!(moved.pages < ORDINARY, "{} pages in the stop", moved.pages);
        there.await_rounds(here.rounds() + 3);
        here = there;
    }
    // All at once, after a move that was given up.
    let mut source = here.source();
    source.pause().expect("pause");
    source.harvest(&mut PageSet::new()).expect("harvest");
    let sections = source.save().expect("save");
    let bytes: usize = sections.iter().map(|section| section.bytes.len()).sum();
    assert!(bytes < 1 << 20, "{bytes} bytes of images: CRIU dumped huge pages");
    source.resume().expect("resume");
    drop(source);
    here.await_rounds(here.rounds() + 3);
    let there = here.twin("h5");
    here.move_to(&there);
    there.await_rounds(here.rounds() + 3);
    there.stop();
    host.assert_nothing_left("h5");
}

/// The test above can fail: without some ordinary page of a shared huge one the program says so.
fn withheld_shared_huge_page_is_noticed(host: &Host) {
    let Some((_pool, here)) = begun_with(host, "hv", "huge", 8) else { return };
    for (turn, name) in SHARED.into_iter().enumerate() {
        let there = here.twin(&format!("hv{}", turn + 1));
        let mut spaces = here.source().spaces().expect("spaces").into_iter();
        let space = SpaceId(spaces.find(|info| info.label == name).expect("a segment").id);
        let one = |of: PageRange| {
            assert!((of.first..of.first + of.count).contains(&100), "{of:?}");
            PageRange::new(space, 100, 1)
        };
        here.run_without(&there, space, one, || there.await_log("BAD"));
        here.await_rounds(here.rounds() + 3);
    }
    here.stop();
}

fn private_huge_pages_move_live(host: &Host) {
    let Some((_pool, mut here)) = begun(host, "hl", 16) else { return };
    for turn in 1..=6 {
        let there = here.twin(&format!("hl{turn}"));
        let moved = here.move_live(&there, 4);
        assert_eq!(moved.arrived.restore.as_deref(), Some("lazy"));
        // What it writes to is sent again, by whole huge pages, and not all of it.
        assert!(moved.pages <= PAGES * WRITTEN + ORDINARY, "{} pages in the stop", moved.pages);
        there.await_rounds(here.rounds() + 25);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("hl6");
}

/// Stopped and copied, by every tracker, and rolled back in between.
fn private_huge_pages_survive_a_stop(host: &Host) {
    let Some((_pool, mut here)) = begun(host, "hs", 16) else { return };
    let mut source = here.source();
    source.pause().expect("pause");
    source.harvest(&mut PageSet::new()).expect("harvest");
    let sections = source.save().expect("save");
    let bytes: usize = sections.iter().map(|section| section.bytes.len()).sum();
    assert!(bytes < 2 << 20, "{bytes} bytes of images: CRIU dumped huge pages");
    source.resume().expect("resume");
    drop(source);
    here.await_rounds(here.rounds() + 3);
    for (turn, tracker) in
        (1..).zip([TrackerChoice::Auto, TrackerChoice::PageHash, TrackerChoice::PageHash])
    {
        host.methods.set(Methods { tracker, ..Methods::default() });
        let there = here.twin(&format!("hs{turn}"));
        match turn {
            1 => here.move_to(&there),
            _ => here.move_live(&there, 3),
        };
        there.await_rounds(here.rounds() + 8);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("hs3");
}

fn private_huge_pages_restored_eagerly(host: &Host) {
    let Some((_pool, mut here)) = begun(host, "he", 16) else { return };
    let restore = RestoreChoice::Eager;
    host.methods.set(Methods { restore, ..Methods::default() });
    for turn in 1..=3 {
        let there = here.twin(&format!("he{turn}"));
        let moved = here.move_live(&there, 3);
        assert_eq!(moved.arrived.restore.as_deref(), Some("eager"));
        there.await_rounds(here.rounds() + 8);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("he3");
}

/// The tests above can fail: without some ordinary page of a huge one the program says so.
fn withheld_huge_page_is_noticed(host: &Host) {
    let Some((_pool, here)) = begun(host, "hw", 16) else { return };
    let there = here.twin("hw1");
    let one = |of: PageRange| {
        // The largest stretch of the first process is the huge one.
        assert!(of.count >= 8 * 512, "{of:?}");
        PageRange::new(of.space, of.first + 700, 1)
    };
    here.run_without(&there, SpaceId(1), one, || there.await_log("BAD"));
    here.stop();
}

/// A destination without as many as will be promised refuses it, with a remedy, before anything is touched.
fn too_few_huge_pages_are_refused(host: &Host) {
    let Some((_pool, here)) = begun(host, "hf", 16) else { return };
    // Nobody takes away those that are in use, or promised.
    fs::write(POOL, "0").expect("huge pages");
    let mut source = here.source();
    let manifest = source.manifest().expect("a manifest");
    let trees: Vec<_> = manifest
        .files
        .iter()
        .map(|tree| PlacedTree { tree: tree.clone(), path: tree.path.clone().into() })
        .collect();
    let refusals = here.twin("hf1").backend().preflight(&manifest, &trees);
    let said: Vec<_> = refusals.iter().map(|refusal| &refusal.text).collect();
    let wanted = format!("It has mapped {OF_BOTH} huge pages of 2048 kB");
    let wanted = wanted.replace("kB", "KiB");
    assert!(
        said.iter().any(|text| text.starts_with(&wanted) && text.contains("nr_hugepages")),
        "{said:?}"
    );
    drop(source);
    here.await_rounds(here.rounds() + 3);
    here.stop();
    host.assert_nothing_left("hf0");
}

/// Not a test that can pass or fail: the figures of moves with huge pages that stand idle but for two.
fn measure_huge(host: &Host) {
    let Ok(sizes) = std::env::var("DECAMP_MEASURE_HUGE_MIB") else {
        return host.skip("set DECAMP_MEASURE_HUGE_MIB to sizes (64,512) to measure");
    };
    for (program, size) in ["huge_private", "huge"]
        .into_iter()
        .flat_map(|program| sizes.split(',').map(move |size| (program, size)))
    {
        let mib = size.parse().expect("a number");
        let name = format!("mh{}{size}-", program.len());
        let Some((_pool, mut here)) = begun_with(host, &name, program, mib) else { return };
        let mut rows = Vec::new();
        for turn in 1..=7 {
            let there = here.twin(&format!("{name}{turn}"));
            let moved = here.move_live(&there, 3);
            there.await_rounds(here.rounds() + 5);
            rows.push(moved);
            here = there;
        }
        here.stop();
        let median = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            (times[0], times[3], times[6])
        };
        let (least, middle, most) = median(rows.iter().map(|row| row.downtime()).collect());
        let mut out = std::io::stderr();
        writeln!(
            out,
            "    {program} of {size} MiB: downtime min {least:.0} median {middle:.0} max {most:.0} ms"
        )
        .expect("stderr");
        for step in ["pause", "harvest", "copy", "save", "load", "activate"] {
            let (_, middle, _) = median(rows.iter().map(|row| row.times[step]).collect());
            writeln!(out, "      {step:9} median {middle:7.1} ms").expect("stderr");
        }
    }
}
