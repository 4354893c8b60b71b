//! ptrace, as far as nix does not offer it.

use std::io;

/// Option of [`seize`]: the task's own seccomp filters do not judge what it is made to call.
pub(crate) const SUSPEND_SECCOMP: i32 = 1 << 21;
/// Option of [`seize`]: stops at system calls are told from traps by bit 7 of the signal.
pub(crate) const MARK_SYSTEM_CALLS: i32 = 1;
/// The event in the status of a task that stopped because it was interrupted.
pub(crate) const EVENT_STOP: i32 = 128;

const GET_SIGNAL_MASK: u32 = 0x420a;
const SET_SIGNAL_MASK: u32 = 0x420b;
const GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;

/// What a task reports to its tracer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Nothing yet.
    None,
    /// It stands still with this signal, and this event beside it (0: none).
    Stopped {
        /// The signal, with bit 7 set at a system call.
        signal: i32,
        /// `PTRACE_EVENT_*`.
        event: i32,
    },
    /// It has ended.
    Ended,
}

/// Becomes the tracer of task `task`, which goes on running.
pub(crate) fn seize(task: i32, options: i32) -> io::Result<()> {
    call(libc::PTRACE_SEIZE, task, 0, options as usize)
}

/// Has a seized task stop soon.
pub(crate) fn interrupt(task: i32) -> io::Result<()> {
    call(libc::PTRACE_INTERRUPT, task, 0, 0)
}

/// Lets a stopped task run, with `signal` delivered to it (0: none).
pub(crate) fn go_on(task: i32, signal: i32) -> io::Result<()> {
    call(libc::PTRACE_CONT, task, 0, signal as usize)
}

/// Lets a stopped task run until it enters or leaves a system call.
pub(crate) fn go_to_system_call(task: i32) -> io::Result<()> {
    call(libc::PTRACE_SYSCALL, task, 0, 0)
}

/// Stops being the tracer of a stopped task, which runs on.
pub(crate) fn detach(task: i32) -> io::Result<()> {
    call(libc::PTRACE_DETACH, task, 0, 0)
}

/// The signals that a stopped task blocks.
pub(crate) fn signal_mask(task: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    call(GET_SIGNAL_MASK, task, size_of::<u64>(), &raw mut mask as usize)?;
    Ok(mask)
}

/// Sets the signals that a stopped task blocks.
pub(crate) fn set_signal_mask(task: i32, mask: u64) -> io::Result<()> {
    call(SET_SIGNAL_MASK, task, size_of::<u64>(), &raw const mask as usize)
}

/// Address of a stopped task's restartable sequences area, if it has one.
pub(crate) fn restartable_sequences(task: i32) -> io::Result<Option<u64>> {
    // struct ptrace_rseq_configuration: pointer, size, signature, flags, padding.
    let mut configuration = [0u64; 3];
    let room = size_of_val(&configuration);
    call(GET_RSEQ_CONFIGURATION, task, room, configuration.as_mut_ptr() as usize)?;
    Ok(Some(configuration[0]).filter(|pointer| *pointer != 0))
}

/// Whether a stopped task has its system calls sent back to itself (Syscall User Dispatch). A kernel that
/// does not tell (before Linux 6.4) says no.
pub(crate) fn dispatches_system_calls(task: i32) -> bool {
    // struct ptrace_sud_config: mode, selector, offset, length.
    let mut configuration = [0u64; 4];
    let room = size_of_val(&configuration);
    let data = configuration.as_mut_ptr() as usize;
    call(GET_SYSCALL_USER_DISPATCH_CONFIG, task, room, data).is_ok() && configuration[0] != 0
}

/// What task `task` has to report just now. Only the thread that seized it may ask.
pub(crate) fn report(task: i32) -> io::Result<Stop> {
    let mut status = 0;
    // SAFETY: the kernel writes one int. `__WNOTHREAD` leaves other threads' children to them.
    let done = unsafe {
        libc::waitpid(task, &mut status, libc::__WALL | libc::WNOHANG | libc::__WNOTHREAD)
    };
    match done {
        0 => Ok(Stop::None),
        _ if done == task && libc::WIFSTOPPED(status) => {
            Ok(Stop::Stopped { signal: libc::WSTOPSIG(status), event: status >> 16 })
        }
        _ if done == task => Ok(Stop::Ended),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends a signal to one task.
pub(crate) fn signal(process: i32, task: i32, signal: i32) -> io::Result<()> {
    // SAFETY: takes integers only.
    let done = unsafe { libc::syscall(libc::SYS_tgkill, process, task, signal) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn call(request: u32, task: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: `data` is an integer, or points at memory of the caller that lives until the call
    // returns and is as large as `address` says; all requests of this file are of one of these forms.
    let done = unsafe { libc::ptrace(request, task, address, data) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
