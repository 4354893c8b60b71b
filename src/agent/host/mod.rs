//! What this host says to workloads that want to come: where their files go, every reason against it,
//! and what the registry says while they arrive. How they arrive is the session's business.
//!
//! Where files go is in `places`, what speaks against it in `checks`, and the registry's part in
//! `entering`.

mod checks;
mod entering;
mod places;

use std::path::PathBuf;
use std::sync::Arc;

use decamp_shared::session::DestinationHost;
use decamp_shared::workload::{
    DestinationWorkload, Kind, Manifest, PlacedTree, Refusal, RefusalCode, Result, WorkloadError,
};

pub(in crate::agent) use checks::device_of;
use places::place;
pub(in crate::agent) use places::unfit;

use crate::agent::answer::chain;
use crate::agent::config::PageEncryption;
use crate::agent::registry::Workload;
use crate::agent::{Agent, arrivals};
use crate::backend::{entry, role_word, still_shared};
use crate::messages::{FileEntry, State};

/// This host as sessions see it.
pub(crate) struct ArrivalHost {
    agent: Arc<Agent>,
}

impl ArrivalHost {
    /// The host of this agent.
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    /// The entry of an earlier stay of this very workload: it moved away, and its files are here.
    fn earlier_stay(&self, manifest: &Manifest) -> Option<Workload> {
        let found = self.agent.registry.by_uuid(&manifest.uuid).ok().flatten()?;
        (found.state == State::Moved && found.name == manifest.name).then_some(found)
    }
}

impl DestinationHost for ArrivalHost {
    fn name(&self) -> &str {
        &self.agent.config.name
    }

    fn page_encryption(&self) -> bool {
        self.agent.config.page_encryption == PageEncryption::On
    }

    fn cpu_offer(&self) -> Result<Vec<u8>> {
        self.agent.backends.of(Kind::Vm)?.cpu_offer()
    }

    fn place_trees(
        &self,
        manifest: &Manifest,
        paths: &[(PathBuf, PathBuf)],
    ) -> std::result::Result<Vec<PlacedTree>, Vec<Refusal>> {
        place(manifest, paths, &self.agent.config.paths, &self.agent.config.state_dir)
    }

    fn preflight(&self, manifest: &Manifest, trees: &[PlacedTree]) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        self.check_identity(manifest, &mut refusals);
        match manifest.kind() {
            Kind::Unspecified => refusals.push(Refusal::new(
                RefusalCode::Unsupported,
                format!("This version knows no workload of kind {}", manifest.kind),
            )),
            kind => match self.agent.backends.of(kind) {
                Ok(backend) => refusals.extend(backend.preflight(manifest, trees)),
                Err(error) => refusals.push(Refusal::new(RefusalCode::Unsupported, chain(&error))),
            },
        }
        self.check_paths(manifest, trees, &mut refusals);
        self.check_disk(manifest, trees, &mut refusals);
        refusals
    }

    fn known_copy(&self, manifest: &Manifest, tree: &PlacedTree) -> bool {
        let role = role_word(tree.tree.role());
        self.earlier_stay(manifest).is_some_and(|earlier| {
            // What other hosts have too is nobody's copy, and nothing of it is replaced.
            let is_it = |file: &FileEntry| file.path == tree.path && file.role == role;
            earlier.files.iter().any(|file| is_it(file) && !file.shared)
        })
    }

    fn prepare(
        &self,
        migration: &str,
        manifest: &Manifest,
        trees: &[PlacedTree],
    ) -> Result<Box<dyn DestinationWorkload>> {
        let claim = self.agent.claims.take(&manifest.name, "arriving").map_err(|doing| {
            WorkloadError::plain(format!("{} is {doing} here right now", manifest.name))
        })?;
        let kind = manifest.kind();
        let spec = self.agent.backends.of(kind)?.respec(manifest, trees)?;
        let mut incoming =
            Workload::new(&manifest.name, &manifest.uuid, kind, spec.clone(), State::Incoming);
        incoming.migration = Some(migration.to_owned());
        let earlier = self.earlier_stay(manifest).map(|earlier| earlier.files).unwrap_or_default();
        let files = trees.iter().map(|placed| entry(&placed.tree, &placed.path)).collect();
        incoming.files = still_shared(files, &earlier);
        self.enter(incoming, trees)?;
        let built = self.build(manifest, &spec);
        drop(claim);
        built.inspect_err(|_| self.gone(migration, manifest))
    }

    fn running(&self, migration: &str, manifest: &Manifest) {
        match self.agent.enter_arrival(migration, &manifest.name) {
            Ok(()) => tracing::info!(migration, workload = manifest.name, "Runs here now"),
            Err(answer) => {
                tracing::error!(
                    migration,
                    workload = manifest.name,
                    "Runs here, but cannot be entered; the journal knows, and it is tried again: {answer}"
                );
                self.agent.try_again(migration, &manifest.name, Agent::enter_arrival);
            }
        }
    }

    fn undecided(&self, migration: &str, _manifest: &Manifest) {
        arrivals::look_after(&self.agent, migration);
    }

    fn recovers(&self, migration: &str) -> bool {
        self.agent.recovering.has(migration)
    }

    fn gone(&self, migration: &str, manifest: &Manifest) {
        if let Err(answer) = self.agent.forget_arrival(migration, &manifest.name) {
            tracing::error!(
                migration,
                workload = manifest.name,
                "Cannot take the entry of an arrival back; it is tried again: {answer}"
            );
            self.agent.try_again(migration, &manifest.name, Agent::forget_arrival);
        }
    }
}
