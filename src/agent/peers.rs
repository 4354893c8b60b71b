//! The door for other hosts: takes connections in and hands them to the sessions.

use std::sync::Arc;
use std::time::Duration;

use decamp_shared::session::DestinationSessions;
use decamp_shared::transport::{Acceptor, TransportError};
use tokio::net::{TcpListener, TcpStream};

use super::answer::chain;

/// After an error of the listener itself, as when descriptors have run out.
const BREATHE: Duration = Duration::from_millis(100);

/// Serves `listener` until the task is dropped.
pub(crate) async fn serve(
    listener: TcpListener,
    acceptor: Acceptor,
    sessions: Arc<DestinationSessions>,
) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                tracing::debug!(%from, "Connection");
                tokio::spawn(serve_one(stream, acceptor.clone(), Arc::clone(&sessions)));
            }
            Err(error) => {
                tracing::warn!(%error, "Cannot accept a connection");
                tokio::time::sleep(BREATHE).await;
            }
        }
    }
}

async fn serve_one(stream: TcpStream, acceptor: Acceptor, sessions: Arc<DestinationSessions>) {
    match acceptor.accept(stream).await {
        Ok(connection) => sessions.serve(connection).await,
        Err(error) if is_worth_a_word(&error) => tracing::warn!("{}", chain(&error)),
        Err(error) => tracing::debug!("{}", chain(&error)),
    }
}

/// Somebody who only looks whether the port is open is not.
fn is_worth_a_word(error: &TransportError) -> bool {
    !matches!(error, TransportError::Ended { .. } | TransportError::Broken { .. })
}
