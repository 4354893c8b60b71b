//! The one room of this crate where `unsafe` is allowed: thin wrappers over calls that the safe
//! crates do not offer. Each block names the invariant that makes it sound.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Sends all of `bytes` (a few, so that they fit the socket's buffer at once) with `descriptor`.
pub(crate) fn send_with_descriptor(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let raw = descriptor.map(|fd| [fd.as_raw_fd()]);
    let control: Vec<_> = raw.iter().map(|fds| ControlMessage::ScmRights(fds)).collect();
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        &control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives up to `bytes.len()` bytes and the descriptor that came with them.
pub(crate) fn receive_with_descriptor(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!([i32; 4]);
    let mut vector = [IoSliceMut::new(bytes)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut vector,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut first = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            for raw in descriptors {
                // SAFETY: the kernel has just installed this descriptor for us and nobody else
                // in this process knows its number; taking each of them also closes the surplus.
                let owned = unsafe { OwnedFd::from_raw_fd(raw) };
                first.get_or_insert(owned);
            }
        }
    }
    Ok((message.bytes, first))
}

/// A file mapped for writing and shared, as a database maps its own: stores to it are no writes.
#[cfg(test)]
pub(crate) struct SharedMapping {
    start: std::ptr::NonNull<u8>,
    length: usize,
}

#[cfg(test)]
impl SharedMapping {
    /// The first `length` bytes of `file`, which must be that long for as long as it is mapped.
    pub(crate) fn of(file: &std::fs::File, length: usize) -> io::Result<Self> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};
        let size = std::num::NonZeroUsize::new(length).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; nobody else knows of it.
        let start = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { start: start.cast(), length })
    }

    /// Stores one byte.
    pub(crate) fn store(&mut self, at: usize, value: u8) {
        assert!(at < self.length);
        // SAFETY: within the mapping, which lives as long as this; volatile, because others see it.
        unsafe { self.start.add(at).write_volatile(value) }
    }
}

#[cfg(test)]
impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing points into it any more.
        let _ = unsafe { nix::sys::mman::munmap(self.start.cast(), self.length) };
    }
}
