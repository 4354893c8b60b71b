//! The hashes of the pages of a segment that were sent, as sparse as the pages are: a file of a few pages
//! may be as long as memory can be.

use std::collections::BTreeMap;
use std::ops::Range;

/// The hash of a page that was never sent. A page that happens to have it is sent each time.
pub(super) const NEVER: u128 = 0;
/// Pages that are kept together.
const CHUNK: u64 = 64;

/// Hashes by page.
#[derive(Default)]
pub(super) struct Hashes {
    chunks: BTreeMap<u64, Box<[u128; CHUNK as usize]>>,
}

impl Hashes {
    /// Those of pages from `first` on are these.
    pub(super) fn set(&mut self, first: u64, hashes: &[u128]) {
        let mut chunk = None;
        for (page, hash) in (first..).zip(hashes) {
            let (number, _) = place(page);
            let at = match chunk.take() {
                Some((same, at)) if same == number => at,
                _ => self.chunks.entry(number).or_insert_with(|| Box::new([NEVER; CHUNK as usize])),
            };
            at[place(page).1] = *hash;
            chunk = Some((number, at));
        }
    }

    /// Those of `pages`, in order.
    pub(super) fn of(&self, pages: &Range<u64>) -> Vec<u128> {
        let mut found = vec![NEVER; (pages.end - pages.start) as usize];
        for (page, hash) in self.sent(pages) {
            found[(page - pages.start) as usize] = hash;
        }
        found
    }

    /// Those among `pages` that were sent, ascending, with their hashes.
    pub(super) fn sent(&self, pages: &Range<u64>) -> impl Iterator<Item = (u64, u128)> {
        let (pages, chunks) = (pages.clone(), pages.start / CHUNK..pages.end.div_ceil(CHUNK));
        let all = self
            .chunks
            .range(chunks)
            .flat_map(|(number, hashes)| (number * CHUNK..).zip(hashes.iter().copied()));
        all.filter(move |(page, hash)| pages.contains(page) && *hash != NEVER)
    }

    /// One past the last page of which something may be known.
    pub(super) fn end(&self) -> u64 {
        self.chunks.last_key_value().map_or(0, |(number, _)| (number + 1) * CHUNK)
    }
}

fn place(page: u64) -> (u64, usize) {
    (page / CHUNK, (page % CHUNK) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_last_is_known_and_nothing_else() {
        let mut hashes = Hashes::default();
        assert_eq!((hashes.end(), hashes.of(&(3..5))), (0, vec![NEVER, NEVER]));
        let first: Vec<u128> = (1..=200).collect();
        hashes.set(100, &first);
        hashes.set(1 << 34, &[7]);
        hashes.set(150, &[9, 9]);
        assert_eq!(hashes.of(&(98..102)), [NEVER, NEVER, 1, 2]);
        assert_eq!(hashes.of(&(149..153)), [50, 9, 9, 53]);
        assert_eq!(hashes.of(&(299..301)), [200, NEVER]);
        let sent: Vec<_> = hashes.sent(&(298..1 << 40)).collect();
        assert_eq!(sent, [(298, 199), (299, 200), (1 << 34, 7)]);
        assert_eq!(hashes.end(), (1 << 34) + CHUNK);
        assert!(hashes.chunks.len() <= 6);
    }
}
