//! `decamp rm`: forgets a workload that does not run here, gives one back that was adopted, and removes the files that one which
//! moved away left behind.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::Args;

use super::client::Client;
use super::failure::Failure;
use super::{output, values};
use crate::messages::{RemoveAnswer, State, WorkloadDetail};

/// Remove a workload that does not run, or give an adopted one back
///
/// A stopped workload is forgotten; its files stay. An adopted one that runs is given back to its
/// runtime as it runs. Of one that moved to another host the files that
/// it left here are removed too, unless another workload uses them or --keep-files is given.
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp rm web --yes")]
pub(crate) struct Rm {
    /// Its name
    #[arg(value_parser = values::workload)]
    name: String,
    /// Leave the files of a workload that moved away where they are
    #[arg(long)]
    keep_files: bool,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

impl Rm {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let path = format!("/v1/workloads/{}", self.name);
        if !self.yes && !self.keep_files && io::stdin().is_terminal() {
            let detail: WorkloadDetail = client.get(&path).await?;
            if detail.view.state == State::Moved && !confirmed(&detail)? {
                return Err(Failure::refused("Nothing was removed"));
            }
        }
        let query = if self.keep_files { "?keep_files=1" } else { "" };
        let answer: RemoveAnswer = client.delete(&format!("{path}{query}")).await?;
        if json {
            output::json(&answer);
            return Ok(0);
        }
        output::line(format!("{} is forgotten", self.name));
        for path in &answer.removed {
            output::line(format!("  removed  {}", path.display()));
        }
        for left in &answer.left {
            output::line(format!("  stays    {} ({})", left.path.display(), left.why));
        }
        Ok(0)
    }
}

fn confirmed(detail: &WorkloadDetail) -> Result<bool, Failure> {
    let view = &detail.view;
    let host = view.moved_to.as_deref().unwrap_or("another host");
    eprintln!("{} moved to {host}. These files, which it left here, will be removed:", view.name);
    for file in &view.files {
        eprintln!("  {}", file.path.display());
    }
    eprint!("Remove them? [y/N] ");
    let mut answer = String::new();
    io::stderr()
        .flush()
        .and_then(|()| io::stdin().lock().read_line(&mut answer))
        .map_err(|error| Failure::other(format!("Cannot read the answer: {error}")))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
