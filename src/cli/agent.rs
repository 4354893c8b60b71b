//! `decamp agent`: the daemon of this host.

use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use tracing_subscriber::EnvFilter;

use super::failure::Failure;
use crate::agent::config::{Config, Overrides};

/// Run the agent of this host
///
/// Serves the local socket and other hosts until it is told to end (SIGTERM). Workloads live on
/// without it, and the next agent finds them again. It logs to standard error; DECAMP_LOG sets what
/// (`debug`, `decamp=trace`).
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp agent --config /etc/decamp/agent.toml")]
pub(crate) struct Agent {
    /// The agent's configuration, in TOML
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// Listen there for other hosts, whatever the configuration says
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,

    /// Keep state there, whatever the configuration says
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl Agent {
    pub(crate) fn run(self, socket: Option<PathBuf>, json: bool) -> Result<u8, Failure> {
        log_to_stderr(json);
        // Named places where a test holds or breaks a move, from FAILPOINTS; torn down with the agent.
        #[cfg(feature = "failpoints")]
        let _failpoints = fail::FailScenario::setup();
        let overrides = Overrides { listen: self.listen, socket, state_dir: self.state_dir };
        let config = Config::load(&self.config, overrides)
            .map_err(|error| Failure::usage(super::failure::chain(&error)))?;
        crate::agent::run(config).map_err(|error| Failure::other(super::failure::chain(&error)))?;
        Ok(0)
    }
}

/// What is logged unless DECAMP_LOG says otherwise. What the queues of a guest's devices say of themselves is said
/// whenever the guest likes.
const LOGGED: &str = "info,virtio_queue=off";

/// Sends tracing events to standard error.
pub(crate) fn log_to_stderr(json: bool) {
    let filter = EnvFilter::try_from_env("DECAMP_LOG").unwrap_or_else(|_| EnvFilter::new(LOGGED));
    let plain = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    // Fails only when somebody set a subscriber already, which nobody does.
    let _ = if json { plain.json().try_init() } else { plain.try_init() };
}
