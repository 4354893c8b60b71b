//! The benchmarks: what moving costs, beside what others take for the same. `tests/bench` builds
//! this, starts it and cleans up after it; here are the arguments, the list of scenarios and the
//! drawing of the result.
//!
//! Not made to be started alone: it wants the environment that `tests/bench` gives it. It is an
//! example to cargo, so that testing all targets builds it and does not run it.

#![deny(unsafe_code)]

mod apps;
mod beat;
mod container;
mod decamp;
mod error;
mod growth;
mod hosts;
mod load;
mod memory;
mod peak;
mod podman;
mod qemu;
mod qmp;
mod redis;
mod redis_move;
mod row;
mod runc;
mod shell;
mod tracking;
mod vm;
mod warm;

use std::cell::RefCell;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;

use error::{BenchError, Result};
use row::{Row, Spread};

const USAGE: &str = "\
Usage: tests/bench [SCENARIO...] [--list] [--json] [--pairs N] [--app NAME] [--reports FILE]

Without a scenario: all of them.

  --list           the scenarios
  --json           the last line of output is one array of rows
  --pairs N        pairs that count, after one that does not (default 5)
  --app NAME       of container-apps this application alone
  --reports FILE   our own report of every move, a JSON object a line

Example: tests/bench vm --json";

/// A scenario: its name, what it is, how it is run.
type Scenario = (&'static str, &'static str, fn(&Bench) -> Result<Vec<Row>>);

const SCENARIOS: [Scenario; 10] = [
    ("vm", "a virtual machine with 1 GiB filled and 32 MiB hot, beside QEMU", vm::run),
    (
        "vm-sparse",
        "a virtual machine with 16 GiB of which it uses 1, beside itself with 2 GiB",
        vm::run_sparse,
    ),
    (
        "container",
        "Redis with 256 MiB, beside runc checkpoint + tar + runc restore",
        container::run,
    ),
    (
        "container-local",
        "Redis with 1 GiB between two hosts, beside runc checkpoint + restore on one",
        container::run_local,
    ),
    (
        "container-tree",
        "Redis with 200 children of 2 MiB, beside runc checkpoint + restore on one host",
        container::run_tree,
    ),
    (
        "container-podman",
        "Redis with 1 GiB run by podman, beside podman container checkpoint -e + restore -i",
        podman::run,
    ),
    ("container-growth", "Redis with 256 MiB, 1 GiB and 4 GiB, beside each other", growth::run),
    (
        "container-shared",
        "Redis with 64 MiB, 256 MiB and 1 GiB that processes share, beside each other",
        growth::run_shared,
    ),
    (
        "container-tracking",
        "how fast Redis with 256 MiB answers while it is copied, beside itself before",
        tracking::run,
    ),
    (
        "container-apps",
        "PostgreSQL, nginx, memcached, Python and Node.js there and back under load",
        apps::run,
    ),
];

/// What all scenarios need.
pub(crate) struct Bench {
    /// Pairs that count.
    pub(crate) pairs: usize,
    /// The application that `container-apps` is about, if not all.
    pub(crate) app: Option<&'static apps::App>,
    /// The checkout.
    pub(crate) root: PathBuf,
    /// The guest, the Redis client, and room for more.
    pub(crate) work: PathBuf,
    reports: RefCell<Option<fs::File>>,
}

/// What the command line asks for.
struct Options {
    scenarios: Vec<Scenario>,
    list: bool,
    json: bool,
    pairs: usize,
    app: Option<&'static apps::App>,
    reports: Option<PathBuf>,
}

impl Bench {
    /// The test guest's image.
    pub(crate) fn guest(&self) -> PathBuf {
        self.work.join("guest.elf")
    }

    /// The Redis client.
    pub(crate) fn redis_client(&self) -> PathBuf {
        self.work.join("redis-client")
    }

    /// The program that makes a tree of processes.
    pub(crate) fn process_tree(&self) -> PathBuf {
        self.work.join("process-tree")
    }

    /// Adds one of our reports to the file of them, if one is wanted.
    pub(crate) fn keep_report(&self, scenario: &str, report: &Value) {
        use std::io::Write;
        let line = serde_json::json!({"scenario": scenario, "report": report});
        if let Some(file) = self.reports.borrow_mut().as_mut()
            && let Err(error) = writeln!(file, "{line}")
        {
            eprintln!("bench: cannot keep a report: {error}");
        }
    }
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(reason) => {
            eprintln!("{reason}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if options.list {
        SCENARIOS.iter().for_each(|(name, what, _)| println!("{name:<20}{what}"));
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(rows) if options.json => println!("{}", row::array(&rows)),
        Ok(rows) => println!("{}", row::table(&rows)),
        Err(error) => {
            tell(format_args!("{}", chain(&error)));
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// All rows, or the first failure: a benchmark that failed has no numbers.
fn run(options: &Options) -> Result<Vec<Row>> {
    let variable = |name: &str| {
        let value = std::env::var_os(name).map(PathBuf::from);
        value.ok_or_else(|| {
            BenchError::wrong(format!("{name} is not set: start this by tests/bench"))
        })
    };
    let create = |path: &PathBuf| {
        fs::File::create(path).map_err(BenchError::io(format!("write {}", path.display())))
    };
    let bench = Bench {
        pairs: options.pairs,
        app: options.app,
        root: variable("DECAMP_BENCH_ROOT")?,
        work: variable("DECAMP_BENCH_WORK")?,
        reports: RefCell::new(options.reports.as_ref().map(create).transpose()?),
    };
    warm::memory();
    let mut rows = Vec::new();
    for (_, _, run) in &options.scenarios {
        rows.extend(run(&bench)?);
    }
    Ok(rows)
}

impl Options {
    /// Reads the command line; nothing if help is asked for.
    fn parse(mut words: impl Iterator<Item = String>) -> std::result::Result<Option<Self>, String> {
        let (scenarios, list, json) = (Vec::new(), false, false);
        let mut options = Self { scenarios, list, json, pairs: 5, app: None, reports: None };
        while let Some(word) = words.next() {
            match word.as_str() {
                "-h" | "--help" => return Ok(None),
                "--list" => options.list = true,
                "--json" => options.json = true,
                "--pairs" => {
                    let number = words.next().and_then(|word| word.parse().ok());
                    options.pairs = number
                        .filter(|&number| number > 0)
                        .ok_or("--pairs needs a number above 0")?;
                }
                "--app" => {
                    let name = words.next().ok_or("--app needs an application's name")?;
                    let known = apps::ALL.iter().find(|app| app.name == name);
                    options.app = Some(known.ok_or_else(|| {
                        format!("There is no application {name}: {}", apps::names())
                    })?);
                }
                "--reports" => {
                    options.reports = Some(words.next().ok_or("--reports needs a file")?.into())
                }
                name => {
                    let known = SCENARIOS.iter().find(|scenario| scenario.0 == name);
                    let known = known
                        .ok_or_else(|| format!("{name} is neither a scenario nor an option"))?;
                    options.scenarios.push(*known);
                }
            }
        }
        if options.scenarios.is_empty() {
            options.scenarios.extend(SCENARIOS);
        }
        Ok(Some(options))
    }
}

/// Says how it goes, on standard error.
pub(crate) fn tell(what: fmt::Arguments<'_>) {
    eprintln!("bench: {what}");
}

/// In milliseconds.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The median; 0 of nothing.
pub(crate) fn median_of(values: impl IntoIterator<Item = f64>) -> f64 {
    Spread::of(values).map_or(0.0, |spread| spread.median)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &[&str]) -> std::result::Result<Option<Options>, String> {
        Options::parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn without_a_scenario_all_are_run() {
        let all = options(&["--json"]).expect("right").expect("options");
        assert_eq!((all.scenarios.len(), all.pairs, all.json), (SCENARIOS.len(), 5, true));
        let one = options(&["container", "--pairs", "2"]).expect("right").expect("options");
        assert_eq!((one.scenarios[0].0, one.scenarios.len(), one.pairs), ("container", 1, 2));
    }

    #[test]
    fn bad_usage_is_refused() {
        let wrong = [&["vms"][..], &["--pairs"], &["--pairs", "0"], &["--reports"], &["--what"]];
        for words in wrong.into_iter().chain([&["--app"][..], &["--app", "emacs"]]) {
            assert!(options(words).is_err(), "{words:?}");
        }
    }
}
