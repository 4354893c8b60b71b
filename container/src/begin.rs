//! How a container comes to be under its keeper: started by the runtime, or as an empty shell that a
//! session fills. What happens to it afterwards is in `kept`.

use std::fs;
use std::path::Path;
use std::time::Instant;

use decamp_shared::keeper::{Beginning, ExitSignal, KeeperConfig};
use decamp_shared::workload::Place;

use crate::bundle::Bundle;
use crate::cgroup::{Cgroups, cgroups_path};
use crate::dump::ms;
use crate::error::{ContainerError, Result};
use crate::hiding;
use crate::init::Init;
use crate::kept::Container;
use crate::network::Network;
use crate::restore::{Shell, oci_directory};
use crate::runtime::{self, Runtime};
use crate::spec::{ContainerSpec, runtime_id, veth_name};
use crate::store::Store;
use crate::streams::Streams;

impl Container {
    /// Starts the container of `config`, or builds its empty shell, as `config` says.
    ///
    /// # Errors
    /// When any part cannot be made; what was made until then is taken away again.
    pub fn begin(config: &KeeperConfig, exit: &ExitSignal) -> Result<Self> {
        match config.beginning {
            Beginning::Run => Self::run(config, exit),
            Beginning::Incoming => Self::incoming(config, exit),
        }
    }

    fn run(config: &KeeperConfig, exit: &ExitSignal) -> Result<Self> {
        let spec = ContainerSpec::from_json(&config.spec)?;
        let place = &config.place;
        let bundle = Bundle::read(&spec.bundle)?;
        let runtime = fresh_runtime(config)?;
        let directory = oci_directory(place);
        write_config(&directory, "original.json", &bundle.config_text())?;
        let network = Network::make(interface(&spec, place), &veth_name(place), true)?;
        let cgroups_path = cgroups_path(place)?;
        let patched = bundle.for_runtime(&network.path(), &cgroups_path).to_string();
        write_config(&directory, "config.json", patched.as_bytes())?;
        let streams = Streams::open(&place.log())?;
        let store = Store::mount(&place.dir.join("store"))?;
        let begun = Instant::now();
        let started = runtime.run(&directory, streams.write_end()?);
        let mut undo = Undo { place, runtime: Some(&runtime) };
        let init = Init::watch(started?, exit)?;
        let cgroups = runtime::cgroups(&runtime.state()?)?;
        undo.runtime = None;
        tracing::debug!(ms = ms(begun), pid = init.pid(), "The runtime started the container");
        Ok(Self::of(config, exit, spec, bundle, runtime.clone(), network, streams, store, cgroups)
            .with_init(init))
    }

    fn incoming(config: &KeeperConfig, exit: &ExitSignal) -> Result<Self> {
        let spec = ContainerSpec::from_json(&config.spec)?;
        let place = &config.place;
        let path = oci_directory(place).join("original.json");
        let text =
            fs::read(&path).map_err(ContainerError::io(format!("read {}", path.display())))?;
        let bundle = Bundle::parse(&spec.bundle, &text)?;
        let runtime = fresh_runtime(config)?;
        let network = Network::make(interface(&spec, place), &veth_name(place), false)?;
        let streams = Streams::open(&place.log())?;
        let store = Store::mount(&place.dir.join("store"))?;
        let cgroups_path = cgroups_path(place)?;
        let mut undo = Undo { place, runtime: Some(&runtime) };
        let shell = Shell::make(&runtime, &bundle, &network, &cgroups_path, &streams, &store)?;
        undo.runtime = None;
        let mut container = Self::of(
            config,
            exit,
            spec,
            bundle,
            runtime.clone(),
            network,
            streams,
            store,
            shell.cgroups,
        );
        container.stand_in = Some(shell.state);
        container.criu = Some(container.restoring().begin()?);
        Ok(container)
    }

    #[allow(clippy::too_many_arguments)]
    fn of(
        config: &KeeperConfig,
        exit: &ExitSignal,
        spec: ContainerSpec,
        bundle: Bundle,
        runtime: Runtime,
        network: Network,
        streams: Streams,
        store: Store,
        cgroups: Cgroups,
    ) -> Self {
        let unhidden = hiding::probe().err();
        if let Some(reason) = &unhidden {
            tracing::warn!(reason, "CRIU will dump all memory by itself");
        }
        Self {
            config: config.clone(),
            exit: exit.clone(),
            spec,
            bundle,
            runtime,
            network,
            streams,
            store,
            cgroups,
            stand_in: None,
            criu: None,
            init: None,
            unhidden,
            paused: None,
            over: false,
        }
    }

    fn with_init(mut self, init: Init) -> Self {
        self.init = Some(init);
        self
    }
}

/// Takes away what a runtime has made, when the next step fails before a [`Container`] exists.
struct Undo<'a> {
    place: &'a Place,
    runtime: Option<&'a Runtime>,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        let Some(runtime) = self.runtime else { return };
        let undone = Cgroups::of_place(self.place).and_then(|cgroups| cgroups.sweep());
        if let Err(error) = undone.and_then(|()| runtime.forget()) {
            tracing::error!(%error, "Cannot take a half made container away");
        }
    }
}

/// The runtime for a container that does not exist yet.
fn fresh_runtime(config: &KeeperConfig) -> Result<Runtime> {
    let runtime = Runtime::new(&config.tools.runc, runtime_id(&config.place)?);
    if runtime.exists() {
        return Err(ContainerError::State(format!(
            "runc has a container {} already",
            config.place.name
        )));
    }
    Ok(runtime)
}

fn interface<'a>(
    spec: &'a ContainerSpec,
    place: &Place,
) -> Option<(&'a crate::spec::Net, crate::spec::Mac)> {
    spec.net.as_ref().map(|net| (net, net.mac_of(&place.uuid)))
}

/// Writes a configuration where the runtime, the next session or the next keeper looks for it.
pub(crate) fn write_config(directory: &Path, name: &str, text: &[u8]) -> Result<()> {
    fs::create_dir_all(directory)
        .map_err(ContainerError::io(format!("make {}", directory.display())))?;
    let path = directory.join(name);
    fs::write(&path, text).map_err(ContainerError::io(format!("write {}", path.display())))
}
