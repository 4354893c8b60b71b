//! The hash by which pages of shared memory are compared with what was sent of them.
//!
//! Two contents with one hash would be lost memory, and contents come from whoever talks to the workload. So
//! the hash has a key, drawn for each move and told to nobody, and its collisions are proved to be rare
//! whatever the contents: NH in two Toeplitz iterations over words of 32 bits (Black, Halevi, Krawczyk,
//! Krovetz, Rogaway: "UMAC", CRYPTO 1999). Two pages that differ have the same hash under one in 2^64 keys.
//! Words are half as long as those of `comparing::sums`, and the promise is: a processor multiplies several of
//! them at once, so that this costs no more than reading the memory, which stands still for it.

use decamp_shared::pages::PAGE_SIZE;

/// Words of 64 bits in a page; each is a pair of those that are multiplied.
const PAIRS: usize = PAGE_SIZE / 8;

/// A key, as long as a page and a pair: the second iteration uses it from one pair further on.
pub(super) struct Key([u64; PAIRS + 1]);

impl Key {
    /// A fresh one.
    pub(super) fn draw() -> Self {
        Self(rand::random())
    }

    /// The hash of a page: both iterations, side by side.
    pub(super) fn hash(&self, page: &[u8]) -> u128 {
        let (mut first, mut second) = (0u64, 0u64);
        let pairs = page.as_chunks::<8>().0.iter();
        for ((pair, key), further) in pairs.zip(&self.0).zip(&self.0[1..]) {
            let pair = u64::from_le_bytes(*pair);
            first = first.wrapping_add(product(pair, *key));
            second = second.wrapping_add(product(pair, *further));
        }
        u128::from(first) << 64 | u128::from(second)
    }
}

/// Both halves of a pair, each with its half of the key added, multiplied.
fn product(pair: u64, key: u64) -> u64 {
    let low = (pair as u32).wrapping_add(key as u32);
    let high = ((pair >> 32) as u32).wrapping_add((key >> 32) as u32);
    u64::from(low) * u64::from(high)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_hash_is_the_one_of_the_paper() {
        let mut words = [0; PAIRS + 1];
        (0u64..).zip(&mut words).for_each(|(at, word)| *word = (2 * at + 2) << 32 | (2 * at + 1));
        let key = Key(words);
        let products = |from: u64| -> u64 {
            (0..PAIRS as u64).map(|at| (from + 2 * at) * (from + 2 * at + 1)).sum()
        };
        let both = |first: u64, second: u64| u128::from(first) << 64 | u128::from(second);
        let mut page = vec![0; PAGE_SIZE];
        assert_eq!(key.hash(&page), both(products(1), products(3)));
        // 1 * (2 + 100), and 3 * (4 + 100).
        page[4..8].copy_from_slice(&100u32.to_le_bytes());
        assert_eq!(key.hash(&page), both(products(1) + 100, products(3) + 300));
    }

    proptest! {
        #[test]
        fn a_page_that_differs_anywhere_differs(
            bytes in prop::collection::vec(any::<u8>(), PAGE_SIZE),
            at in 0..PAGE_SIZE,
            by in 1u8..,
        ) {
            let key = Key::draw();
            let mut other = bytes.clone();
            other[at] = other[at].wrapping_add(by);
            prop_assert_eq!(key.hash(&bytes), key.hash(&bytes.clone()));
            prop_assert_ne!(key.hash(&bytes), key.hash(&other));
            prop_assert_ne!(key.hash(&bytes), Key::draw().hash(&bytes), "the key counts");
        }

        /// The signs of two numbers: hashes that only add products of whole words may not see that.
        #[test]
        fn two_highest_bits_are_seen(one in 0..PAIRS, apart in 1..PAIRS) {
            let key = Key::draw();
            let page = vec![0; PAGE_SIZE];
            let mut other = page.clone();
            other[one * 8 + 7] ^= 0x80;
            other[(one + apart) % PAIRS * 8 + 7] ^= 0x80;
            prop_assert_ne!(key.hash(&page), key.hash(&other));
        }
    }
}
