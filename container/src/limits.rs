//! Resource limits of processes that CRIU may not ask for. Asking for those of another user's process
//! takes CAP_SYS_RESOURCE, which the root of a host that is itself a container may lack; everybody may
//! read them in `/proc/PID/limits`. So CRIU's question is answered from there by its supervisor.

use std::fs;
use std::io;

use crate::hiding;
use crate::sys::{self, Notification, Verdict};

/// `RLIM_NLIMITS`: how many limits a process has.
const LIMITS: usize = 16;
/// How wide the kernel writes a limit's name.
const NAME_WIDTH: usize = 25;

/// Soft and hard limits, by resource number.
type Limits = [(u64, u64); LIMITS];

/// Whether there is one among these processes whose limits we may not ask for.
pub(crate) fn are_out_of_reach(pids: &[i32]) -> bool {
    let refused = |pid: &i32| {
        sys::limit(*pid, libc::RLIMIT_CORE)
            .is_err_and(|error| error.raw_os_error() == Some(libc::EPERM))
    };
    pids.iter().any(refused)
}

/// Why nobody can answer for limits: CRIU may be under no filter at first when it dumps a process that is
/// under one, and cannot get one later on this host.
pub(crate) fn obstacle(pids: &[i32]) -> Option<String> {
    let wanted = are_out_of_reach(pids) && hiding::are_filtered(pids);
    let lacking = wanted.then(hiding::late::probe)?.err()?;
    Some(format!(
        "A process is under a seccomp filter, and CRIU may not ask for the resource limits of another user's \
         process: give the agent the capability CAP_SYS_RESOURCE, or run the container without a seccomp \
         filter, or as root. They cannot be asked for in its place: {lacking}"
    ))
}

/// Answers a call of `prlimit64` that asks for a limit and sets none; lets others through.
pub(crate) fn answer(notification: &Notification) -> io::Result<Verdict> {
    let [pid, resource, new, old, ..] = notification.arguments;
    let (pid, resource) = (pid as i32, resource as u32 as usize);
    if pid <= 0 || new != 0 || old == 0 || resource >= LIMITS {
        return Ok(Verdict::Continue);
    }
    let text = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let limits = parse(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/limits makes no sense"))
    })?;
    let (soft, hard) = limits[resource];
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&soft.to_ne_bytes());
    bytes[8..].copy_from_slice(&hard.to_ne_bytes());
    sys::write_memory(notification.pid, old, &bytes)?;
    Ok(Verdict::Return(0))
}

/// The kernel's table (fs/proc/base.c): a line of headings, then a line a resource, in the order of
/// their numbers, with soft and hard limit behind the name.
fn parse(text: &str) -> Option<Limits> {
    let mut limits = [(0, 0); LIMITS];
    let mut lines = text.lines().skip(1);
    for limit in &mut limits {
        let mut columns = lines.next()?.get(NAME_WIDTH..)?.split_whitespace();
        *limit = (value(columns.next()?)?, value(columns.next()?)?);
    }
    Some(limits)
}

fn value(text: &str) -> Option<u64> {
    if text == "unlimited" { Some(libc::RLIM_INFINITY) } else { text.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_says_what_the_kernel_answers() {
        let pid = std::process::id() as i32;
        let text = fs::read_to_string("/proc/self/limits").expect("there");
        let limits = parse(&text).expect("parsed");
        for (resource, limit) in limits.iter().enumerate() {
            assert_eq!(*limit, sys::limit(pid, resource as u32).expect("our own"), "{resource}");
        }
        assert!(!are_out_of_reach(&[pid]));
    }

    #[test]
    fn another_table_is_not_believed() {
        for text in ["", "Limit\n", "Limit\nMax cpu time              soon  unlimited  seconds\n"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn what_sets_a_limit_or_asks_for_none_is_the_kernels() {
        let call = |arguments| Notification { id: 1, pid: 1, call: libc::SYS_prlimit64, arguments };
        for arguments in [
            [7, 3, 4096, 4096, 0, 0],
            [7, 3, 0, 0, 0, 0],
            [0, 3, 0, 4096, 0, 0],
            [7, 16, 0, 8, 0, 0],
        ] {
            assert_eq!(answer(&call(arguments)).expect("no I/O"), Verdict::Continue);
        }
    }
}
