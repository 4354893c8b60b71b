//! What a restart left open, settled: at the start of an agent, before it listens to anybody, and
//! whenever a move ended without an answer.

use super::asking::{ask, ask_until_settled};
use super::commit::{
    Answer, Destination, DestinationAction, DestinationInput, Keep, Record, Sight, Source,
};
use super::departure::{Departure, Wish};
use super::error::{Result, SessionError, chain};
use super::journal::{Journal, JournalError, Role, SessionRow};
use super::source::Fate;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

use crate::files::Landing;
use crate::protocol::control::Commit;
use crate::transport::{Dialer, PeerAddress};
use crate::workload::SourceWorkload;

/// A source session that a restart, or silence, left open.
pub struct OpenDeparture {
    row: SessionRow,
    dialer: Dialer,
    departure: tokio::sync::Mutex<Departure>,
    /// An operator speaks: nobody asks any more.
    decided: CancellationToken,
    /// Held by whoever asks, so that no question is under way when an operator's word is carried out.
    asking: tokio::sync::Mutex<()>,
}

impl OpenDeparture {
    /// Takes the session up again: does what can be done alone (an unfenced workload is resumed
    /// when this returns) and keeps the rest for [`OpenDeparture::settle`].
    pub async fn take_up(
        journal: Arc<Journal>,
        dialer: Dialer,
        row: SessionRow,
        sight: Sight,
        workload: Option<Box<dyn SourceWorkload>>,
    ) -> (Self, Option<Fate>) {
        let (departure, wishes) =
            Departure::restart(&row.migration, row.token, journal, row.record, sight, workload)
                .await;
        let fate = if wishes.contains(&Wish::Commit) { None } else { fate(departure.machine()) };
        let departure = tokio::sync::Mutex::new(departure);
        let (decided, asking) = (CancellationToken::new(), tokio::sync::Mutex::default());
        (Self { row, dialer, departure, decided, asking }, fate)
    }

    /// What the journal said when it was taken up.
    pub fn row(&self) -> &SessionRow {
        &self.row
    }

    /// Asks the destination until it answers, and does as it says. Gives
    /// [`Fate::Unresolved`] when it does not know either, and nothing when an operator spoke first.
    pub async fn settle(&self) -> Option<Fate> {
        let (answer, reason) = {
            let _asking = self.asking.lock().await;
            let (peer, commit) = (self.peer(), self.commit());
            tokio::select! {
                biased;
                () = self.decided.cancelled() => return None,
                answer = ask_until_settled(&self.dialer, &peer, &commit) => answer,
            }
        };
        let mut departure = self.departure.lock().await;
        if answer == Answer::Undecided {
            tracing::warn!(migration = %self.row.migration, reason, "The destination does not know");
        }
        departure.answered(answer).await;
        Some(fate(departure.machine()).unwrap_or(Fate::Unresolved))
    }

    /// An operator's word. The destination is asked first: when it knows, its answer counts, and
    /// the fate given may not be the one asked for. While it can be reached and does not say, as when
    /// it is just letting the workload run, nothing is done, and [`Fate::Unresolved`] given.
    pub async fn resolve(&self, keep: Keep) -> Fate {
        self.decided.cancel();
        let _asking = self.asking.lock().await;
        let asked = ask(&self.dialer, &self.peer(), &self.commit()).await;
        let mut departure = self.departure.lock().await;
        match asked {
            Ok((Answer::Undecided, _)) | Err(SessionError::Transport { .. }) => {}
            Ok((answer, _)) => {
                departure.answered(answer).await;
            }
            Err(error) => {
                tracing::warn!(migration = %self.row.migration, error = %chain(&error),
                    "The destination is there and does not say");
                return fate(departure.machine()).unwrap_or(Fate::Unresolved);
            }
        }
        if fate(departure.machine()).is_none() {
            departure.resolve(keep).await;
        }
        fate(departure.machine()).unwrap_or(Fate::Unresolved)
    }

    fn peer(&self) -> PeerAddress {
        PeerAddress { name: self.row.peer.clone(), address: self.row.peer_address.clone() }
    }

    fn commit(&self) -> Commit {
        Commit { migration: self.row.migration.clone(), token: self.row.token }
    }
}

/// Settles what a restart left of a session at its destination, as far as it can be. `discard`
/// takes away a copy that never started. Gives the record that now stands; COMMITTED means that
/// nobody knows.
///
/// # Errors
/// When the journal cannot be written; nothing was discarded then.
pub fn recover_arrival(
    journal: &Journal,
    row: &SessionRow,
    sight: Sight,
    discard: impl FnOnce(),
) -> Result<Record> {
    let (machine, actions) = Destination::restart(Some(row.record), sight);
    finish_arrival(journal, row, machine, actions, discard)
}

/// An operator's word on an undecided arrival.
///
/// # Errors
/// When the journal cannot be written.
pub fn resolve_arrival(
    journal: &Journal,
    row: &SessionRow,
    sight: Sight,
    keep: Keep,
    discard: impl FnOnce(),
) -> Result<Record> {
    let (machine, actions) = Destination::restart(Some(row.record), sight);
    if machine != Destination::Undecided {
        // Something can be known after all, and counts for more.
        return finish_arrival(journal, row, machine, actions, discard);
    }
    let (machine, actions) = machine.step(DestinationInput::Resolve(keep));
    finish_arrival(journal, row, machine, actions, discard)
}

fn finish_arrival(
    journal: &Journal,
    row: &SessionRow,
    mut machine: Destination,
    actions: Vec<DestinationAction>,
    discard: impl FnOnce(),
) -> Result<Record> {
    let mut discard = Some(discard);
    let mut record = row.record;
    let mut todo: std::collections::VecDeque<_> = actions.into();
    while let Some(action) = todo.pop_front() {
        match action {
            DestinationAction::Journal(written) => {
                write(journal, row, written)?;
                record = written;
                let (next, more) = machine.step(DestinationInput::Journaled(written));
                machine = next;
                todo.extend(more);
            }
            DestinationAction::Discard => {
                if let Some(discard) = discard.take() {
                    discard();
                }
            }
            // Nobody waits on a connection for an answer: a source that does not know asks.
            DestinationAction::Answer(_) | DestinationAction::Activate => {}
        }
    }
    settle_files(journal, row, record);
    Ok(record)
}

/// What an arrival made on this host's disk stays with a workload that runs here, and goes with one that
/// never will. Nothing to do as long as that is open, or when it was done before.
pub fn settle_files(journal: &Journal, row: &SessionRow, record: Record) {
    let keep = match record {
        Record::Running => true,
        Record::Aborted => false,
        _ => return,
    };
    // A Commit that belonged to no session may have left a row with any id.
    if row.role != Role::Destination || row.migration.parse::<uuid::Uuid>().is_err() {
        return;
    }
    match Landing::recover(&journal.landing_record(&row.migration)) {
        Ok(landing) if keep => landing.keep(),
        Ok(landing) => landing.remove(),
        Err(error) => tracing::warn!(migration = %row.migration, %error,
            "Cannot read what an arrival left on the disk"),
    }
}

fn write(
    journal: &Journal,
    row: &SessionRow,
    record: Record,
) -> std::result::Result<(), JournalError> {
    journal.record(&row.migration, Role::Destination, record)
}

/// Where the workload is, once the machine has come to its end.
fn fate(machine: Source) -> Option<Fate> {
    match machine {
        Source::RolledBack | Source::Resuming => Some(Fate::Here),
        Source::Released | Source::Releasing => Some(Fate::Moved),
        _ => None,
    }
}
