//! The arriving end's hold on a workload: the commit machine of [`super::commit::Destination`] with
//! a real keeper and a real journal behind it. Requests of one session go through here one at a
//! time, whichever connection they came on.

use std::sync::Arc;
use std::time::Duration;

use super::commit::{Answer, Destination, DestinationAction, DestinationInput, Record};
use super::destination::DestinationHost;
use super::error::{Result, SessionError, chain, fail_here};
use super::held::Held;
use super::journal::{Journal, Role};
use crate::files::Landing;
use crate::workload::{self, DestinationWorkload, Manifest, WorkloadError};

/// Pause between two tries of something that must work in the end.
const RETRY: Duration = Duration::from_secs(1);

/// A workload that may arrive.
pub(super) struct Arrival {
    migration: String,
    token: u64,
    journal: Arc<Journal>,
    host: Arc<dyn DestinationHost>,
    manifest: Manifest,
    machine: Destination,
    workload: Held<dyn DestinationWorkload>,
    landing: Arc<Landing>,
    /// Why it will not run here, for the source.
    reason: String,
    /// Whether the host was told how it ended.
    told: bool,
}

impl Arrival {
    /// A session whose BUILDING is on disk.
    pub(super) fn new(
        migration: &str,
        token: u64,
        journal: Arc<Journal>,
        host: Arc<dyn DestinationHost>,
        manifest: Manifest,
        landing: Arc<Landing>,
    ) -> Self {
        Self {
            migration: migration.to_owned(),
            token,
            journal,
            host,
            manifest,
            machine: Destination::Building,
            workload: Held::new(None),
            landing,
            reason: String::new(),
            told: false,
        }
    }

    /// Fencing token of the session.
    pub(super) fn token(&self) -> u64 {
        self.token
    }

    /// Where the commit stands.
    pub(super) fn machine(&self) -> Destination {
        self.machine
    }

    /// Why it did not come to run.
    pub(super) fn reason(&self) -> &str {
        &self.reason
    }

    /// The empty workload is built.
    pub(super) fn hold(&mut self, workload: Box<dyn DestinationWorkload>) {
        self.workload = Held::new(Some(workload));
    }

    /// Lets `work` use the workload on a thread that may block.
    pub(super) async fn with<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut dyn DestinationWorkload) -> workload::Result<R> + Send + 'static,
    ) -> Result<R> {
        self.workload.with("There is no workload in this session yet", |held| work(held)).await
    }

    /// Everything is loaded.
    pub(super) async fn loaded(&mut self) {
        self.feed(DestinationInput::Loaded).await;
    }

    /// The source sent Commit. `None`: nothing durable can be said now, let it ask again.
    pub(super) async fn commit(&mut self) -> Option<Answer> {
        self.feed(DestinationInput::Commit).await
    }

    /// The session is over if it was not committed.
    pub(super) async fn give_up(&mut self, reason: &str) {
        if self.reason.is_empty() {
            self.reason = reason.to_owned();
        }
        self.feed(DestinationInput::GiveUp).await;
        self.tell_host().await;
    }

    /// Tells the host how it ended, once it has. After the answer, so that it costs no downtime.
    pub(super) async fn tell_host(&mut self) {
        let host = self.host.clone();
        let (migration, manifest) = (self.migration.clone(), self.manifest.clone());
        let told = match self.machine {
            _ if self.told => return,
            Destination::Running => {
                self.landing.keep();
                // The keeper needs no session any more; its agent is whoever connects next.
                self.workload = Held::new(None);
                tokio::task::spawn_blocking(move || host.running(&migration, &manifest)).await
            }
            Destination::Aborted => {
                tokio::task::spawn_blocking(move || host.gone(&migration, &manifest)).await
            }
            Destination::Undecided => {
                // Its files stay, and so does the record of them, by which they go when an operator gives
                // the arrival up.
                self.workload = Held::new(None);
                tokio::task::spawn_blocking(move || host.undecided(&migration, &manifest)).await
            }
            _ => return,
        };
        self.told = true;
        if let Err(error) = told {
            tracing::error!(migration = %self.migration, %error, "Cannot tell the host");
        }
    }

    async fn feed(&mut self, input: DestinationInput) -> Option<Answer> {
        let before = self.machine;
        let (machine, actions) = self.machine.step(input);
        self.machine = machine;
        let mut answer = None;
        for action in actions {
            let next = match action {
                DestinationAction::Journal(record) => match self.write(record).await {
                    Ok(()) => Some(DestinationInput::Journaled(record)),
                    Err(error) => {
                        tracing::error!(migration = %self.migration, error = %chain(&error),
                            "Cannot write {}; nothing is answered", record.word());
                        self.machine = before;
                        return None;
                    }
                },
                DestinationAction::Activate => Some(self.activate().await),
                DestinationAction::Discard => {
                    self.discard().await;
                    None
                }
                DestinationAction::Answer(said) => {
                    answer = Some(said);
                    None
                }
            };
            if let Some(input) = next {
                answer = Box::pin(self.feed(input)).await.or(answer);
            }
        }
        answer
    }

    /// COMMITTED may fail, and nothing has happened then. RUNNING and ABORTED say what is so
    /// already: they are tried until they are on disk.
    async fn write(&mut self, record: Record) -> Result<()> {
        loop {
            match self.write_once(record).await {
                Err(error) if record != Record::Committed => {
                    tracing::error!(migration = %self.migration, error = %chain(&error),
                        "Cannot write {} to the journal; trying again", record.word());
                    tokio::time::sleep(RETRY).await;
                }
                result => return result,
            }
        }
    }

    async fn write_once(&mut self, record: Record) -> Result<()> {
        match record {
            Record::Committed => {
                fail_here!("destination.committed");
            }
            Record::Running => {
                fail_here!("destination.running");
            }
            Record::Aborted => {
                fail_here!("destination.aborted");
            }
            _ => {}
        }
        let journal = self.journal.clone();
        let migration = self.migration.clone();
        tokio::task::spawn_blocking(move || journal.record(&migration, Role::Destination, record))
            .await?
            .map_err(SessionError::from)
    }

    async fn activate(&mut self) -> DestinationInput {
        match self.activate_once().await {
            Ok(()) => DestinationInput::Activated,
            Err(error) => {
                self.reason = chain(&error);
                tracing::error!(migration = %self.migration, error = %self.reason, "Cannot activate");
                match error {
                    // A thread of ours that died may have asked the keeper before.
                    SessionError::Workload(WorkloadError::Uncertain { .. })
                    | SessionError::Worker(_) => DestinationInput::ActivateLost,
                    _ => DestinationInput::ActivateFailed,
                }
            }
        }
    }

    async fn activate_once(&mut self) -> Result<()> {
        fail_here!("destination.activate");
        let token = self.token;
        self.with(move |workload| workload.activate(token)).await
    }

    async fn discard(&mut self) {
        if !self.workload.is_none()
            && let Err(error) = self.with(|workload| workload.discard()).await
        {
            tracing::error!(migration = %self.migration, error = %chain(&error),
                "Cannot take the prepared copy away");
        }
        self.workload = Held::new(None);
        let landing = self.landing.clone();
        // Nothing of ours may stay behind, whatever became of the thread.
        let _ = tokio::task::spawn_blocking(move || landing.remove()).await;
    }
}
