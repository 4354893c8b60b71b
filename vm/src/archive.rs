//! A virtual machine in a checkpoint: which parts it consists of, and how they become one again.
//!
//! State sections are `checkpoint/KIND`, memory is `memory/0.map` and `memory/0.pages`, the files it was
//! booted from are `files/ROLE`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use decamp_shared::archive::memory::{SpaceParts, parcels, place_pages};
use decamp_shared::archive::parcel::{SECTIONS, SectionList, cannot_write, read_whole};
use decamp_shared::archive::{Archive, ArchiveError, Frozen, Parcel, PartInfo, Result, Unpacking};
use decamp_shared::files::{FileLander, Landing};
use decamp_shared::workload::{
    DestinationWorkload, FileRole, FileTree, Manifest, PlacedTree, Section, SpaceInfo,
    WorkloadError,
};

use crate::memory::GUEST_MEMORY;

/// What the name of every state section's part begins with.
const STATE: &str = "checkpoint/";
/// Bytes of all state sections at most.
const SECTIONS_MOST: u64 = 256 << 20;

/// The parts of a machine that stands still.
pub(crate) fn pack(frozen: Frozen) -> Result<Vec<Parcel>> {
    let mut list = SectionList::default();
    let mut states = Vec::new();
    for section in frozen.sections {
        let part = format!("{STATE}{}", section.kind.replace('/', "-"));
        list.add(&part, &section.kind, section.version);
        states.push(Parcel::bytes(part, section.bytes));
    }
    let mut parts = vec![list.parcel()?];
    parts.extend(states);
    for tree in &frozen.manifest.files {
        parts.push(file_parcel(tree)?);
    }
    parts.extend(parcels(GUEST_MEMORY, &frozen.pages, frozen.reader));
    Ok(parts)
}

fn file_parcel(tree: &FileTree) -> Result<Parcel> {
    let name = file_name(tree)?;
    let path = tree.path.clone();
    let failed = move |source: io::Error, path: &str| ArchiveError::Io {
        what: "read",
        path: Path::new(path).to_owned(),
        source,
    };
    let file = File::open(&path).map_err(|error| failed(error, &path))?;
    let bytes = tree.bytes;
    let part = name.clone();
    Ok(Parcel::filled(name, bytes, move |to| {
        // One that grows meanwhile is cut, one that shrinks is too short: that is an error.
        io::copy(&mut file.take(bytes), to).map(drop).map_err(|error| cannot_write(&part, &error))
    }))
}

fn file_name(tree: &FileTree) -> Result<String> {
    match tree.role() {
        FileRole::Kernel => Ok("files/kernel".to_owned()),
        FileRole::Initrd => Ok("files/initrd".to_owned()),
        _ => Err(WorkloadError::plain(format!("A VM has no use for {}", tree.path)).into()),
    }
}

/// A machine that comes out of a checkpoint.
pub(crate) struct VmUnpacking {
    /// By the name of their part.
    files: BTreeMap<String, Arriving>,
    space: SpaceInfo,
    memory: SpaceParts,
    list: SectionList,
    sections: Vec<Section>,
}

struct Arriving {
    lander: FileLander,
    /// The very file stands there already.
    is_there: bool,
    placed: PlacedTree,
}

impl VmUnpacking {
    /// Of the machine of `manifest`, whose files go to `trees`.
    pub(crate) fn new(manifest: &Manifest, trees: &[PlacedTree]) -> Result<Self> {
        let space = match &manifest.spaces[..] {
            [space] if space.id == GUEST_MEMORY.0 => space.clone(),
            spaces => {
                let text = format!("A VM has one space, not {}", spaces.len());
                return Err(WorkloadError::plain(text).into());
            }
        };
        let mut files = BTreeMap::new();
        for placed in trees {
            let arriving = Arriving {
                lander: FileLander::new(&placed.path, placed.tree.bytes),
                is_there: false,
                placed: placed.clone(),
            };
            files.insert(file_name(&placed.tree)?, arriving);
        }
        if files.len() != trees.len() {
            return Err(WorkloadError::plain("A VM has one kernel and one initial ramdisk").into());
        }
        let memory = SpaceParts::new(space.clone());
        Ok(Self { files, space, memory, list: SectionList::default(), sections: Vec::new() })
    }

    /// What both times have in common: lists and state.
    fn read(&mut self, part: &PartInfo, content: &mut dyn Read) -> Result<()> {
        if part.name == SECTIONS {
            self.list = SectionList::read(part, content)?;
            // Under another name it would hide what that part is.
            if let Some(other) = self.list.parts().find(|name| !name.starts_with(STATE)) {
                return Err(ArchiveError::part(other, "is no state of a VM"));
            }
        } else if let Some(mut section) = self.list.section_of(&part.name) {
            let had: usize = self.sections.iter().map(|section| section.bytes.len()).sum();
            let most = SECTIONS_MOST.saturating_sub(had as u64);
            section.bytes = read_whole(part, most, content)?;
            self.sections.push(section);
        } else if self.memory.is_map(part) {
            self.memory.read_map(part, content)?;
        } else if self.memory.is_pages(part) {
            self.memory.pages_of(part)?;
        } else if let Some(file) = self.files.get(&part.name) {
            if part.size != file.placed.tree.bytes {
                return Err(ArchiveError::part(&part.name, "is not as long as the header says"));
            }
        } else {
            return Err(ArchiveError::part(&part.name, "is no part of a VM"));
        }
        Ok(())
    }

    /// That nothing is missing of what is no file.
    fn complete(&self) -> Result<()> {
        if self.sections.len() != self.list.len() || self.sections.is_empty() {
            return Err(ArchiveError::part(SECTIONS, "names parts that are not there"));
        }
        self.memory.complete()
    }
}

impl Unpacking for VmUnpacking {
    fn look(&mut self, part: &PartInfo, content: &mut dyn Read) -> Result<()> {
        self.read(part, content)
    }

    fn check(&mut self, archive: &Archive) -> Result<()> {
        self.complete()?;
        for (name, file) in &mut self.files {
            let sum = archive.sum_of(name).and_then(unhex);
            let sum = sum.ok_or_else(|| ArchiveError::part(name, "is missing"))?;
            file.is_there = file.lander.is_there(&sum)?;
        }
        // They are given once more.
        self.sections.clear();
        self.memory = SpaceParts::new(self.space.clone());
        Ok(())
    }

    fn take(
        &mut self,
        part: &PartInfo,
        content: &mut dyn Read,
        destination: &mut dyn DestinationWorkload,
        landing: &Landing,
    ) -> Result<()> {
        self.read(part, content)?;
        if self.memory.is_pages(part) {
            let writer = destination.writer(std::slice::from_ref(&self.space))?;
            let ranges = self.memory.pages_of(part)?;
            place_pages(ranges.iter().copied(), content, &*writer, &part.name)?;
        } else if let Some(file) = self.files.get(&part.name).filter(|file| !file.is_there) {
            file.lander.land(landing, content)?;
        }
        Ok(())
    }

    fn finish(&mut self, _: &Landing) -> Result<Vec<Section>> {
        self.complete()?;
        Ok(std::mem::take(&mut self.sections))
    }
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut sum = [0; 32];
    for (byte, digits) in sum.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacking() -> VmUnpacking {
        let space = SpaceInfo { id: 0, page_limit: 8, ..SpaceInfo::default() };
        let manifest = Manifest { spaces: vec![space], ..Manifest::default() };
        VmUnpacking::new(&manifest, &[]).expect("a VM")
    }

    fn looks(unpacking: &mut VmUnpacking, name: &str, bytes: &[u8]) -> Result<()> {
        let part = PartInfo { name: name.to_owned(), size: bytes.len() as u64 };
        unpacking.look(&part, &mut &*bytes)
    }

    fn list_of(part: &str) -> Vec<u8> {
        let mut list = SectionList::default();
        list.add(part, "vcpu/0", 1);
        let mut bytes = Vec::new();
        (list.parcel().expect("JSON").fill)(&mut bytes).expect("written");
        bytes
    }

    #[test]
    fn memory_of_which_nothing_is_said_is_not_zeros() {
        let map: Vec<u8> = [3u64, 1].into_iter().flat_map(u64::to_le_bytes).collect();
        let page = [7; 4096];
        let parts: [(&str, &[u8]); 2] = [("memory/0.map", &map), ("memory/0.pages", &page)];
        for (count, missing) in [(0, Some("memory/0.map")), (1, Some("memory/0.pages")), (2, None)]
        {
            let mut vm = unpacking();
            looks(&mut vm, SECTIONS, &list_of("checkpoint/vcpu-0")).expect("a list");
            looks(&mut vm, "checkpoint/vcpu-0", b"state").expect("a section");
            for (name, bytes) in &parts[..count] {
                looks(&mut vm, name, bytes).expect("memory");
            }
            let said = vm.complete().err().map(|error| error.to_string());
            assert_eq!(said, missing.map(|part| format!("Part {part} is missing")));
        }
    }

    #[test]
    fn no_other_part_passes_for_state() {
        for part in ["memory/0.map", "files/kernel", "decamp/other"] {
            let error = looks(&mut unpacking(), SECTIONS, &list_of(part)).expect_err("not state");
            assert!(error.to_string().contains("no state"), "{error}");
        }
    }
}
