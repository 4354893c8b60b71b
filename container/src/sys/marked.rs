//! Mappings of our own, each with another mark that a program may give its memory: to try on them what is
//! said of mappings. Marks of devices are not among them: the kernel maps one for each process.

use std::io;
use std::ops::Range;

use decamp_shared::pages::PAGE_SIZE;

/// Advice that leaves a flag, where the kernel knows it.
const ADVICE: [i32; 8] = [
    libc::MADV_SEQUENTIAL,
    libc::MADV_RANDOM,
    libc::MADV_DONTFORK,
    libc::MADV_DONTDUMP,
    libc::MADV_WIPEONFORK,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_MERGEABLE,
];

/// One huge page, of two MiB whatever the default is, that none is reserved for.
const HUGE: usize = 2 << 20;
const HUGE_FLAGS: i32 = libc::MAP_PRIVATE
    | libc::MAP_ANONYMOUS
    | libc::MAP_NORESERVE
    | libc::MAP_HUGETLB
    | libc::MAP_HUGE_2MB;

/// A page and its two neighbours.
const WHOLE: usize = 3 * PAGE_SIZE;

/// The mappings, for as long as this lives.
pub(crate) struct Marked {
    ranges: Vec<Range<u64>>,
    /// Where the kernel has such pages.
    huge: Option<Range<u64>>,
}

impl Marked {
    /// Makes them, each of one page.
    pub(crate) fn make() -> io::Result<Self> {
        let mut marked = Self { ranges: Vec::new(), huge: None };
        let plain = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        for flags in [
            plain,
            plain | libc::MAP_NORESERVE,
            plain | libc::MAP_GROWSDOWN,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        ] {
            marked.map(flags)?;
        }
        for advice in ADVICE {
            let start = marked.map(plain)?;
            // SAFETY: the pages are ours alone and nobody has a reference into them. What the kernel does
            // not know it refuses.
            unsafe { libc::madvise(start as *mut libc::c_void, PAGE_SIZE, advice) };
        }
        let start = marked.map(plain)?;
        // SAFETY: as above. It may be more than the limit allows: then it has no mark.
        unsafe { libc::mlock(start as *const libc::c_void, PAGE_SIZE) };
        // SAFETY: a new mapping at a place of the kernel's choice, which nobody touches.
        let start = unsafe {
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), HUGE, rights, HUGE_FLAGS, -1, 0)
        };
        if start != libc::MAP_FAILED {
            marked.huge = Some(start as u64..start as u64 + HUGE as u64);
        }
        Ok(marked)
    }

    /// Where they are.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = &Range<u64>> {
        self.ranges.iter().chain(&self.huge)
    }

    /// Maps a page between two that nobody may touch: so they are joined with nothing.
    fn map(&mut self, flags: i32) -> io::Result<u64> {
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: new mappings at a place of the kernel's choice; the second replaces a part of the first,
        // which nobody else knows of.
        let start = unsafe {
            let whole = libc::mmap(std::ptr::null_mut(), WHOLE, libc::PROT_NONE, none, -1, 0);
            if whole == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let inner = whole.byte_add(PAGE_SIZE);
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            let inner = libc::mmap(inner, PAGE_SIZE, rights, flags | libc::MAP_FIXED, -1, 0);
            if inner == libc::MAP_FAILED {
                let error = io::Error::last_os_error();
                libc::munmap(whole, WHOLE);
                return Err(error);
            }
            inner as u64
        };
        self.ranges.push(start..start + PAGE_SIZE as u64);
        Ok(start)
    }
}

impl Drop for Marked {
    fn drop(&mut self) {
        for range in &self.ranges {
            let start = range.start - PAGE_SIZE as u64;
            // SAFETY: what `map` mapped, which nobody has a reference into.
            unsafe { libc::munmap(start as *mut libc::c_void, WHOLE) };
        }
        if let Some(range) = &self.huge {
            // SAFETY: as above.
            unsafe { libc::munmap(range.start as *mut libc::c_void, HUGE) };
        }
    }
}
