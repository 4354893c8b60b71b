//! How podman's command is run: in the mount namespace of the host, and not for longer than it may take. What
//! it says goes to files in memory: a pipe ends only when all have let go of it, and what podman starts lives
//! longer than itself.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{PROGRAM, on_host};
use crate::error::{ContainerError, Result};
use crate::sys;

/// podman answers, and makes or removes a record, within this.
const WITHIN: Duration = Duration::from_secs(30);
/// podman starts, stops or removes a container within this.
pub(crate) const LONG: Duration = Duration::from_secs(120);
/// After so many milliseconds it is looked at again whether there is still time.
const LOOK_EVERY: u8 = 50;
/// No answer is longer.
const CAP: u64 = 64 << 20;

/// A command of podman with these arguments.
pub(crate) fn podman(arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).current_dir("/").stdin(Stdio::null());
    command
}

/// Has podman do something that takes no time to speak of. Gives what it says.
///
/// # Errors
/// When it cannot be started, says that it failed, and why, or did not end in time and was killed.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    run_within(command, WITHIN)
}

/// Like [`run`], for what may take `within`.
pub(crate) fn run_within(command: &mut Command, within: Duration) -> Result<String> {
    run_until(command, is_later(within))
}

/// Like [`run`], until `is_over` says that it has had enough time.
pub(crate) fn run_until(
    command: &mut Command,
    is_over: impl Fn() -> bool + Send,
) -> Result<String> {
    let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
    let what = words.iter().take(2).map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let failed = |said: &str| {
        Err(ContainerError::Tool { tool: PROGRAM, what: what.clone(), said: said.to_owned() })
    };
    let Some(said) = on_host(|| output(command, is_over))? else {
        return failed("it did not end in time, and was killed");
    };
    if said.status.success() {
        return Ok(String::from_utf8_lossy(&said.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&said.stderr);
    let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it did not say why");
    failed(last.strip_prefix("Error: ").unwrap_or(last))
}

/// Whether this host's podman has a container of that name; nothing if it does not say.
pub(crate) fn has(name: &str) -> Option<bool> {
    exists("container", name)
}

/// Whether it has a container, or a volume, of that name.
pub(super) fn exists(kind: &str, name: &str) -> Option<bool> {
    let mut command = podman(&[kind, "exists", "--", name]);
    match on_host(|| output(&mut command, is_later(WITHIN))).ok()??.status.code() {
        Some(0) => Some(true),
        Some(1) => Some(false),
        _ => None,
    }
}

fn is_later(within: Duration) -> impl Fn() -> bool + Send {
    let begun = Instant::now();
    move || begun.elapsed() > within
}

/// What `command` has said when it ended; nothing if `is_over` before that, and so it was killed.
fn output(command: &mut Command, is_over: impl Fn() -> bool) -> io::Result<Option<Output>> {
    let file = || memfd_create("podman", MFdFlags::MFD_CLOEXEC).map(File::from);
    let (stdout, stderr) = (file()?, file()?);
    // What podman would make after our end nobody would know of. This thread waits for it.
    sys::end_with_us(command);
    let mut child = command.stdout(stdout.try_clone()?).stderr(stderr.try_clone()?).spawn()?;
    let ended = wait(&mut child, is_over);
    if !matches!(ended, Ok(Some(_))) {
        // It may have ended by itself a moment before.
        let _ = child.kill();
        child.wait()?;
    }
    let Some(status) = ended? else { return Ok(None) };
    let (stdout, stderr) = (text_of(stdout)?, text_of(stderr)?);
    Ok(Some(Output { status, stdout, stderr }))
}

fn wait(child: &mut Child, is_over: impl Fn() -> bool) -> io::Result<Option<ExitStatus>> {
    let process = sys::pidfd_open(child.id() as i32)?;
    while !is_over() {
        let mut events = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        match poll(&mut events, PollTimeout::from(LOOK_EVERY)) {
            Ok(1..) => return child.wait().map(Some),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(None)
}

fn text_of(mut file: File) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.rewind()?;
    file.take(CAP).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(line: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", line]).stdin(Stdio::null());
        command
    }

    #[test]
    fn it_says_what_it_says_and_why_it_failed() {
        assert_eq!(run(&mut shell("echo good; echo no >&2")).expect("it works"), "good\n");
        let error =
            run(&mut shell("echo good; echo Error: no >&2; exit 1")).expect_err("it failed");
        assert!(error.to_string().ends_with(": no"), "{error}");
    }

    /// Whatever else holds what it writes to.
    #[test]
    fn it_is_not_waited_for_without_end() {
        let begun = Instant::now();
        assert_eq!(run(&mut shell("sleep 20 & echo $$")).expect("it ends").lines().count(), 1);
        let error = run_within(&mut shell("exec sleep 20"), Duration::from_millis(100));
        assert!(error.expect_err("it sleeps").to_string().contains("killed"));
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    }
}
