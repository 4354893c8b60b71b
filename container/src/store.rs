//! The keeper's private tmpfs: CRIU's images, the pages that arrive, and the places where parts
//! of the bundle are mounted for a restore.
//!
//! It is mounted in the keeper's own mount namespace, so nothing of it is on a disk, nobody else
//! sees it, and all of it is gone with the keeper.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use decamp_shared::pages::{PAGE_SIZE, SpaceId};
use decamp_shared::workload::SpaceInfo;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{ContainerError, Result};
use crate::images::{PAGE_LIMIT, numbered_pages, pages_name};

/// No limit of its own: what fits is the host's and the agent's to judge, beforehand. Without huge
/// pages: the first byte of a file would have 2 MiB cleared, which takes a millisecond or six, and
/// CRIU writes dozens of small images while the container stands still; and a page that stands alone
/// in its space would take 2 MiB.
const OPTIONS: &str = "mode=0700,size=0,huge=never";
/// The same for kernels whose tmpfs knows no huge pages.
const PLAIN: &str = "mode=0700,size=0";

/// Where parts of the bundle are mounted for a container whose root is not this host's, and looks them up: it
/// may pass here and list nothing. Each keeper has a mount of its own there, which nobody else sees.
const PARTS: &str = "/run/decamp-parts";
const PARTS_OPTIONS: &str = "mode=0711,size=64m";

/// Numbers of processes are below this (the kernel's PID_MAX_LIMIT).
const PROCESS_LIMIT: i32 = 1 << 22;
/// A container has at most so many processes.
const SPACES_CAP: usize = 1 << 16;

/// A mounted tmpfs of our own.
pub(crate) struct Store {
    directory: PathBuf,
    /// Where parts of the bundle are mounted for a restore.
    parts: PathBuf,
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
        tmpfs(OPTIONS)
            .or_else(|_| tmpfs(PLAIN))
            .map_err(ContainerError::errno(format!("mount a tmpfs on {}", directory.display())))?;
        let store = Self {
            directory: directory.to_owned(),
            parts: directory.join("parts"),
            spaces: BTreeMap::new(),
        };
        mount(None::<&str>, directory, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>).map_err(
            ContainerError::errno(format!("make the mount on {} private", directory.display())),
        )?;
        fs::create_dir(store.parent()).map_err(ContainerError::io("make a directory for pages"))?;
        Ok(store)
    }

    /// For a container whose root is not this host's: has parts of the bundle mounted where it can look them
    /// up, and lets it pass from the images, which CRIU hands to it, to their parent. Nobody else comes to
    /// the images.
    pub(crate) fn open_to_others(&mut self) -> Result<()> {
        let pass = fs::Permissions::from_mode(0o711);
        fs::set_permissions(&self.directory, pass)
            .map_err(ContainerError::io(format!("open {}", self.directory.display())))?;
        fs::create_dir_all(PARTS).map_err(ContainerError::io(format!("make {PARTS}")))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let (place, none) = (PARTS, None::<&str>);
        mount(Some("decamp"), place, Some("tmpfs"), flags, Some(PARTS_OPTIONS))
            .map_err(ContainerError::errno(format!("mount a tmpfs on {PARTS}")))?;
        self.parts = PathBuf::from(PARTS);
        mount(none, place, none, MsFlags::MS_PRIVATE, none)
            .map_err(ContainerError::errno(format!("make the mount on {PARTS} private")))
    }

    /// Where CRIU's images are.
    pub(crate) fn images(&self) -> PathBuf {
        self.directory.join("images")
    }

    /// An empty directory for CRIU's images.
    pub(crate) fn fresh_images(&self) -> Result<PathBuf> {
        fresh(self.images())
    }

    /// An empty directory for files that CRIU reads in place of the kernel's.
    pub(crate) fn fresh_covers(&self) -> Result<PathBuf> {
        fresh(self.covers())
    }

    fn covers(&self) -> PathBuf {
        self.directory.join("covers")
    }

    /// Gives back what a dump takes, CRIU's images and what it read, without having it waited for: for hundreds
    /// of processes they are thousands of files.
    pub(crate) fn drop_images(&self) {
        let _ = fs::remove_dir_all(self.covers());
        let (images, dropped) = (self.images(), self.directory.join("dropped"));
        let remove = {
            let dropped = dropped.clone();
            move || drop(fs::remove_dir_all(dropped))
        };
        // It is there while the last ones are being removed.
        let renamed = fs::rename(&images, &dropped);
        let begun = renamed.and_then(|()| thread::Builder::new().spawn(remove));
        if begun.is_err() {
            let _ = fs::remove_dir_all(&images);
            let _ = fs::remove_dir_all(&dropped);
        }
    }

    /// The parent image, whose pages files are the spaces.
    pub(crate) fn parent(&self) -> PathBuf {
        self.directory.join("parent")
    }

    /// A directory for things that are needed for a while, beside the parts of the bundle.
    pub(crate) fn scratch(&self, name: &str) -> Result<PathBuf> {
        let path = self.parts.join(name);
        fs::create_dir_all(&path)
            .map_err(ContainerError::io(format!("make {}", path.display())))?;
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
            // As long as the address space: pages of zeros may never come, and CRIU, which reads them
            // all the same, waits for ever for what is behind the end of a file.
            self.open(info.process)?
                .set_len(PAGE_LIMIT * PAGE_SIZE as u64)
                .map_err(ContainerError::io(format!("make room for space {}", info.id)))?;
        }
        Ok(())
    }

    /// Whether process `inner` has a space.
    pub(crate) fn has(&self, inner: i32) -> bool {
        self.spaces.contains_key(&SpaceId(inner as u32))
    }

    /// The memory of process `inner`, which has a space.
    pub(crate) fn memory_of(&self, inner: i32) -> Result<OwnedFd> {
        self.memory(SpaceId(inner as u32))
    }

    /// A descriptor of a space: a sparse file whose offset is the address.
    pub(crate) fn memory(&self, space: SpaceId) -> Result<OwnedFd> {
        let process = self.spaces.get(&space);
        let process =
            process.ok_or_else(|| ContainerError::State(format!("There is no {space}")))?;
        Ok(self.open(*process)?.into())
    }

    fn open(&self, process: i32) -> Result<File> {
        self.open_named(&pages_name(process))
    }

    /// The pages file of that number, which is of no process, in the parent image.
    pub(crate) fn pages_file(&self, number: u32) -> Result<File> {
        self.open_named(&numbered_pages(number))
    }

    /// Where a tmpfs that the container will have is mounted.
    pub(crate) fn tree(&self, number: u32) -> PathBuf {
        self.parts.join("trees").join(number.to_string())
    }

    fn open_named(&self, name: &str) -> Result<File> {
        let path = self.parent().join(name);
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(ContainerError::io(format!("open {}", path.display())))
    }

    /// Mounts what `source` leads to, with all that is mounted below it, as `name` where nobody else
    /// sees it, and gives the place.
    pub(crate) fn mount_part(&self, source: &Path, name: &str) -> Result<PathBuf> {
        let place = self.parts.join(name);
        let make = || -> std::io::Result<()> {
            fs::create_dir_all(&self.parts)?;
            match fs::metadata(source)?.is_dir() {
                true => fs::create_dir(&place),
                false => File::create_new(&place).map(drop),
            }
        };
        make().map_err(ContainerError::io(format!("make {}", place.display())))?;
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(Some(source), &place, None::<&str>, bind, None::<&str>)
            .and_then(|()| mount(None::<&str>, &place, None::<&str>, private, None::<&str>))
            .map_err(ContainerError::errno(format!("mount a part of the bundle as {name}")))?;
        Ok(place)
    }

    /// The same for what a bind mount shows. One that got the host's mounts too while it ran, as a slave, gets
    /// them from its source in CRIU's eyes, which therefore has to have somebody to share with.
    pub(crate) fn mount_bind(&self, source: &Path, name: &str) -> Result<PathBuf> {
        let place = self.mount_part(source, name)?;
        mount(None::<&str>, &place, None::<&str>, MsFlags::MS_SHARED, None::<&str>)
            .map_err(ContainerError::errno(format!("share the mount of {name}")))?;
        Ok(place)
    }

    fn unmount_parts(&self) {
        // Before a restore there are none.
        let Ok(parts) = fs::read_dir(&self.parts) else { return };
        for part in parts.flatten() {
            let _ = umount2(&part.path(), MntFlags::MNT_DETACH);
        }
    }

    /// Gives back all that the store holds, once nobody needs it.
    pub(crate) fn empty(&mut self) {
        self.spaces.clear();
        self.unmount_parts();
        for part in ["images", "covers", "parent"] {
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
        self.unmount_parts();
        if !self.parts.starts_with(&self.directory) {
            let _ = umount2(&self.parts, MntFlags::MNT_DETACH);
        }
        if let Err(error) = umount2(&self.directory, MntFlags::MNT_DETACH) {
            tracing::warn!(%error, path = %self.directory.display(), "Cannot unmount the store");
        }
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Makes a directory, or makes it empty.
fn fresh(directory: PathBuf) -> Result<PathBuf> {
    let named = |what: &str| format!("{what} the directory {}", directory.display());
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(ContainerError::io(named("empty"))(error));
        }
        _ => {}
    }
    fs::create_dir(&directory).map_err(ContainerError::io(named("make")))?;
    Ok(directory)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One for a test, where it can be mounted.
    pub(crate) fn store(directory: &Path) -> Option<Store> {
        let store = Store::mount(&directory.join("store"));
        store.inspect_err(|error| eprintln!("skipped: {error}: needs root")).ok()
    }
}
