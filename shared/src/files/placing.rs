//! One pass over a tree as the destination carries it out: what must go goes, nodes are made, files
//! are written beside their place and renamed into it, and at the end metadata and disk are right.
//! Nothing here knows of the stream.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Stat};

use super::attributes::{apply, set_mtime, type_of};
use super::beneath::{Root, is_dir, is_gone, remove_all, stat_at};
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
    /// Files with content as it should be: kept or placed.
    whole: Bitmap,
    /// A descriptor on each file system of the tree.
    devices: HashMap<u64, Rc<OwnedFd>>,
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
            whole: Bitmap::empty(index.entries.len()),
            devices: HashMap::new(),
            written: Vec::new(),
            changed: false,
            block: vec![0; BLOCK],
        }
    }

    /// First pass: removes what the index lacks or has as something else, and gives the entries
    /// whose content must come.
    pub(super) fn reconcile(&mut self) -> Result<Bitmap> {
        let (mut remove, mut claimed) = (Vec::new(), HashSet::new());
        let mut gone = HashSet::new();
        self.root.walk(|visit| {
            let found =
                self.index.find(visit.path).map(|number| (number, &self.index.entries[number]));
            match found {
                Some((_, entry)) if type_of(visit.stat) != Some(entry.kind()) => {}
                Some((number, entry)) => {
                    let file = (visit.stat.st_dev, visit.stat.st_ino);
                    if entry.has_content()
                        && is_equal(entry, visit.stat, self.index.names(number))
                        && claimed.insert(file)
                    {
                        self.whole.set(number);
                    }
                    return Ok(());
                }
                None => {}
            }
            let below_gone = gone.contains(split(visit.path).0);
            if is_dir(visit.stat) {
                gone.insert(visit.path.to_vec());
            }
            if !below_gone {
                remove.push(visit.path.to_vec());
            }
            Ok(())
        })?;
        for path in remove {
            self.remove(&path)?;
        }
        let mut wanted = Bitmap::empty(self.index.entries.len());
        for (number, entry) in self.index.entries.iter().enumerate() {
            if entry.has_content() && !self.whole.has(number) {
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

    /// A single file that is as the index says.
    pub(super) fn keep_file(&mut self) {
        self.whole.set(0);
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
        if let Ok(stat) = stat_at(dir.as_fd(), name)
            && is_same_node(entry, &stat, dir.as_fd(), name).doing("look at", &shown)?
        {
            self.changed |=
                apply(entry, dir.as_fd(), name).doing("set the attributes of", &shown)?;
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
        self.install(entry, &dir, temporary, name)
    }

    /// Writes entry `number` from exactly as many bytes of `content` as the index says.
    pub(super) fn place_file(&mut self, number: usize, content: &mut dyn Read) -> Result<()> {
        let index = self.index;
        let entry = &index.entries[number];
        let shown = self.root.shown(&entry.path);
        let (dir, name) = self.place_of(entry)?;
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
        self.install(entry, &dir, temporary, name)?;
        if let Some(path) = self.fresh_file.take() {
            let stat = fs::fstat(&file).doing("look at", &shown)?;
            self.landing.made_tree(&path, (stat.st_dev, stat.st_ino))?;
        }
        if self.written.len() <= SYNCED_SINGLY {
            self.written.push(file);
        }
        self.whole.set(number);
        Ok(())
    }

    /// Blocks of zeros become holes.
    fn write(
        &mut self,
        file: &File,
        size: u64,
        content: &mut dyn Read,
        shown: &std::path::Path,
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

    /// Gives what stands under a temporary name its attributes and its place.
    fn install(
        &mut self,
        entry: &Entry,
        dir: &Rc<OwnedFd>,
        mut temporary: Temporary,
        name: &[u8],
    ) -> Result<()> {
        let shown = self.root.shown(&entry.path);
        apply(entry, dir.as_fd(), temporary.name()).doing("set the attributes of", &shown)?;
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
            match entry.kind() {
                Type::File if !self.whole.has(leader) => self.remove(&entry.path)?,
                Type::File if leader != number => self.link(entry, &index.entries[leader])?,
                Type::File if first => self.correct(entry)?,
                _ => {}
            }
        }
        self.parent = None;
        for entry in index.entries.iter().rev().filter(|entry| entry.kind() == Type::Directory) {
            self.touched
                .entry(entry.path.clone())
                .or_insert((entry.mtime, i64::from(entry.mtime_ns)));
            self.correct(entry)?;
        }
        if !self.root.is_file() {
            for (path, (s, ns)) in &self.touched {
                if index.find(path).is_some() {
                    continue;
                }
                // Not in the index, so it had no change of its own: only ours is taken back.
                if let Ok(dir) = self.root.open_dir(path) {
                    set_mtime(dir.as_fd(), b".", *s, *ns)
                        .doing("set the time of", &self.root.shown(path))?;
                }
            }
        }
        self.sync(first)
    }

    fn correct(&mut self, entry: &Entry) -> Result<()> {
        let _step = self.landing.step()?;
        let (dir, name) = self.place_of(entry)?;
        let shown = self.root.shown(&entry.path);
        self.changed |= apply(entry, dir.as_fd(), name).doing("set the attributes of", &shown)?;
        Ok(())
    }

    fn link(&mut self, entry: &Entry, leader: &Entry) -> Result<()> {
        let _step = self.landing.step()?;
        let shown = self.root.shown(&entry.path);
        let (from, from_name) = self.place_of(leader)?;
        let (dir, name) = self.place_of(entry)?;
        let original =
            stat_at(from.as_fd(), from_name).doing("look at", &self.root.shown(&leader.path))?;
        if let Ok(there) = stat_at(dir.as_fd(), name)
            && (there.st_dev, there.st_ino) == (original.st_dev, original.st_ino)
        {
            return Ok(());
        }
        let temporary = self.temporary(entry, &dir)?;
        fs::linkat(&*from, from_name, &*dir, temporary.name(), AtFlags::empty())
            .doing("link", &shown)?;
        self.install(leader, &dir, temporary, name)
    }

    fn sync(self, first: bool) -> Result<()> {
        if !self.changed && self.touched.is_empty() && self.written.is_empty() {
            return Ok(());
        }
        if first || self.written.len() + self.touched.len() > SYNCED_SINGLY {
            let root =
                Rc::new(self.root.dir().try_clone_to_owned().doing("sync", &self.root.shown(b""))?);
            let device = fs::fstat(&*root).doing("sync", &self.root.shown(b""))?.st_dev;
            let mut devices = self.devices;
            devices.insert(device, root);
            return devices.values().try_for_each(|dir| {
                fs::syncfs(&**dir).doing("sync the file system of", &self.root.shown(b""))
            });
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
        let device = fs::fstat(&*dir)?.st_dev;
        self.devices.entry(device).or_insert_with(|| dir.clone());
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

/// Whether a file that stands there need not be sent. `names`: how many it has in the index; with
/// any other number, writing in it later would change a file that is none of its names.
pub(super) fn is_equal(entry: &Entry, stat: &Stat, names: u64) -> bool {
    stat.st_size as u64 == entry.size
        && (stat.st_mtime, stat.st_mtime_nsec as u32) == (entry.mtime, entry.mtime_ns)
        && stat.st_mode & 0o7777 == entry.mode
        && i128::from(stat.st_nlink) == i128::from(names)
}

fn is_same_node(entry: &Entry, stat: &Stat, dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<bool> {
    if type_of(stat) != Some(entry.kind()) || stat.st_nlink != 1 {
        return Ok(false);
    }
    Ok(match entry.kind() {
        Type::Symlink => fs::readlinkat(dir, name, Vec::new())?.as_bytes() == entry.target,
        Type::CharacterDevice | Type::BlockDevice => {
            stat.st_rdev == fs::makedev(entry.major, entry.minor)
        }
        _ => true,
    })
}
