//! A container as its keeper holds it.
//!
//! Here the parts come together: the runtime starts a container, pause and resume freeze and thaw
//! it and its interface, save and load have CRIU dump and restore. How each of these is done is the
//! parts' own business.

use std::fs;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use decamp_shared::keeper::{ExitSignal, KeeperConfig, Kept};
use decamp_shared::pages::{PageSet, SpaceId};
use decamp_shared::workload::{
    Liveness, Result as WorkloadResult, Section, SpaceInfo, WorkloadError,
};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::cgroup::Cgroups;
use crate::dump::{self, ContainerState, Dump, Dumping, ms};
use crate::error::{ContainerError, Result};
use crate::facts::Facts;
use crate::hiding;
use crate::images::PAGE_LIMIT;
use crate::init::Init;
use crate::memory::{self, HiddenProcess, Process};
use crate::mounts::{self, ExternalMount};
use crate::network::Network;
use crate::restore::{Restore, oci_directory};
use crate::runtime::Runtime;
use crate::spec::{ContainerSpec, runtime_id};
use crate::store::Store;
use crate::streams::Streams;
use crate::swrk::Swrk;
use crate::tree;

/// How long the interface stays on the network after the tasks were frozen. What peers send at that
/// moment is acknowledged by the kernel and moves in the sockets' queues; were it lost, they would
/// send it again only after 200 ms, or 600. Longer than a round trip in a data centre; the pages that
/// exist are looked for meanwhile.
const LINGER: Duration = Duration::from_millis(4);
/// A killed tree is gone within this.
const DEAD_WITHIN: Duration = Duration::from_secs(10);

/// A container and all that it has on this host. When it is dropped, nothing of it is left.
pub struct Container {
    pub(crate) config: KeeperConfig,
    pub(crate) exit: ExitSignal,
    pub(crate) spec: ContainerSpec,
    pub(crate) bundle: Bundle,
    pub(crate) runtime: Runtime,
    pub(crate) network: Network,
    pub(crate) streams: Streams,
    pub(crate) store: Store,
    pub(crate) cgroups: Cgroups,
    /// The runtime's state of the stand-in, until the real container has taken its place.
    pub(crate) stand_in: Option<Value>,
    /// A CRIU that waits in the container's cgroups to restore it.
    pub(crate) criu: Option<Swrk>,
    /// Nothing before a restore.
    pub(crate) init: Option<Init>,
    /// Why memory cannot be hidden from CRIU here, when it cannot.
    pub(crate) unhidden: Option<String>,
    pub(crate) paused: Option<Pause>,
    pub(crate) over: bool,
}

/// What is known of a tree while it stands still.
#[derive(Default)]
pub(crate) struct Pause {
    hidden: Option<Vec<HiddenProcess>>,
    harvested: bool,
    mounts: Vec<ExternalMount>,
    dumping: Option<Dumping>,
}

impl Container {
    fn init(&self) -> Result<&Init> {
        self.init
            .as_ref()
            .ok_or_else(|| ContainerError::State("The container has no process yet".to_owned()))
    }

    fn processes(&self) -> Result<Vec<Process>> {
        memory::processes(&self.cgroups.processes()?, self.init()?.pid())
    }

    /// What is hidden of each process, found once in each pause.
    fn hidden(&mut self) -> Result<&[HiddenProcess]> {
        let not_paused = || ContainerError::State("The container is not paused".to_owned());
        if self.paused.as_ref().ok_or_else(not_paused)?.hidden.is_none() {
            let begun = Instant::now();
            let hidden = match self.unhidden {
                Some(_) => Vec::new(),
                None => self.processes()?.iter().map(HiddenProcess::find).collect::<Result<_>>()?,
            };
            tracing::debug!(ms = ms(begun), processes = hidden.len(), "Found the pages that exist");
            self.paused.as_mut().ok_or_else(not_paused)?.hidden = Some(hidden);
        }
        let hidden = self.paused.as_ref().and_then(|paused| paused.hidden.as_deref());
        hidden.ok_or_else(not_paused)
    }

    fn freeze(&mut self) -> Result<()> {
        let frozen = Instant::now();
        self.cgroups.freeze()?;
        tracing::debug!(ms = ms(frozen), "Frozen");
        self.paused = Some(Pause::default());
        let quiet = self.hidden().map(|_| ()).and_then(|()| {
            thread::sleep(LINGER.saturating_sub(frozen.elapsed()));
            self.network.disconnect()
        });
        if let Err(error) = quiet {
            self.thaw()?;
            return Err(error);
        }
        tracing::debug!(ms = ms(frozen), "Frozen and off the network");
        Ok(())
    }

    /// Whatever is wrong with the network, the tasks run again: who is frozen can mend nothing.
    fn thaw(&mut self) -> Result<()> {
        let begun = Instant::now();
        self.let_go();
        if let Err(error) = self.network.reconnect() {
            tracing::warn!(%error, "The container runs again, but cannot be put back on the network");
        }
        self.cgroups.thaw()?;
        self.paused = None;
        tracing::debug!(ms = ms(begun), "Back on the network and thawed");
        Ok(())
    }

    /// Waits for a CRIU that still has its hands on the tree; nobody wants what it dumps.
    fn let_go(&mut self) {
        let dumping = self.paused.as_mut().and_then(|paused| paused.dumping.take());
        if let Some(Err(error)) = dumping.map(Dumping::finish) {
            tracing::debug!(%error, "A dump that nobody wanted any more failed");
        }
    }

    /// Has CRIU begin to dump, unless it did in this pause.
    fn begin_dump(&mut self) -> Result<()> {
        let ranges = hiding::ranges(self.hidden()?);
        let init = self.init()?.pid();
        let Some(paused) = &mut self.paused else { return Ok(()) };
        if paused.dumping.is_some() {
            return Ok(());
        }
        paused.mounts = mounts::external(&self.bundle, init)?;
        let dump = Dump {
            criu: self.config.tools.criu.clone(),
            init,
            cgroups: self.cgroups.clone(),
            network: self.network.inode()?,
            mounts: paused.mounts.clone(),
            hidden: self.unhidden.is_none().then_some(ranges),
            images: self.store.fresh_images()?,
        };
        paused.dumping = Some(dump.begin()?);
        Ok(())
    }

    fn dump(&mut self) -> Result<Vec<Section>> {
        let begun = Instant::now();
        self.begin_dump()?;
        let not_paused = || ContainerError::State("The container is not paused".to_owned());
        let paused = self.paused.as_mut().ok_or_else(not_paused)?;
        paused.dumping.take().ok_or_else(not_paused)?.finish()?;
        let state = ContainerState {
            output: self.streams.key()?,
            output_owner: self.streams.owner()?,
            mounts: paused.mounts.clone(),
            settings: self.cgroups.settings(),
        };
        let images = self.store.images();
        let sections =
            dump::sections(&images, paused.hidden.as_deref().unwrap_or_default(), &state);
        // The images are in the sections now; twice would be twice the memory.
        let _ = fs::remove_dir_all(&images);
        tracing::debug!(ms = ms(begun), "Saved");
        sections
    }

    fn restore(&mut self, sections: Vec<Section>) -> Result<()> {
        let begun = Instant::now();
        let stand_in = self.stand_in.as_ref();
        let stand_in = stand_in
            .ok_or_else(|| ContainerError::State("The container was restored before".to_owned()))?;
        let gone = || ContainerError::State("The CRIU that waited was used before".to_owned());
        let criu = self.criu.take().ok_or_else(gone)?;
        let init = Init::watch(self.restoring().run(criu, sections)?, &self.exit)?;
        self.runtime.adopt(stand_in, init.pid(), &self.bundle.rootfs(), &self.spec.bundle)?;
        self.init = Some(init);
        self.stand_in = None;
        tracing::debug!(ms = ms(begun), "Loaded");
        Ok(())
    }

    pub(crate) fn restoring(&self) -> Restore<'_> {
        Restore {
            criu: &self.config.tools.criu,
            bundle: &self.bundle,
            cgroups: &self.cgroups,
            network: &self.network,
            streams: &self.streams,
            store: &self.store,
        }
    }

    /// Interface first, so that nobody outside learns of the end of its tasks.
    fn take_away(&mut self) -> Result<()> {
        let begun = Instant::now();
        self.network.remove();
        self.let_go();
        self.criu = None;
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
        self.streams.finish();
        self.cgroups.remove()?;
        self.runtime.forget()?;
        let _ = fs::remove_dir_all(oci_directory(&self.config.place));
        self.store.empty();
        self.over = true;
        tracing::debug!(ms = ms(begun), "Taken away");
        Ok(())
    }

    fn gather_facts(&mut self) -> Result<Facts> {
        let pids = match &self.init {
            Some(_) => self.cgroups.processes()?,
            None => Vec::new(),
        };
        let init = self.init.as_ref().map_or(0, Init::pid);
        let mut obstacles = self.bundle.move_obstacles();
        obstacles.extend(tree::obstacles(&pids, init));
        if self.init.is_some() {
            obstacles.extend(mounts::obstacles(&self.bundle, init)?);
            if self.cgroups.is_nested()? {
                obstacles.push("The container made cgroups of its own below its own".to_owned());
            }
        }
        let processes = memory::processes(&pids, init)?;
        let processes = processes.iter().map(|process| (process.inner, process.pid)).collect();
        Ok(Facts {
            container: runtime_id(&self.config.place)?.to_owned(),
            init,
            processes,
            cgroup: self.cgroups.freezer()?.to_owned(),
            memory_limit: self.cgroups.memory_limit(),
            resident: pids.iter().map(|pid| memory::resident(*pid)).sum(),
            unhidden: self.unhidden.clone(),
            obstacles,
        })
    }
}

impl Kept for Container {
    fn liveness(&self) -> Liveness {
        Liveness::StopOnly {
            reason: "Containers are copied while they stand still in this version".to_owned(),
        }
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
        Ok(self.processes()?.iter().map(info).collect())
    }

    fn make_spaces(&mut self, spaces: &[SpaceInfo]) -> WorkloadResult<()> {
        Ok(self.store.make_spaces(spaces)?)
    }

    fn memory(&mut self, space: SpaceId) -> WorkloadResult<OwnedFd> {
        if self.stand_in.is_some() {
            return Ok(self.store.memory(space)?);
        }
        let processes = self.processes()?;
        let process = processes.iter().find(|process| process.space() == space);
        let process =
            process.ok_or_else(|| WorkloadError::plain(format!("There is no {space}")))?;
        let path = format!("/proc/{}/mem", process.pid);
        let file = fs::File::open(&path)
            .map_err(|error| WorkloadError::new(format!("Cannot open {path}"), error))?;
        Ok(file.into())
    }

    fn track(&mut self) -> WorkloadResult<()> {
        Err(WorkloadError::Unsupported("Dirty tracking"))
    }

    /// Every page that exists, the first time in a pause; nothing after that, because nothing that
    /// stands still writes.
    fn harvest(&mut self, dirty: &mut PageSet) -> WorkloadResult<()> {
        if self.paused.as_ref().is_some_and(|paused| paused.harvested) {
            return Ok(());
        }
        for process in self.hidden()? {
            process.add_to(dirty);
        }
        // CRIU dumps the rest of the tree while these pages travel.
        self.begin_dump()?;
        if let Some(paused) = &mut self.paused {
            paused.harvested = true;
        }
        Ok(())
    }

    fn pause(&mut self) -> WorkloadResult<()> {
        fail::fail_point!("container-pause", |_| Err(WorkloadError::plain(
            "Failed on purpose (container-pause)"
        )));
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
        self.network.connect()?;
        self.network.forget_neighbours();
        if let Err(error) = self.cgroups.thaw() {
            self.network.disconnect()?;
            return Err(error.into());
        }
        self.network.announce();
        tracing::debug!(ms = ms(begun), "Activated");
        self.store.empty();
        Ok(())
    }

    fn release(&mut self) -> WorkloadResult<()> {
        fail::fail_point!("container-release", |_| Err(WorkloadError::plain(
            "Failed on purpose (container-release)"
        )));
        Ok(self.take_away()?)
    }

    fn discard(&mut self) -> WorkloadResult<()> {
        Ok(self.take_away()?)
    }

    fn stop(&mut self, grace: Duration) -> WorkloadResult<()> {
        let init = self.init()?;
        init.end_is_wanted();
        init.terminate();
        // A paused one gets the signal when it is thawed; off the network it stays.
        self.cgroups.thaw()?;
        init.wait(grace);
        Ok(self.take_away()?)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if !self.over
            && let Err(error) = self.take_away()
        {
            tracing::error!(%error, "Cannot take the container away");
        }
    }
}
