//! The filter: a supervisor that answers what CRIU asks the kernel.
//!
//! CRIU runs under a seccomp filter that hands each `ioctl(_, PAGEMAP_SCAN, _)` to us. What is not hidden is
//! scanned through CRIU's own descriptor, and the result is written into CRIU's memory. Scans of anything
//! else, and scans for guard pages, are let through. So are the questions where a file has data, except of
//! segments of shared memory that the page engine moves: those have none. On the way it answers what else
//! CRIU may not ask the kernel for ([`limits`]).
//!
//! A tracer that is under a filter may not suspend the filters of others: for a tree in which there is one
//! the filter comes later ([`super::late`]).

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Hidden, is_page_dump, overlaps, scan, try_on_a_thread};
use crate::error::{ContainerError, Result};
use crate::limits;
use crate::sys::{self, Calls, Notification, PmScanArg, Verdict};

/// Answers the scans of one CRIU for as long as it lives.
pub(crate) struct Supervisor {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    answered: Arc<AtomicU64>,
}

impl Supervisor {
    /// Puts the calling thread under the filter (it never leaves it: use a thread of its own that
    /// does nothing but start CRIU) and answers scans from another thread.
    ///
    /// CRIU's questions for limits are answered too, if `limits` says so. Once `called_off` is
    /// written to, scans fail, and CRIU gives up at the next one.
    pub(crate) fn install(hidden: Hidden, limits: bool, called_off: Arc<EventFd>) -> Result<Self> {
        // Started first: a thread made after the filter would be under it as well.
        let (supervisor, listeners) = Self::ready(hidden, called_off)?;
        // The thread cannot have ended: it waits for this.
        let _ = listeners.send(filter(Calls { scans: true, limits })?);
        Ok(supervisor)
    }

    /// Waits for the descriptor of a filter that somebody else puts CRIU under.
    pub(crate) fn ready(
        hidden: Hidden,
        called_off: Arc<EventFd>,
    ) -> Result<(Self, Sender<OwnedFd>)> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(ContainerError::errno("make an event"))?;
        let stop = Arc::new(stop);
        let answered = Arc::new(AtomicU64::new(0));
        let (sender, receiver) = channel::<OwnedFd>();
        let (stopped, count) = (stop.clone(), answered.clone());
        let thread = std::thread::Builder::new()
            .name("page-scans".to_owned())
            .spawn(move || {
                if let Ok(listener) = receiver.recv() {
                    supervise(&listener, &stopped, &called_off, &hidden, &count);
                }
            })
            .map_err(ContainerError::io("start a thread"))?;
        Ok((Self { stop, thread: Some(thread), answered }, sender))
    }

    /// How many calls were answered without the kernel's word.
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

/// Whether this process may do all that the filter takes: filter a thread, take a descriptor from
/// another process, scan pages. Tried on a thread that ends.
pub(crate) fn probe() -> std::result::Result<(), String> {
    try_on_a_thread(|| {
        let pagemap = fs::File::open("/proc/self/pagemap")
            .map_err(ContainerError::io("open /proc/self/pagemap"))?;
        filter(Calls { scans: true, limits: false })?;
        let us = sys::pidfd_open(std::process::id() as i32)
            .map_err(ContainerError::io("open a process"))?;
        sys::pidfd_getfd(us.as_fd(), pagemap.as_raw_fd())
            .map_err(ContainerError::io("take a descriptor from a process"))?;
        Ok(())
    })
}

fn filter(calls: Calls) -> Result<OwnedFd> {
    sys::filter_calls(calls).map_err(ContainerError::io("put a thread under a seccomp filter"))
}

fn supervise(
    listener: &OwnedFd,
    stop: &EventFd,
    called_off: &EventFd,
    hidden: &Hidden,
    answered: &AtomicU64,
) {
    let (mut caller, mut is_called_off) = (Caller::default(), false);
    loop {
        let mut events = vec![
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        // Once it is known nobody need be woken up by it.
        let called_off =
            (!is_called_off).then(|| PollFd::new(called_off.as_fd(), PollFlags::POLLIN));
        events.extend(called_off);
        match poll(&mut events, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => {
                tracing::error!(%error, "Cannot wait for CRIU's page scans");
                return;
            }
            Ok(_) => {}
        }
        let any = |place: usize| events.get(place).is_some_and(|event| event.any() == Some(true));
        if any(1) {
            return;
        }
        is_called_off |= any(2);
        if !any(0) {
            continue;
        }
        // ENOENT: the caller was killed in between. The listener itself has no other way to fail.
        let Ok(notification) = sys::next_notification(listener.as_fd()) else { continue };
        let of_limits = notification.call == libc::SYS_prlimit64;
        let decided = match of_limits {
            true => limits::answer(&notification),
            false => decide(listener, &notification, &mut caller, hidden),
        };
        let verdict = match decided {
            Ok(_) if is_called_off => Verdict::Fail(libc::ECANCELED),
            Ok(verdict) => verdict,
            Err(error) => {
                tracing::error!(%error, "Cannot answer a call of CRIU");
                // CRIU gives up and the dump fails: better than a page that nobody sends. It must not
                // take an error of ours for a file without data.
                let number = error.raw_os_error().filter(|number| *number != libc::ENXIO);
                Verdict::Fail(number.unwrap_or(libc::EIO))
            }
        };
        if !of_limits && matches!(verdict, Verdict::Return(_) | Verdict::Fail(libc::ENXIO)) {
            answered.fetch_add(1, Ordering::Relaxed);
        }
        if let Err(error) = sys::answer(listener.as_fd(), &notification, verdict) {
            tracing::debug!(%error, "CRIU did not wait for the answer to its call");
        }
    }
}

/// Whoever calls, held open: it is the same CRIU thousands of times.
#[derive(Default)]
struct Caller {
    process: Option<(i32, OwnedFd)>,
}

impl Caller {
    /// A duplicate of descriptor `fd` of the process that thread `thread` is of.
    fn descriptor(&mut self, thread: i32, fd: i32) -> io::Result<OwnedFd> {
        if let Some((of, process)) = &self.process
            && *of == thread
        {
            match sys::pidfd_getfd(process.as_fd(), fd) {
                // It has ended, and another has its number.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                taken => return taken,
            }
        }
        let process = process_of(thread)?;
        let taken = sys::pidfd_getfd(process.as_fd(), fd);
        self.process = Some((thread, process));
        taken
    }
}

/// The process that thread `thread` is of.
fn process_of(thread: i32) -> io::Result<OwnedFd> {
    sys::pidfd_open(thread).or_else(|_| sys::pidfd_open(leader(thread)?))
}

fn decide(
    listener: &OwnedFd,
    notification: &Notification,
    caller: &mut Caller,
    hidden: &Hidden,
) -> io::Result<Verdict> {
    let [fd, _, address, ..] = notification.arguments;
    if notification.call == libc::SYS_lseek {
        let is_hidden = hidden.segments.has(&process_of(notification.pid)?, fd)?;
        if !sys::still_waits(listener.as_fd(), notification) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        // As a file says that has no data from there on.
        return Ok(if is_hidden { Verdict::Fail(libc::ENXIO) } else { Verdict::Continue });
    }
    let argument = PmScanArg::read_from(notification.pid, address)?;
    if !is_page_dump(&argument) {
        return Ok(Verdict::Continue);
    }
    let pagemap = caller.descriptor(notification.pid, fd as i32)?;
    if !sys::still_waits(listener.as_fd(), notification) {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let Some(ranges) = target_of(&pagemap)?.and_then(|target| hidden.ranges.get(&target)) else {
        return Ok(Verdict::Continue);
    };
    let asked = argument.start..argument.end;
    if !ranges.iter().any(|range| overlaps(range, &asked)) {
        return Ok(Verdict::Continue);
    }
    let answer = scan(pagemap.as_fd(), ranges, &argument)?;
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

/// The process whose pages a descriptor of `/proc/PID/pagemap` describes.
fn target_of(pagemap: &OwnedFd) -> io::Result<Option<i32>> {
    let path = fs::read_link(format!("/proc/self/fd/{}", pagemap.as_raw_fd()))?;
    let mut parts = path.components().rev().map(|part| part.as_os_str());
    if parts.next().is_none_or(|name| name != "pagemap") {
        return Ok(None);
    }
    Ok(parts.next().and_then(|pid| pid.to_str()).and_then(|pid| pid.parse().ok()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::hiding::HiddenRanges;
    use crate::pagemap::scans;
    use crate::segments::hide::HiddenSegments;
    use crate::sys::PageRegion;

    #[test]
    fn a_segment_that_is_hidden_has_no_data_and_others_have() {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        use nix::unistd::{Whence, lseek};
        let made =
            || fs::File::from(memfd_create("hiding", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        let (ours, other) = (made(), made());
        for file in [&ours, &other] {
            std::os::unix::fs::FileExt::write_all_at(file, b"x", 8192).expect("written");
        }
        let found = std::os::unix::fs::MetadataExt::ino(&ours.metadata().expect("metadata"));
        let device = std::os::unix::fs::MetadataExt::dev(&ours.metadata().expect("metadata"));
        let memory = BTreeSet::from([(device, found)]);
        let segments = HiddenSegments { memory, ..HiddenSegments::default() };
        let looked = std::thread::spawn(move || {
            let event = Arc::new(EventFd::new().expect("an event"));
            let hidden = Hidden { segments, ..Hidden::default() };
            let supervisor = match Supervisor::install(hidden, false, event) {
                Ok(supervisor) => supervisor,
                Err(error) => {
                    eprintln!("skipped: {error}: needs root");
                    return;
                }
            };
            assert_eq!(lseek(&ours, 0, Whence::SeekData), Err(nix::errno::Errno::ENXIO));
            assert_eq!(supervisor.answered(), 1);
            assert_eq!(lseek(&other, 0, Whence::SeekData), Ok(8192));
            assert_eq!(lseek(&ours, 0, Whence::SeekHole), Ok(0));
            assert_eq!(lseek(&ours, 5, Whence::SeekSet), Ok(5));
            assert_eq!(supervisor.answered(), 1);
        });
        looked.join().expect("no panic");
    }

    #[test]
    fn a_filtered_scan_of_ourselves_is_answered() {
        if !scans() {
            return eprintln!("skipped: the kernel does not scan (Linux 6.7)");
        }
        // The whole path on this very process: a filtered thread scans, the supervisor answers.
        let buffer = vec![1u8; 1 << 20];
        let start = (buffer.as_ptr() as u64).next_multiple_of(4096);
        let end = start + (buffer.len() as u64 / 4096 - 1) * 4096;
        let middle = start + 64 * 4096;
        let ranges = HiddenRanges::from([(
            std::process::id() as i32,
            std::iter::once(start..middle).collect(),
        )]);
        let hidden = Hidden { ranges, ..Hidden::default() };
        let scanned = std::thread::spawn(move || {
            let event = Arc::new(EventFd::new().expect("an event"));
            let supervisor = match Supervisor::install(hidden, false, event.clone()) {
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
            let walk_end = argument.walk_end;
            event.write(1).expect("called off");
            let refused = sys::pagemap_scan(pagemap.as_fd(), &mut argument, &mut regions);
            let error = refused.expect_err("nobody wants it any more");
            assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
            Some((regions[..found].to_vec(), walk_end))
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
