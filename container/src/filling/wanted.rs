//! What of one part of the store is still wanted, and by how many.
//!
//! Pure arithmetic on ranges of offsets, of which there may be many and long ones: nothing here grows with
//! their length.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint ranges, each wanted by as many as it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// By start: the end, and how many want it. No count is zero.
    pieces: BTreeMap<u64, (u64, u64)>,
}

impl Wanted {
    /// One more wants all of `range`.
    pub(super) fn add(&mut self, range: &Range<u64>) {
        self.split(range);
        let mut at = range.start;
        let mut gaps = Vec::new();
        for (start, (end, count)) in self.pieces.range_mut(range.clone()) {
            *count += 1;
            gaps.push(at..*start);
            at = *end;
        }
        gaps.push(at..range.end);
        for gap in gaps.into_iter().filter(|gap| !gap.is_empty()) {
            self.pieces.insert(gap.start, (gap.end, 1));
        }
    }

    /// One of those that want all of `range` does not any more.
    pub(super) fn remove(&mut self, range: &Range<u64>) {
        self.split(range);
        let mut nobodys = Vec::new();
        for (start, (_, count)) in self.pieces.range_mut(range.clone()) {
            *count -= 1;
            if *count == 0 {
                nobodys.push(*start);
            }
        }
        for start in nobodys {
            self.pieces.remove(&start);
        }
    }

    /// What of `range` nobody wants, ascending.
    pub(super) fn nobodys(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let before = self.pieces.range(..range.start).next_back();
        let mut at = before.map_or(range.start, |(_, (end, _))| range.start.max(*end));
        let mut gaps = Vec::new();
        for (start, (end, _)) in self.pieces.range(at..range.end.max(at)) {
            gaps.push(at..*start);
            at = *end;
        }
        gaps.push(at..range.end);
        gaps.retain(|gap| !gap.is_empty());
        gaps
    }

    /// No piece lies across the ends of `range`.
    fn split(&mut self, range: &Range<u64>) {
        for at in [range.start, range.end] {
            if let Some((_, piece)) = self.pieces.range_mut(..at).next_back()
                && piece.0 > at
            {
                let rest = *piece;
                piece.0 = at;
                self.pieces.insert(at, rest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_count_of_each_offset(
            ranges in prop::collection::vec((0u64..60, 0u64..20), 0..20),
            looks in prop::collection::vec((0u64..80, 0u64..40), 1..5),
        ) {
            let ranges: Vec<_> = ranges.iter().map(|(start, count)| *start..start + count).collect();
            let mut wanted = Wanted::default();
            let mut model = [0u64; 120];
            let check = |wanted: &Wanted, model: &[u64; 120]| {
                for (start, count) in &looks {
                    let told: Vec<u64> =
                        wanted.nobodys(&(*start..start + count)).into_iter().flatten().collect();
                    let expected: Vec<u64> =
                        (*start..start + count).filter(|at| model[*at as usize] == 0).collect();
                    prop_assert_eq!(told, expected);
                }
                Ok(())
            };
            for range in &ranges {
                wanted.add(range);
                range.clone().for_each(|at| model[at as usize] += 1);
                check(&wanted, &model)?;
            }
            for range in &ranges {
                wanted.remove(range);
                range.clone().for_each(|at| model[at as usize] -= 1);
                check(&wanted, &model)?;
            }
            prop_assert_eq!(wanted, Wanted::default());
        }
    }
}
