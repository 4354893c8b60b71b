//! Pages that CRIU did not dump, and that it reads from nowhere but its own pages image: those of huge pages, where
//! they do not come late. The pages image is written anew, with them in their places among CRIU's own.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use decamp_shared::pages::PAGE_SIZE;
use decamp_shared::sparse::Data;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::error::{ContainerError, Result};
use crate::images::{PE_LAZY, PE_PRESENT, Pagemap, PagemapEntry, numbered_pages, pagemap_name};

/// Copied at a time.
const PIECE: usize = 1 << 20;

/// Has `pages` (ascending page numbers) of process `inner` be in its pages image in `images`, as `from` has them
/// at the offsets of their addresses, which gives them back. To be done before any others of that process are
/// entered.
pub(crate) fn enter(images: &Path, inner: i32, pages: &[Range<u64>], from: &File) -> Result<()> {
    let path = images.join(pagemap_name(inner));
    let bytes = fs::read(&path).map_err(ContainerError::io(format!("read {}", path.display())))?;
    let mut pagemap = Pagemap::parse(&bytes)
        .and_then(|mut pagemap| pagemap.add_hidden(pages, PE_LAZY).map(|()| pagemap))
        .map_err(|what| ContainerError::malformed(&path, what))?;
    let image = images.join(numbered_pages(pagemap.head.pages_id));
    let written = images.join("pages.new");
    let what = format!("put pages of process {inner} into {}", image.display());
    rewrite(&mut pagemap, (&image, &written), from)
        .and_then(|()| fs::rename(&written, &image))
        .map_err(ContainerError::io(what))?;
    fs::write(&path, pagemap.to_bytes())
        .map_err(ContainerError::io(format!("write {}", path.display())))
}

fn rewrite(pagemap: &mut Pagemap, (old, new): (&Path, &Path), from: &File) -> io::Result<()> {
    let mut new = File::create_new(new)?;
    let mut old = match File::open(old) {
        Ok(file) => Some(file),
        // CRIU dumped no page at all.
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    for entry in &mut pagemap.entries {
        let flags = entry.flags.unwrap_or(PE_PRESENT);
        let (first, count) = bounds(entry)?;
        if flags == PE_LAZY {
            entry.flags = Some(PE_PRESENT);
            move_pages(from, first, count, &mut new)?;
        } else if flags & PE_PRESENT != 0 {
            let own = old.as_mut().ok_or(io::ErrorKind::UnexpectedEof)?;
            let copied = io::copy(&mut own.take(count), &mut new)?;
            if copied < count {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
    Ok(())
}

/// Offset and number of the bytes of an entry.
fn bounds(entry: &PagemapEntry) -> io::Result<(u64, u64)> {
    let pages = entry.range().ok_or(io::ErrorKind::InvalidData)?;
    Ok((pages.start * PAGE_SIZE as u64, (pages.end - pages.start) * PAGE_SIZE as u64))
}

/// Copies what there is of `count` bytes at offset `first`, and gives it back as it goes: there is never more than
/// a piece twice. Of what never came `to` has a hole: that takes no memory, however much it is said to be.
fn move_pages(from: &File, first: u64, count: u64, to: &mut File) -> io::Result<()> {
    let begin = to.stream_position()?;
    let end = begin.checked_add(count).ok_or(io::ErrorKind::InvalidData)?;
    let mut bytes = vec![0; PIECE.min(count as usize)];
    for data in Data::within(from, first..first + count) {
        let data = data?;
        let mut at = data.start;
        while at < data.end {
            let length = (data.end - at).min(bytes.len() as u64);
            let bytes = &mut bytes[..length as usize];
            from.read_exact_at(bytes, at)?;
            to.write_all_at(bytes, begin + (at - first))?;
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(from, hole, at as i64, length as i64)?;
            at += length;
        }
    }
    to.set_len(end)?;
    to.seek(SeekFrom::Start(end)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::images::PagemapHead;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn page(number: u8) -> Vec<u8> {
        vec![number; PAGE_SIZE]
    }

    #[test]
    fn pages_come_among_those_that_criu_dumped() {
        let directory = tempfile::tempdir().expect("a directory");
        let images = directory.path();
        let own = |range, flags| PagemapEntry::hidden(&range, flags);
        let pagemap = Pagemap {
            head: PagemapHead { pages_id: 7 },
            entries: vec![own(2..3, PE_PRESENT | PE_LAZY), own(9..11, PE_PRESENT)],
        };
        fs::write(images.join("pagemap-5.img"), pagemap.to_bytes()).expect("written");
        let own_pages = [page(2), page(9), page(10)].concat();
        fs::write(images.join("pages-7.img"), &own_pages).expect("written");
        let store = tempfile::tempfile().expect("a file");
        store.set_len(1 << 20).expect("a size");
        for number in [4, 5, 20] {
            store.write_all_at(&page(number), u64::from(number) * PAGE).expect("written");
        }
        enter(images, 5, &[4..6, 20..22], &store).expect("entered");
        let expected = [2, 4, 5, 9, 10, 20, 0].map(page).concat();
        assert_eq!(fs::read(images.join("pages-7.img")).expect("read"), expected);
        let bytes = fs::read(images.join("pagemap-5.img")).expect("read");
        let entries = Pagemap::parse(&bytes).expect("an image").entries;
        let ranges: Vec<_> = entries.iter().filter_map(PagemapEntry::range).collect();
        assert_eq!(ranges, [2..3, 4..6, 9..11, 20..22]);
        assert!(entries.iter().all(|entry| entry.flags == Some(PE_PRESENT)));
        let mut left = page(1);
        store.read_exact_at(&mut left, 4 * PAGE).expect("read");
        assert_eq!(left, page(0), "it was given back");
        // A pages image that is shorter than its pagemap says.
        fs::write(images.join("pages-7.img"), &own_pages).expect("cut");
        assert!(enter(images, 5, std::slice::from_ref(&(30..31)), &store).is_err());
    }
    #[test]
    fn what_never_came_takes_no_memory() {
        let directory = tempfile::Builder::new().tempdir_in("/dev/shm").expect("a directory");
        let images = directory.path();
        let head = PagemapHead { pages_id: 7 };
        let own = PagemapEntry::hidden(&(2 << 20..(2 << 20) + 1), PE_PRESENT);
        let pagemap = Pagemap { head, entries: vec![own] };
        fs::write(images.join("pagemap-5.img"), pagemap.to_bytes()).expect("written");
        fs::write(images.join("pages-7.img"), page(2)).expect("written");
        let store = tempfile::tempfile_in(images).expect("a file");
        store.set_len(PAGE << 21).expect("a size");
        store.write_all_at(&page(1), 70 * PAGE).expect("written");
        // 4 GiB are said to be there.
        enter(images, 5, std::slice::from_ref(&(64..64 + (1 << 20))), &store).expect("entered");
        let image = File::open(images.join("pages-7.img")).expect("an image");
        let facts = image.metadata().expect("an image");
        assert_eq!(facts.len(), (1 << 20) * PAGE + PAGE);
        assert!(facts.blocks() * 512 <= 4 * PAGE, "{} blocks", facts.blocks());
        let mut found = page(9);
        for (at, expected) in [(6, 1), (5, 0), (1 << 20, 2)] {
            image.read_exact_at(&mut found, at * PAGE).expect("read");
            assert_eq!(found, page(expected), "page {at}");
        }
    }
}
