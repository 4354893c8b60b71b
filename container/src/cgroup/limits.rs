//! Limits of a container: those that go along with it, and what they leave it of memory.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Cgroups;
use crate::error::{ContainerError, Result};

/// Files whose values travel, by v1 controller ("" is v2). What follows from the host alone (device
/// filters, processor sets) is made by the destination's own runtime.
const SETTINGS: [(&str, &[&str]); 4] = [
    ("memory", &["memory.limit_in_bytes", "memory.soft_limit_in_bytes"]),
    ("cpu", &["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us"]),
    ("pids", &["pids.max"]),
    ("", &["memory.max", "memory.high", "memory.low", "cpu.max", "cpu.weight", "pids.max"]),
];
/// A value of a setting is never longer.
const VALUE_CAP: usize = 128;

/// One limit, as it stands in a file of a controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Setting {
    /// v1 controller, or nothing on v2.
    controller: String,
    /// Name of the file.
    file: String,
    /// Its content without the newline.
    value: String,
}

impl Setting {
    /// Whether it limits how many tasks there are.
    pub(crate) fn limits_tasks(&self) -> bool {
        self.file == "pids.max"
    }

    /// The same, of no effect.
    pub(crate) fn lifted(&self) -> Self {
        Self { value: "max".to_owned(), ..self.clone() }
    }
}

impl Cgroups {
    /// Limits as they are now.
    pub(crate) fn settings(&self) -> Vec<Setting> {
        let mut found = Vec::new();
        for (controller, files) in SETTINGS {
            let Some(directory) = self.paths.get(controller) else { continue };
            for file in files {
                // A controller that is not enabled has no such file.
                if let Ok(value) = fs::read_to_string(directory.join(file)) {
                    found.push(Setting {
                        controller: controller.to_owned(),
                        file: (*file).to_owned(),
                        value: value.trim().to_owned(),
                    });
                }
            }
        }
        found
    }

    /// Sets limits that came from the source. One that this host does not have is said and left out.
    pub(crate) fn apply(&self, settings: &[Setting]) -> Result<()> {
        for setting in settings {
            let known = SETTINGS.iter().any(|(controller, files)| {
                *controller == setting.controller && files.contains(&setting.file.as_str())
            });
            if !known || setting.value.len() > VALUE_CAP {
                return Err(ContainerError::section(
                    "container/state",
                    format!("sets {:?}, which is no limit", setting.file),
                ));
            }
            let Some(directory) = self.paths.get(&setting.controller) else { continue };
            let path = directory.join(&setting.file);
            let current = fs::read_to_string(&path).unwrap_or_default();
            if current.trim() == setting.value {
                continue;
            }
            if let Err(error) = fs::write(&path, &setting.value) {
                tracing::warn!(path = %path.display(), value = setting.value, %error, "Cannot set a limit as it was at the source");
            }
        }
        Ok(())
    }

    /// The memory limit in bytes, when there is one.
    pub(crate) fn memory_limit(&self) -> Option<u64> {
        let (directory, file) = match self.paths.get("memory") {
            Some(directory) => (directory, "memory.limit_in_bytes"),
            None => (self.paths.get("")?, "memory.max"),
        };
        let limit: u64 = fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok()?;
        // v1 says "none" by a number near 2^63.
        (limit < 1 << 60).then_some(limit)
    }

    /// Bytes that its members may have in swap beside their memory, as far as the host has that.
    pub(crate) fn swap_allowance(&self) -> u64 {
        let host = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let free = host.lines().find_map(|line| line.strip_prefix("SwapFree:"));
        let free = free.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        let number = |directory: &Path, file| -> Option<u64> {
            fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok()
        };
        let allowed = match self.paths.get("memory") {
            // Memory and swap together.
            Some(directory) => number(directory, "memory.memsw.limit_in_bytes")
                .map(|both| both.saturating_sub(self.memory_limit().unwrap_or(0))),
            None => self.paths.get("").and_then(|directory| number(directory, "memory.swap.max")),
        };
        (free.unwrap_or(0) * 1024).min(allowed.unwrap_or(u64::MAX))
    }

    /// Anonymous memory of its members in bytes, each page once; nothing when nobody counts it.
    pub(crate) fn anonymous_memory(&self) -> Option<u64> {
        let (directory, name) = match self.paths.get("memory") {
            Some(directory) => (directory, "total_rss "),
            None => (self.paths.get("")?, "anon "),
        };
        let text = fs::read_to_string(directory.join("memory.stat")).ok()?;
        text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_peer_sets_nothing_but_limits() {
        let cgroups =
            Cgroups { paths: BTreeMap::from([("pids".to_owned(), PathBuf::from("/nowhere"))]) };
        let setting = |file: &str| Setting {
            controller: "pids".to_owned(),
            file: file.to_owned(),
            value: "7".to_owned(),
        };
        assert!(cgroups.apply(&[setting("../../../tmp/x")]).is_err());
        assert!(cgroups.apply(&[setting("cgroup.procs")]).is_err());
        // The directory is missing, which is said in the log and no more.
        assert!(cgroups.apply(&[setting("pids.max")]).is_ok());
    }
}
