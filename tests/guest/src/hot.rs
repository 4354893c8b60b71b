//! The hot set: which pages are rewritten, in which order, and which version each page must
//! therefore have after so many rewrites. The order is a plain cycle, so that the version follows
//! from the count alone: a second opinion beside the version table, which could be stale itself.

use crate::pattern::mixed;

/// Which pages are hot.
pub(crate) struct HotSet {
    size: u64,
    /// Version of a page that was never rewritten: 1 when all were written at the start.
    base: u64,
    place: Place,
}

enum Place {
    Together { first: u64 },
    Spread { stride: u64, seed: u64 },
}

impl HotSet {
    /// `size` of `pages` pages: in the middle, or one in each of `size` equal parts of them.
    pub(crate) fn new(pages: u64, size: u64, spread: bool, seed: u64, base: u64) -> HotSet {
        let place = match pages.checked_div(size) {
            Some(stride) if spread => Place::Spread { stride, seed },
            _ => Place::Together { first: (pages - size) / 2 },
        };
        HotSet { size, base, place }
    }

    /// Whether nothing is hot.
    pub(crate) fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// The page that the next rewrite takes.
    pub(crate) fn next(&self, count: u64) -> u64 {
        self.nth(count % self.size)
    }

    /// The version that a page must have after `count` rewrites.
    pub(crate) fn version(&self, page: u64, count: u64) -> u64 {
        match self.index(page) {
            Some(index) => self.base + (count + self.size - 1 - index) / self.size,
            None => self.base,
        }
    }

    fn nth(&self, index: u64) -> u64 {
        match self.place {
            Place::Together { first } => first + index,
            Place::Spread { stride, seed } => index * stride + mixed(seed ^ index) % stride,
        }
    }

    fn index(&self, page: u64) -> Option<u64> {
        let index = match self.place {
            Place::Together { first } => page.checked_sub(first)?,
            Place::Spread { stride, .. } => page / stride,
        };
        (index < self.size && self.nth(index) == page).then_some(index)
    }
}
