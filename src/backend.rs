//! The only file that names both kinds of workload: everything else speaks of a
//! [`Backend`] and of a [`Kind`].

use std::path::PathBuf;
use std::sync::Arc;

use decamp_container::ContainerBackend;
use decamp_shared::keeper::KeeperConfig;
use decamp_shared::workload::{Backend, FileRole, HostTools, Kind, Result, WorkloadError};
use decamp_vm::VmBackend;
use serde_json::Value;

use crate::messages::FileEntry;

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

/// The files that a workload of this spec stands on.
pub(crate) fn files_of(kind: Kind, spec: &Value) -> Vec<FileEntry> {
    let keys: &[(&str, FileRole)] = match kind {
        Kind::Vm => &[("kernel", FileRole::Kernel), ("initrd", FileRole::Initrd)],
        Kind::Container => &[("bundle", FileRole::Bundle)],
        Kind::Unspecified => &[],
    };
    keys.iter()
        .filter_map(|(key, role)| {
            let path = spec.get(key)?.as_str()?;
            Some(FileEntry { role: role_word(*role).to_owned(), path: PathBuf::from(path) })
        })
        .collect()
}

/// A role as it is stored and printed.
pub(crate) fn role_word(role: FileRole) -> &'static str {
    match role {
        FileRole::Kernel => "kernel",
        FileRole::Initrd => "initrd",
        FileRole::Bundle => "bundle",
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
            vec![FileEntry { role: "kernel".into(), path: "/srv/k".into() }]
        );
        let container = json!({"bundle": "/srv/redis"});
        assert_eq!(files_of(Kind::Container, &container)[0].role, "bundle");
        assert!(files_of(Kind::Vm, &container).is_empty());
    }
}
