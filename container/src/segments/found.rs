//! Finding the segments of shared memory that a running container has, and holding them open.
//!
//! A segment is known by the number of its file, which is nobody else's while it is held; that of a System V
//! segment is the one that programs know, and may be given again. What is not found, or found and left
//! alone, is CRIU's: it dumps whatever is not hidden.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use decamp_shared::pages::{PAGE_SIZE, SpaceId};
use decamp_shared::workload::SpaceInfo;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::hide::HiddenSegments;
use super::seen::{Key, Seen, made, page_on, quiet};
use super::{FIRST_SPACE, Moved, SEGMENTS_CAP};
use crate::error::{ContainerError, Result};
use crate::images::PAGE_LIMIT;
use crate::memory::Process;
use crate::tmpfs::Tree;
use crate::tmpfs::held::{Held, OfTree, Own};

/// Smaller ones cost less in CRIU's images than as spaces.
pub(crate) const SMALL: u64 = 256 << 10;
/// What people read of a space, before the name of its segment.
const LABEL: &str = "shared memory ";
/// The same of one of System V.
const LABEL_SYSTEM_V: &str = "System V segment ";
/// The same of one of huge pages, before their size.
const LABEL_HUGE: &str = "shared huge pages of ";
const LABEL_KIB: &str = " KiB ";
/// Names of memory files are this long at most (the kernel's limit).
pub(super) const NAME_CAP: usize = 249;

/// The segments of a container that runs here.
#[derive(Default)]
pub(crate) struct Segments {
    known: Vec<Segment>,
    /// How many there have been. The numbers of those that are gone are not given again.
    counted: u32,
    /// The device of the kernel's own mount of ordinary pages, once something was looked for.
    device: u64,
    /// The mounts that those on a tmpfs are on.
    trees: Held,
}

struct Segment {
    space: SpaceId,
    kind: SegmentKind,
    device: u64,
    inode: u64,
    /// Bytes of a page.
    page: u64,
    label: String,
    /// Held, so that its number stays its own. Read only.
    file: File,
}

/// What a segment is to those who share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SegmentKind {
    /// Anonymous memory, or a memory file.
    Memory,
    /// A System V segment that was made at this time: seconds, and nanoseconds more.
    SystemV((i64, u32)),
    /// A file on the tmpfs of this number.
    OfTree(u32),
}

impl Segments {
    /// Looks at processes that may be running, the first of which is `init`, and at the tmpfs mounts `own`.
    pub(crate) fn look(&mut self, processes: &[Process], init: i32, own: Vec<Own>) -> Result<()> {
        let device = match device() {
            Ok(device) => device,
            Err(error) => {
                tracing::warn!(%error, "Shared memory is left to CRIU");
                self.forget();
                return Ok(());
            }
        };
        self.device = device;
        let mut seen = Seen::default();
        for process in processes {
            // What ends meanwhile has nothing.
            seen.look_at_mappings(process.pid, device);
            seen.look_at_descriptors(process.pid, device);
        }
        let files = seen.without_executed(self.trees.look(init, own));
        self.known.retain(|segment| match segment.kind {
            SegmentKind::OfTree(_) => files.iter().any(|file| segment.is(file)),
            _ => segment.is_in(&seen),
        });
        for (key, path) in &seen.paths {
            let fresh = |space| Segment::open(path, space, device, *key);
            if seen.is_wanted(key) && !self.known.iter().any(|segment| segment.key() == Some(*key))
            {
                self.enter(fresh);
            }
        }
        for file in files {
            if !self.known.iter().any(|segment| segment.is(&file)) {
                self.enter(|space| Some(Segment::of_tree(space, file)));
            }
        }
        Ok(())
    }

    /// Enters a segment under the next number, unless there are too many: the destination counts all that
    /// there have been.
    fn enter(&mut self, open: impl FnOnce(SpaceId) -> Option<Segment>) {
        if self.counted as usize >= SEGMENTS_CAP {
            return;
        }
        if let Some(segment) = open(SpaceId(FIRST_SPACE + self.counted)) {
            let Segment { space, inode, label, .. } = &segment;
            tracing::debug!(%space, inode, label, "Shared memory");
            self.known.push(segment);
            self.counted += 1;
        }
    }

    /// Forgets all of them. Their numbers are not given again.
    pub(crate) fn forget(&mut self) {
        self.known.clear();
        self.trees.forget();
    }

    /// Looks again, now that they stand still, and leaves to CRIU what it must see after all.
    pub(crate) fn look_again<'a>(&mut self, processes: impl Iterator<Item = &'a Process>) {
        if self.known.is_empty() {
            return;
        }
        let mut seen = Seen::default();
        let processes: Vec<&Process> = processes.collect();
        processes.iter().for_each(|process| seen.look_at_mappings(process.pid, self.device));
        // A System V segment that nobody has attached any more may be another one by now.
        self.known.retain(|segment| match segment.kind {
            SegmentKind::Memory => segment.key().is_none_or(|key| !seen.left.contains(&key)),
            SegmentKind::SystemV(_) => segment.is_in(&seen),
            SegmentKind::OfTree(_) => true,
        });
        self.look_at_trees_again(processes.into_iter());
    }

    /// A tmpfs with a file that is executed and shared has to stay with CRIU, which writes into it.
    fn look_at_trees_again<'a>(&mut self, processes: impl Iterator<Item = &'a Process>) {
        let mut seen = Seen::default();
        processes.for_each(|process| seen.look_at_mappings(process.pid, 0));
        let devices: BTreeSet<u64> =
            seen.left_elsewhere.iter().map(|(device, _)| *device).collect();
        self.known.retain(|segment| {
            !matches!(segment.kind, SegmentKind::OfTree(_)) || !devices.contains(&segment.device)
        });
    }

    /// What is on each tmpfs that has some of them, now that nobody writes. One that cannot be moved after
    /// all is left to CRIU.
    pub(crate) fn trees(&mut self) -> Vec<Tree> {
        let of_tree = |segment: &Segment| match segment.kind {
            SegmentKind::OfTree(number) => Some(number),
            _ => None,
        };
        let numbers: BTreeSet<u32> = self.known.iter().filter_map(of_tree).collect();
        let mut found = Vec::new();
        for number in numbers {
            let device = self.trees.device(number);
            let space_of = |inode: u64| {
                let mut known = self.known.iter();
                let ours = |segment: &&Segment| {
                    of_tree(segment) == Some(number)
                        && (Some(segment.device), segment.inode) == (device, inode)
                };
                known.find(ours).map(|segment| segment.space.0)
            };
            match self.trees.list(number, space_of) {
                Ok(tree) => found.push(tree),
                Err(error) => {
                    tracing::warn!(number, %error, "A tmpfs is left to CRIU after all");
                    self.known.retain(|segment| of_tree(segment) != Some(number));
                }
            }
        }
        found
    }

    /// The spaces that they are.
    pub(crate) fn infos(&self) -> impl Iterator<Item = SpaceInfo> + '_ {
        self.known.iter().map(|segment| SpaceInfo {
            id: segment.space.0,
            page_limit: PAGE_LIMIT,
            label: segment.label.clone(),
            process: 0,
        })
    }

    /// A descriptor of its own to the segment that is `space`, to read from.
    pub(crate) fn memory(&self, space: SpaceId) -> Result<OwnedFd> {
        let found = self.known.iter().find(|segment| segment.space == space);
        let found = found.ok_or_else(|| ContainerError::State(format!("There is no {space}")))?;
        let again = quiet().open(format!("/proc/self/fd/{}", found.file.as_raw_fd()));
        Ok(again.map_err(ContainerError::io(format!("open {space}")))?.into())
    }

    /// What CRIU must find empty.
    pub(crate) fn hidden(&self) -> HiddenSegments {
        let mut hidden = HiddenSegments::default();
        for segment in &self.known {
            let into = match segment.kind {
                SegmentKind::Memory => &mut hidden.memory,
                SegmentKind::SystemV(_) => &mut hidden.system_v,
                SegmentKind::OfTree(_) => continue,
            };
            into.insert((segment.device, segment.inode));
        }
        hidden
    }

    /// The same for the destination.
    pub(crate) fn moved(&self) -> Vec<Moved> {
        let moved = |segment: &Segment| {
            let key = segment.key()?;
            // Looked at when it was opened.
            let inode = key.inode as u32;
            Some(Moved { space: segment.space.0, inode, system_v: key.system_v })
        };
        self.known.iter().filter_map(moved).collect()
    }
}

impl Segment {
    /// Opens a segment, if it is one that can be moved.
    fn open(path: &PathBuf, space: SpaceId, device: u64, key: Key) -> Option<Self> {
        let file = quiet().open(path).ok()?;
        let found = file.metadata().ok()?;
        // CRIU keeps the lower half of the number only.
        let page = page_on(found.dev(), device);
        let named = found.is_file() && page == Some(key.page) && found.ino() == key.inode;
        if !named
            || u32::try_from(key.inode).is_err()
            || !(SMALL..=PAGE_LIMIT * PAGE_SIZE as u64).contains(&found.len())
        {
            return None;
        }
        let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        let huge = key.page != PAGE_SIZE as u64;
        let (kind, label) = if key.system_v {
            // Of huge pages they are CRIU's, which makes and fills them.
            link.to_str().filter(|link| link.starts_with("/SYSV") && !huge)?;
            (SegmentKind::SystemV(made(&file)?), format!("{LABEL_SYSTEM_V}{}", key.inode))
        } else {
            let name = name_of(link.to_str()?)?;
            let label = match huge {
                true => format!("{LABEL_HUGE}{}{LABEL_KIB}{name}", key.page / 1024),
                false => format!("{LABEL}{name}"),
            };
            (SegmentKind::Memory, label)
        };
        let (device, inode, page) = (found.dev(), key.inode, key.page);
        Some(Self { space, kind, device, inode, page, label, file })
    }

    fn of_tree(space: SpaceId, found: OfTree) -> Self {
        let OfTree { number, device, label, file } = found;
        let kind = SegmentKind::OfTree(number);
        let page = PAGE_SIZE as u64;
        Self { space, kind, device, inode: file.inode, page, label, file: file.file }
    }

    /// Whether it is this file.
    fn is(&self, file: &OfTree) -> bool {
        self.kind == SegmentKind::OfTree(file.number)
            && (self.device, self.inode) == (file.device, file.file.inode)
    }

    /// Whether a segment is still there, and the same.
    fn is_in(&self, seen: &Seen) -> bool {
        let Some(key) = self.key().filter(|key| seen.is_wanted(key)) else { return false };
        match self.kind {
            SegmentKind::SystemV(when) => {
                let there = seen.paths.get(&key).and_then(|path| quiet().open(path).ok());
                there.and_then(|file| made(&file)) == Some(when)
            }
            _ => true,
        }
    }

    /// Under which CRIU knows it; none for a file on a tmpfs.
    fn key(&self) -> Option<Key> {
        let system_v = match self.kind {
            SegmentKind::Memory => false,
            SegmentKind::SystemV(_) => true,
            SegmentKind::OfTree(_) => return None,
        };
        Some(Key { system_v, inode: self.inode, page: self.page })
    }
}

/// What CRIU gives a memory file as its name, by the link that leads to it.
fn name_of(link: &str) -> Option<&str> {
    let link = link.strip_suffix(" (deleted)")?;
    let name = match link {
        "/dev/zero" | "/anon_hugepage" => link,
        _ => link.strip_prefix("/memfd:")?,
    };
    (name.len() <= NAME_CAP).then_some(name)
}

/// Whether what a space is called is that of a System V segment.
pub(super) fn is_system_v(label: &str) -> bool {
    label.starts_with(LABEL_SYSTEM_V)
}

/// The name of a segment, from what its space is called, and the bytes of its pages if they are huge.
pub(super) fn name_in(label: &str) -> Option<(&str, Option<u64>)> {
    let (name, page) = match label.strip_prefix(LABEL_HUGE) {
        Some(rest) => {
            let (kib, name) = rest.split_once(LABEL_KIB)?;
            (name, Some(kib.parse::<u64>().ok()?.checked_mul(1024)?))
        }
        None => (label.strip_prefix(LABEL)?, None),
    };
    (name.len() <= NAME_CAP).then_some((name, page))
}

/// The device of the kernel's own mount, on which all shared memory is that has no other.
fn device() -> Result<u64> {
    let made = memfd_create("decamp", MFdFlags::MFD_CLOEXEC)
        .map_err(ContainerError::errno("make a memory file"))?;
    let found = File::from(made).metadata();
    Ok(found.map_err(ContainerError::io("look at a memory file"))?.dev())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Process {
        Process { pid: std::process::id() as i32, inner: 1 }
    }

    fn named(segments: &Segments, name: &str) -> Option<Moved> {
        let label = format!("shared memory {name}");
        let info = segments.infos().find(|info| info.label == label)?;
        segments.moved().into_iter().find(|moved| moved.space == info.id)
    }

    #[test]
    fn a_segment_that_only_a_descriptor_holds_is_found_and_keeps_its_number() {
        let made = |name: &str, size| {
            let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC).expect("a memfd"));
            file.set_len(size).expect("a size");
            file
        };
        let (large, _small) = (made("found-large", 1 << 20), made("found-small", 4096));
        let mut segments = Segments::default();
        segments.look(&[ours()], 1, Vec::new()).expect("looked");
        let moved = named(&segments, "found-large").expect("found");
        assert_eq!(u64::from(moved.inode), large.metadata().expect("metadata").ino());
        assert_eq!(named(&segments, "found-small"), None);
        segments.look(&[ours()], 1, Vec::new()).expect("looked");
        assert_eq!(named(&segments, "found-large"), Some(moved.clone()));
        assert!(segments.memory(SpaceId(moved.space)).is_ok());
        drop(large);
        // We hold it ourselves; nobody else does.
        let other = made("found-large", 1 << 20);
        segments.look(&[ours()], 1, Vec::new()).expect("looked");
        let again = segments.moved();
        assert!(
            again
                .iter()
                .any(|one| u64::from(one.inode) == other.metadata().expect("metadata").ino())
        );
        assert_eq!(again.iter().filter(|one| one.space == moved.space).count(), 1);
    }

    #[test]
    fn names_are_those_that_criu_gives() {
        assert_eq!(name_of("/memfd:x y (deleted)"), Some("x y"));
        assert_eq!(name_of("/dev/zero (deleted)"), Some("/dev/zero"));
        assert_eq!(name_of("/memfd:/dev/zero (deleted)"), Some("/dev/zero"));
        assert_eq!(name_of("/SYSV00000000 (deleted)"), None);
        assert_eq!(name_of("/dev/shm/x"), None);
        assert_eq!(name_of("/anon_hugepage (deleted)"), Some("/anon_hugepage"));
        assert_eq!(name_in("shared memory of 2 KiB x"), Some(("of 2 KiB x", None)));
        let huge = "shared huge pages of 2048 KiB a KiB b";
        assert_eq!(name_in(huge), Some(("a KiB b", Some(2 << 20))));
        assert_eq!(name_in("shared huge pages of 99999999999999999999 KiB x"), None);
        assert_eq!(name_in("shared huge pages of x"), None);
    }
}
