//! Questions about places on this host's disks, asked before anything is touched: how much a tree
//! holds, how much room there is, whether a tree can stand somewhere, and whether two hosts mean the
//! very same place.

use std::ffi::OsString;
use std::fs::{self as std_fs, OpenOptions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{self, StatVfsMountFlags};
use sha2::{Digest, Sha256};

use super::beneath::Root;
use super::error::{Doing, Result};
use super::scan::guard_device;
use crate::workload::{FileRole, FileTree, is_plain_absolute};

/// Begins every probe's name.
const PREFIX: &str = ".decamp-probe-";
/// Random hexadecimal digits in a probe's name.
const RANDOM: usize = 32;
/// Hexadecimal digits of the tree's own name, hashed, in a probe's name.
const NAME: usize = 16;
/// In the place of those, for a probe in the directory itself.
const INSIDE: &str = "0000000000000000";
/// Begins what stands for a probe where none can be left.
const LOOK: &str = ".decamp-look-";
/// Entries of a directory that its look is made of, at most.
const LOOKED_AT: usize = 4096;

/// Bytes of content in the tree at `path`: the sizes of its files, each counted once however many
/// names it has.
///
/// # Errors
/// When the tree cannot be read, or holds what cannot travel.
pub fn tree_bytes(path: &Path) -> Result<u64> {
    let mut total = 0;
    let mut counted = std::collections::HashSet::new();
    Root::open(path)?.walk(|visit| {
        guard_device(visit)?;
        let file = fs::FileType::from_raw_mode(visit.stat.st_mode) == fs::FileType::RegularFile;
        let identity = (visit.stat.st_dev, visit.stat.st_ino);
        if file && (visit.stat.st_nlink == 1 || counted.insert(identity)) {
            total += visit.stat.st_size as u64;
        }
        Ok(())
    })?;
    Ok(total)
}

/// Bytes that can still be written at `path`, or where it would be made.
///
/// # Errors
/// When the file system cannot be asked.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = fs::statvfs(nearest(path))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Why `tree` cannot land at `path` on this host; `None` when it can. `keep_equal`: what stands
/// there is an earlier copy of it. A single file that stands there already is no reason, because
/// its content may be the same.
pub fn check_place(tree: &FileTree, path: &Path, keep_equal: bool) -> Option<String> {
    if !is_plain_absolute(path) || path.file_name().is_none() {
        return Some(format!("{} is not a plain absolute path", path.display()));
    }
    let there = std_fs::symlink_metadata(path).ok();
    let Some(there) = there else {
        return check_around(path);
    };
    let single = matches!(tree.role(), FileRole::VolumeFile | FileRole::Disk);
    if single && (tree.live || keep_equal) {
        // One that is written must not be somebody else's.
        return match there.is_file() {
            true if keep_equal => check_writable(path),
            _ => Some(format!(
                "{} exists, and is no earlier copy of this workload's file",
                path.display()
            )),
        };
    }
    if single || matches!(tree.role(), FileRole::Kernel | FileRole::Initrd) {
        let file = std_fs::metadata(path).is_ok_and(|meta| meta.is_file());
        return (!file).then(|| format!("{} exists and is not a file", path.display()));
    }
    if !there.is_dir() {
        return Some(format!("{} exists and is not a directory", path.display()));
    }
    if !keep_equal {
        match std_fs::read_dir(path).map(|mut entries| entries.next().is_some()) {
            Ok(false) => {}
            Ok(true) => {
                return Some(format!(
                    "{} exists, is not empty, and is no earlier copy of this workload's files",
                    path.display()
                ));
            }
            Err(error) => return Some(format!("{} cannot be read: {error}", path.display())),
        }
    }
    check_mounts(path).or_else(|| check_writable(path))
}

/// Bringing an earlier copy up to date removes what the source lacks: never from what somebody
/// mounted in it.
fn check_mounts(path: &Path) -> Option<String> {
    let found = path
        .canonicalize()
        .and_then(|real| Ok(mounted_below(&real, &std_fs::read("/proc/self/mountinfo")?)));
    match found {
        Ok(None) => None,
        Ok(Some(mount)) => Some(format!(
            "Something is mounted at {}, within what is to be brought up to date: unmount it first",
            mount.display()
        )),
        Err(error) => {
            Some(format!("What is mounted below {} cannot be found out: {error}", path.display()))
        }
    }
}

/// The first mount point of `mountinfo` (proc_pid_mountinfo(5)) that is below `path`.
fn mounted_below(path: &Path, mountinfo: &[u8]) -> Option<PathBuf> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let points = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4)).map(unescaped);
    points.map(PathBuf::from).find(|point| point != path && point.starts_with(path))
}

/// The kernel writes blanks and backslashes as a backslash and three octal digits.
fn unescaped(mut text: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(text.len());
    while let [first, rest @ ..] = text {
        match text {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] => {
                plain.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
                text = after;
            }
            _ => {
                plain.push(*first);
                text = rest;
            }
        }
    }
    OsString::from_vec(plain)
}

fn check_around(path: &Path) -> Option<String> {
    let around = nearest(path);
    if !std_fs::metadata(around).is_ok_and(|meta| meta.is_dir()) {
        return Some(format!(
            "{} cannot be made: {} is not a directory",
            path.display(),
            around.display()
        ));
    }
    check_writable(around)
}

fn check_writable(path: &Path) -> Option<String> {
    match fs::statvfs(path) {
        Ok(stat) if stat.f_flag.contains(StatVfsMountFlags::RDONLY) => {
            Some(format!("{} is on a read-only file system", path.display()))
        }
        Ok(_) => None,
        Err(error) => {
            Some(format!("The file system of {} does not answer: {error}", path.display()))
        }
    }
}

/// `path` or the nearest directory around it that exists.
fn nearest(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.symlink_metadata().is_ok()).unwrap_or(Path::new("/"))
}

/// An empty hidden file beside a tree, or in it, for as long as this lives: the other host looks for it
/// to find out whether both mean the very same place.
#[derive(Debug)]
pub struct Probe {
    path: PathBuf,
    name: String,
    /// Of the directory that it is in, to be put back.
    modified: Option<std::time::SystemTime>,
}

impl Probe {
    /// Leaves a probe beside the tree at `path`.
    ///
    /// # Errors
    /// When nothing can be written there: then go without.
    pub fn create(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let (Some(parent), Some(mark)) = (path.parent(), mark(&path)) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "It has no directory around it",
            ));
        };
        Self::leave(parent, &mark, None)
    }

    /// Leaves a probe in the directory at `path`, which may be the root of a file system. Its modification
    /// time is put back in the end.
    ///
    /// # Errors
    /// When nothing can be written there.
    pub fn inside(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let modified = std_fs::metadata(&path)?.modified().ok();
        Self::leave(&path, INSIDE, modified)
    }

    fn leave(
        directory: &Path,
        mark: &str,
        modified: Option<std::time::SystemTime>,
    ) -> io::Result<Self> {
        let name = format!("{PREFIX}{:032x}-{mark}", rand::random::<u128>());
        let path = directory.join(&name);
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Self { path, name, modified })
    }

    /// What the other host must look for.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if let Err(error) = std_fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "Cannot remove a probe");
        }
        if let (Some(modified), Some(parent)) = (self.modified, self.path.parent())
            && let Err(error) = std_fs::File::open(parent).and_then(|it| it.set_modified(modified))
        {
            tracing::debug!(path = %parent.display(), %error, "Cannot put a time back");
        }
    }
}

/// What the tree at `path` looks like, to be held against what another host sees: for what cannot be
/// written, and so has no room for a probe. Two hosts that see the same have the same inodes and times
/// to the nanosecond. Nothing for a directory that holds too much.
///
/// # Errors
/// When it cannot be read.
pub fn look_of(path: &Path) -> io::Result<Option<String>> {
    let mut sum = Sha256::new();
    let mut add = |name: &[u8], meta: &std_fs::Metadata| {
        sum.update((name.len() as u64).to_le_bytes());
        sum.update(name);
        for number in [
            meta.ino(),
            u64::from(meta.mode()),
            meta.size(),
            meta.mtime() as u64,
            meta.mtime_nsec() as u64,
            meta.ctime() as u64,
            meta.ctime_nsec() as u64,
        ] {
            sum.update(number.to_le_bytes());
        }
    };
    let root = std_fs::metadata(path)?;
    add(b"", &root);
    if root.is_dir() {
        let mut entries = Vec::new();
        for entry in std_fs::read_dir(path)? {
            if entries.len() == LOOKED_AT {
                return Ok(None);
            }
            let entry = entry?;
            entries.push((entry.file_name(), entry.metadata()?));
        }
        entries.sort_by(|one, other| one.0.cmp(&other.0));
        entries.iter().for_each(|(name, meta)| add(name.as_bytes(), meta));
    }
    let sum = sum.finalize();
    Ok(Some(sum.iter().fold(LOOK.to_owned(), |text, byte| format!("{text}{byte:02x}"))))
}

/// Whether the tree at `path` on this host looks as a peer said with [`look_of`].
pub fn looks_the_same(path: &Path, look: &str) -> bool {
    look.starts_with(LOOK) && look_of(path).is_ok_and(|ours| ours.as_deref() == Some(look))
}

/// Whether the directory at `path` on this host is the very one that a peer left a probe in. False for
/// a name that is no such probe's.
pub fn has_probe(path: &Path, probe_name: &str) -> bool {
    let is_probe = parts_of(probe_name).is_some_and(|mark| mark == INSIDE);
    is_probe && is_there(&path.join(probe_name))
}

/// Whether `path`, which may not exist, is in a directory that a peer left a probe in.
pub fn is_within_probed(path: &Path, probe_name: &str) -> bool {
    path.ancestors().skip(1).any(|above| has_probe(above, probe_name))
}

/// Has all that was written to the file system of `path` stored, so that other hosts see it.
///
/// # Errors
/// When it cannot be opened, or not all of it could be written.
pub fn settle(path: &Path) -> Result<()> {
    let file = std_fs::File::open(path).doing("open", path)?;
    fs::syncfs(&file).doing("sync", path)
}

/// Whether the tree at `tree_path` on this host is the very one that a peer left a probe beside.
/// False for a name that is no probe's.
pub fn is_same_place(tree_path: &Path, probe_name: &str) -> bool {
    // The probe stands beside what the path leads to, on either side.
    let real = tree_path.canonicalize();
    let path = real.as_deref().unwrap_or(tree_path);
    let named = parts_of(probe_name).is_some_and(|name| mark(path).as_deref() == Some(name));
    named && path.parent().is_some_and(|parent| is_there(&parent.join(probe_name)))
}

/// The mark in a probe's name; nothing for another name.
fn parts_of(probe_name: &str) -> Option<&str> {
    let (random, mark) = probe_name.strip_prefix(PREFIX)?.split_once('-')?;
    let hex = |text: &str, digits| {
        text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    (hex(random, RANDOM) && hex(mark, NAME)).then_some(mark)
}

fn is_there(probe: &Path) -> bool {
    probe.symlink_metadata().is_ok_and(|meta| meta.is_file() && meta.size() == 0)
}

/// Tells trees in one directory apart without saying their names.
fn mark(path: &Path) -> Option<String> {
    let sum = Sha256::digest(path.file_name()?.as_bytes());
    Some(sum.iter().take(NAME / 2).map(|byte| format!("{byte:02x}")).collect())
}
