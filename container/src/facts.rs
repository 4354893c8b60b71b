//! What a container's keeper tells of it, and what of that a destination needs to know.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use crate::file_locks::{HeldLock, LockKind};
pub use crate::obstacles::host::HostNeeds;
use crate::podman::own::Seen;

/// A keeper's facts, for `inspect` and for the agent's end of a session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Facts {
    /// Its name for the runtime.
    pub container: String,
    /// Its first process, or 0 before there is one.
    pub init: i32,
    /// Its processes: number in the container, number here.
    pub processes: BTreeMap<i32, i32>,
    /// Its directory in the freezer's hierarchy.
    pub cgroup: PathBuf,
    /// Its memory limit in bytes, if any.
    pub memory_limit: Option<u64>,
    /// Resident memory of its processes in bytes; shared pages count for each, but for huge ones, which do not
    /// count.
    pub resident: u64,
    /// Bytes of its shared files of huge pages, each once.
    #[serde(default)]
    pub shared_huge: u64,
    /// What is on its own tmpfs mounts in bytes, whoever maps it.
    #[serde(default)]
    pub on_tmpfs: u64,
    /// Why its memory is not hidden from CRIU here, when it is not: CRIU then dumps all of it.
    pub unhidden: Option<String>,
    /// Everything that keeps it from being moved.
    pub obstacles: Vec<String>,
    /// What its processes may have found on this host.
    #[serde(default)]
    pub host: HostNeeds,
    /// Locks that keep everybody else out of files that may be shared with the next host.
    #[serde(default)]
    pub locks: Vec<HeldLock>,
    /// What podman itself mounts in it that has to be the same on the next host.
    #[serde(default)]
    pub own: Vec<Seen>,
}

/// What a destination needs to know beforehand; travels in the manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Needs {
    /// Its configuration as it was started, `config.json`.
    pub config: String,
    /// Resident memory in bytes, without shared huge pages.
    pub resident: u64,
    /// Bytes of its shared files of huge pages, each once: they take none of the ordinary memory.
    #[serde(default)]
    pub shared_huge: u64,
    /// What is on its own tmpfs mounts in bytes, whoever maps it.
    #[serde(default)]
    pub on_tmpfs: u64,
    /// Version of CRIU at the source: an older one cannot read what it writes.
    pub criu: (i32, i32),
    /// Everything that keeps it from being moved, found at the source.
    pub obstacles: Vec<String>,
    /// What its processes may have found at the source, and so may depend on.
    #[serde(default)]
    pub host: HostNeeds,
    /// Locks that keep everybody else out of files that may be shared with the destination.
    #[serde(default)]
    pub locks: Vec<HeldLock>,
}
