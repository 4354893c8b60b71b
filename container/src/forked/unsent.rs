//! Which pages need not be sent because they are those of another process.
//!
//! A page that has to be sent is held back if it lies, at the same address, in the same frame as a page of
//! another process that is sent in its place, or was sent before and not written since. While the container
//! runs everything that is held back is looked at anew in each round: a write by either process gives one
//! of them a frame of its own. In the stop a page stays held back without another look if the tracker knows
//! that neither process wrote to it since. What was in one frame at the last round and was not written
//! since is the same; what is in one frame when nothing runs is so in any case.
//!
//! Pure: where pages lie is told by [`Places`].

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use decamp_shared::pages::{PageRange, PageSet, SpaceId};

use super::{Alias, Aliases};
use crate::error::Result;

/// Pages that are looked at together: those of one page table.
pub(crate) const BLOCK: usize = 512;
const WORDS: usize = BLOCK / 64;

/// Tells where pages lie.
pub(crate) trait Places {
    /// Where the pages `block * BLOCK..` of a process lie: the same number for two pages only if they are one.
    /// Zero where there is none, where it is nobody else's, and where that is not known.
    fn read(&mut self, space: SpaceId, block: u64, into: &mut [u64; BLOCK]) -> Result<()>;
}

/// Memory of one process that is moved by the page engine.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    pub(crate) space: SpaceId,
    /// Page numbers, ascending: of its mappings while it runs, of the pages that exist when it stands still.
    pub(crate) pages: Vec<Range<u64>>,
}

/// What is held back.
#[derive(Debug, Default)]
pub(crate) struct Unsent {
    /// By the process that it is not sent for and the one that it is of: page numbers in the space of the
    /// first.
    held: BTreeMap<(SpaceId, SpaceId), PageSet>,
}

impl Unsent {
    /// Forgets what was held back and is in no mapping any more: `mapped` gives the page numbers of all
    /// mappings of a process, none of one that is gone. What comes there anew the tracker tells.
    ///
    /// # Errors
    /// The first one of `mapped`. What that process has is held back as before.
    pub(crate) fn forget_unmapped(
        &mut self,
        mut mapped: impl FnMut(SpaceId) -> Result<Vec<Range<u64>>>,
    ) -> Result<()> {
        let mut last: Option<(SpaceId, PageSet)> = None;
        for ((space, _), set) in &mut self.held {
            let there = match last.take() {
                Some((of, there)) if of == *space => there,
                _ => Memory { space: *space, pages: mapped(*space)? }.set(),
            };
            set.intersect(&there);
            last = Some((*space, there));
        }
        self.held.retain(|_, set| !set.is_empty());
        Ok(())
    }

    /// A round of running processes, in which the tracker told of `dirty`: takes out what need not be sent,
    /// and puts in what was held back and is not the same any more.
    ///
    /// # Errors
    /// Those of `places`. Then as much is held back as before.
    pub(crate) fn round(
        &mut self,
        memories: &[Memory],
        places: &mut impl Places,
        dirty: &mut PageSet,
    ) -> Result<()> {
        let before = std::mem::take(&mut self.held);
        before.values().for_each(|set| dirty.union(set));
        self.hold_back(memories, places, dirty).inspect_err(|_| self.held = before)
    }

    /// The same for processes that stand still: all pages that exist are `memories`, of which `dirty` were
    /// written since the last round.
    ///
    /// # Errors
    /// Those of `places`. Then as much is held back as before, and it can be asked again with the same
    /// `dirty`.
    pub(crate) fn last(
        &mut self,
        memories: &[Memory],
        places: &mut impl Places,
        dirty: &mut PageSet,
    ) -> Result<()> {
        if self.held.is_empty() {
            let held = self.hold_back(memories, places, dirty);
            return held.inspect_err(|_| self.held.clear());
        }
        let exists: BTreeMap<SpaceId, PageSet> =
            memories.iter().map(|memory| (memory.space, memory.set())).collect();
        let written = dirty.clone();
        let before = std::mem::take(&mut self.held);
        for ((space, of), set) in &before {
            let (space, of, mut set) = (*space, *of, set.clone());
            let Some(there) = exists.get(&space) else { continue };
            // What is gone need not be known any more; what it wrote itself is in `dirty`.
            set.intersect(there);
            set.subtract(&written);
            let mut sound = in_space(&set, space, of);
            sound.subtract(&written);
            match exists.get(&of) {
                Some(there) => sound.intersect(there),
                None => sound.clear(),
            }
            let sound = in_space(&sound, of, space);
            set.subtract(&sound);
            dirty.union(&set);
            if !sound.is_empty() {
                self.held.insert((space, of), sound);
            }
        }
        self.hold_back(memories, places, dirty).inspect_err(|_| self.held = before)
    }

    /// Takes what need not be sent out of `dirty`.
    fn hold_back(
        &mut self,
        memories: &[Memory],
        places: &mut impl Places,
        dirty: &mut PageSet,
    ) -> Result<()> {
        if memories.len() < 2 {
            return Ok(());
        }
        let mut blocks = BTreeSet::new();
        for range in dirty.ranges() {
            blocks.extend(range.first / BLOCK as u64..=(range.end() - 1) / BLOCK as u64);
        }
        let mut held = PageSet::new();
        self.held.values().for_each(|set| held.union(set));
        for block in blocks {
            let there: Vec<_> = memories.iter().filter(|memory| memory.is_in(block)).collect();
            if there.len() < 2 {
                continue;
            }
            let mut members: Vec<_> =
                there.into_iter().map(|memory| Member::of(memory, block, dirty, &held)).collect();
            // Twice: the kernel moves pages, and what lay in one place at the same moment is found there
            // by both looks. Most of what has to be sent is nobody else's, and then the others need not
            // be looked at.
            for member in members.iter_mut().filter(|member| member.wants_any()) {
                places.read(member.space, block, &mut member.places)?;
                member.want_what_has_a_place();
            }
            if !members.iter().any(Member::wants_any) {
                continue;
            }
            for member in members.iter_mut().filter(|member| !member.is_read) {
                places.read(member.space, block, &mut member.places)?;
            }
            let mut again = Box::new([0; BLOCK]);
            for member in &mut members {
                places.read(member.space, block, &mut again)?;
                member.forget_moved(&again);
            }
            for (space, alias) in match_up(&members, block) {
                let range = PageRange::new(SpaceId(space.0), alias.pages.start, alias.count());
                dirty.remove(range);
                self.held.entry((space, SpaceId(alias.of as u32))).or_default().insert(range);
            }
        }
        Ok(())
    }

    /// All of it.
    pub(crate) fn set(&self) -> PageSet {
        let mut set = PageSet::new();
        self.held.values().for_each(|held| set.union(held));
        set
    }

    /// All of it, with whose it is.
    pub(crate) fn aliases(&self) -> Aliases {
        let mut found = Aliases::new();
        for ((space, of), set) in &self.held {
            let ranges = set
                .ranges()
                .map(|range| Alias { pages: range.first..range.end(), of: of.0 as i32 });
            found.entry(space.0 as i32).or_default().extend(ranges);
        }
        for ranges in found.values_mut() {
            ranges.sort_by_key(|alias| alias.pages.start);
        }
        found
    }
}

impl Memory {
    /// Whether it has any of a block.
    fn is_in(&self, block: u64) -> bool {
        let pages = pages_of(block);
        let first = self.pages.partition_point(|range| range.end <= pages.start);
        self.pages.get(first).is_some_and(|range| range.start < pages.end)
    }

    fn set(&self) -> PageSet {
        self.pages
            .iter()
            .map(|range| PageRange::new(self.space, range.start, range.end - range.start))
            .collect()
    }
}

/// The pages of a process in one block.
struct Member {
    space: SpaceId,
    places: Box<[u64; BLOCK]>,
    /// Those that may be another's.
    within: [u64; WORDS],
    /// Those that have to be sent, and may be another's.
    wanted: [u64; WORDS],
    /// `places` was read.
    is_read: bool,
}

impl Member {
    /// What is `held` back already is of no use to others.
    fn of(memory: &Memory, block: u64, dirty: &PageSet, held: &PageSet) -> Self {
        let pages = pages_of(block);
        let first = memory.pages.partition_point(|range| range.end <= pages.start);
        let mut within = [0; WORDS];
        for range in memory.pages[first..].iter().take_while(|range| range.start < pages.end) {
            set_bits(&mut within, &pages, range, true);
        }
        let each_run = |set: &PageSet, bits: &mut [u64; WORDS], value| {
            let mut at = pages.start;
            while let Some(run) = set.next_run(memory.space, at, BLOCK as u64)
                && run.space == memory.space
                && run.first < pages.end
            {
                set_bits(bits, &pages, &(run.first..run.end()), value);
                at = run.end();
            }
        };
        let mut wanted = [0; WORDS];
        each_run(dirty, &mut wanted, true);
        each_run(held, &mut within, false);
        let places = Box::new([0; BLOCK]);
        Self { space: memory.space, places, within, wanted, is_read: false }
    }

    fn wants_any(&self) -> bool {
        self.wanted != [0; WORDS]
    }

    /// What may be nobody else's has to be sent in any case.
    fn want_what_has_a_place(&mut self) {
        self.is_read = true;
        for index in 0..BLOCK {
            if self.wants(index) && self.place(index).is_none() {
                self.wanted[index / 64] &= !(1 << (index % 64));
            }
        }
    }

    fn forget_moved(&mut self, again: &[u64; BLOCK]) {
        for (place, again) in self.places.iter_mut().zip(again) {
            if place != again {
                *place = 0;
            }
        }
    }

    fn place(&self, index: usize) -> Option<u64> {
        let place = self.places[index];
        (has_bit(&self.within, index) && place != 0).then_some(place)
    }

    fn wants(&self, index: usize) -> bool {
        has_bit(&self.wanted, index)
    }
}

/// Numbers of the pages of a block.
fn pages_of(block: u64) -> Range<u64> {
    block * BLOCK as u64..(block + 1) * BLOCK as u64
}

fn has_bit(bits: &[u64; WORDS], index: usize) -> bool {
    bits[index / 64] & 1 << (index % 64) != 0
}

fn set_bits(bits: &mut [u64; WORDS], pages: &Range<u64>, range: &Range<u64>, value: bool) {
    let (start, end) = (range.start.max(pages.start), range.end.min(pages.end));
    for page in start..end {
        let index = (page - pages.start) as usize;
        match value {
            true => bits[index / 64] |= 1 << (index % 64),
            false => bits[index / 64] &= !(1 << (index % 64)),
        }
    }
}

/// Of pages that have to be sent those that another process has too, and which process that is. One that
/// has it already comes before one that it would be sent for, then the one that is named first.
fn match_up(members: &[Member], block: u64) -> Vec<(SpaceId, Alias)> {
    // By member, the last range is the one that may grow.
    let mut found: Vec<Vec<Alias>> = members.iter().map(|_| Vec::new()).collect();
    let mut seen: Vec<(u64, SpaceId)> = Vec::new();
    for index in 0..BLOCK {
        if !members.iter().any(|member| member.wants(index)) {
            continue;
        }
        seen.clear();
        for member in members.iter().filter(|member| !member.wants(index)) {
            if let Some(place) = member.place(index)
                && !seen.iter().any(|(other, _)| *other == place)
            {
                seen.push((place, member.space));
            }
        }
        let page = block * BLOCK as u64 + index as u64;
        for (member, ranges) in members.iter().zip(&mut found) {
            let place = member.place(index).filter(|_| member.wants(index));
            let Some(place) = place else { continue };
            let Some((_, of)) = seen.iter().find(|(other, _)| *other == place) else {
                seen.push((place, member.space));
                continue;
            };
            let of = of.0 as i32;
            match ranges.last_mut() {
                Some(last) if last.pages.end == page && last.of == of => last.pages.end += 1,
                _ => ranges.push(Alias { pages: page..page + 1, of }),
            }
        }
    }
    let by_space = members.iter().map(|member| member.space).zip(found);
    by_space.flat_map(|(space, ranges)| ranges.into_iter().map(move |one| (space, one))).collect()
}

/// The pages of `set`, all of one space, under the numbers of another.
fn in_space(set: &PageSet, from: SpaceId, to: SpaceId) -> PageSet {
    let ranges = set.ranges().filter(|range| range.space == from);
    ranges.map(|range| PageRange { space: to, ..range }).collect()
}

#[cfg(test)]
mod tests;
