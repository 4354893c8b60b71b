//! Finding the tmpfs mounts that a container has for itself, and holding them open: by a mount of our own
//! that nobody sees, so that the container can unmount its own at any time.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, fstat, fstatvfs, openat, openat2};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::list::{self, Large};
use super::{TREES_CAP, Tree};
use crate::error::{ContainerError, Result};
use crate::mounts::ExternalMount;

/// Bytes of a label; a session takes no more than 256.
const LABEL_MOST: usize = 200;

/// A tmpfs that is mounted once in the container, whole, and comes from nowhere else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Own {
    /// The kernel's number of the mount.
    id: u64,
    device: u64,
    mounted: String,
    source: String,
    options: String,
}

/// The tmpfs mounts of a container that runs here, and that hold large files.
#[derive(Default)]
pub(crate) struct Held {
    trees: Vec<HeldTree>,
    /// How many there have been. The numbers of those that are gone are not given again.
    counted: u32,
}

struct HeldTree {
    number: u32,
    own: Own,
    root: OwnedFd,
}

/// A large file on one of them.
pub(crate) struct OfTree {
    pub(crate) number: u32,
    pub(crate) device: u64,
    /// What people read of it, and the destination needs to make room: where it is.
    pub(crate) label: String,
    pub(crate) file: Large,
}

impl Held {
    /// Looks at the mounts `own` of the container whose first process is `init`, which may be running, and
    /// gives the large files on them.
    pub(crate) fn look(&mut self, init: i32, own: Vec<Own>) -> Vec<OfTree> {
        self.trees.retain(|tree| own.contains(&tree.own));
        let known = |one: &Own| self.trees.iter().any(|tree| tree.own == *one);
        let fresh: Vec<Own> = own.into_iter().filter(|one| !known(one)).collect();
        let roots = if fresh.is_empty() { Vec::new() } else { roots_in(init, &fresh) };
        for (own, root) in roots {
            if self.counted as usize >= TREES_CAP {
                break;
            }
            self.trees.push(HeldTree { number: self.counted, own, root });
            self.counted += 1;
        }
        let mut found = Vec::new();
        for tree in &self.trees {
            match list::large(tree.root.as_fd(), tree.own.device) {
                Ok(files) => found.extend(files.into_iter().map(|file| tree.named(file))),
                // It changes under our hands, or holds what is not known here.
                Err(error) => {
                    tracing::debug!(mounted = tree.own.mounted, %error, "A tmpfs is left to CRIU");
                }
            }
        }
        found
    }

    /// What is on tree `number`, now that nobody writes; `space_of` says which files have a space, by their
    /// inode numbers.
    pub(crate) fn list(
        &self,
        number: u32,
        space_of: impl Fn(u64) -> Option<u32>,
    ) -> std::io::Result<Tree> {
        let tree = self.trees.iter().find(|tree| tree.number == number);
        let tree = tree.ok_or_else(|| std::io::Error::other("It is not held"))?;
        Ok(Tree {
            number,
            mounted: tree.own.mounted.clone(),
            source: tree.own.source.clone(),
            options: tree.own.options.clone(),
            entries: list::entries(tree.root.as_fd(), tree.own.device, space_of)?,
        })
    }

    /// The device of tree `number`.
    pub(crate) fn device(&self, number: u32) -> Option<u64> {
        self.trees.iter().find(|tree| tree.number == number).map(|tree| tree.own.device)
    }

    /// Lets go of all.
    pub(crate) fn forget(&mut self) {
        self.trees.clear();
    }
}

impl HeldTree {
    fn named(&self, file: Large) -> OfTree {
        let (number, Own { source, mounted, .. }) = (self.number, &self.own);
        let mut label = format!("tmpfs {number} {source} {mounted}{}", file.path);
        let most = (0..=LABEL_MOST).rev().find(|at| label.is_char_boundary(*at));
        label.truncate(most.unwrap_or(0));
        OfTree { number, device: self.own.device, label, file }
    }
}

/// The number and the source in the label of a space that is a file on a tmpfs.
pub(crate) fn tree_in(label: &str) -> Option<(u32, &str)> {
    let (number, rest) = label.strip_prefix("tmpfs ")?.split_once(' ')?;
    let (source, _) = rest.split_once(' ')?;
    Some((number.parse().ok()?, source))
}

/// The tmpfs mounts that the container whose first process is `init` has for itself; `given` are those
/// that are not its own.
pub(crate) fn own(init: i32, given: &[ExternalMount]) -> Result<Vec<Own>> {
    let path = format!("/proc/{init}/mountinfo");
    let text = fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))?;
    Ok(own_in(&text, |mounted| given.iter().any(|mount| mount.mounted == mounted)))
}

fn own_in(mountinfo: &str, is_given: impl Fn(&str) -> bool) -> Vec<Own> {
    let device = |line: &str| line.split(' ').nth(2).map(str::to_owned);
    let once = |line: &&str| {
        let ours = device(line);
        ours.is_some() && mountinfo.lines().filter(|other| device(other) == ours).count() == 1
    };
    let found = mountinfo.lines().filter(once).filter_map(Own::parse);
    found.filter(|own| !is_given(&own.mounted)).collect()
}

impl Own {
    /// Bytes that it holds, in the container whose first process is `init`; 0 where that cannot be told.
    pub(crate) fn used(&self, init: i32) -> u64 {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let Ok(root) = fs::File::open(format!("/proc/{init}/root")) else { return 0 };
        let opened = openat2(&root, self.mounted.as_str(), flags, Mode::empty(), how);
        let Ok(there) = opened else { return 0 };
        // Something else may be mounted there by now.
        let is_it = fstat(&there).is_ok_and(|found| found.st_dev == self.device);
        let told = fstatvfs(&there).ok().filter(|_| is_it);
        let used = told.map(|told| told.f_blocks.saturating_sub(told.f_bfree) * told.f_frsize);
        used.unwrap_or(0)
    }

    /// A line of mountinfo, if it is of a whole tmpfs that nobody else shares. What has a name that would
    /// have to be escaped is left to CRIU.
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ');
        let (id, _parent, device, root) = (left.next()?, left.next()?, left.next()?, left.next()?);
        let (mounted, _flags) = (left.next()?, left.next()?);
        // What it propagates to, or from.
        let shares = left.next().is_some();
        let mut right = right.split(' ');
        let (kind, source, options) = (right.next()?, right.next()?, right.next()?);
        let (major, minor) = device.split_once(':')?;
        let plain = |text: &str| !text.contains(['\\', '[', ']', ':']);
        let whole = kind == "tmpfs" && root == "/" && mounted != "/" && !shares;
        (whole && plain(mounted) && plain(source) && source.len() <= 64).then_some(Self {
            id: id.parse().ok()?,
            device: libc::makedev(major.parse().ok()?, minor.parse().ok()?),
            mounted: mounted.to_owned(),
            source: source.to_owned(),
            options: options.to_owned(),
        })
    }
}

/// The roots of the mounts `own`, looked for in the mount namespace of process `init`. One that cannot be
/// reached is left out.
fn roots_in(init: i32, own: &[Own]) -> Vec<(Own, OwnedFd)> {
    let Ok(namespace) = fs::File::open(format!("/proc/{init}/ns/mnt")) else { return Vec::new() };
    // A thread of its own: it never comes back from there.
    let looked = thread::scope(|scope| {
        scope
            .spawn(|| -> nix::Result<Vec<(Own, OwnedFd)>> {
                unshare(CloneFlags::CLONE_FS)?;
                setns(&namespace, CloneFlags::CLONE_NEWNS)?;
                let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
                let open = |own: &Own| {
                    let mount = open_tree(CWD, own.mounted.as_str(), flags).ok()?;
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                    openat(&mount, ".", flags, Mode::empty()).ok()
                };
                let opened = own.iter().filter_map(|own| Some((own.clone(), open(own)?)));
                // Another may be mounted over it.
                Ok(opened.filter(|(own, root)| is_of(root.as_fd(), own.device)).collect())
            })
            .join()
    });
    match looked {
        Ok(Ok(found)) => found,
        Ok(Err(errno)) => {
            tracing::debug!(%errno, "The container's tmpfs mounts cannot be reached");
            Vec::new()
        }
        Err(_) => Vec::new(),
    }
}

fn is_of(root: BorrowedFd<'_>, device: u64) -> bool {
    fstat(root).is_ok_and(|found| found.st_dev == device)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
20 1 98:0 /x / rw,relatime - ext4 /dev/vda rw
21 20 0:40 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755
22 21 0:41 / /dev/shm rw,nosuid - tmpfs shm rw,size=65536k
23 20 0:42 / /twice rw - tmpfs tmpfs rw
24 20 0:42 / /again rw - tmpfs tmpfs rw
25 20 0:43 /part /part rw - tmpfs tmpfs rw
26 20 0:44 / /shared rw shared:5 - tmpfs tmpfs rw
27 20 0:45 / /given rw - tmpfs tmpfs rw
28 20 0:46 / /a\\040b rw - tmpfs tmpfs rw
";

    #[test]
    fn what_a_container_has_for_itself_is_known() {
        let found = own_in(MOUNTINFO, |mounted| mounted == "/given");
        let places: Vec<&str> = found.iter().map(|own| own.mounted.as_str()).collect();
        assert_eq!(places, ["/dev", "/dev/shm"]);
        assert_eq!((found[1].source.as_str(), found[1].device), ("shm", libc::makedev(0, 41)));
        assert_eq!(found[1].options, "rw,size=65536k");
    }

    #[test]
    fn labels_are_no_longer_than_a_session_takes() {
        let root: OwnedFd = fs::File::open("/").expect("a directory").into();
        let own = own_in(MOUNTINFO, |_| false).remove(1);
        let tree = HeldTree { number: 3, own, root };
        let named = |path: String| {
            let file = fs::File::open("/dev/null").expect("a file");
            tree.named(Large { inode: 1, path, file }).label
        };
        assert_eq!(named("/x".to_owned()), "tmpfs 3 shm /dev/shm/x");
        let long = named("/\u{e9}".repeat(200));
        assert!(long.len() <= LABEL_MOST && tree_in(&long) == Some((3, "shm")), "{long}");
    }

    #[test]
    fn labels_name_the_tree() {
        assert_eq!(tree_in("tmpfs 3 shm /dev/shm/x y"), Some((3, "shm")));
        for label in ["tmpfs x shm /a", "tmpfs 3", "shared memory x", "tmpfs 3 shm"] {
            assert_eq!(tree_in(label), None, "{label}");
        }
    }
}
