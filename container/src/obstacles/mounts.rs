//! Mounts of a container: which of them CRIU can make again, and which files can be reached through them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::said::{Found, plain};
use crate::bundle::Bundle;
use crate::error::{ContainerError, Result};
use crate::mounts;

/// File systems that CRIU makes again from nothing, or from what it dumps of them (criu/filesystems.c).
const MADE_AGAIN: [&str; 17] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "binfmt_misc",
    "tmpfs",
    "devpts",
    "simfs",
    "pstore",
    "mqueue",
    "securityfs",
    "fusectl",
    "debugfs",
    "tracefs",
    "cgroup",
    "cgroup2",
    "overlay",
    "autofs",
];
/// Those that it takes along only while they hold nothing.
const EMPTY_ONLY: [&str; 2] = ["mqueue", "pstore"];
/// Those behind which there is a server that may not answer: no path on them is ever looked up.
const SERVED: [&str; 12] = [
    "fuse", "fuseblk", "nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "afs", "autofs", "virtiofs",
    "lustre",
];

/// One line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    parent: u64,
    device: String,
    root: Vec<u8>,
    point: Vec<u8>,
    kind: String,
}

/// All mounts of a container's mount namespace, by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Mounts(BTreeMap<u64, Mount>);

impl Mounts {
    /// Those of the container whose first process is `init`.
    pub(crate) fn of(init: i32) -> Result<Self> {
        let path = format!("/proc/{init}/mountinfo");
        let text = fs::read(&path).map_err(ContainerError::io(format!("read {path}")))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &[u8]) -> Self {
        Self(text.split(|byte| *byte == b'\n').filter_map(parse_line).collect())
    }

    /// Whether a file on mount `number` is within the container.
    pub(crate) fn has(&self, number: u64) -> bool {
        self.0.contains_key(&number)
    }

    /// Whether a path on that mount may be looked up without waiting for anybody.
    pub(crate) fn answers(&self, number: u64) -> bool {
        self.0.get(&number).is_some_and(|mount| self.is_within_reach(mount))
    }

    /// Whether no server of files is asked on the way to a mount.
    fn is_within_reach(&self, mount: &Mount) -> bool {
        let mut served = self.0.values().filter(|other| is_served(&other.kind));
        !served.any(|other| is_below(&mount.point, &other.point))
    }

    /// Whether the files of that mount are made by the kernel, and their names are none of theirs.
    pub(crate) fn is_of_kernel(&self, number: u64) -> bool {
        self.0.get(&number).is_some_and(|mount| matches!(mount.kind.as_str(), "proc" | "devpts"))
    }

    /// Where the file system of device `device` is mounted, and may be looked at.
    pub(crate) fn places(&self, device: (u32, u32)) -> impl Iterator<Item = &Path> {
        let device = format!("{}:{}", device.0, device.1);
        let here = move |mount: &&Mount| mount.device == device && self.is_within_reach(mount);
        self.0.values().filter(here).map(|mount| Path::new(OsStr::from_bytes(&mount.point)))
    }

    /// Whether something else is mounted over that mount, so that no path leads to it.
    pub(crate) fn is_covered(&self, number: u64) -> bool {
        let Some(mount) = self.0.get(&number) else { return false };
        let over = |(other, child): (&u64, &Mount)| {
            let beneath = child.parent == number && child.point == mount.point;
            let beside = *other != number
                && number != child.parent
                && child.parent == mount.parent
                && is_below(&mount.point, &child.point);
            beneath || beside
        };
        if self.0.iter().any(over) {
            return true;
        }
        // A parent's own cover was seen from here: it is mounted below the same one.
        let mut at = (mount.parent, mount);
        let mut steps = 0;
        while let Some(parent) = self.0.get(&at.0) {
            let beside = |(other, sibling): (&u64, &Mount)| {
                *other != at.0
                    && sibling.parent == parent.parent
                    && *other != parent.parent
                    && is_below(&parent.point, &sibling.point)
            };
            if self.0.iter().any(beside) {
                return true;
            }
            steps += 1;
            if steps > self.0.len() {
                return false;
            }
            at = (parent.parent, parent);
        }
        false
    }

    /// Says what of the mounts CRIU refuses. Those that the configuration brings from outside are given
    /// again at the destination.
    pub(crate) fn look(&self, bundle: &Bundle, init: i32, found: &mut Found) -> Result<()> {
        let outside: BTreeSet<String> =
            mounts::external(bundle, init)?.into_iter().map(|mount| mount.mounted).collect();
        let given =
            |mount: &Mount| outside.contains(&String::from_utf8_lossy(&mount.point).into_owned());
        let mut places = BTreeSet::new();
        for (number, mount) in &self.0 {
            let who = format!("Mount {}", plain(&mount.point));
            let kind = plain(mount.kind.as_bytes());
            if !places.insert((mount.parent, &mount.point)) {
                found.say(
                    &who,
                    "two are mounted in one place, which CRIU cannot make again",
                    "unmount the one that is on top",
                );
            }
            let is_root = !self.0.contains_key(&mount.parent) || mount.parent == *number;
            if is_root || given(mount) {
                continue;
            }
            if mount.root == b"/" {
                if !MADE_AGAIN.contains(&mount.kind.as_str()) {
                    found.say(
                        &who,
                        &format!("CRIU cannot make a file system of kind {kind} again"),
                        "unmount it in the container, or mount it by the container's configuration",
                    );
                } else if EMPTY_ONLY.contains(&mount.kind.as_str()) && !self.is_empty(init, mount) {
                    found.say(
                        &who,
                        &format!("CRIU takes {kind} along only while nothing is in it"),
                        "remove what is in it (POSIX message queues: mq_unlink)",
                    );
                }
            } else if !self.has_whole(mount) {
                found.say(
                    &who,
                    "it is a part of a file system that is not in the container as a whole",
                    "unmount it, or have the container's configuration mount it",
                );
            }
        }
        Ok(())
    }

    fn is_empty(&self, init: i32, mount: &Mount) -> bool {
        let point = String::from_utf8_lossy(&mount.point).into_owned();
        let entries = fs::read_dir(format!("/proc/{init}/root{point}"));
        entries.is_ok_and(|mut entries| entries.next().is_none())
    }

    /// Whether the file system of a part is in the container, so that CRIU can mount the part from it.
    fn has_whole(&self, part: &Mount) -> bool {
        let is_root = |number: &u64, mount: &Mount| {
            !self.0.contains_key(&mount.parent) || mount.parent == *number
        };
        // A namespace file that is kept by a mount is none.
        part.kind != "nsfs"
            && self.0.iter().any(|(number, mount)| {
                mount.device == part.device
                    && (mount.root == b"/"
                        || (is_root(number, mount) && is_below(&part.root, &mount.root)))
            })
    }
}

fn is_served(kind: &str) -> bool {
    SERVED.contains(&kind) || kind.starts_with("fuse.") || kind.starts_with("fuseblk.")
}

/// Whether `path` is `directory` or below it.
fn is_below(path: &[u8], directory: &[u8]) -> bool {
    let directory = directory.strip_suffix(b"/").unwrap_or(directory);
    path.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

fn parse_line(line: &[u8]) -> Option<(u64, Mount)> {
    let mut words = line.split(|byte| *byte == b' ');
    let mut word = || words.next();
    let number = |word: &[u8]| std::str::from_utf8(word).ok()?.parse::<u64>().ok();
    let (own, parent) = (number(word()?)?, number(word()?)?);
    let device = String::from_utf8(word()?.to_vec()).ok()?;
    let (root, point) = (unescaped(word()?), unescaped(word()?));
    let mut rest = words.skip_while(|word| *word != b"-").skip(1);
    let kind = String::from_utf8_lossy(rest.next()?).into_owned();
    Some((own, Mount { parent, device, root, point, kind }))
}

/// What the kernel wrote as `\` and three octal digits.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(byte) = text.get(at) {
        let digits = text.get(at + 1..at + 4).filter(|_| *byte == b'\\');
        let code = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(code.unwrap_or(*byte));
        at += if code.is_some() { 4 } else { 1 };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"50 40 254:1 /b/rootfs / rw - ext4 /dev/vda rw\n\
        51 50 0:5 / /proc rw,nosuid - proc proc rw\n\
        52 50 0:6 / /data/a\\040b rw shared:3 - tmpfs one rw\n\
        53 52 0:7 / /data/a\\040b rw - tmpfs two rw\n\
        54 50 0:8 / /x rw - fuse.sshfs s rw\n\
        55 50 254:1 /b/rootfs/bin /y rw - ext4 /dev/vda rw\n\
        56 50 254:1 /home /z rw - ext4 /dev/vda rw\n\
        57 50 0:9 / /d rw - tmpfs t rw\n58 57 0:10 / /d/e rw - tmpfs t rw\n59 50 0:11 / /d rw - tmpfs t rw\n";

    #[test]
    fn what_no_path_leads_to_is_covered() {
        let mounts = Mounts::parse(TABLE);
        assert!(mounts.is_covered(52) && !mounts.is_covered(53) && !mounts.is_covered(50));
        // The second mount at /d hides the first and all below it.
        assert!(mounts.is_covered(57) && mounts.is_covered(58));
        assert!(!mounts.answers(54) && mounts.answers(52) && !mounts.has(40));
        assert_eq!(mounts.0[&52].point, b"/data/a b");
        assert!(mounts.is_of_kernel(51));
        assert_eq!(mounts.places((0, 7)).collect::<Vec<_>>(), [Path::new("/data/a b")]);
    }

    #[test]
    fn parts_of_what_is_there_are_there() {
        let mounts = Mounts::parse(TABLE);
        assert!(mounts.has_whole(&mounts.0[&55]));
        assert!(!mounts.has_whole(&mounts.0[&56]));
        assert_eq!(unescaped(b"a\\134040\\9"), b"a\\040\\9");
        assert!(is_below(b"/a/b", b"/a") && is_below(b"/a", b"/") && !is_below(b"/ab", b"/a"));
    }
}
