//! `decamp shim` (hidden): what podman's `conmon` takes for the OCI runtime while a container comes to podman.
//! Called by a script that a keeper writes, never by a person.

use std::path::PathBuf;

use clap::Args;

use crate::backend;

/// Stand for an OCI runtime; podman calls this
#[derive(Debug, Args)]
#[command(
    after_help = "Example: decamp shim --socket /run/decamp-podman/x/keeper.sock -- start ID"
)]
pub(crate) struct Shim {
    /// Where the container's keeper listens
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// What the runtime is called with
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Shim {
    /// What it says is for podman, which shows its user the last line.
    pub(crate) fn run(self) -> u8 {
        match backend::shim_main(&self.socket, &self.arguments) {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("{}", super::failure::chain(&error));
                1
            }
        }
    }
}
