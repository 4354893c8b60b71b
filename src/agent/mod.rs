//! The agent: the daemon of a host. It starts keepers and finds them again, moves workloads and takes
//! them in, and answers the CLI. What must not die with it is in the keepers; what must not be
//! forgotten is in the registry and in the session journal.
//!
//! [`api`] and [`peers`] are its two doors; [`workloads`], [`moves`], [`checkpoints`] and
//! [`restores`] (with [`awakening`]) do what is asked at the first, [`consoles`] lets clients at consoles, [`cpu`] asks other hosts for theirs, [`hooked`] what runtimes' hooks ask,
//! [`host`] answers at the second; [`supervise`] and [`recovery`] make sense of what a restart left, the
//! former with [`fenced`], the latter with [`departures`] and [`arrivals`].

mod adoption;
mod answer;
mod api;
mod arrivals;
mod awakening;
mod checkpoints;
mod claims;
pub(crate) mod config;
mod consoles;
mod cpu;
mod departures;
mod fenced;
mod hooked;
mod host;
mod leftovers;
mod logs;
mod moves;
mod peers;
mod recovery;
mod registry;
mod restores;
mod state_dir;
mod supervise;
mod systemd;
#[cfg(test)]
mod testing;
mod workloads;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use decamp_shared::session::DestinationSessions;
use decamp_shared::session::journal::{Journal, JournalError};
use decamp_shared::transport::{Acceptor, Dialer, Identity, TransportError, Versions};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::backend::Backends;
use crate::messages::HostView;
use answer::Answer;
use api::ApiError;
use arrivals::Recovering;
use claims::Claims;
use config::{Config, PageEncryption};
use departures::OpenMoves;
use hooked::Awaited;
use host::ArrivalHost;
use moves::Moves;
use registry::{Registry, RegistryError};
use state_dir::{StateDir, StateDirError};

/// How long moves may take to roll back when the agent is told to end.
const ROLL_BACK_WITHIN: Duration = Duration::from_secs(10);
/// How long threads may take after that: those that write to the disk are done by then, those that wait
/// for a keeper may wait for minutes, and the next agent asks it again.
const THREADS_WITHIN: Duration = Duration::from_secs(3);

/// Why an agent does not start, or ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// State directory.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// Registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Certificates.
    #[error("Cannot use this host's certificate")]
    Identity(#[source] TransportError),
    /// The certificate is another host's.
    #[error(
        "The certificate {certificate} is for {found}, but this host is configured as {name}: other \
         hosts would not believe it. Issue one with `decamp pki issue DIR {name}`"
    )]
    Name { certificate: String, found: String, name: String },
    /// The local socket.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The port for other hosts.
    #[error("Cannot listen on {address} for other hosts")]
    Listen { address: SocketAddr, source: io::Error },
    /// What an earlier agent left could not be made sense of.
    #[error("Cannot take over what an earlier agent left")]
    TakeOver(#[source] Answer),
    /// The operating system.
    #[error("Cannot {what}")]
    System { what: &'static str, source: io::Error },
}

/// All that the agent's rooms share.
pub(crate) struct Agent {
    pub(crate) config: Config,
    pub(crate) state_dir: StateDir,
    pub(crate) registry: Registry,
    pub(crate) journal: Arc<Journal>,
    pub(crate) backends: Backends,
    pub(crate) dialer: Dialer,
    pub(crate) claims: Claims,
    /// Whose keeper is just asked how it is.
    pub(crate) asking: Claims,
    pub(crate) moves: Moves,
    pub(crate) open_moves: OpenMoves,
    pub(crate) recovering: Recovering,
    /// Held while an arrival is entered.
    pub(crate) entering: Mutex<()>,
    /// How many checkpoints are being written.
    pub(crate) writing: watch::Sender<u32>,
    pub(crate) awaited: Awaited,
    stopping: CancellationToken,
}

/// Runs the agent until it is told to end.
///
/// # Errors
/// When it cannot start, or one of its doors fails.
pub(crate) fn run(config: Config) -> Result<(), AgentError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| AgentError::System { what: "start threads", source })?;
    let ended = runtime.block_on(live(config));
    runtime.shutdown_timeout(THREADS_WITHIN);
    ended
}

async fn live(config: Config) -> Result<(), AgentError> {
    let (agent, acceptor) = Agent::open(config)?;
    let address = agent.config.listen;
    let peers = TcpListener::bind(address)
        .await
        .map_err(|source| AgentError::Listen { address, source })?;
    let socket = api::listen(&agent.config.socket)?;
    let host = Arc::new(ArrivalHost::new(Arc::clone(&agent)));
    let sessions = DestinationSessions::new(host, Arc::clone(&agent.journal));
    recovery::at_start(&agent).await.map_err(AgentError::TakeOver)?;
    supervise::adopt(&agent).await.map_err(AgentError::TakeOver)?;
    tracing::info!(
        host = agent.config.name,
        listen = %address,
        socket = %agent.config.socket.display(),
        "decamp {} serves",
        env!("CARGO_PKG_VERSION")
    );
    let mut doors = JoinSet::new();
    doors.spawn(supervise::watch(Arc::clone(&agent)));
    doors.spawn(leftovers::watch(Arc::clone(&agent)));
    doors.spawn(peers::serve(peers, acceptor, sessions));
    systemd::notify("READY=1");
    let ended = serve_until_told(&agent, socket).await;
    systemd::notify("STOPPING=1");
    agent.stopping.cancel();
    tokio::join!(
        agent.moves.end_all(ROLL_BACK_WITHIN),
        checkpoints::end_all(&agent, ROLL_BACK_WITHIN)
    );
    // A client that connects now shall hear that nobody is there.
    let _ = std::fs::remove_file(&agent.config.socket);
    doors.shutdown().await;
    ended
}

async fn serve_until_told(agent: &Arc<Agent>, socket: UnixListener) -> Result<(), AgentError> {
    let told = |kind| {
        signal(kind).map_err(|source| AgentError::System { what: "wait for signals", source })
    };
    let (mut terminate, mut interrupt) =
        (told(SignalKind::terminate())?, told(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => tracing::info!("Told to end; workloads live on"),
        _ = interrupt.recv() => tracing::info!("Interrupted; workloads live on"),
        served = api::serve(socket, Arc::clone(agent)) => {
            served.map_err(|source| AgentError::System { what: "serve the local socket", source })?;
        }
    }
    Ok(())
}

impl Agent {
    fn open(config: Config) -> Result<(Arc<Self>, Acceptor), AgentError> {
        // Connections, memory of workloads that come, and the looks at keepers all take descriptors.
        decamp_shared::keeper::allow_many_files();
        let state_dir = StateDir::own(&config.state_dir)?;
        let identity = Identity::load(&config.ca, &config.certificate, &config.key)
            .map_err(AgentError::Identity)?;
        if identity.name() != config.name {
            return Err(AgentError::Name {
                certificate: config.certificate.display().to_string(),
                found: identity.name().to_owned(),
                name: config.name,
            });
        }
        let registry = Registry::open(&state_dir.registry())?;
        let journal = Arc::new(Journal::open(&state_dir.journal())?);
        let decamp = std::env::current_exe()
            .map_err(|source| AgentError::System { what: "find this executable", source })?;
        let backends = Backends::new(&config.tools(decamp));
        let agent = Agent {
            config,
            state_dir,
            registry,
            journal,
            backends,
            dialer: Dialer::new(identity.clone(), Versions::OURS),
            claims: Claims::default(),
            asking: Claims::default(),
            moves: Moves::default(),
            open_moves: OpenMoves::default(),
            recovering: Recovering::default(),
            entering: Mutex::default(),
            writing: watch::Sender::new(0),
            awaited: Awaited::default(),
            stopping: CancellationToken::new(),
        };
        Ok((Arc::new(agent), Acceptor::new(identity, Versions::OURS)))
    }

    /// Cancelled when the agent is told to end.
    pub(crate) fn stopping(&self) -> &CancellationToken {
        &self.stopping
    }

    /// Whether the agent is ending.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.is_cancelled()
    }

    fn host_view(&self) -> HostView {
        HostView {
            name: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            listen: self.config.listen.to_string(),
            state_dir: self.config.state_dir.clone(),
            page_encryption: self.config.page_encryption == PageEncryption::On,
            hosts: self.config.hosts.clone(),
        }
    }
}
