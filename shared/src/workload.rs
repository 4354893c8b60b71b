//! What a backend implements, and the plain data that describes a workload.
//!
//! A workload is the same thing to the session whatever its kind: memory that can be read from
//! outside, a dirty tracker, pause, state sections, and files. Defaults are errors, never silent.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::archive::header::Described;
use crate::archive::{Foreign as ForeignArchive, Frozen, Parcel, Unpacking};
use crate::methods::{Methods, Ways};
use crate::pages::{PageReader, PageSet, PageWriter};
pub use crate::protocol::manifest::{
    FileRole, FileTree, Kind, Manifest, NetworkNeed, NetworkNeighbour, Refusal, RefusalCode,
    Section, SpaceInfo, Storage,
};

/// A boxed error of some backend, kept as the source of a [`WorkloadError`].
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// What went wrong with a workload.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// Something that the backend tried did not work.
    #[error("{what}")]
    Failed {
        /// What was tried, and on what.
        what: String,
        /// Why it did not work.
        #[source]
        source: Option<BoxError>,
    },
    /// This kind of workload cannot do what was asked.
    #[error("{0} is not supported by this kind of workload")]
    Unsupported(&'static str),
    /// It was being let run, and nobody can say whether it did.
    #[error("Nobody can say whether the workload began to run")]
    Uncertain {
        /// Why not.
        #[source]
        source: BoxError,
    },
    /// The keeper did not answer, or ended.
    #[error("The keeper of workload {name} is gone ({what})")]
    KeeperGone {
        /// Name of the workload.
        name: String,
        /// What was being asked of it.
        what: String,
    },
}

impl WorkloadError {
    /// An error that says what was tried, with its cause.
    pub fn new(what: impl Into<String>, source: impl Into<BoxError>) -> Self {
        Self::Failed { what: what.into(), source: Some(source.into()) }
    }

    /// An error without a cause beneath it.
    pub fn plain(what: impl Into<String>) -> Self {
        Self::Failed { what: what.into(), source: None }
    }
}

/// Result of a backend's work.
pub type Result<T> = std::result::Result<T, WorkloadError>;

/// How a workload can be copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Liveness {
    /// Dirty pages can be tracked while it runs: pre-copy.
    Tracked {
        /// Name of the tracker, for the report.
        tracker: String,
    },
    /// Its memory is copied while it stands still.
    StopOnly {
        /// Why there is no tracker.
        reason: String,
    },
}

/// What restoring a workload takes of its stop beyond what it takes any of its kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restoring {
    /// In any case.
    pub needed: Duration,
    /// More, where there is time for it: memory is saved so.
    pub wished: Duration,
}

/// A running workload on the host that it leaves. Used by one session at a time.
pub trait SourceWorkload: Send {
    /// What the destination must know before anything is touched.
    fn manifest(&mut self) -> Result<Manifest>;
    /// Whether memory can be copied while the workload runs.
    fn liveness(&self) -> Liveness;
    /// The spaces as they are now; asked again after [`SourceWorkload::pause`].
    fn spaces(&mut self) -> Result<Vec<SpaceInfo>>;
    /// A reader of all spaces, shared by the page threads. Asked again when spaces changed.
    fn reader(&mut self) -> Result<Arc<dyn PageReader>>;
    /// Told before anything is sent: what becomes of each of its trees. Those that travel as pages are among
    /// its spaces from here on.
    fn carry(&mut self, trees: &[FileTree]) -> Result<()> {
        if trees.iter().any(FileTree::is_paged) {
            return Err(WorkloadError::Unsupported("A file that travels as pages"));
        }
        Ok(())
    }
    /// Whether its keeper, which may be older than whoever asks, knows [`SourceWorkload::mirror`] and what follows it.
    /// Touches nothing.
    fn can_mirror(&mut self) -> Result<bool> {
        Err(WorkloadError::Unsupported("A file that moves alone"))
    }
    /// From now on whatever is asked fails if it is not answered within `limit`; `None`: within what any answer may
    /// take. It may be done all the same: [`SourceWorkload::resume`], which waits as long as ever, undoes what can be
    /// undone.
    fn answer_within(&mut self, limit: Option<Duration>) -> Result<()> {
        let _ = limit;
        Err(WorkloadError::Unsupported("A limit for answers"))
    }
    /// Of files that move to another place of this very host while the workload runs: from now on writes to the file
    /// of `tree`, one that could travel as pages, are noted, without those to memory, and the file will be replaced
    /// by `file`, which holds nothing and stands at `path`, and is made as long as the other. The first
    /// [`SourceWorkload::harvest`] after the last of them gives all that they hold.
    fn mirror(&mut self, tree: &FileTree, path: &Path, file: OwnedFd) -> Result<()> {
        let _ = (tree, path, file);
        Err(WorkloadError::Unsupported("A file that moves alone"))
    }
    /// The workload runs, and nothing is written to the files that are mirrored, until they are switched or it is
    /// resumed. On return nothing is under way.
    fn hold(&mut self) -> Result<()> {
        Err(WorkloadError::Unsupported("A file that moves alone"))
    }
    /// What is held goes on with the new files: all of them, or on an error none. That they are the workload's from
    /// here on is on disk, for `migration`, before the first write to them
    /// ([`crate::keeper::switched_for`]). Refused while a write is noted that no harvest gave.
    fn switch(&mut self, migration: &str) -> Result<()> {
        let _ = migration;
        Err(WorkloadError::Unsupported("A file that moves alone"))
    }
    /// Starts dirty tracking. The next [`SourceWorkload::harvest`] gives every page that exists.
    fn track(&mut self) -> Result<()>;
    /// Adds to `dirty` what was written since the last harvest, and re-arms. While paused and
    /// without tracking it gives every page that exists. While paused, what is in `dirty` and no longer
    /// exists is taken out.
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()>;
    /// The longest that any part of the workload stood still for the tracking, so far.
    fn stall(&self) -> Duration;
    /// How long the look for written pages will take in the stop, where that grows with the workload's
    /// memory, as the last harvest had it. Zero for whoever is told of writes.
    fn look(&self) -> Duration {
        Duration::ZERO
    }
    /// How much longer restoring will take in the stop than it takes any workload of its kind, as the last
    /// harvest had it. Nothing for whoever is restored like any other.
    fn restoring(&self) -> Restoring {
        Restoring::default()
    }
    /// Told once, when it is about to be paused: so much of the stop is left for what restoring wishes. Who is
    /// not told takes what it wishes.
    fn spare(&mut self, time: Duration) {
        let _ = time;
    }
    /// What ends, once it is set, a look for written pages that is under way, and all that follow: with an
    /// error, after which [`SourceWorkload::resume`] works as ever. Nothing where no look takes long.
    fn call_off(&self) -> Option<Arc<AtomicBool>> {
        None
    }
    /// How its state leaves this host, for the report. Nothing is known of most kinds.
    fn ways(&self) -> Ways {
        Ways::default()
    }
    /// Takes `percent` of its processor time from the workload (0: none).
    fn throttle(&mut self, percent: u8) -> Result<()> {
        let _ = percent;
        Err(WorkloadError::Unsupported("Throttling"))
    }
    /// Stops every vCPU or task and takes the workload's interfaces off the network.
    fn pause(&mut self) -> Result<()>;
    /// Device, CPU or process state, while paused. May write memory: harvest once more after it.
    fn save(&mut self) -> Result<Vec<Section>>;
    /// The keeper never resumes by itself from here on. Acknowledged by the keeper on return.
    fn fence(&mut self, token: u64) -> Result<()>;
    /// Roll back: the workload runs on as if nothing had been; tracking and throttling are undone.
    /// Works in every state before [`SourceWorkload::release`], also when nothing was paused.
    fn resume(&mut self) -> Result<()>;
    /// It runs elsewhere now: interface first, then the copy, quietly. The keeper ends.
    fn release(&mut self) -> Result<()>;
}

/// A workload being built on the host that it comes to.
pub trait DestinationWorkload: Send {
    /// Makes room for spaces; called before the first page of a space arrives, again when more
    /// spaces come. The writer covers every space named so far.
    fn writer(&mut self, spaces: &[SpaceInfo]) -> Result<Arc<dyn PageWriter>>;
    /// Everything restored, nothing running, interfaces down. Every section must be used up.
    fn load(&mut self, sections: Vec<Section>) -> Result<()>;
    /// How it was restored, for the report, once it is loaded. Nothing is known of most kinds.
    fn ways(&self) -> Ways {
        Ways::default()
    }
    /// Run, interfaces up, announced. On an error no instruction has run, unless it is
    /// [`WorkloadError::Uncertain`].
    fn activate(&mut self, token: u64) -> Result<()>;
    /// Takes everything away that was prepared. Works in every state before activation.
    fn discard(&mut self) -> Result<()>;
}

/// Name of [`Place::users_lock`].
pub const USERS_LOCK: &str = "users.lock";

/// Where one workload lives on this host. All of it belongs to the agent and is gone with the
/// workload; users' files are elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The workload's name, unique on the host.
    pub name: String,
    /// The workload's identity, the same on every host that it visits.
    pub uuid: String,
    /// Directory of its own for sockets and keeper files (`STATE_DIR/workloads/NAME`).
    pub dir: PathBuf,
}

impl Place {
    /// The keeper's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("keeper.sock")
    }

    /// What the workload prints: a guest's serial console, a container's standard output and error.
    pub fn log(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// Where clients of its console connect, if it has one: [`crate::console`].
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.sock")
    }

    /// Where they tell how large their window is, if its console has a size.
    pub fn console_size(&self) -> PathBuf {
        self.dir.join("console.size")
    }

    /// What the keeper itself says.
    pub fn keeper_log(&self) -> PathBuf {
        self.dir.join("keeper.log")
    }

    /// What the agent tells a keeper at its start ([`crate::keeper::KeeperConfig`] as JSON).
    pub fn keeper_config(&self) -> PathBuf {
        self.dir.join("keeper.json")
    }

    /// What the keepers of one agent lock of the numbers of [`HostTools::users`] (`STATE_DIR/users.lock`).
    pub fn users_lock(&self) -> PathBuf {
        let state = self.dir.parent().and_then(Path::parent);
        state.unwrap_or(&self.dir).join(USERS_LOCK)
    }

    /// Written by the keeper when the workload ended by itself ([`crate::keeper::ExitRecord`]).
    pub fn exit_record(&self) -> PathBuf {
        self.dir.join("exit.json")
    }
}

/// Settings of the host that backends use, from the agent's configuration.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct HostTools {
    /// The decamp executable, for keepers.
    pub decamp: PathBuf,
    /// CRIU 4.1 or newer.
    pub criu: PathBuf,
    /// runc.
    pub runc: PathBuf,
    /// crun.
    pub crun: PathBuf,
    /// How long a keeper that is paused waits for its agent before it resumes by itself.
    pub resume_after: Duration,
    /// How containers may be moved.
    #[serde(default)]
    pub methods: Methods,
    /// The bridges that interfaces go to which hung on another one on their source, by that one's name.
    #[serde(default)]
    pub bridges: BTreeMap<String, String>,
    /// Users that keepers run as which need no rights on the host, one for each of them.
    #[serde(default)]
    pub users: IdRange,
}

/// Numbers of users (and of groups) that are nobody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The first.
    pub first: u32,
    /// The last.
    pub last: u32,
}

impl IdRange {
    /// How many there are.
    pub fn count(self) -> u32 {
        self.last.saturating_sub(self.first).saturating_add(1)
    }
}

impl Default for IdRange {
    /// In what systemd's list of numbers (UIDS-GIDS) has as unused.
    fn default() -> Self {
        Self { first: 0x7000_0000, last: 0x7000_ffff }
    }
}

/// A file tree of a workload after the destination chose its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedTree {
    /// As the source described it.
    pub tree: FileTree,
    /// Where it stands on this host.
    pub path: PathBuf,
}

/// A workload that somebody else started, as it would be taken charge of.
#[derive(Clone, Debug, PartialEq)]
pub struct Foreign {
    /// Its name here.
    pub name: String,
    /// Its spec, for [`Backend::adopt`].
    pub spec: serde_json::Value,
}

/// The agent's side of one kind of workload. One object a kind, shared by all sessions.
///
/// `spec` is what `run` was asked for, as JSON of the backend's own type; it is stored with the
/// workload and travels in the manifest.
pub trait Backend: Send + Sync {
    /// Which kind this is.
    fn kind(&self) -> Kind;
    /// Everything that keeps `spec` from running here; empty when it can. Touches nothing.
    fn check(&self, spec: &serde_json::Value) -> Vec<Refusal>;
    /// What CPU a fresh workload of this kind would see here, in the backend's own JSON, for a host that
    /// computes what several have in common. Touches nothing.
    fn cpu_offer(&self) -> Result<Vec<u8>> {
        Err(WorkloadError::Unsupported("A choice of CPU"))
    }
    /// Starts the workload under a keeper of its own and returns when it runs.
    fn run(&self, spec: &serde_json::Value, place: &Place) -> Result<()>;
    /// Looks at a workload that somebody else started, which `what` names in the backend's own words.
    /// Gives every reason why it cannot be adopted. Touches nothing.
    fn find_foreign(&self, what: &str) -> std::result::Result<Foreign, Vec<Refusal>> {
        let text = format!("{what} is of no kind that can be adopted");
        Err(vec![Refusal::new(RefusalCode::Unsupported, text)])
    }
    /// Whether the workload `what` of somebody else was made and not started yet, so that there is no
    /// use in looking at it. False where there is no such thing.
    fn awaits_start(&self, what: &str) -> bool {
        let _ = what;
        false
    }
    /// Takes charge of the workload that [`Backend::find_foreign`] gave `spec` of, under a keeper of its
    /// own. On an error it runs on as if nothing had been.
    fn adopt(&self, spec: &serde_json::Value, place: &Place) -> Result<()> {
        let _ = (spec, place);
        Err(WorkloadError::Unsupported("Adopting"))
    }
    /// Gives an adopted workload back to whoever started it, as it runs.
    fn let_go(&self, place: &Place) -> Result<()> {
        let _ = place;
        Err(WorkloadError::Unsupported("Letting go"))
    }
    /// The running workload behind `place`, for a session that moves it away.
    fn source(&self, spec: &serde_json::Value, place: &Place) -> Result<Box<dyn SourceWorkload>>;
    /// The running workload behind `place`, which goes to no other host: it is stopped and written into a file, and
    /// then nothing of it is tracked, and its state holds all that the page engine does not read; or files of it move
    /// within this host.
    fn source_for_file(
        &self,
        spec: &serde_json::Value,
        place: &Place,
    ) -> Result<Box<dyn SourceWorkload>> {
        let _ = (spec, place);
        Err(WorkloadError::Unsupported("Writing into a file"))
    }
    /// Every reason why the workload of `manifest` cannot come here. Touches nothing. `trees` says
    /// where its files would stand.
    fn preflight(&self, manifest: &Manifest, trees: &[PlacedTree]) -> Vec<Refusal>;
    /// The spec as it reads on this host, once its files stand at `trees`.
    fn respec(&self, manifest: &Manifest, trees: &[PlacedTree]) -> Result<serde_json::Value>;
    /// The spec of a workload of this host whose `files`, old and new paths, have moved within it. What is at its new
    /// place already stays there.
    fn relocated(
        &self,
        spec: &serde_json::Value,
        files: &[(PathBuf, PathBuf)],
    ) -> Result<serde_json::Value> {
        let _ = (spec, files);
        Err(WorkloadError::Unsupported("A file that moves alone"))
    }
    /// Builds an empty workload for `manifest`, nothing running, under a keeper of its own. `spec`
    /// is what [`Backend::respec`] gave. Files may still be arriving.
    fn prepare(
        &self,
        manifest: &Manifest,
        spec: &serde_json::Value,
        place: &Place,
    ) -> Result<Box<dyn DestinationWorkload>>;
    /// Every reason why the running workload of `manifest` cannot go into a checkpoint. Touches nothing.
    fn pack_refusals(&self, manifest: &Manifest) -> Vec<Refusal> {
        let _ = manifest;
        let what = WorkloadError::Unsupported("A checkpoint in a file").to_string();
        vec![Refusal::new(RefusalCode::Unsupported, what)]
    }
    /// The parts of a checkpoint of this kind, of a workload that stands still.
    fn pack(&self, frozen: Frozen) -> crate::archive::Result<Vec<Parcel>> {
        let _ = frozen;
        Err(WorkloadError::Unsupported("A checkpoint in a file").into())
    }
    /// What other programs can do with a checkpoint of this kind in `file`, for people.
    fn advice_for_file(&self, file: &Path) -> Option<String> {
        let _ = file;
        None
    }
    /// What takes a workload of this kind out of a checkpoint, its files to `trees`.
    fn unpack(
        &self,
        manifest: &Manifest,
        trees: &[PlacedTree],
    ) -> crate::archive::Result<Box<dyn Unpacking>> {
        let _ = (manifest, trees);
        Err(WorkloadError::Unsupported("A checkpoint in a file").into())
    }
    /// Which parts of an archive that another program wrote have to be read to know what it is.
    fn wants_of_foreign(&self, part: &str) -> bool {
        let _ = part;
        false
    }
    /// The workload in an archive that another program wrote, as a manifest of ours has it, under `name` if
    /// that is given. What is in the way is among what it needs.
    fn describe_foreign(
        &self,
        found: &ForeignArchive,
        name: Option<&str>,
    ) -> crate::archive::Result<Described> {
        let _ = (found, name);
        Err(WorkloadError::Unsupported("A checkpoint that another program wrote").into())
    }
    /// What takes a workload of this kind out of a checkpoint that another program wrote; `found` is what
    /// [`Backend::describe_foreign`] was shown.
    fn unpack_foreign(
        &self,
        manifest: &Manifest,
        trees: &[PlacedTree],
        found: &ForeignArchive,
    ) -> crate::archive::Result<Box<dyn Unpacking>> {
        let _ = (manifest, trees, found);
        Err(WorkloadError::Unsupported("A checkpoint that another program wrote").into())
    }
    /// Ends a running workload: asks it to, waits for as long as `grace`, or as is usual for its kind, then forces.
    fn stop(&self, spec: &serde_json::Value, place: &Place, grace: Option<Duration>) -> Result<()>;
    /// Removes whatever a keeper that died left on the host: cgroups, namespaces, interfaces,
    /// runtime state. Harmless when nothing is there.
    fn sweep(&self, spec: &serde_json::Value, place: &Place) -> Result<()>;
}

/// Whether `path` is absolute and has no `..` in it, as every path from a peer must be.
pub fn is_plain_absolute(path: &Path) -> bool {
    use std::path::Component;
    path.is_absolute()
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}
