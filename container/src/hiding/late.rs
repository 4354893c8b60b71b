//! The filter of a CRIU that dumps processes which are under a filter themselves.
//!
//! Such a CRIU has to suspend their filters, and to read them, and the kernel lets nobody do either who is
//! under a filter (`PTRACE_O_SUSPEND_SECCOMP`, `PTRACE_SECCOMP_GET_FILTER`). It does both for all of them before
//! it looks at the first one; what it may do later does not depend on its own filters. The first file that it
//! opens when it is done with that is `/proc/PID/stat` of the container's first process, which nobody has opened
//! before. So one of ours lies over that one ([`super::mounts`]), and before it is told that the file is open
//! CRIU is made to put itself under a filter ([`crate::inject`]), as if it had been started under it.
//!
//! Were the order another one, CRIU would fail (the filter came too early), or dump what the page engine moves
//! as well (too late), or not be under a filter at the end, which is an error here.

use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use super::{filter, mounts};
use crate::error::{ContainerError, Result};
use crate::inject::{self, Filtering};
use crate::sys::Calls;

/// What CRIU is to be under a filter for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// The container's first process.
    pub(crate) init: i32,
    /// Whether its questions for limits are answered.
    pub(crate) limits: bool,
}

/// What came of a filter.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// CRIU's process, once it is there.
    criu: AtomicI32,
    /// Nothing yet, that CRIU is under it, or why it is not.
    said: OnceLock<std::result::Result<(), String>>,
}

/// A filter that CRIU gets.
pub(super) struct Late {
    calls: Calls,
    state: State,
    outcome: Outcome,
}

enum State {
    /// For CRIU to open the file.
    Waiting(Sender<OwnedFd>),
    /// It is about to come out of the call that opened it.
    Begun(Filtering, Sender<OwnedFd>),
    Ended,
}

impl Late {
    /// The filter's descriptor goes to `listeners`.
    pub(super) fn new(wanted: Wanted, listeners: Sender<OwnedFd>, outcome: Outcome) -> Self {
        let calls = Calls { scans: false, limits: wanted.limits };
        Self { calls, state: State::Waiting(listeners), outcome }
    }

    /// `caller` opens the file: to be told so when this has returned.
    pub(super) fn is_opened_by(&mut self, caller: i32) -> io::Result<()> {
        if caller != self.outcome.0.criu.load(Ordering::Relaxed) {
            return Ok(());
        }
        if let State::Waiting(listeners) = mem::replace(&mut self.state, State::Ended) {
            let begun = inject::filter_when_back(caller, self.calls);
            self.state = State::Begun(self.noted(begun)?, listeners);
        }
        Ok(())
    }

    /// The file is read that CRIU has opened: it has come out of the call.
    pub(super) fn is_read(&mut self) -> io::Result<()> {
        let (begun, listeners) = match mem::replace(&mut self.state, State::Ended) {
            State::Begun(begun, listeners) => (begun, listeners),
            // By somebody else, before or after.
            other => {
                self.state = other;
                return Ok(());
            }
        };
        let panicked = |_| Err(io::Error::other("the thread that traces panicked"));
        let listener = self.noted(begun.join().unwrap_or_else(panicked))?;
        let _ = listeners.send(listener);
        let _ = self.outcome.0.said.set(Ok(()));
        Ok(())
    }

    fn noted<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result {
            let _ = self.outcome.0.said.set(Err(error.to_string()));
        }
        result
    }
}

impl Outcome {
    /// Says which process CRIU is. To be said before it is asked for anything.
    pub(crate) fn is_of(&self, criu: i32) {
        self.0.criu.store(criu, Ordering::Relaxed);
    }

    /// Whether it failed, as far as is known.
    pub(crate) fn failure(&self) -> Option<ContainerError> {
        let reason = self.0.said.get()?.as_ref().err()?;
        Some(Self::error(reason))
    }

    /// To be asked when CRIU has ended.
    ///
    /// # Errors
    /// When it never was under the filter.
    pub(crate) fn check(&self) -> Result<()> {
        match self.0.said.get() {
            Some(Ok(())) => Ok(()),
            Some(Err(reason)) => Err(Self::error(reason)),
            None => Err(Self::error("it did not open what it was expected to")),
        }
    }

    fn error(reason: &str) -> ContainerError {
        ContainerError::State(format!(
            "CRIU could not be put under a seccomp filter of ours: {reason}. With tracker = \"page-hash\" \
             there is no need to"
        ))
    }
}

/// Whether a CRIU can get a filter late.
///
/// # Errors
/// What this host lacks for it.
pub(crate) fn probe() -> std::result::Result<(), String> {
    // What has worked once works; what has not may.
    static WORKS: OnceLock<()> = OnceLock::new();
    if WORKS.get().is_none() {
        filter::probe()?;
        mounts::probe()?;
        let _ = WORKS.set(());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn late() -> (Late, Outcome) {
        let outcome = Outcome::default();
        let wanted = Wanted { init: 1, limits: false };
        (Late::new(wanted, channel().0, outcome.clone()), outcome)
    }

    #[test]
    fn a_criu_that_opens_nothing_is_under_no_filter() {
        let (mut late, outcome) = late();
        outcome.is_of(4711);
        // Somebody else does.
        late.is_opened_by(4712).and_then(|()| late.is_read()).expect("nothing happens");
        assert!(outcome.failure().is_none());
        let error = outcome.check().expect_err("it never came").to_string();
        assert!(error.contains("did not open"), "{error}");
    }

    #[test]
    fn a_criu_that_cannot_be_traced_fails_where_it_opens_and_afterwards() {
        let (mut late, outcome) = late();
        // Nobody traces himself.
        let us = std::process::id() as i32;
        outcome.is_of(us);
        assert!(late.is_opened_by(us).is_err());
        assert!(outcome.failure().is_some() && outcome.check().is_err());
    }
}
