//! Why a benchmark gave no number. One enum for the whole program; what to do about it is for
//! whoever reads it.

use std::io;
use std::time::Duration;

/// Why a benchmark gave no number.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    /// The system refused something.
    #[error("Cannot {what}")]
    Io { what: String, source: io::Error },
    /// A program ended badly.
    #[error("`{command}` ended with {status}: {said}")]
    Command { command: String, status: String, said: String },
    /// An application did not come through its moves.
    #[error("{app} did not come through its moves")]
    App { app: &'static str, source: Box<BenchError> },
    /// Something answered otherwise than it should.
    #[error("{0}")]
    Wrong(String),
    /// Something did not come.
    #[error("Waited {} s in vain for {what}", waited.as_secs())]
    Late { what: String, waited: Duration },
}

/// A number, or why there is none.
pub(crate) type Result<T> = std::result::Result<T, BenchError>;

impl BenchError {
    /// For `map_err`: what was tried, in words that follow "Cannot".
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| BenchError::Io { what, source }
    }

    /// An answer that is not what it should be.
    pub(crate) fn wrong(text: impl Into<String>) -> Self {
        BenchError::Wrong(text.into())
    }
}
