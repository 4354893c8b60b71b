//! Tracking without any word of the kernel's about writes: everything that exists counts as written, and
//! whoever sends it leaves out what has the hash of what was sent last (see `comparing`, which is where
//! the bytes are). Nothing is done to the processes, so nothing of what they do to their memory can escape.

use std::time::Duration;

use decamp_shared::pages::PageSet;

use super::{Tracker, each_that_lives};
use crate::error::Result;
use crate::memory::{HiddenProcess, Process, hideable_mappings};
use crate::pagemap::{Pagemap, append};

/// The tracker.
pub(super) struct PageHash;

impl Tracker for PageHash {
    fn harvest(&mut self, processes: &[Process], dirty: &mut PageSet) -> Result<()> {
        each_that_lives(processes, |process| {
            let mut pagemap = Pagemap::open(process.pid)?;
            let mut found = Vec::new();
            for mapping in hideable_mappings(process.pid)? {
                pagemap.existing(&mapping, false, |range, _| append(&mut found, range))?;
            }
            process.add_to(dirty, &found);
            Ok(())
        })
    }

    fn last(&mut self, processes: &mut [HiddenProcess]) -> Result<()> {
        processes.iter_mut().try_for_each(|process| process.look(false))
    }

    fn stall(&self) -> Duration {
        Duration::ZERO
    }
}

/// Whether pages that exist can be told.
pub(super) fn probe() -> std::result::Result<(), String> {
    let mut pagemap =
        Pagemap::open(std::process::id() as i32).map_err(|error| error.to_string())?;
    let page = 0..decamp_shared::pages::PAGE_SIZE as u64;
    pagemap.existing(&page, false, |_, _| {}).map(drop).map_err(|error| error.to_string())
}
