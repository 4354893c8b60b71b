//! What the registry says of a workload that arrives, and how it is taken back when it comes to nothing.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use decamp_shared::workload::{
    DestinationWorkload, Manifest, PlacedTree, Result, Storage, WorkloadError,
};

use super::ArrivalHost;
use super::checks::{other_user_of, unfit_to_share};
use crate::agent::Agent;
use crate::agent::registry::{RegistryError, Workload};
use crate::agent::workloads::blocking;
use crate::messages::State;

/// Between two tries to note how an arrival ended.
const NOTE_AGAIN: Duration = Duration::from_secs(5);

/// Notes how an arrival (its migration, its workload) ended.
type Note = fn(&Agent, &str, &str) -> crate::agent::answer::Result<()>;

impl ArrivalHost {
    /// Enters the workload as arriving; the entry of an earlier stay is kept inside the new one. Since it
    /// was looked at, others may have been entered: two that want one place are told apart here.
    pub(super) fn enter(&self, incoming: Workload, trees: &[PlacedTree]) -> Result<()> {
        let _one_at_a_time = self.agent.entering.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |error| WorkloadError::new("Cannot enter the workload in the registry", error);
        let registry = &self.agent.registry;
        let mut others = registry.list().map_err(failed)?;
        others.retain(|other| other.uuid != incoming.uuid);
        for placed in trees {
            if placed.tree.storage() == Storage::Shared {
                if let Some(why) = unfit_to_share(placed, &others) {
                    return Err(WorkloadError::plain(format!(
                        "{} cannot be shared: {why}",
                        placed.path.display()
                    )));
                }
            } else if let Some(other) = other_user_of(placed, &others) {
                return Err(WorkloadError::plain(format!(
                    "{} is used by workload {}, which has come in the meantime",
                    placed.path.display(),
                    other.name
                )));
            }
        }
        match registry.by_uuid(&incoming.uuid).map_err(failed)? {
            Some(earlier) if earlier.state == State::Moved && earlier.name == incoming.name => {
                registry
                    .change(&incoming.name.clone(), |entry| {
                        *entry = Workload { earlier: Some(Box::new(earlier)), ..incoming };
                    })
                    .map_err(failed)?;
            }
            _ => registry.create(&incoming).map_err(failed)?,
        }
        Ok(())
    }

    pub(super) fn build(
        &self,
        manifest: &Manifest,
        spec: &serde_json::Value,
    ) -> Result<Box<dyn DestinationWorkload>> {
        let place = self.agent.state_dir.place(&manifest.name, &manifest.uuid);
        self.agent
            .state_dir
            .make_place(&place)
            .map_err(|error| WorkloadError::new("Cannot make room for the keeper", error))?;
        self.agent.backends.of(manifest.kind())?.prepare(manifest, spec, &place)
    }
}

impl Agent {
    /// The workload of an arrival runs here. Harmless when it was entered before.
    pub(super) fn enter_arrival(
        &self,
        migration: &str,
        name: &str,
    ) -> crate::agent::answer::Result<()> {
        let entered = self.registry.change(name, |entry| {
            let arrives = matches!(entry.state, State::Incoming | State::Unresolved);
            if arrives && entry.migration.as_deref() == Some(migration) {
                entry.becomes_running();
            }
        });
        match entered {
            Ok(_) | Err(RegistryError::Unknown(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Goes on trying to note how an arrival ended, beside everything else: a disk that is full now may not
    /// stay so.
    pub(super) fn try_again(self: &Arc<Self>, migration: &str, name: &str, note: Note) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (agent, migration, name) = (Arc::clone(self), migration.to_owned(), name.to_owned());
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(NOTE_AGAIN).await;
                let (asked, of, whose) = (Arc::clone(&agent), migration.clone(), name.clone());
                let noted = blocking(move || note(&asked, &of, &whose)).await;
                match noted.and_then(|noted| noted) {
                    Ok(()) => return,
                    Err(answer) => {
                        tracing::debug!(
                            migration,
                            workload = name,
                            "Still cannot note it: {answer}"
                        );
                    }
                }
            }
        });
    }

    /// Takes back what an arrival that came to nothing left: keeper's leftovers, directory, entry.
    /// An earlier stay's entry is put back. Harmless when there is nothing.
    pub(crate) fn forget_arrival(
        &self,
        migration: &str,
        name: &str,
    ) -> crate::agent::answer::Result<()> {
        let Some(workload) = self.registry.get(name)? else { return Ok(()) };
        // Unresolved is one whose host restarted at the wrong moment, until an operator gives it up.
        let arrives = matches!(workload.state, State::Incoming | State::Unresolved);
        if !arrives || workload.migration.as_deref() != Some(migration) {
            return Ok(());
        }
        let place = self.place(&workload);
        self.backends.of(workload.kind)?.sweep(&workload.spec, &place)?;
        crate::agent::restores::take_back_files(&place);
        self.state_dir.remove_place(&place)?;
        match workload.earlier {
            Some(earlier) => {
                self.registry.change(name, |entry| *entry = *earlier)?;
            }
            None => self.registry.remove(name)?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use decamp_shared::session::DestinationHost;
    use decamp_shared::workload::{FileRole, FileTree, Kind};

    use super::*;
    use crate::agent::testing::{Bench, MIGRATION, UUID};
    use crate::backend::entry;

    #[tokio::test(flavor = "multi_thread")]
    async fn how_it_ended_is_noted_when_that_is_possible_again() {
        let manifest = Manifest { name: "web".into(), ..Manifest::default() };
        let bench = Bench::new();
        let host = ArrivalHost::new(Arc::clone(&bench.agent));
        bench.enter(State::Incoming);
        bench.fill_disk(State::Running);
        host.running(MIGRATION, &manifest);
        assert_eq!(bench.state(), Some(State::Incoming));
        bench.free_disk();
        bench.until("another try", |bench| bench.state() == Some(State::Running)).await;

        let bench = Bench::new();
        let host = ArrivalHost::new(Arc::clone(&bench.agent));
        bench.enter(State::Incoming);
        bench.backend.cannot_sweep.store(true, Ordering::SeqCst);
        host.gone("another", &manifest);
        host.gone(MIGRATION, &manifest);
        assert_eq!(bench.state(), Some(State::Incoming));
        bench.backend.cannot_sweep.store(false, Ordering::SeqCst);
        bench.until("another try", |bench| bench.state().is_none()).await;
    }

    #[test]
    fn of_two_that_want_one_place_only_one_is_entered() {
        let bench = Bench::new();
        let host = ArrivalHost::new(Arc::clone(&bench.agent));
        let tree = FileTree {
            role: FileRole::Bundle.into(),
            path: "/srv/a".to_owned(),
            bytes: 1,
            live: true,
            ..FileTree::default()
        };
        let trees = [PlacedTree { tree, path: "/srv/a".into() }];
        let enter = |name: &str, uuid: &str| {
            let spec = serde_json::json!({});
            let mut incoming = Workload::new(name, uuid, Kind::Vm, spec, State::Incoming);
            incoming.files = trees.iter().map(|placed| entry(&placed.tree, &placed.path)).collect();
            host.enter(incoming, &trees)
        };
        enter("web", UUID).expect("the first");
        let error = enter("mail", "another").expect_err("the second").to_string();
        assert!(error.contains("/srv/a is used by workload web"), "{error}");
        assert_eq!(bench.agent.registry.get("mail").expect("reads"), None);
    }
}
