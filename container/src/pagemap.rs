//! Scans of `/proc/PID/pagemap`: which pages of a process exist, and which were written since they were
//! last protected (kernel document `admin-guide/mm/pagemap`). Kernels that do not scan are read.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::OnceLock;

use crate::entries::Entries;
use crate::error::{ContainerError, Result};
use crate::sys::{self, PageRegion, PmScanArg};

/// Categories of the `PAGEMAP_SCAN` ioctl (linux/fs.h).
const PAGE_IS_WRITTEN: u64 = 1 << 1;
pub(crate) const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
pub(crate) const PAGE_IS_GUARD: u64 = 1 << 8;
/// Flags of it: protect what is found; fail where protection lifts itself at no write.
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Regions asked of the kernel at once.
const REGIONS: usize = 4096;
/// Pages told of at once: for so long nobody can change what is mapped, CRIU's code in the process neither.
const PAGES: u64 = 1 << 15;

thread_local! {
    /// Room for regions that nobody uses just now: of hundreds of processes one is looked at after another.
    static SPARE: Cell<Option<Vec<PageRegion>>> = const { Cell::new(None) };
}

/// The page tables of one process, seen from outside.
pub(crate) struct Pagemap {
    pid: i32,
    file: File,
    path: String,
    regions: Vec<PageRegion>,
    /// Instead of scans.
    entries: Option<Entries>,
}

impl Pagemap {
    /// Of the memory that process `pid` has now: after an exec it is another.
    pub(crate) fn open(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(ContainerError::io(format!("open {path}")))?;
        // A new one costs more than a scan of a small process: its pages are not there yet.
        let regions = SPARE.take().unwrap_or_else(|| vec![PageRegion::default(); REGIONS]);
        Ok(Self { pid, file, path, regions, entries: None })
    }

    /// Calls `each` for ranges of pages that exist in `range`, ascending, and whether they were written:
    /// those in memory or swap, except the shared page of zeros and guard pages. What is not protected
    /// counts as written.
    ///
    /// Gives false, and what it told is not to be used, when `protected` and a mapping in `range` lifts
    /// no protection by itself. A kernel without scans (before Linux 6.7) protects nothing, and does not
    /// tell the page of zeros from others.
    pub(crate) fn existing(
        &mut self,
        range: &Range<u64>,
        protected: bool,
        mut each: impl FnMut(Range<u64>, bool),
    ) -> Result<bool> {
        if !scans() {
            if !protected {
                self.entries()?.existing(range, |page, _| each(page, true))?;
            }
            return Ok(!protected);
        }
        let argument = PmScanArg {
            flags: if protected { PM_SCAN_CHECK_WPASYNC } else { 0 },
            category_inverted: PAGE_IS_PFNZERO | guards(),
            category_mask: PAGE_IS_PFNZERO | guards(),
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_WRITTEN,
            ..PmScanArg::default()
        };
        self.scan(range, argument, each)
    }

    /// Calls `each` for ranges of pages in `range` at which there is anything, the shared page of zeros too.
    /// Takes a kernel with scans.
    pub(crate) fn populated(
        &mut self,
        range: &Range<u64>,
        mut each: impl FnMut(Range<u64>),
    ) -> Result<()> {
        let argument = PmScanArg {
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            ..PmScanArg::default()
        };
        self.scan(range, argument, |found, _| each(found)).map(drop)
    }

    /// Calls `each` for ranges of pages in `range` that were written since they were protected, and
    /// protects them, in one step.
    ///
    /// Gives false when a mapping in `range` lifts no protection by itself. Some pages may have been
    /// protected then without having been told.
    pub(crate) fn take_written(
        &mut self,
        range: &Range<u64>,
        mut each: impl FnMut(Range<u64>),
    ) -> Result<bool> {
        let argument = PmScanArg {
            flags: PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING,
            category_inverted: PAGE_IS_PFNZERO | guards(),
            category_mask: PAGE_IS_PFNZERO | guards() | PAGE_IS_WRITTEN,
            return_mask: PAGE_IS_WRITTEN,
            ..PmScanArg::default()
        };
        self.scan(range, argument, |found, _| each(found))
    }

    fn entries(&mut self) -> Result<&mut Entries> {
        Ok(match self.entries.take() {
            Some(entries) => self.entries.insert(entries),
            None => self.entries.insert(Entries::open(self.pid)?),
        })
    }

    fn scan(
        &mut self,
        range: &Range<u64>,
        argument: PmScanArg,
        mut each: impl FnMut(Range<u64>, bool),
    ) -> Result<bool> {
        let mut at = range.start;
        // Where pages are protected the end of a piece may be within a huge page, which is broken up for that.
        let max_pages = if argument.flags & PM_SCAN_WP_MATCHING == 0 { PAGES } else { 0 };
        while at < range.end {
            let mut argument = PmScanArg { start: at, end: range.end, max_pages, ..argument };
            let found = sys::pagemap_scan(self.file.as_fd(), &mut argument, &mut self.regions);
            let count = match found {
                Err(error)
                    if error.raw_os_error() == Some(libc::EPERM)
                        && argument.flags & PM_SCAN_CHECK_WPASYNC != 0 =>
                {
                    return Ok(false);
                }
                Err(error) => {
                    return Err(ContainerError::io(format!("scan {}", self.path))(error));
                }
                Ok(count) => count,
            };
            for region in &self.regions[..count] {
                each(region.start..region.end, region.categories & PAGE_IS_WRITTEN != 0);
            }
            if argument.walk_end <= at {
                let stuck = io::Error::other("the scan does not advance");
                return Err(ContainerError::io(format!("scan {}", self.path))(stuck));
            }
            at = argument.walk_end;
        }
        Ok(true)
    }
}

impl Drop for Pagemap {
    fn drop(&mut self) {
        SPARE.set(Some(std::mem::take(&mut self.regions)));
    }
}

/// Whether this kernel scans (6.7 and newer do).
pub(crate) fn scans() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| probe_scan().is_ok())
}

/// Tries a scan of a page of our own.
pub(crate) fn probe_scan() -> io::Result<()> {
    let mut argument = PmScanArg {
        end: 4096,
        category_anyof_mask: PAGE_IS_PRESENT,
        return_mask: PAGE_IS_PRESENT,
        ..PmScanArg::default()
    };
    let pagemap = File::open("/proc/self/pagemap")?;
    sys::pagemap_scan(pagemap.as_fd(), &mut argument, &mut [PageRegion::default()]).map(drop)
}

/// Appends `range` to ascending ranges, joined where they touch.
pub(crate) fn append(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// The category of guard pages, where this kernel tells it (6.15 and newer do).
fn guards() -> u64 {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    let known = *KNOWN.get_or_init(|| {
        let mut argument = PmScanArg {
            end: 4096,
            category_anyof_mask: PAGE_IS_GUARD,
            return_mask: PAGE_IS_GUARD,
            ..PmScanArg::default()
        };
        File::open("/proc/self/pagemap").is_ok_and(|file| {
            sys::pagemap_scan(file.as_fd(), &mut argument, &mut [PageRegion::default()]).is_ok()
        })
    });
    if known { PAGE_IS_GUARD } else { 0 }
}
