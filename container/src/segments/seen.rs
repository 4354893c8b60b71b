//! Where the processes of a container, which may be running, have shared memory: by their mappings and
//! their descriptors.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use decamp_shared::pages::PAGE_SIZE;
use rustix::fs::{AtFlags, StatxFlags, statx};

use crate::huge;
use crate::tmpfs::held::OfTree;

/// A file as the kernel numbers them on its own mounts, one for ordinary pages and one for each size of huge
/// ones: System V segments have numbers of their own, which others may have as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) system_v: bool,
    pub(super) inode: u64,
    /// Bytes of a page.
    pub(super) page: u64,
}

/// Where segments were seen.
#[derive(Default)]
pub(super) struct Seen {
    /// A path that leads to it, while whoever has it lives.
    pub(super) paths: BTreeMap<Key, PathBuf>,
    /// How many of them have a number.
    numbers: BTreeMap<u64, usize>,
    /// What CRIU has to see.
    pub(super) left: BTreeSet<Key>,
    /// The same of files on any other device, by device and number.
    pub(super) left_elsewhere: BTreeSet<(u64, u64)>,
}

impl Seen {
    pub(super) fn look_at_mappings(&mut self, pid: i32, device: u64) {
        let Ok(maps) = fs::read(format!("/proc/{pid}/maps")) else { return };
        for line in maps.split(|byte| *byte == b'\n') {
            let Some(mapping) = Mapping::parse(line) else { continue };
            // CRIU writes code of its own into memory that is executed.
            let is_shared = mapping.permissions.ends_with(b"s");
            let is_executed = mapping.permissions[2] == b'x';
            let Some(page) = page_on(mapping.device, device) else {
                if is_shared && is_executed {
                    self.left_elsewhere.insert((mapping.device, mapping.inode));
                }
                continue;
            };
            let system_v = mapping.path.starts_with(b"/SYSV");
            let key = Key { system_v, inode: mapping.inode, page };
            if !is_shared || is_executed {
                self.left.insert(key);
            }
            let (start, end) = mapping.range;
            let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
            self.note(key, path.into());
        }
    }

    pub(super) fn look_at_descriptors(&mut self, pid: i32, device: u64) {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let is_ours =
                |link: PathBuf| link.as_os_str().as_encoded_bytes().starts_with(b"/memfd:");
            if !fs::read_link(&path).is_ok_and(is_ours) {
                continue;
            }
            if let Ok(found) = fs::metadata(&path)
                && let Some(page) = page_on(found.dev(), device)
            {
                self.note(Key { system_v: false, inode: found.ino(), page }, path);
            }
        }
    }

    fn note(&mut self, key: Key, path: PathBuf) {
        if let Entry::Vacant(entry) = self.paths.entry(key) {
            entry.insert(path);
            *self.numbers.entry(key.inode).or_default() += 1;
        }
    }

    /// Whether the page engine moves it. CRIU's images have one name for all that have its number, a System V
    /// segment or one of huge pages: where there are several, all are CRIU's.
    pub(super) fn is_wanted(&self, key: &Key) -> bool {
        let alone = self.numbers.get(&key.inode) == Some(&1);
        self.paths.contains_key(key) && !self.left.contains(key) && alone
    }

    /// Files on a tmpfs without those on one that has a file which is executed and shared.
    pub(super) fn without_executed(&self, mut files: Vec<OfTree>) -> Vec<OfTree> {
        let left = |device| self.left_elsewhere.iter().any(|(other, _)| *other == device);
        files.retain(|file| !left(file.device));
        files
    }
}

/// Bytes of a page on a device, if it is one of the kernel's own mounts: `device` has ordinary ones.
pub(super) fn page_on(found: u64, device: u64) -> Option<u64> {
    if found == device { Some(PAGE_SIZE as u64) } else { huge::page_on(found) }
}

/// When a file was made, where its file system says that.
pub(super) fn made(file: &File) -> Option<(i64, u32)> {
    let found = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok()?;
    let known = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::BTIME);
    known.then_some((found.stx_btime.tv_sec, found.stx_btime.tv_nsec))
}

/// A line of /proc/PID/maps.
struct Mapping<'a> {
    range: (u64, u64),
    permissions: &'a [u8; 4],
    device: u64,
    inode: u64,
    path: &'a [u8],
}

impl<'a> Mapping<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut words = line.splitn(6, |byte| *byte == b' ');
        let range = std::str::from_utf8(words.next()?).ok()?.split_once('-')?;
        let number = |word: &str| u64::from_str_radix(word, 16).ok();
        let permissions = words.next()?.try_into().ok()?;
        let (_offset, device, inode) = (words.next()?, words.next()?, words.next()?);
        let device = std::str::from_utf8(device).ok()?.split_once(':')?;
        let half = |word: &str| u32::from_str_radix(word, 16).ok();
        let device = (half(device.0)?, half(device.1)?);
        Some(Self {
            range: (number(range.0)?, number(range.1)?),
            permissions,
            device: libc::makedev(device.0, device.1),
            inode: std::str::from_utf8(inode).ok()?.parse().ok()?,
            path: words.next().unwrap_or_default().trim_ascii_start(),
        })
    }
}

/// To open with, so that nothing of the container is changed by reading.
pub(super) fn quiet() -> OpenOptions {
    let mut options = OpenOptions::new();
    // Between a look and this another file may have taken the place, one that would be waited for.
    options.read(true).custom_flags(libc::O_NOATIME | libc::O_NONBLOCK | libc::O_NOCTTY);
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps_are_read() {
        let line =
            b"7f0004000000-7f0004100000 rw-s 00001000 00:01 77                 /dev/zero (deleted)";
        let mapping = Mapping::parse(line).expect("a mapping");
        assert_eq!(mapping.range, (0x7f0004000000, 0x7f0004100000));
        assert_eq!(
            (mapping.permissions, mapping.device, mapping.inode),
            (b"rw-s", libc::makedev(0, 1), 77)
        );
        assert_eq!(mapping.path, b"/dev/zero (deleted)");
        assert!(Mapping::parse(b"").is_none() && Mapping::parse(b"Rss: 4 kB").is_none());
    }
}
