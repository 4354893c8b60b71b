//! Guest memory: one memfd whose byte offset is the guest physical address, mapped shared, with a
//! bitmap of what the VMM itself writes. Nothing here knows KVM.
//!
//! Memory beyond 3 GiB lies above 4 GiB; the hole between them, where devices live, is a hole in
//! the file too, so that a page number of the page engine is a guest frame number.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use decamp_shared::pages::{PAGE_SIZE, PageRange, PageSet, SpaceId};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek64};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MmapRegion,
};

use crate::error::{Result, VmError};

/// The one space of a VM.
pub const GUEST_MEMORY: SpaceId = SpaceId(0);
/// Where the hole for devices begins: memory below it is low memory.
pub(crate) const HOLE_START: u64 = 0xc000_0000;
/// Where memory goes on after the hole.
pub(crate) const HOLE_END: u64 = 1 << 32;

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

    /// A descriptor of its own for another process: reads, and writes if `writable`.
    pub(crate) fn descriptor(&self, writable: bool) -> Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        File::options()
            .read(true)
            .write(writable)
            .open(&path)
            .map(OwnedFd::from)
            .map_err(|error| VmError::refused("open guest memory once more", error))
    }

    /// Adds every page that holds anything (that was ever touched) to `set`.
    pub(crate) fn populated(&self, set: &mut PageSet) -> Result<()> {
        let failed = |error| VmError::refused("find the populated pages of guest memory", error);
        let mut at = 0;
        loop {
            let data = match lseek64(&*self.file, at, Whence::SeekData) {
                Ok(data) => data,
                Err(nix::errno::Errno::ENXIO) => return Ok(()),
                Err(error) => return Err(failed(error)),
            };
            at = lseek64(&*self.file, data, Whence::SeekHole).map_err(failed)?;
            let (first, end) = (data as u64 / PAGE_SIZE as u64, at as u64);
            set.insert(PageRange::new(
                GUEST_MEMORY,
                first,
                end.div_ceil(PAGE_SIZE as u64).saturating_sub(first),
            ));
        }
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
    fn memory_cannot_be_made_longer_or_shorter_from_outside() {
        let memory = Memory::create(16 << 20).expect("memory");
        let file = File::from(memory.descriptor(true).expect("descriptor"));
        assert!(file.set_len(8 << 20).is_err());
        assert!(file.set_len(32 << 20).is_err());
        file.write_at(b"x", 4096).expect("a destination's descriptor writes");
    }
}
