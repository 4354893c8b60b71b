//! Pages of this process's own, mapped for nothing but trying what the kernel tells of them.

use std::io;
use std::ops::Range;

use decamp_shared::pages::PAGE_SIZE;

/// Private memory that nothing else uses. Unmapped when this is dropped.
pub(crate) struct OwnPages {
    start: *mut u8,
    count: usize,
}

impl OwnPages {
    /// `count` pages, none of which is there yet, nor becomes part of a huge one.
    pub(crate) fn map(count: usize) -> io::Result<Self> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new memory at an address that the kernel chooses.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), count * PAGE_SIZE, rights, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let pages = Self { start: start.cast(), count };
        // A kernel without huge pages knows no such advice.
        let _ = pages.advise(libc::MADV_NOHUGEPAGE);
        Ok(pages)
    }

    /// Where they are.
    pub(crate) fn addresses(&self) -> Range<u64> {
        let start = self.start.addr() as u64;
        start..start + self.length() as u64
    }

    /// The first byte of a page.
    pub(crate) fn read(&self, page: usize) -> u8 {
        // SAFETY: `at` gives an address within the mapping, which can be read, and of which there is no
        // reference.
        unsafe { self.at(page).read_volatile() }
    }

    /// Writes the first byte of a page.
    pub(crate) fn write(&mut self, page: usize, byte: u8) {
        // SAFETY: `at` gives an address within the mapping, which can be written, and of which there is
        // no reference.
        unsafe { self.at(page).write_volatile(byte) }
    }

    /// Forbids to write to them, and allows it again.
    pub(crate) fn close_and_open(&mut self) -> io::Result<()> {
        for rights in [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
            // SAFETY: the mapping is ours alone, and nobody writes to it meanwhile: it is borrowed.
            let done = unsafe { libc::mprotect(self.start.cast(), self.length(), rights) };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Wants huge pages after all.
    #[cfg(test)]
    pub(crate) fn be_huge(&mut self) -> io::Result<()> {
        self.advise(libc::MADV_HUGEPAGE)
    }

    /// Gives them all back.
    #[cfg(test)]
    pub(crate) fn give_back(&mut self) -> io::Result<()> {
        self.advise(libc::MADV_DONTNEED)
    }

    fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the mapping is ours alone; there is no reference to what it holds.
        let done = unsafe { libc::madvise(self.start.cast(), self.length(), advice) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn length(&self) -> usize {
        self.count * PAGE_SIZE
    }

    fn at(&self, page: usize) -> *mut u8 {
        assert!(page < self.count, "page {page} of {}", self.count);
        // SAFETY: within the mapping, by the line above.
        unsafe { self.start.add(page * PAGE_SIZE) }
    }
}

impl Drop for OwnPages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and nobody can use it any more.
        unsafe { libc::munmap(self.start.cast(), self.length()) };
    }
}
