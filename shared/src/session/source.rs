//! The leaving end of a move, phase by phase.
//!
//! `run` lists the phases in order. Before the fence there is one way out for every failure: the
//! workload resumes, the peer is told, nothing is left behind. After it only the destination's
//! durable answer counts.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::asking::{ask_until_settled, read_settlement};
use super::commit::{Answer, Record, Source};
use super::copying::Copying;
use super::departure::{Departure, Wish};
use super::error::{Result, SessionError, chain, fail_here};
use super::journal::{Journal, Role, SessionRow, boot_id};
use super::link::Link;
use super::progress::{Phase, Progress, ProgressSender};
use super::report::{DowntimeParts, Outcome, PageCounts, Predicted, Report};
use super::{Mode, MoveOptions, storage};
use crate::files::{Probe, look_of};
use crate::methods::Ways;
use crate::pages::PageSet;
use crate::protocol::control::{
    Commit, Hello, Offer, PathMapping, Prepare, Verdict, reply, request,
};
use crate::transport::{Control, Dialer, Join, PeerAddress, Role as StreamRole, Secret};
use crate::workload::{
    FileRole, FileTree, Kind, Liveness, Manifest, Refusal, RefusalCode, SourceWorkload,
    WorkloadError,
};

/// How long connecting and the first answers may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long building the empty workload may take.
const PREPARE_WITHIN: Duration = Duration::from_secs(120);
/// How long restoring a workload may take.
const LOAD_WITHIN: Duration = Duration::from_secs(300);
/// How long the answer to Commit is awaited on the connection that it was sent on.
const COMMIT_WITHIN: Duration = Duration::from_secs(10);
/// How long the destination is asked again, with the user waiting, before the move is reported
/// as unresolved. The agent goes on asking after that.
const ASK_FOR: Duration = Duration::from_secs(60);

/// What all moves away from a host share.
#[derive(Clone)]
pub struct SourceContext {
    /// Name of this host.
    pub host: String,
    /// Opens connections to peers.
    pub dialer: Dialer,
    /// Where the workload goes.
    pub peer: PeerAddress,
    /// Whether this host's configuration wants pages encrypted.
    pub page_encryption: bool,
    /// This host's journal.
    pub journal: Arc<Journal>,
}

/// One move.
pub struct SourceMove {
    /// Its id, a UUID.
    pub migration: String,
    /// The workload, running.
    pub workload: Box<dyn SourceWorkload>,
    /// What the user asked for.
    pub options: MoveOptions,
    /// Where progress is told; the report is its last event.
    pub progress: ProgressSender,
    /// Cancelled when the user gives up. Without effect after the fence.
    pub cancel: CancellationToken,
}

/// Where the workload is at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It runs on here.
    Here,
    /// It runs at the destination, and this copy is gone.
    Moved,
    /// It stands still here, fenced, until the destination or an operator says.
    Unresolved,
}

/// How a move ended.
#[derive(Clone, Debug)]
pub struct Ending {
    /// What was told.
    pub report: Report,
    /// Where the workload is.
    pub fate: Fate,
    /// Its file trees, for whoever takes the source's files away.
    pub trees: Vec<FileTree>,
}

/// Moves one workload. Tells [`Progress::Report`] last.
pub async fn migrate(context: &SourceContext, request: SourceMove) -> Ending {
    let SourceMove { migration, mut workload, options, progress, cancel } = request;
    progress.phase(Phase::Negotiate);
    let asked = options.clone();
    let described = tokio::task::spawn_blocking(move || {
        let manifest = workload.manifest().map(|manifest| described(manifest, &asked));
        let liveness = workload.liveness();
        (workload, manifest, liveness)
    })
    .await;
    let ending = match described {
        Ok((workload, Ok((manifest, fits)), liveness)) => {
            let mut departing = Departing::new(
                context,
                &migration,
                options,
                progress.clone(),
                cancel,
                workload,
                manifest,
                liveness,
            );
            let result = match fits {
                Ok(()) => departing.run().await,
                Err(refusals) => Err(SessionError::Refused(refusals)),
            };
            departing.end(result).await
        }
        Ok((_, Err(error), _)) => nothing_moved(context, &migration, chain(&error)),
        Err(error) => nothing_moved(context, &migration, chain(&error)),
    };
    if let Err(error) = context.journal.save_report(&ending.report) {
        tracing::warn!(error = %chain(&error), "Cannot keep the report");
    }
    progress.tell(Progress::Report { report: Box::new(ending.report.clone()) });
    ending
}

/// The manifest with what the user said of its trees, and what of that does not fit.
fn described(
    mut manifest: Manifest,
    options: &MoveOptions,
) -> (Manifest, std::result::Result<(), Vec<Refusal>>) {
    let said = storage::said(manifest.files.clone(), options).and_then(|mut trees| {
        storage::measure(&mut trees)?;
        Ok(trees)
    });
    let fits = said.map(|trees| manifest.files = trees);
    (manifest, fits)
}

/// A move under way at the source.
struct Departing<'a> {
    context: &'a SourceContext,
    halt: Halt,
    /// Ends a look at memory that is under way.
    call_off: Option<Arc<AtomicBool>>,
    departure: Departure,
    manifest: Manifest,
    liveness: Liveness,
    options: MoveOptions,
    progress: ProgressSender,
    report: Report,
    started: Instant,
    stopped: Option<Instant>,
    token: u64,
    link: Option<Link>,
}

/// What ends the waiting of a move before its fence: the user, or the timeout.
#[derive(Clone)]
pub(super) struct Halt {
    cancel: CancellationToken,
    deadline: tokio::time::Instant,
    timeout: Duration,
    phase: Phase,
}

impl Halt {
    /// Waits for `work`, unless the move is to end first. The timeout counts until the stop.
    pub(super) async fn or<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            error = self.halted() => Err(error),
            result = work => result,
        }
    }

    /// Returns when the move is to end.
    pub(super) async fn halted(&self) -> SessionError {
        let timeout = SessionError::Timeout { phase: self.phase, after: self.timeout };
        tokio::select! {
            () = self.cancel.cancelled() => SessionError::Cancelled,
            () = tokio::time::sleep_until(self.deadline), if self.phase < Phase::Pause => timeout,
        }
    }

    /// That the move is to end, if it is.
    pub(super) fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(SessionError::Cancelled) } else { Ok(()) }
    }
}

impl<'a> Departing<'a> {
    #[allow(clippy::too_many_arguments)]
    fn new(
        context: &'a SourceContext,
        migration: &str,
        options: MoveOptions,
        progress: ProgressSender,
        cancel: CancellationToken,
        workload: Box<dyn SourceWorkload>,
        manifest: Manifest,
        liveness: Liveness,
    ) -> Self {
        let halt = Halt {
            cancel,
            deadline: tokio::time::Instant::now() + options.timeout(),
            timeout: options.timeout(),
            phase: Phase::Negotiate,
        };
        let mut report = empty_report(context, migration);
        report.workload = manifest.name.clone();
        report.kind = manifest.kind();
        report.memory_bytes = manifest.memory_bytes;
        let (ways, call_off) = (workload.ways(), workload.call_off());
        report.dump = ways.dump;
        report.fallbacks = ways.fallbacks;
        report.tracker = Some(match &liveness {
            Liveness::Tracked { tracker } => tracker.clone(),
            Liveness::StopOnly { reason } => format!("none: {reason}"),
        });
        Self {
            context,
            halt,
            call_off,
            departure: Departure::new(migration, 0, context.journal.clone(), workload),
            manifest,
            liveness,
            options,
            progress,
            report,
            started: Instant::now(),
            stopped: None,
            token: 0,
            link: None,
        }
    }

    /// The phases in order.
    async fn run(&mut self) -> Result<()> {
        let live = self.choose_mode()?;
        let verdict = self.negotiate().await?;
        if self.options.dry_run {
            return Ok(());
        }
        let mut copying = self.prepare(&verdict).await?;
        let copied = self.copy_or_call_off(&mut copying, live).await;
        // Also of a move that failed: how far it had come.
        copying.fill_report(&mut self.report);
        copied?;
        self.hand_over().await
    }

    /// Copies. Who cancels the move does not wait for a look at memory that is under way.
    async fn copy_or_call_off(&mut self, copying: &mut Copying, live: bool) -> Result<()> {
        let (halt, called_off) = (self.halt.clone(), self.call_off.clone());
        let cancelled = async {
            halt.cancel.cancelled().await;
            if let Some(called_off) = called_off {
                called_off.store(true, Ordering::Relaxed);
            }
            std::future::pending::<Result<()>>().await
        };
        let copied = tokio::select! {
            copied = self.copy(copying, live) => copied,
            never = cancelled => never,
        };
        copied.map_err(|error| match error {
            // What was called off failed for that.
            SessionError::Workload(WorkloadError::Failed { .. }) => {
                halt.check().err().unwrap_or(error)
            }
            error => error,
        })
    }

    /// From the files to a workload that is loaded at the destination.
    async fn copy(&mut self, copying: &mut Copying, live: bool) -> Result<()> {
        copying.send_files(&mut self.parts()?.1).await?;
        let mut held = PageSet::new();
        if live {
            self.enter(Phase::PreCopy);
            fail_here!("source.pre-copy");
            let (departure, mut wire, report) = self.parts()?;
            held = copying.pre_copy(departure, &mut wire, report).await?;
        }
        if !live && matches!(self.liveness, Liveness::Tracked { .. }) {
            // What devices write while they are saved must still be seen.
            self.departure.with(|workload| workload.track()).await?;
        }
        self.stop_and_send(copying, held).await
    }

    fn enter(&mut self, phase: Phase) {
        self.halt.phase = phase;
        self.progress.phase(phase);
    }

    fn choose_mode(&mut self) -> Result<bool> {
        let live = match (self.options.mode, &self.liveness) {
            (Mode::StopAndCopy, _) => false,
            (Mode::Auto | Mode::PreCopy, Liveness::Tracked { .. }) => true,
            (Mode::Auto, Liveness::StopOnly { reason }) => {
                let text = format!(
                    "Memory is copied while {} stands still ({reason}), so --max-downtime is not \
                     promised",
                    self.manifest.name
                );
                self.progress.tell(Progress::Note { text });
                false
            }
            (Mode::PreCopy, Liveness::StopOnly { reason }) => {
                let text = format!(
                    "--mode pre-copy needs dirty tracking, which {} does not have: {reason}; use \
                     --mode auto or stop-and-copy",
                    self.manifest.name
                );
                return Err(SessionError::Refused(vec![Refusal::new(
                    RefusalCode::Unsupported,
                    text,
                )]));
            }
        };
        self.report.mode = if live { "pre-copy" } else { "stop-and-copy" }.to_owned();
        Ok(live)
    }

    /// Hello, offer, verdict. Touches nothing on either side.
    async fn negotiate(&mut self) -> Result<Verdict> {
        fail_here!("source.negotiate");
        let context = self.context;
        let dial = async {
            context.dialer.dial(&context.peer, StreamRole::Control, PATIENCE).await.map_err(
                |source| SessionError::Transport {
                    what: format!("Cannot open a session with {}", context.peer.name),
                    source,
                },
            )
        };
        let connection = self.halt.or(dial).await?;
        let mut link = Link::new(Control::new(connection));
        link.send(request::Body::Hello(Hello {
            migration: self.report.migration.clone(),
            host: context.host.clone(),
            plain_pages: !context.page_encryption,
        }))
        .await;
        let welcome = match self.halt.or(link.reply(PATIENCE, "greeting")).await? {
            reply::Body::Welcome(welcome) => welcome,
            other => return Err(link.unexpected(&other, "greeting")),
        };
        self.report.encrypted = context.page_encryption || !welcome.plain_pages;
        let journal = context.journal.clone();
        let uuid = self.manifest.uuid.clone();
        self.token = tokio::task::spawn_blocking(move || journal.next_token(&uuid)).await??;
        // Held until the verdict is there: the destination looks for them.
        let trees = self.manifest.files.clone();
        let left = tokio::task::spawn_blocking(move || trees.iter().map(Left::at).collect());
        let probes: Vec<Left> = left.await?;
        link.send(request::Body::Offer(Offer {
            manifest: Some(self.manifest.clone()),
            token: self.token,
            paths: self.options.paths.iter().map(mapping).collect(),
            streams: self.options.streams,
            dry_run: self.options.dry_run,
            probes: probes.iter().map(Left::name).collect(),
        }))
        .await;
        let verdict = match self.halt.or(link.reply(PATIENCE, "offering the workload")).await? {
            reply::Body::Verdict(verdict) => verdict,
            other => return Err(link.unexpected(&other, "offering the workload")),
        };
        drop(probes);
        if !verdict.refusals.is_empty() {
            return Err(SessionError::Refused(verdict.refusals));
        }
        storage::accepted(&mut self.manifest.files);
        self.link = Some(link);
        Ok(verdict)
    }

    /// Journals the session, has the empty workload built, connects the streams, sends the files.
    async fn prepare(&mut self, verdict: &Verdict) -> Result<Copying> {
        self.enter(Phase::Prepare);
        fail_here!("source.prepare");
        self.begin_journal().await?;
        let halt = self.halt.clone();
        let link = self.link()?;
        link.send(request::Body::Prepare(Prepare {})).await;
        match halt.or(link.reply(PREPARE_WITHIN, "building the empty workload")).await? {
            reply::Body::Ready(_) => {}
            other => return Err(link.unexpected(&other, "building the empty workload")),
        }
        let secret = Secret::from_bytes(&verdict.secret).ok_or_else(|| SessionError::Protocol {
            host: link.host().to_owned(),
            what: "its secret is not 32 bytes".to_owned(),
        })?;
        let streams = verdict.streams.clamp(1, self.options.streams);
        self.report.streams = streams;
        let mut pages = Vec::new();
        for index in 0..streams {
            pages.push(self.join(StreamRole::Page, index, &secret).await?);
        }
        let files = self.join(StreamRole::File, 0, &secret).await?;
        Copying::new(pages, files, self.manifest.files.clone(), &self.options, self.started)
    }

    async fn begin_journal(&mut self) -> Result<()> {
        let row = SessionRow {
            migration: self.report.migration.clone(),
            role: Role::Source,
            workload: self.manifest.name.clone(),
            uuid: self.manifest.uuid.clone(),
            peer: self.context.peer.name.clone(),
            peer_address: self.context.peer.address.clone(),
            token: self.token,
            record: Record::Begun,
            boot_id: boot_id(),
            updated_ms: 0,
            manifest: Vec::new(),
        };
        let journal = self.context.journal.clone();
        tokio::task::spawn_blocking(move || journal.begin(&row)).await??;
        self.departure.begun(self.token);
        Ok(())
    }

    async fn join(
        &mut self,
        role: StreamRole,
        index: u32,
        secret: &Secret,
    ) -> Result<crate::transport::DataStream> {
        let context = self.context;
        let failed = |source| SessionError::Transport {
            what: format!("Cannot open stream {index} to {}", context.peer.name),
            source,
        };
        let session = self.report.migration.parse().map_err(|_| SessionError::Protocol {
            host: context.host.clone(),
            what: "the migration's id is no UUID".to_owned(),
        })?;
        let join = Join {
            session,
            secret: secret.clone(),
            index,
            encrypted: self.report.encrypted || role == StreamRole::File,
        };
        let open = async {
            let connection =
                context.dialer.dial(&context.peer, role, PATIENCE).await.map_err(failed)?;
            connection.join(&join).await.map_err(failed)
        };
        self.halt.or(open).await
    }

    /// Stops the workload and sends what is left of it; it is loaded at the destination after.
    async fn stop_and_send(&mut self, copying: &mut Copying, held: PageSet) -> Result<()> {
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
    async fn hand_over(&mut self) -> Result<()> {
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

    fn link(&mut self) -> Result<&mut Link> {
        self.link.as_mut().ok_or_else(|| SessionError::Protocol {
            host: self.context.peer.name.clone(),
            what: "there is no connection".to_owned(),
        })
    }

    /// What the copying phases need, borrowed apart.
    fn parts(&mut self) -> Result<(&mut Departure, Wire<'_>, &mut Report)> {
        let link = self.link.as_mut().ok_or_else(|| SessionError::Protocol {
            host: self.context.peer.name.clone(),
            what: "there is no connection".to_owned(),
        })?;
        let kind = self.manifest.kind();
        let fixed = self.context.journal.fixed_stop_ms(kind, &self.report.workload).ok().flatten();
        let wire = Wire {
            link,
            halt: self.halt.clone(),
            progress: self.progress.clone(),
            fixed_stop_ms: fixed.unwrap_or(first_guess(kind)),
        };
        Ok((&mut self.departure, wire, &mut self.report))
    }

    /// The one way out: everything that is still ours to undo is undone here.
    async fn end(mut self, result: Result<()>) -> Ending {
        if self.departure.machine().may_give_up() {
            // The destination lets go while the workload resumes.
            let farewell = self.link.as_ref().map(Link::aborter);
            let reason = result.as_ref().err().map(|error| chain(error)).unwrap_or_default();
            self.departure.give_up(farewell, &reason).await;
        }
        if let Some(link) = self.link.take() {
            link.close().await;
        }
        let lost = self.departure.is_lost();
        let fate = match self.departure.machine() {
            Source::Released | Source::Releasing => Fate::Moved,
            Source::Fenced | Source::Undecided => Fate::Unresolved,
            _ => Fate::Here,
        };
        let error = result.as_ref().err().map(|error| chain(error)).unwrap_or_default();
        let (outcome, reason) = match (fate, &result) {
            (Fate::Moved, _) => (Outcome::Completed, None),
            (Fate::Unresolved, _) => {
                (Outcome::Unresolved, Some(unresolved_advice(&self.report, &error)))
            }
            (Fate::Here, Ok(())) => (
                Outcome::Completed,
                Some(format!("Dry run: nothing was touched; {} would take it", self.report.to)),
            ),
            (Fate::Here, Err(error)) => {
                self.report.lost = lost;
                (outcome_of(error, self.halt.phase), Some(self.advice(error, lost)))
            }
        };
        self.report.total_ms = millis(self.started.elapsed());
        self.report.outcome = outcome;
        self.report.reason = reason;
        if let Err(SessionError::Refused(refusals)) = &result {
            self.report.refusals = refusals.clone();
        }
        let mut report = self.report;
        if report.outcome != Outcome::Completed {
            report.downtime_ms = None;
        }
        Ending { report, fate, trees: self.manifest.files }
    }

    fn advice(&self, error: &SessionError, lost: bool) -> String {
        let name = &self.manifest.name;
        let state = match self.stopped {
            _ if lost => format!(
                "{name} ended, or its keeper was killed, while it was being moved: see `decamp \
                 inspect {name}` and `decamp logs {name}`"
            ),
            None => format!("{name} was not touched and runs on at {}", self.context.host),
            Some(_) => format!("{name} was resumed and runs on at {}", self.context.host),
        };
        let text = chain(error);
        let stop = if text.ends_with(['.', '?', '!']) { "" } else { "." };
        format!("{text}{stop} {state}")
    }
}

/// What the copying phases use of a session.
pub(super) struct Wire<'a> {
    /// The control connection.
    pub(super) link: &'a mut Link,
    /// What may end the waiting.
    pub(super) halt: Halt,
    /// Where progress is told.
    pub(super) progress: ProgressSender,
    /// What a stop is thought to cost beyond its memory.
    pub(super) fixed_stop_ms: f64,
}

/// Before any move of a kind was measured on this host, in milliseconds.
fn first_guess(kind: Kind) -> f64 {
    match kind {
        Kind::Container => 250.0,
        _ => 20.0,
    }
}

fn outcome_of(error: &SessionError, phase: Phase) -> Outcome {
    match error {
        SessionError::Cancelled => Outcome::Cancelled,
        _ if phase == Phase::Negotiate => Outcome::Refused,
        _ => Outcome::Failed,
    }
}

fn unresolved_advice(report: &Report, why: &str) -> String {
    format!(
        "{why}. {name} stands still at {from}, fenced, and is never started twice: this agent goes \
         on asking {to}, and settles it when it answers. To decide by hand, look at both hosts with \
         `decamp ls`, then `decamp resolve {id} --keep destination` if it runs at {to}, or `decamp \
         resolve {id} --keep source` if it does not and never will",
        name = report.workload,
        from = report.from,
        to = report.to,
        id = report.migration,
    )
}

/// What tells the destination whether it sees the very same tree.
enum Left {
    /// A file, as long as this lives.
    Probe(Probe),
    /// What the tree looks like: it cannot be written here.
    Look(String),
    Nothing,
}

impl Left {
    fn at(tree: &FileTree) -> Self {
        let path = Path::new(&tree.path);
        let left = match tree.role() {
            FileRole::Volume => Probe::inside(path),
            _ => Probe::create(path),
        };
        let error = match left {
            Ok(probe) => return Self::Probe(probe),
            Err(error) => error,
        };
        tracing::debug!(path = %path.display(), %error, "Cannot leave a probe");
        let look = tree.role().is_volume().then(|| look_of(path).ok().flatten()).flatten();
        look.map_or(Self::Nothing, Self::Look)
    }

    fn name(&self) -> String {
        match self {
            Self::Probe(probe) => probe.name().to_owned(),
            Self::Look(look) => look.clone(),
            Self::Nothing => String::new(),
        }
    }
}

fn mapping((old, new): &(PathBuf, PathBuf)) -> PathMapping {
    PathMapping { old: old.to_string_lossy().into_owned(), new: new.to_string_lossy().into_owned() }
}

/// Milliseconds with their fraction.
pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn empty_report(context: &SourceContext, migration: &str) -> Report {
    Report {
        migration: migration.to_owned(),
        workload: String::new(),
        kind: Kind::Unspecified,
        from: context.host.clone(),
        to: context.peer.name.clone(),
        outcome: Outcome::Failed,
        reason: None,
        lost: false,
        refusals: Vec::new(),
        mode: "stop-and-copy".to_owned(),
        tracker: None,
        dump: None,
        restore: None,
        fallbacks: Vec::new(),
        total_ms: 0.0,
        downtime_ms: None,
        downtime: DowntimeParts::default(),
        rounds: Vec::new(),
        memory_bytes: 0,
        wire_bytes: 0,
        file_bytes: 0,
        pages: PageCounts::default(),
        streams: 0,
        encrypted: context.page_encryption,
        predicted: Predicted::default(),
        source_stall_ms: 0.0,
        compare_ms: 0.0,
    }
}

/// The workload could not even be described.
fn nothing_moved(context: &SourceContext, migration: &str, reason: String) -> Ending {
    let mut report = empty_report(context, migration);
    report.outcome = Outcome::Refused;
    report.reason = Some(format!("{reason}. The workload was not touched"));
    Ending { report, fate: Fate::Here, trees: Vec::new() }
}
