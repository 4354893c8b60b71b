//! The steps in which a keeper's container of podman's is unlike others: how it is restored, how it comes to be
//! podman's, and how podman is told that it has left or shall stop.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use decamp_shared::keeper::ExitSignal;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::arrival::Arrival;
use super::{podman, run};
use crate::adopt::lock;
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
    let ready = arrival.begin(&spec)?;
    container.network = ready.network;
    container.streams.are(ready.output, ready.error);
    container.bundle.stand_in(ready.files);
    let restoring = container.restoring();
    let descriptors = restoring.inherited()?;
    let arrival = container.arrival.as_ref().ok_or_else(gone)?;
    let network = container.network.namespace_again()?;
    let criu = arrival.criu(&container.config.tools.criu, network, &descriptors)?;
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

/// `container` runs, and becomes one that podman has started: beside it, for it takes podman's time, and its
/// memory may be still to come, without which it cannot be podman's alone.
pub(crate) fn settle(container: &mut Container, arrival: Arrival) -> Result<()> {
    let noted = arrival.runs();
    let none = || ContainerError::State("The container has no process".to_owned());
    let init = container.init.as_ref().ok_or_else(none)?.pid();
    let foreign = || -> Result<Foreign> {
        let lock = lock(&container.runtime.directory(), container.runtime.id())?;
        let members = container.cgroups.processes()?;
        let streams = ForeignStreams::find(&members, init)?.unwrap_or_default();
        let started = start_time(init)?;
        let conmon = Conmon::of(init, super::exchanged::directory(&container.config.place))?;
        let noted = parent(init)
            .and_then(|conmon| super::leftover::note_conmon(container.runtime.id(), conmon));
        if let Err(error) = noted {
            tracing::warn!(%error, "What podman was given stays until podman has forgotten it");
        }
        let conmon = Some(conmon);
        Ok(Foreign { _lock: lock, streams, init, started, podman: true, _conmon: conmon })
    };
    let foreign = foreign()?;
    let (place, runtime) = (container.config.place.clone(), container.runtime.clone());
    let mark = foreign.mark(&runtime, &container.cgroups);
    container.foreign = Some(foreign);
    // CRIU is gone, and podman knows nothing of where it was.
    container.cgroups.remove_aside();
    let filled = container.filling.as_ref().map(|filling| filling.end());
    let settle = move || -> Result<()> {
        if let Err(error) = noted() {
            tracing::error!(%error, "The container runs, and podman does not know it");
        }
        filled.map_or(Ok(()), |end: End| end.wait(FILLED_WITHIN))?;
        crate::claim::note_adopted(&place, runtime.kind(), mark)
    };
    let settling = thread::Builder::new().name("settle".to_owned()).spawn(move || {
        if let Err(error) = settle() {
            tracing::error!(%error, "The container is not podman's alone yet");
        }
    });
    container.settling = Some(settling.map_err(ContainerError::io("start a thread"))?);
    Ok(())
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
    run(&mut podman(&["stop", "--time", &seconds, "--", container.runtime.id()]))?;
    container.leave_foreign()?;
    Ok(true)
}
