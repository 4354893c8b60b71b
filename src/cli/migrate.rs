//! `decamp migrate`: moves workloads to another host and shows how it goes.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use decamp_shared::session::report::{DowntimeParts, PageCounts, Predicted};
use decamp_shared::session::{Compress, Mode, MoveOptions, Outcome, Progress, Report};
use hyper::Method;
use serde_json::{Value, json};

use super::aftermath::{self, Aftermath};
use super::client::{Client, Stream};
use super::display::Display;
use super::failure::{Failure, with_reasons};
use super::{output, report, values};
use crate::messages::{MigrationRequest, MigrationView};

/// Move running workloads to another host
///
/// Ctrl-C cancels the move: the workload runs on here. Losing the terminal does not; the move goes on.
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp migrate web --to edge-2\n\n\
    Exit codes: 0 moved; 3 refused, nothing was touched; 4 failed or cancelled, it runs on here;\n\
    5 not known where it runs, `decamp resolve` is needed.")]
pub(crate) struct Migrate {
    /// Names of workloads; moved one after the other
    #[arg(required = true, value_name = "NAME", value_parser = values::workload)]
    names: Vec<String>,
    /// Destination: a host of the agent's configuration
    #[arg(long, value_name = "HOST[:PORT]", value_parser = values::host)]
    to: String,
    /// How memory travels
    #[arg(long, value_enum, default_value_t = ModeWord::Auto)]
    mode: ModeWord,
    /// Stop the workload only when it is predicted to stand still for less than this
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = values::time)]
    max_downtime: Duration,
    /// Page connections
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    streams: u32,
    /// How pages are compressed
    #[arg(long, value_enum, default_value_t = CompressWord::Auto)]
    compress: CompressWord,
    /// Give up, workload running on, when it has not come to the stop by then
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = values::time)]
    timeout: Duration,
    /// Put files from below OLD below NEW on the destination
    #[arg(long, value_name = "OLD=NEW", value_parser = values::mapping)]
    path: Vec<(PathBuf, PathBuf)>,
    /// Remove the files here once the workload runs there
    #[arg(long)]
    remove_source: bool,
    /// Check everything, touch nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModeWord {
    /// Rounds while it runs where that is possible, else stop-and-copy
    Auto,
    /// Rounds while it runs
    PreCopy,
    /// Everything while it stands still
    StopAndCopy,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum CompressWord {
    /// By measurement
    Auto,
    /// Never
    None,
    /// LZ4 wherever it gains
    Lz4,
    /// zstd wherever it gains
    Zstd,
}

/// How one of the moves ended.
enum Ended {
    /// With a report.
    Report(Box<Report>),
    /// Before there was one: the agent refused.
    Failed(Failure),
    /// Unseen: the agent was lost.
    Unseen(Aftermath),
}

impl Migrate {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let options = self.options();
        let mut ends = Vec::new();
        for name in &self.names {
            let request = MigrationRequest {
                workload: name.clone(),
                to: self.to.clone(),
                options: options.clone(),
            };
            let mut display = Display::new(json);
            let ended = move_one(client, &request, &mut display).await;
            display.clear();
            let called_off =
                matches!(&ended, Ended::Report(report) if report.outcome == Outcome::Cancelled);
            if !json {
                self.draw(&ended);
            }
            ends.push(ended);
            if called_off {
                break;
            }
        }
        if json {
            self.print_json(&ends);
        }
        Ok(ends.iter().map(Ended::exit_code).max_by_key(|&code| gravity(code)).unwrap_or(1))
    }

    fn options(&self) -> MoveOptions {
        MoveOptions {
            mode: match self.mode {
                ModeWord::Auto => Mode::Auto,
                ModeWord::PreCopy => Mode::PreCopy,
                ModeWord::StopAndCopy => Mode::StopAndCopy,
            },
            max_downtime_ms: self.max_downtime.as_millis() as u64,
            streams: self.streams,
            compress: match self.compress {
                CompressWord::Auto => Compress::Auto,
                CompressWord::None => Compress::None,
                CompressWord::Lz4 => Compress::Lz4,
                CompressWord::Zstd => Compress::Zstd,
            },
            timeout_ms: self.timeout.as_millis() as u64,
            paths: self.path.clone(),
            dry_run: self.dry_run,
            remove_source: self.remove_source,
        }
    }

    fn draw(&self, ended: &Ended) {
        match ended {
            Ended::Report(end) => output::line(report::text(end, self.dry_run)),
            Ended::Failed(failure) => failure.tell(false),
            Ended::Unseen(aftermath) => output::line(&aftermath.text),
        }
    }

    /// One object, or an array when several workloads were named.
    fn print_json(&self, ends: &[Ended]) {
        let mut reports: Vec<Value> =
            self.names.iter().zip(ends).map(|(name, end)| self.as_json(name, end)).collect();
        match (self.names.len(), reports.pop()) {
            (1, Some(only)) => output::json(&only),
            (_, last) => {
                reports.extend(last);
                output::json(&reports);
            }
        }
        for failure in ends.iter().filter_map(Ended::failure) {
            failure.tell(false);
        }
    }

    fn as_json(&self, name: &str, end: &Ended) -> Value {
        match end {
            Ended::Report(report) => json!(report),
            Ended::Failed(failure) => {
                let outcome = if failure.exit == 3 { Outcome::Refused } else { Outcome::Failed };
                let reason = with_reasons(&failure.body.message, &failure.body.refusals);
                let mut object = self.bare_json(name, outcome, &reason);
                object["refusals"] = json!(failure.body.refusals);
                object["code"] = json!(failure.body.code);
                object
            }
            Ended::Unseen(aftermath) => self.bare_json(name, aftermath.outcome, &aftermath.text),
        }
    }

    /// An object with every key of a report, for a move that left none.
    fn bare_json(&self, name: &str, outcome: Outcome, reason: &str) -> Value {
        json!({
            "migration": null, "workload": name, "kind": null, "from": null, "to": self.to,
            "outcome": outcome, "reason": reason, "mode": null, "tracker": null,
            "total_ms": null, "downtime_ms": null, "downtime": DowntimeParts::default(),
            "rounds": [], "memory_bytes": null, "wire_bytes": 0, "file_bytes": 0,
            "pages": PageCounts::default(), "streams": null, "encrypted": null,
            "predicted": Predicted::default(), "source_stall_ms": 0.0,
        })
    }
}

impl Ended {
    fn exit_code(&self) -> u8 {
        match self {
            Ended::Report(report) => report.outcome.exit_code(),
            Ended::Failed(failure) => failure.exit,
            Ended::Unseen(aftermath) => aftermath.outcome.exit_code(),
        }
    }

    fn failure(&self) -> Option<&Failure> {
        match self {
            Ended::Report(_) | Ended::Unseen(_) => None,
            Ended::Failed(failure) => Some(failure),
        }
    }
}

/// Of several ends the gravest is the exit code: not known, lost, failed, refused, done.
fn gravity(code: u8) -> u8 {
    [0, 2, 3, 4, 1, 5].iter().position(|&one| one == code).unwrap_or(4) as u8
}

async fn move_one(client: &Client, request: &MigrationRequest, display: &mut Display) -> Ended {
    let stream = match client.stream(Method::POST, "/v1/migrations", Some(request)).await {
        Ok(stream) => stream,
        Err(failure) => return Ended::Failed(failure),
    };
    match watch(client, stream, request, display).await {
        Watched::Report(report) => Ended::Report(report),
        Watched::Left => Ended::Failed(Failure::other(
            "Stopped watching; the move ends by itself: see `decamp ls --all`",
        )),
        Watched::Lost => {
            display.remark("Lost the agent; waiting for the next one to say how the move ended");
            Ended::Unseen(aftermath::wait(client, request).await)
        }
    }
}

/// Shows the move until its report comes. The first Ctrl-C cancels it, the second only stops
/// watching.
async fn watch(
    client: &Client,
    mut stream: Stream,
    request: &MigrationRequest,
    display: &mut Display,
) -> Watched {
    let mut migration = None;
    let mut cancelled = false;
    loop {
        let line = tokio::select! {
            line = stream.line() => line,
            pressed = tokio::signal::ctrl_c() => {
                if pressed.is_err() || cancelled {
                    return Watched::Left;
                }
                cancelled = true;
                display.remark("Cancelling; press Ctrl-C again to stop watching");
                ask_to_cancel(client, migration.as_deref().unwrap_or(&request.workload));
                continue;
            }
        };
        let Ok(Some(line)) = line else { return Watched::Lost };
        match serde_json::from_slice::<Progress>(&line) {
            Ok(Progress::Report { report }) => return Watched::Report(report),
            Ok(event) => {
                if let Progress::Started { migration: id, .. } = &event {
                    migration = Some(id.clone());
                }
                display.show(&event);
            }
            // A newer agent may tell more than this build knows.
            Err(error) => tracing::debug!(%error, "Skipped a line of progress"),
        }
    }
}

/// How watching ended.
enum Watched {
    /// The move ended.
    Report(Box<Report>),
    /// The user would not watch any longer.
    Left,
    /// The agent ended first.
    Lost,
}

/// Asks on a connection of its own; the answer comes with the report.
fn ask_to_cancel(client: &Client, migration: &str) {
    let client = client.clone();
    let path = format!("/v1/migrations/{migration}/cancel");
    tokio::spawn(async move {
        if let Err(failure) = client.post::<MigrationView>(&path, &()).await {
            eprintln!("decamp: {}", failure.text());
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gravest_end_is_the_exit_code() {
        let gravest = |codes: &[u8]| codes.iter().copied().max_by_key(|&code| gravity(code));
        assert_eq!(gravest(&[0, 0]), Some(0));
        assert_eq!(gravest(&[0, 3]), Some(3));
        assert_eq!(gravest(&[4, 3, 0]), Some(4));
        assert_eq!(gravest(&[4, 1]), Some(1));
        assert_eq!(gravest(&[5, 1, 4, 0]), Some(5));
    }
}
