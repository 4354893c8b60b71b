//! What a workload printed, as a stream that can follow the file while it grows.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use decamp_shared::console::LogReader;
use futures_util::stream;

use super::Agent;
use super::answer::{Answer, Result};
use super::workloads::blocking;
use crate::messages::State;

/// How often a followed file is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
const PIECE: usize = 64 << 10;

struct Reader {
    agent: Arc<Agent>,
    name: String,
    log: Option<LogReader>,
    follow: bool,
}

/// The console log of `name`; with `follow` until the workload no longer runs here.
///
/// # Errors
/// When there is no such workload.
pub(crate) async fn read(agent: Arc<Agent>, name: String, follow: bool) -> Result<Body> {
    let workload =
        agent.registry.get(&name)?.ok_or_else(|| Answer::UnknownWorkload(name.clone()))?;
    let path = agent.place(&workload).log();
    let opened = path.clone();
    let log = match blocking(move || LogReader::open(&opened)).await? {
        Ok(log) => log,
        // It printed nothing yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !follow => {
            return Ok(Body::empty());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Answer::Conflict(format!("{name} has no log yet to follow")));
        }
        Err(error) => {
            return Err(Answer::Failed(format!("Cannot read the log {}: {error}", path.display())));
        }
    };
    let reader = Reader { agent, name, log: Some(log), follow };
    Ok(Body::from_stream(stream::unfold(reader, |mut reader| async {
        reader.piece().await.transpose().map(|piece| (piece, reader))
    })))
}

impl Reader {
    async fn piece(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            // Asked before the read, so that the last words of a workload that ends are not missed.
            let lives = self.follow && self.lives();
            let Some(mut log) = self.log.take() else { return Ok(None) };
            let read = blocking(move || log.next_piece(PIECE).map(|piece| (log, piece)));
            let (log, piece) =
                read.await.map_err(|answer| io::Error::other(answer.to_string()))??;
            self.log = Some(log);
            if !piece.is_empty() {
                return Ok(Some(piece.into()));
            }
            if !lives {
                return Ok(None);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn lives(&self) -> bool {
        let found = self.agent.registry.get(&self.name).ok().flatten();
        !self.agent.is_stopping()
            && found.is_some_and(|workload| {
                !matches!(workload.state, State::Stopped | State::Moved | State::Unresolved)
            })
    }
}
