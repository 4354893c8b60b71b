//! CRIU's action script: what it calls at each step of a dump or a restore that a runtime has it make,
//! with the step in its environment (criu(8), `--action-script`). It goes by the exit code: one that is
//! not 0 before or during a dump makes it fail, and the container run on.
//!
//! What is said to standard error comes into CRIU's log, where nobody looks; so it is said to the
//! runtime's standard error too.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::backend::container;
use crate::cli::chain;

/// Where CRIU says which step it is at, and which process is the container's first.
const ACTION: &str = "CRTOOLS_SCRIPT_ACTION";
const INIT: &str = "CRTOOLS_INIT_PID";
/// A step of our own: what goes on when CRIU has ended.
const ANNOUNCE: &str = "decamp-announce";

/// What CRIU called us for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Before anything is touched.
    Look,
    /// The processes stand still.
    Hold,
    /// They are about to run on, here or restored.
    Release,
    /// They run, restored.
    Restored,
    Announce,
    /// Nothing to do.
    Other,
}

/// Why a step did not go well: a line each.
pub(crate) type Reasons = Vec<String>;

/// Does what belongs to the step that CRIU is at.
///
/// # Errors
/// Every reason why a dump is refused, or what went wrong. Nothing when a person called it.
pub(crate) fn step() -> Result<(), Option<Reasons>> {
    let Ok(action) = std::env::var(ACTION) else { return Err(None) };
    let step = step_of(&action);
    if step == Step::Other {
        return Ok(());
    }
    let init = std::env::var(INIT).ok();
    let init = init.and_then(|text| text.parse::<i32>().ok()).filter(|pid| *pid > 0);
    let Some(init) = init else {
        return Err(Some(vec![format!("CRIU does not say in {INIT} which process it is at")]));
    };
    let failed = |what: &str, error: &dyn std::error::Error| {
        Some(vec![format!("Cannot {what}: {}", chain(error))])
    };
    match step {
        Step::Look => match container::obstacles(init) {
            found if found.is_empty() => Ok(()),
            found => Err(Some(found)),
        },
        Step::Hold => container::hold_network(init)
            .map_err(|error| failed("hold the container's network still", &error)),
        Step::Release => container::release_network(init)
            .map_err(|error| failed("put the container back on the network", &error)),
        Step::Restored => {
            announce_later(init);
            Ok(())
        }
        Step::Announce => {
            container::announce(init).map_err(|error| failed("announce the container", &error))
        }
        Step::Other => Ok(()),
    }
}

/// Says why it failed, to whoever may hear it.
pub(crate) fn complain(reasons: &Reasons) {
    let mut text =
        String::from("decamp: the container is not checkpointed or restored as asked:\n");
    if std::env::var(ACTION).is_ok_and(|action| step_of(&action) == Step::Look) {
        text = "decamp: the container cannot be checkpointed, and runs on:\n".to_owned();
    }
    for reason in reasons {
        text.push_str(&format!("  - {reason}\n"));
    }
    super::say(text.trim_end());
    // CRIU's parent is the runtime. Nobody is waited for.
    let runtime = parent(nix::unistd::getppid().as_raw()).filter(|pid| *pid > 1);
    let Some(runtime) = runtime else { return };
    let Some(error) = container::standard_error_of(runtime) else { return };
    // Others write there too, so it is not ours to set: what it has room for now fits without waiting.
    let mut room = [PollFd::new(error.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut room, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
        let bytes = text.as_bytes();
        let _ = File::from(error).write(&bytes[..bytes.len().min(libc::PIPE_BUF)]);
    }
}

fn step_of(action: &str) -> Step {
    match action {
        "pre-dump" => Step::Look,
        "network-lock" => Step::Hold,
        "network-unlock" => Step::Release,
        "post-resume" => Step::Restored,
        ANNOUNCE => Step::Announce,
        _ => Step::Other,
    }
}

/// CRIU waits for us: what takes longer is done by a process of its own, which nobody waits for.
fn announce_later(init: i32) {
    let Ok(program) = std::env::current_exe() else { return };
    let spawned = Command::new(program)
        .args(["hook", "criu"])
        .env(ACTION, ANNOUNCE)
        .env(INIT, init.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        .process_group(0)
        .spawn();
    if let Err(error) = spawned {
        super::say(&format!("decamp: Cannot announce the container again: {error}"));
    }
}

fn parent(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_told_apart() {
        for (action, step) in [
            ("pre-dump", Step::Look),
            ("network-lock", Step::Hold),
            ("network-unlock", Step::Release),
            ("post-resume", Step::Restored),
            ("post-dump", Step::Other),
            ("", Step::Other),
        ] {
            assert_eq!(step_of(action), step, "{action}");
        }
        assert_eq!(parent(std::process::id() as i32), Some(nix::unistd::getppid().as_raw()));
    }
}
