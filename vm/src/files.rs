//! How the files of a VM are opened: by their paths, or, where its keeper is confined, by its monitor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::disk::lock;
use crate::error::{Result, VmError};
use crate::monitor::{Monitor, Request};

/// How files are opened. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) enum Files {
    /// By their paths.
    #[default]
    Own,
    /// By the monitor.
    Monitored(Monitor),
}

impl Files {
    /// Disk `number`, which lies at `path`.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn disk(&self, number: usize, path: &Path, write: bool) -> io::Result<File> {
        match self {
            Self::Own => open_disk(path, write),
            Self::Monitored(monitor) => {
                let number = numbered(number).map_err(io::Error::other)?;
                monitor.open(&Request::Disk { number, write }, None).map(File::from)
            }
        }
    }

    /// The kernel, which lies at `path`.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn kernel(&self, path: &Path) -> io::Result<File> {
        self.boot_file(path, &Request::Kernel)
    }

    /// The initial ramdisk, which lies at `path`.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn initrd(&self, path: &Path) -> io::Result<File> {
        self.boot_file(path, &Request::Initrd)
    }

    fn boot_file(&self, path: &Path, request: &Request) -> io::Result<File> {
        match self {
            Self::Own => open_boot_file(path),
            Self::Monitored(monitor) => monitor.open(request, None).map(File::from),
        }
    }

    /// What is open as `file` once more, with a position and locks of its own.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn again(&self, file: BorrowedFd<'_>, write: bool) -> io::Result<OwnedFd> {
        match self {
            Self::Own => {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                OpenOptions::new().read(true).write(write).open(path).map(OwnedFd::from)
            }
            Self::Monitored(monitor) => monitor.open(&Request::Again { write }, Some(file)),
        }
    }

    /// Disk `number` goes over to `file` with the next switch, and is opened as that from then on.
    ///
    /// # Errors
    /// When the monitor does not take it for one.
    pub(crate) fn give_next(&self, number: usize, file: &File) -> Result<()> {
        match self {
            Self::Own => Ok(()),
            Self::Monitored(monitor) => {
                let number = numbered(number)?;
                monitor.ask_of(&Request::Next { number }, Some(file.as_fd())).map(drop)
            }
        }
    }

    /// Disk `number` stays where it is.
    pub(crate) fn drop_next(&self, number: usize) {
        let Self::Monitored(monitor) = self else { return };
        let asked = numbered(number).and_then(|number| monitor.ask(&Request::Stay { number }));
        if let Err(error) = asked {
            tracing::warn!("A file that no disk went over to stays held: {}", error.with_causes());
        }
    }

    /// Who has the lock of `file`, if that can be told.
    pub(crate) fn holder(&self, file: &File) -> Option<String> {
        match self {
            Self::Own => lock::holder(&file.metadata().ok()?),
            Self::Monitored(monitor) => {
                let text = monitor.ask_of(&Request::Holder, Some(file.as_fd())).ok()?;
                Some(text).filter(|text| !text.is_empty())
            }
        }
    }
}

/// The number of a disk, as a monitor is told it.
fn numbered(number: usize) -> Result<u8> {
    u8::try_from(number).map_err(|_| VmError::State(format!("No VM has a disk {number}")))
}

/// A disk at `path`.
pub(crate) fn open_disk(path: &Path, write: bool) -> io::Result<File> {
    // A pipe of that name does not hold anybody up.
    OpenOptions::new().read(true).write(write).custom_flags(libc::O_NONBLOCK).open(path)
}

/// A file to be booted, at `path`.
pub(crate) fn open_boot_file(path: &Path) -> io::Result<File> {
    // Nor does a FIFO.
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}
