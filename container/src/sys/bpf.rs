//! The `bpf` system call, as much of it as a program takes that walks one process's mappings (kernel
//! documents `bpf/bpf_iterators`, `bpf/instruction-set`). What the program does is its author's business.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Commands of the system call (linux/bpf.h).
const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
const ITER_CREATE: i32 = 33;
/// Kind of a program that the kernel's own types describe, and where it is attached.
const TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;

/// The kernel's `union bpf_attr` for PROG_LOAD, up to what is used.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    types: u32,
    function_record_size: u32,
    function_records: u64,
    function_record_count: u32,
    line_record_size: u32,
    line_records: u64,
    line_record_count: u32,
    attach_type_id: u32,
    attach_to: u32,
    relocation_count: u32,
}

/// The same for LINK_CREATE.
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    iterator: u64,
    iterator_length: u32,
    reserved: u32,
}

/// The same for ITER_CREATE.
#[repr(C)]
struct IterCreate {
    link: u32,
    flags: u32,
}

/// The kernel's `union bpf_iter_link_info`, for a walk of one process.
#[repr(C)]
struct OfProcess {
    thread: u32,
    process: u32,
    descriptor: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<ProgLoad>() == 120);
const _: () = assert!(size_of::<LinkCreate>() == 32);
const _: () = assert!(size_of::<IterCreate>() == 8);
const _: () = assert!(size_of::<OfProcess>() == 16);

/// Loads a program for the walk that the kernel's type `function` stands for. It may be linked with what is
/// under the GPL, for what it calls of the kernel asks for that.
pub(crate) fn load_walk(instructions: &[u64], function: u32) -> io::Result<OwnedFd> {
    let license = c"Dual MIT/GPL";
    let request = ProgLoad {
        kind: TRACING,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        attach_type: TRACE_ITER,
        attach_type_id: function,
        ..ProgLoad::default()
    };
    call(PROG_LOAD, &request)
}

/// Lets a program walk process `pid`: what it writes is read from the descriptor returned.
pub(crate) fn walk(program: BorrowedFd<'_>, pid: i32) -> io::Result<OwnedFd> {
    let of = OfProcess { thread: 0, process: pid as u32, descriptor: 0, reserved: 0 };
    let link: OwnedFd = call(
        LINK_CREATE,
        &LinkCreate {
            program: program.as_raw_fd() as u32,
            target: 0,
            attach_type: TRACE_ITER,
            flags: 0,
            iterator: &raw const of as u64,
            iterator_length: size_of::<OfProcess>() as u32,
            reserved: 0,
        },
    )?;
    call(ITER_CREATE, &IterCreate { link: link.as_raw_fd() as u32, flags: 0 })
}

fn call<T>(command: i32, request: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as many bytes of `request` as it has, and what it points at: slices and
    // values that are borrowed, or on their callers' stacks, until the call returns. It writes none of it.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, request, size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this is a descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
