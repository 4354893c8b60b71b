//! What names a page: a space and a page number within it.

use std::fmt;

/// Bytes in a page. The engine knows one size; huge pages are ranges of these.
pub const PAGE_SIZE: usize = 4096;

/// A numbered space of pages within one workload: a guest's physical memory, a process's address
/// space, a shared segment or a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u32);

impl fmt::Display for SpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "space {}", self.0)
    }
}

/// `count` pages of one space, from page number `first` (byte address divided by [`PAGE_SIZE`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    /// The space that the pages belong to.
    pub space: SpaceId,
    /// Number of the first page.
    pub first: u64,
    /// How many pages.
    pub count: u64,
}

impl PageRange {
    /// The range of `count` pages from page number `first`.
    pub const fn new(space: SpaceId, first: u64, count: u64) -> Self {
        Self { space, first, count }
    }

    /// One page past the last; the highest number there is when a hostile range goes beyond it.
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Length in bytes.
    pub const fn bytes(&self) -> usize {
        self.count as usize * PAGE_SIZE
    }

    /// Byte address of the first page within its space.
    pub const fn address(&self) -> u64 {
        self.first * PAGE_SIZE as u64
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {:#x}..{:#x} of {}", self.first, self.end(), self.space)
    }
}
