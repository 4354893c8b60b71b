//! `decamp cancel`: calls a move off.

use clap::Args;
use decamp_shared::session::Outcome;

use super::client::Client;
use super::failure::Failure;
use super::{output, report, values};
use crate::messages::MigrationView;

/// Cancel a move; the workload runs on where it is
///
/// Once the move is past its fence it can no longer be cancelled, and ends by itself.
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp cancel web")]
pub(crate) struct Cancel {
    /// Id of the migration, the beginning of it, or the name of the workload
    #[arg(value_parser = values::migration)]
    migration: String,
}

impl Cancel {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let path = format!("/v1/migrations/{}/cancel", self.migration);
        let view: MigrationView = client.post(&path, &()).await?;
        if json {
            output::json(&view);
        }
        match &view.report {
            Some(ended) => {
                if !json {
                    output::line(report::headline(ended, false));
                }
                // Called off, or ended without a move before it could be.
                let called_off = matches!(
                    ended.outcome,
                    Outcome::Cancelled | Outcome::Failed | Outcome::Refused
                );
                Ok(if called_off { 0 } else { 1 })
            }
            None => {
                if !json {
                    output::line(format!(
                        "Migration {} is past its fence and decides by itself: see `decamp ls --all`",
                        view.migration
                    ));
                }
                Ok(1)
            }
        }
    }
}
