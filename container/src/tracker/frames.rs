//! Where the pages of a memory lay at a look. A page that lies elsewhere at the next one is not the same
//! page, whatever the kernel says of writes: its memory was moved there by whole page tables, merged with
//! another's, given back and taken anew, or swapped.

use crate::entries::Entry;

/// Of each page that existed, ascending.
#[derive(Debug, Default)]
pub(super) struct Frames(Vec<Run>);

/// Adjacent pages in adjacent places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// Number of the first page: its address by the size of a page.
    page: u64,
    place: u64,
    count: u64,
}

impl Run {
    fn place_of(&self, page: u64) -> Option<u64> {
        let within = page.checked_sub(self.page).filter(|within| *within < self.count)?;
        Some(self.place + within)
    }
}

impl Frames {
    /// Notes the next page. One whose place nobody may know lies nowhere.
    pub(super) fn push(&mut self, page: u64, entry: Entry) {
        let Some(place) = entry.place() else { return };
        if let Some(last) = self.0.last_mut()
            && (page, place) == (last.page + last.count, last.place + last.count)
        {
            last.count += 1;
            return;
        }
        self.0.push(Run { page, place, count: 1 });
    }

    /// To be asked for pages in ascending order.
    pub(super) fn compare(&self) -> Comparison<'_> {
        Comparison(&self.0)
    }
}

/// What is left to compare.
pub(super) struct Comparison<'a>(&'a [Run]);

impl Comparison<'_> {
    /// Whether a page lay then where it lies now.
    pub(super) fn lay_there(&mut self, page: u64, entry: Entry) -> bool {
        while let [first, rest @ ..] = self.0
            && first.page + first.count <= page
        {
            self.0 = rest;
        }
        let then = self.0.first().and_then(|run| run.place_of(page));
        then.is_some() && then == entry.place()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Present, in this frame.
    fn present(frame: u64) -> Entry {
        Entry::from_word(1 << 63 | frame)
    }

    /// In swap, at this offset.
    fn swapped(offset: u64) -> Entry {
        Entry::from_word(1 << 62 | offset << 5)
    }

    #[test]
    fn adjacent_pages_in_adjacent_frames_take_no_more_than_one() {
        let mut frames = Frames::default();
        (0..512).for_each(|at| frames.push(100 + at, present(7000 + at)));
        assert_eq!(frames.0.len(), 1);
        frames.push(700, present(7512));
        frames.push(701, present(9));
        frames.push(702, swapped(10));
        assert_eq!(frames.0.len(), 4);
    }

    #[test]
    fn a_page_in_memory_is_not_the_one_that_was_in_swap() {
        let mut frames = Frames::default();
        frames.push(5, swapped(2));
        frames.push(6, present(64));
        assert!(frames.compare().lay_there(5, swapped(2)));
        assert!(!frames.compare().lay_there(5, present(64)));
        assert!(!frames.compare().lay_there(6, swapped(2)));
        // Two swap areas have the same offsets.
        assert!(!frames.compare().lay_there(5, Entry::from_word(1 << 62 | 2 << 5 | 1)));
    }

    #[test]
    fn where_nobody_may_know_the_place_nothing_lay() {
        let mut frames = Frames::default();
        frames.push(5, present(0));
        assert!(!frames.compare().lay_there(5, present(0)));
    }

    proptest! {
        #[test]
        fn what_lay_where_is_told_as_a_table_would(
            then in prop::collection::btree_map(0u64..40, 1u64..60, 0..30),
            now in prop::collection::btree_map(0u64..40, 1u64..60, 0..30),
        ) {
            let mut frames = Frames::default();
            then.iter().for_each(|(page, frame)| frames.push(*page, present(*frame)));
            let mut comparison = frames.compare();
            for (page, frame) in &now {
                let same = then.get(page) == Some(frame);
                prop_assert_eq!(comparison.lay_there(*page, present(*frame)), same);
            }
        }
    }
}
