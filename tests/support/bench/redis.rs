//! The observer of a container: the checking Redis client, run where clients live, on one
//! connection for the whole move. Its own bookkeeping is in `tests/support/redis_client.rs`.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::error::{BenchError, Result};
use crate::hosts::{CLIENT, Reaped, await_that, done};

/// Where Redis is, on the workloads' network.
pub(crate) const ADDRESS: &str = "10.77.1.20";
/// Pairs of a write and a read in a second: four heartbeats in a millisecond would be no use, and a
/// client that asks as fast as it can keeps a processor from what is measured.
pub(crate) const RATE: u32 = 1000;

/// A client at work. Killed when this is dropped.
pub(crate) struct Client {
    commands: ChildStdin,
    lines: BufReader<ChildStdout>,
    // Last: the pipes are closed before it goes.
    process: Reaped,
}

impl Client {
    /// Connects as soon as Redis listens, and fills it with so many MiB of random values. From then on
    /// it works, `rate` times a second, or with 0 as fast as it can.
    pub(crate) fn start(binary: &Path, fill_mib: u32, rate: u32) -> Result<Self> {
        forget_neighbours()?;
        await_listening()?;
        let mut child = Command::new("ip")
            .args(["netns", "exec", CLIENT])
            .arg(binary)
            .arg(format!("{ADDRESS}:6379"))
            .args(["--fill-mib", &fill_mib.to_string(), "--rate", &rate.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(BenchError::io("start the Redis client"))?;
        let (commands, lines) = (child.stdin.take(), child.stdout.take());
        let process = Reaped(child);
        let (Some(commands), Some(lines)) = (commands, lines) else {
            return Err(BenchError::wrong("The Redis client has no pipes"));
        };
        let mut client = Self { commands, lines: BufReader::new(lines), process };
        let ready = client.line()?;
        if ready["ready"] != true {
            return Err(BenchError::wrong(format!(
                "The Redis client could not fill Redis: {}",
                ready["reason"]
            )));
        }
        Ok(client)
    }

    /// The longest time without a reply since this was asked last.
    pub(crate) fn gap(&mut self) -> Result<Duration> {
        Ok(self.report()?.1)
    }

    /// How many operations there were since this was asked last, and the longest time without one.
    pub(crate) fn report(&mut self) -> Result<(u64, Duration)> {
        self.command("report")?;
        let report = self.line()?;
        let ops = report["ops"].as_u64().filter(|_| report["errors"] == 0);
        ops.zip(report["longest_gap_ms"].as_f64())
            .map(|(ops, ms)| (ops, Duration::from_secs_f64(ms / 1000.0)))
            .ok_or_else(|| BenchError::wrong(format!("The Redis client met errors: {report}")))
    }

    /// Has every key verified; an error unless all of them are as they should be.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.command("stop")?;
        let verdict = self.line()?;
        let status = self.process.0.wait().map_err(BenchError::io("wait for the Redis client"))?;
        if verdict["ok"] != true || !status.success() {
            return Err(BenchError::wrong(format!(
                "Redis is not what it was before the move: {}",
                verdict["reason"]
            )));
        }
        Ok(())
    }

    fn command(&mut self, word: &str) -> Result<()> {
        writeln!(self.commands, "{word}").map_err(BenchError::io("speak to the Redis client"))
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line).map_err(BenchError::io("hear from the Redis client"))?;
        serde_json::from_str(&line).map_err(|_| {
            BenchError::wrong(format!("The Redis client said what is no JSON: {line:?}"))
        })
    }
}

/// The containers of a benchmark share an address, and not the hardware address behind it.
pub(crate) fn forget_neighbours() -> Result<()> {
    done(Command::new("ip").args(["-n", CLIENT, "neigh", "flush", "all"]))?;
    Ok(())
}

fn await_listening() -> Result<()> {
    let attempt = format!("exec 3<>/dev/tcp/{ADDRESS}/6379");
    await_that("Redis to listen", Duration::from_secs(20), || {
        let status = Command::new("ip")
            .args(["netns", "exec", CLIENT, "timeout", "1", "bash", "-c", &attempt])
            .stderr(Stdio::null())
            .status()
            .map_err(BenchError::io("look for Redis"))?;
        Ok(status.success().then_some(()))
    })
}
