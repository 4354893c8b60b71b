//! What crun writes down about a container: where, and how it is read and made. crun notes no cgroups
//! but one path for all hierarchies, so they are found by the container's process.
//!
//! crun's own support for CRIU is not needed, and Debian's has none: CRIU is spoken to directly, and what
//! crun goes by afterwards is what stands here.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};
use crate::runtime::Known;

/// Where crun keeps the state of containers when it is not told otherwise.
pub(crate) const ROOT: &str = "/run/crun";
/// The file in a container's directory there.
pub(crate) const STATE: &str = "status";
/// The configuration beside it, by which `crun exec` goes.
pub(crate) const CONFIG: &str = "config.json";
/// The filter of system calls beside it, compiled: `crun exec` goes by it, and takes that there is none where
/// it is not there.
pub(crate) const FILTER: &str = "seccomp.bpf";
/// Controllers of the unified hierarchy where it is mounted beside those of v1.
const HYBRID: &str = "/sys/fs/cgroup/unified/cgroup.controllers";

/// `state` of a stand-in, with the process, root and bundle of the real container.
pub(crate) fn adopted(
    mut state: Value,
    init: i32,
    started: u64,
    rootfs: &Path,
    bundle: &Path,
) -> Value {
    state["pid"] = json!(init);
    state["process-start-time"] = json!(started);
    state["rootfs"] = json!(rootfs);
    state["bundle"] = json!(bundle);
    state
}

/// What a state says of its container.
pub(crate) fn known(state: &Value) -> Option<Known> {
    let bundle = PathBuf::from(state.get("bundle")?.as_str()?);
    Some(Known {
        init: i32::try_from(state.get("pid")?.as_i64()?).ok()?,
        started: state.get("process-start-time")?.as_u64()?,
        rootfs: bundle.join(state.get("rootfs")?.as_str()?),
        bundle,
    })
}

/// The cgroups of a container by those of its first process `init`.
pub(crate) fn cgroups(init: i32) -> Result<Cgroups> {
    let read = |path: String| {
        fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))
    };
    let memberships = read(format!("/proc/{init}/cgroup"))?;
    let mountinfo = read("/proc/self/mountinfo".to_owned())?;
    Cgroups::from_state(&Value::Object(directories(&memberships, &mountinfo)))
}

/// Why crun starts no container on this host, when its cgroups are why.
pub(crate) fn obstacle() -> Option<String> {
    let controllers = fs::read_to_string(HYBRID).ok()?;
    let controllers = controllers.trim();
    (!controllers.is_empty()).then(|| {
        format!(
            "crun starts nothing where the unified cgroup hierarchy beside those of version 1 has \
             controllers ({controllers}): boot with cgroup_no_v1=all or without them"
        )
    })
}

/// The last word in a log of crun, which has one error a line.
pub(crate) fn last_error(log: &str) -> Option<&str> {
    log.lines().rfind(|line| !line.trim().is_empty())
}

/// Directories by controller, as runc's state has them, from a process's `cgroup` and a `mountinfo`.
fn directories(memberships: &str, mountinfo: &str) -> Map<String, Value> {
    let mounts: Vec<_> = mountinfo.lines().filter_map(hierarchy).collect();
    let is_v1 = mounts.iter().any(|mount| mount.v1);
    let mut found = Map::new();
    for line in memberships.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        // Beside v1 the unified hierarchy is not crun's to use.
        if controllers.is_empty() == is_v1 {
            continue;
        }
        let matching = mounts.iter().find(|mount| match controllers.is_empty() {
            true => !mount.v1,
            false => mount.v1 && controllers.split(',').all(|name| mount.has(name)),
        });
        let Some(mount) = matching else { continue };
        let below = path.strip_prefix(mount.root).unwrap_or(path);
        let directory = Path::new(mount.point).join(below.trim_start_matches('/'));
        for controller in controllers.split(',') {
            found.insert(controller.to_owned(), json!(directory));
        }
    }
    found
}

/// A mounted cgroup hierarchy.
struct Hierarchy<'a> {
    v1: bool,
    root: &'a str,
    point: &'a str,
    options: &'a str,
}

impl Hierarchy<'_> {
    fn has(&self, controller: &str) -> bool {
        self.options.split(',').any(|option| option == controller)
    }
}

fn hierarchy(line: &str) -> Option<Hierarchy<'_>> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (root, point) = (left.next()?, left.next()?);
    let mut right = right.split(' ');
    let kind = right.next()?;
    let options = right.nth(1)?;
    let root = if root == "/" { "" } else { root };
    matches!(kind, "cgroup" | "cgroup2").then_some(Hierarchy {
        v1: kind == "cgroup",
        root,
        point,
        options,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
32 30 0:28 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
35 30 254:0 / / rw - ext4 /dev/vda rw\n";

    #[test]
    fn directories_are_those_of_the_hierarchies_that_are_mounted() {
        let found = directories(
            "5:name=systemd:/decamp/web\n4:cpu,cpuacct:/decamp/web\n3:freezer:/decamp/web\n2:pids:/x\n0::/\n",
            MOUNTS,
        );
        let expected = json!({
            "name=systemd": "/sys/fs/cgroup/systemd/decamp/web",
            "cpu": "/sys/fs/cgroup/cpu,cpuacct/decamp/web",
            "cpuacct": "/sys/fs/cgroup/cpu,cpuacct/decamp/web",
            "freezer": "/sys/fs/cgroup/freezer/decamp/web",
        });
        assert_eq!(Value::Object(found), expected);
        let unified = "34 30 0:30 /outer /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let found = directories("0::/outer/decamp/web\n", unified);
        assert_eq!(Value::Object(found), json!({"": "/sys/fs/cgroup/decamp/web"}));
    }

    #[test]
    fn an_adopted_state_points_at_the_real_container() {
        let state = json!({"pid": 1, "process-start-time": 2, "bundle": "/tmp", "rootfs": "r",
            "cgroup-path": "/decamp/web"});
        let state = adopted(state, 77, 88, Path::new("/srv/web/rootfs"), Path::new("/srv/web"));
        let known = known(&state).expect("whole");
        assert_eq!((known.init, known.started), (77, 88));
        assert_eq!(known.rootfs, Path::new("/srv/web/rootfs"));
        assert_eq!(state["cgroup-path"], "/decamp/web");
    }
}
