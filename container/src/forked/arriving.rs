//! The destination: which of the pages that CRIU did not dump are in their place before anything runs, which
//! come late, and where in the store each of them is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use decamp_shared::methods::ForkedChoice;
use decamp_shared::pages::PAGE_SIZE;
use decamp_shared::sparse::Data;
use nix::fcntl::{FallocateFlags, fallocate};

use super::sharing::{BUDGET, Kin, Plan, Room, united};
use super::{Alias, Aliases, count, outside, owners};
use crate::beside;
use crate::contained;
use crate::dump::ms;
use crate::error::{ContainerError, Result};
use crate::filling::{LatePages, sequences};
use crate::images::{self, HiddenIn, HiddenPages};
use crate::placing::{HugeMappings, Split, cut};
use crate::segments::message::{Image, MM_MAGIC, Message, PSTREE_MAGIC};
use crate::store::Store;
use decamp_shared::keeper::ends::available_memory;

/// The kernel's marks of a mapping, as CRIU writes them down: private, anonymous, huge, growing downwards.
const PRIVATE: u64 = 0x2;
const ANONYMOUS: u64 = 0x20;
const ODD: u64 = 0x4_0000 | 0x100;
/// CRIU's mark of guard pages, which are mappings within mappings to it.
const GUARD: u64 = 1 << 16;
/// Copied at a time.
const PIECE: u64 = 64;

/// A restore whose images are to be completed.
pub(crate) struct Arriving<'a> {
    pub(crate) images: &'a Path,
    pub(crate) store: &'a Store,
    /// The images have a parent in any case.
    pub(crate) linked: bool,
    /// Bytes of memory that the container may have.
    pub(crate) limit: Option<u64>,
    /// Bytes that it may have in swap beside that.
    pub(crate) swap: u64,
    pub(crate) choice: ForkedChoice,
    /// Whether what comes late is not CRIU's business.
    pub(crate) behind: bool,
    /// How long sharing pages again may take, where the source says so.
    pub(crate) spare: Option<Duration>,
}

/// How memory comes that comes late.
pub(crate) struct Late {
    pub(crate) pages: LatePages,
    /// Those of them that CRIU leaves absent, where it does not know of them.
    pub(crate) absent: LatePages,
    /// Mappings of huge pages that some of them are of.
    pub(crate) huge: HugeMappings,
    /// What CRIU reads of the store, and does not need any more once it has restored: page numbers, and
    /// whose part it is.
    pub(crate) spent: Vec<Alias>,
    /// What became of pages that forked processes shared, where that is worth a word.
    pub(crate) note: Option<String>,
}

impl Arriving<'_> {
    /// Has everything in its place before anything runs.
    pub(crate) fn eager(self, hidden: &HiddenPages, aliases: &Aliases) -> Result<Option<String>> {
        self.check_stored(hidden)?;
        check_room(aliases.values().flatten())?;
        for (inner, ranges) in aliases {
            self.copy(*inner, ranges)?;
        }
        let huge = Split::of(self.images, hidden.clone())?.huge;
        self.contain(&huge)?;
        for (inner, pages) in hidden.iter().filter(|(_, pages)| !pages.is_empty()) {
            let huge = huge.get(inner).map_or(&[][..], Vec::as_slice);
            self.enter(*inner, *inner, &without(*inner, pages, huge))?;
        }
        self.link()?;
        Ok(None)
    }

    /// Has come late what may.
    pub(crate) fn late(self, hidden: HiddenPages, aliases: &Aliases) -> Result<Late> {
        images::check_all_named(self.images, &hidden)?;
        self.check_stored(&hidden)?;
        let total = pages_of(&hidden);
        let Split { late, locked, huge, huge_mappings } = Split::of(self.images, hidden)?;
        let (total, counted) = (total - pages_of(&huge), outside(aliases, &huge));
        let (plan, note) = self.plan(&counted, &locked, total)?;
        let mut eager: BTreeMap<i32, (i32, Vec<Range<u64>>)> = plan.eager;
        let ours = |inner| aliases.get(&inner).map_or(&[][..], Vec::as_slice);
        for (inner, pages) in locked {
            let others =
                owners(inner, &pages, ours(inner)).into_iter().filter(|one| one.of != inner);
            let others: Vec<_> = others.collect();
            check_room(others.iter())?;
            self.copy(inner, &others)?;
            let entry = eager.entry(inner).or_insert((inner, Vec::new()));
            entry.1 = united([std::mem::take(&mut entry.1), pages].concat());
        }
        // First: what is entered as late stays so only when nothing is entered after it.
        for (inner, (of, pages)) in &eager {
            self.enter(*inner, *of, pages)?;
        }
        // Whoever fills memory behind CRIU's back knows nothing of huge pages. CRIU's own daemon does, from the
        // moment when all is restored: what the kernel writes to before that must be there.
        let (contained, huge, huge_mappings) = match self.behind {
            true => (huge, HiddenPages::new(), HugeMappings::new()),
            false => {
                let written = sequences::huge_pages(self.images, &huge_mappings)?;
                let (contained, huge) = parted(huge, &written);
                (contained, huge, huge_mappings)
            }
        };
        // All who have a page of another's do so before that other's is given back.
        for (inner, pages) in &contained {
            let its = owners(*inner, pages, ours(*inner)).into_iter();
            let others: Vec<_> = its.filter(|one| one.of != *inner).collect();
            check_room(others.iter())?;
            self.copy(*inner, &others)?;
        }
        self.contain(&contained)?;
        let complete = |(inner, ranges): (i32, Vec<Range<u64>>)| -> Result<_> {
            let ranges = match eager.get(&inner) {
                Some((_, eager)) => without(inner, &ranges, eager),
                None => ranges,
            };
            let absent = match self.behind {
                true => {
                    owners(inner, &images::leave_out(self.images, inner, &ranges)?, ours(inner))
                }
                false => {
                    images::complete(self.images, HiddenIn::Daemon, inner, &ranges)?;
                    Vec::new()
                }
            };
            Ok((inner, owners(inner, &ranges, ours(inner)), absent))
        };
        let (mut pages, mut absent) = (LatePages::new(), LatePages::new());
        for (inner, its, left) in beside::each(late.into_iter().collect(), complete)? {
            pages.insert(inner, its);
            if self.behind {
                absent.insert(inner, left);
            }
        }
        if self.linked || !eager.is_empty() || pages.values().all(Vec::is_empty) {
            self.link()?;
        }
        // Of these CRIU has the mappings, and knows of no page.
        for (inner, ranges) in huge {
            pages.entry(inner).or_default().extend(owners(inner, &ranges, ours(inner)));
        }
        let spent = spent(&eager);
        Ok(Late { pages, absent, huge: huge_mappings, spent, note })
    }

    /// What is shared again, and what is said of that.
    fn plan(
        &self,
        aliases: &Aliases,
        locked: &HiddenPages,
        total: u64,
    ) -> Result<(Plan, Option<String>)> {
        if aliases.is_empty() {
            return Ok((Plan::default(), None));
        }
        let begun = Instant::now();
        let bound: BTreeSet<i32> = locked.keys().copied().collect();
        let plan = Plan::of(aliases, &kin(self.images)?, &bound);
        let unsent = count(aliases);
        let pages = |bytes: u64| bytes / PAGE_SIZE as u64;
        let limit = self.limit.map(pages);
        let free = available_memory().map(pages);
        let room = Room { sent: total - unsent, unsent, limit, free };
        let wanted = plan.is_wanted(self.choice, &room, self.spare.unwrap_or(BUDGET));
        tracing::debug!(
            ms = ms(begun),
            ?room,
            again = plan.again,
            wanted,
            "Looked at what forked processes share"
        );
        let again = if wanted { plan.again } else { 0 };
        let most = limit.map(|limit| limit + pages(self.swap));
        // What came may have been in swap there, and was as much.
        if let Some(most) = most.filter(|most| unsent > again && total - again > *most) {
            return Err(ContainerError::State(format!(
                "Its processes share memory since they forked, of which {} MiB are not shared again here: \
                 they would take {} MiB, and its memory limit and the swap that there is come to {} MiB",
                mib(unsent - again),
                mib(total - again),
                mib(most)
            )));
        }
        let note = note(&plan, again, &room);
        Ok((if wanted { plan } else { Plan::default() }, note))
    }

    fn check_stored(&self, hidden: &HiddenPages) -> Result<()> {
        let has = |(inner, pages): &(&i32, &Vec<_>)| pages.is_empty() || self.store.has(**inner);
        match hidden.iter().find(|process| !has(process)) {
            None => Ok(()),
            Some((inner, _)) => Err(ContainerError::section(
                images::HIDDEN,
                format!("speaks of process {inner}, whose memory never came"),
            )),
        }
    }

    /// Puts these pages, all of which are in the parts of their processes, into CRIU's own pages images.
    fn contain(&self, pages: &HiddenPages) -> Result<()> {
        for (inner, pages) in pages {
            let from = fs::File::from(self.store.memory_of(*inner)?);
            contained::enter(self.images, *inner, pages, &from)?;
        }
        Ok(())
    }

    /// Has CRIU read these pages of `inner` from the part of `of`.
    fn enter(&self, inner: i32, of: i32, pages: &[Range<u64>]) -> Result<()> {
        let parent = self.store.parent();
        images::complete(self.images, HiddenIn::Parent(&parent, of), inner, pages)
    }

    fn link(&self) -> Result<()> {
        std::os::unix::fs::symlink("../parent", self.images.join("parent"))
            .map_err(ContainerError::io("link the images to their parent"))
    }

    /// Copies pages into the part of `inner` from those that they are in.
    fn copy(&self, inner: i32, aliases: &[Alias]) -> Result<()> {
        let failed = || ContainerError::io(format!("copy memory to process {inner} in the store"));
        if aliases.is_empty() {
            return Ok(());
        }
        let to = fs::File::from(self.store.memory_of(inner)?);
        let mut bytes = vec![0; PIECE as usize * PAGE_SIZE];
        for Alias { pages, of } in aliases {
            let from = fs::File::from(self.store.memory_of(*of)?);
            // An older copy may be there.
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let (offset, length) = (pages.start * PAGE_SIZE as u64, (pages.end - pages.start));
            fallocate(&to, hole, offset as i64, length as i64 * PAGE_SIZE as i64)
                .map_err(|error| failed()(error.into()))?;
            // What the other part has nothing of is zeros in both.
            for data in Data::within(&from, offset..offset + length * PAGE_SIZE as u64).pages() {
                let Range { start, end } = data.map_err(failed())?;
                for first in (start..end).step_by(PIECE as usize) {
                    let count = PIECE.min(end - first) as usize;
                    let bytes = &mut bytes[..count * PAGE_SIZE];
                    from.read_exact_at(bytes, first * PAGE_SIZE as u64).map_err(failed())?;
                    for (page, bytes) in (first..).zip(bytes.chunks_exact(PAGE_SIZE)) {
                        if bytes.iter().any(|byte| *byte != 0) {
                            to.write_all_at(bytes, page * PAGE_SIZE as u64).map_err(failed())?;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// That there is memory to copy `aliases` with.
fn check_room<'a>(aliases: impl Iterator<Item = &'a Alias>) -> Result<()> {
    let wanted: u64 = aliases.map(Alias::count).sum();
    let free = available_memory().map_or(u64::MAX, |free| free / PAGE_SIZE as u64);
    if wanted <= free {
        return Ok(());
    }
    Err(ContainerError::State(format!(
        "Its processes share {} MiB since they forked that each must have for itself before it runs, and {} \
         MiB are available: free memory here, or say restore = \"auto\" under [containers] here",
        mib(wanted),
        mib(free)
    )))
}

/// What the report says where `again` pages of all that `plan` could have are shared again.
fn note(plan: &Plan, again: u64, room: &Room) -> Option<String> {
    let mut said = Vec::new();
    if again > 0 {
        said.push(format!(
            "Forked processes share {} MiB again, which were compared before it ran",
            mib(again)
        ));
    }
    let apart = room.unsent - again;
    if room.is_growth(apart) {
        let why = match plan.again - again {
            0 => "CRIU cannot share them again".to_owned(),
            not => format!(
                "sharing {} MiB of them again would have taken about {} ms of the stop \
                 (a longer --max-downtime, or forked = \"shared\", has it done)",
                mib(not),
                plan.takes().as_millis()
            ),
        };
        let mib = mib(apart);
        said.push(format!(
            "{mib} MiB that forked processes shared are each process's own now: {why}"
        ));
    }
    (!said.is_empty()).then(|| said.join(". "))
}

fn mib(pages: u64) -> u64 {
    (pages * PAGE_SIZE as u64).div_ceil(1 << 20)
}

fn pages_of(hidden: &HiddenPages) -> u64 {
    hidden.values().flatten().map(|range| range.end - range.start).sum()
}

/// What of `hidden` lies in `places` (page numbers, ascending), whoever has it, and what does not.
fn parted(hidden: HiddenPages, places: &[Range<u64>]) -> (HiddenPages, HiddenPages) {
    let (mut inside, mut outside) = (HiddenPages::new(), HiddenPages::new());
    for (inner, pages) in hidden {
        let (mut these, mut others) = (Vec::new(), Vec::new());
        pages.iter().for_each(|range| cut(range, places, &mut others, &mut these));
        for (pages, into) in [(these, &mut inside), (others, &mut outside)] {
            if !pages.is_empty() {
                into.insert(inner, pages);
            }
        }
    }
    (inside, outside)
}

/// What of `ranges` is not in `others`.
fn without(inner: i32, ranges: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    // No process has the number 0.
    let others: Vec<_> = others.iter().map(|pages| Alias { pages: pages.clone(), of: 0 }).collect();
    let parts = owners(inner, ranges, &others).into_iter();
    parts.filter(|part| part.of == inner).map(|part| part.pages).collect()
}

/// What CRIU reads, each page once.
fn spent(eager: &BTreeMap<i32, (i32, Vec<Range<u64>>)>) -> Vec<Alias> {
    let mut by_owner: BTreeMap<i32, Vec<Range<u64>>> = BTreeMap::new();
    for (of, pages) in eager.values() {
        by_owner.entry(*of).or_default().extend(pages.iter().cloned());
    }
    let each = by_owner
        .into_iter()
        .flat_map(|(of, pages)| united(pages).into_iter().map(move |pages| Alias { pages, of }));
    each.collect()
}

/// Parents and mappings of all processes, as the images have them.
fn kin(images: &Path) -> Result<BTreeMap<i32, Kin>> {
    let path = images.join("pstree.img");
    let bad = || ContainerError::malformed(&path, "has a process that makes no sense");
    let mut found = BTreeMap::new();
    for message in Image::read(&path, PSTREE_MAGIC)?.into_iter().flat_map(|image| image.messages) {
        let number =
            |tag| message.number(tag).and_then(|number| i32::try_from(number).ok()).ok_or_else(bad);
        let (inner, parent, session) = (number(1)?, number(2)?, number(4)?);
        let (program, mappings) = memory_of(images, inner)?;
        found.insert(inner, Kin { parent, session, program: (0, program), mappings });
    }
    Ok(found)
}

/// What process `inner` runs, by the number of the file in the images, and page numbers of its private
/// anonymous mappings, ascending; none of one that has no memory.
fn memory_of(images: &Path, inner: i32) -> Result<(u64, Vec<Range<u64>>)> {
    let path = images.join(format!("mm-{inner}.img"));
    let bad = || ContainerError::malformed(&path, "has a mapping that makes no sense");
    let (mut program, mut found) = (0, Vec::<Range<u64>>::new());
    for message in Image::read(&path, MM_MAGIC)?.into_iter().flat_map(|image| image.messages) {
        program = message.number(12).ok_or_else(bad)?;
        for mapping in message.each(14) {
            let mapping = mapping.ok_or_else(bad)?;
            let number = |tag| Message::number(&mapping, tag).ok_or_else(bad);
            let (start, end) = (number(1)? / PAGE_SIZE as u64, number(2)? / PAGE_SIZE as u64);
            let (flags, status) = (number(6)?, number(7)?);
            let plain = flags & (PRIVATE | ANONYMOUS | ODD) == PRIVATE | ANONYMOUS;
            if !plain || status & GUARD != 0 {
                continue;
            }
            if start >= end || found.last().is_some_and(|last| start < last.end) {
                return Err(bad());
            }
            found.push(start..end);
        }
    }
    Ok((program, found))
}
