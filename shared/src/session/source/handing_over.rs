//! The stop, and the change of ownership: what is left goes over, the workload is loaded there, and the
//! fence, the commit and the release make it the destination's.

use std::time::{Duration, Instant};

use super::{Departing, millis};
use crate::methods::Ways;
use crate::pages::PageSet;
use crate::protocol::control::{Commit, reply, request};
use crate::session::asking::{ask_until_settled, read_settlement};
use crate::session::commit::Answer;
use crate::session::copying::Copying;
use crate::session::departure::Wish;
use crate::session::error::{Result, SessionError, chain, fail_here};
use crate::session::link::Link;
use crate::session::progress::{Phase, Progress};
use crate::workload::Liveness;

/// How long restoring a workload may take.
const LOAD_WITHIN: Duration = Duration::from_secs(300);
/// How long the answer to Commit is awaited on the connection that it was sent on.
const COMMIT_WITHIN: Duration = Duration::from_secs(10);
/// How long the destination is asked again, with the user waiting, before the move is reported
/// as unresolved. The agent goes on asking after that.
const ASK_FOR: Duration = Duration::from_secs(60);

impl Departing<'_> {
    /// Stops the workload and sends what is left of it; it is loaded at the destination after.
    pub(super) async fn stop_and_send(
        &mut self,
        copying: &mut Copying,
        held: PageSet,
    ) -> Result<()> {
        self.enter(Phase::Pause);
        fail_here!("source.pause");
        self.halt.check()?;
        let stopped = Instant::now();
        self.stopped = Some(stopped);
        self.departure.with(|workload| workload.pause()).await?;
        self.report.downtime.pause_ms = millis(stopped.elapsed());
        self.enter(Phase::Final);
        fail_here!("source.final");
        let tracked = matches!(self.liveness, Liveness::Tracked { .. });
        let (departure, mut wire, report) = self.parts()?;
        copying.final_stop(departure, held, tracked, &mut wire, report).await?;
        // The workload may have left another way than it had set out on.
        let ways = self.departure.with(|workload| Ok(workload.ways())).await?;
        self.report.dump = ways.dump;
        self.report.fallbacks = ways.fallbacks;
        let loading = Instant::now();
        let halt = self.halt.clone();
        let link = self.link()?;
        match halt.or(link.reply(LOAD_WITHIN, "restoring the workload")).await? {
            reply::Body::Loaded(loaded) => {
                let ways = Ways::from_peer(&loaded.restore, loaded.fallbacks);
                self.report.restore = ways.restore;
                self.report.fallbacks.extend(ways.fallbacks);
            }
            other => return Err(link.unexpected(&other, "restoring the workload")),
        }
        self.report.downtime.restore_ms = millis(loading.elapsed());
        self.halt.check()
    }

    /// Fence, commit, release.
    pub(super) async fn hand_over(&mut self) -> Result<()> {
        self.enter(Phase::Fence);
        let switching = Instant::now();
        let farewell = self.link.as_ref().map(Link::aborter);
        let wishes = self.departure.hand_over(farewell).await;
        if !wishes.contains(&Wish::Commit) {
            return Err(SessionError::Workload(crate::workload::WorkloadError::plain(
                "The workload could not be fenced; see the agent's log",
            )));
        }
        self.progress.phase(Phase::Commit);
        let answered = self.commit_here().await;
        let answer = match answered {
            Ok(answer) => Some(answer),
            Err(error) => {
                let text = format!(
                    "{}; asking {} over a new connection what became of it",
                    chain(&error),
                    self.context.peer.name
                );
                self.progress.tell(Progress::Note { text });
                self.ask_again().await
            }
        };
        let Some((answer, reason)) = answer else {
            return Err(self.unresolved("it cannot be reached"));
        };
        if answer == Answer::Running {
            self.report.downtime_ms = self.stopped.map(|stopped| millis(stopped.elapsed()));
            self.report.downtime.switch_ms = millis(switching.elapsed());
            self.progress.phase(Phase::Release);
        }
        self.departure.answered(answer).await;
        match answer {
            Answer::Running => Ok(()),
            Answer::Aborted => Err(SessionError::Peer {
                host: self.context.peer.name.clone(),
                text: if reason.is_empty() {
                    "it could not run it there".to_owned()
                } else {
                    reason
                },
            }),
            Answer::Undecided => Err(self.unresolved(&reason)),
        }
    }

    async fn commit_here(&mut self) -> Result<(Answer, String)> {
        fail_here!("source.commit");
        let commit = Commit { migration: self.report.migration.clone(), token: self.token };
        let link = self.link()?;
        link.send(request::Body::Commit(commit)).await;
        match link.reply(COMMIT_WITHIN, "waiting for the answer to Commit").await? {
            reply::Body::Settled(settled) => read_settlement(&settled, link.host()),
            other => Err(link.unexpected(&other, "waiting for the answer to Commit")),
        }
    }

    async fn ask_again(&mut self) -> Option<(Answer, String)> {
        if let Some(link) = self.link.take() {
            link.close().await;
        }
        let commit = Commit { migration: self.report.migration.clone(), token: self.token };
        let asking = ask_until_settled(&self.context.dialer, &self.context.peer, &commit);
        tokio::time::timeout(ASK_FOR, asking).await.ok()
    }

    fn unresolved(&self, why: &str) -> SessionError {
        SessionError::NotConverging(format!(
            "{} does not say what became of the workload ({why})",
            self.context.peer.name
        ))
    }
}
