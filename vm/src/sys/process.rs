//! This process and its rights: a child of it, and what it gives up for good.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::panic::AssertUnwindSafe;

use libc::{c_int, c_ulong};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{ForkResult, Pid, getpid, getppid};

/// Version 3 of the kernel's capability interface (linux/capability.h): two words of each set.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilitySet {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const _: () = assert!(size_of::<CapabilityHeader>() == 8 && size_of::<CapabilitySet>() == 12);

/// Which of the two a process is after a fork.
pub(crate) enum Fork {
    /// The one that was there.
    Parent {
        /// The new one.
        child: Pid,
    },
    /// The new one.
    Child {
        /// The one that was there.
        parent: Pid,
    },
}

/// Makes a child of this process, which nobody waits for: nothing of it is left when it has ended.
///
/// # Errors
/// When this process has more threads than this one (locks that others hold would be held for ever in the child), or
/// the kernel refuses.
pub(crate) fn fork() -> io::Result<Fork> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("the process has {threads} threads")));
    }
    // SAFETY: no handler of this program is replaced, for it has none; it starts nothing whose end it asks for.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
    let parent = getpid();
    // SAFETY: this is the only thread, so the child has all that it could wait for.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Fork::Parent { child }),
        ForkResult::Child => Ok(Fork::Child { parent }),
    }
}

/// Closes all that is open in this child but standard error, `socket` and `held`, has it `work` with the socket and a
/// descriptor of `parent`, and ends it. To people it is `title`.
pub(crate) fn live_as_child(
    parent: Pid,
    title: &str,
    socket: OwnedFd,
    held: Option<OwnedFd>,
    work: impl FnOnce(BorrowedFd<'_>, BorrowedFd<'_>),
) -> ! {
    let lived = keep_only(socket, held).and_then(|(socket, held)| {
        let parent_fd = pidfd_open(parent)?;
        // It may have ended before, and another have its number.
        if getppid() == parent {
            let _ = nix::sys::prctl::set_name(c"decamp-monitor");
            // A kernel may refuse it: then it looks like its parent.
            let _ = show_as(title);
            let works = AssertUnwindSafe(|| work(socket.as_fd(), parent_fd.as_fd()));
            // A panic that went on would make a second keeper of this.
            if std::panic::catch_unwind(works).is_err() {
                return Err(io::Error::other("the monitor panicked"));
            }
        }
        Ok(held)
    });
    // SAFETY: takes an integer. What this process shares with its parent (buffers that would be written twice, files
    // that would be removed) is left alone: nothing of Rust's or of C's is run at its end.
    unsafe { libc::_exit(c_int::from(lived.is_err())) }
}

/// Has `ps` show `title` for this process, in place of the words that it was started with, as far as there is room.
/// Nobody in this process looks at those any more.
fn show_as(title: &str) -> io::Result<()> {
    // Fields 48 and 49 of proc_pid_stat(5); the third is the first behind the name.
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace()).into_iter();
    let mut places = fields.flatten().skip(48 - 3).map(str::parse::<u64>);
    let (Some(Ok(start)), Some(Ok(end))) = (places.next(), places.next()) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let room = usize::try_from(end.saturating_sub(start)).unwrap_or_default();
    let mut words: Vec<u8> = title.bytes().take(room.saturating_sub(1)).collect();
    words.resize(room, 0);
    std::fs::File::options().write(true).open("/proc/self/mem")?.write_all_at(&words, start)
}

/// Leaves two descriptors (and standard error) open, and gives them back.
fn keep_only(socket: OwnedFd, held: Option<OwnedFd>) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    const FIRST: c_int = 3;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    // Closed with all the others.
    let _ = null.into_raw_fd();
    let (socket, held) = (socket.into_raw_fd(), held.map(IntoRawFd::into_raw_fd));
    let mut kept: Vec<c_int> = held.into_iter().chain([socket]).collect();
    kept.sort_unstable();
    let mut next = FIRST;
    for fd in kept {
        close_range(next, fd - 1)?;
        next = fd + 1;
    }
    close_range(next, c_int::MAX)?;
    // SAFETY: both were taken out of their owners above and left open, and everything else was closed behind the
    // backs of its owners, who never run again in this process.
    let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
    Ok((own(socket), held.map(own)))
}

/// Closes all but the standard streams: what this process was started with by somebody who did not mean to.
///
/// # Errors
/// When the kernel does not do it.
pub(crate) fn close_inherited() -> io::Result<()> {
    close_range(3, c_int::MAX)
}

fn close_range(first: c_int, last: c_int) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: takes integers. Who calls this is a child that forgets all that it had open, or a process that has opened
    // nothing yet.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A descriptor of a process, readable when that has ended.
pub(crate) fn pidfd_open(process: Pid) -> io::Result<OwnedFd> {
    // SAFETY: takes integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, process.as_raw(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as c_int) })
}

/// Ends the process of which `held` is a descriptor.
pub(crate) fn kill_held(held: BorrowedFd<'_>) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    let (fd, kill) = (held.as_raw_fd(), libc::SIGKILL);
    // SAFETY: takes integers, and nothing more to be said of the signal.
    let done = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, kill, none, 0) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives up every capability that this process could come to by running a program. As far as it may: nothing is gained
/// by programs once it can gain nothing any more.
pub(crate) fn bound_capabilities() {
    let mut capability: c_ulong = 0;
    // SAFETY: takes integers. There are no more when it is refused.
    while unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } == 0 {
        capability += 1;
    }
}

/// Gives up every capability of this process, which has one thread.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    // SAFETY: takes integers.
    let _ = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    let header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    let none = [CapabilitySet::default(); 2];
    // SAFETY: the kernel reads one header and, of version 3, two sets.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
