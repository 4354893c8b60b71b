//! `decamp adopt`: takes charge of a container that runs already.

use clap::Args;

use super::client::Client;
use super::failure::Failure;
use super::output;
use crate::messages::{AdoptRequest, WorkloadView};

/// Take charge of a container that a runtime started, so that it can be moved
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp adopt runc:web\n\n\
    The container is not touched until it is moved. `decamp rm web` gives it back as it runs;\n\
    `decamp stop web` ends it, and leaves it to its runtime as stopped.")]
pub(crate) struct Adopt {
    /// The container: its runtime, and its name there
    #[arg(value_name = "runc:ID|crun:ID", value_parser = container)]
    what: String,
}

impl Adopt {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let request = AdoptRequest { what: self.what };
        let adopted: WorkloadView = client.post("/v1/adopt", &request).await?;
        if json {
            output::json(&adopted);
        } else {
            output::line(format!("{} is in the charge of decamp", adopted.name));
        }
        Ok(0)
    }
}

/// `RUNTIME:ID`; which of them there are is for the agent to say.
fn container(text: &str) -> Result<String, String> {
    match text.split_once(':') {
        Some((runtime, id)) if !runtime.is_empty() && !id.is_empty() => Ok(text.to_owned()),
        _ => Err("a container is named by its runtime and its name there, as in runc:web".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_a_runtime_and_a_name() {
        assert_eq!(container("runc:web"), Ok("runc:web".to_owned()));
        for bad in ["web", "runc:", ":web", ""] {
            assert!(container(bad).is_err(), "{bad}");
        }
    }
}
