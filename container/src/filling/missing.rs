//! Which memory of a process has not arrived yet, and where it lies in the store.
//!
//! Pure arithmetic on address ranges: what tasks do to their memory meanwhile is told to it.

use std::collections::BTreeMap;
use std::ops::Range;

use decamp_shared::pages::PAGE_SIZE;

use crate::forked::Alias;

const PAGE: u64 = PAGE_SIZE as u64;

/// Memory that has still to come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Missing {
    /// By first address.
    pieces: BTreeMap<u64, Piece>,
    pages: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    length: u64,
    /// Whose part of the store it is in: a process's number in the container.
    of: i32,
    /// Where it begins there. The address, unless the task has moved it.
    offset: u64,
}

/// Somewhere in the store: whose part of it, and offsets there.
pub(super) type Place = (i32, Range<u64>);

/// A range of addresses and where its contents are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) addresses: Range<u64>,
    pub(super) of: i32,
    pub(super) offset: u64,
}

impl Piece {
    /// What is left of one that begins at `start` without its first `skip` bytes.
    fn span(&self, start: u64, skip: u64) -> Span {
        let addresses = start + skip..start + self.length;
        Span { addresses, of: self.of, offset: self.offset + skip }
    }

    fn place(&self) -> Place {
        (self.of, self.offset..self.offset + self.length)
    }
}

impl Span {
    /// Length in bytes.
    pub(super) fn length(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }
}

impl Missing {
    /// These pages (ascending), each at the offset of its address.
    pub(super) fn of_pages(ranges: &[Alias]) -> Self {
        let mut missing = Self::default();
        for Alias { pages, of } in ranges {
            let start = pages.start * PAGE;
            let length = (pages.end - pages.start) * PAGE;
            missing.put(start, Piece { length, of: *of, offset: start });
        }
        missing
    }

    /// All of it, by address.
    pub(super) fn places(&self) -> impl Iterator<Item = Place> {
        self.pieces.values().map(Piece::place)
    }

    /// How many pages have still to come.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// The first of it at or after `from`, at most `most` bytes and not across a multiple of `most` in
    /// the store; or else the first of all.
    pub(super) fn next(&self, from: u64, most: u64) -> Option<Span> {
        let after = self.at(from).or_else(|| {
            let (start, piece) = self.pieces.range(from..).next()?;
            Some(piece.span(*start, 0))
        });
        let span = after.or_else(|| {
            let (start, piece) = self.pieces.first_key_value()?;
            Some(piece.span(*start, 0))
        })?;
        let room = most - span.offset % most;
        let length = span.length().min(room);
        Some(Span { addresses: span.addresses.start..span.addresses.start + length, ..span })
    }

    /// The first of it in `addresses`, and no more than lies in them.
    pub(super) fn first_in(&self, addresses: &Range<u64>) -> Option<Span> {
        let span = self.at(addresses.start).or_else(|| {
            let (start, piece) = self.pieces.range(addresses.clone()).next()?;
            Some(piece.span(*start, 0))
        })?;
        let end = span.addresses.end.min(addresses.end);
        let addresses = span.addresses.start..end;
        (!addresses.is_empty()).then_some(Span { addresses, ..span })
    }

    /// What has still to come from `address` on, without a gap.
    pub(super) fn at(&self, address: u64) -> Option<Span> {
        let (start, piece) = self.pieces.range(..=address).next_back()?;
        let skip = address - start;
        (skip < piece.length).then(|| piece.span(*start, skip))
    }

    /// These addresses have come, or are not wanted any more. Gives where they were in the store.
    #[must_use]
    pub(super) fn remove(&mut self, addresses: &Range<u64>) -> Vec<Place> {
        self.cut(addresses).iter().map(|(_, piece)| piece.place()).collect()
    }

    /// The task moved `length` bytes `from` one address `to` another, and what was there is gone: gives
    /// where that was in the store.
    #[must_use]
    pub(super) fn moved(&mut self, from: u64, to: u64, length: u64) -> Vec<Place> {
        let (Some(from_end), Some(to_end)) = (from.checked_add(length), to.checked_add(length))
        else {
            return Vec::new();
        };
        let cut = self.cut(&(from..from_end));
        let gone = self.remove(&(to..to_end));
        for (start, piece) in cut {
            self.put(start - from + to, piece);
        }
        gone
    }

    fn put(&mut self, start: u64, piece: Piece) {
        if piece.length > 0 {
            self.pages += piece.length / PAGE;
            self.pieces.insert(start, piece);
        }
    }

    /// Takes out what lies in `addresses`, and gives it.
    fn cut(&mut self, addresses: &Range<u64>) -> Vec<(u64, Piece)> {
        let before = self.pieces.range(..addresses.start).next_back().map(|(start, _)| *start);
        let first = before.unwrap_or(addresses.start);
        let touched: Vec<u64> = self
            .pieces
            .range(first..addresses.end.max(first))
            .filter(|(start, piece)| {
                **start < addresses.end && *start + piece.length > addresses.start
            })
            .map(|(start, _)| *start)
            .collect();
        let mut cut = Vec::new();
        for start in touched {
            let Some(piece) = self.pieces.remove(&start) else { continue };
            self.pages -= piece.length / PAGE;
            let end = start + piece.length;
            let (from, to) = (start.max(addresses.start), end.min(addresses.end));
            let part = |from: u64, to: u64| Piece {
                length: to - from,
                offset: piece.offset + (from - start),
                ..piece
            };
            self.put(start, part(start, from));
            self.put(to, part(to, end));
            cut.push((from, part(from, to)));
        }
        cut
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// One thing that happens to memory.
    #[derive(Clone, Debug)]
    enum Step {
        Remove(u64, u64),
        Move(u64, u64, u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0u64..100, 0u64..30).prop_map(|(first, count)| Step::Remove(first, count)),
            (0u64..100, 0u64..100, 1u64..30)
                // The kernel moves nothing onto itself.
                .prop_filter("apart", |(from, to, count)| from.abs_diff(*to) >= *count)
                .prop_map(|(from, to, count)| Step::Move(from, to, count)),
        ];
        prop::collection::vec(step, 0..20)
    }

    proptest! {
        #[test]
        fn behaves_as_a_map_from_pages_to_places(
            cuts in prop::collection::btree_set(0u64..100, 0..20),
            steps in steps(),
            from in 0u64..140,
            most in 1u64..9,
        ) {
            let cuts: Vec<u64> = cuts.into_iter().collect();
            let ranges: Vec<Alias> = cuts.chunks_exact(2)
                .map(|pair| Alias { pages: pair[0]..pair[1], of: (pair[0] % 3) as i32 })
                .collect();
            let mut missing = Missing::of_pages(&ranges);
            let mut model: BTreeMap<u64, (i32, u64)> = ranges.iter()
                .flat_map(|one| one.pages.clone().map(|page| (page, (one.of, page))))
                .collect();
            let mut gone = Vec::new();
            let all: BTreeSet<_> = model.values().copied().collect();
            for step in steps {
                match step {
                    Step::Remove(first, count) => {
                        gone.extend(missing.remove(&(first * PAGE..(first + count) * PAGE)));
                        model.retain(|page, _| !(first..first + count).contains(page));
                    }
                    Step::Move(from, to, count) => {
                        gone.extend(missing.moved(from * PAGE, to * PAGE, count * PAGE));
                        let held: Vec<_> = model.range(from..from + count).map(|(page, place)| (*page, *place)).collect();
                        model.retain(|page, _| {
                            !(from..from + count).contains(page) && !(to..to + count).contains(page)
                        });
                        model.extend(held.into_iter().map(|(page, place)| (page - from + to, place)));
                    }
                }
                prop_assert_eq!(missing.pages(), model.len() as u64);
            }
            for page in 0..160 {
                let found = missing.at(page * PAGE).map(|span| (span.of, span.offset / PAGE));
                prop_assert_eq!(found, model.get(&page).copied());
            }
            // Each page of the store is told once: it is gone, or has still to come.
            let told: Vec<_> = gone.into_iter().chain(missing.places())
                .flat_map(|(of, at)| (at.start / PAGE..at.end / PAGE).map(move |page| (of, page)))
                .collect();
            prop_assert_eq!(told.len(), all.len());
            prop_assert_eq!(told.into_iter().collect::<BTreeSet<_>>(), all);
            // And so it is when only a part is looked at.
            let part = from * PAGE..(from + 40) * PAGE;
            let (mut at, mut found) = (part.start, BTreeMap::new());
            while let Some(span) = missing.first_in(&(at..part.end)) {
                prop_assert!(part.contains(&span.addresses.start) && span.addresses.end <= part.end);
                for index in 0..span.length() / PAGE {
                    found.insert(span.addresses.start / PAGE + index, (span.of, span.offset / PAGE + index));
                }
                at = span.addresses.end;
            }
            let expected: BTreeMap<_, _> =
                model.range(from..from + 40).map(|(page, place)| (*page, *place)).collect();
            prop_assert_eq!(found, expected);
            // Walked on from anywhere, it is all found.
            let mut at = from * PAGE;
            let mut walked = BTreeMap::new();
            while let Some(span) = missing.next(at, most * PAGE) {
                prop_assert!(span.length() > 0 && span.length() <= most * PAGE);
                for index in 0..span.length() / PAGE {
                    let place = (span.of, span.offset / PAGE + index);
                    walked.insert(span.addresses.start / PAGE + index, place);
                }
                at = span.addresses.end;
                let come = missing.remove(&span.addresses);
                prop_assert_eq!(come, vec![(span.of, span.offset..span.offset + span.length())]);
            }
            prop_assert_eq!(walked, model);
            prop_assert_eq!(missing.pages(), 0);
        }
    }
}
