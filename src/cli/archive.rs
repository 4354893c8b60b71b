//! What `checkpoint` and `restore` have in common: following the agent's events to the last one, with a bar
//! on a terminal, a line for each phase when piped, nothing with `--json`.

use std::io::{self, IsTerminal};

use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::client::Client;
use super::failure::Failure;
use super::output;
use crate::messages::{ArchiveEvent, CheckpointView, RUNS_ON, WorkloadView};

const BAR: &str =
    "  {spinner} {prefix:8} {elapsed:>5}  [{bar:36}] {binary_bytes} of {binary_total_bytes}";
const WAITING: &str = "  {spinner} {prefix:8} {elapsed:>5}";

/// How it ended.
pub(super) enum Ended {
    /// The file is complete.
    Checkpointed(CheckpointView),
    /// The workload runs.
    Restored(WorkloadView),
}

/// Asks the agent and follows it to the end.
pub(super) async fn follow(
    client: &Client,
    path: &str,
    request: &impl Serialize,
    json: bool,
) -> Result<Ended, Failure> {
    let mut stream = client.stream(Method::POST, path, Some(request)).await?;
    let mut display = Display::new(json);
    while let Some(line) = stream.line().await? {
        let event: ArchiveEvent = serde_json::from_slice(&line).map_err(|error| {
            Failure::other(format!("The agent said something that makes no sense here: {error}"))
        })?;
        match event {
            ArchiveEvent::Step { phase, bytes, total } => display.step(&phase, bytes, total),
            ArchiveEvent::Checkpointed(view) => return Ok(Ended::Checkpointed(view)),
            ArchiveEvent::Restored(view) => return Ok(Ended::Restored(view)),
            ArchiveEvent::Refused(body) => return Err(Failure { exit: 3, body }),
            ArchiveEvent::Failed(body) => {
                return Err(Failure { exit: exit_code(&body.code), body });
            }
        }
    }
    Err(Failure::lost(
        "Lost the agent before it was done: look at its log, and at `decamp ls` once it runs again. A \
         workload that was being checkpointed runs on by itself",
    ))
}

/// Whether something runs on as it did is what the exit codes tell apart.
fn exit_code(code: &str) -> u8 {
    if code == RUNS_ON { 4 } else { 1 }
}

/// Where progress is shown.
struct Display {
    bar: Option<ProgressBar>,
    lines: bool,
    phase: String,
}

impl Display {
    fn new(json: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        let bar = (!json && terminal).then(ProgressBar::new_spinner);
        Self { bar, lines: !json && !terminal, phase: String::new() }
    }

    fn step(&mut self, phase: &str, bytes: u64, total: u64) {
        let entered = phase != self.phase;
        phase.clone_into(&mut self.phase);
        if self.lines && entered {
            output::line(format!("  {phase}"));
        }
        let Some(bar) = &self.bar else { return };
        if entered {
            let template = if total == 0 { WAITING } else { BAR };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(phase.to_owned());
        }
        bar.set_length(total);
        bar.set_position(bytes);
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
