//! Numbers of users that keepers run as: one each, of a range that is nobody else's. Nothing on the host belongs to
//! any of them.
//!
//! A number is taken by locking the byte of that place in a file that the keepers of one agent share, and is free
//! again when whoever holds the lock has ended, however that ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use decamp_shared::workload::IdRange;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::{major, minor};
use nix::unistd::Pid;

use crate::sys::process::{kill_held, pidfd_open};

/// Takes a number of `range` that nobody has, by a lock in `file`; the first that is tried is chosen by `seed`, so
/// that agents that do not share that file seldom want the same.
///
/// # Errors
/// When all are taken, or the file cannot be locked.
pub(crate) fn take(range: IdRange, file: &Path, seed: u64) -> io::Result<(u32, OwnedFd)> {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).mode(0o600).open(file)?;
    let count = u64::from(range.count());
    let others = users();
    for number in 0..count {
        let id = range.first + (seed.wrapping_add(number) % count) as u32;
        let lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: i64::from(id),
            l_len: 1,
            l_pid: 0,
        };
        if others.contains(&id) {
            continue;
        }
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => return Ok((id, file.into())),
            Err(Errno::EAGAIN | Errno::EACCES) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::other(format!("all {count} users from {} are taken", range.first)))
}

/// The first of `paths` whose file system asks who it is also of those who have a file open already: it does not even
/// tell another user than the one that opened it how long the file is.
pub(crate) fn asked_who<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Option<&'a Path> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let asking: Vec<&str> = mountinfo.lines().filter_map(asking).collect();
    paths.into_iter().find(|path| {
        let found = fs::metadata(path).ok().or_else(|| fs::metadata(path.parent()?).ok());
        let device = found.map(|found| format!("{}:{}", major(found.dev()), minor(found.dev())));
        device.is_some_and(|device| asking.contains(&&*device))
    })
}

/// The device of a line of `mountinfo` (proc_pid_mountinfo(5)), if it is such a file system's.
fn asking(line: &str) -> Option<&str> {
    let (left, right) = line.split_once(" - ")?;
    let device = left.split(' ').nth(2)?;
    let mut words = right.split(' ');
    let kind = words.next()?;
    let mut options = words.nth(1)?.split(',');
    let asks = match kind {
        "nfs" | "nfs4" => options.any(|option| option.starts_with("sec=krb5")),
        "cifs" | "smb3" => options.any(|option| option == "multiuser"),
        _ => kind.starts_with("fuse") && !options.any(|option| option == "allow_other"),
    };
    asks.then_some(device)
}

/// Ends all that still runs as `user`, which is the number of a keeper that has ended, held until then: a VMM that its
/// guest had taken over may have left processes behind.
pub(crate) fn end_all_of(user: u32) {
    /// It may make others meanwhile.
    const TRIES: usize = 100;
    for _ in 0..TRIES {
        let mut left = processes().filter(|(_, one)| one.user == user && !one.is_over).peekable();
        if left.peek().is_none() {
            return;
        }
        for (process, _) in left {
            // Of this very process, if it is that user's once there is a descriptor of it.
            let Ok(held) = pidfd_open(process) else { continue };
            if Seen::of(process).is_some_and(|one| one.user == user)
                && let Err(error) = kill_held(held.as_fd())
            {
                tracing::warn!(%error, %process, "Cannot end what a keeper left behind");
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    tracing::warn!(user, "There is no end to what a keeper left behind");
}

/// A process, as far as it can be seen.
struct Seen {
    user: u32,
    /// It has ended, and nobody asked how.
    is_over: bool,
}

impl Seen {
    fn of(process: Pid) -> Option<Self> {
        // Directories of those that nobody may look into belong to root.
        let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let word = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()
        };
        // A first thread that has ended alone looks the same, but for the others.
        let is_over = word("State:") == Some("Z") && matches!(word("Threads:"), Some("0" | "1"));
        Some(Self { user: word("Uid:")?.parse().ok()?, is_over })
    }
}

/// Those that there are here.
fn processes() -> impl Iterator<Item = (Pid, Seen)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let process = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?);
        Some((process, Seen::of(process)?))
    })
}

/// Whose processes there are here, as far as can be seen.
fn users() -> Vec<u32> {
    processes().map(|(_, one)| one.user).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_has_what_another_has_until_that_is_gone() {
        let dir = tempfile::tempdir().expect("directory");
        let file = dir.path().join("ids");
        let range = IdRange { first: 1_900_000_000, last: 1_900_000_002 };
        let (first, held) = take(range, &file, 7).expect("a number");
        assert_eq!(first, 1_900_000_001);
        let (second, _held) = take(range, &file, 7).expect("another");
        let (third, _also) = take(range, &file, 7).expect("another");
        assert_eq!([second, third], [1_900_000_002, 1_900_000_000]);
        let error = take(range, &file, 7).expect_err("all are taken").to_string();
        assert!(error.contains("all 3 users"), "{error}");
        drop(held);
        assert_eq!(take(range, &file, 0).expect("it is free again").0, first);
    }

    #[test]
    fn file_systems_that_ask_who_it_is_are_known() {
        let on = |rest: &str| {
            asking(&format!("36 35 0:98 / /mnt rw,noatime shared:1 - {rest}")).is_some()
        };
        assert!(on("fuse.sshfs host:/srv rw,user_id=0,group_id=0"));
        assert!(!on("fuse.glusterfs host:/srv rw,user_id=0,allow_other"));
        assert!(on("nfs4 host:/srv rw,vers=4.2,sec=krb5p,addr=10.0.0.1"));
        assert!(!on("nfs4 host:/srv rw,vers=4.2,sec=sys,addr=10.0.0.1"));
        assert!(on("cifs //host/srv rw,multiuser") && !on("cifs //host/srv rw"));
        assert!(!on("ext4 /dev/vda1 rw") && !on("ext4"));
        assert_eq!(asking("36 35 0:98 / /mnt rw - fuse.sshfs x rw"), Some("0:98"));
        let dir = tempfile::tempdir().expect("directory");
        assert_eq!(asked_who([dir.path(), &*dir.path().join("none")]), None);
    }

    #[test]
    fn a_user_with_a_process_is_nobodys() {
        let own = nix::unistd::getuid().as_raw();
        assert!(users().contains(&own));
        let dir = tempfile::tempdir().expect("directory");
        let range = IdRange { first: own, last: own };
        take(range, &dir.path().join("ids"), 0).expect_err("it is ours");
    }

    #[test]
    fn what_a_user_left_behind_ends_and_nothing_else() {
        use std::os::unix::process::{CommandExt, ExitStatusExt};
        let sleeper = |user: u32| {
            let mut command = std::process::Command::new("sleep");
            command.arg("1000").uid(user).spawn().expect("started, for which the tests run as root")
        };
        let (one, other) = (1_900_000_007, 1_900_000_008);
        let (mut left, mut stays) = (sleeper(one), sleeper(other));
        end_all_of(one);
        assert_eq!(left.wait().expect("ended").signal(), Some(libc::SIGKILL));
        assert!(stays.try_wait().expect("looked").is_none(), "that is another's");
        stays.kill().and_then(|()| stays.wait()).expect("ended");
    }
}
