//! How it is written down that a move ended, and what becomes of what is left here.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use decamp_shared::session::source::{Ending, Fate};
use decamp_shared::session::{MoveOptions, Progress};

use super::Move;
use crate::agent::Agent;
use crate::agent::answer::chain;
use crate::agent::registry::{RegistryError, Workload};
use crate::agent::workloads::gone;
use crate::backend::{entry, still_shared};
use crate::messages::State;

/// What a claim says while it is noted late how a move ended.
const TIDYING: &str = "being noted as moved";
/// Between two tries to note how a move ended.
pub(super) const NOTE_AGAIN: Duration = Duration::from_secs(5);

impl Agent {
    /// Writes down where the workload is after a move.
    pub(super) async fn settle(
        self: &Arc<Self>,
        ending: &Ending,
        options: &MoveOptions,
        moving: &Arc<Move>,
    ) {
        if options.dry_run {
            return;
        }
        match self.registry.change(&moving.workload, |entry| enter_end(entry, ending, moving)) {
            Ok(workload) => self.tidy(&workload, ending.fate, options, moving).await,
            Err(error) => {
                tracing::error!(
                    migration = moving.id,
                    "Cannot note how the move ended; the journal knows: {}",
                    chain(&error)
                );
                if ending.fate != Fate::Unresolved {
                    let (ending, moving) = (ending.clone(), Arc::clone(moving));
                    tokio::spawn(note_end_later(Arc::clone(self), ending, options.clone(), moving));
                }
            }
        }
    }

    /// What is left here of a workload that is noted as moved goes.
    async fn tidy(
        self: &Arc<Self>,
        workload: &Workload,
        fate: Fate,
        options: &MoveOptions,
        moving: &Move,
    ) {
        if fate == Fate::Moved {
            self.sweep_moved(workload).await;
            if options.remove_source {
                self.remove_source(workload, moving).await;
            }
        }
    }

    /// Removes the files of a workload that moved. Its claim must be held.
    pub(super) async fn remove_source(&self, workload: &Workload, moving: &Move) {
        let note = |text: String| moving.tell(Progress::Note { text });
        let name = &workload.name;
        let is_it = |found: &Workload| {
            found.state == State::Moved && found.migration.as_deref() == Some(&moving.id)
        };
        if !self.registry.get(name).is_ok_and(|found| found.as_ref().is_some_and(is_it)) {
            return note(format!("{name} is not what moved away any more, so its files stay"));
        }
        if !gone(&self.place(workload)).await.unwrap_or(false) {
            return note(format!(
                "The old copy of {name} is still being taken away, so its files stay: `decamp rm {name}` \
                 removes them"
            ));
        }
        let answer = match self.remove_files(workload).await {
            Ok(answer) => answer,
            Err(answer) => return note(format!("The files here were not removed: {answer}")),
        };
        for left in &answer.left {
            note(format!("{} stays here: {}", left.path.display(), left.why));
        }
        if answer.left.is_empty() {
            let place = self.place(workload);
            let forgotten = self.registry.remove(&workload.name);
            if let Err(error) = forgotten {
                note(format!("It stays in `ls --all` here: {}", chain(&error)));
            } else if let Err(error) = self.state_dir.remove_place(&place) {
                tracing::warn!("{}", chain(&error));
            }
        }
    }
}

/// What the registry says of a workload when its move has ended.
fn enter_end(entry: &mut Workload, ending: &Ending, moving: &Move) {
    match ending.fate {
        Fate::Here => {
            entry.state = State::Running;
            entry.moved_to = None;
            entry.files.clone_from(&moving.files);
        }
        Fate::Moved => {
            entry.becomes_moved(&moving.to);
            if !ending.trees.is_empty() {
                let files =
                    ending.trees.iter().map(|tree| self::entry(tree, Path::new(&tree.path)));
                entry.files = still_shared(files.collect(), &moving.files);
            }
        }
        Fate::Unresolved => entry.state = State::Unresolved,
    }
}

/// A disk that is full now may not stay so: until it is noted, nothing can be done to the workload.
pub(super) async fn note_end_later(
    agent: Arc<Agent>,
    ending: Ending,
    options: MoveOptions,
    moving: Arc<Move>,
) {
    loop {
        tokio::time::sleep(NOTE_AGAIN).await;
        // As soon as it is noted it may come back, or be removed: not before all of this is done.
        let Ok(_claim) = agent.claims.take(&moving.workload, TIDYING) else { continue };
        let mut entered = false;
        let noted = agent.registry.change(&moving.workload, |entry| {
            // It may have been settled otherwise meanwhile.
            let same = entry.migration.as_deref() == Some(&moving.id);
            entered = same && entry.state == State::Migrating;
            if entered {
                enter_end(entry, &ending, &moving);
            }
        });
        match noted {
            Ok(workload) if entered => {
                return agent.tidy(&workload, ending.fate, &options, &moving).await;
            }
            Ok(_) | Err(RegistryError::Unknown(_)) => return,
            Err(error) => tracing::debug!("Still cannot note how it ended: {}", chain(&error)),
        }
    }
}
