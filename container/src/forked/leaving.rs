//! The source: a container's processes, in each round and in the stop, as far as they share memory since they
//! forked.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use decamp_shared::methods::ForkedChoice;
use decamp_shared::pages::{PAGE_SIZE, PageSet, SpaceId};
use decamp_shared::workload::Restoring;

use super::places::{self, PageTables};
use super::sharing::{BUDGET, Kin, Plan, Room};
use super::unsent::{Memory, Unsent};
use super::{Aliases, count, outside};
use crate::dump::ms;
use crate::error::{ContainerError, Result};
use crate::huge;
use crate::memory::{self, HiddenProcess, Process, hideable_mappings};
use crate::pagemap::{Pagemap, append};

/// What is held back, where anything is.
#[derive(Debug, Default)]
pub(crate) struct Forked {
    unsent: Option<Unsent>,
    /// There was a round.
    looked: bool,
    /// Whose pages are held back, and which processes they were then.
    pids: BTreeMap<SpaceId, i32>,
    choice: ForkedChoice,
}

impl Forked {
    /// For a move that begins. Nothing is held back where the configuration says so, or where nobody may know
    /// where pages lie.
    pub(crate) fn new(choice: ForkedChoice) -> Self {
        let once = choice != ForkedChoice::Each && places::are_known();
        Self { unsent: once.then(Unsent::default), choice, ..Self::default() }
    }

    /// A round of `processes`, which run, of which the tracker told `dirty`.
    pub(crate) fn round(&mut self, processes: &[Process], dirty: &mut PageSet) -> Result<()> {
        let Some(unsent) = &mut self.unsent else { return Ok(()) };
        let begun = Instant::now();
        self.looked = true;
        let mut memories = Vec::with_capacity(processes.len());
        for process in processes {
            // One that ends just now shares nothing.
            let mappings = hideable_mappings(process.pid).unwrap_or_default();
            memories.push(Memory::of(process, &mappings));
        }
        // One that is not listed just now may live all the same.
        self.pids.extend(processes.iter().map(|process| (process.space(), process.pid)));
        let pids = &self.pids;
        unsent.forget_unmapped(|space| {
            match pids.get(&space).map(|pid| memory::mappings(*pid)) {
                None => Ok(Vec::new()),
                Some(Err(error)) if error.is_gone() => Ok(Vec::new()),
                Some(mappings) => Ok(mappings?.iter().map(page_numbers).collect()),
            }
        })?;
        unsent.round(&memories, &mut PageTables::of(processes.iter())?, dirty)?;
        tracing::debug!(
            ms = ms(begun),
            pages = unsent.set().len(),
            "Held back pages that are those of other processes"
        );
        Ok(())
    }

    /// The same in the stop.
    pub(crate) fn last(&mut self, hidden: &[HiddenProcess], dirty: &mut PageSet) -> Result<()> {
        let Some(unsent) = &mut self.unsent else { return Ok(()) };
        let begun = Instant::now();
        let memories: Vec<_> =
            hidden.iter().map(|hidden| Memory::of(&hidden.process, &hidden.pages)).collect();
        let processes = hidden.iter().map(|hidden| &hidden.process);
        unsent.last(&memories, &mut PageTables::of(processes)?, dirty)?;
        tracing::debug!(
            ms = ms(begun),
            pages = unsent.set().len(),
            "Held back pages that are those of other processes, for good"
        );
        Ok(())
    }

    /// Whether what `processes`, which run, share could keep them from running elsewhere: what cannot be
    /// shared again, beside the `used` bytes that they have here, is more than `limit`.
    pub(crate) fn check(&self, processes: &[Process], used: u64, limit: u64) -> Result<()> {
        let Some(unsent) = self.unsent.as_ref().filter(|_| processes.len() > 1) else {
            return Ok(());
        };
        let begun = Instant::now();
        let mut aliases = unsent.aliases();
        if !self.looked {
            let mut look = Self { unsent: Some(Unsent::default()), ..Self::default() };
            look.round(processes, &mut all_pages(processes))?;
            aliases = look.aliases();
        }
        let aliases = counted(&aliases, processes);
        let shareable = plan(&aliases, processes).again;
        let again = if self.choice == ForkedChoice::Apart { 0 } else { shareable };
        let growth = (count(&aliases) - again) * PAGE_SIZE as u64;
        tracing::debug!(
            ms = ms(begun),
            again,
            growth,
            used,
            "Looked at what cannot be shared again"
        );
        if used.saturating_add(growth) <= limit {
            return Ok(());
        }
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let hint = match used.saturating_add(growth - (shareable - again) * PAGE_SIZE as u64) {
            fits if again < shareable && fits <= limit => {
                ", say forked = \"shared\" under [containers] on both hosts"
            }
            _ => "",
        };
        Err(ContainerError::State(format!(
            "Its processes share {} MiB since they forked that are not shared again elsewhere: with what they \
             have now, {} MiB, they would take {} MiB there, and its memory limit is {} MiB, swap included. It runs on here: \
             raise the limit, end some of them{hint}, and move it again",
            mib(growth),
            mib(used),
            mib(used + growth),
            limit >> 20,
        )))
    }

    /// What sharing again will take of the stop, or would where there is time for it, if the destination does as
    /// it would be done here, with the `used` bytes of `limit` that they have.
    pub(crate) fn restoring(
        &self,
        processes: &[Process],
        used: Option<u64>,
        limit: Option<u64>,
    ) -> Restoring {
        let aliases = counted(&self.aliases(), processes);
        let unsent = count(&aliases);
        if unsent == 0 {
            return Restoring::default();
        }
        let pages = |bytes: u64| bytes / PAGE_SIZE as u64;
        let room =
            Room { sent: used.map_or(0, pages), unsent, limit: limit.map(pages), free: None };
        let plan = plan(&aliases, processes);
        let none = Restoring::default();
        match plan.is_needed(self.choice, &room) {
            true => Restoring { needed: plan.takes(), ..none },
            false if plan.is_wanted(self.choice, &room, BUDGET) => {
                Restoring { wished: plan.takes(), ..none }
            }
            false => none,
        }
    }

    /// Pages that are held back.
    pub(crate) fn unsent(&self) -> PageSet {
        self.unsent.as_ref().map(Unsent::set).unwrap_or_default()
    }

    /// The same, with whose they are.
    pub(crate) fn aliases(&self) -> Aliases {
        self.unsent.as_ref().map(Unsent::aliases).unwrap_or_default()
    }
}

/// All pages that exist of processes that run.
fn all_pages(processes: &[Process]) -> PageSet {
    let mut all = PageSet::new();
    for process in processes {
        let look = || -> Result<Vec<Range<u64>>> {
            let mut pagemap = Pagemap::open(process.pid)?;
            let mut found = Vec::new();
            for mapping in hideable_mappings(process.pid)? {
                pagemap.existing(&mapping, false, |range, _| append(&mut found, range))?;
            }
            Ok(found)
        };
        // One that ends just now has nothing.
        process.add_to(&mut all, &look().unwrap_or_default());
    }
    all
}

/// What of `aliases` is no huge page.
fn counted(aliases: &Aliases, processes: &[Process]) -> Aliases {
    let unsent = processes.iter().filter(|process| aliases.contains_key(&process.inner));
    let huge = unsent.map(|process| {
        let mappings = huge::tracked(process.pid);
        (process.inner, mappings.iter().map(page_numbers).collect())
    });
    outside(aliases, &huge.collect())
}

/// What of `aliases` can be shared again, as far as that can be seen here.
fn plan(aliases: &Aliases, processes: &[Process]) -> Plan {
    let bound = processes.iter().filter(|process| memory::locked(process.pid) > 0);
    Plan::of(aliases, &kin_of(processes), &bound.map(|process| process.inner).collect())
}

/// Parents and mappings of processes that run.
fn kin_of(processes: &[Process]) -> BTreeMap<i32, Kin> {
    let inner: BTreeMap<i32, i32> =
        processes.iter().map(|process| (process.pid, process.inner)).collect();
    let mut found = BTreeMap::new();
    for process in processes {
        let parent = memory::parent(process.pid).and_then(|parent| inner.get(&parent).copied());
        let mappings = hideable_mappings(process.pid).unwrap_or_default();
        let kin = Kin {
            parent: parent.unwrap_or(0),
            session: memory::session(process.pid).unwrap_or(0),
            program: memory::program(process.pid).unwrap_or_default(),
            mappings: Memory::of(process, &mappings).pages,
        };
        found.insert(process.inner, kin);
    }
    found
}

impl Memory {
    fn of(process: &Process, addresses: &[Range<u64>]) -> Self {
        Self { space: process.space(), pages: addresses.iter().map(page_numbers).collect() }
    }
}

fn page_numbers(addresses: &Range<u64>) -> Range<u64> {
    addresses.start / PAGE_SIZE as u64..addresses.end / PAGE_SIZE as u64
}
