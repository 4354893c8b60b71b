//! A container as its keeper holds it.
//!
//! Here the parts come together: the runtime starts a container, pause and resume freeze and thaw
//! it and its interface, save and load have CRIU dump and restore. How each of these is done is the
//! parts' own business. Here is what a container has, and what is known of it while it stands still;
//! what its keeper is asked to do is in `asked`, each deed in a file of its own.

mod asked;
mod ending;
mod facts;
mod freezing;
mod restoring;
mod saving;

use std::thread::JoinHandle;

use decamp_shared::keeper::{ExitSignal, KeeperConfig};
use decamp_shared::methods::{Methods, Ways};

use crate::bundle::Bundle;
use crate::cgroup::Cgroups;
use crate::dump::Dumping;
use crate::error::{ContainerError, Result};
use crate::filling::{Filling, Holder};
use crate::foreign::Foreign;
use crate::forked::leaving::Forked;
use crate::hiding::HiddenRanges;
use crate::init::Init;
use crate::looking::Looking;
use crate::memory::{self, HiddenProcess, Process};
use crate::mounts::ExternalMount;
use crate::network::Network;
use crate::owned::Planned;
use crate::podman::arrival::Arrival;
use crate::restore::StandIn;
use crate::runtime::Runtime;
use crate::segments::found::Segments;
use crate::segments::landing::Landing;
use crate::store::Store;
use crate::streams::Streams;
use crate::swrk::Swrk;
use crate::terminal::Terminal;
use crate::throttle::Throttle;
use crate::tmpfs::Tree;
use crate::tracker::Tracker;
use crate::warm::Warm;
use crate::ways::Hiding;

/// A container and all that it has on this host. When it is dropped, nothing of it is left.
pub struct Container {
    pub(crate) config: KeeperConfig,
    pub(crate) exit: ExitSignal,
    pub(crate) bundle: Bundle,
    pub(crate) runtime: Runtime,
    pub(crate) network: Network,
    /// The network that it is to have in a user namespace of its own, once it is restored.
    pub(crate) planned: Option<Planned>,
    pub(crate) streams: Streams,
    /// Its terminal, where it has one and we hold it.
    pub(crate) terminal: Option<Terminal>,
    /// Set while it is one that somebody else started.
    pub(crate) foreign: Option<Foreign>,
    /// Set while it comes to podman.
    pub(crate) arrival: Option<Arrival>,
    /// What goes on until it is podman's alone, once it runs.
    pub(crate) settling: Option<JoinHandle<()>>,
    pub(crate) store: Store,
    pub(crate) cgroups: Cgroups,
    /// What is left of the stand-in, until the real container has taken its place.
    pub(crate) stand_in: Option<StandIn>,
    /// A CRIU that waits in the container's cgroups to restore it.
    pub(crate) criu: Option<Swrk>,
    /// Ready to hold the descriptors behind memory that comes late, where it can.
    pub(crate) holder: Option<Holder>,
    /// Memory that comes late.
    pub(crate) filling: Option<Filling>,
    /// Nothing before a restore.
    pub(crate) init: Option<Init>,
    /// Which ways the host's configuration allows.
    pub(crate) methods: Methods,
    /// How its memory is hidden from CRIU when it leaves.
    pub(crate) hiding: Hiding,
    /// Why all memory is restored before it runs, when it is.
    pub(crate) eager: Option<String>,
    /// How it was restored, until it runs here.
    pub(crate) arrived: Option<Ways>,
    /// Its processes, as they were when its spaces were last asked for.
    pub(crate) known: Vec<Process>,
    /// Its shared memory, as it was when its spaces were last asked for and it ran.
    pub(crate) segments: Segments,
    /// Shared memory that comes.
    pub(crate) landing: Landing,
    /// While dirty pages are tracked.
    pub(crate) tracker: Option<Box<dyn Tracker>>,
    /// What its processes still share since a fork, while it is moved away.
    pub(crate) forked: Forked,
    pub(crate) throttle: Option<Throttle>,
    pub(crate) paused: Option<Pause>,
    /// While it is moved.
    pub(crate) warm: Option<Warm>,
    pub(crate) over: bool,
}

/// What is known of a tree while it stands still.
#[derive(Default)]
pub(crate) struct Pause {
    /// What CRIU shall not see of processes.
    ranges: HiddenRanges,
    /// The look for pages, until they are found.
    looking: Option<Looking>,
    hidden: Option<Vec<HiddenProcess>>,
    harvested: bool,
    mounts: Vec<ExternalMount>,
    /// What is on tmpfs mounts that CRIU takes as given.
    trees: Vec<Tree>,
    dumping: Option<Dumping>,
}

impl Container {
    fn init(&self) -> Result<&Init> {
        self.init
            .as_ref()
            .ok_or_else(|| ContainerError::State("The container has no process yet".to_owned()))
    }

    fn processes(&self) -> Result<Vec<Process>> {
        memory::processes(&self.cgroups.processes()?, self.init()?.pid())
    }
}

fn not_paused() -> ContainerError {
    ContainerError::State("The container is not paused".to_owned())
}
