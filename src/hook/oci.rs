//! What an OCI runtime tells a hook: the container's state as JSON, on standard input. Whoever made the
//! container chose its name and its annotations, so nothing of it is believed before it is checked.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Deserialize;

use super::{ANNOTATION, MIGRATABLE};
use crate::backend::container::first_process;
use crate::messages::{HookEvent, HookRequest};

/// No state is longer: names, a path, and annotations.
const STATE_CAP: usize = 1 << 20;
/// A runtime writes it at once.
const READ_WITHIN: Duration = Duration::from_secs(2);
/// No name is longer.
const ID_CAP: usize = 255;
/// What podman's containers are annotated with.
const MANAGER: (&str, &str) = ("io.container.manager", "libpod");
/// The manager of those. The hooks of the stage poststop it calls itself, with fewer annotations.
const PODMAN: &str = "podman";

/// Why a call of the hook makes no sense.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// A person called it.
    #[error(
        "Container runtimes call this, with a container's state on standard input: `decamp hook install` \
         has them do so"
    )]
    Terminal,
    /// Standard input.
    #[error("Cannot read the container's state from standard input")]
    Read(#[source] io::Error),
    /// Its length.
    #[error("The container's state is longer than {} MiB", STATE_CAP >> 20)]
    Long,
    /// Its end did not come.
    #[error("The container's state did not come to its end within {} s", READ_WITHIN.as_secs())]
    Slow,
    /// Its form.
    #[error("What stands on standard input is no state of a container")]
    Form(#[source] serde_json::Error),
    /// What it says.
    #[error("{0}")]
    Lie(String),
}

/// A container's state, as far as it matters here (OCI runtime specification, `runtime.md`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Called {
    id: String,
    status: String,
    #[serde(default)]
    pid: i32,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// Reads the state from standard input.
///
/// # Errors
/// When that is a terminal, is too long, ends too late, or is no state.
pub(crate) fn read() -> Result<Called, CallError> {
    let input = io::stdin();
    if input.is_terminal() {
        return Err(CallError::Terminal);
    }
    let bytes = read_from(input.as_fd(), READ_WITHIN)?;
    serde_json::from_slice(&bytes).map_err(CallError::Form)
}

fn read_from(input: BorrowedFd<'_>, within: Duration) -> Result<Vec<u8>, CallError> {
    let deadline = Instant::now() + within;
    let own = input.try_clone_to_owned().map_err(CallError::Read)?;
    let (mut file, mut bytes, mut piece) = (File::from(own), Vec::new(), [0; 8 << 10]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut ready = [PollFd::new(input, PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut ready, timeout) {
            Ok(0) => return Err(CallError::Slow),
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => return Err(CallError::Read(errno.into())),
            Ok(_) => {}
        }
        match file.read(&mut piece).map_err(CallError::Read)? {
            0 => return Ok(bytes),
            length => bytes.extend_from_slice(&piece[..length]),
        }
        if bytes.len() > STATE_CAP {
            return Err(CallError::Long);
        }
    }
}

impl Called {
    /// The container's name, for messages; nothing that could be mistaken for anything else.
    pub(crate) fn name(&self) -> String {
        self.id.chars().filter(char::is_ascii_graphic).take(64).collect()
    }

    /// What to tell the agent; nothing for a container that is not to be registered. `caller` is the
    /// executable of the runtime.
    ///
    /// # Errors
    /// When the state cannot be of a container that this runtime has.
    pub(crate) fn request(&self, caller: &Path) -> Result<Option<HookRequest>, CallError> {
        let lie = |text: String| Err(CallError::Lie(text));
        let annotation = |key: &str| self.annotations.as_ref()?.get(key).map(String::as_str);
        match annotation(ANNOTATION) {
            None => return Ok(None),
            Some(MIGRATABLE) => {}
            Some(other) => {
                return lie(format!(
                    "Its annotation {ANNOTATION} is {:?}; only {MIGRATABLE:?} has it registered",
                    other.chars().take(40).collect::<String>()
                ));
            }
        }
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-+".contains(&byte);
        let id = self.id.as_str();
        if id.is_empty() || id.len() > ID_CAP || id.starts_with('.') || !id.bytes().all(good) {
            return lie(format!("{:?} is no name of a container", self.name()));
        }
        let runtime = caller.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !["runc", "crun", PODMAN].contains(&runtime) {
            return lie(format!(
                "It was called by {}, and not by runc, crun or podman: their containers are what can be \
                 adopted",
                caller.display()
            ));
        }
        let event = match self.status.as_str() {
            "created" | "running" => HookEvent::Started,
            "stopped" => HookEvent::Stopped,
            other => {
                return lie(format!(
                    "It is {:?}: the hook belongs to the stages poststart and poststop",
                    other.chars().take(40).collect::<String>()
                ));
            }
        };
        // One that has ended is no longer written down.
        if event == HookEvent::Started {
            self.check_process(runtime)?;
        }
        let is_podmans = runtime == PODMAN || annotation(MANAGER.0) == Some(MANAGER.1);
        let manager = if is_podmans { PODMAN } else { runtime };
        Ok(Some(HookRequest { what: format!("{manager}:{id}"), event }))
    }

    /// Whether the process is the container's, by what the runtime itself has written down.
    fn check_process(&self, runtime: &str) -> Result<(), CallError> {
        match first_process(runtime, &self.id) {
            Some(pid) if pid == self.pid => Ok(()),
            Some(pid) => Err(CallError::Lie(format!(
                "Its process is said to be {}, and is {pid} by what {runtime} has written down",
                self.pid
            ))),
            None => Err(CallError::Lie(format!(
                "{runtime} has no such container in /run/{runtime}: one with a --root of its own cannot be \
                 adopted"
            ))),
        }
    }
}

/// The executable that called us.
pub(crate) fn caller() -> PathBuf {
    let parent = nix::unistd::getppid();
    let executable = fs::read_link(format!("/proc/{parent}/exe")).unwrap_or_default();
    let words = fs::read(format!("/proc/{parent}/cmdline")).unwrap_or_default();
    named(executable, &words)
}

/// An executable by its own name, or by what it was called where it has none: crun runs from a mount of its
/// binary, or a copy in memory, that no container can write to. What it says of a container that runs is held
/// to what crun has written down.
fn named(executable: PathBuf, words: &[u8]) -> PathBuf {
    let is_memory = executable.as_os_str().as_bytes().starts_with(b"/memfd:");
    if executable.file_name().is_some() && !is_memory {
        return executable;
    }
    let first = words.split(|byte| *byte == 0).next().unwrap_or_default();
    PathBuf::from(OsStr::from_bytes(first))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn request(text: &str, caller: &str) -> Result<Option<HookRequest>, String> {
        let called: Called = serde_json::from_str(text).map_err(|error| error.to_string())?;
        called.request(Path::new(caller)).map_err(|error| error.to_string())
    }

    fn state(id: &str, status: &str, value: &str, more: &str) -> String {
        format!(
            r#"{{"ociVersion": "1.0.2", "id": "{id}", "status": "{status}", "pid": 7, "bundle": "/b",
                "annotations": {{"decamp.migratable": "{value}"{more}}}}}"#
        )
    }

    #[test]
    fn only_what_is_annotated_is_spoken_of() {
        for text in [
            r#"{"id": "web", "status": "running", "pid": 1}"#,
            r#"{"id": "web", "status": "running", "annotations": null}"#,
            r#"{"id": "../x", "status": "odd", "annotations": {"other": "true"}}"#,
        ] {
            assert_eq!(request(text, "/usr/bin/runc"), Ok(None), "{text}");
        }
        let ended = request(&state("web", "stopped", "true", ""), "/usr/bin/crun");
        let ended = ended.expect("good").expect("annotated");
        assert_eq!((ended.what.as_str(), ended.event), ("crun:web", HookEvent::Stopped));
        let podmans = state("0a1b", "stopped", "true", r#", "io.container.manager": "libpod""#);
        for (state, caller) in
            [(podmans, "/usr/bin/runc"), (state("0a1b", "stopped", "true", ""), "/usr/bin/podman")]
        {
            let ended = request(&state, caller).expect("good").expect("annotated");
            assert_eq!(ended.what, "podman:0a1b");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (text, caller, says) in [
            (state("web", "stopped", "yes", ""), "/usr/bin/runc", "only \"true\""),
            (state("web", "stopped", "True", ""), "/usr/bin/runc", "only \"true\""),
            (state("../web", "stopped", "true", ""), "/usr/bin/runc", "no name"),
            (state("a/b", "stopped", "true", ""), "/usr/bin/runc", "no name"),
            (state("", "stopped", "true", ""), "/usr/bin/runc", "no name"),
            (state(".web", "stopped", "true", ""), "/usr/bin/runc", "no name"),
            (state(&"x".repeat(300), "stopped", "true", ""), "/usr/bin/runc", "no name"),
            (state("web", "creating", "true", ""), "/usr/bin/runc", "poststart"),
            (state("web", "stopped", "true", ""), "/bin/bash", "/bin/bash"),
            (state("web", "stopped", "true", ""), "", "not by runc"),
            (
                state("no-such-container", "running", "true", ""),
                "/usr/bin/runc",
                "no such container",
            ),
            ("{".to_owned(), "/usr/bin/runc", "EOF"),
            ("[]".to_owned(), "/usr/bin/runc", ""),
            (r#"{"id": 7, "status": "x"}"#.to_owned(), "/usr/bin/runc", "string"),
            (
                r#"{"id": "x", "status": "x", "annotations": {"decamp.migratable": true}}"#
                    .to_owned(),
                "/usr/bin/runc",
                "string",
            ),
        ] {
            let refused = request(&text, caller).expect_err(&text);
            assert!(refused.contains(says), "{text}: {refused}");
        }
    }

    #[test]
    fn a_runtime_without_a_name_of_its_own_is_what_it_was_called() {
        for (executable, words, name) in [
            ("/usr/sbin/runc", &b"x\0run\0"[..], "/usr/sbin/runc"),
            ("/", b"/usr/bin/crun\0run\0", "/usr/bin/crun"),
            ("/memfd:crun (deleted)", b"crun\0", "crun"),
            ("", b"", ""),
        ] {
            assert_eq!(named(executable.into(), words), Path::new(name), "{executable}");
        }
    }

    #[test]
    fn what_is_read_has_an_end() {
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let short = Duration::from_millis(50);
        assert!(matches!(read_from(reader.as_fd(), short), Err(CallError::Slow)));
        writer.write_all(b"{}").expect("written");
        assert!(matches!(read_from(reader.as_fd(), short), Err(CallError::Slow)));
        writer.write_all(b"[]").expect("written");
        drop(writer);
        assert_eq!(read_from(reader.as_fd(), READ_WITHIN * 100).expect("read"), b"[]");
        let zeros = File::open("/dev/zero").expect("opened");
        assert!(matches!(read_from(zeros.as_fd(), READ_WITHIN * 100), Err(CallError::Long)));
    }
}
