//! What the destination has of each page, as a hash of it ([`crate::keyed_hash`], in its wide form).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use decamp_shared::pages::{PAGE_SIZE, PageRange, SpaceId};

use crate::keyed_hash::{Pair, WideKey};

/// Pages whose hashes lie side by side.
const GROUP: u64 = 256;

/// The hash of one page: both iterations.
pub(super) type Sum = <u128 as Pair>::Hash;

/// Hashes of [`GROUP`] pages, as far as they are known.
#[derive(Clone)]
struct Group([Option<Sum>; GROUP as usize]);

/// Hashes by page.
pub(super) struct Sums {
    key: WideKey,
    groups: Mutex<HashMap<(SpaceId, u64), Box<Group>>>,
}

impl Sums {
    /// Nothing is known yet.
    pub(super) fn new(key: WideKey) -> Self {
        Self { key, groups: Mutex::default() }
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<(SpaceId, u64), Box<Group>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The destination gets these bytes for the pages of `range`.
    pub(super) fn note(&self, range: PageRange, bytes: &[u8]) {
        // Hashed without the lock: others read meanwhile.
        let sums: Vec<Sum> =
            bytes.chunks_exact(PAGE_SIZE).map(|page| self.key.hash(page)).collect();
        let mut groups = self.groups();
        for (page, sum) in (range.first..range.end()).zip(sums) {
            let group = groups
                .entry((range.space, page / GROUP))
                .or_insert_with(|| Box::new(Group([None; GROUP as usize])));
            group.0[(page % GROUP) as usize] = Some(sum);
        }
    }

    /// What the destination has of the pages of `range`; nothing of those that it never got.
    pub(super) fn of(&self, range: PageRange) -> Vec<Option<Sum>> {
        let groups = self.groups();
        let of = |page: u64| groups.get(&(range.space, page / GROUP))?.0[(page % GROUP) as usize];
        (range.first..range.end()).map(of).collect()
    }

    /// Whether a page holds what has this hash.
    pub(super) fn is(&self, page: &[u8], sum: &Sum) -> bool {
        self.key.hash(page) == *sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_last_counts() {
        let sums = Sums::new(WideKey::draw());
        let page = |first| PageRange::new(SpaceId(3), first, 1);
        let (ones, twos) = (vec![1; PAGE_SIZE], vec![2; PAGE_SIZE]);
        assert_eq!(sums.of(PageRange::new(SpaceId(3), 254, 4)), [None; 4]);
        sums.note(PageRange::new(SpaceId(3), 255, 2), &[ones.clone(), twos.clone()].concat());
        assert_eq!(sums.of(page(254)), [None]);
        let found = sums.of(PageRange::new(SpaceId(3), 255, 2));
        let [Some(first), Some(second)] = found[..] else { panic!("both are known") };
        assert!(sums.is(&ones, &first) && !sums.is(&twos, &first));
        assert!(sums.is(&twos, &second));
        sums.note(page(255), &twos);
        assert_eq!(sums.of(page(255)), [Some(second)]);
        assert_eq!(sums.of(PageRange::new(SpaceId(4), 255, 1)), [None], "of another space");
    }
}
