//! Checkpoints in a file: one workload that stood still, all of it, as a tar through zstd.
//!
//! The parts of an archive, in their order: the header (`decamp/header.json`), which says what is in it
//! and names every part with its size; the parts, which are the backend's business; the sums
//! (`decamp/sums.json`), SHA-256 of each part. A reader goes through all of it before anything is touched,
//! and once more when it restores. Nothing in a file is believed: names, sizes, numbers and order are
//! checked against the header, the header against what this host has.
//!
//! Rooms: `header` (what an archive says of itself), `write` and `read` (the two ends), `tarred` (the tar in a file), `parcel` (parts as
//! backends give and take them), `foreign` (an archive that another program wrote), `memory` (pages of spaces as parts), `output` (the file that is there as a
//! whole or not at all), `checkpoint` and `restore` (a workload into a file, and out of it).

pub mod checkpoint;
mod error;
mod foreign;
pub mod header;
pub mod memory;
mod output;
pub mod parcel;
pub mod read;
pub mod restore;
mod tarred;
#[cfg(test)]
mod tests;
pub mod write;

pub use error::{ArchiveError, Result};
pub use foreign::Foreign;
pub use header::{Header, PartInfo};
pub use parcel::{Frozen, Parcel, Unpacking};
pub use read::Archive;
