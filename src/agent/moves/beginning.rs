//! How a move begins: what is asked for is checked, the registry says so, and the session is set going.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use decamp_shared::session::source::{Fate, SourceContext, SourceMove, migrate};
use decamp_shared::session::{MoveOptions, ProgressSender, storage};
use decamp_shared::transport::PeerAddress;
use decamp_shared::workload::{
    FileTree, SourceWorkload, Storage, WorkloadError, is_plain_absolute,
};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::telling::follow;
use super::{DOING, Listed, Move};
use crate::agent::answer::{Answer, Result, chain};
use crate::agent::claims::Claim;
use crate::agent::config::PageEncryption;
use crate::agent::registry::Workload;
use crate::agent::workloads::{blocking, not_in_state};
use crate::agent::{Agent, recovery};
use crate::backend::{entry, still_shared};
use crate::messages::{FileEntry, MigrationRequest, State};

/// Events that a slow listener may be behind; of more it misses the oldest.
const BEHIND: usize = 1024;
/// How long the last words of a session may take to be told on.
const DRAINED_WITHIN: Duration = Duration::from_secs(1);

impl Agent {
    /// Begins a move and returns once it is under way; it goes on whoever listens.
    pub(crate) async fn begin_move(
        self: &Arc<Self>,
        request: MigrationRequest,
    ) -> Result<Arc<Move>> {
        let name = request.workload.as_str();
        let known = self.find(name)?;
        check_options(&request.options)?;
        if self.is_here(&request.to) {
            return self.begin_within(request).await;
        }
        let peer = self.peer(&request.to)?;
        if known.state != State::Running {
            return Err(Answer::Conflict(not_in_state(&known, "moved", "running")));
        }
        let claim = self.claim(name, DOING).await?;
        let workload = self.find(name)?;
        if workload.state != State::Running {
            return Err(Answer::Conflict(not_in_state(&workload, "moved", "running")));
        }
        let (source, trees) = described(self, &workload, Whither::Away).await?;
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
        let Begun { listed, progress, told } =
            self.list_move(id.clone(), request.workload, peer.name.clone(), files);
        let moving = Arc::clone(&listed.moving);
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
            told.drained().await;
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

    /// Enters a move among those under way, with what tells of it.
    pub(super) fn list_move(
        self: &Arc<Self>,
        id: String,
        workload: String,
        to: String,
        files: Vec<FileEntry>,
    ) -> Begun {
        let moving = Arc::new(Move {
            id: id.clone(),
            workload,
            to,
            files,
            cancel: CancellationToken::new(),
            events: broadcast::Sender::new(BEHIND),
            told: Mutex::default(),
            over: watch::Sender::new(false),
        });
        self.moves.held().insert(id, Arc::clone(&moving));
        let (progress, events) = ProgressSender::channel();
        let told = Follower(tokio::spawn(follow(Arc::clone(&moving), events)));
        Begun { listed: Listed { agent: Arc::clone(self), moving }, progress, told }
    }

    /// Whether `to` names this very host.
    fn is_here(&self, to: &str) -> bool {
        to.split(':').next() == Some(&self.config.name)
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

    pub(crate) fn peer(&self, to: &str) -> Result<PeerAddress> {
        let name = to.split(':').next().unwrap_or(to);
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
}

/// A move that was entered among those under way.
pub(super) struct Begun {
    pub(super) listed: Listed,
    /// Where its session tells its progress.
    pub(super) progress: ProgressSender,
    pub(super) told: Follower,
}

/// Whoever tells on what a session tells.
pub(super) struct Follower(JoinHandle<()>);

impl Follower {
    /// All that was told is told on, before the report is. The session must have ended.
    pub(super) async fn drained(self) {
        let _ = tokio::time::timeout(DRAINED_WITHIN, self.0).await;
    }
}

/// Where what is described is to go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Whither {
    /// To another host, all of it.
    Away,
    /// Files of it to other places of this host: it stays on its networks, whatever these are.
    Within,
}

/// The running `workload` as a session has it, and its files.
///
/// # Errors
/// When it cannot be described.
pub(super) async fn described(
    agent: &Agent,
    workload: &Workload,
    whither: Whither,
) -> Result<(Box<dyn SourceWorkload>, Vec<FileTree>)> {
    let backend = agent.backends.of(workload.kind)?;
    let (spec, place) = (workload.spec.clone(), agent.place(workload));
    let described = blocking(move || {
        let mut source = match whither {
            Whither::Away => backend.source(&spec, &place),
            Whither::Within => backend.source_for_file(&spec, &place),
        }?;
        let trees = source.manifest()?.files;
        Ok::<_, WorkloadError>((source, trees))
    });
    described.await?.map_err(|error| {
        Answer::refused(format!("{} cannot be moved: {}", workload.name, chain(&error)))
    })
}

/// The files of a workload that begins to leave: where nobody said that a volume is copied the other host
/// may have the very same.
pub(super) fn may_be_shared(trees: &[FileTree], before: &[FileEntry]) -> Vec<FileEntry> {
    let files = trees.iter().map(|tree| {
        let unsaid = tree.role().is_storage() && tree.storage() == Storage::Unsaid;
        let entry = entry(tree, Path::new(&tree.path));
        FileEntry { shared: entry.shared || unsaid, ..entry }
    });
    still_shared(files.collect(), before)
}

pub(super) fn check_options(options: &MoveOptions) -> Result<()> {
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
