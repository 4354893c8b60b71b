//! What is mounted into a container of podman's from outside of its root file system: podman's volumes,
//! which are directories under a name, and anything else of the host. What they hold travels as of any
//! container; here the next podman gets a volume of each name, and is told what is mounted where.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use decamp_shared::workload::{PlacedTree, Storage};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::command::exists;
use super::{ask, on_host, podman, run};
use crate::bundle::{Bind, Bundle, is_host_file};
use crate::error::{ContainerError, Result};
use crate::volumes::Volume;

/// What podman takes for options of a mount.
const OPTIONS: [&str; 18] = [
    "rw",
    "ro",
    "bind",
    "rbind",
    "exec",
    "noexec",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "private",
    "rprivate",
    "shared",
    "rshared",
    "slave",
    "rslave",
    "unbindable",
    "runbindable",
];

/// A volume of podman's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedVolume {
    /// Its name.
    pub name: String,
    /// Its directory, as the configuration of its container has it.
    pub source: String,
    /// Its labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Whether both hosts have the very same: the destination's to know.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

/// The volumes of a container of which podman says `said`.
pub(super) fn of_container(said: &Value, against: &mut Vec<String>) -> Vec<NamedVolume> {
    let removed = said.pointer("/HostConfig/AutoRemove").and_then(Value::as_bool) == Some(true);
    let mut found: Vec<NamedVolume> = Vec::new();
    for mount in said.pointer("/Mounts").and_then(Value::as_array).into_iter().flatten() {
        let text = |key: &str| mount[key].as_str().unwrap_or_default().to_owned();
        let (kind, name, source) = (text("Type"), text("Name"), text("Source"));
        if kind == "bind" || found.iter().any(|volume| volume.name == name) {
            continue;
        }
        let known = ask(&["volume", "inspect", "--", &name]).ok();
        let Some(known) = known.filter(|_| kind == "volume") else {
            against.push(format!(
                "What is mounted at {} is a {kind} of podman's, which is not moved",
                text("Destination")
            ));
            continue;
        };
        let is_plain = known[0]["Options"].as_object().is_none_or(|options| options.is_empty());
        if !is_plain || !["", "local"].contains(&text("Driver").as_str()) {
            against.push(format!(
                "The volume {name} has a driver or options of its own (podman volume inspect {name}), which \
                 do not go along"
            ));
        }
        if removed && known[0]["Anonymous"] == true {
            against.push(format!(
                "podman would remove the volume at {} here when it has left (--rm): give that a name \
                 (podman run -v NAME:{0})",
                text("Destination")
            ));
        }
        let labels = known[0]["Labels"].as_object().into_iter().flatten();
        let labels = labels.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.into())));
        found.push(NamedVolume { name, source, labels: labels.collect(), shared: false });
    }
    found
}

/// Whether podman mounts something at a volume when it is used.
fn is_mount(volume: &Value) -> bool {
    let options = volume["Options"].as_object();
    options.is_some_and(|options| options.keys().any(|key| ["type", "device"].contains(&&**key)))
}

/// Notes which of `volumes` both hosts have, now that this is decided for `trees`; all that is mounted stands
/// where `placed` says.
pub(crate) fn note_shared(volumes: &mut [NamedVolume], placed: &[Volume], trees: &[PlacedTree]) {
    for volume in volumes {
        let its = placed.iter().find(|placed| placed.source == volume.source);
        let tree = trees.iter().find(|tree| its.is_some_and(|its| its.tree == tree.path));
        volume.shared = tree.is_some_and(|placed| placed.tree.storage() == Storage::Shared);
    }
}

/// Why this host's podman cannot take what is mounted of `bundle`, with `volumes` among it, whose
/// directories are to be where `bundle` says.
pub(crate) fn refusals(volumes: &[NamedVolume], bundle: &Bundle) -> Vec<String> {
    let mut found = Vec::new();
    for bind in told(bundle) {
        let source = bind.source.display().to_string();
        if [&source, &bind.destination].iter().any(|path| path.contains([':', ',', '\n'])) {
            found.push(format!(
                "podman cannot be told to mount {source} at {}: it reads : and , for itself",
                bind.destination
            ));
        }
    }
    if volumes.is_empty() {
        return found;
    }
    let kept = ask(&["info", "--format", "json"]).ok();
    let kept = kept.as_ref().and_then(|said| said.pointer("/store/volumePath")?.as_str());
    for volume in volumes {
        let name = &volume.name;
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let starts = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        let Some(placed) = bundle.volume(&volume.source) else {
            found.push(format!("What is in podman's volume {name:?} does not come along"));
            continue;
        };
        if !starts || !name.bytes().all(good) {
            found.push(format!("{name:?} is no name of a volume of podman's"));
            continue;
        }
        let known = ask(&["volume", "inspect", "--", name]).ok();
        let point = known.as_ref().and_then(|known| known[0]["Mountpoint"].as_str());
        let point = point.map(PathBuf::from);
        match point.or_else(|| kept.map(|kept| Path::new(kept).join(name).join("_data"))) {
            Some(point) if !is_same(&point, &placed.path) => found.push(format!(
                "podman has its volume {name} at {} there, not at {}: --path {}={0}",
                point.display(),
                placed.path.display(),
                volume.source
            )),
            Some(_) => {}
            None => found.push("podman does not say where it keeps its volumes there".to_owned()),
        }
        match known {
            Some(known) if is_mount(&known[0]) => found.push(format!(
                "podman mounts something else at its volume {name} there: podman volume rm {name}"
            )),
            Some(_) if !volume.shared => found.extend(used(name)),
            None if volume.shared => found.push(format!(
                "podman has no volume {name} there, whose storage is to be shared: podman volume create \
                 {name}, while that storage is not mounted there, for podman changes the owner of what it \
                 makes a volume"
            )),
            _ => {}
        }
    }
    found
}

/// Why a volume that podman has already cannot be that of one that comes.
fn used(name: &str) -> Option<String> {
    let filter = format!("volume={name}");
    let arguments = ["ps", "--all", "--filter", &filter, "--format", "{{.Names}}"];
    let users = match run(&mut podman(&arguments)) {
        Ok(said) => said.lines().collect::<Vec<_>>().join(", "),
        Err(error) => return Some(error.to_string()),
    };
    (!users.is_empty()).then(|| {
        format!(
            "podman's volume {name} is that of another container there ({users}): podman rm removes one \
             that is not needed any more"
        )
    })
}

fn is_same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    one == other || real(one) == real(other)
}

/// What podman is told of: all that is mounted but its own files.
fn told(bundle: &Bundle) -> impl Iterator<Item = Bind> {
    bundle.binds().into_iter().filter(|bind| !is_host_file(&bind.source))
}

/// What `podman create` is told, for each mount.
pub(super) fn arguments(volumes: &[NamedVolume], bundle: &Bundle) -> Vec<String> {
    let argument = |bind: Bind| {
        let volume = volumes.iter().find(|volume| volume.source == bind.written);
        let known = bind.options.iter().map(String::as_str);
        let mut options: Vec<_> = known.filter(|option| OPTIONS.contains(option)).collect();
        // What is in it has come, and nothing of the image is to be added.
        options.extend(volume.map(|_| "nocopy"));
        let what = volume.map_or(bind.source.display().to_string(), |volume| volume.name.clone());
        format!("--volume={what}:{}:{}", bind.destination, options.join(","))
    };
    told(bundle).map(argument).collect()
}

/// Where `volumes` stand here.
pub(super) fn directories(volumes: &[NamedVolume], bundle: &Bundle) -> Vec<PathBuf> {
    let placed = volumes.iter().filter_map(|volume| bundle.volume(&volume.source));
    placed.map(|placed| placed.path.clone()).collect()
}

/// Those of `volumes` that podman is to make.
///
/// # Errors
/// When podman does not say which it has.
pub(super) fn lacking(volumes: &[NamedVolume]) -> Result<Vec<&NamedVolume>> {
    let mut lacking = Vec::new();
    for volume in volumes.iter().filter(|volume| !volume.shared) {
        let name = &volume.name;
        let has = exists("volume", name).ok_or_else(|| {
            ContainerError::State(format!("podman does not say whether it has the volume {name}"))
        })?;
        if !has {
            lacking.push(volume);
        }
    }
    Ok(lacking)
}

/// The names of those of `volumes`, which podman lacks, that are nobody's: nothing is where they are to be.
pub(super) fn nobodys(volumes: &[&NamedVolume], bundle: &Bundle) -> Vec<String> {
    let is_nobodys = |volume: &&&NamedVolume| {
        let place = bundle.volume(&volume.source).map(|placed| &placed.path);
        let entries = place.and_then(|place| fs::read_dir(place).ok());
        entries.is_none_or(|mut entries| entries.next().is_none())
    };
    volumes.iter().filter(is_nobodys).map(|volume| volume.name.clone()).collect()
}

/// Has podman make `volumes`.
pub(super) fn make(volumes: &[&NamedVolume]) -> Result<()> {
    for volume in volumes {
        let labels: Vec<_> =
            volume.labels.iter().map(|(key, value)| format!("--label={key}={value}")).collect();
        let mut command = podman(&["volume", "create"]);
        run(command.args(labels).args(["--", &volume.name]))?;
    }
    Ok(())
}

/// Has podman remove volumes that it made for what did not come.
pub(super) fn remove(names: &[String]) {
    for name in names {
        if let Err(error) = run(&mut podman(&["volume", "rm", "--", name])) {
            tracing::warn!(%error, "podman keeps a volume of a container that did not come");
        }
    }
}

/// Has podman remove those of these volumes that hold nothing: whoever died knew more of the others.
pub(super) fn remove_empty(names: &[String]) {
    let is_empty = |name: &&String| {
        let Ok(known) = ask(&["volume", "inspect", "--", name]) else { return false };
        let Some(place) = known[0]["Mountpoint"].as_str() else { return false };
        on_host(|| fs::read_dir(place)).is_ok_and(|mut entries| entries.next().is_none())
    };
    let empty: Vec<_> = names.iter().filter(is_empty).cloned().collect();
    remove(&empty);
}

/// Stands where files will come: podman makes no record of a container whose sources are not there. Gone
/// when this is dropped.
#[derive(Default)]
pub(super) struct StandIns(Vec<PathBuf>);

impl StandIns {
    pub(super) fn make(volumes: &[NamedVolume], bundle: &Bundle) -> Result<Self> {
        let mut made = Self::default();
        for bind in told(bundle) {
            let named = volumes.iter().any(|volume| volume.source == bind.written);
            if !named && !bind.source.exists() {
                made.stand_at(&bind.source)?;
            }
        }
        Ok(made)
    }

    fn stand_at(&mut self, path: &Path) -> Result<()> {
        let missing: Vec<_> = path.ancestors().take_while(|path| !path.exists()).collect();
        for path in missing.into_iter().rev() {
            fs::create_dir(path).map_err(ContainerError::io(format!("make {}", path.display())))?;
            self.0.push(path.to_owned());
        }
        Ok(())
    }
}

impl Drop for StandIns {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            // What has something in it is somebody's.
            let _ = fs::remove_dir(path);
        }
    }
}

/// Owner, mode and time of directories of volumes: podman changes them when a container first uses one. They
/// are put back when this is dropped: somebody may use them who has nothing to do with that container.
pub(super) struct Attributes(Vec<(PathBuf, fs::Metadata)>);

impl Attributes {
    pub(super) fn of(volumes: &[PathBuf]) -> Result<Self> {
        let look = |path: &PathBuf| {
            let found = fs::metadata(path);
            let found = found.map_err(ContainerError::io(format!("look at {}", path.display())))?;
            Ok((path.clone(), found))
        };
        volumes.iter().map(look).collect::<Result<_>>().map(Self)
    }

    /// Puts them back now.
    ///
    /// # Errors
    /// When one cannot be put back.
    pub(super) fn put_back(mut self) -> Result<()> {
        for (path, was) in &self.0 {
            put_back(path, was).map_err(ContainerError::io(format!(
                "give {} its owner, mode and time back",
                path.display()
            )))?;
        }
        self.0.clear();
        Ok(())
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        for (path, was) in &self.0 {
            if let Err(error) = put_back(path, was) {
                tracing::error!(%error, path = %path.display(), "Cannot give a volume its owner, mode and time back");
            }
        }
    }
}

fn put_back(path: &Path, was: &fs::Metadata) -> io::Result<()> {
    let look = |found: &fs::Metadata| {
        Ok::<_, io::Error>((found.uid(), found.gid(), found.mode(), found.modified()?))
    };
    let now = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if look(&now)? == look(was)? {
        return Ok(());
    }
    chown(path, Some(was.uid()), Some(was.gid()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(was.mode()))?;
    File::open(path)?.set_modified(was.modified()?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn bundle(mounts: Value) -> Bundle {
        let config = json!({ "mounts": mounts }).to_string();
        let placed = |source: &str, path: &str| Volume {
            source: source.into(),
            tree: path.into(),
            path: path.into(),
        };
        let volumes = [placed("/v/data/_data", "/w/data/_data"), placed("/srv/x", "/srv/y")];
        Bundle::parse(Path::new("/r"), config.as_bytes()).expect("a bundle").with_volumes(&volumes)
    }

    fn data() -> NamedVolume {
        let (name, source) = ("data".into(), "/v/data/_data".into());
        NamedVolume { name, source, ..NamedVolume::default() }
    }

    #[test]
    fn podman_is_told_of_what_is_mounted_by_name_or_by_place() {
        let bundle = bundle(json!([
            {"destination": "/data", "type": "bind", "source": "/v/data/_data",
                "options": ["rw", "rprivate", "nosuid", "rbind", "idmap"]},
            {"destination": "/x", "type": "bind", "source": "/srv/x", "options": ["ro", "rbind"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts"},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
        ]));
        assert_eq!(
            arguments(&[data()], &bundle),
            ["--volume=data:/data:rw,rprivate,nosuid,rbind,nocopy", "--volume=/srv/y:/x:ro,rbind"]
        );
    }

    #[test]
    fn what_podman_would_read_otherwise_is_refused() {
        let mount = |destination: &str| {
            bundle(json!([{"destination": destination, "type": "bind", "source": "/srv/x"}]))
        };
        assert_eq!(refusals(&[], &mount("/x")), [""; 0]);
        for bad in ["/x:ro", "/x,y", "/x\n"] {
            assert_eq!(refusals(&[], &mount(bad)).len(), 1, "{bad}");
        }
    }

    #[test]
    fn what_stands_in_is_gone_and_what_came_meanwhile_is_not() {
        let room = tempfile::tempdir().expect("a directory");
        let (one, two) = (room.path().join("a/b"), room.path().join("c"));
        let mut stand_ins = StandIns::default();
        stand_ins.stand_at(&one).expect("made");
        stand_ins.stand_at(&two).expect("made");
        fs::write(two.join("file"), "").expect("written");
        drop(stand_ins);
        assert!(!room.path().join("a").exists() && two.join("file").exists());
    }

    #[test]
    fn owner_mode_and_time_are_put_back() {
        let room = tempfile::tempdir().expect("a directory");
        let path = room.path().join("volume");
        fs::create_dir(&path).expect("made");
        let was = fs::metadata(&path).expect("it");
        let look = || Attributes::of(std::slice::from_ref(&path)).expect("looked");
        let (attributes, again) = (look(), look());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("changed");
        fs::write(path.join("file"), "").expect("written");
        let is_as_it_was = || {
            let now = fs::metadata(&path).expect("it");
            (was.mode(), was.modified().ok()) == (now.mode(), now.modified().ok())
        };
        attributes.put_back().expect("put back");
        assert!(is_as_it_was());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o711)).expect("changed");
        drop(again);
        assert!(is_as_it_was(), "whatever went wrong");
    }
}
