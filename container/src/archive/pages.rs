//! Pages of one process between CRIU's images and the page engine. In an archive all of them are in
//! CRIU's images, whoever copied them, so that any CRIU restores from it; which were ours is noted beside,
//! and when such an archive is restored here, those come as they come in a move.

use std::collections::BTreeMap;
use std::ops::Range;

use decamp_shared::pages::PAGE_SIZE;

use crate::images::{PE_LAZY, PE_PARENT, PE_PRESENT, Pagemap};

type Fault = &'static str;

/// A stretch of a pages image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Page numbers of the process.
    pub(super) pages: Range<u64>,
    /// Whether the page engine copies them.
    pub(super) ours: bool,
}

/// A pagemap image and what its pages image consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Images {
    /// The pagemap image.
    pub(super) pagemap: Vec<u8>,
    /// Number of the pages image.
    pub(super) pages_id: u32,
    /// What is in the pages image of an archive, in its order.
    pub(super) pieces: Vec<Piece>,
}

impl Images {
    /// Enters the pages `hidden` from CRIU into the pagemap image that it wrote.
    pub(super) fn merge(pagemap: &[u8], hidden: &[Range<u64>]) -> Result<Self, Fault> {
        let mut pagemap = Pagemap::parse(pagemap)?;
        pagemap.add_hidden(hidden, PE_LAZY)?;
        let mut pieces = Vec::new();
        for entry in &mut pagemap.entries {
            let ours = entry.flags == Some(PE_LAZY);
            if ours {
                entry.flags = Some(PE_PRESENT);
            }
            if holds_pages(entry.flags, entry.in_parent)? {
                let pages = entry.range().ok_or("has an entry that leaves the address space")?;
                pieces.push(Piece { pages, ours });
            }
        }
        Ok(Self { pagemap: pagemap.to_bytes(), pages_id: pagemap.head.pages_id, pieces })
    }

    /// All the pages that the pagemap image says are in its pages image.
    pub(super) fn all(pagemap: &[u8]) -> Result<Vec<Range<u64>>, Fault> {
        let mut all = Vec::new();
        for entry in Pagemap::parse(pagemap)?.entries {
            if holds_pages(entry.flags, entry.in_parent)? {
                all.push(entry.range().ok_or("has an entry that leaves the address space")?);
            }
        }
        Ok(all)
    }

    /// Takes the pages `hidden` out of the pagemap image of an archive. Each range of them is an entry of
    /// it, as [`Images::hidden`] gave them.
    pub(super) fn split(pagemap: &[u8], hidden: &[Range<u64>]) -> Result<Self, Fault> {
        let mut pagemap = Pagemap::parse(pagemap)?;
        let mut hidden: BTreeMap<u64, u64> =
            hidden.iter().map(|range| (range.start, range.end)).collect();
        let mut pieces = Vec::new();
        let mut kept = Vec::new();
        let mut past = 0;
        for entry in pagemap.entries.drain(..) {
            let pages = entry.range().ok_or("has an entry that leaves the address space")?;
            if pages.start < past {
                return Err("has entries that are out of order");
            }
            past = pages.end;
            let holds = holds_pages(entry.flags, entry.in_parent)?;
            let ours = holds && hidden.get(&pages.start) == Some(&pages.end);
            if ours {
                hidden.remove(&pages.start);
            } else {
                kept.push(entry);
            }
            if holds {
                pieces.push(Piece { pages, ours });
            }
        }
        if !hidden.is_empty() {
            return Err("lacks pages that it should have");
        }
        pagemap.entries = kept;
        Ok(Self { pagemap: pagemap.to_bytes(), pages_id: pagemap.head.pages_id, pieces })
    }

    /// The pages that the page engine copies.
    pub(super) fn hidden(&self) -> Vec<Range<u64>> {
        self.pieces.iter().filter(|piece| piece.ours).map(|piece| piece.pages.clone()).collect()
    }

    /// Bytes of all pieces; nothing when they are more than can be.
    pub(super) fn bytes(&self) -> Option<u64> {
        bytes_of(self.pieces.iter())
    }

    /// Bytes of the pieces that are CRIU's own.
    pub(super) fn own_bytes(&self) -> Option<u64> {
        bytes_of(self.pieces.iter().filter(|piece| !piece.ours))
    }
}

/// Bytes of pieces; nothing when they are more than can be.
fn bytes_of<'a>(mut pieces: impl Iterator<Item = &'a Piece>) -> Option<u64> {
    pieces.try_fold(0u64, |sum, piece| {
        let pages = piece.pages.end - piece.pages.start;
        sum.checked_add(pages.checked_mul(PAGE_SIZE as u64)?)
    })
}

/// Whether the pages of an entry are in the pages image.
fn holds_pages(flags: Option<u32>, in_parent: Option<bool>) -> Result<bool, Fault> {
    let parent = in_parent == Some(true) || flags.is_some_and(|flags| flags & PE_PARENT != 0);
    if parent {
        return Err("has pages in another checkpoint");
    }
    Ok(flags.is_none_or(|flags| flags & PE_PRESENT != 0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::images::{PagemapEntry, PagemapHead};

    fn disjoint(mut cuts: Vec<u64>) -> Vec<Range<u64>> {
        cuts.sort_unstable();
        cuts.dedup();
        cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect()
    }

    proptest! {
        #[test]
        fn what_was_merged_is_split_again(
            theirs in prop::collection::vec(0u64..300, 0..24),
            hidden in prop::collection::vec(0u64..300, 0..24),
        ) {
            let (theirs, hidden) = (disjoint(theirs), disjoint(hidden));
            let entry = |range: &Range<u64>| PagemapEntry::hidden(range, PE_PRESENT);
            let dumped = Pagemap {
                head: PagemapHead { pages_id: 7 },
                entries: theirs.iter().map(entry).collect(),
            };
            let merged = Images::merge(&dumped.to_bytes(), &hidden).expect("sane");
            // Every page once, in ascending order, CRIU's own from CRIU.
            let mut past = 0;
            for piece in &merged.pieces {
                prop_assert!(piece.pages.start >= past && piece.pages.start < piece.pages.end);
                past = piece.pages.end;
                let own = theirs.iter().any(|range| range.contains(&piece.pages.start));
                prop_assert_eq!(piece.ours, !own);
            }
            let pages = |pieces: &[Range<u64>]| -> std::collections::BTreeSet<u64> {
                pieces.iter().cloned().flatten().collect()
            };
            let all: Vec<_> = merged.pieces.iter().map(|piece| piece.pages.clone()).collect();
            prop_assert_eq!(pages(&all), pages(&[theirs.clone(), hidden].concat()));
            let split = Images::split(&merged.pagemap, &merged.hidden()).expect("our own");
            prop_assert_eq!(&split.pieces, &merged.pieces);
            prop_assert_eq!(split.pagemap, dumped.to_bytes());
        }

        #[test]
        fn any_pagemap_is_refused_or_split(
            bytes in prop::collection::vec(any::<u8>(), 0..100),
            hidden in prop::collection::vec(0u64..300, 0..6),
        ) {
            let dumped = Pagemap { head: PagemapHead { pages_id: 1 }, entries: Vec::new() };
            let image = [dumped.to_bytes(), bytes].concat();
            let _ = Images::split(&image, &disjoint(hidden)).map(|images| images.bytes());
        }
    }

    #[test]
    fn pages_that_are_elsewhere_are_refused() {
        let elsewhere = Pagemap {
            head: PagemapHead { pages_id: 1 },
            entries: vec![PagemapEntry::hidden(&(3..5), PE_PARENT)],
        };
        assert!(Images::split(&elsewhere.to_bytes(), &[]).is_err());
        assert!(Images::merge(&elsewhere.to_bytes(), &[]).is_err());
        let one = std::iter::once(3..5).collect::<Vec<_>>();
        let empty = Pagemap { head: PagemapHead { pages_id: 1 }, entries: Vec::new() };
        assert!(Images::split(&empty.to_bytes(), &one).is_err(), "pages that are not there");
    }
}
