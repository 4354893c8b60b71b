//! A set of pages over all spaces of a workload: dirty pages, pages already sent, pages present.
//!
//! Spaces can be 47-bit address spaces with a few islands in them or a terabyte of guest memory
//! that is mostly clean, so the set is a map of bitmap chunks, each of 32,768 pages (128 MiB).

use std::collections::BTreeMap;
use std::ops::Bound;

use super::address::{PageRange, SpaceId};

const WORDS: usize = 512;
/// Pages that one chunk of the map covers.
pub(crate) const CHUNK_PAGES: u64 = (WORDS * 64) as u64;

type Chunk = Box<[u64; WORDS]>;

/// A set of pages. Cheap to union, cheap to walk as ranges; memory grows with the 128 MiB regions
/// that hold a member, 4 KiB each.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    chunks: BTreeMap<(SpaceId, u64), Chunk>,
}

impl PageSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.chunks.values().all(|chunk| chunk.iter().all(|word| *word == 0))
    }

    /// Number of pages in the set.
    pub fn len(&self) -> u64 {
        self.chunks.values().flat_map(|chunk| chunk.iter()).map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether `page` of `space` is a member.
    pub fn contains(&self, space: SpaceId, page: u64) -> bool {
        let bit = page % CHUNK_PAGES;
        self.chunks
            .get(&(space, page / CHUNK_PAGES))
            .is_some_and(|chunk| chunk[(bit / 64) as usize] & (1 << (bit % 64)) != 0)
    }

    /// Adds every page of `range`.
    pub fn insert(&mut self, range: PageRange) {
        for_each_word(range, |key, word, mask| {
            self.chunks.entry(key).or_insert_with(empty_chunk)[word] |= mask;
        });
    }

    /// Takes every page of `range` out.
    pub fn remove(&mut self, range: PageRange) {
        for_each_word(range, |key, word, mask| {
            if let Some(chunk) = self.chunks.get_mut(&key) {
                chunk[word] &= !mask;
            }
        });
    }

    /// Adds the pages whose bits are set in `bitmap`: bit 0 of word 0 is page `first`, which must
    /// be a multiple of 64 (as KVM's dirty logs are).
    pub fn insert_bitmap(&mut self, space: SpaceId, first: u64, bitmap: &[u64]) {
        debug_assert_eq!(first % 64, 0);
        for (index, word) in bitmap.iter().enumerate().filter(|(_, word)| **word != 0) {
            let page = first + index as u64 * 64;
            let key = (space, page / CHUNK_PAGES);
            let at = (page % CHUNK_PAGES / 64) as usize;
            self.chunks.entry(key).or_insert_with(empty_chunk)[at] |= word;
        }
    }

    /// Adds every page of `other`.
    pub fn union(&mut self, other: &PageSet) {
        for (key, theirs) in &other.chunks {
            let ours = self.chunks.entry(*key).or_insert_with(empty_chunk);
            for (word, more) in ours.iter_mut().zip(theirs.iter()) {
                *word |= more;
            }
        }
    }

    /// Takes every page of `other` out.
    pub fn subtract(&mut self, other: &PageSet) {
        for (key, ours) in &mut self.chunks {
            if let Some(theirs) = other.chunks.get(key) {
                for (word, less) in ours.iter_mut().zip(theirs.iter()) {
                    *word &= !less;
                }
            }
        }
    }

    /// Takes every page out that is not in `other`.
    pub fn intersect(&mut self, other: &PageSet) {
        self.chunks.retain(|key, ours| {
            let Some(theirs) = other.chunks.get(key) else { return false };
            for (word, keep) in ours.iter_mut().zip(theirs.iter()) {
                *word &= keep;
            }
            true
        });
    }

    /// Takes every page of the spaces out that `keep` does not want.
    pub fn retain_spaces(&mut self, mut keep: impl FnMut(SpaceId) -> bool) {
        self.chunks.retain(|(space, _), _| keep(*space));
    }

    /// Empties the set, and keeps nothing.
    pub fn clear(&mut self) {
        self.chunks.clear();
    }

    /// The members as maximal ranges, by space and then by page number.
    pub fn ranges(&self) -> impl Iterator<Item = PageRange> + '_ {
        let mut runs = self.chunks.iter().flat_map(|((space, chunk), words)| {
            Runs { words, at: 0 }
                .map(move |(start, len)| PageRange::new(*space, chunk * CHUNK_PAGES + start, len))
        });
        let mut pending: Option<PageRange> = None;
        std::iter::from_fn(move || {
            loop {
                match (pending.take(), runs.next()) {
                    (Some(mut last), Some(next))
                        if last.space == next.space && last.end() == next.first =>
                    {
                        last.count += next.count;
                        pending = Some(last);
                    }
                    (Some(last), next) => {
                        pending = next;
                        return Some(last);
                    }
                    (None, Some(next)) => pending = Some(next),
                    (None, None) => return None,
                }
            }
        })
    }

    /// The first run of members at or after page `from` of `space`, or else of a later space; at
    /// most `limit` pages of it, and cut where a chunk of the map ends. For walking a set without
    /// borrowing it: go on at the run's end.
    pub fn next_run(&self, space: SpaceId, from: u64, limit: u64) -> Option<PageRange> {
        let first = (space, from / CHUNK_PAGES);
        self.chunks.range(first..).find_map(|(key, words)| {
            let at = if *key == first { from % CHUNK_PAGES } else { 0 };
            let (start, len) = Runs { words, at }.next()?;
            Some(PageRange::new(key.0, key.1 * CHUNK_PAGES + start, len.min(limit)))
        })
    }

    /// The set as bitmap chunks: (space, first page, words of 64 pages), for the keeper's protocol.
    pub fn chunks(&self) -> impl Iterator<Item = (SpaceId, u64, &[u64])> + '_ {
        self.chunks.iter().map(|((space, chunk), words)| (*space, chunk * CHUNK_PAGES, &words[..]))
    }

    /// The spaces that have at least one chunk, in order.
    pub fn spaces(&self) -> Vec<SpaceId> {
        let mut found = Vec::new();
        let mut from = Bound::Unbounded;
        while let Some(((space, _), _)) = self.chunks.range((from, Bound::Unbounded)).next() {
            found.push(*space);
            from = Bound::Excluded((*space, u64::MAX));
        }
        found
    }
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.ranges()).finish()
    }
}

impl FromIterator<PageRange> for PageSet {
    fn from_iter<T: IntoIterator<Item = PageRange>>(ranges: T) -> Self {
        let mut set = Self::new();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

/// Runs of set bits within one chunk, as (first bit, length).
struct Runs<'a> {
    words: &'a [u64; WORDS],
    at: u64,
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let start = next_bit(self.words, self.at, true)?;
        let end = next_bit(self.words, start, false).unwrap_or(CHUNK_PAGES);
        self.at = end;
        Some((start, end - start))
    }
}

/// The first bit at or after `from` whose value is `set`.
fn next_bit(words: &[u64; WORDS], from: u64, set: bool) -> Option<u64> {
    let mut at = (from / 64) as usize;
    let mut skip = from % 64;
    while at < WORDS {
        let word = if set { words[at] } else { !words[at] };
        let rest = word & (u64::MAX << skip);
        if rest != 0 {
            return Some(at as u64 * 64 + u64::from(rest.trailing_zeros()));
        }
        at += 1;
        skip = 0;
    }
    None
}

fn empty_chunk() -> Chunk {
    Box::new([0; WORDS])
}

/// Calls `visit(chunk key, word index, mask)` for each word that `range` touches.
fn for_each_word(range: PageRange, mut visit: impl FnMut((SpaceId, u64), usize, u64)) {
    let mut page = range.first;
    while page < range.end() {
        let bit = page % 64;
        let take = (64 - bit).min(range.end() - page);
        let mask = if take == 64 { u64::MAX } else { ((1 << take) - 1) << bit };
        visit((range.space, page / CHUNK_PAGES), (page % CHUNK_PAGES / 64) as usize, mask);
        page += take;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const A: SpaceId = SpaceId(0);
    const B: SpaceId = SpaceId(7);

    #[test]
    fn ranges_join_across_chunks_but_not_across_spaces() {
        let set: PageSet = [
            PageRange::new(A, CHUNK_PAGES - 3, 10),
            PageRange::new(A, CHUNK_PAGES + 7, 1),
            PageRange::new(B, 0, 2),
        ]
        .into_iter()
        .collect();
        let ranges: Vec<_> = set.ranges().collect();
        assert_eq!(ranges, [PageRange::new(A, CHUNK_PAGES - 3, 11), PageRange::new(B, 0, 2)]);
        assert_eq!(set.len(), 13);
        assert_eq!(set.spaces(), [A, B]);
    }

    #[test]
    fn high_addresses_of_a_process_fit() {
        let set: PageSet = [PageRange::new(A, (1 << 35) - 5, 5)].into_iter().collect();
        assert_eq!(set.ranges().next(), Some(PageRange::new(A, (1 << 35) - 5, 5)));
    }

    proptest! {
        #[test]
        fn behaves_as_a_set_of_numbers(
            steps in prop::collection::vec((any::<bool>(), 0u32..3, 0u64..70_000, 1u64..500), 1..40)
        ) {
            let mut set = PageSet::new();
            let mut model = BTreeSet::new();
            for (insert, space, first, count) in steps {
                let range = PageRange::new(SpaceId(space), first, count);
                for page in range.first..range.end() {
                    if insert { model.insert((range.space, page)); } else { model.remove(&(range.space, page)); }
                }
                if insert { set.insert(range) } else { set.remove(range) }
            }
            let walked: BTreeSet<_> =
                set.ranges().flat_map(|r| (r.first..r.end()).map(move |p| (r.space, p))).collect();
            prop_assert_eq!(&walked, &model);
            prop_assert_eq!(set.len(), model.len() as u64);
            let mut copy = PageSet::new();
            for (space, first, words) in set.chunks() { copy.insert_bitmap(space, first, words); }
            prop_assert_eq!(&copy.ranges().collect::<Vec<_>>(), &set.ranges().collect::<Vec<_>>());
            copy.subtract(&set);
            prop_assert!(copy.is_empty());
            let some: PageSet = [PageRange::new(SpaceId(1), 100, 40_000)].into_iter().collect();
            let mut common = set.clone();
            common.intersect(&some);
            let expected: BTreeSet<_> = model.iter().copied()
                .filter(|(space, page)| *space == SpaceId(1) && (100..40_100).contains(page)).collect();
            let found: BTreeSet<_> =
                common.ranges().flat_map(|r| (r.first..r.end()).map(move |p| (r.space, p))).collect();
            prop_assert_eq!(found, expected);
            let mut kept = set.clone();
            kept.retain_spaces(|space| space == SpaceId(1));
            prop_assert_eq!(kept.len(), model.iter().filter(|(space, _)| *space == SpaceId(1)).count() as u64);
            let mut stepped = PageSet::new();
            let (mut space, mut page) = (SpaceId(0), 0);
            while let Some(run) = set.next_run(space, page, 100) {
                prop_assert!(run.count <= 100 && (run.space, run.first) >= (space, page));
                stepped.insert(run);
                (space, page) = (run.space, run.end());
            }
            prop_assert_eq!(stepped.ranges().collect::<Vec<_>>(), set.ranges().collect::<Vec<_>>());
        }
    }
}
