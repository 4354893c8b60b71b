//! The keeper of a container: what the hidden verb `decamp keeper` runs.

use decamp_shared::keeper::{ExitSignal, KeeperConfig, note_processes, serve};
use decamp_shared::workload::{Result, WorkloadError};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::error::ContainerError;
use crate::kept::Container;
use crate::sys;

/// Keeps the container of `config` until it is released, discarded, stopped or has ended.
///
/// Call it while the process has one thread: it takes the process into a mount namespace of its own
/// (mounts of the host still reach it; its own reach nobody) and makes it the parent of orphans.
///
/// # Errors
/// When the container cannot be started, or its shell cannot be built.
pub fn keeper_main(config: &KeeperConfig) -> Result<()> {
    crate::podman::remember_host_mounts()?;
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(ContainerError::errno("make a mount namespace for the keeper"))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
        .map_err(ContainerError::errno("keep the keeper's mounts from the host"))?;
    sys::children_come_back_to_us().map_err(ContainerError::io("become the parent of orphans"))?;
    let exit = ExitSignal::new()
        .map_err(|error| WorkloadError::new("Cannot make the keeper's exit signal", error))?;
    let container = Container::begin(config, &exit)?;
    note_processes(&config.place, &[std::process::id() as i32])?;
    serve(config, Box::new(container), &exit)
}
