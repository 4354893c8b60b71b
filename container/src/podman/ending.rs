//! The end of a container of podman's that runs elsewhere, or may: podman shall know that it was wanted, or a
//! restart policy would start it again here.

use std::fs;
use std::io;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::command::{LONG, run_within};
use super::{has, podman};
use crate::cgroup::{Cgroups, kill_each};
use crate::error::{ContainerError, Result};

/// Ends the container `id`, which stands still in `cgroups`, with first process `init`. Nothing of it runs
/// again: all but the first process are killed before anything is thawed, and podman kills that one. Its
/// record stays, as exited.
///
/// A CRIU that lost its keeper may still dump it. While it does it has the cgroup thawed and holds the tasks by
/// itself, and it ends at once, without freezing them again, when one of them dies under its hands: so all
/// are told to stand still first, and whoever it lets go of does.
///
/// # Errors
/// When podman does not do that. What is left of the container stands still. One of which nothing is left has
/// ended: podman removes some by itself.
pub(crate) fn end_for_good(id: &str, cgroups: &Cgroups, init: i32) -> Result<()> {
    end(id, cgroups, init).or_else(|error| {
        let is_gone = has(id) == Some(false) && cgroups.peopled()?.is_none();
        if is_gone { Ok(()) } else { Err(error) }
    })
}

fn end(id: &str, cgroups: &Cgroups, init: i32) -> Result<()> {
    cgroups.freeze_when_free()?;
    let others = cgroups.processes()?.into_iter().filter(|pid| *pid != init).collect();
    kill_each(&others)?;
    thread::scope(|scope| {
        let stop = || {
            let mut command = podman(&["stop", "--time", "0", "--", id]);
            run_within(&mut command, LONG).map(|_| ())
        };
        let stopping = thread::Builder::new().spawn_scoped(scope, stop);
        let stopping = stopping.map_err(ContainerError::io("start a thread"))?;
        // podman has a time limit of its own.
        while !stopping.is_finished() {
            if is_killed(init) {
                // A frozen one of cgroup v1 dies when it is thawed, which not every runtime does. One that
                // has died may be gone with its cgroup.
                let _ = cgroups.thaw();
                break;
            }
            // A CRIU that had only begun thaws them once more; and v1 is to be asked again for a task that it
            // has just stopped.
            if cgroups.is_frozen().is_ok_and(|frozen| !frozen) {
                let _ = cgroups.freeze_when_free();
            }
            thread::sleep(Duration::from_millis(2));
        }
        stopping.join().unwrap_or_else(|_| {
            Err(ContainerError::State("A thread that stops panicked".to_owned()))
        })
    })
}

/// Whether process `pid` has been killed, if it still waits for that to come to pass, or is gone.
fn is_killed(pid: i32) -> bool {
    let status = match fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) => status,
        Err(error) => {
            let is_gone = error.raw_os_error() == Some(libc::ESRCH);
            // Whoever cannot be looked at for another reason may live, and would run if it were thawed.
            return is_gone || error.kind() == io::ErrorKind::NotFound;
        }
    };
    let bit = 1u64 << (Signal::SIGKILL as u32 - 1);
    let pending = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let mask = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        mask.is_some_and(|mask| mask & bit != 0)
    };
    pending("SigPnd:") || pending("ShdPnd:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_lives_is_not_killed_and_who_is_gone_is() {
        assert!(!is_killed(std::process::id() as i32));
        assert!(is_killed(i32::MAX));
    }
}
