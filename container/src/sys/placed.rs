//! Descriptors handed to a child under numbers that somebody else chose, and the namespaces that it begins in.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Lets the child of `command` have `descriptors` under the numbers beside them, and begin in `namespaces`.
pub(crate) fn inherit(
    command: &mut Command,
    descriptors: Vec<(OwnedFd, i32)>,
    namespaces: Vec<OwnedFd>,
) -> io::Result<()> {
    // Out of the way first, so that none is written over before it has been put in its place.
    let highest = descriptors.iter().map(|(_, number)| *number).max().unwrap_or(0);
    let aside = |descriptor: &OwnedFd| -> io::Result<OwnedFd> {
        // SAFETY: `fcntl` makes a new descriptor, which nobody else has.
        let number = unsafe {
            libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD_CLOEXEC, highest.max(2) + 1)
        };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just made.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    };
    let descriptors: Vec<(OwnedFd, i32)> = descriptors
        .iter()
        .map(|(descriptor, number)| Ok((aside(descriptor)?, *number)))
        .collect::<io::Result<_>>()?;
    let namespaces = namespaces.iter().map(aside).collect::<io::Result<Vec<_>>>()?;
    let place = move || {
        for namespace in &namespaces {
            // SAFETY: `setns` is a system call and touches nothing of this process's memory.
            if unsafe { libc::setns(namespace.as_raw_fd(), 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for (descriptor, number) in &descriptors {
            // SAFETY: `dup2` is async-signal-safe and touches this process's own table only.
            if unsafe { libc::dup2(descriptor.as_raw_fd(), *number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure calls nothing but `setns` and `dup2`, allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(place) };
    Ok(())
}
