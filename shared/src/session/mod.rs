//! One move: the two ends of it, the commit between them, and what is told about it.
//!
//! [`commit`] holds the pure state machines that decide who owns the workload; everything else here
//! drives them. [`source`] runs the leaving end (its copying is in `copying`, its hold on the
//! workload in [`departure`]), [`destination`] and [`sessions`] the arriving end, [`recovery`]
//! settles what a restart left open, [`journal`] is the durable memory of all of them. [`relocation`] moves files
//! within a host, where nothing changes hands.

mod arrival;
pub mod asking;
pub mod commit;
mod copying;
pub mod departure;
pub mod destination;
pub mod error;
mod held;
pub mod journal;
mod link;
pub mod policy;
pub mod progress;
pub mod recovery;
pub mod relocation;
pub mod report;
mod sections;
pub mod sessions;
pub mod source;
pub mod storage;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use destination::DestinationHost;
pub use progress::{Progress, ProgressSender};
pub use report::{Outcome, Report};
pub use sessions::DestinationSessions;
pub use source::{Ending, Fate, SourceContext, SourceMove, migrate};

use crate::workload::Storage;

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
    /// The final stop is not entered before it is predicted to be shorter than this. Where nothing is
    /// said, [`AIM`] is aimed at, and missed where a stop costs more before any memory is sent.
    pub max_downtime_ms: Option<u64>,
    /// Page connections, 1 to 64.
    pub streams: u32,
    /// Compression of pages.
    pub compress: Compress,
    /// The move gives up, workload running on, when it has not reached the stop by then.
    pub timeout_ms: u64,
    /// `OLD=NEW` path mappings for the destination.
    pub paths: Vec<(PathBuf, PathBuf)>,
    /// What becomes of what is mounted into it, where [`MoveOptions::storage_of`] does not say.
    pub storage: Option<Storage>,
    /// The same by tree: its path on the source, or where the workload sees it.
    pub storage_of: Vec<(PathBuf, Storage)>,
    /// Check everything, touch nothing.
    pub dry_run: bool,
    /// Remove the source's files after the move.
    pub remove_source: bool,
    /// Do not ask whether the destination's bridges lead to the segments that the workload is on, nor whether they
    /// tell the same virtual networks apart.
    pub no_network_check: bool,
}

/// The stop that is aimed at where nobody asked for another.
pub const AIM: Duration = Duration::from_millis(300);

/// How long a stop may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaxDowntime {
    /// No longer than this, or the move is given up.
    Promised(Duration),
    /// No longer than this where it can be.
    Aimed(Duration),
}

impl Default for MoveOptions {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            max_downtime_ms: None,
            streams: 2,
            compress: Compress::Auto,
            timeout_ms: 600_000,
            paths: Vec::new(),
            storage: None,
            storage_of: Vec::new(),
            dry_run: false,
            remove_source: false,
            no_network_check: false,
        }
    }
}

impl MoveOptions {
    /// How long the stop may be.
    pub fn max_downtime(&self) -> MaxDowntime {
        match self.max_downtime_ms {
            Some(ms) => MaxDowntime::Promised(Duration::from_millis(ms)),
            None => MaxDowntime::Aimed(AIM),
        }
    }

    /// [`MoveOptions::timeout_ms`] as a duration.
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

#[cfg(test)]
mod tests;
