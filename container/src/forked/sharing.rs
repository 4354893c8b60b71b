//! Which pages CRIU can share again between forked processes, and whether that is worth it.
//!
//! CRIU restores a process, forks its children from it while its memory lies in a place of its own, and then
//! compares each page of a child with the one that it has from its parent. Equal ones stay shared. So a page
//! can be shared again by a process and its parent, where both have it in mappings of the same bounds and
//! both have it in their images, instead of having it come late. What is equal only among siblings cannot,
//! nor what a mapping has that was split or grown since the fork, nor what the child of a process has that
//! runs another program, nor what a child of the first process has that is in the session of neither: CRIU
//! forks it from a helper.
//!
//! Those pages are read from the page store by way of a parent image, and of one process that names one file
//! of pages ([`crate::images`]). So of each process the pages of one owner can be shared again, those of
//! which there are most.
//!
//! Pure: fed with what the images, or /proc, say.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use decamp_shared::methods::ForkedChoice;
use decamp_shared::pages::PAGE_SIZE;

use super::{Alias, Aliases, join};

/// Growth by fewer pages is not worth anything: 4 MiB.
const WORTH: u64 = (4 << 20) / PAGE_SIZE as u64;
/// By so many percent memory may grow before what can be shared again is.
const GROWTH: u64 = 15;
/// What CRIU takes to read a page of a child and compare it, as measured on two busy cores.
const PER_PAGE: Duration = Duration::from_micros(6);
/// Where there is memory enough, sharing is to take no more of the stop, however long that may be.
pub(crate) const BUDGET: Duration = Duration::from_millis(100);

/// A process as far as sharing goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kin {
    /// Its parent's number in the container.
    pub(crate) parent: i32,
    /// The number of its session in the container.
    pub(crate) session: i32,
    /// The same for two processes that run the same file.
    pub(crate) program: (u64, u64),
    /// Page numbers of its private anonymous mappings, ascending.
    pub(crate) mappings: Vec<Range<u64>>,
}

impl Kin {
    /// Whether CRIU forks it, process `inner`, from `parent` and compares their pages.
    fn is_forked_from(&self, inner: i32, parent: &Self) -> bool {
        let is_first = parent.parent == 0;
        let by_helper = is_first && self.session != parent.session && self.session != inner;
        self.parent != inner && self.program == parent.program && !by_helper
    }
}

/// What is shared again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// By process: the pages (ascending) that have to be in its place before it runs, and the process whose
    /// part of the store they are in.
    pub(crate) eager: BTreeMap<i32, (i32, Vec<Range<u64>>)>,
    /// How many pages no process gets a copy of.
    pub(crate) again: u64,
}

/// Memory that there is and that is wanted, in pages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Room {
    /// Those that came.
    pub(crate) sent: u64,
    /// Those that did not come for each process that has them.
    pub(crate) unsent: u64,
    /// As many the container may have.
    pub(crate) limit: Option<u64>,
    /// As many the host has left.
    pub(crate) free: Option<u64>,
}

/// Pages of a child that are its parent's, in the part of `of`.
struct Edge {
    child: i32,
    parent: i32,
    of: i32,
    pages: Vec<Range<u64>>,
}

impl Edge {
    fn count(&self) -> u64 {
        self.pages.iter().map(|range| range.end - range.start).sum()
    }
}

impl Plan {
    /// All that can be shared again. Processes in `bound` have to have pages of their own part before they
    /// run.
    pub(crate) fn of(aliases: &Aliases, kin: &BTreeMap<i32, Kin>, bound: &BTreeSet<i32>) -> Self {
        let edges: Vec<Edge> = aliases
            .iter()
            .flat_map(|(child, ranges)| edges(*child, ranges, aliases, kin))
            .collect();
        let mut demand: BTreeMap<i32, BTreeMap<i32, u64>> = BTreeMap::new();
        for edge in &edges {
            for process in [edge.child, edge.parent] {
                *demand.entry(process).or_default().entry(edge.of).or_default() += edge.count();
            }
        }
        let choice = |process: i32| match bound.contains(&process) {
            true => Some(process),
            false => {
                let wanted = demand.get(&process)?.iter();
                wanted.max_by_key(|(of, count)| (**count, -**of)).map(|(of, _)| *of)
            }
        };
        let mut plan = Self::default();
        for edge in edges {
            if [edge.child, edge.parent].iter().all(|process| choice(*process) == Some(edge.of)) {
                plan.again += edge.count();
                for process in [edge.child, edge.parent] {
                    let entry = plan.eager.entry(process).or_insert((edge.of, Vec::new()));
                    entry.1.extend(edge.pages.iter().cloned());
                }
            }
        }
        for (_, pages) in plan.eager.values_mut() {
            *pages = united(std::mem::take(pages));
        }
        plan
    }

    /// Whether it is worth `time` of the stop, or wanted.
    pub(crate) fn is_wanted(&self, choice: ForkedChoice, room: &Room, time: Duration) -> bool {
        self.is_needed(choice, room)
            || choice == ForkedChoice::Auto
                && self.again > 0
                && room.is_growth(self.again)
                && self.takes() <= time.min(BUDGET)
    }

    /// Whether it is done however long it takes.
    pub(crate) fn is_needed(&self, choice: ForkedChoice, room: &Room) -> bool {
        match choice {
            _ if self.again == 0 => false,
            ForkedChoice::Shared => true,
            ForkedChoice::Apart | ForkedChoice::Each => false,
            ForkedChoice::Auto => room.is_short(),
        }
    }

    /// What it takes of the stop, about.
    pub(crate) fn takes(&self) -> Duration {
        PER_PAGE.saturating_mul(u32::try_from(self.again).unwrap_or(u32::MAX))
    }
}

impl Room {
    /// Whether so many pages more are worth a thought.
    pub(crate) fn is_growth(&self, pages: u64) -> bool {
        pages >= WORTH && pages * 100 > self.sent * GROWTH
    }

    /// Whether there is too little for each process to have its own.
    fn is_short(&self) -> bool {
        self.limit.is_some_and(|limit| self.sent + self.unsent > limit)
            || self.free.is_some_and(|free| self.unsent > free)
    }
}

/// What of a child's `ranges` is its parent's too.
fn edges(child: i32, ranges: &[Alias], aliases: &Aliases, kin: &BTreeMap<i32, Kin>) -> Vec<Edge> {
    let Some(own) = kin.get(&child) else { return Vec::new() };
    let Some(parent) = kin.get(&own.parent).filter(|parent| own.is_forked_from(child, parent))
    else {
        return Vec::new();
    };
    let theirs = aliases.get(&own.parent).map_or(&[][..], Vec::as_slice);
    let mut found: BTreeMap<i32, Vec<Range<u64>>> = BTreeMap::new();
    for alias in ranges {
        for mapping in common(&own.mappings, &parent.mappings, &alias.pages) {
            let pages = mapping.start.max(alias.pages.start)..mapping.end.min(alias.pages.end);
            if alias.of == own.parent {
                found.entry(alias.of).or_default().push(pages);
                continue;
            }
            let first = theirs.partition_point(|other| other.pages.end <= pages.start);
            for other in theirs[first..].iter().take_while(|other| other.pages.start < pages.end) {
                if other.of == alias.of {
                    let both = pages.start.max(other.pages.start)..pages.end.min(other.pages.end);
                    found.entry(alias.of).or_default().push(both);
                }
            }
        }
    }
    found
        .into_iter()
        .map(|(of, pages)| Edge { child, parent: own.parent, of, pages: join(pages.into_iter()) })
        .collect()
}

/// Mappings that both have, within `pages`.
fn common<'a>(
    own: &'a [Range<u64>],
    theirs: &'a [Range<u64>],
    pages: &'a Range<u64>,
) -> impl Iterator<Item = &'a Range<u64>> {
    let first = own.partition_point(|mapping| mapping.end <= pages.start);
    own[first..].iter().take_while(|mapping| mapping.start < pages.end).filter(|mapping| {
        let at = theirs.partition_point(|other| other.start < mapping.start);
        theirs.get(at) == Some(mapping)
    })
}

/// These ranges in order, each page once.
pub(crate) fn united(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut united: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match united.last_mut().filter(|last| range.start <= last.end) {
            Some(last) => last.end = last.end.max(range.end),
            None => united.push(range),
        }
    }
    united
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alias(pages: Range<u64>, of: i32) -> Alias {
        Alias { pages, of }
    }

    fn only(range: Range<u64>) -> Vec<Range<u64>> {
        std::iter::once(range).collect()
    }

    fn kin(parent: i32, mappings: &[Range<u64>]) -> Kin {
        Kin { parent, mappings: mappings.to_vec(), ..Kin::default() }
    }

    #[test]
    fn a_parent_and_its_children_share_what_they_have_in_the_same_mappings() {
        let mappings = [0..100, 200..300];
        let kin = BTreeMap::from([
            (1, kin(0, &mappings)),
            (2, kin(1, &mappings)),
            // Its second mapping has grown.
            (3, kin(1, &[0..100, 200..310])),
        ]);
        let aliases = Aliases::from([
            (2, vec![alias(10..20, 1), alias(250..260, 1)]),
            (3, vec![alias(15..30, 1), alias(250..260, 1)]),
        ]);
        let plan = Plan::of(&aliases, &kin, &BTreeSet::new());
        assert_eq!(plan.again, 10 + 10 + 15);
        let expected = BTreeMap::from([
            (1, (1, vec![10..30, 250..260])),
            (2, (1, vec![10..20, 250..260])),
            (3, (1, only(15..30))),
        ]);
        assert_eq!(plan.eager, expected);
    }

    #[test]
    fn siblings_share_nothing_again_and_grandchildren_what_is_their_parents() {
        let mappings = only(0..100);
        let kin = BTreeMap::from([
            (1, kin(0, &mappings)),
            (2, kin(1, &mappings)),
            (3, kin(1, &mappings)),
            (4, kin(3, &mappings)),
        ]);
        let aliases = Aliases::from([
            // The parent wrote there, 2 and 3 have what was.
            (3, vec![alias(10..20, 2), alias(50..90, 1)]),
            // And 4 what 3 has, of 1 in part; of the rest 3 has its own.
            (4, vec![alias(15..20, 2), alias(40..45, 3), alias(60..70, 1), alias(95..96, 1)]),
        ]);
        let plan = Plan::of(&aliases, &kin, &BTreeSet::new());
        let expected = BTreeMap::from([
            (1, (1, only(50..90))),
            (3, (1, only(50..90))),
            (4, (1, only(60..70))),
        ]);
        assert_eq!((plan.eager, plan.again), (expected, 50));
        // One that has pages of its own to be there before it runs can have no others so.
        let plan = Plan::of(&aliases, &kin, &BTreeSet::from([3]));
        assert_eq!((plan.eager, plan.again), (BTreeMap::new(), 0));
    }

    #[test]
    fn what_criu_does_not_fork_from_its_parent_is_not_shared_again() {
        let mappings = only(0..100);
        let again = |session: [i32; 3], program: [u64; 3]| {
            let of = |which: usize, parent| Kin {
                session: session[which],
                program: (0, program[which]),
                ..kin(parent, &mappings)
            };
            let kin = BTreeMap::from([(1, of(0, 0)), (2, of(1, 1)), (3, of(2, 2))]);
            [(2, alias(0..10, 1)), (3, alias(0..20, 2))].map(|(child, alias)| {
                Plan::of(&Aliases::from([(child, vec![alias])]), &kin, &BTreeSet::new()).again
            })
        };
        assert_eq!(again([1, 1, 1], [7, 7, 7]), [10, 20]);
        // One that leads its own, and its child in that or another.
        assert_eq!(again([1, 2, 2], [7, 7, 7]), [10, 20]);
        assert_eq!(again([1, 2, 9], [7, 7, 7]), [10, 20]);
        // The first one's child in a session of one that is gone.
        assert_eq!(again([1, 9, 9], [7, 7, 7]), [0, 20]);
        assert_eq!(again([1, 1, 1], [7, 8, 8]), [0, 20]);
        assert_eq!(again([1, 1, 1], [7, 7, 8]), [10, 0]);
    }

    #[test]
    fn it_is_shared_again_where_memory_would_be_short_or_grow() {
        let plan = Plan { again: 8 * WORTH, ..Plan::default() };
        let room = |sent| Room { sent, unsent: 8 * WORTH, ..Room::default() };
        let limited = |sent, limit| Room { limit: Some(limit), ..room(sent) };
        let auto = ForkedChoice::Auto;
        assert!(plan.is_wanted(auto, &room(10 * WORTH), BUDGET));
        let less = Duration::from_millis(40);
        assert!(!plan.is_wanted(auto, &room(10 * WORTH), less), "there is no time for it");
        assert!(plan.is_wanted(auto, &limited(1000 * WORTH, 1001 * WORTH), less), "it has to be");
        assert!(!plan.is_wanted(auto, &room(1000 * WORTH), BUDGET), "it grows by less than 15 %");
        assert!(plan.is_wanted(auto, &limited(1000 * WORTH, 1001 * WORTH), BUDGET));
        assert!(!plan.is_wanted(auto, &limited(1000 * WORTH, 1008 * WORTH), BUDGET));
        assert!(plan.is_wanted(
            auto,
            &Room { free: Some(7 * WORTH), ..room(1000 * WORTH) },
            BUDGET
        ));
        assert!(!plan.is_wanted(
            auto,
            &Room { free: Some(8 * WORTH), ..room(1000 * WORTH) },
            BUDGET
        ));
        assert!(plan.is_wanted(ForkedChoice::Shared, &room(1000 * WORTH), BUDGET));
        assert!(!plan.is_wanted(ForkedChoice::Apart, &limited(WORTH, 1), BUDGET));
        let few = Plan { again: WORTH - 1, ..Plan::default() };
        assert!(!few.is_wanted(auto, &room(2), BUDGET));
        assert!(!Plan::default().is_wanted(ForkedChoice::Shared, &limited(2, 1), BUDGET));
        // What takes long has to be worth that.
        let many = Plan { again: 100 * WORTH, ..Plan::default() };
        assert!(many.takes() > BUDGET && !many.is_wanted(auto, &room(100 * WORTH), BUDGET));
        assert!(many.is_wanted(auto, &limited(100 * WORTH, 101 * WORTH), BUDGET));
    }
}
