//! Which memory of a container's processes is moved by the page engine instead of by CRIU: the
//! mappings that can be hidden from CRIU, and the pages that exist in them.
//!
//! Only private anonymous memory, of huge pages too: what is special or backed by a file stays in CRIU's own
//! images, and so does the executable mapping that CRIU works from. Shared memory is the business of
//! [`crate::segments`].

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use decamp_shared::pages::{PAGE_SIZE, PageRange, PageSet, SpaceId};

use crate::beside;
use crate::error::{ContainerError, Result};
use crate::huge;
use crate::pagemap::{Pagemap, append};

/// Flags in smaps of mappings that stay with CRIU: device memory, raw frame numbers, shadow stacks, memory
/// that the kernel may drop.
const LEFT_TO_CRIU: [&str; 4] = ["io", "pf", "ss", "dp"];
/// Processes that one thread looks at before it asks for more.
const LOOKS: usize = 16;
/// Where the addresses of user space end. What the kernel maps above, CRIU does not run.
const USER_END: u64 = 1 << 47;

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
    /// Those of the pages that were written since the last harvest, ascending: all, where nobody tracked.
    pub(crate) written: Vec<Range<u64>>,
}

impl Process {
    /// The space that its memory is.
    pub(crate) fn space(&self) -> SpaceId {
        SpaceId(self.inner as u32)
    }

    /// Adds pages of it, given as ascending address ranges, to `set`.
    pub(crate) fn add_to(&self, set: &mut PageSet, addresses: &[Range<u64>]) {
        for range in addresses {
            let first = range.start / PAGE_SIZE as u64;
            let count = (range.end - range.start) / PAGE_SIZE as u64;
            set.insert(PageRange::new(self.space(), first, count));
        }
    }
}

impl HiddenProcess {
    /// A process that stands still, into whose mappings nobody has looked yet.
    pub(crate) fn mapped(process: &Process) -> Result<Self> {
        Ok(Self {
            process: process.clone(),
            mappings: hideable_mappings(process.pid)?,
            pages: Vec::new(),
            written: Vec::new(),
        })
    }

    /// The same of many.
    pub(crate) fn all_mapped(processes: &[Process]) -> Result<Vec<Self>> {
        let of = |some: &[Process]| some.iter().map(Self::mapped).collect::<Result<Vec<_>>>();
        Ok(beside::each(processes.chunks(LOOKS).collect(), of)?.into_iter().flatten().collect())
    }

    /// Looks for its pages; `tracked` says whether its memory was protected at the last harvest.
    pub(crate) fn look(&mut self, tracked: bool) -> Result<()> {
        let mut pagemap = Pagemap::open(self.process.pid)?;
        let (mut pages, mut written) = (Vec::new(), Vec::new());
        for mapping in &self.mappings {
            let before =
                (pages.len(), pages.last().cloned(), written.len(), written.last().cloned());
            let known = pagemap.existing(mapping, tracked, |range, was_written| {
                if was_written || !tracked {
                    append(&mut written, range.clone());
                }
                append(&mut pages, range);
            })?;
            if !known {
                // A mapping that came, or moved, since the last harvest: all of it.
                restore(&mut pages, before.0, before.1);
                restore(&mut written, before.2, before.3);
                pagemap.existing(mapping, false, |range, _| {
                    append(&mut written, range.clone());
                    append(&mut pages, range);
                })?;
            }
        }
        (self.pages, self.written) = (pages, written);
        Ok(())
    }
}

/// Takes back what was appended to `ranges` since it had `length` members, the last of them `last`.
fn restore(ranges: &mut Vec<Range<u64>>, length: usize, last: Option<Range<u64>>) {
    ranges.truncate(length);
    if let (Some(now), Some(before)) = (ranges.last_mut(), last) {
        *now = before;
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
    let look = |pid: &i32| -> Result<Option<Process>> {
        let Some(numbers) = namespace_numbers(*pid)? else { return Ok(None) };
        let inner = numbers.get(depth - 1).copied().ok_or_else(|| {
            ContainerError::malformed(
                format!("/proc/{pid}/status"),
                "is of no process of the container",
            )
        })?;
        Ok(has_memory(*pid)?.then_some(Process { pid: *pid, inner }))
    };
    let looks = |pids: &[i32]| pids.iter().map(look).collect::<Result<Vec<_>>>();
    let found = beside::each(pids.chunks(LOOKS).collect(), looks)?;
    let mut found: Vec<Process> = found.into_iter().flatten().flatten().collect();
    found.sort_by_key(|process| process.inner);
    Ok(found)
}

/// Memory that a process has, in bytes: resident, in huge pages of its own, or swapped out. Shared huge pages are
/// not in it: they lie in files ([`huge::Shared`]), and take none of what is ordinary.
pub(crate) fn resident(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = |name| status_number(&status, name).unwrap_or(0);
    ((kib("VmRSS:") + kib("VmSwap:")) * 1024).saturating_add(huge::Private::of(pid).bytes)
}

/// The same with shared huge pages, which is told without a walk of its page tables.
pub(crate) fn roughly_resident(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = |name| status_number(&status, name).unwrap_or(0);
    (kib("VmRSS:") + kib("HugetlbPages:") + kib("VmSwap:")) * 1024
}

/// Number of a process's session in the namespace that it is in itself; nothing when it is gone, or the
/// leader is outside.
pub(crate) fn session(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSsid:"))?;
    line.split_ascii_whitespace().next_back()?.parse().ok()
}

/// Device and inode of the file that a process runs; nothing when it is gone.
pub(crate) fn program(pid: i32) -> Option<(u64, u64)> {
    let file = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
    Some((file.dev(), file.ino()))
}

/// Number here of the parent of a process; nothing when it is gone.
pub(crate) fn parent(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status_number(&status, "PPid:").and_then(|parent| parent.try_into().ok())
}

/// Whether a process has no memory (any more): it has ended.
pub(crate) fn is_without_memory(pid: i32) -> Result<bool> {
    Ok(!has_memory(pid)?)
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

/// When the process began, in clock ticks since the boot: with its number this names it for good. `None`
/// when it is gone.
pub(crate) fn began(pid: i32) -> Result<Option<u64>> {
    let path = format!("/proc/{pid}/stat");
    let Some(text) = read_of_process(&path)? else { return Ok(None) };
    // Its name, in brackets, may hold anything. What follows it begins with the third field.
    text.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19)?.parse().ok())
        .map(Some)
        .ok_or_else(|| ContainerError::malformed(path, "does not say when it began"))
}

/// Whether a process has a file open whose reads a device, or another process, may put into its memory
/// without the kernel's page tables: for direct I/O, or on a file system that hands out pages itself.
pub(crate) fn does_direct_io(pid: i32) -> Result<bool> {
    let directory = format!("/proc/{pid}/fdinfo");
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(ContainerError::io(format!("list {directory}"))(error)),
    };
    let mountinfo = read_of_process(&format!("/proc/{pid}/mountinfo"))?.unwrap_or_default();
    let handing_out: Vec<&str> = mountinfo.lines().filter_map(mount_that_hands_out_pages).collect();
    let direct = |text: String| {
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let flags = field("flags:").and_then(|flags| i32::from_str_radix(flags, 8).ok());
        flags.is_some_and(|flags| flags & libc::O_DIRECT != 0)
            || field("mnt_id:").is_some_and(|mount| handing_out.contains(&mount))
    };
    Ok(entries.flatten().any(|entry| {
        // A descriptor that was closed meanwhile has no file any more. Pipes use the flag for something
        // else; only files have a path.
        fs::read_to_string(entry.path()).is_ok_and(direct)
            && fs::read_link(Path::new(&format!("/proc/{pid}/fd")).join(entry.file_name()))
                .is_ok_and(|link| link.is_absolute())
    }))
}

/// Whether a process has a file open by which soft-dirty bits are cleared, its own or another's: it looks at
/// them, as collectors of garbage do.
pub(crate) fn clears_bits(pid: i32) -> Result<bool> {
    let directory = format!("/proc/{pid}/fd");
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(ContainerError::io(format!("list {directory}"))(error)),
    };
    let is_that = |link: std::path::PathBuf| link.ends_with("clear_refs");
    Ok(entries.flatten().any(|entry| fs::read_link(entry.path()).is_ok_and(is_that)))
}

/// The number of the mount that a line of mountinfo is about, where its file system may answer a read by
/// writing to the reader's pages (FUSE with direct I/O, 9p).
fn mount_that_hands_out_pages(line: &str) -> Option<&str> {
    let (left, right) = line.split_once(" - ")?;
    let kind = right.split(' ').next()?;
    let wanted = kind == "9p" || kind == "fuse" || kind.starts_with("fuse.");
    left.split(' ').next().filter(|_| wanted)
}

/// Mappings of a process that CRIU need not see.
pub(crate) fn hideable_mappings(pid: i32) -> Result<Vec<Range<u64>>> {
    let status_path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&status_path)
        .map_err(ContainerError::io(format!("read {status_path}")))?;
    // Reading smaps walks all page tables (12 ms a GiB), maps does not: look there only when some
    // mapping may have a flag that matters.
    let plain = !status.contains("shstk");
    let path = format!("/proc/{pid}/{}", if plain { "maps" } else { "smaps" });
    let text = fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))?;
    parse_mappings(&text)
        .ok_or_else(|| ContainerError::malformed(path, "has a line of no known form"))
}

/// All mappings of a process: addresses, ascending. None of one that has no memory any more.
///
/// # Errors
/// That it is gone, too.
pub(crate) fn mappings(pid: i32) -> Result<Vec<Range<u64>>> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))?;
    let ranges = text.lines().map(|line| parse_range(line.split(' ').next()?));
    let ranges: Option<Vec<_>> = ranges.collect();
    ranges.ok_or_else(|| ContainerError::malformed(path, "has a line of no known form"))
}

/// Bytes of a process's memory that is locked, and never swapped; none of one that is gone.
pub(crate) fn locked(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status_number(&status, "VmLck:").unwrap_or(0) * 1024
}

/// Hideable mappings in the text of maps or smaps; none when a line makes no sense.
fn parse_mappings(text: &str) -> Option<Vec<Range<u64>>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut last_is_ours = false;
    // CRIU has a task do system calls from the first executable mapping that it finds, and writes its own
    // code there meanwhile: while the page engine reads, that must not be memory of ours.
    let mut works_from = None;
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
        let Mapping { range, anonymous, executable } = parse_mapping(line)?;
        if executable && range.start < USER_END {
            works_from.get_or_insert(range.start);
        }
        last_is_ours = anonymous && works_from != Some(range.start);
        if last_is_ours {
            found.push(range);
        }
    }
    Some(found)
}

/// One line of maps.
struct Mapping {
    range: Range<u64>,
    /// Private, and of a kind that can be hidden.
    anonymous: bool,
    executable: bool,
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let range = parse_range(words.next()?)?;
    let permissions = words.next()?;
    let (_offset, _device, inode) = (words.next()?, words.next()?, words.next()?);
    let name = words.next().unwrap_or("");
    // The first thread's stack stays with CRIU, as do the kernel's own mappings.
    let anonymous =
        inode == "0" && (name.is_empty() || name == "[heap]" || name.starts_with("[anon:"));
    let anonymous = anonymous && permissions.ends_with('p') || huge::is_tracked(line);
    Some(Mapping { range, anonymous, executable: permissions.contains('x') })
}

/// The range of addresses at the beginning of a line of maps.
pub(crate) fn parse_range(word: &str) -> Option<Range<u64>> {
    let (start, end) = word.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    let page = PAGE_SIZE as u64;
    (start < end && start.is_multiple_of(page) && end.is_multiple_of(page)).then_some(start..end)
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
    fn private_anonymous_mappings_are_hideable_and_no_others() {
        let starts = |maps: &str| -> Vec<u64> {
            parse_mappings(maps).expect("maps").iter().map(|range| range.start).collect()
        };
        let data = [0xe03000, 0x7f0000000000, 0x7f0000021000, 0x7f0005000000];
        let code = [0x7f0006000000, 0x7f0006001000];
        assert_eq!(starts(MAPS), [&data[..], &code[..]].concat());
        // Without the program's text CRIU works from the first of the others.
        let (_, rest) = MAPS.split_once('\n').expect("lines");
        assert_eq!(starts(rest), [&data[..], &code[1..]].concat());
    }

    #[test]
    fn flags_in_smaps_leave_a_mapping_to_criu() {
        let smaps = "\
00e03000-00e24000 rw-p 00000000 00:00 0 [heap]
Rss:                   4 kB
VmFlags: rd wr mr mw me lo ac 
7f0000000000-7f0000021000 rw-p 00000000 00:00 0 
VmFlags: rd wr mr mw me dp ac 
";
        let left = std::iter::once(0xe03000..0xe24000).collect();
        assert_eq!(parse_mappings(smaps), Some(left));
    }

    #[test]
    fn a_file_that_is_open_for_direct_io_is_seen_and_a_pipe_is_not() {
        use std::os::unix::fs::OpenOptionsExt;
        let pid = std::process::id() as i32;
        let flags = nix::fcntl::OFlag::O_DIRECT;
        let _packets = nix::unistd::pipe2(flags).expect("a pipe of packets");
        assert!(!does_direct_io(pid).expect("ourselves"));
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        fs::write(&path, "").expect("a file");
        let opened = fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(&path);
        let _file = opened.expect("a file system that can do direct I/O");
        assert!(does_direct_io(pid).expect("ourselves"));
    }

    #[test]
    fn mounts_that_hand_out_pages_are_known() {
        let line = "36 35 0:45 / /mnt rw - fuse.sshfs host:/ rw,user_id=0";
        assert_eq!(mount_that_hands_out_pages(line), Some("36"));
        assert_eq!(mount_that_hands_out_pages("36 35 98:0 / / rw - ext4 /dev/sda rw"), None);
        assert_eq!(mount_that_hands_out_pages("36 35 0:45 / /c rw - fusectl fusectl rw"), None);
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
        let mut hidden = HiddenProcess::mapped(&own[0]).expect("our mappings");
        hidden.look(false).expect("our memory");
        let start = (buffer.as_ptr() as u64).next_multiple_of(PAGE_SIZE as u64);
        let end = start + 63 * PAGE_SIZE as u64;
        let covered: u64 = hidden
            .pages
            .iter()
            .map(|range| range.end.min(end).saturating_sub(range.start.max(start)))
            .sum();
        assert_eq!(covered, end - start);
        let mut set = PageSet::new();
        assert_eq!(hidden.written, hidden.pages);
        hidden.process.add_to(&mut set, &hidden.written);
        assert!(set.contains(SpaceId(own[0].inner as u32), start / PAGE_SIZE as u64));
    }
}
