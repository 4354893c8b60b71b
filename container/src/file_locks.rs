//! Locks of files that both hosts of a move have. The source's copy keeps them until the container runs
//! elsewhere, and CRIU would wait for them at the destination without end: they are noted at the source, tried
//! at the destination before anything is touched, and whoever waits for one in a restore is found.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use decamp_shared::workload::{PlacedTree, Storage};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, OFlag, OpenHow, ResolveFlag, fcntl, open, openat2};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use crate::bundle::Bundle;
use crate::mounts;
use crate::obstacles::holders;
use crate::sys::look::file_facts;

/// No more of them travel, or are tried. Those after them are noticed in the restore.
const CAP: usize = 256;

/// A lock that keeps everybody else out, held by a container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldLock {
    /// The file, on the host that the container runs on.
    pub path: PathBuf,
    /// Which kind of lock.
    pub kind: LockKind,
    /// Which process holds it, for people.
    pub who: String,
}

/// Kinds of locks that CRIU waits for when it restores them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LockKind {
    /// Of a whole file, by `flock`.
    Flock,
    /// Of a part of a file, by `fcntl`: of a process (POSIX) or of an open file.
    Record,
    /// A lease for writing, which even opening the file elsewhere breaks.
    Lease,
}

/// The locks of `pids`, of the container whose first process is `init`, that keep others out of files in its
/// bundle and its volumes.
pub(crate) fn held(pids: &[i32], bundle: &Bundle, init: i32) -> Vec<HeldLock> {
    let mut found = BTreeSet::new();
    let mut places = None;
    for holder in holders(pids, init) {
        let (pid, descriptor) = (holder.pid, holder.descriptor);
        let Ok(info) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{descriptor}")) else {
            continue;
        };
        for kind in exclusive(&info) {
            let places = places.get_or_insert_with(|| mounts::sources(bundle, init));
            let open = PathBuf::from(format!("/proc/{pid}/fd/{descriptor}"));
            if let Some(path) = on_host(&holder.link, &open, places) {
                found.insert(HeldLock { path, kind, who: holder.who() });
            }
        }
    }
    found.into_iter().take(CAP).collect()
}

/// The kinds of locks in `info`, the kernel's text on a descriptor, that keep everybody else out.
fn exclusive(info: &str) -> Vec<LockKind> {
    let lock = |line: &str| {
        let mut words = line.strip_prefix("lock:")?.split_ascii_whitespace().skip(1);
        let kind = match words.next()? {
            "FLOCK" => LockKind::Flock,
            "POSIX" | "OFDLCK" => LockKind::Record,
            "LEASE" => LockKind::Lease,
            _ => return None,
        };
        (words.nth(1)? == "WRITE").then_some(kind)
    };
    info.lines().filter_map(lock).collect()
}

/// Where the host has a file that the container sees as `link`, if it is one of `places`: where something is
/// mounted, and from what.
fn on_host(link: &Path, open: &Path, places: &[(PathBuf, PathBuf)]) -> Option<PathBuf> {
    let within = places.iter().filter(|(point, _)| link.starts_with(point));
    let (point, source) = within.max_by_key(|(point, _)| point.components().count())?;
    let below = link.strip_prefix(point).ok()?;
    let path = if below.as_os_str().is_empty() { source.clone() } else { source.join(below) };
    let same = |one: &Path| file_facts(one).map(|facts| (facts.device, facts.inode)).ok();
    // What the container has mounted there itself is another file.
    (same(&path)? == same(open)?).then_some(path)
}

/// Which of `locks` could not be taken here, because whoever has them is seen from here.
pub(crate) fn in_the_way(locks: &[HeldLock], trees: &[PlacedTree]) -> Vec<String> {
    let mut found = Vec::new();
    for lock in locks.iter().take(CAP) {
        let shared = trees.iter().filter(|placed| placed.tree.storage() == Storage::Shared);
        let mut within = shared
            .filter_map(|placed| Some((placed, lock.path.strip_prefix(&placed.tree.path).ok()?)));
        let Some((placed, below)) = within.next() else { continue };
        if is_held(lock.kind, &placed.path, below) {
            found.push(format!(
                "{} has locked {}, which both hosts share: it cannot be locked there too before it is let go \
                 here; have it unlock the file for the move, or copy it with --storage {}=copy",
                lock.who,
                lock.path.display(),
                placed.tree.mounts.first().unwrap_or(&placed.tree.path)
            ));
        }
    }
    found
}

/// Whether somebody has a file locked. What cannot be looked at counts as free.
fn is_held(kind: LockKind, tree: &Path, below: &Path) -> bool {
    let Ok(file) = open_below(tree, below) else { return false };
    let regular = [libc::S_IFREG, libc::S_IFDIR];
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    if !file_facts(&path).is_ok_and(|facts| regular.contains(&facts.kind())) {
        return false;
    }
    if kind == LockKind::Lease {
        return true;
    }
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let Ok(file) = open(&path, flags, Mode::empty()) else { return false };
    match kind {
        LockKind::Flock => {
            // Had for a moment by us, where nobody has it.
            let tried = Flock::lock(file, FlockArg::LockSharedNonblock);
            matches!(tried, Err((_, Errno::EWOULDBLOCK)))
        }
        LockKind::Record | LockKind::Lease => {
            let mut lock = libc::flock {
                l_type: libc::F_RDLCK as i16,
                l_whence: libc::SEEK_SET as i16,
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            };
            let asked = fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock));
            asked.is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
        }
    }
}

fn open_below(tree: &Path, below: &Path) -> nix::Result<OwnedFd> {
    let looking = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let tree = open(tree, looking, Mode::empty())?;
    if below.as_os_str().is_empty() {
        return Ok(tree);
    }
    let how = OpenHow::new().flags(looking | OFlag::O_NOFOLLOW);
    openat2(
        &tree,
        below,
        how.resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS),
    )
}

/// Which of `pids` waits for a lock that somebody else has, and of which file (a device and a number).
pub(crate) fn waiting(pids: &[i32]) -> Option<(i32, String)> {
    let table = fs::read_to_string("/proc/locks").ok()?;
    table.lines().find_map(|line| waiter(line, pids))
}

/// The waiting process of a line such as `4:  -> FLOCK  ADVISORY  WRITE 292 fe:00:1001 0 EOF`.
fn waiter(line: &str, pids: &[i32]) -> Option<(i32, String)> {
    let mut words = line.split_ascii_whitespace().skip(1);
    (words.next()? == "->").then_some(())?;
    let pid = words.nth(3)?.parse().ok()?;
    let file = words.next()?;
    pids.contains(&pid).then(|| (pid, file.to_owned()))
}

/// What `pid` has open of the file that the kernel's table of locks calls `file`.
pub(crate) fn name(pid: i32, file: &str) -> Option<PathBuf> {
    let inode: u64 = file.rsplit(':').next()?.parse().ok()?;
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let mut open = entries.flatten().map(|entry| entry.path());
    let held = open.find(|path| fs::metadata(path).is_ok_and(|facts| facts.ino() == inode))?;
    fs::read_link(held).ok()
}

#[cfg(test)]
mod tests {
    use decamp_shared::workload::FileTree;

    use super::*;

    #[test]
    fn only_what_keeps_others_out_counts() {
        let info = "pos:\t0\nflags:\t02\nlock:\t1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF\n\
            lock:\t2: POSIX  ADVISORY  READ 359 00:13:11691 0 EOF\n\
            lock:\t3: OFDLCK ADVISORY  WRITE -1 00:13:11691 0 EOF\n\
            lock:\t4: LEASE  ACTIVE    WRITE 359 00:13:11691 0 EOF\nlock:\t5: FLOCK\nlock:\n";
        let kinds = [LockKind::Flock, LockKind::Record, LockKind::Lease];
        assert_eq!(exclusive(info), kinds);
    }

    #[test]
    fn who_waits_is_read_at_any_depth() {
        let line = "4:  -> FLOCK  ADVISORY  WRITE 292 fe:00:1001 0 EOF";
        assert_eq!(waiter(line, &[1, 292]), Some((292, "fe:00:1001".to_owned())));
        assert_eq!(waiter(line, &[1]), None);
        let holder = "4: FLOCK  ADVISORY  WRITE 292 fe:00:1001 0 EOF";
        assert_eq!(waiter(holder, &[292]), None);
        assert_eq!(waiter("4: ->", &[292]), None);
    }

    #[test]
    fn a_lock_is_tried_where_the_storage_is_shared() {
        let room = tempfile::tempdir().expect("a directory");
        fs::create_dir(room.path().join("in")).expect("made");
        let path = room.path().join("in/file");
        fs::write(&path, "x").expect("written");
        let there = |storage: Storage| PlacedTree {
            tree: FileTree {
                path: "/srv/data".into(),
                storage: storage.into(),
                ..FileTree::default()
            },
            path: room.path().into(),
        };
        let lock = |path: &str, kind| HeldLock { path: path.into(), kind, who: "It".into() };
        let shared = [there(Storage::Shared)];
        let wanted = [lock("/srv/data/in/file", LockKind::Flock)];
        assert_eq!(in_the_way(&wanted, &shared), [""; 0]);
        let file = fs::File::open(&path).expect("open");
        let held = Flock::lock(file, FlockArg::LockExclusiveNonblock).expect("locked");
        let said = in_the_way(&wanted, &shared);
        assert!(said[0].starts_with("It has locked /srv/data/in/file"), "{said:?}");
        assert_eq!(in_the_way(&wanted, &[there(Storage::Copy)]), [""; 0]);
        // Other kinds are others' business, and nothing leads out of the tree.
        for path in ["/srv/data/in/file", "/srv/data/../data", "/srv/data/none", "/srv/data"] {
            assert_eq!(in_the_way(&[lock(path, LockKind::Record)], &shared), [""; 0]);
        }
        drop(held);
        assert_eq!(in_the_way(&wanted, &shared), [""; 0]);
        let file = fs::OpenOptions::new().write(true).open(&path).expect("open");
        let mut part = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: 0,
            l_start: 3,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLK(&part)).expect("locked");
        let wanted = [lock("/srv/data/in/file", LockKind::Record)];
        assert_eq!(in_the_way(&wanted, &shared).len(), 1);
        part.l_type = libc::F_UNLCK as i16;
        fcntl(&file, FcntlArg::F_OFD_SETLK(&part)).expect("unlocked");
        assert_eq!(in_the_way(&wanted, &shared), [""; 0]);
        let leased = [lock("/srv/data/in/file", LockKind::Lease)];
        assert_eq!(in_the_way(&leased, &shared).len(), 1);
    }
}
