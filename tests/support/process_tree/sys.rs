//! What the standard library does not do: memory that processes share, and a second process that has it.

use std::ffi::{c_int, c_void};
use std::io;

const PROT_READ_WRITE: c_int = 1 | 2;
const MAP_SHARED_ANONYMOUS: c_int = 0x01 | 0x20;

unsafe extern "C" {
    fn mmap(
        at: *mut c_void,
        length: usize,
        rights: c_int,
        flags: c_int,
        file: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn fork() -> c_int;
}

/// So many bytes of anonymous memory that a child has in common with its parent, for as long as either lives.
pub(super) fn shared_words(bytes: usize) -> io::Result<&'static mut [u64]> {
    // SAFETY: a new mapping at a place of the kernel's choice.
    let start =
        unsafe { mmap(std::ptr::null_mut(), bytes, PROT_READ_WRITE, MAP_SHARED_ANONYMOUS, -1, 0) };
    // MAP_FAILED.
    if start as isize == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping has so many bytes, all of them zeros, is never unmapped, and nobody else has a
    // reference into it: whoever is forked later only waits.
    Ok(unsafe { std::slice::from_raw_parts_mut(start.cast(), bytes / size_of::<u64>()) })
}

/// Forks; both go on. This process has no other thread.
pub(super) fn go_on_twice() -> io::Result<()> {
    // SAFETY: there is one thread, so that the child finds no lock taken.
    match unsafe { fork() } {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
