//! What is on a tmpfs: read by descriptors, without following a link, while a container runs (its large
//! files alone) and when it stands still (all of it).

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use decamp_shared::pages::PAGE_SIZE;
use decamp_shared::sparse;
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, llistxattr, openat, readlinkat, statat,
};
use rustix::io::Errno;

use super::{Attribute, Data, ENTRIES_CAP, Entry, travels};
use crate::images::PAGE_LIMIT;

/// Smaller files travel in the stop.
const SMALL: u64 = 256 << 10;
/// What travels in the stop of one tmpfs is no more than this; CRIU has the rest.
const CONTENTS_CAP: u64 = 256 << 20;
/// Directories within directories.
const DEPTH: usize = 128;
/// Bytes of the names, and of each value, of extended attributes: the kernel's limits.
const ATTRIBUTES: usize = 64 << 10;

/// A large file.
pub(crate) struct Large {
    pub(crate) inode: u64,
    /// Below the mount, for people.
    pub(crate) path: String,
    /// Open to be read.
    pub(crate) file: File,
}

/// Something in a directory.
struct Item<'a> {
    parent: u32,
    directory: BorrowedFd<'a>,
    /// Below the mount.
    above: &'a str,
    name: &'a CStr,
    stat: &'a Stat,
}

/// Large files on the tmpfs whose root is `root`. What changes meanwhile may be missed.
pub(super) fn large(root: BorrowedFd<'_>, device: u64) -> io::Result<Vec<Large>> {
    let mut found: BTreeMap<u64, Large> = BTreeMap::new();
    walk(root, device, &mut |item| {
        let size = item.stat.st_size as u64;
        let kind = kind(item.stat)?;
        let fits = (SMALL..=PAGE_LIMIT * PAGE_SIZE as u64).contains(&size);
        let inode = item.stat.st_ino;
        if kind == FileType::RegularFile && fits && !found.contains_key(&inode) {
            let path = format!("{}/{}", item.above, item.name.to_string_lossy());
            match item.open() {
                Ok(file) => drop(found.insert(inode, Large { inode, path, file })),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    })?;
    Ok(found.into_values().collect())
}

/// All that is on it, while nobody writes.
pub(super) fn entries(
    root: BorrowedFd<'_>,
    device: u64,
    space_of: impl Fn(u64) -> Option<u32>,
) -> io::Result<Vec<Entry>> {
    let mut found = vec![entry(0, &[], &fstat(root)?)];
    found[0].attributes = attributes(&format!("/proc/self/fd/{}/.", root.as_raw_fd()))?;
    let mut links: BTreeMap<u64, u32> = BTreeMap::new();
    let mut room = CONTENTS_CAP;
    walk(root, device, &mut |item| {
        let mut entry = entry(item.parent, item.name.to_bytes(), item.stat);
        let at = found.len() as u32;
        match kind(item.stat)? {
            FileType::RegularFile => {
                entry.size = item.stat.st_size as u64;
                entry.same_as = links.get(&item.stat.st_ino).copied();
                if entry.same_as.is_none() {
                    links.insert(item.stat.st_ino, at);
                    entry.space = space_of(item.stat.st_ino);
                    if entry.space.is_none() {
                        entry.data = contents(&item.open()?, &mut room)?;
                    }
                }
            }
            FileType::Symlink => {
                entry.target = readlinkat(item.directory, item.name, Vec::new())?.into_bytes();
            }
            _ => {}
        }
        let path = format!("/proc/self/fd/{}/", item.directory.as_raw_fd());
        let path = [path.as_bytes(), item.name.to_bytes()].concat();
        entry.attributes = attributes(&path[..])?;
        found.push(entry);
        Ok(())
    })?;
    Ok(found)
}

/// Calls `visit` for all below `root`, each directory before what is in it. Sockets are left out: whoever
/// bound one is dumped with it.
fn walk(
    root: BorrowedFd<'_>,
    device: u64,
    visit: &mut dyn FnMut(Item<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let mut count = 0;
    walk_below(root, device, (0, ""), &mut count, DEPTH, visit)
}

fn walk_below(
    directory: BorrowedFd<'_>,
    device: u64,
    (parent, above): (u32, &str),
    count: &mut u32,
    depth: usize,
    visit: &mut dyn FnMut(Item<'_>) -> io::Result<()>,
) -> io::Result<()> {
    for found in Dir::read_from(directory)? {
        let found = found?;
        let name = found.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat?,
        };
        let kind = kind(&stat)?;
        if kind == FileType::Socket {
            continue;
        }
        *count += 1;
        let ours = *count;
        if ours as usize >= ENTRIES_CAP || depth == 0 || stat.st_dev != device {
            return Err(io::Error::other("It holds more than is moved by file"));
        }
        visit(Item { parent, directory, above, name, stat: &stat })?;
        if kind == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let below = match openat(directory, name, flags, Mode::empty()) {
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                below => below?,
            };
            let path = format!("{above}/{}", name.to_string_lossy());
            walk_below(below.as_fd(), device, (ours, &path), count, depth - 1, visit)?;
        }
    }
    Ok(())
}

impl Item<'_> {
    /// Opens the file that it is, for reading.
    fn open(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY
            | OFlags::NOFOLLOW
            | OFlags::NOATIME
            | OFlags::NONBLOCK
            | OFlags::NOCTTY
            | OFlags::CLOEXEC;
        let opened = openat(self.directory, self.name, flags, Mode::empty())?;
        let found = fstat(&opened)?;
        if (found.st_dev, found.st_ino) != (self.stat.st_dev, self.stat.st_ino) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(opened.into())
    }
}

/// What kind of thing it is, of those that are moved.
fn kind(stat: &Stat) -> io::Result<FileType> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice | FileType::BlockDevice | FileType::Unknown => {
            Err(io::Error::other("It has devices"))
        }
        kind => Ok(kind),
    }
}

fn entry(parent: u32, name: &[u8], stat: &Stat) -> Entry {
    Entry {
        parent,
        name: name.to_vec(),
        mode: stat.st_mode,
        owner: stat.st_uid,
        group: stat.st_gid,
        written: stat.st_mtime,
        written_more: stat.st_mtime_nsec as u32,
        ..Entry::default()
    }
}

/// What a file holds, without its holes.
fn contents(file: &File, room: &mut u64) -> io::Result<Vec<Data>> {
    let mut found = Vec::new();
    for piece in sparse::Data::of(file) {
        let Range { start, end } = piece?;
        let length = end - start;
        *room = room.checked_sub(length).ok_or_else(|| {
            io::Error::other("It holds more in small files than is moved by file")
        })?;
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, start)?;
        found.push(Data { offset: start, bytes });
    }
    Ok(found)
}

/// The extended attributes that travel, of what is at `path`, whose last part is not followed.
fn attributes(path: impl rustix::path::Arg + Copy) -> io::Result<Vec<Attribute>> {
    let mut names = Vec::with_capacity(ATTRIBUTES);
    match llistxattr(path, rustix::buffer::spare_capacity(&mut names)) {
        Ok(_) => {}
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(errno) => return Err(errno.into()),
    }
    let mut found = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| travels(name)) {
        let mut value = Vec::with_capacity(ATTRIBUTES);
        rustix::fs::lgetxattr(path, name, rustix::buffer::spare_capacity(&mut value))?;
        found.push(Attribute { name: name.to_vec(), value });
    }
    Ok(found)
}
