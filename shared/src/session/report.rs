//! The report that every move ends with: the JSON of the command contract, field by field.

use serde::{Deserialize, Serialize};

use crate::workload::{Kind, Refusal};

/// How a move ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The workload runs at the destination.
    Completed,
    /// It runs on at the source.
    Failed,
    /// It runs on at the source, as the user wished.
    Cancelled,
    /// Nothing was touched.
    Refused,
    /// Nobody knows; `decamp resolve` is needed.
    Unresolved,
}

impl Outcome {
    /// The exit code of the command contract.
    pub fn exit_code(self) -> u8 {
        match self {
            Outcome::Completed => 0,
            Outcome::Refused => 3,
            Outcome::Failed | Outcome::Cancelled => 4,
            Outcome::Unresolved => 5,
        }
    }
}

/// What the downtime was made of, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DowntimeParts {
    /// Stopping the workload and taking it off the network.
    pub pause_ms: f64,
    /// The last pages and files.
    pub memory_ms: f64,
    /// Saving and sending the state sections, as far as it was not hidden behind the pages.
    pub state_ms: f64,
    /// Loading at the destination.
    pub restore_ms: f64,
    /// Fence, commit, activation and its answer.
    pub switch_ms: f64,
}

/// One round of copying.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Number, from 1.
    pub round: u32,
    /// Pages that were dirty at its start.
    pub dirty_pages: u64,
    /// Bytes that it put on the wire.
    pub wire_bytes: u64,
    /// How long it took.
    pub ms: f64,
}

/// Pages by the encoding that they travelled in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Zero pages.
    pub zero: u64,
    /// Content that the destination had.
    pub same: u64,
    /// Differences against the copy sent last.
    pub delta: u64,
    /// LZ4.
    pub lz4: u64,
    /// zstd.
    pub zstd: u64,
    /// As they were.
    pub raw: u64,
}

/// What was foretold before the final stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Predicted {
    /// Whole move.
    pub total_ms: Option<f64>,
    /// Final stop.
    pub downtime_ms: Option<f64>,
}

/// One move, told to people and machines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Id of the migration.
    pub migration: String,
    /// Name of the workload.
    pub workload: String,
    /// Its kind.
    pub kind: Kind,
    /// Source host.
    pub from: String,
    /// Destination host.
    pub to: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, when it did not complete: what happened, what state the workload is in, what to do.
    pub reason: Option<String>,
    /// Every refusal, when refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refusals: Vec<Refusal>,
    /// `pre-copy` or `stop-and-copy`.
    pub mode: String,
    /// Which dirty tracker, or why there was none.
    pub tracker: Option<String>,
    /// From the request to the end.
    pub total_ms: f64,
    /// From the moment the source stops the workload to the answer that it runs, by the source's
    /// clock; null when it was never stopped.
    pub downtime_ms: Option<f64>,
    /// Its parts.
    pub downtime: DowntimeParts,
    /// The rounds.
    pub rounds: Vec<Round>,
    /// Memory that the workload has.
    pub memory_bytes: u64,
    /// Bytes of page batches on the wire.
    pub wire_bytes: u64,
    /// Bytes of files on the wire.
    pub file_bytes: u64,
    /// Pages by encoding.
    pub pages: PageCounts,
    /// Page connections.
    pub streams: u32,
    /// Whether pages were encrypted.
    pub encrypted: bool,
    /// What was foretold.
    pub predicted: Predicted,
    /// How long tracking stopped the workload before the final stop, in all.
    pub source_stall_ms: f64,
}
