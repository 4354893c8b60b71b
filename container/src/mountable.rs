//! What a container may have mounted besides what its configuration brings from outside: one rule, for what
//! the kernel says of a container that runs here and is to move, and for what images say that came from
//! another host or out of a file. So what a destination would refuse in the stop is refused before it.
//!
//! Whatever is mounted is a file system of the container's own, or a part of its root. (What is mounted once
//! more of a volume counts as from outside.) A part of any other file system is refused: CRIU makes it by a
//! path within that file system, whose links, out of images that nobody has looked at, would lead through this
//! host.

use std::fs::File;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::bundle::Bundle;

/// File systems by the kernel's names for them, and their numbers in CRIU's `mnt.proto`. Of all others, and of
/// root file systems, the number is 0 or another that is not in here.
const NUMBERS: [(&str, u64); 16] = [
    ("proc", PROC),
    ("sysfs", SYSFS),
    ("devtmpfs", 3),
    ("binfmt_misc", 4),
    ("tmpfs", TMPFS),
    ("devpts", DEVPTS),
    ("pstore", 8),
    ("securityfs", 9),
    ("fusectl", 10),
    ("debugfs", 11),
    ("cgroup", 12),
    ("mqueue", MQUEUE),
    ("overlay", OVERLAY),
    ("autofs", 18),
    ("tracefs", 19),
    ("cgroup2", CGROUP2),
];

/// Those that every container may have. None shows more of the host than the namespaces do.
pub(crate) const PROC: u64 = 1;
pub(crate) const SYSFS: u64 = 2;
pub(crate) const TMPFS: u64 = 5;
pub(crate) const DEVPTS: u64 = 6;
pub(crate) const MQUEUE: u64 = 14;
/// That which none may have but as its root.
const OVERLAY: u64 = 17;
/// That which it may have where its configuration mounts control groups.
pub(crate) const CGROUP2: u64 = 23;
/// Those that it may have where its configuration mounts them. An overlay is none of them: CRIU would put it
/// together from those directories of this host that an image names.
const CONFIGURED: [&str; 7] =
    ["devtmpfs", "binfmt_misc", "pstore", "securityfs", "fusectl", "debugfs", "tracefs"];

/// A mount, as images and the kernel describe it alike.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mounted<'a> {
    /// The number of its file system's kind: [`number_of`].
    pub(crate) kind: u64,
    /// What mounts of one file system have in common.
    pub(crate) device: u64,
    /// Which part of the file system is mounted.
    pub(crate) root: &'a str,
    /// Where, in the container.
    pub(crate) point: &'a str,
}

/// Why a container may not have a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unmountable {
    #[error("it leads elsewhere by dots in its path")]
    Leads,
    #[error("it is mounted over the container's root")]
    OverRoot,
    #[error("it shows what belongs to one process in /proc")]
    OfProcess,
    #[error("it is a file system of a kind that the container's configuration does not mount")]
    Kind,
    #[error(
        "it is an overlay, which CRIU would put together from whatever directories of the host it is told"
    )]
    Overlay,
    #[error("it is a part of a file system, other than the container's root or gone from there")]
    Part,
}

/// The container's configuration and its root, which mounts are held to.
#[derive(Clone, Copy)]
pub(crate) struct Mountable<'a> {
    pub(crate) bundle: &'a Bundle,
    /// The root file system, as it is here, with nothing mounted in it.
    pub(crate) root: &'a Path,
}

impl Mountable<'_> {
    /// Whether the container, whose root is mounted as `whole`, may have `mount`, which is not that root and
    /// not from outside.
    pub(crate) fn check(&self, whole: Mounted<'_>, mount: Mounted<'_>) -> Result<(), Unmountable> {
        mount.check_path()?;
        if mount.is_root() {
            return Err(Unmountable::OverRoot);
        }
        let fine = |is_fine, why| if is_fine { Ok(()) } else { Err(why) };
        match (mount.kind, mount.root) {
            (PROC, part) => fine(is_plain_in_proc(part), Unmountable::OfProcess),
            // There are no links of the container's making there.
            (SYSFS | DEVPTS | MQUEUE, _) | (TMPFS, "/") => Ok(()),
            (CGROUP2, _) => fine(self.bundle.mounts_cgroups(), Unmountable::Kind),
            (OVERLAY, "/") => Err(Unmountable::Overlay),
            (kind, "/") if self.configures(kind) => Ok(()),
            (_, "/") => Err(Unmountable::Kind),
            _ => fine(self.is_part(whole, mount), Unmountable::Part),
        }
    }

    /// Whether the configuration mounts file systems of that kind.
    fn configures(&self, kind: u64) -> bool {
        let mounts = self.bundle.config()["mounts"].as_array().into_iter().flatten();
        let mut kinds = mounts.filter_map(|mount| mount["type"].as_str());
        kinds.any(|name| CONFIGURED.contains(&name) && number_of(name) == kind)
    }

    /// Whether a mount shows a part of the container's root, to which no link leads: CRIU would follow one.
    fn is_part(&self, whole: Mounted<'_>, mount: Mounted<'_>) -> bool {
        let same = whole.device == mount.device && whole.kind == mount.kind;
        let Ok(below) = Path::new(mount.root).strip_prefix(whole.root) else { return false };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
        same && File::open(self.root).is_ok_and(|open| openat2(open, below, how).is_ok())
    }
}

impl Mounted<'_> {
    /// Whether it is at the container's root, however that is written.
    pub(crate) fn is_root(&self) -> bool {
        self.point.split('/').all(|part| part.is_empty() || part == ".")
    }

    /// Whether neither of its paths leads up.
    pub(crate) fn check_path(&self) -> Result<(), Unmountable> {
        let leads = |path: &str| path.split('/').any(|part| part == "..");
        if leads(self.root) || leads(self.point) { Err(Unmountable::Leads) } else { Ok(()) }
    }
}

/// The number of file systems that the kernel calls `name`.
pub(crate) fn number_of(name: &str) -> u64 {
    NUMBERS.iter().find(|(known, _)| *known == name).map_or(0, |(_, number)| *number)
}

/// Whether this part of a proc file system is none of a process's own, whose links lead anywhere.
fn is_plain_in_proc(part: &str) -> bool {
    let first = part.split('/').find(|part| !part.is_empty() && *part != ".").unwrap_or("");
    !first.starts_with(|first: char| first.is_ascii_digit())
        && !["self", "thread-self"].contains(&first)
}
