//! What an arrival made on this host's disk, so that a move that is given up can take exactly that
//! away again. It never takes anything that was there before.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use rustix::fs::{self, Mode, Stat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::beneath::{
    Root, is_dir, is_gone, open_directory, parent_and_name, remove_all, remove_contents, stat_at,
};
use super::error::{Doing, FileError, Result};
use super::placing::TEMPORARY;

/// Begins the names of earlier copies that were put aside.
const ASIDE: &str = ".decamp-old-";

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
    /// The earlier copy that stood at `path` and stands at `aside` until it is clear which of the two stays.
    Aside { path: PathBuf, aside: PathBuf, identity: (u64, u64) },
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

    /// Device and inode of the tree or file that it made at `path`, if it made one and nobody decided yet.
    pub fn made_at(&self, path: &Path) -> Option<(u64, u64)> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.made.iter().rev().find_map(|made| match made {
            Made::Tree { path: at, identity } if at == path => Some(*identity),
            _ => None,
        })
    }

    /// The move completed: everything stays, but for the earlier copies that it replaced.
    pub fn keep(&self) {
        let memory =
            std::mem::take(&mut *self.memory.lock().unwrap_or_else(PoisonError::into_inner));
        for thing in &memory.made {
            if let Err(error) = thing.replaced() {
                tracing::warn!(error = error.text(), "Cannot remove an earlier copy");
            }
        }
        if let Some((path, _)) = memory.record {
            discard(&path);
        }
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

    /// An empty file at `path`, for whoever fills it in another way. `known`: what stands there is an earlier
    /// copy of it, which is put aside, and is there again when this arrival is removed.
    ///
    /// Each step is remembered before it is taken, and the file has its name last: whenever a crash comes, nothing
    /// stands at `path` that was not there before and is not known to be this arrival's.
    ///
    /// # Errors
    /// When something else stands there, or it cannot be made.
    pub fn land_empty(&self, path: &Path, known: bool) -> Result<()> {
        let _step = self.step()?;
        let (parent, name) = self.land_parent(path)?;
        let earlier = match stat_of(&parent, &name, path)? {
            None => None,
            Some(stat) if known && fs::FileType::from_raw_mode(stat.st_mode).is_file() => {
                Some((stat.st_dev, stat.st_ino))
            }
            Some(_) => return Err(taken(path, "something that is no earlier copy of it")),
        };
        let number = rand::random::<u64>();
        let [new, old] = [TEMPORARY, ASIDE].map(|begins| format!("{begins}{number:016x}"));
        self.making_file(&path.with_file_name(&new))?;
        let flags = fs::OFlags::WRONLY
            | fs::OFlags::CREATE
            | fs::OFlags::EXCL
            | fs::OFlags::NOFOLLOW
            | fs::OFlags::CLOEXEC;
        let file =
            fs::openat(&parent, &*new, flags, Mode::RUSR | Mode::WUSR).doing("make", path)?;
        let stat = fs::fstat(&file).doing("look at", path)?;
        if let Some(identity) = earlier {
            let aside = path.with_file_name(&old);
            self.remember(Made::Aside { path: path.to_owned(), aside, identity })?;
            fs::renameat(&parent, &*name, &parent, &*old).doing("put aside", path)?;
        }
        self.made_tree(path, (stat.st_dev, stat.st_ino))?;
        rename_to_free(&parent, new.as_bytes(), &name).doing("put into place", path)?;
        fs::fsync(&parent).doing("sync the directory of", path)
    }

    /// The directory around a tree at `path`, made if it is not there, and the tree's name in it.
    pub(super) fn land_parent(&self, path: &Path) -> Result<(OwnedFd, Vec<u8>)> {
        let (parent, name) = parent_and_name(path).doing("find the directory of", path)?;
        self.make_parents(parent)?;
        let dir = open_directory(parent).doing("open", parent)?;
        Ok((dir, name.to_vec()))
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
    /// What it stands in for goes.
    fn replaced(&self) -> Result<()> {
        match self {
            Self::Aside { aside, identity, .. } => match aside_of(aside, *identity)? {
                Some((dir, name)) => {
                    fs::unlinkat(&dir, &*name, fs::AtFlags::empty()).doing("remove", aside)
                }
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

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
            Self::Aside { path, aside, identity } => return put_back(&path, &aside, identity),
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

/// Where the earlier copy stands that was put aside, if it does: only ever by a name of ours.
fn aside_of(aside: &Path, identity: (u64, u64)) -> Result<Option<(OwnedFd, Vec<u8>)>> {
    let (parent, name) = parent_and_name(aside).doing("find the directory of", aside)?;
    let dir = open_directory(parent).doing("open", parent)?;
    let found = stat_of(&dir, name, aside)?;
    let is_it = |stat: &Stat| (stat.st_dev, stat.st_ino) == identity;
    let is_ours = name.starts_with(ASIDE.as_bytes()) && found.as_ref().is_some_and(is_it);
    Ok(is_ours.then(|| (dir, name.to_vec())))
}

/// The earlier copy stands at `path` again, unless somebody else's file stands there by now.
fn put_back(path: &Path, aside: &Path, identity: (u64, u64)) -> Result<()> {
    let Some((dir, name)) = aside_of(aside, identity)? else { return Ok(()) };
    let (_, old) = parent_and_name(path).doing("find the directory of", path)?;
    rename_to_free(&dir, &name, old).doing("put back what stood at", path)?;
    fs::fsync(&dir).doing("sync the directory of", path)
}

/// Renames within `dir` where nothing has the new name yet.
fn rename_to_free(dir: &OwnedFd, from: &[u8], to: &[u8]) -> io::Result<()> {
    match fs::renameat_with(dir, from, dir, to, fs::RenameFlags::NOREPLACE) {
        // Network file systems do not know that; a second name is never given over another.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            fs::linkat(dir, from, dir, to, fs::AtFlags::empty())?;
            Ok(fs::unlinkat(dir, from, fs::AtFlags::empty())?)
        }
        renamed => Ok(renamed?),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_made_where_nothing_of_anybody_else_is_and_goes_with_the_rest() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("new/disk.img");
        let landing = Landing::new();
        landing.land_empty(&path, false).expect("made");
        assert_eq!(std::fs::metadata(&path).expect("there").len(), 0);
        std::fs::write(&path, "filled").expect("written");
        assert!(Landing::new().land_empty(&path, false).is_err(), "it is somebody's");
        landing.remove();
        assert!(!dir.path().join("new").exists());
        let earlier = dir.path().join("earlier.img");
        std::fs::write(&earlier, "an earlier copy").expect("written");
        let landing = Landing::new();
        landing.land_empty(&earlier, true).expect("replaced");
        assert_eq!(std::fs::read(&earlier).expect("there"), b"");
        landing.keep();
        assert!(Landing::new().land_empty(dir.path(), true).is_err(), "a directory is no copy");
        assert_eq!(names(dir.path()), ["earlier.img"]);
        assert_eq!(std::fs::read(&earlier).expect("there"), b"");
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).expect("listed").map(|entry| entry.expect("listed"));
        entries.map(|entry| entry.file_name().to_str().expect("UTF-8").to_owned()).collect()
    }

    #[test]
    fn an_earlier_copy_is_there_again_when_nothing_came_of_the_new_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk.img");
        std::fs::write(&path, "an earlier copy").expect("written");
        let landing = Landing::new();
        landing.land_empty(&path, true).expect("put aside");
        std::fs::write(&path, "half of the new one").expect("written");
        landing.remove();
        assert_eq!(std::fs::read(&path).expect("there"), b"an earlier copy");
        assert_eq!(names(dir.path()), ["disk.img"]);
        // What somebody put there meanwhile is not ours to replace.
        let landing = Landing::new();
        landing.land_empty(&path, true).expect("put aside");
        // Made beside it, for its number would be given again.
        std::fs::write(dir.path().join("theirs"), "somebody's").expect("written");
        std::fs::rename(dir.path().join("theirs"), &path).expect("renamed");
        landing.remove();
        assert_eq!(std::fs::read(&path).expect("there"), b"somebody's");
        assert_eq!(names(dir.path()).len(), 2, "and the earlier copy is not lost");
    }

    /// The record is cut behind each of its lines, with what was done before the next one: as a crash leaves it.
    #[test]
    fn a_crash_at_any_step_leaves_the_earlier_copy_or_a_whole_new_file() {
        for lines in 0..=3 {
            for done in [false, true] {
                let dir = tempfile::tempdir().expect("a directory");
                let (path, record) = (dir.path().join("disk.img"), dir.path().join("record"));
                std::fs::write(&path, "an earlier copy").expect("written");
                let landing = Landing::recorded(&record).expect("recorded");
                landing.land_empty(&path, true).expect("made");
                drop(landing);
                let text = std::fs::read_to_string(&record).expect("read");
                assert_eq!(text.lines().count(), 3, "{text}");
                let kept: String = text.split_inclusive('\n').take(lines).collect();
                std::fs::write(&record, kept).expect("cut");
                let of = |begins: &str| {
                    let name = names(dir.path()).into_iter().find(|name| name.starts_with(begins));
                    dir.path().join(name.unwrap_or_default())
                };
                // Back, step by step, to where it was when the next line was not written.
                let new =
                    dir.path().join(of(ASIDE).to_str().expect("UTF-8").replace("-old-", "-new-"));
                if lines < 3 || !done {
                    std::fs::rename(&path, &new).expect("not in place yet");
                }
                if lines < 2 || (lines == 2 && !done) {
                    std::fs::rename(of(ASIDE), &path).expect("not aside yet");
                }
                if lines < 1 || (lines == 1 && !done) {
                    std::fs::remove_file(&new).expect("not made yet");
                }
                Landing::recover(&record).expect("recovered").remove();
                assert_eq!(std::fs::read(&path).expect("there"), b"an earlier copy", "{lines}");
                assert_eq!(names(dir.path()), ["disk.img"], "{lines} {done}");
            }
        }
    }
}
