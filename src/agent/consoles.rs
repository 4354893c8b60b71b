//! Attached consoles: the agent carries bytes between a client of its API and the console socket of a
//! workload's keeper, for as long as the workload runs here, and tells the client why it ended.

use std::future;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use decamp_shared::workload::Kind;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixDatagram, UnixStream};
use tokio::time::timeout;

use super::Agent;
use super::answer::{Answer, Result};
use super::registry::Workload;
use super::supervise::listens;
use super::workloads::not_in_state;
use crate::backend::{is_adopted, is_podmans};
use crate::frames::{Decoder, FRAME_CAP, Frame, PROTOCOL};
use crate::messages::{ConsoleEnd, State};

/// How often it is looked whether the workload still runs here.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long after its console was closed it may take until it is known why.
const KNOWN_WITHIN: Duration = Duration::from_secs(5);
/// How long a console that nothing is expected of any more is listened to.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// The most that is held of what was typed and not taken yet.
const TYPED_CAP: usize = 4 * FRAME_CAP;

/// One client at one console.
struct Attached {
    agent: Arc<Agent>,
    workload: Workload,
    sizes: PathBuf,
}

/// Attaches a client, who asks for [`PROTOCOL`], to the console of `name`: the answer's connection becomes
/// that of the console.
///
/// # Errors
/// When there is no such workload, it does not run here, or has no console of ours.
pub(crate) async fn attach(
    agent: Arc<Agent>,
    name: &str,
    mut request: Request,
) -> Result<Response> {
    if !asks_for_it(request.headers()) {
        return Err(Answer::Request(format!(
            "A console needs a connection of its own: ask with `Connection: Upgrade` and `Upgrade: {PROTOCOL}`"
        )));
    }
    let workload = agent.find(name)?;
    if !runs_here(workload.state) {
        return Err(Answer::Conflict(not_in_state(&workload, "attached to", "running")));
    }
    let place = agent.place(&workload);
    let keeper = match UnixStream::connect(place.console()).await {
        Ok(keeper) => keeper,
        Err(_) if !listens(&place) => {
            return Err(Answer::Conflict(format!("{name} is just ending")));
        }
        Err(error) if is_absent(&error) => return Err(Answer::refused(without_console(&workload))),
        Err(error) => {
            return Err(Answer::Failed(format!("Cannot reach the console of {name}: {error}")));
        }
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let attached = Attached { agent, workload, sizes: place.console_size() };
    tokio::spawn(attached.serve(upgrade, keeper));
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, PROTOCOL)
        .body(Body::empty())
        .map_err(|error| Answer::Failed(format!("Cannot answer: {error}")))
}

fn asks_for_it(headers: &HeaderMap) -> bool {
    let has = |name, word: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(word)))
    };
    has(header::CONNECTION, "upgrade") && has(header::UPGRADE, PROTOCOL)
}

fn runs_here(state: State) -> bool {
    matches!(state, State::Running | State::Migrating)
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn without_console(workload: &Workload) -> String {
    let name = &workload.name;
    match workload.kind {
        Kind::Container if is_podmans(&workload.spec) => {
            format!("The terminal of {name}, if it has one, is podman's: `podman attach` has it")
        }
        Kind::Container if is_adopted(&workload.spec) => format!(
            "The terminal of {name}, if it has one, is with whoever started it: decamp has only \
             taken charge of it"
        ),
        Kind::Container => format!(
            "{name} has no terminal: it was started without --tty. `decamp logs --follow {name}` \
             shows what it prints"
        ),
        _ => format!("{name} has no console: look at the log of its keeper"),
    }
}

impl Attached {
    async fn serve(self, upgrade: OnUpgrade, keeper: UnixStream) {
        let name = &self.workload.name;
        let client = match upgrade.await {
            Ok(client) => TokioIo::new(client),
            Err(error) => {
                tracing::debug!(workload = name, "Nobody came to the console: {error}");
                return;
            }
        };
        tracing::debug!(workload = name, "A client is at the console");
        let (typed, shown) = split(client);
        let (printed, keyboard) = keeper.into_split();
        // An error is a client that is gone; nobody is left to be told.
        if let Err(error) = self.carry(typed, shown, printed, keyboard).await {
            tracing::debug!(workload = name, "A client has left the console: {error}");
        }
    }

    async fn carry(
        &self,
        typed: ReadHalf<TokioIo<Upgraded>>,
        mut shown: WriteHalf<TokioIo<Upgraded>>,
        mut printed: OwnedReadHalf,
        keyboard: OwnedWriteHalf,
    ) -> io::Result<()> {
        let mut typing = pin!(self.type_on(typed, keyboard));
        let mut leaving = pin!(self.left());
        let mut buffer = vec![0; FRAME_CAP];
        let end = loop {
            let count = tokio::select! {
                gone = typing.as_mut() => return gone,
                end = leaving.as_mut() => break Some(end),
                read = printed.read(&mut buffer) => read.unwrap_or(0),
            };
            if count == 0 {
                break None;
            }
            // Whoever does not take it is not told of an end, either: a frame is never cut.
            tokio::select! {
                gone = typing.as_mut() => return gone,
                written = show(&mut shown, &buffer[..count]) => written?,
            }
        };
        let end = match end {
            Some(end) => {
                while let Ok(Ok(count @ 1..)) = timeout(LAST_WORDS, printed.read(&mut buffer)).await
                {
                    show(&mut shown, &buffer[..count]).await?;
                }
                end
            }
            None => timeout(KNOWN_WITHIN, leaving).await.unwrap_or(ConsoleEnd::Closed),
        };
        shown.write_all(&Frame::End(end).to_bytes()).await?;
        shown.shutdown().await
    }

    /// Types what the client sends; returns when that is gone.
    async fn type_on(
        &self,
        mut client: ReadHalf<TokioIo<Upgraded>>,
        mut keyboard: OwnedWriteHalf,
    ) -> io::Result<()> {
        let sizes = UnixDatagram::unbound()?;
        let (mut decoder, mut buffer) = (Decoder::default(), vec![0; FRAME_CAP]);
        let (mut typed, mut has_ended) = (Vec::new(), false);
        loop {
            if has_ended && typed.is_empty() {
                has_ended = false;
                let _ = keyboard.shutdown().await;
            }
            let count = tokio::select! {
                read = client.read(&mut buffer), if typed.len() < TYPED_CAP => read?,
                written = keyboard.write(&typed), if !typed.is_empty() => match written {
                    Ok(count) => {
                        typed.drain(..count);
                        continue;
                    }
                    // The workload is leaving; the other direction finds out how.
                    Err(_) => future::pending().await,
                },
            };
            if count == 0 {
                return Ok(());
            }
            decoder.push(&buffer[..count]);
            while let Some(frame) = decoder.next().map_err(io::Error::other)? {
                match frame {
                    Frame::Bytes(bytes) => typed.extend(bytes),
                    // A console without a size has no use for it.
                    Frame::Size(size) => drop(sizes.send_to(&size.to_bytes(), &self.sizes).await),
                    Frame::InputEnd => has_ended = true,
                    Frame::End(_) => return Err(io::Error::other("A client cannot end a console")),
                }
            }
        }
    }

    /// Waits until the workload runs here no more.
    async fn left(&self) -> ConsoleEnd {
        loop {
            match self.agent.registry.get(&self.workload.name) {
                Ok(found) => {
                    let found = found.filter(|one| one.uuid == self.workload.uuid);
                    if let Some(end) = end_of(found) {
                        return end;
                    }
                }
                Err(error) => tracing::debug!("Cannot see whether a workload still runs: {error}"),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// How the console of a workload ended whose entry is this one now; nothing while it runs here.
fn end_of(found: Option<Workload>) -> Option<ConsoleEnd> {
    let Some(workload) = found else { return Some(ConsoleEnd::Stopped { exit: None }) };
    match workload.state {
        State::Moved => Some(ConsoleEnd::Moved { to: workload.moved_to }),
        State::Unresolved => Some(ConsoleEnd::Unresolved { migration: workload.migration }),
        State::Stopped | State::Starting | State::Incoming => {
            Some(ConsoleEnd::Stopped { exit: workload.exit })
        }
        State::Running | State::Migrating => None,
    }
}

async fn show(client: &mut WriteHalf<TokioIo<Upgraded>>, bytes: &[u8]) -> io::Result<()> {
    client.write_all(&Frame::Bytes(bytes.to_vec()).to_bytes()).await?;
    client.flush().await
}
