//! The keeper's private tmpfs: CRIU's images, the pages that arrive, and the place where a root file
//! system is mounted for a restore.
//!
//! It is mounted in the keeper's own mount namespace, so nothing of it is on a disk, nobody else
//! sees it, and all of it is gone with the keeper.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use decamp_shared::pages::SpaceId;
use decamp_shared::workload::SpaceInfo;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{ContainerError, Result};
use crate::images::{PAGE_LIMIT, pages_name};
use crate::swrk::two_numbers;

/// No limit of its own: what fits is the host's and the agent's to judge, beforehand.
const PLAIN: &str = "mode=0700,size=0";
/// The same with folios as large as what is written at once: pages arrive in half the time.
const LARGE: &str = "mode=0700,size=0,huge=always";

/// Numbers of processes are below this (the kernel's PID_MAX_LIMIT).
const PROCESS_LIMIT: i32 = 1 << 22;
/// A container has at most so many processes.
const SPACES_CAP: usize = 1 << 16;

/// A mounted tmpfs of our own.
pub(crate) struct Store {
    directory: PathBuf,
    spaces: BTreeMap<SpaceId, i32>,
}

impl Store {
    /// Mounts a fresh one on `directory`, which is made.
    pub(crate) fn mount(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)
            .map_err(ContainerError::io(format!("make {}", directory.display())))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let tmpfs =
            |options: &str| mount(Some("decamp"), directory, Some("tmpfs"), flags, Some(options));
        let mounted = match large_folios() {
            true => tmpfs(LARGE).or_else(|_| tmpfs(PLAIN)),
            false => tmpfs(PLAIN),
        };
        mounted
            .map_err(ContainerError::errno(format!("mount a tmpfs on {}", directory.display())))?;
        let store = Self { directory: directory.to_owned(), spaces: BTreeMap::new() };
        mount(None::<&str>, directory, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>).map_err(
            ContainerError::errno(format!("make the mount on {} private", directory.display())),
        )?;
        fs::create_dir(store.parent()).map_err(ContainerError::io("make a directory for pages"))?;
        Ok(store)
    }

    /// Where CRIU's images are.
    pub(crate) fn images(&self) -> PathBuf {
        self.directory.join("images")
    }

    /// An empty directory for CRIU's images.
    pub(crate) fn fresh_images(&self) -> Result<PathBuf> {
        let images = self.images();
        match fs::remove_dir_all(&images) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(ContainerError::io("empty the directory for images")(error));
            }
            _ => {}
        }
        fs::create_dir(&images).map_err(ContainerError::io("make a directory for images"))?;
        Ok(images)
    }

    /// The parent image, whose pages files are the spaces.
    pub(crate) fn parent(&self) -> PathBuf {
        self.directory.join("parent")
    }

    /// A directory for things that are needed for a while.
    pub(crate) fn scratch(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        fs::create_dir(&path).map_err(ContainerError::io(format!("make {}", path.display())))?;
        Ok(path)
    }

    /// Makes room for spaces of processes.
    pub(crate) fn make_spaces(&mut self, spaces: &[SpaceInfo]) -> Result<()> {
        for info in spaces {
            let bad = |what: &str| ContainerError::State(format!("Space {} {what}", info.id));
            let fits = info.page_limit <= PAGE_LIMIT && info.process as u32 == info.id;
            if !(1..PROCESS_LIMIT).contains(&info.process) || !fits {
                return Err(bad("is of no process of a container"));
            }
            if self.spaces.len() >= SPACES_CAP {
                return Err(bad("is one too many"));
            }
            if self.spaces.insert(SpaceId(info.id), info.process).is_some() {
                return Err(bad("exists already"));
            }
            self.open(info.process)?;
        }
        Ok(())
    }

    /// Whether process `inner` has a space.
    pub(crate) fn has(&self, inner: i32) -> bool {
        self.spaces.contains_key(&SpaceId(inner as u32))
    }

    /// A descriptor of a space: a sparse file whose offset is the address.
    pub(crate) fn memory(&self, space: SpaceId) -> Result<OwnedFd> {
        let process = self.spaces.get(&space);
        let process =
            process.ok_or_else(|| ContainerError::State(format!("There is no {space}")))?;
        Ok(self.open(*process)?.into())
    }

    fn open(&self, process: i32) -> Result<File> {
        let path = self.parent().join(pages_name(process));
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(ContainerError::io(format!("open {}", path.display())))
    }

    /// Makes `rootfs` a mount of its own, as CRIU wants the root of what it restores.
    pub(crate) fn mount_root(&self, rootfs: &Path) -> Result<PathBuf> {
        let root = self.scratch("root")?;
        mount(Some(rootfs), &root, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
            .map_err(ContainerError::errno(format!(
                "mount {} on {}",
                rootfs.display(),
                root.display()
            )))?;
        mount(
            None::<&str>,
            &root,
            None::<&str>,
            MsFlags::MS_PRIVATE | MsFlags::MS_REC,
            None::<&str>,
        )
        .map_err(ContainerError::errno("make the root's mount private"))?;
        Ok(root)
    }

    /// Gives back all that the store holds, once nobody needs it.
    pub(crate) fn empty(&mut self) {
        self.spaces.clear();
        let _ = umount2(&self.directory.join("root"), MntFlags::MNT_DETACH);
        for part in ["images", "parent"] {
            let path = self.directory.join(part);
            if let Err(error) = fs::remove_dir_all(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(%error, path = %path.display(), "Cannot give memory back");
            }
        }
        let _ = fs::create_dir(self.parent());
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = umount2(&self.directory.join("root"), MntFlags::MNT_DETACH);
        if let Err(error) = umount2(&self.directory, MntFlags::MNT_DETACH) {
            tracing::warn!(%error, path = %self.directory.display(), "Cannot unmount the store");
        }
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Whether the kernel's tmpfs makes folios as large as what is written (6.14 and newer do). Older ones
/// would give 2 MiB to each page that stands alone.
fn large_folios() -> bool {
    let release = nix::sys::utsname::uname().ok();
    let version = release.and_then(|uname| two_numbers(uname.release().to_str()?));
    version.is_some_and(|version| version >= (6, 14))
}
