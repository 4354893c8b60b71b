//! The agent's side of containers.

use std::fs;
use std::path::Path;
use std::time::Duration;

use decamp_shared::keeper::ends::{KeeperDestination, KeeperSource};
use decamp_shared::keeper::{Beginning, KeeperClient, KeeperConfig, spawn};
use decamp_shared::workload::{
    Backend, DestinationWorkload, FileRole, FileTree, HostTools, Kind, Manifest, NetworkNeed,
    Place, PlacedTree, Refusal, Result, SourceWorkload, WorkloadError,
};
use serde_json::Value;

use crate::begin::write_config;
use crate::cgroup::Cgroups;
use crate::error::ContainerError;
use crate::facts::{Facts, Needs};
use crate::network::delete_link;
use crate::preflight;
use crate::reader::ProcessReader;
use crate::restore::oci_directory;
use crate::runtime::Runtime;
use crate::spec::{ContainerSpec, runtime_id, veth_name};
use crate::swrk;

/// A stopped container has this long to end by itself.
const GRACE: Duration = Duration::from_secs(10);
/// Memory that a container without a limit may grow by while it is moved.
const HEADROOM: u64 = 64 << 20;

/// Containers by runc and CRIU.
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
        let needs = Needs {
            config,
            resident: facts.resident,
            criu: swrk::version(&self.tools.criu)?,
            obstacles: facts.obstacles,
        };
        let bundle = FileTree {
            id: 0,
            role: FileRole::Bundle.into(),
            path: spec.bundle.display().to_string(),
            bytes: bytes_below(&spec.bundle),
            live: true,
        };
        let bridge = spec.net.iter().map(|net| NetworkNeed { bridge: net.bridge.clone() });
        Ok(Manifest {
            name: place.name.clone(),
            uuid: place.uuid.clone(),
            kind: Kind::Container.into(),
            memory_bytes: facts.memory_limit.unwrap_or(facts.resident + HEADROOM),
            spaces: client.spaces()?,
            files: vec![bundle],
            networks: bridge.collect(),
            spec: json(spec)?,
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
        spawn(&self.keeper(Beginning::Run, spec, place))
    }

    fn source(&self, spec: &Value, place: &Place) -> Result<Box<dyn SourceWorkload>> {
        let spec = ContainerSpec::from_json(spec)?;
        let mut client = KeeperClient::connect(place)?;
        let manifest = self.manifest(&mut client, &spec, place)?;
        let source = KeeperSource::new(client, manifest, Box::new(ProcessReader::open))?;
        Ok(Box::new(source))
    }

    fn preflight(&self, manifest: &Manifest, trees: &[PlacedTree]) -> Vec<Refusal> {
        preflight::for_move(&self.tools, manifest, trees)
    }

    fn respec(&self, manifest: &Manifest, trees: &[PlacedTree]) -> Result<Value> {
        let spec: Value = serde_json::from_slice(&manifest.spec)
            .map_err(|error| WorkloadError::new("Cannot read the manifest's spec", error))?;
        let mut spec = ContainerSpec::from_json(&spec)?;
        let [bundle] = trees else {
            return Err(WorkloadError::plain(format!(
                "A container has one bundle, not {}",
                trees.len()
            )));
        };
        spec.bundle = bundle.path.clone();
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
            Ok(client) => Ok(Box::new(KeeperDestination::new(client))),
            Err(error) => {
                let _ = fs::remove_dir_all(oci_directory(place));
                Err(error)
            }
        }
    }

    fn stop(&self, _: &Value, place: &Place) -> Result<()> {
        KeeperClient::connect(place)?.stop(GRACE)
    }

    fn sweep(&self, _: &Value, place: &Place) -> Result<()> {
        // Interface first, as ever: what is killed next shall not say goodbye to its peers.
        delete_link(&veth_name(place));
        Cgroups::of_place(place)?.sweep()?;
        Runtime::new(&self.tools.runc, runtime_id(place)?).forget()?;
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
