//! The steps in which a keeper's container of podman's is unlike others: how it is restored, how it comes to be
//! podman's, and how podman is told that it has left or shall stop.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use decamp_shared::keeper::ExitSignal;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::command::{LONG, run_within};
use super::podman;
use crate::adopt::lock;
use crate::claim::{self, Arriving};
use crate::error::{ContainerError, Result};
use crate::filling::End;
use crate::foreign::{Foreign, ForeignStreams};
use crate::init::Init;
use crate::kept::Container;
use crate::runtime::start_time;
use crate::spec::ContainerSpec;
use crate::swrk::Swrk;
use crate::sys;

/// Memory that comes late is there within this.
const FILLED_WITHIN: Duration = Duration::from_secs(120);
/// `conmon` has had podman clean up after a container within this many milliseconds.
const CLEANED_WITHIN: u16 = 10_000;

/// Has podman start `container` as far as a CRIU that will restore it.
pub(crate) fn criu(container: &mut Container) -> Result<Swrk> {
    let gone = || ContainerError::State("The CRIU that waited was used before".to_owned());
    let spec = ContainerSpec::from_json(&container.config.spec)?;
    let arrival = container.arrival.as_mut().ok_or_else(gone)?;
    let ready = arrival.begin(&spec, &container.bundle)?;
    container.network = ready.network;
    container.streams.are(ready.output, ready.error);
    container.bundle.stand_in(ready.files);
    let restoring = container.restoring();
    let descriptors = restoring.inherited()?;
    let arrival = container.arrival.as_ref().ok_or_else(gone)?;
    let network = container.network.namespace_again()?;
    let namespaces: Vec<_> =
        [Some(network.as_fd()), restoring.cgroup_namespace].into_iter().flatten().collect();
    let criu = arrival.criu(&container.config.tools.criu, &namespaces, &descriptors)?;
    container.cgroups.enter(criu.pid())?;
    Ok(criu)
}

/// The parent of a container that came here, which gets commands from the directory of its arrival until it
/// has cleaned up after the container.
pub(crate) struct Conmon {
    init: OwnedFd,
    process: OwnedFd,
    directory: PathBuf,
}

impl Conmon {
    fn of(init: i32, directory: PathBuf) -> Result<Self> {
        let open = |pid| sys::pidfd_open(pid).map_err(ContainerError::io("watch conmon"));
        Ok(Self { init: open(init)?, process: open(parent(init)?)?, directory })
    }
}

impl Drop for Conmon {
    fn drop(&mut self) {
        let over = |process: &OwnedFd, within: PollTimeout| {
            let mut events = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
            poll(&mut events, within).is_ok_and(|ready| ready > 0)
        };
        // One that runs on is podman's, and so are the commands.
        if over(&self.init, PollTimeout::ZERO) && over(&self.process, CLEANED_WITHIN.into()) {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

fn parent(pid: i32) -> Result<i32> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok());
    parent.ok_or_else(|| ContainerError::malformed(path, "names no parent"))
}

/// Watches the first process of a container, which `conmon` will reap.
pub(crate) fn watch(init: i32, exit: &ExitSignal) -> Result<Init> {
    let process =
        sys::pidfd_open(init).map_err(ContainerError::io(format!("open the process {init}")))?;
    Init::watch_foreign(init, process, exit)
}

/// What waits until podman has noted that a container runs.
type Noted = Box<dyn FnOnce() -> Result<()> + Send>;

/// A container that is about to run, and then becomes one that podman has started: beside it, for it takes
/// podman's time, and its memory may be still to come, without which it cannot be podman's alone.
pub(crate) struct Settling {
    foreign: Foreign,
    go: mpsc::Sender<Noted>,
    thread: JoinHandle<()>,
}

/// Makes all ready for `container` to run, if it came to podman.
///
/// # Errors
/// When any of it cannot be made, or podman has given its start up. Nothing of it has run then.
pub(crate) fn about_to_run(container: &mut Container) -> Result<Option<Settling>> {
    let Some(arrival) = &mut container.arrival else { return Ok(None) };
    arrival.still_starts()?;
    let (place, runtime) = (container.config.place.clone(), container.runtime.clone());
    // From now on what is in its volumes may be newer than anywhere else, and nobody removes it.
    let arriving = Arriving { volumes: Vec::new(), ..arrival.noted(container.cgroups.clone()) };
    claim::note_arriving(&place, runtime.kind(), arriving)?;
    let none = || ContainerError::State("The container has no process".to_owned());
    let init = container.init.as_ref().ok_or_else(none)?.pid();
    let lock = lock(&runtime.directory(), runtime.id())?;
    let streams = ForeignStreams::look(&container.cgroups.processes()?, init)?.unwrap_or_default();
    let started = start_time(init)?;
    let conmon = Some(Conmon::of(init, super::exchanged::directory(&place))?);
    let foreign = Foreign { _lock: lock, streams, init, started, podman: true, _conmon: conmon };
    let mark = foreign.mark(&runtime, &container.cgroups);
    let filled = container.filling.as_ref().map(|filling| filling.end());
    let settle = move |noted: Noted| -> Result<()> {
        let conmon =
            parent(init).and_then(|conmon| super::leftover::note_conmon(runtime.id(), conmon));
        if let Err(error) = conmon {
            tracing::warn!(%error, "What podman was given stays until podman has forgotten it");
        }
        if let Err(error) = noted() {
            tracing::error!(%error, "The container runs, and podman does not know it");
        }
        filled.map_or(Ok(()), |end: End| end.wait(FILLED_WITHIN))?;
        claim::note_adopted(&place, runtime.kind(), mark)
    };
    let (go, begins) = mpsc::channel::<Noted>();
    let thread = thread::Builder::new().name("settle".to_owned()).spawn(move || {
        // Nobody says so when it does not come to run.
        if let Ok(noted) = begins.recv()
            && let Err(error) = settle(noted)
        {
            tracing::error!(%error, "The container is not podman's alone yet");
        }
    });
    let thread = thread.map_err(ContainerError::io("start a thread"))?;
    Ok(Some(Settling { foreign, go, thread }))
}

impl Settling {
    /// It runs. Nothing in here can fail.
    pub(crate) fn runs(self, container: &mut Container) {
        container.foreign = Some(self.foreign);
        if let Some(arrival) = container.arrival.take() {
            // It waits for nothing else.
            let _ = self.go.send(Box::new(arrival.runs()));
        }
        container.settling = Some(self.thread);
        // CRIU is gone, and podman knows nothing of where it was.
        container.cgroups.remove_aside();
    }
}

/// Ends `container`, which runs elsewhere, if it is one of podman's; says whether it was.
pub(crate) fn leaves(container: &mut Container) -> Result<bool> {
    let spec = ContainerSpec::from_json(&container.config.spec)?;
    if spec.podman.is_none() || container.foreign.is_none() {
        return Ok(false);
    }
    // Interface first, so that nobody outside learns of the end of its tasks.
    container.network.remove();
    container.let_go();
    if let Some(init) = &container.init {
        init.end_is_wanted();
    }
    let init = container.foreign.as_ref().map_or(0, |foreign| foreign.init);
    super::end_for_good(container.runtime.id(), &container.cgroups, init)?;
    container.filling = None;
    container.leave_foreign()?;
    Ok(true)
}

/// Has podman stop `container`, if it is one of its own; says whether it was.
pub(crate) fn stop(container: &mut Container, grace: Duration) -> Result<bool> {
    let spec = ContainerSpec::from_json(&container.config.spec)?;
    if spec.podman.is_none() || container.foreign.is_none() {
        return Ok(false);
    }
    if let Some(init) = &container.init {
        init.end_is_wanted();
    }
    container.cgroups.thaw()?;
    let seconds = grace.as_secs().to_string();
    let mut command = podman(&["stop", "--time", &seconds, "--", container.runtime.id()]);
    run_within(&mut command, grace + LONG)?;
    container.leave_foreign()?;
    Ok(true)
}
