//! The destination's segments of shared memory: memory files that pages are written into as they come, and
//! that the restored processes then map themselves.
//!
//! They are made under the name that a segment has, which cannot be changed later; owner, mode and size
//! follow from CRIU's images, and seals once everything is mapped. Files on a tmpfs come into a tmpfs that
//! CRIU mounts. System V segments are CRIU's to make: what they hold it reads from a parent image.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{File, Permissions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::Path;

use decamp_shared::pages::{PAGE_SIZE, SpaceId};
use decamp_shared::workload::SpaceInfo;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::found::{is_system_v, name_in};
use super::{Moved, SEGMENTS, SEGMENTS_CAP, is_segment, rewrite, system_v};
use crate::error::{ContainerError, Result};
use crate::huge;
use crate::images::PAGE_LIMIT;
use crate::mounts::Given;
use crate::store::Store;
use crate::tmpfs::held::tree_in;
use crate::tmpfs::land::Mounted;
use crate::tmpfs::{self, Tree};

/// The segments that come, by space.
#[derive(Default)]
pub(crate) struct Landing {
    files: BTreeMap<SpaceId, Landed>,
    /// By number.
    trees: BTreeMap<u32, Mounted>,
}

struct Landed {
    kind: LandedKind,
    file: File,
}

enum LandedKind {
    /// A memory file of this name, and of huge pages of so many bytes.
    Memory(String, Option<u64>),
    SystemV,
    /// A file on the tmpfs of this number.
    OfTree(u32),
}

/// Seals that segments get once everything is mapped.
#[derive(Debug)]
pub(crate) struct Seals<'a>(Vec<(BorrowedFd<'a>, i32)>);

impl Landing {
    /// Makes room for the segments among `spaces`; true when there are some that CRIU has to inherit.
    pub(crate) fn make(&mut self, spaces: &[SpaceInfo], store: &Store) -> Result<bool> {
        let segments = spaces.iter().filter(|info| is_segment(SpaceId(info.id)));
        let mut inherited = false;
        for info in segments {
            let bad = |what: &str| ContainerError::State(format!("Space {} {what}", info.id));
            if info.page_limit > PAGE_LIMIT || info.process != 0 {
                return Err(bad("is no segment of shared memory"));
            }
            if self.files.len() >= SEGMENTS_CAP {
                return Err(bad("is one segment too many"));
            }
            let landed = self.land(info, store)?;
            inherited |= matches!(landed.kind, LandedKind::Memory(..));
            if self.files.insert(SpaceId(info.id), landed).is_some() {
                return Err(bad("exists already"));
            }
        }
        Ok(inherited)
    }

    fn land(&mut self, info: &SpaceInfo, store: &Store) -> Result<Landed> {
        if is_system_v(&info.label) {
            let file = store.pages_file(system_v::pages_id(info.id))?;
            return Ok(Landed { kind: LandedKind::SystemV, file });
        }
        if let Some((number, source)) = tree_in(&info.label) {
            let file = self.tree(number, source, store)?.file();
            let file = file.map_err(ContainerError::io("make a file on a tmpfs"))?;
            return Ok(Landed { kind: LandedKind::OfTree(number), file });
        }
        let known = |page: &Option<u64>| page.is_none_or(|page| huge::sizes().contains(&page));
        let named = name_in(&info.label).filter(|(name, page)| !name.contains('\0') && known(page));
        let (name, page) = named.ok_or_else(|| {
            ContainerError::State(format!("Space {} is no segment of shared memory", info.id))
        })?;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | huge::of_pages(page);
        let made = memfd_create(name, flags)
            .map_err(ContainerError::errno(format!("make memory file {name}")))?;
        Ok(Landed { kind: LandedKind::Memory(name.to_owned(), page), file: made.into() })
    }

    /// The tmpfs of that number, mounted if it is not.
    fn tree(&mut self, number: u32, source: &str, store: &Store) -> Result<&Mounted> {
        Ok(match self.trees.entry(number) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(none) => none.insert(Mounted::mount(&store.tree(number), source)?),
        })
    }

    /// A descriptor to write the pages of `space` through.
    pub(crate) fn memory(&self, space: SpaceId) -> Result<OwnedFd> {
        let file = self.files.get(&space).map(|landed| landed.file.try_clone());
        let file = file.ok_or_else(|| ContainerError::State(format!("There is no {space}")))?;
        Ok(file.map_err(ContainerError::io(format!("share {space}")))?.into())
    }

    /// What CRIU has to inherit, with the key under which it finds each.
    pub(crate) fn inherited(&self) -> impl Iterator<Item = (String, BorrowedFd<'_>)> {
        let memory = |landed: &Landed| matches!(landed.kind, LandedKind::Memory(..));
        let files = self.files.iter().filter(move |(_, landed)| memory(landed));
        files.map(|(space, landed)| (key(*space), landed.file.as_fd()))
    }

    /// Completes the tmpfs mounts `trees`, whose large files have come, and gives what CRIU is told of them.
    pub(crate) fn plant(&self, trees: &[Tree]) -> Result<Vec<Given>> {
        let mut given = Vec::new();
        for tree in trees {
            let never = || ContainerError::section(tmpfs::TREES, "has a tmpfs that never came");
            let mounted = self.trees.get(&tree.number).ok_or_else(never)?;
            mounted.fill(tree, |space| {
                let landed = self.files.get(&space);
                let ours = |landed: &&Landed| {
                    matches!(landed.kind, LandedKind::OfTree(number) if number == tree.number)
                };
                landed.filter(ours).map(|landed| &landed.file)
            })?;
            let (key, source) = (tmpfs::key(tree.number), mounted.place().to_owned());
            given.push(Given { key, source, is_read_only: false });
        }
        Ok(given)
    }

    /// Has the restore that `images` are of use the segments that were `moved`. Who owns them on this host
    /// follows by `outside` from who does in the container.
    ///
    /// # Errors
    /// When the images do not speak of the segment that has come, or of one that never came.
    pub(crate) fn enter(
        &self,
        images: &Path,
        moved: &[Moved],
        store: &Store,
        outside: impl Fn((u32, u32)) -> Option<(u32, u32)>,
    ) -> Result<Seals<'_>> {
        let bad = |what: String| ContainerError::section(SEGMENTS, what);
        let mut landed = BTreeMap::new();
        for segment in moved {
            let space = SpaceId(segment.space);
            let never = || bad(format!("speaks of {space}, whose memory never came"));
            let there = self.files.get(&space).ok_or_else(never)?;
            match (&there.kind, segment.system_v) {
                (LandedKind::SystemV, true) => {
                    system_v::enter(images, &store.parent(), segment, &there.file)?;
                }
                (LandedKind::Memory(name, page), false) => {
                    landed.insert(segment.inode, (space, (name, *page), there));
                }
                _ => return Err(bad(format!("has {space} of another kind than it came as"))),
            }
        }
        let keys = landed.iter().map(|(inode, (space, ..))| (*inode, key(*space))).collect();
        let mut seals = Vec::new();
        let entered = rewrite::enter(images, &keys)?;
        // Of one that is no memory file to CRIU nobody has a descriptor or a mapping any more; unless CRIU
        // dumped it in its other form, and found it empty because we said so.
        let other = landed.keys().filter(|inode| !entered.contains_key(inode));
        for inode in other {
            if images.join(format!("pagemap-shmem-{inode}.img")).exists() {
                return Err(bad(format!("has memory {inode} in a form that is not known here")));
            }
        }
        for (inode, facts) in entered {
            let Some((space, (name, page), landed)) = landed.get(&inode) else { continue };
            if facts.name != name.as_bytes() || facts.page != *page {
                return Err(bad(format!(
                    "calls {space} by another name than it came under, or has other pages in it"
                )));
            }
            if facts.size > PAGE_LIMIT * PAGE_SIZE as u64 {
                return Err(bad(format!("has {space} larger than memory can be")));
            }
            let owner = outside(facts.owner);
            let owner = owner.ok_or_else(|| bad(format!("has {space} of nobody's")))?;
            landed
                .finish(&facts, owner)
                .map_err(ContainerError::io(format!("complete {space}")))?;
            // What is mapped before this is set could be written, for all the kernel knows, and is not sealed.
            let early = SealFlag::from_bits_retain(facts.seals) & SealFlag::F_SEAL_WRITE;
            Seals(vec![(landed.file.as_fd(), early.bits())]).set()?;
            seals.push((landed.file.as_fd(), facts.seals));
        }
        Ok(Seals(seals))
    }

    /// They are the restored processes' alone from here on.
    pub(crate) fn clear(&mut self) {
        self.files.clear();
        self.trees.clear();
    }
}

impl Landed {
    fn finish(&self, facts: &rewrite::Inode, owner: (u32, u32)) -> std::io::Result<()> {
        // What came behind its end, or in the last page after it, goes.
        self.file.set_len(facts.size)?;
        fchown(&self.file, Some(owner.0), Some(owner.1))?;
        if let Some(mode) = facts.mode {
            self.file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
        }
        Ok(())
    }
}

impl Seals<'_> {
    /// To be set when nobody has still to map or to write what will be sealed.
    pub(crate) fn set(&self) -> Result<()> {
        for (file, seals) in self.0.iter().filter(|(_, seals)| *seals != 0) {
            let seals = SealFlag::from_bits_retain(*seals);
            fcntl(file, FcntlArg::F_ADD_SEALS(seals)).map_err(ContainerError::errno(format!(
                "seal memory file {} as it was",
                file.as_raw_fd()
            )))?;
        }
        Ok(())
    }
}

/// What CRIU calls the inherited descriptor of a space. It begins with a slash: that no name does that
/// CRIU looks for by itself, without the one that begins a path.
fn key(space: SpaceId) -> String {
    format!("/decamp-segment-{}", space.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segments::FIRST_SPACE;

    fn info(id: u32, label: &str) -> SpaceInfo {
        SpaceInfo { id, page_limit: PAGE_LIMIT, label: label.to_owned(), process: 0 }
    }

    #[test]
    fn room_is_made_for_segments_alone_and_once() {
        let directory = tempfile::tempdir().expect("a directory");
        let Some(store) = crate::store::tests::store(directory.path()) else { return };
        let mut landing = Landing::default();
        let mut make = |spaces: &[SpaceInfo]| landing.make(spaces, &store);
        assert!(!make(&[info(1, "process 1")]).expect("not ours"));
        let good = info(FIRST_SPACE + 1, "shared memory /dev/zero");
        assert!(make(std::slice::from_ref(&good)).expect("made"));
        assert!(make(&[good]).is_err(), "twice");
        for label in ["process 7", "shared memory a\0b"] {
            assert!(make(&[info(FIRST_SPACE + 2, label)]).is_err(), "{label:?}");
        }
        let long = format!("shared memory {}", "x".repeat(250));
        assert!(make(&[info(FIRST_SPACE + 2, &long)]).is_err());
        let held = landing.memory(SpaceId(FIRST_SPACE + 1)).expect("there");
        let link = std::fs::read_link(format!("/proc/self/fd/{}", held.as_raw_fd()));
        assert_eq!(link.expect("a link").to_str(), Some("/memfd:/dev/zero (deleted)"));
        assert!(landing.memory(SpaceId(FIRST_SPACE)).is_err());
    }

    #[test]
    fn a_segment_that_never_came_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let Some(store) = crate::store::tests::store(directory.path()) else { return };
        let moved = Moved { space: FIRST_SPACE, inode: 9, system_v: false };
        let landing = Landing::default();
        let error =
            landing.enter(directory.path(), &[moved], &store, Some).expect_err("it is not here");
        assert!(error.to_string().contains("never came"), "{error}");
    }
}
