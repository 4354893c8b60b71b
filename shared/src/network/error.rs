//! What can go wrong with an interface.

use std::io;

/// An error of the host's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel refused something.
    #[error("Could not {what}")]
    Refused {
        /// What was tried, and on what.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Something is not as it must be.
    #[error("{0}")]
    State(String),
}

impl NetworkError {
    /// For `map_err`: the kernel refused `what`.
    pub(super) fn refused(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Refused { what, source }
    }
}

/// Result of work on the host's network.
pub(super) type Result<T> = std::result::Result<T, NetworkError>;
