//! Containers of podman. podman keeps a record of each, mounts its root, makes its network, and has `conmon`
//! be the parent of what an OCI runtime starts; below that it is a container like any other.
//!
//! Rooms: `found` (one that podman has), `image` (images and networks, for a checkpoint of podman's), `made` (what
//! another podman is told to make of it), `volumes` (what is mounted into it), `own` (what podman itself mounts),
//! `arrival` (how it comes to the charge of this host's podman), `exchanged` (the commands that podman gets for
//! that), `kept` and `ending` (what its keeper does otherwise), [`leftover`] (what stays until podman has forgotten
//! it), `restarting` (whether the host starts it by itself) and [`shim`] (what `conmon` there takes for the runtime).
//! podman is spoken to by its command (`command`), in the mount namespace of the host, for what it mounts is for
//! all of the host to see.

pub(crate) mod arrival;
mod command;
mod config;
mod ending;
pub(crate) mod exchanged;
pub(crate) mod found;
pub(crate) mod image;
mod kept;
pub mod leftover;
pub(crate) mod made;
pub(crate) mod own;
pub(crate) mod restarting;
pub mod shim;
mod talk;
pub(crate) mod volumes;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;

use crate::beside;
use crate::error::{ContainerError, Result};

pub(crate) use command::{has, podman, run};
pub(crate) use ending::end_for_good;
pub(crate) use kept::{Conmon, about_to_run, criu, leaves, stop, watch};

/// Its command.
const PROGRAM: &str = "podman";

/// The mount namespace of the host, where this process has left it.
static HOST_MOUNTS: OnceLock<OwnedFd> = OnceLock::new();

/// Remembers the mount namespace that this process is in as that of the host, before it leaves it.
pub(crate) fn remember_host_mounts() -> Result<()> {
    let path = "/proc/self/ns/mnt";
    let file = File::open(path).map_err(ContainerError::io(format!("open {path}")))?;
    let _ = HOST_MOUNTS.set(file.into());
    Ok(())
}

/// Does `work` on a thread that is in the mount namespace of the host: a child that it starts is there too,
/// and what it opens is the host's.
pub(crate) fn on_host<T: Send>(work: impl FnOnce() -> std::io::Result<T> + Send) -> Result<T> {
    beside::apart(|| {
        if let Some(namespace) = HOST_MOUNTS.get() {
            unshare(CloneFlags::CLONE_FS)
                .and_then(|()| setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS))
                .map_err(ContainerError::errno("enter the host's mount namespace"))?;
        }
        work().map_err(ContainerError::io("work in the host's mount namespace"))
    })
}

/// Has podman answer in JSON.
fn ask(arguments: &[&str]) -> Result<Value> {
    let text = run(&mut podman(arguments))?;
    serde_json::from_str(&text).map_err(|error| ContainerError::Tool {
        tool: PROGRAM,
        what: arguments.join(" "),
        said: format!("no JSON: {error}"),
    })
}

/// Why this host's podman cannot take a container of that record.
pub(crate) fn refusals(made: &made::Made) -> Vec<String> {
    let information = match ask(&["info", "--format", "json"]) {
        Ok(information) => information,
        Err(error) => return vec![format!("There is no podman that works: {error}")],
    };
    let mut found: Vec<_> = restarting::obstacle(made).into_iter().collect();
    let Some(network) = &made.network else { return found };
    if let Some(nonsense) = made.nonsense() {
        found.push(nonsense);
        return found;
    }
    let backend = information.pointer("/host/networkBackend").and_then(Value::as_str);
    if backend != Some("netavark") {
        found.push("podman makes its networks without netavark there: install that".to_owned());
    }
    let nft = Command::new("nft").arg("--version").stdin(Stdio::null()).output();
    if !nft.is_ok_and(|said| said.status.success()) {
        found.push(
            "There is no nft, which closes a network until its container is there".to_owned(),
        );
    }
    let known = ask(&["network", "inspect", "--", &network.name]);
    if known.is_err() {
        found.push(format!(
            "podman has no network {0} there: podman network create {0}, with the subnet of {1}",
            network.name, network.ip
        ));
    }
    found
}
