//! The arriving end of a move, message by message.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::commit::Answer;
use super::error::{Result, SessionError, chain, fail_here};
use super::sessions::Live;
use super::storage;
use crate::files::{Incoming, receive};
use crate::pages::ReceivePool;
use crate::protocol::control::{
    Load, Loaded, Offer, Part, Pong, Ready, Reply, Request, Round, RoundDone, Settled, Settlement,
    reply, request,
};
use crate::transport::{ControlReader, ControlWriter, DataStream, Role};
use crate::workload::{
    DestinationWorkload, Manifest, PlacedTree, Refusal, Section, SpaceInfo, Storage, WorkloadError,
    is_plain_absolute,
};

/// A source that sends nothing at all, not even a ping, for so long is lost.
const SILENCE: Duration = Duration::from_secs(15);
/// How long the streams of a session may take to join.
const JOIN_WITHIN: Duration = Duration::from_secs(30);
/// How long one round may take to arrive.
const ROUND_WITHIN: Duration = Duration::from_secs(3600);
/// State sections of one workload together.
const SECTIONS_CAP: u64 = 16 << 30;
/// Number of sections of one workload.
const SECTIONS_MOST: usize = 100_000;
/// Spaces of one workload.
const SPACES_MOST: usize = 1 << 20;
/// Bytes of a section's kind or of a space's label.
const NAME_MOST: usize = 256;
/// No host hands out tokens that large.
const TOKEN_MOST: u64 = 1 << 62;

/// What an agent does for the sessions that come to it. All of it may block.
pub trait DestinationHost: Send + Sync + 'static {
    /// Name of this host.
    fn name(&self) -> &str;
    /// Whether this host's configuration wants pages encrypted.
    fn page_encryption(&self) -> bool;
    /// What CPU this host can offer a guest, for [`CpuAnswer`](crate::protocol::control::CpuAnswer).
    fn cpu_offer(&self) -> crate::workload::Result<Vec<u8>> {
        Err(crate::workload::WorkloadError::Unsupported("A choice of CPU"))
    }
    /// Where the files of a workload would stand here.
    ///
    /// # Errors
    /// Every path that makes no sense here.
    fn place_trees(
        &self,
        manifest: &Manifest,
        paths: &[(PathBuf, PathBuf)],
    ) -> std::result::Result<Vec<PlacedTree>, Vec<Refusal>>;
    /// Every reason against the workload. Touches nothing.
    fn preflight(&self, manifest: &Manifest, trees: &[PlacedTree]) -> Vec<Refusal>;
    /// Whether what stands at `tree` is an earlier copy of this very workload.
    fn known_copy(&self, manifest: &Manifest, tree: &PlacedTree) -> bool;
    /// Registers the workload as incoming and builds it, empty.
    ///
    /// # Errors
    /// Whatever keeps it from being built; nothing is left behind then.
    fn prepare(
        &self,
        migration: &str,
        manifest: &Manifest,
        trees: &[PlacedTree],
    ) -> crate::workload::Result<Box<dyn DestinationWorkload>>;
    /// It runs here now.
    fn running(&self, migration: &str, manifest: &Manifest);
    /// It did not come, and everything of it is gone.
    fn gone(&self, migration: &str, manifest: &Manifest);
    /// Its keeper was lost while it was let run, and the journal says COMMITTED. Looks after what is left
    /// of it: nothing of it runs any more when this returns, or the journal says RUNNING, or
    /// [`DestinationHost::recovers`] says that it is still being looked after.
    fn undecided(&self, migration: &str, manifest: &Manifest);
    /// Whether this host is still finding out what became of a session that its journal leaves open.
    fn recovers(&self, migration: &str) -> bool;
}

/// An accepted offer.
pub(super) struct Accepted {
    pub(super) manifest: Manifest,
    pub(super) trees: Vec<PlacedTree>,
    /// For each tree: what stands there is an earlier copy of this very workload. Asked before
    /// the workload is entered as incoming, while the host still remembers its earlier stay.
    pub(super) known: Vec<bool>,
    /// What stood at each shared tree when it was seen to be the source's.
    pub(super) shared: Vec<(PathBuf, Option<(u64, u64)>)>,
    pub(super) streams: u32,
}

/// The control connection as the destination uses it: pings are answered at once by the reading
/// task, everything else comes out of `requests`.
pub(super) struct Requests {
    pub(super) requests: mpsc::Receiver<request::Body>,
    replies: mpsc::Sender<Reply>,
    writer: JoinHandle<()>,
    reader: JoinHandle<()>,
}

impl Requests {
    pub(super) fn new(mut reader: ControlReader, mut writer: ControlWriter) -> Self {
        let (said, requests) = mpsc::channel(16);
        let (replies, mut out) = mpsc::channel::<Reply>(64);
        let writer = tokio::spawn(async move {
            while let Some(reply) = out.recv().await {
                if let Err(error) = writer.send(&reply).await {
                    tracing::debug!(%error, "Cannot answer the source");
                    return;
                }
            }
            // Whether the source still reads the end does not matter.
            let _ = writer.close().await;
        });
        let pong = replies.clone();
        let reader = tokio::spawn(async move {
            loop {
                let body = match reader.recv::<Request>(SILENCE).await {
                    Ok(Some(Request { body: Some(request::Body::Ping(_)) })) => {
                        if pong.send(reply::Body::Pong(Pong {}).into()).await.is_err() {
                            return;
                        }
                        continue;
                    }
                    Ok(Some(Request { body: Some(body) })) => body,
                    Ok(Some(Request { body: None })) => {
                        tracing::warn!("The source said something that this build does not know");
                        return;
                    }
                    Ok(None) => return,
                    Err(error) => {
                        tracing::info!(%error, "Lost the source's control connection");
                        return;
                    }
                };
                if said.send(body).await.is_err() {
                    return;
                }
            }
        });
        Self { requests, replies, writer, reader }
    }

    pub(super) async fn reply(&self, body: reply::Body) {
        // A writer that is gone is noticed by the reader.
        let _ = self.replies.send(body.into()).await;
    }

    /// Sends what is still to be sent, and closes.
    pub(super) async fn close(self) {
        // It holds a sender of its own, for as long as the peer pings.
        self.reader.abort();
        drop(self.requests);
        drop(self.replies);
        let _ = tokio::time::timeout(Duration::from_secs(2), self.writer).await;
    }
}

/// Checks an offer. Touches nothing.
pub(super) fn judge(
    host: &dyn DestinationHost,
    offer: &Offer,
    newest_token: u64,
) -> std::result::Result<Accepted, Vec<Refusal>> {
    use crate::workload::RefusalCode;
    let wrong = |text: &str| vec![Refusal::new(RefusalCode::Request, text)];
    let Some(manifest) = offer.manifest.clone() else {
        return Err(wrong("The offer has no manifest"));
    };
    if manifest.spaces.len() > SPACES_MOST
        || manifest.files.iter().any(|tree| !is_plain_absolute(tree.path.as_ref()))
    {
        return Err(wrong("The manifest makes no sense"));
    }
    if offer.token > TOKEN_MOST {
        return Err(wrong("The offer's fencing token is larger than any can be"));
    }
    if offer.token <= newest_token {
        return Err(wrong(
            "The offer's fencing token is not newer than one that this host has seen of the \
             workload: this is a late or repeated offer",
        ));
    }
    let paths: Vec<_> = offer
        .paths
        .iter()
        .map(|path| (PathBuf::from(&path.old), PathBuf::from(&path.new)))
        .collect();
    let mut trees = host.place_trees(&manifest, &paths)?;
    let mut refusals = storage::judge(&mut trees, &offer.probes, host.name());
    let onto_itself = i32::from(RefusalCode::SameFile);
    // Whose own place is taken is told that alone.
    if refusals.iter().all(|refusal| refusal.code != onto_itself) {
        refusals.extend(host.preflight(&manifest, &trees));
    }
    if refusals.is_empty() {
        let known = trees.iter().map(|tree| host.known_copy(&manifest, tree)).collect();
        let shared = seen(&trees);
        let streams = offer.streams.clamp(1, 64);
        Ok(Accepted { manifest, trees, known, shared, streams })
    } else {
        Err(refusals)
    }
}

/// Which file or directory stands at each shared tree now.
fn seen(trees: &[PlacedTree]) -> Vec<(PathBuf, Option<(u64, u64)>)> {
    use std::os::unix::fs::MetadataExt;
    let identity = |placed: &PlacedTree| {
        let found = std::fs::metadata(&placed.path);
        (placed.path.clone(), found.ok().map(|found| (found.dev(), found.ino())))
    };
    trees.iter().filter(|placed| placed.tree.storage() == Storage::Shared).map(identity).collect()
}

/// Builds, receives and loads the workload of an accepted offer; returns when it is prepared.
pub(super) async fn receive_workload(
    live: &Arc<Live>,
    accepted: &Accepted,
    joined: &mut mpsc::Receiver<(Role, DataStream)>,
    wire: &mut Requests,
) -> Result<()> {
    fail_here!("destination.prepare");
    let host = live.host.clone();
    let (migration, manifest, trees) =
        (live.migration.clone(), accepted.manifest.clone(), accepted.trees.clone());
    let built =
        tokio::task::spawn_blocking(move || host.prepare(&migration, &manifest, &trees)).await??;
    live.arrival.lock().await.hold(built);
    make_paged(live, accepted).await?;
    wire.reply(reply::Body::Ready(Ready {})).await;
    let (pages, files) = collect(live, accepted.streams, joined, wire).await?;
    let mut receiving = Receiving::new(live, accepted, pages, files)?;
    let mut asked = None;
    loop {
        // It may have been asked for while the last of it was still on its way.
        if let Some(asked) = asked.filter(|_| !receiving.is_under_way()) {
            check_shared(accepted).await?;
            let loaded = receiving.load(asked).await?;
            live.arrival.lock().await.loaded().await;
            wire.reply(reply::Body::Loaded(loaded)).await;
            return Ok(());
        }
        tokio::select! {
            body = wire.requests.recv() => match body {
                Some(request::Body::Round(round)) if asked.is_none() => {
                    receiving.begin_round(round, wire).await?;
                }
                Some(request::Body::Part(part)) if asked.is_none() => receiving.take_part(part)?,
                Some(request::Body::Load(load)) if asked.is_none() => asked = Some(load),
                Some(request::Body::Abort(abort)) => return Err(aborted(live, abort.reason)),
                Some(other) => return Err(out_of_turn(live, &other)),
                None => return Err(lost(live)),
            },
            result = receiving.background() => result?,
        }
    }
}

/// That what is shared is still what it was when the move began.
async fn check_shared(accepted: &Accepted) -> Result<()> {
    let trees = accepted.trees.clone();
    let still = tokio::task::spawn_blocking(move || seen(&trees)).await?;
    match still.iter().find(|one| !accepted.shared.contains(one)) {
        None => Ok(()),
        Some((path, _)) => {
            let what = format!(
                "{} is not what it was when the move began: was it unmounted?",
                path.display()
            );
            Err(WorkloadError::plain(what).into())
        }
    }
}

/// Makes an empty file for each tree whose content comes as pages. When it stands, so does the record of it.
async fn make_paged(live: &Arc<Live>, accepted: &Accepted) -> Result<()> {
    let known = accepted.trees.iter().cloned().zip(accepted.known.iter().copied());
    let paged: Vec<_> = known.filter(|(placed, _)| placed.tree.is_paged()).collect();
    let landing = live.landing.clone();
    let made = move || {
        paged.iter().try_for_each(|(placed, known)| {
            landing.land_empty(&placed.path, *known).map_err(|error| SessionError::Files {
                path: placed.path.display().to_string(),
                source: Box::new(error),
            })
        })
    };
    tokio::task::spawn_blocking(made).await?
}

/// Waits until every stream of the session has joined.
async fn collect(
    live: &Live,
    streams: u32,
    joined: &mut mpsc::Receiver<(Role, DataStream)>,
    wire: &mut Requests,
) -> Result<(Vec<DataStream>, DataStream)> {
    let mut pages = Vec::new();
    let mut files = None;
    let deadline = tokio::time::Instant::now() + JOIN_WITHIN;
    while pages.len() < streams as usize || files.is_none() {
        tokio::select! {
            stream = joined.recv() => match stream {
                Some((Role::Page, stream)) => pages.push(stream),
                Some((_, stream)) => files = Some(stream),
                None => return Err(lost(live)),
            },
            body = wire.requests.recv() => return Err(match body {
                Some(request::Body::Abort(abort)) => aborted(live, abort.reason),
                Some(other) => out_of_turn(live, &other),
                None => lost(live),
            }),
            () = tokio::time::sleep_until(deadline) => return Err(SessionError::Protocol {
                host: live.peer.name.clone(),
                what: "its page connections did not come".to_owned(),
            }),
        }
    }
    files.map(|files| (pages, files)).ok_or_else(|| lost(live))
}

/// What arrives over page and file streams, and the sections gathered so far.
struct Receiving {
    live: Arc<Live>,
    pool: Arc<ReceivePool>,
    round: Option<JoinHandle<Result<()>>>,
    /// Number of the round that was begun last.
    last: u32,
    files: Option<JoinHandle<Result<()>>>,
    spaces: Vec<SpaceInfo>,
    sections: Vec<Section>,
    /// Bytes still to come of the last section.
    open: u64,
    total: u64,
}

impl Receiving {
    fn new(
        live: &Arc<Live>,
        accepted: &Accepted,
        pages: Vec<DataStream>,
        files: DataStream,
    ) -> Result<Self> {
        let pool = Arc::new(ReceivePool::new(pages.len() as u32));
        for stream in pages {
            pool.add_stream(stream)
                .map_err(|error| SessionError::Pages { round: 0, source: Box::new(error) })?;
        }
        let known = accepted.known.iter();
        let incoming = accepted
            .trees
            .iter()
            .zip(known)
            .filter(|(tree, _)| tree.tree.storage() != Storage::Shared && !tree.tree.is_paged())
            .map(|(tree, known)| Incoming { tree: tree.clone(), keep_equal: *known })
            .collect();
        let landing = live.landing.clone();
        let files = tokio::task::spawn_blocking(move || {
            receive(files, incoming, &landing).map_err(|error| SessionError::Files {
                path: "the destination".to_owned(),
                source: Box::new(error),
            })
        });
        Ok(Self {
            live: live.clone(),
            pool,
            round: None,
            last: 0,
            files: Some(files),
            spaces: Vec::new(),
            sections: Vec::new(),
            open: 0,
            total: 0,
        })
    }

    /// Makes room for a round and lets it arrive beside whatever else is said.
    async fn begin_round(&mut self, round: Round, wire: &Requests) -> Result<()> {
        // The round before has said RoundDone, or the source is out of turn and waits for it.
        if let Some(before) = self.round.take() {
            before.await??;
        }
        let named = round.spaces.iter().all(|space| space.label.len() <= NAME_MOST);
        self.spaces.extend(round.spaces);
        if self.spaces.len() > SPACES_MOST || !named {
            return Err(SessionError::Protocol {
                host: self.live.peer.name.clone(),
                what: "it named more spaces than any workload has, or longer".to_owned(),
            });
        }
        self.last = round.round;
        let spaces = self.spaces.clone();
        let writer =
            self.live.arrival.lock().await.with(move |workload| workload.writer(&spaces)).await?;
        self.pool.open_round(round.round, &self.spaces, writer);
        let pool = self.pool.clone();
        let (number, replies) = (round.round, wire.replies.clone());
        self.round = Some(tokio::task::spawn_blocking(move || {
            let received = pool
                .wait_round(number, ROUND_WITHIN)
                .map_err(|error| SessionError::Pages { round: number, source: Box::new(error) })?;
            let done = RoundDone { round: number, pages: received.pages };
            // A connection that is gone is noticed by its reader.
            let _ = replies.blocking_send(reply::Body::RoundDone(done).into());
            Ok(())
        }));
        Ok(())
    }

    /// How the round or the files that are arriving ended; waits for ever when neither is.
    async fn background(&mut self) -> Result<()> {
        tokio::select! {
            result = join(&mut self.round) => {
                self.round = None;
                result
            }
            result = join(&mut self.files) => {
                self.files = None;
                result
            }
        }
    }

    fn take_part(&mut self, part: Part) -> Result<()> {
        let bad = |what: &str| SessionError::Protocol {
            host: self.live.peer.name.clone(),
            what: what.to_owned(),
        };
        if self.open == 0 {
            self.total = self.total.saturating_add(part.total);
            let long = part.kind.len() > NAME_MOST;
            if self.total > SECTIONS_CAP || self.sections.len() >= SECTIONS_MOST || long {
                return Err(bad("its state is larger than any workload's"));
            }
            self.open = part.total;
            self.sections.push(Section {
                kind: part.kind.clone(),
                version: part.version,
                bytes: Vec::new(),
            });
        }
        let left = self.open.checked_sub(part.bytes.len() as u64);
        match (self.sections.last_mut(), left) {
            (Some(section), Some(left))
                if section.kind == part.kind
                    && section.version == part.version
                    && (left < self.open || part.total == 0) =>
            {
                section.bytes.extend_from_slice(&part.bytes);
                self.open = left;
                Ok(())
            }
            _ => Err(bad("a piece of state does not fit the section it belongs to")),
        }
    }

    /// Whether pages or files are still arriving.
    fn is_under_way(&self) -> bool {
        self.round.is_some() || self.files.is_some()
    }

    /// Everything has arrived: loads.
    async fn load(&mut self, asked: Load) -> Result<Loaded> {
        let wrong = |what: &str| SessionError::Protocol {
            host: self.live.peer.name.clone(),
            what: what.to_owned(),
        };
        if self.open != 0 || asked.sections as usize != self.sections.len() {
            return Err(wrong("its state is incomplete"));
        }
        // Rounds begin with 1. Who says none is an older source, which has waited for its last one.
        if self.last == 0 || (asked.round != self.last && asked.round != 0) {
            return Err(wrong("its pages are incomplete"));
        }
        fail_here!("destination.load");
        let begun = Instant::now();
        let sections = std::mem::take(&mut self.sections);
        let load = move |workload: &mut dyn DestinationWorkload| {
            workload.load(sections)?;
            Ok(workload.ways())
        };
        let ways = self.live.arrival.lock().await.with(load).await?;
        Ok(Loaded {
            load_us: begun.elapsed().as_micros() as u64,
            restore: ways.restore.unwrap_or_default(),
            fallbacks: ways.fallbacks,
        })
    }
}

async fn join(task: &mut Option<JoinHandle<Result<()>>>) -> Result<()> {
    match task {
        Some(task) => task.await?,
        None => std::future::pending().await,
    }
}

/// The durable answer as it travels.
pub(super) fn settled(answer: Answer, reason: &str) -> Settled {
    let settlement = match answer {
        Answer::Running => Settlement::Running,
        Answer::Aborted => Settlement::Aborted,
        Answer::Undecided => Settlement::Undecided,
    };
    Settled { settlement: settlement.into(), reason: reason.to_owned() }
}

pub(super) fn lost(live: &Live) -> SessionError {
    SessionError::Peer {
        host: live.peer.name.clone(),
        text: "the control connection ended".to_owned(),
    }
}

pub(super) fn aborted(live: &Live, reason: String) -> SessionError {
    SessionError::Peer { host: live.peer.name.clone(), text: reason }
}

pub(super) fn out_of_turn(live: &Live, body: &request::Body) -> SessionError {
    let text = format!("{body:?}");
    let name = text.split('(').next().unwrap_or_default();
    SessionError::Protocol {
        host: live.peer.name.clone(),
        what: format!("it said {name} out of turn"),
    }
}

/// For the peer: what ended the session.
pub(super) fn told(error: &SessionError) -> String {
    chain(error)
}
