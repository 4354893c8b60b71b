//! Asking another host, over fresh connections: what became of a committed session, and what CPU it can offer.

use std::time::Duration;

use super::commit::Answer;
use super::error::{Result, SessionError, chain};
use super::link::Link;
use crate::protocol::control::{Commit, CpuQuestion, Settlement, reply, request};
use crate::transport::{Control, Dialer, PeerAddress, Role};

/// How long one try may take to connect.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long the answer may take: the destination may be activating.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Pauses between tries grow from the first to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// The pauses between tries, each twice as long as the one before, up to a limit.
pub(super) struct Pauses(Duration);

impl Pauses {
    /// Short at first.
    pub(super) fn new() -> Self {
        Self(PAUSES.0)
    }

    /// How long to wait now.
    pub(super) fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(PAUSES.1);
        pause
    }
}

/// Asks until an answer comes; never gives up by itself. The answer, and why.
pub async fn ask_until_settled(
    dialer: &Dialer,
    peer: &PeerAddress,
    commit: &Commit,
) -> (Answer, String) {
    let mut pauses = Pauses::new();
    loop {
        match ask(dialer, peer, commit).await {
            Ok(answer) => return answer,
            Err(error) => {
                tracing::info!(migration = %commit.migration, peer = %peer.name,
                    error = %chain(&error), "No answer yet; asking again");
            }
        }
        tokio::time::sleep(pauses.next()).await;
    }
}

/// Asks once.
///
/// # Errors
/// [`SessionError::Unreachable`] when nothing was said to the destination; anything else when it was
/// asked and gave no answer that makes sense. It may act on the question all the same.
pub async fn ask(dialer: &Dialer, peer: &PeerAddress, commit: &Commit) -> Result<(Answer, String)> {
    let connection = dialer
        .dial(peer, Role::Control, CONNECT_WITHIN)
        .await
        .map_err(|source| SessionError::Unreachable { host: peer.name.clone(), source })?;
    let mut link = Link::new(Control::new(connection));
    link.send(request::Body::Commit(commit.clone())).await;
    let body = link.reply(ANSWER_WITHIN, "asking what became of the workload").await?;
    let settled = match body {
        reply::Body::Settled(settled) => read_settlement(&settled, &peer.name),
        other => Err(link.unexpected(&other, "asking what became of the workload")),
    };
    link.close().await;
    settled
}

/// Asks what CPU `peer` can offer a guest; the answer is in the backend's own JSON.
///
/// # Errors
/// When it cannot be reached, cannot say, or does not know the question.
pub async fn ask_cpu(dialer: &Dialer, peer: &PeerAddress) -> Result<Vec<u8>> {
    const DOING: &str = "asking what CPU it can offer";
    let connection = dialer
        .dial(peer, Role::Control, CONNECT_WITHIN)
        .await
        .map_err(|source| SessionError::Unreachable { host: peer.name.clone(), source })?;
    let mut link = Link::new(Control::new(connection));
    link.send(request::Body::CpuQuestion(CpuQuestion {})).await;
    let offer = match link.answer(ANSWER_WITHIN, DOING).await {
        Ok(Some(reply::Body::CpuAnswer(answer))) => Ok(answer.offer),
        Ok(Some(other)) => Err(link.unexpected(&other, DOING)),
        // What an older one does about a question that it does not know.
        Ok(None) => Err(SessionError::Peer {
            host: peer.name.clone(),
            text:
                "it closed the connection instead of saying what CPU it can offer: its decamp is \
                   older than this question"
                    .to_owned(),
        }),
        Err(error) => Err(error),
    };
    link.close().await;
    offer
}

/// What a destination's answer means.
///
/// # Errors
/// When this build does not know the word.
pub(super) fn read_settlement(
    settled: &crate::protocol::control::Settled,
    host: &str,
) -> Result<(Answer, String)> {
    let answer = match settled.settlement() {
        Settlement::Running => Answer::Running,
        Settlement::Aborted => Answer::Aborted,
        Settlement::Undecided => Answer::Undecided,
        Settlement::Unspecified => {
            return Err(SessionError::Protocol {
                host: host.to_owned(),
                what: "it answered Commit with a word that this build does not know".to_owned(),
            });
        }
    };
    Ok((answer, settled.reason.clone()))
}
