//! Where the threads of a process have the areas of their restartable sequences (linux/rseq.h), as CRIU's
//! images have it: the kernel writes there, from the moment in which CRIU tells it of an area again.

use std::ops::Range;
use std::path::Path;

use decamp_shared::pages::PAGE_SIZE;

use crate::error::{ContainerError, Result};
use crate::forked::sharing::united;
use crate::placing::HugeMappings;
use crate::segments::message::{Image, Message, PSTREE_MAGIC};

/// The second mark of the image of one thread.
const CORE_MAGIC: u32 = 0x5505_3847;
/// No area is longer.
const LENGTH_MOST: u64 = 4096;

/// The areas of the threads of process `inner`.
///
/// # Errors
/// When the images cannot be read or make no sense.
pub(super) fn areas(images: &Path, inner: i32) -> Result<Vec<Range<u64>>> {
    let path = images.join("pstree.img");
    let tree = Image::read(&path, PSTREE_MAGIC)?.into_iter().flat_map(|image| image.messages);
    let mut found = Vec::new();
    for process in tree.filter(|process| process.number(1) == u64::try_from(inner).ok()) {
        let bad = || ContainerError::malformed(&path, "has a process that makes no sense");
        for thread in process.numbers(5).ok_or_else(bad)? {
            found.extend(area(&images.join(format!("core-{thread}.img")))?);
        }
    }
    Ok(found)
}

/// Numbers of the ordinary pages in all huge ones that areas lie in, ascending: the kernel writes there while
/// nobody is told of what is missing, and makes a huge page of zeros for it.
///
/// # Errors
/// When the images cannot be read or make no sense.
pub(crate) fn huge_pages(images: &Path, mappings: &HugeMappings) -> Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    for (inner, mappings) in mappings {
        for area in areas(images, *inner)? {
            for mapping in mappings {
                let start = area.start.max(mapping.addresses.start) / mapping.page * mapping.page;
                let end = area.end.min(mapping.addresses.end).next_multiple_of(mapping.page);
                if start < end {
                    found.push(start / PAGE_SIZE as u64..end / PAGE_SIZE as u64);
                }
            }
        }
    }
    Ok(united(found))
}

fn area(path: &Path) -> Result<Option<Range<u64>>> {
    let bad = || ContainerError::malformed(path, "has a thread that makes no sense");
    let image = Image::read(path, CORE_MAGIC)?.ok_or_else(bad)?;
    let core = image.messages.first().ok_or_else(bad)?;
    let inner = |message: &Message, tag| match message.bytes(tag) {
        Some(bytes) => Message::parse(bytes).map(Some).ok_or_else(bad),
        None => Ok(None),
    };
    let Some(thread) = inner(core, 5)? else { return Ok(None) };
    let Some(sequences) = inner(&thread, 15)? else { return Ok(None) };
    let start = sequences.number(1).ok_or_else(bad)?;
    let length = sequences.number(2).filter(|length| *length <= LENGTH_MOST).ok_or_else(bad)?;
    let end = start.checked_add(length).ok_or_else(bad)?;
    Ok((start != 0).then_some(start..end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placing::HugeMapping;

    fn thread(directory: &Path, number: u32, area: Option<(u64, u64)>) {
        let (mut core, mut thread, mut sequences) =
            (Message::default(), Message::default(), Message::default());
        if let Some((start, length)) = area {
            sequences.set_number(1, start);
            sequences.set_number(2, length);
            thread.set_bytes(15, sequences.to_bytes());
        }
        core.set_bytes(5, thread.to_bytes());
        let image = Image::of(CORE_MAGIC, vec![core]);
        image.write(&directory.join(format!("core-{number}.img"))).expect("written");
    }

    #[test]
    fn huge_pages_are_those_that_areas_lie_in() {
        const HUGE: u64 = 2 << 20;
        let directory = tempfile::tempdir().expect("a directory");
        let images = directory.path();
        let mut process = Message::default();
        process.set_number(1, 7);
        for tid in [7u8, 8, 9] {
            process =
                Message::parse(&[&process.to_bytes()[..], &[5 << 3, tid]].concat()).expect("one");
        }
        let tree = Image::of(PSTREE_MAGIC, vec![process]);
        tree.write(&images.join("pstree.img")).expect("written");
        // At the end of one, across two, and below all.
        thread(images, 7, Some((5 * HUGE - 32, 32)));
        thread(images, 8, Some((7 * HUGE - 8, 32)));
        thread(images, 9, Some((4 * HUGE - 32, 32)));
        let addresses = 4 * HUGE..8 * HUGE;
        let mapping = HugeMapping { addresses, page: HUGE, promised: true };
        let mappings = HugeMappings::from([(7, vec![mapping.clone()])]);
        let found = huge_pages(images, &mappings).expect("read");
        assert_eq!(found, [4 * 512..5 * 512, 6 * 512..8 * 512]);
        // Of others' threads there are none.
        let mappings = HugeMappings::from([(5, vec![mapping])]);
        assert_eq!(huge_pages(images, &mappings).expect("read"), []);
    }

    #[test]
    fn the_areas_are_those_of_the_threads() {
        let directory = tempfile::tempdir().expect("a directory");
        let images = directory.path();
        let mut process = Message::default();
        process.set_number(1, 7);
        let mut other = process.clone();
        other.set_number(1, 9);
        for tid in [7u8, 8] {
            // Each has its own number.
            process =
                Message::parse(&[&process.to_bytes()[..], &[5 << 3, tid]].concat()).expect("one");
        }
        let tree = Image::of(PSTREE_MAGIC, vec![other, process]);
        tree.write(&images.join("pstree.img")).expect("written");
        thread(images, 7, Some((4096, 32)));
        thread(images, 8, None);
        let found = areas(images, 7).expect("read");
        assert_eq!(found.first(), Some(&(4096..4128)));
        assert_eq!(found.len(), 1);
        assert!(areas(images, 9).expect("read").is_empty());
        thread(images, 8, Some((u64::MAX, 32)));
        assert!(areas(images, 7).is_err());
        std::fs::remove_file(images.join("core-8.img")).expect("removed");
        assert!(areas(images, 7).is_err());
    }
}
