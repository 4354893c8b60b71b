//! A client of QEMU's monitor protocol, as much of it as a benchmark needs: commands, their
//! answers, and one event to wait for.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::error::{BenchError, Result};
use crate::hosts::await_that;

/// How long QEMU may take to answer, and a migration to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// One connection to a monitor.
pub(crate) struct Qmp {
    name: &'static str,
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects as soon as the socket is there.
    pub(crate) fn connect(name: &'static str, socket: &Path) -> Result<Self> {
        let what = format!("the monitor of QEMU {name}");
        let stream =
            await_that(&what, Duration::from_secs(20), || Ok(UnixStream::connect(socket).ok()))?;
        let failed = || BenchError::io(format!("speak to {what}"));
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed())?;
        let lines = BufReader::new(stream.try_clone().map_err(failed())?);
        let mut qmp = Self { name, stream, lines };
        qmp.line()?;
        qmp.ask("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Gives a command and waits for its answer.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.stream
            .write_all(format!("{request}\n").as_bytes())
            .map_err(BenchError::io(format!("give QEMU {} the command {command}", self.name)))?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                return Err(BenchError::wrong(format!(
                    "QEMU {} refused {command}: {}",
                    self.name, error["desc"]
                )));
            }
            if let Some(answer) = answer.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    /// Waits until the migration has completed, by QEMU's own event.
    pub(crate) fn await_completed(&mut self) -> Result<()> {
        loop {
            let event = self.line()?;
            if event["event"] != "MIGRATION" {
                continue;
            }
            match event["data"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some(bad @ ("failed" | "cancelled")) => {
                    let status = self.ask("query-migrate", json!({}))?;
                    return Err(BenchError::wrong(format!(
                        "The migration of QEMU {} {bad}: {}",
                        self.name, status["error-desc"]
                    )));
                }
                _ => {}
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let count = self
            .lines
            .read_line(&mut line)
            .map_err(BenchError::io(format!("hear from the monitor of QEMU {}", self.name)))?;
        if count == 0 {
            return Err(BenchError::wrong(format!("QEMU {} has ended", self.name)));
        }
        serde_json::from_str(&line).map_err(|_| {
            BenchError::wrong(format!("QEMU {} said what is no JSON: {line}", self.name))
        })
    }
}
