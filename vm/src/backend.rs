//! The agent's side of virtual machines: checks before anything is touched, keepers started and
//! asked, manifests written and read.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use decamp_shared::archive::{Frozen, Parcel, Unpacking};
use decamp_shared::keeper::ends::{KeeperDestination, KeeperSource};
use decamp_shared::keeper::{Beginning, KeeperClient, KeeperConfig, spawn};
use decamp_shared::network::{Link, Neighbour, is_interface_name, need};
use decamp_shared::pages::{PageReader, SpaceId};
use decamp_shared::workload::{
    Backend, DestinationWorkload, FileRole, FileTree, HostTools, Kind, Manifest, NetworkNeed,
    Place, PlacedTree, Refusal, RefusalCode, Result, SourceWorkload, SpaceInfo, Storage,
    WorkloadError,
};
use kvm_ioctls::Kvm;

use crate::archive::{self, VmUnpacking};
use crate::boot;
use crate::confinement::Presence;
use crate::cpuid::baseline::Offer;
use crate::devices::{self, VSOCK_SOCKET};
use crate::disk;
use crate::ending;
use crate::error::VmError;
use crate::files::Files;
use crate::host;
use crate::interfaces::InterfaceFacts;
use crate::memory::{GUEST_MEMORY, Memory};
use crate::needs::{Needs, named};
use crate::reader::GuestReader;
use crate::spec::{DiskSpec, MAX_DISKS, VmSpec};

/// The most bytes of state that a VM has beside its memory: some KiB each vCPU and device.
const MAX_STATE: u64 = 256 << 20;
/// The most bytes of spec that are read from a peer.
const MAX_SPEC: usize = 64 * 1024;

/// Where programs of the host meet those of a VM, in the directory of its console's socket.
pub fn vsock_socket(place: &Place) -> PathBuf {
    place.console().with_file_name(VSOCK_SOCKET)
}

/// Virtual machines on this host.
#[derive(Clone, Debug)]
pub struct VmBackend {
    tools: HostTools,
}

impl VmBackend {
    /// A backend that starts keepers with `tools`.
    pub fn new(tools: HostTools) -> Self {
        Self { tools }
    }

    fn start(&self, spec: &serde_json::Value, place: &Place, beginning: Beginning) -> Result<()> {
        spawn(&KeeperConfig {
            kind: Kind::Vm,
            beginning,
            place: place.clone(),
            tools: self.tools.clone(),
            spec: spec.clone(),
        })
    }
}

impl Backend for VmBackend {
    fn kind(&self) -> Kind {
        Kind::Vm
    }

    fn check(&self, spec: &serde_json::Value) -> Vec<Refusal> {
        let spec = match VmSpec::parse(spec) {
            Ok(spec) => spec,
            Err(error) => return vec![Refusal::new(RefusalCode::Request, error.to_string())],
        };
        let mut refusals = Vec::new();
        let lacks_memory = host::lacks_memory(spec.memory_bytes);
        refusals.extend(boot_refusals(&spec, lacks_memory.is_none()));
        refusals.extend(lacks_memory);
        refusals.extend(disk_refusals(&spec));
        match host::open_kvm() {
            Ok(kvm) => refusals.extend(baseline_refusal(&spec, &kvm)),
            Err(error) => refusals.push(Refusal::new(RefusalCode::Kvm, error.with_causes())),
        }
        refusals.extend(host::lacks_cpus(spec.cpus));
        refusals.extend(spec.net.iter().filter_map(|net| need::bridge_refusal(&net.bridge)));
        refusals.extend(tap_refusal(&spec));
        refusals
    }

    fn cpu_offer(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(&Offer::of_this_host()?)
            .map_err(|error| WorkloadError::new("Could not write what CPU this host offers", error))
    }

    fn run(&self, spec: &serde_json::Value, place: &Place) -> Result<()> {
        self.start(spec, place, Beginning::Run)
    }

    fn source_for_file(
        &self,
        spec: &serde_json::Value,
        place: &Place,
    ) -> Result<Box<dyn SourceWorkload>> {
        source(spec, place, |_| Ok(()))
    }

    fn source(&self, spec: &serde_json::Value, place: &Place) -> Result<Box<dyn SourceWorkload>> {
        source(spec, place, on_its_networks)
    }

    fn preflight(&self, manifest: &Manifest, trees: &[PlacedTree]) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        let request = |error: WorkloadError| Refusal::new(RefusalCode::Request, error.to_string());
        match manifest_spec(manifest) {
            Ok((_, mut spec)) => {
                match spaces_match(manifest, &spec) {
                    Ok(memory_bytes) => refusals.extend(host::lacks_memory(memory_bytes)),
                    Err(error) => refusals.push(request(error)),
                }
                refusals.extend(host::lacks_cpus(spec.cpus));
                refusals.extend(place_files(&mut spec, trees).err().map(request));
                let bridges = spec.net.iter().map(|net| net.bridge.as_str());
                refusals.extend(need::refusals(&manifest.networks, bridges, &self.tools.bridges));
                refusals.extend(tap_refusal(&spec));
            }
            Err(error) => refusals.push(request(error)),
        }
        match (Needs::parse(&manifest.needs), host::open_kvm()) {
            (Ok(needs), Ok(kvm)) => refusals.extend(needs.refusals(&kvm)),
            (needs, kvm) => {
                refusals.extend(needs.err().map(|error| request(error.into())));
                let unusable = |error: VmError| Refusal::new(RefusalCode::Kvm, error.with_causes());
                refusals.extend(kvm.err().map(unusable));
            }
        }
        refusals
    }

    fn respec(&self, manifest: &Manifest, trees: &[PlacedTree]) -> Result<serde_json::Value> {
        let (_, mut spec) = manifest_spec(manifest)?;
        place_files(&mut spec, trees)?;
        for net in &mut spec.net {
            net.bridge = need::mapped(&net.bridge, &self.tools.bridges).to_owned();
        }
        serde_json::to_value(&spec)
            .map_err(|error| WorkloadError::new("Could not write the spec as JSON", error))
    }

    fn relocated(
        &self,
        spec: &serde_json::Value,
        files: &[(PathBuf, PathBuf)],
    ) -> Result<serde_json::Value> {
        let mut spec = VmSpec::parse(spec)?;
        for (old, new) in files {
            let there = spec.disks.iter().any(|disk| disk.path == *new);
            match spec.disks.iter_mut().find(|disk| disk.path == *old) {
                _ if there => {}
                Some(disk) => disk.path.clone_from(new),
                None => {
                    let text = format!("The VM has no disk {}", old.display());
                    return Err(WorkloadError::plain(text));
                }
            }
        }
        serde_json::to_value(&spec)
            .map_err(|error| WorkloadError::new("Could not write the spec as JSON", error))
    }

    fn prepare(
        &self,
        manifest: &Manifest,
        spec: &serde_json::Value,
        place: &Place,
    ) -> Result<Box<dyn DestinationWorkload>> {
        spaces_match(manifest, &VmSpec::parse(spec)?)?;
        self.start(spec, place, Beginning::Incoming)?;
        Ok(Box::new(KeeperDestination::new(KeeperClient::connect(place)?)))
    }

    fn pack_refusals(&self, manifest: &Manifest) -> Vec<Refusal> {
        let disks = manifest.files.iter().filter(|tree| tree.role() == FileRole::Disk);
        let refusal = |tree: &FileTree| {
            let text = format!(
                "Disks do not go into a checkpoint in this version: {} would have to stay behind",
                tree.path
            );
            Refusal::new(RefusalCode::Unsupported, text)
        };
        disks.map(refusal).collect()
    }

    fn pack(&self, frozen: Frozen) -> decamp_shared::archive::Result<Vec<Parcel>> {
        archive::pack(frozen)
    }

    fn unpack(
        &self,
        manifest: &Manifest,
        trees: &[PlacedTree],
    ) -> decamp_shared::archive::Result<Box<dyn Unpacking>> {
        Ok(Box::new(VmUnpacking::new(manifest, trees)?))
    }

    fn stop(
        &self,
        _spec: &serde_json::Value,
        place: &Place,
        grace: Option<Duration>,
    ) -> Result<()> {
        ending::stop(place, grace)
    }

    fn sweep(&self, _spec: &serde_json::Value, place: &Place) -> Result<()> {
        ending::sweep(place)
    }
}

/// Reads the guest's memory, and the disks that are copied, through descriptors of the keeper's.
fn make_reader(client: &mut KeeperClient, spaces: &[SpaceInfo]) -> Result<Arc<dyn PageReader>> {
    are_few(spaces)?;
    let mut reader = GuestReader::default();
    for space in spaces {
        let id = SpaceId(space.id);
        reader = reader.with(id, client.memory(id)?, space.page_limit);
    }
    Ok(Arc::new(reader))
}

/// Why the files of `spec` cannot be booted. What only shows when they lie in memory is found by putting them into
/// memory that nobody runs, where there is `room` for that.
fn boot_refusals(spec: &VmSpec, room: bool) -> Vec<Refusal> {
    let mut wrong = boot::problems(spec);
    if wrong.is_empty() && room {
        let tried = Memory::create(spec.memory_bytes)
            .and_then(|memory| boot::load(spec, &Files::Own, &memory, &devices::slots(spec)));
        wrong.extend(tried.err());
    }
    wrong.iter().map(|error| Refusal::new(RefusalCode::File, error.with_causes())).collect()
}

/// Why no guest here can be held to the CPU baseline of `spec`, if so.
fn baseline_refusal(spec: &VmSpec, kvm: &Kvm) -> Option<Refusal> {
    match spec.cpu_baseline.as_ref()?.refusals(kvm) {
        Ok(lacks) if lacks.is_empty() => None,
        Ok(lacks) => {
            let text = format!(
                "The CPU here cannot be held to the baseline, for it lacks {}",
                named(&lacks)
            );
            Some(Refusal::new(RefusalCode::Cpu, text))
        }
        Err(error) => Some(Refusal::new(RefusalCode::Kvm, error.with_causes())),
    }
}

/// The VM behind `place`, for a session. `check`: what has to hold of its interfaces.
fn source(
    spec: &serde_json::Value,
    place: &Place,
    check: impl Fn(&[InterfaceFacts]) -> Result<()>,
) -> Result<Box<dyn SourceWorkload>> {
    let parsed = VmSpec::parse(spec)?;
    let mut client = KeeperClient::connect(place)?.with_state_of_at_most(MAX_STATE);
    let facts = client.facts()?;
    has_its_monitor(&facts)?;
    let interfaces = interfaces(&facts)?;
    are_its_own(&interfaces, &parsed)?;
    check(&interfaces)?;
    let spaces = client.spaces()?;
    are_few(&spaces)?;
    let needs = facts.get("needs").cloned().unwrap_or_default();
    let mut files = files(&parsed)?;
    files.extend(disks(&parsed, &facts)?);
    let manifest = Manifest {
        name: place.name.clone(),
        uuid: place.uuid.clone(),
        kind: Kind::Vm.into(),
        memory_bytes: parsed.memory_bytes,
        spaces,
        files,
        networks: networks(interfaces),
        spec: to_json(spec)?,
        needs: to_json(&needs)?,
    };
    let source = KeeperSource::new(client, manifest, Box::new(make_reader))?;
    Ok(Box::new(source.with_lasting_spaces()))
}

/// That a keeper speaks of no more spaces than a VM can have: a descriptor of each is opened.
fn are_few(spaces: &[SpaceInfo]) -> Result<()> {
    if spaces.len() <= 1 + MAX_DISKS {
        return Ok(());
    }
    let text = format!("Its keeper says that the VM has {} memories and disks", spaces.len());
    Err(WorkloadError::plain(text))
}

/// That a keeper speaks of the interfaces that its VM has, by names like those that are given here: what it says of them
/// goes to another host, and is shown to people as commands to type.
fn are_its_own(interfaces: &[InterfaceFacts], spec: &VmSpec) -> Result<()> {
    let bridges = interfaces.iter().map(|interface| &interface.bridge);
    let mut taps = interfaces.iter().map(|interface| &interface.tap);
    let usual = |tap: &String| {
        is_interface_name(tap) && tap.bytes().all(|byte| byte.is_ascii_alphanumeric())
    };
    if bridges.eq(spec.net.iter().map(|net| &net.bridge)) && taps.all(usual) {
        return Ok(());
    }
    Err(WorkloadError::plain("Its keeper speaks of other interfaces than the VM has"))
}

/// That whoever would open the memory of a VM for a move is still there.
fn has_its_monitor(facts: &serde_json::Value) -> Result<()> {
    let said = facts["confinement"]["monitor"].clone();
    // Keepers of an earlier version say nothing.
    if serde_json::from_value::<Presence>(said).unwrap_or_default() != Presence::Ended {
        return Ok(());
    }
    Err(WorkloadError::plain(
        "The monitor of its keeper has ended: the guest runs on, and can be moved again once it was stopped and \
         started",
    ))
}

/// The interfaces of a VM, by what its keeper says.
fn interfaces(facts: &serde_json::Value) -> Result<Vec<InterfaceFacts>> {
    let said = facts.get("networks").cloned().unwrap_or_else(|| serde_json::json!([]));
    serde_json::from_value(said)
        .map_err(|error| WorkloadError::new("Could not read what the keeper says", error))
}

/// That a VM is on the networks that it would leave.
fn on_its_networks(interfaces: &[InterfaceFacts]) -> Result<()> {
    let gone: Vec<String> = interfaces.iter().filter_map(off_the_network).collect();
    if gone.is_empty() {
        return Ok(());
    }
    let text = format!("The VM is not on the network that it would leave: {}", gone.join("; "));
    Err(WorkloadError::plain(text))
}

/// What a VM needs of the networks of a host that it comes to.
fn networks(interfaces: Vec<InterfaceFacts>) -> Vec<NetworkNeed> {
    /// So many of its own addresses are asked for.
    const OWN: usize = 3;
    let one = |interface: InterfaceFacts| {
        // It answers itself, as long as it is there; else those that it spoke to last.
        let newest = |list: Vec<Neighbour>| list.into_iter().rev();
        let seen = newest(interface.own).take(OWN).chain(newest(interface.neighbours));
        need::need(&interface.bridge, &interface.tap, Some(interface.mtu.into()), seen)
    };
    interfaces.into_iter().map(one).collect()
}

/// How somebody has taken an interface off the network under its VM, if so, and what to do.
fn off_the_network(interface: &InterfaceFacts) -> Option<String> {
    let (tap, bridge) = (&interface.tap, &interface.bridge);
    let back = format!("ip link set {tap} master {bridge}");
    match (Link::find(tap), Link::bridge(bridge)) {
        (Err(_), _) => Some(format!(
            "its interface {tap} on bridge {bridge} was removed from this host; a VM that is stopped and started \
             has it again"
        )),
        (Ok(_), None) => Some(format!(
            "bridge {bridge} is gone; make it again with ip link add {bridge} type bridge, and put the interface \
             back with {back}"
        )),
        (Ok(link), Some(there)) => (link.master != Some(there.index)).then(|| {
            format!("its interface {tap} was taken off bridge {bridge}; put it back with {back}")
        }),
    }
}

/// Why this host can make no interfaces for a VM of `spec`, if so.
fn tap_refusal(spec: &VmSpec) -> Option<Refusal> {
    const TUN: &str = "/dev/net/tun";
    let opened = || fs::File::options().read(true).write(true).open(TUN);
    let error = opened().err().filter(|_| !spec.net.is_empty())?;
    let text = format!("{TUN} cannot be opened ({error}): load the module tun");
    Some(Refusal::new(RefusalCode::Kernel, text))
}

/// Lets `spec` name its files where they stand here. Every file that it names has to be one of `trees`,
/// and each of those one that it names: nothing else of this host is ever sent, or removed, as the VM's.
fn place_files(spec: &mut VmSpec, trees: &[PlacedTree]) -> Result<()> {
    let mut left: Vec<&PlacedTree> = trees.iter().collect();
    let placed = |role: FileRole, path: &Path, left: &mut Vec<&PlacedTree>| {
        let is_it =
            |one: &&PlacedTree| one.tree.role() == role && Path::new(&one.tree.path) == path;
        let at = left.iter().position(is_it).ok_or_else(|| {
            WorkloadError::plain(format!(
                "The spec in the manifest names {}, which is not among the files that come with the VM",
                path.display()
            ))
        })?;
        Ok::<_, WorkloadError>(left.swap_remove(at).path.clone())
    };
    spec.kernel = placed(FileRole::Kernel, &spec.kernel, &mut left)?;
    if let Some(initrd) = &mut spec.initrd {
        *initrd = placed(FileRole::Initrd, initrd, &mut left)?;
    }
    for (number, disk) in spec.disks.iter_mut().enumerate() {
        let of = left.iter().find(|one| Path::new(&one.tree.path) == disk.path);
        let kept = of.map(|one| (one.tree.live, one.tree.space));
        // A copy lies where no other host sees it.
        disk.shared &= of.is_some_and(|one| one.tree.storage() != Storage::Copy);
        let wanted = (!disk.readonly, space_of(number, disk.readonly));
        disk.path = placed(FileRole::Disk, &disk.path, &mut left)?;
        if kept != Some(wanted) {
            return Err(WorkloadError::plain(format!(
                "Disk {} is not listed as the spec in the manifest has it",
                disk.path.display()
            )));
        }
    }
    match left.first() {
        None => Ok(()),
        Some(one) => Err(WorkloadError::plain(format!(
            "A VM has no use for {}, which its manifest lists (role {})",
            one.tree.path, one.tree.role
        ))),
    }
}

/// The files that must stand on the destination too. Nobody writes them while the guest runs.
fn files(spec: &VmSpec) -> Result<Vec<FileTree>> {
    let kernel = Some((FileRole::Kernel, &spec.kernel));
    let initrd = spec.initrd.as_ref().map(|path| (FileRole::Initrd, path));
    let roles = kernel.into_iter().chain(initrd);
    (1u32..).zip(roles).map(|(id, (role, path))| file_tree(id, role, path)).collect()
}

/// The disks, of which `facts` are the keeper's.
fn disks(spec: &VmSpec, facts: &serde_json::Value) -> Result<Vec<FileTree>> {
    // Behind kernel and initial ramdisk.
    let first = 2 + u32::from(spec.initrd.is_some());
    let tree = |(id, (number, disk)): (u32, (usize, &DiskSpec))| {
        let found = disk::size_at(&disk.path)?;
        let known = facts["disks"][number]["bytes"].as_u64();
        if known.is_some_and(|known| known != found) {
            return Err(WorkloadError::plain(format!(
                "Disk {} has changed its size: the guest knows it with {} bytes, and it has {found} now",
                disk.path.display(),
                known.unwrap_or_default()
            )));
        }
        let failed = |error: io::Error| {
            WorkloadError::new(format!("Could not look at disk {}", disk.path.display()), error)
        };
        let there = fs::metadata(&disk.path).map_err(failed)?;
        // A device does not say what of it was ever written.
        let held = if there.is_file() { there.blocks().saturating_mul(512) } else { found };
        let path = disk.path.to_str().ok_or_else(|| {
            WorkloadError::plain(format!("The path {} is not UTF-8", disk.path.display()))
        })?;
        let storage = if disk.shared { Storage::Shared } else { Storage::Unsaid };
        Ok(FileTree {
            id,
            role: FileRole::Disk.into(),
            path: path.to_owned(),
            // A file that travels as one has to have room for all that it may hold.
            bytes: if disk.readonly { found } else { held.min(found) },
            live: !disk.readonly,
            storage: storage.into(),
            space: space_of(number, disk.readonly),
            ..FileTree::default()
        })
    };
    (first..).zip(spec.disks.iter().enumerate()).map(tree).collect()
}

/// The space that the content of disk `number` travels as; 0 of one that nobody writes, which is a file like others.
fn space_of(number: usize, readonly: bool) -> u32 {
    if readonly { 0 } else { disk::space(number).0 }
}

/// Why the disks of `spec` cannot be used.
fn disk_refusals(spec: &VmSpec) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut refuse = |text: String| refusals.push(Refusal::new(RefusalCode::File, text));
    let mut seen: Vec<((u64, u64), &Path)> = Vec::new();
    for one in &spec.disks {
        let usable =
            disk::size_at(&one.path).and_then(|_| disk::lock::check(&one.path, one.readonly));
        if let Err(error) = usable {
            refuse(error.with_causes());
        } else if let Ok(found) = fs::metadata(&one.path) {
            let identity = (found.dev(), found.ino());
            if let Some((_, other)) = seen.iter().find(|(other, _)| *other == identity) {
                let (path, other) = (one.path.display(), other.display());
                refuse(format!("Disk {path} is the same as {other}: a VM has each once"));
            }
            seen.push((identity, &one.path));
        }
    }
    refusals
}

fn file_tree(id: u32, role: FileRole, path: &Path) -> Result<FileTree> {
    let failed = |error: io::Error| {
        WorkloadError::new(format!("Could not look at {} of the VM", path.display()), error)
    };
    let found = fs::metadata(path).map_err(failed)?;
    if !found.is_file() {
        let text = format!("{} is no file that a VM could be booted from", path.display());
        return Err(WorkloadError::plain(text));
    }
    let bytes = found.len();
    let path = path
        .to_str()
        .ok_or_else(|| WorkloadError::plain(format!("The path {} is not UTF-8", path.display())))?;
    Ok(FileTree {
        id,
        role: role.into(),
        path: path.to_owned(),
        bytes,
        live: false,
        ..FileTree::default()
    })
}

/// The spec that a manifest carries, as JSON and checked.
fn manifest_spec(manifest: &Manifest) -> Result<(serde_json::Value, VmSpec)> {
    if manifest.spec.len() > MAX_SPEC {
        let text = format!("The manifest's spec of {} bytes is too long", manifest.spec.len());
        return Err(WorkloadError::plain(text));
    }
    let json = serde_json::from_slice(&manifest.spec)
        .map_err(|error| WorkloadError::new("Could not read the spec in the manifest", error))?;
    let spec = VmSpec::parse(&json)?;
    Ok((json, spec))
}

/// Bytes of guest memory, if the manifest's own numbers agree with the spec's.
fn spaces_match(manifest: &Manifest, spec: &VmSpec) -> Result<u64> {
    let limit = Memory::page_limit_of(spec.memory_bytes);
    let spaces: Vec<_> = manifest.spaces.iter().map(|space| (space.id, space.page_limit)).collect();
    if manifest.memory_bytes != spec.memory_bytes || spaces != [(GUEST_MEMORY.0, limit)] {
        return Err(WorkloadError::plain(format!(
            "The manifest lists {} bytes of memory and spaces {spaces:?}, its spec {} bytes and one \
             space of {limit} pages",
            manifest.memory_bytes, spec.memory_bytes
        )));
    }
    Ok(spec.memory_bytes)
}

fn to_json(value: &serde_json::Value) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|error| WorkloadError::new("Could not write the manifest's JSON", error))
}

#[cfg(test)]
mod tests;
