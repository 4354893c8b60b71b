//! Huge pages (hugetlbfs) of this host: which sizes there are, how many pages are free, and which mappings are
//! made of them. Those that are transparent are pages like any others, and not meant here.
//!
//! What has no name of its own lies on mounts of the kernel's, one for each size: there are mappings that were
//! asked for without a file, memory files, and System V segments. Kernel document: `admin-guide/mm/hugetlbpage`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::memory::parse_range;

/// What a private mapping without a file is called in `/proc/PID/maps`.
const ANONYMOUS: &str = "/anon_hugepage (deleted)";
const DIRECTORY: &str = "/sys/kernel/mm/hugepages";
/// Bytes of a huge page that one entry of a page's directory stands for.
const TRACKED: u64 = 2 << 20;
/// Bytes of huge pages that are filled in a nanosecond: 4 GB/s, from one file in memory.
const FILLED: u64 = 4;
/// Where the logarithm of a size begins in flags (`MAP_HUGE_SHIFT`, `MFD_HUGE_SHIFT`).
pub(crate) const SIZE_SHIFT: u32 = 26;
/// `MFD_HUGETLB`.
const MFD_HUGETLB: u32 = 4;

/// Numbers of huge pages, by their size in bytes.
pub(crate) type Pages = BTreeMap<u64, u64>;

/// A line of `/proc/PID/maps` that is about huge pages.
struct Mapping<'a> {
    range: &'a str,
    device: u64,
    inode: u64,
    /// Bytes of a page.
    page: u64,
    length: u64,
    private: bool,
    anonymous: bool,
    system_v: bool,
}

/// The size of a page on this device; nothing for one that has no huge pages, or is a mount that somebody made.
pub(crate) fn page_on(device: u64) -> Option<u64> {
    static KNOWN: OnceLock<BTreeMap<u64, u64>> = OnceLock::new();
    KNOWN.get_or_init(devices).get(&device).copied()
}

/// Bytes of the huge pages that this kernel has, ascending.
pub(crate) fn sizes() -> Vec<u64> {
    let entries = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    let size = |name: &str| {
        let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        kib.checked_mul(1024).filter(|size| size.is_power_of_two())
    };
    let mut found: Vec<u64> =
        entries.filter_map(|entry| size(entry.file_name().to_str()?)).collect();
    found.sort_unstable();
    found
}

/// The kernel's own mounts by their device. A memory file is on one of them, and takes no page while it is empty.
fn devices() -> BTreeMap<u64, u64> {
    let device = |size: u64| {
        let flags = MFdFlags::MFD_CLOEXEC | of_pages(Some(size));
        let made = memfd_create("decamp", flags).ok()?;
        Some((fs::File::from(made).metadata().ok()?.dev(), size))
    };
    sizes().into_iter().filter_map(device).collect()
}

/// What makes a memory file of pages of so many bytes; nothing for ordinary ones.
pub(crate) fn of_pages(size: Option<u64>) -> MFdFlags {
    let flags = |size: u64| MFD_HUGETLB | size.trailing_zeros() << SIZE_SHIFT;
    MFdFlags::from_bits_retain(size.map_or(0, flags))
}

/// Bytes of the pages that these flags of a memory file, or of a mapping, speak of.
pub(crate) fn page_in(flags: u32) -> u64 {
    1 << (flags >> SIZE_SHIFT & 0x3f)
}

/// Huge pages that nobody has or was promised, and those that the kernel would make on demand.
pub(crate) fn free() -> Pages {
    let of = |size: &u64| {
        let directory = Path::new(DIRECTORY).join(format!("hugepages-{}kB", size / 1024));
        let number = |name: &str| -> Option<u64> {
            fs::read_to_string(directory.join(name)).ok()?.trim().parse().ok()
        };
        let less =
            |more: &str, less: &str| Some(number(more)?.saturating_sub(number(less).unwrap_or(0)));
        let free = less("free_hugepages", "resv_hugepages").unwrap_or(0);
        free.saturating_add(less("nr_overcommit_hugepages", "surplus_hugepages").unwrap_or(0))
    };
    sizes().into_iter().map(|size| (size, of(&size))).collect()
}

/// Whether a line of `/proc/PID/maps` is of a private mapping without a file, of huge pages that can be tracked:
/// a scan protects those of one size only (the kernel's `pagemap_scan_hugetlb_entry`).
pub(crate) fn is_tracked(line: &str) -> bool {
    parse(line, page_on).is_some_and(|mapping| mapping.anonymous && mapping.page == TRACKED)
}

/// Addresses of the private mappings of huge pages of a process that can be tracked, ascending; none of one that
/// is gone.
pub(crate) fn tracked(pid: i32) -> Vec<Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let lines = maps.lines().filter(|line| is_tracked(line));
    lines.filter_map(|line| parse_range(line.split(' ').next()?)).collect()
}

/// Huge pages that are promised to processes once they are restored elsewhere: for each private mapping of
/// its own, written or not, and once for what is shared.
pub(crate) fn wanted(pids: &[i32]) -> Pages {
    let Mapped { mut private, files, attached } = Mapped::by(pids);
    for (page, length) in files.into_iter().chain(attached) {
        let pages = private.entry(page).or_default();
        *pages = pages.saturating_add(length.div_ceil(page));
    }
    private
}

/// Bytes of huge pages that processes share, each once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shared {
    /// In files that are mapped or open.
    pub(crate) files: u64,
    /// In System V segments that are attached.
    pub(crate) attached: u64,
}

impl Shared {
    /// That of the processes `pids`.
    pub(crate) fn of(pids: &[i32]) -> Self {
        let sum = |of: Vec<(u64, u64)>| {
            of.into_iter().fold(0u64, |sum, (_, length)| sum.saturating_add(length))
        };
        let Mapped { files, attached, .. } = Mapped::by(pids);
        Self { files: sum(files), attached: sum(attached) }
    }

    /// Those that travel in CRIU's images, and so take ordinary memory at the destination as well: segments, and
    /// files where none moves live.
    pub(crate) fn in_images(self, moves_live: bool) -> u64 {
        self.attached.saturating_add(if moves_live { 0 } else { self.files })
    }
}

/// What a process has in huge pages of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Private {
    /// Bytes in private mappings; what it shares since a fork counts.
    pub(crate) bytes: u64,
    /// Those of them that were never promised to it (`MAP_NORESERVE`), where they have no file.
    pub(crate) unpromised: u64,
}

impl Private {
    /// That of a process; nothing of one that is gone.
    pub(crate) fn of(pid: i32) -> Self {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
        // Most have none, and the kernel walks all page tables for the other file.
        let has = |status: String| {
            let line = status.lines().find_map(|line| line.strip_prefix("HugetlbPages:"));
            line.is_some_and(|line| line.trim() != "0 kB")
        };
        let smaps = read("status").filter(|status| has(status.clone())).and_then(|_| read("smaps"));
        smaps.map_or(Self::default(), |smaps| Self::in_smaps(&smaps, page_on))
    }

    fn in_smaps(smaps: &str, page_on: impl Fn(u64) -> Option<u64>) -> Self {
        let mut found = Self::default();
        let (mut bytes, mut anonymous) = (None, false);
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next().and_then(|word| word.strip_suffix(':')) {
                None => {
                    let mapping = parse(line, &page_on).filter(|mapping| mapping.private);
                    anonymous = mapping.as_ref().is_some_and(|mapping| mapping.anonymous);
                    bytes = mapping.map(|_| 0);
                }
                Some("Shared_Hugetlb" | "Private_Hugetlb") => {
                    let kib: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
                    bytes = bytes.map(|bytes: u64| bytes.saturating_add(kib.saturating_mul(1024)));
                }
                Some("VmFlags") => {
                    let bytes = bytes.take().unwrap_or(0);
                    found.bytes = found.bytes.saturating_add(bytes);
                    if anonymous && words.any(|flag| flag == "nr") {
                        found.unpromised = found.unpromised.saturating_add(bytes);
                    }
                }
                Some(_) => {}
            }
        }
        found
    }

    /// How long it takes to fill, before it runs elsewhere, what was not promised.
    pub(crate) fn fills_in(&self) -> Duration {
        Duration::from_nanos(self.unpromised / FILLED)
    }
}

/// Why CRIU cannot dump huge pages of these processes, if it cannot. It learns on which device they lie by mapping
/// one of each size; and each file of them that is shared it maps, one after the other, for which the kernel
/// promises as many pages anew.
pub(crate) fn obstacle(pids: &[i32]) -> Option<String> {
    lacking(&Mapped::by(pids), &free())
}

fn lacking(mapped: &Mapped, free: &Pages) -> Option<String> {
    let one = mapped.private.keys().chain(mapped.attached.iter().map(|(page, _)| page));
    let shared = mapped.files.iter().map(|(page, length)| (*page, length.div_ceil(*page)));
    let wanted = one.map(|page| (*page, 1)).chain(shared.map(|(page, pages)| (page, pages.max(1))));
    let there = |page: u64| free.get(&page).copied().unwrap_or(0);
    let (page, pages) =
        wanted.filter(|(page, pages)| *pages > there(*page)).max_by_key(|one| one.1)?;
    let (there, kib) = (there(page), page / 1024);
    let why = match pages {
        1 => "CRIU maps one to dump it",
        _ => "CRIU maps what it shares of them once more to dump it",
    };
    Some(format!(
        "It has huge pages of {kib} KiB, and {why}: {pages} have to be free here, and {there} are. Raise \
         /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages here by {}",
        pages - there
    ))
}

/// What processes have of huge pages.
#[derive(Default)]
struct Mapped {
    private: Pages,
    /// Bytes of a page, and of all, of each file that is mapped or open.
    files: Vec<(u64, u64)>,
    /// The same of System V segments.
    attached: Vec<(u64, u64)>,
}

impl Mapped {
    fn by(pids: &[i32]) -> Self {
        let (mut found, mut seen) = (Self::default(), BTreeSet::new());
        for pid in pids {
            let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
            for mapping in maps.lines().filter_map(|line| parse(line, page_on)) {
                let Mapping { device, inode, page, length, .. } = mapping;
                if mapping.private {
                    let pages = found.private.entry(page).or_default();
                    *pages = pages.saturating_add(length.div_ceil(page));
                }
                if !mapping.anonymous && seen.insert((device, inode)) {
                    let file = fs::metadata(format!("/proc/{pid}/map_files/{}", mapping.range));
                    let into = match mapping.system_v {
                        true => &mut found.attached,
                        false => &mut found.files,
                    };
                    into.push((page, file.map_or(length, |file| file.len())));
                }
            }
            let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            for file in open.filter_map(|entry| fs::metadata(entry.path()).ok()) {
                if let Some(page) = page_on(file.dev())
                    && seen.insert((file.dev(), file.ino()))
                {
                    found.files.push((page, file.len()));
                }
            }
        }
        found
    }
}

/// Nothing for a mapping of other pages. `page_on` tells the size of pages on a device.
fn parse(line: &str, page_on: impl Fn(u64) -> Option<u64>) -> Option<Mapping<'_>> {
    let mut words = line.splitn(6, ' ');
    let range = words.next()?;
    let (rights, _offset) = (words.next()?, words.next()?);
    let (major, minor) = words.next()?.split_once(':')?;
    let number = |text: &str| u32::from_str_radix(text, 16).ok();
    let device = libc::makedev(number(major)?, number(minor)?);
    let inode = words.next()?.parse().ok()?;
    let page = page_on(device).filter(|_| inode != 0)?;
    let addresses = parse_range(range)?;
    let private = rights.ends_with('p');
    let name = words.next().unwrap_or_default().trim_start();
    Some(Mapping {
        range,
        device,
        inode,
        page,
        length: addresses.end - addresses.start,
        private,
        anonymous: private && name == ANONYMOUS,
        system_v: name.starts_with("/SYSV"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_travels_in_images_takes_ordinary_memory() {
        let shared = Shared { files: 7, attached: 2 };
        assert_eq!((shared.in_images(true), shared.in_images(false)), (2, 9));
    }

    #[test]
    fn mappings_of_huge_pages_are_told_by_their_device() {
        let page_on = |device| (device == libc::makedev(0, 0x10)).then_some(2 << 20);
        let of = |rest: &str| {
            let line = format!("7f0000000000-7f0000400000 {rest}");
            let found = parse(&line, page_on)?;
            Some((found.length, found.private, found.anonymous))
        };
        let name = "                       /anon_hugepage (deleted)";
        let anonymous = format!("rw-p 00000000 00:10 77 {name}");
        assert_eq!(of(&anonymous), Some((4 << 20, true, true)));
        let shared = format!("rw-s 00000000 00:10 77 {name}");
        assert_eq!(of(&shared), Some((4 << 20, false, false)));
        let file = "rw-p 00000000 00:10 77                         /memfd:x (deleted)";
        assert_eq!(of(file), Some((4 << 20, true, false)));
        // The name alone makes it none: anybody may call a file so.
        assert_eq!(of(&format!("rw-p 00000000 00:11 77 {name}")), None);
        assert_eq!(of("rw-p 00000000 00:10 0 "), None);
        assert_eq!(of("hello world"), None);
    }

    #[test]
    fn private_huge_pages_are_told_from_shared_ones_and_promised_ones_from_others() {
        const MIB: u64 = 1 << 20;
        let page_on = |device| (device == libc::makedev(0, 0x10)).then_some(2 << 20);
        let mapping = |rest: &str, mine: u64, ours: u64, flags: &str| {
            format!(
                "7f0000000000-7f0000800000 {rest}\nSize:               8192 kB\nRss:                   0 kB\n\
                 Shared_Hugetlb: {:8} kB\nPrivate_Hugetlb: {:7} kB\nTHPeligible:           0\n\
                 VmFlags: rd wr mr mw me {flags}ht sd \n",
                ours * 1024,
                mine * 1024
            )
        };
        let name = "/anon_hugepage (deleted)";
        let smaps = [
            mapping(&format!("rw-p 00000000 00:10 77   {name}"), 2, 4, "ac "),
            // Shared, though nobody else maps it.
            mapping(&format!("rw-s 00000000 00:10 78   {name}"), 8, 0, "ac "),
            mapping(&format!("rw-p 00000000 00:10 79   {name}"), 6, 0, "nr "),
            // Of a file of its own, and no such mapping at all.
            mapping("rw-p 00000000 00:10 80   /memfd:x (deleted)", 2, 0, "nr "),
            mapping("rw-p 00000000 00:11 81   /srv/x", 8, 0, "nr "),
        ];
        let found = Private::in_smaps(&smaps.concat(), page_on);
        assert_eq!(found, Private { bytes: 14 * MIB, unpromised: 6 * MIB });
        assert_eq!(found.fills_in().as_micros(), 1572);
        assert_eq!(Private::in_smaps("hello: world\nVmFlags: nr\n", page_on), Private::default());
        assert_eq!(Private::of(std::process::id() as i32), Private::default());
    }

    #[test]
    fn what_criu_maps_has_to_be_free_at_the_source() {
        const PAGE: u64 = 2 << 20;
        let free = |pages| Pages::from([(PAGE, pages)]);
        let private = Mapped { private: Pages::from([(PAGE, 9)]), ..Mapped::default() };
        assert_eq!(lacking(&private, &free(1)), None);
        assert!(lacking(&private, &free(0)).is_some_and(|said| said.ends_with("here by 1")));
        let files = vec![(PAGE, 3 * PAGE), (PAGE, 5 * PAGE), (PAGE, PAGE)];
        let shared = Mapped { files, ..Mapped::default() };
        assert_eq!(lacking(&shared, &free(5)), None);
        let said = lacking(&shared, &free(3)).expect("two are missing");
        assert!(said.contains("2048kB") && said.ends_with("here by 2"), "{said}");
        let attached = Mapped { attached: vec![(PAGE, 5 * PAGE)], ..Mapped::default() };
        assert_eq!(lacking(&attached, &free(1)), None);
        assert_eq!(lacking(&Mapped::default(), &Pages::new()), None);
    }

    #[test]
    fn this_host_has_as_many_as_it_says() {
        for size in sizes() {
            assert!(size.is_power_of_two() && size > 4096, "{size}");
        }
        assert_eq!(free().keys().copied().collect::<Vec<_>>(), sizes());
        assert!(devices().values().all(|size| sizes().contains(size)));
        // We have none.
        assert_eq!(wanted(&[std::process::id() as i32]), Pages::new());
    }
}
