//! How a container comes to be under its keeper: started by the runtime, or as an empty shell that a
//! session fills. What happens to it afterwards is in `kept`.

use std::fs;
use std::path::Path;
use std::time::Instant;

use decamp_shared::keeper::{Beginning, ExitSignal, KeeperConfig};
use decamp_shared::workload::Place;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::bundle::Bundle;
use crate::cgroup::{Cgroups, cgroups_path};
use crate::claim::{self, Claim};
use crate::dump::ms;
use crate::error::{ContainerError, Result};
use crate::filling::Holder;
use crate::forked::leaving::Forked;
use crate::init::Init;
use crate::kept::Container;
use crate::network::{self, Network};
use crate::owned::{Planned, Settings};
use crate::podman::arrival::Arrival;
use crate::restore::{Shell, oci_directory};
use crate::runtime::Runtime;
use crate::segments::found::Segments;
use crate::segments::landing::Landing;
use crate::spec::{ContainerSpec, veth_name};
use crate::store::Store;
use crate::streams::Streams;
use crate::terminal::{ConsoleSocket, Terminal};
use crate::warm::Warm;
use crate::ways;

impl Container {
    /// Starts the container of `config`, or builds its empty shell, as `config` says.
    ///
    /// # Errors
    /// When any part cannot be made; what was made until then is taken away again.
    pub fn begin(config: &KeeperConfig, exit: &ExitSignal) -> Result<Self> {
        match config.beginning {
            Beginning::Run => Self::run(config, exit),
            Beginning::Incoming => Self::incoming(config, exit),
            Beginning::Adopt => Self::adopt(config, exit),
        }
    }

    fn run(config: &KeeperConfig, exit: &ExitSignal) -> Result<Self> {
        let spec = ContainerSpec::from_json(&config.spec)?;
        let place = &config.place;
        let bundle = Bundle::read(&spec.bundle)?.with_volumes(&spec.volumes);
        let bundle = if spec.tty { bundle.with_terminal() } else { bundle };
        let mut undo =
            Undo { config, claim: Some(Claim::take(&config.tools, place, spec.kind()?)?) };
        let directory = oci_directory(place);
        write_config(&directory, "original.json", &bundle.config_text())?;
        let made = |namespace| {
            Network::within(namespace, interface(&spec, place), &veth_name(place), true)
        };
        let before = match bundle.mapped_root() {
            None => Some(made(network::fresh_namespace()?)?),
            Some(_) => None,
        };
        let cgroups_path = cgroups_path(place)?;
        let path = before.as_ref().map(Network::path).unwrap_or_default();
        let patched = bundle.for_runtime(&path, &cgroups_path).to_string();
        write_config(&directory, "config.json", patched.as_bytes())?;
        let streams = Streams::open(&place.log())?;
        let store = Store::mount(&place.dir.join("store"))?;
        let runtime = undo.runtime()?;
        let begun = Instant::now();
        let console = bundle.wants_terminal().then(|| ConsoleSocket::listen(&place.dir));
        let console = console.transpose()?;
        let path = console.as_ref().map(ConsoleSocket::path);
        let output = streams.write_end()?;
        let (init, network) = match before {
            Some(network) => (runtime.run(&directory, output, path)?, network),
            None => {
                let init = runtime.create(&directory, output, path)?;
                let network = made(network::namespace_of(init)?)?;
                runtime.start(&directory)?;
                (init, network)
            }
        };
        let init = Init::watch(init, exit)?;
        let keep = |master| Terminal::keep(master, place);
        let terminal = console.map(|console| console.master().and_then(keep)).transpose()?;
        let cgroups = runtime.cgroups(&runtime.state()?, init.pid())?;
        undo.claim = None;
        tracing::debug!(ms = ms(begun), pid = init.pid(), "The runtime started the container");
        let mut container =
            Self::of(config, exit, bundle, runtime, network, streams, store, cgroups);
        container.terminal = terminal;
        Ok(container.with_init(init))
    }

    fn incoming(config: &KeeperConfig, exit: &ExitSignal) -> Result<Self> {
        // Two descriptors for each process of the container while its memory comes. What the runtime
        // starts here is the stand-in alone.
        if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
        }
        let spec = ContainerSpec::from_json(&config.spec)?;
        let place = &config.place;
        let path = oci_directory(place).join("original.json");
        let text =
            fs::read(&path).map_err(ContainerError::io(format!("read {}", path.display())))?;
        let bundle = Bundle::parse(&spec.bundle, &text)?.with_volumes(&spec.volumes);
        let mut undo =
            Undo { config, claim: Some(Claim::take(&config.tools, place, spec.kind()?)?) };
        let arrival = spec
            .podman
            .as_ref()
            .map(|made| Arrival::make(&config.tools, place, &spec, made, &bundle));
        let arrival = arrival.transpose()?;
        if let Some(arrival) = &arrival {
            let cgroups = Cgroups::at(arrival.cgroups_path())?;
            claim::note_arriving(place, spec.kind()?, arrival.noted(cgroups))?;
        }
        // podman makes that of its own; and so does who has a user namespace, when it is there.
        let now = arrival.is_none() && bundle.mapped_root().is_none();
        let at_once = interface(&spec, place).filter(|_| now);
        let network = Network::make(at_once, &veth_name(place), false)?;
        let streams = Streams::open(&place.log())?;
        let mut store = Store::mount(&place.dir.join("store"))?;
        if bundle.mapped_root().is_some() {
            store.open_to_others()?;
        }
        let (runtime, cgroups_path) = match &arrival {
            None => (undo.runtime()?, cgroups_path(place)?),
            Some(arrival) => (
                Runtime::new(spec.kind()?, &config.tools, arrival.id()),
                arrival.cgroups_path().to_owned(),
            ),
        };
        let shell = Shell::make(&runtime, &bundle, &network, &cgroups_path, &streams, &store)?;
        let mut container =
            Self::of(config, exit, bundle, runtime, network, streams, store, shell.cgroups);
        container.stand_in = Some(shell.stand_in);
        container.warm = Some(Warm::keep(&config.tools.criu));
        if container.bundle.mapped_root().is_some() {
            let net = interface(&spec, place).map(|(net, mac)| (net.clone(), mac));
            let settings = Settings::of(&container.bundle)?;
            container.planned = Some(Planned { net, outside: veth_name(place), settings });
        }
        match ways::late(&container.methods, container.bundle.mapped_root().is_some()) {
            Ok(()) => container.holder = Some(Holder::start()?),
            Err(reason) => {
                tracing::warn!(reason, "Memory is restored before it runs");
                container.eager = Some(reason);
            }
        }
        if let Some(arrival) = arrival {
            let arriving = arrival.noted(container.cgroups.clone());
            container.arrival = Some(arrival);
            undo.claim = None;
            claim::note_arriving(place, spec.kind()?, arriving)?;
            return Ok(container);
        }
        // It is in the cgroups, and so nobody else takes them for free.
        container.criu = Some(container.restoring().begin()?);
        undo.claim = None;
        Ok(container)
    }

    #[allow(clippy::too_many_arguments)]
    pub(crate) fn of(
        config: &KeeperConfig,
        exit: &ExitSignal,
        bundle: Bundle,
        runtime: Runtime,
        network: Network,
        streams: Streams,
        store: Store,
        cgroups: Cgroups,
    ) -> Self {
        let methods = config.tools.methods;
        // Before it has processes. It is asked again when it is to leave.
        let hiding = ways::hiding(&methods, false);
        if let Err(reason) = &hiding {
            tracing::warn!(reason, "CRIU will dump all memory by itself");
        }
        Self {
            config: config.clone(),
            exit: exit.clone(),
            bundle,
            runtime,
            network,
            planned: None,
            streams,
            terminal: None,
            foreign: None,
            arrival: None,
            settling: None,
            store,
            cgroups,
            stand_in: None,
            criu: None,
            holder: None,
            filling: None,
            init: None,
            methods,
            hiding,
            eager: None,
            arrived: None,
            known: Vec::new(),
            segments: Segments::default(),
            landing: Landing::default(),
            tracker: None,
            forked: Forked::default(),
            throttle: None,
            paused: None,
            warm: None,
            over: false,
        }
    }

    pub(crate) fn with_init(mut self, init: Init) -> Self {
        self.init = Some(init);
        self
    }
}

/// Takes away what a runtime has made under a name that was claimed, when a step fails before there
/// is a [`Container`], which does so itself from then on.
struct Undo<'a> {
    config: &'a KeeperConfig,
    claim: Option<Claim>,
}

impl Undo<'_> {
    fn runtime(&self) -> Result<Runtime> {
        let gone = || ContainerError::State("The container's name is not claimed".to_owned());
        self.claim.as_ref().map(|claim| claim.runtime().clone()).ok_or_else(gone)
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if self.claim.is_some()
            && let Err(error) = claim::sweep(&self.config.tools, &self.config.place)
        {
            tracing::error!(%error, "Cannot take a half made container away");
        }
    }
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
