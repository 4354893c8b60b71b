//! One pass over a tree as the destination carries it out: what must go goes, nodes are made, files
//! are written beside their place and renamed into it, and at the end metadata and disk are right.
//! Nothing here knows of the stream.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags};

use super::attributes::{apply, set_mtime, type_of};
use super::beneath::{
    Identity, Root, held_in_proc, hold, identity, is_dir, is_gone, remove_all, stat_at,
};
use super::error::{Doing, FileError, Result};
use super::index::{Bitmap, Entry, Index, Type, as_path, split};
use super::landing::Landing;

/// Bytes written, or left out as a hole, at once.
const BLOCK: usize = 64 << 10;
/// A pass that touched more files and directories than this syncs the whole file system.
const SYNCED_SINGLY: usize = 48;
/// Begins the names of files that are being written.
pub(super) const TEMPORARY: &str = ".decamp-new-";

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// A pass that is being carried out.
pub(super) struct Placing<'a> {
    root: &'a Root,
    index: &'a Index,
    landing: &'a Landing,
    /// Where a single file stands that nobody had before.
    fresh_file: Option<PathBuf>,
    /// The directory opened last, and its path.
    parent: Option<(Vec<u8>, Rc<OwnedFd>)>,
    /// Directories that something was changed in, with their modification times before.
    touched: HashMap<Vec<u8>, (i64, i64)>,
    /// Files with content as it should be, kept or placed: which they are.
    whole: HashMap<usize, Identity>,
    /// Files written in this pass, as long as they are few.
    written: Vec<File>,
    changed: bool,
    block: Vec<u8>,
}

impl<'a> Placing<'a> {
    pub(super) fn new(
        root: &'a Root,
        index: &'a Index,
        landing: &'a Landing,
        fresh_file: Option<PathBuf>,
    ) -> Self {
        Self {
            root,
            index,
            landing,
            fresh_file,
            parent: None,
            touched: HashMap::new(),
            whole: HashMap::new(),
            written: Vec::new(),
            changed: false,
            block: vec![0; BLOCK],
        }
    }

    /// First pass: removes what is not to stay, keeps the files that are as they should be already,
    /// and gives the entries whose content must come.
    pub(super) fn reconcile(
        &mut self,
        remove: &[Vec<u8>],
        equal: HashMap<usize, Identity>,
    ) -> Result<Bitmap> {
        for path in remove {
            self.remove(path)?;
        }
        self.whole = equal;
        let mut wanted = Bitmap::empty(self.index.entries.len());
        for (number, entry) in self.index.entries.iter().enumerate() {
            if entry.has_content() && !self.whole.contains_key(&number) {
                wanted.set(number);
            }
        }
        Ok(wanted)
    }

    /// Pass over changes: removes what the source says is gone.
    pub(super) fn remove_gone(&mut self) -> Result<()> {
        for path in &self.index.removed {
            self.remove(path)?;
        }
        Ok(())
    }

    fn remove(&mut self, path: &[u8]) -> Result<()> {
        let _step = self.landing.step()?;
        let (parent, name) = self.root.locate(path);
        let dir = match self.open_parent(parent) {
            Ok(dir) => dir,
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(error).doing("open the directory of", &self.root.shown(path)),
        };
        self.touch(parent, &dir)?;
        // A directory below it may be the one that is held open.
        self.parent = None;
        remove_all(dir.as_fd(), name, &self.root.shown(path))
    }

    /// Makes directories, symbolic links, pipes and device nodes.
    pub(super) fn make_nodes(&mut self) -> Result<()> {
        for entry in &self.index.entries {
            let _step = self.landing.step()?;
            match entry.kind() {
                Type::Directory if !entry.path.is_empty() => self.make_directory(entry)?,
                Type::Symlink | Type::Fifo | Type::CharacterDevice | Type::BlockDevice => {
                    self.make_node(entry)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn make_directory(&mut self, entry: &Entry) -> Result<()> {
        let (dir, name) = self.place_of(entry)?;
        let shown = self.root.shown(&entry.path);
        match stat_at(dir.as_fd(), name) {
            Ok(stat) if is_dir(&stat) => return Ok(()),
            Ok(_) => remove_all(dir.as_fd(), name, &shown)?,
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error).doing("look at", &shown),
        }
        self.touch(split(&entry.path).0, &dir)?;
        fs::mkdirat(&*dir, name, Mode::RWXU).doing("make the directory", &shown)
    }

    fn make_node(&mut self, entry: &Entry) -> Result<()> {
        let (dir, name) = self.place_of(entry)?;
        let shown = self.root.shown(&entry.path);
        if let Ok(there) = hold(dir.as_fd(), name)
            && is_node(entry, there.as_fd()).doing("look at", &shown)?
        {
            self.changed |= apply(entry, there.as_fd()).doing("set the attributes of", &shown)?;
            return Ok(());
        }
        let temporary = self.temporary(entry, &dir)?;
        let kind = match entry.kind() {
            Type::Fifo => FileType::Fifo,
            Type::CharacterDevice => FileType::CharacterDevice,
            _ => FileType::BlockDevice,
        };
        let made = match entry.kind() {
            Type::Symlink => fs::symlinkat(entry.target.as_slice(), &*dir, temporary.name()),
            _ => {
                let device = fs::makedev(entry.major, entry.minor);
                fs::mknodat(&*dir, temporary.name(), kind, Mode::RUSR | Mode::WUSR, device)
            }
        };
        made.doing("make", &shown)?;
        let node = hold(dir.as_fd(), temporary.name()).doing("look at", &shown)?;
        if !is_node(entry, node.as_fd()).doing("look at", &shown)? {
            return Err(FileError::replaced(&shown));
        }
        self.install(entry, &dir, temporary, node.as_fd())
    }

    /// Writes entry `number` from exactly as many bytes of `content` as the index says.
    pub(super) fn place_file(&mut self, number: usize, content: &mut dyn Read) -> Result<()> {
        let index = self.index;
        let entry = &index.entries[number];
        let shown = self.root.shown(&entry.path);
        let (dir, _) = self.place_of(entry)?;
        let temporary = self.temporary(entry, &dir)?;
        if let Some(path) = &self.fresh_file {
            self.landing.making_file(&path.with_file_name(as_path(temporary.name())))?;
        }
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file: File = {
            let _step = self.landing.step()?;
            fs::openat(&*dir, temporary.name(), flags, mode).doing("make", &shown)?.into()
        };
        self.write(&file, entry.size, content, &shown)?;
        let _step = self.landing.step()?;
        self.install(entry, &dir, temporary, file.as_fd())?;
        let placed = identity(&fs::fstat(&file).doing("look at", &shown)?);
        if let Some(path) = self.fresh_file.take() {
            self.landing.made_tree(&path, placed)?;
        }
        if self.written.len() <= SYNCED_SINGLY {
            self.written.push(file);
        }
        self.whole.insert(number, placed);
        Ok(())
    }

    /// Blocks of zeros become holes.
    fn write(
        &mut self,
        file: &File,
        size: u64,
        content: &mut dyn Read,
        shown: &Path,
    ) -> Result<()> {
        let mut at = 0;
        while at < size {
            let _given_up = self.landing.step()?;
            let part = &mut self.block[..BLOCK.min((size - at).min(BLOCK as u64) as usize)];
            content.read_exact(part).map_err(|error| {
                FileError::hostile(shown, format!("content that cannot be unpacked: {error}"))
            })?;
            if part[..] != ZEROS[..part.len()] {
                file.write_all_at(part, at).doing("write", shown)?;
            }
            at += part.len() as u64;
        }
        file.set_len(size).doing("write", shown)
    }

    /// A name in `dir` for what is to become `entry`; the directory counts as touched from here on.
    fn temporary(&mut self, entry: &Entry, dir: &Rc<OwnedFd>) -> Result<Temporary> {
        self.touch(self.root.locate(&entry.path).0, dir)?;
        Ok(Temporary::new(dir.clone()))
    }

    /// Gives what is `held`, and stands under a temporary name, its attributes and its place. The
    /// name alone proves nothing: others may write in the directory.
    fn install(
        &mut self,
        entry: &Entry,
        dir: &Rc<OwnedFd>,
        mut temporary: Temporary,
        held: BorrowedFd<'_>,
    ) -> Result<()> {
        let shown = self.root.shown(&entry.path);
        let (_, name) = self.root.locate(&entry.path);
        apply(entry, held).doing("set the attributes of", &shown)?;
        let ours = identity(&fs::fstat(held).doing("look at", &shown)?);
        let there = stat_at(dir.as_fd(), temporary.name()).doing("look at", &shown)?;
        if identity(&there) != ours {
            return Err(FileError::replaced(&shown));
        }
        if stat_at(dir.as_fd(), name).is_ok_and(|stat| is_dir(&stat)) {
            remove_all(dir.as_fd(), name, &shown)?;
        }
        fs::renameat(&**dir, temporary.name(), &**dir, name).doing("put into place", &shown)?;
        temporary.renamed();
        Ok(())
    }

    /// Everything that came has come: links, then what was wanted and did not come goes, then
    /// metadata, from the leaves to the root; then all of it is brought to the disk.
    pub(super) fn finish(mut self, first: bool) -> Result<()> {
        let index = self.index;
        for (number, entry) in index.entries.iter().enumerate() {
            let leader = entry.leader().unwrap_or(number);
            if entry.kind() != Type::File {
                continue;
            }
            match self.whole.get(&leader).copied() {
                None => self.remove(&entry.path)?,
                Some(file) if leader != number => {
                    self.link(entry, &index.entries[leader], file)?;
                }
                Some(file) if first => self.correct(entry, Some(file))?,
                Some(_) => {}
            }
        }
        self.parent = None;
        for entry in index.entries.iter().rev().filter(|entry| entry.kind() == Type::Directory) {
            self.touched
                .entry(entry.path.clone())
                .or_insert((entry.mtime, i64::from(entry.mtime_ns)));
            self.correct(entry, None)?;
        }
        if !self.root.is_file() {
            for (path, (s, ns)) in &self.touched {
                if index.find(path).is_some() {
                    continue;
                }
                // Not in the index, so it had no change of its own: only ours is taken back.
                if let Ok(dir) = self.root.open_dir(path) {
                    set_mtime(dir.as_fd(), *s, *ns)
                        .doing("set the time of", &self.root.shown(path))?;
                }
            }
        }
        self.sync(first)
    }

    /// Sets what is not as the index says; `file`: which file must stand there.
    fn correct(&mut self, entry: &Entry, file: Option<Identity>) -> Result<()> {
        let _step = self.landing.step()?;
        let (dir, name) = self.place_of(entry)?;
        let shown = self.root.shown(&entry.path);
        let held = hold(dir.as_fd(), name).doing("look at", &shown)?;
        self.must_be(file, &held, &shown)?;
        self.changed |= apply(entry, held.as_fd()).doing("set the attributes of", &shown)?;
        Ok(())
    }

    fn must_be(&self, file: Option<Identity>, held: &OwnedFd, shown: &Path) -> Result<()> {
        let found = identity(&fs::fstat(held).doing("look at", shown)?);
        match file {
            Some(file) if file != found => Err(FileError::replaced(shown)),
            _ => Ok(()),
        }
    }

    /// Makes `entry` another name of `leader`, which is `file`.
    fn link(&mut self, entry: &Entry, leader: &Entry, file: Identity) -> Result<()> {
        let _step = self.landing.step()?;
        let shown = self.root.shown(&entry.path);
        let (from, from_name) = self.place_of(leader)?;
        let (dir, name) = self.place_of(entry)?;
        let original = self.root.shown(&leader.path);
        let held = hold(from.as_fd(), from_name).doing("look at", &original)?;
        self.must_be(Some(file), &held, &original)?;
        if stat_at(dir.as_fd(), name).is_ok_and(|there| identity(&there) == file) {
            return Ok(());
        }
        let temporary = self.temporary(entry, &dir)?;
        let path = held_in_proc(held.as_fd()).doing("link", &shown)?;
        fs::linkat(CWD, &path, &*dir, temporary.name(), AtFlags::SYMLINK_FOLLOW)
            .doing("link", &shown)?;
        // Its attributes are the leader's, its place is the entry's.
        let entry = Entry { path: entry.path.clone(), ..leader.clone() };
        self.install(&entry, &dir, temporary, held.as_fd())
    }

    fn sync(self, first: bool) -> Result<()> {
        if !self.changed && self.touched.is_empty() && self.written.is_empty() {
            return Ok(());
        }
        if first || self.written.len() + self.touched.len() > SYNCED_SINGLY {
            // All of a tree stands on one file system.
            return fs::syncfs(self.root.dir())
                .doing("sync the file system of", &self.root.shown(b""));
        }
        for file in &self.written {
            file.sync_all().doing("sync a file in", &self.root.shown(b""))?;
        }
        for path in self.touched.keys() {
            match self.root.open_dir(path) {
                Ok(dir) => fs::fsync(&dir).doing("sync", &self.root.shown(path))?,
                // Removed in this very pass.
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error).doing("sync", &self.root.shown(path)),
            }
        }
        Ok(())
    }

    /// The opened directory of an entry, and the entry's name in it.
    fn place_of<'e>(&mut self, entry: &'e Entry) -> Result<(Rc<OwnedFd>, &'e [u8])>
    where
        'a: 'e,
    {
        let root: &'a Root = self.root;
        let (parent, name) = root.locate(&entry.path);
        let dir = self
            .open_parent(parent)
            .doing("open the directory of", &self.root.shown(&entry.path))?;
        Ok((dir, name))
    }

    fn open_parent(&mut self, path: &[u8]) -> io::Result<Rc<OwnedFd>> {
        if let Some((open, dir)) = &self.parent
            && open == path
        {
            return Ok(dir.clone());
        }
        let dir = Rc::new(self.root.open_dir(path)?);
        self.parent = Some((path.to_vec(), dir.clone()));
        Ok(dir)
    }

    /// Remembers when the directory at `path` was modified, before it is.
    fn touch(&mut self, path: &[u8], dir: &Rc<OwnedFd>) -> Result<()> {
        self.changed = true;
        if !self.touched.contains_key(path) {
            let stat = fs::fstat(&**dir).doing("look at", &self.root.shown(path))?;
            self.touched.insert(path.to_vec(), (stat.st_mtime, stat.st_mtime_nsec as i64));
        }
        Ok(())
    }
}

/// A name that nobody else uses, and that is taken away again unless it was renamed.
struct Temporary {
    dir: Rc<OwnedFd>,
    name: Vec<u8>,
    stands: bool,
}

impl Temporary {
    fn new(dir: Rc<OwnedFd>) -> Self {
        let name = format!("{TEMPORARY}{:016x}", rand::random::<u64>()).into_bytes();
        Self { dir, name, stands: true }
    }

    /// There is nothing to take away any more.
    fn renamed(&mut self) {
        self.stands = false;
    }

    fn name(&self) -> &[u8] {
        &self.name
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.stands {
            return;
        }
        if let Err(error) = fs::unlinkat(&*self.dir, self.name(), AtFlags::empty())
            && error != rustix::io::Errno::NOENT
        {
            let name = String::from_utf8_lossy(&self.name).into_owned();
            tracing::warn!(name, %error, "Cannot remove a temporary file");
        }
    }
}

/// Whether what is held is a link or a node as the entry says, and has no other name.
fn is_node(entry: &Entry, held: BorrowedFd<'_>) -> io::Result<bool> {
    let stat = fs::fstat(held)?;
    if type_of(&stat) != Some(entry.kind()) || stat.st_nlink != 1 {
        return Ok(false);
    }
    Ok(match entry.kind() {
        Type::Symlink => fs::readlinkat(held, "", Vec::new())?.as_bytes() == entry.target,
        Type::CharacterDevice | Type::BlockDevice => {
            stat.st_rdev == fs::makedev(entry.major, entry.minor)
        }
        _ => true,
    })
}
