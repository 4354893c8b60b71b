//! The one room of this crate where `unsafe` is allowed: thin wrappers over calls that the safe
//! crates do not offer. Each block names the invariant that makes it sound.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{size_of, zeroed};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;

/// Sends all of `bytes` (a few, so that they fit the socket's buffer at once) with `descriptor`.
///
/// # Errors
/// The kernel's.
pub fn send_with_descriptor(
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
///
/// # Errors
/// The kernel's.
pub fn receive_with_descriptor(
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

/// A packet socket on interface `index` of the calling thread's network namespace: what is written to it goes out
/// there, and of what comes in there it gets frames of `protocol` (an EtherType; 0: none).
pub fn packet_socket(index: u32, protocol: u16) -> io::Result<OwnedFd> {
    // SAFETY: takes integers, returns a descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index as i32;
    // SAFETY: the kernel reads one `sockaddr_ll` of the length given.
    let done = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// Has the calling thread be `niceness` nice, from -20 to 19. Less than before takes CAP_SYS_NICE or a limit
/// that allows it.
pub(crate) fn be_nice(niceness: i32) -> io::Result<()> {
    // SAFETY: takes integers; on Linux process 0 is the calling thread.
    let done = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, niceness) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How nice the calling thread is.
#[cfg(test)]
pub(crate) fn niceness() -> io::Result<i32> {
    // The kernel's answer is never negative, unlike the library's.
    // SAFETY: takes integers.
    match unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0) } {
        ..0 => Err(io::Error::last_os_error()),
        answer => Ok(20 - answer as i32),
    }
}

/// Stores all of `bytes` in `file` at `at` through a mapping: a file of huge pages, of `page` bytes each, takes
/// nothing else. It becomes as long as that needs.
///
/// # Errors
/// When there are no huge pages for it, too: nothing is stored to a page that is not there.
pub(crate) fn write_mapped(file: &File, at: u64, bytes: &[u8], page: u64) -> io::Result<()> {
    let first = at / page * page;
    let end = (at + bytes.len() as u64).next_multiple_of(page);
    let mapping = SharedMapping::of_part(file, first, (end - first) as usize)?;
    let mut done = 0;
    while done < bytes.len() {
        // By the kernel, as if to another process: where a page is missing that is an error, and no signal.
        let local = [IoSlice::new(&bytes[done..])];
        let base = mapping.start.as_ptr() as usize + (at - first) as usize + done;
        let remote = [RemoteIoVec { base, len: bytes.len() - done }];
        match process_vm_writev(Pid::this(), &local, &remote)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => done += written,
        }
    }
    Ok(())
}

/// A file mapped for writing and shared, as a database maps its own: stores to it are no writes.
pub(crate) struct SharedMapping {
    start: NonNull<u8>,
    length: usize,
}

impl SharedMapping {
    /// The first `length` bytes of `file`, which must be that long for as long as it is mapped.
    #[cfg(test)]
    pub(crate) fn of(file: &File, length: usize) -> io::Result<Self> {
        Self::of_part(file, 0, length)
    }

    fn of_part(file: &File, at: u64, length: usize) -> io::Result<Self> {
        let size = NonZeroUsize::new(length).ok_or(io::ErrorKind::InvalidInput)?;
        let at = i64::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; nobody else knows of it.
        let start = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, file, at) }?;
        Ok(Self { start: start.cast(), length })
    }

    /// Stores one byte.
    #[cfg(test)]
    pub(crate) fn store(&mut self, at: usize, value: u8) {
        assert!(at < self.length);
        // SAFETY: within the mapping, which lives as long as this; volatile, because others see it.
        unsafe { self.start.add(at).write_volatile(value) }
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing points into it any more.
        let _ = unsafe { nix::sys::mman::munmap(self.start.cast(), self.length) };
    }
}
