//! The source's control connection: requests out, replies in, and a pulse that notices a dead peer.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::error::{Result, SessionError};
use crate::protocol::control::{Abort, Ping, Reply, Request, reply, request};
use crate::transport::{Control, Peer, TransportError};

/// How often the peer is asked whether it is there.
const PULSE: Duration = Duration::from_secs(2);
/// A peer that said nothing at all for so long is lost.
const SILENCE: Duration = Duration::from_secs(15);

/// How long it may take to hand an Abort to a connection.
const ABORT_WITHIN: Duration = Duration::from_secs(1);

/// The source's end of a control connection.
#[derive(Debug)]
pub(super) struct Link {
    host: String,
    out: Outbox,
    replies: mpsc::Receiver<std::result::Result<reply::Body, Lost>>,
    writer: JoinHandle<()>,
    reader: JoinHandle<()>,
}

/// Tells the destination that nothing will come, for whoever decides that. Does not keep the
/// connection open.
#[derive(Clone, Debug)]
pub(super) struct Aborter(mpsc::WeakSender<Request>);

impl Aborter {
    /// Hands the message to the connection, if that is still there. A connection that stalls is not
    /// waited for: the workload shall run on.
    pub(super) async fn abort(&self, reason: &str) {
        if let Some(out) = self.0.upgrade() {
            let abort = request::Body::Abort(Abort { reason: reason.to_owned() });
            let _ = timeout(ABORT_WITHIN, out.send(abort.into())).await;
        }
    }
}

/// Says things over a control connection beside whoever waits for its replies. Keeps the connection open.
#[derive(Clone, Debug)]
pub(super) struct Outbox(mpsc::Sender<Request>);

impl Outbox {
    /// Hands `body` to the connection; a broken one is noticed by the next [`Link::reply`].
    pub(super) async fn send(&self, body: request::Body) {
        let _ = self.0.send(body.into()).await;
    }
}

/// How a link ended.
#[derive(Debug)]
enum Lost {
    Closed,
    Broken(TransportError),
}

impl Link {
    /// Speaks to the destination over `control`.
    pub(super) fn new(control: Control) -> Self {
        let Peer { name: host, .. } = control.peer().clone();
        let (mut reader, mut writer) = control.split();
        let (out, mut requests) = mpsc::channel::<Request>(16);
        let (said, replies) = mpsc::channel(64);
        let broken = said.clone();
        let writer = tokio::spawn(async move {
            let mut pulse = interval(PULSE);
            pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                let next = tokio::select! {
                    request = requests.recv() => request,
                    _ = pulse.tick() => Some(request::Body::Ping(Ping {}).into()),
                };
                let Some(request) = next else {
                    let _ = writer.close().await;
                    return;
                };
                if let Err(error) = writer.send(&request).await {
                    let _ = broken.send(Err(Lost::Broken(error))).await;
                    return;
                }
            }
        });
        let reader = tokio::spawn(async move {
            loop {
                let next = match reader.recv::<Reply>(SILENCE).await {
                    Ok(Some(Reply { body: Some(reply::Body::Pong(_)) })) => continue,
                    Ok(Some(Reply { body: Some(body) })) => Ok(body),
                    Ok(Some(Reply { body: None })) => continue,
                    Ok(None) => Err(Lost::Closed),
                    Err(error) => Err(Lost::Broken(error)),
                };
                let over = next.is_err();
                if said.send(next).await.is_err() || over {
                    return;
                }
            }
        });
        Self { host, out: Outbox(out), replies, writer, reader }
    }

    /// Name of the destination host.
    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// Says over this connection that nothing will come.
    pub(super) fn aborter(&self) -> Aborter {
        Aborter(self.out.0.downgrade())
    }

    /// As [`Outbox::send`].
    pub(super) async fn send(&self, body: request::Body) {
        self.out.send(body).await;
    }

    /// Says things over this connection too.
    pub(super) fn outbox(&self) -> Outbox {
        self.out.clone()
    }

    /// The next reply. A [`reply::Body::Failed`] is an error.
    pub(super) async fn reply(&mut self, patience: Duration, what: &str) -> Result<reply::Body> {
        let answer = self.answer(patience, what).await?;
        answer.ok_or_else(|| SessionError::Peer {
            host: self.host.clone(),
            text: format!("it closed the connection while {what}"),
        })
    }

    /// The same, or nothing when the connection was closed in good order.
    pub(super) async fn answer(
        &mut self,
        patience: Duration,
        what: &str,
    ) -> Result<Option<reply::Body>> {
        match timeout(patience, self.replies.recv()).await {
            Err(_) => Err(SessionError::Silent {
                host: self.host.clone(),
                patience,
                what: what.to_owned(),
            }),
            Ok(Some(Ok(reply::Body::Failed(failed)))) => {
                Err(SessionError::Peer { host: self.host.clone(), text: failed.text })
            }
            Ok(Some(Ok(body))) => Ok(Some(body)),
            Ok(Some(Err(Lost::Broken(source)))) => Err(SessionError::Transport {
                what: format!("Lost the connection to {} while {what}", self.host),
                source,
            }),
            Ok(Some(Err(Lost::Closed)) | None) => Ok(None),
        }
    }

    /// That `body` is not what was expected.
    pub(super) fn unexpected(&self, body: &reply::Body, what: &str) -> SessionError {
        let text = format!("{body:?}");
        let name = text.split('(').next().unwrap_or_default().to_owned();
        SessionError::Protocol {
            host: self.host.clone(),
            what: format!("it answered {name} while {what}"),
        }
    }

    /// Sends what is still to be sent, and closes.
    pub(super) async fn close(self) {
        drop(self.out);
        let _ = timeout(Duration::from_secs(2), self.writer).await;
        self.reader.abort();
    }
}
