//! What an arrival made on this host's disk, so that a move that is given up can take exactly that
//! away again. It never takes anything that was there before.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use rustix::fs::{self, Mode, Stat};
use serde::{Deserialize, Serialize};

use super::beneath::{
    Root, is_dir, is_gone, open_directory, parent_and_name, remove_all, remove_contents, stat_at,
};
use super::error::{Doing, FileError, Result};
use super::placing::TEMPORARY;

/// The memory of one arrival, shared by whoever receives its files and whoever ends it. Dropped
/// without [`Landing::keep`], it removes what was made, unless there is a record on disk: then it
/// outlives the process, and [`Landing::recover`] finds it.
#[derive(Debug, Default)]
pub struct Landing {
    memory: Mutex<Memory>,
    /// Whether it is being removed. Each step of receiving holds it for reading.
    closed: RwLock<bool>,
}

#[derive(Debug, Default)]
struct Memory {
    made: Vec<Made>,
    record: Option<(PathBuf, File)>,
}

/// Something that an arrival made.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Made {
    /// A directory around a tree; goes if nothing else came into it.
    Parent(PathBuf),
    /// A tree, or a single file, known by device and inode.
    Tree { path: PathBuf, identity: (u64, u64) },
    /// What is in a directory that was there and empty.
    Contents { path: PathBuf, identity: (u64, u64) },
    /// A single file that is being written under this temporary name.
    Temporary(PathBuf),
}

impl Landing {
    /// Nothing made yet, remembered in this process alone.
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing made yet; whatever is made is written to a new file at `record` as well, so that
    /// [`Landing::recover`] finds it after a crash. The file goes when the arrival is kept or removed.
    ///
    /// # Errors
    /// When the file exists or cannot be made.
    pub fn recorded(record: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(record)?;
        let memory = Memory { made: Vec::new(), record: Some((record.to_owned(), file)) };
        Ok(Self { memory: Mutex::new(memory), closed: RwLock::default() })
    }

    /// What an arrival that was cut short by a crash made, by its record. Then [`Landing::keep`] or
    /// [`Landing::remove`] it. No record: nothing made.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn recover(record: &Path) -> io::Result<Self> {
        let file = match OpenOptions::new().read(true).append(true).open(record) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::new()),
            Err(error) => return Err(error),
        };
        let mut made = Vec::new();
        for line in BufReader::new(&file).lines() {
            match serde_json::from_str(&line?) {
                Ok(thing) => made.push(thing),
                // The last line may have been cut short by the crash: what it names is not made.
                Err(error) => tracing::warn!(record = %record.display(), %error, "A broken line"),
            }
        }
        let memory = Memory { made, record: Some((record.to_owned(), file)) };
        Ok(Self { memory: Mutex::new(memory), closed: RwLock::default() })
    }

    /// The move completed: everything stays.
    pub fn keep(&self) {
        drop(self.forget());
    }

    /// Removes what was made, and nothing else; receiving that still goes on ends with
    /// [`FileError::GivenUp`]. What cannot be removed is named in the log.
    pub fn remove(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = true;
        let memory =
            std::mem::take(&mut *self.memory.lock().unwrap_or_else(PoisonError::into_inner));
        for thing in memory.made.into_iter().rev() {
            if let Err(error) = thing.remove() {
                tracing::warn!(error = error.text(), "Cannot remove what a move left");
            }
        }
        if let Some((path, _)) = memory.record {
            discard(&path);
        }
    }

    /// The directory of a tree, made if it is not there. `keep`: what stands there is an earlier copy;
    /// else it has to be empty.
    pub(super) fn land_directory(&self, path: &Path, keep: bool) -> Result<Root> {
        let _step = self.step()?;
        let (parent, name) = self.land_parent(path)?;
        match stat_of(&parent, &name, path)? {
            None => {
                fs::mkdirat(&parent, &*name, Mode::RWXU).doing("make the directory", path)?;
                let stat = stat_at(parent.as_fd(), &name).doing("look at", path)?;
                self.made_tree(path, (stat.st_dev, stat.st_ino))?;
            }
            Some(stat) if !is_dir(&stat) => {
                return Err(taken(path, "something that is no directory"));
            }
            Some(_) if keep => {}
            Some(stat) => {
                let mut entries = std::fs::read_dir(path).doing("list", path)?;
                if entries.next().is_some() {
                    return Err(taken(path, "a directory that is not empty"));
                }
                self.made_contents(path, (stat.st_dev, stat.st_ino))?;
            }
        }
        let around = Root::directory(parent, path.to_owned());
        let dir = around.open_dir(&name).doing("open", path)?;
        Ok(Root::landing(dir, path.to_owned()))
    }

    /// The directory around a tree at `path`, made if it is not there, and the tree's name in it.
    pub(super) fn land_parent(&self, path: &Path) -> Result<(OwnedFd, Vec<u8>)> {
        let (parent, name) = parent_and_name(path).doing("find the directory of", path)?;
        self.make_parents(parent)?;
        let dir = open_directory(parent).doing("open", parent)?;
        Ok((dir, name.to_vec()))
    }

    fn forget(&self) -> Vec<Made> {
        let memory =
            std::mem::take(&mut *self.memory.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some((path, _)) = memory.record {
            discard(&path);
        }
        memory.made
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
            self.remember(Made::Parent(dir.to_owned()))?;
            std::fs::create_dir(dir).doing("make the directory", dir)?;
        }
        Ok(())
    }

    /// Remembers a tree or a file that was just made at `path`.
    pub(super) fn made_tree(&self, path: &Path, identity: (u64, u64)) -> Result<()> {
        self.remember(Made::Tree { path: path.to_owned(), identity })
    }

    /// Remembers that whatever is in the directory at `path` comes from this arrival.
    pub(super) fn made_contents(&self, path: &Path, identity: (u64, u64)) -> Result<()> {
        self.remember(Made::Contents { path: path.to_owned(), identity })
    }

    /// Remembers that a single file is about to be written under the temporary name `path`.
    pub(super) fn making_file(&self, path: &Path) -> Result<()> {
        self.remember(Made::Temporary(path.to_owned()))
    }

    /// In memory in any case, so that an error of the record does not leave anything behind.
    fn remember(&self, made: Made) -> Result<()> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let line = serde_json::to_string(&made);
        memory.made.push(made);
        let Some((path, file)) = &mut memory.record else { return Ok(()) };
        let written = line.map_err(io::Error::from).and_then(|line| {
            file.write_all(format!("{line}\n").as_bytes())?;
            file.sync_data()
        });
        written.doing("write the record", path)
    }
}

pub(super) fn stat_of(dir: &OwnedFd, name: &[u8], path: &Path) -> Result<Option<Stat>> {
    match stat_at(dir.as_fd(), name) {
        Ok(stat) => Ok(Some(stat)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error).doing("look at", path),
    }
}

pub(super) fn taken(path: &Path, what: &str) -> FileError {
    FileError::PathTaken { path: path.to_owned(), what: what.to_owned() }
}

fn discard(record: &Path) {
    if let Err(error) = std::fs::remove_file(record) {
        tracing::warn!(record = %record.display(), %error, "Cannot remove the record of an arrival");
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let memory = self.memory.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Whoever drops one with a record may be a process that was told to end in the middle of it all:
        // what becomes of it is for the next one to say.
        if memory.record.is_none() {
            self.remove();
        }
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
            Self::Temporary(path) => return remove_temporary(&path),
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

/// Only ever a file by a name of ours.
fn remove_temporary(path: &Path) -> Result<()> {
    let (parent, name) = parent_and_name(path).doing("find the directory of", path)?;
    if !name.starts_with(TEMPORARY.as_bytes()) {
        return Ok(());
    }
    // Mostly it has been renamed since, or its directory was never made.
    let Ok(dir) = open_directory(parent) else { return Ok(()) };
    match stat_at(dir.as_fd(), name) {
        Ok(stat) if !is_dir(&stat) => remove_all(dir.as_fd(), name, path),
        _ => Ok(()),
    }
}
