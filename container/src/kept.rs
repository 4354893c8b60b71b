//! A container as its keeper holds it.
//!
//! Here the parts come together: the runtime starts a container, pause and resume freeze and thaw
//! it and its interface, save and load have CRIU dump and restore. How each of these is done is the
//! parts' own business.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use decamp_shared::keeper::{ExitSignal, Harvest, KeeperConfig, Kept};
use decamp_shared::methods::{Methods, Ways};
use decamp_shared::pages::{PageSet, SpaceId};
use decamp_shared::workload::{
    Liveness, Result as WorkloadResult, Section, SpaceInfo, WorkloadError,
};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::cgroup::{Cgroups, cgroups_path};
use crate::claim;
use crate::dump::{self, ContainerState, Dump, Dumping, ms};
use crate::error::{ContainerError, Result};
use crate::facts::{Facts, HostNeeds};
use crate::file_locks;
use crate::filling::{Filling, Holder};
use crate::foreign::Foreign;
use crate::forked::leaving::Forked;
use crate::hiding::{self, Hidden, HiddenRanges, Way};
use crate::images::PAGE_LIMIT;
use crate::init::Init;
use crate::input::Rest;
use crate::landed;
use crate::limits;
use crate::looking::Looking;
use crate::mappings;
use crate::memory::{self, HiddenProcess, Process};
use crate::mounts::{self, ExternalMount};
use crate::network::Network;
use crate::obstacles::{self, Subject};
use crate::podman;
use crate::podman::arrival::Arrival;
use crate::restore::{Restore, oci_directory};
use crate::runtime::Runtime;
use crate::segments::found::Segments;
use crate::segments::is_segment;
use crate::segments::landing::Landing;
use crate::spec::console;
use crate::store::Store;
use crate::streams::Streams;
use crate::swrk::Swrk;
use crate::terminal::Terminal;
use crate::throttle::Throttle;
use crate::tmpfs::{Tree, held};
use crate::tracker::{self, Tracker};
use crate::volumes;
use crate::ways::{self, Hiding};

/// How long the interface stays on the network after the tasks were frozen. What peers send at that
/// moment is acknowledged by the kernel and moves in the sockets' queues; were it lost, they would
/// send it again only after 200 ms, or 600. Longer than a round trip in a data centre; the pages that
/// exist are looked for meanwhile.
const LINGER: Duration = Duration::from_millis(4);
/// What has just been frozen is looked at again for so long at least, if that takes so long.
const GLANCE: Duration = Duration::from_millis(1);
/// Memory that comes late is there within this: it is on this host already.
const FILLED_WITHIN: Duration = Duration::from_secs(120);
/// A runtime that deletes what has ended is done with it within this.
const DELETED_WITHIN: Duration = Duration::from_millis(300);
/// A killed tree is gone within this.
const DEAD_WITHIN: Duration = Duration::from_secs(10);

/// A container and all that it has on this host. When it is dropped, nothing of it is left.
pub struct Container {
    pub(crate) config: KeeperConfig,
    pub(crate) exit: ExitSignal,
    pub(crate) bundle: Bundle,
    pub(crate) runtime: Runtime,
    pub(crate) network: Network,
    pub(crate) streams: Streams,
    /// Its terminal, where it has one and we hold it.
    pub(crate) terminal: Option<Terminal>,
    /// Set while it is one that somebody else started.
    pub(crate) foreign: Option<Foreign>,
    /// Set while it comes to podman.
    pub(crate) arrival: Option<Arrival>,
    /// What goes on until it is podman's alone, once it runs.
    pub(crate) settling: Option<JoinHandle<()>>,
    pub(crate) store: Store,
    pub(crate) cgroups: Cgroups,
    /// The runtime's state of the stand-in, until the real container has taken its place.
    pub(crate) stand_in: Option<Value>,
    /// A CRIU that waits in the container's cgroups to restore it.
    pub(crate) criu: Option<Swrk>,
    /// Ready to hold the descriptors behind memory that comes late, where it can.
    pub(crate) holder: Option<Holder>,
    /// Memory that comes late.
    pub(crate) filling: Option<Filling>,
    /// Nothing before a restore.
    pub(crate) init: Option<Init>,
    /// Which ways the host's configuration allows.
    pub(crate) methods: Methods,
    /// How its memory is hidden from CRIU when it leaves.
    pub(crate) hiding: Hiding,
    /// Why all memory is restored before it runs, when it is.
    pub(crate) eager: Option<String>,
    /// How it was restored, until it runs here.
    pub(crate) arrived: Option<Ways>,
    /// Its processes, as they were when its spaces were last asked for.
    pub(crate) known: Vec<Process>,
    /// Its shared memory, as it was when its spaces were last asked for and it ran.
    pub(crate) segments: Segments,
    /// Shared memory that comes.
    pub(crate) landing: Landing,
    /// While dirty pages are tracked.
    pub(crate) tracker: Option<Box<dyn Tracker>>,
    /// What its processes still share since a fork, while it is moved away.
    pub(crate) forked: Forked,
    pub(crate) throttle: Option<Throttle>,
    pub(crate) paused: Option<Pause>,
    pub(crate) over: bool,
}

/// What is known of a tree while it stands still.
#[derive(Default)]
pub(crate) struct Pause {
    /// What CRIU shall not see of processes.
    ranges: HiddenRanges,
    /// The look for pages, until they are found.
    looking: Option<Looking>,
    hidden: Option<Vec<HiddenProcess>>,
    harvested: bool,
    mounts: Vec<ExternalMount>,
    /// What is on tmpfs mounts that CRIU takes as given.
    trees: Vec<Tree>,
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

    /// Begins to look for the pages of all processes whose memory is hidden from CRIU, and gives them.
    fn begin_look(&mut self) -> Result<Vec<Process>> {
        let processes = if self.hiding.is_ok() { self.processes()? } else { Vec::new() };
        let mapped = processes.iter().map(HiddenProcess::mapped).collect::<Result<Vec<_>>>()?;
        let paused = self.paused.as_mut().ok_or_else(not_paused)?;
        paused.ranges = hiding::ranges(&mapped);
        paused.looking = Some(Looking::begin(self.tracker.take(), mapped)?);
        Ok(processes)
    }

    /// What is hidden of each process, found once in each pause.
    fn hidden(&mut self) -> Result<&[HiddenProcess]> {
        let paused = self.paused.as_mut().ok_or_else(not_paused)?;
        if let Some(looking) = paused.looking.take() {
            let (tracker, found) = looking.finish();
            self.tracker = tracker;
            paused.hidden = Some(found?);
        }
        let not_found = || ContainerError::State("Nobody knows which pages exist".to_owned());
        paused.hidden.as_deref().ok_or_else(not_found)
    }

    /// The container as it is looked at for what speaks against a move.
    fn subject(&self, init: i32) -> Result<Subject<'_>> {
        let mut pipes = vec![self.streams.key()?];
        pipes.extend(self.streams.input_key()?);
        if let Some(foreign) = &self.foreign {
            pipes.extend(foreign.streams.outputs.iter().chain(&foreign.streams.input).cloned());
        }
        let (cgroups, bundle, network) = (&self.cgroups, &self.bundle, &self.network);
        Ok(Subject { init, cgroups, bundle, network, pipes })
    }

    fn freeze(&mut self) -> Result<()> {
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
            let filtered = scope.spawn(|| hiding::are_filtered(&pids));
            (self.begin_look(), filtered.join().unwrap_or(true))
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
            (Ok(_), Some(limit), Some(used)) => self.forked.check(&self.processes()?, used, limit),
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
    fn thaw(&mut self) -> Result<()> {
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
    fn note_that_it_runs(&mut self) {
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

    /// Ends a CRIU that still has its hands on the tree; nobody wants what it dumps.
    pub(crate) fn let_go(&mut self) {
        let dumping = self.paused.as_mut().and_then(|paused| paused.dumping.take());
        if let Some(Err(error)) = dumping.map(Dumping::call_off) {
            tracing::debug!(%error, "A dump that nobody wanted any more failed");
        }
    }

    /// Waits until all memory of the last move is in its place.
    fn await_memory(&mut self) -> Result<()> {
        if let Some(filling) = &self.filling {
            filling.wait(FILLED_WITHIN)?;
            self.filling = None;
        }
        if let Some(settling) = self.settling.take() {
            let _ = settling.join();
        }
        Ok(())
    }

    /// Has CRIU begin to dump, unless it did in this pause.
    fn begin_dump(&mut self) -> Result<()> {
        let (init, terminal) = (self.init()?.pid(), self.has_terminal());
        let Some(paused) = &mut self.paused else { return Ok(()) };
        if paused.dumping.is_some() {
            return Ok(());
        }
        paused.mounts = mounts::external(&self.bundle, init)?;
        // Some of them may turn out to be CRIU's, and their files with them.
        paused.trees = self.segments.trees();
        let hidden = Hidden { ranges: paused.ranges.clone(), segments: self.segments.hidden() };
        let dump = Dump {
            criu: self.config.tools.criu.clone(),
            init,
            cgroups: self.cgroups.clone(),
            network: self.network.namespace_again()?,
            for_file: ways::is_for_file(&self.methods),
            mounts: paused.mounts.clone(),
            external: paused.trees.iter().map(Tree::at_dump).collect(),
            hidden: self.hiding.as_ref().ok().map(|way| (*way, hidden)),
            images: self.store.fresh_images()?,
            covers: self.store.fresh_covers()?,
            terminal,
        };
        paused.dumping = Some(dump.begin()?);
        Ok(())
    }

    fn dump(&mut self) -> Result<Vec<Section>> {
        let begun = Instant::now();
        self.begin_dump()?;
        let terminal = self.has_terminal();
        self.hidden()?;
        let paused = self.paused.as_mut().ok_or_else(not_paused)?;
        paused.dumping.take().ok_or_else(not_paused)?.finish()?;
        let mut state = ContainerState {
            output: self.streams.key()?,
            output_owner: self.streams.owner()?,
            mounts: paused.mounts.clone(),
            second_output: None,
            input: self.streams.input_key()?,
            input_rest: Vec::new(),
            input_ended: false,
            settings: self.cgroups.settings(),
            terminal,
            eager: false,
        };
        if let Some(foreign) = &self.foreign {
            foreign.streams.enter(&mut state);
        }
        let pids = self.cgroups.processes()?;
        let rest = state.input.as_ref().map(|key| Rest::of(&pids, key)).transpose()?.flatten();
        match rest {
            Some(rest) => (state.input_rest, state.input_ended) = (rest.bytes, rest.ended),
            // Nobody has it any more.
            None => state.input = None,
        }
        let images = self.store.images();
        let hidden = paused.hidden.as_deref().unwrap_or_default();
        let aliases = self.forked.aliases();
        if !paused.harvested && !aliases.is_empty() {
            return Err(ContainerError::State(
                "What its processes share was not looked at since it stands still".to_owned(),
            ));
        }
        let (moved, for_file) = (self.segments.moved(), ways::is_for_file(&self.methods));
        let hidden = (hidden, &aliases);
        let sections = dump::sections(&images, hidden, &moved, &paused.trees, &state, for_file);
        // The images are in the sections now; twice would be twice the memory.
        self.store.drop_images();
        tracing::debug!(ms = ms(begun), "Saved");
        sections
    }

    fn restore(&mut self, sections: Vec<Section>) -> Result<()> {
        let begun = Instant::now();
        let restored_before =
            || ContainerError::State("The container was restored before".to_owned());
        self.stand_in.as_ref().ok_or_else(restored_before)?;
        let criu = match self.criu.take() {
            None => podman::criu(self)?,
            Some(criu) => criu,
        };
        let stand_in = self.stand_in.as_ref().ok_or_else(restored_before)?;
        let holder = self.holder.take();
        let restored = self.restoring().run(criu, sections, holder)?;
        self.filling = restored.filling;
        let eager = self.eager.as_deref().unwrap_or("the source hid nothing from CRIU");
        let eager = self.filling.is_none().then_some(eager);
        self.arrived = Some(ways::arrived(eager, restored.forked));
        let mut terminal = restored.terminal;
        if self.arrival.is_none() {
            self.terminal = self.keep_terminal(terminal.take())?;
        }
        let (init, config) = match &self.arrival {
            None => {
                let init = Init::watch(restored.init, &self.exit)?;
                let namespace = format!("/proc/{}/ns/net", init.pid());
                let path = cgroups_path(&self.config.place)?;
                (init, self.bundle.for_runtime(&namespace, &path))
            }
            Some(arrival) => (podman::watch(restored.init, &self.exit)?, arrival.config().clone()),
        };
        self.runtime.adopt(stand_in, init.pid(), &self.bundle, &config)?;
        if let Some(arrival) = &mut self.arrival {
            arrival.restored(init.pid(), terminal)?;
        }
        self.init = Some(init);
        self.stand_in = None;
        tracing::debug!(ms = ms(begun), "Loaded");
        Ok(())
    }

    fn has_terminal(&self) -> bool {
        self.terminal.is_some()
            || self.foreign.as_ref().is_some_and(|foreign| foreign.streams.terminal)
    }

    fn keep_terminal(&self, master: Option<OwnedFd>) -> Result<Option<Terminal>> {
        let place = &self.config.place;
        master.map(|master| Terminal::keep(master, &place.log(), &console(place))).transpose()
    }

    pub(crate) fn restoring(&self) -> Restore<'_> {
        Restore {
            criu: &self.config.tools.criu,
            bundle: &self.bundle,
            cgroups: &self.cgroups,
            network: &self.network,
            streams: &self.streams,
            store: &self.store,
            landing: &self.landing,
            forked: self.methods.forked,
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
        // Nobody waits for memory any more.
        self.filling = None;
        self.landing.clear();
        self.streams.finish();
        self.terminal = None;
        self.arrival = None;
        self.cgroups.remove()?;
        self.runtime.forget()?;
        claim::give_back(&self.config.place)?;
        let _ = fs::remove_dir_all(oci_directory(&self.config.place));
        self.store.empty();
        self.over = true;
        tracing::debug!(ms = ms(begun), "Taken away");
        Ok(())
    }

    fn end(&mut self, grace: Duration) -> Result<()> {
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

    /// Bytes on the tmpfs mounts that it has for itself, as far as that can be told.
    fn on_tmpfs(&self) -> u64 {
        let Some(init) = self.init.as_ref().map(Init::pid) else { return 0 };
        let given = mounts::external(&self.bundle, init);
        let own = given.and_then(|given| held::own(init, &given));
        own.unwrap_or_default().iter().map(|own| own.used(init)).sum()
    }

    fn gather_facts(&mut self) -> Result<Facts> {
        self.note_that_it_runs();
        // A move begins so.
        mappings::prepare();
        let pids = match &self.init {
            Some(_) => self.cgroups.processes()?,
            None => Vec::new(),
        };
        let init = self.init.as_ref().map_or(0, Init::pid);
        let mut obstacles = self.bundle.move_obstacles();
        let found = volumes::found(&self.bundle);
        if obstacles.is_empty() && found.obstacles.is_empty() {
            let bundle = self.bundle.clone().with_volumes(&found.volumes);
            obstacles.extend(landed::obstacle(&bundle));
        }
        obstacles.extend(ways::obstacles(&self.methods, &self.hiding));
        obstacles.extend(limits::obstacle(&pids));
        if self.init.is_some() {
            obstacles.extend(self.subject(init)?.look()?);
            obstacles.extend(mounts::obstacles(&self.bundle, init)?);
            obstacles.extend(volumes::obstacles(&self.bundle, init)?);
            if self.cgroups.is_nested()? {
                obstacles.push("The container made cgroups of its own below its own".to_owned());
            }
        }
        let processes = memory::processes(&pids, init)?;
        let processes: BTreeMap<i32, i32> =
            processes.iter().map(|process| (process.inner, process.pid)).collect();
        let highest = processes.keys().next_back().copied().unwrap_or(0);
        Ok(Facts {
            host: HostNeeds::of_processes(&pids, highest),
            container: self.runtime.id().to_owned(),
            init,
            processes,
            cgroup: self.cgroups.freezer()?.to_owned(),
            memory_limit: self.cgroups.memory_limit(),
            on_tmpfs: self.on_tmpfs(),
            resident: pids.iter().map(|pid| memory::resident(*pid)).sum(),
            unhidden: self.hiding.clone().err(),
            obstacles,
            locks: file_locks::held(&pids, &self.bundle, init),
        })
    }
}

fn not_paused() -> ContainerError {
    ContainerError::State("The container is not paused".to_owned())
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
        let is_mapped = self.bundle.mapped_root().is_some();
        let leaving = || ways::leaving(&self.methods, &self.hiding, is_mapped);
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
        // Root in a user namespace may not open what would be ours.
        let is_mapped = self.bundle.mapped_root().is_some();
        if self.paused.is_none() && moved && !is_mapped {
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
            let restoring = self.forked.restoring(&processes, used, limit);
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
        // Once it runs again: the kernel takes a moment to forget what was protected.
        self.tracker = None;
        self.forked = Forked::new(self.methods.forked);
        // Held open it would stay when the container lets go of it.
        self.segments.forget();
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
        self.network.announce();
        self.arrived = None;
        if let Some(settling) = settling {
            settling.runs(self);
        }
        tracing::debug!(ms = ms(begun), "Activated");
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
