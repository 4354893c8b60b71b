//! Where the pages of processes lie just now, read from their page tables.

use std::collections::BTreeMap;

use decamp_shared::pages::{PAGE_SIZE, SpaceId};

use super::unsent::{BLOCK, Places};
use crate::entries::Entries;
use crate::error::Result;
use crate::memory::Process;

/// The page tables of some processes.
pub(crate) struct PageTables {
    open: BTreeMap<SpaceId, Entries>,
}

impl PageTables {
    /// Of the memory that each process has now. One that is gone has none.
    pub(crate) fn of<'a>(processes: impl Iterator<Item = &'a Process>) -> Result<Self> {
        let mut open = BTreeMap::new();
        for process in processes {
            match Entries::open(process.pid) {
                Ok(entries) => drop(open.insert(process.space(), entries)),
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self { open })
    }
}

impl Places for PageTables {
    fn read(&mut self, space: SpaceId, block: u64, into: &mut [u64; BLOCK]) -> Result<()> {
        into.fill(0);
        let Some(entries) = self.open.get_mut(&space) else { return Ok(()) };
        let page = PAGE_SIZE as u64;
        let first = block * BLOCK as u64;
        let addresses = first * page..(first + BLOCK as u64) * page;
        let read = entries.existing(&addresses, |range, entry| {
            into[(range.start / page - first) as usize] = entry.shared_place().unwrap_or(0);
        });
        match read {
            Err(error) if error.is_gone() => {
                into.fill(0);
                Ok(())
            }
            read => read,
        }
    }
}

/// Whether this process may know where pages lie: not everybody is told.
pub(crate) fn are_known() -> bool {
    let page = Box::new([1u8; 2 * PAGE_SIZE]);
    let address = std::hint::black_box(&page).as_ptr() as u64 / PAGE_SIZE as u64 * PAGE_SIZE as u64;
    let mut known = false;
    let read = Entries::open(std::process::id() as i32).and_then(|mut entries| {
        entries.existing(&(address..address + PAGE_SIZE as u64), |_, entry| {
            known = entry.place().is_some();
        })
    });
    read.is_ok() && known
}
