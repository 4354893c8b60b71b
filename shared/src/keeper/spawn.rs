//! Starting a keeper, and what a keeper says while it starts.
//!
//! The keeper's standard output is the channel: one line, `ready` or `failed TEXT`, then nothing.
//! Its standard error is the keeper's log.

use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::KeeperConfig;
use crate::workload::{Result, WorkloadError};

/// A keeper that says nothing for so long is ended.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Tells a keeper how many files may be open by default in what it starts.
const OPEN_FILES: &str = "DECAMP_OPEN_FILES";

/// How many files this process was allowed to open when it began.
static GIVEN: OnceLock<u64> = OnceLock::new();

/// Agent side: allows this process as many open files as it may allow itself. Keepers that it starts
/// begin with what it had before: workloads inherit that.
pub fn allow_many_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(given, most)| {
        GIVEN.get_or_init(|| given);
        setrlimit(Resource::RLIMIT_NOFILE, most, most)
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "Cannot allow more open files");
    }
}

/// Keeper side: what the agent had before that.
fn as_given() {
    let given = std::env::var(OPEN_FILES).ok().and_then(|text| text.parse().ok());
    let (Some(given), Ok((_, most))) = (given, getrlimit(Resource::RLIMIT_NOFILE)) else { return };
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, most.min(given), most) {
        tracing::warn!(%error, "Cannot allow as many open files as by default");
    }
}

/// Starts a keeper and returns when it is ready: the workload runs, or its empty shell is built.
/// The keeper is no part of the agent's process group and outlives it.
///
/// # Errors
/// What the keeper says of its failure, or that it said nothing within a minute.
pub fn spawn(config: &KeeperConfig) -> Result<()> {
    let name = &config.place.name;
    let path = config.place.keeper_config();
    let prepare = || -> io::Result<Child> {
        std::fs::create_dir_all(&config.place.dir)?;
        let _ = std::fs::remove_file(config.place.exit_record());
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        file.write_all(&serde_json::to_vec_pretty(config)?)?;
        let log = OpenOptions::new().append(true).create(true).open(config.place.keeper_log())?;
        Command::new(&config.tools.decamp)
            .envs(GIVEN.get().map(|given| (OPEN_FILES, given.to_string())))
            .arg("keeper")
            .arg("--config")
            .arg(&path)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
    };
    let mut child = prepare()
        .map_err(|error| WorkloadError::new(format!("Cannot start the keeper of {name}"), error))?;
    let said = first_line(&mut child);
    match said {
        Some(line) if line.trim_end() == "ready" => {
            // Reaped whenever it ends; the keeper itself answers to nobody here.
            thread::spawn(move || child.wait());
            Ok(())
        }
        other => {
            let _ = child.kill();
            let _ = child.wait();
            let text = match other.as_deref().map(|line| line.trim_end()) {
                Some(line) if line.starts_with("failed ") => line["failed ".len()..].to_owned(),
                _ => format!(
                    "The keeper of {name} said nothing sensible while it started; see {}",
                    config.place.keeper_log().display()
                ),
            };
            Err(WorkloadError::plain(text))
        }
    }
}

/// Keeper side: leaves the agent's session, so that neither its terminal nor its end reach us, and takes
/// back what the agent allowed itself.
pub fn detach() {
    as_given();
    // Fails only for a process group leader, which then has left already.
    let _ = nix::unistd::setsid();
}

/// Keeper side: the workload runs, or the shell is built, and the socket listens.
pub(super) fn report_ready() -> io::Result<()> {
    say("ready")
}

/// Keeper side: tells the agent why the keeper does not start.
pub fn report_failure(error: &dyn std::error::Error) {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    // Whether or not somebody still listens, there is nothing more to do.
    let _ = say(&format!("failed {}", text.replace('\n', " ")));
}

fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    // Whoever has no such file any more was started with it as standard input.
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = null.map(OwnedFd::from).or_else(|_| io::stdin().as_fd().try_clone_to_owned())?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}

fn first_line(child: &mut Child) -> Option<String> {
    let out = child.stdout.take()?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(out.take(64 << 10)).read_line(&mut line);
        // The receiver may have given up.
        let _ = sender.send(read.ok().map(|_| line));
    });
    receiver.recv_timeout(READY_WITHIN).ok().flatten()
}
