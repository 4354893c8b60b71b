//! `decamp keeper` (hidden): the process that lives as long as one workload. Started by the agent,
//! never by a person.

use std::fs;
use std::path::PathBuf;

use clap::Args;
use decamp_shared::keeper::{KeeperConfig, spawn};
use decamp_shared::workload::WorkloadError;

use super::failure::{Failure, chain};
use crate::backend;

/// Keep one workload; the agent starts this
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp keeper --config /var/lib/decamp/workloads/web/keeper.json")]
pub(crate) struct Keeper {
    /// What the agent wrote for this keeper
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Keeper {
    pub(crate) fn run(self) -> Result<u8, Failure> {
        spawn::detach();
        super::agent::log_to_stderr(false);
        // Those of the agent that started it.
        #[cfg(feature = "failpoints")]
        let _failpoints = fail::FailScenario::setup();
        match self.keep() {
            Ok(()) => Ok(0),
            Err(error) => {
                tracing::error!("{}", chain(&error));
                spawn::report_failure(&error);
                Ok(1)
            }
        }
    }

    fn keep(&self) -> Result<(), WorkloadError> {
        let wrong = || format!("Cannot read the keeper's configuration {}", self.config.display());
        let text = fs::read(&self.config).map_err(|error| WorkloadError::new(wrong(), error))?;
        let config: KeeperConfig =
            serde_json::from_slice(&text).map_err(|error| WorkloadError::new(wrong(), error))?;
        backend::keeper_main(config)
    }
}
