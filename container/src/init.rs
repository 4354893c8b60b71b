//! A container's first process: watched, reaped where it is a child of ours, and its end told.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use decamp_shared::keeper::{ExitRecord, ExitSignal};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::error::{ContainerError, Result};
use crate::sys;

/// An exit code, or a signal.
type How = std::result::Result<i32, i32>;

/// The parent of a foreign process reaps it within this, or not at all.
const REAPED_WITHIN: Duration = Duration::from_secs(1);

/// A first process that runs; its end is told to the keeper, unless it was wanted.
pub(crate) struct Init {
    pid: i32,
    process: Arc<OwnedFd>,
    wanted: Arc<AtomicBool>,
    ended: Arc<(Mutex<Option<ExitRecord>>, Condvar)>,
    exit: ExitSignal,
}

impl Init {
    /// Watches child `pid` of this process.
    pub(crate) fn watch(pid: i32, exit: &ExitSignal) -> Result<Self> {
        let process =
            sys::pidfd_open(pid).map_err(ContainerError::io(format!("open the process {pid}")))?;
        Self::watch_with(pid, process, exit, move |process| {
            await_end(process).and_then(|()| sys::reap(pid)).map(Some)
        })
    }

    /// Watches `process`, number `pid`, which is somebody else's to reap.
    pub(crate) fn watch_foreign(pid: i32, process: OwnedFd, exit: &ExitSignal) -> Result<Self> {
        Self::watch_with(pid, process, exit, |process| {
            await_end(process)?;
            await_reaping(process);
            // Where the kernel does not tell, its parent alone knows.
            Ok(sys::pidfd::exit_of(process).unwrap_or(None))
        })
    }

    fn watch_with(
        pid: i32,
        process: OwnedFd,
        exit: &ExitSignal,
        outcome: impl FnOnce(BorrowedFd<'_>) -> std::io::Result<Option<How>> + Send + 'static,
    ) -> Result<Self> {
        let process = Arc::new(process);
        let init = Self {
            pid,
            process: process.clone(),
            wanted: Arc::default(),
            ended: Arc::default(),
            exit: exit.clone(),
        };
        let (exit, wanted, ended) = (exit.clone(), init.wanted.clone(), init.ended.clone());
        thread::Builder::new()
            .name("init".to_owned())
            .spawn(move || {
                let record = match outcome(process.as_fd()) {
                    Ok(Some(how)) => record(how),
                    Ok(None) => ExitRecord {
                        status: 1,
                        text: "ended; how, its parent alone knows".to_owned(),
                    },
                    Err(error) => ExitRecord { status: 1, text: format!("was lost: {error}") },
                };
                *ended.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(record.clone());
                ended.1.notify_all();
                if !wanted.load(Ordering::SeqCst) {
                    exit.raise(record);
                }
            })
            .map_err(ContainerError::io("start a thread"))?;
        Ok(init)
    }

    /// Its number here.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// From here on its end is what we want.
    pub(crate) fn end_is_wanted(&self) {
        self.wanted.store(true, Ordering::SeqCst);
    }

    /// Its end is told after all, and at once if it has ended: what was to follow it cannot be done.
    pub(crate) fn end_is_told(&self) {
        self.wanted.store(false, Ordering::SeqCst);
        let ended = self.ended.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(record) = &*ended {
            self.exit.raise(record.clone());
        }
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        if !self.wait(Duration::ZERO) {
            // It may end at this very moment.
            let _ = sys::pidfd_signal(self.process.as_fd(), Signal::SIGTERM as i32);
        }
    }

    /// Whether it ended within `patience`.
    pub(crate) fn wait(&self, patience: Duration) -> bool {
        let ended = self.ended.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.ended.1.wait_timeout_while(ended, patience, |ended| ended.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.is_some()
    }
}

/// Returns when `process` has ended. A thread that waited for it by its number would
/// also be told that it stands still when another thread of ours traces it.
fn await_end(process: BorrowedFd<'_>) -> std::io::Result<()> {
    loop {
        match poll(&mut [PollFd::new(process, PollFlags::POLLIN)], PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return other.map(drop).map_err(Into::into),
        }
    }
}

/// Returns when the parent of `process`, which has ended, has reaped it: only then the kernel tells how it
/// ended. A parent may never do that, and is not waited for long.
fn await_reaping(process: BorrowedFd<'_>) {
    let begun = Instant::now();
    while begun.elapsed() < REAPED_WITHIN {
        let mut events = [PollFd::new(process, PollFlags::POLLIN)];
        let _ = poll(&mut events, PollTimeout::ZERO);
        if events[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)) {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn record(how: How) -> ExitRecord {
    match how {
        Ok(code) => ExitRecord { status: code, text: format!("exited with {code}") },
        Err(signal) => {
            let name = Signal::try_from(signal)
                .map_or_else(|_| format!("signal {signal}"), |name| name.to_string());
            ExitRecord { status: 128 + signal, text: format!("killed by {name}") }
        }
    }
}
