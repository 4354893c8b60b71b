//! What stands in a tree on the source, and what changed there since it was looked at last.
//!
//! A file is known by its fingerprint; an unchanged change time means that nothing of it changed.
//! Two things could fool that, and both are closed here. Time stamps have the grain of a clock tick,
//! so an entry whose change time is not clearly older than the scan is *unsettled*, and counts as
//! changed next time whatever its stamps say. And stores through a mapping stamp a file only when a
//! clean page turns dirty, so the file systems are synced before the scan: that makes every page
//! clean, and the next store to it leaves a stamp. File systems without writeback (tmpfs) have no
//! clean pages: their regular files stay unsettled, so each of them goes again in the stop.

use std::collections::HashMap;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{self, Mode, OFlags, Stat};

use super::attributes::{describe, type_of};
use super::beneath::{Root, Visit, is_dir, is_gone};
use super::error::{Doing, FileError, Result};
use super::index::{ENTRIES_MOST, Entry, Type};

/// How much older than the scan a change time must be to be trusted: more than a tick of the
/// coarsest clock that stamps files.
const GRAIN_NS: i128 = 20_000_000;

/// What tells two states of an entry apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fingerprint {
    device: u64,
    inode: u64,
    changed: (i64, i64),
    modified: (i64, i64),
    size: i64,
    mode: u32,
    owner: (u32, u32),
}

impl Fingerprint {
    fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            changed: (stat.st_ctime, stat.st_ctime_nsec as i64),
            modified: (stat.st_mtime, stat.st_mtime_nsec as i64),
            size: stat.st_size,
            mode: stat.st_mode,
            owner: (stat.st_uid, stat.st_gid),
        }
    }
}

/// One entry as it was when it was sent last.
#[derive(Clone, Copy, Debug)]
struct Known {
    print: Fingerprint,
    settled: bool,
    /// Number of the scan that saw it last.
    seen: u32,
}

/// A tree as it was when it was sent last.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    known: HashMap<Vec<u8>, Known>,
    scans: u32,
}

/// What is to be sent.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Directories before what is in them.
    pub(super) entries: Vec<Entry>,
    /// Paths that are gone.
    pub(super) removed: Vec<Vec<u8>>,
}

impl Snapshot {
    /// Everything in the tree. `live`: something may be writing in it.
    pub(super) fn first(root: &Root, live: bool) -> Result<(Self, Scan)> {
        let mut snapshot = Self::default();
        let begun = now_ns();
        let mut gathering = Gathering::default();
        let mut stamping = HashMap::new();
        root.walk(|visit| {
            guard_device(visit)?;
            if live && (visit.device.is_some() || visit.path.is_empty()) {
                sync(visit)?;
            }
            if !gathering.add(visit)? {
                return Ok(());
            }
            let print = Fingerprint::of(visit.stat);
            let changed = i128::from(print.changed.0) * 1_000_000_000 + i128::from(print.changed.1);
            let settled =
                !live || (changed < begun - GRAIN_NS && stamps_stores(visit, &mut stamping));
            snapshot.known.insert(visit.path.to_vec(), Known { print, settled, seen: 0 });
            Ok(())
        })?;
        Ok((snapshot, gathering.scan))
    }

    /// What changed since this was taken; the workload stands still. Whatever is sent now stays
    /// unsettled, because nothing was synced.
    pub(super) fn changes(&mut self, root: &Root) -> Result<Scan> {
        self.scans += 1;
        let mut gathering = Gathering::default();
        let mut same_links: HashMap<(u64, u64), Vec<Vec<u8>>> = HashMap::new();
        let mut seen = 0;
        root.walk(|visit| {
            let print = Fingerprint::of(visit.stat);
            let linked = visit.stat.st_nlink > 1 && !is_dir(visit.stat);
            match self.known.get_mut(visit.path) {
                Some(known) if known.settled && known.print == print => {
                    known.seen = self.scans;
                    seen += 1;
                    if linked {
                        let inode = (print.device, print.inode);
                        same_links.entry(inode).or_default().push(visit.path.to_vec());
                    }
                    return Ok(());
                }
                _ => {}
            }
            guard_device(visit)?;
            if gathering.add(visit)? {
                seen += 1;
                let known = Known { print, settled: false, seen: self.scans };
                self.known.insert(visit.path.to_vec(), known);
            }
            Ok(())
        })?;
        // All names of one file go together, or the destination would make two files of them.
        let torn: Vec<_> = same_links
            .into_iter()
            .filter(|(inode, _)| gathering.leaders.contains_key(inode))
            .flat_map(|(_, paths)| paths)
            .collect();
        for path in torn {
            gathering.add_again(root, &path)?;
        }
        let mut removed = Vec::new();
        if seen != self.known.len() {
            let scans = self.scans;
            removed = self
                .known
                .extract_if(|_, known| known.seen != scans)
                .map(|(path, _)| path)
                .collect();
            removed.sort_unstable();
        }
        Ok(Scan { removed, ..gathering.scan })
    }

    /// Entry `number` of a scan could not be sent because it vanished: whatever is found there
    /// next time is new, under each of its names.
    pub(super) fn forget(&mut self, entries: &[Entry], number: usize) {
        self.known.remove(&entries[number].path);
        for entry in entries.iter().filter(|entry| entry.leader() == Some(number)) {
            self.known.remove(&entry.path);
        }
    }
}

/// Entries that are being gathered, hard links told apart from first names.
#[derive(Default)]
pub(super) struct Gathering {
    pub(super) scan: Scan,
    /// First name of each file with several.
    leaders: HashMap<(u64, u64), u32>,
}

impl Gathering {
    /// False: it does not travel, or vanished.
    pub(super) fn add(&mut self, visit: &Visit<'_>) -> Result<bool> {
        let Some(kind) = type_of(visit.stat) else {
            let path = visit.root.shown(visit.path);
            tracing::debug!(path = %path.display(), "A socket does not travel");
            return Ok(false);
        };
        let mut entry = match describe(kind, visit.path, visit.dir, visit.name, visit.stat) {
            Ok(entry) => entry,
            Err(error) if is_gone(&error) => return Ok(false),
            // A link that became something else while it was read: next time.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(false),
            Err(error) => {
                return Err(error).doing("read the attributes of", &visit.root.shown(visit.path));
            }
        };
        if kind == Type::File && visit.stat.st_nlink > 1 {
            let inode = (visit.stat.st_dev, visit.stat.st_ino);
            let number = self.scan.entries.len() as u32;
            match self.leaders.get(&inode) {
                Some(leader) => {
                    entry.link = leader + 1;
                    // It may have grown since its first name was looked at.
                    entry.size = self.scan.entries[*leader as usize].size;
                }
                None => {
                    self.leaders.insert(inode, number);
                }
            }
        }
        if self.scan.entries.len() >= ENTRIES_MOST {
            return Err(FileError::Unsendable {
                path: visit.root.shown(b""),
                what: format!("it has more than {ENTRIES_MOST} entries"),
            });
        }
        self.scan.entries.push(entry);
        Ok(true)
    }

    /// Adds an entry that did not change by itself.
    fn add_again(&mut self, root: &Root, path: &[u8]) -> Result<()> {
        let (parent, name) = root.locate(path);
        let again = || -> io::Result<_> {
            let dir = root.open_dir(parent)?;
            let stat = super::beneath::stat_at(std::os::fd::AsFd::as_fd(&dir), name)?;
            Ok((dir, stat))
        };
        let (dir, stat) = again().doing("look again at", &root.shown(path))?;
        let dir = std::os::fd::AsFd::as_fd(&dir);
        self.add(&Visit { root, path, dir, name, stat: &stat, device: None }).map(drop)
    }
}

/// Refuses a file system that the kernel makes up: it is no content of a workload.
pub(super) fn guard_device(visit: &Visit<'_>) -> Result<()> {
    if visit.device.is_none() || !is_dir(visit.stat) {
        return Ok(());
    }
    let path = || visit.root.shown(visit.path);
    let dir = match visit.root.open_dir(visit.path) {
        Ok(dir) => dir,
        Err(error) if is_gone(&error) => return Ok(()),
        Err(error) => return Err(error).doing("open", &path()),
    };
    let kind = fs::fstatfs(&dir).doing("look at the file system of", &path())?.f_type;
    match KERNEL_MADE.iter().find(|(magic, _)| i128::from(*magic) == i128::from(kind)) {
        Some((_, name)) => Err(FileError::Unsendable {
            path: path(),
            what: format!("a {name} file system is mounted there; unmount it first"),
        }),
        None => Ok(()),
    }
}

/// File systems that hold nothing of their own (`linux/magic.h`).
const KERNEL_MADE: [(u32, &str); 12] = [
    (0x9fa0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x1cd1, "devpts"),
    (0x27_e0eb, "cgroup"),
    (0x6367_7270, "cgroup2"),
    (0x1980_0202, "mqueue"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0xcafe_4a11, "bpf"),
    (0x6265_6570, "configfs"),
    (0x0187, "autofs"),
];

/// File systems whose pages are never clean, because there is no disk to write them to: a store
/// through a mapping leaves no stamp there, however long ago the last one was.
const WITHOUT_WRITEBACK: [u32; 3] = [
    0x0102_1994, // tmpfs
    0x8584_58f6, // ramfs
    0x9584_58f6, // hugetlbfs
];

/// Whether a store to a synced entry stamps it. `known` remembers it by device.
fn stamps_stores(visit: &Visit<'_>, known: &mut HashMap<u64, bool>) -> bool {
    if type_of(visit.stat) != Some(Type::File) {
        return true;
    }
    if let Some(known) = known.get(&visit.stat.st_dev) {
        return *known;
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let kind = fs::openat(visit.dir, visit.name, flags, Mode::empty()).and_then(fs::fstatfs);
    // What is gone by now is new next time.
    let Ok(kind) = kind else { return false };
    let stamps = !WITHOUT_WRITEBACK.contains(&(kind.f_type as u32));
    known.insert(visit.stat.st_dev, stamps);
    stamps
}

fn sync(visit: &Visit<'_>) -> Result<()> {
    let dir = if is_dir(visit.stat) {
        visit.root.open_dir(visit.path)
    } else {
        visit.dir.try_clone_to_owned()
    };
    match dir {
        Ok(dir) => fs::syncfs(&dir).doing("sync", &visit.root.shown(visit.path)),
        Err(error) if is_gone(&error) => Ok(()),
        Err(error) => Err(error).doing("open", &visit.root.shown(visit.path)),
    }
}

fn now_ns() -> i128 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_nanos() as i128,
        Err(before) => -(before.duration().as_nanos() as i128),
    }
}
