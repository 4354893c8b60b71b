//! What an arrival made on this host's disk, so that a move that is given up can take exactly that
//! away again. It never takes anything that was there before.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use rustix::fs;

use super::beneath::{open_directory, parent_and_name, remove_all, remove_contents, stat_at};
use super::error::{Doing, FileError, Result};

/// The memory of one arrival, shared by whoever receives its files and whoever ends it. Dropped
/// without [`Landing::keep`], it removes what was made.
#[derive(Debug, Default)]
pub struct Landing {
    made: Mutex<Vec<Made>>,
    /// Whether it is being removed. Each step of receiving holds it for reading.
    closed: RwLock<bool>,
}

/// Something that an arrival made.
#[derive(Debug)]
enum Made {
    /// A directory around a tree; goes if nothing else came into it.
    Parent(PathBuf),
    /// A tree, or a single file, known by device and inode.
    Tree { path: PathBuf, identity: (u64, u64) },
    /// What is in a directory that was there and empty.
    Contents { path: PathBuf, identity: (u64, u64) },
}

impl Landing {
    /// Nothing made yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The move completed: everything stays.
    pub fn keep(&self) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Removes what was made, and nothing else; receiving that still goes on ends with
    /// [`FileError::GivenUp`]. What cannot be removed is named in the log.
    pub fn remove(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = true;
        let made = std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner));
        for thing in made.into_iter().rev() {
            if let Err(error) = thing.remove() {
                tracing::warn!(error = error.text(), "Cannot remove what a move left");
            }
        }
    }

    /// Held during one step of receiving, so that nothing is made while, or after, it is removed.
    pub(super) fn step(&self) -> Result<RwLockReadGuard<'_, bool>> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        if *closed { Err(FileError::GivenUp) } else { Ok(closed) }
    }

    /// Makes the directories around a tree that do not exist, and remembers them.
    pub(super) fn make_parents(&self, dir: &Path) -> Result<()> {
        let missing: Vec<_> =
            dir.ancestors().take_while(|ancestor| ancestor.symlink_metadata().is_err()).collect();
        for dir in missing.into_iter().rev() {
            std::fs::create_dir(dir).doing("make the directory", dir)?;
            self.remember(Made::Parent(dir.to_owned()));
        }
        Ok(())
    }

    /// Remembers a tree or a file that was just made at `path`.
    pub(super) fn made_tree(&self, path: &Path, identity: (u64, u64)) {
        self.remember(Made::Tree { path: path.to_owned(), identity });
    }

    /// Remembers that whatever is in the directory at `path` comes from this arrival.
    pub(super) fn made_contents(&self, path: &Path, identity: (u64, u64)) {
        self.remember(Made::Contents { path: path.to_owned(), identity });
    }

    fn remember(&self, made: Made) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(made);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Made {
    fn remove(self) -> Result<()> {
        let (path, identity, whole) = match self {
            Self::Parent(path) => {
                // Whatever else came into it meanwhile keeps it.
                if let Err(error) = std::fs::remove_dir(&path) {
                    tracing::debug!(path = %path.display(), %error, "A directory stays");
                }
                return Ok(());
            }
            Self::Tree { path, identity } => (path, identity, true),
            Self::Contents { path, identity } => (path, identity, false),
        };
        let (parent, name) = parent_and_name(&path).doing("find the directory of", &path)?;
        let dir = open_directory(parent).doing("open", parent)?;
        match stat_at(dir.as_fd(), name) {
            Ok(stat) if (stat.st_dev, stat.st_ino) == identity => {}
            // Somebody replaced it or took it away: not ours any more.
            _ => return Ok(()),
        }
        let removed = match whole {
            true => remove_all(dir.as_fd(), name, &path),
            false => remove_contents(dir.as_fd(), name, &path),
        };
        if let Err(error) = fs::fsync(&dir) {
            tracing::debug!(path = %parent.display(), %error, "Cannot sync a directory");
        }
        removed
    }
}
