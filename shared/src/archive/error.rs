//! Why a checkpoint could not be written or read.

use std::io;
use std::path::PathBuf;

use crate::files::FileError;
use crate::workload::{Refusal, WorkloadError};

/// What can go wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// A system call on the archive failed.
    #[error("Cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it did not work.
        #[source]
        source: io::Error,
    },
    /// The file is none of decamp's, or not all of it is there, or it lies.
    #[error("{} cannot be restored: {what}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Something stands where the file should go.
    #[error("{} exists already; a checkpoint never replaces a file: name another one, or remove it", .0.display())]
    OutputTaken(PathBuf),
    /// A part cannot be what it should be.
    #[error("Part {part} {what}")]
    Part {
        /// Its name.
        part: String,
        /// What is wrong with it.
        what: String,
    },
    /// This host cannot take what is in the archive.
    #[error("This host cannot take it")]
    Unfit(Vec<Refusal>),
    /// The workload, or its backend.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// Its files.
    #[error(transparent)]
    Files(#[from] FileError),
}

/// Result of work on archives.
pub type Result<T> = std::result::Result<T, ArchiveError>;

impl ArchiveError {
    /// A part that is not what it should be.
    pub fn part(part: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Part { part: part.into(), what: what.into() }
    }
}
