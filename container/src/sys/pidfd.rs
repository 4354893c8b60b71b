//! What a process descriptor tells of a process that is no child of ours.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The kernel's `struct pidfd_info` (linux/pidfd.h), as it was first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    numbers: [u32; 11],
    exit_code: i32,
}

/// `_IOWR(0xff, 11, struct pidfd_info)`.
const GET_INFO: u64 = 0xc040_ff0b;
/// How it ended is wanted, or told (Linux 6.15).
const INFO_EXIT: u64 = 1 << 3;

const _: () = assert!(size_of::<PidfdInfo>() == 64);
const _: () =
    assert!(GET_INFO == (3 << 30) | ((size_of::<PidfdInfo>() as u64) << 16) | (0xff << 8) | 11);

/// How a process ended that its parent has reaped, `Ok(code)` or `Err(signal)`; nothing where the kernel
/// does not tell.
pub(crate) fn exit_of(process: BorrowedFd<'_>) -> io::Result<Option<Result<i32, i32>>> {
    let mut info = PidfdInfo { mask: INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the kernel writes at most the 64 bytes whose size is part of the request number, into
    // `info`, which is exclusively borrowed.
    let done = unsafe { libc::ioctl(process.as_raw_fd(), GET_INFO as _, &mut info) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    if info.mask & INFO_EXIT == 0 {
        return Ok(None);
    }
    let status = info.exit_code;
    Ok(Some(match libc::WIFSIGNALED(status) {
        true => Err(libc::WTERMSIG(status)),
        false => Ok(libc::WEXITSTATUS(status)),
    }))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_kernel_tells_how_a_reaped_process_ended() {
        let mut command = Command::new("sh");
        command.args(["-c", "read x; exit 7"]).stdin(Stdio::piped());
        let mut child = command.spawn().expect("started");
        let process = crate::sys::pidfd_open(child.id() as i32).expect("a descriptor");
        drop(child.stdin.take());
        child.wait().expect("reaped");
        // Before Linux 6.15 it is an error or nothing.
        match exit_of(process.as_fd()) {
            Ok(Some(how)) => assert_eq!(how, Ok(7)),
            Ok(None) | Err(_) => println!("[skipped: needs Linux 6.15]"),
        }
    }
}
