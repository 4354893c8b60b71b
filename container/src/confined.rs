//! What CRIU's images may ask of CRIU. It restores what they say, as root of this host, and images come from
//! another host or out of a file. So before it starts they are held to what the container's configuration
//! allows: processes come into namespaces of their own, with no more rights than it gives, and nothing of this
//! host is mounted there but what the configuration names.
//!
//! CRIU makes those namespaces whose numbers a process has not in common with the CRIU that dumped it
//! (`get_clone_mask` in its `pstree.c`): equal numbers would leave a process in the ones of the keeper, with
//! this host's mounts.

mod deleted;
mod filters;
mod kernel;
mod origins;
mod protected;
mod remaps;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::bundle::Bundle;
use crate::error::{ContainerError, Result};
use crate::mountable::{Mountable, Mounted};
use crate::mounts::Given;
use crate::rights::{Held, Rights};
use crate::segments::message::{Image, Message};

use filters::Filters;
pub(crate) use origins::MOUNTS_CAP;
pub(crate) use remaps::{GhostImage, ghosts};

/// CRIU's marks at the head of an inventory, of what a process has, and of a list of mounts (its `magic.h`).
pub(crate) const INVENTORY_MARKS: &[u32] = &[0x5831_3116];
pub(crate) const IDS_MARKS: &[u32] = &[0x5456_4319, 0x5443_2030];
pub(crate) const MOUNTS_MARKS: &[u32] = &[0x5456_4319, 0x5556_3928];
/// The same of a task, and of a user namespace.
const CORE_MARKS: &[u32] = &[0x5456_4319, 0x5505_3847];
const USERS_MARKS: &[u32] = &[0x5456_4319, 0x5547_4906];
/// Where an inventory has what the CRIU had that dumped.
pub(crate) const HOST_IDS: u32 = 3;
/// Bytes of an inventory, or of what one process has, at most: some fifty are usual.
pub(crate) const IDS_MOST: u64 = 64 << 10;
/// Bytes of what one task has in its registers, or of a list of numbers, at most: some thousand are usual.
const TASK_MOST: u64 = 1 << 20;
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

type Fault = String;

/// What holds the images of one restore to its configuration.
pub(crate) struct Confined<'a> {
    pub(crate) bundle: &'a Bundle,
    /// The root file system, as it is here.
    pub(crate) root: &'a Path,
    /// The mounts that CRIU is given from outside.
    pub(crate) given: &'a [Given],
}

impl Confined<'_> {
    /// Looks at the images in this directory.
    ///
    /// # Errors
    /// When they ask for more than the configuration has.
    pub(crate) fn check(&self, images: &Path) -> Result<()> {
        let list = || format!("list {}", images.display());
        let (mut ids, mut mounts, mut filters) = (Vec::new(), Vec::new(), Filters::default());
        let rights = Rights::of(self.bundle);
        for entry in fs::read_dir(images).map_err(ContainerError::io(list()))? {
            let name = entry.map_err(ContainerError::io(list()))?.file_name();
            let Some(name) = name.to_str().filter(|name| name.ends_with(".img")) else { continue };
            if name.starts_with("ids-") {
                ids.push(only(read(&images.join(name), IDS_MOST, IDS_MARKS)?, images, name)?);
            } else if name.starts_with("mountpoints-") {
                let image = read(&images.join(name), MOUNTS_MOST, MOUNTS_MARKS)?;
                mounts.push((name.to_owned(), image.messages));
            } else if name.starts_with("core-") {
                let core = only(read(&images.join(name), TASK_MOST, CORE_MARKS)?, images, name)?;
                task(&rights, &core)
                    .map_err(|what| ContainerError::malformed(images.join(name), what))?;
                filters.add(name, &core);
            } else if name.starts_with("userns-") {
                let users = only(read(&images.join(name), TASK_MOST, USERS_MARKS)?, images, name)?;
                if !rights.are_its_numbers(&users) {
                    let what = "numbers users or groups otherwise than the configuration";
                    return Err(ContainerError::malformed(images.join(name), what));
                }
            }
        }
        let inventory = read(&images.join("inventory.img"), IDS_MOST, INVENTORY_MARKS)?;
        let inventory = only(inventory, images, "inventory.img")?;
        let bad = |name: &str, what: Fault| ContainerError::malformed(images.join(name), what);
        let number = namespaces(&inventory, &ids, self.bundle.mapped_root().is_some())
            .map_err(|what| bad("inventory.img", what))?;
        self.kernel(images, &inventory, &ids)?;
        if rights.filters() {
            filters.check(images)?;
        }
        // CRIU takes the list of that very number.
        let [(name, mounts)] = &mounts[..] else {
            return Err(bad("", "have not one list of mounts".to_owned()));
        };
        if *name != format!("mountpoints-{number}.img") {
            return Err(bad(name, "is of another mount namespace than the processes".to_owned()));
        }
        self.given_once().map_err(|what| bad(name, what))?;
        self.mounts(mounts).map_err(|what| bad(name, what))?;
        let origins = origins::read(mounts).map_err(|what| bad(name, what))?;
        self.protected(&origins).map_err(|what| bad(name, what))?;
        self.deleted(images, &origins)
    }

    /// Nothing is given twice from different places: CRIU takes the last, and what is looked at here is the
    /// first.
    fn given_once(&self) -> std::result::Result<(), Fault> {
        let mut sources = BTreeMap::new();
        for given in self.given {
            let first = sources.entry(&given.key).or_insert(&given.source);
            if *first != &given.source {
                return Err(format!("is to have {:?} from two places", given.key));
            }
        }
        Ok(())
    }

    /// Every mount is a given one, a file system of the container's own, or a part of one.
    fn mounts(&self, mounts: &[Message]) -> std::result::Result<(), Fault> {
        let all: Vec<_> = mounts.iter().map(described).collect::<std::result::Result<_, _>>()?;
        let mut roots = all.iter().filter(|mount| mount.is_root());
        // With another beside it parts of it would not be what they were taken for.
        let (Some(root), None) = (roots.next(), roots.next()) else {
            return Err("has not one root".to_owned());
        };
        let rule = Mountable { bundle: self.bundle, root: self.root };
        for (mount, this) in mounts.iter().zip(&all) {
            let point = this.point;
            let bad = |what: &str| Err(format!("has a mount at {point:?} {what}"));
            if mount.number(BY_PLUGIN).is_some_and(|by| by != 0) {
                return bad("that a plugin has to make");
            }
            if let Err(why) = this.check_path() {
                return bad(&format!("that it may not have: {why}"));
            }
            let key = match mount.bytes(EXTERNAL_KEY) {
                Some(key) => Some(key),
                // So it was with older ones.
                None if mount.number(IS_EXTERNAL).is_some_and(|is| is != 0) => {
                    Some(this.root.as_bytes())
                }
                None => None,
            };
            match key {
                Some(key) if self.given.iter().any(|given| given.key.as_bytes() == key) => continue,
                Some(_) => return bad("from outside, which the configuration does not have"),
                None if this.is_root() => continue,
                None => {}
            }
            if let Err(why) = rule.check(*root, *this) {
                return bad(&format!("that it may not have: {why}"));
            }
        }
        Ok(())
    }
}

/// A task has no more rights than the configuration gives.
fn task(rights: &Rights, core: &Message) -> std::result::Result<(), Fault> {
    let Some(held) = Held::of_image(core)? else { return Ok(()) };
    match rights.exceeded(&held).first() {
        Some(excess) => Err(format!("is of a task that may not run: {excess}")),
        None => Ok(()),
    }
}

/// A mount of an image.
fn described(mount: &Message) -> std::result::Result<Mounted<'_>, Fault> {
    let text =
        |tag| std::str::from_utf8(mount.bytes(tag).unwrap_or_default()).map_err(|_| "is no text");
    Ok(Mounted {
        kind: number_of(mount, KIND),
        device: number_of(mount, DEVICE),
        root: text(ROOT)?,
        point: text(POINT)?,
    })
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

/// An image of at most `most` bytes.
pub(crate) fn read(path: &Path, most: u64, marks: &[u32]) -> Result<Image> {
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
    use crate::mountable::{CGROUP2, DEVPTS, PROC, SYSFS, TMPFS};

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
        let given = [Given {
            key: "/data".to_owned(),
            source: root.path().join("bin"),
            is_read_only: false,
        }];
        let confined = Confined { bundle: &bundle, root: root.path(), given: &given };
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
        let twice = |source: &str| {
            let given = [given[0].clone(), Given { source: source.into(), ..given[0].clone() }];
            Confined { given: &given, ..confined }.given_once()
        };
        assert_eq!(twice(given[0].source.to_str().expect("a name")), Ok(()));
        assert!(twice("/etc").is_err(), "two places");
        for second in ["/", "//", "/."] {
            assert!(checked(mount(0, "/b/rootfs/bin", second)).is_err(), "two roots: {second}");
        }
    }
}
