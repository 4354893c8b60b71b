//! Moves away from this host: those under way, who listens to them, and what the registry says when
//! they end. How a move is done is the session's business.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use decamp_shared::session::progress::Phase;
use decamp_shared::session::source::{Ending, Fate, SourceContext, SourceMove, migrate};
use decamp_shared::session::{MoveOptions, Progress, ProgressSender, Report, storage};
use decamp_shared::transport::PeerAddress;
use decamp_shared::workload::{
    FileTree, SourceWorkload, Storage, WorkloadError, is_plain_absolute,
};
use futures_util::stream;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::Agent;
use super::answer::{Answer, Result, chain};
use super::claims::Claim;
use super::config::PageEncryption;
use super::recovery;
use super::registry::{RegistryError, Workload};
use super::workloads::{blocking, gone, not_in_state};
use crate::backend::{entry, still_shared};
use crate::messages::{FileEntry, MigrationRequest, MigrationView, State};

/// What a claim for a move says.
pub(crate) const DOING: &str = "being moved";
/// What a claim says while it is noted late how a move ended.
const TIDYING: &str = "being noted as moved";
/// Events that a slow listener may be behind; of more it misses the oldest.
const BEHIND: usize = 1024;
/// How long `cancel` waits for the move to end.
const CANCEL_WITHIN: Duration = Duration::from_secs(60);
/// How long the last words of a session may take to be told on.
const DRAINED_WITHIN: Duration = Duration::from_secs(1);
/// Between two tries to note how a move ended.
const NOTE_AGAIN: Duration = Duration::from_secs(5);
/// The least of an id that stands for it: less is typed by mistake, or was to be a name.
const ID_LEAST: usize = 6;
/// Reports of earlier moves that are listed.
const LISTED: u32 = 100;

/// The moves that are under way.
#[derive(Debug, Default)]
pub(crate) struct Moves(Mutex<BTreeMap<String, Arc<Move>>>);

/// One move under way.
#[derive(Debug)]
pub(crate) struct Move {
    id: String,
    workload: String,
    to: String,
    /// What the registry had as its files before it began.
    files: Vec<FileEntry>,
    cancel: CancellationToken,
    events: broadcast::Sender<Progress>,
    told: Mutex<Told>,
    over: watch::Sender<bool>,
}

/// What a move told last.
#[derive(Debug, Default)]
struct Told {
    phase: Option<Phase>,
    report: Option<Report>,
}

/// Whether `key` is as much of a migration's id as it takes to mean it.
pub(super) fn begins_so(id: &str, key: &str) -> bool {
    key.len() >= ID_LEAST && id.starts_with(key)
}

/// Takes a move out of the list, however its task ends.
struct Listed {
    agent: Arc<Agent>,
    moving: Arc<Move>,
}

impl Moves {
    fn held(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Move>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the move of exactly that id is under way.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.held().contains_key(id)
    }

    /// The move under way with that id, or of the workload of that name; else the only one whose id begins
    /// so.
    fn find(&self, key: &str) -> Option<Arc<Move>> {
        let held = self.held();
        let exact = held.get(key).or_else(|| held.values().find(|one| one.workload == key));
        let begins = || {
            let mut begin = held.values().filter(|one| begins_so(&one.id, key));
            begin.next().filter(|_| begin.next().is_none())
        };
        exact.or_else(begins).cloned()
    }

    /// Cancels every move that can still be, and waits for all to end.
    pub(crate) async fn end_all(&self, within: Duration) {
        let all: Vec<Arc<Move>> = self.held().values().cloned().collect();
        let ends = all.iter().map(|moving| {
            moving.cancel.cancel();
            moving.ended()
        });
        if tokio::time::timeout(within, futures_util::future::join_all(ends)).await.is_err() {
            tracing::warn!("A move did not end in time; the next agent finds it in the journal");
        }
    }
}

impl Move {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: Progress) {
        let mut told = self.told();
        match &event {
            Progress::Phase { phase } => told.phase = Some(*phase),
            Progress::Report { report } => told.report = Some((**report).clone()),
            _ => {}
        }
        // Without listeners nobody misses it. Sent under the lock, so that whoever subscribes sees
        // the report either there or here.
        let _ = self.events.send(event);
    }

    fn view(&self) -> MigrationView {
        let told = self.told();
        MigrationView {
            migration: self.id.clone(),
            workload: self.workload.clone(),
            to: self.to.clone(),
            active: told.report.is_none(),
            phase: told.phase,
            report: told.report.clone(),
        }
    }

    /// Its events from now on as JSON lines, the report last.
    pub(crate) fn lines(&self) -> Body {
        let told = self.told();
        let begin = Progress::Started {
            migration: self.id.clone(),
            workload: self.workload.clone(),
            to: self.to.clone(),
        };
        let mut first = vec![begin];
        first.extend(told.phase.map(|phase| Progress::Phase { phase }));
        let ended = told.report.clone().map(|report| Progress::Report { report: Box::new(report) });
        let events = match ended {
            Some(report) => {
                first.push(report);
                None
            }
            None => Some(self.events.subscribe()),
        };
        let begin = stream::iter(first.iter().map(line).collect::<Vec<_>>());
        Body::from_stream(futures_util::StreamExt::chain(begin, stream::unfold(events, next_line)))
    }

    async fn ended(&self) {
        // The sender lives in this very object.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }
}

async fn next_line(
    events: Option<broadcast::Receiver<Progress>>,
) -> Option<(std::io::Result<Bytes>, Option<broadcast::Receiver<Progress>>)> {
    let mut events = events?;
    loop {
        match events.recv().await {
            Ok(event) => {
                let is_last = matches!(event, Progress::Report { .. });
                return Some((line(&event), (!is_last).then_some(events)));
            }
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return None,
        }
    }
}

fn line(event: &Progress) -> std::io::Result<Bytes> {
    let mut text = serde_json::to_vec(event)?;
    text.push(b'\n');
    Ok(text.into())
}

/// Tells on what the session tells. The report is left out: it is told once the registry says the
/// same.
async fn follow(moving: Arc<Move>, mut events: mpsc::UnboundedReceiver<Progress>) {
    while let Some(event) = events.recv().await {
        if !matches!(event, Progress::Report { .. } | Progress::Started { .. }) {
            moving.tell(event);
        }
    }
}

impl Agent {
    /// Begins a move and returns once it is under way; it goes on whoever listens.
    pub(crate) async fn begin_move(
        self: &Arc<Self>,
        request: MigrationRequest,
    ) -> Result<Arc<Move>> {
        let name = request.workload.as_str();
        let known = self.find(name)?;
        check_options(&request.options)?;
        let peer = self.peer(&request.to)?;
        if known.state != State::Running {
            return Err(Answer::Conflict(not_in_state(&known, "moved", "running")));
        }
        let claim = self.claim(name, DOING).await?;
        let workload = self.find(name)?;
        if workload.state != State::Running {
            return Err(Answer::Conflict(not_in_state(&workload, "moved", "running")));
        }
        let backend = self.backends.of(workload.kind)?;
        let (spec, place) = (workload.spec.clone(), self.place(&workload));
        let described = blocking(move || {
            let mut source = backend.source(&spec, &place)?;
            let trees = source.manifest()?.files;
            Ok::<_, WorkloadError>((source, trees))
        });
        let (source, trees) = described.await?.map_err(|error| {
            Answer::refused(format!("{name} cannot be moved: {}", chain(&error)))
        })?;
        let trees = storage::said(trees, &request.options).map_err(|refusals| {
            Answer::refused_for(&format!("{name} cannot be moved"), refusals)
        })?;
        let id = uuid::Uuid::new_v4().to_string();
        if !request.options.dry_run {
            self.registry.change(name, |workload| {
                workload.state = State::Migrating;
                workload.moved_to = Some(peer.name.clone());
                workload.migration = Some(id.clone());
                // Before anything else: whoever settles it after a crash knows no more than this.
                workload.files = may_be_shared(&trees, &workload.files);
            })?;
        }
        Ok(self.launch(id, request, peer, source, workload.files, claim))
    }

    /// Sets the session going, and whoever tells of it and writes down its end.
    fn launch(
        self: &Arc<Self>,
        id: String,
        request: MigrationRequest,
        peer: PeerAddress,
        source: Box<dyn SourceWorkload>,
        files: Vec<FileEntry>,
        claim: Claim,
    ) -> Arc<Move> {
        let moving = Arc::new(Move {
            id: id.clone(),
            workload: request.workload,
            to: peer.name.clone(),
            files,
            cancel: CancellationToken::new(),
            events: broadcast::Sender::new(BEHIND),
            told: Mutex::default(),
            over: watch::Sender::new(false),
        });
        self.moves.held().insert(id.clone(), Arc::clone(&moving));
        let listed = Listed { agent: Arc::clone(self), moving: Arc::clone(&moving) };
        let (progress, events) = ProgressSender::channel();
        let follower = tokio::spawn(follow(Arc::clone(&moving), events));
        let context = self.source_context(peer);
        let options = request.options;
        let source_move = SourceMove {
            migration: id,
            workload: source,
            options: options.clone(),
            progress,
            cancel: moving.cancel.clone(),
        };
        tokio::spawn(async move {
            let ending = migrate(&context, source_move).await;
            // All that was told before comes before the report.
            let _ = tokio::time::timeout(DRAINED_WITHIN, follower).await;
            listed.agent.settle(&ending, &options, &listed.moving).await;
            // Its entry keeps everybody else off as long as nobody knows where it is.
            drop(claim);
            if ending.fate == Fate::Unresolved {
                // Before the report, so that whoever hears it can decide at once.
                recovery::go_on_asking(&listed.agent, &ending.report.migration).await;
            }
            listed.end(ending.report);
        });
        moving
    }

    /// Calls a move off and waits until it has ended.
    pub(crate) async fn cancel_move(&self, key: &str) -> Result<MigrationView> {
        let moving = self
            .moves
            .find(key)
            .ok_or_else(|| Answer::UnknownMigration(key.to_owned(), "under way on this host"))?;
        tracing::info!(migration = moving.id, workload = moving.workload, "Cancelling");
        moving.cancel.cancel();
        // A move past its fence ends in its own time; the view says how far it is.
        let _ = tokio::time::timeout(CANCEL_WITHIN, moving.ended()).await;
        Ok(moving.view())
    }

    /// The move under way behind `key`, for one more listener.
    pub(crate) fn follow_move(&self, key: &str) -> Result<Body> {
        let moving = self
            .moves
            .find(key)
            .ok_or_else(|| Answer::UnknownMigration(key.to_owned(), "under way on this host"))?;
        Ok(moving.lines())
    }

    /// Moves under way, then those that ended, the newest first.
    pub(crate) fn list_moves(&self) -> Result<Vec<MigrationView>> {
        let mut views: Vec<MigrationView> =
            self.moves.held().values().map(|one| one.view()).collect();
        for report in self.journal.reports(LISTED)? {
            if views.iter().all(|view| view.migration != report.migration) {
                views.push(MigrationView {
                    migration: report.migration.clone(),
                    workload: report.workload.clone(),
                    to: report.to.clone(),
                    active: false,
                    phase: None,
                    report: Some(report),
                });
            }
        }
        Ok(views)
    }

    /// What sessions that leave for `peer` share.
    pub(crate) fn source_context(&self, peer: PeerAddress) -> SourceContext {
        SourceContext {
            host: self.config.name.clone(),
            dialer: self.dialer.clone(),
            peer,
            page_encryption: self.config.page_encryption == PageEncryption::On,
            journal: Arc::clone(&self.journal),
        }
    }

    fn peer(&self, to: &str) -> Result<PeerAddress> {
        let name = to.split(':').next().unwrap_or(to);
        if name == self.config.name {
            return Err(Answer::refused(format!(
                "{name} is this very host: a workload is moved to another one"
            )));
        }
        self.config.peer(to).ok_or_else(|| {
            let known: Vec<&str> = self.config.hosts.keys().map(String::as_str).collect();
            let known = match known.is_empty() {
                true => "it names none".to_owned(),
                false => format!("it names {}", known.join(", ")),
            };
            Answer::refused(format!(
                "Host {name} is unknown: name it in the [hosts] table of this agent's configuration \
                 ({known})"
            ))
        })
    }

    /// Writes down where the workload is after a move.
    async fn settle(self: &Arc<Self>, ending: &Ending, options: &MoveOptions, moving: &Arc<Move>) {
        if options.dry_run {
            return;
        }
        match self.registry.change(&moving.workload, |entry| enter_end(entry, ending, moving)) {
            Ok(workload) => self.tidy(&workload, ending.fate, options, moving).await,
            Err(error) => {
                tracing::error!(
                    migration = moving.id,
                    "Cannot note how the move ended; the journal knows: {}",
                    chain(&error)
                );
                if ending.fate != Fate::Unresolved {
                    let (ending, moving) = (ending.clone(), Arc::clone(moving));
                    tokio::spawn(note_end_later(Arc::clone(self), ending, options.clone(), moving));
                }
            }
        }
    }

    /// What is left here of a workload that is noted as moved goes.
    async fn tidy(
        self: &Arc<Self>,
        workload: &Workload,
        fate: Fate,
        options: &MoveOptions,
        moving: &Move,
    ) {
        if fate == Fate::Moved {
            self.sweep_moved(workload).await;
            if options.remove_source {
                self.remove_source(workload, moving).await;
            }
        }
    }

    /// Removes the files of a workload that moved. Its claim must be held.
    async fn remove_source(&self, workload: &Workload, moving: &Move) {
        let note = |text: String| moving.tell(Progress::Note { text });
        let name = &workload.name;
        let is_it = |found: &Workload| {
            found.state == State::Moved && found.migration.as_deref() == Some(&moving.id)
        };
        if !self.registry.get(name).is_ok_and(|found| found.as_ref().is_some_and(is_it)) {
            return note(format!("{name} is not what moved away any more, so its files stay"));
        }
        if !gone(&self.place(workload)).await.unwrap_or(false) {
            return note(format!(
                "The old copy of {name} is still being taken away, so its files stay: `decamp rm {name}` \
                 removes them"
            ));
        }
        let answer = match self.remove_files(workload).await {
            Ok(answer) => answer,
            Err(answer) => return note(format!("The files here were not removed: {answer}")),
        };
        for left in &answer.left {
            note(format!("{} stays here: {}", left.path.display(), left.why));
        }
        if answer.left.is_empty() {
            let place = self.place(workload);
            let forgotten = self.registry.remove(&workload.name);
            if let Err(error) = forgotten {
                note(format!("It stays in `ls --all` here: {}", chain(&error)));
            } else if let Err(error) = self.state_dir.remove_place(&place) {
                tracing::warn!("{}", chain(&error));
            }
        }
    }
}

impl Listed {
    /// Ends the move. Its claim was given back: whoever hears the report finds the workload free.
    fn end(self, report: Report) {
        let reason = report.reason.as_deref().unwrap_or_default();
        tracing::info!(
            migration = self.moving.id,
            workload = self.moving.workload,
            to = self.moving.to,
            outcome = ?report.outcome,
            reason,
            "Move ended"
        );
        self.moving.tell(Progress::Report { report: Box::new(report) });
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.agent.moves.held().remove(&self.moving.id);
        self.moving.over.send_replace(true);
    }
}

/// What the registry says of a workload when its move has ended.
fn enter_end(entry: &mut Workload, ending: &Ending, moving: &Move) {
    match ending.fate {
        Fate::Here => {
            entry.state = State::Running;
            entry.moved_to = None;
            entry.files.clone_from(&moving.files);
        }
        Fate::Moved => {
            entry.becomes_moved(&moving.to);
            if !ending.trees.is_empty() {
                let files =
                    ending.trees.iter().map(|tree| self::entry(tree, Path::new(&tree.path)));
                entry.files = still_shared(files.collect(), &moving.files);
            }
        }
        Fate::Unresolved => entry.state = State::Unresolved,
    }
}

/// A disk that is full now may not stay so: until it is noted, nothing can be done to the workload.
async fn note_end_later(
    agent: Arc<Agent>,
    ending: Ending,
    options: MoveOptions,
    moving: Arc<Move>,
) {
    loop {
        tokio::time::sleep(NOTE_AGAIN).await;
        // As soon as it is noted it may come back, or be removed: not before all of this is done.
        let Ok(_claim) = agent.claims.take(&moving.workload, TIDYING) else { continue };
        let mut entered = false;
        let noted = agent.registry.change(&moving.workload, |entry| {
            // It may have been settled otherwise meanwhile.
            let same = entry.migration.as_deref() == Some(&moving.id);
            entered = same && entry.state == State::Migrating;
            if entered {
                enter_end(entry, &ending, &moving);
            }
        });
        match noted {
            Ok(workload) if entered => {
                return agent.tidy(&workload, ending.fate, &options, &moving).await;
            }
            Ok(_) | Err(RegistryError::Unknown(_)) => return,
            Err(error) => tracing::debug!("Still cannot note how it ended: {}", chain(&error)),
        }
    }
}

/// The files of a workload that begins to leave: where nobody said that a volume is copied the other host
/// may have the very same.
fn may_be_shared(trees: &[FileTree], before: &[FileEntry]) -> Vec<FileEntry> {
    let files = trees.iter().map(|tree| {
        let unsaid = tree.role().is_volume() && tree.storage() == Storage::Unsaid;
        let entry = entry(tree, Path::new(&tree.path));
        FileEntry { shared: entry.shared || unsaid, ..entry }
    });
    still_shared(files.collect(), before)
}

fn check_options(options: &MoveOptions) -> Result<()> {
    if !(1..=64).contains(&options.streams) {
        return Err(Answer::Request(format!("{} streams: 1 to 64 can be used", options.streams)));
    }
    if options.max_downtime_ms == Some(0) || options.timeout_ms == 0 {
        return Err(Answer::Request("A time of 0 ms cannot be kept".into()));
    }
    let words = options.storage.iter().chain(options.storage_of.iter().map(|(_, word)| word));
    if words.into_iter().any(|word| *word == Storage::Unsaid) {
        return Err(Answer::Request("Storage is copy or shared".into()));
    }
    if let Some((path, _)) = options.storage_of.iter().find(|(path, _)| !is_plain_absolute(path)) {
        return Err(Answer::Request(format!(
            "{} has to be an absolute path without `..`",
            path.display()
        )));
    }
    match options.paths.iter().find(|(old, new)| !is_plain_absolute(old) || !is_plain_absolute(new))
    {
        Some((old, new)) => Err(Answer::Request(format!(
            "{}={} has to be two absolute paths without `..`",
            old.display(),
            new.display()
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, MIGRATION, keeper};
    use super::*;

    fn moving(id: &str, workload: &str) -> Arc<Move> {
        Arc::new(Move {
            id: id.into(),
            workload: workload.into(),
            to: "beta".into(),
            files: Vec::new(),
            cancel: CancellationToken::new(),
            events: broadcast::Sender::new(4),
            told: Mutex::default(),
            over: watch::Sender::new(false),
        })
    }

    async fn collected(body: Body) -> Vec<Progress> {
        let bytes = axum::body::to_bytes(body, 1 << 20).await.expect("collected");
        bytes
            .split(|&byte| byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).expect("a line of progress"))
            .collect()
    }

    fn report(id: &str) -> Report {
        serde_json::from_value(serde_json::json!({
            "migration": id, "workload": "web", "kind": "vm", "from": "alpha", "to": "beta",
            "outcome": "completed", "reason": null, "mode": "pre-copy", "tracker": null,
            "total_ms": 1.0, "downtime_ms": 1.0,
            "downtime": {"pause_ms": 0.0, "memory_ms": 0.0, "state_ms": 0.0, "restore_ms": 0.0,
                         "switch_ms": 0.0},
            "rounds": [], "memory_bytes": 1, "wire_bytes": 1, "file_bytes": 0,
            "pages": {"zero": 0, "same": 0, "delta": 0, "lz4": 0, "zstd": 0, "raw": 0},
            "streams": 1, "encrypted": true,
            "predicted": {"total_ms": null, "downtime_ms": null}, "source_stall_ms": 0.0
        }))
        .expect("a report")
    }

    #[tokio::test]
    async fn every_listener_hears_the_report_last() {
        let one = moving("1", "web");
        let early = one.lines();
        one.tell(Progress::Phase { phase: Phase::Prepare });
        let middle = one.lines();
        // More than a listener may be behind.
        for round in 0..10 {
            one.tell(Progress::Note { text: format!("{round}") });
        }
        one.tell(Progress::Report { report: Box::new(report("1")) });
        let late = one.lines();
        for body in [early, middle, late] {
            let events = collected(body).await;
            assert!(matches!(events.first(), Some(Progress::Started { .. })));
            assert!(matches!(events.last(), Some(Progress::Report { .. })));
            let reports = events.iter().filter(|event| matches!(event, Progress::Report { .. }));
            assert_eq!(reports.count(), 1);
        }
        let view = one.view();
        assert!(!view.active && view.phase == Some(Phase::Prepare));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn files_stay_as_long_as_the_old_copy_does() {
        let bench = Bench::new();
        let web = bench.enter(State::Moved);
        let keeper = keeper(&bench.agent.place(&web));
        let one = moving(MIGRATION, "web");
        let mut events = one.events.subscribe();
        bench.agent.remove_source(&web, &one).await;
        let Ok(Progress::Note { text }) = events.try_recv() else { panic!("nothing is told") };
        assert!(text.contains("decamp rm web"), "{text}");
        assert_eq!(bench.state(), Some(State::Moved));
        drop(keeper);
        bench.agent.remove_source(&web, &one).await;
        assert_eq!(bench.state(), None);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn files_of_what_came_back_stay() {
        let bench = Bench::new();
        let web = bench.enter(State::Moved);
        let one = moving(MIGRATION, "web");
        let mut events = one.events.subscribe();
        bench.agent.registry.change("web", Workload::becomes_running).expect("written");
        bench.agent.remove_source(&web, &one).await;
        let Ok(Progress::Note { text }) = events.try_recv() else { panic!("nothing is told") };
        assert!(text.contains("its files stay"), "{text}");
        assert_eq!(bench.state(), Some(State::Running));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn how_it_ended_is_not_noted_while_something_is_done_to_it() {
        let bench = Bench::new();
        bench.enter(State::Migrating);
        let claim = bench.agent.claims.take("web", "arriving").expect("free");
        let ending = Ending { report: report(MIGRATION), fate: Fate::Moved, trees: Vec::new() };
        let options = MoveOptions { remove_source: true, ..MoveOptions::default() };
        let agent = Arc::clone(&bench.agent);
        tokio::spawn(note_end_later(agent, ending, options, moving(MIGRATION, "web")));
        tokio::time::sleep(NOTE_AGAIN + Duration::from_millis(500)).await;
        assert_eq!(bench.state(), Some(State::Migrating));
        drop(claim);
        bench.until("another try", |bench| bench.state().is_none()).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn how_it_ended_is_noted_when_the_disk_has_room_again() {
        let bench = Bench::new();
        bench.enter(State::Migrating);
        bench.fill_disk(State::Running);
        let report = report(MIGRATION);
        let ending = Ending { report, fate: Fate::Here, trees: Vec::new() };
        let one = moving(MIGRATION, "web");
        bench.agent.settle(&ending, &MoveOptions::default(), &one).await;
        assert_eq!(bench.state(), Some(State::Migrating));
        bench.free_disk();
        bench.until("another try", |bench| bench.state() == Some(State::Running)).await;
    }

    #[test]
    fn what_may_be_shared_is_noted_before_anything_can_go_wrong() {
        let tree = |path: &str, storage: Storage| FileTree {
            role: decamp_shared::workload::FileRole::Volume.into(),
            path: path.to_owned(),
            storage: storage.into(),
            ..FileTree::default()
        };
        let trees = [
            tree("/own", Storage::Copy),
            tree("/nas", Storage::Shared),
            tree("/unsaid", Storage::Unsaid),
            tree("/once", Storage::Copy),
        ];
        // A copy is made of what was shared with another host, which may still use it.
        let once = FileEntry { role: "volume".into(), path: "/once".into(), shared: true };
        let files = may_be_shared(&trees, &[once]);
        let shared: Vec<bool> = files.iter().map(|file| file.shared).collect();
        assert_eq!(shared, [false, true, true, true]);
    }

    #[test]
    fn moves_are_found_by_id_its_beginning_or_workload() {
        let moves = Moves::default();
        let under_way =
            [("3f2a17-1", "web"), ("3f2a17-2", "mail"), ("3f2b18-3", "redis"), ("a", "3f2b18")];
        for (id, workload) in under_way {
            moves.held().insert(id.into(), moving(id, workload));
        }
        let found = |key: &str| moves.find(key).map(|one| one.id.clone());
        assert_eq!(found("3f2a17-1").as_deref(), Some("3f2a17-1"));
        assert_eq!(found("3f2b18-").as_deref(), Some("3f2b18-3"));
        assert_eq!(found("web").as_deref(), Some("3f2a17-1"));
        assert_eq!(found("3f2b18").as_deref(), Some("a"), "first of all it is a workload's name");
        assert_eq!(found("3f2a17"), None, "two begin so");
        assert_eq!(found("3f2b1"), None, "too little");
        assert_eq!(found("zzz"), None);
    }

    #[test]
    fn options_of_other_clients_are_checked_too() {
        assert!(check_options(&MoveOptions::default()).is_ok());
        for bad in [
            MoveOptions { streams: 0, ..MoveOptions::default() },
            MoveOptions { streams: 65, ..MoveOptions::default() },
            MoveOptions { timeout_ms: 0, ..MoveOptions::default() },
            MoveOptions { max_downtime_ms: Some(0), ..MoveOptions::default() },
            MoveOptions { paths: vec![("/a".into(), "../b".into())], ..MoveOptions::default() },
            MoveOptions { storage: Some(Storage::Unsaid), ..MoveOptions::default() },
            MoveOptions {
                storage_of: vec![("a/..".into(), Storage::Copy)],
                ..MoveOptions::default()
            },
        ] {
            assert!(matches!(check_options(&bad), Err(Answer::Request(_))), "{bad:?}");
        }
    }
}
