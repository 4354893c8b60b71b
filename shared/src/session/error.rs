//! What ends a session early.

use std::time::Duration;

use super::journal::JournalError;
use super::progress::Phase;
use crate::transport::TransportError;
use crate::workload::{Refusal, WorkloadError};

/// Why a session did not go on. The printer at the edge shows the chain of sources.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Refused before anything was touched.
    #[error("{}", sentences(.0))]
    Refused(Vec<Refusal>),
    /// The user cancelled it.
    #[error("Cancelled")]
    Cancelled,
    /// The peer ended the session and said why.
    #[error("{host} ended the move: {text}")]
    Peer {
        /// Name of the other host.
        host: String,
        /// What it said.
        text: String,
    },
    /// The peer said nothing for too long.
    #[error("{host} gave no answer within {} s while {what}", patience.as_secs())]
    Silent {
        /// By its certificate.
        host: String,
        /// So long was waited.
        patience: Duration,
        /// What was being done.
        what: String,
    },
    /// The peer said something that does not belong there.
    #[error("{host} broke the protocol: {what}")]
    Protocol {
        /// Name of the other host.
        host: String,
        /// What it did.
        what: String,
    },
    /// The connection to the peer.
    #[error("{what}")]
    Transport {
        /// What was being done.
        what: String,
        /// Why it did not work.
        #[source]
        source: TransportError,
    },
    /// No connection came about: nothing was said to the peer.
    #[error("Cannot ask {host}")]
    Unreachable {
        /// Name of the other host.
        host: String,
        /// Why not.
        #[source]
        source: TransportError,
    },
    /// The workload or its keeper.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Pages did not travel.
    #[error("Cannot move the pages of round {round}")]
    Pages {
        /// Which round.
        round: u32,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Files did not travel.
    #[error("Cannot move the files at {path}")]
    Files {
        /// Root of the tree.
        path: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The downtime target cannot be met.
    #[error("{0}")]
    NotConverging(String),
    /// `--timeout` passed.
    #[error("It was still in its {phase:?} phase when --timeout {} s had passed", after.as_secs_f32())]
    Timeout {
        /// Which phase.
        phase: Phase,
        /// The timeout.
        after: Duration,
    },
    /// A thread of ours died.
    #[error("A worker of this move ended unexpectedly")]
    Worker(#[from] tokio::task::JoinError),
    /// A test holds or breaks the move here.
    #[cfg(feature = "failpoints")]
    #[error("Failed on request of a test at {0}")]
    Injected(&'static str),
}

/// Result of a session's step.
pub type Result<T> = std::result::Result<T, SessionError>;

/// Every message of `error`'s chain in one line, without saying anything twice.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let message = inner.to_string();
        if !text.ends_with(&message) {
            text = format!("{text}: {message}");
        }
        source = inner.source();
    }
    text
}

fn sentences(refusals: &[Refusal]) -> String {
    refusals.iter().map(|refusal| refusal.text.as_str()).collect::<Vec<_>>().join("; ")
}

/// What a test wants at a point: to break it, or to hold it as long as `file` is there. Whether it is broken.
#[cfg(feature = "failpoints")]
pub(crate) fn is_broken(file: Option<String>) -> bool {
    /// No test takes longer.
    const MOST: Duration = Duration::from_secs(300);
    let Some(file) = file else { return true };
    let begun = std::time::Instant::now();
    while std::path::Path::new(&file).exists() && begun.elapsed() < MOST {
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// A named place in a session where a test may hold it (`return(FILE)`, while FILE is there), or break it (`return`).
/// Nothing in other builds.
macro_rules! fail_here {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        {
            // Points that hold block a thread, which is why they run on a blocking one.
            let broken = tokio::task::spawn_blocking(|| {
                // What a test waits for before it breaks something else.
                tracing::debug!(target: "decamp_shared::failpoint", "At {}", $name);
                fail::fail_point!($name, $crate::session::error::is_broken);
                false
            })
            .await?;
            if broken {
                return Err($crate::session::error::SessionError::Injected($name).into());
            }
        }
    };
}
pub(crate) use fail_here;
