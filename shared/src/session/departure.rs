//! The leaving end's hold on a workload: the commit machine of [`super::commit::Source`] with a
//! real keeper and a real journal behind it. Sessions and recovery both go through here, so that
//! there is one place where a workload is fenced, resumed or released.

use std::sync::Arc;
use std::time::Duration;

use super::commit::{Answer, Keep, Record, Sight, Source, SourceAction, SourceInput};
use super::error::{Result, SessionError, chain, fail_here};
use super::held::Held;
use super::journal::{Journal, Role};
use super::link::Aborter;
use crate::workload::{self, SourceWorkload, WorkloadError};

/// Pause between two tries of something that must work in the end.
const RETRY: Duration = Duration::from_secs(1);
/// Tries to write that the workload runs on here. It does so already, and a restart finds that out by
/// itself: nobody has to wait for a disk that stays full.
const ROLLED_BACK_TRIES: u32 = 5;
/// Tries to take a copy away that does not go.
const RELEASE_TRIES: u32 = 600;

/// A workload that may leave.
pub struct Departure {
    migration: String,
    token: u64,
    journal: Arc<Journal>,
    machine: Source,
    workload: Held<dyn SourceWorkload>,
    /// Whether the journal has a row of this session.
    begun: bool,
    /// How to tell the destination that nothing will come, and why.
    farewell: Option<(Aborter, String)>,
}

/// What the machine wants of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Send Commit and feed the answer to [`Departure::answered`].
    Commit,
}

impl Departure {
    /// Takes hold of a running workload.
    pub fn new(
        migration: &str,
        token: u64,
        journal: Arc<Journal>,
        workload: Box<dyn SourceWorkload>,
    ) -> Self {
        Self {
            migration: migration.to_owned(),
            token,
            journal,
            machine: Source::Open,
            workload: Held::new(Some(workload)),
            begun: false,
            farewell: None,
        }
    }

    /// Takes hold of what a restart left: `record` from the journal, `sight` of the keeper, and
    /// the workload behind it if there is one. Does at once what can be done without the peer.
    pub async fn restart(
        migration: &str,
        token: u64,
        journal: Arc<Journal>,
        record: Record,
        sight: Sight,
        workload: Option<Box<dyn SourceWorkload>>,
    ) -> (Self, Vec<Wish>) {
        let (machine, actions) = Source::restart(record, sight);
        let mut departure = Self {
            migration: migration.to_owned(),
            token,
            journal,
            machine,
            workload: Held::new(workload),
            begun: true,
            farewell: None,
        };
        let wishes = departure.carry_out(actions).await;
        (departure, wishes)
    }

    /// Where the commit stands.
    pub fn machine(&self) -> Source {
        self.machine
    }

    /// Whether the workload's keeper was lost: the workload ended, or was killed.
    pub fn is_lost(&self) -> bool {
        self.workload.is_none()
    }

    /// The session has a row in the journal from now on, with this token.
    pub(super) fn begun(&mut self, token: u64) {
        self.begun = true;
        self.token = token;
    }

    /// Lets `work` use the workload on a thread that may block.
    ///
    /// # Errors
    /// What `work` gives; that the workload is no longer held.
    pub async fn with<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut dyn SourceWorkload) -> workload::Result<R> + Send + 'static,
    ) -> Result<R> {
        self.workload.with("The workload is no longer held by this move", |held| work(held)).await
    }

    /// The destination is prepared: fences. On success the wish is to send Commit. When it cannot be
    /// fenced, the destination is told so through `farewell`, and the workload runs on.
    pub(super) async fn hand_over(&mut self, farewell: Option<Aborter>) -> Vec<Wish> {
        let reason = "the source could not fence the workload".to_owned();
        self.farewell = farewell.map(|aborter| (aborter, reason));
        self.feed(SourceInput::HandOver).await
    }

    /// Gives up where that is still possible: the destination is told why through `farewell`, and the
    /// workload runs on when this returns.
    pub(super) async fn give_up(&mut self, farewell: Option<Aborter>, reason: &str) -> Vec<Wish> {
        self.farewell = farewell.map(|aborter| (aborter, reason.to_owned()));
        self.feed(SourceInput::GiveUp).await
    }

    /// The destination answered a Commit.
    pub async fn answered(&mut self, answer: Answer) -> Vec<Wish> {
        self.feed(SourceInput::Answered(answer)).await
    }

    /// The operator's word on an undecided session.
    pub async fn resolve(&mut self, keep: Keep) -> Vec<Wish> {
        self.feed(SourceInput::Resolve(keep)).await
    }

    async fn feed(&mut self, input: SourceInput) -> Vec<Wish> {
        let (machine, actions) = self.machine.step(input);
        self.machine = machine;
        self.carry_out(actions).await
    }

    async fn carry_out(&mut self, actions: Vec<SourceAction>) -> Vec<Wish> {
        let mut wishes = Vec::new();
        for action in actions {
            let input = match action {
                SourceAction::FenceKeeper => Some(self.fence_keeper().await),
                SourceAction::Journal(record) => self.write(record).await,
                SourceAction::SendCommit => {
                    wishes.push(Wish::Commit);
                    None
                }
                SourceAction::SendAbort => {
                    // At once: what comes next may take long, and the destination holds a copy.
                    if let Some((aborter, reason)) = self.farewell.take() {
                        aborter.abort(&reason).await;
                    }
                    None
                }
                SourceAction::Resume => {
                    self.resume().await;
                    Some(SourceInput::Resumed)
                }
                SourceAction::Release => {
                    self.release().await;
                    None
                }
            };
            if let Some(input) = input {
                wishes.extend(Box::pin(self.feed(input)).await);
            }
        }
        wishes
    }

    async fn fence_keeper(&mut self) -> SourceInput {
        let token = self.token;
        match self.with(move |workload| workload.fence(token)).await {
            Ok(()) => SourceInput::KeeperFenced,
            Err(error) => {
                tracing::warn!(migration = %self.migration, error = %chain(&error), "Cannot fence");
                SourceInput::GiveUp
            }
        }
    }

    /// Writes `record`. Only FENCED may fail, because only before it giving up is still possible.
    /// ROLLED_BACK is left out when it cannot be written for long: nothing comes of it then.
    async fn write(&mut self, record: Record) -> Option<SourceInput> {
        if !self.begun {
            return Some(SourceInput::Journaled(record));
        }
        for tries in 1.. {
            let Err(error) = self.write_once(record).await else { break };
            tracing::error!(migration = %self.migration, error = %chain(&error),
                "Cannot write {} to the journal", record.word());
            match record {
                Record::Fenced => return Some(SourceInput::GiveUp),
                Record::RolledBack if tries >= ROLLED_BACK_TRIES => {
                    tracing::error!(migration = %self.migration,
                        "The workload runs on here; the journal does not say so yet, and the next agent \
                         finds it out");
                    return None;
                }
                _ => tokio::time::sleep(RETRY).await,
            }
        }
        Some(SourceInput::Journaled(record))
    }

    async fn write_once(&mut self, record: Record) -> Result<()> {
        if record == Record::Fenced {
            fail_here!("source.fence");
        }
        let journal = self.journal.clone();
        let migration = self.migration.clone();
        tokio::task::spawn_blocking(move || journal.record(&migration, Role::Source, record))
            .await?
            .map_err(SessionError::from)
    }

    /// Resumes, trying again as long as the keeper is there: nothing runs elsewhere. Whoever took the
    /// session up without a workload has made sure that no keeper listens.
    async fn resume(&mut self) {
        loop {
            if self.workload.is_none() {
                return;
            }
            match self.with(|workload| workload.resume()).await {
                Ok(()) => return,
                Err(SessionError::Workload(WorkloadError::KeeperGone { what, .. })) => {
                    // Without its agent's connection the keeper resumes by itself, or is gone.
                    tracing::error!(migration = %self.migration, what, "Lost the keeper");
                    self.workload = Held::new(None);
                }
                Err(error) => {
                    tracing::error!(migration = %self.migration, error = %chain(&error),
                        "Cannot resume the workload; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Takes the copy away; what does not go at once is tried again beside everything else.
    async fn release(&mut self) {
        if self.workload.is_none() {
            return;
        }
        let failed = self.with(|workload| workload.release()).await.err();
        let Some(held) = self.workload.take() else { return };
        match failed {
            None => {}
            Some(SessionError::Workload(WorkloadError::KeeperGone { what, .. })) => {
                // What it left on the host is for the host to sweep.
                tracing::warn!(migration = %self.migration, what, "The old copy's keeper is gone");
            }
            Some(error) => {
                tracing::error!(migration = %self.migration, error = %chain(&error),
                    "Cannot take the old copy away; it stays stopped, and is tried again");
                tokio::task::spawn_blocking(move || release_later(held));
            }
        }
    }
}

fn release_later(mut held: Box<dyn SourceWorkload>) {
    for _ in 0..RELEASE_TRIES {
        std::thread::sleep(RETRY);
        match held.release() {
            Ok(()) | Err(WorkloadError::KeeperGone { .. }) => return,
            Err(error) => tracing::debug!(error = %chain(&error), "The old copy is still there"),
        }
    }
    tracing::error!("The old copy cannot be taken away; the next agent tries again");
}
