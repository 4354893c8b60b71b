//! What its keeper is asked to do with a container, each in a phase that allows it. Only the order of
//! things is here, and what spaces and pages it has; how things are done is in the other files.

use std::fs;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use decamp_shared::keeper::{Harvest, Kept};
use decamp_shared::methods::{Methods, Ways};
use decamp_shared::pages::{PageSet, SpaceId};
use decamp_shared::workload::{
    Liveness, Result as WorkloadResult, Section, SpaceInfo, WorkloadError,
};
use serde_json::Value;

use super::Container;
use crate::dump::ms;
use crate::forked::leaving::Forked;
use crate::hiding;
use crate::huge;
use crate::images::PAGE_LIMIT;
use crate::memory::Process;
use crate::mounts;
use crate::podman;
use crate::segments::found::Segments;
use crate::segments::is_segment;
use crate::throttle::Throttle;
use crate::tmpfs::held;
use crate::tracker;
use crate::warm::Warm;
use crate::ways;

impl Kept for Container {
    fn liveness(&self) -> Liveness {
        ways::liveness(&self.methods, &self.hiding)
    }

    fn configure(&mut self, methods: Methods) -> WorkloadResult<()> {
        if self.tracker.is_some() {
            // What is held back would be forgotten, and never sent.
            return Err(WorkloadError::plain("The container is being moved: try again after that"));
        }
        self.methods = methods;
        // One that has no processes has none under a filter.
        let pids = self.cgroups.processes().unwrap_or_default();
        self.hiding = ways::hiding(&methods, hiding::are_filtered(&pids));
        // Whoever asks begins anew: what an earlier attempt knew of shared memory is of no use to it.
        self.segments = Segments::default();
        self.forked = Forked::new(methods.forked);
        Ok(())
    }

    /// Of one that has just come: how it was restored; else how it would leave.
    fn ways(&self) -> Ways {
        let leaving = || ways::leaving(&self.methods, &self.hiding);
        self.arrived.clone().unwrap_or_else(leaving)
    }

    fn facts(&mut self) -> WorkloadResult<Value> {
        serde_json::to_value(self.gather_facts()?)
            .map_err(|error| WorkloadError::new("Cannot write the container's facts", error))
    }

    fn spaces(&mut self) -> WorkloadResult<Vec<SpaceInfo>> {
        let info = |process: &Process| SpaceInfo {
            id: process.space().0,
            page_limit: PAGE_LIMIT,
            label: format!("process {}", process.inner),
            process: process.inner,
        };
        self.known = self.processes()?;
        // What is hidden when it stands still is what was named before; CRIU dumps the rest.
        let moved = ways::moves_segments(&self.methods, &self.hiding);
        if self.paused.is_none() && moved {
            let init = self.init()?.pid();
            let given = mounts::external(&self.bundle, init)?;
            self.segments.look(&self.known, init, held::own(init, &given)?)?;
        }
        Ok(self.known.iter().map(info).chain(self.segments.infos()).collect())
    }

    fn make_spaces(&mut self, spaces: &[SpaceInfo]) -> WorkloadResult<()> {
        let of_segment = |info: &SpaceInfo| is_segment(SpaceId(info.id));
        let (segments, processes): (Vec<_>, Vec<_>) = spaces.iter().cloned().partition(of_segment);
        self.store.make_spaces(&processes)?;
        if self.landing.make(&segments, &self.store)? && self.arrival.is_none() {
            // The CRIU that waits has not inherited these.
            self.criu = Some(self.restoring().begin()?);
        }
        Ok(())
    }

    fn memory(&mut self, space: SpaceId) -> WorkloadResult<OwnedFd> {
        match (self.stand_in.is_some(), is_segment(space)) {
            (true, true) => return Ok(self.landing.memory(space)?),
            (true, false) => return Ok(self.store.memory(space)?),
            (false, true) => return Ok(self.segments.memory(space)?),
            (false, false) => {}
        }
        let process = self.known.iter().find(|process| process.space() == space);
        let process =
            process.ok_or_else(|| WorkloadError::plain(format!("There is no {space}")))?;
        let path = format!("/proc/{}/mem", process.pid);
        let file = fs::File::open(&path)
            .map_err(|error| WorkloadError::new(format!("Cannot open {path}"), error))?;
        Ok(file.into())
    }

    fn track(&mut self) -> WorkloadResult<()> {
        self.await_memory()?;
        self.tracker = Some(
            tracker::start(self.methods.tracker, &self.cgroups).map_err(WorkloadError::plain)?,
        );
        self.forked = Forked::new(self.methods.forked);
        self.warm = Some(Warm::keep(&self.config.tools.criu));
        Ok(())
    }

    /// While it stands still: what was written since the last round, the first time in a pause; nothing
    /// after that, because nothing that stands still writes.
    fn harvest(&mut self, dirty: &mut PageSet) -> WorkloadResult<Harvest> {
        if self.paused.is_none() {
            let processes = self.processes()?;
            let not_tracked = || WorkloadError::plain("The container is not tracked");
            let tracker = self.tracker.as_mut().ok_or_else(not_tracked)?;
            tracker.harvest(&processes, dirty)?;
            self.forked.round(&processes, dirty)?;
            let stall = tracker.stall();
            let (limit, used) = (self.cgroups.memory_limit(), self.cgroups.anonymous_memory());
            let mut restoring = self.forked.restoring(&processes, used, limit);
            let huge = processes.iter().map(|process| huge::Private::of(process.pid).fills_in());
            restoring.needed += huge.sum::<Duration>();
            return Ok(Harvest { exists: None, stall, restoring });
        }
        let mut exists = PageSet::new();
        let harvested = self.paused.as_ref().is_some_and(|paused| paused.harvested);
        for hidden in self.hidden()?.iter().filter(|_| !harvested) {
            hidden.process.add_to(dirty, &hidden.written);
            hidden.process.add_to(&mut exists, &hidden.pages);
        }
        let stall = self.tracker.as_ref().map(|tracker| tracker.stall()).unwrap_or_default();
        if harvested {
            return Ok(Harvest { exists: None, stall, ..Harvest::default() });
        }
        if let Some(hidden) = self.paused.as_ref().and_then(|paused| paused.hidden.as_ref()) {
            self.forked.last(hidden, dirty)?;
            exists.subtract(&self.forked.unsent());
        }
        if let Some(paused) = &mut self.paused {
            paused.harvested = true;
        }
        Ok(Harvest { exists: Some(exists), stall, ..Harvest::default() })
    }

    fn throttle(&mut self, percent: u8) -> WorkloadResult<()> {
        // Before the next one, which goes by what the container has.
        self.throttle = None;
        if percent > 0 {
            self.throttle = Some(Throttle::begin(&self.cgroups, percent)?);
        }
        Ok(())
    }

    fn pause(&mut self) -> WorkloadResult<()> {
        fail::fail_point!("container-pause", |_| Err(WorkloadError::plain(
            "Failed on purpose (container-pause)"
        )));
        self.await_memory()?;
        Ok(self.freeze()?)
    }

    fn save(&mut self) -> WorkloadResult<Vec<Section>> {
        fail::fail_point!("container-save", |_| Err(WorkloadError::plain(
            "Failed on purpose (container-save)"
        )));
        Ok(self.dump()?)
    }

    fn resume(&mut self) -> WorkloadResult<()> {
        if self.paused.is_some() {
            self.thaw()?;
        }
        self.note_that_it_runs();
        self.throttle = None;
        self.warm = None;
        // Once it runs again: the kernel takes a moment to forget what was protected.
        self.tracker = None;
        self.forked = Forked::new(self.methods.forked);
        // Held open it would stay when the container lets go of it.
        self.segments.forget();
        self.store.drop_images();
        Ok(())
    }

    fn load(&mut self, sections: Vec<Section>) -> WorkloadResult<()> {
        fail::fail_point!("container-load", |_| Err(WorkloadError::plain(
            "Failed on purpose (container-load)"
        )));
        Ok(self.restore(sections)?)
    }

    fn activate(&mut self) -> WorkloadResult<()> {
        fail::fail_point!("container-activate", |_| Err(WorkloadError::plain(
            "Failed on purpose (container-activate)"
        )));
        let begun = Instant::now();
        if let Some(filling) = &self.filling {
            filling.check()?;
        }
        // Whatever may fail comes first: once it has run here it must not run elsewhere.
        let settling = podman::about_to_run(self)?;
        self.network.connect()?;
        self.network.forget_neighbours();
        if let Err(error) = self.cgroups.thaw() {
            self.network.disconnect()?;
            return Err(error.into());
        }
        if let Some(filling) = &self.filling {
            filling.runs();
        }
        self.network.announce();
        self.arrived = None;
        if let Some(settling) = settling {
            settling.runs(self);
        }
        tracing::debug!(ms = ms(begun), "Activated");
        self.warm = None;
        // What is still to be filled is read through descriptors.
        self.store.empty();
        self.landing.clear();
        Ok(())
    }

    fn release(&mut self) -> WorkloadResult<()> {
        fail::fail_point!("container-release", |_| Err(WorkloadError::plain(
            "Failed on purpose (container-release)"
        )));
        if podman::leaves(self)? {
            return Ok(());
        }
        Ok(self.take_away()?)
    }

    fn discard(&mut self) -> WorkloadResult<()> {
        Ok(self.take_away()?)
    }

    fn stop(&mut self, grace: Duration) -> WorkloadResult<()> {
        let stopped = match podman::stop(self, grace) {
            Ok(true) => return Ok(()),
            Ok(false) => self.end(grace),
            Err(error) => Err(error),
        };
        if let (Err(_), Some(init)) = (&stopped, &self.init) {
            // Otherwise it would stand here as one that runs, with nothing in it.
            init.end_is_told();
        }
        Ok(stopped?)
    }

    fn let_go(&mut self) -> WorkloadResult<()> {
        if self.foreign.is_none() {
            return Err(WorkloadError::plain("The container was not adopted"));
        }
        // Nothing of ours stays in it.
        self.resume()?;
        Ok(self.leave_foreign()?)
    }
}
