//! What CRIU's images may ask of CRIU. It restores what they say, as root of this host, and images come from
//! another host or out of a file. So before it starts they are held to what the container's configuration
//! allows: processes come into namespaces of their own, and nothing of this host is mounted there but what
//! the configuration names.
//!
//! CRIU makes those namespaces whose numbers a process has not in common with the CRIU that dumped it
//! (`get_clone_mask` in its `pstree.c`): equal numbers would leave a process in the ones of the keeper, with
//! this host's mounts.

use std::fs::{self, File};
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::bundle::Bundle;
use crate::error::{ContainerError, Result};
use crate::segments::message::{Image, Message};

/// CRIU's marks at the head of an inventory, of what a process has, and of a list of mounts (its `magic.h`).
pub(crate) const INVENTORY_MARKS: &[u32] = &[0x5831_3116];
pub(crate) const IDS_MARKS: &[u32] = &[0x5456_4319, 0x5443_2030];
pub(crate) const MOUNTS_MARKS: &[u32] = &[0x5456_4319, 0x5556_3928];
/// Where an inventory has what the CRIU had that dumped.
pub(crate) const HOST_IDS: u32 = 3;
/// Bytes of an inventory, or of what one process has, at most: some fifty are usual.
pub(crate) const IDS_MOST: u64 = 64 << 10;
/// Bytes of a list of mounts at most.
const MOUNTS_MOST: u64 = 16 << 20;

/// Numbers of namespaces in CRIU's `task_kobj_ids_entry`.
const OWN: [(&str, u32); 4] = [("PID", 5), ("IPC", 7), ("UTS", 8), ("mount", MOUNT_ID)];
const MOUNT_ID: u32 = 9;
const USER_ID: u32 = 10;

/// Fields of CRIU's `mnt_entry`.
const KIND: u32 = 1;
const DEVICE: u32 = 3;
const ROOT: u32 = 6;
const POINT: u32 = 7;
const BY_PLUGIN: u32 = 12;
const IS_EXTERNAL: u32 = 13;
const EXTERNAL_KEY: u32 = 18;

/// File systems that every container may have, by their numbers in CRIU's `mnt.proto`. None shows more of
/// the host than the namespaces do.
const PROC: u64 = 1;
const SYSFS: u64 = 2;
const TMPFS: u64 = 5;
const DEVPTS: u64 = 6;
const MQUEUE: u64 = 14;
const CGROUP2: u64 = 23;
/// Those that it may have where its configuration mounts them.
const CONFIGURED: [(&str, u64); 8] = [
    ("devtmpfs", 3),
    ("binfmt_misc", 4),
    ("pstore", 8),
    ("securityfs", 9),
    ("fusectl", 10),
    ("debugfs", 11),
    ("tracefs", 19),
    ("overlay", 17),
];

type Fault = String;

/// What holds the images of one restore to its configuration.
pub(crate) struct Confined<'a> {
    pub(crate) bundle: &'a Bundle,
    /// The root file system, as it is here.
    pub(crate) root: &'a Path,
    /// Keys of the mounts that CRIU is given from outside.
    pub(crate) given: Vec<String>,
}

impl Confined<'_> {
    /// Looks at the images in this directory.
    ///
    /// # Errors
    /// When they ask for more than the configuration has.
    pub(crate) fn check(&self, images: &Path) -> Result<()> {
        let list = || format!("list {}", images.display());
        let (mut ids, mut mounts) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(images).map_err(ContainerError::io(list()))? {
            let name = entry.map_err(ContainerError::io(list()))?.file_name();
            let Some(name) = name.to_str().filter(|name| name.ends_with(".img")) else { continue };
            if name.starts_with("ids-") {
                ids.push(only(read(&images.join(name), IDS_MOST, IDS_MARKS)?, images, name)?);
            } else if name.starts_with("mountpoints-") {
                let image = read(&images.join(name), MOUNTS_MOST, MOUNTS_MARKS)?;
                mounts.push((name.to_owned(), image.messages));
            }
        }
        let inventory = read(&images.join("inventory.img"), IDS_MOST, INVENTORY_MARKS)?;
        let inventory = only(inventory, images, "inventory.img")?;
        let bad = |name: &str, what: Fault| ContainerError::malformed(images.join(name), what);
        let number = namespaces(&inventory, &ids, self.bundle.mapped_root().is_some())
            .map_err(|what| bad("inventory.img", what))?;
        // CRIU takes the list of that very number.
        let [(name, mounts)] = &mounts[..] else {
            return Err(bad("", "have not one list of mounts".to_owned()));
        };
        if *name != format!("mountpoints-{number}.img") {
            return Err(bad(name, "is of another mount namespace than the processes".to_owned()));
        }
        self.mounts(mounts).map_err(|what| bad(name, what))
    }

    /// Every mount is a given one, a file system of the container's own, or a part of one.
    fn mounts(&self, mounts: &[Message]) -> std::result::Result<(), Fault> {
        let root = mounts.iter().find(|mount| mount.bytes(POINT) == Some(b"/"));
        let root = root.ok_or("has no root")?;
        for mount in mounts {
            let text = |tag| {
                std::str::from_utf8(mount.bytes(tag).unwrap_or_default()).map_err(|_| "is no text")
            };
            let point = text(POINT)?;
            let bad = |what: &str| Err(format!("has a mount at {point:?} {what}"));
            if mount.number(BY_PLUGIN).is_some_and(|by| by != 0) {
                return bad("that a plugin has to make");
            }
            if leaves(point) || leaves(text(ROOT)?) {
                return bad("that leads elsewhere");
            }
            let key = match mount.bytes(EXTERNAL_KEY) {
                Some(_) => Some(text(EXTERNAL_KEY)?),
                // So it was with older ones.
                None if mount.number(IS_EXTERNAL).is_some_and(|is| is != 0) => Some(text(ROOT)?),
                None => None,
            };
            match key {
                Some(key) if self.given.iter().any(|given| given == key) => continue,
                Some(_) => return bad("from outside, which the configuration does not have"),
                None if point == "/" => continue,
                None => {}
            }
            let kind = number_of(mount, KIND);
            let part = text(ROOT)?;
            let fine = match (kind, part) {
                (PROC, part) => is_plain_in_proc(part),
                // There are no links of the container's making there.
                (SYSFS | DEVPTS | MQUEUE, _) | (TMPFS, "/") => true,
                (CGROUP2, _) => self.bundle.mounts_cgroups(),
                (kind, "/") if self.configures(kind) => true,
                _ => self.is_part(root, mount, part),
            };
            if !fine {
                return bad("of a file system that its configuration does not mount");
            }
        }
        Ok(())
    }

    /// Whether the configuration mounts file systems of that kind.
    fn configures(&self, kind: u64) -> bool {
        let mounts = self.bundle.config()["mounts"].as_array().into_iter().flatten();
        let mut kinds = mounts.filter_map(|mount| mount["type"].as_str());
        kinds.any(|name| CONFIGURED.contains(&(name, kind)))
    }

    /// Whether a mount shows a part of the container's root, to which no link leads: CRIU would follow one.
    fn is_part(&self, root: &Message, mount: &Message, part: &str) -> bool {
        let same = |tag| number_of(root, tag) == number_of(mount, tag);
        let whole = root.bytes(ROOT).and_then(|whole| std::str::from_utf8(whole).ok());
        let below = whole.and_then(|whole| Path::new(part).strip_prefix(whole).ok());
        let Some(below) = below.filter(|_| same(DEVICE) && same(KIND) && part != "/") else {
            return false;
        };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
        File::open(self.root).is_ok_and(|open| openat2(open, below, how).is_ok())
    }
}

/// Whether no process shares a namespace with the CRIU that dumped it, but that of the network, which is
/// the container's here, and that of users where the container has none of its own. Gives the number of
/// their mount namespace.
pub(crate) fn namespaces(
    inventory: &Message,
    ids: &[Message],
    has_users: bool,
) -> std::result::Result<u64, Fault> {
    let host: Vec<_> = inventory.each(HOST_IDS).collect();
    let [Some(host)] = &host[..] else {
        return Err("does not say which namespaces the host had".to_owned());
    };
    for own in ids {
        for (kind, tag) in OWN {
            let number = number_of(own, tag);
            if number == 0 || number == number_of(host, tag) {
                return Err(format!("has a process in the {kind} namespace of its host"));
            }
        }
        if (number_of(own, USER_ID) != number_of(host, USER_ID)) != has_users {
            return Err("has a process in another user namespace than its configuration".to_owned());
        }
    }
    let mut numbers = ids.iter().map(|own| number_of(own, MOUNT_ID));
    match numbers.next() {
        None => Err("is of no process".to_owned()),
        Some(number) if numbers.all(|other| other == number) => Ok(number),
        Some(_) => Err("has processes in several mount namespaces".to_owned()),
    }
}

/// A number as CRIU reads it: of 32 bits, and 0 where there is none.
fn number_of(message: &Message, tag: u32) -> u64 {
    u64::from(message.number(tag).unwrap_or(0) as u32)
}

fn leaves(path: &str) -> bool {
    path.split('/').any(|part| part == "..")
}

/// Whether this part of a proc file system is none of a process's own, whose links lead anywhere.
fn is_plain_in_proc(part: &str) -> bool {
    let first = part.split('/').find(|part| !part.is_empty() && *part != ".").unwrap_or("");
    !first.starts_with(|first: char| first.is_ascii_digit())
        && !["self", "thread-self"].contains(&first)
}

/// An image of at most `most` bytes.
fn read(path: &Path, most: u64, marks: &[u32]) -> Result<Image> {
    let failed = || format!("read {}", path.display());
    let length = fs::metadata(path).map_err(ContainerError::io(failed()))?.len();
    if length > most {
        return Err(ContainerError::malformed(path, format!("is longer than {most} bytes")));
    }
    let bytes = fs::read(path).map_err(ContainerError::io(failed()))?;
    Image::parse_marked(&bytes, marks)
        .ok_or_else(|| ContainerError::malformed(path, "is no image of CRIU's"))
}

/// The one message of an image.
fn only(image: Image, images: &Path, name: &str) -> Result<Message> {
    match <[Message; 1]>::try_from(image.messages) {
        Ok([message]) => Ok(message),
        Err(_) => Err(ContainerError::malformed(images.join(name), "has not one message")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a process has, with numbers from `first` on.
    fn ids(first: u64) -> Message {
        let mut ids = Message::default();
        for (_, tag) in OWN {
            ids.set_number(tag, first + u64::from(tag));
        }
        ids.set_number(USER_ID, 1);
        ids
    }

    fn inventory() -> Message {
        let mut inventory = Message::default();
        inventory.set_bytes(HOST_IDS, ids(100).to_bytes());
        inventory
    }

    #[test]
    fn no_process_is_in_a_namespace_of_the_host() {
        let honest = [ids(200), ids(200)];
        assert_eq!(namespaces(&inventory(), &honest, false), Ok(200 + u64::from(MOUNT_ID)));
        assert!(namespaces(&inventory(), &honest, true).is_err(), "no users of its own");
        assert!(namespaces(&inventory(), &[], false).is_err());
        assert!(namespaces(&Message::default(), &honest, false).is_err());
        for (kind, tag) in OWN {
            let host = 100 + u64::from(tag);
            // CRIU reads 32 bits of a number, and takes one that is not there for 0.
            for number in [Some(host), Some(host | 1 << 32), Some(0), None] {
                let mut forged = ids(200);
                forged.remove(tag);
                if let Some(number) = number {
                    forged.set_number(tag, number);
                }
                let found = namespaces(&inventory(), &[ids(200), forged], false);
                assert!(found.expect_err("forged").contains("of its host"), "{kind} {number:?}");
            }
        }
        let mut nested = ids(200);
        nested.set_number(MOUNT_ID, 7);
        assert!(namespaces(&inventory(), &[ids(200), nested], false).is_err());
        let mut users = ids(200);
        users.set_number(USER_ID, 2);
        assert!(namespaces(&inventory(), std::slice::from_ref(&users), false).is_err());
        assert!(namespaces(&inventory(), &[users], true).is_ok());
        // CRIU would put both together.
        let mut twice = inventory();
        twice.add_bytes(HOST_IDS, ids(200).to_bytes());
        assert!(namespaces(&twice, &honest, false).is_err());
    }

    fn mount(kind: u64, root: &str, point: &str) -> Message {
        let mut mount = Message::default();
        mount.set_number(KIND, kind);
        mount.set_number(DEVICE, 5);
        mount.set_bytes(ROOT, root.into());
        mount.set_bytes(POINT, point.into());
        mount
    }

    #[test]
    fn nothing_is_mounted_that_the_configuration_does_not_have() {
        let root = tempfile::tempdir().expect("a directory");
        fs::create_dir(root.path().join("bin")).expect("a directory");
        std::os::unix::fs::symlink("/", root.path().join("host")).expect("a link");
        let config = br#"{"mounts": [{"destination": "/s", "type": "securityfs", "source": "s"}]}"#;
        let bundle = Bundle::parse(Path::new("/b"), config).expect("a bundle");
        let confined =
            Confined { bundle: &bundle, root: root.path(), given: vec!["/data".to_owned()] };
        let whole = || mount(0, "/b/rootfs", "/");
        let checked = |one: Message| confined.mounts(&[whole(), one]);
        let keyed = |key: &str| {
            let mut keyed = mount(0, "/x", "/data");
            keyed.set_bytes(EXTERNAL_KEY, key.into());
            keyed
        };
        for good in [
            keyed("/data"),
            mount(PROC, "/", "/proc"),
            mount(PROC, "/sys", "/proc/sys"),
            mount(SYSFS, "/", "/sys"),
            mount(TMPFS, "/", "/dev"),
            mount(DEVPTS, "/0", "/dev/console"),
            mount(9, "/", "/s"),
            mount(0, "/b/rootfs/bin", "/sbin"),
        ] {
            assert_eq!(checked(good.clone()), Ok(()), "{good:?}");
        }
        let mut plugin = mount(TMPFS, "/", "/x");
        plugin.set_number(BY_PLUGIN, 1);
        let mut old = mount(0, "/etc", "/data");
        old.set_number(IS_EXTERNAL, 1);
        let mut elsewhere = mount(0, "/b/rootfs/bin", "/x");
        elsewhere.set_number(DEVICE, 6);
        for forged in [
            keyed("/etc"),
            // A device of the host.
            keyed("CRIU:EXTERNAL_DEV"),
            old,
            plugin,
            elsewhere,
            mount(PROC, "/self/root", "/x"),
            mount(PROC, "/./1/root", "/x"),
            mount(TMPFS, "/link", "/x"),
            mount(SYSFS, "/../..", "/x"),
            mount(0, "/b/rootfs/../..", "/x"),
            mount(0, "/b/rootfs/host", "/x"),
            mount(0, "/b/rootfs/host/etc", "/x"),
            mount(0, "/", "/x"),
            // devtmpfs, debugfs, cgroup, any by its name (ext4), overlay, cgroup2.
            mount(3, "/", "/x"),
            mount(11, "/", "/x"),
            mount(12, "/", "/x"),
            mount(16, "/", "/x"),
            mount(17, "/", "/x"),
            mount(CGROUP2, "/", "/x"),
        ] {
            assert!(checked(forged.clone()).is_err(), "{forged:?}");
        }
        assert!(confined.mounts(&[mount(PROC, "/", "/proc")]).is_err(), "no root");
    }
}
