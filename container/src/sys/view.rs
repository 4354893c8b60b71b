//! A file of shared memory, mapped to be read without copying it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use super::bus;

/// A mapping that is only read.
pub(crate) struct View {
    start: *mut libc::c_void,
    length: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is unmapped once, when dropped.
unsafe impl Send for View {}
// SAFETY: nothing changes through a shared View; see `with` for what others may change.
unsafe impl Sync for View {}

impl View {
    /// Maps the first `length` bytes of `file`, which are not none.
    pub(crate) fn of(file: &File, length: u64) -> io::Result<Self> {
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let (protection, flags) = (libc::PROT_READ, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address that the kernel chooses touches no memory of ours.
        let start =
            unsafe { libc::mmap(null_mut(), length, protection, flags, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, length })
    }

    /// How many bytes it covers.
    pub(crate) fn length(&self) -> u64 {
        self.length as u64
    }

    /// Puts what is in `range` into our page tables, so that it is faster to read later. Never fails for
    /// memory that is gone meanwhile; a hole in it would be filled with a page of zeros.
    pub(crate) fn populate(&self, range: &Range<u64>) {
        const MADV_POPULATE_READ: i32 = 22;
        let (start, end) = (range.start.min(self.length()), range.end.min(self.length()));
        if start < end {
            // SAFETY: the range lies in the mapping, and the call changes no contents.
            let _ = unsafe {
                libc::madvise(
                    self.start.byte_add(start as usize),
                    (end - start) as usize,
                    MADV_POPULATE_READ,
                )
            };
        }
    }

    /// Copies what is at `from`, whoever writes there meanwhile. An error when it is not there.
    pub(crate) fn copy(&self, from: u64, into: &mut [u8]) -> io::Result<()> {
        let end = from.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.length()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // By the kernel, as if from another process: it minds neither writers nor missing pages.
        super::read_memory(std::process::id() as i32, self.start as u64 + from, into)
    }

    /// Lends the bytes of `range` to `look`; nothing when they are not all mapped. Whoever could write to
    /// the file must stand still until it returns.
    ///
    /// # Errors
    /// When somebody makes the file shorter meanwhile. This is of no use from then on.
    pub(crate) fn with<R>(
        &self,
        range: &Range<u64>,
        look: impl FnOnce(&[u8]) -> R,
    ) -> io::Result<Option<R>> {
        if range.start > range.end || range.end > self.length() {
            return Ok(None);
        }
        let length = (range.end - range.start) as usize;
        // SAFETY: the range lies in the mapping, which lives as long as `self`, and as is said above
        // nobody changes the bytes meanwhile; those that go away are zeros before they can be read.
        let bytes = unsafe {
            std::slice::from_raw_parts(self.start.cast::<u8>().add(range.start as usize), length)
        };
        let start = bytes.as_ptr() as usize;
        bus::guarded(start..start + length, || look(bytes)).map(Some)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whatever was lent of it has been given back.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const PAGE: u64 = 4096;

    #[test]
    fn a_file_that_is_cut_short_is_an_error_and_no_end() {
        let file = File::from(memfd_create("view", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        file.set_len(4 * PAGE).expect("a size");
        let all = 0..4 * PAGE;
        let view = View::of(&file, 4 * PAGE).expect("mapped");
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        assert_eq!(view.with(&all, sum).expect("whole"), Some(0));
        assert_eq!(view.with(&(0..5 * PAGE), sum).expect("nothing"), None);
        let cut = view.with(&all, |bytes| {
            file.set_len(PAGE).expect("cut");
            sum(bytes)
        });
        assert!(cut.expect_err("it is gone").to_string().contains("cut the file short"));
        // The next one is as good as ever, in this thread and in others.
        file.set_len(4 * PAGE).expect("grown");
        let view = View::of(&file, 4 * PAGE).expect("mapped");
        assert_eq!(view.with(&all, sum).expect("whole"), Some(0));
        let elsewhere = std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                view.with(&all, |bytes| {
                    file.set_len(0).expect("cut");
                    sum(bytes)
                })
                .is_err()
            });
            there.join().expect("it ends in good order")
        });
        assert!(elsewhere);
    }
}
