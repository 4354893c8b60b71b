//! Into a checkpoint: state sections, memory and files of a container that stands still, as parts.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use decamp_shared::archive::memory::copy_pages;
use decamp_shared::archive::parcel::{SectionList, cannot_write};
use decamp_shared::archive::{ArchiveError, Frozen, Parcel, Result};
use decamp_shared::files::TarTree;
use decamp_shared::pages::{PAGE_SIZE, PageRange, PageReader, PageSet, SpaceId};
use decamp_shared::workload::{Manifest, Refusal, RefusalCode, Section, WorkloadError};

use super::pages::{Images, Piece};
use super::{IMAGES, REST, ROOTFS, failed, podman, root_name};
use crate::bundle::Bundle;
use crate::dump::{ContainerState, STATE, STATISTICS};
use crate::facts::Needs;
use crate::images::{self, HIDDEN, HiddenPages, PREFIX, process_of};
use crate::segments::message::Image;
use crate::segments::{self, SEGMENTS};
use crate::spec::ContainerSpec;

/// CRIU's image of cgroups.
const CGROUPS: &str = "cgroup.img";
/// How the names of its images of tasks begin, and their second mark (CRIU's magic.h).
const CORE: &str = "core-";
const CORE_MAGIC: u32 = 0x5505_3847;
/// In such an image: the task, the thread, and in which set of cgroups either is (CRIU's core.proto).
const TASK: u32 = 3;
const TASK_CGROUPS: u32 = 9;
const THREAD: u32 = 5;
const THREAD_CGROUPS: u32 = 16;

/// CRIU's image of open files, and its second mark.
const FILES: &str = "files.img";
const FILES_MAGIC: u32 = 0x5630_3138;
/// In it: a file with a path, the path and the mode (CRIU's fdinfo.proto and regfile.proto).
const FILE: u32 = 3;
const FILE_PATH: u32 = 6;
const FILE_MODE: u32 = 10;

/// Why the container of `manifest` cannot go into a checkpoint. Touches nothing.
pub(crate) fn refusals(manifest: &Manifest) -> Vec<Refusal> {
    let refuse = |text: String| Refusal::new(RefusalCode::Unsupported, text);
    let (bundle, needs) = match described(manifest) {
        Ok((spec, ..)) if spec.podman.is_some() => {
            let text = "It is podman's: podman container checkpoint --export writes it into a file";
            return vec![refuse(text.to_owned())];
        }
        Ok((_, bundle, needs)) => (bundle, needs),
        Err(error) => return vec![Refusal::new(RefusalCode::Request, error.to_string())],
    };
    let mut found: Vec<_> = needs.obstacles.into_iter().map(refuse).collect();
    for tree in manifest.files.iter().filter(|tree| tree.role().is_volume()) {
        found.push(refuse(format!(
            "{} is mounted at {} from outside of the bundle, and does not go into a file in this version",
            tree.path,
            tree.mounts.join(", ")
        )));
    }
    let trees = root_name(&bundle).map_err(failed).and_then(|root| trees(&bundle, root.as_deref()));
    if let Err(error) = trees {
        found.push(refuse(error.to_string()));
    }
    found
}

/// The parts of a container that stands still.
pub(crate) fn pack(frozen: Frozen) -> Result<Vec<Parcel>> {
    let Frozen { manifest, sections, pages, reader } = frozen;
    let (spec, bundle, needs) = described(&manifest)?;
    let mut dumped = Dumped::sort(sections)?;
    let mut parts = podman::parcels(&manifest, &spec, &bundle, &needs, &dumped.state)?;
    let merged = dumped.merge(&pages)?;
    let ours = merged.values().flat_map(|(_, images)| &images.pieces).filter(|piece| piece.ours);
    let ours = ours.map(|piece| piece.pages.end - piece.pages.start).sum();
    parts.push(podman::statistics(&dumped.statistics, ours)?);
    let mut list = SectionList::default();
    let mut others = Vec::new();
    // These stand first: whoever restores needs them for what follows.
    let mut hidden = images::write_hidden(&dumped.hidden);
    hidden.kind = HIDDEN.to_owned();
    for (part, section) in
        [("decamp/container-state.json", dumped.state_section), ("decamp/criu-hidden", hidden)]
    {
        list.add(part, &section.kind, section.version);
        others.push(Parcel::bytes(part, section.bytes));
    }
    // By name, so that each pagemap stands before its pages.
    for (name, (version, bytes)) in dumped.images {
        let part = format!("{IMAGES}{name}");
        list.add(&part, &format!("{PREFIX}{name}"), version);
        others.push(match merged.get(&name) {
            Some((inner, images)) => pages_parcel(part, *inner, images, bytes, reader.clone())?,
            None => Parcel::bytes(part, bytes),
        });
    }
    parts.push(list.parcel()?);
    parts.extend(others);
    let root = root_name(&bundle).map_err(failed)?;
    for (name, tree) in trees(&bundle, root.as_deref())? {
        let bytes = tree.bytes();
        parts.push(Parcel::filled(name, bytes, move |to| Ok(tree.write(to)?)));
    }
    Ok(parts)
}

fn described(manifest: &Manifest) -> Result<(ContainerSpec, Bundle, Needs)> {
    let json = |bytes: &[u8], what: &str| -> Result<serde_json::Value> {
        serde_json::from_slice(bytes)
            .map_err(|error| WorkloadError::new(format!("Cannot read the {what}"), error).into())
    };
    let spec =
        ContainerSpec::from_json(&json(&manifest.spec, "container's spec")?).map_err(failed)?;
    let needs: Needs = serde_json::from_value(json(&manifest.needs, "container's needs")?)
        .map_err(|error| WorkloadError::new("Cannot read the container's needs", error))?;
    let bundle = Bundle::parse(&spec.bundle, needs.config.as_bytes()).map_err(failed)?;
    Ok((spec, bundle, needs))
}

/// The bundle as tars, the rest before the root that stands in it.
fn trees(bundle: &Bundle, root: Option<&str>) -> Result<Vec<(&'static str, TarTree)>> {
    let directory = bundle.directory();
    let Some(root) = root else {
        return Ok(vec![(ROOTFS, TarTree::scan(directory, None)?)]);
    };
    let rootfs = bundle.rootfs();
    if rootfs.symlink_metadata().is_ok_and(|found| found.is_symlink()) {
        let text =
            format!("{} is a symbolic link; a checkpoint needs the directory", rootfs.display());
        return Err(WorkloadError::plain(text).into());
    }
    Ok(vec![
        (REST, TarTree::scan(directory, Some(root.as_bytes()))?),
        (ROOTFS, TarTree::scan(&rootfs, None)?),
    ])
}

/// What a dump consists of.
struct Dumped {
    state: ContainerState,
    state_section: Section,
    statistics: Section,
    /// Pages that CRIU did not dump, by process.
    hidden: HiddenPages,
    /// Version and bytes of each image, by name.
    images: BTreeMap<String, (u32, Vec<u8>)>,
}

impl Dumped {
    fn sort(sections: Vec<Section>) -> Result<Self> {
        let (mut state, mut hidden, mut images) = (None, None, BTreeMap::new());
        let mut statistics = None;
        for section in sections {
            match section.kind.strip_prefix(PREFIX) {
                _ if section.kind == HIDDEN => {
                    let read = images::read_hidden(&section);
                    hidden = Some(read.map_err(failed)?);
                }
                // Whoever restores it has cgroups of its own for it.
                Some(CGROUPS) => {}
                Some(name) => {
                    let changed = match name {
                        FILES => without_mode_of_root(&section.bytes),
                        _ if name.starts_with(CORE) => without_cgroup(&section.bytes),
                        _ => Some(section.bytes),
                    };
                    let bad = || ArchiveError::part(&section.kind, "is no image of CRIU's");
                    let bytes = changed.ok_or_else(bad)?;
                    images.insert(name.to_owned(), (section.version, bytes));
                }
                None if section.kind == STATE => state = Some(section),
                None if section.kind == STATISTICS => statistics = Some(section),
                // Of a container that is written into a file CRIU has the shared memory.
                None if section.kind == SEGMENTS => {
                    if !segments::read_section(&section).map_err(failed)?.is_empty() {
                        let what = "names shared memory that is not in the images";
                        return Err(ArchiveError::part(section.kind, what));
                    }
                }
                None => return Err(ArchiveError::part(section.kind, "is not known here")),
            }
        }
        let missing = |what| ArchiveError::part(what, "is missing");
        let state_section = state.ok_or_else(|| missing(STATE))?;
        let state = ContainerState::from_section(&state_section).map_err(failed)?;
        let statistics = statistics.ok_or_else(|| missing(STATISTICS))?;
        let hidden = hidden.ok_or_else(|| missing(HIDDEN))?;
        Ok(Self { state, state_section, statistics, hidden, images })
    }

    /// Enters those of the hidden pages that hold something into the pagemaps. Gives, by the name of a
    /// pages image, whose it is and what it consists of.
    fn merge(&mut self, pages: &PageSet) -> Result<BTreeMap<String, (i32, Images)>> {
        let mut merged = BTreeMap::new();
        for (name, (_, bytes)) in &mut self.images {
            let Some(inner) = process_of(name) else { continue };
            let Some(hidden) = self.hidden.get_mut(&inner) else { continue };
            let found = pages.ranges().filter(|range| range.space == SpaceId(inner as u32));
            let found: Vec<_> = found.map(|range| range.first..range.first + range.count).collect();
            let images = Images::merge(bytes, &found)
                .map_err(|what| ArchiveError::part(format!("{IMAGES}{name}"), what))?;
            *hidden = images.hidden();
            bytes.clone_from(&images.pagemap);
            let pages = format!("pages-{}.img", images.pages_id);
            if merged.insert(pages.clone(), (inner, images)).is_some() {
                return Err(ArchiveError::part(format!("{IMAGES}{pages}"), "is of two processes"));
            }
        }
        // CRIU writes no image for a process of which it dumps no page.
        for name in merged.keys() {
            self.images.entry(name.clone()).or_insert((images::VERSION, Vec::new()));
        }
        let unnamed = self.hidden.keys().find(|inner| !merged.values().any(|(of, _)| of == *inner));
        match unnamed {
            Some(inner) => Err(ArchiveError::part(
                HIDDEN,
                format!("names process {inner}, which CRIU did not dump"),
            )),
            None => Ok(merged),
        }
    }
}

/// The image of a task without its cgroups: those of this host, which a runtime does not make there. CRIU
/// leaves such a task in the cgroups that it is restored in. Nothing when it is no image.
fn without_cgroup(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut image = Image::parse(bytes, CORE_MAGIC)?;
    for message in &mut image.messages {
        let parsed = message.change_each(TASK, |task| task.remove(TASK_CGROUPS))
            && message.change_each(THREAD, |thread| thread.remove(THREAD_CGROUPS));
        parsed.then_some(())?;
    }
    Some(image.to_bytes())
}

/// The image of open files without the mode of the root directory. podman gives that of an image one of its
/// own, whatever is in an archive, and CRIU restores no file whose mode is another. Nothing when it is no
/// image.
fn without_mode_of_root(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut image = Image::parse(bytes, FILES_MAGIC)?;
    for message in &mut image.messages {
        let parsed = message.change_each(FILE, |file| {
            if file.bytes(FILE_PATH) == Some(b"/") {
                file.remove(FILE_MODE);
            }
        });
        parsed.then_some(())?;
    }
    Some(image.to_bytes())
}

/// A pages image: CRIU's own pages and those that it did not see, in the order of the pagemap.
fn pages_parcel(
    part: String,
    inner: i32,
    images: &Images,
    own: Vec<u8>,
    reader: Arc<dyn PageReader>,
) -> Result<Parcel> {
    if images.own_bytes() != Some(own.len() as u64) {
        return Err(ArchiveError::part(&part, "has not as many pages as its pagemap says"));
    }
    let bytes = images.bytes().ok_or_else(|| ArchiveError::part(&part, "is too long"))?;
    let pieces = images.pieces.clone();
    let name = part.clone();
    Ok(Parcel::filled(name, bytes, move |to| {
        copy_pieces(&pieces, inner, &own, &*reader, to, &part)
    }))
}

fn copy_pieces(
    pieces: &[Piece],
    inner: i32,
    own: &[u8],
    reader: &dyn PageReader,
    to: &mut dyn Write,
    part: &str,
) -> Result<()> {
    let mut at = 0;
    for Piece { pages, ours } in pieces {
        let count = pages.end - pages.start;
        if *ours {
            let range = PageRange::new(SpaceId(inner as u32), pages.start, count);
            copy_pages(std::iter::once(range), reader, to, part)?;
        } else {
            let end = at + count as usize * PAGE_SIZE;
            let bytes = own.get(at..end).ok_or_else(|| ArchiveError::part(part, "is cut short"))?;
            to.write_all(bytes).map_err(|error| cannot_write(part, &error))?;
            at = end;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segments::message::Message;

    fn message(numbers: &[(u32, u64)]) -> Message {
        let mut message = Message::default();
        for (tag, number) in numbers {
            message.set_number(*tag, *number);
        }
        message
    }

    #[test]
    fn a_task_is_told_no_cgroups() {
        let mut core = message(&[(1, 1)]);
        core.set_bytes(TASK, message(&[(1, 1), (TASK_CGROUPS, 2)]).to_bytes());
        core.set_bytes(THREAD, message(&[(11, 2), (THREAD_CGROUPS, 2)]).to_bytes());
        let bytes = Image::of(CORE_MAGIC, vec![core]).to_bytes();
        let image = Image::parse(&without_cgroup(&bytes).expect("an image"), CORE_MAGIC);
        let core = &image.expect("an image").messages[0];
        let inner = |tag| core.each(tag).next().flatten().expect("a message");
        assert_eq!(inner(TASK), message(&[(1, 1)]));
        assert_eq!(inner(THREAD), message(&[(11, 2)]));
        assert_eq!(without_cgroup(&bytes[1..]), None);
    }

    #[test]
    fn only_the_root_is_told_without_its_mode() {
        let file = |path: &[u8]| {
            let mut file = message(&[(1, 3), (FILE_MODE, 0o40755)]);
            file.set_bytes(FILE_PATH, path.to_vec());
            let mut entry = message(&[(1, 1)]);
            entry.set_bytes(FILE, file.to_bytes());
            entry
        };
        let bytes = Image::of(FILES_MAGIC, vec![file(b"/"), file(b"/data")]).to_bytes();
        let image = Image::parse(&without_mode_of_root(&bytes).expect("an image"), FILES_MAGIC);
        let messages = image.expect("an image").messages;
        let modes =
            messages.iter().map(|entry| entry.each(FILE).next().flatten()?.number(FILE_MODE));
        assert_eq!(modes.collect::<Vec<_>>(), [None, Some(0o40755)]);
    }
}
