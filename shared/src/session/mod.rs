//! One move: the two ends of it, the commit between them, and what is told about it.
//!
//! [`commit`] holds the pure state machines that decide who owns the workload; everything else here
//! drives them. [`source`] runs the leaving end (its copying is in `copying`, its hold on the
//! workload in [`departure`]), [`destination`] and [`sessions`] the arriving end, [`recovery`]
//! settles what a restart left open, [`journal`] is the durable memory of all of them.

mod arrival;
pub mod asking;
pub mod commit;
mod copying;
pub mod departure;
pub mod destination;
pub mod error;
pub mod journal;
mod link;
pub mod policy;
pub mod progress;
pub mod recovery;
pub mod report;
pub mod sessions;
pub mod source;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use destination::DestinationHost;
pub use progress::{Progress, ProgressSender};
pub use report::{Outcome, Report};
pub use sessions::DestinationSessions;
pub use source::{Ending, Fate, SourceContext, SourceMove, migrate};

/// How memory is to travel, as the user asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Pre-copy where the workload can be tracked, else stop-and-copy.
    #[default]
    Auto,
    /// Rounds while it runs; refused for a workload that cannot be tracked.
    PreCopy,
    /// Everything while it stands still.
    StopAndCopy,
}

/// How pages may be compressed, as the user asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// By measurement.
    #[default]
    Auto,
    /// Never.
    None,
    /// LZ4 wherever it gains.
    Lz4,
    /// zstd wherever it gains.
    Zstd,
}

/// What the user asked of one move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MoveOptions {
    /// How memory travels.
    pub mode: Mode,
    /// The final stop is not entered before it is predicted to be shorter than this.
    pub max_downtime_ms: u64,
    /// Page connections, 1 to 64.
    pub streams: u32,
    /// Compression of pages.
    pub compress: Compress,
    /// The move gives up, workload running on, when it has not reached the stop by then.
    pub timeout_ms: u64,
    /// `OLD=NEW` path mappings for the destination.
    pub paths: Vec<(PathBuf, PathBuf)>,
    /// Check everything, touch nothing.
    pub dry_run: bool,
    /// Remove the source's files after the move.
    pub remove_source: bool,
}

impl Default for MoveOptions {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            max_downtime_ms: 300,
            streams: 2,
            compress: Compress::Auto,
            timeout_ms: 600_000,
            paths: Vec::new(),
            dry_run: false,
            remove_source: false,
        }
    }
}

impl MoveOptions {
    /// [`MoveOptions::max_downtime_ms`] as a duration.
    pub fn max_downtime(&self) -> Duration {
        Duration::from_millis(self.max_downtime_ms)
    }

    /// [`MoveOptions::timeout_ms`] as a duration.
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

#[cfg(test)]
mod tests;
