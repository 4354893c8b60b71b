//! Freezing and thawing: a container that stands still for a move, off the network, and runs again.
//!
//! What has just been frozen is looked at once more, for what appeared since the move was agreed upon; its
//! pages are looked for and CRIU dumps it meanwhile. On an error it runs again.

use std::thread;
use std::time::{Duration, Instant};

use super::{Container, Pause, not_paused};
use crate::claim;
use crate::dump::ms;
use crate::error::{ContainerError, Result};
use crate::hiding::{self, Way};
use crate::looking::Looking;
use crate::memory::{HiddenProcess, Process};
use crate::obstacles;
use crate::ways;

/// How long the interface stays on the network after the tasks were frozen. What peers send at that
/// moment is acknowledged by the kernel and moves in the sockets' queues; were it lost, they would
/// send it again only after 200 ms, or 600. Longer than a round trip in a data centre; the pages that
/// exist are looked for meanwhile.
const LINGER: Duration = Duration::from_millis(4);
/// What has just been frozen is looked at again for so long at least, if that takes so long.
const GLANCE: Duration = Duration::from_millis(1);

impl Container {
    /// Begins to look for the pages of all processes whose memory is hidden from CRIU, and gives them.
    fn begin_look(&mut self) -> Result<Vec<Process>> {
        let processes = if self.hiding.is_ok() { self.processes()? } else { Vec::new() };
        let mapped = HiddenProcess::all_mapped(&processes)?;
        let paused = self.paused.as_mut().ok_or_else(not_paused)?;
        paused.ranges = hiding::ranges(&mapped);
        paused.looking = Some(Looking::begin(self.tracker.take(), mapped)?);
        Ok(processes)
    }

    /// What is hidden of each process, found once in each pause.
    pub(super) fn hidden(&mut self) -> Result<&[HiddenProcess]> {
        let paused = self.paused.as_mut().ok_or_else(not_paused)?;
        if let Some(looking) = paused.looking.take() {
            let (tracker, found) = looking.finish();
            self.tracker = tracker;
            paused.hidden = Some(found?);
        }
        let not_found = || ContainerError::State("Nobody knows which pages exist".to_owned());
        paused.hidden.as_deref().ok_or_else(not_found)
    }

    pub(super) fn freeze(&mut self) -> Result<()> {
        // Processes come and go: what appeared since the move was agreed upon ends it here.
        refuse(self.subject(self.init()?.pid())?.look_before_stop()?)?;
        self.check_limit()?;
        if self.foreign.is_some() {
            claim::hold(&self.config.place)?;
        }
        let frozen = Instant::now();
        if let Err(error) = self.cgroups.freeze() {
            self.note_that_it_runs();
            return Err(error);
        }
        tracing::debug!(ms = ms(frozen), "Frozen");
        // Its limits travel as they were.
        self.throttle = None;
        self.paused = Some(Pause::default());
        if let Err(error) = self.settle(frozen) {
            self.thaw()?;
            return Err(error);
        }
        tracing::debug!(ms = ms(frozen), "Frozen and off the network");
        Ok(())
    }

    /// Takes what has just been frozen off the network, and has its pages looked for and CRIU dump it beside
    /// all that follows.
    fn settle(&mut self, frozen: Instant) -> Result<()> {
        let pids = self.cgroups.processes().unwrap_or_default();
        let (processes, filtered) = thread::scope(|scope| {
            // Each takes milliseconds for hundreds of processes.
            let look = || hiding::are_filtered(&pids);
            let filtered = thread::Builder::new().spawn_scoped(scope, look);
            let processes = self.begin_look();
            // Where there is no thread for it, it is done after.
            (processes, filtered.map_or_else(|_| look(), |thread| thread.join().unwrap_or(true)))
        });
        let processes = processes?;
        self.check_nesting()?;
        self.segments.look_again(processes.iter());
        if filtered {
            self.hide_by_mounts()?;
        }
        let budget = LINGER.saturating_sub(frozen.elapsed()).max(GLANCE);
        refuse(obstacles::glance(self.init()?.pid(), &self.cgroups, budget)?)?;
        thread::sleep(LINGER.saturating_sub(frozen.elapsed()));
        self.network.disconnect()?;
        self.begin_dump()
    }

    /// What its processes share since a fork may be too much for its memory limit elsewhere.
    fn check_limit(&self) -> Result<()> {
        let (limit, used) = (self.cgroups.memory_limit(), self.cgroups.anonymous_memory());
        match (&self.hiding, limit, used) {
            (Ok(_), Some(limit), Some(used)) => {
                // Whoever takes it has it swap as well; how much there is there he says himself.
                let limit = limit.saturating_add(self.cgroups.swap_allowance());
                self.forked.check(&self.processes()?, used, limit)
            }
            _ => Ok(()),
        }
    }

    /// A process is under a filter, perhaps only since it was last looked for one: then memory is hidden from
    /// a CRIU that is under none at first.
    fn hide_by_mounts(&mut self) -> Result<()> {
        if self.hiding != Ok(Way::Filter) {
            return Ok(());
        }
        let way = ways::hiding(&self.methods, true).map_err(|reason| {
            ContainerError::State(format!(
                "A process put itself under a seccomp filter meanwhile, and memory cannot be hidden \
                 from CRIU now: {reason}. It can be moved again, with all of its memory in CRIU's images"
            ))
        })?;
        tracing::info!("A process is under a seccomp filter now: CRIU can be under none at first");
        self.hiding = Ok(way);
        if !ways::moves_segments(&self.methods, &self.hiding) {
            // CRIU sees it, and has all of it in its images.
            self.segments.forget();
        }
        Ok(())
    }

    /// Whatever is wrong with the network, the tasks run again: who is frozen can mend nothing.
    pub(super) fn thaw(&mut self) -> Result<()> {
        let begun = Instant::now();
        self.let_go();
        if let Err(error) = self.network.reconnect() {
            tracing::warn!(%error, "The container runs again, but cannot be put back on the network");
        }
        self.cgroups.thaw()?;
        // What still looks at it has what the next one needs to protect it anew.
        let looking = self.paused.take().and_then(|paused| paused.looking);
        if let Some(looking) = looking {
            self.tracker = looking.finish().0;
        }
        self.note_that_it_runs();
        tracing::debug!(ms = ms(begun), "Back on the network and thawed");
        Ok(())
    }

    /// Whoever sweeps after this keeper is not to take an adopted container for one that may run
    /// elsewhere. What goes wrong with that keeps nothing from running, and is tried again.
    pub(super) fn note_that_it_runs(&mut self) {
        if self.foreign.is_none() || self.paused.is_some() {
            return;
        }
        if let Err(error) = claim::unhold(&self.config.place) {
            tracing::error!(%error, "The container runs again, and would be ended if this keeper died: trying again when it is next asked for");
        }
    }

    /// Cgroups that it made since the move began do not go along.
    fn check_nesting(&self) -> Result<()> {
        match self.cgroups.is_nested()? {
            true => Err(ContainerError::State(
                "The container made cgroups of its own below its own since the move began. It runs on \
                 here: move it again once it has removed them"
                    .to_owned(),
            )),
            false => Ok(()),
        }
    }
}

/// An error when there are reasons against a move.
fn refuse(obstacles: Vec<String>) -> Result<()> {
    match &obstacles[..] {
        [] => Ok(()),
        said => Err(ContainerError::State(format!(
            "The container cannot be moved as it is now, and runs on: {}",
            said.join("; and: ")
        ))),
    }
}
