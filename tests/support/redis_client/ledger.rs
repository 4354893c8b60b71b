//! What was written and acknowledged, and how long nothing was heard.
//! What does not belong here: the connection.

use std::time::{Duration, Instant};

/// Bytes at the head of each value that name its key and version.
pub(super) const VALUE_HEAD: usize = 16;

/// What was written, what was acknowledged, what was silent for how long.
pub(super) struct Ledger {
    seed: u64,
    value_bytes: usize,
    /// Version acknowledged last for each key; 0 is never written.
    pub(super) versions: Vec<u64>,
    pub(super) acknowledged: u64,
    pub(super) ops: u64,
    pub(super) errors: u64,
    pub(super) last_reply: Instant,
    pub(super) longest_gap: Duration,
    pub(super) gap_since_report: Duration,
    pub(super) ops_since_report: u64,
}

impl Ledger {
    /// For keys 0 to `keys`, none of them written yet, with values of `value_bytes` each.
    pub(super) fn new(seed: u64, value_bytes: usize, keys: usize) -> Self {
        Self {
            seed,
            value_bytes,
            versions: vec![0; keys],
            acknowledged: 0,
            ops: 0,
            errors: 0,
            last_reply: Instant::now(),
            longest_gap: Duration::ZERO,
            gap_since_report: Duration::ZERO,
            ops_since_report: 0,
        }
    }

    /// The bytes that a key holds at a version: its key and version, then noise that only these and the seed tell.
    pub(super) fn value(&self, key: usize, version: u64, into: &mut Vec<u8>) {
        into.clear();
        into.extend_from_slice(&(key as u64).to_be_bytes());
        into.extend_from_slice(&version.to_be_bytes());
        let start = Random(self.seed).next()
            ^ Random(key as u64).next().rotate_left(17)
            ^ Random(version).next();
        let mut random = Random(start);
        while into.len() < self.value_bytes {
            into.extend_from_slice(&random.next().to_be_bytes());
        }
        into.truncate(self.value_bytes);
    }

    pub(super) fn acknowledge(&mut self, key: usize, version: u64) {
        self.versions[key] = version;
        self.acknowledged += 1;
    }

    pub(super) fn acknowledged_keys(&self) -> Vec<usize> {
        (0..self.versions.len()).filter(|&key| self.versions[key] > 0).collect()
    }

    /// Notes that a reply came just now.
    pub(super) fn heard(&mut self) {
        let now = Instant::now();
        let gap = now - self.last_reply;
        self.last_reply = now;
        self.longest_gap = self.longest_gap.max(gap);
        self.gap_since_report = self.gap_since_report.max(gap);
    }

    /// Counts and gaps since the last report start again.
    pub(super) fn reported(&mut self) {
        self.gap_since_report = Duration::ZERO;
        self.ops_since_report = 0;
    }
}

/// Says what a value claims to be.
pub(super) fn identify(held: &[u8]) -> String {
    match held.split_first_chunk::<8>() {
        Some((key, rest)) if rest.len() >= 8 => {
            let version = rest.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
            let key = u64::from_be_bytes(*key);
            format!("{} bytes that begin as version {version} of key {key}", held.len())
        }
        _ => format!("{} bytes", held.len()),
    }
}

/// The splitmix64 generator (Steele, Lea, Flood 2014): each state gives one number.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_differ_by_key_version_and_seed() {
        let mut seen = std::collections::HashSet::new();
        for seed in [1, 2] {
            let ledger = Ledger::new(seed, 37, 4);
            for (key, version) in [(0, 1), (0, 2), (1, 1), (1, 2)] {
                let (mut once, mut again) = (Vec::new(), Vec::new());
                ledger.value(key, version, &mut once);
                ledger.value(key, version, &mut again);
                assert_eq!((once.len(), &once), (37, &again));
                assert!(seen.insert(once));
            }
        }
    }
}
