//! What is mounted into a container from outside of its bundle: directories and single files of the host.
//! Which trees they make on the host that it runs on, where those stand on the next, and what keeps one
//! from moving. How CRIU is told of mounts is in `mounts`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use decamp_shared::workload::{FileRole, FileTree, PlacedTree, is_plain_absolute};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};

use crate::bundle::{Bind, Bundle};
use crate::error::{ContainerError, Result};
use crate::mounts;

/// Where nothing is a volume: what the kernel makes up, and devices.
const NO_FILES: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Where the source of a bind mount stands on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// As the configuration names it.
    pub source: String,
    /// The tree that it is, or is in: several mounts may show parts of one.
    pub tree: PathBuf,
    /// Where it is, at or below `tree`.
    pub path: PathBuf,
}

/// What of this host is mounted into a container from outside of its bundle.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Trees that stand beside each other, ordered by path, without numbers and sizes.
    pub(crate) trees: Vec<FileTree>,
    /// One for each mount.
    pub(crate) volumes: Vec<Volume>,
    /// What cannot be a volume, and why.
    pub(crate) obstacles: Vec<String>,
}

/// A mount that can be one.
struct Sound {
    bind: Bind,
    /// Without links.
    real: PathBuf,
    file: bool,
}

/// Looks at the sources of `bundle`'s bind mounts, as they are on this host now.
pub(crate) fn found(bundle: &Bundle) -> Found {
    let mut found = Found::default();
    let mut sound = Vec::new();
    for bind in bundle.binds().into_iter().filter(|bind| bundle.is_outside(&bind.source)) {
        match look(&bind, bundle.directory()) {
            Ok((real, file)) => sound.push(Sound { bind, real, file }),
            Err(why) => {
                found.obstacles.push(format!(
                    "{} is to be mounted from {}: {why}",
                    bind.destination,
                    bind.source.display()
                ));
            }
        }
    }
    // What holds others comes before them.
    sound.sort_by(|one, other| one.real.cmp(&other.real));
    for Sound { bind, real, file } in sound {
        let around = found.trees.iter_mut().find(|tree| real.starts_with(&tree.path));
        let tree = match around {
            Some(tree) => tree,
            None => {
                let role = if file { FileRole::VolumeFile } else { FileRole::Volume };
                found.trees.push(FileTree {
                    role: role.into(),
                    path: real.display().to_string(),
                    ..FileTree::default()
                });
                let last = found.trees.len() - 1;
                &mut found.trees[last]
            }
        };
        tree.live |= bind.writable;
        tree.mounts.push(bind.destination);
        let tree = PathBuf::from(&tree.path);
        found.volumes.push(Volume { source: bind.written, tree, path: real });
    }
    found
}

/// Where the source of a mount really is, and whether it is a file; or why it cannot be a volume.
fn look(bind: &Bind, bundle: &Path) -> std::result::Result<(PathBuf, bool), String> {
    let real =
        fs::canonicalize(&bind.source).map_err(|error| format!("it cannot be found ({error})"))?;
    let kind = fs::metadata(&real).map_err(|error| format!("it cannot be looked at ({error})"))?;
    if real.to_str().is_none() {
        return Err("its name is no UTF-8".to_owned());
    }
    if real.parent().is_none() || NO_FILES.iter().any(|top| real.starts_with(top)) {
        return Err(format!("{} is no place for files of a container", real.display()));
    }
    if !kind.is_dir() && !kind.is_file() {
        return Err("it is neither a directory nor a file".to_owned());
    }
    if fs::canonicalize(bundle).is_ok_and(|bundle| bundle.starts_with(&real)) {
        return Err("the bundle itself is in it".to_owned());
    }
    Ok((real, kind.is_file()))
}

/// What keeps the volumes of the running container whose first process is `init` from moving.
pub(crate) fn obstacles(bundle: &Bundle, init: i32) -> Result<Vec<String>> {
    let Found { volumes, mut obstacles, .. } = found(bundle);
    let binds = bundle.binds();
    let outside = binds.iter().filter(|bind| bundle.is_outside(&bind.source));
    let is_known = |bind: &&Bind| volumes.iter().any(|volume| volume.source == bind.written);
    let shown: Vec<_> = outside.filter(is_known).collect();
    if shown.is_empty() {
        return Ok(obstacles);
    }
    let root = fs::File::open(format!("/proc/{init}/root"))
        .map_err(ContainerError::io("open the container's root"))?;
    for bind in &shown {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let inside = openat2(&root, Path::new(&bind.destination), how)
            .and_then(|held| fstat(&held))
            .map(|stat| (stat.st_dev, stat.st_ino));
        let here = fs::metadata(&bind.source).map(|meta| (meta.dev(), meta.ino()));
        if !matches!((inside, here), (Ok(inside), Ok(here)) if inside == here) {
            obstacles.push(format!(
                "{} does not show what {} is now: it was replaced since it was mounted, or something \
                 else is mounted there",
                bind.destination,
                bind.source.display()
            ));
        }
    }
    let shown: Vec<_> = shown.iter().map(|bind| bind.destination.as_str()).collect();
    let within = mounts::within(bundle, init, &shown)?;
    obstacles.extend(within.into_iter().map(|(inner, outer)| {
        format!(
            "Something is mounted at {inner}, within the volume at {outer}: only what the configuration \
             mounts by itself moves"
        )
    }));
    Ok(obstacles)
}

/// The volumes of a container that comes here, whose trees stand at `trees`.
///
/// # Errors
/// When one is of no tree.
pub(crate) fn placed(volumes: &[Volume], trees: &[PlacedTree]) -> Result<Vec<Volume>> {
    let place = |volume: &Volume| {
        let below = volume.path.strip_prefix(&volume.tree).ok().filter(|below| is_plain(below));
        let mut volumes = trees.iter().filter(|placed| placed.tree.role().is_volume());
        let tree = volumes.find(|placed| Path::new(&placed.tree.path) == volume.tree);
        let (Some(below), Some(tree)) = (below, tree) else {
            return Err(ContainerError::State(format!(
                "What is mounted from {} is in no tree that comes along",
                volume.source
            )));
        };
        let tree = tree.path.clone();
        // Joining nothing would leave a slash at the end.
        let path = if below.as_os_str().is_empty() { tree.clone() } else { tree.join(below) };
        Ok(Volume { source: volume.source.clone(), tree, path })
    };
    volumes.iter().map(place).collect()
}

impl Volume {
    /// Whether its paths make sense by themselves.
    pub(crate) fn is_plain(&self) -> bool {
        let below = self.path.strip_prefix(&self.tree);
        is_plain_absolute(&self.tree) && below.is_ok_and(is_plain)
    }
}

fn is_plain(below: &Path) -> bool {
    below.components().all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use serde_json::{Value, json};

    use super::*;

    fn bundle(directory: &Path, sources: &[(&Path, &str)]) -> Bundle {
        let mount = |(number, (source, option)): (usize, &(&Path, &str))| {
            json!({"destination": format!("/{number}"), "type": "bind", "source": source,
                "options": ["rbind", option]})
        };
        let mounts: Vec<Value> = sources.iter().enumerate().map(mount).collect();
        fs::create_dir_all(directory).expect("a directory");
        Bundle::parse(directory, json!({ "mounts": mounts }).to_string().as_bytes())
            .expect("a bundle")
    }

    #[test]
    fn mounts_of_one_tree_are_one_tree() {
        let room = tempfile::tempdir().expect("a directory");
        let room = room.path().canonicalize().expect("it");
        let (data, deep) = (room.join("data"), room.join("data/deep"));
        fs::create_dir_all(&deep).expect("made");
        fs::create_dir(room.join("data-2")).expect("made");
        fs::write(room.join("conf"), "x").expect("written");
        symlink(&deep, room.join("link")).expect("a link");
        let found = found(&bundle(
            &room.join("bundle"),
            &[
                (&room.join("link"), "rw"),
                (&data, "ro"),
                (&room.join("data-2"), "ro"),
                (&room.join("conf"), "ro"),
                (&data, "ro"),
                (Path::new("/etc/hosts"), "ro"),
            ],
        ));
        assert_eq!(found.obstacles, [""; 0]);
        let trees: Vec<_> = found
            .trees
            .iter()
            .map(|tree| (tree.role(), tree.path.clone(), tree.live, tree.mounts.join(" ")))
            .collect();
        let path = |name: &str| room.join(name).display().to_string();
        assert_eq!(
            trees,
            [
                (FileRole::VolumeFile, path("conf"), false, "/3".to_owned()),
                (FileRole::Volume, path("data"), true, "/1 /4 /0".to_owned()),
                (FileRole::Volume, path("data-2"), false, "/2".to_owned()),
            ]
        );
        let linked = found.volumes.iter().find(|volume| volume.source.ends_with("link"));
        let linked = linked.expect("it");
        assert_eq!((&linked.tree, &linked.path), (&data, &deep));
        assert!(found.volumes.iter().all(Volume::is_plain));

        // On another host.
        let there = |tree: &FileTree| PlacedTree {
            tree: tree.clone(),
            path: Path::new("/there").join(Path::new(&tree.path).file_name().expect("a name")),
        };
        let trees: Vec<_> = found.trees.iter().map(there).collect();
        let placed = super::placed(&found.volumes, &trees).expect("all of them");
        let linked = placed.iter().find(|volume| volume.source.ends_with("link")).expect("it");
        assert_eq!(linked.path, Path::new("/there/data/deep"));
        let file = placed.iter().find(|volume| volume.source.ends_with("conf")).expect("it");
        assert_eq!(file.path.as_os_str(), "/there/conf");
        let lie = Volume { path: data.join("../../etc"), ..linked.clone() };
        assert!(super::placed(&[lie], &trees).is_err());
        let stray = Volume { tree: "/etc".into(), path: "/etc".into(), source: "/etc".into() };
        assert!(super::placed(&[stray], &trees).is_err());
    }

    #[test]
    fn what_is_no_volume_is_said_each() {
        let room = tempfile::tempdir().expect("a directory");
        let pipe = room.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        symlink("/proc/sys", room.path().join("link")).expect("a link");
        let found = found(&bundle(
            &room.path().join("bundle"),
            &[
                (&room.path().join("none"), "rw"),
                (&pipe, "rw"),
                (Path::new("/dev/null"), "rw"),
                (&room.path().join("link"), "rw"),
                (room.path(), "rw"),
                (Path::new("/"), "ro"),
            ],
        ));
        assert_eq!(found.obstacles.len(), 6, "{:?}", found.obstacles);
        assert!(found.trees.is_empty());
        for text in
            ["cannot be found", "neither a directory", "no place for files", "the bundle itself"]
        {
            assert!(found.obstacles.iter().any(|obstacle| obstacle.contains(text)), "{text}");
        }
    }
}
