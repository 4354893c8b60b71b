//! The page engine: page addresses and sets, encodings, and the pipelines that send and receive.
//!
//! Everything here speaks of (space, page number) and nothing else. What a space is, a guest's
//! physical memory or one process's address space, only a backend knows.

pub mod address;
pub mod batch;
mod choose;
mod encode;
pub mod receive;
mod receiver;
pub mod send;
mod sender;
pub mod set;
#[cfg(test)]
mod tests;

pub use address::{PAGE_SIZE, PageRange, SpaceId};
pub use choose::Compression;
pub(crate) use encode::is_zero;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use encode::{batch_seeds, try_run};
pub use receive::{ReceiveCanceller, ReceiveError, ReceivePool, RoundReceived};
pub use send::{RoundSent, SendCanceller, SendCounters, SendError, SendOptions, SendPool};
pub use set::PageSet;

use crate::workload::Result;

/// Memory of a workload, readable from outside while it runs. Called by several threads at once.
pub trait PageReader: Send + Sync {
    /// Copies the pages of `range` into `into`, which is exactly `range.bytes()` long.
    ///
    /// # Errors
    /// When any byte could not be read: a short read is an error, never a zero-filled tail.
    fn read(&self, range: PageRange, into: &mut [u8]) -> Result<()>;

    /// Pages that the workload gave back while it ran, after they were asked for and before they were
    /// read: they were given as zeros, and are to be counted as written again, so that whoever still has
    /// them when the workload stands still reads them then. Empties the set.
    fn take_missed(&self) -> PageSet;
}

/// Where arriving pages are put, on the destination. Called by several threads at once, never for
/// the same page by two of them within a round.
pub trait PageWriter: Send + Sync {
    /// Puts `bytes` (exactly `range.bytes()` long) at the pages of `range`.
    ///
    /// # Errors
    /// When the space does not exist, the range leaves it, or the bytes could not be stored.
    fn write(&self, range: PageRange, bytes: &[u8]) -> Result<()>;

    /// Makes every page of `range` read as zeros.
    ///
    /// # Errors
    /// As for [`PageWriter::write`].
    fn zero(&self, range: PageRange) -> Result<()>;
}
