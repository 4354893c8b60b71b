//! What a move tells while it is under way, to whoever listens: the report last.

use std::sync::{Arc, MutexGuard, PoisonError};

use axum::body::{Body, Bytes};
use decamp_shared::session::Progress;
use futures_util::stream;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};

use super::{Move, Told};
use crate::messages::MigrationView;

impl Move {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell(&self, event: Progress) {
        let mut told = self.told();
        match &event {
            Progress::Phase { phase } => told.phase = Some(*phase),
            Progress::Report { report } => told.report = Some((**report).clone()),
            _ => {}
        }
        // Without listeners nobody misses it. Sent under the lock, so that whoever subscribes sees
        // the report either there or here.
        let _ = self.events.send(event);
    }

    pub(super) fn view(&self) -> MigrationView {
        let told = self.told();
        MigrationView {
            migration: self.id.clone(),
            workload: self.workload.clone(),
            to: self.to.clone(),
            active: told.report.is_none(),
            phase: told.phase,
            report: told.report.clone(),
        }
    }

    /// Its events from now on as JSON lines, the report last.
    pub(crate) fn lines(&self) -> Body {
        let told = self.told();
        let begin = Progress::Started {
            migration: self.id.clone(),
            workload: self.workload.clone(),
            to: self.to.clone(),
        };
        let mut first = vec![begin];
        first.extend(told.phase.map(|phase| Progress::Phase { phase }));
        let ended = told.report.clone().map(|report| Progress::Report { report: Box::new(report) });
        let events = match ended {
            Some(report) => {
                first.push(report);
                None
            }
            None => Some(self.events.subscribe()),
        };
        let begin = stream::iter(first.iter().map(line).collect::<Vec<_>>());
        Body::from_stream(futures_util::StreamExt::chain(begin, stream::unfold(events, next_line)))
    }

    pub(super) async fn ended(&self) {
        // The sender lives in this very object.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }
}

async fn next_line(
    events: Option<broadcast::Receiver<Progress>>,
) -> Option<(std::io::Result<Bytes>, Option<broadcast::Receiver<Progress>>)> {
    let mut events = events?;
    loop {
        match events.recv().await {
            Ok(event) => {
                let is_last = matches!(event, Progress::Report { .. });
                return Some((line(&event), (!is_last).then_some(events)));
            }
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return None,
        }
    }
}

fn line(event: &Progress) -> std::io::Result<Bytes> {
    let mut text = serde_json::to_vec(event)?;
    text.push(b'\n');
    Ok(text.into())
}

/// Tells on what the session tells. The report is left out: it is told once the registry says the
/// same.
pub(super) async fn follow(moving: Arc<Move>, mut events: mpsc::UnboundedReceiver<Progress>) {
    while let Some(event) = events.recv().await {
        if !matches!(event, Progress::Report { .. } | Progress::Started { .. }) {
            moving.tell(event);
        }
    }
}
