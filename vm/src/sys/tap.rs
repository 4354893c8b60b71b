//! Tap devices (linux/if_tun.h): interfaces whose other end is a descriptor.

use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{c_int, c_ulong};

const TUNSETIFF: c_ulong = request(202);
const TUNSETPERSIST: c_ulong = request(203);
const TUNSETOFFLOAD: c_ulong = request(208);
const TUNSETSNDBUF: c_ulong = request(212);
const TUNSETVNETHDRSZ: c_ulong = request(216);
/// The request of [`set_offloads`].
pub(crate) const SET_OFFLOADS: u32 = TUNSETOFFLOAD as u32;
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

/// `_IOW('T', number, int)`: also where the structure is another.
const fn request(number: c_ulong) -> c_ulong {
    (1 << 30) | ((size_of::<c_int>() as c_ulong) << 16) | ((b'T' as c_ulong) << 8) | number
}

// As `linux/if_tun.h` expands them.
const _: () = {
    assert!(TUNSETIFF == 0x4004_54ca && TUNSETOFFLOAD == 0x4004_54d0);
    assert!(TUNSETPERSIST == 0x4004_54cb);
    assert!(TUNSETSNDBUF == 0x4004_54d4 && TUNSETVNETHDRSZ == 0x4004_54d8);
};

/// What need not be done to a frame before it is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offloads {
    /// Checksums of TCP and UDP.
    pub(crate) checksums: bool,
    /// TCP over IPv4 cut into segments.
    pub(crate) segments4: bool,
    /// The same over IPv6.
    pub(crate) segments6: bool,
}

/// Makes a tap device called `name` in the network namespace of the calling thread. It goes with the descriptor,
/// which does not block, whose frames have headers of `header` bytes, and which has at most about `unsent` bytes under
/// way. One of that name that nobody holds, for whoever held it last had it stay, is removed before.
pub(crate) fn make_tap(name: &str, header: usize, unsent: usize) -> io::Result<OwnedFd> {
    // Not one that somebody else has made and might hold.
    let file = match attach(name, libc::IFF_TUN_EXCL) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let left = attach(name, 0)?;
            // SAFETY: takes an integer.
            check(unsafe { libc::ioctl(left.as_raw_fd(), TUNSETPERSIST, 0 as c_ulong) })?;
            drop(left);
            attach(name, libc::IFF_TUN_EXCL)
        }
        attached => attached,
    }?;
    for (request, value) in [(TUNSETVNETHDRSZ, header), (TUNSETSNDBUF, unsent)] {
        let value = c_int::try_from(value).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the kernel reads one `int`.
        check(unsafe { libc::ioctl(file.as_raw_fd(), request, &raw const value) })?;
    }
    set_offloads(file.as_fd(), Offloads::default())?;
    Ok(file.into())
}

/// A descriptor of the tap device called `name`, made when it is not there, `how`.
fn attach(name: &str, how: c_int) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: all-zero is a valid `ifreq`.
    let mut wanted: libc::ifreq = unsafe { zeroed() };
    if name.is_empty() || name.len() >= wanted.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in wanted.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | how;
    wanted.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: the kernel reads and writes one `ifreq`, whose name ends with a zero.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut wanted) })?;
    Ok(file)
}

/// Says what the reader of the tap device does by itself.
pub(crate) fn set_offloads(tap: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let one = |set: bool, flag: u32| if set { flag } else { 0 };
    let flags = one(offloads.checksums, TUN_F_CSUM)
        | one(offloads.segments4, TUN_F_TSO4)
        | one(offloads.segments6, TUN_F_TSO6);
    // SAFETY: takes an integer.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, c_ulong::from(flags)) })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
