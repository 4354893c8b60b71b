//! What can go wrong while file trees travel. Messages name the path; the text of an error is what
//! the other side is told.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use crate::transport::TransportError;

/// Why a file tree did not travel.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The destination's disk, or a quota on it, is full.
    #[error("No room is left on the disk at {}", path.display())]
    DiskFull {
        /// What was being written.
        path: PathBuf,
    },
    /// The peer sent something that no honest sender sends. Nothing outside the tree was touched.
    #[error("The source sent {what} ({})", path.display())]
    Hostile {
        /// The entry, as far as it can be named.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Something else stands where a tree should go.
    #[error("{} is taken: {what}", path.display())]
    PathTaken {
        /// The place.
        path: PathBuf,
        /// What stands there.
        what: String,
    },
    /// A system call on a file of the tree failed.
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
    /// The tree itself cannot travel.
    #[error("{} cannot be moved: {what}", path.display())]
    Unsendable {
        /// The entry.
        path: PathBuf,
        /// Why, and what to do.
        what: String,
    },
    /// Somebody on the source wrote in the tree although the workload stood still.
    #[error("{} was changed by something else while the workload stood still", path.display())]
    ChangedWhilePaused {
        /// The file.
        path: PathBuf,
    },
    /// Changes were asked for before the tree itself was sent.
    #[error("No first pass of {} was sent", path.display())]
    NoFirstPass {
        /// The tree.
        path: PathBuf,
    },
    /// The source ended before everything had come.
    #[error("The source ended before it had sent {}", path.display())]
    Incomplete {
        /// The tree that is missing.
        path: PathBuf,
    },
    /// The move was given up and what had arrived is being removed.
    #[error("The move was given up while its files arrived")]
    GivenUp,
    /// The other side reported an error of its own.
    #[error("The other side reported: {text}")]
    Peer {
        /// What it said.
        text: String,
    },
    /// The peer sent a frame that does not belong there.
    #[error("The file stream carries {what}")]
    Protocol {
        /// What it carries.
        what: String,
    },
    /// The stream itself.
    #[error("Cannot go on {doing} the file stream")]
    Stream {
        /// `reading` or `writing`.
        doing: &'static str,
        /// Why not.
        #[source]
        source: StreamError,
    },
}

/// Why the stream beneath broke.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A joined connection.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A plain stream.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Result of moving files.
pub type Result<T> = std::result::Result<T, FileError>;

impl FileError {
    /// What the peer sent and should not have; `path` names the entry.
    pub(super) fn hostile(path: impl Into<PathBuf>, what: impl Into<String>) -> Self {
        Self::Hostile { path: path.into(), what: what.into() }
    }

    /// Something that is not the tree's is mounted in the place of one of its entries.
    pub(super) fn mounted(path: &Path) -> Self {
        let what = format!("something is mounted at {}, unmount it first", path.display());
        Self::PathTaken { path: path.to_owned(), what }
    }

    /// Somebody who may write in the tree put something else in the place of an entry.
    pub(super) fn replaced(path: &Path) -> Self {
        let what = "something else took its place while it arrived".to_owned();
        Self::PathTaken { path: path.to_owned(), what }
    }

    /// A frame out of turn, or one that cannot be read.
    pub(super) fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol { what: what.into() }
    }

    /// Whether the peer can still be told about it.
    pub(super) fn is_local(&self) -> bool {
        !matches!(self, Self::Stream { .. } | Self::Peer { .. })
    }

    /// Every message of the chain in one line, for the peer.
    pub(super) fn text(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(inner) = source {
            text = format!("{text}: {inner}");
            source = inner.source();
        }
        text
    }
}

/// Names what was tried on what when a system call fails; a full disk is told apart.
pub(super) trait Doing<T> {
    /// As `map_err`, with the words for the message.
    fn doing(self, what: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: &'static str, path: &Path) -> Result<T> {
        self.map_err(|error| {
            let source = error.into();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    FileError::DiskFull { path: path.to_owned() }
                }
                // Below a place where a tree lands, the kernel refuses to cross a mount.
                io::ErrorKind::CrossesDevices => FileError::mounted(path),
                _ => FileError::Io { what, path: path.to_owned(), source },
            }
        })
    }
}
