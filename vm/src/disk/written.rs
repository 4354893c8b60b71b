//! Which pages of a disk were written since they were looked for last.
//!
//! A page is noted after a write to it is through, and whoever harvests takes the notes before it reads a page.
//! So a write whose note was taken is in what is read after, and one whose note was not is in the next harvest;
//! at the last one nothing is under way.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use decamp_shared::pages::{PAGE_SIZE, PageSet, SpaceId};

/// A bit for each page; nothing while nobody wants to know.
#[derive(Debug, Default)]
pub(super) struct Written(RwLock<Option<Vec<AtomicU64>>>);

impl Written {
    /// From now on writes to `pages` pages are noted; none is so far.
    pub(super) fn start(&self, pages: u64) {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        let words = (0..words).map(|_| AtomicU64::new(0)).collect();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(words);
    }

    /// Nothing is noted any more.
    pub(super) fn stop(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// `length` bytes from `at` on were written.
    pub(super) fn note(&self, at: u64, length: u64) {
        let words = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(words) = words.as_ref().filter(|_| length > 0) else { return };
        let page = PAGE_SIZE as u64;
        let (first, last) = (at / page, (at + (length - 1)) / page);
        for word in first / 64..=last / 64 {
            let low = u64::MAX << first.saturating_sub(word * 64).min(63);
            let high = u64::MAX >> (63 - (last - word * 64).min(63));
            if let Some(bits) = usize::try_from(word).ok().and_then(|word| words.get(word)) {
                bits.fetch_or(low & high, Ordering::SeqCst);
            }
        }
    }

    /// Whether anything was noted and not taken.
    pub(super) fn any(&self) -> bool {
        let words = self.0.read().unwrap_or_else(PoisonError::into_inner);
        words
            .as_ref()
            .is_some_and(|words| words.iter().any(|word| word.load(Ordering::SeqCst) != 0))
    }

    /// Adds what was noted to `set` and forgets it.
    pub(super) fn take(&self, space: SpaceId, set: &mut PageSet) {
        let words = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(words) = words.as_ref() else { return };
        let taken: Vec<u64> = words.iter().map(|word| word.swap(0, Ordering::SeqCst)).collect();
        set.insert_bitmap(space, 0, &taken);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use decamp_shared::pages::PageRange;

    const SPACE: SpaceId = SpaceId(1);

    fn taken(written: &Written) -> PageSet {
        let mut set = PageSet::new();
        written.take(SPACE, &mut set);
        set
    }

    #[test]
    fn nothing_is_noted_unless_somebody_wants_to_know() {
        let written = Written::default();
        written.note(0, 4096);
        assert!(taken(&written).is_empty());
        written.start(4);
        assert!(taken(&written).is_empty());
        written.note(4095, 2);
        assert!(written.any());
        assert_eq!(taken(&written).len(), 2);
        assert!(!written.any() && taken(&written).is_empty());
        written.note(0, 0);
        written.note(1 << 40, 1);
        assert!(taken(&written).is_empty());
        written.note(0, 1);
        written.stop();
        assert!(taken(&written).is_empty());
    }

    proptest! {
        #[test]
        fn every_page_that_is_touched_is_noted_and_no_other(
            writes in prop::collection::vec((0u64..300 * 4096, 1u64..80 * 4096), 1..8)
        ) {
            let written = Written::default();
            written.start(400);
            let mut expected = PageSet::new();
            for (at, length) in writes {
                written.note(at, length);
                let (first, last) = (at / 4096, (at + length - 1) / 4096);
                expected.insert(PageRange::new(SPACE, first, last - first + 1));
            }
            // Words are whole: bits behind the last page are never asked for.
            prop_assert_eq!(taken(&written), expected);
        }
    }
}
