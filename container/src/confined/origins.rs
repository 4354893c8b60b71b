//! Whence CRIU would have each mount of an image. It does not go by what a file system is called: mounts of
//! one device are taken for binds of each other, and one is made from any other whose root is at or above its
//! own, by a path whose links it follows (`mounts_sb_equal` and `do_bind_mount_v2` in its `mount.c` and
//! `mount-v2.c`). Flags go to `mount` as the image has them, and can make another call of it.

use std::collections::{BTreeMap, BTreeSet};

use super::{BY_PLUGIN, DEVICE, EXTERNAL_KEY, Fault, IS_EXTERNAL, KIND, POINT, ROOT, number_of};
use crate::mountable::{DEVPTS, PROC, SYSFS};
use crate::segments::message::Message;

/// A container has so many mounts at most.
pub(crate) const MOUNTS_CAP: usize = 4096;

/// Further fields of CRIU's `mnt_entry`.
const NUMBER: u32 = 2;
const PARENT: u32 = 4;
const FLAGS: u32 = 5;
const SOURCE: u32 = 8;
const OPTIONS: u32 = 9;
const FILE_SYSTEM: u32 = 14;
const DELETED: u32 = 16;
const OWN_FLAGS: u32 = 17;
const TEXTS: [u32; 6] = [ROOT, POINT, SOURCE, OPTIONS, FILE_SYSTEM, EXTERNAL_KEY];

/// What CRIU's own keys begin with. They have it mount what an image says, or what it finds.
const MAGIC_KEYS: &str = "CRIU:";

/// Flags of a mount that the kernel tells of, and how it is propagated (`MS_REC` comes with debugfs).
const MOUNT_FLAGS: u64 = libc::MS_RDONLY
    | libc::MS_NOSUID
    | libc::MS_NODEV
    | libc::MS_NOEXEC
    | libc::MS_NOATIME
    | libc::MS_NODIRATIME
    | libc::MS_RELATIME
    | libc::MS_STRICTATIME
    | libc::MS_REC
    | libc::MS_SHARED
    | libc::MS_SLAVE
    | libc::MS_PRIVATE
    | libc::MS_UNBINDABLE;
/// Those of a file system.
const FILE_SYSTEM_FLAGS: u64 = libc::MS_RDONLY
    | libc::MS_SYNCHRONOUS
    | libc::MS_DIRSYNC
    | libc::MS_MANDLOCK
    | libc::MS_NOSUID
    | libc::MS_NODEV
    | libc::MS_NOEXEC;

/// A mount of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin<'a> {
    pub(crate) number: u64,
    pub(crate) parent: u64,
    pub(crate) kind: u64,
    pub(crate) device: u64,
    pub(crate) root: &'a str,
    pub(crate) point: &'a str,
    /// By what it is given from outside.
    pub(crate) key: Option<&'a str>,
    /// Whether nothing can be written through it.
    pub(crate) is_read_only: bool,
}

impl<'a> Origin<'a> {
    /// Reads one, and holds it to what the kernel could have told of it.
    fn read(mount: &'a Message) -> Result<Self, Fault> {
        let text = |tag| {
            let bytes = mount.bytes(tag).unwrap_or_default();
            let text = std::str::from_utf8(bytes).map_err(|_| "has a mount that is no text")?;
            // For CRIU a text ends there.
            if text.contains('\0') { Err("has a mount with a text in two parts") } else { Ok(text) }
        };
        for tag in TEXTS {
            text(tag)?;
        }
        let (root, point) = (text(ROOT)?, text(POINT)?);
        let bad = |what: &str| Err(format!("has a mount at {point:?} {what}"));
        let is = |tag| mount.number(tag).is_some_and(|is| is != 0);
        let key = match mount.bytes(EXTERNAL_KEY) {
            Some(_) => Some(text(EXTERNAL_KEY)?),
            None if is(IS_EXTERNAL) => Some(root),
            None => None,
        };
        if key.is_some_and(|key| key.starts_with(MAGIC_KEYS)) {
            return bad("by a key that is CRIU's own");
        }
        if is(BY_PLUGIN) {
            return bad("that a plugin has to make");
        }
        let leaves = |path: &str| path.split('/').any(|part| part == "..");
        if leaves(point) || leaves(root) {
            return bad("that leads elsewhere");
        }
        if key.is_none() && is(DELETED) {
            return bad("of what is deleted");
        }
        let flags = number_of(mount, FLAGS);
        let own = mount.number(OWN_FLAGS).map(|_| number_of(mount, OWN_FLAGS));
        let fine = match own {
            Some(own) => flags & !MOUNT_FLAGS == 0 && own & !FILE_SYSTEM_FLAGS == 0,
            // In old ones they are all in one, of which CRIU has nothing be read only but the file system.
            None => flags & !(MOUNT_FLAGS | FILE_SYSTEM_FLAGS) == 0,
        };
        if !fine {
            return bad("with flags that no mount has");
        }
        let is_read_only = own.is_some() && flags & libc::MS_RDONLY != 0;
        let [number, parent, kind, device] =
            [NUMBER, PARENT, KIND, DEVICE].map(|tag| number_of(mount, tag));
        Ok(Self { number, parent, kind, device, root, point, key, is_read_only })
    }

    /// Whether it is the container's root.
    pub(crate) fn is_root(&self) -> bool {
        self.key.is_none() && parts(self.point).next().is_none()
    }

    /// Whether CRIU would make `other` from it.
    pub(crate) fn makes(&self, other: &Self) -> bool {
        let mut wanted = parts(other.root);
        self.device == other.device && parts(self.root).all(|part| wanted.next() == Some(part))
    }
}

/// Reads the mounts of an image, and sees that CRIU would make none of what comes from outside but under
/// its key, and parts of file systems only of those that are in the container as a whole.
///
/// # Errors
/// Which one is otherwise.
pub(super) fn read(mounts: &[Message]) -> Result<Vec<Origin<'_>>, Fault> {
    if mounts.len() > MOUNTS_CAP {
        return Err(format!("has more than {MOUNTS_CAP} mounts"));
    }
    let all = mounts.iter().map(Origin::read).collect::<Result<Vec<_>, _>>()?;
    let mut numbers = BTreeSet::new();
    let mut devices: BTreeMap<u64, Vec<&Origin<'_>>> = BTreeMap::new();
    for mount in &all {
        if !numbers.insert(mount.number) {
            return Err(format!("has two mounts of number {}", mount.number));
        }
        devices.entry(mount.device).or_default().push(mount);
    }
    if all.iter().filter(|mount| mount.is_root()).count() > 1 {
        return Err("has two roots".to_owned());
    }
    for of_device in devices.values() {
        for mount in of_device.iter().filter(|mount| mount.key.is_none() && !mount.is_root()) {
            sources(mount, of_device)
                .map_err(|what| format!("has a mount at {:?} {what}", mount.point))?;
        }
    }
    Ok(all)
}

/// Looks at what CRIU could make `mount` from, of all that are of its device.
fn sources(mount: &Origin<'_>, of_device: &[&Origin<'_>]) -> Result<(), &'static str> {
    let others = || of_device.iter().filter(|other| other.number != mount.number);
    if others().any(|other| other.key.is_none() && other.kind != mount.kind) {
        return Err("of the device of another kind of file system");
    }
    let mut sources = others().filter(|other| other.makes(mount));
    let root = of_device.iter().find(|other| other.is_root() && other.makes(mount));
    if let Some(root) = root {
        // A part of the root: whatever it is made from shows no more.
        return match sources.all(|source| source.key.is_none() && root.makes(source)) {
            true => Ok(()),
            false => Err("that could be made from another than the root"),
        };
    }
    if sources.clone().any(|source| source.key.is_some()) {
        return Err("that shows what is mounted from outside once more");
    }
    let mut has_whole = || sources.any(|source| parts(source.root).next().is_none());
    let is_whole = parts(mount.root).next().is_none();
    if [PROC, SYSFS, DEVPTS].contains(&mount.kind) && !is_whole && !has_whole() {
        return Err("of a part of a file system that is not there as a whole");
    }
    Ok(())
}

/// The names in a path.
pub(super) fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty() && *part != ".")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mountable::{MQUEUE, TMPFS};

    /// A file system of the host, as it is dumped; its name is not in the image.
    const DISK: u64 = 0;

    fn mount(number: u64, kind: u64, device: u64, root: &str, point: &str) -> Message {
        let mut mount = Message::default();
        for (tag, value) in [(KIND, kind), (NUMBER, number), (DEVICE, device), (PARENT, 1)] {
            mount.set_number(tag, value);
        }
        for (tag, text) in [(ROOT, root), (POINT, point), (SOURCE, "none"), (OPTIONS, "size=64k")] {
            mount.set_bytes(tag, text.into());
        }
        let flags = libc::MS_NOSUID | libc::MS_RELATIME | libc::MS_SLAVE;
        mount.set_number(FLAGS, flags);
        mount.set_number(OWN_FLAGS, libc::MS_RDONLY);
        mount
    }

    fn keyed(mut mount: Message, key: &str) -> Message {
        mount.set_bytes(EXTERNAL_KEY, key.into());
        mount
    }

    fn with(mut mount: Message, tag: u32, number: u64) -> Message {
        mount.set_number(tag, number);
        mount
    }

    fn texted(mut mount: Message, tag: u32, text: &str) -> Message {
        mount.set_bytes(tag, text.into());
        mount
    }

    /// An honest container on a disk, with a volume beside it and one on a disk of its own.
    fn honest() -> Vec<Message> {
        vec![
            mount(1, DISK, 5, "/b/rootfs", "/"),
            keyed(mount(2, DISK, 5, "/b/data", "/data"), "/data"),
            keyed(mount(3, DISK, 77, "/", "/v"), "/v"),
            keyed(mount(4, 3, 6, "/null", "/proc/kcore"), "/dev/null"),
            mount(5, PROC, 40, "/", "/proc"),
            mount(6, PROC, 40, "/sys", "/proc/sys"),
            mount(7, SYSFS, 41, "/", "/sys"),
            mount(8, DEVPTS, 42, "/", "/dev/pts"),
            mount(9, DEVPTS, 42, "/0", "/dev/console"),
            mount(10, TMPFS, 43, "/", "/dev"),
            mount(11, TMPFS, 43, "/", "/dev-again"),
            mount(12, MQUEUE, 44, "/", "/dev/mqueue"),
            mount(13, DISK, 5, "/b/rootfs/bin", "/sbin"),
            mount(14, DISK, 5, "/b/rootfs/bin/deep", "/deep"),
            keyed(mount(15, 12, 45, "/c/x", "/sys/fs/cgroup/cpu"), "/sys/fs/cgroup/cpu"),
            // The host's, which there is only one of: nothing in it is above that.
            mount(16, 3, 6, "/", "/dev-all"),
        ]
    }

    fn refused(one: Message) -> String {
        let mut mounts = honest();
        mounts.push(one);
        read(&mounts).err().unwrap_or_default()
    }

    #[test]
    fn what_the_kernel_tells_of_mounts_is_taken() {
        let mounts = honest();
        let found = read(&mounts).expect("honest");
        assert_eq!(found.len(), mounts.len());
        assert_eq!((found[1].key, found[1].root, found[1].number), (Some("/data"), "/b/data", 2));
        assert!(!found[1].is_read_only);
        // On an overlay, which is a device of its own.
        let overlay = [
            mount(1, 17, 9, "/", "/"),
            mount(2, 17, 9, "/bin", "/sbin"),
            keyed(mount(3, DISK, 5, "/v", "/v"), "/v"),
        ];
        read(&overlay).expect("honest");
    }

    #[test]
    fn mounts_are_made_from_what_they_seem_to_be_made_from() {
        // A link in the root file system, or in a volume, would lead through the host.
        for forged in [
            mount(50, PROC, 5, "/b/rootfs/link/etc", "/x"),
            mount(50, TMPFS, 5, "/", "/x"),
            mount(50, SYSFS, 77, "/link/etc", "/x"),
            mount(50, TMPFS, 77, "/", "/x"),
            mount(50, DISK, 77, "/part", "/x"),
            mount(50, SYSFS, 40, "/", "/x"),
            mount(50, PROC, 46, "/sys", "/x"),
            mount(50, DEVPTS, 46, "/0", "/x"),
        ] {
            assert_ne!(refused(forged.clone()), "", "{forged:?}");
        }
        // CRIU takes either, and one of them is what comes from outside.
        let mut mounts = honest();
        mounts.push(keyed(mount(50, DISK, 5, "/b/rootfs/bin", "/y"), "/data"));
        assert!(read(&mounts).expect_err("either").contains("another than the root"));
        let mut mounts = honest();
        mounts.push(mount(50, DISK, 5, "/", "/y"));
        assert!(read(&mounts).expect_err("either").contains("another than the root"));
        // The kind of the root is looked at like that of the others.
        let mut mounts = honest();
        mounts[0] = mount(1, PROC, 40, "/b/rootfs", "/");
        mounts.push(mount(50, PROC, 40, "/b/rootfs/link/etc", "/x"));
        let whole = read(&mounts).expect_err("another kind");
        assert!(whole.contains("another"), "{whole}");
    }

    #[test]
    fn flags_make_no_other_call_of_a_mount() {
        let tmpfs = || mount(50, TMPFS, 46, "/", "/x");
        assert_eq!(refused(tmpfs()), "");
        for flag in [libc::MS_BIND, libc::MS_MOVE, libc::MS_REMOUNT, libc::MS_SHARED, libc::MS_REC]
        {
            assert_ne!(refused(with(tmpfs(), OWN_FLAGS, flag)), "", "{flag}");
        }
        for flag in [libc::MS_BIND, libc::MS_MOVE, libc::MS_REMOUNT, 1 << 31] {
            assert_ne!(refused(with(tmpfs(), FLAGS, flag)), "", "{flag}");
            let mut old = with(tmpfs(), FLAGS, flag);
            old.remove(OWN_FLAGS);
            assert_ne!(refused(old), "", "{flag}");
        }
        let mut old =
            with(tmpfs(), FLAGS, libc::MS_RDONLY | libc::MS_SYNCHRONOUS | libc::MS_RELATIME);
        old.remove(OWN_FLAGS);
        assert_eq!(refused(old.clone()), "");
        let honest = [mount(1, DISK, 5, "/b", "/"), old, with(tmpfs(), NUMBER, 51)];
        let honest = [&honest[..], &[with(with(tmpfs(), NUMBER, 52), FLAGS, libc::MS_RDONLY)]];
        let honest = honest.concat();
        let found: Vec<_> =
            read(&honest).expect("honest").iter().map(|mount| mount.is_read_only).collect();
        assert_eq!(found, [false, false, false, true], "as CRIU has it");
    }

    #[test]
    fn nothing_is_read_in_two_ways() {
        let tmpfs = || mount(50, TMPFS, 46, "/", "/x");
        for text in ["/..\0", "/x\0y", "\0"] {
            for tag in TEXTS {
                assert!(
                    refused(texted(tmpfs(), tag, text)).contains("two parts"),
                    "{tag} {text:?}"
                );
            }
        }
        let mut broken = tmpfs();
        broken.set_bytes(POINT, b"/\xff".to_vec());
        for forged in [
            broken,
            keyed(tmpfs(), "CRIU:EXTERNAL_DEV"),
            keyed(tmpfs(), "CRIU:AUTOGENERATED"),
            with(texted(tmpfs(), ROOT, "CRIU:EXTERNAL_DEV"), IS_EXTERNAL, 1),
            with(tmpfs(), BY_PLUGIN, 1 << 63),
            with(tmpfs(), DELETED, 1),
            with(tmpfs(), NUMBER, 5),
            mount(50, TMPFS, 46, "/../..", "/x"),
            mount(50, TMPFS, 46, "/", "/../x"),
            mount(50, DISK, 5, "/b/rootfs", "/"),
            mount(50, DISK, 5, "/b/rootfs", "//."),
        ] {
            assert_ne!(refused(forged.clone()), "", "{forged:?}");
        }
        // The source of what is given has been replaced.
        assert_eq!(refused(keyed(with(tmpfs(), DELETED, 1), "/x")), "");
    }

    #[test]
    fn there_are_not_more_mounts_than_can_be_looked_at() {
        let many = |count: u64| -> Vec<Message> {
            (1..=count).map(|number| mount(number, TMPFS, number, "/", "/x")).collect()
        };
        assert!(read(&many(MOUNTS_CAP as u64)).is_ok());
        assert!(read(&many(MOUNTS_CAP as u64 + 1)).expect_err("too many").contains("4096"));
    }
}
