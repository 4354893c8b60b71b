//! Moves away from this host: those under way, who is told of them, and what the registry says when
//! they end. How a move is done is the session's business.
//!
//! Here is the list of them; each begins in `beginning`, tells in `telling`, and is noted in `settling`. Disks that move
//! within this host have a room of their own, `within`.

mod beginning;
mod settling;
mod telling;
pub(super) mod within;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use decamp_shared::session::progress::Phase;
use decamp_shared::session::{Progress, Report};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::agent::answer::{Answer, Result};
use crate::messages::{FileEntry, MigrationView};

/// What a claim for a move says.
pub(crate) const DOING: &str = "being moved";
/// How long `cancel` waits for the move to end.
const CANCEL_WITHIN: Duration = Duration::from_secs(60);
/// The least of an id that stands for it: less is typed by mistake, or was to be a name.
const ID_LEAST: usize = 6;
/// Reports of earlier moves that are listed.
const LISTED: u32 = 100;

/// The moves that are under way.
#[derive(Debug, Default)]
pub(crate) struct Moves(Mutex<BTreeMap<String, Arc<Move>>>);

/// One move under way.
#[derive(Debug)]
pub(crate) struct Move {
    id: String,
    workload: String,
    to: String,
    /// What the registry had as its files before it began.
    files: Vec<FileEntry>,
    cancel: CancellationToken,
    events: broadcast::Sender<Progress>,
    told: Mutex<Told>,
    over: watch::Sender<bool>,
}

/// What a move told last.
#[derive(Debug, Default)]
struct Told {
    phase: Option<Phase>,
    report: Option<Report>,
}

/// Whether `key` is as much of a migration's id as it takes to mean it.
pub(super) fn begins_so(id: &str, key: &str) -> bool {
    key.len() >= ID_LEAST && id.starts_with(key)
}

/// Takes a move out of the list, however its task ends.
struct Listed {
    agent: Arc<Agent>,
    moving: Arc<Move>,
}

impl Moves {
    fn held(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Move>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the move of exactly that id is under way.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.held().contains_key(id)
    }

    /// The move under way with that id, or of the workload of that name; else the only one whose id begins
    /// so.
    fn find(&self, key: &str) -> Option<Arc<Move>> {
        let held = self.held();
        let exact = held.get(key).or_else(|| held.values().find(|one| one.workload == key));
        let begins = || {
            let mut begin = held.values().filter(|one| begins_so(&one.id, key));
            begin.next().filter(|_| begin.next().is_none())
        };
        exact.or_else(begins).cloned()
    }

    /// Cancels every move that can still be, and waits for all to end.
    pub(crate) async fn end_all(&self, within: Duration) {
        let all: Vec<Arc<Move>> = self.held().values().cloned().collect();
        let ends = all.iter().map(|moving| {
            moving.cancel.cancel();
            moving.ended()
        });
        if tokio::time::timeout(within, futures_util::future::join_all(ends)).await.is_err() {
            tracing::warn!("A move did not end in time; the next agent finds it in the journal");
        }
    }
}

impl Agent {
    /// Calls a move off and waits until it has ended.
    pub(crate) async fn cancel_move(&self, key: &str) -> Result<MigrationView> {
        let moving = self
            .moves
            .find(key)
            .ok_or_else(|| Answer::UnknownMigration(key.to_owned(), "under way on this host"))?;
        moving.cancel.cancel();
        tracing::info!(migration = moving.id, workload = moving.workload, "Called off on request");
        // A move past its fence ends in its own time; the view says how far it is.
        let _ = tokio::time::timeout(CANCEL_WITHIN, moving.ended()).await;
        Ok(moving.view())
    }

    /// The move under way behind `key`, for one more listener.
    pub(crate) fn follow_move(&self, key: &str) -> Result<Body> {
        let moving = self
            .moves
            .find(key)
            .ok_or_else(|| Answer::UnknownMigration(key.to_owned(), "under way on this host"))?;
        Ok(moving.lines())
    }

    /// Moves under way, then those that ended, the newest first.
    pub(crate) fn list_moves(&self) -> Result<Vec<MigrationView>> {
        let mut views: Vec<MigrationView> =
            self.moves.held().values().map(|one| one.view()).collect();
        for report in self.journal.reports(LISTED)? {
            if views.iter().all(|view| view.migration != report.migration) {
                views.push(MigrationView {
                    migration: report.migration.clone(),
                    workload: report.workload.clone(),
                    to: report.to.clone(),
                    active: false,
                    phase: None,
                    report: Some(report),
                });
            }
        }
        Ok(views)
    }
}

impl Listed {
    /// Ends the move. Its claim was given back: whoever hears the report finds the workload free.
    fn end(self, report: Report) {
        let reason = report.reason.as_deref().unwrap_or_default();
        tracing::info!(
            migration = self.moving.id,
            workload = self.moving.workload,
            to = self.moving.to,
            outcome = ?report.outcome,
            reason,
            "Move ended"
        );
        self.moving.tell(Progress::Report { report: Box::new(report) });
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.agent.moves.held().remove(&self.moving.id);
        self.moving.over.send_replace(true);
    }
}

#[cfg(test)]
mod tests;
