//! One look at the page tables of a process: what exists, what was written, and where it lies.

use std::ops::Range;

use decamp_shared::pages::PAGE_SIZE;

use crate::entries::Entries;
use crate::error::Result;
use crate::pagemap::append;
use crate::tracker::frames::Frames;
use crate::tracker::zeros::Zeros;

/// What one walk of a memory's page tables finds. All of it without the kernel's pages of zeros: they hold
/// nothing, and whoever wants to know what they held before has to have been told of it before.
pub(super) struct Look {
    /// Pages that exist.
    pub(super) exist: Vec<Range<u64>>,
    /// Those of them that were written, or may have been, since the look before; all, if there was none.
    pub(super) written: Vec<Range<u64>>,
    pub(super) frames: Frames,
}

impl Look {
    /// Looks at all pages of `mappings`. Of those that `stayed` it is known where their pages lay `before`.
    pub(super) fn take(
        pid: i32,
        mappings: &[Range<u64>],
        before: &Frames,
        zeros: &mut Zeros,
        mut stayed: impl FnMut(&Range<u64>) -> bool,
    ) -> Result<Self> {
        zeros.forget();
        let mut entries = Entries::open(pid)?;
        let mut before = before.compare();
        let mut look = Self { exist: Vec::new(), written: Vec::new(), frames: Frames::default() };
        let mut failed = Ok(());
        for mapping in mappings {
            let stayed = stayed(mapping);
            entries.existing(mapping, |range, entry| {
                let page = range.start / PAGE_SIZE as u64;
                match zeros.has(page, entry) {
                    Ok(false) => {}
                    Ok(true) => return,
                    Err(error) => return failed = Err(error),
                }
                let lay_there = stayed && before.lay_there(page, entry);
                look.frames.push(page, entry);
                append(&mut look.exist, range.clone());
                if entry.is_soft_dirty() || !lay_there {
                    append(&mut look.written, range);
                }
            })?;
        }
        failed.map(|()| look)
    }
}
