//! `decamp start`: runs a stopped workload again.

use clap::Args;

use super::client::Client;
use super::failure::Failure;
use super::{output, values};
use crate::messages::WorkloadView;

/// Run a stopped workload again
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp start web")]
pub(crate) struct Start {
    /// Its name
    #[arg(value_parser = values::workload)]
    name: String,
}

impl Start {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let path = format!("/v1/workloads/{}/start", self.name);
        let started: WorkloadView = client.post(&path, &()).await?;
        if json {
            output::json(&started);
        } else {
            output::line(format!("{} runs", started.name));
        }
        Ok(0)
    }
}
