//! A container's first process: watched, reaped, and its end told.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use decamp_shared::keeper::{ExitRecord, ExitSignal};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{ContainerError, Result};
use crate::sys;

/// A first process that runs; its end is told to the keeper, unless it was wanted.
pub(crate) struct Init {
    pid: i32,
    wanted: Arc<AtomicBool>,
    ended: Arc<(Mutex<bool>, Condvar)>,
}

impl Init {
    /// Watches child `pid` of this process.
    pub(crate) fn watch(pid: i32, exit: &ExitSignal) -> Result<Self> {
        let init = Self { pid, wanted: Arc::default(), ended: Arc::default() };
        let (exit, wanted, ended) = (exit.clone(), init.wanted.clone(), init.ended.clone());
        thread::Builder::new()
            .name("init".to_owned())
            .spawn(move || {
                let record = match sys::reap(pid) {
                    Ok(how) => record(how),
                    Err(error) => ExitRecord { status: 1, text: format!("was lost: {error}") },
                };
                *ended.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
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

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        if !self.wait(Duration::ZERO) {
            // It may end at this very moment; it is not reaped by anybody else, so the number is its.
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGTERM);
        }
    }

    /// Whether it ended within `patience`.
    pub(crate) fn wait(&self, patience: Duration) -> bool {
        let ended = self.ended.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.ended.1.wait_timeout_while(ended, patience, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

fn record(how: std::result::Result<i32, i32>) -> ExitRecord {
    match how {
        Ok(code) => ExitRecord { status: code, text: format!("exited with {code}") },
        Err(signal) => {
            let name = Signal::try_from(signal)
                .map_or_else(|_| format!("signal {signal}"), |name| name.to_string());
            ExitRecord { status: 128 + signal, text: format!("killed by {name}") }
        }
    }
}
