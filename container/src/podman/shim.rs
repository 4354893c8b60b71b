//! What `conmon` takes for the OCI runtime while a container comes to podman: told to create it, it has the
//! container's keeper restore it, and told to start it, it has the keeper let it run. A restored process is
//! the child of whoever started the CRIU that restores it, and orphans are `conmon`'s: so CRIU is started
//! here, and `conmon` is told of its end like of any container's.
//!
//! The keeper's side of this conversation is in `arrival`. What either says is one message, with the
//! descriptors that belong to it.

use std::fs::{self, File};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};

use super::talk;
use crate::error::{ContainerError, Result};
use crate::sys;

/// What the runtime was called with.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Call {
    /// `create` or `start`.
    pub(crate) verb: String,
    /// Where the configuration is, to create.
    pub(crate) bundle: Option<PathBuf>,
}

/// A name for a terminal, whoever wants one with it.
const TERMINAL: &[u8] = b"/dev/console";

/// What the keeper wants to be done for a `create`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// These descriptors are wanted under these numbers. More will follow.
    Take(Vec<i32>),
    /// Start this CRIU, in the namespaces that come with it, with all that was taken, and speaking on the
    /// descriptor of that number.
    Begin { criu: PathBuf, socket: i32 },
    /// It restored a container with this first process, and the terminal that comes with it.
    Restored(i32),
    /// The container runs.
    Runs,
    /// Nothing came of it.
    Failed(String),
}

/// Stands for a runtime that was called with `arguments`, whose keeper listens on `socket`.
///
/// # Errors
/// When the keeper refuses or ends, and so nothing was created or started.
pub fn shim_main(socket: &Path, arguments: &[String]) -> Result<()> {
    let keeper = UnixStream::connect(socket)
        .map_err(ContainerError::io(format!("reach the keeper at {}", socket.display())))?;
    let verb = arguments.iter().find(|word| matches!(word.as_str(), "create" | "start"));
    let verb = verb.cloned().unwrap_or_default();
    let bundle = option(arguments, &["--bundle", "-b"]).map(PathBuf::from);
    if verb == "start" {
        talk::say(&keeper, &Call { verb, bundle }, &[])?;
        return match talk::hear(&keeper)? {
            (Order::Runs, _) => Ok(()),
            (other, _) => Err(unexpected(other)),
        };
    }
    let pid_file = option(arguments, &["--pid-file"])
        .ok_or_else(|| ContainerError::State("No file for the process number is named".into()))?;
    let console = option(arguments, &["--console-socket"]);
    let (output, error) = (io::stdout(), io::stderr());
    talk::say(&keeper, &Call { verb, bundle }, &[output.as_fd(), error.as_fd()])?;
    let mut criu = begin(&keeper)?;
    // Without a keeper CRIU is left to whoever sweeps: killed here, it would let go of tasks that run then.
    let (init, terminal) = match talk::hear(&keeper)? {
        (Order::Restored(init), terminal) => (Ok(init), terminal),
        (other, _) => (Err(unexpected(other)), Vec::new()),
    };
    criu.wait().map_err(ContainerError::io("wait for CRIU"))?;
    let created = created(init?, Path::new(pid_file), console, &terminal);
    // The keeper waits to hear whether all is done; one that is gone sees it end.
    let _ = talk::say(&keeper, &created.as_ref().err().map(ToString::to_string), &[]);
    created
}

/// Tells `conmon` of the first process that was restored, and gives it the terminal that it waits for.
fn created(init: i32, pid_file: &Path, console: Option<&str>, terminal: &[OwnedFd]) -> Result<()> {
    if let Some(console) = console {
        hand_over(Path::new(console), terminal)?;
    }
    fs::write(pid_file, init.to_string())
        .map_err(ContainerError::io(format!("write {}", pid_file.display())))
}

/// Gives `conmon`, which listens on `console`, the master of a terminal, as a runtime does.
fn hand_over(console: &Path, terminal: &[OwnedFd]) -> Result<()> {
    let failed = format!("hand a terminal over at {}", console.display());
    let stream = UnixStream::connect(console).map_err(ContainerError::io(failed.clone()))?;
    let numbers: Vec<_> = terminal.iter().map(AsRawFd::as_raw_fd).collect();
    if numbers.len() != 1 {
        return Err(ContainerError::State("The keeper has no terminal for conmon".to_owned()));
    }
    let rights = [ControlMessage::ScmRights(&numbers)];
    let parts = [IoSlice::new(TERMINAL)];
    sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None)
        .map_err(ContainerError::errno(failed))?;
    Ok(())
}

/// Starts CRIU as the keeper says.
fn begin(keeper: &UnixStream) -> Result<std::process::Child> {
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    let mut taken: Vec<(OwnedFd, i32)> = Vec::new();
    loop {
        match talk::hear(keeper)? {
            (Order::Take(numbers), descriptors) if numbers.len() == descriptors.len() => {
                taken.extend(descriptors.into_iter().zip(numbers));
            }
            (Order::Begin { criu, socket }, namespaces) => {
                let mut command = Command::new(&criu);
                command
                    .args(["swrk", &socket.to_string()])
                    .current_dir("/")
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null());
                sys::placed::inherit(&mut command, taken, namespaces)
                    .map_err(ContainerError::io("hand descriptors to CRIU"))?;
                let child = command
                    .spawn()
                    .map_err(ContainerError::io(format!("start {}", criu.display())))?;
                talk::say(keeper, &child.id(), &[])?;
                return Ok(child);
            }
            (other, _) => return Err(unexpected(other)),
        }
    }
}

fn unexpected(order: Order) -> ContainerError {
    ContainerError::State(match order {
        Order::Failed(why) => why,
        other => format!("The keeper said {other:?} out of turn"),
    })
}

/// The value of the option that has one of these names.
fn option<'a>(arguments: &'a [String], names: &[&str]) -> Option<&'a str> {
    let mut words = arguments.iter().map(String::as_str);
    while let Some(word) = words.next() {
        for name in names {
            if word == *name {
                return words.next();
            }
            if let Some(value) = word.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')) {
                return Some(value);
            }
        }
    }
    None
}

/// Opens the namespace of that kind of this process, for CRIU to be started in.
pub(crate) fn own_namespace(kind: &str) -> Result<OwnedFd> {
    let path = format!("/proc/self/ns/{kind}");
    Ok(File::open(&path).map_err(ContainerError::io(format!("open {path}")))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_found_in_either_form() {
        let words: Vec<String> =
            ["--log=x", "create", "--bundle", "/b", "--pid-file=/p", "id"].map(String::from).into();
        assert_eq!(option(&words, &["--bundle", "-b"]), Some("/b"));
        assert_eq!(option(&words, &["--pid-file"]), Some("/p"));
        assert_eq!(option(&words, &["--console-socket"]), None);
    }
}
