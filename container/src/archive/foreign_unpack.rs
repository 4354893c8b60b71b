//! Out of a checkpoint that podman exported: everything is looked at, then memory goes where a move would put
//! it, the bundle is made of the image, the changes to it and the volumes, and CRIU's images become the state
//! sections of a move.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;

use decamp_shared::archive::parcel::read_whole;
use decamp_shared::archive::{Archive, ArchiveError, Foreign, PartInfo, Result, Unpacking};
use decamp_shared::files::{Changes, Landing, LayeredLander, TreeLander};
use decamp_shared::workload::{
    DestinationWorkload, Manifest, PlacedTree, Section, SpaceInfo, WorkloadError,
};
use serde_json::Value;

use super::foreign::{
    CONFIG, Config, DELETED, DESCRIPTORS, INVENTORY, OWN_FILES, ROOT, SHM, Told, VOLUMES, json_of,
    told,
};
use super::pages::Images;
use super::unpack::{Lists, refusals, space, take_pages};
use super::{IMAGES, ROOTFS, failed};
use crate::confined::{HOST_IDS, IDS_MARKS, IDS_MOST, INVENTORY_MARKS};
use crate::dump::ContainerState;
use crate::facts::Needs;
use crate::images::{self, HiddenPages, PREFIX, is_image_name, process_of};
use crate::mounts::ExternalKind;
use crate::podman::image::MountedImage;
use crate::segments;
use crate::segments::message::{Image, Message};
use crate::spec::ContainerSpec;

/// Shared memory files, as podman has them.
const SHM_TAR: &str = "devshm-checkpoint.tar";
/// What podman has in its files for people and for itself.
const FOR_PODMAN: [&str; 6] =
    [CONFIG, "spec.dump", "network.status", DELETED, DESCRIPTORS, "stats-dump"];
/// CRIU's image of what is in pipes, and the marks at its head.
const PIPES_DATA: &str = "pipes-data.img";
const PIPES_DATA_MARKS: [u32; 2] = [0x5456_4319, 0x5645_3709];
/// Which pipe it is, by its inode, and how many bytes follow (CRIU's pipe-data.proto).
const PIPE_ID: u32 = 1;
const PIPE_BYTES: u32 = 2;
const CUT: &str = "is cut short";
/// What the images say of the network namespace of a process.
const NETWORK_ID: u32 = 6;

/// A container that comes out of a checkpoint of podman's.
pub(crate) struct ForeignUnpacking {
    /// Where the bundle is to be.
    path: PathBuf,
    oci: Value,
    told: Told,
    /// Base of its files; mounted until this is dropped.
    image: MountedImage,
    removed: Vec<Vec<u8>>,
    changes: Option<Changes>,
    /// The root file system, once all was seen.
    root: Option<LayeredLander>,
    root_landed: bool,
    /// The bundle without what is in trees of its own: its tar.
    bundle: Vec<u8>,
    bundle_lander: TreeLander,
    bundle_landed: bool,
    /// Volumes and shared memory files, by the name of their part.
    trees: BTreeMap<String, TreeLander>,
    /// Pages images of processes, by the name of their part.
    processes: BTreeMap<String, (i32, Images)>,
    hidden: HiddenPages,
    lists: Lists,
    spaces: Vec<SpaceInfo>,
    /// What was in its standard input, not yet read.
    input: Vec<u8>,
    /// What its processes call their network namespace.
    network_id: Option<u64>,
    sections: Vec<Section>,
}

impl ForeignUnpacking {
    /// Of the container of `manifest`, which was made of what is in `found`, and whose bundle goes to
    /// `trees`.
    pub(crate) fn new(manifest: &Manifest, trees: &[PlacedTree], found: &Foreign) -> Result<Self> {
        let [placed] = trees else {
            return Err(WorkloadError::plain("A container has one bundle").into());
        };
        let needs: Needs = serde_json::from_slice(&manifest.needs)
            .map_err(|error| WorkloadError::new("Cannot read the container's needs", error))?;
        let oci: Value = serde_json::from_str(&needs.config)
            .map_err(|error| WorkloadError::new("Cannot read its configuration", error))?;
        let config: Config = json_of(found, CONFIG)?;
        let removed: Vec<String> = match found.kept(DELETED) {
            Some(_) => json_of::<Option<_>>(found, DELETED)?.unwrap_or_default(),
            None => Vec::new(),
        };
        let removed = removed.iter().map(|path| path.trim_start_matches('/').as_bytes().to_vec());
        let spec: ContainerSpec = serde_json::from_slice(&manifest.spec)
            .map_err(|error| WorkloadError::new("Cannot read the container's spec", error))?;
        let address = spec.net.as_ref().and_then(|net| net.ip.split('/').next());
        let bundle = bundle_tar(&oci, address.unwrap_or("127.0.1.1")).map_err(|error| {
            ArchiveError::part("config.json", format!("cannot be written: {error}"))
        })?;
        let bundle_lander = TreeLander::list(&placed.path, &mut &bundle[..])?;
        Ok(Self {
            path: placed.path.clone(),
            told: told(found, &oci)?,
            oci,
            image: MountedImage::mount(&config.image).map_err(failed)?,
            removed: removed.collect(),
            changes: None,
            root: None,
            root_landed: false,
            bundle,
            bundle_lander,
            bundle_landed: false,
            trees: BTreeMap::new(),
            processes: BTreeMap::new(),
            hidden: HiddenPages::new(),
            lists: Lists::default(),
            spaces: Vec::new(),
            input: Vec::new(),
            network_id: None,
            sections: Vec::new(),
        })
    }

    /// Where the tree of a part goes, if it is one.
    fn tree_path(&self, part: &str) -> Option<PathBuf> {
        if part == SHM_TAR {
            return Some(self.path.join(SHM));
        }
        let name = part.strip_prefix("volumes/")?.strip_suffix(".tar")?;
        let source = format!("{VOLUMES}/{name}");
        let mounts = self.oci["mounts"].as_array().into_iter().flatten();
        let known =
            mounts.filter_map(|mount| mount["source"].as_str()).any(|known| known == source);
        (known && !name.contains('/')).then(|| self.path.join(source))
    }

    /// Looks at an image of CRIU's, and reads what is a list.
    fn look_at_image(&mut self, name: &str, part: &PartInfo, content: &mut dyn Read) -> Result<()> {
        let bad = |what: &str| ArchiveError::part(&part.name, what);
        if part.name == INVENTORY && part.size > IDS_MOST {
            return Err(bad("is longer than any"));
        }
        if let Some((_, images)) = self.processes.get(&part.name) {
            return match images.bytes() == Some(part.size) {
                true => Ok(()),
                false => Err(bad("has not as many pages as its pagemap says")),
            };
        }
        if name.starts_with("ids-") {
            let bytes = read_whole(part, IDS_MOST, content)?;
            let image = Image::parse_marked(&bytes, IDS_MARKS);
            let image = image.ok_or_else(|| bad("is no image of CRIU's"))?;
            let id = image.messages.first().and_then(|ids| ids.number(NETWORK_ID));
            if id.is_none() || self.network_id.is_some_and(|known| Some(known) != id) {
                return Err(bad("is in a network namespace of its own within the container"));
            }
            self.network_id = id;
            return Ok(());
        }
        let Some(inner) = process_of(name) else { return Ok(()) };
        let bytes = self.lists.read(part, content)?;
        let all = Images::all(&bytes).map_err(bad)?;
        let images = Images::split(&bytes, &all).map_err(bad)?;
        let pages = format!("{IMAGES}pages-{}.img", images.pages_id);
        if inner <= 0 || self.hidden.insert(inner, all).is_some() {
            return Err(bad("is of no process, or of one that has another"));
        }
        match self.processes.insert(pages, (inner, images)) {
            None => Ok(()),
            Some(_) => Err(bad("shares its pages with another process")),
        }
    }

    /// Makes the bundle without its trees, before the first of them.
    fn begin(&mut self, landing: &Landing) -> Result<()> {
        if !std::mem::replace(&mut self.bundle_landed, true) {
            self.bundle_lander.land(landing, &mut &self.bundle[..])?;
        }
        Ok(())
    }

    fn land_root(&mut self, landing: &Landing, changes: Option<&mut dyn Read>) -> Result<()> {
        let missing = || ArchiveError::part(ROOTFS, "was not looked at");
        self.root.as_ref().ok_or_else(missing)?.land(landing, changes)?;
        self.root_landed = true;
        Ok(())
    }

    /// What CRIU takes for its own network namespace is the one that it is started in, ours.
    fn in_our_network(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let bad = |what: &str| ArchiveError::part(INVENTORY, what);
        let mut image = Image::parse_marked(bytes, INVENTORY_MARKS)
            .ok_or_else(|| bad("is no inventory of CRIU's"))?;
        let id = self.network_id.ok_or_else(|| bad("is of no processes"))?;
        let changed = image.messages.first_mut().is_some_and(|inventory| {
            inventory.change_each(HOST_IDS, |ids| ids.set_number(NETWORK_ID, id))
        });
        if changed { Ok(image.to_bytes()) } else { Err(bad("is no inventory of CRIU's")) }
    }

    /// What the runtime knew of it, and CRIU does not.
    fn state(&self) -> ContainerState {
        let pipe = |number: usize| {
            self.told.descriptors.get(number).filter(|key| key.starts_with("pipe:")).cloned()
        };
        let output = pipe(1).or_else(|| pipe(2));
        let second_output = pipe(2).filter(|second| Some(second) != output.as_ref());
        let user = |name: &str| self.oci["process"]["user"][name].as_u64().unwrap_or(0) as u32;
        ContainerState {
            // A name that no pipe has.
            output: output.unwrap_or_else(|| "pipe:[0]".to_owned()),
            output_owner: (user("uid"), user("gid")),
            mounts: self.told.mounts.clone(),
            second_output,
            input: pipe(0),
            input_rest: self.input.clone(),
            // Podman had its other end. Images do not say whether it had closed it.
            input_ended: false,
            settings: Vec::new(),
            terminal: false,
            eager: true,
        }
    }

    /// What has to be there for its mounts: what a runtime makes when it starts a container.
    fn mount_points(&self) -> Vec<(Vec<u8>, bool)> {
        let plain = |path: &str| path.trim_start_matches('/').as_bytes().to_vec();
        let mounts = self.oci["mounts"].as_array().into_iter().flatten();
        let is_file = |destination: &str| OWN_FILES.iter().any(|(own, _)| *own == destination);
        // Where it was really mounted is CRIU's to say; what is within another mount is no place here.
        let real = |destination: &str| {
            let mut told = self.told.mounts.iter();
            let found =
                told.find(|one| one.kind == ExternalKind::Bind && one.destination == destination);
            found.map_or(destination, |found| &found.mounted).to_owned()
        };
        let within = ["/dev/", "/proc/", "/sys/"];
        mounts
            .filter_map(|mount| mount["destination"].as_str())
            .filter(|destination| !within.iter().any(|outer| destination.starts_with(outer)))
            .map(|destination| (plain(&real(destination)), !is_file(destination)))
            .filter(|(path, _)| !path.is_empty())
            .collect()
    }
}

impl Unpacking for ForeignUnpacking {
    fn look(&mut self, part: &PartInfo, content: &mut dyn Read) -> Result<()> {
        let name = part.name.as_str();
        if name == ROOTFS {
            self.changes = Some(Changes::list(&self.path.join(ROOT), content)?);
            return Ok(());
        }
        if let Some(path) = self.tree_path(name) {
            let tree = TreeLander::list(&path, content)?;
            self.trees.insert(name.to_owned(), tree);
            return Ok(());
        }
        let bad = |what: &str| Err(ArchiveError::part(name, what));
        match name.strip_prefix(IMAGES) {
            _ if FOR_PODMAN.contains(&name) => Ok(()),
            Some(image) if is_image_name(image) => self.look_at_image(image, part, content),
            Some(_) => bad("is no image of CRIU's"),
            None if name.ends_with(".log") || name.starts_with("artifacts/") => Ok(()),
            None if name.starts_with("volumes/") => bad("is of a volume that it does not mount"),
            None => bad("is no part of a checkpoint of podman's"),
        }
    }

    fn check(&mut self, archive: &Archive) -> Result<()> {
        for name in self.processes.keys() {
            let missing = || ArchiveError::part(name, "is missing");
            archive.header().part(name).ok_or_else(missing)?;
        }
        if self.network_id.is_none() || self.processes.is_empty() {
            return Err(ArchiveError::part(IMAGES, "has no process"));
        }
        let mounts = self.oci["mounts"].as_array().into_iter().flatten();
        let volumes = mounts.filter_map(|mount| mount["source"].as_str()?.strip_prefix(VOLUMES));
        for name in volumes {
            let part = format!("{VOLUMES}{name}.tar");
            if !self.trees.contains_key(&part) {
                let what = "is missing: it was made with --ignore-volumes";
                return Err(ArchiveError::part(part, what));
            }
        }
        let root = LayeredLander::of(
            &self.path.join(ROOT),
            self.image.path(),
            self.changes.take().unwrap_or_default(),
            &self.removed,
            &self.mount_points(),
        )?;
        self.spaces = self.hidden.keys().map(|inner| space(*inner)).collect();
        let trees = self.trees.values().map(TreeLander::bytes);
        let files = trees.chain([root.bytes()]).fold(0, u64::saturating_add);
        self.root = Some(root);
        // All of them are read once more.
        self.lists = Lists::default();
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
        self.begin(landing)?;
        let name = part.name.as_str();
        if name == ROOTFS {
            return self.land_root(landing, Some(content));
        }
        if let Some(tree) = self.trees.get(name) {
            return Ok(tree.land(landing, content)?);
        }
        let Some(image) = name.strip_prefix(IMAGES).filter(|image| is_image_name(image)) else {
            return Ok(());
        };
        let own = take_pages(&self.processes, &self.spaces, part, content, destination)?;
        let bytes = match (own, process_of(image)) {
            (Some(own), _) => own,
            (None, Some(inner)) => {
                let bytes = self.lists.read(part, content)?;
                let hidden = self.hidden.get(&inner).map(Vec::as_slice).unwrap_or_default();
                let split = Images::split(&bytes, hidden);
                split.map_err(|what| ArchiveError::part(name, what))?.pagemap
            }
            (None, None) => read_whole(part, part.size, content)?,
        };
        if let Some(key) = self.told.descriptors.first().filter(|_| image == PIPES_DATA) {
            let bad = |what: &str| ArchiveError::part(name, what);
            self.input = held_in_pipe(&bytes, key).map_err(bad)?;
        }
        let bytes = if name == INVENTORY { self.in_our_network(&bytes)? } else { bytes };
        let (kind, version) = (format!("{PREFIX}{image}"), images::VERSION);
        self.sections.push(Section { kind, version, bytes });
        Ok(())
    }

    fn finish(&mut self, landing: &Landing) -> Result<Vec<Section>> {
        self.begin(landing)?;
        if !self.root_landed {
            self.land_root(landing, None)?;
        }
        let mut sections = std::mem::take(&mut self.sections);
        sections.push(images::write_hidden(&self.hidden));
        sections.push(segments::section(&[]).map_err(failed)?);
        sections.push(self.state().to_section().map_err(failed)?);
        Ok(sections)
    }
}

/// What an image of what is in pipes has of the pipe that CRIU calls `key` ("pipe:[7]"): into a pipe that is
/// given from outside CRIU itself puts nothing.
fn held_in_pipe(image: &[u8], key: &str) -> std::result::Result<Vec<u8>, &'static str> {
    let id = key.strip_prefix("pipe:[").and_then(|rest| rest.strip_suffix(']')?.parse().ok());
    let Some(id) = id else { return Ok(Vec::new()) };
    let marks = PIPES_DATA_MARKS.map(u32::to_le_bytes).concat();
    let mut rest = image.strip_prefix(&marks[..]).ok_or("is no image of CRIU's")?;
    while !rest.is_empty() {
        let length = split(&mut rest, 4)?.try_into().map_err(|_| CUT)?;
        let message = Message::parse(split(&mut rest, u32::from_le_bytes(length) as usize)?)
            .ok_or("is no image of CRIU's")?;
        let length = message.number(PIPE_BYTES).unwrap_or(0) as u32;
        let bytes = split(&mut rest, length as usize)?;
        if message.number(PIPE_ID) == Some(id) {
            return Ok(bytes.to_vec());
        }
    }
    Ok(Vec::new())
}

fn split<'a>(rest: &mut &'a [u8], length: usize) -> std::result::Result<&'a [u8], &'static str> {
    let (first, behind) = rest.split_at_checked(length).ok_or(CUT)?;
    *rest = behind;
    Ok(first)
}

/// The bundle without what is in trees of its own, but with the place of shared memory files, which need not
/// be any.
fn bundle_tar(oci: &Value, address: &str) -> std::io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, mode: u32, content: Option<&[u8]>| {
        let mut head = tar::Header::new_ustar();
        head.set_path(name)?;
        head.set_entry_type(match content {
            None => tar::EntryType::Directory,
            Some(_) => tar::EntryType::Regular,
        });
        head.set_mode(mode);
        head.set_uid(0);
        head.set_gid(0);
        head.set_mtime(0);
        let content = content.unwrap_or_default();
        head.set_size(content.len() as u64);
        head.set_cksum();
        builder.append(&head, content)
    };
    // Nobody else here is to run what in it runs as root.
    add("./", 0o700, None)?;
    add(&format!("{SHM}/"), 0o1777, None)?;
    add("config.json", 0o644, Some(oci.to_string().as_bytes()))?;
    let name = oci["hostname"].as_str().unwrap_or_default();
    for (destination, file) in OWN_FILES {
        let content = match destination {
            "/etc/hostname" => format!("{name}\n"),
            "/etc/hosts" => format!("127.0.0.1 localhost\n::1 localhost\n{address} {name}\n"),
            // Of this host, for it says who answers here.
            "/etc/resolv.conf" => std::fs::read_to_string(destination).unwrap_or_default(),
            _ => String::new(),
        };
        add(file, 0o644, Some(content.as_bytes()))?;
    }
    builder.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_in_a_pipe_is_found() {
        let mut image = PIPES_DATA_MARKS.map(u32::to_le_bytes).concat();
        for (id, bytes) in [(5, &b"others"[..]), (6, b""), (7, b"unread")] {
            let mut message = Message::default();
            message.set_number(PIPE_ID, id);
            message.set_number(PIPE_BYTES, bytes.len() as u64);
            let message = message.to_bytes();
            image.extend((message.len() as u32).to_le_bytes());
            image.extend(message);
            image.extend(bytes);
        }
        let held = |key| held_in_pipe(&image, key).expect("sane");
        assert_eq!(held("pipe:[7]"), b"unread");
        assert_eq!(held("pipe:[6]"), b"");
        assert_eq!(held("pipe:[8]"), b"");
        assert_eq!(held("/dev/null"), b"");
        assert!(held_in_pipe(&image[..image.len() - 1], "pipe:[7]").is_err(), "cut short");
        assert!(held_in_pipe(&image[1..], "pipe:[7]").is_err());
        assert_eq!(held_in_pipe(&image[..8], "pipe:[7]"), Ok(Vec::new()), "nothing in any");
    }
}
