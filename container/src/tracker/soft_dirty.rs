//! Tracking by the kernel's soft-dirty bits (`CONFIG_MEM_SOFT_DIRTY`): `/proc/PID/clear_refs` clears them
//! for a whole process, the first write to each page sets its bit. Kernel document:
//! `admin-guide/mm/soft-dirty`.
//!
//! Bits are looked at and cleared in two steps, and a write between them would be lost. So the container is
//! frozen for each of these looks; how long that took is told. A process that is new stands still only while
//! its bits are cleared: then all that it has counts as written.
//!
//! # Why what is not told was not written
//!
//! Read from Linux 6.1, and held to by [`probe`] where it was not always so. A page that was there at a look
//! can be other at the next one, or have been other in between, only by one of these.
//!
//! - It is written, by the process or by the kernel for it: no entry of a page table that lost its bit lets
//!   writes through (see below), so that is a fault, which sets the bit. So do a fault that makes a page, or
//!   a huge one, for a write; the copy of what forked processes share; the write of a debugger to memory that
//!   is read only; a huge page put together of small ones; `UFFDIO_COPY`.
//! - It goes, and another comes: that one comes by a write, with its bit, or by a read, and then it is a page
//!   of zeros. That is where two looks see the same: the page of zeros at both, and what was written and sent
//!   in between was given back. So a page of zeros counts as one that is not there, at every look, the last
//!   one too, and what is not there in the stop is not there where it arrives ([`Zeros`]). Private mappings
//!   of files, where a page of the file's comes back, are not this tracker's: CRIU dumps them.
//! - Memory is moved there by `mremap`. By single pages, and by huge ones, they get their bits; by whole page
//!   tables they do not. So each mapping is registered with a userfaultfd: one that moves loses that, whole
//!   or in part, as does one that is mapped anew, and what is not registered counts as written.
//! - KSM merges it, which loses the bit, and takes it apart again. Where that was at work between two looks
//!   all counts as written ([`merging`]). An administrator who starts it, has it take everything apart and
//!   stops it again, all between two looks, goes unnoticed.
//! - Somebody else clears the bits, as a program does that uses them itself; and it would go wrong if we
//!   did. Where a process of the container has the file for that open, no bit is cleared any more, and
//!   everything counts as written. One that opens and closes it between two looks goes unnoticed.
//! - A device writes it. In the stop all counts as written of a process with a file that is open for direct
//!   I/O. Whatever else lets devices write is refused before.
//!
//! Everything else keeps page, bit and contents together: swap and back, migration and back, huge pages that
//! are split, forks, changes of protection, `MADV_FREE`. Beyond that, where each page lay is remembered
//! ([`Frames`]): one that lies elsewhere counts as written, whatever the bits say, and so does one that was on
//! its way elsewhere.
//!
//! An entry of a page table that is migrated just while bits are cleared keeps the right to be written and
//! gets it back, with no bit; if the migration fails, in the same frame. So when the bits are cleared all
//! that is registered is protected by the userfaultfd once, which does take that right away from what is
//! on its way, and lifted again, which gives it to none without a bit. No process of the container can meet
//! that protection: it is there only while they are frozen.
//!
//! Of a process that shares its memory with another one, or that cannot have a userfaultfd, everything counts
//! as written at every look.

mod look;
mod merging;
mod probe;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use decamp_shared::pages::{PAGE_SIZE, PageSet};

use super::frames::Frames;
use super::zeros::Zeros;
use super::{Tracker, each_that_lives, sharing};
use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};
use crate::inject::{take_back, userfaultfd_of};
use crate::memory::{self, HiddenProcess, Process, hideable_mappings};
use crate::sys::userfault::{self, Mode};

use look::Look;
pub(super) use probe::probe;

const FEATURES: u64 = userfault::FEATURE_PAGEFAULT_FLAG_WP;

/// A process that could not have a userfaultfd, because its tasks are busy in the kernel, is not asked again
/// for so long.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// Somebody may take the cgroup away: it is not tried for ever.
const THAW_TRIES: u32 = 100;

/// The tracker.
pub(super) struct SoftDirty {
    cgroups: Cgroups,
    zeros: Zeros,
    /// By the process's number here.
    known: BTreeMap<i32, Known>,
    /// What KSM had done at the last look.
    merged: Option<Vec<String>>,
    /// Somebody in the container clears bits too: they are his from then on.
    rival: bool,
    longest_stop: Duration,
}

/// A process that was seen before.
struct Known {
    began: u64,
    /// Nothing when it could not make one, or has other memory since: it is as good as new.
    uffd: Option<OwnedFd>,
    /// Until then it is not asked for one: it did not make one.
    left_alone: Option<Instant>,
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
    /// # Errors
    /// Where the kernel does not tell pages of zeros from others.
    pub(super) fn new(cgroups: &Cgroups) -> Result<Self> {
        Ok(Self {
            cgroups: cgroups.clone(),
            zeros: Zeros::open()?,
            known: BTreeMap::new(),
            merged: None,
            rival: false,
            longest_stop: Duration::ZERO,
        })
    }

    /// Whether KSM did nothing since this was asked last.
    fn nothing_merged(&mut self) -> bool {
        let merged = merging::so_far();
        let nothing = merged.is_some() && merged == self.merged;
        self.merged = merged;
        nothing
    }

    /// Of which of them the bits tell what was written since the last harvest.
    fn told<'a>(
        &mut self,
        processes: impl Iterator<Item = &'a Process> + Clone,
    ) -> Result<BTreeSet<i32>> {
        if !self.nothing_merged() || self.rival {
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

    /// Takes charge of a process that is new, or as good as that. `shares` its memory with another one: then
    /// it stays unknown.
    fn meet(&mut self, process: &Process, shares: bool) -> Result<()> {
        let before = self.known.remove(&process.pid);
        let Some(began) = memory::began(process.pid)? else { return Ok(()) };
        let before = before.filter(|known| known.began == began);
        let ours = self.known.values().chain(&before).filter_map(|known| known.uffd.as_ref());
        if let Err(error) = take_back(process.pid, ours) {
            // It is found again before the stop, which ends there.
            tracing::warn!(%error, "A process keeps a descriptor of ours that it was forked with");
        }
        let direct = before.as_ref().is_some_and(|known| known.direct);
        let mut left_alone = before.and_then(|known| known.left_alone);
        let mut uffd = None;
        if !shares && !self.rival && left_alone.is_none_or(|until| until <= Instant::now()) {
            uffd = self.descriptor_of(process);
            left_alone = uffd.is_none().then(|| Instant::now() + AGAIN_AFTER);
        }
        if let Some(uffd) = &uffd {
            for mapping in hideable_mappings(process.pid)? {
                is_watched(process.pid, uffd.as_fd(), &mapping);
            }
        }
        let frames = Frames::default();
        self.known.insert(process.pid, Known { began, uffd, left_alone, frames, direct });
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

    /// What is done while nobody writes: a look at those that are `known`, and the bits of all are cleared.
    fn while_it_stands(
        &mut self,
        known: &[Process],
        new: &[Process],
        dirty: &mut PageSet,
    ) -> Result<()> {
        let is_met = |pid: &i32| self.known.get(pid).is_some_and(|known| known.uffd.is_some());
        if !known.iter().chain(new).any(|process| is_met(&process.pid)) {
            return Ok(());
        }
        let begun = Instant::now();
        let cgroups = self.cgroups.clone();
        let still = Stillness::begin(&cgroups)?;
        let outcome = self.look_and_clear(known, new, dirty);
        drop(still);
        self.longest_stop = self.longest_stop.max(begun.elapsed());
        outcome
    }

    fn look_and_clear(
        &mut self,
        known: &[Process],
        new: &[Process],
        dirty: &mut PageSet,
    ) -> Result<()> {
        self.look_for_a_rival(known)?;
        self.look_for_a_rival(new)?;
        if self.rival {
            return each_that_lives(known, |process| self.look_first(process, dirty));
        }
        each_that_lives(known, |process| self.look_again(process, dirty))?;
        each_that_lives(new, |process| match self.known.get_mut(&process.pid) {
            Some(known) => known.clear(process.pid, &hideable_mappings(process.pid)?),
            None => Ok(()),
        })
    }

    /// To be asked while they stand still, before any bit is cleared.
    fn look_for_a_rival(&mut self, processes: &[Process]) -> Result<()> {
        each_that_lives(processes, |process| {
            if !self.rival && memory::clears_bits(process.pid)? {
                tracing::warn!(
                    pid = process.pid,
                    "A process uses soft-dirty bits itself: all memory counts as written"
                );
                self.rival = true;
            }
            Ok(())
        })
    }

    /// Looks at a process that stands still, and whose bits tell what it wrote.
    fn look_again(&mut self, process: &Process, dirty: &mut PageSet) -> Result<()> {
        let Some(known) = self.known.get_mut(&process.pid) else { return Ok(()) };
        let mappings = hideable_mappings(process.pid)?;
        let look = known.look(process.pid, &mappings, &mut self.zeros)?;
        known.clear(process.pid, &mappings)?;
        process.add_to(dirty, &look.written);
        known.frames = look.frames;
        // To be asked when the bits are cleared: what was on its way into memory then is of a file that
        // was open then.
        known.direct |= memory::does_direct_io(process.pid)?;
        Ok(())
    }

    /// Looks at a process that runs, and whose bits were cleared just now: all that it has.
    fn look_first(&mut self, process: &Process, dirty: &mut PageSet) -> Result<()> {
        let Some(known) = self.known.get_mut(&process.pid) else { return Ok(()) };
        let mappings = hideable_mappings(process.pid)?;
        let nothing = Frames::default();
        let look = Look::take(process.pid, &mappings, &nothing, &mut self.zeros, |_| false)?;
        process.add_to(dirty, &look.written);
        known.frames = look.frames;
        known.direct |= memory::does_direct_io(process.pid)?;
        Ok(())
    }
}

impl Known {
    /// One look, with what it knows of the last.
    fn look(&mut self, pid: i32, mappings: &[Range<u64>], zeros: &mut Zeros) -> Result<Look> {
        let Some(uffd) = self.uffd.as_ref().map(AsFd::as_fd) else {
            return Look::take(pid, mappings, &Frames::default(), zeros, |_| false);
        };
        let mut gone = false;
        let look = Look::take(pid, mappings, &self.frames, zeros, |mapping| {
            let watched = is_watched(pid, uffd, mapping);
            gone |= watched == Watched::Gone;
            watched == Watched::Still
        });
        if gone {
            self.uffd = None;
        }
        look
    }

    /// Has the kernel forget what was written until now by a process that stands still.
    fn clear(&mut self, pid: i32, mappings: &[Range<u64>]) -> Result<()> {
        let Some(uffd) = self.uffd.as_ref().map(AsFd::as_fd) else { return Ok(()) };
        clear(pid)?;
        let settled = mappings.iter().try_for_each(|mapping| settle(uffd, mapping));
        if let Err(error) = settled {
            tracing::warn!(pid, %error, "What this process writes may not be told: all of it counts as written");
            // Which lifts all protection.
            self.uffd = None;
        }
        Ok(())
    }
}

/// Takes the right to be written from all pages of a mapping, also of those that are on their way elsewhere.
fn settle(uffd: BorrowedFd<'_>, mapping: &Range<u64>) -> io::Result<()> {
    match userfault::protect(uffd, mapping, true) {
        Ok(()) => userfault::protect(uffd, mapping, false),
        // It is not registered: all of it counts as written at the next look.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(error) => Err(error),
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
        each_that_lives(&new, |process| self.meet(process, sharing.contains(&process.pid)))?;
        self.while_it_stands(&known, &new, dirty)?;
        each_that_lives(&new, |process| self.look_first(process, dirty))?;
        self.known.retain(|pid, _| processes.iter().any(|process| process.pid == *pid));
        Ok(())
    }

    fn last(&mut self, processes: &mut [HiddenProcess]) -> Result<()> {
        let all: Vec<_> = processes.iter().map(|hidden| hidden.process.clone()).collect();
        self.look_for_a_rival(&all)?;
        let told = self.told(processes.iter().map(|hidden| &hidden.process))?;
        for hidden in processes.iter_mut() {
            let pid = hidden.process.pid;
            let known = self.known.get_mut(&pid);
            match known.filter(|known| told.contains(&pid) && !known.direct) {
                Some(known) => {
                    let look = known.look(pid, &hidden.mappings, &mut self.zeros)?;
                    (hidden.pages, hidden.written) = (look.exist, look.written);
                }
                None => hidden.look(false)?,
            }
        }
        if self.nothing_merged() {
            return Ok(());
        }
        // While it was looked, and there is no other look that would notice.
        processes.iter_mut().try_for_each(|hidden| hidden.look(false))
    }

    fn stall(&self) -> Duration {
        self.longest_stop
    }
}

/// Clears the bits of a process.
fn clear(pid: i32) -> Result<()> {
    let path = format!("/proc/{pid}/clear_refs");
    fs::write(&path, "4").map_err(ContainerError::io(format!("write to {path}")))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::sys;

    /// A shell that answers each line, and waits in between; it inherits `descriptors`.
    fn echo(descriptors: &[BorrowedFd<'_>]) -> (Child, Process) {
        let mut command = Command::new("sh");
        command.args(["-c", "while read line; do echo $line; done"]);
        sys::inherit(&mut command, descriptors);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("sh");
        answers(&mut child);
        let pid = child.id() as i32;
        let process = memory::processes(&[pid], pid).expect("it lives").remove(0);
        (child, process)
    }

    fn answers(child: &mut Child) {
        child.stdin.as_mut().expect("a pipe").write_all(b"ping\n").expect("it listens");
        let mut answer = [0; 5];
        child.stdout.as_mut().expect("a pipe").read_exact(&mut answer).expect("it answers");
        assert_eq!(&answer, b"ping\n");
    }

    fn tracker() -> Option<SoftDirty> {
        let cgroups = Cgroups::at("/there-is-no-such-cgroup").expect("a path");
        SoftDirty::new(&cgroups).inspect_err(|error| eprintln!("skipped: {error}")).ok()
    }

    #[test]
    fn what_a_process_was_forked_with_of_ours_is_taken_back() {
        let Some(mut tracker) = tracker() else { return };
        let ours = sys::userfaultfd().expect("a userfaultfd");
        let number = ours.as_raw_fd();
        let (mut child, process) = echo(&[ours.as_fd()]);
        // That of its parent.
        let frames = Frames::default();
        let parent = Known { began: 1, uffd: Some(ours), left_alone: None, frames, direct: false };
        tracker.known.insert(std::process::id() as i32, parent);
        let has = || fs::read_link(format!("/proc/{}/fd/{number}", process.pid)).is_ok();
        assert!(has());
        tracker.meet(&process, true).expect("met");
        assert!(!has());
        assert!(tracker.known[&process.pid].uffd.is_none(), "its memory is another's too");
        tracker.meet(&process, false).expect("met");
        assert!(tracker.known[&process.pid].uffd.is_some());
        answers(&mut child);
        child.kill().and_then(|()| child.wait()).expect("ended");
    }

    #[test]
    fn who_made_no_descriptor_is_not_asked_again_at_once() {
        let Some(mut tracker) = tracker() else { return };
        let (mut child, process) = echo(&[]);
        let until = Instant::now() + AGAIN_AFTER;
        let began = memory::began(process.pid).expect("/proc").expect("it lives");
        let (left_alone, frames) = (Some(until), Frames::default());
        let known = Known { began, uffd: None, left_alone, frames, direct: true };
        tracker.known.insert(process.pid, known);
        tracker.meet(&process, false).expect("met");
        let known = &tracker.known[&process.pid];
        assert!(known.uffd.is_none() && known.left_alone == Some(until) && known.direct);
        tracker.known.get_mut(&process.pid).expect("known").left_alone = Some(Instant::now());
        tracker.meet(&process, false).expect("met");
        let known = &tracker.known[&process.pid];
        assert!(known.uffd.is_some() && known.left_alone.is_none() && known.direct);
        child.kill().and_then(|()| child.wait()).expect("ended");
    }

    /// What it has done with the bits nobody knows, and what it would do without them neither.
    #[test]
    fn where_somebody_else_clears_bits_all_counts_as_written() {
        let Some(mut tracker) = tracker() else { return };
        let own = fs::File::create("/proc/self/clear_refs").expect("our own");
        for (descriptors, rival) in [(vec![], false), (vec![own.as_fd()], true)] {
            let (mut child, process) = echo(&descriptors);
            assert_eq!(memory::clears_bits(process.pid).expect("its descriptors"), rival);
            tracker.meet(&process, false).expect("met");
            tracker.look_first(&process, &mut PageSet::new()).expect("a look");
            tracker.nothing_merged();
            // Nothing of what is there is known to be other than it was.
            clear(process.pid).expect("cleared");
            let mut hidden = [HiddenProcess::mapped(&process).expect("its mappings")];
            tracker.last(&mut hidden).expect("a look");
            let [hidden] = hidden;
            assert!(!hidden.pages.is_empty());
            assert_eq!(hidden.written, if rival { hidden.pages } else { Vec::new() });
            tracker.meet(&process, false).expect("met");
            assert_eq!(tracker.known[&process.pid].uffd.is_none(), rival);
            child.kill().and_then(|()| child.wait()).expect("ended");
        }
    }

    /// That all is protected for a moment leaves nothing behind: it writes on, and that is told.
    #[test]
    fn what_waits_writes_nothing_and_what_writes_is_told() {
        if let Err(reason) = probe() {
            return eprintln!("skipped: {reason}");
        }
        let Some(mut tracker) = tracker() else { return };
        let (mut child, process) = echo(&[]);
        let new = [process.clone()];
        let mut all = PageSet::new();
        tracker.meet(&process, false).expect("met");
        let known = tracker.known.get_mut(&process.pid).expect("known");
        known.clear(process.pid, &hideable_mappings(process.pid).expect("maps")).expect("cleared");
        tracker.look_first(&process, &mut all).expect("a look");
        assert!(!all.is_empty());
        assert!(!tracker.nothing_merged(), "nobody asked before");
        for writes in [false, true, false] {
            if writes {
                answers(&mut child);
            }
            let told = tracker.told(new.iter()).expect("told");
            assert_eq!(told, BTreeSet::from([process.pid]));
            let mut dirty = PageSet::new();
            tracker.look_again(&process, &mut dirty).expect("a look");
            assert_eq!(!dirty.is_empty(), writes, "{dirty:?} of {all:?}");
        }
        child.kill().and_then(|()| child.wait()).expect("ended");
    }
}
