//! What a restart left open, settled: at the start of an agent, before it listens to anybody, and
//! whenever a move ended without an answer.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::asking::{Pauses, ask};
use super::commit::{
    Answer, Destination, DestinationAction, DestinationInput, Keep, Record, Sight, Source,
};
use super::departure::{Departure, Wish};
use super::error::{Result, SessionError, chain};
use super::journal::{Journal, JournalError, Role, SessionRow};
use super::source::Fate;
use crate::files::Landing;
use crate::protocol::control::Commit;
use crate::transport::{Dialer, PeerAddress};
use crate::workload::SourceWorkload;

/// Between two questions to a destination that does not know either: an operator may have told it.
const ASK_SLOWLY: Duration = Duration::from_secs(30);

/// An operator waits so long for a question that is under way.
const WORD_HEARD_WITHIN: Duration = Duration::from_secs(60);

/// A source session that a restart, or silence, left open. It holds the workload's keeper, which
/// serves nobody else meanwhile, until the session is settled.
pub struct OpenDeparture {
    row: SessionRow,
    dialer: Dialer,
    departure: tokio::sync::Mutex<Departure>,
    /// Held by whoever asks and does as the answer says. A question that was begun is brought to its
    /// end: the destination may act on it.
    asking: tokio::sync::Mutex<()>,
    /// Settled, by whomever: nobody asks any more.
    over: CancellationToken,
    ask_slowly: Duration,
}

/// What came of an operator's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// It was carried out.
    Obeyed(Fate),
    /// The destination knew better.
    Known(Fate),
    /// It had been settled before.
    Before(Fate),
    /// The destination is there, or was a moment ago, and has not said what it knows, as when it is just
    /// letting the workload run. Nothing was done. Why.
    Open(String),
}

impl Resolution {
    /// Where the workload is, if that is settled.
    pub fn fate(&self) -> Option<Fate> {
        match self {
            Self::Obeyed(fate) | Self::Known(fate) | Self::Before(fate) => Some(*fate),
            Self::Open(_) => None,
        }
    }
}

impl OpenDeparture {
    /// Takes the session up again: does what can be done alone (an unfenced workload is resumed
    /// when this returns) and keeps the rest for [`OpenDeparture::settle`]. `workload` must be there
    /// if its keeper is.
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
        let (over, asking) = (CancellationToken::new(), tokio::sync::Mutex::default());
        (Self { row, dialer, departure, asking, over, ask_slowly: ASK_SLOWLY }, fate)
    }

    /// Asks a destination that does not know this often. For tests.
    #[cfg(test)]
    pub(super) fn asking_every(self, ask_slowly: Duration) -> Self {
        Self { ask_slowly, ..self }
    }

    /// What the journal said when it was taken up.
    pub fn row(&self) -> &SessionRow {
        &self.row
    }

    /// Asks the destination, again and again, until it knows, and does as it says; slowly once it has
    /// said that it does not know. Ends too when an operator's word has settled it.
    pub async fn settle(&self) -> Fate {
        let mut pauses = Pauses::new();
        loop {
            let pause = {
                let _asking = self.asking.lock().await;
                if let Some(fate) = self.fate().await {
                    return fate;
                }
                match self.ask().await {
                    Ok(_) => {}
                    Err(error) => {
                        tracing::info!(migration = %self.row.migration, peer = %self.row.peer,
                            error = %chain(&error), "No answer yet; asking again");
                    }
                }
                match self.departure.lock().await.machine() {
                    Source::Undecided => self.ask_slowly,
                    _ => pauses.next(),
                }
            };
            tokio::select! {
                () = self.over.cancelled() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// An operator's word. The destination is asked first: when it knows, its answer counts, and
    /// the fate may not be the one asked for. Only when it does not know, or nothing could be said to
    /// it, is the operator's word carried out. A connection that broke after the question may have
    /// carried it there.
    pub async fn resolve(&self, keep: Keep) -> Resolution {
        let Ok(_asking) = tokio::time::timeout(WORD_HEARD_WITHIN, self.asking.lock()).await else {
            return Resolution::Open(
                "the destination's answer is being carried out, and the workload's keeper here does \
                 not answer"
                    .to_owned(),
            );
        };
        if let Some(fate) = self.fate().await {
            return Resolution::Before(fate);
        }
        match self.ask().await {
            Ok(Some(fate)) => return Resolution::Known(fate),
            Ok(None) | Err(SessionError::Unreachable { .. }) => {}
            Err(error) => {
                tracing::warn!(migration = %self.row.migration, error = %chain(&error),
                    "The destination is there and does not say");
                return Resolution::Open(chain(&error));
            }
        }
        self.departure.lock().await.resolve(keep).await;
        match self.fate().await {
            Some(fate) => Resolution::Obeyed(fate),
            None => Resolution::Open("the word could not be carried out".to_owned()),
        }
    }

    /// Asks once and does as the answer says. Nothing: the destination does not know either.
    async fn ask(&self) -> Result<Option<Fate>> {
        let peer =
            PeerAddress { name: self.row.peer.clone(), address: self.row.peer_address.clone() };
        let commit = Commit { migration: self.row.migration.clone(), token: self.row.token };
        let (answer, reason) = ask(&self.dialer, &peer, &commit).await?;
        let mut departure = self.departure.lock().await;
        if answer == Answer::Undecided && departure.machine() != Source::Undecided {
            tracing::warn!(migration = %self.row.migration, reason, "The destination does not know");
        }
        departure.answered(answer).await;
        drop(departure);
        Ok(self.fate().await)
    }

    /// Where the workload is, once that is settled. Whoever waits to ask again is told.
    async fn fate(&self) -> Option<Fate> {
        let fate = fate(self.departure.lock().await.machine());
        if fate.is_some() {
            self.over.cancel();
        }
        fate
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
