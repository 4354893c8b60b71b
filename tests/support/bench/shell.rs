//! A shell that stands ready in a host, so that a step of a peer costs what its programs cost and
//! not what entering the host does.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Stdio};

use crate::error::{BenchError, Result};
use crate::hosts::{Hosts, Reaped};

/// What ends the output of one script; the exit code follows.
const MARK: &str = "\u{1}bench-done ";

/// One bash in one host.
pub(crate) struct Shell {
    host: &'static str,
    script: String,
    keyboard: ChildStdin,
    lines: BufReader<ChildStdout>,
    // Last: the pipes are closed before it goes.
    _process: Reaped,
}

impl Shell {
    /// Starts it.
    pub(crate) fn start(hosts: &Hosts, host: &'static str) -> Result<Self> {
        let mut child = hosts
            .command(host, "bash")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(BenchError::io(format!("start a shell on {host}")))?;
        let (keyboard, lines) = (child.stdin.take(), child.stdout.take());
        let process = Reaped(child);
        let (Some(keyboard), Some(lines)) = (keyboard, lines) else {
            return Err(BenchError::wrong(format!("The shell on {host} has no pipes")));
        };
        let lines = BufReader::new(lines);
        let mut shell = Self { host, script: String::new(), keyboard, lines, _process: process };
        shell.run("true")?;
        Ok(shell)
    }

    /// Runs a script to its end and gives what it printed. Any command that fails ends it.
    pub(crate) fn run(&mut self, script: &str) -> Result<String> {
        self.begin(script)?;
        self.end()
    }

    /// Starts a script.
    pub(crate) fn begin(&mut self, script: &str) -> Result<()> {
        self.script = script.to_owned();
        let text =
            format!("( set -e -o pipefail\n{script}\n) 2>&1; printf '\\001bench-done %s\\n' $?\n");
        self.keyboard
            .write_all(text.as_bytes())
            .map_err(BenchError::io(format!("speak to the shell on {}", self.host)))
    }

    /// Waits for the end of what was started, and gives what it printed.
    pub(crate) fn end(&mut self) -> Result<String> {
        let mut said = String::new();
        loop {
            let mut line = String::new();
            let count = self
                .lines
                .read_line(&mut line)
                .map_err(BenchError::io(format!("hear from the shell on {}", self.host)))?;
            if count == 0 {
                return Err(BenchError::wrong(format!("The shell on {} has ended", self.host)));
            }
            let Some((before, code)) = line.split_once(MARK) else {
                said.push_str(&line);
                continue;
            };
            said.push_str(before);
            return match code.trim() {
                "0" => Ok(said),
                code => Err(BenchError::Command {
                    command: format!("{}: {}", self.host, self.script.trim()),
                    status: code.to_owned(),
                    said: said.trim().to_owned(),
                }),
            };
        }
    }
}
