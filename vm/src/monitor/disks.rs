//! The disks of the one VM, as its monitor opens them: by the paths of its spec or, of those that went over to other
//! files while the guest ran, as what they went over to. No path of those is believed: a keeper shows what it has open
//! already, with all rights that it could want, and that is opened again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::files::open_disk;
use crate::spec::VmSpec;

/// All of them.
#[derive(Debug)]
pub(super) struct Disks(Vec<One>);

#[derive(Debug)]
struct One {
    readonly: bool,
    at: At,
    /// What it goes over to with the next switch.
    next: Option<Pin>,
}

#[derive(Debug)]
enum At {
    Path(PathBuf),
    Pin(Pin),
}

/// A file, whatever name it has. It is open for nothing: who waits for a lock of it, or for its keeper to have closed
/// it, does not wait for this.
#[derive(Debug)]
struct Pin(File);

impl Pin {
    fn of(file: &File) -> io::Result<Self> {
        let mut nothing = OpenOptions::new();
        nothing.read(true).custom_flags(libc::O_PATH);
        nothing.open(format!("/proc/self/fd/{}", file.as_raw_fd())).map(Self)
    }

    fn open(&self, write: bool) -> io::Result<File> {
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        OpenOptions::new().read(true).write(write).open(path)
    }
}

impl Disks {
    /// Those of `spec`.
    pub(super) fn of(spec: &VmSpec) -> Self {
        let one = |disk: &crate::spec::DiskSpec| One {
            readonly: disk.readonly,
            at: At::Path(disk.path.clone()),
            next: None,
        };
        Self(spec.disks.iter().map(one).collect())
    }

    /// Disk `number`, opened.
    ///
    /// # Errors
    /// The kernel's; when there is none, or it is to be written and may only be read.
    pub(super) fn open(&mut self, number: u8, write: bool) -> io::Result<File> {
        let disk = self.find(number)?;
        match &disk.at {
            _ if write && disk.readonly => Err(refused()),
            At::Path(path) => open_disk(path, write),
            At::Pin(pin) => pin.open(write),
        }
    }

    /// Disk `number` goes over to `file` with the next switch. Only its inode is held here: the lock that `file` has
    /// is its keeper's to give up.
    ///
    /// # Errors
    /// The kernel's; when there is no such disk, its guest does not write it, or `file` is no regular file that is
    /// open for reading and writing at any place.
    pub(super) fn give_next(&mut self, number: u8, file: &File) -> io::Result<()> {
        let disk = self.find(number)?;
        let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL)?);
        let usual = flags & OFlag::O_ACCMODE == OFlag::O_RDWR
            && !flags.intersects(OFlag::O_APPEND | OFlag::O_PATH);
        if disk.readonly || !usual || !file.metadata()?.is_file() {
            return Err(refused());
        }
        disk.next = Some(Pin::of(file)?);
        Ok(())
    }

    /// Disk `number` stays where it is.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn drop_next(&mut self, number: u8) -> io::Result<()> {
        self.find(number)?.next = None;
        Ok(())
    }

    /// Those go over that have where to, once that is `noted`.
    ///
    /// # Errors
    /// Whatever `noted` says; when there is none.
    pub(super) fn go_over(&mut self, noted: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if self.0.iter().all(|disk| disk.next.is_none()) {
            return Err(none_such());
        }
        noted()?;
        for disk in &mut self.0 {
            if let Some(next) = disk.next.take() {
                disk.at = At::Pin(next);
            }
        }
        Ok(())
    }

    fn find(&mut self, number: u8) -> io::Result<&mut One> {
        self.0.get_mut(usize::from(number)).ok_or_else(none_such)
    }
}

fn none_such() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

fn refused() -> io::Error {
    io::Error::from_raw_os_error(libc::EACCES)
}
