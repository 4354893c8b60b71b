//! The session in the journal, the empty workload at the destination, and the streams to it.

use std::time::Duration;

use super::{Departing, PATIENCE};
use crate::protocol::control::{Prepare, Verdict, reply, request};
use crate::session::commit::Record;
use crate::session::copying::Copying;
use crate::session::error::{Result, SessionError, fail_here};
use crate::session::journal::{Role, SessionRow, boot_id};
use crate::session::progress::Phase;
use crate::transport::{Join, Role as StreamRole, Secret};

/// How long building the empty workload may take.
const PREPARE_WITHIN: Duration = Duration::from_secs(120);

impl Departing<'_> {
    /// Journals the session, has the empty workload built, connects the streams, sends the files.
    pub(super) async fn prepare(&mut self, verdict: &Verdict) -> Result<Copying> {
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
        let (trees, kind) = (self.manifest.files.clone(), self.manifest.kind());
        Copying::new(pages, files, trees, kind, &self.options, self.started)
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
}
