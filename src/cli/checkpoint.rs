//! `decamp checkpoint`: a running workload into a file.

use std::path::PathBuf;

use clap::Args;

use super::archive::{Ended, follow};
use super::client::Client;
use super::failure::Failure;
use super::{output, units, values};
use crate::messages::{CheckpointRequest, CheckpointView};

/// Put a running workload into a file, all of it: memory, state and files
///
/// The workload stands still while the file is written. Then it is taken away, or runs on with
/// --leave-running; if anything fails it runs on as if nothing had been. The file is written by the agent,
/// and is there as a whole or not at all; whoever can read it can read the workload's memory. It can be
/// restored on any host, and more than once: each time that makes a copy. Ctrl-C leaves this command, not
/// the checkpoint.
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp checkpoint web --output /srv/web.tar.zst --leave-running")]
pub(crate) struct Checkpoint {
    /// Its name
    #[arg(value_parser = values::workload)]
    name: String,
    /// The file; nothing may be there
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Let the workload run on afterwards
    #[arg(long)]
    leave_running: bool,
}

impl Checkpoint {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let request = CheckpointRequest {
            output: values::absolute(&self.output),
            leave_running: self.leave_running,
        };
        let path = format!("/v1/workloads/{}/checkpoint", self.name);
        match follow(client, &path, &request, json).await? {
            Ended::Checkpointed(view) if json => output::json(&view),
            Ended::Checkpointed(view) => {
                output::line(told(&view));
                if let Some(advice) = &view.advice {
                    output::line(advice);
                }
            }
            Ended::Restored(_) => return Err(Failure::other("The agent answered something else")),
        }
        Ok(0)
    }
}

fn told(view: &CheckpointView) -> String {
    let state = if view.left_running { "runs on" } else { "is stopped" };
    format!(
        "{} is in {} ({} for {}) and {state}; it stood still for {}",
        view.workload,
        view.output.display(),
        units::bytes(view.file_bytes),
        units::bytes(view.bytes),
        units::milliseconds(view.stopped_ms)
    )
}
