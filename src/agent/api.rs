//! The local API: HTTP/JSON over a UNIX socket that only its owner may use. Each handler reads its
//! request and hands it on; nothing is decided here.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path as Part, Query, Request, State as Shared};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;

use super::Agent;
use super::answer::{Answer, Result};
use super::{consoles, hooked, recovery};
use crate::messages::{
    AdoptRequest, BaselineAnswer, BaselineRequest, CheckpointRequest, HookAnswer, HookRequest,
    HostView, MigrationRequest, MigrationView, RemoveAnswer, ResolveAnswer, ResolveRequest,
    RestoreRequest, RunRequest, StopRequest, WorkloadDetail, WorkloadView,
};

type Agency = Shared<Arc<Agent>>;

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// Another agent serves it.
    #[error("Another agent listens on {0}: end it first, or give this one a --socket of its own")]
    Served(PathBuf),
    /// Something that is no socket stands there.
    #[error("{0} is there and is no socket: take it away, or give the agent another --socket")]
    NoSocket(PathBuf),
    /// The socket could not be made.
    #[error("Cannot listen on the socket {path}")]
    Listen { path: PathBuf, source: io::Error },
}

/// Listens on `path`, mode 0600. A socket that a dead agent left is replaced.
///
/// # Errors
/// When another agent serves it, or it cannot be made.
pub(crate) fn listen(path: &Path) -> std::result::Result<UnixListener, ApiError> {
    use std::os::unix::fs::FileTypeExt;
    let failed = |source| ApiError::Listen { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ApiError::NoSocket(path.to_owned()));
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(ApiError::Served(path.to_owned()));
        }
        _ => {}
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    bind_privately(path).and_then(UnixListener::from_std).map_err(failed)
}

/// A socket at `path` that was never open to others, not even between making it and setting its mode: in Linux it
/// has that of its descriptor. (A umask would be the whole process's, and another thread's files would have it too.)
fn bind_privately(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
    };
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::fs::PermissionsExt;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let made = std::fs::File::from(socket(AddressFamily::Unix, SockType::Stream, flags, None)?);
    made.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    bind(made.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&made, Backlog::MAXCONN)?;
    Ok(OwnedFd::from(made).into())
}

/// Serves `listener` until the task is dropped.
///
/// # Errors
/// When the listener fails.
pub(crate) async fn serve(listener: UnixListener, agent: Arc<Agent>) -> io::Result<()> {
    axum::serve(listener, router(agent)).await
}

fn router(agent: Arc<Agent>) -> Router {
    Router::new()
        .route("/v1/host", get(host))
        .route("/v1/workloads", get(list).post(run))
        .route("/v1/adopt", post(adopt))
        .route("/v1/cpu/baseline", post(baseline))
        .route("/v1/hook", post(hook))
        .route("/v1/workloads/{name}", get(inspect).delete(remove))
        .route("/v1/workloads/{name}/start", post(start))
        .route("/v1/workloads/{name}/stop", post(stop))
        .route("/v1/workloads/{name}/logs", get(logs))
        .route("/v1/workloads/{name}/console", get(console))
        .route("/v1/workloads/{name}/checkpoint", post(checkpoint))
        .route("/v1/restore", post(restore))
        .route("/v1/migrations", get(migrations).post(migrate))
        .route("/v1/migrations/{id}", get(follow))
        .route("/v1/migrations/{id}/cancel", post(cancel))
        .route("/v1/migrations/{id}/resolve", post(resolve))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .with_state(agent)
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ListQuery {
    all: Flag,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LogsQuery {
    follow: Flag,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RemoveQuery {
    keep_files: Flag,
}

/// `1`, `true`, or nothing for yes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
struct Flag(bool);

impl TryFrom<String> for Flag {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        match text.as_str() {
            "1" | "true" | "" => Ok(Self(true)),
            "0" | "false" => Ok(Self(false)),
            _ => Err(format!("{text:?} is neither 1 nor 0")),
        }
    }
}

async fn host(agent: Agency) -> Json<HostView> {
    Json(agent.host_view())
}

async fn list(agent: Agency, query: Queried<ListQuery>) -> Result<Json<Vec<WorkloadView>>> {
    let ListQuery { all } = asked(query)?;
    agent.list(all.0).map(Json)
}

async fn run(agent: Agency, body: Bytes) -> Result<(StatusCode, Json<WorkloadView>)> {
    let request: RunRequest = read(&body)?;
    let view = to_its_end(async move { agent.run_new(request).await }).await?;
    Ok((StatusCode::CREATED, Json(view)))
}

async fn baseline(agent: Agency, body: Bytes) -> Result<Json<BaselineAnswer>> {
    let request: BaselineRequest = read(&body)?;
    agent.cpu_baseline(request).await.map(Json)
}

async fn adopt(agent: Agency, body: Bytes) -> Result<(StatusCode, Json<WorkloadView>)> {
    let request: AdoptRequest = read(&body)?;
    let view = to_its_end(async move { agent.adopt_new(request).await }).await?;
    Ok((StatusCode::CREATED, Json(view)))
}

async fn hook(agent: Agency, body: Bytes) -> Result<(StatusCode, Json<HookAnswer>)> {
    let request: HookRequest = read(&body)?;
    Ok((StatusCode::ACCEPTED, Json(hooked::called(&agent, request)?)))
}

async fn inspect(agent: Agency, name: Part<String>) -> Result<Json<WorkloadDetail>> {
    agent.inspect(&name).await.map(Json)
}

async fn start(agent: Agency, name: Part<String>) -> Result<Json<WorkloadView>> {
    to_its_end(async move { agent.start(&name).await }).await.map(Json)
}

async fn stop(agent: Agency, name: Part<String>, body: Bytes) -> Result<Json<WorkloadView>> {
    let asked = if body.is_empty() { None } else { read::<Option<StopRequest>>(&body)? };
    let StopRequest { timeout_ms } = asked.unwrap_or_default();
    let grace = timeout_ms.map(Duration::from_millis);
    to_its_end(async move { agent.stop(&name, grace).await }).await.map(Json)
}

async fn remove(
    agent: Agency,
    name: Part<String>,
    query: Queried<RemoveQuery>,
) -> Result<Json<RemoveAnswer>> {
    let RemoveQuery { keep_files } = asked(query)?;
    to_its_end(async move { agent.remove(&name, keep_files.0).await }).await.map(Json)
}

async fn logs(agent: Agency, name: Part<String>, query: Queried<LogsQuery>) -> Result<Response> {
    let LogsQuery { follow } = asked(query)?;
    let body = super::logs::read(agent.0, name.0, follow.0).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

async fn console(agent: Agency, name: Part<String>, request: Request) -> Result<Response> {
    consoles::attach(agent.0, &name, request).await
}

async fn checkpoint(agent: Agency, name: Part<String>, body: Bytes) -> Result<Response> {
    let request: CheckpointRequest = read(&body)?;
    let agent = agent.0;
    let lines = to_its_end(async move { agent.begin_checkpoint(&name, request).await }).await?;
    Ok(json_lines(lines))
}

async fn restore(agent: Agency, body: Bytes) -> Result<Response> {
    let request: RestoreRequest = read(&body)?;
    agent.0.begin_restore(request).map(json_lines)
}

async fn migrations(agent: Agency) -> Result<Json<Vec<MigrationView>>> {
    agent.list_moves().map(Json)
}

async fn migrate(agent: Agency, body: Bytes) -> Result<Response> {
    let request: MigrationRequest = read(&body)?;
    let agent = agent.0;
    let moving = to_its_end(async move { agent.begin_move(request).await }).await?;
    Ok(json_lines(moving.lines()))
}

async fn follow(agent: Agency, id: Part<String>) -> Result<Response> {
    agent.follow_move(&id).map(json_lines)
}

async fn cancel(agent: Agency, id: Part<String>) -> Result<Json<MigrationView>> {
    agent.cancel_move(&id).await.map(Json)
}

async fn resolve(agent: Agency, id: Part<String>, body: Bytes) -> Result<Json<ResolveAnswer>> {
    let request: ResolveRequest = read(&body)?;
    let agent = agent.0;
    to_its_end(async move { recovery::resolve(&agent, &id, request.keep).await }).await.map(Json)
}

async fn unknown() -> Answer {
    Answer::Request("This agent knows no such request".into())
}

type Queried<T> = std::result::Result<Query<T>, axum::extract::rejection::QueryRejection>;

fn asked<T>(query: Queried<T>) -> Result<T> {
    query.map(|Query(query)| query).map_err(|error| Answer::Request(error.body_text()))
}

fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T> {
    serde_json::from_slice(body)
        .map_err(|error| Answer::Request(format!("The request's body is wrong: {error}")))
}

fn json_lines(body: Body) -> Response {
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// What was begun is brought to its end even when the client goes away.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(Answer::Failed(format!("The agent's own work broke off: {error}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn flags_are_read_as_people_write_them() {
        for (text, flag) in
            [("1", true), ("true", true), ("", true), ("0", false), ("false", false)]
        {
            assert_eq!(Flag::try_from(text.to_owned()), Ok(Flag(flag)));
        }
        assert!(Flag::try_from("yes".to_owned()).is_err());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("decamp.sock");
        let first = listen(&path).expect("listens");
        let mode = std::fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(listen(&path), Err(ApiError::Served(_))));
        drop(first);
        listen(&path).expect("replaces what a dead agent left");
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("written");
        assert!(matches!(listen(&file), Err(ApiError::NoSocket(_))));
    }
}
