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

impl Report {
    /// The exit code of the command contract. 3 and 4 promise that the workload runs on.
    pub fn exit_code(&self) -> u8 {
        if self.lost { 1 } else { self.outcome.exit_code() }
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
    /// Whether the workload ended by itself, or its keeper was killed, while it was being moved: then it
    /// runs on neither host, whatever the outcome.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lost: bool,
    /// Every refusal, when refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refusals: Vec<Refusal>,
    /// `pre-copy` or `stop-and-copy`.
    pub mode: String,
    /// Which dirty tracker, or why there was none.
    pub tracker: Option<String>,
    /// Of a container: `hidden` when CRIU did not see the memory that pages were sent of, `criu` when its
    /// own images hold all memory.
    #[serde(default)]
    pub dump: Option<String>,
    /// Of a container that arrived: `lazy` when memory came while it ran already, `eager` when all of it
    /// was there before.
    #[serde(default)]
    pub restore: Option<String>,
    /// Why each way that is not the best was taken, at the source and at the destination.
    #[serde(default)]
    pub fallbacks: Vec<String>,
    /// What else a user should know: what was not looked at, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// From the request to the end.
    pub total_ms: f64,
    /// From the moment the source stops the workload to the answer that it runs, by the source's
    /// clock; null when it was never stopped. Of disks that move within a host: how long their devices stood.
    pub downtime_ms: Option<f64>,
    /// Its parts.
    pub downtime: DowntimeParts,
    /// The rounds.
    pub rounds: Vec<Round>,
    /// Memory that the workload has.
    pub memory_bytes: u64,
    /// Bytes of page batches on the wire.
    pub wire_bytes: u64,
    /// Of those, the bytes of batches with pages of disks.
    #[serde(default)]
    pub disk_bytes: u64,
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
    /// How much of the downtime went into comparing all memory with what was sent; nothing where the
    /// kernel tells what was written.
    #[serde(default)]
    pub compare_ms: f64,
}

impl Report {
    /// Of a move that has just begun: it has failed, unless something else is said.
    pub(super) fn begun(migration: &str, from: &str, to: &str) -> Self {
        Self {
            migration: migration.to_owned(),
            workload: String::new(),
            kind: Kind::Unspecified,
            from: from.to_owned(),
            to: to.to_owned(),
            outcome: Outcome::Failed,
            reason: None,
            lost: false,
            refusals: Vec::new(),
            mode: "stop-and-copy".to_owned(),
            tracker: None,
            dump: None,
            restore: None,
            fallbacks: Vec::new(),
            notes: Vec::new(),
            total_ms: 0.0,
            downtime_ms: None,
            downtime: DowntimeParts::default(),
            rounds: Vec::new(),
            memory_bytes: 0,
            wire_bytes: 0,
            disk_bytes: 0,
            file_bytes: 0,
            pages: PageCounts::default(),
            streams: 0,
            encrypted: false,
            predicted: Predicted::default(),
            source_stall_ms: 0.0,
            compare_ms: 0.0,
        }
    }
}
