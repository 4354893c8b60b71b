//! How much of the processors other work had during the moves: what a benchmark on a shared machine
//! must say of itself. Also sees to it that the hosts get their part.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{BenchError, Result};

/// Above this share the numbers tell more of the other work than of what was measured.
const BUSY: f64 = 0.15;
/// Threads that a move keeps busy on both hosts: a group of processes counts as one thread to the
/// scheduler, however many it holds, unless it is given the weight of more.
const THREADS: u32 = 8;

/// A tick as Linux shows it to programs (USER_HZ is 100 wherever this runs).
const TICK_MS: u64 = 10;

/// The processor time of one set of hosts.
pub(crate) struct Processors {
    usage: Usage,
}

enum Usage {
    /// cgroup v1: nanoseconds.
    Account(PathBuf),
    /// cgroup v2: a line `usage_usec N`.
    Stat(PathBuf),
}

/// The processor time at one moment.
pub(crate) struct Mark {
    all: Duration,
    busy: Duration,
    hosts: Duration,
}

/// The shares that other work had during moves.
#[derive(Default)]
pub(crate) struct OtherWork {
    shares: Vec<f64>,
}

impl Processors {
    /// Of the hosts whose cgroups have this name, which are given their weight.
    pub(crate) fn of(name: &str) -> Result<Self> {
        let top = Path::new("/sys/fs/cgroup");
        let account = top.join("cpuacct").join(name).join("cpuacct.usage");
        let stat = top.join(name).join("cpu.stat");
        let (usage, weight, value) = if account.exists() {
            (Usage::Account(account), top.join("cpu").join(name).join("cpu.shares"), 1024 * THREADS)
        } else {
            (Usage::Stat(stat), top.join(name).join("cpu.weight"), 100 * THREADS)
        };
        // Where the controller is not there to be used nothing is grouped either.
        if weight.exists() {
            fs::write(&weight, value.to_string())
                .map_err(BenchError::io(format!("write {}", weight.display())))?;
        }
        Ok(Self { usage })
    }

    /// Now.
    pub(crate) fn mark(&self) -> Result<Mark> {
        let read = |path: &Path| {
            fs::read_to_string(path).map_err(BenchError::io(format!("read {}", path.display())))
        };
        let hosts = match &self.usage {
            Usage::Account(path) => read(path)?.trim().parse().ok().map(Duration::from_nanos),
            Usage::Stat(path) => microseconds(&read(path)?),
        };
        let ticks = parse(&read(Path::new("/proc/stat"))?);
        let time = |ticks: u64| Duration::from_millis(ticks * TICK_MS);
        match (hosts, ticks) {
            (Some(hosts), Some((all, busy))) => {
                Ok(Mark { all: time(all), busy: time(busy), hosts })
            }
            _ => Err(BenchError::wrong("The kernel's account of processor time cannot be read")),
        }
    }
}

impl OtherWork {
    /// Adds the time between two moments.
    pub(crate) fn add(&mut self, from: &Mark, to: &Mark) {
        let all = to.all.saturating_sub(from.all).as_secs_f64().max(1e-3);
        let busy = to.busy.saturating_sub(from.busy);
        let other = busy.saturating_sub(to.hosts.saturating_sub(from.hosts));
        self.shares.push((other.as_secs_f64() / all).min(1.0));
    }

    /// A sentence for a note.
    pub(crate) fn text(&self) -> String {
        if self.shares.is_empty() {
            return "How busy the machine was with other work is not known.".to_owned();
        }
        let mean = self.shares.iter().sum::<f64>() / self.shares.len() as f64;
        let most = self.shares.iter().copied().fold(0.0, f64::max);
        let warning = if mean > BUSY { ": too much for these numbers to be relied on" } else { "" };
        format!(
            "What is on neither host (commands, observers, other work) had {:.0} % of the \
             processors during the moves, {:.0} % at the most{warning}.",
            mean * 100.0,
            most * 100.0
        )
    }
}

fn microseconds(text: &str) -> Option<Duration> {
    let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    line.trim().parse().ok().map(Duration::from_micros)
}

/// Ticks of all processors since the machine started: all of them, and those that were not idle.
/// The first line of /proc/stat (proc(5)): user, nice, system, idle, iowait, irq, softirq, steal,
/// guest, ... Guest time is within user time already.
fn parse(text: &str) -> Option<(u64, u64)> {
    let fields = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
    let fields = fields.map(|field| field.parse().ok()).collect::<Option<Vec<u64>>>()?;
    let all: u64 = fields.iter().sum();
    Some((all, all - fields.get(3)? - fields.get(4)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_line_is_read() {
        let text = "cpu  10 1 5 70 4 1 2 7 3 0\ncpu0 1 2 3\n";
        assert_eq!(parse(text), Some((100, 26)));
        assert_eq!(parse("cpu0 1 2"), None);
        let now = fs::read_to_string("/proc/stat").expect("there");
        assert!(parse(&now).is_some_and(|(all, busy)| all >= busy));
        assert_eq!(microseconds("usage_usec 7\nuser_usec 3\n"), Some(Duration::from_micros(7)));
    }

    #[test]
    fn what_the_hosts_did_not_do_is_other_work() {
        let mark = |all, busy, hosts| {
            let [all, busy, hosts] = [all, busy, hosts].map(Duration::from_millis);
            Mark { all, busy, hosts }
        };
        let mut other = OtherWork::default();
        assert!(other.text().contains("not known"));
        other.add(&mark(0, 0, 0), &mark(1000, 900, 800));
        assert!(other.text().contains("had 10 %") && !other.text().contains("relied on"));
        // A group's account may be ahead of the ticks.
        other.add(&mark(0, 0, 0), &mark(1000, 900, 910));
        assert!(other.text().contains("had 5 %") && other.text().contains("10 % at the most"));
        other.add(&mark(0, 0, 0), &mark(1000, 1000, 0));
        assert!(other.text().contains("relied on"));
    }
}
