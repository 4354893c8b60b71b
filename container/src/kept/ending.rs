//! The end of a container, whoever wants it: nothing of it is left on this host, unless it is somebody
//! else's.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use super::Container;
use crate::claim;
use crate::dump::ms;
use crate::error::{ContainerError, Result};
use crate::podman::arrival::Arrival;
use crate::restore::oci_directory;

/// A runtime that deletes what has ended is done with it within this.
const DELETED_WITHIN: Duration = Duration::from_millis(300);
/// A killed tree is gone within this.
const DEAD_WITHIN: Duration = Duration::from_secs(10);

impl Container {
    /// Interface first, so that nobody outside learns of the end of its tasks.
    pub(super) fn take_away(&mut self) -> Result<()> {
        let begun = Instant::now();
        self.network.remove();
        self.let_go();
        self.criu = None;
        self.warm = None;
        if let Some(init) = &self.init {
            init.end_is_wanted();
        }
        self.cgroups.kill_all()?;
        self.cgroups.thaw()?;
        if let Some(init) = &self.init
            && !init.wait(DEAD_WITHIN)
        {
            return Err(ContainerError::State("The killed container does not die".to_owned()));
        }
        // Nobody waits for memory any more.
        self.filling = None;
        self.landing.clear();
        self.streams.finish();
        self.terminal = None;
        let forgotten = self.arrival.as_mut().map_or(Ok(()), Arrival::forget);
        self.arrival = None;
        self.cgroups.remove()?;
        self.runtime.forget()?;
        match forgotten {
            Ok(()) => claim::give_back(&self.config.place)?,
            // While podman has it, the mark stays: whoever sweeps tries it again. There is nothing left to keep.
            Err(error) => {
                tracing::warn!(%error, "podman keeps a container that did not come; it is asked again");
            }
        }
        let _ = fs::remove_dir_all(oci_directory(&self.config.place));
        self.store.empty();
        self.over = true;
        tracing::debug!(ms = ms(begun), "Taken away");
        Ok(())
    }

    pub(super) fn end(&mut self, grace: Duration) -> Result<()> {
        let init = self.init()?;
        init.end_is_wanted();
        init.terminate();
        // A paused one gets the signal when it is thawed; off the network it stays.
        self.cgroups.thaw()?;
        init.wait(grace);
        if self.foreign.is_some() { self.end_foreign() } else { self.take_away() }
    }

    /// A container that ended by itself may have been ended by its runtime's `delete`, which is at it
    /// still and would complain if what it knows went away under its hands.
    fn let_the_runtime_delete(&self) {
        let Some(init) = &self.init else { return };
        let begun = Instant::now();
        while init.wait(Duration::ZERO) && self.runtime.exists() && begun.elapsed() < DELETED_WITHIN
        {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        self.let_the_runtime_delete();
        let gone = match self.foreign {
            // One that stands still for our sake is for whoever sweeps to judge.
            Some(_) if self.paused.is_some() => Ok(()),
            Some(_) => self.leave_foreign(),
            None => self.take_away(),
        };
        if let Err(error) = gone {
            tracing::error!(%error, "Cannot take the container away");
            // Some of its tasks may live, and would read zeros where memory has not arrived. Its holder
            // stays until they have ended.
            std::mem::forget(self.filling.take());
        }
    }
}
