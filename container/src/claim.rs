//! Whose a container's name is. Runtimes and the kernel know containers and cgroups by name alone, and
//! others use names too: a user's own runc, another agent on this host. What is found under a name is
//! ours to kill and to remove only while the mark of a claim stands in the workload's place.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use decamp_shared::workload::{HostTools, Place};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};
use crate::podman::{self, arrival, exchanged};
use crate::runtime::{Runtime, RuntimeKind};
use crate::spec::runtime_id;

/// Another one for each boot: what had the name before it is gone, whoever has it now.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Between the look and the runtime's start others wait for so long.
const LOCKED_WITHIN: Duration = Duration::from_secs(20);

/// What stands in the mark of a claim.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Mark {
    /// The boot in which it was claimed.
    boot: String,
    /// The runtime that knows the container.
    runtime: String,
    /// What somebody else started: never ours to kill, unless it stands still for our sake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    adopted: Option<Adopted>,
    /// What podman has made and does not know to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    arriving: Option<Arriving>,
    /// What podman is about to make.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    coming: Option<Coming>,
}

/// What a sweep knows by what podman is told to make of a container that comes. Before that podman had none
/// of these.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Coming {
    /// Its name for podman.
    pub(crate) name: String,
    /// Its root file system.
    pub(crate) rootfs: PathBuf,
    /// Volumes for it alone.
    pub(crate) volumes: Vec<String>,
}

/// What a sweep needs to know of a container that comes to podman.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Arriving {
    /// Its name for podman and the runtime.
    pub(crate) id: String,
    /// Where it is.
    pub(crate) cgroups: Cgroups,
    /// Its root file system.
    pub(crate) rootfs: PathBuf,
    /// Volumes that podman made for it alone.
    #[serde(default)]
    pub(crate) volumes: Vec<String>,
}

/// What a sweep needs to know of an adopted container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Adopted {
    /// Its name for the runtime.
    pub(crate) id: String,
    /// Where it is, wherever its runtime put it.
    pub(crate) cgroups: Cgroups,
    /// What an earlier decamp wrote when it was made to stand still, and so may run elsewhere. Today a
    /// file says so: see [`hold`].
    #[serde(default)]
    pub(crate) held: bool,
    /// Its first process, and when that started: another container may have the name by now.
    pub(crate) init: i32,
    pub(crate) started: u64,
    /// Whether podman is in charge of it, and would start it again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) podman: bool,
}

impl Adopted {
    /// Whether what `runtime` has under the name is still the container that was adopted, or nothing.
    fn is_still(&self, runtime: &Runtime) -> Result<bool> {
        if !runtime.exists() {
            return Ok(true);
        }
        let known = runtime.known(&runtime.state()?)?;
        // Of one that has stopped crun no longer says who it was; nothing of it runs.
        let nobody = known.init <= 0;
        Ok(nobody || (known.init == self.init && known.started == self.started))
    }
}

/// A name that was free and is ours now. While this lives nobody else claims one on this host.
pub(crate) struct Claim {
    runtime: Runtime,
    _lock: Flock<File>,
}

impl Claim {
    /// Takes the name of `place`, for a container of `kind`.
    ///
    /// # Errors
    /// When somebody has it: a container of the runtime's, or tasks in cgroups of that name.
    pub(crate) fn take(tools: &HostTools, place: &Place, kind: RuntimeKind) -> Result<Self> {
        let cgroups = Cgroups::of_place(place)?;
        // Between the look and the runtime's start no other keeper may look.
        let directory = cgroups.mount_point()?;
        let lock = File::open(&directory)
            .map_err(ContainerError::io(format!("open {}", directory.display())))
            .and_then(|file| lock(file, &directory))?;
        if let Some(taken) = taken(tools, place, kind)? {
            return Err(ContainerError::State(taken));
        }
        let runtime = Runtime::new(kind, tools, runtime_id(place)?);
        let runtime_word = kind.word().to_owned();
        Mark { boot: boot_id()?, runtime: runtime_word, ..Mark::default() }.write(place)?;
        Ok(Self { runtime, _lock: lock })
    }

    /// The runtime for the container of that name.
    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }
}

/// Anybody may open the directory, and so lock it: nobody is waited for without end.
fn lock(mut file: File, directory: &Path) -> Result<Flock<File>> {
    let begun = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err((unlocked, Errno::EWOULDBLOCK)) if begun.elapsed() < LOCKED_WITHIN => {
                file = unlocked;
                thread::sleep(Duration::from_millis(5));
            }
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(ContainerError::State(format!(
                    "Somebody has locked {} for more than {} s, and no container can be started on \
                     this host meanwhile: `fuser -v {}` names who",
                    directory.display(),
                    LOCKED_WITHIN.as_secs(),
                    directory.display()
                )));
            }
            Err((_, errno)) => {
                return Err(ContainerError::errno(format!("lock {}", directory.display()))(errno));
            }
        }
    }
}

/// Who has the name of `place` on this host, if anybody has, and what to do about it.
pub(crate) fn taken(tools: &HostTools, place: &Place, kind: RuntimeKind) -> Result<Option<String>> {
    let (id, word) = (runtime_id(place)?, kind.word());
    if Runtime::new(kind, tools, id).exists() {
        return Ok(Some(format!(
            "{word} has a container {id} there already: remove it with {word} delete {id}"
        )));
    }
    let peopled = Cgroups::of_place(place)?.peopled()?;
    Ok(peopled.map(|directory| {
        format!("Processes run in {} already: they are not ours", directory.display())
    }))
}

impl Mark {
    /// The mark at `place`, when what has its name is ours.
    fn read(place: &Place) -> Result<Option<Self>> {
        let path = mark(place);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(ContainerError::io(format!("read {}", path.display()))(error));
            }
        };
        // An earlier decamp wrote the boot alone, and knew runc alone.
        let runc = RuntimeKind::Runc.word().to_owned();
        let earlier = |_| Self { boot: text.clone(), runtime: runc, ..Self::default() };
        let mark: Self = serde_json::from_str(&text).unwrap_or_else(earlier);
        Ok(if mark.boot == boot_id()? { Some(mark) } else { None })
    }

    fn write(&self, place: &Place) -> Result<()> {
        let path = mark(place);
        let fresh = path.with_extension("claim.new");
        let written = serde_json::to_vec(self)
            .map_err(io::Error::from)
            .and_then(|text| fs::write(&fresh, text))
            .and_then(|()| fs::rename(&fresh, &path));
        written.map_err(ContainerError::io(format!("write {}", path.display())))
    }

    fn runtime(&self, tools: &HostTools, place: &Place) -> Result<Runtime> {
        let kind = RuntimeKind::from_word(&self.runtime).ok_or_else(|| {
            ContainerError::malformed(mark(place), "names a runtime that is not known here")
        })?;
        let adopted = self.adopted.as_ref().map(|adopted| adopted.id.as_str());
        let id = adopted.or(self.arriving.as_ref().map(|arriving| arriving.id.as_str())).map(Ok);
        Ok(Runtime::new(kind, tools, id.unwrap_or_else(|| runtime_id(place))?))
    }
}

/// Notes that the adopted container of `place` is made to stand still, and so may run elsewhere. To be
/// called before that: it takes room on the disk, and taking it back takes none.
pub(crate) fn hold(place: &Place) -> Result<()> {
    let path = held(place);
    let made = File::create(&path).map(drop);
    made.map_err(ContainerError::io(format!("make {}", path.display())))
}

/// Notes that it runs here again.
pub(crate) fn unhold(place: &Place) -> Result<()> {
    remove(&held(place))
}

/// Gives the name of `place` back, once nothing of ours has it. Harmless when it was not ours.
pub(crate) fn give_back(place: &Place) -> Result<()> {
    // The mark first: without it what the other file says is nobody's.
    remove(&mark(place))?;
    remove(&held(place))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(ContainerError::io(format!("remove {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Notes in `place` that `adopted` is in our charge, or how it stands. On disk before anything is done to
/// it, so that whoever sweeps after a keeper knows.
pub(crate) fn note_adopted(place: &Place, kind: RuntimeKind, adopted: Adopted) -> Result<()> {
    let runtime = kind.word().to_owned();
    Mark { boot: boot_id()?, runtime, adopted: Some(adopted), ..Mark::default() }.write(place)
}

/// Notes in `place` what podman has made for it: ours to take away, until podman knows that it runs.
pub(crate) fn note_arriving(place: &Place, kind: RuntimeKind, arriving: Arriving) -> Result<()> {
    let runtime = kind.word().to_owned();
    Mark { boot: boot_id()?, runtime, arriving: Some(arriving), ..Mark::default() }.write(place)
}

/// Notes in `place` what podman is about to be told to make for it.
pub(crate) fn note_coming(place: &Place, kind: RuntimeKind, coming: Coming) -> Result<()> {
    let runtime = kind.word().to_owned();
    Mark { boot: boot_id()?, runtime, coming: Some(coming), ..Mark::default() }.write(place)
}

/// Takes away all that has the name of `place`, if it is ours. An adopted container goes on under its
/// runtime, unless it was made to stand still: then it may run elsewhere, and never runs here again.
pub(crate) fn sweep(tools: &HostTools, place: &Place) -> Result<()> {
    if let Some(mark) = Mark::read(place)? {
        let runtime = mark.runtime(tools, place)?;
        if let Some(Arriving { id, cgroups, rootfs, volumes }) = mark.arriving {
            cgroups.sweep().and_then(|()| runtime.forget())?;
            arrival::forget(&id, &exchanged::directory(place), &rootfs, &volumes)?;
            return give_back(place);
        }
        if let Some(Coming { name, rootfs, volumes }) = mark.coming {
            arrival::forget_unknown(&name, &exchanged::directory(place), &rootfs, &volumes)?;
            return give_back(place);
        }
        match mark.adopted {
            None => Cgroups::of_place(place)?.sweep().and_then(|()| runtime.forget())?,
            Some(adopted)
                if (adopted.held || held(place).exists()) && adopted.is_still(&runtime)? =>
            {
                if adopted.podman && adopted.cgroups.freezer()?.is_dir() {
                    podman::end_for_good(&adopted.id, &adopted.cgroups, adopted.init)?;
                }
                adopted.cgroups.sweep().and_then(|()| runtime.forget())?;
            }
            Some(_) => {}
        }
    }
    give_back(place)
}

fn mark(place: &Place) -> PathBuf {
    place.dir.join("container.claim")
}

/// The file that stands here while an adopted container may run elsewhere.
fn held(place: &Place) -> PathBuf {
    place.dir.join("container.held")
}

fn boot_id() -> Result<String> {
    fs::read_to_string(BOOT_ID).map_err(ContainerError::io(format!("read {BOOT_ID}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_good_for_one_boot() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
        let runtime = || Mark::read(&place).expect("read").map(|mark| mark.runtime);
        assert_eq!(runtime(), None);
        let boot = boot_id().expect("a boot");
        let mut ours = Mark { boot: boot.clone(), runtime: "crun".into(), ..Mark::default() };
        ours.write(&place).expect("written");
        assert_eq!(runtime().as_deref(), Some("crun"));
        ours.boot = "another boot".into();
        ours.write(&place).expect("written");
        assert_eq!(runtime(), None);
        fs::write(mark(&place), boot).expect("written");
        assert_eq!(runtime().as_deref(), Some("runc"), "what an earlier decamp wrote");
        hold(&place).expect("held");
        unhold(&place).expect("runs again");
        unhold(&place).expect("twice");
        assert!(!held(&place).exists());
        hold(&place).expect("held");
        give_back(&place).expect("given back");
        assert!(!held(&place).exists(), "it would be taken for the next one's");
        give_back(&place).expect("twice");
        assert!(!mark(&place).exists());
    }
}
