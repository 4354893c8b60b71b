//! All sessions that come to this host: who is told what, which stream belongs where, and the one
//! place where a Commit is answered, whatever connection it came on.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;

use super::arrival::Arrival;
use super::commit::{Answer, Destination, Record};
use super::destination::{
    self, Accepted, DestinationHost, Requests, aborted, judge, out_of_turn, receive_workload,
    settled, told,
};
use super::error::{Result, SessionError, chain, fail_here};
use super::journal::{Journal, Role as End, SessionRow, boot_id};
use crate::files::Landing;
use crate::protocol::control::{
    Commit, CpuAnswer, Failed, Hello, Offer, Pong, Request, Verdict, Welcome, reply, request,
};
use crate::transport::{
    Canceller, Connection, Control, DataStream, JoinRefusal, Peer, Role, Secret,
};
use crate::workload::{Refusal, RefusalCode};
use prost::Message;

/// How long a source may take for its next word before its offer is accepted.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a prepared workload waits for a source whose connection broke to ask again.
const LINGER: Duration = Duration::from_secs(5);

/// The sessions of one agent.
pub struct DestinationSessions {
    host: Arc<dyn DestinationHost>,
    journal: Arc<Journal>,
    live: Mutex<HashMap<String, Arc<Live>>>,
}

/// A session under way.
pub(super) struct Live {
    pub(super) migration: String,
    pub(super) peer: Peer,
    pub(super) host: Arc<dyn DestinationHost>,
    pub(super) landing: Arc<Landing>,
    pub(super) arrival: tokio::sync::Mutex<Arrival>,
    secret: Secret,
    encrypted: bool,
    streams: u32,
    joined: mpsc::Sender<(Role, DataStream)>,
    cancellers: Mutex<Vec<Canceller>>,
    /// Streams that asked to join: pages or files, and their index.
    taken: Mutex<HashSet<(bool, u32)>>,
}

impl Live {
    /// `canceller` is used when the session ends early.
    pub(super) fn cancel_with(&self, canceller: Canceller) {
        lock(&self.cancellers).push(canceller);
    }
}

impl DestinationSessions {
    /// Sessions that `host` receives.
    pub fn new(host: Arc<dyn DestinationHost>, journal: Arc<Journal>) -> Arc<Self> {
        Arc::new(Self { host, journal, live: Mutex::default() })
    }

    /// Serves one accepted connection of any role to its end.
    pub async fn serve(self: &Arc<Self>, connection: Connection) {
        let peer = connection.peer().name.clone();
        let served = match connection.role() {
            Role::Control => self.serve_control(Control::new(connection)).await,
            Role::Page | Role::File => self.serve_stream(connection).await,
        };
        if let Err(error) = served {
            tracing::warn!(%peer, error = %chain(&error), "A connection ended in error");
        }
    }

    async fn serve_stream(&self, connection: Connection) -> Result<()> {
        let failed = |source| SessionError::Transport {
            what: "Cannot take a stream into its session".to_owned(),
            source,
        };
        let role = connection.role();
        let joining = connection.joining().await.map_err(failed)?;
        let live = lock(&self.live).get(&joining.session().to_string()).cloned();
        let Some(live) = live else {
            return Err(failed(joining.refuse(JoinRefusal::NotYours).await));
        };
        let most = if role == Role::Page { live.streams } else { 1 };
        let mine = lock(&live.taken).insert((role == Role::Page, joining.index()));
        if joining.index() >= most || !mine {
            return Err(failed(joining.refuse(JoinRefusal::Index).await));
        }
        let encrypted = live.encrypted || role == Role::File;
        let stream = joining.admit(&live.secret, &live.peer, encrypted).await.map_err(failed)?;
        live.cancel_with(stream.canceller());
        // The session may have ended in between; then the stream ends with it.
        let _ = live.joined.send((role, stream)).await;
        Ok(())
    }

    async fn serve_control(self: &Arc<Self>, mut control: Control) -> Result<()> {
        let peer = control.peer().clone();
        let failed = |source| SessionError::Transport {
            what: "Cannot read the first message".to_owned(),
            source,
        };
        let first = control.recv::<Request>(PATIENCE).await.map_err(failed)?;
        let (reader, writer) = control.split();
        let mut wire = Requests::new(reader, writer);
        let result = match first.and_then(|request| request.body) {
            // A ping may come first: the source's pulse starts with its connection.
            Some(request::Body::Ping(_)) => {
                wire.reply(reply::Body::Pong(Pong {})).await;
                match tokio::time::timeout(PATIENCE, wire.requests.recv()).await {
                    Ok(Some(body)) => self.begin(body, &peer, &mut wire).await,
                    _ => Ok(()),
                }
            }
            Some(body) => self.begin(body, &peer, &mut wire).await,
            None => Ok(()),
        };
        if let Err(error) = &result {
            wire.reply(reply::Body::Failed(Failed { text: told(error) })).await;
        }
        wire.close().await;
        result
    }

    async fn begin(
        self: &Arc<Self>,
        body: request::Body,
        peer: &Peer,
        wire: &mut Requests,
    ) -> Result<()> {
        match body {
            request::Body::Hello(hello) => self.session(hello, peer, wire).await,
            request::Body::Commit(commit) => {
                let answer = self.settle(&commit, peer).await?;
                wire.reply(reply::Body::Settled(answer)).await;
                Ok(())
            }
            request::Body::CpuQuestion(_) => {
                let host = Arc::clone(&self.host);
                let offer = tokio::task::spawn_blocking(move || host.cpu_offer()).await??;
                wire.reply(reply::Body::CpuAnswer(CpuAnswer { offer })).await;
                Ok(())
            }
            _ => Err(SessionError::Protocol {
                host: peer.name.clone(),
                what: "it began with nothing that a connection can begin with".to_owned(),
            }),
        }
    }

    /// One session from its Hello to its end.
    async fn session(
        self: &Arc<Self>,
        hello: Hello,
        peer: &Peer,
        wire: &mut Requests,
    ) -> Result<()> {
        let broken =
            |what: &str| SessionError::Protocol { host: peer.name.clone(), what: what.to_owned() };
        if hello.host != peer.name {
            return Err(broken("its name is not the one in its certificate"));
        }
        if hello.migration.parse::<uuid::Uuid>().is_err() {
            return Err(broken("the migration's id is no UUID"));
        }
        let plain = hello.plain_pages && !self.host.page_encryption();
        let host = self.host.name().to_owned();
        wire.reply(reply::Body::Welcome(Welcome { host, plain_pages: plain })).await;
        let offer = match tokio::time::timeout(PATIENCE, wire.requests.recv()).await {
            Ok(Some(request::Body::Offer(offer))) => offer,
            Ok(None) => return Ok(()),
            _ => return Err(broken("it made no offer")),
        };
        let dry_run = offer.dry_run;
        let token = offer.token;
        let accepted = match self.judge(offer).await? {
            Ok(accepted) => accepted,
            Err(refusals) => {
                wire.reply(reply::Body::Verdict(Verdict { refusals, ..Verdict::default() })).await;
                return Ok(());
            }
        };
        let secret = Secret::random().map_err(|error| {
            crate::workload::WorkloadError::new("Cannot make a session's secret", error)
        })?;
        wire.reply(reply::Body::Verdict(Verdict {
            refusals: Vec::new(),
            secret: secret.as_bytes().to_vec(),
            streams: accepted.streams,
        }))
        .await;
        if dry_run {
            return Ok(());
        }
        match tokio::time::timeout(PATIENCE, wire.requests.recv()).await {
            Ok(Some(request::Body::Prepare(_))) => {}
            // A source that changed its mind, or was cancelled, before anything was touched.
            Ok(None | Some(request::Body::Abort(_))) => return Ok(()),
            _ => return Err(broken("it did not go on after the verdict")),
        }
        self.arrive(&hello.migration, token, peer, secret, !plain, accepted, wire).await
    }

    /// From BUILDING to a final record.
    #[allow(clippy::too_many_arguments)]
    async fn arrive(
        self: &Arc<Self>,
        migration: &str,
        token: u64,
        peer: &Peer,
        secret: Secret,
        encrypted: bool,
        accepted: Accepted,
        wire: &mut Requests,
    ) -> Result<()> {
        // Before the row, so that no row is left open when there is no room for it.
        let record = self.journal.landing_record(migration);
        let landing = Landing::recorded(&record).map(Arc::new).map_err(|source| {
            SessionError::Files { path: record.display().to_string(), source: Box::new(source) }
        })?;
        if let Err(error) = self.journal_building(migration, token, peer, &accepted).await {
            // No row will remind the next agent of the record.
            landing.remove();
            return Err(error);
        }
        let arrival = Arrival::new(
            migration,
            token,
            self.journal.clone(),
            self.host.clone(),
            accepted.manifest.clone(),
            landing.clone(),
        );
        let (joined, mut streams) = mpsc::channel(accepted.streams as usize + 1);
        let live = Arc::new(Live {
            migration: migration.to_owned(),
            peer: peer.clone(),
            host: self.host.clone(),
            landing,
            arrival: tokio::sync::Mutex::new(arrival),
            secret,
            encrypted,
            streams: accepted.streams,
            joined,
            cancellers: Mutex::default(),
            taken: Mutex::default(),
        });
        let _guard = Listed::new(self, &live);
        let received = match receive_workload(&live, &accepted, &mut streams, wire).await {
            Ok(()) => self.await_commit(&live, wire).await,
            Err(error) => Err(error),
        };
        let reason = received.as_ref().err().map(told).unwrap_or_default();
        lock(&live.cancellers).iter().for_each(Canceller::cancel);
        live.arrival.lock().await.give_up(&reason).await;
        received
    }

    async fn journal_building(
        &self,
        migration: &str,
        token: u64,
        peer: &Peer,
        accepted: &Accepted,
    ) -> Result<()> {
        let row = SessionRow {
            migration: migration.to_owned(),
            role: End::Destination,
            workload: accepted.manifest.name.clone(),
            uuid: accepted.manifest.uuid.clone(),
            peer: peer.name.clone(),
            peer_address: String::new(),
            token,
            record: Record::Building,
            boot_id: boot_id(),
            updated_ms: 0,
            manifest: accepted.manifest.encode_to_vec(),
        };
        let journal = self.journal.clone();
        Ok(tokio::task::spawn_blocking(move || journal.begin(&row)).await??)
    }

    /// The workload is prepared: waits for Commit here, and for a while on other connections when
    /// this one breaks.
    async fn await_commit(&self, live: &Arc<Live>, wire: &mut Requests) -> Result<()> {
        fail_here!("destination.prepared");
        loop {
            match wire.requests.recv().await {
                Some(request::Body::Commit(commit)) => {
                    let answer = self.settle(&commit, &live.peer).await?;
                    fail_here!("destination.answer");
                    wire.reply(reply::Body::Settled(answer)).await;
                }
                Some(request::Body::Abort(abort)) => return Err(aborted(live, abort.reason)),
                Some(other) => return Err(out_of_turn(live, &other)),
                None => break,
            }
        }
        let settled = |machine| {
            use Destination::{Aborted, Running, Undecided};
            matches!(machine, Running | Aborted | Undecided)
        };
        if settled(live.arrival.lock().await.machine()) {
            return Ok(());
        }
        // The source may be fenced and ask again; only after that is it taken for gone.
        tokio::time::sleep(LINGER).await;
        if settled(live.arrival.lock().await.machine()) {
            return Ok(());
        }
        Err(destination::lost(live))
    }

    async fn judge(&self, offer: Offer) -> Result<std::result::Result<Accepted, Vec<Refusal>>> {
        let host = self.host.clone();
        let journal = self.journal.clone();
        tokio::task::spawn_blocking(move || {
            let uuid = offer.manifest.as_ref().map(|manifest| manifest.uuid.clone());
            let newest = journal.newest_token(&uuid.unwrap_or_default())?;
            Ok(judge(&*host, &offer, newest))
        })
        .await?
    }

    /// Answers a Commit: one request of a session at a time, and only what is durable.
    async fn settle(
        &self,
        commit: &Commit,
        peer: &Peer,
    ) -> Result<crate::protocol::control::Settled> {
        if commit.migration.parse::<uuid::Uuid>().is_err() {
            return Err(forged());
        }
        let live = lock(&self.live).get(&commit.migration).cloned();
        if let Some(live) = live {
            let mut arrival = live.arrival.lock().await;
            if live.peer.name != peer.name || arrival.token() != commit.token {
                return Err(forged());
            }
            let answer = arrival.commit().await;
            if answer == Some(Answer::Undecided) {
                // The source may be let run on this word: nothing may run here any more before it is
                // given. What the host finds out then stands in the journal.
                arrival.tell_host().await;
                drop(arrival);
                return self.settle_from_journal(commit, peer).await;
            }
            let reason = arrival.reason().to_owned();
            if answer.is_some() {
                // Not in the way of the answer.
                let live = live.clone();
                drop(arrival);
                tokio::spawn(async move { live.arrival.lock().await.tell_host().await });
            }
            return answer.map(|answer| settled(answer, &reason)).ok_or_else(|| {
                SessionError::Protocol {
                    host: self.host.name().to_owned(),
                    what: "nothing durable can be said yet; ask again".to_owned(),
                }
            });
        }
        self.settle_from_journal(commit, peer).await
    }

    /// The session is not under way: what its journal says, or, if there is none, that it never
    /// will be.
    async fn settle_from_journal(
        &self,
        commit: &Commit,
        peer: &Peer,
    ) -> Result<crate::protocol::control::Settled> {
        let journal = self.journal.clone();
        // Looked up first: what a recovery finds out is in the journal when it is over.
        let recovers = self.host.recovers(&commit.migration);
        let (commit, peer) = (commit.clone(), peer.name.clone());
        let row = tokio::task::spawn_blocking(move || {
            if let Some(row) = journal.session(&commit.migration, End::Destination)? {
                if row.peer != peer || row.token != commit.token {
                    return Err(forged());
                }
                return Ok::<_, SessionError>(row);
            }
            let row = SessionRow {
                migration: commit.migration,
                role: End::Destination,
                workload: String::new(),
                uuid: String::new(),
                peer,
                peer_address: String::new(),
                token: commit.token,
                record: Record::Aborted,
                boot_id: boot_id(),
                updated_ms: 0,
                manifest: Vec::new(),
            };
            journal.begin(&row)?;
            Ok(row)
        })
        .await??;
        match row.record {
            Record::Running => Ok(settled(Answer::Running, "")),
            Record::Aborted => {
                Ok(settled(Answer::Aborted, "the session was given up there before Commit came"))
            }
            Record::Committed if !recovers => Ok(settled(
                Answer::Undecided,
                "its keeper was lost between its commit and its confirmation, perhaps with the host",
            )),
            _ => Err(SessionError::Protocol {
                host: self.host.name().to_owned(),
                what: "the session is being recovered; ask again".to_owned(),
            }),
        }
    }
}

/// A session's place in the list, taken away with the session.
struct Listed {
    sessions: Arc<DestinationSessions>,
    migration: String,
}

impl Listed {
    fn new(sessions: &Arc<DestinationSessions>, live: &Arc<Live>) -> Self {
        lock(&sessions.live).insert(live.migration.clone(), live.clone());
        Self { sessions: sessions.clone(), migration: live.migration.clone() }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        lock(&self.sessions.live).remove(&self.migration);
    }
}

fn forged() -> SessionError {
    SessionError::Refused(vec![Refusal::new(
        RefusalCode::Request,
        "This Commit does not belong to the session: wrong host or fencing token",
    )])
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No state is left half changed by a panic: each holder does one insert, remove or look-up.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
