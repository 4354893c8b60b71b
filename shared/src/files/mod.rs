//! File trees (bundle, root file system, kernel) that travel with a workload over one blocking
//! stream: first as a whole while the workload runs, then what changed while it stands still.
//!
//! Rooms: `channel` (what a stream must do), `frame` (frames and flow), `index` (what travels before
//! any content, and its checks), `beneath` (files below a root, never through a link), `attributes`
//! (owner, mode, times, extended attributes), `scan` and `pack` (the source's disk), `sender` and
//! `receive` (the two ends), `earlier` (what stands there already), `placing` (a pass carried out), `landing` (what to take away again) and
//! `place` (questions before anything is touched). `PROTOCOL.md` describes the wire.

use std::sync::atomic::AtomicU64;

mod attributes;
mod beneath;
mod channel;
mod earlier;
mod error;
mod frame;
mod index;
mod landing;
mod pack;
mod place;
mod placing;
mod receive;
mod scan;
mod sender;
#[cfg(test)]
mod tests;

pub use channel::FileChannel;
pub use error::{FileError, Result, StreamError};
pub use landing::Landing;
pub use place::{Probe, check_place, free_bytes, is_same_place, tree_bytes};
pub use receive::{Incoming, receive};
pub use sender::TreeSender;

/// How far a sender is; read by whoever shows progress.
#[derive(Debug, Default)]
pub struct FileCounters {
    /// Bytes of content read and sent.
    pub sent_bytes: AtomicU64,
    /// Bytes of content that are to be sent, as far as is known.
    pub total_bytes: AtomicU64,
    /// Bytes written to the stream, indexes included and after compression.
    pub wire_bytes: AtomicU64,
}
