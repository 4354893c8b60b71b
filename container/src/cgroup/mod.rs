//! A container's control groups: which directories they are, in whatever hierarchy.
//!
//! The runtime makes them; both hierarchies (v1 with a freezer of its own, and v2) are spoken here.
//! CRIU never touches them. Who is in them, what stops and limits them, and how they end is in files of
//! its own.

mod freezing;
mod limits;
mod members;
mod removal;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use decamp_shared::workload::Place;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{ContainerError, Result};
use crate::spec::runtime_id;

pub(crate) use limits::Setting;
pub(crate) use removal::kill_each;

/// Below the mount point of each hierarchy, the one directory that is ours.
const PARENT: &str = "decamp";

/// The directories of one container, by controller; one entry with an empty name on v2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cgroups {
    paths: BTreeMap<String, PathBuf>,
}

/// What the runtime's configuration calls the container's cgroup.
pub(crate) fn cgroups_path(place: &Place) -> Result<String> {
    Ok(format!("/{PARENT}/{}", runtime_id(place)?))
}

impl Cgroups {
    /// The directories that a runtime's state names (`cgroup_paths`).
    pub(crate) fn from_state(paths: &Value) -> Result<Self> {
        let bad = |what: &str| ContainerError::State(format!("The runtime's state {what}"));
        let mut found = BTreeMap::new();
        for (controller, path) in paths.as_object().ok_or_else(|| bad("names no cgroups"))? {
            let path = path.as_str().ok_or_else(|| bad("names a cgroup that is no path"))?;
            found.insert(controller.clone(), PathBuf::from(path));
        }
        let cgroups = Self { paths: found };
        cgroups.freezer()?;
        Ok(cgroups)
    }

    /// Wherever a container of this place would have its directories on this host: for a sweep, which
    /// does not know what the runtime made of them.
    pub(crate) fn of_place(place: &Place) -> Result<Self> {
        Self::at(&format!("/{PARENT}/{}", runtime_id(place)?))
    }

    /// Those whose path is `path` in any hierarchy, whether they are there or not.
    pub(crate) fn at(path: &str) -> Result<Self> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo")
            .map_err(ContainerError::io("read /proc/self/mountinfo"))?;
        let below = |mount_point: &str| Path::new(mount_point).join(path.trim_start_matches('/'));
        let mounts = cgroup_mounts(&mountinfo).into_iter();
        Ok(Self {
            paths: mounts.map(|mount_point| (mount_point.to_owned(), below(mount_point))).collect(),
        })
    }

    /// Where a hierarchy of [`Cgroups::of_place`] is mounted: one that everybody on this host has.
    pub(crate) fn mount_point(&self) -> Result<PathBuf> {
        // One that another mount hides is still listed.
        let mut mounted = self.paths.keys().map(PathBuf::from);
        mounted.find(|path| path.is_dir()).ok_or_else(|| {
            ContainerError::State("No cgroup hierarchy is mounted on this host".to_owned())
        })
    }

    fn is_v2(&self) -> bool {
        !self.paths.contains_key("freezer")
    }

    /// The directory whose tasks are frozen and thawed together.
    pub(crate) fn freezer(&self) -> Result<&Path> {
        let found = self.paths.get("freezer").or_else(|| self.paths.get(""));
        found.map(PathBuf::as_path).ok_or_else(|| {
            ContainerError::State("The container has no cgroup that can be frozen".to_owned())
        })
    }

    /// The directory of a v1 controller.
    pub(crate) fn controller(&self, name: &str) -> Option<&Path> {
        self.paths.get(name).map(PathBuf::as_path)
    }
}

/// A directory beside a container's own. No workload's name begins with a dot.
fn beside(directory: &Path) -> PathBuf {
    let mut name = OsString::from(".criu-");
    name.push(directory.file_name().unwrap_or_default());
    directory.with_file_name(name)
}

/// Mount points of all cgroup hierarchies.
fn cgroup_mounts(mountinfo: &str) -> Vec<&str> {
    let mount_point = |line| -> Option<&str> {
        let (left, right): (&str, &str) = str::split_once(line, " - ")?;
        right.starts_with("cgroup").then(|| left.split(' ').nth(4))?
    };
    mountinfo.lines().filter_map(mount_point).collect()
}

/// Whether an error says that a cgroup is no longer there.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// The outcome of something done to a cgroup, which need not be done where that is no longer there.
fn unless_gone(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(ContainerError::Io { source, .. }) if is_gone(&source) => Ok(()),
        outcome => outcome,
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(ContainerError::io(format!("read {}", path.display())))
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value)
        .map_err(ContainerError::io(format!("write {value:?} to {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_of_both_versions() {
        let text = "\
31 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:27 / /sys/fs/cgroup/freezer rw,relatime shared:4 - cgroup cgroup rw,freezer
34 31 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
        assert_eq!(cgroup_mounts(text), ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup/unified"]);
    }

    #[test]
    fn no_workload_has_the_name_of_what_stands_beside_another() {
        let place = |name: &str| Place { name: name.into(), uuid: "u".into(), dir: "/x".into() };
        for name in ["web", "web.criu", "-criu"] {
            let directory = Path::new("/sys/fs/cgroup/decamp").join(name);
            let beside = beside(&directory);
            assert_eq!(beside.parent(), directory.parent());
            let taken = beside.file_name().and_then(|name| name.to_str()).expect("a name");
            assert!(runtime_id(&place(taken)).is_err(), "{taken} can be a workload");
        }
    }

    #[test]
    fn a_state_without_a_freezer_is_refused() {
        assert!(Cgroups::from_state(&serde_json::json!({"memory": "/x"})).is_err());
        assert!(Cgroups::from_state(&serde_json::json!({"": "/x"})).is_ok());
        assert!(Cgroups::from_state(&serde_json::json!({"freezer": 3})).is_err());
    }

    pub(super) fn in_one(hierarchy: &str, directory: &Path) -> Cgroups {
        Cgroups { paths: BTreeMap::from([(hierarchy.to_owned(), directory.to_owned())]) }
    }
}
