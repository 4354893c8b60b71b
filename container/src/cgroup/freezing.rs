//! Freezing and thawing all tasks of a container, in either hierarchy.

use std::time::{Duration, Instant};

use super::{Cgroups, read, unless_gone, write};
use crate::error::{ContainerError, Result};

/// Freezing takes microseconds; a task that does not stop for so long is stuck in the kernel.
const FREEZE_WITHIN: Duration = Duration::from_secs(5);

impl Cgroups {
    /// Stops every task, and returns when all of them stand still. On an error all of them run.
    pub(crate) fn freeze(&self) -> Result<()> {
        self.stop_all().inspect_err(|_| {
            if let Err(error) = self.thaw() {
                tracing::error!(%error, "Cannot thaw what could not be frozen");
            }
        })
    }

    fn stop_all(&self) -> Result<()> {
        let directory = self.freezer()?;
        let begun = Instant::now();
        let mut again = Instant::now();
        self.write_freezer(true)?;
        while !self.is_frozen()? {
            if begun.elapsed() > FREEZE_WITHIN {
                return Err(ContainerError::State(format!(
                    "The tasks in {} did not stop within {} s",
                    directory.display(),
                    FREEZE_WITHIN.as_secs()
                )));
            }
            if again.elapsed() > Duration::from_millis(20) {
                // A task that forked at the wrong moment is caught by asking v1 once more.
                again = Instant::now();
                self.write_freezer(true)?;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// Marks the directory as frozen without waiting: tasks that are traced just now stop as soon
    /// as their tracer lets them go.
    pub(crate) fn freeze_when_free(&self) -> Result<()> {
        self.write_freezer(true)
    }

    /// Lets every task run. Where the cgroup is gone, with all its tasks, there is nothing to do.
    pub(crate) fn thaw(&self) -> Result<()> {
        unless_gone(self.write_freezer(false))
    }

    /// Whether every task stands still.
    pub(crate) fn is_frozen(&self) -> Result<bool> {
        let directory = self.freezer()?;
        if self.is_v2() {
            let events = read(&directory.join("cgroup.events"))?;
            Ok(events.lines().any(|line| line == "frozen 1"))
        } else {
            Ok(read(&directory.join("freezer.state"))?.trim() == "FROZEN")
        }
    }

    /// Whether somebody has it stand still, or is about to.
    pub(crate) fn is_suspended(&self) -> Result<bool> {
        let directory = self.freezer()?;
        if self.is_v2() {
            return Ok(read(&directory.join("cgroup.freeze"))?.trim() == "1");
        }
        Ok(read(&directory.join("freezer.state"))?.trim() != "THAWED")
    }

    fn write_freezer(&self, frozen: bool) -> Result<()> {
        let directory = self.freezer()?;
        let (file, value) = match (self.is_v2(), frozen) {
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
        };
        write(&directory.join(file), value)
    }

    /// Writes to whatever freezes in the directories: a state of v1, a switch of v2.
    pub(super) fn write_freezers(&self, state: &str, switch: &str) -> Result<()> {
        for directory in self.paths.values() {
            for (file, value) in [("freezer.state", state), ("cgroup.freeze", switch)] {
                let path = directory.join(file);
                if path.exists() {
                    unless_gone(write(&path, value))?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::in_one;
    use super::*;

    #[test]
    fn what_cannot_be_frozen_runs_again() {
        // A cgroup without the file that says whether all stand still.
        let directory = tempfile::tempdir().expect("a directory");
        let cgroups = in_one("", directory.path());
        cgroups.freeze().expect_err("nothing says whether it is frozen");
        assert_eq!(read(&directory.path().join("cgroup.freeze")).expect("readable"), "0");
    }
}
