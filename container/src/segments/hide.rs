//! Whether CRIU looks for data in a segment that the page engine moves. It asks by
//! `lseek(_, _, SEEK_DATA)`; "there is none" leaves the segment empty in its images.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::stat::fstat;

use crate::sys;

/// Segments by device and number of their file, all on the kernel's own mounts of shared memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct HiddenSegments {
    pub(crate) memory: BTreeSet<(u64, u64)>,
    /// The same of those of System V, whose numbers others may have as well.
    pub(crate) system_v: BTreeSet<(u64, u64)>,
}

impl HiddenSegments {
    pub(crate) fn is_empty(&self) -> bool {
        self.memory.is_empty() && self.system_v.is_empty()
    }

    /// Whether descriptor `number` of `process` is of one of them.
    pub(crate) fn has(&self, process: &OwnedFd, number: u64) -> io::Result<bool> {
        if self.is_empty() {
            return Ok(false);
        }
        let number = i32::try_from(number).map_err(|_| io::ErrorKind::InvalidInput)?;
        let file = sys::pidfd_getfd(std::os::fd::AsFd::as_fd(process), number)?;
        let found = fstat(&file)?;
        let named = (found.st_dev, found.st_ino);
        if !self.memory.contains(&named) && !self.system_v.contains(&named) {
            return Ok(false);
        }
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let system_v = link.as_os_str().as_encoded_bytes().starts_with(b"/SYSV");
        let ours = if system_v { &self.system_v } else { &self.memory };
        Ok(ours.contains(&named))
    }
}
