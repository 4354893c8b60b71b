//! `decamp migrate`: moves workloads to another host and shows how it goes.

use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use clap::{Args, ValueEnum};
use decamp_shared::session::report::{DowntimeParts, PageCounts, Predicted};
use decamp_shared::session::{Compress, Mode, MoveOptions, Outcome, Progress, Report};
use decamp_shared::workload::Storage;
use hyper::Method;
use serde_json::{Value, json};

use super::aftermath::{self, Aftermath};
use super::client::{Client, Stream};
use super::display::Display;
use super::failure::{Failure, with_reasons};
use super::interrupts::Interrupts;
use super::{output, report, values};
use crate::messages::{MigrationRequest, MigrationView};

/// Move running workloads to another host
///
/// Ctrl-C cancels the move: the workload runs on here, and no other is begun. Losing the terminal does
/// not; the move goes on.
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp migrate web --to edge-2\n         \
    decamp migrate db --to edge-2 --storage /var/lib/db=copy --storage /media=shared\n         \
    decamp migrate box --to THIS-HOST --path /srv/box.img=/fast/box.img   only the disk, within this host\n\n\
    Exit codes: 0 moved; 3 refused, nothing was touched; 4 failed or cancelled, it runs on here;\n\
    5 not known where it runs, `decamp resolve` is needed.")]
pub(crate) struct Migrate {
    /// Names of workloads; moved one after the other
    #[arg(required = true, value_name = "NAME", value_parser = values::workload)]
    names: Vec<String>,
    /// Destination: a host of the agent's configuration, or this very host for disks that move alone (--path)
    #[arg(long, value_name = "HOST[:PORT]", value_parser = values::host)]
    to: String,
    /// How memory travels
    #[arg(long, value_enum, default_value_t = ModeWord::Auto)]
    mode: ModeWord,
    /// Stop the workload only when it is predicted to stand still for less than this. Without it 300ms
    /// are aimed at, and more is taken where a stop costs more before any memory is sent
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    max_downtime: Option<Duration>,
    /// Page connections
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    streams: u32,
    /// How pages are compressed
    #[arg(long, value_enum, default_value_t = CompressWord::Auto)]
    compress: CompressWord,
    /// Give up, workload running on, when it has not come to the stop by then
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = values::time)]
    timeout: Duration,
    /// Put files from below OLD below NEW on the destination. Where --to is this very host: move the disk OLD of a
    /// running VM to the new file NEW; of several all move, or none
    #[arg(long, value_name = "OLD=NEW", value_parser = values::mapping)]
    path: Vec<(PathBuf, PathBuf)>,
    /// What becomes of what is mounted into a container from outside of its bundle: copied, or shared, where
    /// both hosts have the same storage. Of one mount with PATH, in the container or on this host
    #[arg(long, value_name = "[PATH=]copy|shared", value_parser = values::storage)]
    storage: Vec<(Option<PathBuf>, Storage)>,
    /// Remove the files here once the workload runs there
    #[arg(long)]
    remove_source: bool,
    /// Do not ask whether the destination's bridges lead to the network segments that it is on, nor whether they
    /// tell the same VLANs apart
    #[arg(long)]
    no_network_check: bool,
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

/// Told at the first Ctrl-C.
const CANCELLING: &str = "Cancelling; press Ctrl-C again to stop watching";

/// How one of the moves ended.
enum Ended {
    /// With a report.
    Report(Box<Report>),
    /// Before there was one: the agent refused.
    Failed(Failure),
    /// Unseen: the agent was lost, nobody watched to the end, or it was never begun.
    Unseen(Aftermath),
}

impl Migrate {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let mut words = self.storage.iter().filter(|(path, _)| path.is_none());
        if let (Some((_, first)), Some((_, second))) = (words.next(), words.next())
            && first != second
        {
            return Err(Failure::usage("--storage says both copy and shared of everything"));
        }
        let options = self.options();
        let mut interrupts = Interrupts::listen()?;
        let mut ends = Vec::new();
        let mut called_off = false;
        for name in &self.names {
            called_off = called_off || interrupts.any().await;
            let ended = if called_off {
                Ended::Unseen(never_begun(name))
            } else {
                let request = MigrationRequest {
                    workload: name.clone(),
                    to: self.to.clone(),
                    options: options.clone(),
                };
                let mut display = Display::new(json);
                let ended = move_one(client, &request, &mut display, &mut interrupts).await;
                display.clear();
                ended
            };
            called_off = called_off || ended.was_cancelled();
            if !json {
                self.draw(&ended);
            }
            ends.push(ended);
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
            max_downtime_ms: self.max_downtime.map(|time| time.as_millis() as u64),
            streams: self.streams,
            compress: match self.compress {
                CompressWord::Auto => Compress::Auto,
                CompressWord::None => Compress::None,
                CompressWord::Lz4 => Compress::Lz4,
                CompressWord::Zstd => Compress::Zstd,
            },
            timeout_ms: self.timeout.as_millis() as u64,
            paths: self.path.clone(),
            storage: self.storage.iter().find(|(path, _)| path.is_none()).map(|(_, word)| *word),
            storage_of: self
                .storage
                .iter()
                .filter_map(|(path, word)| Some((path.clone()?, *word)))
                .collect(),
            dry_run: self.dry_run,
            remove_source: self.remove_source,
            no_network_check: self.no_network_check,
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
            "dump": null, "restore": null, "fallbacks": [], "compare_ms": 0.0, "total_ms": null, "downtime_ms": null, "downtime": DowntimeParts::default(),
            "rounds": [], "memory_bytes": null, "wire_bytes": 0, "file_bytes": 0,
            "pages": PageCounts::default(), "streams": null, "encrypted": null,
            "predicted": Predicted::default(), "source_stall_ms": 0.0,
        })
    }
}

impl Ended {
    fn exit_code(&self) -> u8 {
        match self {
            Ended::Report(report) => report.exit_code(),
            Ended::Failed(failure) => failure.exit,
            Ended::Unseen(aftermath) => aftermath.exit_code(),
        }
    }

    /// Somebody called the move off, here or by `decamp cancel`.
    fn was_cancelled(&self) -> bool {
        matches!(self, Ended::Report(report) if report.outcome == Outcome::Cancelled)
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

/// What is said of a workload whose turn never came.
fn never_begun(name: &str) -> Aftermath {
    Aftermath {
        outcome: Outcome::Cancelled,
        lost: false,
        text: format!("The move of {name} was called off before it was begun. It runs on here"),
    }
}

/// What is said of a move that the user would not see to its end.
fn left(name: &str) -> Aftermath {
    Aftermath {
        outcome: Outcome::Unresolved,
        lost: false,
        text: format!(
            "Nobody watched the move of {name} to its end; it ends by itself: `decamp ls --all` shows \
             where {name} is then"
        ),
    }
}

async fn move_one(
    client: &Client,
    request: &MigrationRequest,
    display: &mut Display,
    interrupts: &mut Interrupts,
) -> Ended {
    let watched = match begin(client, request, display, interrupts).await {
        Begun::Stream { stream, cancelled } => {
            watch(client, stream, request, display, interrupts, cancelled).await
        }
        Begun::Ended(watched) => watched,
        Begun::Failed(failure) => return Ended::Failed(failure),
    };
    match watched {
        Watched::Report(report) => Ended::Report(report),
        Watched::Left => Ended::Unseen(left(&request.workload)),
        Watched::Lost => {
            display.remark("Lost the agent; waiting for the next one to say how the move ended");
            Ended::Unseen(aftermath::wait(client, request, interrupts).await)
        }
    }
}

/// How asking for the move went.
enum Begun {
    /// It is under way; the user may have cancelled it already.
    Stream { stream: Stream, cancelled: bool },
    /// It may be under way, unwatched.
    Ended(Watched),
    /// It is not under way.
    Failed(Failure),
}

/// Asks for the move. Nothing can be cancelled before the agent has answered, so the first Ctrl-C is
/// kept until then.
async fn begin(
    client: &Client,
    request: &MigrationRequest,
    display: &mut Display,
    interrupts: &mut Interrupts,
) -> Begun {
    let mut asked = pin!(client.stream(Method::POST, "/v1/migrations", Some(request)));
    let mut cancelled = false;
    loop {
        tokio::select! {
            answer = &mut asked => return match answer {
                Ok(stream) => Begun::Stream { stream, cancelled },
                Err(failure) if failure.is_lost() => Begun::Ended(Watched::Lost),
                Err(failure) => Begun::Failed(failure),
            },
            () = interrupts.next() => {
                if cancelled {
                    return Begun::Ended(Watched::Left);
                }
                cancelled = true;
                display.remark(CANCELLING);
            }
        }
    }
}

/// Shows the move until its report comes. The first Ctrl-C cancels it, the second only stops
/// watching; `cancelled` says that the first was before.
async fn watch(
    client: &Client,
    mut stream: Stream,
    request: &MigrationRequest,
    display: &mut Display,
    interrupts: &mut Interrupts,
    mut cancelled: bool,
) -> Watched {
    let mut migration = None;
    if cancelled {
        ask_to_cancel(client, &request.workload);
    }
    loop {
        let line = tokio::select! {
            line = stream.line() => line,
            () = interrupts.next() => {
                if cancelled {
                    return Watched::Left;
                }
                cancelled = true;
                display.remark(CANCELLING);
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
