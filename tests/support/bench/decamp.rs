//! Our side: the `decamp` command, used as a user would, against the agents of the hosts. What is
//! moved, and what is made of the numbers, is known elsewhere.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{BenchError, Result};
use crate::hosts::{Hosts, done, succeeded};

/// A move as its user saw it.
pub(crate) struct Moved {
    /// When the command was started.
    pub(crate) started: Instant,
    /// From there until it had ended.
    pub(crate) wall: Duration,
    /// What it reported.
    pub(crate) report: Value,
}

/// The command at one host's agent.
pub(crate) struct Decamp {
    binary: PathBuf,
    socket: PathBuf,
}

impl Decamp {
    /// The agent of a host that is up.
    pub(crate) fn at(hosts: &Hosts, host: &str) -> Result<Self> {
        let binary = std::env::var_os("DECAMP_BIN")
            .ok_or_else(|| BenchError::wrong("DECAMP_BIN is not set: start this by tests/bench"))?;
        Ok(Self { binary: binary.into(), socket: hosts.root(host)?.join("run/decamp.sock") })
    }

    /// Runs a verb to its end.
    pub(crate) fn verb(&self, words: &[&str]) -> Result<String> {
        done(&mut self.command(words))
    }

    /// Moves a workload, all by default.
    pub(crate) fn migrate(&self, name: &str, to: &str) -> Result<Moved> {
        let mut command = self.command(&["migrate", name, "--to", to, "--json"]);
        let started = Instant::now();
        let output = command
            .stdin(Stdio::null())
            .output()
            .map_err(BenchError::io(format!("start {}", self.binary.display())))?;
        let wall = started.elapsed();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let report: Option<Value> = serde_json::from_str(&said).ok();
        match (report, output.status.success()) {
            (Some(report), true) => Ok(Moved { started, wall, report }),
            (Some(report), false) => {
                Err(BenchError::wrong(format!("The move of {name} failed: {}", report["reason"])))
            }
            (None, _) => {
                succeeded("decamp migrate", output)?;
                Err(BenchError::wrong(format!("decamp migrate reported what is no JSON: {said}")))
            }
        }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--socket").arg(&self.socket).args(words);
        command
    }
}

impl Moved {
    /// A number of the report; 0 when it has none there.
    pub(crate) fn reported(&self, key: &str) -> f64 {
        self.report[key].as_f64().unwrap_or(0.0)
    }
}
