//! The source's last step: CRIU dumps the frozen tree, without the memory that the page engine
//! moves, and leaves it frozen.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use decamp_shared::workload::Section;
use rust_criu::rust_criu_protobuf::rpc::{
    Criu_cg_mode, Criu_network_lock_method, Criu_opts, Criu_req_type,
};
use serde::{Deserialize, Serialize};

use crate::cgroup::{Cgroups, Setting};
use crate::error::{ContainerError, Result};
use crate::hiding::{HiddenRanges, Supervisor};
use crate::images;
use crate::memory::HiddenProcess;
use crate::mounts::ExternalMount;
use crate::swrk::Swrk;

/// The section of what CRIU does not know.
pub(crate) const STATE: &str = "container/state";
const STATE_VERSION: u32 = 1;
/// What CRIU calls the network namespace that it finds ready at the restore.
pub(crate) const NETWORK_KEY: &str = "extRootNetNS";
/// Deleted files that tasks still have open travel in the images up to this size.
const GHOST_LIMIT: u32 = 64 << 20;
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
    /// Limits of its cgroups.
    pub(crate) settings: Vec<Setting>,
}

/// What a dump needs to know.
pub(crate) struct Dump {
    pub(crate) criu: PathBuf,
    pub(crate) init: i32,
    pub(crate) cgroups: Cgroups,
    /// Inode of the network namespace.
    pub(crate) network: u64,
    pub(crate) mounts: Vec<ExternalMount>,
    /// Memory that CRIU shall not see; nothing when it shall dump all by itself.
    pub(crate) hidden: Option<HiddenRanges>,
    /// An empty directory.
    pub(crate) images: PathBuf,
}

/// A dump that goes on in a thread of its own, while the page engine reads memory.
pub(crate) struct Dumping(JoinHandle<Result<()>>);

impl Dumping {
    /// Waits until CRIU has let the tree go; the tree is frozen then, whatever came of the dump.
    pub(crate) fn finish(self) -> Result<()> {
        let panicked = |_| Err(ContainerError::State("The thread that dumps panicked".to_owned()));
        self.0.join().unwrap_or_else(panicked)
    }
}

impl Dump {
    /// Begins to dump. The thread is used for nothing else: the filter that hides memory stays on
    /// it, and on CRIU, and on nothing else.
    pub(crate) fn begin(self) -> Result<Dumping> {
        let thread = thread::Builder::new().name("dump".to_owned()).spawn(move || self.run());
        thread.map(Dumping).map_err(ContainerError::io("start a thread"))
    }

    fn run(self) -> Result<()> {
        let begun = Instant::now();
        let images = &self.images;
        let directory =
            File::open(images).map_err(ContainerError::io(format!("open {}", images.display())))?;
        let options = self.options(&directory)?;
        let dumped = self.criu(options);
        tell_log(&images.join(LOG));
        let answered = dumped.map_err(|error| with_log(error, &images.join(LOG)))?;
        tracing::debug!(ms = ms(begun), answered, "CRIU dumped");
        if !self.cgroups.is_frozen()? {
            return Err(ContainerError::State("The tree is not frozen after the dump".to_owned()));
        }
        Ok(())
    }

    /// Gives how many page scans were answered for the kernel.
    fn criu(&self, options: Criu_opts) -> Result<u64> {
        let supervisor = self.hidden.clone().map(Supervisor::install).transpose()?;
        let criu = Swrk::start(&self.criu, &[])?;
        criu.request(Criu_req_type::DUMP, options, |_| true)?;
        Ok(supervisor.map_or(0, |supervisor| supervisor.answered()))
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
        options.external.push(format!("net[{}]:{NETWORK_KEY}", self.network));
        options.external.extend(self.mounts.iter().map(ExternalMount::at_dump));
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
        serde_json::from_slice(&section.bytes)
            .map_err(|error| ContainerError::section(STATE, format!("makes no sense: {error}")))
    }
}

/// All sections of a dumped container.
pub(crate) fn sections(
    images: &Path,
    hidden: &[HiddenProcess],
    state: &ContainerState,
) -> Result<Vec<Section>> {
    let begun = Instant::now();
    let mut sections = images::collect(images)?;
    sections.push(images::hidden_section(hidden));
    sections.push(state.to_section()?);
    let bytes: usize = sections.iter().map(|section| section.bytes.len()).sum();
    tracing::debug!(ms = ms(begun), count = sections.len(), bytes, "Collected the images");
    Ok(sections)
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
