//! The JSON that the CLI and the agent exchange over the agent's socket. Types and their words,
//! nothing else: no I/O, and nothing that only one of the two sides needs.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use decamp_shared::keeper::ExitRecord;
use decamp_shared::session::progress::Phase;
use decamp_shared::session::{MoveOptions, Report};
use decamp_shared::workload::{Kind, Refusal};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What state a workload is in on this host, as far as the agent knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// Its keeper is being started.
    Starting,
    /// Runs here.
    Running,
    /// Runs here, or stands still for an instant; a move to another host is under way.
    Migrating,
    /// Arrives from another host; nothing of it has run here yet.
    Incoming,
    /// Ended, by itself or by `stop`.
    Stopped,
    /// Runs on another host; what is left here are its files.
    Moved,
    /// Stands still: nobody knows on which host it has to run. `resolve` decides.
    Unresolved,
}

impl State {
    /// As it is printed and stored.
    pub(crate) fn word(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running",
            State::Migrating => "migrating",
            State::Incoming => "incoming",
            State::Stopped => "stopped",
            State::Moved => "moved",
            State::Unresolved => "unresolved",
        }
    }

    /// The state of that word.
    pub(crate) fn from_word(word: &str) -> Option<Self> {
        [
            State::Starting,
            State::Running,
            State::Migrating,
            State::Incoming,
            State::Stopped,
            State::Moved,
            State::Unresolved,
        ]
        .into_iter()
        .find(|state| state.word() == word)
    }
}

impl fmt::Display for State {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.word())
    }
}

/// A file or directory that a workload stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileEntry {
    /// `kernel`, `initrd`, `bundle`, `volume` or `volume-file`.
    pub(crate) role: String,
    /// Where it stands on this host.
    pub(crate) path: PathBuf,
    /// Whether another host has, or may have, the very same: nobody removes any of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) shared: bool,
}

/// A workload in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct WorkloadView {
    /// Unique on the host.
    pub(crate) name: String,
    /// The same on every host that it visits.
    pub(crate) uuid: String,
    /// Virtual machine or container.
    pub(crate) kind: Kind,
    /// On this host.
    pub(crate) state: State,
    /// When it was first run or arrived here, in milliseconds since 1970.
    pub(crate) created_ms: u64,
    /// When its state last changed, in milliseconds since 1970.
    pub(crate) changed_ms: u64,
    /// The host that it moved to, or is moving to.
    pub(crate) moved_to: Option<String>,
    /// The move that concerns it now, or the last one.
    pub(crate) migration: Option<String>,
    /// How it ended, when it ended by itself.
    pub(crate) exit: Option<ExitRecord>,
    /// Its files on this host.
    pub(crate) files: Vec<FileEntry>,
}

/// All that the agent knows of one workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct WorkloadDetail {
    /// As in a list.
    #[serde(flatten)]
    pub(crate) view: WorkloadView,
    /// What `run` was asked for, in the backend's own words.
    pub(crate) spec: Value,
    /// Where its console log is.
    pub(crate) log: PathBuf,
    /// What its keeper says of itself (phase, and the backend's facts); null without a keeper, or
    /// while a move has it to itself.
    pub(crate) keeper: Option<Value>,
}

/// `POST /v1/workloads`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunRequest {
    /// A name that is free on the host.
    pub(crate) name: String,
    /// Virtual machine or container.
    pub(crate) kind: Kind,
    /// In the backend's own words.
    pub(crate) spec: Value,
}

/// `POST /v1/adopt`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AdoptRequest {
    /// `RUNTIME:ID`.
    pub(crate) what: String,
}

/// `POST /v1/hook`: what a runtime's hook has to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HookRequest {
    /// `RUNTIME:ID`, or `podman:ID`.
    pub(crate) what: String,
    /// What has become of it.
    pub(crate) event: HookEvent,
}

/// What a hook is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HookEvent {
    /// It runs, or is about to.
    Started,
    /// It has ended, or its runtime has let go of it.
    Stopped,
}

/// What the agent does about it, beside the hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HookAnswer {
    /// For people.
    pub(crate) said: String,
}

/// What `DELETE /v1/workloads/NAME` did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RemoveAnswer {
    /// Files and directories that are gone.
    pub(crate) removed: Vec<PathBuf>,
    /// Files and directories that stay.
    pub(crate) left: Vec<LeftFile>,
}

/// A file of a removed workload that stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeftFile {
    /// Which.
    pub(crate) path: PathBuf,
    /// Why it stays.
    pub(crate) why: String,
}

/// `POST /v1/cpu/baseline`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BaselineRequest {
    /// `HOST[:PORT]`, hosts of the agent's configuration; its own counts in any case.
    pub(crate) hosts: Vec<String>,
}

/// The widest CPU that they have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct BaselineAnswer {
    /// As it stands in a file.
    pub(crate) baseline: Value,
    /// What each host has beyond it, for people.
    pub(crate) lost: BTreeMap<String, Vec<String>>,
    /// Hosts whose decamp is too old to say what registers tell there; nothing is said of those then.
    #[serde(default)]
    pub(crate) silent: Vec<String>,
}

/// `POST /v1/migrations`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MigrationRequest {
    /// Name of the workload.
    pub(crate) workload: String,
    /// `HOST[:PORT]`, a host of the agent's configuration.
    pub(crate) to: String,
    /// As the user asked.
    #[serde(default)]
    pub(crate) options: MoveOptions,
}

/// A move in a list: one under way, or one that ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MigrationView {
    /// Its id.
    pub(crate) migration: String,
    /// Name of the workload.
    pub(crate) workload: String,
    /// Destination host.
    pub(crate) to: String,
    /// Whether it is under way.
    pub(crate) active: bool,
    /// The phase that it is in.
    pub(crate) phase: Option<Phase>,
    /// How it ended.
    pub(crate) report: Option<Report>,
}

/// Whose copy of an unresolved workload is to live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Side {
    /// The one on the host that it was leaving.
    Source,
    /// The one on the host that it was going to.
    Destination,
}

/// `POST /v1/migrations/ID/resolve`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResolveRequest {
    /// Whose copy is to live.
    pub(crate) keep: Side,
}

/// What `resolve` did on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ResolveAnswer {
    /// Id of the migration.
    pub(crate) migration: String,
    /// Name of the workload.
    pub(crate) workload: String,
    /// What was done, and what is to be done on the other host.
    pub(crate) text: String,
}

/// `POST /v1/workloads/NAME/stop`; nothing (`null`) stands for one without a time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StopRequest {
    /// How long it is given to end by itself; as is usual for its kind when there is none.
    #[serde(default)]
    pub(crate) timeout_ms: Option<u64>,
}

/// `POST /v1/workloads/NAME/checkpoint`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CheckpointRequest {
    /// Absolute path of the file; nothing may stand there.
    pub(crate) output: PathBuf,
    /// Whether the workload runs on afterwards.
    #[serde(default)]
    pub(crate) leave_running: bool,
}

/// `POST /v1/restore`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RestoreRequest {
    /// Absolute path of the file.
    pub(crate) file: PathBuf,
    /// The name that it gets; the one in the file when there is none.
    #[serde(default)]
    pub(crate) name: Option<String>,
    /// Where its files go: old and new paths.
    #[serde(default)]
    pub(crate) paths: Vec<(PathBuf, PathBuf)>,
}

/// A line of the answer to either. The last one is none of [`ArchiveEvent::Step`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum ArchiveEvent {
    /// How far it is.
    Step {
        /// What is being done, as a word.
        phase: String,
        /// Bytes that are done.
        bytes: u64,
        /// Of so many; 0 when there is nothing to count.
        total: u64,
    },
    /// The file is complete.
    Checkpointed(CheckpointView),
    /// It runs.
    Restored(WorkloadView),
    /// Refused before anything was touched.
    Refused(ErrorBody),
    /// Failed; the message says how the workload is.
    Failed(ErrorBody),
}

/// Code of a failed checkpoint whose workload runs on as it did.
pub(crate) const RUNS_ON: &str = "failed-runs-on";

/// A checkpoint that was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CheckpointView {
    /// The workload.
    pub(crate) workload: String,
    /// Its kind.
    pub(crate) kind: Kind,
    /// The file.
    pub(crate) output: PathBuf,
    /// Bytes of the file.
    pub(crate) file_bytes: u64,
    /// Bytes of what is in it.
    pub(crate) bytes: u64,
    /// Whether the workload runs on.
    pub(crate) left_running: bool,
    /// How long it stood still, in milliseconds.
    pub(crate) stopped_ms: f64,
    /// What other programs can do with the file, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) advice: Option<String>,
}

/// Why a console that was attached to ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "ended", rename_all = "kebab-case")]
pub(crate) enum ConsoleEnd {
    /// The workload has ended here, by itself or by `stop`.
    Stopped {
        /// How.
        exit: Option<ExitRecord>,
    },
    /// It runs on another host now.
    Moved {
        /// Which.
        to: Option<String>,
    },
    /// Nobody knows on which host it has to run.
    Unresolved {
        /// The move that it is about.
        migration: Option<String>,
    },
    /// Its keeper closed the console, and nothing else is known to have happened.
    Closed,
}

/// `GET /v1/host`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostView {
    /// Name of this host, as its certificate says.
    pub(crate) name: String,
    /// Version of decamp.
    pub(crate) version: String,
    /// Where it listens for other hosts.
    pub(crate) listen: String,
    /// Where its state is.
    pub(crate) state_dir: PathBuf,
    /// Whether page connections to this host are always encrypted.
    pub(crate) page_encryption: bool,
    /// Hosts that workloads can be moved to, with their addresses.
    pub(crate) hosts: BTreeMap<String, String>,
}

/// The body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ErrorBody {
    /// For machines: `unknown-workload`, `refused`, ...
    pub(crate) code: String,
    /// For people.
    pub(crate) message: String,
    /// Every reason, when there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) refusals: Vec<Refusal>,
}

/// The time as every message gives it: milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |time| time.as_millis() as u64)
}

/// Whether `name` may be the name of a workload: `[a-z0-9][a-z0-9_.-]{0,39}`.
pub(crate) fn is_workload_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() <= 40
        && name.bytes().next().is_some_and(plain)
        && name.bytes().all(|byte| plain(byte) || b"_.-".contains(&byte))
}

/// Whether `name` may be the name of a host, as it stands in certificates: letters, digits, dots
/// and hyphens, at most 63.
pub(crate) fn is_host_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric();
    name.len() <= 63
        && name.bytes().next().is_some_and(plain)
        && name.bytes().last().is_some_and(plain)
        && name.bytes().all(|byte| plain(byte) || b".-".contains(&byte))
        && !name.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workload_names_are_short_and_plain() {
        for good in ["web", "a", "0", "redis-1", "a_b.c", &"x".repeat(40)] {
            assert!(is_workload_name(good), "{good}");
        }
        for bad in ["", "Web", ".web", "-web", "_a", "a/b", "a b", "ä", "..", &"x".repeat(41)] {
            assert!(!is_workload_name(bad), "{bad}");
        }
    }

    #[test]
    fn host_names_can_stand_in_certificates() {
        for good in ["alpha", "edge-2", "node1.example.org", "A"] {
            assert!(is_host_name(good), "{good}");
        }
        for bad in ["", ".", "-a", "a-", "a..b", "a_b", "a b", "a:1", &"x".repeat(64)] {
            assert!(!is_host_name(bad), "{bad}");
        }
    }

    #[test]
    fn every_state_is_found_by_its_word() {
        for word in
            ["starting", "running", "migrating", "incoming", "stopped", "moved", "unresolved"]
        {
            let state = State::from_word(word).expect("a known word");
            assert_eq!(serde_json::to_value(state).expect("a string"), word);
        }
        assert_eq!(State::from_word("Running"), None);
    }
}
