//! Filling a restored container's memory while it runs: a lazy-pages daemon for CRIU, fed from the page
//! store, whose pages are on this host already.
//!
//! CRIU hands over a userfaultfd for each task that it restores, and leaves memory that is missing to us.
//! A page that a task waits for is installed at once; the rest follows once the container runs, in the order of
//! its place in the store, which gives its memory back as it empties: before that it would take a processor
//! from those who have it run. What tasks do to their memory meanwhile (fork, move
//! it, give it back) is told by the kernel. When nothing is missing the descriptors are closed, and the
//! container is as any other. Until then they are never closed, whoever dies: see `holder`.
//!
//! Tasks in a user namespace may not make such a descriptor; how theirs are come by is said in `descent`.
//!
//! Protocol: CRIU's `criu/uffd.c`. Kernel document: `admin-guide/mm/userfaultfd`.

mod descent;
mod holder;
mod huge;
mod missing;
pub(crate) mod sequences;
mod space;
mod wanted;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::error::{ContainerError, Result};
use crate::forked::Alias;
use crate::placing::HugeMappings;
use crate::store::Store;
use crate::sys;
use crate::sys::userfault;

pub(crate) use descent::{Descent, Settling, probe as probe_descent};
pub(crate) use holder::Holder;
use space::{Source, Sources, Space};

/// Where CRIU looks for its daemon, in the directory of its images.
const SOCKET: &str = "lazy-pages.socket";
/// CRIU's word that every task is restored.
const FINISHED: i32 = 0x5253_5446;
/// What CRIU asks of the kernel, and so what must be there.
const FEATURES: u64 = userfault::FEATURE_EVENT_FORK
    | userfault::FEATURE_EVENT_REMAP
    | userfault::FEATURE_EVENT_REMOVE
    | userfault::FEATURE_EVENT_UNMAP;

/// Once in so many steps a child that was forked meanwhile is looked after.
const LOOK_AFTER: usize = 4;
/// Pages of the store that are given back at a time when CRIU is done with them.
const SPENT: u64 = 512;
/// From the moment when CRIU is done until it is known that all has its place. Huge pages that are not promised
/// are filled meanwhile.
const PLACED_WITHIN: Duration = Duration::from_secs(60);
/// Pause while a task's word cannot be heard.
const UNHEARD: Duration = Duration::from_millis(20);

/// Memory that is being filled. Dropped, the descriptors are closed: only when the tasks are dead, or
/// nothing is missing.
pub(crate) struct Filling {
    shared: Arc<Shared>,
    stop: Arc<EventFd>,
    runs: Arc<EventFd>,
    failed: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// How far it has come.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Status {
    /// CRIU restores.
    Begun,
    /// Every task is restored, and pages are missing.
    Under,
    /// Everything is in its place.
    Done,
    /// It cannot go on. Who wants a page waits.
    Failed(String),
}

struct Shared {
    status: Mutex<Status>,
    changed: Condvar,
    holder: Mutex<Option<Holder>>,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holder(&self) -> MutexGuard<'_, Option<Holder>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A descriptor that must not be closed by our death.
    fn hold(&self, uffd: &OwnedFd) -> Result<()> {
        self.holder().as_ref().map_or(Ok(()), |holder| holder.hold(uffd.as_fd()))
    }

    fn set(&self, status: Status) {
        *self.status() = status;
        self.changed.notify_all();
    }
}

/// Whether this host can fill memory late.
///
/// # Errors
/// Why not.
pub(crate) fn probe() -> std::result::Result<(), String> {
    sys::userfaultfd()
        .and_then(|uffd| userfault::agree(uffd.as_fd(), FEATURES))
        .map_err(|error| format!("the kernel's userfaultfd does not tell of all events: {error}"))
}

/// Whether memory that comes late does so without CRIU: where tasks have a user namespace of their own, and
/// not everybody may make a userfaultfd that sees faults of the kernel too.
pub(crate) fn comes_behind(is_mapped: bool) -> bool {
    const SETTING: &str = "/proc/sys/vm/unprivileged_userfaultfd";
    let for_all = || std::fs::read_to_string(SETTING).is_ok_and(|said| said.trim() == "1");
    is_mapped && !for_all()
}

impl Filling {
    /// Waits for a CRIU that restores from `images`, to give it the `late` pages that `store` has, some of them
    /// to mappings of huge pages. What it reads of the store itself is `spent` when it is done. Each page is given back when the last one that
    /// wants it has it.
    pub(crate) fn begin(
        images: &Path,
        store: &Store,
        (late, huge): (LatePages, HugeMappings),
        spent: Vec<Alias>,
        holder: Holder,
    ) -> Result<Self> {
        let directory =
            File::open(images).map_err(ContainerError::io(format!("open {}", images.display())))?;
        // A socket's path is short; this one is.
        let listener =
            UnixListener::bind(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()))
                .map_err(ContainerError::io("listen for CRIU's restored tasks"))?;
        let event = || {
            let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC);
            event.map(Arc::new).map_err(ContainerError::errno("make an event"))
        };
        let (stop, runs, failed) = (event()?, event()?, event()?);
        let mut sources = Sources::new();
        // Of what CRIU reads nothing is given back before it has: what nobody waits for is late.
        for Alias { pages, of } in late.values().flatten().chain(&spent) {
            let source = match sources.entry(*of) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => entry.insert(Source::new(store.memory_of(*of)?.into())),
            };
            source.keep_pages(pages);
        }
        let shared = Arc::new(Shared {
            status: Mutex::new(Status::Begun),
            changed: Condvar::new(),
            holder: Mutex::new(Some(holder)),
        });
        let daemon = Daemon {
            shared: shared.clone(),
            stop: stop.clone(),
            runs: Some(runs.clone()),
            failed: failed.clone(),
            listener: Some(listener),
            criu: None,
            sources: Arc::new(sources),
            late,
            huge,
            spent,
            spaces: Vec::new(),
            buffer: vec![0; space::CHUNK as usize],
            turn: 0,
            steps: 0,
            finished: false,
            begun: Instant::now(),
        };
        let thread = std::thread::Builder::new()
            .name("filling".to_owned())
            .spawn(move || daemon.run())
            .map_err(ContainerError::io("start a thread"))?;
        Ok(Self { shared, stop, runs, failed, thread: Some(thread) })
    }

    /// Whoever holds the descriptors when we are dead lets go when the container's first process ends.
    pub(crate) fn guard(&self, init: i32) -> Result<()> {
        let process = sys::pidfd_open(init)
            .map_err(ContainerError::io("open the container's first process"))?;
        self.shared.holder().as_ref().map_or(Ok(()), |holder| holder.until(process.as_fd()))
    }

    /// The container runs: what nobody waits for comes from now on too.
    pub(crate) fn runs(&self) {
        // The thread hears of it, or has ended.
        let _ = self.runs.write(1);
    }

    /// Becomes readable when it cannot go on: whoever waits for a page then waits for ever.
    pub(crate) fn failed(&self) -> &Arc<EventFd> {
        &self.failed
    }

    /// Whether it goes on, or has come to its end. To be asked before the container is let run: until then
    /// it can still be given up.
    ///
    /// # Errors
    /// That it cannot go on, and why.
    pub(crate) fn check(&self) -> Result<()> {
        match &*self.shared.status() {
            Status::Failed(why) => {
                Err(ContainerError::State(format!("Memory cannot be filled: {why}")))
            }
            Status::Begun | Status::Under | Status::Done => Ok(()),
        }
    }

    /// Waits until CRIU has said that every task is restored, and all that may come late has a place where it is
    /// waited for. To be done before the container is let run: until then it can still be given up.
    ///
    /// # Errors
    /// When it cannot go on, and why; or CRIU never said so.
    pub(crate) fn await_places(&self) -> Result<()> {
        let begun = |status: &mut Status| *status == Status::Begun;
        let waited =
            self.shared.changed.wait_timeout_while(self.shared.status(), PLACED_WITHIN, begun);
        let mut status = waited.unwrap_or_else(PoisonError::into_inner).0;
        if begun(&mut status) {
            return Err(ContainerError::CriuProtocol(
                "did not say that all is restored".to_owned(),
            ));
        }
        drop(status);
        self.check()
    }

    /// Waits until everything is in its place.
    ///
    /// # Errors
    /// When that takes longer than `patience`, or will never be.
    pub(crate) fn wait(&self, patience: Duration) -> Result<()> {
        self.end().wait(patience)
    }

    /// Its end, for whoever waits for that elsewhere.
    pub(crate) fn end(&self) -> End {
        End(self.shared.clone())
    }
}

/// The end of a filling.
pub(crate) struct End(Arc<Shared>);

impl End {
    /// Waits for it.
    ///
    /// # Errors
    /// When it does not come, or memory is missing.
    pub(crate) fn wait(&self, patience: Duration) -> Result<()> {
        let status = self.0.status();
        let waited = self
            .0
            .changed
            .wait_timeout_while(status, patience, |status| {
                matches!(status, Status::Begun | Status::Under)
            })
            .unwrap_or_else(PoisonError::into_inner);
        match &*waited.0 {
            Status::Done => Ok(()),
            Status::Begun | Status::Under => Err(ContainerError::State(format!(
                "Its memory is still being filled after its last move ({} s were waited): try again",
                patience.as_secs()
            ))),
            Status::Failed(why) => Err(ContainerError::State(format!(
                "Its memory could not be filled after its last move: {why}"
            ))),
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Pages that come late (ascending) and in whose part of the store they are, by the process that they come
/// to.
pub(crate) type LatePages = BTreeMap<i32, Vec<Alias>>;

/// The thread that does it.
struct Daemon {
    shared: Arc<Shared>,
    stop: Arc<EventFd>,
    /// Readable when the container runs; nothing once that is known.
    runs: Option<Arc<EventFd>>,
    failed: Arc<EventFd>,
    listener: Option<UnixListener>,
    criu: Option<UnixStream>,
    sources: Arc<Sources>,
    late: LatePages,
    huge: HugeMappings,
    /// What CRIU reads of the store, and whose part of it that is.
    spent: Vec<Alias>,
    spaces: Vec<Space>,
    /// Through which pages go.
    buffer: Vec<u8>,
    /// Whose turn it is to get pages that nobody waits for.
    turn: usize,
    /// How often somebody got some.
    steps: usize,
    finished: bool,
    begun: Instant,
}

impl Daemon {
    fn run(mut self) {
        match self.serve() {
            Ok(true) => self.end(),
            // Told to stop: the tasks are dead.
            Ok(false) => {}
            Err(error) => {
                tracing::error!(%error, cause = ?std::error::Error::source(&error), "Cannot fill memory; tasks that want it wait");
                self.shared.set(Status::Failed(error.to_string()));
                let _ = self.failed.write(1);
                // Everything is kept as it is until somebody ends the container.
                let _ = poll(
                    &mut [PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)],
                    PollTimeout::NONE,
                );
            }
        }
    }

    /// Everything is in its place: the container is as any other from here on.
    fn end(&mut self) {
        // Who else holds the descriptors first, so that closing ours is what ends it.
        *self.shared.holder() = None;
        self.spaces.clear();
        self.sources.values().for_each(Source::empty);
        tracing::debug!(ms = self.begun.elapsed().as_millis(), "All memory is in its place");
        self.shared.set(Status::Done);
    }

    /// True when all is in its place, false when told to stop.
    fn serve(&mut self) -> Result<bool> {
        loop {
            let missing = self.spaces.iter().any(Space::lacks);
            if self.finished && !missing {
                return Ok(true);
            }
            let ready = self.await_something(self.patience())?;
            if ready.stop {
                return Ok(false);
            }
            if ready.runs {
                self.runs = None;
            }
            if ready.criu {
                self.hear_criu()?;
            }
            let mut busy = false;
            for index in 0..self.spaces.len() {
                if !ready.spaces.contains(&index) && !self.spaces[index].is_waited_for() {
                    continue;
                }
                busy = true;
                let forked = self.spaces[index].serve(&mut self.buffer)?;
                self.take(forked);
            }
            if self.spaces.iter().any(Space::is_unheard) {
                // Children that have ended need nothing any more: what they had may be what is wanted.
                for child in self.spaces.iter_mut().filter(|space| space.is_forked()) {
                    child.look_after(&mut self.buffer)?;
                }
                std::thread::sleep(UNHEARD);
            }
            self.spaces.retain(|space| !space.is_gone());
            if self.finished {
                fail::fail_point!("container-fill");
            }
            // Who waits comes first, and then again.
            if self.fills() && !busy {
                self.fill_some()?;
            }
        }
    }

    /// Whether pages come that nobody waits for.
    fn fills(&self) -> bool {
        self.finished && self.runs.is_none()
    }

    /// How long nothing need be done unless something is heard.
    fn patience(&self) -> PollTimeout {
        // First: whoever rests below did so here.
        let rest = self.spaces.iter().filter_map(Space::rest).min();
        let fills =
            self.fills() && (!self.spent.is_empty() || self.spaces.iter().any(Space::takes));
        match rest {
            _ if fills || self.spaces.iter().any(Space::is_waited_for) => PollTimeout::ZERO,
            // Not a moment too early.
            Some(rest) => {
                PollTimeout::try_from(rest + Duration::from_millis(1)).unwrap_or(PollTimeout::ZERO)
            }
            None => PollTimeout::NONE,
        }
    }

    /// Takes charge of the memory of children that tasks made meanwhile.
    fn take(&mut self, forked: Vec<Space>) {
        for child in forked {
            if let Err(error) = self.shared.hold(child.descriptor()) {
                // The child runs already. Only our own death would be a loss.
                tracing::warn!(%error, "Nobody but us holds the memory of a child");
            }
            self.spaces.push(child);
        }
    }

    fn fill_some(&mut self) -> Result<()> {
        if let Some(Alias { pages, of }) = self.spent.pop() {
            // A piece at a time, for somebody may want a page.
            let first = pages.end.saturating_sub(SPENT).max(pages.start);
            self.sources
                .get(&of)
                .into_iter()
                .for_each(|source| source.release_pages(&(first..pages.end)));
            if pages.start < first {
                self.spent.push(Alias { pages: pages.start..first, of });
            }
            return Ok(());
        }
        let anybody_else = self.spaces.iter().any(|space| space.takes() && !space.is_forked());
        self.steps = self.steps.wrapping_add(1);
        if anybody_else && self.steps.is_multiple_of(LOOK_AFTER) {
            // A child that has ended tells nobody.
            let forked = self.spaces.iter_mut().filter(|space| space.is_forked() && space.takes());
            let mut forked: Vec<_> = forked.collect();
            if !forked.is_empty() {
                let turn = self.steps / LOOK_AFTER % forked.len();
                forked[turn].look_after(&mut self.buffer)?;
            }
        }
        for step in 0..self.spaces.len() {
            let index = (self.turn + step) % self.spaces.len();
            if self.spaces[index].takes() && !(anybody_else && self.spaces[index].is_forked()) {
                // On with the same one until it is whole: its pages lie side by side.
                self.turn = index;
                let forked = self.spaces[index].fill_some(&mut self.buffer)?;
                self.take(forked);
                return Ok(());
            }
        }
        Ok(())
    }

    fn await_something(&self, timeout: PollTimeout) -> Result<Ready> {
        let criu = match (&self.criu, &self.listener) {
            (Some(criu), _) => Some(criu.as_fd()),
            (None, listener) => listener.as_ref().map(AsFd::as_fd),
        };
        let mut events = vec![PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
        events.extend(criu.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
        let runs = events.len();
        events.extend(self.runs.iter().map(|event| PollFd::new(event.as_fd(), PollFlags::POLLIN)));
        let first = events.len();
        let spaces = self.spaces.iter();
        events
            .extend(spaces.map(|space| PollFd::new(space.descriptor().as_fd(), PollFlags::POLLIN)));
        loop {
            match poll(&mut events, timeout) {
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    return Err(ContainerError::errno("wait for tasks that want memory")(error));
                }
                Ok(_) => break,
            }
        }
        let any = |event: &PollFd<'_>| event.any().unwrap_or(false);
        Ok(Ready {
            stop: any(&events[0]),
            criu: criu.is_some() && any(&events[1]),
            runs: runs < first && any(&events[runs]),
            spaces: (first..events.len())
                .filter(|index| any(&events[*index]))
                .map(|index| index - first)
                .collect(),
        })
    }

    /// CRIU connects, names a task and hands over its descriptor, or says that it has restored all.
    fn hear_criu(&mut self) -> Result<()> {
        let Some(criu) = &mut self.criu else {
            let listener = self.listener.take();
            let accepted = listener.map(|listener| listener.accept()).transpose();
            let accepted = accepted.map_err(ContainerError::io("hear CRIU's restored tasks"))?;
            self.criu = accepted.map(|(stream, _)| stream);
            return Ok(());
        };
        let mut word = [0; 4];
        match io::Read::read_exact(criu, &mut word) {
            // It has gone, having said that it was finished or not: a restore that failed ends otherwise.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.criu = None;
                return Ok(());
            }
            read => read.map_err(ContainerError::io("hear CRIU's restored tasks"))?,
        }
        match i32::from_ne_bytes(word) {
            FINISHED => {
                tracing::debug!(tasks = self.spaces.len(), "All tasks are restored");
                if let Some((inner, _)) = self.huge.first_key_value() {
                    return Err(ContainerError::CriuProtocol(format!(
                        "gave no userfaultfd of process {inner}, which has huge pages"
                    )));
                }
                self.spaces.iter_mut().try_for_each(Space::register)?;
                self.finished = true;
                self.shared.set(Status::Under);
            }
            // A zombie has no memory.
            ..=0 => {}
            inner => {
                let uffd = receive_descriptor(criu)?;
                self.shared.hold(&uffd)?;
                // Named again it would have what is kept for others given back.
                let pages = self.late.remove(&inner).unwrap_or_default();
                let huge = self.huge.remove(&inner).unwrap_or_default();
                let space = Space::new(uffd, self.sources.clone(), &pages);
                self.spaces.push(space.with_huge(huge));
            }
        }
        Ok(())
    }
}

/// Who has something to say.
struct Ready {
    stop: bool,
    criu: bool,
    runs: bool,
    spaces: BTreeSet<usize>,
}

fn receive_descriptor(stream: &UnixStream) -> Result<OwnedFd> {
    let bad = || ContainerError::CriuProtocol("handed over no userfaultfd".to_owned());
    let mut byte = [0];
    let mut room = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let message =
        recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(ContainerError::errno("take a task's userfaultfd from CRIU"))?;
    let mut messages =
        message.cmsgs().map_err(ContainerError::errno("take a task's userfaultfd from CRIU"))?;
    let number = messages.find_map(|message| match message {
        ControlMessageOwned::ScmRights(numbers) => numbers.first().copied(),
        _ => None,
    });
    number.map(sys::adopt_descriptor).ok_or_else(bad)
}
