//! The most memory that a host had at any moment of a move, as the kernel counts it for the host's
//! cgroup: its agent, keepers, page stores and workloads, the pages of files that they wrote, and what
//! the kernel holds for them. Nothing is sampled, so no peak is missed.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{BenchError, Result};

/// Counts from where it was begun.
pub(crate) struct Peak {
    most: PathBuf,
    before: u64,
}

impl Peak {
    /// Of `host`, one of the hosts whose cgroups have the name `hosts`.
    pub(crate) fn begin(hosts: &str, host: &str) -> Result<Self> {
        let top = Path::new("/sys/fs/cgroup");
        let v1 = top.join("memory").join(hosts).join(host);
        let (usage, most) = if v1.exists() {
            (v1.join("memory.usage_in_bytes"), v1.join("memory.max_usage_in_bytes"))
        } else {
            let v2 = top.join(hosts).join(host);
            (v2.join("memory.current"), v2.join("memory.peak"))
        };
        // From Linux 6.12 on v2 can be told so too, but only for one open descriptor.
        fs::write(&most, "0").map_err(BenchError::io(format!("reset {}", most.display())))?;
        Ok(Self { before: number(&usage)?, most })
    }

    /// Bytes that the host had more than at the beginning, at the most.
    pub(crate) fn above(&self) -> Result<u64> {
        Ok(number(&self.most)?.saturating_sub(self.before))
    }
}

fn number(path: &Path) -> Result<u64> {
    let text =
        fs::read_to_string(path).map_err(BenchError::io(format!("read {}", path.display())))?;
    let wrong = |_| BenchError::wrong(format!("{} holds no number", path.display()));
    text.trim().parse().map_err(wrong)
}
