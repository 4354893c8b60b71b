//! Before anything is touched: how the memory is copied, and whether the destination takes the workload.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Departing, PATIENCE};
use crate::files::{Probe, look_of};
use crate::protocol::control::{Hello, Offer, PathMapping, Verdict, reply, request};
use crate::session::error::{Result, SessionError, fail_here};
use crate::session::link::Link;
use crate::session::progress::Progress;
use crate::session::{Mode, storage};
use crate::transport::{Control, Role as StreamRole};
use crate::workload::{FileRole, FileTree, Liveness, Refusal, RefusalCode};

/// How long the destination may look at the offer: at its network and storage, and, by programs that it may have to
/// load from a slow disk first, at what its kernel can do.
const JUDGEMENT: Duration = Duration::from_secs(60);

impl Departing<'_> {
    pub(super) fn choose_mode(&mut self) -> Result<bool> {
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
    pub(super) async fn negotiate(&mut self) -> Result<Verdict> {
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
        let verdict = match self.halt.or(link.reply(JUDGEMENT, "offering the workload")).await? {
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
        let look = tree.role().is_storage().then(|| look_of(path).ok().flatten()).flatten();
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
