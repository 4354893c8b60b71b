//! What of making a task do a system call is particular to x86-64: the instruction, and which register
//! holds what. Another architecture is another file like this one.

use std::io;

use nix::sys::ptrace;
use nix::unistd::Pid;

/// The registers of a stopped task.
pub(crate) type Registers = libc::user_regs_struct;

/// `syscall`.
pub(crate) const SYSTEM_CALL: [u8; 2] = [0x0f, 0x05];

/// Code segment of a task that runs 64-bit code.
const USER_CS: u64 = 0x33;

/// The registers of task `task`.
pub(crate) fn registers(task: i32) -> io::Result<Registers> {
    Ok(ptrace::getregs(Pid::from_raw(task))?)
}

/// Sets the registers of task `task`.
pub(crate) fn set_registers(task: i32, registers: Registers) -> io::Result<()> {
    Ok(ptrace::setregs(Pid::from_raw(task), registers)?)
}

/// Whether the task runs code that our system calls are of.
pub(crate) fn is_native(registers: &Registers) -> bool {
    registers.cs == USER_CS
}

/// `registers` with the next instruction at `instruction`, which is a system call, of this number and
/// with these arguments and zeros. A call that was interrupted is not restarted before it.
pub(crate) fn calling(
    mut registers: Registers,
    instruction: u64,
    number: i64,
    arguments: [u64; 3],
) -> Registers {
    registers.rip = instruction;
    registers.rax = number as u64;
    registers.orig_rax = u64::MAX;
    [registers.rdi, registers.rsi, registers.rdx] = arguments;
    [registers.r10, registers.r8, registers.r9] = [0; 3];
    registers
}

/// What a system call that was just left returned.
pub(crate) fn returned(registers: &Registers) -> io::Result<u64> {
    match registers.rax as i64 {
        error @ -4095..0 => Err(io::Error::from_raw_os_error(-error as i32)),
        value => Ok(value as u64),
    }
}

/// Address of the next instruction.
pub(crate) fn instruction(registers: &Registers) -> u64 {
    registers.rip
}

/// An address with room for so many bytes below all that a stopped task has on its stack.
pub(crate) fn below_the_stack(registers: &Registers, bytes: usize) -> u64 {
    // What lies closer belongs to the function that runs (System V ABI).
    (registers.rsp - 128 - bytes as u64) & !15
}

/// `registers` with the next instruction at `address`.
pub(crate) fn jumping(mut registers: Registers, address: u64) -> Registers {
    registers.rip = address;
    registers
}

/// Bytes that it takes to save all registers of a task, of those that the kernel has switched on: CPUID leaf
/// 13, EBX. 0 where the CPU cannot tell.
pub(crate) fn saved_bytes() -> u32 {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    if __cpuid(0).eax < 0xd { 0 } else { __cpuid_count(0xd, 0).ebx }
}
