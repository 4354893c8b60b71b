//! The CLI's end of the agent's socket: HTTP requests, JSON answers, streams of JSON lines.

use std::io;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::http::request;
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::failure::Failure;
use crate::messages::ErrorBody;

/// An answer that is not a stream is never longer.
const ANSWER_CAP: usize = 64 << 20;
/// Nor is one line of a stream.
const LINE_CAP: usize = 16 << 20;

/// An agent behind a socket. Each request has a connection of its own.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    /// The agent that listens on `socket`.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// GET.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.answer(Method::GET, path, None::<&()>).await
    }

    /// POST with a JSON body.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        self.answer(Method::POST, path, Some(body)).await
    }

    /// DELETE.
    pub(crate) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.answer(Method::DELETE, path, None::<&()>).await
    }

    /// A request whose answer comes piece by piece.
    pub(crate) async fn stream(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Stream, Failure> {
        let response = self.send(method, path, body).await?;
        Ok(Stream { body: response.into_body(), held: Vec::new() })
    }

    async fn answer<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        let bytes = self.collect(self.send(method, path, body).await?.into_body()).await?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Failure::other(format!(
                "The agent's answer makes no sense to this decamp ({error}): are both of one version?"
            ))
        })
    }

    /// Sends the request; an answer that is not a success becomes a [`Failure`].
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Response<Incoming>, Failure> {
        let bytes = match body {
            Some(body) => serde_json::to_vec(body)
                .map_err(|error| Failure::other(format!("Cannot write the request: {error}")))?,
            None => Vec::new(),
        };
        let request =
            Request::builder().method(method).uri(path).header("content-type", "application/json");
        self.exchange(request, bytes, StatusCode::is_success).await
    }

    /// Asks for a connection of its own that speaks `protocol`.
    pub(crate) async fn upgrade(
        &self,
        path: &str,
        protocol: &str,
    ) -> Result<TokioIo<Upgraded>, Failure> {
        let request = Request::builder()
            .method(Method::GET)
            .uri(path)
            .header("connection", "upgrade")
            .header("upgrade", protocol);
        let switched = |status: &StatusCode| *status == StatusCode::SWITCHING_PROTOCOLS;
        let response = self.exchange(request, Vec::new(), switched).await?;
        let upgraded = hyper::upgrade::on(response).await.map_err(|error| self.lost(&error))?;
        Ok(TokioIo::new(upgraded))
    }

    /// Sends the request on a connection of its own; an answer that is not `right` becomes a [`Failure`].
    async fn exchange(
        &self,
        request: request::Builder,
        body: Vec<u8>,
        right: impl FnOnce(&StatusCode) -> bool,
    ) -> Result<Response<Incoming>, Failure> {
        let request = request
            .header("host", "decamp")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| Failure::other(format!("Cannot write the request: {error}")))?;
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| unreachable(&self.socket, &error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.lost(&error))?;
        // Ends with the response; errors reach the response too.
        tokio::spawn(connection.with_upgrades());
        let response = sender.send_request(request).await.map_err(|error| self.lost(&error))?;
        let status = response.status();
        if right(&status) {
            return Ok(response);
        }
        let bytes = self.collect(response.into_body()).await?;
        let body = serde_json::from_slice(&bytes).unwrap_or_else(|_| ErrorBody {
            code: "failed".into(),
            message: format!("The agent answered {status}: {}", String::from_utf8_lossy(&bytes)),
            refusals: Vec::new(),
        });
        Err(Failure::from_answer(status.as_u16(), body))
    }

    async fn collect(&self, body: Incoming) -> Result<Bytes, Failure> {
        let whole = Limited::new(body, ANSWER_CAP).collect().await;
        whole.map(|whole| whole.to_bytes()).map_err(|error| self.lost(&error))
    }

    fn lost(&self, error: &dyn std::fmt::Display) -> Failure {
        Failure::lost(format!(
            "Lost the agent behind {} ({error}): look at its log, and at `decamp ls` once it runs again",
            self.socket.display()
        ))
    }
}

/// An answer that comes piece by piece.
#[derive(Debug)]
pub(crate) struct Stream {
    body: Incoming,
    held: Vec<u8>,
}

impl Stream {
    /// The next piece as it came; `None` at the end.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, Failure> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|error| {
                Failure::other(format!("Lost the agent in mid-answer: {error}"))
            })?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// The next line without its line feed; `None` at the end. Can be dropped and called again
    /// without losing anything.
    pub(crate) async fn line(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            if let Some(end) = self.held.iter().position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.held.drain(..=end).collect();
                line.pop();
                return Ok(Some(line));
            }
            if self.held.len() > LINE_CAP {
                return Err(Failure::other("The agent sent a line that never ends"));
            }
            match self.piece().await? {
                Some(data) => self.held.extend_from_slice(&data),
                None if self.held.is_empty() => return Ok(None),
                None => return Ok(Some(std::mem::take(&mut self.held))),
            }
        }
    }
}

fn unreachable(socket: &Path, error: &io::Error) -> Failure {
    let socket = socket.display();
    Failure::other(match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => format!(
            "No agent listens on {socket}.\n  \
             Start one with `decamp agent --config /etc/decamp/agent.toml`, \
             or name its socket with --socket or DECAMP_SOCKET"
        ),
        io::ErrorKind::PermissionDenied => {
            format!("The agent's socket {socket} is not yours to use: run this as root")
        }
        _ => format!("Cannot reach the agent on {socket}: {error}"),
    })
}
