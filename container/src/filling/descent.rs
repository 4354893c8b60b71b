//! Memory that comes late to tasks which may not make a userfaultfd, because they are root in a user
//! namespace only, and so have no part in CRIU's protocol.
//!
//! CRIU itself may, and is made to make one that is told of forks: of whatever it forks, and what that
//! forks, we get the userfaultfd from the kernel. When all tasks are restored and none has run, each
//! descriptor is matched with its process, and what is to come late is registered, as CRIU would have done
//! it; and then it is handed over as CRIU would have done that.
//!
//! CRIU does not know of such memory, and leaves it absent. What the kernel did there meanwhile (it writes
//! where a thread runs into the area of its restartable sequences) is put in order before a task runs.
//!
//! Kernel document: `admin-guide/mm/userfaultfd`, and for forks `fs/userfaultfd.c` (`dup_userfaultfd`).

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use decamp_shared::pages::PAGE_SIZE;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::sequences;
use super::{FEATURES, FINISHED, LatePages, SOCKET};
use crate::error::{ContainerError, Result};
use crate::forked::Alias;
use crate::inject;
use crate::memory::{self, HiddenProcess, Process};
use crate::pagemap::{Pagemap, scans};
use crate::store::Store;
use crate::sys;
use crate::sys::userfault::{self, Event, Mode};

const PAGE: u64 = PAGE_SIZE as u64;
/// Beside what CRIU asks of the kernel: pages that are not there can be marked, to find whose they are.
const ALL_FEATURES: u64 =
    FEATURES | userfault::FEATURE_PAGEFAULT_FLAG_WP | userfault::FEATURE_WP_UNPOPULATED;
/// The bit of such a mark in `/proc/PID/pagemap`.
const MARKED: u64 = 1 << 57;

/// What follows the forks of a CRIU.
pub(crate) struct Descent {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<Result<Vec<OwnedFd>>>>,
}

/// What is to be settled when all tasks are restored.
pub(crate) struct Settling<'a> {
    /// Where CRIU's images are.
    pub(crate) images: &'a Path,
    pub(crate) store: &'a Store,
    /// What comes late, and what of that CRIU left absent.
    pub(crate) late: &'a LatePages,
    pub(crate) absent: &'a LatePages,
}

/// Whether this host can do it.
///
/// # Errors
/// Why not.
pub(crate) fn probe() -> std::result::Result<(), String> {
    if !scans() {
        return Err("the kernel does not tell where memory is (Linux 6.7 does)".to_owned());
    }
    sys::userfaultfd()
        .and_then(|uffd| userfault::agree(uffd.as_fd(), ALL_FEATURES))
        .map_err(|error| format!("the kernel's userfaultfd does not mark what is absent: {error}"))
}

impl Descent {
    /// Follows what `criu`, which waits for us and has forked nothing, will fork.
    pub(crate) fn begin(criu: i32) -> Result<Self> {
        let uffd = inject::whole_userfaultfd_of(criu)?;
        // Of its stack nothing is protected, and so nothing ever caught: it is there to be forked.
        let stack = stack_of(criu)?;
        userfault::agree(uffd.as_fd(), ALL_FEATURES)
            .and_then(|()| userfault::register(uffd.as_fd(), &stack, Mode::WriteProtect))
            .map_err(ContainerError::io("follow what CRIU forks"))?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(ContainerError::errno("make an event"))?;
        let stop = Arc::new(stop);
        let told = stop.clone();
        let thread = std::thread::Builder::new()
            .name("descent".to_owned())
            .spawn(move || follow(uffd, &told))
            .map_err(ContainerError::io("start a thread"))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// The memories that were forked, in about the order in which they were.
    fn finish(mut self) -> Result<Vec<OwnedFd>> {
        let panicked =
            || ContainerError::State("The thread that follows forks panicked".to_owned());
        self.stop.write(1).map_err(ContainerError::errno("end a thread"))?;
        let thread = self.thread.take().ok_or_else(panicked)?;
        thread.join().unwrap_or_else(|_| Err(panicked()))
    }

    /// Hands the memory of the restored processes `pids`, whose first is `init` and of which none has run, to
    /// who fills it.
    ///
    /// # Errors
    /// When any of it cannot be: then none of them may run.
    pub(crate) fn settle(self, pids: &[i32], init: i32, settling: &Settling<'_>) -> Result<()> {
        let mut forked = self.finish()?;
        let processes = memory::processes(pids, init)?;
        let directory = File::open(settling.images)
            .map_err(ContainerError::io(format!("open {}", settling.images.display())))?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd());
        let filling = UnixStream::connect(path)
            .map_err(ContainerError::io("hand memory that comes late over"))?;
        let missing = settling.late.iter().filter(|(_, pages)| !pages.is_empty());
        for (inner, pages) in missing {
            let process = processes.iter().find(|process| process.inner == *inner);
            let nobody = || ContainerError::State(format!("CRIU restored no process {inner}"));
            let process = process.ok_or_else(nobody)?;
            let uffd = take_of(&mut forked, process, pages)?;
            settling.settle(process, &uffd, pages)?;
            hand_over(&filling, *inner, &uffd)
                .map_err(ContainerError::io("hand memory that comes late over"))?;
        }
        io::Write::write_all(&mut &filling, &FINISHED.to_ne_bytes())
            .map_err(ContainerError::io("hand memory that comes late over"))
    }
}

impl Drop for Descent {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Takes down what is forked until it is told to stop. Whoever forks, or unmaps its stack, waits for us.
fn follow(first: OwnedFd, stop: &EventFd) -> Result<Vec<OwnedFd>> {
    let mut known = vec![first];
    loop {
        let mut wanted = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        wanted.extend(known.iter().map(|uffd| PollFd::new(uffd.as_fd(), PollFlags::POLLIN)));
        match poll(&mut wanted, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other.map_err(ContainerError::errno("wait for forks of CRIU"))?,
        };
        let ready: Vec<bool> = wanted.iter().map(|one| one.any() == Some(true)).collect();
        let mut forked = Vec::new();
        for (uffd, _) in known.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            let heard = userfault::next_event(uffd.as_fd())
                .map_err(ContainerError::io("hear of a fork of CRIU"))?;
            if let Some(Event::Fork(child)) = heard {
                forked.push(child);
            }
        }
        if ready[0] && forked.is_empty() && !ready[1..].contains(&true) {
            // CRIU's own ends here.
            known.remove(0);
            return Ok(known);
        }
        known.append(&mut forked);
    }
}

/// Takes the descriptor out of `forked` that is of the memory of `process`, which lacks `pages`.
fn take_of(forked: &mut Vec<OwnedFd>, process: &Process, pages: &[Alias]) -> Result<OwnedFd> {
    let failed = || format!("find the memory of process {}", process.inner);
    let path = format!("/proc/{}/pagemap", process.pid);
    let pagemap = File::open(&path).map_err(ContainerError::io(format!("open {path}")))?;
    let page = pages.first().map_or(0, |pages| pages.pages.start) * PAGE;
    let page = page..page + PAGE;
    let mut index = 0;
    while let Some(uffd) = forked.get(index) {
        match is_of(uffd, &pagemap, &page) {
            Ok(true) => return Ok(forked.remove(index)),
            // It has nothing there.
            Ok(false) => index += 1,
            // What has ended is nobody's any more.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => drop(forked.remove(index)),
            Err(error) => return Err(ContainerError::io(failed())(error)),
        }
    }
    let nobodys = "none that was forked is its".to_owned();
    Err(ContainerError::io(failed())(io::Error::other(nobodys)))
}

/// Whether `uffd` is of the memory that `pagemap` shows: marks a page through the one, and looks for it in the
/// other. Nothing of the mark is left.
fn is_of(uffd: &OwnedFd, pagemap: &File, page: &Range<u64>) -> io::Result<bool> {
    let uffd = uffd.as_fd();
    match userfault::register(uffd, page, Mode::WriteProtect) {
        Ok(()) => {}
        Err(error) => {
            return match error.raw_os_error() {
                Some(libc::EINVAL | libc::ENOMEM | libc::EPERM) => Ok(false),
                _ => Err(error),
            };
        }
    }
    let mut entry = [0; 8];
    let seen = userfault::protect(uffd, page, true)
        .and_then(|()| pagemap.read_exact_at(&mut entry, page.start / PAGE * 8));
    let undone = userfault::protect(uffd, page, false);
    let undone = undone.and_then(|()| userfault::unregister(uffd, page));
    seen.and(undone)?;
    Ok(u64::from_ne_bytes(entry) & MARKED != 0)
}

impl Settling<'_> {
    /// Has `process` wait for what it lacks.
    fn settle(&self, process: &Process, uffd: &OwnedFd, late: &[Alias]) -> Result<()> {
        let inner = process.inner;
        let mappings = HiddenProcess::mapped(process)?.mappings;
        let register = |mapping: &Range<u64>| {
            userfault::register(uffd.as_fd(), mapping, Mode::Missing).map_err(ContainerError::io(
                format!("have process {inner} wait for memory at {:#x}", mapping.start),
            ))
        };
        if let Some(page) = uncovered(&mappings, late) {
            // It would read as zeros.
            return Err(ContainerError::State(format!(
                "Process {inner} has nothing at {:#x} that could wait for memory",
                page * PAGE
            )));
        }
        mappings.iter().filter(|mapping| has_any(mapping, late)).try_for_each(register)?;
        let absent = self.absent.get(&inner).map_or(&[][..], Vec::as_slice);
        self.repair(process, absent)
    }

    /// Writes what belongs there into pages of `absent` that are there nevertheless: nobody would be asked for
    /// them.
    fn repair(&self, process: &Process, absent: &[Alias]) -> Result<()> {
        let mut pagemap = Pagemap::open(process.pid)?;
        let mut there = Vec::new();
        for Alias { pages, of } in absent {
            let range = pages.start * PAGE..pages.end * PAGE;
            pagemap.populated(&range, |found| there.push((found, *of)))?;
        }
        if there.is_empty() {
            return Ok(());
        }
        let failed = || format!("put memory of process {} in order", process.inner);
        let kept = sequences::areas(self.images, process.inner)?;
        let path = format!("/proc/{}/mem", process.pid);
        let memory = fs::OpenOptions::new().read(true).write(true).open(&path);
        let memory = memory.map_err(ContainerError::io(format!("open {path}")))?;
        let mut count = 0;
        for (range, of) in there {
            let source = File::from(self.store.memory_of(of)?);
            for page in range.step_by(PAGE_SIZE) {
                put_in_order(&memory, &source, page, &kept)
                    .map_err(ContainerError::io(failed()))?;
                count += 1;
            }
        }
        tracing::debug!(
            process = process.inner,
            count,
            "Put pages in order that were there already"
        );
        Ok(())
    }
}

/// Writes the page of `source` into `memory`, but for the addresses in `kept`.
fn put_in_order(memory: &File, source: &File, page: u64, kept: &[Range<u64>]) -> io::Result<()> {
    let (mut now, mut wanted) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    memory.read_exact_at(&mut now, page)?;
    // What lies behind the end of the part is zeros.
    let length = source.metadata()?.len();
    if page < length {
        source.read_exact_at(&mut wanted, page)?;
    }
    for area in kept {
        let start = area.start.clamp(page, page + PAGE) - page;
        let end = area.end.clamp(page, page + PAGE) - page;
        wanted[start as usize..end as usize].copy_from_slice(&now[start as usize..end as usize]);
    }
    memory.write_all_at(&wanted, page)
}

fn has_any(mapping: &Range<u64>, pages: &[Alias]) -> bool {
    let first = pages.partition_point(|pages| pages.pages.end * PAGE <= mapping.start);
    pages.get(first).is_some_and(|pages| pages.pages.start * PAGE < mapping.end)
}

/// The first of `pages` (ascending) that is in none of the `mappings` (ascending).
fn uncovered(mappings: &[Range<u64>], pages: &[Alias]) -> Option<u64> {
    let mut mappings = mappings.iter().peekable();
    for Alias { pages, .. } in pages {
        let mut at = pages.start;
        while at < pages.end {
            while mappings.next_if(|mapping| mapping.end <= at * PAGE).is_some() {}
            match mappings.peek() {
                Some(mapping) if mapping.start <= at * PAGE => at = mapping.end / PAGE,
                _ => return Some(at),
            }
        }
    }
    None
}

/// As CRIU does: a number, and a byte with the descriptor.
fn hand_over(filling: &UnixStream, inner: i32, uffd: &OwnedFd) -> io::Result<()> {
    io::Write::write_all(&mut &*filling, &inner.to_ne_bytes())?;
    let descriptors = [uffd.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    let bytes = [io::IoSlice::new(&[0])];
    sendmsg::<()>(filling.as_raw_fd(), &bytes, &control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// The addresses of the stack of process `pid`.
fn stack_of(pid: i32) -> Result<Range<u64>> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))?;
    let stack = text.lines().find(|line| line.ends_with("[stack]")).and_then(|line| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    });
    stack.ok_or_else(|| ContainerError::malformed(path, "has no stack"))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    use super::*;

    /// A shell that forks two more when it is told to, says their numbers, and waits.
    const SHELLS: &str = "exec 3<&0; echo here; read go; (read more; :) <&3 & echo $!; \
        (read more; :) <&3 & echo $!; wait";

    fn heap_of(pid: i32) -> Range<u64> {
        let text = fs::read_to_string(format!("/proc/{pid}/maps")).expect("its mappings");
        let heap = text.lines().find(|line| line.ends_with("[heap]")).expect("a heap");
        let start = heap.split('-').next().expect("an address");
        let start = u64::from_str_radix(start, 16).expect("a number") / PAGE;
        start..start + 1
    }

    #[test]
    fn what_is_forked_is_found_by_its_memory() {
        if probe().is_err() {
            return;
        }
        let mut shell = Command::new("sh")
            .args(["-c", SHELLS])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh");
        let mut told = BufReader::new(shell.stdout.take().expect("a pipe")).lines();
        let mut line = || told.next().expect("a line").expect("text");
        assert_eq!(line(), "here");
        let descent = Descent::begin(shell.id() as i32).expect("followed");
        let mut stdin = shell.stdin.take().expect("a pipe");
        stdin.write_all(b"go\n").expect("told");
        let forked: Vec<i32> = (0..2).map(|_| line().parse().expect("a number")).collect();
        let mut found = descent.finish().expect("descriptors");
        assert_eq!(found.len(), 2);
        let mut take = |pid: i32| {
            let page = [Alias { pages: heap_of(pid), of: 1 }];
            take_of(&mut found, &Process { pid, inner: 1 }, &page)
        };
        let second = take(forked[1]).expect("the second's");
        assert!(take(shell.id() as i32).is_err(), "the shell itself was not forked");
        let first = take(forked[0]).expect("the first's");
        let pagemap = File::open(format!("/proc/{}/pagemap", forked[0])).expect("a pagemap");
        let page = heap_of(forked[0]).start * PAGE;
        let page = page..page + PAGE;
        assert!(is_of(&first, &pagemap, &page).expect("asked"));
        assert!(!is_of(&second, &pagemap, &page).expect("asked"));
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, page.start / PAGE * 8).expect("an entry");
        assert_eq!(u64::from_ne_bytes(entry) & MARKED, 0, "no mark is left");
        drop((first, second, stdin));
        assert!(shell.wait().expect("ended").success());
    }

    #[test]
    fn pages_are_looked_for_in_mappings() {
        let late = [Alias { pages: 2..4, of: 1 }, Alias { pages: 8..9, of: 1 }];
        for (mapping, expected) in
            [(0..2, false), (0..3, true), (3..4, true), (4..8, false), (4..9, true), (9..20, false)]
        {
            assert_eq!(has_any(&(mapping.start * PAGE..mapping.end * PAGE), &late), expected);
        }
    }

    #[test]
    fn what_nothing_is_mapped_for_is_seen() {
        let pages = |range: Range<u64>| Alias { pages: range, of: 1 };
        let bytes = |range: Range<u64>| range.start * PAGE..range.end * PAGE;
        let mappings = [bytes(2..4), bytes(4..6), bytes(8..9)];
        assert_eq!(uncovered(&mappings, &[pages(2..3), pages(3..6), pages(8..9)]), None);
        assert_eq!(uncovered(&mappings, &[]), None);
        for (range, first) in [(1..3, 1), (5..9, 6), (8..10, 9), (7..8, 7), (20..21, 20)] {
            assert_eq!(uncovered(&mappings, &[pages(range.clone())]), Some(first), "{range:?}");
        }
    }

    #[test]
    fn what_the_kernel_wrote_is_kept() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = |name: &str, byte: u8| {
            let path = directory.path().join(name);
            fs::write(&path, vec![byte; 2 * PAGE_SIZE]).expect("written");
            fs::OpenOptions::new().read(true).write(true).open(path).expect("a file")
        };
        let (memory, source) = (file("memory", 1), file("source", 2));
        let kept = [10..20, PAGE - 4..PAGE + 4, PAGE + 40..PAGE + 44];
        put_in_order(&memory, &source, PAGE, &kept).expect("in order");
        let bytes = fs::read(directory.path().join("memory")).expect("read");
        assert!(bytes[..PAGE_SIZE].iter().all(|byte| *byte == 1), "another page");
        let expected = |at: usize| if at < 4 || (40..44).contains(&at) { 1 } else { 2 };
        assert!((0..PAGE_SIZE).all(|at| bytes[PAGE_SIZE + at] == expected(at)));
    }
}
