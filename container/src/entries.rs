//! The page tables of a process as `/proc/PID/pagemap` gives them to whoever reads it: one word a page, in
//! every kernel. For what scans (`pagemap`, Linux 6.7) do not tell, or where there are none. Kernel
//! document: `admin-guide/mm/pagemap`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use decamp_shared::pages::PAGE_SIZE;

use crate::error::{ContainerError, Result};

/// Bits of a word.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const SOFT_DIRTY: u64 = 1 << 55;
/// Nobody else has the page (Linux 4.2).
const ALONE: u64 = 1 << 56;
/// The number of the page frame, of a present page: zero for who may not know it. The place in swap of
/// another.
const FRAME: u64 = (1 << 55) - 1;

/// The kind of what is not present: the number of a swap area, or, from this on, what is no page in swap: one
/// that is moved in memory just now, or belongs to a device (`MAX_SWAPFILES` in linux/swap.h, where it is least).
const KIND: u64 = (1 << 5) - 1;
const NO_SWAP_AREA: u64 = 23;

/// Bytes of one word.
pub(crate) const WORD: u64 = 8;
/// Words read at once: 256 MiB of addresses.
const WORDS: usize = 1 << 16;

/// The page tables of one process.
pub(crate) struct Entries {
    file: File,
    path: String,
    /// As long as the longest read so far.
    bytes: Vec<u8>,
}

/// What the word of a page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry(u64);

impl Entry {
    /// The page is in memory or in swap. It may be the page of zeros.
    pub(crate) fn exists(self) -> bool {
        self.0 & (PRESENT | SWAPPED) != 0
    }

    /// It was written, or mapped, since its soft-dirty bit was cleared. Always false in a kernel without.
    pub(crate) fn is_soft_dirty(self) -> bool {
        self.0 & SOFT_DIRTY != 0
    }

    /// The number of the frame that it lies in, of one that is in memory. None where nobody may know.
    pub(crate) fn frame(self) -> Option<u64> {
        let known = self.0 & PRESENT != 0 && self.0 & FRAME != 0;
        known.then_some(self.0 & FRAME)
    }

    /// Where it lies: the same number for two pages only if they are one, in memory or in swap. None
    /// where nobody may know, and of one that is on its way elsewhere.
    pub(crate) fn place(self) -> Option<u64> {
        let in_swap = self.0 & SWAPPED != 0 && self.0 & KIND < NO_SWAP_AREA;
        self.frame().or_else(|| in_swap.then_some(self.0 & (SWAPPED | FRAME)))
    }

    /// The same of a page that may be another's too.
    pub(crate) fn shared_place(self) -> Option<u64> {
        self.place().filter(|_| self.0 & ALONE == 0)
    }

    /// The entry of a word.
    #[cfg(test)]
    pub(crate) fn from_word(word: u64) -> Self {
        Self(word)
    }
}

impl Entries {
    /// Of the memory that process `pid` has now: after an exec it is another.
    pub(crate) fn open(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(ContainerError::io(format!("open {path}")))?;
        Ok(Self { file, path, bytes: Vec::new() })
    }

    /// Calls `each` for every page in `range` that exists, ascending.
    pub(crate) fn existing(
        &mut self,
        range: &Range<u64>,
        mut each: impl FnMut(Range<u64>, Entry),
    ) -> Result<()> {
        let page = PAGE_SIZE as u64;
        let mut at = range.start / page;
        let end = range.end.div_ceil(page);
        while at < end {
            let count = (end - at).min(WORDS as u64);
            let length = (count * WORD) as usize;
            if self.bytes.len() < length {
                self.bytes.resize(length, 0);
            }
            let bytes = &mut self.bytes[..length];
            let read = self.file.read_exact_at(bytes, at * WORD);
            match read {
                // A memory that has ended reads as nothing at all.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    let gone = io::Error::from_raw_os_error(libc::ESRCH);
                    return Err(ContainerError::io(format!("read {}", self.path))(gone));
                }
                read => read.map_err(ContainerError::io(format!("read {}", self.path)))?,
            }
            for (page_number, word) in (at..).zip(bytes.as_chunks::<{ WORD as usize }>().0) {
                let entry = Entry(u64::from_ne_bytes(*word));
                if entry.exists() {
                    each(page_number * page..(page_number + 1) * page, entry);
                }
            }
            at += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_exist_are_found_and_each_lies_somewhere() {
        // So large that it is mapped afresh; what is looked at lies further apart than a huge page.
        let mut buffer = vec![0u8; 40 << 20];
        let far = 10 << 20;
        buffer[far] = 7;
        buffer[2 * far] = 8;
        let mut entries = Entries::open(std::process::id() as i32).expect("ourselves");
        let page = PAGE_SIZE as u64;
        let mut place_of = |offset: usize| {
            let start = (buffer.as_ptr() as u64 + offset as u64) / page * page;
            let mut found = None;
            entries.existing(&(start..start + page), |_, entry| found = Some(entry)).expect("read");
            found.map(Entry::place)
        };
        let (first, second) = (place_of(far), place_of(2 * far));
        assert_ne!(first, None, "written");
        assert_ne!(second, None, "written");
        // Who is not root may know no place.
        assert!(first != second || first == Some(None), "{first:?}");
        assert_eq!(place_of(3 * far), None, "never touched");
        std::hint::black_box(&buffer);
    }

    #[test]
    fn what_is_neither_in_memory_nor_in_swap_lies_nowhere() {
        let swapped = |kind: u64| Entry::from_word(SWAPPED | 9 << 5 | kind);
        assert!(swapped(3).place().is_some() && swapped(3).frame().is_none());
        // Migration entries are of kinds 29 and 30, or lower where the kernel has more kinds.
        for kind in NO_SWAP_AREA..=KIND {
            assert!(swapped(kind).exists() && swapped(kind).place().is_none(), "{kind}");
        }
        assert_eq!(Entry::from_word(PRESENT | 31).place(), Some(31), "a frame has no kind");
        assert_eq!(Entry::from_word(PRESENT).frame(), None);
    }

    #[test]
    fn a_process_that_is_gone_is_gone() {
        let mut child = std::process::Command::new("true").spawn().expect("true");
        let opened = Entries::open(child.id() as i32);
        child.wait().expect("it ends");
        if let Ok(mut entries) = opened {
            let error = entries.existing(&(0x1000..0x9000), |_, _| {}).expect_err("no memory");
            assert!(error.is_gone(), "{error}");
        }
    }
}
