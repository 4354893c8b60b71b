//! What can go wrong in this crate, and how it becomes the session's error.

use std::io;
use std::path::PathBuf;

use decamp_shared::console::ConsoleError;
use decamp_shared::workload::WorkloadError;

/// An error of the container backend.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// A file or a system call did not do what was asked.
    #[error("Cannot {what}")]
    Io {
        /// What was tried, and on what.
        what: String,
        /// Why it did not work.
        #[source]
        source: io::Error,
    },
    /// A tool ended with an error.
    #[error("{tool} could not {what}: {said}")]
    Tool {
        /// Name of the program.
        tool: &'static str,
        /// What it was asked to do.
        what: String,
        /// What it said about that.
        said: String,
    },
    /// CRIU refused.
    #[error("CRIU could not {what} (error {number}): {said}")]
    Criu {
        /// What it was asked to do.
        what: &'static str,
        /// Its error number, 0 when it gave none.
        number: i32,
        /// The errors in its log.
        said: String,
    },
    /// CRIU ended, or answered what nobody asked.
    #[error("CRIU {0}")]
    CriuProtocol(String),
    /// `config.json`, a runtime's state or a file in /proc does not read as it should.
    #[error("{path} {what}", path = path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A state section from the source is not what it should be.
    #[error("State section {kind} {what}")]
    Section {
        /// Kind of the section.
        kind: String,
        /// What is wrong with it.
        what: String,
    },
    /// The console of its terminal.
    #[error(transparent)]
    Console(ConsoleError),
    /// The spec asks for what cannot be.
    #[error("{0}")]
    Spec(String),
    /// The host's network did not do what was asked.
    #[error(transparent)]
    Network(#[from] decamp_shared::network::NetworkError),
    /// Something is not in the state that it must be in.
    #[error("{0}")]
    State(String),
}

/// Result within this crate.
pub type Result<T> = std::result::Result<T, ContainerError>;

impl ContainerError {
    /// For `map_err`: an I/O error with what was tried.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// For `map_err`: the same for errors of `nix`.
    pub(crate) fn errno(what: impl Into<String>) -> impl FnOnce(nix::errno::Errno) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source: source.into() }
    }

    /// Whether it says that a process, or its memory, is not there any more.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self, Self::Io { source, .. }
            if source.raw_os_error() == Some(libc::ESRCH) || source.kind() == io::ErrorKind::NotFound)
    }

    pub(crate) fn malformed(path: impl Into<PathBuf>, what: impl Into<String>) -> Self {
        Self::Malformed { path: path.into(), what: what.into() }
    }

    pub(crate) fn section(kind: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Section { kind: kind.into(), what: what.into() }
    }
}

impl From<ContainerError> for WorkloadError {
    fn from(error: ContainerError) -> Self {
        match error {
            ContainerError::Io { what, source } => {
                WorkloadError::new(format!("Cannot {what}"), source)
            }
            ContainerError::Console(error) => error.into(),
            other => WorkloadError::plain(other.to_string()),
        }
    }
}
