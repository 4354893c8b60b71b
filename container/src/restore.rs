//! The destination's work: an empty shell beforehand, then CRIU's restore into a frozen cgroup.
//!
//! The shell is a stand-in container that the runtime makes and whose process is killed at once: what
//! remains are cgroups with the container's limits, made by this host's own runtime, and the
//! runtime's state in this host's own form. The restored tree takes its place.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use decamp_shared::methods::ForkedChoice;
use decamp_shared::workload::Section;
use nix::sched::{CloneFlags, setns};
use rust_criu::rust_criu_protobuf::rpc::{
    Criu_cg_mode, Criu_network_lock_method, Criu_opts, Criu_req_type, Inherit_fd,
};

use crate::bundle::Bundle;
use crate::cgroup::{Cgroups, Setting};
use crate::confined::Confined;
use crate::dump::{ContainerState, NETWORK, STATE, STATISTICS, log_level, ms, tell_log, with_log};
use crate::error::{ContainerError, Result};
use crate::filling::{self, Descent, Filling, Holder, Settling};
use crate::forked::arriving::{Arriving, Late};
use crate::forked::{self, Aliases};
use crate::images::{self, HiddenPages};
use crate::input;
use crate::landed::Landed;
use crate::mounts::Given;
use crate::network::Network;
use crate::owned::{self, Planned};
use crate::runtime::{Runtime, Written};
use crate::segments::landing::Landing;
use crate::segments::{self, Moved, system_v};
use crate::store::Store;
use crate::streams::Streams;
use crate::swrk::{Notice, Swrk};
use crate::sys;
use crate::tmpfs::{self, Tree};

const LOG: &str = "restore.log";
/// Tasks that CRIU has let go are in the freezer within this.
const STILL_WITHIN: Duration = Duration::from_secs(5);

/// What stands ready before any state has come.
pub(crate) struct Shell {
    /// Cgroups with the limits of the configuration.
    pub(crate) cgroups: Cgroups,
    pub(crate) stand_in: StandIn,
}

/// What is left of a stand-in.
pub(crate) struct StandIn {
    /// What the runtime has written down of it.
    pub(crate) written: Written,
    /// The cgroup namespace that it was in, where the container has one of its own.
    cgroup_namespace: Option<OwnedFd>,
}

/// A restored container, frozen.
pub(crate) struct Restored {
    /// Its first process, a child of this one.
    pub(crate) init: i32,
    /// Its memory, where that comes late.
    pub(crate) filling: Option<Filling>,
    /// What became of pages that forked processes shared, where that is worth a word.
    pub(crate) forked: Option<String>,
    /// The master of its terminal, if it has one.
    pub(crate) terminal: Option<OwnedFd>,
    /// Its network, where that is of its own user namespace, off the network.
    pub(crate) network: Option<Network>,
}

/// What CRIU has restored.
struct Made {
    init: i32,
    terminal: Option<OwnedFd>,
    network: Option<Network>,
}

/// What a restore needs to know.
pub(crate) struct Restore<'a> {
    pub(crate) criu: &'a Path,
    pub(crate) bundle: &'a Bundle,
    pub(crate) cgroups: &'a Cgroups,
    pub(crate) network: &'a Network,
    /// Set where its user namespace is to have one of its own instead.
    pub(crate) planned: Option<&'a Planned>,
    pub(crate) streams: &'a Streams,
    pub(crate) store: &'a Store,
    /// Shared memory that has come.
    pub(crate) landing: &'a Landing,
    /// What becomes of pages that forked processes still share.
    pub(crate) forked: ForkedChoice,
    /// Where what is restored has its cgroup namespace from: CRIU makes none when it leaves cgroups alone.
    pub(crate) cgroup_namespace: Option<BorrowedFd<'a>>,
}

impl StandIn {
    /// The cgroup namespace for the container in its place, if it has one of its own.
    pub(crate) fn cgroup_namespace(&self) -> Option<BorrowedFd<'_>> {
        self.cgroup_namespace.as_ref().map(AsFd::as_fd)
    }
}

impl Shell {
    /// Has `runtime` make the stand-in in `store`, and ends its process.
    pub(crate) fn make(
        runtime: &Runtime,
        bundle: &Bundle,
        network: &Network,
        cgroups_path: &str,
        streams: &Streams,
        store: &Store,
    ) -> Result<Self> {
        let begun = Instant::now();
        let directory = store.scratch("stand-in")?;
        let root = directory.join("rootfs");
        let program = root.join("stand-in");
        let config = bundle.for_stand_in(&network.path(), cgroups_path, &root);
        let write = || -> std::io::Result<()> {
            fs::create_dir(&root)?;
            fs::write(&program, "")?;
            fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
            // Who makes mount points in it is root in the container only.
            if let Some((user, group)) = bundle.mapped_root() {
                std::os::unix::fs::chown(&root, Some(user), Some(group))?;
            }
            fs::write(directory.join("config.json"), config.to_string())
        };
        write().map_err(ContainerError::io("make a stand-in's bundle"))?;
        let hidden = runtime.hidden_in(&directory.join("state"));
        let init = hidden.create(&directory, streams.write_end()?, None)?;
        // While it lives: not every runtime notes the cgroups.
        let found = hidden.written().and_then(|written| {
            let cgroup_namespace = cgroup_namespace(bundle, init)?;
            Ok((hidden.cgroups(&written.state, init)?, StandIn { written, cgroup_namespace }))
        });
        let ended = sys::pidfd_open(init)
            .and_then(|process| sys::pidfd_kill(process.as_fd()))
            .and_then(|()| sys::reap(init));
        // However it ended: killed, or by itself a moment before.
        let _how = ended.map_err(ContainerError::io("end the stand-in's process"))?;
        let (cgroups, stand_in) = found?;
        fs::remove_dir_all(&directory).map_err(ContainerError::io("remove the stand-in"))?;
        tracing::debug!(ms = ms(begun), "Made a stand-in");
        Ok(Self { cgroups, stand_in })
    }
}

impl Restore<'_> {
    /// Starts the CRIU that will restore, so that it is there when the state comes. What it makes is
    /// born in the container's cgroups, its network and its cgroup namespace, because it is in them itself.
    pub(crate) fn begin(&self) -> Result<Swrk> {
        let begun = Instant::now();
        let inherited = self.inherited()?;
        let criu = self.network.inside(|| {
            if let Some(namespace) = self.cgroup_namespace {
                setns(namespace, CloneFlags::CLONE_NEWCGROUP)
                    .map_err(ContainerError::errno("enter the cgroup namespace"))?;
            }
            Swrk::start_waiting(self.criu, &inherited)
        })?;
        self.cgroups.enter(criu.pid())?;
        tracing::debug!(ms = ms(begun), "CRIU waits");
        Ok(criu)
    }

    /// Descriptors that a CRIU needs, under the numbers that they have here.
    pub(crate) fn inherited(&self) -> Result<Vec<BorrowedFd<'_>>> {
        let streams = self.streams;
        let mut inherited = vec![streams.write_end()?, streams.second_end()?, streams.input_end()];
        inherited.push(self.network.namespace());
        inherited.extend(self.landing.inherited().map(|(_, descriptor)| descriptor));
        Ok(inherited)
    }

    /// Has `criu` restore a container from its sections, frozen. With a holder, memory comes late. On
    /// an error no process of it is left.
    pub(crate) fn run(
        &self,
        criu: Swrk,
        sections: Vec<Section>,
        holder: Option<Holder>,
    ) -> Result<Restored> {
        let begun = Instant::now();
        let images = self.store.fresh_images()?;
        let others = images::unpack(sections, &images)?;
        let Rest { state, hidden, aliases, spare, moved, trees } = use_up(others)?;
        let mut given = self.landing.plant(&trees)?;
        let owner = |owner| self.bundle.outside(owner);
        let seals = self.landing.enter(&images, &moved, self.store, owner)?;
        // A source that could not hide anything has CRIU's own images hold it all.
        let holder = holder.filter(|_| !hidden.is_empty() && !state.eager);
        // While it restores CRIU is one of the tasks too.
        let (tasks, settings): (Vec<_>, Vec<_>) =
            state.settings.iter().cloned().partition(Setting::limits_tasks);
        self.cgroups.apply(&settings)?;
        let behind = filling::comes_behind(self.planned.is_some());
        let arriving = Arriving {
            images: &images,
            store: self.store,
            linked: moved.iter().any(|segment| segment.system_v),
            limit: self.cgroups.memory_limit(),
            swap: self.cgroups.swap_allowance(),
            choice: self.forked,
            behind,
            spare,
        };
        let (filling, behind, forked) = match holder {
            Some(holder) => {
                let Late { pages, absent, huge, spent, note } = arriving.late(hidden, &aliases)?;
                let behind = behind.then(|| (pages.clone(), absent));
                let late = (pages, huge);
                let filling = Filling::begin(&images, self.store, late, spent, holder)?;
                (Some(filling), behind, note)
            }
            None => (None, None, arriving.eager(&hidden, &aliases)?),
        };
        let settling = behind.as_ref().map(|(late, absent)| Settling {
            images: &images,
            store: self.store,
            late,
            absent,
        });
        self.cgroups.apply(&tasks.iter().map(Setting::lifted).collect::<Vec<_>>())?;
        self.streams.give_to(state.output_owner)?;
        if self.planned.is_some() {
            owned::enter(&images)?;
        }
        let mut landed = Landed::mount(self.bundle, self.store)?;
        landed.add_parts(&state.mounts, self.store)?;
        for mount in &state.mounts {
            given.push(mount.at_restore(self.bundle, &landed, self.cgroups)?);
        }
        Confined { bundle: self.bundle, root: landed.root(), given: &given }.check(&images)?;
        tracing::debug!(ms = ms(begun), "Unpacked and completed the images");
        let begun = Instant::now();
        let late = filling.as_ref().map(|filling| (filling, settling.as_ref()));
        let outcome = self.request(criu, &images, &state, (&landed, &given), late);
        let outcome = outcome.and_then(|made| {
            let init = made.init;
            self.await_stillness()?;
            self.cgroups.apply(&tasks)?;
            seals.set()?;
            system_v::destroy_again(&images, init)?;
            if let Some(filling) = &filling {
                filling.guard(init)?;
                filling.await_places()?;
            }
            Ok(made)
        });
        tell_log(&images.join(LOG));
        tracing::debug!(ms = ms(begun), fine = outcome.is_ok(), "CRIU restored");
        let restored = outcome.map_err(|error| {
            let error = with_log(error, &images.join(LOG));
            // CRIU kills what it has made; when it was CRIU that died, we do.
            if let Err(error) = self.cgroups.kill_all().and_then(|()| self.cgroups.thaw()) {
                tracing::warn!(%error, "Cannot clean up after a failed restore");
            }
            error
        });
        let Made { init, terminal, network } = restored?;
        Ok(Restored { init, filling, forked, terminal, network })
    }

    fn request(
        &self,
        mut criu: Swrk,
        images: &Path,
        state: &ContainerState,
        (landed, given): (&Landed, &[Given]),
        late: Option<(&Filling, Option<&Settling<'_>>)>,
    ) -> Result<Made> {
        let directory =
            File::open(images).map_err(ContainerError::io(format!("open {}", images.display())))?;
        let mut options = self.options(&directory, state, landed)?;
        options.external.extend(given.iter().map(Given::told));
        let settling = late.and_then(|(_, settling)| settling);
        options.set_lazy_pages(late.is_some() && settling.is_none());
        options.inherit_fd.push(inherit(&state.output, self.streams.write_end()?.as_raw_fd()));
        if let Some(key) = &state.second_output {
            options.inherit_fd.push(inherit(key, self.streams.second_end()?.as_raw_fd()));
        }
        // Images that are for a file name it, and those of other runtimes.
        options.inherit_fd.push(inherit(NETWORK, self.network.namespace().as_raw_fd()));
        if let Some(key) = &state.input {
            options.inherit_fd.push(inherit(key, self.streams.input_end().as_raw_fd()));
            let (bytes, ended) = (state.input_rest.clone(), state.input_ended);
            self.streams.give_input(&input::Rest { bytes, ended })?;
        }
        let segments = self.landing.inherited();
        options.inherit_fd.extend(segments.map(|(key, file)| inherit(&key, file.as_raw_fd())));
        let mut holding = Holding {
            cgroups: self.cgroups,
            planned: self.planned,
            settling,
            init: 0,
            network: None,
            descent: None,
            aside: None,
        };
        let (mut held, mut terminals) = (Ok(()), Vec::new());
        // Without its memory CRIU would wait for ever.
        let given_up = late.map(|(filling, _)| &**filling.failed());
        let into = Some(self.cgroups);
        let outcome = criu.request(Criu_req_type::RESTORE, options, into, given_up, |notice| {
            tracing::trace!(step = notice.step, "CRIU");
            match notice.step {
                "pre-restore" => held = holding.follow(&notice),
                "setup-namespaces" => held = holding.begin(&notice),
                "orphan-pts-master" => terminals.extend(notice.descriptor),
                "pre-resume" => held = holding.hold(),
                _ => {}
            }
            held.is_ok()
        });
        if outcome.is_err() {
            self.kill_what_is_held();
        }
        drop(criu);
        held?;
        let (init, network) = (outcome?.pid, holding.network);
        let wrong = |what: &str| Err(ContainerError::CriuProtocol(what.to_owned()));
        match (init, terminals.len(), state.terminal) {
            (..=0, ..) => wrong("restored no process"),
            // Nobody has to have had it open.
            (_, 0, _) | (_, 1, true) => Ok(Made { init, terminal: terminals.pop(), network }),
            // What stands still is killed for it.
            _ => wrong("restored more terminals than there were"),
        }
    }

    /// A CRIU that is stuck holds tasks that would run if it was killed before them.
    fn kill_what_is_held(&self) {
        let frozen = self.cgroups.freeze_when_free();
        let killed = self.cgroups.kill_all().and_then(|()| self.cgroups.thaw());
        if let Err(error) = frozen.and(killed) {
            tracing::warn!(%error, "Cannot kill what a failed restore left");
        }
    }

    fn await_stillness(&self) -> Result<()> {
        let begun = Instant::now();
        while !self.cgroups.is_frozen()? {
            if begun.elapsed() > STILL_WITHIN {
                return Err(ContainerError::State("The restored tasks are not still".to_owned()));
            }
            thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    fn options(&self, images: &File, state: &ContainerState, landed: &Landed) -> Result<Criu_opts> {
        let mut options = Criu_opts::new();
        options.set_images_dir_fd(images.as_raw_fd());
        options.set_log_file(LOG.to_owned());
        options.set_log_level(log_level());
        options.set_root(landed.root().display().to_string());
        options.set_rst_sibling(true);
        options.set_notify_scripts(true);
        options.set_evasive_devices(true);
        options.set_manage_cgroups(true);
        options.set_manage_cgroups_mode(Criu_cg_mode::IGNORE);
        options.set_tcp_established(true);
        options.set_network_lock(Criu_network_lock_method::SKIP);
        options.set_file_locks(true);
        options.set_orphan_pts_master(state.terminal);
        if self.planned.is_some() {
            Planned::ask(&mut options);
        }
        Ok(options)
    }
}

/// What comes beside CRIU's images.
struct Rest {
    state: ContainerState,
    hidden: HiddenPages,
    aliases: Aliases,
    spare: Option<Duration>,
    moved: Vec<Moved>,
    trees: Vec<Tree>,
}

/// Every section that is no image.
fn use_up(others: Vec<Section>) -> Result<Rest> {
    let (mut state, mut hidden, mut moved, mut trees) = (None, None, None, None);
    let (mut aliases, mut spare) = (None, None);
    for section in others {
        match section.kind.as_str() {
            STATE if state.is_none() => state = Some(ContainerState::from_section(&section)?),
            images::HIDDEN if hidden.is_none() => hidden = Some(images::read_hidden(&section)?),
            segments::SEGMENTS if moved.is_none() => {
                moved = Some(segments::read_section(&section)?);
            }
            forked::FORKED if aliases.is_none() => aliases = Some(section),
            forked::SPARE if spare.is_none() => spare = Some(forked::read_spare(&section)?),
            tmpfs::TREES if trees.is_none() => trees = Some(tmpfs::read_section(&section)?),
            // For people.
            STATISTICS => {}
            _ => {
                return Err(ContainerError::section(
                    section.kind,
                    "is not known here, or came twice",
                ));
            }
        }
    }
    let missing = |kind: &str| ContainerError::section(kind, "is missing");
    let hidden = hidden.ok_or_else(|| missing(images::HIDDEN))?;
    // Without it what CRIU found empty would be zeros.
    let moved = moved.ok_or_else(|| missing(segments::SEGMENTS))?;
    let state = state.ok_or_else(|| missing(STATE))?;
    // One that shares nothing says nothing.
    let aliases = aliases.map(|section| forked::read_section(&section, &hidden)).transpose()?;
    let (aliases, trees) = (aliases.unwrap_or_default(), trees.unwrap_or_default());
    Ok(Rest { state, hidden, aliases, spare, moved, trees })
}

/// How the restored tasks come to stand still: CRIU, in whose cgroup they are born, leaves it, and
/// what stays is frozen.
struct Holding<'a> {
    cgroups: &'a Cgroups,
    /// The network that is to come into the first task's namespace, and once it is there.
    planned: Option<&'a Planned>,
    network: Option<Network>,
    /// Memory that comes late without CRIU, the first task that it comes to, and what knows them all.
    settling: Option<&'a Settling<'a>>,
    init: i32,
    descent: Option<Descent>,
    /// The thread that sees to that, or why there is none.
    aside: Option<Result<JoinHandle<Result<()>>>>,
}

impl Holding<'_> {
    /// CRIU is about to fork.
    fn follow(&mut self, notice: &Notice<'_>) -> Result<()> {
        self.descent = self.settling.map(|_| Descent::begin(notice.criu)).transpose()?;
        Ok(())
    }

    /// The first task exists, and all others will be its children, so CRIU itself need not stay.
    /// On v1 a change of cgroup waits for the kernel (20 ms): let that be while CRIU works. It heeds a
    /// refusal here.
    fn begin(&mut self, notice: &Notice<'_>) -> Result<()> {
        let (cgroups, criu) = (self.cgroups.clone(), notice.criu);
        let thread = thread::Builder::new().name("aside".to_owned());
        let started = thread.spawn(move || cgroups.step_aside(criu));
        self.init = notice.init;
        self.aside = Some(started.map_err(ContainerError::io("start a thread")));
        let begun = Instant::now();
        self.network = self.planned.map(|planned| planned.make(notice.init)).transpose()?;
        if self.network.is_some() {
            tracing::debug!(ms = ms(begun), "Made its network");
        }
        Ok(())
    }

    /// All tasks are restored and held by CRIU: their cgroup is frozen now, so that letting them go
    /// does not let them run.
    ///
    /// CRIU does not heed a refusal at this step. So on an error everything is killed while it is
    /// still held: killed tasks run nothing. If this process dies here, CRIU waits for its answer and
    /// holds them until they are swept.
    fn hold(&mut self) -> Result<()> {
        tracing::debug!("CRIU holds the restored tasks");
        fail::fail_point!("container-hold");
        let never =
            || ContainerError::CriuProtocol("never said that it made namespaces".to_owned());
        let aside = self.aside.take().unwrap_or_else(|| Err(never())).and_then(|aside| {
            aside
                .join()
                .unwrap_or_else(|_| Err(ContainerError::State("A thread panicked".to_owned())))
        });
        let held = aside.and_then(|()| self.settle());
        let held = held.and_then(|()| self.cgroups.freeze_when_free());
        if held.is_err() {
            self.cgroups.kill_all()?;
        }
        held
    }

    fn settle(&mut self) -> Result<()> {
        let Some(settling) = self.settling else { return Ok(()) };
        let begun = Instant::now();
        let never = || ContainerError::CriuProtocol("never said that it would restore".to_owned());
        let descent = self.descent.take().ok_or_else(never)?;
        descent.settle(&self.cgroups.processes()?, self.init, settling)?;
        tracing::debug!(ms = ms(begun), "Memory will come late, without CRIU");
        Ok(())
    }
}

/// The cgroup namespace of process `init`, where that has one of its own by its configuration.
fn cgroup_namespace(bundle: &Bundle, init: i32) -> Result<Option<OwnedFd>> {
    if !bundle.hides_cgroups() {
        return Ok(None);
    }
    let path = format!("/proc/{init}/ns/cgroup");
    let file = File::open(&path).map_err(ContainerError::io(format!("open {path}")))?;
    Ok(Some(file.into()))
}

fn inherit(key: &str, descriptor: i32) -> Inherit_fd {
    let mut inherit = Inherit_fd::new();
    inherit.set_key(key.to_owned());
    inherit.set_fd(descriptor);
    inherit
}

/// Where the configuration that a container was started with is kept, and the one for the runtime.
pub(crate) fn oci_directory(place: &decamp_shared::workload::Place) -> PathBuf {
    place.dir.join("oci")
}
