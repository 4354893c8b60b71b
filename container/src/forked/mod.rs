//! Pages that forked processes still share: nobody has written to them since the fork, and so the kernel
//! keeps one copy for all (copy on write). They travel once. What a process shares with another one is not
//! sent for it ([`unsent`]); a section of the state tells the destination whose pages they are instead.
//! Where that matters CRIU restores them shared again ([`sharing`]), else each process gets a copy of its
//! own from the pages of that one process in the store.
//!
//! The section comes from another host: it is checked against the list of hidden pages before it is used.

pub(crate) mod arriving;
pub(crate) mod leaving;
pub(crate) mod places;
pub(crate) mod sharing;
pub(crate) mod unsent;

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use decamp_shared::workload::Section;

use crate::error::{ContainerError, Result};
use crate::hiding::visible;
use crate::images::HiddenPages;
use crate::pagemap::append;

/// The section that says whose pages were not sent for themselves.
pub(crate) const FORKED: &str = "container/forked";
/// The section that says how long sharing them again may take.
pub(crate) const SPARE: &str = "container/spare";
const VERSION: u32 = 1;
/// Bytes of one range in the section: two page numbers and a process.
const RANGE: usize = 20;

/// Pages of one process that are those of another one, at the same addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Alias {
    /// Page numbers.
    pub(crate) pages: Range<u64>,
    /// The process that they were sent for, by its number in the container.
    pub(crate) of: i32,
}

impl Alias {
    pub(crate) fn count(&self) -> u64 {
        self.pages.end - self.pages.start
    }
}

/// Ascending, disjoint, by the process that they were not sent for.
pub(crate) type Aliases = BTreeMap<i32, Vec<Alias>>;

/// How many pages were not sent.
pub(crate) fn count(aliases: &Aliases) -> u64 {
    aliases.values().flatten().map(Alias::count).sum()
}

/// What of `aliases` lies in none of the pages `left`: what is left to be counted against limits of memory, among
/// which huge pages do not count.
pub(crate) fn outside(aliases: &Aliases, left: &HiddenPages) -> Aliases {
    let of = |inner: &i32, ranges: &[Alias]| -> Vec<Alias> {
        let left = left.get(inner).map_or(&[][..], Vec::as_slice);
        let parts = |alias: &Alias| {
            let of = alias.of;
            visible(&alias.pages, left).into_iter().map(move |pages| Alias { pages, of })
        };
        ranges.iter().flat_map(parts).collect()
    };
    let parts = aliases.iter().map(|(inner, ranges)| (*inner, of(inner, ranges)));
    parts.filter(|(_, ranges)| !ranges.is_empty()).collect()
}

/// The aliases as a section; none where there are none, so that a destination that knows nothing of them
/// takes such a container as ever.
pub(crate) fn section(aliases: &Aliases) -> Option<Section> {
    if aliases.is_empty() {
        return None;
    }
    let mut bytes = (aliases.len() as u32).to_le_bytes().to_vec();
    for (inner, ranges) in aliases {
        bytes.extend_from_slice(&inner.to_le_bytes());
        bytes.extend_from_slice(&(ranges.len() as u64).to_le_bytes());
        for alias in ranges {
            bytes.extend_from_slice(&alias.pages.start.to_le_bytes());
            bytes.extend_from_slice(&alias.pages.end.to_le_bytes());
            bytes.extend_from_slice(&alias.of.to_le_bytes());
        }
    }
    Some(Section { kind: FORKED.to_owned(), version: VERSION, bytes })
}

/// Reads what [`section`] wrote, of a container whose hidden pages are `hidden`: aliases are hidden pages
/// of both processes, and were sent for the one that they are of.
pub(crate) fn read_section(section: &Section, hidden: &HiddenPages) -> Result<Aliases> {
    let bad = |what: &str| ContainerError::section(FORKED, what);
    if section.version != VERSION {
        return Err(bad("has a version that this build does not know"));
    }
    let short = || bad("is cut short");
    let mut rest = &section.bytes[..];
    let processes = take::<4>(&mut rest).map(u32::from_le_bytes).ok_or_else(short)?;
    let mut found = Aliases::new();
    for _ in 0..processes {
        let inner = take::<4>(&mut rest).map(i32::from_le_bytes).ok_or_else(short)?;
        let count = take::<8>(&mut rest).map(u64::from_le_bytes).ok_or_else(short)?;
        if count > (rest.len() / RANGE) as u64 {
            return Err(short());
        }
        let mut ranges: Vec<Alias> = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let mut number = || take::<8>(&mut rest).map(u64::from_le_bytes).ok_or_else(short);
            let pages = number()?..number()?;
            let of = take::<4>(&mut rest).map(i32::from_le_bytes).ok_or_else(short)?;
            let after_last = ranges.last().is_none_or(|last| last.pages.end <= pages.start);
            if pages.start >= pages.end || !after_last {
                return Err(bad("has ranges that are out of order"));
            }
            ranges.push(Alias { pages, of });
        }
        if found.insert(inner, ranges).is_some() {
            return Err(bad("names a process twice"));
        }
    }
    if !rest.is_empty() {
        return Err(bad("is longer than it says"));
    }
    check(&found, hidden)?;
    Ok(found)
}

/// So much of the stop is left for sharing pages again, as a section: microseconds.
pub(crate) fn spare_section(time: Duration) -> Section {
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    Section { kind: SPARE.to_owned(), version: VERSION, bytes: micros.to_le_bytes().to_vec() }
}

/// Reads what [`spare_section`] wrote.
pub(crate) fn read_spare(section: &Section) -> Result<Duration> {
    let micros = <[u8; 8]>::try_from(&section.bytes[..]).map(u64::from_le_bytes);
    match micros.ok().filter(|_| section.version == VERSION) {
        Some(micros) => Ok(Duration::from_micros(micros)),
        None => Err(ContainerError::section(SPARE, "makes no sense")),
    }
}

fn check(aliases: &Aliases, hidden: &HiddenPages) -> Result<()> {
    let bad = |what: &str| Err(ContainerError::section(FORKED, what));
    let joined: BTreeMap<i32, Vec<Range<u64>>> =
        hidden.iter().map(|(inner, ranges)| (*inner, join(ranges.iter().cloned()))).collect();
    let has = |inner: i32, pages: &Range<u64>| {
        joined.get(&inner).is_some_and(|ranges| covers(ranges, pages))
    };
    for (inner, ranges) in aliases {
        for Alias { pages, of } in ranges {
            if !has(*inner, pages) || !has(*of, pages) {
                return bad("speaks of pages that are not hidden");
            }
            let unsent = aliases.get(of).is_some_and(|others| {
                let at = others.partition_point(|other| other.pages.end <= pages.start);
                others.get(at).is_some_and(|other| other.pages.start < pages.end)
            });
            if inner == of || unsent {
                return bad("names pages that were not sent as those of others");
            }
        }
    }
    Ok(())
}

/// Ascending ranges, joined where they touch.
pub(crate) fn join(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut joined = Vec::new();
    ranges.for_each(|range| append(&mut joined, range));
    joined
}

/// Whether one of these ranges (ascending, disjoint, joined) has all of `pages`.
pub(crate) fn covers(ranges: &[Range<u64>], pages: &Range<u64>) -> bool {
    let at = ranges.partition_point(|range| range.end <= pages.start);
    ranges.get(at).is_some_and(|range| range.start <= pages.start && pages.end <= range.end)
}

/// What of `pages` (ascending) is no alias, with the process itself, and the rest with the process that it
/// is of; ascending.
pub(crate) fn owners(inner: i32, pages: &[Range<u64>], aliases: &[Alias]) -> Vec<Alias> {
    let mut found = Vec::new();
    let mut at = 0;
    for range in pages {
        let mut from = range.start;
        while from < range.end {
            while aliases.get(at).is_some_and(|alias| alias.pages.end <= from) {
                at += 1;
            }
            let (end, of) = match aliases.get(at) {
                Some(alias) if alias.pages.start <= from => (alias.pages.end, alias.of),
                Some(alias) => (alias.pages.start, inner),
                None => (range.end, inner),
            };
            let end = end.min(range.end);
            found.push(Alias { pages: from..end, of });
            from = end;
        }
    }
    found
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, left) = rest.split_first_chunk::<N>()?;
    *rest = left;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn alias(pages: Range<u64>, of: i32) -> Alias {
        Alias { pages, of }
    }

    fn hidden() -> HiddenPages {
        let only = |range| std::iter::once(range).collect();
        HiddenPages::from([(1, vec![0..50, 50..100]), (2, only(10..90)), (3, only(20..30))])
    }

    #[test]
    fn a_section_says_what_it_was_written_from() {
        let aliases = Aliases::from([
            (2, vec![alias(10..20, 1), alias(40..60, 1)]),
            (3, vec![alias(20..25, 2), alias(25..30, 1)]),
        ]);
        let written = section(&aliases).expect("there are some");
        assert_eq!(read_section(&written, &hidden()).expect("our own"), aliases);
        assert_eq!(count(&aliases), 40);
        assert_eq!(section(&Aliases::new()), None);
    }

    #[test]
    fn pages_that_do_not_count_are_left_out() {
        let aliases = Aliases::from([
            (2, vec![alias(10..20, 1), alias(40..60, 1)]),
            (3, vec![alias(20..25, 2)]),
        ]);
        let left = HiddenPages::from([(2, vec![12..14, 50..70]), (3, vec![0..9, 9..25])]);
        let expected =
            Aliases::from([(2, vec![alias(10..12, 1), alias(14..20, 1), alias(40..50, 1)])]);
        assert_eq!(outside(&aliases, &left), expected);
        assert_eq!(outside(&aliases, &HiddenPages::new()), aliases);
    }

    #[test]
    fn what_is_left_of_the_stop_comes_back() {
        let time = Duration::from_micros(70_123);
        let written = spare_section(time);
        assert_eq!(read_spare(&written).expect("our own"), time);
        assert!(read_spare(&Section { version: 2, ..written.clone() }).is_err());
        assert!(read_spare(&Section { bytes: vec![1; 7], ..written }).is_err());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (wrong, says) in [
            (Aliases::from([(2, vec![alias(5..15, 1)])]), "not hidden"),
            (Aliases::from([(1, vec![alias(0..10, 2)])]), "not hidden"),
            (Aliases::from([(2, vec![alias(10..11, 9)])]), "not hidden"),
            (Aliases::from([(9, vec![alias(10..11, 1)])]), "not hidden"),
            (Aliases::from([(2, vec![alias(10..11, 2)])]), "not sent"),
            (Aliases::from([(2, vec![alias(20..22, 1)]), (3, vec![alias(21..23, 2)])]), "not sent"),
            (Aliases::from([(2, vec![alias(20..22, 1), alias(21..23, 1)])]), "out of order"),
            (Aliases::from([(2, vec![alias(22..22, 1)])]), "out of order"),
        ] {
            let written = section(&wrong).expect("there are some");
            let error = read_section(&written, &hidden()).expect_err("wrong").to_string();
            assert!(error.contains(says), "{wrong:?}: {error}");
        }
    }

    #[test]
    fn pages_are_told_apart_by_whose_they_are() {
        let found = owners(2, &[0..10, 20..30], &[alias(5..8, 1), alias(22..30, 3)]);
        let expected =
            [alias(0..5, 2), alias(5..8, 1), alias(8..10, 2), alias(20..22, 2), alias(22..30, 3)];
        assert_eq!(found, expected);
    }

    proptest! {
        #[test]
        fn no_bytes_of_a_peer_are_more_than_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let hostile = Section { kind: FORKED.to_owned(), version: VERSION, bytes };
            if let Ok(aliases) = read_section(&hostile, &hidden()) {
                prop_assert!(check(&aliases, &hidden()).is_ok());
            }
        }

        #[test]
        fn a_section_that_is_cut_is_refused(at in 0usize..100) {
            let aliases = Aliases::from([(2, vec![alias(10..20, 1), alias(40..60, 1)])]);
            let mut written = section(&aliases).expect("there are some");
            let length = written.bytes.len();
            written.bytes.truncate(at % length);
            prop_assert!(read_section(&written, &hidden()).is_err());
        }
    }
}
