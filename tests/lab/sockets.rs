//! Sockets between the guest and its host (vsock(7)): what comes is sent back.
//!
//! What belongs here: those sockets, of which the standard library knows nothing. What does not: other sockets.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;

use crate::send_back;

/// As linux/vm_sockets.h has it.
const AF_VSOCK: i32 = 40;
const ANY: u32 = u32::MAX;
const SOCK_STREAM: i32 = 1;
const SOCK_CLOEXEC: i32 = 0o2000000;
const BACKLOG: i32 = 8;

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    rest: [u8; 4],
}

unsafe extern "C" {
    fn socket(family: i32, kind: i32, protocol: i32) -> i32;
    fn bind(socket: i32, address: *const Address, length: u32) -> i32;
    fn listen(socket: i32, backlog: i32) -> i32;
    fn accept4(socket: i32, address: *mut Address, length: *mut u32, flags: i32) -> i32;
}

fn check(done: i32) -> io::Result<i32> {
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

/// A descriptor that the kernel has just given.
fn own(given: i32) -> io::Result<OwnedFd> {
    let raw = check(given)?;
    // SAFETY: it is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Sends back what comes at `port`.
pub fn echo(port: u32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    let listener = own(unsafe { socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0) })?;
    let address = Address { family: AF_VSOCK as u16, reserved: 0, port, cid: ANY, rest: [0; 4] };
    // SAFETY: the address is read, and lives until the calls are over.
    unsafe {
        check(bind(listener.as_raw_fd(), &raw const address, size_of::<Address>() as u32))?;
        check(listen(listener.as_raw_fd(), BACKLOG))?;
    }
    loop {
        // SAFETY: nobody asks for the peer's address.
        let taken = unsafe {
            accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), SOCK_CLOEXEC)
        };
        let stream = File::from(own(taken)?);
        thread::spawn(move || send_back(stream));
    }
}
