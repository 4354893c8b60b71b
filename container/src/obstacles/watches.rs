//! What epoll and inotify descriptors watch: CRIU has to find it again, by a descriptor or by a path.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::mounts::Mounts;
use super::process::Process;
use super::said::Found;
use crate::sys::look::{self, file_facts};

/// Watches of one descriptor that are looked at; more would take long, and are alike.
const CAP: usize = 2000;

/// Judges what is watched within one container.
pub(crate) struct Watches<'a> {
    mounts: &'a Mounts,
    init: i32,
    /// Mount points that are open.
    open: HashMap<PathBuf, Option<OwnedFd>>,
}

/// One watch of an inotify descriptor.
#[derive(Debug, PartialEq, Eq)]
struct Watch {
    device: (u32, u32),
    inode: u64,
    kind: i32,
    handle: Vec<u8>,
}

impl<'a> Watches<'a> {
    /// For a container whose first process is `init`.
    pub(crate) fn new(mounts: &'a Mounts, init: i32) -> Self {
        Self { mounts, init, open: HashMap::new() }
    }

    /// An inotify descriptor: what it watches must have a path.
    pub(crate) fn inotify(&mut self, process: &Process, number: i32, found: &mut Found) {
        let text = fs::read_to_string(fdinfo(process.pid, number)).unwrap_or_default();
        let lines = text.lines().filter(|line| line.starts_with("inotify wd:"));
        let lost = lines.take(CAP).filter(|line| !self.is_found(line)).count();
        if lost > 0 {
            found.say(
                &process.with_descriptor(number),
                &format!(
                    "{lost} of the files that it watches by inotify cannot be found by a path"
                ),
                "have it stop watching files that were deleted, or restart it",
            );
        }
    }

    /// Whether CRIU finds what one line of fdinfo says is watched. It opens the file by its handle and looks
    /// for its path; where that cannot be done it knows of some directories only.
    fn is_found(&mut self, line: &str) -> bool {
        let Some(watch) = parse(line) else { return false };
        let points: Vec<_> = self.mounts.places(watch.device).map(Path::to_owned).collect();
        let init = self.init;
        for point in points {
            let open = self.open.entry(point).or_insert_with_key(|point| open_mount(init, point));
            let Some(mount) = open else { continue };
            let Ok(file) = look::open_handle(mount.as_fd(), watch.kind, &watch.handle) else {
                continue;
            };
            let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let (facts, link) = (file_facts(&path), fs::read_link(&path));
            let (Ok(facts), Ok(link)) = (facts, link) else { continue };
            if facts.links > 0 && facts.inode == watch.inode && link.is_absolute() {
                return true;
            }
        }
        false
    }
}

/// An epoll descriptor: what it watches must be open in its process still. One that was closed and lives on
/// elsewhere is watched on.
pub(crate) fn epoll(process: &Process, number: i32, numbers: &[i32], found: &mut Found) {
    let path = fdinfo(process.pid, number);
    let all = watched(&path);
    for watched_as in all.iter().filter(|watched| numbers.binary_search(watched).is_err()) {
        // By another number CRIU finds it too, unless that is watched beside it: then it would watch that
        // twice. Where the kernel does not tell, CRIU may know better.
        let is_it = |other: &&i32| {
            look::is_watched(process.pid, **other, number, *watched_as).unwrap_or(true)
        };
        let other = numbers.iter().find(is_it);
        if other.is_some_and(|other| !all.contains(other)) || !watched(&path).contains(watched_as) {
            continue;
        }
        found.say(
            &process.with_descriptor(number),
            &format!(
                "it watches by epoll what was its descriptor {watched_as}, which it has closed and which \
                 is open elsewhere"
            ),
            "restart it: a program should remove from epoll what it closes",
        );
    }
}

/// The numbers under which an epoll descriptor watches.
fn watched(path: &Path) -> Vec<i32> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let numbers = text.lines().filter_map(|line| {
        line.strip_prefix("tfd:")?.split_whitespace().next()?.parse::<i32>().ok()
    });
    numbers.take(CAP).collect()
}

fn fdinfo(pid: i32, number: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/fdinfo/{number}"))
}

/// A mount point of the container, to open handles on.
fn open_mount(init: i32, point: &Path) -> Option<OwnedFd> {
    let below = point.strip_prefix("/").ok()?;
    let root = Path::new("/proc").join(init.to_string()).join("root");
    // Not O_PATH: handles are opened on what is really open. A mount point is a directory or a file.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    open(&root.join(below), flags | OFlag::O_DIRECTORY, Mode::empty()).ok()
}

/// Reads "inotify wd:1 ino:2 sdev:42 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:ab…",
/// all numbers in hexadecimal.
fn parse(line: &str) -> Option<Watch> {
    let word = |name: &str| {
        line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix(':'))
    };
    let number = |name: &str| u64::from_str_radix(word(name)?, 16).ok();
    let device = number("sdev")?;
    let text = word("f_handle")?;
    let bytes = usize::try_from(number("fhandle-bytes")?).ok().filter(|bytes| *bytes <= 128)?;
    let handle = (0..bytes).map(|at| u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok());
    Some(Watch {
        // As the kernel has it: 20 bits for the minor number.
        device: ((device >> 20) as u32, (device & 0xf_ffff) as u32),
        inode: number("ino")?,
        kind: i32::try_from(number("fhandle-type")?).ok()?,
        handle: handle.collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_read() {
        let line = "inotify wd:1 ino:2f sdev:fe00001 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 \
            f_handle:2f0000000a0b0c0d";
        let watch = parse(line).expect("parsed");
        assert_eq!((watch.device, watch.inode, watch.kind), ((254, 1), 0x2f, 1));
        assert_eq!(watch.handle, [0x2f, 0, 0, 0, 0xa, 0xb, 0xc, 0xd]);
        assert_eq!(parse("inotify wd:1 ino:2f sdev:fe00001 mask:2 ignored_mask:0 "), None);
        assert_eq!(parse(&line.replace("bytes:8", "bytes:ff")), None);
    }
}
