//! A container as its keeper holds it.
//!
//! Here the parts come together: the runtime starts a container, pause and resume freeze and thaw
//! it and its interface, save and load have CRIU dump and restore. How each of these is done is the
//! parts' own business.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use decamp_shared::keeper::{Beginning, ExitSignal, KeeperConfig, Kept};
use decamp_shared::pages::{PageSet, SpaceId};
use decamp_shared::workload::{
    Liveness, Place, Result as WorkloadResult, Section, SpaceInfo, WorkloadError,
};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::cgroup::{Cgroups, cgroups_path};
use crate::dump::{self, ContainerState, Dump, Dumping, ms};
use crate::error::{ContainerError, Result};
use crate::facts::Facts;
use crate::hiding;
use crate::images::PAGE_LIMIT;
use crate::init::Init;
use crate::memory::{self, HiddenProcess, Process};
use crate::mounts::{self, ExternalMount};
use crate::network::Network;
use crate::restore::{Restore, Shell, oci_directory};
use crate::runtime::{self, Runtime};
use crate::spec::{ContainerSpec, runtime_id, veth_name};
use crate::store::Store;
use crate::streams::Streams;
use crate::swrk::Swrk;
use crate::tree;

/// A killed tree is gone within this.
const DEAD_WITHIN: Duration = Duration::from_secs(10);

/// A container and all that it has on this host. When it is dropped, nothing of it is left.
pub struct Container {
    config: KeeperConfig,
    exit: ExitSignal,
    spec: ContainerSpec,
    bundle: Bundle,
    runtime: Runtime,
    network: Network,
    streams: Streams,
    store: Store,
    cgroups: Cgroups,
    /// The runtime's state of the stand-in, until the real container has taken its place.
    stand_in: Option<Value>,
    /// A CRIU that waits in the container's cgroups to restore it.
    criu: Option<Swrk>,
    /// Nothing before a restore.
    init: Option<Init>,
    /// Why memory cannot be hidden from CRIU here, when it cannot.
    unhidden: Option<String>,
    paused: Option<Pause>,
    over: bool,
}

/// What is known of a tree while it stands still.
#[derive(Default)]
struct Pause {
    hidden: Option<Vec<HiddenProcess>>,
    harvested: bool,
    mounts: Vec<ExternalMount>,
    dumping: Option<Dumping>,
}

impl Container {
    /// Starts the container of `config`, or builds its empty shell, as `config` says.
    ///
    /// # Errors
    /// When any part cannot be made; what was made until then is taken away again.
    pub fn begin(config: &KeeperConfig, exit: &ExitSignal) -> Result<Self> {
        match config.beginning {
            Beginning::Run => Self::run(config, exit),
            Beginning::Incoming => Self::incoming(config, exit),
        }
    }

    fn run(config: &KeeperConfig, exit: &ExitSignal) -> Result<Self> {
        let spec = ContainerSpec::from_json(&config.spec)?;
        let place = &config.place;
        let bundle = Bundle::read(&spec.bundle)?;
        let runtime = fresh_runtime(config)?;
        let directory = oci_directory(place);
        write_config(&directory, "original.json", &bundle.config_text())?;
        let network = Network::make(interface(&spec, place), &veth_name(place), true)?;
        let cgroups_path = cgroups_path(place)?;
        let patched = bundle.for_runtime(&network.path(), &cgroups_path).to_string();
        write_config(&directory, "config.json", patched.as_bytes())?;
        let streams = Streams::open(&place.log())?;
        let store = Store::mount(&place.dir.join("store"))?;
        let begun = Instant::now();
        let started = runtime.run(&directory, streams.write_end()?);
        let mut undo = Undo { place, runtime: Some(&runtime) };
        let init = Init::watch(started?, exit)?;
        let cgroups = runtime::cgroups(&runtime.state()?)?;
        undo.runtime = None;
        tracing::debug!(ms = ms(begun), pid = init.pid(), "The runtime started the container");
        Ok(Self::of(config, exit, spec, bundle, runtime.clone(), network, streams, store, cgroups)
            .with_init(init))
    }

    fn incoming(config: &KeeperConfig, exit: &ExitSignal) -> Result<Self> {
        let spec = ContainerSpec::from_json(&config.spec)?;
        let place = &config.place;
        let path = oci_directory(place).join("original.json");
        let text =
            fs::read(&path).map_err(ContainerError::io(format!("read {}", path.display())))?;
        let bundle = Bundle::parse(&spec.bundle, &text)?;
        let runtime = fresh_runtime(config)?;
        let network = Network::make(interface(&spec, place), &veth_name(place), false)?;
        let streams = Streams::open(&place.log())?;
        let store = Store::mount(&place.dir.join("store"))?;
        let cgroups_path = cgroups_path(place)?;
        let mut undo = Undo { place, runtime: Some(&runtime) };
        let shell = Shell::make(&runtime, &bundle, &network, &cgroups_path, &streams, &store)?;
        undo.runtime = None;
        let mut container = Self::of(
            config,
            exit,
            spec,
            bundle,
            runtime.clone(),
            network,
            streams,
            store,
            shell.cgroups,
        );
        container.stand_in = Some(shell.state);
        container.criu = Some(container.restoring().begin()?);
        Ok(container)
    }

    #[allow(clippy::too_many_arguments)]
    fn of(
        config: &KeeperConfig,
        exit: &ExitSignal,
        spec: ContainerSpec,
        bundle: Bundle,
        runtime: Runtime,
        network: Network,
        streams: Streams,
        store: Store,
        cgroups: Cgroups,
    ) -> Self {
        let unhidden = hiding::probe().err();
        if let Some(reason) = &unhidden {
            tracing::warn!(reason, "CRIU will dump all memory by itself");
        }
        Self {
            config: config.clone(),
            exit: exit.clone(),
            spec,
            bundle,
            runtime,
            network,
            streams,
            store,
            cgroups,
            stand_in: None,
            criu: None,
            init: None,
            unhidden,
            paused: None,
            over: false,
        }
    }

    fn with_init(mut self, init: Init) -> Self {
        self.init = Some(init);
        self
    }

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
        let begun = Instant::now();
        self.cgroups.freeze()?;
        tracing::debug!(ms = ms(begun), "Frozen");
        let begun = Instant::now();
        if let Err(error) = self.network.disconnect() {
            self.thaw()?;
            return Err(error);
        }
        tracing::debug!(ms = ms(begun), "Taken off the network");
        self.paused = Some(Pause::default());
        Ok(())
    }

    fn thaw(&mut self) -> Result<()> {
        let begun = Instant::now();
        self.let_go();
        self.network.connect()?;
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

    fn restoring(&self) -> Restore<'_> {
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
        if self.init.is_some() && self.cgroups.is_nested()? {
            obstacles.push("The container made cgroups of its own below its own".to_owned());
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

/// Takes away what a runtime has made, when the next step fails before a [`Container`] exists.
struct Undo<'a> {
    place: &'a Place,
    runtime: Option<&'a Runtime>,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        let Some(runtime) = self.runtime else { return };
        let undone = Cgroups::of_place(self.place).and_then(|cgroups| cgroups.sweep());
        if let Err(error) = undone.and_then(|()| runtime.forget()) {
            tracing::error!(%error, "Cannot take a half made container away");
        }
    }
}

/// The runtime for a container that does not exist yet.
fn fresh_runtime(config: &KeeperConfig) -> Result<Runtime> {
    let runtime = Runtime::new(&config.tools.runc, runtime_id(&config.place)?);
    if runtime.exists() {
        return Err(ContainerError::State(format!(
            "runc has a container {} already",
            config.place.name
        )));
    }
    Ok(runtime)
}

fn interface<'a>(
    spec: &'a ContainerSpec,
    place: &Place,
) -> Option<(&'a crate::spec::Net, crate::spec::Mac)> {
    spec.net.as_ref().map(|net| (net, net.mac_of(&place.uuid)))
}

/// Writes a configuration where the runtime, the next session or the next keeper looks for it.
pub(crate) fn write_config(directory: &Path, name: &str, text: &[u8]) -> Result<()> {
    fs::create_dir_all(directory)
        .map_err(ContainerError::io(format!("make {}", directory.display())))?;
    let path = directory.join(name);
    fs::write(&path, text).map_err(ContainerError::io(format!("write {}", path.display())))
}
