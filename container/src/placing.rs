//! Where pages that CRIU did not dump come to their place at the destination, by the mapping that they are of.
//!
//! Most come late, as CRIU has it. Locked memory it lets come late nowhere, for whoever locked it must never
//! wait for a page: that is in its place before anything runs. Of huge pages it makes the mappings, and reads
//! nothing from a parent: they are for whoever fills memory ([`crate::filling`]), or have to be in CRIU's own
//! pages image.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use decamp_shared::pages::PAGE_SIZE;

use crate::beside;
use crate::error::{ContainerError, Result};
use crate::huge::SIZE_SHIFT;
use crate::images::{HIDDEN, HiddenPages};
use crate::segments::message::{Image, MM_MAGIC, Message};

/// The kernel's marks of a mapping, as CRIU writes them down: private, without a file, locked, without a
/// promise of pages, of huge pages.
const PRIVATE: u64 = 0x2;
const ANONYMOUS: u64 = 0x20;
const LOCKED: u64 = 0x2000;
const UNPROMISED: u64 = 0x4000;
const HUGE: u64 = 0x4_0000;
/// Sizes of huge pages that there are, as logarithms: 16 KiB to 16 GiB.
const SIZES: std::ops::RangeInclusive<u64> = 14..=34;

/// Pages that CRIU did not dump.
pub(crate) struct Split {
    /// Those that may come when their process runs already.
    pub(crate) late: HiddenPages,
    /// Those that must not.
    pub(crate) locked: HiddenPages,
    /// Those in mappings of huge pages.
    pub(crate) huge: HiddenPages,
    /// Those mappings.
    pub(crate) huge_mappings: HugeMappings,
}

/// Private mappings of huge pages, ascending, by the process that has them.
pub(crate) type HugeMappings = BTreeMap<i32, Vec<HugeMapping>>;

/// A private mapping of huge pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HugeMapping {
    pub(crate) addresses: Range<u64>,
    /// Bytes of a page; the mapping begins and ends at multiples of it.
    pub(crate) page: u64,
    /// Whether the kernel has promised a page for each of its places.
    pub(crate) promised: bool,
}

impl Split {
    /// Tells them apart by the mappings in `images`.
    ///
    /// # Errors
    /// When a page is in no mapping of its process: there would be no place for it.
    pub(crate) fn of(images: &Path, hidden: HiddenPages) -> Result<Self> {
        let mut split = Self {
            late: HiddenPages::new(),
            locked: HiddenPages::new(),
            huge: HiddenPages::new(),
            huge_mappings: HugeMappings::new(),
        };
        let read = |(inner, pages): (i32, Vec<Range<u64>>)| -> Result<_> {
            Ok((inner, pages, Mappings::read(images, inner)?))
        };
        for (inner, pages, mappings) in beside::each(hidden.into_iter().collect(), read)? {
            split.add(inner, &pages, mappings)?;
        }
        Ok(split)
    }

    fn add(&mut self, inner: i32, pages: &[Range<u64>], mappings: Mappings) -> Result<()> {
        let huge_places: Vec<_> = mappings.huge.iter().map(HugeMapping::pages).collect();
        let (mut late, mut locked, mut huge) = (Vec::new(), Vec::new(), Vec::new());
        for range in pages {
            let (mut nowhere, mut somewhere) = (Vec::new(), Vec::new());
            cut(range, &mappings.all, &mut nowhere, &mut somewhere);
            if let Some(nowhere) = nowhere.first() {
                return Err(ContainerError::section(
                    HIDDEN,
                    format!(
                        "has page {:#x} of process {inner}, in none of its mappings",
                        nowhere.start
                    ),
                ));
            }
            let mut others = Vec::new();
            cut(range, &huge_places, &mut others, &mut huge);
            others.iter().for_each(|range| cut(range, &mappings.locked, &mut late, &mut locked));
        }
        self.late.insert(inner, late);
        for (pages, into) in [(locked, &mut self.locked), (huge, &mut self.huge)] {
            if !pages.is_empty() {
                into.insert(inner, pages);
            }
        }
        if !mappings.huge.is_empty() {
            self.huge_mappings.insert(inner, mappings.huge);
        }
        Ok(())
    }
}

impl HugeMapping {
    /// Its page numbers, in ordinary pages.
    fn pages(&self) -> Range<u64> {
        self.addresses.start / PAGE_SIZE as u64..self.addresses.end / PAGE_SIZE as u64
    }

    /// Of a mapping in an image; nothing of one that is not private and without a file, or of no huge pages.
    ///
    /// # Errors
    /// Of one that cannot be.
    fn parse(addresses: &Range<u64>, flags: u64) -> std::result::Result<Option<Self>, ()> {
        const ALL: u64 = PRIVATE | ANONYMOUS | HUGE;
        if flags & ALL != ALL {
            return Ok(None);
        }
        let size = flags >> SIZE_SHIFT & 0x3f;
        let page = SIZES.contains(&size).then(|| 1u64 << size).ok_or(())?;
        let fits = addresses.start.is_multiple_of(page) && addresses.end.is_multiple_of(page);
        let promised = flags & UNPROMISED == 0;
        fits.then(|| Some(Self { addresses: addresses.clone(), page, promised })).ok_or(())
    }
}

/// Page numbers of the mappings of a process, ascending and joined.
struct Mappings {
    all: Vec<Range<u64>>,
    locked: Vec<Range<u64>>,
    /// Ascending, each for itself.
    huge: Vec<HugeMapping>,
}

impl Mappings {
    /// Those of process `inner`.
    fn read(images: &Path, inner: i32) -> Result<Self> {
        let path = images.join(format!("mm-{inner}.img"));
        let bad = || ContainerError::malformed(&path, "has a mapping that makes no sense");
        let (mut all, mut locked, mut huge) = (Vec::new(), Vec::new(), Vec::<HugeMapping>::new());
        for message in Image::read(&path, MM_MAGIC)?.into_iter().flat_map(|image| image.messages) {
            for mapping in message.each(14) {
                let mapping = mapping.ok_or_else(bad)?;
                let number = |tag| Message::number(&mapping, tag).ok_or_else(bad);
                let (addresses, flags) = (number(1)?..number(2)?, number(6)?);
                let (start, end) =
                    (addresses.start / PAGE_SIZE as u64, addresses.end / PAGE_SIZE as u64);
                if start >= end {
                    return Err(bad());
                }
                all.push(start..end);
                match HugeMapping::parse(&addresses, flags).map_err(|()| bad())? {
                    Some(mapping) => huge.push(mapping),
                    None if flags & LOCKED != 0 => locked.push(start..end),
                    None => {}
                }
            }
        }
        huge.sort_by_key(|mapping| mapping.addresses.start);
        if huge.windows(2).any(|two| two[1].addresses.start < two[0].addresses.end) {
            return Err(bad());
        }
        Ok(Self { all: joined(all), locked: joined(locked), huge })
    }
}
/// The same pages. Guard pages are mappings within mappings to CRIU.
fn joined(mut mappings: Vec<Range<u64>>) -> Vec<Range<u64>> {
    mappings.sort_by_key(|mapping| mapping.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for mapping in mappings {
        match joined.last_mut().filter(|last| mapping.start <= last.end) {
            Some(last) => last.end = last.end.max(mapping.end),
            None => joined.push(mapping),
        }
    }
    joined
}

/// Gives the parts of `range` within `mappings` (ascending, disjoint) to `inside`, and the others to
/// `outside`.
pub(crate) fn cut(
    range: &Range<u64>,
    mappings: &[Range<u64>],
    outside: &mut Vec<Range<u64>>,
    inside: &mut Vec<Range<u64>>,
) {
    let first = mappings.partition_point(|mapping| mapping.end <= range.start);
    let mut at = range.start;
    for mapping in mappings[first..].iter().take_while(|mapping| mapping.start < range.end) {
        let part = mapping.start.max(at)..mapping.end.min(range.end);
        if at < part.start {
            outside.push(at..part.start);
        }
        at = part.end;
        inside.push(part);
    }
    if at < range.end {
        outside.push(at..range.end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_told_apart_by_their_mappings() {
        let directory = tempfile::tempdir().expect("a directory");
        let mapping = |start: u64, end: u64, flags: u64| {
            let mut mapping = Message::default();
            for (tag, number) in [(1, start * 4096), (2, end * 4096), (6, flags)] {
                mapping.set_number(tag, number);
            }
            mapping.to_bytes()
        };
        let mut mm = Message::default();
        for bytes in [
            mapping(10, 20, 0x22),
            mapping(20, 30, 0x2022),
            mapping(30, 40, 0x22),
            mapping(22, 23, 0x2022),
        ] {
            mm.add_bytes(14, bytes);
        }
        let path = directory.path().join("mm-1.img");
        Image::of(MM_MAGIC, vec![mm]).write(&path).expect("written");
        let split = |pages: &[Range<u64>]| {
            Split::of(directory.path(), HiddenPages::from([(1, pages.to_vec())]))
        };
        for nowhere in [9..12, 39..41, 1 << 30..(1 << 30) + 1] {
            let error = split(&[12..25, nowhere]).err().expect("it has no place");
            assert!(error.to_string().contains("in none of its mappings"), "{error}");
        }
        let split = split(&[12..25, 28..35]).expect("split");
        let late = HiddenPages::from([(1, vec![12..20, 30..35])]);
        assert_eq!(split.late, late);
        assert_eq!(split.locked, HiddenPages::from([(1, vec![20..25, 28..30])]));
    }
}
