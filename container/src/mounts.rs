//! Mounts of a container that CRIU takes as given from outside: it notes them by a name at the dump,
//! and is told at the restore what stands behind each name here.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bundle::Bundle;
use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};

/// A mount from outside, by where it appears in the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExternalMount {
    pub(crate) destination: String,
    pub(crate) kind: ExternalKind,
}

/// What stands behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ExternalKind {
    /// A bind mount of the configuration.
    Bind,
    /// A file hidden by the host's `/dev/null`.
    Masked,
    /// The container's directory of a v1 cgroup controller.
    Cgroup(String),
}

/// The mounts from outside of the container whose first process is `init`.
pub(crate) fn external(bundle: &Bundle, init: i32) -> Result<Vec<ExternalMount>> {
    let path = format!("/proc/{init}/mountinfo");
    let mountinfo =
        fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))?;
    let mut found: Vec<ExternalMount> = Vec::new();
    for bind in bundle.binds() {
        found.push(ExternalMount { destination: bind.destination, kind: ExternalKind::Bind });
    }
    let mounted = mounts(&mountinfo);
    for masked in bundle.masked_paths() {
        // A masked directory is a tmpfs, which CRIU dumps like any other.
        if mounted.iter().any(|mount| mount.destination == masked && mount.root == "/null") {
            found.push(ExternalMount { destination: masked, kind: ExternalKind::Masked });
        }
    }
    for mount in mounted.iter().filter(|mount| mount.kind == "cgroup") {
        let controllers = mount.options.trim_start_matches("rw,").trim_start_matches("ro,");
        found.push(ExternalMount {
            destination: mount.destination.to_owned(),
            kind: ExternalKind::Cgroup(controllers.to_owned()),
        });
    }
    Ok(found)
}

impl ExternalMount {
    /// How CRIU is told of it at the dump.
    pub(crate) fn at_dump(&self) -> String {
        format!("mnt[{0}]:{0}", self.destination)
    }

    /// How CRIU is told at the restore what to mount there.
    pub(crate) fn at_restore(&self, bundle: &Bundle, cgroups: &Cgroups) -> Result<String> {
        Ok(format!("mnt[{}]:{}", self.destination, self.source(bundle, cgroups)?.display()))
    }

    /// What of this host stands behind it.
    fn source(&self, bundle: &Bundle, cgroups: &Cgroups) -> Result<PathBuf> {
        let unknown = || {
            ContainerError::section(
                "container/state",
                format!("names mount {}, which the configuration does not have", self.destination),
            )
        };
        match &self.kind {
            ExternalKind::Bind => {
                let binds = bundle.binds();
                let bind = binds.into_iter().find(|bind| bind.destination == self.destination);
                bind.map(|bind| bind.source).ok_or_else(unknown)
            }
            ExternalKind::Masked if bundle.masked_paths().contains(&self.destination) => {
                Ok(Path::new("/dev/null").to_owned())
            }
            ExternalKind::Cgroup(controllers) if bundle.mounts_cgroups() => {
                // Mounted together (`cpu,cpuacct`), they share one directory.
                let mut each = controllers.split(',');
                let found = each.find_map(|name| cgroups.controller(name));
                found.map(Path::to_owned).ok_or_else(unknown)
            }
            _ => Err(unknown()),
        }
    }
}

struct Mount<'a> {
    root: &'a str,
    destination: &'a str,
    kind: &'a str,
    options: &'a str,
}

fn mounts(mountinfo: &str) -> Vec<Mount<'_>> {
    let mount = |line| -> Option<Mount<'_>> {
        let (left, right): (&str, &str) = str::split_once(line, " - ")?;
        let mut left = left.split(' ').skip(3);
        let mut right = right.split(' ');
        Some(Mount {
            root: left.next()?,
            destination: left.next()?,
            kind: right.next()?,
            options: right.nth(1)?,
        })
    };
    mountinfo.lines().filter_map(mount).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_names_only_mounts_of_the_configuration() {
        let config = br#"{"mounts": [{"destination": "/data", "type": "bind", "source": "data"}]}"#;
        let bundle = Bundle::parse(Path::new("/b"), config).expect("a bundle");
        let cgroups =
            Cgroups::from_state(&serde_json::json!({"": "/sys/fs/cgroup/x"})).expect("cgroups");
        let mount =
            |destination: &str, kind| ExternalMount { destination: destination.into(), kind };
        let good = mount("/data", ExternalKind::Bind).at_restore(&bundle, &cgroups);
        assert_eq!(good.expect("known"), "mnt[/data]:/b/data");
        for kind in
            [ExternalKind::Bind, ExternalKind::Masked, ExternalKind::Cgroup("memory".into())]
        {
            assert!(mount("/etc", kind).at_restore(&bundle, &cgroups).is_err());
        }
    }
}
