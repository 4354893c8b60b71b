//! The one room of this crate where `unsafe` is allowed: thin wrappers over calls that the safe
//! crates do not offer. No policy lives here; each block names the invariant that makes it sound.

#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
pub(crate) mod arch;
pub(crate) mod bpf;
mod bus;
pub(crate) mod look;
pub(crate) mod marked;
pub(crate) mod own_pages;
pub(crate) mod pidfd;
pub(crate) mod placed;
pub(crate) mod trace;
pub(crate) mod userfault;
pub(crate) mod view;

use std::cmp::Ordering;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The kernel's `struct pm_scan_arg` (linux/fs.h): what the `PAGEMAP_SCAN` ioctl takes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PmScanArg {
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) walk_end: u64,
    pub(crate) vec: u64,
    pub(crate) vec_len: u64,
    pub(crate) max_pages: u64,
    pub(crate) category_inverted: u64,
    pub(crate) category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    pub(crate) return_mask: u64,
}

/// The kernel's `struct page_region`: addresses `start..end` with the categories that they have.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageRegion {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

/// Request number of the `PAGEMAP_SCAN` ioctl: `_IOWR('f', 16, struct pm_scan_arg)`.
pub(crate) const PAGEMAP_SCAN: u64 = 0xc060_6610;

const _: () = assert!(size_of::<PmScanArg>() == 96);
const _: () = assert!(size_of::<PageRegion>() == 24);
const _: () = assert!(
    PAGEMAP_SCAN == (3 << 30) | ((size_of::<PmScanArg>() as u64) << 16) | ((b'f' as u64) << 8) | 16
);
const _: () = assert!(size_of::<libc::seccomp_notif>() == 80);
const _: () = assert!(size_of::<libc::seccomp_notif_resp>() == 24);

/// Offsets in `struct seccomp_data`: number, architecture, and the low halves of two arguments.
const DATA_NUMBER: u32 = 0;
const DATA_ARCHITECTURE: u32 = 4;
const DATA_SECOND_ARGUMENT: u32 = 24;
const DATA_THIRD_ARGUMENT: u32 = 32;

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

// The low half of a 64-bit argument comes first: both architectures are little-endian.
const _: () = assert!(cfg!(target_endian = "little"));

/// A system call that a filtered task waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Notification {
    /// The kernel's cookie of this call.
    pub(crate) id: u64,
    /// The task that called.
    pub(crate) pid: i32,
    /// Which system call it is.
    pub(crate) call: i64,
    /// The arguments of the call.
    pub(crate) arguments: [u64; 6],
}

/// How a supervisor answers a [`Notification`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Let the kernel do the call.
    Continue,
    /// The call returns this.
    Return(i64),
    /// The call fails with this error number.
    Fail(i32),
}

/// Scans what `pagemap` describes; fills `regions` and `argument.walk_end`, returns how many
/// regions were filled.
pub(crate) fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    argument: &mut PmScanArg,
    regions: &mut [PageRegion],
) -> io::Result<usize> {
    argument.size = size_of::<PmScanArg>() as u64;
    argument.vec = regions.as_mut_ptr() as u64;
    argument.vec_len = regions.len() as u64;
    // SAFETY: the kernel writes at most `vec_len` regions into `regions`, which is exclusively
    // borrowed, and `walk_end` into `argument`; sizes are proved above.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, argument) };
    if found < 0 { Err(io::Error::last_os_error()) } else { Ok(found as usize) }
}

/// Which calls a filter sends to its supervisor, beside `lseek(_, _, SEEK_DATA)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Calls {
    /// `ioctl(_, PAGEMAP_SCAN, _)`.
    pub(crate) scans: bool,
    /// `prlimit64`.
    pub(crate) limits: bool,
}

/// Puts the calling **thread**, and so every process that it starts from now on, under a filter that sends
/// `calls` to the descriptor returned and lets all else through.
pub(crate) fn filter_calls(calls: Calls) -> io::Result<OwnedFd> {
    listen_under(&mut filter_program(calls))
}

/// What a task needs in its memory, at `address`, to put itself under the filter of [`filter_calls`]: a
/// `struct sock_fprog`, and the program behind it.
pub(crate) fn filter_bytes(calls: Calls, address: u64) -> Vec<u8> {
    let program = filter_program(calls);
    let mut bytes = Vec::with_capacity(FILTER_ROOM);
    bytes.extend_from_slice(&(program.len() as u64).to_ne_bytes());
    bytes.extend_from_slice(&(address + size_of::<libc::sock_fprog>() as u64).to_ne_bytes());
    for statement in program {
        bytes.extend_from_slice(&statement.code.to_ne_bytes());
        bytes.extend_from_slice(&[statement.jt, statement.jf]);
        bytes.extend_from_slice(&statement.k.to_ne_bytes());
    }
    bytes
}

/// Statements of a filter.
const STATEMENTS: usize = 13;
/// Bytes that [`filter_bytes`] gives.
pub(crate) const FILTER_ROOM: usize =
    size_of::<libc::sock_fprog>() + STATEMENTS * size_of::<libc::sock_filter>();

// A length of 16 bits whose upper neighbours nobody reads, and a pointer.
const _: () = assert!(size_of::<libc::sock_fprog>() == 16);
const _: () = assert!(size_of::<libc::sock_filter>() == 8);

fn filter_program(calls: Calls) -> [libc::sock_filter; STATEMENTS] {
    // No call has the other number.
    let wanted = |call: i64, is_wanted: bool| if is_wanted { call as u32 } else { u32::MAX };
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let unless_equal = |k: u32, jf: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf,
        k,
    };
    let when_equal = |k: u32, jt: u8| libc::sock_filter { jt, jf: 0, ..unless_equal(k, 0) };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let give = libc::BPF_RET | libc::BPF_K;
    [
        statement(load, DATA_ARCHITECTURE),
        unless_equal(ARCHITECTURE, 10),
        statement(load, DATA_NUMBER),
        when_equal(wanted(libc::SYS_prlimit64, calls.limits), 7),
        unless_equal(wanted(libc::SYS_ioctl, calls.scans), 3),
        statement(load, DATA_SECOND_ARGUMENT),
        unless_equal(PAGEMAP_SCAN as u32, 5),
        statement(give, libc::SECCOMP_RET_USER_NOTIF),
        unless_equal(libc::SYS_lseek as u32, 3),
        statement(load, DATA_THIRD_ARGUMENT),
        unless_equal(libc::SEEK_DATA as u32, 1),
        statement(give, libc::SECCOMP_RET_USER_NOTIF),
        statement(give, libc::SECCOMP_RET_ALLOW),
    ]
}

/// Puts the calling thread under a filter, and gives the descriptor that it sends calls to.
fn listen_under(program: &mut [libc::sock_filter]) -> io::Result<OwnedFd> {
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: `filter` points at a program that lives until the call returns; the kernel copies it.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &filter as *const libc::sock_fprog,
        )
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let listener = unsafe { OwnedFd::from_raw_fd(listener as i32) };
    // Caller and listener take turns: one processor does for both. Older kernels (before Linux 6.6) wake up
    // another one, which takes longer.
    // SAFETY: the argument is a number.
    let _ = unsafe {
        libc::ioctl(listener.as_raw_fd(), SECCOMP_IOCTL_NOTIF_SET_FLAGS as _, SYNC_WAKE_UP)
    };
    Ok(listener)
}

/// Flag of a listener (linux/seccomp.h).
const SYNC_WAKE_UP: u64 = 1;
const SECCOMP_IOCTL_NOTIF_SET_FLAGS: u64 = 0x4008_2104;
const SECCOMP_IOCTL_NOTIF_RECV: u64 = 0xc050_2100;
const SECCOMP_IOCTL_NOTIF_SEND: u64 = 0xc018_2101;
const SECCOMP_IOCTL_NOTIF_ID_VALID: u64 = 0x4008_2102;

/// Takes the next call off a listener of [`filter_calls`]. Blocks unless poll said readable.
pub(crate) fn next_notification(listener: BorrowedFd<'_>) -> io::Result<Notification> {
    // SAFETY: all-zero is a valid `seccomp_notif`, and what the kernel asks for.
    let mut notification: libc::seccomp_notif = unsafe { zeroed() };
    // SAFETY: the kernel writes one `seccomp_notif`, whose size is proved above.
    let done = unsafe {
        libc::ioctl(listener.as_raw_fd(), SECCOMP_IOCTL_NOTIF_RECV as _, &mut notification)
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Notification {
        id: notification.id,
        pid: notification.pid as i32,
        call: notification.data.nr.into(),
        arguments: notification.data.args,
    })
}

/// Whether the call still waits: its task may have died and its number been given to another.
pub(crate) fn still_waits(listener: BorrowedFd<'_>, notification: &Notification) -> bool {
    let id = notification.id;
    // SAFETY: the kernel reads one u64.
    let done = unsafe { libc::ioctl(listener.as_raw_fd(), SECCOMP_IOCTL_NOTIF_ID_VALID as _, &id) };
    done == 0
}

/// Answers a call taken by [`next_notification`].
pub(crate) fn answer(
    listener: BorrowedFd<'_>,
    notification: &Notification,
    verdict: Verdict,
) -> io::Result<()> {
    let mut response = libc::seccomp_notif_resp { id: notification.id, val: 0, error: 0, flags: 0 };
    match verdict {
        Verdict::Continue => response.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        Verdict::Return(value) => response.val = value,
        Verdict::Fail(number) => response.error = -number,
    }
    // SAFETY: the kernel reads one `seccomp_notif_resp`, whose size is proved above.
    let done =
        unsafe { libc::ioctl(listener.as_raw_fd(), SECCOMP_IOCTL_NOTIF_SEND as _, &response) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A descriptor of the process `pid`.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers, returns a descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd)
}

/// A duplicate of descriptor number `fd` of another process.
pub(crate) fn pidfd_getfd(process: BorrowedFd<'_>, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes three integers, returns a descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) };
    owned(fd)
}

/// A resource limit of a process, soft and hard.
pub(crate) fn limit(pid: i32, resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one `rlimit`; with a null pointer for the new limit it sets none.
    let done = unsafe { libc::prlimit(pid, resource, std::ptr::null(), &mut limit) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok((limit.rlim_cur, limit.rlim_max)) }
}

/// Sends SIGKILL through a process descriptor, so that never a stranger is hit.
pub(crate) fn pidfd_kill(process: BorrowedFd<'_>) -> io::Result<()> {
    pidfd_signal(process, libc::SIGKILL)
}

/// Sends `signal` through a process descriptor.
pub(crate) fn pidfd_signal(process: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: takes integers and a null pointer, which the call allows.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets the child of `command` inherit `descriptors` under their own numbers. They must stay open
/// until it is spawned.
pub(crate) fn inherit(command: &mut Command, descriptors: &[BorrowedFd<'_>]) {
    let numbers: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let clear = move || {
        for number in &numbers {
            // SAFETY: `fcntl` is async-signal-safe and touches this process's own table only.
            if unsafe { libc::fcntl(*number, libc::F_SETFD, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure calls nothing but `fcntl`, allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(clear) };
}

/// Has the child of `command` killed when the thread that spawned it ends, however that comes about. It counts
/// for the child alone, not for what that starts.
pub(crate) fn end_with_us(command: &mut Command) {
    let parent = std::process::id();
    let bind = move || {
        // SAFETY: `prctl` and `getppid` are async-signal-safe and touch no memory of this process.
        let (bound, now) = unsafe {
            (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0), libc::getppid())
        };
        match bound {
            0 if now as u32 == parent => Ok(()),
            0 => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec the closure calls nothing but `prctl` and `getppid`, allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(bind) };
}

/// Reads exactly `into.len()` bytes of another process's memory at `address`.
pub(crate) fn read_memory(pid: i32, address: u64, into: &mut [u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: address as *mut _, iov_len: into.len() };
    // SAFETY: the kernel writes at most `into.len()` bytes into `into`, which is exclusively
    // borrowed; the remote address is checked by the kernel.
    let done = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
    exactly(done, into.len())
}

/// Writes `bytes` into another process's memory at `address`.
pub(crate) fn write_memory(pid: i32, address: u64, bytes: &[u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: address as *mut _, iov_len: bytes.len() };
    // SAFETY: the kernel only reads from `bytes`; the remote address is checked by the kernel.
    let done = unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) };
    exactly(done, bytes.len())
}

impl PmScanArg {
    /// The argument as it stands in another process's memory.
    pub(crate) fn read_from(pid: i32, address: u64) -> io::Result<Self> {
        let mut bytes = [0; Self::SIZE];
        read_memory(pid, address, &mut bytes)?;
        Ok(Self::from_bytes(bytes))
    }

    /// The argument from its bytes.
    pub(crate) fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        // SAFETY: both are plain data of the same size, and every bit pattern is a valid PmScanArg.
        unsafe { std::mem::transmute::<[u8; Self::SIZE], Self>(bytes) }
    }

    /// Bytes of it.
    pub(crate) const SIZE: usize = size_of::<Self>();

    /// Offset of `walk_end`, which the kernel writes back.
    pub(crate) const WALK_END: u64 = 32;
}

/// Writes `regions` into another process's memory at `address`.
pub(crate) fn write_regions(pid: i32, address: u64, regions: &[PageRegion]) -> io::Result<()> {
    if regions.is_empty() {
        return Ok(());
    }
    // SAFETY: PageRegion is three u64 without padding, so all its bytes are initialised.
    let bytes = unsafe {
        std::slice::from_raw_parts(regions.as_ptr().cast::<u8>(), std::mem::size_of_val(regions))
    };
    write_memory(pid, address, bytes)
}

/// Sets the hardware address of interface `name` in the network namespace that `socket` was made in.
/// Setting the one that it has makes the kernel forget the neighbours behind it.
pub(crate) fn set_hardware_address(
    socket: BorrowedFd<'_>,
    name: &str,
    mac: [u8; 6],
) -> io::Result<()> {
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: as above.
    let mut address: libc::sockaddr = unsafe { zeroed() };
    address.sa_family = libc::ARPHRD_ETHER;
    for (to, from) in address.sa_data.iter_mut().zip(mac) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_hwaddr = address;
    // SAFETY: the kernel reads one `ifreq`, whose name ends with a zero.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFHWADDR as _, &request) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Orphaned descendants of this process become its children.
pub(crate) fn children_come_back_to_us() -> io::Result<()> {
    // SAFETY: takes integers only.
    let done = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits until `child` has exited, reaps it, and says how: `Ok(Ok(code))` or `Ok(Err(signal))`.
pub(crate) fn reap(child: i32) -> io::Result<Result<i32, i32>> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int. `__WALL` also finds a child that CRIU made without
        // the usual exit signal.
        let done = unsafe { libc::waitpid(child, &mut status, libc::__WALL) };
        if done == child {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if libc::WIFSIGNALED(status) {
        Ok(Err(libc::WTERMSIG(status)))
    } else {
        Ok(Ok(libc::WEXITSTATUS(status)))
    }
}

/// Inode of what `path` leads to, the name that CRIU gives namespaces.
pub(crate) fn inode(of: impl AsFd) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(of)?.st_ino)
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn exactly(done: isize, wanted: usize) -> io::Result<()> {
    if done < 0 {
        Err(io::Error::last_os_error())
    } else if done as usize == wanted {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{done} of {wanted} bytes could be copied"),
        ))
    }
}

/// A userfaultfd of this process.
pub(crate) fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64 | userfault::USER_MODE_ONLY;
    // SAFETY: takes an integer, returns a descriptor or -1.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })
}

/// Compares the memories of two processes, in an order that only the kernel knows: `Equal` when they are
/// one.
pub(crate) fn compare_memory(one: i32, other: i32) -> io::Result<Ordering> {
    const KCMP_VM: i32 = 1;
    // SAFETY: takes integers only.
    match unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) } {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        -1 => Err(io::Error::last_os_error()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Whether `ours` is the open file that process `pid` has as descriptor `number`.
pub(crate) fn is_same_file(ours: BorrowedFd<'_>, pid: i32, number: i32) -> bool {
    const KCMP_FILE: i32 = 0;
    let (us, ours) = (std::process::id(), ours.as_raw_fd());
    // SAFETY: takes integers only.
    unsafe { libc::syscall(libc::SYS_kcmp, us, pid, KCMP_FILE, ours, number) == 0 }
}

/// Copies up to `length` bytes from one pipe to another, and leaves them in the first.
pub(crate) fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
    let flags = libc::SPLICE_F_NONBLOCK;
    // SAFETY: takes integers only.
    let copied = unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), length, flags) };
    if copied < 0 { Err(io::Error::last_os_error()) } else { Ok(copied as usize) }
}

/// Destroys a System V segment of the calling thread's namespace, once nobody has it attached.
pub(crate) fn destroy_segment(id: i32) -> io::Result<()> {
    // SAFETY: removal takes no buffer, and memory that is attached stays.
    match unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// What a holder is told: keep this descriptor.
pub(crate) const HOLD: u8 = b'h';
/// The same, and end when it becomes readable (a process: when it has ended).
pub(crate) const UNTIL: u8 = b'u';

/// Forks a process that has no descriptor but `socket`, takes the descriptors that come over it, and
/// does nothing else. It ends when the descriptor sent with [`UNTIL`] becomes readable, or when the
/// socket's other end is closed and there was none.
pub(crate) fn fork_holder(socket: BorrowedFd<'_>) -> io::Result<i32> {
    let number = socket.as_raw_fd();
    // SAFETY: the child calls nothing but async-signal-safe functions, allocates nothing, takes no lock,
    // and never returns.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => hold(number),
        pid => Ok(pid),
    }
}

/// The life of a holder. Runs in a forked child: see [`fork_holder`] for what it must not do.
fn hold(socket: i32) -> ! {
    /// One descriptor's control message, aligned as the kernel wants it.
    #[repr(C, align(8))]
    struct Control([u8; 64]);
    // SAFETY: only system calls, on integers and on memory of this frame that outlives each call.
    unsafe {
        if socket > 0 {
            libc::close_range(0, socket as u32 - 1, 0);
        }
        libc::close_range(socket as u32 + 1, u32::MAX, 0);
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"decamp-holder".as_ptr());
        let mut until = -1;
        let mut open = true;
        while open || until >= 0 {
            let mut events = [
                libc::pollfd {
                    fd: if open { socket } else { -1 },
                    events: libc::POLLIN,
                    revents: 0,
                },
                libc::pollfd { fd: until, events: libc::POLLIN, revents: 0 },
            ];
            if libc::poll(events.as_mut_ptr(), 2, -1) < 0 {
                continue;
            }
            if events[1].revents != 0 {
                break;
            }
            if events[0].revents == 0 {
                continue;
            }
            let mut what = [0u8; 1];
            let mut part = libc::iovec { iov_base: what.as_mut_ptr().cast(), iov_len: 1 };
            let mut control = Control([0; 64]);
            let mut message: libc::msghdr = zeroed();
            message.msg_iov = &mut part;
            message.msg_iovlen = 1;
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = control.0.len() as _;
            let got = libc::recvmsg(socket, &mut message, libc::MSG_CMSG_CLOEXEC);
            open = got > 0;
            let header = libc::CMSG_FIRSTHDR(&message);
            if open && what[0] == UNTIL && !header.is_null() {
                until = libc::CMSG_DATA(header).cast::<i32>().read_unaligned();
            }
        }
        libc::_exit(0)
    }
}

/// Takes charge of a descriptor that has just come in a message, and that nobody else knows of.
pub(crate) fn adopt_descriptor(number: i32) -> OwnedFd {
    // SAFETY: the kernel made this descriptor for the message that it came with, and whoever read that
    // message gives its number to us and to nobody else.
    unsafe { OwnedFd::from_raw_fd(number) }
}
