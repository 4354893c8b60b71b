//! What can be asked about files, sockets and tasks of others without touching them.

use std::ffi::CString;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What `statx` tells of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FileFacts {
    /// Type and permissions.
    pub(crate) mode: u32,
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
    pub(crate) links: u32,
    /// Of a device node: which device it is.
    pub(crate) node: (u32, u32),
    /// Bytes that it takes.
    pub(crate) taken: u64,
    /// The mount that it is on, as mountinfo numbers it.
    pub(crate) mount: u64,
}

impl FileFacts {
    /// The type of the file: one of `S_IFREG` and so on.
    pub(crate) fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
}

/// Looks at `path`, following it to its end; below `/proc/PID` that is what a descriptor holds. Never asks a
/// server of files (FUSE, NFS): that one may not answer.
pub(crate) fn file_facts(path: &Path) -> io::Result<FileFacts> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the kernel reads a NUL-terminated string that lives until the call returns, and writes one
    // `statx` into `found`.
    let done = unsafe {
        libc::statx(
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_STATX_DONT_SYNC,
            libc::STATX_BASIC_STATS | libc::STATX_MNT_ID,
            found.as_mut_ptr(),
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all-zero is a valid `statx`, and the kernel has filled it.
    let found = unsafe { found.assume_init() };
    Ok(FileFacts {
        mode: found.stx_mode.into(),
        device: (found.stx_dev_major, found.stx_dev_minor),
        inode: found.stx_ino,
        links: found.stx_nlink,
        node: (found.stx_rdev_major, found.stx_rdev_minor),
        taken: found.stx_blocks.saturating_mul(512),
        mount: found.stx_mnt_id,
    })
}

/// A socket option that is a number.
pub(crate) fn option(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut bytes = [0; size_of::<i32>()];
    option_bytes(socket, level, name, &mut bytes)?;
    Ok(i32::from_ne_bytes(bytes))
}

/// A socket option as bytes; gives how many there are. With an empty `into` some options tell how long they
/// are.
pub(crate) fn option_bytes(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    into: &mut [u8],
) -> io::Result<usize> {
    let mut length = into.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `into`, which is exclusively borrowed, and one
    // number into `length`.
    let done = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, into.as_mut_ptr().cast(), &mut length)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(length as usize) }
}

/// The address that a socket has here, as the kernel writes it; gives its length.
pub(crate) fn own_address(socket: BorrowedFd<'_>, into: &mut [u8; 128]) -> io::Result<usize> {
    let mut length = into.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `into`, which is exclusively borrowed, and one
    // number into `length`.
    let done =
        unsafe { libc::getsockname(socket.as_raw_fd(), into.as_mut_ptr().cast(), &mut length) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok((length as usize).min(into.len())) }
}

/// The scheduling policy of a task.
pub(crate) fn policy(task: i32) -> io::Result<i32> {
    // SAFETY: takes an integer only.
    let policy = unsafe { libc::syscall(libc::SYS_sched_getscheduler, task) };
    if policy < 0 { Err(io::Error::last_os_error()) } else { Ok(policy as i32) }
}

/// Whether two tasks have one table of descriptors.
pub(crate) fn share_descriptors(one: i32, other: i32) -> io::Result<bool> {
    const KCMP_FILES: i32 = 2;
    // SAFETY: takes integers only.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) };
    if order < 0 { Err(io::Error::last_os_error()) } else { Ok(order == 0) }
}

/// Whether descriptor `number` of process `pid` is the file that its epoll descriptor `epoll` watches under
/// number `watched`, the first of them that it watches under that number.
pub(crate) fn is_watched(pid: i32, number: i32, epoll: i32, watched: i32) -> io::Result<bool> {
    const KCMP_EPOLL_TFD: i32 = 7;
    /// The kernel's `struct kcmp_epoll_slot`.
    #[repr(C)]
    struct Slot {
        epoll: u32,
        watched: u32,
        offset: u32,
    }
    let slot = Slot { epoll: epoll as u32, watched: watched as u32, offset: 0 };
    // SAFETY: the kernel reads one slot, which lives until the call returns.
    let order =
        unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_EPOLL_TFD, number, &raw const slot) };
    if order < 0 { Err(io::Error::last_os_error()) } else { Ok(order == 0) }
}

/// Opens what a file handle means on the file system that `mount` is open on, for looking only.
pub(crate) fn open_handle(
    mount: BorrowedFd<'_>,
    kind: i32,
    handle: &[u8],
) -> io::Result<std::os::fd::OwnedFd> {
    /// The kernel's `struct file_handle`, with room for the longest (`MAX_HANDLE_SZ`).
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        handle: [u8; 128],
    }
    let mut given = Handle { bytes: handle.len() as u32, kind, handle: [0; 128] };
    let room = given.handle.get_mut(..handle.len()).ok_or(io::ErrorKind::InvalidInput)?;
    room.copy_from_slice(handle);
    // SAFETY: the kernel reads `bytes` bytes behind the head, which are within `given`.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw const given,
            libc::O_PATH | libc::O_CLOEXEC,
        )
    };
    super::owned(fd)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_kernel_tells_of_files_and_sockets() {
        let file = file_facts(Path::new("/dev/null")).expect("there");
        assert_eq!((file.kind(), file.node, file.links), (libc::S_IFCHR, (1, 3), 1));
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
        assert_eq!(option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN).ok(), Some(2));
        let mut address = [0; 128];
        assert_eq!(own_address(socket.as_fd(), &mut address).expect("bound"), 16);
        let me = std::process::id() as i32;
        assert!(share_descriptors(me, me).expect("ourselves"));
        assert!(policy(me).expect("ourselves") >= 0);
    }
}
