//! The state directory: who owns it, and where things are in it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use decamp_shared::workload::{Place, USERS_LOCK};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// What can go wrong with the state directory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateDirError {
    /// Another agent owns it.
    #[error("Another agent works in {0}: end it first, or give this one a --state-dir of its own")]
    Owned(PathBuf),
    /// It could not be made or locked.
    #[error("Cannot {what} {path}")]
    Failed { what: &'static str, path: PathBuf, source: io::Error },
}

/// A state directory that belongs to this agent as long as this lives.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl StateDir {
    /// Makes the directory when missing, and locks it. The kernel gives the lock back when the agent
    /// ends, however it ends.
    ///
    /// # Errors
    /// When another agent owns it, or it cannot be made.
    pub(crate) fn own(path: &Path) -> Result<Self, StateDirError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| StateDirError::Failed { what, path, source }
        };
        let workloads = path.join("workloads");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&workloads)
            .map_err(failed("create the state directory", &workloads))?;
        let open = |lock: &Path| {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600);
            options.open(lock).map_err(failed("open", lock))
        };
        // Keepers lock that, from first to last.
        open(&path.join(USERS_LOCK))?;
        let lock = path.join("agent.lock");
        let file = open(&lock)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => Ok(Self { path: path.to_owned(), _lock: held }),
            Err((_, Errno::EWOULDBLOCK)) => Err(StateDirError::Owned(path.to_owned())),
            Err((_, error)) => Err(failed("lock", &lock)(error.into())),
        }
    }

    /// The registry.
    pub(crate) fn registry(&self) -> PathBuf {
        self.path.join("registry.db")
    }

    /// The session journal.
    pub(crate) fn journal(&self) -> PathBuf {
        self.path.join("journal.db")
    }

    /// Where the workload `name` lives.
    pub(crate) fn place(&self, name: &str, uuid: &str) -> Place {
        Place {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            dir: self.path.join("workloads").join(name),
        }
    }

    /// Makes an empty directory for a workload that begins to be here.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn make_place(&self, place: &Place) -> Result<(), StateDirError> {
        self.remove_place(place)?;
        DirBuilder::new().mode(0o700).create(&place.dir).map_err(|source| StateDirError::Failed {
            what: "create",
            path: place.dir.clone(),
            source,
        })
    }

    /// Removes a workload's directory; it does not matter whether it was there.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub(crate) fn remove_place(&self, place: &Place) -> Result<(), StateDirError> {
        match std::fs::remove_dir_all(&place.dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(StateDirError::Failed { what: "remove", path: place.dir.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_agent_owns_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state");
        let first = StateDir::own(&path).expect("ours");
        assert!(matches!(StateDir::own(&path), Err(StateDirError::Owned(_))));
        drop(first);
        StateDir::own(&path).expect("free again");
    }

    #[test]
    fn a_place_is_empty_when_it_is_made() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = StateDir::own(dir.path()).expect("ours");
        let place = state.place("web", "u-1");
        state.make_place(&place).expect("made");
        std::fs::write(place.exit_record(), "{}").expect("written");
        state.make_place(&place).expect("made anew");
        assert!(!place.exit_record().exists());
        state.remove_place(&place).expect("removed");
        state.remove_place(&place).expect("not there");
    }
}
