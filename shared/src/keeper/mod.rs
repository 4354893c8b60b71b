//! The keeper: a small process that lives as long as its workload and holds all that must not die
//! with the agent.
//!
//! A VM's keeper is its VMM; a container's keeper holds its streams, exit status, freezer and page
//! store. Both implement [`Kept`] and are driven by [`server::serve`] over one local protocol; the
//! agent speaks to them through [`client::KeeperClient`]. A keeper serves one connection at a time
//! and reads it to its end before it takes the next, so whatever a dead agent still asked for is
//! done or refused before a new agent is told what state the workload is in.

pub mod client;
pub mod ends;
pub mod processes;
pub mod protocol;
pub mod server;
pub mod spawn;
pub mod switched;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::methods::{Methods, Ways};
use crate::pages::{PageSet, SpaceId};
use crate::workload::{
    HostTools, Kind, Liveness, Place, Restoring, Result, Section, SpaceInfo, WorkloadError,
};

pub use client::{KeeperClient, is_kept, listens};
pub use processes::{end_by_force, end_left, note_processes};
pub use server::{ExitSignal, listen, serve, serve_from, serve_on, write_exit_record};
pub use spawn::{allow_many_files, spawn};
pub use switched::{forget_switch, record_switch, switched_for};

/// How a keeper begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Beginning {
    /// Start the workload from its spec, running.
    Run,
    /// Build an empty workload that a session fills.
    Incoming,
    /// Take charge of one that somebody else started and that runs.
    Adopt,
}

/// What the agent tells a keeper at its start (the file [`Place::keeper_config`]).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeeperConfig {
    /// Which kind of workload.
    pub kind: Kind,
    /// How to begin.
    pub beginning: Beginning,
    /// Where the workload lives.
    pub place: Place,
    /// Tools of this host.
    pub tools: HostTools,
    /// The backend's own spec.
    pub spec: serde_json::Value,
}

/// What remains of a workload that ended by itself (the file [`Place::exit_record`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Exit code, or 128 + signal; 0 for a guest that powered itself off.
    pub status: i32,
    /// For people: `exited with 0`, `killed by SIGKILL`, `powered off`, `triple fault`.
    pub text: String,
}

/// What state a keeper's workload is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Being built; no instruction has run here.
    Incoming,
    /// Everything loaded; no instruction has run here.
    Prepared,
    /// Runs.
    Running,
    /// Stands still; resumes by itself when its agent is lost for too long.
    Paused,
    /// Stands still until it is told what to do, under the fencing token given.
    Fenced {
        /// The token of the change of ownership under way.
        token: u64,
    },
}

/// What a harvest tells beside dirty pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Harvest {
    /// All pages that exist, of a workload that stands still and whose memory may come and go, when
    /// they are looked for the first time.
    pub exists: Option<PageSet>,
    /// The longest that any part of the workload stood still for the tracking, so far.
    pub stall: Duration,
    /// How much longer restoring will take in the stop than it takes any workload of the kind.
    pub restoring: Restoring,
}

/// A workload as its keeper holds it. Called by one thread, the keeper's server; phases are the
/// server's business, so an implementation may rely on `pause` not being called twice in a row.
pub trait Kept: Send {
    /// What the host's configuration says now; that of the keeper's own start may be older. For the
    /// moves that follow.
    fn configure(&mut self, methods: Methods) -> Result<()> {
        let _ = methods;
        Err(WorkloadError::Unsupported("A choice of methods"))
    }
    /// Whether and how dirty pages can be tracked while it runs.
    fn liveness(&self) -> Liveness;
    /// How it leaves, or was restored here; see [`crate::workload::SourceWorkload::ways`].
    fn ways(&self) -> Ways {
        Ways::default()
    }
    /// Facts for `inspect` and for the manifest, in the backend's own JSON (pids, CPUID, ...).
    fn facts(&mut self) -> Result<serde_json::Value>;
    /// The spaces as they are now.
    fn spaces(&mut self) -> Result<Vec<SpaceInfo>>;
    /// Destination: makes room for these spaces, in addition to those named before.
    fn make_spaces(&mut self, spaces: &[SpaceInfo]) -> Result<()>;
    /// A descriptor whose byte offset is the address within `space`. Source: readable. Destination:
    /// readable and writable, sparse.
    fn memory(&mut self, space: SpaceId) -> Result<OwnedFd>;
    /// From now on these, which are files of the workload's, are among its spaces, until it resumes.
    fn carry(&mut self, spaces: &[SpaceId]) -> Result<()> {
        let _ = spaces;
        Err(WorkloadError::Unsupported("A file that travels as pages"))
    }
    /// From now on the file that is `space` is followed without the workload's memory, and will be replaced by
    /// `file`, which stands at `path`; see [`crate::workload::SourceWorkload::mirror`].
    fn mirror(&mut self, space: SpaceId, path: &Path, file: File) -> Result<()> {
        let _ = (space, path, file);
        Err(WorkloadError::Unsupported("A file that moves alone"))
    }
    /// Nothing is written to the files that are mirrored until [`Kept::switch`] or [`Kept::resume`].
    fn hold(&mut self) -> Result<()> {
        Err(WorkloadError::Unsupported("A file that moves alone"))
    }
    /// The new files take the place of those that are mirrored, all of them or, on an error, none, which
    /// [`record_switch`] says of `migration` before anything is written to them.
    fn switch(&mut self, migration: &str) -> Result<()> {
        let _ = migration;
        Err(WorkloadError::Unsupported("A file that moves alone"))
    }
    /// Starts dirty tracking; see [`crate::workload::SourceWorkload::track`].
    fn track(&mut self) -> Result<()>;
    /// Adds to `dirty` what was written since the last harvest, and re-arms; see
    /// [`crate::workload::SourceWorkload::harvest`].
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<Harvest>;
    /// See [`crate::workload::SourceWorkload::throttle`].
    fn throttle(&mut self, percent: u8) -> Result<()> {
        let _ = percent;
        Err(WorkloadError::Unsupported("Throttling"))
    }
    /// Stops it and takes its interfaces off the network. On an error it runs on.
    fn pause(&mut self) -> Result<()>;
    /// State sections, while paused. On an error it can still be resumed.
    fn save(&mut self) -> Result<Vec<Section>>;
    /// It is about to be fenced, and may run elsewhere next: what only one host may hold is let go, and taken
    /// again by `resume`. Nothing, for whoever holds nothing of the kind.
    fn fenced(&mut self) -> Result<()> {
        Ok(())
    }
    /// Undoes tracking, throttling, `mirror`, `hold`, `save` and `pause`, whichever of them were done.
    fn resume(&mut self) -> Result<()>;
    /// Destination: restores everything, runs nothing.
    fn load(&mut self, sections: Vec<Section>) -> Result<()>;
    /// Destination: run, interfaces up, announced. On an error no instruction has run.
    fn activate(&mut self) -> Result<()>;
    /// Source: interface first, then the paused copy, quietly (no FIN, no RST). The keeper ends.
    fn release(&mut self) -> Result<()>;
    /// Destination, never activated: takes everything away. The keeper ends.
    fn discard(&mut self) -> Result<()>;
    /// Running: asks the workload to end, waits `grace`, then forces. The keeper ends.
    fn stop(&mut self, grace: Duration) -> Result<()>;
    /// It ended by itself: `record` is written down where the agent looks for it. Whoever may not write there has
    /// somebody else do it.
    fn note_end(&self, place: &Place, record: &ExitRecord) {
        write_exit_record(place, record);
    }
    /// Running, and adopted: gives it back to whoever started it, as it runs. The keeper ends.
    fn let_go(&mut self) -> Result<()> {
        Err(WorkloadError::Unsupported("Letting go"))
    }
}
