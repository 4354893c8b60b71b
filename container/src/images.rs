//! CRIU's image files as sections on the wire, and the surgery that puts hidden pages back.
//!
//! A pagemap image is two magic numbers, then messages, each after its length. On the destination
//! the hidden pages are entered into each process's pagemap: as pages that come late, or as pages of a
//! parent image, and that parent is the page store itself: a sparse file whose offset is the address.
//! Images come from another host: names, lengths and numbers are checked before they are used.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use decamp_shared::pages::PAGE_SIZE;
use decamp_shared::workload::Section;
use prost::Message;

use crate::beside;
use crate::error::{ContainerError, Result};
use crate::memory::HiddenProcess;
use crate::packed::{self, Image, PACKED};

/// Prefix of the kind of a section that is an image file.
pub(crate) const PREFIX: &str = "criu/";
/// The section that lists the hidden pages.
pub(crate) const HIDDEN: &str = "criu/hidden";
pub(crate) const VERSION: u32 = 1;
/// A tree has at most so many image files.
const FILES_CAP: usize = 1 << 16;
/// Files that one thread reads at a time.
const READ_TOGETHER: usize = 64;
/// CRIU's marks at the head of an image.
const COMMON_MAGIC: u32 = 0x5456_4319;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
/// Flags of a pagemap entry: contents are in the parent image, come late, are in this image.
pub(crate) const PE_PARENT: u32 = 1;
pub(crate) const PE_LAZY: u32 = 2;
pub(crate) const PE_PRESENT: u32 = 4;
/// No message in a pagemap image is longer.
const MESSAGE_CAP: usize = 64;
/// One past the last page of a user address space of 47 bits.
pub(crate) const PAGE_LIMIT: u64 = 1 << 35;
/// Pages of one entry in the parent's pagemap: CRIU counts them in an `int`.
const PARENT_ENTRY: u64 = 1 << 30;
/// The number that the parent's pagemap calls its pages file.
const PARENT_PAGES_ID: u32 = 1;

/// Pages of the processes that CRIU did not dump, as page numbers, by the process's number in the
/// container.
pub(crate) type HiddenPages = BTreeMap<i32, Vec<Range<u64>>>;

/// CRIU's `pagemap_head` (tags from CRIU's pagemap.proto).
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct PagemapHead {
    #[prost(uint32, required, tag = "1")]
    pub(crate) pages_id: u32,
}

/// CRIU's `pagemap_entry`. CRIU 4.2 counts pages in a field of 64 bits as well.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    address: u64,
    #[prost(uint32, required, tag = "2")]
    pages: u32,
    #[prost(bool, optional, tag = "3")]
    pub(crate) in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    pub(crate) flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    wide_pages: Option<u64>,
}

/// From where a restore has the hidden pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HiddenIn<'a> {
    /// They come late, from a daemon.
    Daemon,
    /// They are in a parent image, in this directory, in the pages file of the process of that number.
    Parent(&'a Path, i32),
}

impl PagemapEntry {
    pub(crate) fn hidden(range: &Range<u64>, flags: u32) -> Self {
        Self {
            address: range.start * PAGE_SIZE as u64,
            pages: (range.end - range.start) as u32,
            in_parent: None,
            flags: Some(flags),
            wide_pages: None,
        }
    }

    /// Its page numbers; nothing when they leave the address space.
    pub(crate) fn range(&self) -> Option<Range<u64>> {
        let first = self.address / PAGE_SIZE as u64;
        let end = first.checked_add(self.wide_pages.unwrap_or(self.pages.into()))?;
        (self.address.is_multiple_of(PAGE_SIZE as u64) && end <= PAGE_LIMIT).then_some(first..end)
    }
}

/// A process's pagemap image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pagemap {
    pub(crate) head: PagemapHead,
    pub(crate) entries: Vec<PagemapEntry>,
}

/// Every image file in `directory`: as a section, or small ones `together`.
pub(crate) fn collect(directory: &Path, together: bool) -> Result<Vec<Section>> {
    let images = read_all(directory)?;
    let (mut sections, alone) = if together { packed::pack(images)? } else { (Vec::new(), images) };
    sections.extend(alone.into_iter().map(|(name, bytes)| Section {
        kind: format!("{PREFIX}{name}"),
        version: VERSION,
        bytes,
    }));
    Ok(sections)
}

/// Every image file in `directory`, by name.
fn read_all(directory: &Path) -> Result<Vec<Image>> {
    let list = || format!("list {}", directory.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(ContainerError::io(list()))? {
        let name = entry.map_err(ContainerError::io(list()))?.file_name();
        let name = name.to_string_lossy().into_owned();
        // Its log and its statistics are no state.
        if is_image_name(&name) && !name.starts_with("stats-") {
            names.push(name);
        }
    }
    names.sort_unstable();
    let read = |names: &[String]| -> Result<Vec<Image>> {
        let each = names.iter().map(|name| {
            let path = directory.join(name);
            let bytes = fs::read(&path);
            let bytes = bytes.map_err(ContainerError::io(format!("read {}", path.display())))?;
            Ok((name.clone(), bytes))
        });
        each.collect()
    };
    Ok(beside::each(names.chunks(READ_TOGETHER).collect(), read)?.concat())
}

/// The list of hidden pages as a section.
pub(crate) fn hidden_section(hidden: &[HiddenProcess]) -> Section {
    let pages = |range: &Range<u64>| range.start / PAGE_SIZE as u64..range.end / PAGE_SIZE as u64;
    let pages = |process: &HiddenProcess| process.pages.iter().map(pages).collect();
    let of = |process: &HiddenProcess| (process.process.inner, pages(process));
    write_hidden(&hidden.iter().map(of).collect())
}

/// What [`read_hidden`] reads.
pub(crate) fn write_hidden(hidden: &HiddenPages) -> Section {
    let mut bytes = (hidden.len() as u32).to_le_bytes().to_vec();
    for (inner, ranges) in hidden {
        bytes.extend_from_slice(&inner.to_le_bytes());
        bytes.extend_from_slice(&(ranges.len() as u64).to_le_bytes());
        for range in ranges {
            bytes.extend_from_slice(&range.start.to_le_bytes());
            bytes.extend_from_slice(&range.end.to_le_bytes());
        }
    }
    Section { kind: HIDDEN.to_owned(), version: VERSION, bytes }
}

/// Reads what [`hidden_section`] wrote.
pub(crate) fn read_hidden(section: &Section) -> Result<HiddenPages> {
    let bad = |what: &str| ContainerError::section(HIDDEN, what);
    if section.version != VERSION {
        return Err(bad("has a version that this build does not know"));
    }
    let mut rest = &section.bytes[..];
    let processes =
        take::<4>(&mut rest).map(u32::from_le_bytes).ok_or_else(|| bad("is cut short"))?;
    let mut found = HiddenPages::new();
    for _ in 0..processes {
        let inner =
            take::<4>(&mut rest).map(i32::from_le_bytes).ok_or_else(|| bad("is cut short"))?;
        let count =
            take::<8>(&mut rest).map(u64::from_le_bytes).ok_or_else(|| bad("is cut short"))?;
        if count > rest.len() as u64 / 16 {
            return Err(bad("is cut short"));
        }
        let mut ranges: Vec<Range<u64>> = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let mut number =
                || take::<8>(&mut rest).map(u64::from_le_bytes).ok_or_else(|| bad("is cut short"));
            let range = number()?..number()?;
            let after_last = ranges.last().is_none_or(|last| last.end <= range.start);
            if range.start >= range.end || range.end > PAGE_LIMIT || !after_last {
                return Err(bad("has ranges that are out of order or of no address space"));
            }
            ranges.push(range);
        }
        if inner <= 0 || found.insert(inner, ranges).is_some() {
            return Err(bad("names a process twice, or one that cannot be"));
        }
    }
    if rest.is_empty() { Ok(found) } else { Err(bad("is longer than it says")) }
}

/// Writes images as files into `directory`; gives back the sections that are none.
pub(crate) fn unpack(sections: Vec<Section>, directory: &Path) -> Result<Vec<Section>> {
    if sections.len() > FILES_CAP {
        return Err(too_many());
    }
    let (packs, sections): (Vec<_>, Vec<_>) =
        sections.into_iter().partition(|section| section.kind == PACKED);
    let mut others = Vec::new();
    let files = AtomicUsize::new(0);
    let write = |name: &str, bytes: &[u8]| match files.fetch_add(1, Ordering::Relaxed) {
        FILES_CAP.. => Err(too_many()),
        _ => write_image(directory, name, bytes),
    };
    for section in sections {
        let Some(name) = section.kind.strip_prefix(PREFIX).filter(|_| section.kind != HIDDEN)
        else {
            others.push(section);
            continue;
        };
        if section.version != VERSION {
            return Err(ContainerError::section(
                section.kind,
                "has a version that this build does not know",
            ));
        }
        write(name, &section.bytes)?;
    }
    packed::unpack(packs, write)?;
    Ok(others)
}

fn too_many() -> ContainerError {
    ContainerError::section(PREFIX, "comes in too many parts")
}

fn write_image(directory: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    if !is_image_name(name) {
        return Err(ContainerError::section(format!("{PREFIX}{name}"), "is named as no image is"));
    }
    let path = directory.join(name);
    let what = || format!("write {}", path.display());
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(ContainerError::io(what()))?;
    std::io::Write::write_all(&mut file, bytes).map_err(ContainerError::io(what()))
}

/// Enters the hidden pages of process `inner` into its pagemap in `images`. A parent that holds them is
/// made an image; its pages file itself is `parent/pages_name`, the store.
pub(crate) fn complete(
    images: &Path,
    within: HiddenIn<'_>,
    inner: i32,
    hidden: &[Range<u64>],
) -> Result<()> {
    let flags = if within == HiddenIn::Daemon { PE_LAZY } else { PE_PARENT };
    let name = pagemap_name(inner);
    let path = images.join(&name);
    let bytes = fs::read(&path).map_err(ContainerError::io(format!("read {}", path.display())))?;
    let mut pagemap = Pagemap::parse(&bytes)
        .map_err(|what| ContainerError::section(format!("{PREFIX}{name}"), what))?;
    pagemap
        .add_hidden(hidden, flags)
        .map_err(|what| ContainerError::section(format!("{PREFIX}{name}"), what))?;
    fs::write(&path, pagemap.to_bytes())
        .map_err(ContainerError::io(format!("write {}", path.display())))?;
    let HiddenIn::Parent(parent, of) = within else { return Ok(()) };
    let path = parent.join(&name);
    let whole = Pagemap::of_store(pages_id(of));
    fs::write(&path, whole.to_bytes())
        .map_err(ContainerError::io(format!("write {}", path.display())))
}

/// Leaves the hidden pages of process `inner` out of its pagemap in `images`, as if nothing had been there, and
/// gives those that CRIU did not dump after all.
pub(crate) fn leave_out(
    images: &Path,
    inner: i32,
    hidden: &[Range<u64>],
) -> Result<Vec<Range<u64>>> {
    let name = pagemap_name(inner);
    let path = images.join(&name);
    let bytes = fs::read(&path).map_err(ContainerError::io(format!("read {}", path.display())))?;
    let bad = |what| ContainerError::section(format!("{PREFIX}{name}"), what);
    let mut pagemap = Pagemap::parse(&bytes).map_err(bad)?;
    pagemap.add_hidden(hidden, PE_LAZY).map_err(bad)?;
    // Nothing else has that flag now.
    let (absent, rest): (Vec<_>, Vec<_>) =
        pagemap.entries.drain(..).partition(|entry| entry.flags == Some(PE_LAZY));
    pagemap.entries = rest;
    fs::write(&path, pagemap.to_bytes())
        .map_err(ContainerError::io(format!("write {}", path.display())))?;
    Ok(absent.iter().filter_map(PagemapEntry::range).collect())
}

/// That `hidden` names every process that has a pagemap in `images`, with hidden pages or without: where
/// pages come late, an entry of CRIU's own that may come late must not be left as it is, or it never
/// comes.
pub(crate) fn check_all_named(images: &Path, hidden: &HiddenPages) -> Result<()> {
    let list = || format!("list {}", images.display());
    for entry in fs::read_dir(images).map_err(ContainerError::io(list()))? {
        let name = entry.map_err(ContainerError::io(list()))?.file_name();
        let Some(inner) = name.to_str().and_then(process_of) else { continue };
        if !hidden.contains_key(&inner) {
            return Err(ContainerError::section(HIDDEN, format!("does not name process {inner}")));
        }
    }
    Ok(())
}

/// Name of the pages file that the parent's pagemap of process `inner` points at.
pub(crate) fn pages_name(inner: i32) -> String {
    numbered_pages(pages_id(inner))
}

/// Name of the pages file of that number.
pub(crate) fn numbered_pages(pages_id: u32) -> String {
    format!("pages-{pages_id}.img")
}

fn pages_id(inner: i32) -> u32 {
    // Numbers of processes are positive and below 2^22.
    PARENT_PAGES_ID + inner as u32
}

/// The process whose pagemap image has that name. Those of shared memory have other names.
pub(crate) fn process_of(name: &str) -> Option<i32> {
    name.strip_prefix("pagemap-")?.strip_suffix(".img")?.parse().ok()
}

pub(crate) fn pagemap_name(inner: i32) -> String {
    format!("pagemap-{inner}.img")
}

pub(crate) fn is_image_name(name: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:+".contains(&byte);
    name.len() <= 200 && !name.starts_with('.') && name.ends_with(".img") && name.bytes().all(good)
}

impl Pagemap {
    /// The pagemap of a page store: every page of the address space, at the offset of its address.
    fn of_store(pages_id: u32) -> Self {
        Self::of_pages(pages_id, PAGE_LIMIT)
    }

    /// The pagemap of a file that holds all pages below `end`, each at the offset of its address.
    pub(crate) fn of_pages(pages_id: u32, end: u64) -> Self {
        let mut entries = Vec::new();
        push_hidden(&mut entries, &(0..end), PE_PRESENT);
        Self { head: PagemapHead { pages_id }, entries }
    }

    pub(crate) fn parse(bytes: &[u8]) -> std::result::Result<Self, &'static str> {
        let mut rest = bytes;
        let magic = take::<4>(&mut rest).map(u32::from_le_bytes);
        let kind = take::<4>(&mut rest).map(u32::from_le_bytes);
        if magic != Some(COMMON_MAGIC) || kind != Some(PAGEMAP_MAGIC) {
            return Err("is no pagemap image");
        }
        let head = take_message(&mut rest)?.ok_or("has no head")?;
        let mut entries = Vec::new();
        while let Some(entry) = take_message(&mut rest)? {
            entries.push(entry);
        }
        Ok(Self { head, entries })
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = COMMON_MAGIC.to_le_bytes().to_vec();
        bytes.extend_from_slice(&PAGEMAP_MAGIC.to_le_bytes());
        put_message(&mut bytes, &self.head);
        for entry in &self.entries {
            put_message(&mut bytes, entry);
        }
        bytes
    }

    /// Adds hidden page ranges (ascending) with these flags. What CRIU dumped itself stays as it is and
    /// in its order, which is the order of its pages file; none of it comes late, whatever it was called.
    pub(crate) fn add_hidden(
        &mut self,
        hidden: &[Range<u64>],
        flags: u32,
    ) -> std::result::Result<(), &'static str> {
        let mut merged = Vec::with_capacity(self.entries.len() + hidden.len());
        let mut waiting = hidden.iter().cloned().peekable();
        let mut past = 0;
        for mut entry in self.entries.drain(..) {
            entry.flags = entry.flags.map(|flags| flags & !PE_LAZY);
            let own = entry.range().ok_or("has an entry that leaves the address space")?;
            if own.start < past {
                return Err("has entries that are out of order");
            }
            past = own.end;
            while let Some(range) = waiting.peek_mut().filter(|range| range.start < own.end) {
                if range.start < own.start {
                    let before = range.start..range.end.min(own.start);
                    push_hidden(&mut merged, &before, flags);
                    range.start = before.end;
                }
                // What CRIU dumped after all need not come from us.
                range.start = range.start.max(own.end.min(range.end));
                if range.start < range.end {
                    break;
                }
                waiting.next();
            }
            merged.push(entry);
        }
        waiting.for_each(|range| push_hidden(&mut merged, &range, flags));
        self.entries = merged;
        Ok(())
    }
}

/// Adds one range, in entries that CRIU's counters hold.
fn push_hidden(entries: &mut Vec<PagemapEntry>, range: &Range<u64>, flags: u32) {
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + PARENT_ENTRY);
        entries.push(PagemapEntry::hidden(&(at..end), flags));
        at = end;
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (first, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*first)
}

fn take_message<M: Message + Default>(
    rest: &mut &[u8],
) -> std::result::Result<Option<M>, &'static str> {
    if rest.is_empty() {
        return Ok(None);
    }
    let length = take::<4>(rest).map(u32::from_le_bytes).ok_or("is cut short")? as usize;
    if length > MESSAGE_CAP || length > rest.len() {
        return Err("is cut short, or has a message that is too long");
    }
    let (message, after) = rest.split_at(length);
    *rest = after;
    M::decode(message).map(Some).map_err(|_| "has a message that makes no sense")
}

fn put_message(bytes: &mut Vec<u8>, message: &impl Message) {
    bytes.extend_from_slice(&(message.encoded_len() as u32).to_le_bytes());
    bytes.extend_from_slice(&message.encode_to_vec());
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::memory::Process;

    fn own(range: Range<u64>, flags: u32) -> PagemapEntry {
        PagemapEntry::hidden(&range, flags)
    }

    fn disjoint(mut cuts: Vec<u64>) -> Vec<Range<u64>> {
        cuts.sort_unstable();
        cuts.dedup();
        cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect()
    }

    #[test]
    fn the_bytes_are_those_that_criu_writes() {
        // As `criu dump` 4.1.1 wrote it: pages 1, one entry of 3 pages at 0x400000, flags 6.
        let image = [
            0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, 2, 0, 0, 0, 0x08, 0x01, 9, 0, 0, 0,
            0x08, 0x80, 0x80, 0x80, 0x02, 0x10, 0x03, 0x20, 0x06,
        ];
        let pagemap = Pagemap::parse(&image).expect("an image");
        assert_eq!(pagemap.entries, [own(0x400..0x403, 6)]);
        assert_eq!(pagemap.to_bytes(), image);
    }

    #[test]
    fn the_store_covers_the_whole_address_space() {
        let whole = Pagemap::of_store(7);
        let last = whole.entries.last().and_then(PagemapEntry::range).expect("an entry");
        assert_eq!(last.end, PAGE_LIMIT);
        assert_eq!(whole.entries.len(), 32);
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in ["../x.img", "a/b.img", ".x.img", "core-1", "", "tmpfs-../x", "x.img\0"] {
            assert!(!is_image_name(name), "{name:?}");
        }
        for name in ["core-1.img", "pagemap-1.img", "tmpfs-dev-73.tar.gz.img", "ip6tables-9.img"] {
            assert!(is_image_name(name), "{name:?}");
        }
    }

    #[test]
    fn images_come_back_as_files_however_they_travel() {
        let directory = tempfile::tempdir().expect("a directory");
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir(&from).expect("a directory");
        for number in 0..300 {
            fs::write(from.join(format!("core-{number}.img")), vec![1; number]).expect("written");
        }
        fs::write(from.join("pages-1.img"), vec![2; 3 << 20]).expect("written");
        fs::write(from.join("stats-dump"), "no image").expect("written");
        for together in [false, true] {
            let mut sections = collect(&from, together).expect("collected");
            assert_eq!(sections.len(), if together { 2 } else { 301 });
            sections.push(write_hidden(&HiddenPages::new()));
            fs::create_dir(&to).expect("a directory");
            let others = unpack(sections, &to).expect("our own");
            assert_eq!(others.iter().map(|one| &*one.kind).collect::<Vec<_>>(), [HIDDEN]);
            assert_eq!(read_all(&to).expect("read"), read_all(&from).expect("read"));
            fs::remove_dir_all(&to).expect("removed");
        }
    }

    #[test]
    fn what_is_packed_is_written_nowhere_else_and_once() {
        let directory = tempfile::tempdir().expect("a directory");
        let refused = |names: &[&str], why: &str| {
            let images = names.iter().map(|name| ((*name).to_owned(), b"x".to_vec())).collect();
            let (sections, _) = packed::pack(images).expect("packed");
            let error = unpack(sections, directory.path()).expect_err(why).to_string();
            assert!(error.contains(why), "{error}");
        };
        refused(&["../core-1.img"], "named as no image is");
        refused(&["hidden"], "named as no image is");
        refused(&["core-1.img", "core-1.img"], "Cannot write");
        let many: Vec<String> = (0..=FILES_CAP).map(|number| format!("a{number}.img")).collect();
        refused(&many.iter().map(String::as_str).collect::<Vec<_>>(), "too many parts");
    }

    proptest! {
        #[test]
        fn hidden_pages_fill_what_criu_left_out(
            theirs in prop::collection::vec(0u64..200, 0..16),
            hidden in prop::collection::vec(0u64..200, 0..16),
            flags in prop::sample::select(vec![PE_PARENT, PE_LAZY]),
        ) {
            let (theirs, hidden) = (disjoint(theirs), disjoint(hidden));
            let entries: Vec<_> = theirs.iter().map(|range| own(range.clone(), 4)).collect();
            let called_late = theirs.iter().map(|range| own(range.clone(), 6)).collect();
            let mut pagemap = Pagemap { head: PagemapHead { pages_id: 1 }, entries: called_late };
            pagemap.add_hidden(&hidden, flags).expect("sane ranges");
            let mut past = 0;
            let mut parent = BTreeSet::new();
            for entry in &pagemap.entries {
                let range = entry.range().expect("sane");
                prop_assert!(range.start >= past && range.start < range.end);
                past = range.end;
                if entry.flags == Some(flags) { parent.extend(range); }
            }
            let kept: Vec<_> = pagemap.entries.iter().filter(|e| e.flags == Some(4)).cloned().collect();
            prop_assert_eq!(kept, entries);
            let expected: BTreeSet<u64> = hidden.into_iter().flatten()
                .filter(|page| !theirs.iter().any(|range| range.contains(page))).collect();
            prop_assert_eq!(parent, expected);
            prop_assert_eq!(Pagemap::parse(&pagemap.to_bytes()), Ok(pagemap));
        }

        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Pagemap::parse(&bytes);
            let mut image = COMMON_MAGIC.to_le_bytes().to_vec();
            image.extend_from_slice(&PAGEMAP_MAGIC.to_le_bytes());
            image.extend_from_slice(&bytes);
            let everything = std::iter::once(0..PAGE_LIMIT).collect::<Vec<_>>();
            let _ = Pagemap::parse(&image).map(|mut pagemap| pagemap.add_hidden(&everything, PE_LAZY));
            let _ = read_hidden(&Section { kind: HIDDEN.into(), version: VERSION, bytes });
        }

        #[test]
        fn the_list_of_hidden_pages_comes_back(cuts in prop::collection::vec(0u64..PAGE_LIMIT, 0..20)) {
            let ranges = disjoint(cuts);
            let bytes = |range: &Range<u64>| range.start * 4096..range.end * 4096;
            let hidden = HiddenProcess {
                process: Process { pid: 99, inner: 3 },
                mappings: Vec::new(),
                pages: ranges.iter().map(bytes).collect(),
                written: Vec::new(),
            };
            let back = read_hidden(&hidden_section(&[hidden])).expect("our own");
            prop_assert_eq!(back, HiddenPages::from([(3, ranges)]));
        }
    }
}
