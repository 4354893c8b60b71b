//! Numbers of users that keepers run as: one each, of a range that is nobody else's. Nothing on the host belongs to
//! any of them.
//!
//! A number is taken by locking the byte of that place in a file that the keepers of one agent share, and is free
//! again when whoever holds the lock has ended, however that ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use decamp_shared::workload::IdRange;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

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

/// Whose processes there are here, as far as can be seen.
fn users() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let process = |entry: fs::DirEntry| {
        let is_number = entry.file_name().to_str()?.bytes().all(|byte| byte.is_ascii_digit());
        let directory = is_number.then(|| entry.path())?;
        // Directories of those that nobody may look into belong to root.
        let status = fs::read_to_string(directory.join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        line.split_whitespace().next()?.parse().ok()
    };
    entries.filter_map(process).collect()
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
    fn a_user_with_a_process_is_nobodys() {
        let own = nix::unistd::getuid().as_raw();
        assert!(users().contains(&own));
        let dir = tempfile::tempdir().expect("directory");
        let range = IdRange { first: own, last: own };
        take(range, &dir.path().join("ids"), 0).expect_err("it is ours");
    }
}
