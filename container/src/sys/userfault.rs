//! The ioctls of a userfaultfd (linux/userfaultfd.h), as far as this crate uses them.

use std::io;
use std::mem::size_of;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Write faults are caught, beside missing pages.
pub(crate) const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Told of: forks, memory that is moved, given back, and unmapped.
pub(crate) const FEATURE_EVENT_FORK: u64 = 1 << 1;
pub(crate) const FEATURE_EVENT_REMAP: u64 = 1 << 2;
pub(crate) const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub(crate) const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
/// Pages that do not exist can be protected as well.
pub(crate) const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// A write to a protected page lifts the protection and goes on; nobody is asked.
pub(crate) const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// Flag of the system call `userfaultfd` that needs no privilege: faults in the kernel need not be
/// handled. Protection that is lifted without asking covers the kernel's writes all the same.
pub(crate) const USER_MODE_ONLY: u64 = 1;

/// What a range is registered for (`UFFDIO_REGISTER_MODE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Writes to protected pages.
    WriteProtect = 2,
    /// Pages that are not there. (Who restores registers these, but for huge ones.)
    Missing = 1,
}

const API: u64 = 0xaa;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// `struct uffd_msg`: an event, its padding, and three words whose meaning is the event's.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdMsg {
    event: u8,
    reserved: [u8; 7],
    words: [u64; 3],
}

const fn request(direction: u64, number: u64, size: usize) -> u64 {
    (direction << 30) | ((size as u64) << 16) | (API << 8) | number
}

const READ: u64 = 2;
const BOTH: u64 = 3;
const UFFDIO_API: u64 = request(BOTH, 0x3f, size_of::<UffdioApi>());
const UFFDIO_REGISTER: u64 = request(BOTH, 0x00, size_of::<UffdioRegister>());
const UFFDIO_UNREGISTER: u64 = request(READ, 0x01, size_of::<UffdioRange>());
const UFFDIO_WAKE: u64 = request(READ, 0x02, size_of::<UffdioRange>());
const UFFDIO_COPY: u64 = request(BOTH, 0x03, size_of::<UffdioCopy>());
const UFFDIO_ZEROPAGE: u64 = request(BOTH, 0x04, size_of::<UffdioZeropage>());
const UFFDIO_WRITEPROTECT: u64 = request(BOTH, 0x06, size_of::<UffdioWriteprotect>());

const _: () = assert!(size_of::<UffdMsg>() == 32);
const _: () = assert!(UFFDIO_API == 0xc018_aa3f);
const _: () = assert!(UFFDIO_REGISTER == 0xc020_aa00);
const _: () = assert!(UFFDIO_UNREGISTER == 0x8010_aa01);
const _: () = assert!(UFFDIO_WAKE == 0x8010_aa02);
const _: () = assert!(UFFDIO_COPY == 0xc028_aa03);
const _: () = assert!(UFFDIO_ZEROPAGE == 0xc020_aa04);
const _: () = assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06);

/// What a task did to memory that is still being filled, or wants of it.
#[derive(Debug)]
pub(crate) enum Event {
    /// It waits for the page at this address.
    Fault(u64),
    /// It forked; the child's memory is behind this descriptor.
    Fork(OwnedFd),
    /// It moved memory.
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// How much, in bytes.
        len: u64,
    },
    /// It gave the contents of addresses back; the mapping stays.
    Remove(Range<u64>),
    /// It unmapped addresses.
    Unmap(Range<u64>),
}

/// Agrees on features with the kernel. Done once for each descriptor, before anything else.
pub(crate) fn agree(uffd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    let mut argument = UffdioApi { api: API, features, ioctls: 0 };
    // SAFETY: the kernel reads and writes one `uffdio_api`, whose size is proved above.
    checked(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API as _, &mut argument) })
}

/// Registers the mappings in a range of addresses of the descriptor's process.
pub(crate) fn register(uffd: BorrowedFd<'_>, range: &Range<u64>, mode: Mode) -> io::Result<()> {
    let range = UffdioRange { start: range.start, len: range.end - range.start };
    let mut argument = UffdioRegister { range, mode: mode as u64, ioctls: 0 };
    // SAFETY: the kernel reads and writes one `uffdio_register`, whose size is proved above.
    checked(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER as _, &mut argument) })
}

/// Takes a registration back, and wakes who waits for pages there.
pub(crate) fn unregister(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    let argument = UffdioRange { start: range.start, len: range.end - range.start };
    // SAFETY: the kernel reads one `uffdio_range`, whose size is proved above.
    checked(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_UNREGISTER as _, &argument) })
}

/// Whether the mapping at `address`, of the descriptor's process, is registered for write protection: asks
/// for a page there to be without. An error says that the memory is gone.
pub(crate) fn is_registered(uffd: BorrowedFd<'_>, address: u64, page: u64) -> io::Result<bool> {
    match protect(uffd, &(address..address + page), false) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Protects the pages that exist in a range of one mapping against writes, or lifts that. `ENOENT` where it is
/// not registered.
pub(crate) fn protect(uffd: BorrowedFd<'_>, range: &Range<u64>, wanted: bool) -> io::Result<()> {
    let range = UffdioRange { start: range.start, len: range.end - range.start };
    let mut argument = UffdioWriteprotect { range, mode: u64::from(wanted) };
    // SAFETY: the kernel reads one `uffdio_writeprotect`, whose size is proved above.
    checked(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WRITEPROTECT as _, &mut argument) })
}

/// Wakes who waits for pages in a range of addresses.
pub(crate) fn wake(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    let argument = UffdioRange { start: range.start, len: range.end - range.start };
    // SAFETY: the kernel reads one `uffdio_range`, whose size is proved above.
    checked(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WAKE as _, &argument) })
}

/// Installs `bytes` (whole pages) at `address` of the descriptor's process, atomically page by page,
/// and wakes who waits for them. Gives how many bytes were installed before the first page that could
/// not be, and why that one could not.
pub(crate) fn copy(uffd: BorrowedFd<'_>, address: u64, bytes: &[u8]) -> (u64, Option<io::Error>) {
    let mut argument = UffdioCopy {
        dst: address,
        src: bytes.as_ptr() as u64,
        len: bytes.len() as u64,
        mode: 0,
        copy: 0,
    };
    // SAFETY: the kernel reads `bytes`, which is borrowed for the length of the call, and writes one
    // `uffdio_copy`, whose size is proved above; it writes no memory of this process.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY as _, &mut argument) };
    installed(done, argument.copy, bytes.len() as u64)
}

/// The same with pages of zeros.
pub(crate) fn zero(uffd: BorrowedFd<'_>, range: &Range<u64>) -> (u64, Option<io::Error>) {
    let length = range.end - range.start;
    let mut argument = UffdioZeropage {
        range: UffdioRange { start: range.start, len: length },
        mode: 0,
        zeropage: 0,
    };
    // SAFETY: the kernel reads and writes one `uffdio_zeropage`, whose size is proved above.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_ZEROPAGE as _, &mut argument) };
    installed(done, argument.zeropage, length)
}

/// Takes the next event off a descriptor that does not block; nothing when there is none.
pub(crate) fn next_event(uffd: BorrowedFd<'_>) -> io::Result<Option<Event>> {
    let mut message = UffdMsg::default();
    // SAFETY: the kernel writes at most one `uffd_msg` into `message`, for which every bit pattern
    // is valid.
    let got =
        unsafe { libc::read(uffd.as_raw_fd(), (&raw mut message).cast(), size_of::<UffdMsg>()) };
    if got < 0 {
        let error = io::Error::last_os_error();
        let none = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
        return if none { Ok(None) } else { Err(error) };
    }
    let bad = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
    if got as usize != size_of::<UffdMsg>() {
        return Err(bad("A message of a userfaultfd was cut short"));
    }
    let [first, second, third] = message.words;
    match message.event {
        // Flags, address, thread.
        0x12 => Ok(Some(Event::Fault(second))),
        // SAFETY: with this event the kernel has made a descriptor for us and put its number here.
        0x13 => Ok(Some(Event::Fork(unsafe { OwnedFd::from_raw_fd(first as u32 as i32) }))),
        0x14 => Ok(Some(Event::Remap { from: first, to: second, len: third })),
        0x15 => Ok(Some(Event::Remove(first..second))),
        0x16 => Ok(Some(Event::Unmap(first..second))),
        _ => Err(bad("A userfaultfd told of something that this build does not know")),
    }
}

fn installed(done: i32, count: i64, wanted: u64) -> (u64, Option<io::Error>) {
    if done == 0 {
        return (wanted, None);
    }
    let error = io::Error::last_os_error();
    (u64::try_from(count).unwrap_or(0).min(wanted), Some(error))
}

fn checked(done: i32) -> io::Result<()> {
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// By whole page tables, too.
    #[test]
    fn memory_that_was_away_is_not_registered() {
        const TABLE: usize = 2 << 20;
        let uffd = super::super::userfaultfd().expect("a userfaultfd");
        let uffd = uffd.as_fd();
        agree(uffd, FEATURE_PAGEFAULT_FLAG_WP).expect("Linux 5.7");
        // SAFETY: addresses that the kernel chooses, which nothing else uses; moved within themselves.
        let (start, moved) = unsafe {
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let all = libc::mmap(std::ptr::null_mut(), 5 * TABLE, rights, flags, -1, 0);
            assert_ne!(all, libc::MAP_FAILED);
            let start = all.cast::<u8>().add(TABLE - all.addr() % TABLE);
            start.add(5).write(7);
            let move_to = move |from: *mut u8, to: *mut u8| {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                libc::mremap(from.cast(), TABLE, TABLE, flags, to.cast::<libc::c_void>())
            };
            (start, move_to)
        };
        let mapping = start.addr() as u64..(start.addr() + TABLE) as u64;
        let is_registered = || is_registered(uffd, mapping.start, 4096).expect("memory");
        assert!(!is_registered());
        register(uffd, &mapping, Mode::WriteProtect).expect("our own");
        assert!(is_registered() && is_registered(), "asking changes nothing");
        // SAFETY: all within what was mapped above, of which there is no reference.
        unsafe {
            let away = start.add(2 * TABLE);
            assert_eq!(moved(start, away), away.cast());
            assert_eq!(moved(away, start), start.cast());
            assert_eq!(start.add(5).read(), 7);
        }
        assert!(!is_registered());
    }
}
