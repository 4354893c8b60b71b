//! `decamp stop`: ends a running workload.

use std::time::Duration;

use clap::Args;

use super::client::Client;
use super::failure::Failure;
use super::{output, values};
use crate::messages::{StopRequest, WorkloadView};

/// Stop a running workload: ask it to end, wait, then force it
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp stop db --timeout 5m")]
pub(crate) struct Stop {
    /// Its name
    #[arg(value_parser = values::workload)]
    name: String,

    /// How long it is given to end by itself: 60s for a virtual machine, 10s for a container
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    timeout: Option<Duration>,
}

impl Stop {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let path = format!("/v1/workloads/{}/stop", self.name);
        let timeout_ms = self.timeout.map(|timeout| timeout.as_millis() as u64);
        let request = StopRequest { timeout_ms };
        let stopped: WorkloadView = client.post(&path, &request).await?;
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
