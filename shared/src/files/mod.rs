//! File trees (bundle, root file system, kernel) that travel with a workload over one blocking
//! stream: first as a whole while the workload runs, then what changed while it stands still.
//!
//! Rooms: `channel` (what a stream must do), `frame` (frames and flow), `index` (what travels before
//! any content, and its checks), `beneath` (files below a root, never through a link), `attributes`
//! (owner, mode, times, extended attributes), `scan` and `pack` (the source's disk), `sender` and
//! `receive` (the two ends), `tar_tree` and `tar_landing` (a tree that stands still as a plain tar, and a
//! tree that comes out of one: a checkpoint's), `earlier` (what stands there already), `placing` (a pass carried out), `landing` (what to take away again) and
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
mod layers;
mod pack;
mod place;
mod placing;
mod receive;
mod scan;
mod sender;
mod tar_landing;
mod tar_tree;
#[cfg(test)]
mod tests;

pub use channel::FileChannel;
pub use error::{FileError, Result, StreamError};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use index::{index_seed, try_index};
pub use landing::Landing;
pub use layers::{Changes, LayeredLander};
pub use place::{
    Probe, check_place, free_bytes, has_probe, is_same_place, is_within_probed, look_of,
    looks_the_same, settle, tree_bytes,
};
pub use receive::{Incoming, receive};
pub use sender::TreeSender;
pub use tar_landing::{FileLander, TreeLander};
pub use tar_tree::{TarTree, file_sum};

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
