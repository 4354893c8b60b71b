//! `decamp cancel`: calls a move off.

use clap::Args;
use decamp_shared::session::Outcome;
use decamp_shared::session::progress::Phase;

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
    /// Id of the migration, the name of the workload, or the first six characters or more of the id
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
                Ok(if called_off && !ended.lost { 0 } else { 1 })
            }
            None => {
                if !json {
                    output::line(still_under_way(&view));
                }
                Ok(1)
            }
        }
    }
}

/// The move did not end within the time that the agent waited.
fn still_under_way(view: &MigrationView) -> String {
    let id = &view.migration;
    match view.phase {
        Some(phase) if phase >= Phase::Fence => {
            format!("Migration {id} is past its fence and decides by itself: see `decamp ls --all`")
        }
        _ => format!(
            "Migration {id} was told to end, before its fence, and has not ended yet: {} runs on here \
             once it has. See `decamp ls --all` and the agent's log",
            view.workload
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_move_past_its_fence_is_said_to_be() {
        let text = |phase| {
            still_under_way(&MigrationView {
                migration: "3f2a".into(),
                workload: "web".into(),
                to: "beta".into(),
                active: true,
                phase,
                report: None,
            })
        };
        for before in [None, Some(Phase::Negotiate), Some(Phase::PreCopy), Some(Phase::Final)] {
            assert!(!text(before).contains("past its fence"), "{before:?}");
            assert!(text(before).contains("web runs on here once it has"));
        }
        for after in [Phase::Fence, Phase::Commit, Phase::Release] {
            assert!(text(Some(after)).contains("past its fence"), "{after:?}");
        }
    }
}
