//! All memory from 16 MiB upward, as numbered frames, and what lies where in it: the first witness,
//! the version table, the pages, and, in the very last frame, the second witness.

use crate::loader::Range;
use crate::sys::{Memory, PAGE, Page};

const RANGES: usize = 16;
const VERSIONS_IN_A_PAGE: u64 = 512;

/// The memory that is watched.
pub(crate) struct Arena {
    memory: Memory,
    ranges: [Range; RANGES],
    frames: u64,
    table: u64,
}

impl Arena {
    /// Takes all of the reported memory.
    pub(crate) fn new(reported: &[Range]) -> Arena {
        let top = reported.iter().map(|range| range.end).max().unwrap_or(0);
        let memory = Memory::take(top);
        let mut ranges = [Range::default(); RANGES];
        let mut frames = 0;
        for (ours, theirs) in ranges.iter_mut().zip(reported) {
            let end = theirs.end.min(memory.mapped()).max(theirs.start);
            *ours = Range { start: theirs.start, end };
            frames += (end - theirs.start) / PAGE;
        }
        Arena { memory, ranges, frames, table: 0 }
    }

    /// Frames that there are.
    pub(crate) fn frames(&self) -> u64 {
        self.frames
    }

    /// Lays out room for `pages` pages and clears the table; `false` when they do not fit.
    pub(crate) fn lay_out(&mut self, pages: u64) -> bool {
        self.table = pages.div_ceil(VERSIONS_IN_A_PAGE);
        if pages + self.table + 2 > self.frames {
            return false;
        }
        for frame in 1..=self.table {
            self.frame(frame).fill(0);
        }
        true
    }

    /// A page.
    pub(crate) fn page(&mut self, number: u64) -> &mut Page {
        self.frame(1 + self.table + number)
    }

    /// Where a page lies in physical memory.
    pub(crate) fn address(&self, number: u64) -> u64 {
        self.locate(1 + self.table + number)
    }

    /// The version that the table has for a page.
    pub(crate) fn version(&mut self, number: u64) -> u64 {
        *self.entry(number)
    }

    /// Puts a page's version into the table.
    pub(crate) fn set_version(&mut self, number: u64, version: u64) {
        *self.entry(number) = version;
    }

    /// One of the two witnesses.
    pub(crate) fn witness(&mut self, second: bool) -> &mut Page {
        let frame = if second { self.frames - 1 } else { 0 };
        self.frame(frame)
    }

    fn entry(&mut self, number: u64) -> &mut u64 {
        let page = self.frame(1 + number / VERSIONS_IN_A_PAGE);
        &mut page[(number % VERSIONS_IN_A_PAGE) as usize]
    }

    fn frame(&mut self, frame: u64) -> &mut Page {
        let address = self.locate(frame);
        self.memory.page(address)
    }

    fn locate(&self, frame: u64) -> u64 {
        let mut offset = frame * PAGE;
        for range in &self.ranges {
            let length = range.end - range.start;
            if offset < length {
                return range.start + offset;
            }
            offset -= length;
        }
        panic!("Frame {frame} of {} asked for", self.frames)
    }
}
