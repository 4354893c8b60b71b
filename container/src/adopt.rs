//! Taking charge of a container that a runtime started by itself: finding it, every reason against it, and
//! how a keeper begins that holds it. Until a keeper has it, nothing of it is touched; what a keeper does
//! to it afterwards is in `kept`, and what it leaves alone in `foreign`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use decamp_shared::keeper::{ExitSignal, KeeperConfig};
use decamp_shared::workload::{Foreign as Found, HostTools, Refusal, RefusalCode};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::begin::write_config;
use crate::bundle::Bundle;
use crate::cgroup::Cgroups;
use crate::crun;
use crate::error::{ContainerError, Result};
use crate::foreign::{Foreign, ForeignStreams};
use crate::init::Init;
use crate::interfaces::{self, Interface};
use crate::kept::Container;
use crate::landed;
use crate::network::Network;
use crate::podman::{found, made};
use crate::restore::oci_directory;
use crate::runtime::{Runtime, RuntimeKind, start_time};
use crate::spec::ContainerSpec;
use crate::store::Store;
use crate::strangers::{self, OWN_NAMESPACES};
use crate::streams::Streams;
use crate::sys;
use crate::volumes;

/// A container that was made and not started waits behind this.
const NOT_STARTED: &str = "exec.fifo";
/// How a container of podman's is named.
const PODMAN: &str = "podman";
/// The longest name of a container that is looked for.
const ID_CAP: usize = 255;

/// A container that can be adopted.
struct Survey {
    runtime: Runtime,
    bundle: Bundle,
    cgroups: Cgroups,
    init: i32,
    process: OwnedFd,
    network: Network,
    interface: Option<Interface>,
    streams: ForeignStreams,
    lock: Flock<File>,
}

/// Finds the container `what` (`runc:ID`), for the agent; or every reason why it cannot be adopted.
pub(crate) fn survey(tools: &HostTools, what: &str) -> std::result::Result<Found, Vec<Refusal>> {
    let (word, id) = named(what).map_err(|text| vec![refusal(text)])?;
    let (kind, id, podman) = match RuntimeKind::from_word(word) {
        Some(kind) => (kind, id.to_owned(), None),
        None => {
            let found = found::find(id)
                .map_err(|against| against.into_iter().map(refusal).collect::<Vec<_>>())?;
            (found.kind, found.id.clone(), Some(found))
        }
    };
    let survey = Survey::make(Runtime::new(kind, tools, &id), podman.is_some())?;
    let own = podman.as_ref().map(|found| found.own_mounts(&survey.bundle)).unwrap_or_default();
    if !own.is_empty() {
        return Err(own.into_iter().map(refusal).collect());
    }
    let podman = podman.map(|found| found.made);
    let name = podman.as_ref().map_or(&id, |made| &made.name).clone();
    let spec = ContainerSpec {
        bundle: survey.bundle.directory().to_owned(),
        runtime: kind.word().to_owned(),
        tty: survey.streams.terminal,
        adopted: Some(id),
        podman,
        net: survey.interface.map(|interface| interface.net),
        volumes: Vec::new(),
    };
    let spec = serde_json::to_value(spec).map_err(|error| vec![refusal(error.to_string())])?;
    Ok(Found { name, spec })
}

/// Whether the container `what` was made and not started yet: nobody can tell when that will be.
pub(crate) fn awaits_start(tools: &HostTools, what: &str) -> bool {
    named(what).is_ok_and(|(word, id)| {
        let Some(kind) = RuntimeKind::from_word(word) else { return found::awaits_start(id) };
        let runtime = Runtime::new(kind, tools, id);
        let waits = runtime.directory().join(NOT_STARTED).exists();
        let known = || runtime.known(&runtime.state().ok()?).ok();
        waits && known().is_some_and(|known| alive(known.init, known.started).is_some())
    })
}

/// The runtime, or podman, and the name in `runc:ID`.
fn named(what: &str) -> std::result::Result<(&str, &str), String> {
    let (word, id) = what.split_once(':').unwrap_or((what, ""));
    if word != PODMAN && RuntimeKind::from_word(word).is_none() {
        return Err(format!(
            "Containers of {word} cannot be adopted in this version: podman:NAME, runc:ID and crun:ID can"
        ));
    }
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-+".contains(&byte);
    if id.is_empty() || id.len() > ID_CAP || id.starts_with('.') || !id.bytes().all(good) {
        return Err(format!("{id:?} is no name of a container of {word}"));
    }
    Ok((word, id))
}

impl Survey {
    /// Of a container that `runtime` has, for podman or for somebody else.
    fn make(runtime: Runtime, for_podman: bool) -> std::result::Result<Self, Vec<Refusal>> {
        let alone = |error: ContainerError| vec![refusal(error.to_string())];
        let (word, id) = (runtime.kind().word(), runtime.id().to_owned());
        if !runtime.exists() {
            return Err(vec![refusal(format!(
                "{word} has no container {id} on this host: {word} list names those that it has"
            ))]);
        }
        let state = runtime.state().map_err(alone)?;
        let known = runtime.known(&state).map_err(alone)?;
        let process = alive(known.init, known.started).ok_or_else(|| {
            vec![refusal(format!("Container {id} has stopped: only one that runs can be adopted"))]
        })?;
        if runtime.directory().join(NOT_STARTED).exists() {
            return Err(vec![refusal(format!(
                "Container {id} was made and not started: {word} start {id} first"
            ))]);
        }
        let lock = lock(&runtime.directory(), &id).map_err(alone)?;
        let mut against = Vec::new();
        let bundle = read_bundle(&runtime, &known.bundle, &known.rootfs, for_podman, &mut against);
        against.extend(shared_namespaces(known.init).into_iter().map(refusal));
        against.extend(waited_for(&runtime, known.init).map(refusal));
        let cgroups = runtime.cgroups(&state, known.init);
        let cgroups = or_refuse(
            cgroups.and_then(|found| check_cgroups(found, &id, known.init)),
            &mut against,
        );
        let network = or_refuse(network_of(known.init), &mut against);
        let streams = cgroups.as_ref().map(|cgroups| {
            let found =
                cgroups.processes().and_then(|pids| ForeignStreams::find(&pids, known.init));
            or_refuse(found, &mut against)
        });
        let streams = streams.flatten();
        match (bundle, cgroups, network, streams) {
            (Some(bundle), Some(cgroups), Some((network, interface)), Some(streams))
                if against.is_empty() =>
            {
                let init = known.init;
                Ok(Self {
                    runtime,
                    bundle,
                    cgroups,
                    init,
                    process,
                    network,
                    interface,
                    streams,
                    lock,
                })
            }
            _ => Err(against),
        }
    }
}

impl Container {
    /// Takes charge of the container that the spec of `config` names. On an error it is as it was.
    pub(crate) fn adopt(config: &KeeperConfig, exit: &ExitSignal) -> Result<Self> {
        let spec = ContainerSpec::from_json(&config.spec)?;
        let place = &config.place;
        let id = spec.adopted.as_deref().unwrap_or(&place.name);
        let runtime = Runtime::new(spec.kind()?, &config.tools, id);
        // Looked at again: it may be another by now.
        let survey = Survey::make(runtime, spec.podman.is_some()).map_err(|against| {
            let reasons: Vec<_> = against.into_iter().map(|refusal| refusal.text).collect();
            ContainerError::State(reasons.join("; "))
        })?;
        let Survey { runtime, bundle, cgroups, init, process, network, .. } = survey;
        let Survey { interface, streams: foreign_streams, lock, .. } = survey;
        let found = interface.map(|interface| interface.net);
        if found != spec.net || bundle.directory() != spec.bundle {
            return Err(ContainerError::State(format!(
                "Container {id} is not what it was a moment ago: try again"
            )));
        }
        write_config(&oci_directory(place), "original.json", &bundle.config_text())?;
        let started = start_time(init)?;
        let foreign = Foreign {
            _lock: lock,
            streams: foreign_streams,
            init,
            started,
            podman: spec.podman.is_some(),
            _conmon: None,
        };
        foreign.note(place, &runtime, &cgroups)?;
        let streams = Streams::open(&place.log())?;
        let store = Store::mount(&place.dir.join("store"))?;
        let mut container =
            Self::of(config, exit, bundle, runtime, network, streams, store, cgroups);
        container.foreign = Some(foreign);
        let init = Init::watch_foreign(init, process, exit)?;
        tracing::info!(pid = init.pid(), "Adopted the container");
        Ok(container.with_init(init))
    }
}

/// The process `init`, if it is still the one that began at `started`, and no zombie.
fn alive(init: i32, started: u64) -> Option<OwnedFd> {
    if init <= 0 {
        return None;
    }
    let process = sys::pidfd_open(init).ok()?;
    let status = fs::read_to_string(format!("/proc/{init}/status")).ok()?;
    let state = status.lines().find_map(|line| line.strip_prefix("State:"))?.trim();
    (start_time(init).ok()? == started && !state.starts_with(['Z', 'X'])).then_some(process)
}

/// Nobody else has the container in charge as long as the lock lives.
pub(crate) fn lock(directory: &Path, id: &str) -> Result<Flock<File>> {
    let failed = format!("lock {}", directory.display());
    let file = File::open(directory).map_err(ContainerError::io(failed.clone()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => ContainerError::State(format!(
            "Container {id} is adopted already: decamp ls of the agent that has it shows it"
        )),
        errno => ContainerError::errno(failed)(errno),
    })
}

/// The bundle as it was started from, as far as that can be told, made a bundle that could be run here.
fn read_bundle(
    runtime: &Runtime,
    directory: &Path,
    rootfs: &Path,
    for_podman: bool,
    against: &mut Vec<Refusal>,
) -> Option<Bundle> {
    let read = match runtime.kind() {
        RuntimeKind::Runc => Bundle::read(directory),
        // crun keeps a copy, which is what it started.
        RuntimeKind::Crun => Bundle::read_from(directory, &runtime.directory().join(crun::CONFIG)),
    };
    let bundle = match read {
        Ok(bundle) if for_podman && found::is_mounted(rootfs) => {
            let changed = |config| made::anywhere(config, runtime.id());
            bundle.moved_to(rootfs, changed).with_own_network()
        }
        Ok(bundle) if directory.is_dir() => bundle.with_own_network(),
        Ok(_) => {
            against.push(file(format!("Its bundle {} is gone", directory.display())));
            return None;
        }
        Err(error) => {
            let text = format!("Its bundle {} is gone or damaged", directory.display());
            let cause = std::error::Error::source(&error);
            let cause = cause.map_or_else(|| error.to_string(), ToString::to_string);
            against.push(file(format!("{text} ({cause})")));
            return None;
        }
    };
    against.extend(bundle.run_refusals());
    if !same_file(&bundle.rootfs(), rootfs) {
        against.push(file(format!(
            "Its configuration has changed since it was started: its root file system was {}",
            rootfs.display()
        )));
    }
    if against.is_empty() {
        let found = volumes::found(&bundle);
        against.extend(found.obstacles.into_iter().map(refusal));
        against.extend(landed::obstacle(&bundle.clone().with_volumes(&found.volumes)).map(refusal));
    }
    Some(bundle)
}

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((fs::canonicalize(one), fs::canonicalize(other)), (Ok(one), Ok(other)) if one == other)
}

/// Namespaces that the container has in common with the host, whatever its configuration says.
fn shared_namespaces(init: i32) -> Vec<String> {
    let of = |process: &str, kind: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).ok();
    let shared = OWN_NAMESPACES.iter().filter(|(kind, _)| {
        let theirs = of(&init.to_string(), kind);
        theirs.is_none() || theirs == of("self", kind) || theirs == of("1", kind)
    });
    shared.map(|(_, name)| format!("The container is in the host's {name} namespace")).collect()
}

/// Whether all that would be frozen, and killed, is the container, and all of the container would be.
fn check_cgroups(
    cgroups: Cgroups,
    id: &str,
    init: i32,
) -> Result<std::result::Result<Cgroups, Vec<String>>> {
    let directory = cgroups.freezer()?.to_owned();
    let mut against = Vec::new();
    if directory.ends_with(Path::new("decamp").join(id)) {
        against.push(format!("Container {id} is in the charge of an agent of decamp already"));
    }
    if cgroups.is_suspended()? {
        against.push(format!("Container {id} is paused: resume it first"));
    }
    against.extend(strangers::find(&cgroups, init)?);
    Ok(if against.is_empty() { Ok(cgroups) } else { Err(against) })
}

/// Whether the runtime's own command waits for the container: who started that may start it again when
/// it ends here, and so it would run twice.
fn waited_for(runtime: &Runtime, init: i32) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{init}/status")).ok()?;
    let parent: i32 =
        status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
    let word = runtime.kind().word();
    runs(parent, word, runtime.program()).then(|| {
        format!(
            "Process {parent}, {word} itself, waits for the container: whoever started that may start it \
             again when it ends here. Start it with {word} run --detach"
        )
    })
}

/// Whether a process is one of the command `word`, which is at `program`. A runtime may run from a copy
/// of its file that has no path or another name, and its file may have been replaced meanwhile: so
/// anything that tells is enough.
fn runs(pid: i32, word: &str, program: &Path) -> bool {
    let of = |file: &str| PathBuf::from(format!("/proc/{pid}/{file}"));
    let is_it = |name: &[u8]| {
        let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
        Path::new(OsStr::from_bytes(name)).file_name().is_some_and(|name| name == word)
    };
    let file = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let executed = file(&of("exe"));
    let arguments = fs::read(of("cmdline")).unwrap_or_default();
    (executed.is_some() && executed == file(program))
        || fs::read_link(of("exe")).is_ok_and(|link| is_it(link.as_os_str().as_bytes()))
        || fs::read(of("comm")).is_ok_and(|comm| is_it(comm.trim_ascii_end()))
        || arguments.split(|byte| *byte == 0).next().is_some_and(is_it)
}

type WithInterface = (Network, Option<Interface>);

fn network_of(init: i32) -> Result<std::result::Result<WithInterface, Vec<String>>> {
    let path = format!("/proc/{init}/ns/net");
    let open = || File::open(&path).map_err(ContainerError::io(format!("open {path}")));
    let found = interfaces::find(&Network::found(open()?.into(), None)?)?;
    let network = |interface: Option<Interface>| -> Result<WithInterface> {
        let outside = interface.as_ref().map(|interface| interface.outside.as_str());
        Ok((Network::found(open()?.into(), outside)?, interface))
    };
    match found {
        Ok(interface) => network(interface).map(Ok),
        Err(against) => Ok(Err(against)),
    }
}

fn or_refuse<T>(
    found: Result<std::result::Result<T, Vec<String>>>,
    against: &mut Vec<Refusal>,
) -> Option<T> {
    match found {
        Ok(Ok(found)) => return Some(found),
        Ok(Err(reasons)) => against.extend(reasons.into_iter().map(refusal)),
        Err(error) => against.push(refusal(error.to_string())),
    }
    None
}

fn refusal(text: impl Into<String>) -> Refusal {
    Refusal::new(RefusalCode::Unsupported, text.into())
}

fn file(text: String) -> Refusal {
    Refusal::new(RefusalCode::File, text)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn what_to_adopt_is_said_by_runtime_and_name() {
        assert_eq!(named("runc:web"), Ok(("runc", "web")));
        assert_eq!(named("crun:a_b.c-d+e"), Ok(("crun", "a_b.c-d+e")));
        assert_eq!(named("podman:web"), Ok(("podman", "web")));
        for bad in ["web", "runc:", "runc:../x", "runc:a/b", "runc:.x", "kata:web", "podman:"] {
            assert!(named(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn we_ourselves_are_alive_and_share_the_hosts_namespaces() {
        let pid = std::process::id() as i32;
        let started = start_time(pid).expect("ourselves");
        assert!(alive(pid, started).is_some());
        assert!(alive(pid, started + 1).is_none(), "another process with that number");
        assert!(alive(0, started).is_none());
        assert_eq!(shared_namespaces(pid).len(), OWN_NAMESPACES.len());
    }

    /// A runtime that has made itself a copy without a path, or was replaced since, is known all the same.
    #[test]
    fn a_command_is_known_by_its_file_its_name_or_what_it_calls_itself() {
        let directory = tempfile::tempdir().expect("a directory");
        let program = directory.path().join("crun");
        let other = directory.path().join("other");
        let elsewhere = directory.path().join("elsewhere");
        let sleep = fs::canonicalize("/bin/sleep").expect("sleep");
        for path in [&program, &other] {
            fs::copy(&sleep, path).expect("copied");
        }
        fs::hard_link(&program, &elsewhere).expect("linked");
        let known = |command: &mut Command, gone: Option<&Path>| {
            command.arg("60");
            let mut child = loop {
                match command.spawn() {
                    // Another test forked while the copy was written.
                    Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {}
                    spawned => break spawned.expect("started"),
                }
            };
            // The exec is told of before the new program has its arguments.
            let arguments = format!("/proc/{}/cmdline", child.id());
            while fs::read(&arguments).expect("it lives").is_empty() {
                std::thread::yield_now();
            }
            if let Some(path) = gone {
                fs::remove_file(path).expect("removed");
            }
            let known = runs(child.id() as i32, "crun", &program);
            child.kill().and_then(|()| child.wait()).expect("ended");
            known
        };
        assert!(!known(&mut Command::new(&other), None));
        assert!(known(&mut Command::new(&elsewhere), None), "by its file");
        assert!(known(Command::new(&other).arg0("/usr/bin/crun"), None), "by what it calls itself");
        assert!(known(Command::new(&program).arg0("x"), Some(&program)), "by what it was");
    }

    #[test]
    fn one_lock_at_a_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let held = lock(directory.path(), "web").expect("free");
        let error = lock(directory.path(), "web").expect_err("held");
        assert!(error.to_string().contains("adopted already"), "{error}");
        drop(held);
        assert!(lock(directory.path(), "web").is_ok());
    }
}
