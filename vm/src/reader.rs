//! Guest memory as the agent reads it, from outside and while the guest writes it.
//!
//! Pages are copied out by `pread`, that is by the kernel, so no reference to memory that changes
//! under it ever exists here, a hole reads as zeros without being filled, and the agent needs no
//! page tables for the guest's memory.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use decamp_shared::pages::{PageRange, PageReader, PageSet};
use decamp_shared::workload::{Result, WorkloadError};

use crate::memory::GUEST_MEMORY;

/// Reads pages of one guest.
#[derive(Debug)]
pub struct GuestReader {
    file: File,
    page_limit: u64,
}

impl GuestReader {
    /// A reader of the memory behind `descriptor`, whose pages end before `page_limit`.
    pub fn new(descriptor: OwnedFd, page_limit: u64) -> Self {
        Self { file: File::from(descriptor), page_limit }
    }
}

impl PageReader for GuestReader {
    fn read(&self, range: PageRange, into: &mut [u8]) -> Result<()> {
        let inside = range.space == GUEST_MEMORY
            && range.first.checked_add(range.count).is_some_and(|end| end <= self.page_limit)
            && into.len() == range.bytes();
        if !inside {
            return Err(WorkloadError::plain(format!(
                "Could not read {} pages from page {:#x} of {} into {} bytes: not guest memory",
                range.count,
                range.first,
                range.space,
                into.len()
            )));
        }
        self.file
            .read_exact_at(into, range.address())
            .map_err(|error| WorkloadError::new(format!("Could not read {range}"), error))
    }

    /// Guest memory never goes away.
    fn take_missed(&self) -> PageSet {
        PageSet::new()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Memory;
    use decamp_shared::pages::SpaceId;

    #[test]
    fn pages_are_read_and_nothing_beyond() {
        let memory = Memory::create(4 << 20).expect("memory");
        memory.map().write_obj(7u8, GuestAddress(0x2fff)).expect("write");
        let reader = GuestReader::new(memory.descriptor(false).expect("fd"), memory.page_limit());
        let mut page = [1; 8192];
        reader.read(PageRange::new(GUEST_MEMORY, 2, 2), &mut page).expect("two pages");
        assert_eq!((page[0], page[4095], page[4096]), (0, 7, 0));
        assert!(reader.read(PageRange::new(GUEST_MEMORY, 1023, 2), &mut page).is_err());
        assert!(reader.read(PageRange::new(GUEST_MEMORY, u64::MAX, 2), &mut page).is_err());
        assert!(reader.read(PageRange::new(SpaceId(1), 0, 2), &mut page).is_err());
        assert!(reader.read(PageRange::new(GUEST_MEMORY, 0, 1), &mut page).is_err());
    }
}
