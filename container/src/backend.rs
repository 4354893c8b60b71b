//! The agent's side of containers.

use std::fs;
use std::path::Path;
use std::time::Duration;

use decamp_shared::archive::header::Described;
use decamp_shared::archive::{Foreign as ForeignArchive, Frozen, Parcel, Unpacking};
use decamp_shared::keeper::ends::KeeperDestination;
use decamp_shared::keeper::{Beginning, KeeperClient, KeeperConfig, end_left, spawn};
use decamp_shared::methods::{ForkedChoice, Methods, TrackerChoice};
use decamp_shared::network::{Neighbour, need};
use decamp_shared::workload::{
    Backend, DestinationWorkload, FileRole, FileTree, Foreign, HostTools, Kind, Liveness, Manifest,
    NetworkNeed, Place, PlacedTree, Refusal, Result, SourceWorkload, WorkloadError,
};
use serde_json::Value;

use crate::adopt;
use crate::archive::{self, ContainerUnpacking, ForeignUnpacking};
use crate::begin::write_config;
use crate::bundle::Bundle;
use crate::claim;
use crate::comparing::Comparing;
use crate::error::ContainerError;
use crate::facts::{Facts, Needs};
use crate::network::delete_link;
use crate::obstacles::host::criu_obstacle;
use crate::podman::{self, found};
use crate::preflight;
use crate::restore::oci_directory;
use crate::source::ContainerSource;
use crate::spec::{ContainerSpec, Net, veth_name};
use crate::swrk;
use crate::volumes::{self, Found};

/// A stopped container has this long to end by itself.
const GRACE: Duration = Duration::from_secs(10);
/// A keeper that has not ended its container so long after that, and what was left of it, will not.
const ANSWER_WITHIN: Duration = Duration::from_secs(300);
/// Memory that a container without a limit may grow by while it is moved.
const HEADROOM: u64 = 64 << 20;

/// Any container may grow by so much while it is moved.
const GROWTH: u64 = 1 << 30;

/// Containers by OCI runtimes and CRIU.
#[derive(Clone, Debug)]
pub struct ContainerBackend {
    tools: HostTools,
}

impl ContainerBackend {
    /// The backend that uses `tools`.
    pub fn new(tools: HostTools) -> Self {
        Self { tools }
    }

    fn keeper(&self, beginning: Beginning, spec: &Value, place: &Place) -> KeeperConfig {
        KeeperConfig {
            kind: Kind::Container,
            beginning,
            place: place.clone(),
            tools: self.tools.clone(),
            spec: spec.clone(),
        }
    }

    /// Tells a keeper what this host's configuration says now: it may have been started under another.
    fn configure(&self, client: &mut KeeperClient, methods: &Methods) -> Result<()> {
        let Err(error) = client.configure(methods) else { return Ok(()) };
        tracing::debug!(%error, ?methods, "The keeper does not take these methods");
        // One that is older than the choice of what is shared sends each process's own in any case.
        let without = Methods { forked: ForkedChoice::default(), ..*methods };
        if without != *methods && client.configure(&without).is_ok() {
            return Ok(());
        }
        // It is stopped already, or older than the question, and knows no other than this.
        if without == Methods::default() {
            return Ok(());
        }
        Err(WorkloadError::new(
            "Its keeper does not take what the configuration says under [containers]",
            error,
        ))
    }

    fn leaving(&self, spec: &Value, place: &Place, methods: &Methods) -> Result<ContainerSource> {
        // On the next host it is like any other.
        let spec = ContainerSpec { adopted: None, ..ContainerSpec::from_json(spec)? };
        let mut client = KeeperClient::connect(place)?;
        self.configure(&mut client, methods)?;
        let manifest = self.manifest(&mut client, &spec, place)?;
        ContainerSource::new(client, manifest)
    }

    fn manifest(
        &self,
        client: &mut KeeperClient,
        spec: &ContainerSpec,
        place: &Place,
    ) -> Result<Manifest> {
        let facts: Facts = serde_json::from_value(client.facts()?)
            .map_err(|error| WorkloadError::new("Cannot read the container's facts", error))?;
        let path = oci_directory(place).join("original.json");
        let config = fs::read_to_string(&path).map_err(|error| {
            WorkloadError::new(format!("Cannot read {}", path.display()), error)
        })?;
        let mut obstacles = facts.obstacles;
        obstacles
            .extend(criu_obstacle(&self.tools.criu).map(|said| format!("At the source: {said}")));
        let needs = Needs {
            config,
            resident: facts.resident,
            shared_huge: facts.shared_huge,
            on_tmpfs: facts.on_tmpfs,
            criu: swrk::version(&self.tools.criu)?,
            obstacles,
            host: facts.host,
            locks: facts.locks,
        };
        let bundle = FileTree {
            id: 0,
            role: FileRole::Bundle.into(),
            path: spec.bundle.display().to_string(),
            place: place_of(spec),
            bytes: bytes_below(&spec.bundle),
            live: true,
            ..FileTree::default()
        };
        let Found { trees, volumes, .. } = volumes_of(spec, needs.config.as_bytes())?;
        let numbered = (1..).zip(trees).map(|(id, tree)| FileTree { id, ..tree });
        let mut spec = ContainerSpec { volumes, ..spec.clone() };
        if let Some(made) = &mut spec.podman {
            made.own = facts.own;
        }
        let networks =
            spec.net.iter().map(|net| network_need(net, place)).collect::<Result<_>>()?;
        Ok(Manifest {
            name: place.name.clone(),
            uuid: place.uuid.clone(),
            kind: Kind::Container.into(),
            memory_bytes: facts.memory_limit.unwrap_or(facts.resident + HEADROOM),
            spaces: client.spaces()?,
            files: [bundle].into_iter().chain(numbered).collect(),
            networks,
            spec: json(&spec)?,
            needs: json(&needs)?,
        })
    }
}

impl Backend for ContainerBackend {
    fn kind(&self) -> Kind {
        Kind::Container
    }

    fn check(&self, spec: &Value) -> Vec<Refusal> {
        preflight::for_run(&self.tools, spec)
    }

    fn run(&self, spec: &Value, place: &Place) -> Result<()> {
        // The keeper looks again; here nothing was touched yet.
        let kind = ContainerSpec::from_json(spec)?.kind()?;
        if let Some(taken) = claim::taken(&self.tools, place, kind)? {
            return Err(WorkloadError::plain(taken));
        }
        spawn(&self.keeper(Beginning::Run, spec, place))
    }

    fn find_foreign(&self, what: &str) -> std::result::Result<Foreign, Vec<Refusal>> {
        adopt::survey(&self.tools, what)
    }

    fn awaits_start(&self, what: &str) -> bool {
        adopt::awaits_start(&self.tools, what)
    }

    fn adopt(&self, spec: &Value, place: &Place) -> Result<()> {
        spawn(&self.keeper(Beginning::Adopt, spec, place))
    }

    fn let_go(&self, place: &Place) -> Result<()> {
        KeeperClient::connect(place)?.let_go()
    }

    fn source(&self, spec: &Value, place: &Place) -> Result<Box<dyn SourceWorkload>> {
        let source: Box<dyn SourceWorkload> =
            Box::new(self.leaving(spec, place, &self.tools.methods)?);
        let compares = matches!(source.liveness(), Liveness::Tracked { tracker }
            if tracker == TrackerChoice::PageHash.word());
        Ok(if compares { Box::new(Comparing::new(source)) } else { source })
    }

    /// Without a tracker shared memory stays in CRIU's images, where other tools look for it too.
    fn source_for_file(&self, spec: &Value, place: &Place) -> Result<Box<dyn SourceWorkload>> {
        let methods = Methods {
            tracker: TrackerChoice::None,
            // Each process has its own file in an archive.
            forked: ForkedChoice::Each,
            ..self.tools.methods
        };
        Ok(Box::new(self.leaving(spec, place, &methods)?))
    }

    fn preflight(&self, manifest: &Manifest, trees: &[PlacedTree]) -> Vec<Refusal> {
        preflight::for_move(&self.tools, manifest, trees)
    }

    fn respec(&self, manifest: &Manifest, trees: &[PlacedTree]) -> Result<Value> {
        let spec: Value = serde_json::from_slice(&manifest.spec)
            .map_err(|error| WorkloadError::new("Cannot read the manifest's spec", error))?;
        let mut spec = ContainerSpec { adopted: None, ..ContainerSpec::from_json(&spec)? };
        let (volumes, bundles): (Vec<_>, Vec<_>) =
            trees.iter().partition(|placed| placed.tree.role().is_volume());
        let [bundle] = bundles[..] else {
            return Err(WorkloadError::plain(format!(
                "A container has one bundle, not {}",
                trees.len() - volumes.len()
            )));
        };
        spec.bundle = bundle.path.clone();
        if let Some(net) = spec.net.as_mut().filter(|_| spec.podman.is_none()) {
            net.bridge = need::mapped(&net.bridge, &self.tools.bridges).to_owned();
        }
        spec.volumes = volumes::placed(&spec.volumes, trees)?;
        if let Some(made) = &mut spec.podman {
            spec.adopted = Some(manifest.name.clone());
            podman::volumes::note_shared(&mut made.volumes, &spec.volumes, trees);
        }
        serde_json::to_value(spec)
            .map_err(|error| WorkloadError::new("Cannot write the spec", error))
    }

    fn prepare(
        &self,
        manifest: &Manifest,
        spec: &Value,
        place: &Place,
    ) -> Result<Box<dyn DestinationWorkload>> {
        let needs: Needs = serde_json::from_slice(&manifest.needs)
            .map_err(|error| WorkloadError::new("Cannot read the manifest's needs", error))?;
        write_config(&oci_directory(place), "original.json", needs.config.as_bytes())?;
        let begun = spawn(&self.keeper(Beginning::Incoming, spec, place))
            .and_then(|()| KeeperClient::connect(place));
        match begun {
            Ok(client) => {
                let most = most(manifest.memory_bytes, &needs);
                Ok(Box::new(KeeperDestination::growing_to(client, most)))
            }
            Err(error) => {
                let _ = fs::remove_dir_all(oci_directory(place));
                Err(error)
            }
        }
    }

    fn pack_refusals(&self, manifest: &Manifest) -> Vec<Refusal> {
        archive::refusals(manifest)
    }

    fn pack(&self, frozen: Frozen) -> decamp_shared::archive::Result<Vec<Parcel>> {
        archive::pack(frozen)
    }

    fn advice_for_file(&self, file: &Path) -> Option<String> {
        Some(archive::advice(file))
    }

    fn unpack(
        &self,
        manifest: &Manifest,
        trees: &[PlacedTree],
    ) -> decamp_shared::archive::Result<Box<dyn Unpacking>> {
        let spec: Value = serde_json::from_slice(&manifest.spec)
            .map_err(|error| WorkloadError::new("Cannot read the checkpoint's spec", error))?;
        if ContainerSpec::from_json(&spec).map_err(WorkloadError::from)?.podman.is_some() {
            let text = "The checkpoint is of a container of podman's, which no version writes";
            return Err(WorkloadError::plain(text).into());
        }
        Ok(Box::new(ContainerUnpacking::new(manifest, trees)?))
    }

    fn wants_of_foreign(&self, part: &str) -> bool {
        archive::wants(part)
    }

    fn describe_foreign(
        &self,
        found: &ForeignArchive,
        name: Option<&str>,
    ) -> decamp_shared::archive::Result<Described> {
        archive::describe(found, name)
    }

    fn unpack_foreign(
        &self,
        manifest: &Manifest,
        trees: &[PlacedTree],
        found: &ForeignArchive,
    ) -> decamp_shared::archive::Result<Box<dyn Unpacking>> {
        Ok(Box::new(ForeignUnpacking::new(manifest, trees, found)?))
    }

    fn stop(&self, _: &Value, place: &Place, grace: Option<Duration>) -> Result<()> {
        let (grace, mut keeper) = (grace.unwrap_or(GRACE), KeeperClient::connect(place)?);
        keeper.answer_within(Some(grace.saturating_add(ANSWER_WITHIN)))?;
        keeper.stop(grace)
    }

    fn sweep(&self, _: &Value, place: &Place) -> Result<()> {
        end_left(place)?;
        // Interface first, as ever: what is killed next shall not say goodbye to its peers.
        delete_link(&veth_name(place));
        claim::sweep(&self.tools, place)?;
        for left in ["oci", "store"] {
            let path = place.dir.join(left);
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(
                        ContainerError::io(format!("remove {}", path.display()))(error).into()
                    );
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// What the container in `place` needs of the network: the segment that it answers on itself.
fn network_need(net: &Net, place: &Place) -> Result<NetworkNeed> {
    let itself = Neighbour { address: net.address()?.0.into(), mac: net.mac_of(&place.uuid) };
    Ok(need::need(&net.bridge, &veth_name(place), None, [itself]))
}

/// Bytes of memory that may come of a container that needs this, and says that it has `memory_bytes`.
fn most(memory_bytes: u64, needs: &Needs) -> u64 {
    let announced = memory_bytes.max(needs.resident);
    let announced = announced.saturating_add(needs.on_tmpfs).saturating_add(needs.shared_huge);
    // Twice, and some: what runs may grow while it is copied.
    announced.saturating_mul(2).saturating_add(GROWTH)
}

/// Where a container's files go on the next host, where that is not where they stand here.
fn place_of(spec: &ContainerSpec) -> String {
    spec.podman
        .as_ref()
        .map_or(String::new(), |made| found::place_of(&made.name).display().to_string())
}

/// What of the host is mounted from outside of the bundle of `spec`, whose configuration is `config`.
fn volumes_of(spec: &ContainerSpec, config: &[u8]) -> crate::error::Result<Found> {
    let bundle = Bundle::parse(&spec.bundle, config)?;
    Ok(volumes::found(&bundle.with_volumes(&spec.volumes)))
}

/// The trees of this host that are mounted into a container of `spec` from outside of its bundle; none
/// for a bundle that cannot be read.
pub fn volume_trees(spec: &Value) -> Vec<FileTree> {
    let read = || {
        let spec = ContainerSpec::from_json(spec)?;
        let bundle = Bundle::read(&spec.bundle)?;
        Ok::<_, ContainerError>(volumes::found(&bundle.with_volumes(&spec.volumes)).trees)
    };
    read().unwrap_or_default()
}

/// Bytes of the files below `directory`; what cannot be read is not counted.
fn bytes_below(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => bytes_below(&entry.path()),
            Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |metadata| metadata.len()),
            _ => 0,
        })
        .sum()
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|error| WorkloadError::new("Cannot write the manifest", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_come_is_what_was_announced_twice_and_some() {
        let told = r#"{"config": "", "resident": 1000, "criu": [4, 2], "obstacles": []}"#;
        let needs: Needs = serde_json::from_str(told).expect("of an older source");
        assert_eq!(most(500, &needs), 2000 + GROWTH);
        // What processes share in huge pages comes once, and is in nothing else that is announced.
        let needs = Needs { shared_huge: 64, on_tmpfs: 36, ..needs };
        assert_eq!(most(500, &needs), 2200 + GROWTH);
        assert_eq!(most(2000, &needs), 4200 + GROWTH);
        assert_eq!(most(u64::MAX, &needs), u64::MAX);
    }
}
