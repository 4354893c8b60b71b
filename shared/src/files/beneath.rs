//! Files beneath a root, reached by descriptors alone: no path below it is ever resolved through a
//! symbolic link or upwards. Both ends use it; what is done with the files is theirs.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags, Stat};

use super::error::{Doing, FileError, Result};
use super::index::{PATH_MOST, as_path, shown};

/// Bytes of directory entries read at once.
const LISTING: usize = 32 << 10;
/// How every path below a root is resolved.
const CONFINED: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// The root of a tree: a directory, or one file in a directory that is not part of the tree.
#[derive(Debug)]
pub(super) struct Root {
    /// The directory, or the one that holds the file.
    dir: OwnedFd,
    /// Name of the file when the tree is one file.
    file: Option<Vec<u8>>,
    /// How paths below it are resolved.
    resolve: ResolveFlags,
    /// For messages.
    shown: PathBuf,
}

impl Root {
    /// A tree that is the directory `dir`.
    pub(super) fn directory(dir: OwnedFd, shown: PathBuf) -> Self {
        Self { dir, file: None, resolve: CONFINED, shown }
    }

    /// A tree that is the directory `dir` on this host's disk and nothing that is mounted below it:
    /// whoever mounted that there owns what is in it.
    pub(super) fn landing(dir: OwnedFd, shown: PathBuf) -> Self {
        Self { dir, file: None, resolve: CONFINED | ResolveFlags::NO_XDEV, shown }
    }

    /// A tree that is the file `name` in `dir`.
    pub(super) fn file(dir: OwnedFd, name: Vec<u8>, shown: PathBuf) -> Self {
        Self { dir, file: Some(name), resolve: CONFINED, shown }
    }

    /// The existing file or directory at `path`; symbolic links to it are the administrator's and
    /// are followed.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let real = path.canonicalize().doing("find", path)?;
        let stat = fs::stat(&real).doing("look at", path)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let dir = open_directory(&real).doing("open", path)?;
                Ok(Self::directory(dir, path.to_owned()))
            }
            FileType::RegularFile => {
                let (parent, name) = parent_and_name(&real).doing("find the directory of", path)?;
                let dir = open_directory(parent).doing("open", parent)?;
                Ok(Self::file(dir, name.to_vec(), path.to_owned()))
            }
            _ => Err(FileError::Unsendable {
                path: path.to_owned(),
                what: "it is neither a file nor a directory".to_owned(),
            }),
        }
    }

    /// The same root once more.
    pub(super) fn again(&self) -> io::Result<Self> {
        let Self { dir, file, resolve, shown } = self;
        Ok(Self {
            dir: dir.try_clone()?,
            file: file.clone(),
            resolve: *resolve,
            shown: shown.clone(),
        })
    }

    /// Whether the tree is a single file.
    pub(super) fn is_file(&self) -> bool {
        self.file.is_some()
    }

    /// The root's own descriptor: the directory, or the one around the file.
    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// `path`'s full name, for messages.
    pub(super) fn shown(&self, path: &[u8]) -> PathBuf {
        shown(&self.shown, path)
    }

    /// The directory that holds `path`, relative to this root, and the name in it. The root itself
    /// is named `.` within itself.
    pub(super) fn locate<'a>(&'a self, path: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        match (&self.file, path) {
            (Some(name), _) => (b"", name),
            (None, b"") => (b"", b"."),
            (None, path) => super::index::split(path),
        }
    }

    /// Opens the directory at `path` below the root; empty: the root, or the directory around the
    /// root that is a file.
    pub(super) fn open_dir(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let path: &[u8] = if path.is_empty() { b"." } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(fs::openat2(&self.dir, path, flags, Mode::empty(), self.resolve)?)
    }

    /// Opens the regular file at `path` for reading; `None` when it is gone or something else. A
    /// device or pipe that took its place is never opened.
    pub(super) fn open_file(&self, path: &[u8]) -> io::Result<Option<std::fs::File>> {
        let path = self.file.as_deref().unwrap_or(path);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = match fs::openat2(&self.dir, path, flags, Mode::empty(), self.resolve) {
            Ok(found) => found,
            Err(error) => {
                let error = io::Error::from(error);
                return if is_gone(&error) { Ok(None) } else { Err(error) };
            }
        };
        if FileType::from_raw_mode(fs::fstat(&found)?.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        let file = fs::open(
            held_in_proc(found.as_fd())?,
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Some(file.into()))
    }

    /// Visits the root and everything below it, directories before what is in them. Entries that
    /// vanish meanwhile are left out.
    pub(super) fn walk(&self, mut visit: impl FnMut(&Visit<'_>) -> Result<()>) -> Result<()> {
        let (_, name) = self.locate(b"");
        let stat = stat_at(self.dir(), name).doing("look at", &self.shown)?;
        visit(&Visit { root: self, path: b"", dir: self.dir(), name, stat: &stat, device: None })?;
        if self.is_file() {
            return Ok(());
        }
        let mut buffer = vec![MaybeUninit::uninit(); LISTING];
        let mut names = Names::default();
        let mut pending = vec![(Vec::new(), stat.st_dev)];
        while let Some((path, device)) = pending.pop() {
            let dir = match self.open_dir(&path) {
                Ok(dir) => dir,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error).doing("open", &self.shown(&path)),
            };
            names.read(&dir, &mut buffer).doing("list", &self.shown(&path))?;
            let mut child = path;
            if !child.is_empty() {
                child.push(b'/');
            }
            let stem = child.len();
            for name in names.iter() {
                let stat = match stat_at(dir.as_fd(), name) {
                    Ok(stat) => stat,
                    Err(error) if is_gone(&error) => continue,
                    Err(error) => {
                        return Err(error)
                            .doing("look at", &self.shown(&child).join(as_path(name)));
                    }
                };
                child.truncate(stem);
                child.extend_from_slice(name);
                if child.len() > PATH_MOST {
                    return Err(FileError::Unsendable {
                        path: self.shown(&child),
                        what: format!("its path below the root is longer than {PATH_MOST} bytes"),
                    });
                }
                let entered = (stat.st_dev != device).then_some(stat.st_dev);
                visit(&Visit {
                    root: self,
                    path: &child,
                    dir: dir.as_fd(),
                    name,
                    stat: &stat,
                    device: entered,
                })?;
                if is_dir(&stat) {
                    pending.push((child.clone(), stat.st_dev));
                }
            }
        }
        Ok(())
    }
}

/// One entry of a walk.
pub(super) struct Visit<'a> {
    /// The root of the walk.
    pub(super) root: &'a Root,
    /// Below the root; empty for the root.
    pub(super) path: &'a [u8],
    /// The directory that holds it.
    pub(super) dir: BorrowedFd<'a>,
    /// Its name in there.
    pub(super) name: &'a [u8],
    /// What it is.
    pub(super) stat: &'a Stat,
    /// Its device, when that is not its directory's: something is mounted here.
    pub(super) device: Option<u64>,
}

/// The names of one directory, one after another with a NUL after each.
#[derive(Default)]
struct Names(Vec<u8>);

impl Names {
    fn read(&mut self, dir: &OwnedFd, buffer: &mut [MaybeUninit<u8>]) -> io::Result<()> {
        self.0.clear();
        let mut listing = RawDir::new(dir, buffer);
        while let Some(entry) = listing.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes_with_nul();
            if name != b".\0" && name != b"..\0" {
                self.0.extend_from_slice(name);
            }
        }
        Ok(())
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|byte| *byte == 0).filter(|name| !name.is_empty())
    }
}

/// What stands at `name` in `dir`, without following it.
pub(super) fn stat_at(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Stat> {
    Ok(fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Removes `name` in `dir` with everything below it, without following anything and without
/// entering what is mounted there. `shown` names it in errors. Nothing there: nothing to do.
pub(super) fn remove_all(dir: BorrowedFd<'_>, name: &[u8], shown: &Path) -> Result<()> {
    let stat = match stat_at(dir, name) {
        Ok(stat) => stat,
        Err(error) if is_gone(&error) => return Ok(()),
        Err(error) => return Err(error).doing("look at", shown),
    };
    if !is_dir(&stat) {
        return unlink(dir, name, AtFlags::empty()).doing("remove", shown);
    }
    remove_contents(dir, name, shown)?;
    unlink(dir, name, AtFlags::REMOVEDIR).doing("remove", shown)
}

/// Removes everything below the directory `name` in `dir`, as [`remove_all`] does.
pub(super) fn remove_contents(dir: BorrowedFd<'_>, name: &[u8], shown: &Path) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = CONFINED | ResolveFlags::NO_XDEV;
    let inner = fs::openat2(dir, name, flags, Mode::empty(), resolve).doing("open", shown)?;
    let root = Root::landing(inner, shown.to_owned());
    let mut found = Vec::new();
    root.walk(|visit| {
        if !visit.path.is_empty() {
            found.push((visit.path.to_vec(), is_dir(visit.stat)));
        }
        Ok(())
    })?;
    // Children stand after their directories, so the other way round empties them first.
    for (path, is_dir) in found.into_iter().rev() {
        let (parent, name) = root.locate(&path);
        let flags = if is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        let parent = root.open_dir(parent).doing("open the directory of", &root.shown(&path))?;
        unlink(parent.as_fd(), name, flags).doing("remove", &root.shown(&path))?;
    }
    Ok(())
}

fn unlink(dir: BorrowedFd<'_>, name: &[u8], flags: AtFlags) -> io::Result<()> {
    match fs::unlinkat(dir, name, flags) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Takes hold of `name` in `dir`, a link itself included, without opening it: what is done by the
/// descriptor is done to this very thing, whatever the name comes to mean.
pub(super) fn hold(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(fs::openat2(dir, name, flags, Mode::empty(), CONFINED)?)
}

/// A path to what a descriptor holds, to be followed: it leads to that very thing and, should that
/// be a symbolic link, no further.
pub(super) fn held_in_proc(held: BorrowedFd<'_>) -> io::Result<CString> {
    Ok(CString::new(format!("/proc/self/fd/{}", held.as_raw_fd()))?)
}

/// A path that names `name` in `dir`, for the calls on extended attributes, which know no
/// descriptors of directories. Use only calls that do not follow the last name.
pub(super) fn through_proc(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<CString> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    Ok(CString::new(path)?)
}

/// Opens a directory by a path of this host's own, following links.
pub(super) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(fs::open(path, flags, Mode::empty())?)
}

/// The directory around `path` and its last name.
pub(super) fn parent_and_name(path: &Path) -> io::Result<(&Path, &[u8])> {
    use std::os::unix::ffi::OsStrExt;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((parent, name.as_bytes())),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "It has no directory around it")),
    }
}

/// Device and inode: which file it is.
pub(super) type Identity = (u64, u64);

/// Which file it is.
pub(super) fn identity(stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino)
}

/// Whether this is a directory.
pub(super) fn is_dir(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// Whether an error only says that something is not there (any more), or is no directory (any more).
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::ESTALE))
}
