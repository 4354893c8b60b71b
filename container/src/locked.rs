//! Locked memory at the destination: CRIU has no such mapping come late, for whoever locked it must never
//! wait for a page. So what the page engine has copied of it is in its place before anything runs.

use std::ops::Range;
use std::path::Path;

use decamp_shared::pages::PAGE_SIZE;

use crate::error::{ContainerError, Result};
use crate::images::{HIDDEN, HiddenPages};
use crate::segments::message::{Image, MM_MAGIC, Message};

/// The kernel's mark of a mapping that is locked (`MAP_LOCKED`), as CRIU writes it down.
const LOCKED: u64 = 0x2000;

/// Pages that CRIU did not dump.
pub(crate) struct Split {
    /// Those that may come when their process runs already.
    pub(crate) late: HiddenPages,
    /// Those that must not.
    pub(crate) locked: HiddenPages,
}

impl Split {
    /// Tells them apart by the mappings in `images`.
    ///
    /// # Errors
    /// When a page is in no mapping of its process: there would be no place for it.
    pub(crate) fn of(images: &Path, hidden: HiddenPages) -> Result<Self> {
        let (mut late, mut locked) = (HiddenPages::new(), HiddenPages::new());
        for (inner, pages) in hidden {
            let Mappings { all, locked: mappings } = Mappings::read(images, inner)?;
            let (mut others, mut ours) = (Vec::new(), Vec::new());
            for range in pages {
                let (mut nowhere, mut somewhere) = (Vec::new(), Vec::new());
                cut(&range, &all, &mut nowhere, &mut somewhere);
                if let Some(nowhere) = nowhere.first() {
                    return Err(ContainerError::section(
                        HIDDEN,
                        format!(
                            "has page {:#x} of process {inner}, in none of its mappings",
                            nowhere.start
                        ),
                    ));
                }
                cut(&range, &mappings, &mut others, &mut ours);
            }
            late.insert(inner, others);
            if !ours.is_empty() {
                locked.insert(inner, ours);
            }
        }
        Ok(Self { late, locked })
    }
}

/// Page numbers of the mappings of a process, ascending and joined.
struct Mappings {
    all: Vec<Range<u64>>,
    locked: Vec<Range<u64>>,
}

impl Mappings {
    /// Those of process `inner`.
    fn read(images: &Path, inner: i32) -> Result<Self> {
        let path = images.join(format!("mm-{inner}.img"));
        let bad = || ContainerError::malformed(&path, "has a mapping that makes no sense");
        let (mut all, mut locked) = (Vec::new(), Vec::new());
        for message in Image::read(&path, MM_MAGIC)?.into_iter().flat_map(|image| image.messages) {
            for mapping in message.each(14) {
                let mapping = mapping.ok_or_else(bad)?;
                let number = |tag| Message::number(&mapping, tag).ok_or_else(bad);
                let (start, end) = (number(1)? / PAGE_SIZE as u64, number(2)? / PAGE_SIZE as u64);
                if start >= end {
                    return Err(bad());
                }
                all.push(start..end);
                if number(6)? & LOCKED != 0 {
                    locked.push(start..end);
                }
            }
        }
        Ok(Self { all: joined(all), locked: joined(locked) })
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
fn cut(
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
