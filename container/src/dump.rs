//! The source's last step: CRIU dumps the frozen tree, without the memory that the page engine
//! moves, and leaves it frozen.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use decamp_shared::workload::Section;
use nix::sched::{CloneFlags, setns};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rust_criu::rust_criu_protobuf::rpc::{
    Criu_cg_mode, Criu_network_lock_method, Criu_opts, Criu_req_type,
};
use serde::{Deserialize, Serialize};

use crate::cgroup::{Cgroups, Setting};
use crate::confined::{self, MOUNTS_CAP};
use crate::error::{ContainerError, Result};
use crate::forked::{self, Aliases};
use crate::hiding::filter::Supervisor;
use crate::hiding::late::{Outcome, Wanted};
use crate::hiding::mounts::{self, Mounts};
use crate::hiding::{self, Hidden, Way};
use crate::images;
use crate::limits;
use crate::mappings;
use crate::memory::HiddenProcess;
use crate::mounts::ExternalMount;
use crate::obstacles;
use crate::segments::{self, Moved};
use crate::swrk::Swrk;
use crate::sys;
use crate::tmpfs::{self, Tree};

/// The section of what CRIU does not know.
pub(crate) const STATE: &str = "container/state";
/// 3: mounts have names of their own.
const STATE_VERSION: u32 = 3;
/// The section of what CRIU counted and timed, of a container that is written into a file.
pub(crate) const STATISTICS: &str = "container/statistics";
/// CRIU's file of them.
const STATISTICS_FILE: &str = "stats-dump";
/// What runtimes call the network namespace of a container, which they make before CRIU restores it.
pub(crate) const NETWORK: &str = "extRootNetNS";
/// Deleted files that tasks still have open travel in the images up to this size.
pub(crate) const GHOST_LIMIT: u32 = 64 << 20;
const LOG: &str = "dump.log";

/// What CRIU does not know of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ContainerState {
    /// What CRIU calls the pipe behind standard output and error.
    pub(crate) output: String,
    /// Owner of that pipe.
    pub(crate) output_owner: (u32, u32),
    /// Mounts from outside.
    pub(crate) mounts: Vec<ExternalMount>,
    /// What CRIU calls another pipe for output, and one for input: of a container that was adopted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) second_output: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) input: Option<String>,
    /// What of its input is not read yet, and whether that is the last of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) input_rest: Vec<u8>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) input_ended: bool,
    /// Limits of its cgroups.
    pub(crate) settings: Vec<Setting>,
    /// Whether it has a terminal, whose master is outside.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) terminal: bool,
    /// Whether pages that the page engine has copied may be of mappings that CRIU does not restore late.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) eager: bool,
}

/// What a dump needs to know.
pub(crate) struct Dump {
    pub(crate) criu: PathBuf,
    pub(crate) init: i32,
    pub(crate) cgroups: Cgroups,
    /// The network namespace.
    pub(crate) network: OwnedFd,
    /// Whether this is for a file, from which a runtime may restore it: then the images name the network
    /// namespace as runtimes do. Otherwise CRIU works in it, and takes it as given without a name: of one
    /// that is not its own it lists the host's connection tracking table twice, 23 ms for an empty one.
    pub(crate) for_file: bool,
    pub(crate) mounts: Vec<ExternalMount>,
    /// What else CRIU takes as given from outside, as it is told.
    pub(crate) external: Vec<String>,
    /// Memory that CRIU shall not see, and how; nothing when it shall dump all by itself.
    pub(crate) hidden: Option<(Way, Hidden)>,
    /// An empty directory.
    pub(crate) images: PathBuf,
    /// An empty directory for files that CRIU reads in place of the kernel's.
    pub(crate) covers: PathBuf,
    /// Whether it has a terminal, whose master is outside.
    pub(crate) terminal: bool,
}

/// A dump that goes on in a thread of its own, while the page engine reads memory.
pub(crate) struct Dumping {
    thread: JoinHandle<Result<()>>,
    call_off: Arc<EventFd>,
}

impl Dumping {
    /// Waits until CRIU has let the tree go; the tree is frozen then, whatever came of the dump.
    pub(crate) fn finish(self) -> Result<()> {
        let panicked = |_| Err(ContainerError::State("The thread that dumps panicked".to_owned()));
        self.thread.join().unwrap_or_else(panicked)
    }

    /// Has CRIU give it up, for nobody wants it, and waits until it has let the tree go. It is not
    /// killed, unless it is stuck: a task that it works in would be left with CRIU's code in it.
    pub(crate) fn call_off(self) -> Result<()> {
        self.call_off.write(1).map_err(ContainerError::errno("call a dump off"))?;
        self.finish()
    }
}

impl Dump {
    /// Begins to dump. The thread is used for nothing else: what hides memory, a filter or a mount namespace,
    /// stays on it, and on CRIU, and on nothing else; the same goes for the network namespace.
    pub(crate) fn begin(self) -> Result<Dumping> {
        let call_off = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(ContainerError::errno("make an event"))?;
        let call_off = Arc::new(call_off);
        let called_off = call_off.clone();
        let thread =
            thread::Builder::new().name("dump".to_owned()).spawn(move || self.run(&called_off));
        let thread = thread.map_err(ContainerError::io("start a thread"))?;
        Ok(Dumping { thread, call_off })
    }

    fn run(self, called_off: &Arc<EventFd>) -> Result<()> {
        let begun = Instant::now();
        let images = &self.images;
        let directory =
            File::open(images).map_err(ContainerError::io(format!("open {}", images.display())))?;
        let options = self.options(&directory)?;
        if !self.for_file {
            setns(&self.network, CloneFlags::CLONE_NEWNET)
                .map_err(ContainerError::errno("enter the network namespace"))?;
        }
        let dumped = self.criu(options, called_off);
        tell_log(&images.join(LOG));
        let answered = dumped.map_err(|error| with_log(error, &images.join(LOG)))?;
        tracing::debug!(ms = ms(begun), answered, "CRIU dumped");
        if !self.cgroups.is_frozen()? {
            return Err(ContainerError::State("The tree is not frozen after the dump".to_owned()));
        }
        self.check_deleted()
    }

    /// What is deleted may lie elsewhere than it did when it was last looked at. Nothing moves any more.
    fn check_deleted(&self) -> Result<()> {
        let ghosts = confined::ghosts(&self.images)?;
        match obstacles::astray(&ghosts, self.init)?.first() {
            Some(what) => Err(ContainerError::State(format!("{what}. The container runs on here"))),
            None => Ok(()),
        }
    }

    /// Gives how many of CRIU's calls were answered.
    fn criu(&self, options: Criu_opts, called_off: &Arc<EventFd>) -> Result<u64> {
        let pids = self.cgroups.processes()?;
        let limits = limits::are_out_of_reach(&pids);
        let way = match &self.hidden {
            Some((way, _)) => Some(*way),
            // For limits alone.
            None if limits && hiding::are_filtered(&pids) => Some(Way::Mounts),
            None => limits.then_some(Way::Filter),
        };
        let hidden = self.hidden.clone().map(|(_, hidden)| hidden).unwrap_or_default();
        self.cover_mappings(&pids);
        let (mut supervisor, mut mounts) = (None, None);
        match way {
            Some(Way::Filter) => {
                supervisor = Some(Supervisor::install(hidden, limits, called_off.clone())?);
            }
            Some(Way::Mounts) => {
                let wanted = limits || !hidden.segments.is_empty();
                let wanted = wanted.then_some(Wanted { init: self.init, limits });
                mounts = Some(Mounts::enter(hidden, wanted, called_off.clone())?);
            }
            None => {}
        }
        let filter = mounts.as_ref().and_then(Mounts::filter);
        let mut criu = Swrk::start(&self.criu, &[])?;
        if let Some(filter) = filter {
            filter.is_of(criu.pid());
        }
        criu.request(Criu_req_type::DUMP, options, None, Some(called_off), |_| true)
            .map_err(|error| filter.and_then(Outcome::failure).unwrap_or(error))?;
        filter.map_or(Ok(()), Outcome::check)?;
        let answered = mounts.as_ref().map_or(0, Mounts::answered);
        Ok(answered + supervisor.as_ref().map_or(0, Supervisor::answered))
    }

    /// Spares CRIU walks of page tables, which take the longer the more memory there is.
    fn cover_mappings(&self, pids: &[i32]) {
        let begun = Instant::now();
        let texts = mappings::of_large(pids);
        if texts.is_empty() {
            return;
        }
        let covered = mounts::alone().and_then(|()| mappings::cover(&texts, &self.covers));
        if let Err(error) = covered {
            // As true, only slower.
            tracing::warn!(%error, "CRIU reads the kernel's own lists of mappings");
        }
        tracing::debug!(ms = ms(begun), processes = texts.len(), "Listed mappings");
    }

    fn options(&self, images: &File) -> Result<Criu_opts> {
        let mut options = Criu_opts::new();
        options.set_images_dir_fd(images.as_raw_fd());
        options.set_log_file(LOG.to_owned());
        options.set_log_level(log_level());
        options.set_pid(self.init);
        // Left running, and the cgroup frozen as CRIU found it: so the tree stands still without
        // being stopped by signals, and a roll back is a thaw.
        options.set_leave_running(true);
        options.set_freeze_cgroup(self.cgroups.freezer()?.display().to_string());
        options.set_manage_cgroups(true);
        options.set_manage_cgroups_mode(Criu_cg_mode::IGNORE);
        options.set_tcp_established(true);
        options.set_tcp_skip_in_flight(true);
        // The interface is off the network already.
        options.set_network_lock(Criu_network_lock_method::SKIP);
        options.set_file_locks(true);
        options.set_ghost_limit(GHOST_LIMIT);
        options.set_orphan_pts_master(self.terminal);
        options.external.extend(self.mounts.iter().map(ExternalMount::at_dump));
        options.external.extend(self.external.iter().cloned());
        if self.for_file {
            let inode = sys::inode(self.network.as_fd())
                .map_err(ContainerError::io("look at the network namespace"))?;
            options.external.push(format!("net[{inode}]:{NETWORK}"));
        }
        Ok(options)
    }
}

impl ContainerState {
    /// As a section.
    pub(crate) fn to_section(&self) -> Result<Section> {
        let bytes = serde_json::to_vec(self).map_err(|error| {
            ContainerError::section(STATE, format!("cannot be written: {error}"))
        })?;
        Ok(Section { kind: STATE.to_owned(), version: STATE_VERSION, bytes })
    }

    /// From a section.
    pub(crate) fn from_section(section: &Section) -> Result<Self> {
        if section.version != STATE_VERSION {
            return Err(ContainerError::section(
                STATE,
                "has a version that this build does not know",
            ));
        }
        let state: Self = serde_json::from_slice(&section.bytes)
            .map_err(|error| ContainerError::section(STATE, format!("makes no sense: {error}")))?;
        match state.mounts.len() > MOUNTS_CAP {
            true => Err(ContainerError::section(
                STATE,
                format!("names more than {MOUNTS_CAP} mounts from outside"),
            )),
            false => Ok(state),
        }
    }
}

/// All sections of a dumped container.
pub(crate) fn sections(
    images: &Path,
    (hidden, aliases): (&[HiddenProcess], &Aliases),
    moved: &[Moved],
    trees: &[Tree],
    state: &ContainerState,
    for_file: bool,
) -> Result<Vec<Section>> {
    let begun = Instant::now();
    // In a file each has its place.
    let mut sections = images::collect(images, !for_file)?;
    if for_file {
        sections.push(statistics(&images.join(STATISTICS_FILE))?);
    }
    sections.push(images::hidden_section(hidden));
    sections.extend(forked::section(aliases));
    sections.push(segments::section(moved)?);
    sections.extend(tmpfs::section(trees));
    sections.push(state.to_section()?);
    let bytes: usize = sections.iter().map(|section| section.bytes.len()).sum();
    tracing::debug!(ms = ms(begun), count = sections.len(), bytes, "Collected the images");
    Ok(sections)
}

/// What CRIU tells of a dump, as it wrote it.
fn statistics(path: &Path) -> Result<Section> {
    let bytes = fs::read(path).map_err(ContainerError::io(format!("read {}", path.display())))?;
    Ok(Section { kind: STATISTICS.to_owned(), version: images::VERSION, bytes })
}

/// An error of CRIU with the errors that its log has.
pub(crate) fn with_log(error: ContainerError, log: &Path) -> ContainerError {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let errors: Vec<&str> = text
        .lines()
        // Without the right to raise limits CRIU says so, twice, and goes on.
        .filter(|line| line.contains("Error") && !line.contains("RLIMIT_NOFILE"))
        .collect();
    if errors.is_empty() {
        return error;
    }
    let last = errors[errors.len().saturating_sub(5)..].join("; ");
    match error {
        ContainerError::Criu { what, number, said } if said.is_empty() => {
            ContainerError::Criu { what, number, said: last }
        }
        ContainerError::Criu { what, number, said } => {
            ContainerError::Criu { what, number, said: format!("{said}; {last}") }
        }
        ContainerError::CriuProtocol(what) => {
            ContainerError::CriuProtocol(format!("{what}: {last}"))
        }
        other => other,
    }
}

/// CRIU's own log into ours, for who follows every step.
pub(crate) fn tell_log(log: &Path) {
    if tracing::enabled!(tracing::Level::TRACE) {
        let text = fs::read(log).unwrap_or_default();
        tracing::trace!("CRIU's log {}\n{}", log.display(), String::from_utf8_lossy(&text));
    }
}

/// How much CRIU writes into its log: all when somebody follows our own debug messages.
pub(crate) fn log_level() -> i32 {
    if tracing::enabled!(tracing::Level::TRACE) { 4 } else { 1 }
}

/// Milliseconds since `begun`.
pub(crate) fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1000.0
}
