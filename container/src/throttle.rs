//! Taking processor time from a container that writes faster than its pages can be sent, and giving it
//! back: the quota of its cgroup.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};

/// A quota's period where none is set, in microseconds; the kernel's own default.
const PERIOD: u64 = 100_000;
/// The kernel refuses a smaller quota, in microseconds.
const LEAST: u64 = 1_000;

/// A container with less processor time than it had. When this is dropped it has it again.
pub(crate) struct Throttle {
    path: PathBuf,
    before: String,
}

impl Throttle {
    /// Takes `percent` of the processor time that the container may use from it.
    pub(crate) fn begin(cgroups: &Cgroups, percent: u8) -> Result<Self> {
        let v1 = cgroups.controller("cpu");
        let (path, period) = match (v1, cgroups.controller("")) {
            (Some(directory), _) => {
                let period = read(&directory.join("cpu.cfs_period_us"))?;
                let period = number(&period);
                (directory.join("cpu.cfs_quota_us"), period)
            }
            (None, Some(directory)) => {
                let path = directory.join("cpu.max");
                let period = read(&path)?.split(' ').nth(1).and_then(number);
                (path, period)
            }
            (None, None) => {
                return Err(ContainerError::State(
                    "The container has no cgroup whose processor time could be limited".to_owned(),
                ));
            }
        };
        let period = period.unwrap_or(PERIOD);
        let before = read(&path)?;
        let processors = available_parallelism().map_or(1, |count| count.get() as u64);
        // "max", or -1 on v1, is no limit at all.
        let whole = before.split(' ').next().and_then(number).unwrap_or(period * processors);
        let quota = (whole * u64::from(100 - percent.min(99)) / 100).max(LEAST);
        let text = if v1.is_some() { quota.to_string() } else { format!("{quota} {period}") };
        write(&path, &text)?;
        Ok(Self { path, before })
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // A directory that is gone has taken the quota with it.
        if self.path.exists()
            && let Err(error) = write(&self.path, &self.before)
        {
            tracing::error!(%error, "The container keeps less processor time than it had");
        }
    }
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

fn read(path: &Path) -> Result<String> {
    let text =
        fs::read_to_string(path).map_err(ContainerError::io(format!("read {}", path.display())))?;
    Ok(text.trim().to_owned())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(ContainerError::io(format!("write {text} to {}", path.display())))
}
