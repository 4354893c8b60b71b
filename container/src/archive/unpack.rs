//! Out of a checkpoint: everything is looked at, then memory goes where a move would put it, the bundle to
//! its place, and CRIU's images become the state sections of a move.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use decamp_shared::archive::memory::place_pages;
use decamp_shared::archive::parcel::{SECTIONS, SectionList, cannot_read, read_whole};
use decamp_shared::archive::{Archive, ArchiveError, PartInfo, Result, Unpacking};
use decamp_shared::files::{Landing, TreeLander, free_bytes};
use decamp_shared::keeper::ends::available_memory;
use decamp_shared::pages::{PAGE_SIZE, PageRange, SpaceId};
use decamp_shared::workload::{
    DestinationWorkload, Manifest, PlacedTree, Refusal, RefusalCode, Section, SpaceInfo,
    WorkloadError,
};

use super::pages::{Images, Piece};
use super::{FOR_PODMAN, IMAGES, REST, ROOTFS, failed, root_name};
use crate::bundle::Bundle;
use crate::dump::{ContainerState, STATE};
use crate::facts::Needs;
use crate::images::{self, HIDDEN, HiddenPages, PAGE_LIMIT, PREFIX, is_image_name, process_of};
use crate::segments;

/// Bytes of all pagemaps and lists of hidden pages of a file at most.
const LISTS_MOST: u64 = 256 << 20;
/// And what part of the memory that is free here: read, they take some ten times as much.
const LISTS_PART: u64 = 20;

/// How much of lists may still be read.
#[derive(Debug)]
pub(super) struct Lists {
    left: u64,
}

impl Default for Lists {
    fn default() -> Self {
        let room = available_memory().map_or(LISTS_MOST, |free| free / LISTS_PART);
        Self { left: room.min(LISTS_MOST) }
    }
}

impl Lists {
    /// All of a part that is a list.
    pub(super) fn read(&mut self, part: &PartInfo, content: &mut dyn Read) -> Result<Vec<u8>> {
        let bytes = read_whole(part, self.left, content)?;
        self.left -= bytes.len() as u64;
        Ok(bytes)
    }
}

/// A container that comes out of a checkpoint.
pub(crate) struct ContainerUnpacking {
    /// Where the bundle is to be.
    path: PathBuf,
    /// Where the root file system is to be.
    root: PathBuf,
    list: SectionList,
    lists: Lists,
    hidden: HiddenPages,
    /// Pages images of processes, by the name of their part.
    processes: BTreeMap<String, (i32, Images)>,
    spaces: Vec<SpaceInfo>,
    /// The trees, by the name of their part.
    trees: BTreeMap<String, TreeLander>,
    state_seen: bool,
    /// Whether an image was seen: from then on it is known whose pages are whose.
    images_seen: bool,
    sections: Vec<Section>,
}

impl ContainerUnpacking {
    /// Of the container of `manifest`, whose bundle goes to `trees`.
    pub(crate) fn new(manifest: &Manifest, trees: &[PlacedTree]) -> Result<Self> {
        let [placed] = trees else {
            return Err(WorkloadError::plain("A container has one bundle").into());
        };
        let needs: Needs = serde_json::from_slice(&manifest.needs)
            .map_err(|error| WorkloadError::new("Cannot read the container's needs", error))?;
        let bundle = Bundle::parse(&placed.path, needs.config.as_bytes()).map_err(failed)?;
        let root = root_name(&bundle).map_err(failed)?;
        Ok(Self {
            path: placed.path.clone(),
            root: root.map_or_else(|| placed.path.clone(), |root| placed.path.join(root)),
            list: SectionList::default(),
            lists: Lists::default(),
            hidden: HiddenPages::new(),
            processes: BTreeMap::new(),
            spaces: Vec::new(),
            trees: BTreeMap::new(),
            state_seen: false,
            images_seen: false,
            sections: Vec::new(),
        })
    }

    /// Reads what both times need: lists, pagemaps, state. Gives the section that the part is, if it is
    /// one that had to be read.
    fn read(&mut self, part: &PartInfo, content: &mut dyn Read) -> Result<Option<Section>> {
        if part.name == SECTIONS {
            self.list = SectionList::read(part, content)?;
            return Ok(None);
        }
        let Some(mut section) = self.list.section_of(&part.name) else { return Ok(None) };
        let bad = |what: &str| ArchiveError::part(&part.name, what);
        match section.kind.strip_prefix(PREFIX) {
            _ if section.kind == HIDDEN && self.images_seen => {
                return Err(bad("stands behind the images that it speaks of"));
            }
            _ if section.kind == HIDDEN => {
                section.bytes = self.lists.read(part, content)?;
                self.hidden = images::read_hidden(&section).map_err(failed)?;
                self.spaces = self.hidden.keys().map(|inner| space(*inner)).collect();
            }
            None if section.kind == STATE => {
                section.bytes = self.lists.read(part, content)?;
                ContainerState::from_section(&section).map_err(failed)?;
                self.state_seen = true;
            }
            None => return Err(bad("is a section that no container has")),
            Some(name) if part.name != format!("{IMAGES}{name}") || !is_image_name(name) => {
                return Err(bad("is named as no image is"));
            }
            Some(name) => {
                self.images_seen = true;
                let hidden =
                    process_of(name).and_then(|inner| Some((inner, self.hidden.get(&inner)?)));
                let Some((inner, hidden)) = hidden else { return Ok(None) };
                section.bytes = self.lists.read(part, content)?;
                let images = Images::split(&section.bytes, hidden).map_err(bad)?;
                section.bytes.clone_from(&images.pagemap);
                let pages = format!("{IMAGES}pages-{}.img", images.pages_id);
                if self.processes.insert(pages, (inner, images)).is_some_and(|(of, _)| of != inner)
                {
                    return Err(bad("shares its pages with another process"));
                }
            }
        }
        Ok(Some(section))
    }

    /// A part that is no list: its length, and whether there may be one of that name.
    fn must_fit(&self, part: &PartInfo) -> Result<()> {
        let bad = |what: &str| Err(ArchiveError::part(&part.name, what));
        match self.processes.get(&part.name) {
            Some((_, images)) if images.bytes() != Some(part.size) => {
                bad("has not as many pages as its pagemap says")
            }
            Some(_) => Ok(()),
            None if self.list.section_of(&part.name).is_some() => Ok(()),
            None if FOR_PODMAN.contains(&part.name.as_str()) => Ok(()),
            None if part.name == SECTIONS => Ok(()),
            None => bad("is no part of a container"),
        }
    }

    /// Where the tree of a part goes, if it is one.
    fn tree_path(&self, name: &str) -> Option<PathBuf> {
        match name {
            ROOTFS => Some(self.root.clone()),
            REST if self.root != self.path => Some(self.path.clone()),
            _ => None,
        }
    }
}

impl Unpacking for ContainerUnpacking {
    fn look(&mut self, part: &PartInfo, content: &mut dyn Read) -> Result<()> {
        if let Some(path) = self.tree_path(&part.name) {
            let tree = TreeLander::list(&path, content)?;
            self.trees.insert(part.name.clone(), tree);
            return Ok(());
        }
        self.read(part, content)?;
        self.must_fit(part)
    }

    fn check(&mut self, archive: &Archive) -> Result<()> {
        let missing = |what: &str| ArchiveError::part(what, "is missing");
        let rest = self.root == self.path || self.trees.contains_key(REST);
        if !self.trees.contains_key(ROOTFS) || !rest {
            return Err(missing(ROOTFS));
        }
        if !self.state_seen || archive.header().part("checkpoint/inventory.img").is_none() {
            return Err(missing("checkpoint/inventory.img"));
        }
        for name in self.processes.keys() {
            archive.header().part(name).ok_or_else(|| missing(name))?;
        }
        self.images_seen = false;
        // All of them are read once more.
        self.lists = Lists::default();
        let files = self.trees.values().map(TreeLander::bytes).fold(0u64, u64::saturating_add);
        let refusals = refusals(archive, &self.path, files);
        if refusals.is_empty() { Ok(()) } else { Err(ArchiveError::Unfit(refusals)) }
    }

    fn take(
        &mut self,
        part: &PartInfo,
        content: &mut dyn Read,
        destination: &mut dyn DestinationWorkload,
        landing: &Landing,
    ) -> Result<()> {
        if let Some(tree) = self.trees.get(&part.name) {
            return Ok(tree.land(landing, content)?);
        }
        let read = self.read(part, content)?;
        self.must_fit(part)?;
        let Some(section) = read.or_else(|| self.list.section_of(&part.name)) else {
            return Ok(());
        };
        let own = take_pages(&self.processes, &self.spaces, part, content, destination)?;
        let bytes = match own {
            Some(own) => own,
            None if section.bytes.is_empty() => read_whole(part, part.size, content)?,
            None => section.bytes,
        };
        self.sections.push(Section { bytes, ..section });
        Ok(())
    }

    fn finish(&mut self, _: &Landing) -> Result<Vec<Section>> {
        let mut sections = std::mem::take(&mut self.sections);
        // Of a container in a file CRIU has the shared memory.
        sections.push(segments::section(&[]).map_err(failed)?);
        Ok(sections)
    }
}

/// The pages of one process: those of the page engine to their space, CRIU's own into its image. Nothing
/// for a part that is none of `processes`.
pub(super) fn take_pages(
    processes: &BTreeMap<String, (i32, Images)>,
    spaces: &[SpaceInfo],
    part: &PartInfo,
    content: &mut dyn Read,
    destination: &mut dyn DestinationWorkload,
) -> Result<Option<Vec<u8>>> {
    let Some((inner, images)) = processes.get(&part.name) else { return Ok(None) };
    let writer = destination.writer(spaces)?;
    let mut own = Vec::new();
    for Piece { pages, ours } in &images.pieces {
        let count = pages.end - pages.start;
        if *ours {
            let range = PageRange::new(SpaceId(*inner as u32), pages.start, count);
            place_pages(std::iter::once(range), content, &*writer, &part.name)?;
        } else {
            let bytes = count * PAGE_SIZE as u64;
            let read = content.take(bytes).read_to_end(&mut own);
            if read.map_err(|error| cannot_read(&part.name, &error))? as u64 != bytes {
                return Err(ArchiveError::part(&part.name, "is cut short"));
            }
        }
    }
    Ok(Some(own))
}

/// What is still in the way of `archive` when all was seen, with so many bytes of `files` for `path`.
pub(super) fn refusals(archive: &Archive, path: &Path, files: u64) -> Vec<Refusal> {
    let mut found = Vec::new();
    // CRIU's images are in the store and then in the processes; a part is never in both at once.
    let state = archive.header().parts.iter().filter(|part| part.name.starts_with(IMAGES));
    let state: u64 = state.map(|part| part.size).sum();
    if let Some(free) = available_memory().filter(|free| *free < state) {
        let text =
            format!("Its memory is {} MiB, and {} MiB are available", state >> 20, free >> 20);
        found.push(Refusal::new(RefusalCode::Memory, text));
    }
    match free_bytes(path) {
        Ok(free) if free < files => found.push(Refusal::new(
            RefusalCode::Disk,
            format!("Not enough room at {}: {files} bytes needed, {free} free", path.display()),
        )),
        _ => {}
    }
    found
}

/// The memory of a process.
pub(super) fn space(inner: i32) -> SpaceInfo {
    let label = format!("process {inner}");
    SpaceInfo { id: inner as u32, page_limit: PAGE_LIMIT, label, process: inner }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::segments::SEGMENTS;
    use decamp_shared::pages::PageWriter;
    use decamp_shared::workload::{FileTree, Kind, Result as WorkloadResult};
    use serde_json::json;

    use super::*;
    use crate::images::{PE_PRESENT, Pagemap, PagemapEntry, PagemapHead};

    /// A destination that keeps what it is given.
    #[derive(Clone, Default)]
    struct Kept(Arc<std::sync::Mutex<BTreeMap<(u32, u64), u8>>>);

    impl PageWriter for Kept {
        fn write(&self, range: PageRange, bytes: &[u8]) -> WorkloadResult<()> {
            let pages = (range.first..).zip(bytes.chunks_exact(PAGE_SIZE));
            let pages = pages.map(|(page, bytes)| ((range.space.0, page), bytes[0]));
            self.0.lock().expect("not poisoned").extend(pages);
            Ok(())
        }

        fn zero(&self, _range: PageRange) -> WorkloadResult<()> {
            Err(WorkloadError::plain("No page is cleared"))
        }
    }

    impl DestinationWorkload for Kept {
        fn writer(&mut self, _spaces: &[SpaceInfo]) -> WorkloadResult<Arc<dyn PageWriter>> {
            Ok(Arc::new(self.clone()))
        }

        fn load(&mut self, _sections: Vec<Section>) -> WorkloadResult<()> {
            Err(WorkloadError::plain("Nothing is loaded"))
        }

        fn activate(&mut self, _token: u64) -> WorkloadResult<()> {
            Err(WorkloadError::plain("Nothing runs"))
        }

        fn discard(&mut self) -> WorkloadResult<()> {
            Ok(())
        }
    }

    fn manifest(root: &str) -> (Manifest, Vec<PlacedTree>) {
        let needs = Needs {
            config: json!({"root": {"path": root}}).to_string(),
            resident: 0,
            shared_huge: 0,
            on_tmpfs: 0,
            criu: (4, 2),
            obstacles: Vec::new(),
            host: crate::facts::HostNeeds::default(),
            locks: Vec::new(),
        };
        let manifest = Manifest {
            name: "web".into(),
            kind: Kind::Container.into(),
            needs: serde_json::to_vec(&needs).expect("JSON"),
            ..Manifest::default()
        };
        let placed = PlacedTree { tree: FileTree::default(), path: "/srv/nowhere/web".into() };
        (manifest, vec![placed])
    }

    fn unpacking() -> ContainerUnpacking {
        let (manifest, trees) = manifest("rootfs");
        ContainerUnpacking::new(&manifest, &trees).expect("a container")
    }

    /// A dump of one process, 7: CRIU has its pages 2 to 4, the page engine 10 to 12 and 20.
    fn parts() -> Vec<(PartInfo, Vec<u8>)> {
        let dumped = Pagemap {
            head: PagemapHead { pages_id: 3 },
            entries: vec![PagemapEntry::hidden(&(2..5), PE_PRESENT)],
        };
        let images = Images::merge(&dumped.to_bytes(), &[10..13, 20..21]).expect("sane");
        let hidden = images::write_hidden(&HiddenPages::from([(7, images.hidden())]));
        let mut pages = Vec::new();
        for piece in &images.pieces {
            for page in piece.pages.clone() {
                pages.extend(vec![page as u8; PAGE_SIZE]);
            }
        }
        let named = [
            ("decamp/criu-hidden", HIDDEN, hidden.bytes),
            ("checkpoint/inventory.img", "criu/inventory.img", b"inventory".to_vec()),
            ("checkpoint/pagemap-7.img", "criu/pagemap-7.img", images.pagemap),
            ("checkpoint/pages-3.img", "criu/pages-3.img", pages),
        ];
        let mut list = SectionList::default();
        let mut parts = Vec::new();
        for (part, kind, bytes) in named {
            list.add(part, kind, images::VERSION);
            let info = PartInfo { name: part.to_owned(), size: bytes.len() as u64 };
            parts.push((info, bytes));
        }
        let mut bytes = Vec::new();
        let list = list.parcel().expect("JSON");
        (list.fill)(&mut bytes).expect("written");
        parts.insert(0, (list.info, bytes));
        parts
    }

    #[test]
    fn lists_are_short_together() {
        let mut lists = Lists { left: 100 };
        let part = PartInfo { name: "checkpoint/pagemap-1.img".to_owned(), size: 60 };
        assert_eq!(lists.read(&part, &mut &[0; 60][..]).expect("short").len(), 60);
        assert!(lists.read(&part, &mut &[0; 60][..]).is_err());
    }

    fn take(parts: &[(PartInfo, Vec<u8>)]) -> Result<(Kept, Vec<Section>)> {
        let (mut unpacking, mut kept) = (unpacking(), Kept::default());
        for (part, bytes) in parts {
            unpacking.look(part, &mut &bytes[..])?;
        }
        unpacking.images_seen = false;
        for (part, bytes) in parts {
            unpacking.take(part, &mut &bytes[..], &mut kept, &Landing::new())?;
        }
        Ok((kept, unpacking.finish(&Landing::new())?))
    }

    #[test]
    fn each_page_goes_where_a_move_would_put_it() {
        let (kept, sections) = take(&parts()).expect("our own");
        let placed = kept.0.lock().expect("not poisoned").clone();
        let wanted = [10, 11, 12, 20].map(|page| ((7, page), page as u8));
        assert_eq!(placed, BTreeMap::from(wanted));
        let of = |kind: &str| {
            let found = sections.iter().find(|section| section.kind == kind);
            found.unwrap_or_else(|| panic!("no {kind}")).bytes.clone()
        };
        let own: Vec<u8> = [2, 3, 4].into_iter().flat_map(|page| vec![page; PAGE_SIZE]).collect();
        assert_eq!(of("criu/pages-3.img"), own);
        assert_eq!(of("criu/inventory.img"), b"inventory");
        let pagemap = Pagemap::parse(&of("criu/pagemap-7.img")).expect("a pagemap");
        assert_eq!(pagemap.entries, [PagemapEntry::hidden(&(2..5), PE_PRESENT)]);
        // Beside these it says that no shared memory came by itself.
        assert_eq!((sections.len(), of(SEGMENTS)), (5, b"[]".to_vec()));
    }

    #[test]
    fn parts_that_lie_are_refused_when_they_are_looked_at() {
        let refused = |change: fn(&mut Vec<(PartInfo, Vec<u8>)>), says: &str| {
            let mut parts = parts();
            change(&mut parts);
            for (part, bytes) in &mut parts {
                part.size = bytes.len() as u64;
            }
            let error = take(&parts).map(|_| ()).expect_err(says).to_string();
            assert!(error.contains(says), "{error}");
        };
        refused(|parts| parts[4].1.truncate(4 * PAGE_SIZE), "not as many pages");
        refused(|parts| parts[4].1.extend([0; PAGE_SIZE]), "not as many pages");
        refused(|parts| parts[3].1.truncate(9), "cut short");
        refused(|parts| parts[1].1.truncate(9), "cut short");
        // Or all of them would be taken for CRIU's own.
        refused(|parts| parts.swap(1, 3), "stands behind the images");
        refused(
            |parts| parts[2].0.name = "checkpoint/../../x.img".into(),
            "no part of a container",
        );
        refused(|parts| parts[0].1 = b"{".to_vec(), "cannot be read");
        let other = r#"{"sections": [{"part": "p", "kind": "criu/../x.img", "version": 1}]}"#;
        let mut lying = parts();
        lying[0].1 = other.as_bytes().to_vec();
        lying[0].0.size = other.len() as u64;
        lying[1].0.name = "p".into();
        let error = take(&lying).map(|_| ()).expect_err("a name that leads out").to_string();
        assert!(error.contains("named as no image is"), "{error}");
    }

    #[test]
    fn the_root_stands_directly_in_the_bundle() {
        for root in ["rootfs", "."] {
            let (manifest, trees) = manifest(root);
            assert!(ContainerUnpacking::new(&manifest, &trees).is_ok(), "{root}");
        }
        for root in ["a/b", "../x", "/etc", "a/../../x"] {
            let (manifest, trees) = manifest(root);
            assert!(ContainerUnpacking::new(&manifest, &trees).is_err(), "{root}");
        }
        let (manifest, _) = manifest("rootfs");
        assert!(ContainerUnpacking::new(&manifest, &[]).is_err());
    }
}
