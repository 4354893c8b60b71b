//! Pages of spaces in an archive: which there are (`memory/SPACE.map`), and their contents
//! (`memory/SPACE.pages`). Pages of zeros are in neither: memory stays as sparse as it is.

use std::io::{Read, Write};
use std::sync::Arc;

use super::error::{ArchiveError, Result};
use super::header::PartInfo;
use super::parcel::{Parcel, cannot_read, cannot_write, read_whole};
use crate::pages::{PAGE_SIZE, PageRange, PageReader, PageSet, PageWriter, SpaceId};
use crate::workload::SpaceInfo;

/// Pages read or written at once.
const PIECE: u64 = 256;
/// Bytes of a map at most: every second page of a TiB.
const MAP_MOST: u64 = 2 << 30;
/// Bytes of one range in a map: first page and count, little-endian.
const RANGE: usize = 16;

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Those of `pages` that hold anything but zeros.
///
/// # Errors
/// When one of them cannot be read.
pub fn without_zeros(reader: &dyn PageReader, pages: &PageSet) -> Result<PageSet> {
    let mut found = PageSet::new();
    each_piece(pages.ranges(), |piece, buffer| {
        reader.read(piece, buffer)?;
        for (at, page) in (piece.first..).zip(buffer.chunks_exact(PAGE_SIZE)) {
            if page != ZEROS {
                found.insert(PageRange::new(piece.space, at, 1));
            }
        }
        Ok(())
    })?;
    Ok(found)
}

/// The two parts of one space.
pub fn parcels(space: SpaceId, pages: &PageSet, reader: Arc<dyn PageReader>) -> [Parcel; 2] {
    let ranges: Vec<PageRange> = pages.ranges().filter(|range| range.space == space).collect();
    let number = |value: u64| value.to_le_bytes();
    let map = ranges.iter().flat_map(|range| [number(range.first), number(range.count)]);
    let map: Vec<u8> = map.flatten().collect();
    let count: u64 = ranges.iter().map(|range| range.count).sum();
    let name = pages_name(space);
    let part = name.clone();
    let pages = Parcel::filled(name, count * PAGE_SIZE as u64, move |to| {
        copy_pages(ranges.into_iter(), &*reader, to, &part)
    });
    [Parcel::bytes(map_name(space), map), pages]
}

/// Copies pages from `reader` into a part.
///
/// # Errors
/// When a page cannot be read, or nothing more be written.
pub fn copy_pages(
    ranges: impl Iterator<Item = PageRange>,
    reader: &dyn PageReader,
    to: &mut dyn Write,
    part: &str,
) -> Result<()> {
    each_piece(ranges, |piece, buffer| {
        reader.read(piece, buffer)?;
        to.write_all(buffer).map_err(|error| cannot_write(part, &error))
    })
}

/// Copies pages of a part into a workload.
///
/// # Errors
/// When the part ends, or a page cannot be stored.
pub fn place_pages(
    ranges: impl Iterator<Item = PageRange>,
    from: &mut dyn Read,
    writer: &dyn PageWriter,
    part: &str,
) -> Result<()> {
    each_piece(ranges, |piece, buffer| {
        from.read_exact(buffer).map_err(|error| cannot_read(part, &error))?;
        Ok(writer.write(piece, buffer)?)
    })
}

fn each_piece(
    ranges: impl Iterator<Item = PageRange>,
    mut act: impl FnMut(PageRange, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; PIECE as usize * PAGE_SIZE];
    for range in ranges {
        let end = range.first + range.count;
        let mut first = range.first;
        while first < end {
            let piece = PageRange::new(range.space, first, PIECE.min(end - first));
            act(piece, &mut buffer[..piece.bytes()])?;
            first += piece.count;
        }
    }
    Ok(())
}

/// What the parts of one space's memory are in the reading.
#[derive(Debug)]
pub struct SpaceParts {
    info: SpaceInfo,
    ranges: Option<Vec<PageRange>>,
    had_pages: bool,
}

impl SpaceParts {
    /// Of the space `info`.
    pub fn new(info: SpaceInfo) -> Self {
        Self { info, ranges: None, had_pages: false }
    }

    /// Whether `part` is one of the two.
    pub fn is_map(&self, part: &PartInfo) -> bool {
        part.name == map_name(SpaceId(self.info.id))
    }

    /// Whether `part` holds the contents.
    pub fn is_pages(&self, part: &PartInfo) -> bool {
        part.name == pages_name(SpaceId(self.info.id))
    }

    /// Reads the map, which stands before the contents.
    ///
    /// # Errors
    /// When it is none, or of no pages of this space.
    pub fn read_map(&mut self, part: &PartInfo, content: &mut dyn Read) -> Result<()> {
        let bytes = read_whole(part, MAP_MOST, content)?;
        let bad = |what: &str| Err(ArchiveError::part(&part.name, what));
        if bytes.len() % RANGE != 0 {
            return bad("is no list of pages");
        }
        let mut ranges = Vec::with_capacity(bytes.len() / RANGE);
        let mut past = 0;
        for range in bytes.chunks_exact(RANGE) {
            let number = |at: usize| {
                range[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX)
            };
            let (first, count) = (number(0), number(8));
            let end = first.checked_add(count).filter(|end| *end <= self.info.page_limit);
            match end {
                Some(end) if first >= past && count > 0 => past = end,
                _ => return bad("has pages out of order, or beyond their space"),
            }
            ranges.push(PageRange::new(SpaceId(self.info.id), first, count));
        }
        self.ranges = Some(ranges);
        Ok(())
    }

    /// The pages that the contents are of.
    ///
    /// # Errors
    /// When there was no map, or it speaks of another number of pages.
    pub fn pages_of(&mut self, part: &PartInfo) -> Result<&[PageRange]> {
        let missing = || ArchiveError::part(&part.name, "stands before its map");
        let ranges = self.ranges.as_ref().ok_or_else(missing)?;
        let count: u64 = ranges.iter().map(|range| range.count).sum();
        match count.checked_mul(PAGE_SIZE as u64) {
            Some(bytes) if bytes == part.size => {
                self.had_pages = true;
                Ok(ranges)
            }
            _ => Err(ArchiveError::part(&part.name, "has not as many pages as its map says")),
        }
    }

    /// That both parts were there: memory of which nothing is said would be all zeros.
    ///
    /// # Errors
    /// Which one is missing.
    pub fn complete(&self) -> Result<()> {
        let space = SpaceId(self.info.id);
        match (&self.ranges, self.had_pages) {
            (None, _) => Err(ArchiveError::part(map_name(space), "is missing")),
            (Some(_), false) => Err(ArchiveError::part(pages_name(space), "is missing")),
            (Some(_), true) => Ok(()),
        }
    }
}

fn map_name(space: SpaceId) -> String {
    format!("memory/{}.map", space.0)
}

fn pages_name(space: SpaceId) -> String {
    format!("memory/{}.pages", space.0)
}
