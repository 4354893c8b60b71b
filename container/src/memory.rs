//! Which memory of a container's processes is moved by the page engine instead of by CRIU: the
//! mappings that can be hidden from CRIU, and the pages that exist in them.
//!
//! Only private anonymous memory, and of that only what CRIU restores like any other: what is
//! locked, huge, shared, special, executable or backed by a file stays in CRIU's own images.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use decamp_shared::pages::{PAGE_SIZE, PageRange, PageSet, SpaceId};

use crate::error::{ContainerError, Result};
use crate::sys::{self, PageRegion, PmScanArg};

/// Categories of the `PAGEMAP_SCAN` ioctl (linux/fs.h).
pub(crate) const PAGE_IS_PRESENT: u64 = 1 << 3;
pub(crate) const PAGE_IS_SWAPPED: u64 = 1 << 4;
pub(crate) const PAGE_IS_PFNZERO: u64 = 1 << 5;
pub(crate) const PAGE_IS_GUARD: u64 = 1 << 8;

/// Regions asked of the kernel at once.
const REGIONS: usize = 4096;
/// Flags in smaps of mappings that stay with CRIU: locked, huge pages, device memory, raw frame
/// numbers, shadow stacks, memory that the kernel may drop.
const LEFT_TO_CRIU: [&str; 6] = ["lo", "ht", "io", "pf", "ss", "dp"];

/// A process of the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    /// Its number here.
    pub(crate) pid: i32,
    /// Its number in the container, the same on every host; also the number of its space.
    pub(crate) inner: i32,
}

/// What of one process is hidden from CRIU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HiddenProcess {
    pub(crate) process: Process,
    /// Address ranges that CRIU must find empty, ascending.
    pub(crate) mappings: Vec<Range<u64>>,
    /// Address ranges that hold pages, ascending, within the mappings.
    pub(crate) pages: Vec<Range<u64>>,
}

impl Process {
    /// The space that its memory is.
    pub(crate) fn space(&self) -> SpaceId {
        SpaceId(self.inner as u32)
    }
}

impl HiddenProcess {
    /// Looks at a process that stands still.
    pub(crate) fn find(process: &Process) -> Result<Self> {
        let mappings = hideable_mappings(process.pid)?;
        let pages = present_pages(process.pid, &mappings)?;
        Ok(Self { process: process.clone(), mappings, pages })
    }

    /// Adds its pages to `set`.
    pub(crate) fn add_to(&self, set: &mut PageSet) {
        for range in &self.pages {
            let first = range.start / PAGE_SIZE as u64;
            let count = (range.end - range.start) / PAGE_SIZE as u64;
            set.insert(PageRange::new(self.process.space(), first, count));
        }
    }
}

/// The processes `pids` with their numbers in the container, whose first process is `init`. One
/// that has no memory any more (a zombie), or has gone while the container runs, is left out.
pub(crate) fn processes(pids: &[i32], init: i32) -> Result<Vec<Process>> {
    if pids.is_empty() {
        return Ok(Vec::new());
    }
    let gone = || ContainerError::State(format!("The container's first process {init} is gone"));
    let depth = namespace_numbers(init)?.ok_or_else(gone)?.len();
    let mut found = Vec::new();
    for pid in pids {
        let Some(numbers) = namespace_numbers(*pid)? else { continue };
        let inner = numbers.get(depth - 1).copied().ok_or_else(|| {
            ContainerError::malformed(
                format!("/proc/{pid}/status"),
                "is of no process of the container",
            )
        })?;
        if has_memory(*pid)? {
            found.push(Process { pid: *pid, inner });
        }
    }
    found.sort_by_key(|process| process.inner);
    Ok(found)
}

/// Resident memory of a process, in bytes.
pub(crate) fn resident(pid: i32) -> u64 {
    status_number(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default(), "VmRSS:")
        .unwrap_or(0)
        * 1024
}

fn has_memory(pid: i32) -> Result<bool> {
    let statm = read_of_process(&format!("/proc/{pid}/statm"))?;
    Ok(statm.is_some_and(|text| !text.starts_with("0 ")))
}

/// Numbers of a process from our own PID namespace inwards; nothing when it is gone.
fn namespace_numbers(pid: i32) -> Result<Option<Vec<i32>>> {
    let path = format!("/proc/{pid}/status");
    let Some(text) = read_of_process(&path)? else { return Ok(None) };
    let numbers: Option<Vec<i32>> = text
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))
        .map(|rest| rest.split_whitespace().map_while(|word| word.parse().ok()).collect());
    numbers
        .filter(|numbers| !numbers.is_empty())
        .map(Some)
        .ok_or_else(|| ContainerError::malformed(path, "has no line NSpid"))
}

/// A file in /proc/PID; nothing when the process is gone.
fn read_of_process(path: &str) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            Ok(None)
        }
        Err(error) => Err(ContainerError::io(format!("read {path}"))(error)),
    }
}

/// Mappings of a process that CRIU need not see.
fn hideable_mappings(pid: i32) -> Result<Vec<Range<u64>>> {
    let status_path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&status_path)
        .map_err(ContainerError::io(format!("read {status_path}")))?;
    // Reading smaps walks all page tables (12 ms a GiB), maps does not: look there only when some
    // mapping may have a flag that matters.
    let plain = status_number(&status, "VmLck:") == Some(0)
        && status_number(&status, "HugetlbPages:").unwrap_or(0) == 0
        && !status.contains("shstk");
    let path = format!("/proc/{pid}/{}", if plain { "maps" } else { "smaps" });
    let text = fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))?;
    parse_mappings(&text)
        .ok_or_else(|| ContainerError::malformed(path, "has a line of no known form"))
}

/// Hideable mappings in the text of maps or smaps; none when a line makes no sense.
fn parse_mappings(text: &str) -> Option<Vec<Range<u64>>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut last_is_ours = false;
    for line in text.lines() {
        let word = line.split(' ').next()?;
        if let Some(name) = word.strip_suffix(':') {
            if name == "VmFlags"
                && last_is_ours
                && line.split(' ').any(|flag| LEFT_TO_CRIU.contains(&flag))
            {
                found.pop();
                last_is_ours = false;
            }
            continue;
        }
        let (range, hideable) = parse_mapping(line)?;
        last_is_ours = hideable;
        if hideable {
            found.push(range);
        }
    }
    Some(found)
}

/// One line of maps: the range, and whether it can be hidden.
fn parse_mapping(line: &str) -> Option<(Range<u64>, bool)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    let permissions = words.next()?;
    let (_offset, _device, inode) = (words.next()?, words.next()?, words.next()?);
    let name = words.next().unwrap_or("");
    // The first thread's stack stays with CRIU, as do the kernel's own mappings.
    let anonymous =
        inode == "0" && (name.is_empty() || name == "[heap]" || name.starts_with("[anon:"));
    // CRIU has a task do system calls from the first executable mapping that it finds, and writes
    // its own code there meanwhile: while the page engine reads, that must not be memory of ours.
    let quiet = permissions.ends_with('p') && !permissions.contains('x');
    let sane = start < end && start % PAGE_SIZE as u64 == 0 && end % PAGE_SIZE as u64 == 0;
    sane.then_some((start..end, anonymous && quiet))
}

/// Pages that exist in the mappings of a process that stands still: those in memory or swap, except
/// the shared page of zeros and guard pages.
fn present_pages(pid: i32, mappings: &[Range<u64>]) -> Result<Vec<Range<u64>>> {
    let path = format!("/proc/{pid}/pagemap");
    let what = || format!("scan {path}");
    let pagemap = File::open(&path).map_err(ContainerError::io(format!("open {path}")))?;
    let guards = if knows_guards(&pagemap) { PAGE_IS_GUARD } else { 0 };
    let mut regions = vec![PageRegion::default(); REGIONS];
    let mut found: Vec<Range<u64>> = Vec::new();
    for mapping in mappings {
        let mut at = mapping.start;
        while at < mapping.end {
            let mut argument = PmScanArg {
                start: at,
                end: mapping.end,
                category_inverted: PAGE_IS_PFNZERO,
                category_mask: PAGE_IS_PFNZERO,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: guards,
                ..PmScanArg::default()
            };
            let count = sys::pagemap_scan(pagemap.as_fd(), &mut argument, &mut regions)
                .map_err(ContainerError::io(what()))?;
            for region in
                regions[..count].iter().filter(|region| region.categories & PAGE_IS_GUARD == 0)
            {
                match found.last_mut() {
                    Some(last) if last.end == region.start => last.end = region.end,
                    _ => found.push(region.start..region.end),
                }
            }
            if argument.walk_end <= at {
                return Err(ContainerError::io(what())(io::Error::other(
                    "the scan does not advance",
                )));
            }
            at = argument.walk_end;
        }
    }
    Ok(found)
}

/// Whether this kernel tells guard pages (6.15 and newer do).
fn knows_guards(pagemap: &File) -> bool {
    let mut argument = PmScanArg {
        end: PAGE_SIZE as u64,
        category_anyof_mask: PAGE_IS_GUARD,
        return_mask: PAGE_IS_GUARD,
        ..PmScanArg::default()
    };
    sys::pagemap_scan(pagemap.as_fd(), &mut argument, &mut [PageRegion::default()]).is_ok()
}

/// The number after `name` in /proc/PID/status.
fn status_number(status: &str, name: &str) -> Option<u64> {
    status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/x
00e03000-00e24000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000021000 rw-p 00000000 00:00 0 
7f0000021000-7f0004000000 ---p 00000000 00:00 0 
7f0004000000-7f0004100000 rw-s 00000000 00:01 77 /dev/zero (deleted)
7f0005000000-7f0005001000 rw-p 00000000 00:00 0 [anon:arena one]
7f0006000000-7f0006001000 rwxp 00000000 00:00 0 
7f0006001000-7f0006002000 --xp 00000000 00:00 0 [anon:code]
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
7ffc00100000-7ffc00102000 r--p 00000000 00:00 0 [vvar]
";

    #[test]
    fn private_anonymous_mappings_without_code_are_hideable_and_no_others() {
        let found = parse_mappings(MAPS).expect("maps");
        let starts: Vec<u64> = found.iter().map(|range| range.start).collect();
        assert_eq!(starts, [0xe03000, 0x7f0000000000, 0x7f0000021000, 0x7f0005000000]);
    }

    #[test]
    fn flags_in_smaps_leave_a_mapping_to_criu() {
        let smaps = "\
00e03000-00e24000 rw-p 00000000 00:00 0 [heap]
Rss:                   4 kB
VmFlags: rd wr mr mw me ac 
7f0000000000-7f0000021000 rw-p 00000000 00:00 0 
VmFlags: rd wr mr mw me lo ac 
";
        let left = std::iter::once(0xe03000..0xe24000).collect();
        assert_eq!(parse_mappings(smaps), Some(left));
    }

    #[test]
    fn text_that_is_no_maps_is_refused() {
        assert_eq!(parse_mappings("hello world"), None);
        assert_eq!(parse_mappings("2000-1000 rw-p 0 00:00 0"), None);
    }

    #[test]
    fn our_own_pages_are_found() {
        // Written, so that they exist; fewer than a huge page, so that the rest does not.
        let buffer = vec![1u8; 64 * PAGE_SIZE];
        let pid = std::process::id() as i32;
        let own = processes(&[pid], pid).expect("ourselves");
        let hidden = HiddenProcess::find(&own[0]).expect("our memory");
        let start = (buffer.as_ptr() as u64).next_multiple_of(PAGE_SIZE as u64);
        let end = start + 63 * PAGE_SIZE as u64;
        let covered: u64 = hidden
            .pages
            .iter()
            .map(|range| range.end.min(end).saturating_sub(range.start.max(start)))
            .sum();
        assert_eq!(covered, end - start);
        let mut set = PageSet::new();
        hidden.add_to(&mut set);
        assert!(set.contains(SpaceId(own[0].inner as u32), start / PAGE_SIZE as u64));
    }
}
