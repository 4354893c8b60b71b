//! Guest memory, and disks, as the agent reads them, from outside and while the guest writes it.
//!
//! Pages are copied out by `pread`, that is by the kernel, so no reference to memory that changes
//! under it ever exists here, a hole reads as zeros without being filled, and the agent needs no
//! page tables for the guest's memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use decamp_shared::pages::{PAGE_SIZE, PageRange, PageReader, PageSet, SpaceId};
use decamp_shared::workload::{Result, WorkloadError};

use crate::memory::GUEST_MEMORY;

/// Reads pages of one guest: of its memory, and of its disks.
#[derive(Debug, Default)]
pub struct GuestReader {
    spaces: BTreeMap<SpaceId, (File, u64)>,
}

impl GuestReader {
    /// A reader of the memory behind `descriptor`, whose pages end before `page_limit`.
    pub fn new(descriptor: OwnedFd, page_limit: u64) -> Self {
        Self::default().with(GUEST_MEMORY, descriptor, page_limit)
    }

    /// The same that reads `space`, too, from behind `descriptor`, with pages that end before `page_limit`.
    pub fn with(mut self, space: SpaceId, descriptor: OwnedFd, page_limit: u64) -> Self {
        self.spaces.insert(space, (File::from(descriptor), page_limit));
        self
    }
}

impl PageReader for GuestReader {
    fn read(&self, range: PageRange, into: &mut [u8]) -> Result<()> {
        let found = self.spaces.get(&range.space).filter(|(_, limit)| {
            range.first.checked_add(range.count).is_some_and(|end| end <= *limit)
                && into.len() == range.bytes()
        });
        let Some((file, _)) = found else {
            return Err(WorkloadError::plain(format!(
                "Could not read {} pages from page {:#x} of {} into {} bytes: the guest has no such",
                range.count,
                range.first,
                range.space,
                into.len()
            )));
        };
        fill(file, range.address(), into)
            .map_err(|error| WorkloadError::new(format!("Could not read {range}"), error))
    }

    /// Neither memory nor a disk ever goes away.
    fn take_missed(&self) -> PageSet {
        PageSet::new()
    }
}

/// Reads what is at `at`. Where the file ends within the last page, zeros are behind its end: the last page of a
/// disk may be a part of one.
fn fill(file: &File, at: u64, into: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], at + done as u64) {
            Ok(0) if into.len() - done < PAGE_SIZE => {
                into[done..].fill(0);
                return Ok(());
            }
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Memory;

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

    #[test]
    fn the_last_page_of_a_disk_may_be_a_part_of_one() {
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(&[7; 4096 + 512], 0).expect("written");
        let disk = SpaceId(1);
        let again = || OwnedFd::from(file.try_clone().expect("a descriptor"));
        let reader = GuestReader::default().with(disk, again(), 2);
        let mut pages = [1; 8192];
        reader.read(PageRange::new(disk, 0, 2), &mut pages).expect("both");
        assert_eq!((pages[4607], &pages[4608..]), (7, &[0; 3584][..]));
        let cut = GuestReader::default().with(disk, again(), 4);
        assert!(cut.read(PageRange::new(disk, 2, 1), &mut pages[..4096]).is_err(), "it was cut");
        assert!(cut.read(PageRange::new(disk, 1, 2), &mut pages).is_err());
    }
}
