//! Hiding memory from CRIU: what the page engine moves CRIU finds empty, and leaves out of its images.
//!
//! CRIU asks `/proc/PID/pagemap` which pages there are, and we answer: for what is hidden none, for the rest
//! what the kernel says. There are two ways to be the one that is asked. Under the filter ([`filter`]) CRIU's
//! calls come to us; so can its questions for segments of shared memory. With the mounts ([`mounts`]) the
//! file that it opens is ours: that also does where CRIU may be under no filter at first, because a process
//! that it has to dump is, and where the kernel does not scan (before Linux 6.7) and page tables are read. What
//! else CRIU asks it gets a filter for as soon as it may be under one ([`late`]).

pub(crate) mod files;
pub(crate) mod filter;
pub(crate) mod late;
pub(crate) mod mounts;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use crate::beside;
use crate::error::Result;
use crate::memory::HiddenProcess;
use crate::pagemap::{PAGE_IS_GUARD, scans};
use crate::segments::hide::HiddenSegments;
use crate::sys::{self, PageRegion, PmScanArg};

/// CRIU asks for 32,768 regions at most; a request for far more is not CRIU's.
const REGIONS_CAP: u64 = 1 << 20;

/// Hidden address ranges by process.
pub(crate) type HiddenRanges = BTreeMap<i32, Vec<Range<u64>>>;

/// All that CRIU shall not see.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hidden {
    pub(crate) ranges: HiddenRanges,
    pub(crate) segments: HiddenSegments,
}

/// How memory is hidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// CRIU is under a filter of ours.
    Filter,
    /// CRIU has files of ours in a mount namespace of its own.
    Mounts,
}

/// The way to hide memory of a tree, in which somebody is under a seccomp filter when it is `filtered`.
///
/// # Errors
/// Why there is none on this host.
pub(crate) fn choose(filtered: bool) -> std::result::Result<Way, String> {
    let filter = match (filtered, scans()) {
        (true, _) => Err("a process of it is under a seccomp filter".to_owned()),
        (false, false) => Err("the kernel does not scan page tables (before Linux 6.7)".to_owned()),
        (false, true) => filter::probe(),
    };
    let Err(no_filter) = filter else { return Ok(Way::Filter) };
    match mounts::probe() {
        Ok(()) => Ok(Way::Mounts),
        Err(no_mounts) => Err(format!("{no_filter}, and {no_mounts}")),
    }
}

/// Whether segments of shared memory can be hidden too.
///
/// # Errors
/// Why not.
pub(crate) fn hides_segments(way: Way) -> std::result::Result<(), String> {
    match way {
        Way::Filter => Ok(()),
        Way::Mounts => late::probe(),
    }
}

/// Tries on a thread of its own what a thread is not rid of again.
fn try_on_a_thread(
    what: impl FnOnce() -> Result<()> + Send + 'static,
) -> std::result::Result<(), String> {
    beside::apart(what).map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
        format!("{error}{}", cause.unwrap_or_default())
    })
}

/// Whether a thread of these processes is under a seccomp filter. Those that have ended are not.
pub(crate) fn are_filtered(pids: &[i32]) -> bool {
    pids.iter().any(|pid| {
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
        threads.flatten().any(|thread| {
            fs::read_to_string(thread.path().join("status")).is_ok_and(|text| is_filtered(&text))
        })
    })
}

/// Whether `/proc/PID/status` is of a thread under a filter, or in strict mode.
fn is_filtered(status: &str) -> bool {
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    mode.is_some_and(|mode| mode.trim() != "0")
}

/// What a scan may be answered with.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    regions: Vec<PageRegion>,
    walk_end: u64,
}

/// The ranges to hide, joined where they touch.
pub(crate) fn ranges(hidden: &[HiddenProcess]) -> HiddenRanges {
    let mut found = HiddenRanges::new();
    for process in hidden {
        let joined = found.entry(process.process.pid).or_default();
        for mapping in &process.mappings {
            match joined.last_mut() {
                Some(last) if last.end == mapping.start => last.end = mapping.end,
                _ => joined.push(mapping.clone()),
            }
        }
    }
    found
}

/// Does a scan of `pagemap` for CRIU as if `hidden` (ascending, disjoint) were empty. A scan for anything else
/// than pages to be dumped is done as it is.
fn scan(
    pagemap: BorrowedFd<'_>,
    hidden: &[Range<u64>],
    argument: &PmScanArg,
) -> io::Result<Answer> {
    if argument.vec_len > REGIONS_CAP {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let hidden = if is_page_dump(argument) { hidden } else { &[] };
    scan_around(argument, hidden, |range, regions| {
        let mut part = PmScanArg { start: range.start, end: range.end, ..*argument };
        let found = sys::pagemap_scan(pagemap, &mut part, regions)?;
        Ok((found, part.walk_end))
    })
}

/// Whether a scan asks for pages to be dumped, and for nothing else that we would have to know.
fn is_page_dump(argument: &PmScanArg) -> bool {
    let asked = argument.category_mask | argument.category_anyof_mask;
    asked & PAGE_IS_GUARD == 0
        && argument.flags == 0
        && argument.max_pages == 0
        && argument.start < argument.end
        && (1..=REGIONS_CAP).contains(&argument.vec_len)
}

/// Answers a scan as if `hidden` (ascending, disjoint) were empty; `scan` is the kernel's word for a
/// range that is not hidden: regions found, and where it stopped.
fn scan_around(
    argument: &PmScanArg,
    hidden: &[Range<u64>],
    mut scan: impl FnMut(&Range<u64>, &mut [PageRegion]) -> io::Result<(usize, u64)>,
) -> io::Result<Answer> {
    let room = argument.vec_len as usize;
    let mut regions = vec![PageRegion::default(); room];
    let mut used = 0;
    for visible in visible(&(argument.start..argument.end), hidden) {
        if used == room {
            return Ok(answer(regions, used, visible.start));
        }
        let (found, walk_end) = scan(&visible, &mut regions[used..])?;
        used += found;
        if walk_end < visible.end {
            return Ok(answer(regions, used, walk_end));
        }
    }
    Ok(answer(regions, used, argument.end))
}

fn answer(mut regions: Vec<PageRegion>, used: usize, walk_end: u64) -> Answer {
    regions.truncate(used);
    Answer { regions, walk_end }
}

/// What is left of `range` without `hidden` (ascending, disjoint).
pub(crate) fn visible(range: &Range<u64>, hidden: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut at = range.start;
    for hole in hidden.iter().filter(|hole| overlaps(hole, range)) {
        if at < hole.start {
            left.push(at..hole.start);
        }
        at = at.max(hole.end);
    }
    if at < range.end {
        left.push(at..range.end);
    }
    left
}

fn is_set(event: &EventFd) -> bool {
    let mut events = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    poll(&mut events, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn overlaps(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// A kernel with these pages present, one region a page, as many as there is room for.
    fn kernel(pages: &BTreeSet<u64>, range: &Range<u64>, room: &mut [PageRegion]) -> (usize, u64) {
        let mut used = 0;
        for page in pages.range(range.clone()) {
            if used == room.len() {
                return (used, *page);
            }
            room[used] = PageRegion { start: *page, end: page + 1, categories: 8 };
            used += 1;
        }
        (used, range.end)
    }

    fn disjoint(mut cuts: Vec<u64>) -> Vec<Range<u64>> {
        cuts.sort_unstable();
        cuts.dedup();
        cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect()
    }

    proptest! {
        #[test]
        fn a_caller_that_walks_on_sees_all_pages_but_the_hidden(
            pages in prop::collection::btree_set(0u64..300, 0..120),
            cuts in prop::collection::vec(0u64..300, 0..12),
            start in 0u64..150,
            length in 1u64..150,
            room in 1u64..40,
        ) {
            let hidden = disjoint(cuts);
            let end = start + length;
            let mut seen = BTreeSet::new();
            let mut at = start;
            while at < end {
                let argument = PmScanArg { start: at, end, vec_len: room, ..PmScanArg::default() };
                let answer = scan_around(&argument, &hidden, |range, regions| Ok(kernel(&pages, range, regions)))
                    .expect("a fake kernel does not fail");
                prop_assert!(answer.walk_end > at || !answer.regions.is_empty());
                prop_assert!(answer.walk_end <= end);
                for region in &answer.regions {
                    prop_assert!(seen.insert(region.start));
                    prop_assert!(region.end <= answer.walk_end);
                }
                at = answer.walk_end;
            }
            let expected: BTreeSet<u64> = pages
                .into_iter()
                .filter(|page| (start..end).contains(page) && !hidden.iter().any(|hole| hole.contains(page)))
                .collect();
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn threads_under_a_filter_are_seen() {
        let status = |mode| format!("Name:\tx\nSeccomp:\t{mode}\nSeccomp_filters:\t1\n");
        assert!(!is_filtered(&status(0)));
        assert!(is_filtered(&status(1)) && is_filtered(&status(2)));
        // One of ours alone, and not the first.
        let us = [std::process::id() as i32];
        let (ended, wait) = std::sync::mpsc::channel::<()>();
        let (say, filtered) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let listener = sys::filter_calls(sys::Calls::default());
            say.send(listener.is_ok()).expect("heard");
            let _ = wait.recv();
        });
        match filtered.recv().expect("told") {
            true => assert!(are_filtered(&us)),
            false => eprintln!("skipped: needs root"),
        }
        drop(ended);
        thread.join().expect("no panic");
        assert!(!are_filtered(&[i32::MAX]));
    }

    #[test]
    fn scans_for_guard_pages_and_unknown_scans_pass() {
        let dump = PmScanArg {
            start: 0,
            end: 4096,
            vec_len: 10,
            category_anyof_mask: 24,
            ..PmScanArg::default()
        };
        assert!(is_page_dump(&dump));
        assert!(!is_page_dump(&PmScanArg { category_mask: PAGE_IS_GUARD, ..dump }));
        assert!(!is_page_dump(&PmScanArg { flags: 1, ..dump }));
        assert!(!is_page_dump(&PmScanArg { max_pages: 5, ..dump }));
    }
}
