//! The agent's side of virtual machines: checks before anything is touched, keepers started and
//! asked, manifests written and read.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use decamp_shared::archive::{Frozen, Parcel, Unpacking};
use decamp_shared::keeper::ends::{KeeperDestination, KeeperSource};
use decamp_shared::keeper::{Beginning, KeeperClient, KeeperConfig, spawn};
use decamp_shared::pages::PageReader;
use decamp_shared::workload::{
    Backend, DestinationWorkload, FileRole, FileTree, HostTools, Kind, Manifest, Place, PlacedTree,
    Refusal, RefusalCode, Result, SourceWorkload, SpaceInfo, WorkloadError,
};

use crate::archive::{self, VmUnpacking};
use crate::boot;
use crate::error::VmError;
use crate::host;
use crate::memory::{GUEST_MEMORY, Memory};
use crate::needs::Needs;
use crate::reader::GuestReader;
use crate::spec::VmSpec;

/// How long a guest is given to end when it is stopped.
const GRACE: Duration = Duration::from_secs(10);
/// The most bytes of spec that are read from a peer.
const MAX_SPEC: usize = 64 * 1024;

/// Where clients of a VM's serial console connect.
pub fn console_socket(place: &Place) -> PathBuf {
    place.dir.join("console.sock")
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
        refusals.extend(boot_refusal(&spec));
        if let Err(error) = host::open_kvm() {
            refusals.push(Refusal::new(RefusalCode::Kvm, error.with_causes()));
        }
        refusals.extend(host::lacks_memory(spec.memory_bytes));
        refusals
    }

    fn run(&self, spec: &serde_json::Value, place: &Place) -> Result<()> {
        self.start(spec, place, Beginning::Run)
    }

    fn source_for_file(
        &self,
        spec: &serde_json::Value,
        place: &Place,
    ) -> Result<Box<dyn SourceWorkload>> {
        self.source(spec, place)
    }

    fn source(&self, spec: &serde_json::Value, place: &Place) -> Result<Box<dyn SourceWorkload>> {
        let parsed = VmSpec::parse(spec)?;
        let mut client = KeeperClient::connect(place)?;
        let facts = client.facts()?;
        let needs = facts.get("needs").cloned().unwrap_or_default();
        let manifest = Manifest {
            name: place.name.clone(),
            uuid: place.uuid.clone(),
            kind: Kind::Vm.into(),
            memory_bytes: parsed.memory_bytes,
            spaces: client.spaces()?,
            files: files(&parsed)?,
            networks: Vec::new(),
            spec: to_json(spec)?,
            needs: to_json(&needs)?,
        };
        Ok(Box::new(KeeperSource::new(client, manifest, Box::new(make_reader))?))
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
                refusals.extend(place_files(&mut spec, trees).err().map(request));
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

    fn pack_refusals(&self, _manifest: &Manifest) -> Vec<Refusal> {
        Vec::new()
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

    fn stop(&self, _spec: &serde_json::Value, place: &Place) -> Result<()> {
        KeeperClient::connect(place)?.stop(GRACE)
    }

    fn sweep(&self, _spec: &serde_json::Value, place: &Place) -> Result<()> {
        // All that a keeper holds goes with its process; its console socket stays behind.
        let socket = console_socket(place);
        match fs::symlink_metadata(&socket) {
            Ok(meta) if meta.file_type().is_socket() => fs::remove_file(&socket),
            _ => Ok(()),
        }
        .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
        .map_err(|error| {
            WorkloadError::new(format!("Could not remove {}", socket.display()), error)
        })
    }
}

/// Reads the guest's memory through a descriptor of the keeper's.
fn make_reader(client: &mut KeeperClient, spaces: &[SpaceInfo]) -> Result<Arc<dyn PageReader>> {
    match spaces {
        [space] if space.id == GUEST_MEMORY.0 => {
            let descriptor = client.memory(GUEST_MEMORY)?;
            Ok(Arc::new(GuestReader::new(descriptor, space.page_limit)))
        }
        _ => Err(WorkloadError::plain(format!("A VM has one space, not {}", spaces.len()))),
    }
}

/// Why the files of `spec` cannot be booted, if so: found by putting them into memory that nobody
/// runs.
fn boot_refusal(spec: &VmSpec) -> Option<Refusal> {
    let tried = Memory::create(spec.memory_bytes).and_then(|memory| boot::load(spec, &memory));
    tried.err().map(|error| Refusal::new(RefusalCode::File, error.with_causes()))
}

/// Lets `spec` name its files where they stand here. Every file that it names has to be one of `trees`,
/// and each of those one that it names: nothing else of this host is ever sent, or removed, as the VM's.
fn place_files(spec: &mut VmSpec, trees: &[PlacedTree]) -> Result<()> {
    let mut left: Vec<&PlacedTree> = trees.iter().collect();
    let mut placed = |role: FileRole, path: &Path| {
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
    spec.kernel = placed(FileRole::Kernel, &spec.kernel)?;
    if let Some(initrd) = &mut spec.initrd {
        *initrd = placed(FileRole::Initrd, initrd)?;
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
