//! Mounts of a container: which of them CRIU can make again, and which files can be reached through them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::process::Who;
use super::said::{Found, plain};
use crate::bundle::Bundle;
use crate::confined::MOUNTS_CAP;
use crate::error::{ContainerError, Result};
use crate::mountable::{Mountable, Mounted, number_of};
use crate::mounts::{self, ExternalKind};

/// File systems that CRIU makes again from nothing, or from what it dumps of them (criu/filesystems.c), so far
/// as a container may have them at all ([`Mountable`]).
const MADE_AGAIN: [&str; 15] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "binfmt_misc",
    "tmpfs",
    "devpts",
    "pstore",
    "mqueue",
    "securityfs",
    "fusectl",
    "debugfs",
    "tracefs",
    "cgroup",
    "cgroup2",
    "overlay",
];
/// Those that it takes along only while they hold nothing.
const EMPTY_ONLY: [&str; 2] = ["mqueue", "pstore"];
/// Those behind which there is a server that may not answer: no path on them is ever looked up.
const SERVED: [&str; 12] = [
    "fuse", "fuseblk", "nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "afs", "autofs", "virtiofs",
    "lustre",
];

/// What to do about any of them.
const UNMOUNT: &str = "unmount it in the container, or mount it by the container's configuration";

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

    /// Whether files of that mount, when they are mapped, show what this host's kernel or devices have.
    pub(crate) fn shows_host(&self, number: u64) -> bool {
        let kinds = ["proc", "sysfs", "debugfs", "tracefs", "securityfs"];
        self.0.get(&number).is_some_and(|mount| kinds.contains(&mount.kind.as_str()))
    }

    /// Where a mount is, and whether CRIU makes it from its images, so that nobody sees it before.
    pub(crate) fn ground(&self, number: u64) -> Option<(&Path, bool)> {
        let mount = self.0.get(&number)?;
        let is_root = !self.0.contains_key(&mount.parent) || mount.parent == number;
        let is_from_images =
            !is_root && mount.root == b"/" && MADE_AGAIN.contains(&mount.kind.as_str());
        Some((Path::new(OsStr::from_bytes(&mount.point)), is_from_images))
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

    /// Says what of the mounts CRIU refuses, and what the destination would. Those that the configuration brings
    /// from outside are given again there.
    pub(crate) fn look(&self, bundle: &Bundle, init: i32, found: &mut Found) -> Result<()> {
        let outside: BTreeMap<String, ExternalKind> = mounts::external(bundle, init)?
            .into_iter()
            .map(|mount| (mount.mounted, mount.kind))
            .collect();
        let rootfs = bundle.rootfs();
        let rule = Mountable { bundle, root: &rootfs };
        let mut places = BTreeSet::new();
        if self.0.len() > MOUNTS_CAP {
            let what = format!("it has more than {MOUNTS_CAP} mounts");
            found.say(&Who::named("The container"), &what, "unmount some of them");
        }
        let given: Vec<_> = self
            .0
            .values()
            .filter(|mount| outside.contains_key(&*String::from_utf8_lossy(&mount.point)))
            .collect();
        for (number, mount) in &self.0 {
            let who = Who::named(format!("Mount {}", plain(&mount.point)));
            let kind = plain(mount.kind.as_bytes());
            if !places.insert((mount.parent, &mount.point)) {
                found.say(
                    &who,
                    "two are mounted in one place, which CRIU cannot make again",
                    "unmount the one that is on top",
                );
            }
            let point = String::from_utf8_lossy(&mount.point);
            match outside.get(&*point) {
                _ if self.is_root(*number, mount) => continue,
                Some(ExternalKind::Cgroup(_)) if !bundle.mounts_cgroups() => {
                    found.say(&who, "it shows control groups", UNMOUNT);
                    continue;
                }
                Some(_) => continue,
                None => {}
            }
            if mount.root == b"/" {
                if !MADE_AGAIN.contains(&mount.kind.as_str()) {
                    found.say(
                        &who,
                        &format!("CRIU cannot make a file system of kind {kind} again"),
                        UNMOUNT,
                    );
                    continue;
                }
                if EMPTY_ONLY.contains(&mount.kind.as_str()) && !self.is_empty(init, mount) {
                    found.say(
                        &who,
                        &format!("CRIU takes {kind} along only while nothing is in it"),
                        "remove what is in it (POSIX message queues: mq_unlink)",
                    );
                }
            } else if !is_its_own_cgroup(bundle, mount) && !self.has_whole(mount) {
                found.say(
                    &who,
                    "it is a part of a file system that is not in the container as a whole",
                    UNMOUNT,
                );
                continue;
            }
            if let Some(why) = self.against(rule, mount) {
                found.say(&who, &why, UNMOUNT);
            } else if given
                .iter()
                .any(|given| given.device == mount.device && is_below(&mount.root, &given.root))
            {
                found.say(
                    &who,
                    "it shows what is mounted from outside once more, and shares mounts",
                    UNMOUNT,
                );
            }
        }
        Ok(())
    }

    /// Why the container may not have that mount at the destination.
    fn against(&self, rule: Mountable<'_>, mount: &Mount) -> Option<String> {
        let whole = self.0.iter().find(|(number, mount)| self.is_root(**number, mount))?.1;
        let (Some(whole), Some(mount)) = (whole.described(), mount.described()) else {
            return Some("its path is no text (UTF-8)".to_owned());
        };
        rule.check(whole, mount).err().map(|why| why.to_string())
    }

    /// Whether that mount is the container's root.
    fn is_root(&self, number: u64, mount: &Mount) -> bool {
        !self.0.contains_key(&mount.parent) || mount.parent == number
    }

    fn is_empty(&self, init: i32, mount: &Mount) -> bool {
        let point = String::from_utf8_lossy(&mount.point).into_owned();
        let entries = fs::read_dir(format!("/proc/{init}/root{point}"));
        entries.is_ok_and(|mut entries| entries.next().is_none())
    }

    /// Whether the file system of a part is in the container, so that CRIU can mount the part from it.
    fn has_whole(&self, part: &Mount) -> bool {
        // A namespace file that is kept by a mount is none.
        part.kind != "nsfs"
            && self.0.iter().any(|(number, mount)| {
                mount.device == part.device
                    && (mount.root == b"/"
                        || (self.is_root(*number, mount) && is_below(&part.root, &mount.root)))
            })
    }
}

impl Mount {
    /// As the rule for mounts has it; nothing when it is no text.
    fn described(&self) -> Option<Mounted<'_>> {
        let (major, minor) = self.device.split_once(':')?;
        let number = |text: &str| text.parse::<u32>().ok().map(u64::from);
        Some(Mounted {
            kind: number_of(&self.kind),
            device: number(major)? << 32 | number(minor)?,
            root: std::str::from_utf8(&self.root).ok()?,
            point: std::str::from_utf8(&self.point).ok()?,
        })
    }
}

/// Whether it shows the cgroup that the container's own namespace begins with, which CRIU takes for a whole.
fn is_its_own_cgroup(bundle: &Bundle, mount: &Mount) -> bool {
    let mut places = bundle.destinations().map(str::as_bytes);
    mount.kind == "cgroup2" && bundle.hides_cgroups() && places.any(|place| place == mount.point)
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

    #[test]
    fn what_no_destination_would_mount_is_known() {
        let root = tempfile::tempdir().expect("a directory");
        fs::create_dir(root.path().join("bin")).expect("a directory");
        std::os::unix::fs::symlink("bin", root.path().join("link")).expect("a link");
        let config = br#"{"mounts": [{"destination": "/d", "type": "debugfs", "source": "d"}]}"#;
        let bundle = Bundle::parse(Path::new("/b"), config).expect("a bundle");
        let rule = Mountable { bundle: &bundle, root: root.path() };
        let mounts = Mounts::parse(
            b"50 40 254:1 /b/rootfs / rw - ext4 d rw\n51 50 0:5 /sys /proc/sys rw - proc p rw\n\
            52 50 0:6 / /data rw - tmpfs one rw\n53 50 0:8 / /d rw - debugfs d rw\n\
            54 50 254:1 /b/rootfs/bin /y rw - ext4 d rw\n60 50 0:6 /part /x rw - tmpfs one rw\n\
            61 50 0:9 / /o rw - overlay o rw\n62 50 0:5 /1/root /x rw - proc p rw\n\
            63 50 254:1 /b/rootfs/link /x rw - ext4 d rw\n64 50 254:1 /b/rootfs/gone//deleted /x rw - ext4 d rw\n\
            65 50 0:7 / / rw - tmpfs t rw\n66 50 0:6 / /\xff rw - tmpfs one rw\n\
            67 50 0:5 /../.. /x rw - sysfs s rw\n",
        );
        for (number, mount) in mounts.0.iter().filter(|(number, _)| **number > 50) {
            let against = mounts.against(rule, mount);
            assert_eq!(against.is_some(), *number >= 60, "{number}: {against:?}");
        }
    }
}
