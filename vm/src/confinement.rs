//! What a keeper gives up before its guest runs: the host's files, networks, names and users, and all privileges. What
//! it needs of those later its monitor does ([`crate::monitor`]); its threads are confined further
//! ([`crate::sandbox`]).
//!
//! Each step that this host does not have, or that the agent itself may not take (as within a container), is left
//! out and said. Done by the one thread that there is, before there are others: namespaces and rights are a
//! thread's own.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, chdir, chroot, mkdir, pivot_root, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};

use crate::error::{Result, VmError};
use crate::sandbox::confine_keeper;
use crate::sys::process::{bound_capabilities, drop_capabilities};

/// How a keeper is confined, for its users.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Confinement {
    /// The user and group that it runs as, if that is one of its own.
    pub(crate) user: Option<u32>,
    /// The namespaces that are its own.
    pub(crate) namespaces: Vec<&'static str>,
    /// Controllers of the control groups that are its own.
    pub(crate) controllers: Vec<&'static str>,
    /// Whether there is a monitor that does for it what it may not.
    pub(crate) monitor: Presence,
    /// What it does without, and why.
    pub(crate) lacks: Vec<String>,
}

/// Whether a keeper has its monitor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Presence {
    /// It has none, and does all by itself.
    #[default]
    None,
    /// It has one.
    Runs,
    /// It had one.
    Ended,
}

impl Confinement {
    /// Takes every step that there is; `mount_at` is a directory for the mount that becomes its root.
    ///
    /// # Errors
    /// When it would keep privileges.
    pub(crate) fn enter(&mut self, mount_at: &Path, user: Option<u32>) -> Result<()> {
        let mut without = Vec::new();
        let namespaces = [
            (CloneFlags::CLONE_NEWIPC, "ipc"),
            (CloneFlags::CLONE_NEWUTS, "uts"),
            (CloneFlags::CLONE_NEWNET, "network"),
            (CloneFlags::CLONE_NEWNS, "mount"),
        ];
        for (flag, name) in namespaces {
            match unshare(flag) {
                Ok(()) => self.namespaces.push(name),
                Err(error) => without.push(format!("a {name} namespace ({error})")),
            }
        }
        if self.namespaces.contains(&"mount")
            && let Err(error) = empty_root(mount_at)
        {
            without.push(format!("an empty root directory ({error})"));
        }
        // While it may.
        bound_capabilities();
        if let Some(user) = user {
            match become_user(user) {
                Ok(()) => self.user = Some(user),
                Err(error) => without.push(format!("a user of its own ({error})")),
            }
        }
        let failed = |error: io::Error| VmError::refused("give its privileges up", error);
        drop_capabilities().map_err(failed)?;
        prctl::set_no_new_privs().map_err(|error| failed(error.into()))?;
        if let Err(error) = confine_keeper() {
            without.push(format!("a filter of system calls ({error})"));
        }
        self.lacks.append(&mut without);
        // No other process of that user, should there be one, looks into guest memory; nor does a core file.
        prctl::set_dumpable(false).map_err(|error| failed(error.into()))
    }
}

/// Puts an empty directory, in which nothing can be made, in the place of all that is mounted. It is one within the
/// root of its file system: a process whose root is not that of its mount namespace makes no user namespaces
/// (user_namespaces(7)), in which it would have all capabilities again, over what the kernel then lets it reach.
fn empty_root(at: &Path) -> io::Result<()> {
    const NONE: Option<&str> = None;
    const WITHIN: &str = "nothing";
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NONE, "/", NONE, private, NONE)?;
    let bare = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), at, Some("tmpfs"), bare, Some("size=4k,nr_inodes=3,mode=555"))?;
    chdir(at)?;
    match pivot_root(".", ".") {
        Ok(()) => umount2(".", MntFlags::MNT_DETACH)?,
        // The first root of all, that of an initial ramdisk, stays below.
        Err(Errno::EINVAL) => {
            mount(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE)?;
            chroot(".")?;
        }
        Err(error) => return Err(error.into()),
    }
    chdir("/")?;
    mkdir(WITHIN, Mode::from_bits_truncate(0o555))?;
    let readonly = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | bare;
    mount(NONE, "/", NONE, readonly, NONE)?;
    chroot(WITHIN)?;
    Ok(chdir("/")?)
}

fn become_user(id: u32) -> nix::Result<()> {
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)
}
