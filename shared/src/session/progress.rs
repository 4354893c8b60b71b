//! What a move tells while it goes on, as a stream of JSON lines.

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::report::Report;

/// Phases of a move, in order (design: "A move, from end to end").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Hello, manifest, verdict.
    Negotiate,
    /// Empty workload, connections, files.
    Prepare,
    /// Rounds while it runs.
    PreCopy,
    /// Stopping.
    Pause,
    /// Last pages, state, files; loading.
    Final,
    /// In place of all that follows, of disks that move within a host: nothing is written to them, and they go over to
    /// their new files.
    Switch,
    /// Journaled: from here the source never resumes by itself.
    Fence,
    /// Waiting for the destination's durable answer.
    Commit,
    /// The source's copy is taken away.
    Release,
}

/// One line of progress.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Progress {
    /// The move has an id.
    Started {
        /// Id, for `cancel` and `resolve`.
        migration: String,
        /// Name of the workload.
        workload: String,
        /// Destination host.
        to: String,
    },
    /// A phase began.
    Phase {
        /// Which.
        phase: Phase,
    },
    /// Files on their way.
    Files {
        /// Bytes sent.
        sent_bytes: u64,
        /// Bytes to send in all.
        total_bytes: u64,
    },
    /// Pages on their way; about ten a second.
    Pages {
        /// Round, from 1.
        round: u32,
        /// Pages of this round that are read and handed to the wire.
        done_pages: u64,
        /// Pages of this round.
        round_pages: u64,
        /// Bytes on the wire since the start; of what is copied within a host, bytes that were read.
        wire_bytes: u64,
        /// Bytes on the wire a second, now.
        rate: f64,
        /// Pages that the workload wrote a second, in the last round.
        dirty_rate: Option<f64>,
        /// Predicted downtime if it stopped now.
        predicted_downtime_ms: Option<f64>,
    },
    /// Something that a person should know, and that does not end the move.
    Note {
        /// The sentence.
        text: String,
    },
    /// The end. Always the last line.
    Report {
        /// The report.
        report: Box<Report>,
    },
}

/// Where a session tells its progress. A listener that went away never disturbs the move.
#[derive(Clone, Debug, Default)]
pub struct ProgressSender(Option<mpsc::UnboundedSender<Progress>>);

impl ProgressSender {
    /// A sender and the stream that it feeds.
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<Progress>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(Some(sender)), receiver)
    }

    /// Tells `event` to whoever listens.
    pub fn tell(&self, event: Progress) {
        if let Some(sender) = &self.0 {
            // A closed channel means that nobody listens any more.
            let _ = sender.send(event);
        }
    }

    /// Tells that `phase` began.
    pub fn phase(&self, phase: Phase) {
        self.tell(Progress::Phase { phase });
    }
}
