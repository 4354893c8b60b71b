//! The one room of this crate where `unsafe` is allowed: thin wrappers over calls that the safe
//! crates do not offer. Each block names the invariant that makes it sound.

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::{size_of, size_of_val, zeroed};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
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

/// Receives up to `bytes.len()` bytes and the descriptor that came with them. Whatever else comes is closed.
///
/// # Errors
/// The kernel's; when more than one descriptor came, or there was no room for it in this process.
pub fn receive_with_descriptor(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    // Room for all that can come with one message (SCM_MAX_FD, 253 descriptors): what the kernel has installed and
    // nobody is told of would stay open for ever. Of words, as a control message has to be aligned.
    let mut control = [0_u64; 160];
    let mut vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero is a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the kernel writes to `bytes` and to `control`, whose lengths it is told and which are there meanwhile.
    let got =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut came = Vec::new();
    // SAFETY: `message` is as the kernel left it, and `control`, to which it points, is still there.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: a whole header, aligned, within `control`: these are given, or nothing is.
        let (level, kind, length) =
            unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
        if (level, kind) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: what is behind a header is within `control`, too.
            let data = unsafe { libc::CMSG_DATA(header) };
            let count = (length - (data.addr() - header.addr())) / size_of::<libc::c_int>();
            for at in 0..count {
                // SAFETY: the kernel wrote `count` descriptors there, and has just installed them for us: nobody
                // else in this process knows their numbers.
                came.push(unsafe {
                    OwnedFd::from_raw_fd(data.cast::<libc::c_int>().add(at).read_unaligned())
                });
            }
        }
        // SAFETY: as of the first.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    if came.len() > 1 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "More than one descriptor came"));
    }
    Ok((got as usize, came.pop()))
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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn one_descriptor_is_taken_and_no_surplus_stays_open() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        for count in [0, 1, 2, 5, 253] {
            let (mut reader, writer) = io::pipe().expect("a pipe");
            let raw = vec![writer.as_raw_fd(); count];
            let rights = [ControlMessage::ScmRights(&raw)];
            let control = &rights[..count.min(1)];
            let words = [IoSlice::new(b"word")];
            sendmsg::<()>(theirs.as_raw_fd(), &words, control, MsgFlags::empty(), None)
                .expect("sent");
            drop(writer);
            let mut bytes = [0; 4];
            let received = receive_with_descriptor(ours.as_fd(), &mut bytes);
            assert_eq!(received.is_ok(), count <= 1, "{count}");
            if let Ok((got, descriptor)) = received {
                assert_eq!((got, descriptor.is_some()), (4, count == 1));
            }
            // Its end comes when nobody has the other one open any more.
            assert_eq!(reader.read(&mut bytes).expect("read"), 0, "{count}");
        }
    }
}
