//! Which pages are the kernel's pages of zeros: what is read, and was not written before, is one of these, be it
//! read for the first time or after it was given back. There is nothing in them to move; and that a page is one
//! at two looks does not say that it was one in between.
//!
//! There is a small one, the same for all processes as long as the host runs, and a huge one, which is made
//! when one is wanted. `/proc/kpageflags` tells of either (kernel document `admin-guide/mm/pagemap`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::entries::{Entries, Entry, WORD};
use crate::error::{ContainerError, Result};
use crate::sys::own_pages::OwnPages;

const FLAGS: &str = "/proc/kpageflags";
/// `KPF_ZERO_PAGE` (linux/kernel-page-flags.h).
const IS_OF_ZEROS: u64 = 1 << 24;
/// Pages of a huge page, which begins at a multiple of this both in memory and where it is mapped.
const HUGE: u64 = 512;

/// Tells pages of zeros from others.
pub(super) struct Zeros {
    flags: File,
    /// The frame of the small one.
    small: u64,
    /// The frame that was asked about last, and the answer.
    last: (u64, bool),
}

impl Zeros {
    /// # Errors
    /// Where the kernel does not tell.
    pub(super) fn open() -> Result<Self> {
        let flags = File::open(FLAGS).map_err(ContainerError::io(format!("open {FLAGS}")))?;
        let small =
            frame_of_what_is_read().map_err(ContainerError::io("find the page of zeros"))?;
        let mut zeros = Self { flags, small, last: (u64::MAX, false) };
        if !zeros.is_of_zeros(small)? {
            return Err(ContainerError::malformed(FLAGS, "does not say which page is of zeros"));
        }
        Ok(zeros)
    }

    /// Whether what lies at page number `page` of a process is a page of zeros.
    pub(super) fn has(&mut self, page: u64, entry: Entry) -> Result<bool> {
        match entry.frame() {
            None => Ok(false),
            Some(frame) if frame == self.small => Ok(true),
            // Neither can be moved, swapped or freed while it is mapped: what is said of the frame now was
            // true when the entry was read.
            Some(frame) if frame % HUGE == page % HUGE => self.is_of_zeros(frame - frame % HUGE),
            Some(_) => Ok(false),
        }
    }

    fn is_of_zeros(&mut self, frame: u64) -> Result<bool> {
        if self.last.0 != frame {
            let mut word = [0; WORD as usize];
            self.flags
                .read_exact_at(&mut word, frame * WORD)
                .map_err(ContainerError::io(format!("read {FLAGS}")))?;
            self.last = (frame, u64::from_ne_bytes(word) & IS_OF_ZEROS != 0);
        }
        Ok(self.last.1)
    }

    /// Has the kernel asked anew: to be called before each look.
    pub(super) fn forget(&mut self) {
        self.last = (u64::MAX, false);
    }
}

/// Where a page lies that was read and never written.
fn frame_of_what_is_read() -> io::Result<u64> {
    let pages = OwnPages::map(1)?;
    pages.read(0);
    let mut frame = None;
    Entries::open(std::process::id() as i32)
        .and_then(|mut own| own.existing(&pages.addresses(), |_, entry| frame = entry.frame()))
        .map_err(io::Error::other)?;
    frame.ok_or_else(|| io::Error::other("where pages lie takes CAP_SYS_ADMIN to know"))
}

#[cfg(test)]
mod tests {
    use decamp_shared::pages::PAGE_SIZE;

    use super::*;

    /// For each of the pages from the `first` on that exist, whether it is one of zeros.
    fn look(zeros: &mut Zeros, pages: &OwnPages, first: u64, count: u64) -> Vec<bool> {
        zeros.forget();
        let start = pages.addresses().start + first * PAGE_SIZE as u64;
        let mut found = Vec::new();
        let mut own = Entries::open(std::process::id() as i32).expect("ourselves");
        own.existing(&(start..start + count * PAGE_SIZE as u64), |range, entry| {
            found.push(zeros.has(range.start / PAGE_SIZE as u64, entry).expect("an answer"));
        })
        .expect("our pages");
        found
    }

    #[test]
    fn what_is_only_read_is_of_zeros() {
        let mut zeros = match Zeros::open() {
            Ok(zeros) => zeros,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let mut pages = OwnPages::map(4).expect("memory");
        pages.read(0);
        pages.write(1, 0);
        pages.read(3);
        assert_eq!(look(&mut zeros, &pages, 0, 4), [true, false, true]);
        pages.write(3, 1);
        assert_eq!(look(&mut zeros, &pages, 0, 4), [true, false, false]);
        pages.give_back().expect("given back");
        pages.read(3);
        assert_eq!(look(&mut zeros, &pages, 0, 4), [true]);
    }

    #[test]
    fn so_is_what_is_read_of_a_huge_page() {
        let mut zeros = match Zeros::open() {
            Ok(zeros) => zeros,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let mut pages = OwnPages::map(3 * HUGE as usize).expect("memory");
        if pages.be_huge().is_err() {
            return eprintln!("skipped: the kernel has no huge pages");
        }
        let start = pages.addresses().start / PAGE_SIZE as u64;
        let first = start.next_multiple_of(HUGE) - start;
        pages.read(first as usize + 7);
        let found = look(&mut zeros, &pages, first, HUGE);
        // Where no huge one can be had just now it is a small one.
        assert!(found.len() == HUGE as usize || found.len() == 1, "{} pages", found.len());
        assert!(found.iter().all(|of_zeros| *of_zeros));
        pages.write((first + HUGE) as usize, 1);
        assert!(!look(&mut zeros, &pages, first + HUGE, HUGE)[0], "it was written");
        // A part of the huge page of zeros is written.
        pages.write(first as usize + 7, 1);
        let found = look(&mut zeros, &pages, first, HUGE);
        let written = found.len() - found.iter().filter(|of_zeros| **of_zeros).count();
        assert!(written == 1 || written == HUGE as usize, "{written} of {}", found.len());
    }
}
