//! The hash by which pages are compared with what was sent of them.
//!
//! A page whose hash is the same is not sent, so two contents with one hash would be lost memory. Contents
//! come from whoever talks to the workload: with a hash for which anybody can work out collisions, a client
//! of a database could spoil a page of it. So the hash has a key, drawn for each move and told to nobody,
//! and is one whose collisions are proved to be rare whatever the contents: NH in two Toeplitz iterations
//! (Black, Halevi, Krawczyk, Krovetz, Rogaway: "UMAC", CRYPTO 1999). No output of it leaves this process, so
//! nobody learns anything of the key. It is several times as fast as BLAKE3.
//!
//! There are two widths. With words of 64 bits ([`WideKey`]) two pages that differ have the same hash under
//! one in 2^128 keys, and it is no slower than reading another process's memory, all of which is read in the
//! stop. With words of 32 bits ([`NarrowKey`]) it is under one in 2^64 keys: a processor multiplies several
//! of those at once, so that this costs no more than reading shared memory, which is mapped here.

use decamp_shared::pages::PAGE_SIZE;

/// A key for words of 64 bits.
pub(crate) type WideKey = Key<u128>;
/// A key for words of 32 bits.
pub(crate) type NarrowKey = Key<u64>;

/// Two words side by side, the first in the lower half: those that are multiplied.
pub(crate) trait Pair: Copy {
    /// What the products of words are summed up in.
    type Sum: Copy;
    /// The sums of both iterations.
    type Hash;
    /// Of nothing.
    const ZERO: Self::Sum;

    /// A random one.
    fn draw() -> Self;
    /// Those of a page, in order.
    fn of(page: &[u8]) -> impl Iterator<Item = Self>;
    /// `sum`, and the product of both words, each with its word of the key added.
    fn add(self, key: Self, sum: Self::Sum) -> Self::Sum;
    /// Both iterations.
    fn both(first: Self::Sum, second: Self::Sum) -> Self::Hash;
}

/// A key, as long as a page and a pair: the second iteration uses it from one pair further on.
pub(crate) struct Key<P>(Box<[P]>);

impl<P: Pair> Key<P> {
    /// A fresh one.
    pub(crate) fn draw() -> Self {
        Self((0..pairs::<P>() + 1).map(|_| P::draw()).collect())
    }

    /// The hash of a page: the sum of products of pairs of words, twice.
    pub(crate) fn hash(&self, page: &[u8]) -> P::Hash {
        let (mut first, mut second) = (P::ZERO, P::ZERO);
        for ((pair, key), further) in P::of(page).zip(&self.0).zip(&self.0[1..]) {
            first = pair.add(*key, first);
            second = pair.add(*further, second);
        }
        P::both(first, second)
    }
}

/// How many of them are in a page.
const fn pairs<P>() -> usize {
    PAGE_SIZE / size_of::<P>()
}

impl Pair for u128 {
    type Sum = u128;
    type Hash = [u128; 2];
    const ZERO: u128 = 0;

    fn draw() -> Self {
        rand::random()
    }

    fn of(page: &[u8]) -> impl Iterator<Item = Self> {
        page.as_chunks::<16>().0.iter().map(|pair| u128::from_le_bytes(*pair))
    }

    fn add(self, key: Self, sum: u128) -> u128 {
        let low = (self as u64).wrapping_add(key as u64);
        let high = ((self >> 64) as u64).wrapping_add((key >> 64) as u64);
        sum.wrapping_add(u128::from(low) * u128::from(high))
    }

    fn both(first: u128, second: u128) -> [u128; 2] {
        [first, second]
    }
}

impl Pair for u64 {
    type Sum = u64;
    type Hash = u128;
    const ZERO: u64 = 0;

    fn draw() -> Self {
        rand::random()
    }

    fn of(page: &[u8]) -> impl Iterator<Item = Self> {
        page.as_chunks::<8>().0.iter().map(|pair| u64::from_le_bytes(*pair))
    }

    fn add(self, key: Self, sum: u64) -> u64 {
        let low = (self as u32).wrapping_add(key as u32);
        let high = ((self >> 32) as u32).wrapping_add((key >> 32) as u32);
        sum.wrapping_add(u64::from(low) * u64::from(high))
    }

    /// Side by side.
    fn both(first: u64, second: u64) -> u128 {
        u128::from(first) << 64 | u128::from(second)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Words of 64 bits in a page.
    const WORDS: usize = PAGE_SIZE / 8;

    /// Keys of consecutive numbers from one on.
    fn plain_wide() -> WideKey {
        Key((0..=pairs::<u128>() as u128).map(|at| (2 * at + 2) << 64 | (2 * at + 1)).collect())
    }

    fn plain_narrow() -> NarrowKey {
        Key((0..=pairs::<u64>() as u64).map(|at| (2 * at + 2) << 32 | (2 * at + 1)).collect())
    }

    #[test]
    fn the_wide_hash_is_the_one_of_the_paper() {
        let mut page = vec![0; PAGE_SIZE];
        // Of nothing but zeros: the products of the key's own words.
        let products =
            |from: u128| (0..256).map(|i| (from + 2 * i) * (from + 2 * i + 1)).sum::<u128>();
        assert_eq!(plain_wide().hash(&page), [products(1), products(3)]);
        page[8..16].copy_from_slice(&100u64.to_le_bytes());
        page[PAGE_SIZE - 16..PAGE_SIZE - 8].copy_from_slice(&u64::MAX.to_le_bytes());
        // 1 * (2 + 100), and (511 - 1) * 512; two further on, 3 * (4 + 100), and (513 - 1) * 514.
        let expected = [products(1) + 100 - 512, products(3) + 300 - 514];
        assert_eq!(plain_wide().hash(&page), expected);
    }

    #[test]
    fn the_narrow_hash_is_the_one_of_the_paper() {
        let products = |from: u64| -> u64 {
            (0..WORDS as u64).map(|at| (from + 2 * at) * (from + 2 * at + 1)).sum()
        };
        let both = |first: u64, second: u64| u128::from(first) << 64 | u128::from(second);
        let mut page = vec![0; PAGE_SIZE];
        assert_eq!(plain_narrow().hash(&page), both(products(1), products(3)));
        // 1 * (2 + 100), and 3 * (4 + 100).
        page[4..8].copy_from_slice(&100u32.to_le_bytes());
        assert_eq!(plain_narrow().hash(&page), both(products(1) + 100, products(3) + 300));
    }

    fn differs<P: Pair<Hash: PartialEq + std::fmt::Debug>>(
        bytes: &[u8],
        other: &[u8],
        copy: &[u8],
    ) -> Result<(), TestCaseError> {
        let key = Key::<P>::draw();
        prop_assert_eq!(key.hash(bytes), key.hash(copy));
        prop_assert_ne!(key.hash(bytes), key.hash(other));
        prop_assert_ne!(key.hash(bytes), Key::<P>::draw().hash(bytes), "the key counts");
        Ok(())
    }

    /// The signs of two numbers: hashes that only add products of whole words may not see that.
    fn sees_two_highest_bits<P: Pair<Hash: PartialEq + std::fmt::Debug>>(
        one: usize,
        apart: usize,
    ) -> Result<(), TestCaseError> {
        let key = Key::<P>::draw();
        let page = vec![0; PAGE_SIZE];
        let mut other = page.clone();
        other[one * 8 + 7] ^= 0x80;
        other[(one + apart) % WORDS * 8 + 7] ^= 0x80;
        prop_assert_ne!(key.hash(&page), key.hash(&other));
        Ok(())
    }

    proptest! {
        #[test]
        fn a_page_that_differs_anywhere_differs(
            bytes in prop::collection::vec(any::<u8>(), PAGE_SIZE),
            at in 0..PAGE_SIZE,
            by in 1u8..,
        ) {
            let mut other = bytes.clone();
            other[at] = other[at].wrapping_add(by);
            differs::<u128>(&bytes, &other, &bytes.clone())?;
            differs::<u64>(&bytes, &other, &bytes.clone())?;
        }

        #[test]
        fn words_in_another_order_differ(words in prop::collection::vec(any::<u64>(), WORDS), by in 1..WORDS) {
            let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
            let mut turned = words.clone();
            turned.rotate_left(by);
            let (ones, others) = (bytes(&words), bytes(&turned));
            let (wide, narrow) = (WideKey::draw(), NarrowKey::draw());
            prop_assert_eq!(words == turned, wide.hash(&ones) == wide.hash(&others));
            prop_assert_eq!(words == turned, narrow.hash(&ones) == narrow.hash(&others));
        }

        #[test]
        fn two_highest_bits_are_seen(one in 0..WORDS, apart in 1..WORDS) {
            sees_two_highest_bits::<u128>(one, apart)?;
            sees_two_highest_bits::<u64>(one, apart)?;
        }
    }
}
