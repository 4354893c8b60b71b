//! Hiding memory from CRIU: the supervisor that answers CRIU's page scans.
//!
//! CRIU runs under a filter that hands each `ioctl(_, PAGEMAP_SCAN, _)` to us. A scan of a process
//! whose memory the page engine moves is answered as if the hidden mappings were empty: what is left
//! between them is scanned through CRIU's own descriptor, and the result is written into CRIU's
//! memory. Scans of anything else, and scans for guard pages, are let through.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{ContainerError, Result};
use crate::memory::{HiddenProcess, PAGE_IS_GUARD};
use crate::sys::{self, Notification, PageRegion, PmScanArg, Verdict};

/// CRIU asks for 32,768 regions at most; a request for far more is not CRIU's.
const REGIONS_CAP: u64 = 1 << 20;

/// Hidden address ranges by process.
pub(crate) type HiddenRanges = BTreeMap<i32, Vec<Range<u64>>>;

/// Answers the scans of one CRIU for as long as it lives.
pub(crate) struct Supervisor {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    answered: Arc<AtomicU64>,
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

impl Supervisor {
    /// Puts the calling thread under the filter (it never leaves it: use a thread of its own that
    /// does nothing but start CRIU) and answers scans from another thread.
    pub(crate) fn install(hidden: HiddenRanges) -> Result<Self> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(ContainerError::errno("make an event"))?;
        let stop = Arc::new(stop);
        let answered = Arc::new(AtomicU64::new(0));
        let (sender, receiver) = std::sync::mpsc::channel::<OwnedFd>();
        let (stopped, count) = (stop.clone(), answered.clone());
        // Started first: a thread made after the filter would be under it as well.
        let thread = std::thread::Builder::new()
            .name("page-scans".to_owned())
            .spawn(move || {
                if let Ok(listener) = receiver.recv() {
                    supervise(&listener, &stopped, &hidden, &count);
                }
            })
            .map_err(ContainerError::io("start a thread"))?;
        let listener = sys::filter_page_scans()
            .map_err(ContainerError::io("put a thread under a seccomp filter"))?;
        // The thread cannot have ended: it waits for this.
        let _ = sender.send(listener);
        Ok(Self { stop, thread: Some(thread), answered })
    }

    /// How many scans were answered without the kernel's word for the hidden ranges.
    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whether this process may do all that hiding takes: filter a thread, take a descriptor from
/// another process, scan pages. Tried on a thread that ends.
pub(crate) fn probe() -> std::result::Result<(), String> {
    let tried = std::thread::spawn(|| -> Result<()> {
        let pagemap = fs::File::open("/proc/self/pagemap")
            .map_err(ContainerError::io("open /proc/self/pagemap"))?;
        let mut argument =
            PmScanArg { end: 4096, category_anyof_mask: 8, return_mask: 8, ..PmScanArg::default() };
        sys::pagemap_scan(pagemap.as_fd(), &mut argument, &mut [PageRegion::default()])
            .map_err(ContainerError::io("scan pages (Linux 6.7 or newer is needed)"))?;
        sys::filter_page_scans()
            .map_err(ContainerError::io("put a thread under a seccomp filter"))?;
        let us = sys::pidfd_open(std::process::id() as i32)
            .map_err(ContainerError::io("open a process"))?;
        sys::pidfd_getfd(us.as_fd(), pagemap.as_raw_fd())
            .map_err(ContainerError::io("take a descriptor from a process"))?;
        Ok(())
    });
    match tried.join() {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            Err(format!("{error}{}", cause.unwrap_or_default()))
        }
        Err(_) => Err("the probe ended in a panic".to_owned()),
    }
}

fn supervise(listener: &OwnedFd, stop: &EventFd, hidden: &HiddenRanges, answered: &AtomicU64) {
    loop {
        let mut events = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut events, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => {
                tracing::error!(%error, "Cannot wait for CRIU's page scans");
                return;
            }
            Ok(_) => {}
        }
        if events[1].any() == Some(true) {
            return;
        }
        // ENOENT: the caller was killed in between. The listener itself has no other way to fail.
        let Ok(notification) = sys::next_notification(listener.as_fd()) else { continue };
        let verdict = match decide(listener, &notification, hidden) {
            Ok(verdict) => verdict,
            Err(error) => {
                tracing::error!(%error, "Cannot answer CRIU's page scan");
                // CRIU gives up and the dump fails: better than a page that nobody sends.
                Verdict::Fail(error.raw_os_error().unwrap_or(libc::EIO))
            }
        };
        if matches!(verdict, Verdict::Return(_)) {
            answered.fetch_add(1, Ordering::Relaxed);
        }
        if let Err(error) = sys::answer(listener.as_fd(), &notification, verdict) {
            tracing::debug!(%error, "CRIU did not wait for the answer to its page scan");
        }
    }
}

fn decide(
    listener: &OwnedFd,
    notification: &Notification,
    hidden: &HiddenRanges,
) -> io::Result<Verdict> {
    let [fd, _, address, ..] = notification.arguments;
    let argument = PmScanArg::read_from(notification.pid, address)?;
    if !is_page_dump(&argument) {
        return Ok(Verdict::Continue);
    }
    let process = sys::pidfd_open(notification.pid)
        .or_else(|_| sys::pidfd_open(leader(notification.pid)?))?;
    let pagemap = sys::pidfd_getfd(process.as_fd(), fd as i32)?;
    if !sys::still_waits(listener.as_fd(), notification) {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let Some(ranges) = target_of(&pagemap)?.and_then(|target| hidden.get(&target)) else {
        return Ok(Verdict::Continue);
    };
    let asked = argument.start..argument.end;
    if !ranges.iter().any(|range| overlaps(range, &asked)) {
        return Ok(Verdict::Continue);
    }
    let answer = scan_around(&argument, ranges, |range, regions| {
        let mut part = PmScanArg { start: range.start, end: range.end, ..argument };
        let found = sys::pagemap_scan(pagemap.as_fd(), &mut part, regions)?;
        Ok((found, part.walk_end))
    })?;
    sys::write_regions(notification.pid, argument.vec, &answer.regions)?;
    sys::write_memory(
        notification.pid,
        address + PmScanArg::WALK_END,
        &answer.walk_end.to_ne_bytes(),
    )?;
    Ok(Verdict::Return(answer.regions.len() as i64))
}

/// The process that thread `thread` belongs to.
fn leader(thread: i32) -> io::Result<i32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status"))?;
    let number = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    number.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
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

/// The process whose pages a descriptor of `/proc/PID/pagemap` describes.
fn target_of(pagemap: &OwnedFd) -> io::Result<Option<i32>> {
    let path = fs::read_link(format!("/proc/self/fd/{}", pagemap.as_raw_fd()))?;
    let mut parts = path.components().rev().map(|part| part.as_os_str());
    if parts.next().is_none_or(|name| name != "pagemap") {
        return Ok(None);
    }
    Ok(parts.next().and_then(|pid| pid.to_str()).and_then(|pid| pid.parse().ok()))
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
fn visible(range: &Range<u64>, hidden: &[Range<u64>]) -> Vec<Range<u64>> {
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

    #[test]
    fn a_filtered_scan_of_ourselves_is_answered() {
        // The whole path on this very process: a filtered thread scans, the supervisor answers.
        let buffer = vec![1u8; 1 << 20];
        let start = (buffer.as_ptr() as u64).next_multiple_of(4096);
        let end = start + (buffer.len() as u64 / 4096 - 1) * 4096;
        let middle = start + 64 * 4096;
        let hidden = HiddenRanges::from([(
            std::process::id() as i32,
            std::iter::once(start..middle).collect(),
        )]);
        let scanned = std::thread::spawn(move || {
            let supervisor = match Supervisor::install(hidden) {
                Ok(supervisor) => supervisor,
                Err(error) => {
                    eprintln!("skipped: {error}: needs root");
                    return None;
                }
            };
            let pagemap = fs::File::open("/proc/self/pagemap").expect("pagemap");
            let mut argument = PmScanArg {
                start,
                end,
                category_anyof_mask: 24,
                return_mask: 24,
                ..PmScanArg::default()
            };
            let mut regions = vec![PageRegion::default(); 600];
            let found =
                sys::pagemap_scan(pagemap.as_fd(), &mut argument, &mut regions).expect("scan");
            assert_eq!(supervisor.answered(), 1);
            Some((regions[..found].to_vec(), argument.walk_end))
        });
        let Some((regions, walk_end)) = scanned.join().expect("no panic") else { return };
        drop(buffer);
        assert_eq!(walk_end, end);
        assert_eq!(regions.first().map(|region| region.start), Some(middle));
        assert_eq!(
            regions.iter().map(|region| region.end - region.start).sum::<u64>(),
            end - middle
        );
    }
}
