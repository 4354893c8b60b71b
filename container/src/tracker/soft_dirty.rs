//! Tracking by the kernel's soft-dirty bits (`CONFIG_MEM_SOFT_DIRTY`): `/proc/PID/clear_refs` clears them
//! for a whole process, the first write to each page sets its bit. Kernel document:
//! `admin-guide/mm/soft-dirty`.
//!
//! Bits are looked at and cleared in two steps, and a write between them would be lost. So the container is
//! frozen for each of these looks; how long that took is told. Only a process that is new is not waited
//! for: its bits are cleared first, and then all that it has counts as written.
//!
//! The kernel keeps the bits of what it swaps or copies for a fork. Two things it does not tell.
//!
//! - Memory that `mremap` moves by whole page tables gets no bits, and may be back where it was before
//!   anybody looks: what was read there meanwhile was something else. So each mapping is registered with a
//!   userfaultfd that protects nothing. A mapping that moves loses that, whole or in part, and one that is
//!   not registered counts as written.
//! - Memory that is merged, or given back and only read since, has no bit either. So where each page lay is
//!   remembered ([`Frames`]): one that lies elsewhere counts as written.
//!
//! So does all memory of a process that shares it with another one, or that cannot have a userfaultfd; and,
//! in the stop, of one with a file that is open for direct I/O, for nobody sees what a device writes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use decamp_shared::pages::{PAGE_SIZE, PageSet};

use super::frames::Frames;
use super::{Tracker, each_that_lives, sharing};
use crate::cgroup::Cgroups;
use crate::entries::Entries;
use crate::error::{ContainerError, Result};
use crate::inject::userfaultfd_of;
use crate::memory::{self, HiddenProcess, Process, hideable_mappings};
use crate::pagemap::append;
use crate::sys;
use crate::sys::userfault::{self, Mode};

/// Nothing of it is protected: that it can be is all that is asked.
const FEATURES: u64 = userfault::FEATURE_PAGEFAULT_FLAG_WP;

/// Whether KSM merges pages.
const KSM: &str = "/sys/kernel/mm/ksm/run";

/// Somebody may take the cgroup away: it is not tried for ever.
const THAW_TRIES: u32 = 100;

/// The tracker.
pub(super) struct SoftDirty {
    cgroups: Cgroups,
    /// By the process's number here.
    known: BTreeMap<i32, Known>,
    longest_stop: Duration,
}

/// A process whose bits were cleared before.
struct Known {
    began: u64,
    /// Nothing when it could not make one, or has other memory since: it is as good as new.
    uffd: Option<OwnedFd>,
    /// Where the pages lay that were looked at when its bits were cleared. Memory that was of another kind
    /// then (locked, executable) lost its bits all the same, and nobody sent it: it is not among them.
    frames: Frames,
    /// It was seen with a file that is open for direct I/O.
    direct: bool,
}

/// A container that stands still for a moment. When this is dropped it runs again.
struct Stillness<'a>(&'a Cgroups);

impl<'a> Stillness<'a> {
    /// Nothing when it stands still already: whoever stopped it lets it run.
    fn begin(cgroups: &'a Cgroups) -> Result<Option<Self>> {
        if cgroups.is_frozen()? {
            return Ok(None);
        }
        cgroups.freeze()?;
        Ok(Some(Self(cgroups)))
    }
}

impl Drop for Stillness<'_> {
    fn drop(&mut self) {
        for _ in 0..THAW_TRIES {
            match self.0.thaw() {
                Ok(()) => return,
                Err(error) => {
                    tracing::error!(%error, "Cannot thaw what was frozen for a look; trying again");
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl SoftDirty {
    pub(super) fn new(cgroups: &Cgroups) -> Self {
        Self { cgroups: cgroups.clone(), known: BTreeMap::new(), longest_stop: Duration::ZERO }
    }

    /// Of which of them the bits tell what was written since the last harvest.
    fn told<'a>(
        &self,
        processes: impl Iterator<Item = &'a Process> + Clone,
    ) -> Result<BTreeSet<i32>> {
        if ksm_merges() {
            return Ok(BTreeSet::new());
        }
        let sharing = sharing(processes.clone());
        let mut told = BTreeSet::new();
        for Process { pid, .. } in processes {
            let known = self.known.get(pid);
            let began = memory::began(*pid)?;
            let is_same = |known: &Known| Some(known.began) == began && known.uffd.is_some();
            if known.is_some_and(is_same) && !sharing.contains(pid) {
                told.insert(*pid);
            }
        }
        Ok(told)
    }

    /// Looks at a process that stands still, and whose bits tell what it wrote.
    fn look_again(&mut self, process: &Process, dirty: &mut PageSet) -> Result<()> {
        let Some(known) = self.known.get_mut(&process.pid) else { return Ok(()) };
        let mappings = hideable_mappings(process.pid)?;
        let look = known.look(process.pid, &mappings)?;
        clear(process.pid)?;
        process.add_to(dirty, &look.written);
        known.frames = look.frames;
        // To be asked when the bits are cleared: what was on its way into memory then is of a file that
        // was open then.
        known.direct |= memory::does_direct_io(process.pid)?;
        Ok(())
    }

    /// Looks at a process that runs, and of which nothing is known: all that it has. `shares` its memory
    /// with another one: then it stays unknown.
    fn look_first(&mut self, process: &Process, shares: bool, dirty: &mut PageSet) -> Result<()> {
        let Some(began) = memory::began(process.pid)? else { return Ok(()) };
        let before = self.known.remove(&process.pid).filter(|known| known.began == began);
        let uffd = if shares { None } else { self.descriptor_of(process) };
        let mappings = hideable_mappings(process.pid)?;
        if let Some(uffd) = &uffd {
            mappings.iter().for_each(|mapping| {
                is_watched(process.pid, uffd.as_fd(), mapping);
            });
        }
        clear(process.pid)?;
        let look = Look::take(process.pid, &mappings, &Frames::default(), |_| false)?;
        process.add_to(dirty, &look.written);
        let direct =
            before.is_some_and(|known| known.direct) || memory::does_direct_io(process.pid)?;
        self.known.insert(process.pid, Known { began, uffd, frames: look.frames, direct });
        Ok(())
    }

    fn descriptor_of(&mut self, process: &Process) -> Option<OwnedFd> {
        let injected = userfaultfd_of(process.pid).and_then(|injected| {
            userfault::agree(injected.uffd.as_fd(), FEATURES)
                .map_err(ContainerError::io("use a userfaultfd"))?;
            Ok(injected)
        });
        match injected {
            Ok(injected) => {
                self.longest_stop = self.longest_stop.max(injected.stopped);
                Some(injected.uffd)
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::info!(%error, cause, "All memory of this process counts as written");
                None
            }
        }
    }
}

impl Known {
    /// One look, with what it knows of the last.
    fn look(&mut self, pid: i32, mappings: &[Range<u64>]) -> Result<Look> {
        let Some(uffd) = self.uffd.as_ref().map(AsFd::as_fd) else {
            return Look::take(pid, mappings, &Frames::default(), |_| false);
        };
        let mut gone = false;
        let look = Look::take(pid, mappings, &self.frames, |mapping| {
            let watched = is_watched(pid, uffd, mapping);
            gone |= watched == Watched::Gone;
            watched == Watched::Still
        });
        if gone {
            self.uffd = None;
        }
        look
    }
}

/// Whether a mapping stayed where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watched {
    /// It was registered.
    Still,
    /// It is from now on, or cannot be.
    Anew,
    /// The descriptor is of memory that the process has no more.
    Gone,
}

/// Registers a mapping, unless it is registered.
fn is_watched(pid: i32, uffd: BorrowedFd<'_>, mapping: &Range<u64>) -> Watched {
    match userfault::is_registered(uffd, mapping.start, PAGE_SIZE as u64) {
        Ok(true) => return Watched::Still,
        Ok(false) => {}
        // An exec replaced it.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Watched::Gone,
        Err(error) => {
            tracing::debug!(pid, ?mapping, %error, "Cannot say whether a mapping stayed");
        }
    }
    match userfault::register(uffd, mapping, Mode::WriteProtect) {
        Ok(()) => Watched::Anew,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOMEM)) => {
            Watched::Gone
        }
        Err(error) => {
            tracing::debug!(pid, ?mapping, %error, "Cannot register a mapping");
            Watched::Anew
        }
    }
}

impl Tracker for SoftDirty {
    fn harvest(&mut self, processes: &[Process], dirty: &mut PageSet) -> Result<()> {
        let told = self.told(processes.iter())?;
        let (known, new): (Vec<_>, Vec<_>) =
            processes.iter().cloned().partition(|process| told.contains(&process.pid));
        let sharing = sharing(new.iter());
        each_that_lives(&new, |process| {
            self.look_first(process, sharing.contains(&process.pid), dirty)
        })?;
        if !known.is_empty() {
            let begun = Instant::now();
            let cgroups = self.cgroups.clone();
            let still = Stillness::begin(&cgroups)?;
            let outcome = each_that_lives(&known, |process| self.look_again(process, dirty));
            drop(still);
            self.longest_stop = self.longest_stop.max(begun.elapsed());
            outcome?;
        }
        self.known.retain(|pid, _| processes.iter().any(|process| process.pid == *pid));
        Ok(())
    }

    fn last(&mut self, processes: &mut [HiddenProcess]) -> Result<()> {
        let told = self.told(processes.iter().map(|hidden| &hidden.process))?;
        for hidden in processes {
            hidden.look(false)?;
            let pid = hidden.process.pid;
            let known = self.known.get_mut(&pid);
            let known = known.filter(|known| told.contains(&pid) && !known.direct);
            if let Some(known) = known {
                let look = known.look(pid, &hidden.mappings)?;
                hidden.written = common(&hidden.pages, &look.written);
            }
        }
        Ok(())
    }

    fn stall(&self) -> Duration {
        self.longest_stop
    }
}

/// Has the kernel forget what was written until now.
fn clear(pid: i32) -> Result<()> {
    let path = format!("/proc/{pid}/clear_refs");
    fs::write(&path, "4").map_err(ContainerError::io(format!("write to {path}")))
}

/// What one walk of a memory's page tables finds.
struct Look {
    /// Pages that were written, or may have been, since the look before; all, if there was none.
    written: Vec<Range<u64>>,
    frames: Frames,
}

impl Look {
    /// Looks at all pages of `mappings`. Of those that `stayed` it is known where their pages lay `before`.
    fn take(
        pid: i32,
        mappings: &[Range<u64>],
        before: &Frames,
        mut stayed: impl FnMut(&Range<u64>) -> bool,
    ) -> Result<Self> {
        let mut entries = Entries::open(pid)?;
        let mut before = before.compare();
        let (mut written, mut frames) = (Vec::new(), Frames::default());
        for mapping in mappings {
            let stayed = stayed(mapping);
            entries.existing(mapping, |range, entry| {
                let page = range.start / PAGE_SIZE as u64;
                let lay_there = stayed && before.lay_there(page, entry);
                frames.push(page, entry);
                if entry.is_soft_dirty() || !lay_there {
                    append(&mut written, range);
                }
            })?;
        }
        Ok(Self { written, frames })
    }
}

/// What is in both of two lists of ascending ranges.
fn common(one: &[Range<u64>], other: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut found = Vec::new();
    let (mut first, mut second) = (one.iter().peekable(), other.iter().peekable());
    while let (Some(left), Some(right)) = (first.peek(), second.peek()) {
        let both = left.start.max(right.start)..left.end.min(right.end);
        if both.start < both.end {
            append(&mut found, both);
        }
        if left.end < right.end {
            first.next()
        } else {
            second.next()
        };
    }
    found
}

/// KSM forgets the bit of a page that it merges, and the page that it takes apart again may lie where it
/// once lay.
fn ksm_merges() -> bool {
    fs::read_to_string(KSM).is_ok_and(|run| run.trim() != "0")
}

/// Why it is used nowhere yet: memory that is the page of zeros at one look, is then written, read by us and sent,
/// given back, and only read again, is the page of zeros at the next look as well: it lies where it lay, without
/// a bit, and what was sent stays. Seen on Linux 6.1 by comparing, in the stops of 33 moves, each page with what
/// had been sent of it last, zeros in the last 10 of them: 65 such pages in one stop. Nothing else was missing but
/// what the kernel itself writes (the number of the CPU in a thread's restartable sequences area, while CRIU works
/// in the thread). So the pages of zeros, the huge one too (`KPF_ZERO_PAGE` in `/proc/kpageflags`), would have to
/// count as written at each look.
const NOT_YET: &str = "a page that is given back and read again between two looks may not be told of: not \
                       used in this version";

/// Whether the bits work here, tried on pages of our own: that the kernel has the file says nothing.
pub(super) fn probe() -> std::result::Result<(), String> {
    static OUTCOME: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    if ksm_merges() {
        return Err(format!("KSM merges pages and forgets that they were written ({KSM})"));
    }
    let tried = || match try_on_ourselves() {
        Ok(Tried::Works) => watching().and_then(|()| Err(NOT_YET.to_owned())),
        Ok(Tried::NoBits) => {
            Err("the kernel keeps no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)".to_owned())
        }
        Ok(Tried::NoFrames) => {
            Err("the kernel does not say where pages lie: that takes CAP_SYS_ADMIN".to_owned())
        }
        Err(error) => Err(format!("soft-dirty bits could not be tried: {error}")),
    };
    OUTCOME.get_or_init(tried).clone()
}

/// Whether it can be seen that memory moves.
fn watching() -> std::result::Result<(), String> {
    let uffd = sys::userfaultfd().map_err(|error| format!("no userfaultfd: {error}"))?;
    userfault::agree(uffd.as_fd(), FEATURES)
        .map_err(|error| format!("no write protection by userfaultfd (Linux 5.7): {error}"))?;
    let pid = std::process::id() as i32;
    sys::compare_memory(pid, pid)
        .map(drop)
        .map_err(|error| format!("the kernel does not compare memories (kcmp): {error}"))
}

/// What came of trying.
enum Tried {
    Works,
    NoBits,
    NoFrames,
}

/// Nobody else tracks this process, so nobody misses the bits that are cleared.
fn try_on_ourselves() -> Result<Tried> {
    let page = PAGE_SIZE as u64;
    let pid = std::process::id() as i32;
    let mut buffer = vec![1u8; 3 * PAGE_SIZE];
    let start = (buffer.as_ptr() as u64).next_multiple_of(page);
    let offset = (start - buffer.as_ptr() as u64) as usize;
    let mut entries = Entries::open(pid)?;
    let mut known = true;
    let mut bits = || -> Result<Vec<bool>> {
        let mut found = Vec::new();
        let range = start..start + 2 * page;
        entries.existing(&range, |_, entry| {
            found.push(entry.is_soft_dirty());
            known &= entry.place().is_some();
        })?;
        Ok(found)
    };
    let before = bits()?;
    clear(pid)?;
    let cleared = bits()?;
    std::hint::black_box(&mut buffer)[offset + PAGE_SIZE] = 2;
    let after = bits()?;
    let works = (before, cleared, after) == (vec![true; 2], vec![false; 2], vec![false, true]);
    Ok(match (works, known) {
        (false, _) => Tried::NoBits,
        (true, false) => Tried::NoFrames,
        (true, true) => Tried::Works,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(pairs: &[(u64, u64)]) -> Vec<Range<u64>> {
        pairs.iter().map(|(start, end)| *start..*end).collect()
    }

    #[test]
    fn what_is_in_both_lists_is_found() {
        let one = ranges(&[(0, 4), (6, 9), (12, 20)]);
        let other = ranges(&[(2, 7), (8, 13), (19, 30)]);
        assert_eq!(common(&one, &other), ranges(&[(2, 4), (6, 7), (8, 9), (12, 13), (19, 20)]));
        assert_eq!(common(&one, &[]), []);
        assert_eq!(common(&one, &one), one);
    }

    #[test]
    fn the_probe_says_what_the_kernel_was_built_with() {
        // A process that nobody tracks has the flag on every mapping, where there is such a thing.
        let smaps = fs::read_to_string("/proc/self/smaps").expect("our mappings");
        let built_in =
            smaps.lines().any(|line| line.starts_with("VmFlags:") && line.contains(" sd"));
        // Where another test has cleared them, it could not be tried. Who is not root may know no frames.
        let outcome = probe();
        let said = outcome.as_ref().err().map_or("", String::as_str);
        assert!(
            built_in || said.contains("CONFIG_MEM_SOFT_DIRTY") || said.contains("KSM"),
            "{said}"
        );
        assert!(!said.contains("CONFIG_MEM_SOFT_DIRTY") || !built_in, "{said}");
    }
}
