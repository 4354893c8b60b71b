//! What a page holds: a header that says which page and version it is, a checksum, and content that
//! follows from seed, page and version alone. So every page can be judged by itself, and what is
//! wrong with it can be named.

use crate::sys::Page;

const HEADER: usize = 4;
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
const MIX: u64 = 0xD6E8_FEB8_6659_FD93;

/// What pages look like to a compressor.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    /// Noise.
    Random,
    /// One word of noise in eight, the rest the same word again and again.
    Compressible,
    /// Odd versions (so the first) are all zero, even ones noise: pages that were sent before turn
    /// to zero and back.
    Zero,
}

/// Makes and judges pages.
pub(crate) struct Pattern {
    seed: u64,
    kind: Kind,
}

/// What is wrong with a page.
pub(crate) struct Fault {
    /// `lost`, `misplaced`, `stale`, `early` or `torn`.
    pub(crate) kind: &'static str,
    /// The version that the page says it has.
    pub(crate) got: u64,
    /// The page that it says it is.
    pub(crate) claims: u64,
}

impl Pattern {
    /// Pages of this kind from this seed.
    pub(crate) fn new(seed: u64, kind: Kind) -> Pattern {
        Pattern { seed, kind }
    }

    /// Writes a version of a page; its checksum.
    pub(crate) fn write(&self, page: &mut Page, number: u64, version: u64) -> u64 {
        if self.is_zero(version) {
            page.fill(0);
            return 0;
        }
        let key = self.key(number, version);
        let mut sum = key;
        for (at, word) in page.iter_mut().enumerate().skip(HEADER) {
            *word = self.word(key, at);
            sum = summed(sum, at, *word);
        }
        page[..HEADER].copy_from_slice(&[number, version, sum, self.seed ^ MIX]);
        sum
    }

    /// Whether a page is exactly this version of itself; its checksum, or what is wrong.
    pub(crate) fn check(&self, page: &Page, number: u64, version: u64) -> Result<u64, Fault> {
        if self.is_zero(version) {
            let bits = page.iter().fold(0, |bits, word| bits | word);
            return if bits == 0 { Ok(0) } else { Err(self.judge(page, number, version)) };
        }
        let key = self.key(number, version);
        let (mut sum, mut differ) = (key, 0);
        for (at, word) in page.iter().enumerate().skip(HEADER) {
            let want = self.word(key, at);
            differ |= want ^ word;
            sum = summed(sum, at, want);
        }
        if differ == 0 && page[..HEADER] == [number, version, sum, self.seed ^ MIX] {
            Ok(sum)
        } else {
            Err(self.judge(page, number, version))
        }
    }

    /// Version 0 is a page that nobody wrote yet.
    fn is_zero(&self, version: u64) -> bool {
        version == 0 || (self.kind == Kind::Zero && version % 2 == 1)
    }

    fn key(&self, number: u64, version: u64) -> u64 {
        mixed(
            mixed(self.seed ^ STEP)
                .wrapping_add(mixed(number.wrapping_mul(STEP) ^ version << 40 ^ version)),
        )
    }

    fn word(&self, key: u64, at: usize) -> u64 {
        if self.kind == Kind::Compressible && !at.is_multiple_of(8) {
            return key;
        }
        let word = key.wrapping_add((at as u64).wrapping_mul(STEP));
        let word = (word ^ word >> 32).wrapping_mul(MIX);
        word ^ word >> 29
    }

    /// Names what is wrong with a page that is not what it should be.
    fn judge(&self, page: &Page, number: u64, version: u64) -> Fault {
        let [claims, got, sum, _] = [page[0], page[1], page[2], page[3]];
        let whole = page
            .iter()
            .enumerate()
            .skip(HEADER)
            .fold(self.key(claims, got), |sum, (at, word)| summed(sum, at, *word))
            == sum;
        let kind = if page.iter().all(|&word| word == 0) {
            "lost"
        } else if !whole {
            "torn"
        } else if claims != number {
            "misplaced"
        } else if got < version {
            "stale"
        } else {
            "early"
        };
        Fault { kind, got, claims }
    }
}

/// The next link of a chain over everything written.
pub(crate) fn link(chain: u64, number: u64, version: u64, sum: u64) -> u64 {
    mixed(chain.rotate_left(5) ^ sum.wrapping_add(number.wrapping_mul(STEP)).wrapping_add(version))
}

/// Scrambles a word, one to one.
pub(crate) fn mixed(word: u64) -> u64 {
    let word = (word ^ word >> 32).wrapping_mul(MIX);
    let word = (word ^ word >> 32).wrapping_mul(MIX);
    word ^ word >> 32
}

/// Depends on the place of each word, and not on the sum before it: this runs at memory speed.
fn summed(sum: u64, at: usize, word: u64) -> u64 {
    sum.wrapping_add(word.wrapping_mul(2 * at as u64 + 1))
}
