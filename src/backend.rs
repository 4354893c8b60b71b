//! The only file that names both kinds of workload: everything else speaks of a
//! [`Backend`] and of a [`Kind`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use decamp_container::ContainerBackend;
pub(crate) use decamp_container::hooks as container;
use decamp_shared::keeper::KeeperConfig;
use decamp_shared::workload::{
    Backend, FileRole, FileTree, HostTools, Kind, Result, Storage, WorkloadError,
};
use decamp_vm::{Baseline, Offer, VmBackend};
use serde_json::Value;

use crate::messages::{BaselineAnswer, FileEntry};

/// One backend a kind.
#[derive(Clone)]
pub(crate) struct Backends {
    vm: Arc<dyn Backend>,
    container: Arc<dyn Backend>,
}

impl Backends {
    /// Backends that use these tools.
    pub(crate) fn new(tools: &HostTools) -> Self {
        Self {
            vm: Arc::new(VmBackend::new(tools.clone())),
            container: Arc::new(ContainerBackend::new(tools.clone())),
        }
    }

    /// One backend for both kinds.
    #[cfg(test)]
    pub(crate) fn both(backend: Arc<dyn Backend>) -> Self {
        Self { vm: Arc::clone(&backend), container: backend }
    }

    /// The backend of `kind`.
    ///
    /// # Errors
    /// When there is none, as for a kind that a newer peer knows.
    pub(crate) fn of(&self, kind: Kind) -> Result<Arc<dyn Backend>> {
        match kind {
            Kind::Vm => Ok(Arc::clone(&self.vm)),
            Kind::Container => Ok(Arc::clone(&self.container)),
            Kind::Unspecified => {
                Err(WorkloadError::plain("A workload of kind unspecified cannot be run"))
            }
        }
    }
}

/// Lives as the keeper of one workload; returns when the workload is gone from this host.
///
/// # Errors
/// When the workload could not be started or built.
pub(crate) fn keeper_main(config: KeeperConfig) -> Result<()> {
    match config.kind {
        Kind::Vm => decamp_vm::keeper_main(config),
        Kind::Container => decamp_container::keeper_main(&config),
        Kind::Unspecified => Err(WorkloadError::plain("There is no keeper of kind unspecified")),
    }
}

/// Stands for the OCI runtime that podman called with `arguments`; the keeper on `socket` does the work.
///
/// # Errors
/// When it did not.
pub(crate) fn shim_main(socket: &Path, arguments: &[String]) -> Result<()> {
    Ok(decamp_container::podman::shim::shim_main(socket, arguments)?)
}

/// The widest CPU that all of `offers`, each a host's name and its backend's own words, have in common, as it
/// is written into a file, what each host has beyond it, and who says less than he could.
///
/// # Errors
/// When an offer is none, or there is nothing in common.
pub(crate) fn cpu_baseline(offers: &[(String, Vec<u8>)]) -> Result<BaselineAnswer> {
    let read = |(host, offer): &(String, Vec<u8>)| {
        let offer = Offer::parse(offer)
            .map_err(|error| WorkloadError::new(format!("Cannot understand {host}"), error))?;
        Ok((host.clone(), offer))
    };
    let offers: Vec<_> = offers.iter().map(read).collect::<Result<_>>()?;
    let (baseline, lost) = Baseline::of(&offers)?;
    let silent = offers.iter().filter(|(_, offer)| offer.registers.is_none());
    let silent = silent.map(|(host, _)| host.clone()).collect();
    let baseline = serde_json::to_value(&baseline)
        .map_err(|error| WorkloadError::new("Could not write a CPU baseline", error))?;
    Ok(BaselineAnswer { baseline, lost, silent })
}

/// What the spec of a virtual machine holds of a file with a CPU baseline.
///
/// # Errors
/// When the file is none.
pub(crate) fn read_cpu_baseline(file: &[u8]) -> Result<Value> {
    serde_json::to_value(Baseline::parse(file)?.held())
        .map_err(|error| WorkloadError::new("Could not write a CPU baseline", error))
}

/// The files that a workload of this spec stands on.
pub(crate) fn files_of(kind: Kind, spec: &Value) -> Vec<FileEntry> {
    let keys: &[(&str, FileRole)] = match kind {
        Kind::Vm => &[("kernel", FileRole::Kernel), ("initrd", FileRole::Initrd)],
        Kind::Container => &[("bundle", FileRole::Bundle)],
        Kind::Unspecified => &[],
    };
    let named = keys.iter().filter_map(|(key, role)| {
        let path = PathBuf::from(spec.get(key)?.as_str()?);
        Some(FileEntry { role: role_word(*role).to_owned(), path, shared: false })
    });
    let mounted = match kind {
        Kind::Container => decamp_container::volume_trees(spec),
        _ => Vec::new(),
    };
    let mounted = mounted.iter().map(|tree| entry(tree, Path::new(&tree.path)));
    let disks = match kind {
        Kind::Vm => spec.get("disks").and_then(Value::as_array).map(Vec::as_slice),
        _ => None,
    };
    let disk = |disk: &Value| {
        let path = PathBuf::from(disk.get("path")?.as_str()?);
        let shared = disk.get("shared").and_then(Value::as_bool).unwrap_or_default();
        Some(FileEntry { role: role_word(FileRole::Disk).to_owned(), path, shared })
    };
    let disks = disks.unwrap_or_default().iter().filter_map(disk);
    named.chain(mounted).chain(disks).collect()
}

/// A tree of a move as the registry has it, at `path`.
pub(crate) fn entry(tree: &FileTree, path: &Path) -> FileEntry {
    let shared = tree.storage() == Storage::Shared;
    FileEntry { role: role_word(tree.role()).to_owned(), path: path.to_owned(), shared }
}

/// `files` with those at `moves`, old and new paths, where they are now.
pub(crate) fn moved_files(files: &[FileEntry], moves: &[(PathBuf, PathBuf)]) -> Vec<FileEntry> {
    let disk = role_word(FileRole::Disk);
    let now = |file: &FileEntry| {
        let moved = moves.iter().find(|(old, _)| file.role == disk && file.path == *old);
        moved.map_or_else(
            || file.clone(),
            |(_, new)| FileEntry { path: new.clone(), ..file.clone() },
        )
    };
    files.iter().map(now).collect()
}

/// `now`, in which what was shared before still is.
pub(crate) fn still_shared(mut now: Vec<FileEntry>, before: &[FileEntry]) -> Vec<FileEntry> {
    for file in &mut now {
        file.shared |= before.iter().any(|one| one.shared && one.path == file.path);
    }
    now
}

/// Whether a workload of this spec was started by somebody else, who still knows it.
pub(crate) fn is_adopted(spec: &Value) -> bool {
    spec.get("adopted").is_some_and(|adopted| !adopted.is_null())
}

/// Whether podman is in charge of a workload of this spec, and so of its files.
pub(crate) fn is_podmans(spec: &Value) -> bool {
    spec.get("podman").is_some_and(|podman| !podman.is_null())
}

/// Takes away what containers of podman's left that it has no more, but for what `is_used`. Gives what is still to
/// be removed and that nobody can find.
pub(crate) fn clear_podmans(is_used: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    decamp_container::podman::leftover::clear(is_used)
}

/// Whether a workload of this spec is the container that somebody calls `what`, as in `runc:web`.
pub(crate) fn is_adopted_as(spec: &Value, what: &str) -> bool {
    let Some((manager, id)) = what.split_once(':') else { return false };
    let is = |key: &str, word: &str| spec.get(key).and_then(Value::as_str) == Some(word);
    is("adopted", id) && (is("runtime", manager) || manager == "podman")
}

/// A role as it is stored and printed.
pub(crate) fn role_word(role: FileRole) -> &'static str {
    match role {
        FileRole::Kernel => "kernel",
        FileRole::Initrd => "initrd",
        FileRole::Bundle => "bundle",
        FileRole::Volume => "volume",
        FileRole::VolumeFile => "volume-file",
        FileRole::Disk => "disk",
        FileRole::Unspecified => "file",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn files_are_read_from_the_spec() {
        let vm = json!({"kernel": "/srv/k", "initrd": null, "cmdline": "", "cpus": 1});
        assert_eq!(
            files_of(Kind::Vm, &vm),
            vec![FileEntry { role: "kernel".into(), path: "/srv/k".into(), shared: false }]
        );
        let container = json!({"bundle": "/srv/redis"});
        assert_eq!(files_of(Kind::Container, &container)[0].role, "bundle");
        assert!(!is_adopted(&container) && is_adopted(&json!({"adopted": "web"})));
        assert!(!is_podmans(&container) && is_podmans(&json!({"podman": {"name": "web"}})));
        let adopted = json!({"adopted": "web", "runtime": "runc"});
        assert!(is_adopted_as(&adopted, "runc:web") && !is_adopted_as(&adopted, "crun:web"));
        assert!(!is_adopted_as(&container, "runc:web") && !is_adopted_as(&adopted, "web"));
        assert!(files_of(Kind::Vm, &container).is_empty());
    }
}
