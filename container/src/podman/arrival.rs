//! A container on its way into the charge of this host's podman. podman makes its record while memory comes;
//! then it starts it like any other, with its own network, files and `conmon`, but for two commands that are
//! exchanged for this start alone: the OCI runtime, for which `shim` asks us, and netavark, before which the
//! new network namespace is closed. Nobody shall see the address here before the container is there: a
//! namespace without its connections would reset them.
//!
//! What is exchanged stands in a directory of its own in `/run`, which stays for as long as the container's
//! `conmon`: it names it to podman when the container ends, and gets podman's own commands from then on.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use decamp_shared::workload::{HostTools, Place};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use super::command::{LONG, run_until, run_within};
use super::exchanged::{CLOSED, OPENED, directory, prepare, remove, write};
use super::made::{Made, own_files};
use super::shim::{Call, Order, own_namespace};
use super::volumes::{self, Attributes, StandIns};
use super::{ask, has, leftover, on_host, own, podman, talk};
use crate::bundle::Bundle;
use crate::cgroup::Cgroups;
use crate::claim::{self, Arriving, Coming};
use crate::error::{ContainerError, Result};
use crate::interfaces;
use crate::network::Network;
use crate::nft;
use crate::spec::ContainerSpec;
use crate::swrk::Swrk;

/// podman and `conmon` come to the runtime within this.
const CALLED_WITHIN: Duration = Duration::from_secs(30);
/// podman has noted that it runs within this.
const NOTED_WITHIN: Duration = Duration::from_secs(30);
/// A container that podman has made and that does not run yet.
pub(crate) struct Arrival {
    id: String,
    cgroups_path: String,
    directory: PathBuf,
    listener: UnixListener,
    starting: Option<JoinHandle<Result<String>>>,
    /// When that is to be over: once it is known how it went.
    due: Arc<OnceLock<Instant>>,
    /// Who waits for the first process.
    creating: Option<UnixStream>,
    /// Whom to tell that it runs, or that it does not.
    started: Option<mpsc::Sender<bool>>,
    rootfs: PathBuf,
    /// Its configuration, as podman has made it.
    config: Value,
    /// Whether `conmon` waits for the master of a terminal.
    terminal: bool,
    /// The directories of volumes that are in it.
    directories: Vec<PathBuf>,
    /// What those were like before podman started it.
    attributes: Option<Attributes>,
    /// Volumes that podman made for it, and that are nobody's else.
    volumes: Vec<String>,
    /// Whether it runs: then it is podman's.
    runs: bool,
    /// Whether podman was asked to forget it.
    forgotten: bool,
}

/// What podman has made ready for it.
pub(crate) struct Ready {
    pub(crate) network: Network,
    /// Standard output and error, which `conmon` reads.
    pub(crate) output: OwnedFd,
    pub(crate) error: OwnedFd,
    /// What is mounted for files of the host, and for podman's own.
    pub(crate) files: BTreeMap<String, PathBuf>,
}

impl Arrival {
    /// Has podman make the container of `spec`, whose configuration is that of `bundle`.
    pub(crate) fn make(
        tools: &HostTools,
        place: &Place,
        spec: &ContainerSpec,
        made: &Made,
        bundle: &Bundle,
    ) -> Result<Self> {
        let kind = spec.kind()?;
        let directory = directory(place);
        let lacking = volumes::lacking(&made.volumes)?;
        let volumes = volumes::nobodys(&lacking, bundle);
        if has(&place.name) != Some(false) {
            return Err(ContainerError::State(format!(
                "podman has a container {0} already, or does not say: podman rm {0} removes it",
                place.name
            )));
        }
        let (name, rootfs) = (place.name.clone(), spec.bundle.clone());
        claim::note_coming(place, kind, Coming { name, rootfs, volumes: volumes.clone() })?;
        leftover::supersede(&spec.bundle, &directory)?;
        prepare(&directory, tools, kind)?;
        let socket = directory.join("keeper.sock");
        let listener = UnixListener::bind(&socket)
            .map_err(ContainerError::io(format!("listen on {}", socket.display())))?;
        fs::create_dir_all(&spec.bundle)
            .map_err(ContainerError::io(format!("make {}", spec.bundle.display())))?;
        let profile = directory.join("seccomp.json");
        let seccomp = bundle.config().pointer("/linux/seccomp").unwrap_or(&Value::Null);
        write(&profile, &seccomp.to_string(), 0o600)?;
        let mut mounted = volumes::arguments(&made.volumes, bundle);
        mounted.extend(own::arguments(&made.own, bundle));
        let arguments =
            made.arguments(&place.name, bundle.config(), &mounted, &spec.bundle, &profile);
        let mut command = podman(&["--cgroup-manager", "cgroupfs", "--runtime", kind.word()]);
        let said = volumes::make(&lacking).and_then(|()| {
            let _stand_ins = StandIns::make(&made.volumes, bundle)?;
            run_within(command.args(&arguments), LONG)
        });
        // Where podman did not end in time, there may be one all the same.
        let failed = |_: &_| {
            warn_of_kept(forget_unknown(&place.name, &directory, &spec.bundle, &volumes));
        };
        let said = said.inspect_err(failed)?;
        let id = said.lines().last().unwrap_or_default().trim().to_owned();
        if id.len() != 64 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(ContainerError::State(format!("podman called a container {id:?}")));
        }
        let cgroups_path = format!("/libpod_parent/libpod-{id}");
        tracing::info!(id, "podman made the container");
        if let Err(error) = leftover::note(&id, &spec.bundle, &directory) {
            warn_of_kept(forget(&id, &directory, &spec.bundle, &volumes));
            return Err(error);
        }
        Ok(Self {
            id,
            cgroups_path,
            directory,
            listener,
            starting: None,
            due: Arc::default(),
            creating: None,
            started: None,
            rootfs: spec.bundle.clone(),
            config: Value::Null,
            terminal: made.tty,
            directories: volumes::directories(&made.volumes, bundle),
            attributes: None,
            volumes,
            runs: false,
            forgotten: false,
        })
    }

    /// Its name for the runtime.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// What a sweep needs to know of it, which is in `cgroups`.
    pub(crate) fn noted(&self, cgroups: Cgroups) -> Arriving {
        let (id, rootfs) = (self.id.clone(), self.rootfs.clone());
        Arriving { id, cgroups, rootfs, volumes: self.volumes.clone() }
    }

    /// Where its cgroups are.
    pub(crate) fn cgroups_path(&self) -> &str {
        &self.cgroups_path
    }

    /// Its configuration, once podman has begun to start it.
    pub(crate) fn config(&self) -> &Value {
        &self.config
    }

    /// Has podman start it, as far as the runtime's part. Its configuration is that of `bundle`.
    pub(crate) fn begin(&mut self, spec: &ContainerSpec, bundle: &Bundle) -> Result<Ready> {
        let begun = Instant::now();
        // Kept until podman has done what it does to them, or has given up.
        self.attributes = Some(Attributes::of(&self.directories)?);
        write(&self.directory.join("closed.nft"), CLOSED, 0o600)?;
        let mut command = podman(&["start", "--", &self.id]);
        command.env("CONTAINERS_CONF", self.directory.join("containers.conf"));
        let starting = thread::Builder::new().name("podman".to_owned());
        let due = self.due.clone();
        let is_over = move || due.get().is_some_and(|due| Instant::now() > *due);
        let starting = starting.spawn(move || run_until(&mut command, is_over));
        self.starting = Some(starting.map_err(ContainerError::io("start a thread"))?);
        let shim = self.accept(CALLED_WITHIN)?;
        let (call, descriptors): (Call, _) = talk::hear(&shim)?;
        let [output, error] = <[OwnedFd; 2]>::try_from(descriptors)
            .map_err(|_| ContainerError::State("The shim came without its output".to_owned()))?;
        self.attributes.take().map_or(Ok(()), Attributes::put_back)?;
        self.creating = Some(shim);
        let place = call.bundle.filter(|_| call.verb == "create").ok_or_else(|| {
            ContainerError::State(format!("podman asked to {} before to create", call.verb))
        })?;
        let theirs = Bundle::read(&place)?;
        let config = theirs.config();
        if config.pointer("/linux/cgroupsPath").and_then(Value::as_str) != Some(&self.cgroups_path)
        {
            return Err(ContainerError::State(format!(
                "podman has it in the cgroup {}, not in {}",
                config.pointer("/linux/cgroupsPath").unwrap_or(&Value::Null),
                self.cgroups_path
            )));
        }
        let seen = spec.podman.as_ref().map_or(&[][..], |made| &made.own);
        let mut files = own::stand_ins(config, bundle, seen)?;
        files.extend(own_files(config));
        let network = self.network(config, spec)?;
        self.config = config.clone();
        remove(&self.directory.join("closed.nft"));
        tracing::debug!(ms = crate::dump::ms(begun), "podman is ready");
        Ok(Ready { network, output, error, files })
    }

    /// The network that podman has made, off the bridge and open again.
    fn network(&self, config: &Value, spec: &ContainerSpec) -> Result<Network> {
        let namespaces = config.pointer("/linux/namespaces").and_then(Value::as_array);
        let path = namespaces.into_iter().flatten().find_map(|namespace| {
            (namespace["type"] == "network").then(|| namespace["path"].as_str()).flatten()
        });
        let Some(path) = path else {
            // It makes one of its own, with nothing in it: so do we.
            return Network::make(None, "", false);
        };
        // A mount of the host's, which the keeper may not see: it is older, and in a mount namespace of its
        // own.
        let open = || on_host(|| File::open(path));
        let Some(net) = &spec.net else { return Network::found(open()?.into(), None) };
        let closed = Network::found(open()?.into(), None)?;
        let outside = interfaces::outside_of(&closed)?;
        let mut network = Network::found(open()?.into(), Some(&outside))?;
        network.disconnect()?;
        network.arrives(net, net.mac_of(""))?;
        network.inside(|| nft::carry_out(OPENED))?;
        Ok(network)
    }

    /// Has the shim start CRIU, in these namespaces of the container and our mount namespace.
    pub(crate) fn criu(
        &self,
        criu: &Path,
        namespaces: &[BorrowedFd<'_>],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Swrk> {
        let gone = || ContainerError::State("podman's runtime is not waiting".to_owned());
        let shim = self.creating.as_ref().ok_or_else(gone)?;
        Swrk::started_by(descriptors, |inherited| {
            for some in inherited.chunks(talk::DESCRIPTORS) {
                let numbers = some.iter().map(AsRawFd::as_raw_fd).collect();
                talk::say(shim, &Order::Take(numbers), some)?;
            }
            let mounts = own_namespace("mnt")?;
            let order = Order::Begin { criu: criu.to_owned(), socket: inherited[0].as_raw_fd() };
            talk::say(shim, &order, &[&[mounts.as_fd()], namespaces].concat())?;
            let (pid, _): (u32, _) = talk::hear(shim)?;
            Ok(pid as i32)
        })
    }

    /// It is restored, with this first process and the master of this terminal, and stands still. From now on
    /// podman waits to hear that it runs.
    pub(crate) fn restored(&mut self, init: i32, terminal: Option<OwnedFd>) -> Result<()> {
        let gone = || ContainerError::State("podman's runtime is not waiting".to_owned());
        if self.terminal && terminal.is_none() {
            return Err(ContainerError::State(
                "No process of the container has its terminal open, and podman would wait for that"
                    .to_owned(),
            ));
        }
        let shim = self.creating.take().ok_or_else(gone)?;
        let with: Vec<_> = terminal.iter().filter(|_| self.terminal).map(AsFd::as_fd).collect();
        talk::say(&shim, &Order::Restored(init), &with)?;
        // Only then is it `conmon`'s child, and `conmon` has all that it waits for.
        if let (Some(why), _) = talk::hear::<Option<String>>(&shim)? {
            return Err(ContainerError::State(format!("podman's runtime failed: {why}")));
        }
        let listener =
            self.listener.try_clone().map_err(ContainerError::io("hold a container's socket"))?;
        let (sender, receiver) = mpsc::channel();
        let waiting = thread::Builder::new().name("start".to_owned()).spawn(move || {
            if let Err(error) = answer_start(&listener, &receiver) {
                tracing::warn!(%error, "podman does not hear whether the container runs");
            }
        });
        waiting.map_err(ContainerError::io("start a thread"))?;
        self.started = Some(sender);
        Ok(())
    }

    /// Whether podman still waits to hear that it runs.
    ///
    /// # Errors
    /// When it does not, and why.
    pub(crate) fn still_starts(&mut self) -> Result<()> {
        if self.starting.as_ref().is_some_and(|starting| !starting.is_finished()) {
            return Ok(());
        }
        if let Some(Ok(ended)) = self.starting.take().map(JoinHandle::join) {
            ended?;
        }
        Err(ContainerError::State(
            "podman was done with its start before the container ran".to_owned(),
        ))
    }

    /// It runs: podman may know. Gives what waits until it does.
    pub(crate) fn runs(mut self) -> impl FnOnce() -> Result<()> + Send {
        self.runs = true;
        if let Some(started) = self.started.take() {
            let _ = started.send(true);
        }
        let _ = self.due.set(Instant::now() + LONG);
        let starting = self.starting.take();
        let socket = self.directory.join("keeper.sock");
        move || {
            let noted = starting.map_or(Ok(Ok(String::new())), JoinHandle::join);
            remove(&socket);
            noted.unwrap_or_else(|_| Err(ContainerError::State("A thread panicked".to_owned())))?;
            Ok(())
        }
    }

    /// Nothing came of it: podman forgets it. What there was of it, frozen, is gone already. It may be done
    /// again.
    ///
    /// # Errors
    /// When podman does not do that: see [`forget`].
    pub(crate) fn forget(&mut self) -> Result<()> {
        self.forgotten = true;
        if let Some(started) = self.started.take() {
            let _ = started.send(false);
        }
        if let Some(shim) = self.creating.take() {
            let order = Order::Failed("The container did not come to this host".to_owned());
            let _ = talk::say(&shim, &order, &[]);
        }
        remove(&self.directory.join("keeper.sock"));
        let _ = self.due.set(Instant::now() + LONG);
        if let Some(starting) = self.starting.take() {
            let _ = starting.join();
        }
        self.attributes = None;
        forget(&self.id, &self.directory, &self.rootfs, &[])?;
        // It never ran: what is in them is a copy, whose files somebody else may be about to take back.
        volumes::remove(&self.volumes);
        Ok(())
    }

    fn accept(&self, within: Duration) -> Result<UnixStream> {
        let over = || self.starting.as_ref().is_some_and(JoinHandle::is_finished);
        accept(&self.listener, within, over).map_err(|error| match over() {
            true => ContainerError::State("podman did not start the container".to_owned()),
            false => error,
        })
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        // Whoever has done so already knows what came of it.
        if !self.runs && !self.forgotten {
            warn_of_kept(self.forget());
        }
    }
}

/// Takes away what podman has of a container that never ran here, and those of its `volumes` that hold nothing.
///
/// # Errors
/// When podman does not remove it. Then all stays as it is: podman, whose record it is, may still start it.
pub(crate) fn forget(id: &str, directory: &Path, rootfs: &Path, volumes: &[String]) -> Result<()> {
    let mut command = podman(&["rm", "--force", "--ignore", "--time", "0", "--", id]);
    run_within(&mut command, LONG)?;
    take_back(directory, rootfs, volumes);
    leftover::forget(id);
    Ok(())
}

/// Like [`forget`], of one that podman was told to make, and perhaps has made, by the name `name`.
///
/// # Errors
/// When podman does not say whether it has, or does not remove it. Then all stays as it is.
pub(crate) fn forget_unknown(
    name: &str,
    directory: &Path,
    rootfs: &Path,
    volumes: &[String],
) -> Result<()> {
    let known = match has(name) {
        Some(true) => ask(&["container", "inspect", "--", name])?,
        Some(false) => Value::Null,
        None => {
            return Err(ContainerError::State(format!(
                "podman does not say whether it has {name}"
            )));
        }
    };
    let text = |pointer: &str| known.pointer(pointer).and_then(Value::as_str);
    // One that has run is somebody's.
    let is_new = matches!(text("/0/State/Status"), Some("configured" | "created" | "initialized"));
    match text("/0/Id").filter(|_| is_new && text("/0/Rootfs").map(Path::new) == Some(rootfs)) {
        Some(id) => forget(id, directory, rootfs, volumes),
        None => {
            take_back(directory, rootfs, volumes);
            Ok(())
        }
    }
}

/// Says in the log what could not be taken away: whoever sweeps tries it again.
fn warn_of_kept(forgotten: Result<()>) {
    if let Err(error) = forgotten {
        tracing::warn!(%error, "podman may keep a container that did not come");
    }
}

/// Takes away what was made for one that podman does not have.
fn take_back(directory: &Path, rootfs: &Path, volumes: &[String]) {
    volumes::remove_empty(volumes);
    let _ = fs::remove_dir_all(directory);
    // Files that have come are taken back by whoever took them; an empty directory is ours.
    let _ = fs::remove_dir(rootfs);
}

fn answer_start(listener: &UnixListener, runs: &mpsc::Receiver<bool>) -> Result<()> {
    let shim = accept(listener, CALLED_WITHIN, || false)?;
    let (_, _): (Call, _) = talk::hear(&shim)?;
    let order = match runs.recv() {
        Ok(true) => Order::Runs,
        _ => Order::Failed("The container was not let run here".to_owned()),
    };
    talk::say(&shim, &order, &[])
}

fn accept(
    listener: &UnixListener,
    within: Duration,
    in_vain: impl Fn() -> bool,
) -> Result<UnixStream> {
    let begun = Instant::now();
    while begun.elapsed() < within && !in_vain() {
        let mut events = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut events, PollTimeout::from(50u8)) {
            Ok(1..) => {
                let (stream, _) =
                    listener.accept().map_err(ContainerError::io("hear podman's runtime"))?;
                let deadline = Some(NOTED_WITHIN);
                stream
                    .set_read_timeout(deadline)
                    .and_then(|()| stream.set_write_timeout(deadline))
                    .map_err(ContainerError::io("hear podman's runtime"))?;
                return Ok(stream);
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(ContainerError::errno("wait for podman")(errno)),
        }
    }
    Err(ContainerError::State(format!(
        "podman did not come to the runtime within {} s",
        within.as_secs()
    )))
}
