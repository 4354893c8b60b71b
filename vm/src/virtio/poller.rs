//! What a device's thread waits for: a kick for each of its queues, what the device itself watches, and being
//! woken.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::{Result, VmError};
use crate::sys;

/// Tokens of the device's own begin here; those of queues are below.
const OWN: u64 = 1 << 32;
/// The thread itself is meant.
const WAKE: u64 = u64::MAX;
/// Events that are taken at once.
const AT_ONCE: usize = 32;

/// What is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ready {
    /// The driver kicked this queue.
    Queue(usize),
    /// What the device watches under this token.
    Own(u32),
}

/// Watches for one device. Clones watch the same.
#[derive(Clone, Debug)]
pub(crate) struct Poller {
    epoll: Arc<Epoll>,
    kicks: Arc<Vec<EventFd>>,
    wake: Arc<EventFd>,
}

impl Poller {
    /// Watches for kicks of `queues` queues.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn new(queues: usize) -> Result<Self> {
        let failed = |error: io::Error| VmError::refused("wait for a device's events", error);
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|error| failed(error.into()))?;
        let make = || EventFd::new(EFD_NONBLOCK);
        let kicks = (0..queues).map(|_| make()).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        let poller = Self {
            epoll: Arc::new(epoll),
            kicks: Arc::new(kicks),
            wake: Arc::new(make().map_err(failed)?),
        };
        for (number, kick) in (0u64..).zip(poller.kicks.iter()) {
            poller.add(&sys::borrow_event(kick), EpollFlags::EPOLLIN, number).map_err(failed)?;
        }
        poller.add(&sys::borrow_event(&poller.wake), EpollFlags::EPOLLIN, WAKE).map_err(failed)?;
        Ok(poller)
    }

    /// From now on `fd` is watched for `events`, as `token`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn watch(&self, fd: impl AsFd, events: EpollFlags, token: u32) -> io::Result<()> {
        self.add(&fd, events, OWN + u64::from(token))
    }

    /// `fd`, which is watched as `token`, is watched for `events` instead.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn change(&self, fd: impl AsFd, events: EpollFlags, token: u32) -> io::Result<()> {
        let mut event = EpollEvent::new(events, OWN + u64::from(token));
        Ok(self.epoll.modify(fd, &mut event)?)
    }

    /// `fd` is watched no more.
    ///
    /// # Errors
    /// When it was not.
    pub(crate) fn forget(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(self.epoll.delete(fd)?)
    }

    fn add(&self, fd: &impl AsFd, events: EpollFlags, data: u64) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(events, data))?)
    }

    /// The event that a kick of `queue` is.
    pub(super) fn kick_event(&self, queue: usize) -> Option<&EventFd> {
        self.kicks.get(queue)
    }

    /// Kicks `queue`, if there is one.
    pub(super) fn kick(&self, queue: usize) {
        if let Some(Err(error)) = self.kicks.get(queue).map(|kick| kick.write(1)) {
            // Its counter is full: it is kicked already.
            tracing::debug!("A kick of queue {queue} was one too many: {error}");
        }
    }

    /// Wakes whoever waits.
    pub(super) fn wake(&self) {
        let _ = self.wake.write(1);
    }

    /// Waits until anything is ready. Kicks and being woken are taken.
    pub(super) fn wait(&self, ready: &mut Vec<Ready>) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); AT_ONCE];
        ready.clear();
        let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => 0,
            count => count?,
        };
        for event in &events[..count] {
            match event.data() {
                WAKE => drop(self.wake.read()),
                own if own >= OWN => ready.push(Ready::Own((own - OWN) as u32)),
                queue => {
                    let queue = queue as usize;
                    if let Some(kick) = self.kicks.get(queue) {
                        let _ = kick.read();
                    }
                    ready.push(Ready::Queue(queue));
                }
            }
        }
        Ok(())
    }
}
