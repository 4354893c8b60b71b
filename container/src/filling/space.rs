//! One task's memory that is being filled: faults, events, and pages that nobody waits for yet.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use decamp_shared::pages::PAGE_SIZE;
use nix::fcntl::{FallocateFlags, fallocate};

use super::huge::Huge;
use super::missing::{Missing, Place, Span};
use super::wanted::Wanted;
use crate::error::{ContainerError, Result};
use crate::forked::Alias;
use crate::placing::HugeMapping;
use crate::sys::userfault::{self, Event};

pub(super) const PAGE: u64 = PAGE_SIZE as u64;
/// Installed at a time when nobody waits, and so the length of the buffer that all have in common.
pub(super) const CHUNK: u64 = 256 << 10;
/// Installed at a time around a page that somebody waits for.
const NEIGHBOURS: u64 = 64 << 10;
/// The store gives memory back in pieces as large as its own.
const GIVEN_BACK: u64 = 2 << 20;
/// Pause before something is tried again that must work in the end.
pub(super) const AGAIN: Duration = Duration::from_micros(50);
/// The same when there is no memory: somebody has to give some back.
pub(super) const NO_MEMORY: Duration = Duration::from_millis(20);

/// The part of the store that one process's memory is in: a sparse file whose offset is the address that
/// it had when it came.
pub(super) struct Source {
    file: File,
    /// Of which each piece is given back when the last one that wants it has it.
    wanted: Mutex<Wanted>,
}

/// The store by whose memory it is: a process's number in the container.
pub(super) type Sources = BTreeMap<i32, Source>;

/// A task's memory.
pub(super) struct Space {
    uffd: OwnedFd,
    sources: Arc<Sources>,
    /// A child has what its parent had until one of them gets something.
    missing: Arc<Missing>,
    /// Where its pages are huge.
    pub(super) huge: Huge,
    /// Those that are still to be registered.
    pub(super) huge_mappings: Vec<HugeMapping>,
    /// Until then no huge page is tried for: there was none.
    pub(super) rests_until: Option<Instant>,
    /// Faults that were told while something else was done.
    waiting: VecDeque<u64>,
    /// Where the pages that nobody waits for go on.
    at: u64,
    /// Of a child that was forked meanwhile.
    forked: bool,
    /// What it told could not be heard for want of a descriptor or of memory: it is told again.
    unheard: bool,
    gone: bool,
    /// Somebody was told of a page without a place: once is enough.
    told: bool,
}

/// How one installation ended.
pub(super) enum Outcome {
    /// As asked, or partly.
    Fine,
    /// The task changes its memory just now: its events have to be heard first.
    Changing,
}

/// Whether an error says that there is no descriptor or no memory left for what was asked.
fn is_want(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

impl Source {
    /// The part that is in `file`.
    pub(super) fn new(file: File) -> Self {
        Self { file, wanted: Mutex::default() }
    }

    /// Gives all of it back.
    pub(super) fn empty(&self) {
        if let Err(error) = self.file.set_len(0) {
            tracing::warn!(%error, "Cannot give a part of the page store back");
        }
    }

    /// One more wants these pages, by number.
    pub(super) fn keep_pages(&self, pages: &Range<u64>) {
        self.wanted().add(&(pages.start * PAGE..pages.end * PAGE));
    }

    /// One of those that want these pages, by number, has them.
    pub(super) fn release_pages(&self, pages: &Range<u64>) {
        self.release(&(pages.start * PAGE..pages.end * PAGE));
    }

    /// Gives back what nobody wants any more now, in whole pieces.
    fn release(&self, range: &Range<u64>) {
        let around = range.start / GIVEN_BACK * GIVEN_BACK..range.end.next_multiple_of(GIVEN_BACK);
        let mut wanted = self.wanted();
        wanted.remove(range);
        for gap in wanted.nobodys(&around) {
            let start = gap.start.next_multiple_of(GIVEN_BACK);
            self.punch(start..gap.end / GIVEN_BACK * GIVEN_BACK);
        }
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn punch(&self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let length = (range.end - range.start) as i64;
        if let Err(error) = fallocate(&self.file, hole, range.start as i64, length) {
            tracing::debug!(%error, "Cannot give a piece of the page store back");
        }
    }
}

impl Space {
    /// The memory behind `uffd`, which lacks `pages` (ascending) and has them kept for it.
    pub(super) fn new(uffd: OwnedFd, sources: Arc<Sources>, pages: &[Alias]) -> Self {
        Self::lacking(uffd, sources, Arc::new(Missing::of_pages(pages)))
    }

    fn lacking(uffd: OwnedFd, sources: Arc<Sources>, missing: Arc<Missing>) -> Self {
        Self {
            uffd,
            sources,
            missing,
            huge: Huge::default(),
            huge_mappings: Vec::new(),
            rests_until: None,
            waiting: VecDeque::new(),
            at: 0,
            forked: false,
            unheard: false,
            gone: false,
            told: false,
        }
    }

    pub(super) fn descriptor(&self) -> &OwnedFd {
        &self.uffd
    }

    /// Whether anything has still to come.
    pub(super) fn lacks(&self) -> bool {
        !self.gone && self.missing.pages() > 0
    }

    /// Whether it is of a child that was forked meanwhile: it has what it shares with its parent, and may
    /// well have ended before it wants the rest.
    pub(super) fn is_forked(&self) -> bool {
        self.forked
    }

    /// Whether the memory is gone, with its task or by an exec.
    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    /// Whether what it lacks may be given to it now.
    pub(super) fn takes(&self) -> bool {
        self.lacks() && self.rest().is_none()
    }

    /// Hears what the task has to say and gives it what it waits for. Gives the memory of children that
    /// it made.
    pub(super) fn serve(&mut self, buffer: &mut [u8]) -> Result<Vec<Self>> {
        let mut forked = Vec::new();
        self.hear(&mut forked)?;
        for _ in 0..self.waiting.len() {
            let Some(address) = self.waiting.pop_front() else { break };
            if !self.gone && (self.rests_at(address) || !self.answer(address, buffer)?) {
                self.waiting.push_back(address);
            }
            self.hear(&mut forked)?;
        }
        Ok(forked)
    }

    /// Whether somebody waits for a page that could not be given at once, and may be given now.
    pub(super) fn is_waited_for(&self) -> bool {
        !self.gone && self.waiting.iter().any(|address| !self.rests_at(*address))
    }

    /// Installs a little of what nobody waits for yet.
    pub(super) fn fill_some(&mut self, buffer: &mut [u8]) -> Result<Vec<Self>> {
        let mut forked = Vec::new();
        if let Some(span) = self.missing.next(self.at, CHUNK) {
            self.at = span.addresses.end;
            let outcome = match self.give_huge(span.addresses.start)? {
                Some(outcome) => outcome,
                None => self.install(&span, buffer)?,
            };
            match outcome {
                Outcome::Fine => {}
                Outcome::Changing => {
                    self.at = span.addresses.start;
                    self.hear(&mut forked)?;
                    thread::sleep(AGAIN);
                }
            }
        }
        Ok(forked)
    }

    /// Whether it told something that could not be heard for want of a descriptor or of memory.
    pub(super) fn is_unheard(&self) -> bool {
        !self.gone && self.unheard
    }

    /// Installs one page, and so learns whether the task still lives.
    pub(super) fn look_after(&mut self, buffer: &mut [u8]) -> Result<()> {
        let Some(span) = self.missing.next(self.at, PAGE) else { return Ok(()) };
        match self.give_huge(span.addresses.start)? {
            Some(_) => Ok(()),
            None => self.install(&span, buffer).map(drop),
        }
    }

    /// Pages that nobody waits for go on from here.
    pub(super) fn start_at(&mut self, address: u64) {
        self.at = address;
    }

    /// The first of what is missing in `addresses`, as far as it lies in them.
    pub(super) fn missing_in(&self, addresses: &Range<u64>) -> Option<Span> {
        self.missing.first_in(addresses)
    }

    /// The memory is gone, with its task or by an exec.
    pub(super) fn is_no_more(&mut self) {
        self.gone = true;
    }

    /// Takes what the task told; faults are put aside.
    fn hear(&mut self, forked: &mut Vec<Self>) -> Result<()> {
        self.unheard = false;
        while !self.gone {
            let event = match userfault::next_event(self.uffd.as_fd()) {
                // The kernel keeps it.
                Err(error) if is_want(&error) => {
                    tracing::debug!(%error, "A task's word cannot be heard now");
                    self.unheard = true;
                    return Ok(());
                }
                event => {
                    event.map_err(ContainerError::io("hear what a task does to its memory"))?
                }
            };
            match event {
                None => return Ok(()),
                Some(Event::Fault(address)) => self.waiting.push_back(address & !(PAGE - 1)),
                Some(Event::Remove(range)) => {
                    let gone = Arc::make_mut(&mut self.missing).remove(&range);
                    self.release(gone);
                }
                Some(Event::Unmap(range)) => {
                    self.huge.unmapped(&range);
                    let gone = Arc::make_mut(&mut self.missing).remove(&range);
                    self.release(gone);
                }
                Some(Event::Remap { from, to, len }) => {
                    self.huge.moved(from, to, len);
                    let gone = Arc::make_mut(&mut self.missing).moved(from, to, len);
                    self.release(gone);
                }
                Some(Event::Fork(uffd)) => {
                    for (of, range) in self.missing.places() {
                        if let Some(source) = self.sources.get(&of) {
                            source.wanted().add(&range);
                        }
                    }
                    let missing = self.missing.clone();
                    let mut child = Self::lacking(uffd, self.sources.clone(), missing);
                    child.forked = true;
                    child.huge = self.huge.clone();
                    forked.push(child);
                }
            }
        }
        Ok(())
    }

    /// Gives a task the page that it waits for; false when it has to wait on, because somebody changes the
    /// memory or because there is none: others are heard meanwhile.
    fn answer(&mut self, address: u64, buffer: &mut [u8]) -> Result<bool> {
        let outcome = match (self.give_huge(address)?, self.missing.at(address)) {
            (Some(outcome), _) => outcome,
            (None, Some(span)) => {
                let end = span.addresses.end.min(address + NEIGHBOURS);
                self.install(&Span { addresses: address..end, ..span }, buffer)?
            }
            (None, None) => self.install_zero(address)?,
        };
        match outcome {
            Outcome::Fine => {
                // Whoever saw the page come by other means still sleeps.
                let _ = userfault::wake(self.uffd.as_fd(), &(address..address + PAGE));
                Ok(true)
            }
            Outcome::Changing => {
                thread::sleep(AGAIN);
                Ok(false)
            }
        }
    }

    fn install_zero(&mut self, address: u64) -> Result<Outcome> {
        let (_, error) = userfault::zero(self.uffd.as_fd(), &(address..address + PAGE));
        match error.as_ref().and_then(io::Error::raw_os_error) {
            None | Some(libc::EEXIST | libc::ENOENT) => Ok(Outcome::Fine),
            Some(libc::EAGAIN) => Ok(Outcome::Changing),
            Some(libc::ESRCH | libc::ENOSPC) => {
                self.gone = true;
                Ok(Outcome::Fine)
            }
            Some(libc::ENOMEM) => {
                thread::sleep(NO_MEMORY);
                Ok(Outcome::Changing)
            }
            Some(_) => {
                let error = error.unwrap_or_else(io::Error::last_os_error);
                Err(ContainerError::io(format!("install a page at {address:#x}"))(error))
            }
        }
    }

    /// Installs `span`, all of which is missing and not longer than the buffer.
    fn install(&mut self, span: &Span, buffer: &mut [u8]) -> Result<Outcome> {
        let length = span.length().min(CHUNK) as usize;
        self.read(span, &mut buffer[..length])?;
        let (mut done, mut part) = (0, length);
        while done < length {
            let address = span.addresses.start + done as u64;
            let bytes = &buffer[done..(done + part).min(length)];
            let (copied, error) = userfault::copy(self.uffd.as_fd(), address, bytes);
            self.has_come(&(address..address + copied));
            done += copied as usize;
            match error.as_ref().and_then(io::Error::raw_os_error) {
                None => part = length,
                Some(libc::EAGAIN) if copied > 0 => {}
                Some(libc::EAGAIN) => return Ok(Outcome::Changing),
                // It came by itself.
                Some(libc::EEXIST) => {
                    self.has_come(&(address..address + PAGE));
                    done += PAGE_SIZE;
                }
                // Two mappings cannot be filled at once: smaller pieces find where they meet.
                Some(libc::ENOENT) if bytes.len() > PAGE_SIZE => {
                    part = (bytes.len() / 2).next_multiple_of(PAGE_SIZE);
                }
                Some(libc::ENOENT) => {
                    if !std::mem::replace(&mut self.told, true) {
                        tracing::warn!(address, "A page that was to come has no place any more");
                    }
                    self.has_come(&(address..address + PAGE));
                    done += PAGE_SIZE;
                    part = length;
                }
                Some(libc::ESRCH | libc::ENOSPC) => {
                    self.gone = true;
                    return Ok(Outcome::Fine);
                }
                // Whoever could give some back may wait for us to hear so.
                Some(libc::ENOMEM) => {
                    thread::sleep(NO_MEMORY);
                    return Ok(Outcome::Changing);
                }
                Some(_) => {
                    let error = error.unwrap_or_else(io::Error::last_os_error);
                    return Err(ContainerError::io(format!("install memory at {address:#x}"))(
                        error,
                    ));
                }
            }
        }
        Ok(Outcome::Fine)
    }

    /// Reads the beginning of `span` from the store.
    pub(super) fn read(&self, span: &Span, into: &mut [u8]) -> Result<()> {
        let source = self.sources.get(&span.of).ok_or_else(|| {
            ContainerError::State(format!("Memory of process {} never came", span.of))
        })?;
        source.file.read_exact_at(into, span.offset).map_err(ContainerError::io(format!(
            "read {} bytes at {:#x} of the page store",
            into.len(),
            span.offset
        )))
    }

    pub(super) fn has_come(&mut self, addresses: &Range<u64>) {
        if !addresses.is_empty() {
            let come = Arc::make_mut(&mut self.missing).remove(addresses);
            self.release(come);
        }
    }

    fn release(&self, places: Vec<Place>) {
        for (of, range) in places {
            if let Some(source) = self.sources.get(&of) {
                source.release(&range);
            }
        }
    }
}

impl Drop for Space {
    /// It wants nothing any more.
    fn drop(&mut self) {
        self.release(self.missing.places().collect());
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::MetadataExt;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::inject::userfaultfd_of;
    use crate::memory::hideable_mappings;
    use crate::sys::userfault::Mode;

    #[test]
    fn what_there_is_too_little_of_is_told_from_what_is_wrong() {
        let of = |number| is_want(&io::Error::from_raw_os_error(number));
        assert!(of(libc::EMFILE) && of(libc::ENFILE) && of(libc::ENOMEM));
        assert!(!of(libc::EINVAL) && !of(libc::EBADF));
    }

    #[test]
    fn what_several_want_is_given_back_when_the_last_one_has_it() {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = File::from(nix::sys::memfd::memfd_create("pages", flags).expect("a file"));
        let piece = GIVEN_BACK / PAGE;
        file.write_all_at(&vec![1; 3 * GIVEN_BACK as usize], 0).expect("memory");
        let source = Source::new(file.try_clone().expect("a descriptor"));
        let holds = || file.metadata().expect("a file").blocks() * 512 / GIVEN_BACK;
        // Two want the first piece and a half, one of them the rest too.
        source.keep_pages(&(0..piece * 3 / 2));
        source.keep_pages(&(0..piece * 3));
        source.release_pages(&(0..piece * 3 / 2));
        assert_eq!(holds(), 3);
        source.release_pages(&(0..piece / 2));
        assert_eq!(holds(), 3, "half a piece is not worth it");
        source.release_pages(&(piece / 2..piece * 2));
        assert_eq!(holds(), 1);
        source.release_pages(&(piece * 2..piece * 3));
        assert_eq!(holds(), 0);
    }

    /// A shell that forks while its heap is filled: its child is heard of, and its end is noticed.
    #[test]
    fn a_child_that_has_ended_is_noticed() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo ready; read line; (exit 0); echo forked; read line"]);
        shell.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = shell.spawn().expect("sh");
        let (mut say, mut hear) =
            (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        hear.read_exact(&mut [0; 6]).expect("it is ready");
        let pid = child.id() as i32;
        let uffd = userfaultfd_of(pid).expect("a userfaultfd").uffd;
        userfault::agree(uffd.as_fd(), userfault::FEATURE_EVENT_FORK).expect("as root");
        let heap = hideable_mappings(pid).expect("it lives").remove(0);
        userfault::register(uffd.as_fd(), &heap, Mode::Missing).expect("its heap");
        // Its pages are all there, so nothing is installed that it would read.
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = nix::sys::memfd::memfd_create("pages", flags).expect("a file");
        let file = File::from(file);
        file.write_all_at(&[0], heap.end - 1).expect("a sparse file");
        let pages = heap.start / PAGE..heap.end / PAGE;
        let source = Source::new(file);
        source.keep_pages(&pages);
        let sources = Arc::new(Sources::from([(1, source)]));
        let mut space = Space::new(uffd, sources, &[Alias { pages, of: 1 }]);
        let mut buffer = vec![0; CHUNK as usize];
        say.write_all(b"\n").expect("it listens");
        let begun = Instant::now();
        let mut children = Vec::new();
        while children.is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(120), "it does not fork");
            children.extend(space.serve(&mut buffer).expect("heard"));
        }
        // The shell waits for its child, which may want pages meanwhile.
        let answered = thread::spawn(move || hear.read_exact(&mut [0; 7]));
        while !answered.is_finished() {
            assert!(begun.elapsed() < Duration::from_secs(120), "it does not go on");
            children.extend(space.serve(&mut buffer).expect("heard"));
            children[0].serve(&mut buffer).expect("heard");
            thread::sleep(AGAIN);
        }
        answered.join().expect("no panic").expect("it said so");
        assert!(children[0].is_forked() && children[0].lacks());
        for _ in 0..100 {
            children[0].look_after(&mut buffer).expect("it is looked after");
        }
        assert!(children[0].is_gone());
        child.kill().and_then(|()| child.wait()).expect("ended");
    }
}
