//! `decamp stop`: ends a running workload.

use clap::Args;

use super::client::Client;
use super::failure::Failure;
use super::{output, values};
use crate::messages::WorkloadView;

/// Stop a running workload: ask it to end, wait, then force it
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp stop web")]
pub(crate) struct Stop {
    /// Its name
    #[arg(value_parser = values::workload)]
    name: String,
}

impl Stop {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let path = format!("/v1/workloads/{}/stop", self.name);
        let stopped: WorkloadView = client.post(&path, &()).await?;
        if json {
            output::json(&stopped);
        } else {
            // A VM's says whether it switched itself off, or why that was not waited for.
            let how = stopped.exit.filter(|exit| exit.text != "stopped");
            let how = how.map_or_else(String::new, |exit| format!(": {}", exit.text));
            output::line(format!("{} is stopped{how}", stopped.name));
        }
        Ok(0)
    }
}
