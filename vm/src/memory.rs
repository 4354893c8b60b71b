//! Guest memory: one memfd whose byte offset is the guest physical address, mapped shared, with a
//! bitmap of what the VMM itself writes. Nothing here knows KVM.
//!
//! Memory beyond 3 GiB lies above 4 GiB; the hole between them, where devices live, is a hole in
//! the file too, so that a page number of the page engine is a guest frame number.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use decamp_shared::pages::{PAGE_SIZE, PageRange, PageSet, SpaceId};
use decamp_shared::sparse::Data;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MmapRegion,
};

use crate::error::{Result, VmError};
use crate::files::Files;
use crate::layout::{HOLE_END, HOLE_START};

/// The one space of a VM.
pub const GUEST_MEMORY: SpaceId = SpaceId(0);

/// The mapping of guest memory, with the bitmap of the VMM's own writes.
pub(crate) type Map = GuestMemoryMmap<AtomicBitmap>;

/// Guest memory of one VM.
#[derive(Debug)]
pub(crate) struct Memory {
    file: Arc<File>,
    map: Map,
}

impl Memory {
    /// Fresh memory of `bytes` (a multiple of the page size), all of it holes, sealed against
    /// becoming shorter or longer.
    pub(crate) fn create(bytes: u64) -> Result<Self> {
        let ranges = layout(bytes);
        let end = ranges.last().map_or(0, |(start, len)| start + len);
        let fd = memfd_create(c"decamp-guest", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
            .map_err(|error| VmError::refused("create the memfd of guest memory", error))?;
        let file = Arc::new(File::from(fd));
        file.set_len(end).map_err(|error| {
            VmError::refused(format!("size guest memory to {end} bytes"), error)
        })?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&*file, FcntlArg::F_ADD_SEALS(seals))
            .map_err(|error| VmError::refused("seal guest memory", error))?;
        let regions = ranges.iter().map(|(start, len)| {
            let offset = FileOffset::from_arc(file.clone(), *start);
            (GuestAddress(*start), usize::try_from(*len).unwrap_or(usize::MAX), Some(offset))
        });
        let map = Map::from_ranges_with_files(regions).map_err(|error| {
            VmError::refused(format!("map {bytes} bytes of guest memory"), io::Error::other(error))
        })?;
        Ok(Self { file, map })
    }

    /// The mapping.
    pub(crate) fn map(&self) -> &Map {
        &self.map
    }

    /// Ranges of memory as (guest address, bytes), ascending.
    pub(crate) fn ranges(&self) -> Vec<(u64, u64)> {
        self.map.iter().map(|region| (region.start_addr().raw_value(), region.len())).collect()
    }

    /// One past the last page number.
    pub(crate) fn page_limit(&self) -> u64 {
        (self.map.last_addr().raw_value() + 1) / PAGE_SIZE as u64
    }

    /// One past the last page number of a VM with `bytes` of memory.
    pub(crate) fn page_limit_of(bytes: u64) -> u64 {
        let end = layout(bytes).last().map_or(0, |(start, len)| start + len);
        end / PAGE_SIZE as u64
    }

    /// One past the last byte below the hole of a VM with `bytes` of memory.
    pub(crate) fn low_end_of(bytes: u64) -> u64 {
        layout(bytes).first().map_or(0, |(start, len)| start + len)
    }

    /// A descriptor of its own for another process: reads, and writes if `writable`.
    #[cfg(test)]
    pub(crate) fn descriptor(&self, writable: bool) -> Result<OwnedFd> {
        self.descriptor_by(&Files::Own, writable)
    }

    /// The same, which `files` open.
    pub(crate) fn descriptor_by(&self, files: &Files, writable: bool) -> Result<OwnedFd> {
        let opened = files.again(self.file.as_fd(), writable);
        opened.map_err(|error| VmError::refused("open guest memory once more", error))
    }

    /// Adds every page that holds anything (that was ever touched) to `set`.
    pub(crate) fn populated(&self, set: &mut PageSet) -> Result<()> {
        let failed = |error| VmError::refused("find the populated pages of guest memory", error);
        for data in Data::of(&*self.file).pages() {
            let data = data.map_err(failed)?;
            set.insert(PageRange::new(GUEST_MEMORY, data.start, data.end - data.start));
        }
        Ok(())
    }

    /// Empties all of it. What was there counts as written by the VMM.
    pub(crate) fn clear(&self) -> Result<()> {
        let mut had = PageSet::new();
        self.populated(&mut had)?;
        for range in had.ranges() {
            let bytes = range.bytes() as u64;
            discard(&self.map, range.address(), bytes).map_err(|error| {
                VmError::refused(format!("empty {bytes} bytes of guest memory"), error)
            })?;
        }
        Ok(())
    }

    /// Adds what the VMM itself wrote since the last call to `set`, and forgets it.
    pub(crate) fn take_own_writes(&self, set: &mut PageSet) {
        for region in self.map.iter() {
            let first = region.start_addr().raw_value() / PAGE_SIZE as u64;
            let mapping: &MmapRegion<AtomicBitmap> = region;
            set.insert_bitmap(GUEST_MEMORY, first, &mapping.bitmap().get_and_reset());
        }
    }
}

/// Gives the whole pages among `bytes` bytes at guest address `start` back to the host: they are holes from then on,
/// and read as zeros until the guest writes them again.
///
/// They count as written by the VMM, so that another host that has their former contents gets zeros too. They count
/// from after they are gone: who took the mark earlier could still have read what was there.
///
/// # Errors
/// `InvalidInput` when the bytes are not all memory; or what the kernel says.
pub(crate) fn discard(map: &Map, start: u64, bytes: u64) -> io::Result<()> {
    let nowhere = || io::Error::from(io::ErrorKind::InvalidInput);
    let region = map.find_region(GuestAddress(start)).ok_or_else(nowhere)?;
    let at = start - region.start_addr().raw_value();
    if bytes > region.len() - at {
        return Err(nowhere());
    }
    let page = PAGE_SIZE as u64;
    let (first, end) = (at.next_multiple_of(page), (at + bytes) / page * page);
    if first >= end {
        return Ok(());
    }
    let place = region.file_offset().ok_or_else(nowhere)?;
    let offset = libc::off_t::try_from(place.start() + first).map_err(|_| nowhere())?;
    let length = libc::off_t::try_from(end - first).map_err(|_| nowhere())?;
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(place.file(), hole, offset, length)?;
    let mapping: &MmapRegion<AtomicBitmap> = region;
    mapping.bitmap().mark_dirty(first as usize, (end - first) as usize);
    Ok(())
}

/// Where `bytes` of memory lie, as (guest address, bytes).
fn layout(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(HOLE_START);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HOLE_END, bytes - low));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn the_offset_in_the_file_is_the_guest_address() {
        let memory = Memory::create(HOLE_START + (64 << 20)).expect("sparse memory");
        assert_eq!(memory.ranges(), [(0, HOLE_START), (HOLE_END, 64 << 20)]);
        assert_eq!(memory.page_limit(), (HOLE_END + (64 << 20)) / 4096);
        assert_eq!(memory.page_limit(), Memory::page_limit_of(HOLE_START + (64 << 20)));
        memory.map().write_obj(0x1122_3344u32, GuestAddress(HOLE_END + 0x5000)).expect("write");
        let file = File::from(memory.descriptor(false).expect("descriptor"));
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, HOLE_END + 0x5000).expect("read");
        assert_eq!(u32::from_le_bytes(bytes), 0x1122_3344);
        assert!(file.write_at(&bytes, 0).is_err(), "a source's descriptor only reads");
    }

    #[test]
    fn populated_pages_and_own_writes_are_found() {
        let memory = Memory::create(HOLE_START + (64 << 20)).expect("sparse memory");
        let mut own = PageSet::new();
        memory.take_own_writes(&mut own);
        for address in [0, 0x3000, 0x4fff, HOLE_END + 0x2_0000] {
            memory.map().write_obj(1u8, GuestAddress(address)).expect("write");
        }
        let mut populated = PageSet::new();
        memory.populated(&mut populated).expect("populated");
        memory.take_own_writes(&mut own);
        let expected: Vec<_> = [(0, 1), (3, 2), (HOLE_END / 4096 + 0x20, 1)]
            .map(|(first, count)| PageRange::new(GUEST_MEMORY, first, count))
            .to_vec();
        assert_eq!(populated.ranges().collect::<Vec<_>>(), expected);
        assert_eq!(own.ranges().collect::<Vec<_>>(), expected);
        let mut again = PageSet::new();
        memory.take_own_writes(&mut again);
        assert!(again.is_empty());
    }

    #[test]
    fn whole_pages_are_given_back_and_nothing_else() {
        let memory = Memory::create(HOLE_START + (64 << 20)).expect("sparse memory");
        let map = memory.map();
        let bases = [0x10_0000, HOLE_END + 0x10_0000];
        for page in 0..4 {
            for base in bases {
                map.write_slice(&[7; 4096], GuestAddress(base + page * 4096)).expect("write");
            }
        }
        let mut own = PageSet::new();
        memory.take_own_writes(&mut own);
        for base in bases {
            discard(map, base + 1, 3 * 4096).expect("two whole pages");
            discard(map, base, 4095).expect("no whole page");
        }
        let held = bases.iter().flat_map(|base| [(base / 4096, 1), (base / 4096 + 3, 1)]);
        let gone = bases.iter().map(|base| (base / 4096 + 1, 2));
        let pages = |runs: &mut dyn Iterator<Item = (u64, u64)>| {
            runs.map(|(first, count)| PageRange::new(GUEST_MEMORY, first, count)).collect()
        };
        let (held, gone): (PageSet, PageSet) = (pages(&mut { held }), pages(&mut { gone }));
        let mut populated = PageSet::new();
        memory.populated(&mut populated).expect("populated");
        assert_eq!(populated, held);
        let mut marked = PageSet::new();
        memory.take_own_writes(&mut marked);
        assert_eq!(marked, gone, "another host has to hear of them");
        let read = |address| map.read_obj::<u8>(GuestAddress(address)).expect("read");
        assert_eq!((read(0x10_0000), read(0x10_1000), read(0x10_3000)), (7, 0, 7));
        for (start, bytes) in [
            (HOLE_START, 4096),
            (HOLE_START - 4096, 8192),
            (HOLE_END - 4096, 8192),
            (HOLE_END + (64 << 20) - 4096, 4097),
            (0, u64::MAX),
            (u64::MAX - 4095, 4096),
        ] {
            let error = discard(map, start, bytes).expect_err("not memory");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{start:#x} {bytes:#x}");
        }
        let mut still = PageSet::new();
        memory.populated(&mut still).expect("populated");
        assert!(still.contains(GUEST_MEMORY, 0x100) && still.contains(GUEST_MEMORY, 0x103));
    }

    #[test]
    fn memory_that_is_cleared_is_empty_and_was_written() {
        let memory = Memory::create(HOLE_START + (64 << 20)).expect("sparse memory");
        let places = [0x3000, HOLE_START - 8, HOLE_END + 0x2_0000];
        for address in places {
            memory.map().write_obj(7u64, GuestAddress(address)).expect("write");
        }
        let mut own = PageSet::new();
        memory.take_own_writes(&mut own);
        memory.clear().expect("clear");
        let mut populated = PageSet::new();
        memory.populated(&mut populated).expect("populated");
        assert!(populated.is_empty(), "{populated:?}");
        let mut again = PageSet::new();
        memory.take_own_writes(&mut again);
        assert_eq!(again, own);
        for address in places {
            let value: u64 = memory.map().read_obj(GuestAddress(address)).expect("read");
            assert_eq!(value, 0);
        }
    }

    #[test]
    fn memory_cannot_be_made_longer_or_shorter_from_outside() {
        let memory = Memory::create(16 << 20).expect("memory");
        let file = File::from(memory.descriptor(true).expect("descriptor"));
        assert!(file.set_len(8 << 20).is_err());
        assert!(file.set_len(32 << 20).is_err());
        file.write_at(b"x", 4096).expect("a destination's descriptor writes");
    }
}
