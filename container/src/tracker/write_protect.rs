//! Tracking by write protection that lifts itself (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7): the first write
//! to a page in a round costs the process a fault that nobody has to answer, and nothing ever stops it.
//!
//! Each process has a userfaultfd of its own making, in our hands. A mapping is registered when it is
//! first seen. A mapping that came, moved or was replaced since lifts no protection, and the kernel says
//! so: it is registered then, and all of it counts as written. So does all memory of a process that is
//! new, or that replaced its memory by an exec. Memory that several processes share (a child between its
//! vfork and its exec) is neither registered nor protected: what one of them is told of would be lost for
//! the others.
//!
//! Nobody sees what a device writes into memory by itself. So a process that has a file open for direct
//! I/O counts as written whole, from then on, when it stands still and all of that has come to its end.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use decamp_shared::pages::PageSet;

use super::{Tracker, each_that_lives, sharing};
use crate::error::{ContainerError, Result};
use crate::inject::{take_back, userfaultfd_of};
use crate::memory::{self, HiddenProcess, Process, hideable_mappings};
use crate::pagemap::{Pagemap, append};
use crate::sys;
use crate::sys::userfault::{self, Mode};

const FEATURES: u64 = userfault::FEATURE_PAGEFAULT_FLAG_WP
    | userfault::FEATURE_WP_UNPOPULATED
    | userfault::FEATURE_WP_ASYNC;

/// A process that could not be tracked, because its tasks are busy in the kernel, is left alone so long.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// The tracker.
#[derive(Default)]
pub(crate) struct WriteProtect {
    /// By the process's number here.
    known: BTreeMap<i32, Known>,
    /// The longest that a task stood still for us.
    longest_stop: Duration,
}

/// A process that was seen before.
struct Known {
    began: u64,
    /// Nothing when it cannot be tracked: everything that it has counts as written then.
    uffd: Option<OwnedFd>,
    /// It was seen with a file that is open for direct I/O.
    direct: bool,
    /// Until then it is left alone: it did not let itself be tracked.
    left_alone: Option<Instant>,
}

impl WriteProtect {
    /// Takes charge of a process. One that cannot be tracked is no error.
    fn meet(&mut self, process: &Process, began: u64) {
        let ours = self.known.values().filter_map(|known| known.uffd.as_ref());
        if let Err(error) = take_back(process.pid, ours) {
            // It is found again before the stop, which ends there.
            tracing::warn!(%error, "A process keeps a descriptor of ours that it was forked with");
        }
        let (uffd, left_alone) = match self.descriptor_of(process) {
            Ok(uffd) => (Some(uffd), None),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                // One that ends just now is not worth a warning.
                match memory::is_without_memory(process.pid) {
                    Ok(true) => {
                        tracing::debug!(%error, cause, "A process ended before it was tracked")
                    }
                    _ => {
                        tracing::warn!(%error, cause, "All memory of this process counts as written")
                    }
                }
                (None, Some(Instant::now() + AGAIN_AFTER))
            }
        };
        let direct =
            self.known.get(&process.pid).is_some_and(|known| known.began == began && known.direct);
        self.known.insert(process.pid, Known { began, uffd, direct, left_alone });
    }

    fn descriptor_of(&mut self, process: &Process) -> Result<OwnedFd> {
        let injected = userfaultfd_of(process.pid)?;
        self.longest_stop = self.longest_stop.max(injected.stopped);
        userfault::agree(injected.uffd.as_fd(), FEATURES)
            .map_err(ContainerError::io("use a userfaultfd (Linux 6.7 or newer is needed)"))?;
        Ok(injected.uffd)
    }

    /// Adds what one process wrote.
    fn harvest_one(&mut self, process: &Process, shares: bool, dirty: &mut PageSet) -> Result<()> {
        let Some(began) = memory::began(process.pid)? else { return Ok(()) };
        if shares {
            return self.harvest_shared(process, began, dirty);
        }
        let known = self.known.get(&process.pid).filter(|known| known.began == began);
        // One that could not be tracked may have been busy in the kernel just then.
        let new = known.is_none_or(|known| known.uffd.is_none());
        let left_alone = known.and_then(|known| known.left_alone);
        if new && left_alone.is_none_or(|until| until <= Instant::now()) {
            self.meet(process, began);
        }
        let mut pagemap = Pagemap::open(process.pid)?;
        let (mut found, mut looked_at) = (Vec::new(), BTreeSet::new());
        let mut add = |range| append(&mut found, range);
        // Twice, because it maps and unmaps meanwhile: memory of which we have registered a part is
        // several mappings, and some of what a program may do (mremap) is for one only.
        for _ in 0..2 {
            for mapping in hideable_mappings(process.pid)? {
                if looked_at.insert((mapping.start, mapping.end))
                    && (new || !pagemap.take_written(&mapping, &mut add)?)
                {
                    self.take_all(process, began, &mapping, &mut pagemap, &mut add)?;
                }
            }
        }
        process.add_to(dirty, &found);
        self.note_direct_io(process)
    }

    /// All that exists of a process whose memory is another's too. What was protected before stays so:
    /// whoever writes there, the next harvest of it alone is told.
    fn harvest_shared(&mut self, process: &Process, began: u64, dirty: &mut PageSet) -> Result<()> {
        if self.known.get(&process.pid).is_none_or(|known| known.began != began) {
            let known = Known { began, uffd: None, direct: false, left_alone: None };
            self.known.insert(process.pid, known);
        }
        let mut pagemap = Pagemap::open(process.pid)?;
        let mut found = Vec::new();
        for mapping in hideable_mappings(process.pid)? {
            pagemap.existing(&mapping, false, |range, _| append(&mut found, range))?;
        }
        process.add_to(dirty, &found);
        self.note_direct_io(process)
    }

    /// All of a mapping. It is protected before it is looked at, and so before it is read: what is written
    /// from here on is found by the next harvest.
    fn take_all(
        &mut self,
        process: &Process,
        began: u64,
        mapping: &Range<u64>,
        pagemap: &mut Pagemap,
        mut add: impl FnMut(Range<u64>),
    ) -> Result<()> {
        let mut registered = self.register(process, mapping);
        if registered.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ENOMEM)) {
            // An exec gave it other memory than the descriptor is of.
            self.meet(process, began);
            registered = self.register(process, mapping);
        }
        match registered {
            Ok(true) if pagemap.take_written(mapping, |_| {})? => {}
            // It changes just now, or the descriptor is of a memory that the process had before:
            // all of it again in the next round, by a new one.
            Ok(true) => {
                if let Some(known) = self.known.get_mut(&process.pid) {
                    known.uffd = None;
                }
            }
            Ok(false) => {}
            // Gone again, or of a kind that cannot be: it is looked at anew in the next round.
            Err(error) => {
                tracing::debug!(pid = process.pid, ?mapping, %error, "Cannot register a mapping");
            }
        }
        pagemap.existing(mapping, false, |range, _| add(range))?;
        Ok(())
    }

    /// False when the process cannot be tracked at all.
    fn register(&self, process: &Process, mapping: &Range<u64>) -> io::Result<bool> {
        let uffd = self.known.get(&process.pid).and_then(|known| known.uffd.as_ref());
        match uffd {
            Some(uffd) => {
                userfault::register(uffd.as_fd(), mapping, Mode::WriteProtect).map(|()| true)
            }
            None => Ok(false),
        }
    }

    /// To be called when memory was protected: what was on its way into it then is of a file that was open
    /// then.
    fn note_direct_io(&mut self, process: &Process) -> Result<()> {
        if let Some(known) = self.known.get_mut(&process.pid)
            && !known.direct
            && memory::does_direct_io(process.pid)?
        {
            tracing::info!(
                pid = process.pid,
                "Direct I/O: all of its memory is read again in the stop"
            );
            known.direct = true;
        }
        Ok(())
    }
}

impl Tracker for WriteProtect {
    fn harvest(&mut self, processes: &[Process], dirty: &mut PageSet) -> Result<()> {
        let sharing = sharing(processes.iter());
        each_that_lives(processes, |process| {
            self.harvest_one(process, sharing.contains(&process.pid), dirty)
        })?;
        self.known.retain(|pid, _| processes.iter().any(|process| process.pid == *pid));
        Ok(())
    }

    fn last(&mut self, processes: &mut [HiddenProcess]) -> Result<()> {
        let sharing = sharing(processes.iter().map(|hidden| &hidden.process));
        for hidden in processes {
            let process = &hidden.process;
            let began = memory::began(process.pid)?;
            let known = self.known.get(&process.pid);
            let tracked = known.is_some_and(|known| {
                Some(known.began) == began && known.uffd.is_some() && !known.direct
            });
            hidden.look(tracked && !sharing.contains(&hidden.process.pid))?;
        }
        Ok(())
    }

    fn stall(&self) -> Duration {
        self.longest_stop
    }
}

/// Whether this host can track so, tried on ourselves.
pub(crate) fn probe() -> std::result::Result<(), String> {
    static OUTCOME: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    OUTCOME
        .get_or_init(|| {
            let uffd = sys::userfaultfd().map_err(|error| format!("no userfaultfd: {error}"))?;
            userfault::agree(uffd.as_fd(), FEATURES).map_err(|error| {
                format!("the kernel has no write protection that lifts itself (Linux 6.7): {error}")
            })?;
            let pid = std::process::id() as i32;
            sys::compare_memory(pid, pid)
                .map_err(|error| format!("the kernel does not compare memories (kcmp): {error}"))?;
            Ok(())
        })
        .clone()
}

#[cfg(test)]
mod tests {
    use decamp_shared::pages::PAGE_SIZE;

    use super::*;

    /// A child between its vfork and its exec ends with its parent's pages told of as its own.
    #[test]
    fn memory_that_is_shared_is_told_whole_and_not_protected() {
        if let Err(reason) = probe() {
            return eprintln!("skipped: {reason}");
        }
        use std::process::{Command, Stdio};
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo ready; read line"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = shell.spawn().expect("sh");
        let ready = child.stdout.as_mut().expect("a pipe");
        std::io::Read::read_exact(ready, &mut [0; 6]).expect("it is ready");
        let pid = child.id() as i32;
        let of = || memory::processes(&[pid], pid).expect("it lives").remove(0);
        let mut tracker = WriteProtect::default();
        let protected = |pid| {
            let mappings = hideable_mappings(pid).expect("it lives");
            let mut pagemap = Pagemap::open(pid).expect("it lives");
            mappings.iter().any(|range| pagemap.existing(range, true, |_, _| {}).expect("a scan"))
        };
        for _ in 0..2 {
            let mut dirty = PageSet::new();
            tracker.harvest_one(&of(), true, &mut dirty).expect("a harvest");
            assert!(!dirty.is_empty() && !protected(pid), "{dirty:?}");
        }
        // Once nobody shares it, it is tracked like any other, and protected it stays.
        for shares in [false, true] {
            let mut dirty = PageSet::new();
            tracker.harvest_one(&of(), shares, &mut dirty).expect("a harvest");
            assert!(!dirty.is_empty() && protected(pid), "{dirty:?}");
        }
        let mut dirty = PageSet::new();
        tracker.harvest_one(&of(), false, &mut dirty).expect("a harvest");
        assert!(dirty.is_empty(), "it wrote nothing: {dirty:?}");
        child.kill().and_then(|()| child.wait()).expect("ended");
    }

    /// As with direct I/O: protected, perhaps not written since, and all of it is to be read again.
    #[test]
    fn all_that_is_protected_and_not_trusted_counts_as_written() {
        if let Err(reason) = probe() {
            return eprintln!("skipped: {reason}");
        }
        let pid = std::process::id() as i32;
        let mut buffer = vec![0u8; 40 << 20];
        buffer.chunks_mut(PAGE_SIZE).take(64).for_each(|page| page[0] = 1);
        let start = (buffer.as_ptr() as u64).next_multiple_of(PAGE_SIZE as u64);
        let range = start..start + 32 * PAGE_SIZE as u64;
        let uffd = sys::userfaultfd().expect("probed");
        userfault::agree(uffd.as_fd(), FEATURES).expect("probed");
        userfault::register(uffd.as_fd(), &range, Mode::WriteProtect).expect("our own");
        let mut pagemap = Pagemap::open(pid).expect("ourselves");
        assert!(pagemap.take_written(&range, |_| {}).expect("a scan"), "it is protected");
        let mut since = 0;
        assert!(pagemap.take_written(&range, |_| since += 1).expect("a scan"));
        assert_eq!(since, 0, "nobody wrote there since");
        let own = memory::processes(&[pid], pid).expect("ourselves");
        let mut hidden = HiddenProcess::mapped(&own[0]).expect("our mappings");
        hidden.look(false).expect("our memory");
        let covers = |ranges: &[Range<u64>]| {
            ranges.iter().any(|found| found.start <= range.start && range.end <= found.end)
        };
        assert!(covers(&hidden.pages) && covers(&hidden.written), "{:x?}", hidden.written);
        drop(buffer);
    }
}
