//! Metadata of an entry: read on the source, set on the destination in the order that keeps all of
//! it. No content, no names given or taken.

use std::ffi::CString;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{
    self, AtFlags, CWD, FileType, Gid, Mode, Stat, Timespec, Timestamps, UTIME_OMIT, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use super::beneath::{held_in_proc, through_proc};
use super::index::{Entry, Type, XATTR_MOST, XATTRS_MOST, Xattr, travels};

/// The kernel's limit on the list of a file's attribute names.
const NAMES_MOST: usize = 64 << 10;

/// The wire's word for what `stat` is. `None`: a socket, which does not travel.
pub(super) fn type_of(stat: &Stat) -> Option<Type> {
    Some(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Type::File,
        FileType::Directory => Type::Directory,
        FileType::Symlink => Type::Symlink,
        FileType::Fifo => Type::Fifo,
        FileType::CharacterDevice => Type::CharacterDevice,
        FileType::BlockDevice => Type::BlockDevice,
        _ => return None,
    })
}

/// The entry of `name` in `dir`, links and hard links apart. `stat` is what it is.
pub(super) fn describe(
    kind: Type,
    path: &[u8],
    dir: BorrowedFd<'_>,
    name: &[u8],
    stat: &Stat,
) -> io::Result<Entry> {
    let device = matches!(kind, Type::CharacterDevice | Type::BlockDevice);
    Ok(Entry {
        path: path.to_vec(),
        kind: kind.into(),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: stat.st_mtime,
        mtime_ns: stat.st_mtime_nsec as u32,
        size: if kind == Type::File { stat.st_size as u64 } else { 0 },
        target: match kind {
            Type::Symlink => fs::readlinkat(dir, name, Vec::new())?.into_bytes(),
            _ => Vec::new(),
        },
        link: 0,
        major: if device { fs::major(stat.st_rdev) } else { 0 },
        minor: if device { fs::minor(stat.st_rdev) } else { 0 },
        xattrs: read_xattrs(&Named::Last(through_proc(dir, name)?))?,
    })
}

/// A path to what extended attributes are read from; those calls take no bare descriptor.
enum Named {
    /// By a name that is not followed.
    Last(CString),
    /// By the `/proc` entry of a held descriptor, which is followed, and to that very thing only.
    Held(CString),
}

impl Named {
    fn list(&self, into: &mut Vec<u8>, most: usize) -> rustix::io::Result<usize> {
        let room = rustix::buffer::spare_capacity(reserved(into, most));
        match self {
            Self::Last(path) => fs::llistxattr(path, room),
            Self::Held(path) => fs::listxattr(path, room),
        }
    }

    fn get(&self, name: &[u8], into: &mut Vec<u8>) -> rustix::io::Result<usize> {
        let room = rustix::buffer::spare_capacity(reserved(into, XATTR_MOST));
        match self {
            Self::Last(path) => fs::lgetxattr(path, name, room),
            Self::Held(path) => fs::getxattr(path, name, room),
        }
    }
}

/// The extended attributes that travel.
fn read_xattrs(from: &Named) -> io::Result<Vec<Xattr>> {
    let mut xattrs = Vec::new();
    let mut total = 0;
    for name in xattr_names(from)? {
        if !travels(&name) {
            continue;
        }
        let mut value = Vec::new();
        match from.get(&name, &mut value) {
            Ok(_) => {}
            Err(Errno::NODATA) => continue,
            Err(error) => return Err(error.into()),
        }
        value.shrink_to_fit();
        total += name.len() + value.len();
        if total > XATTRS_MOST {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("It has more than {XATTRS_MOST} bytes of extended attributes"),
            ));
        }
        xattrs.push(Xattr { name, value });
    }
    Ok(xattrs)
}

fn xattr_names(from: &Named) -> io::Result<Vec<Vec<u8>>> {
    // Most files have none or a label; the kernel's limit is asked for only when need be.
    let mut list = Vec::new();
    let listed = match from.list(&mut list, 1024) {
        Err(Errno::RANGE) => from.list(&mut list, NAMES_MOST),
        listed => listed,
    };
    match listed {
        Ok(_) => {}
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    }
    let names = list.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(<[u8]>::to_vec).collect())
}

fn reserved(buffer: &mut Vec<u8>, bytes: usize) -> &mut Vec<u8> {
    buffer.clear();
    buffer.reserve(bytes);
    buffer
}

/// Gives what is `held` the owner, mode, attributes and times of `entry`, in this order: a change
/// of owner takes set-user-ID and file capabilities away, and setting an ACL needs the mode first.
/// Gives whether anything had to be changed.
///
/// It goes by the descriptor alone: whoever may write in the directory can put something else, or a
/// link to it, in the place of any name, between a look at it and a change of its mode.
pub(super) fn apply(entry: &Entry, held: BorrowedFd<'_>) -> io::Result<bool> {
    let mut stat = fs::fstat(held)?;
    if type_of(&stat) != Some(entry.kind()) {
        return Err(io::Error::other("Something else took its place meanwhile"));
    }
    let path = held_in_proc(held)?;
    let mut changed = false;
    if (stat.st_uid, stat.st_gid) != (entry.uid, entry.gid) {
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        fs::chownat(CWD, &path, Some(uid), Some(gid), AtFlags::empty())?;
        stat = fs::fstat(held)?;
        changed = true;
    }
    if entry.kind() != Type::Symlink && stat.st_mode & 0o7777 != entry.mode {
        fs::chmodat(CWD, &path, Mode::from_raw_mode(entry.mode), AtFlags::empty())?;
        changed = true;
    }
    changed |= apply_xattrs(entry, held)?;
    if (stat.st_mtime, stat.st_mtime_nsec as u32) != (entry.mtime, entry.mtime_ns) {
        set_mtime(held, entry.mtime, i64::from(entry.mtime_ns))?;
        changed = true;
    }
    Ok(changed)
}

/// Sets the modification time alone.
pub(super) fn set_mtime(held: BorrowedFd<'_>, s: i64, ns: i64) -> io::Result<()> {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: s, tv_nsec: ns },
    };
    Ok(fs::utimensat(CWD, held_in_proc(held)?, &times, AtFlags::empty())?)
}

/// Attributes that the entry lacks go (a directory with a default ACL gives one to what is made in
/// it); labels that the kernel put there by itself stay.
fn apply_xattrs(entry: &Entry, held: BorrowedFd<'_>) -> io::Result<bool> {
    let there = read_xattrs(&Named::Held(held_in_proc(held)?))?;
    if there == entry.xattrs {
        return Ok(false);
    }
    let path = held_in_proc(held)?;
    let mut changed = false;
    for old in &there {
        let label = old.name.starts_with(b"security.") && old.name != b"security.capability";
        if !label && !entry.xattrs.iter().any(|xattr| xattr.name == old.name) {
            fs::removexattr(&path, &old.name).map_err(|error| named(&old.name, error))?;
            changed = true;
        }
    }
    for xattr in entry.xattrs.iter().filter(|xattr| !there.contains(xattr)) {
        fs::setxattr(&path, &xattr.name, &xattr.value, XattrFlags::empty())
            .map_err(|error| named(&xattr.name, error))?;
        changed = true;
    }
    Ok(changed)
}

/// An error that says which attribute it is about. The operating system's code stays with it when
/// the disk is full, because that is told apart.
fn named(name: &[u8], error: Errno) -> io::Error {
    let error = io::Error::from(error);
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => error,
        kind => {
            let name = String::from_utf8_lossy(name);
            io::Error::new(kind, format!("extended attribute {name}: {error}"))
        }
    }
}
