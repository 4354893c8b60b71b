//! `decamp resolve`: decides a move of which nobody knows how it ended.

use clap::Args;

use super::client::Client;
use super::failure::Failure;
use super::{output, values};
use crate::messages::{ResolveAnswer, ResolveRequest, Side};

/// Decide a move of which nobody knows how it ended
///
/// Needed when both hosts lost track, as after a crash of the destination between commit and run. Look
/// first where the workload runs (`decamp ls --all` on both hosts). `--keep source` lets it run on the
/// host that it was leaving, `--keep destination` on the other. Say the same on both hosts: with two
/// different answers two copies run, or none.
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp resolve 3f2a9c81d04e5b76 --keep source")]
pub(crate) struct Resolve {
    /// Id of the migration, the name of the workload, or the first six characters or more of the id
    #[arg(value_parser = values::migration)]
    migration: String,
    /// Whose copy is to live
    #[arg(long, value_enum)]
    keep: Side,
}

impl Resolve {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let path = format!("/v1/migrations/{}/resolve", self.migration);
        let answer: ResolveAnswer = client.post(&path, &ResolveRequest { keep: self.keep }).await?;
        if json {
            output::json(&answer);
        } else {
            output::line(answer.text);
        }
        Ok(0)
    }
}
