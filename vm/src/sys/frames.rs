//! Frames between guest memory and a descriptor, without a copy of ours in between.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_void, iovec};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The kernel takes one more at once (UIO_MAXIOV), which is for the rest.
pub(crate) const MOST_PIECES: usize = 1023;

/// Reads one frame into `pieces`, and what is too much for them into `rest`; gives its length. What was written of
/// `pieces` counts as dirty.
pub(crate) fn read_frame<B: BitmapSlice>(
    from: BorrowedFd<'_>,
    pieces: &[VolatileSlice<'_, B>],
    rest: &mut [u8],
) -> io::Result<usize> {
    let guards: Vec<_> = pieces.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vector: Vec<iovec> = guards
        .iter()
        .map(|guard| iovec { iov_base: guard.as_ptr().cast::<c_void>(), iov_len: guard.len() })
        .collect();
    vector.push(iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
    // SAFETY: each entry but the last is guest memory that its guard holds mapped, and that nothing in this process
    // has a reference to; the last is `rest`, which is exclusively borrowed. The kernel writes no further.
    let read = unsafe { libc::readv(from.as_raw_fd(), vector.as_ptr(), vector.len() as i32) };
    let length = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    let mut left = length;
    for piece in pieces {
        let count = left.min(piece.len());
        if count == 0 {
            break;
        }
        piece.bitmap().mark_dirty(0, count);
        left -= count;
    }
    Ok(length)
}

/// Writes `pieces` as one frame.
pub(crate) fn write_frame<B: BitmapSlice>(
    to: BorrowedFd<'_>,
    pieces: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let guards: Vec<_> = pieces.iter().map(VolatileSlice::ptr_guard).collect();
    let vector: Vec<iovec> = guards
        .iter()
        .map(|guard| iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() })
        .collect();
    // SAFETY: each entry is guest memory that its guard holds mapped; the kernel only reads it.
    let written = unsafe { libc::writev(to.as_raw_fd(), vector.as_ptr(), vector.len() as i32) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}
