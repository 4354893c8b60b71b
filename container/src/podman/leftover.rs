//! What a container that came to podman has on this host and podman knows nothing of: its root file system,
//! where that stands in our own directory, and the directory of its arrival. Either is noted, and goes when
//! nobody needs it any more: the one when podman has no such container, the other when its `conmon` has ended.

use std::cell::OnceCell;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::found::HOME;
use super::{ask, has, image, on_host};
use crate::error::{ContainerError, Result};
use crate::runtime::start_time;

/// Ends the names of notes.
const NOTE: &str = "note";
/// Ends the names of what is being removed.
const GOING: &str = "going";

/// What there is of one.
#[derive(Debug, Serialize, Deserialize)]
struct Left {
    /// Its name for podman.
    id: String,
    rootfs: PathBuf,
    directory: PathBuf,
    /// Its `conmon`, once it runs, and when that started.
    conmon: Option<(i32, u64)>,
    /// Where podman keeps its record.
    records: Records,
}

/// A directory in which podman keeps records, so that it is known again: whether podman lacks a container counts
/// for nothing while it looks elsewhere, or where a file system is not mounted yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Records {
    path: PathBuf,
    inode: u64,
    /// When the directory was made, where the file system says so.
    born: Option<SystemTime>,
}

impl Records {
    /// Where podman keeps them now.
    fn now() -> Result<Self> {
        let known = ask(&["info", "--format", "json"])?;
        let path = known.pointer("/store/graphRoot").and_then(Value::as_str);
        let path = path.ok_or_else(|| {
            ContainerError::State("podman does not say where it keeps its records".to_owned())
        })?;
        on_host(|| Self::at(Path::new(path)))
    }

    fn at(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)?;
        Ok(Self { path: path.to_owned(), inode: found.ino(), born: found.created().ok() })
    }
}

/// What podman says of a container: whether it has it, if it says so, and where it has looked.
struct Known {
    has: Option<bool>,
    records: Option<Records>,
}

/// Whoever comes to use these two: what was noted of them before is no more.
pub(super) fn supersede(rootfs: &Path, directory: &Path) -> Result<()> {
    let home = Path::new(HOME);
    make(home)?;
    let _alone = alone(home)?;
    for (path, left) in notes(home) {
        if left.rootfs == rootfs || left.directory == directory {
            fs::remove_file(&path)
                .map_err(ContainerError::io(format!("remove {}", path.display())))?;
        }
    }
    Ok(())
}

/// Makes the directory for what podman has of us, which nobody else may look into, as in podman's own.
pub(super) fn make(home: &Path) -> Result<()> {
    let failed = || format!("make {}", home.display());
    fs::create_dir_all(home).map_err(ContainerError::io(failed()))?;
    // Earlier versions left it open.
    fs::set_permissions(home, fs::Permissions::from_mode(0o700))
        .map_err(ContainerError::io(failed()))
}

/// Notes that podman has made the container `id`, with these.
pub(super) fn note(id: &str, rootfs: &Path, directory: &Path) -> Result<()> {
    let (rootfs, directory, records) = (rootfs.to_owned(), directory.to_owned(), Records::now()?);
    Left { id: id.to_owned(), rootfs, directory, conmon: None, records }.write(Path::new(HOME))
}

/// Notes the `conmon` of the container `id`.
pub(super) fn note_conmon(id: &str, conmon: i32) -> Result<()> {
    let home = Path::new(HOME);
    let Some(left) = Left::read(&path(home, id, NOTE)) else { return Ok(()) };
    Left { conmon: Some((conmon, start_time(conmon)?)), ..left }.write(home)
}

/// Forgets the container `id`, of which nothing is left.
pub(super) fn forget(id: &str) {
    let _ = fs::remove_file(path(Path::new(HOME), id, NOTE));
}

/// Takes away what nobody needs any more (images too that stayed mounted), but for root file systems that
/// `is_used` says are. Nobody may come to use one meanwhile. Gives directories that are still to be removed,
/// which nobody can find any more.
pub fn clear(is_used: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let home = Path::new(HOME);
    match alone(home) {
        Ok(_alone) => {
            if let Err(error) = make(home) {
                tracing::warn!(%error, "Others can look into what podman has of us");
            }
            image::unmount_left(home);
            // Asked once, and only if anything has come here.
            let records = OnceCell::new();
            let ask = |id: &str| Known {
                has: has(id),
                records: records.get_or_init(|| Records::now().ok()).clone(),
            };
            clear_in(home, ask, is_used)
        }
        // Nothing came here yet.
        Err(_) => Vec::new(),
    }
}

/// While this is held nobody else changes what is noted.
fn alone(home: &Path) -> Result<Flock<File>> {
    let failed = format!("lock {}", home.display());
    let file = File::open(home).map_err(ContainerError::io(failed.clone()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| ContainerError::errno(failed)(errno))
}

/// All notes.
fn notes(home: &Path) -> Vec<(PathBuf, Left)> {
    let entries = fs::read_dir(home).into_iter().flatten().flatten().map(|entry| entry.path());
    let notes = entries.filter(|path| path.extension().is_some_and(|end| end == NOTE));
    notes.filter_map(|path| Left::read(&path).map(|left| (path, left))).collect()
}

fn clear_in(
    home: &Path,
    podman_knows: impl Fn(&str) -> Known,
    is_used: impl Fn(&Path) -> bool,
) -> Vec<PathBuf> {
    // An earlier removal may have been cut short.
    let is_going = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        name.starts_with(b".") && path.extension().is_some_and(|end| end == GOING)
    };
    let entries = fs::read_dir(home).into_iter().flatten().flatten();
    let mut going: Vec<_> = entries.map(|entry| entry.path()).filter(is_going).collect();
    for (note, left) in notes(home) {
        let Known { has: Some(has), records } = podman_knows(&left.id) else { continue };
        if !has && records.as_ref() != Some(&left.records) {
            tracing::warn!(
                id = left.id,
                records = %left.records.path.display(),
                rootfs = %left.rootfs.display(),
                "podman does not look where it had the record of a container: its files stay"
            );
            continue;
        }
        let ended = |(pid, started): (i32, u64)| start_time(pid).ok() != Some(started);
        if !has || left.conmon.is_some_and(ended) {
            let _ = fs::remove_dir_all(&left.directory);
        }
        // Another configuration may have podman look for its containers elsewhere.
        if has || is_used(&left.rootfs) || is_lived_in(&left.rootfs) {
            continue;
        }
        // One that people gave a place is theirs.
        if left.rootfs.parent() == Some(home) && left.rootfs.is_dir() {
            let gone = path(home, &left.id, GOING);
            if let Err(error) = fs::rename(&left.rootfs, &gone) {
                tracing::warn!(%error, path = %left.rootfs.display(), "Cannot remove what podman had");
                continue;
            }
            going.push(gone);
        }
        let _ = fs::remove_file(&note);
    }
    going
}

/// Whether the root of any process is the directory at `rootfs`.
fn is_lived_in(rootfs: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let Some(wanted) = identity(rootfs) else { return false };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    // A link to where its root is, which is followed there.
    processes.map(|entry| entry.path().join("root/.")).any(|root| identity(&root) == Some(wanted))
}

/// Hidden, so that it is no container's.
fn path(home: &Path, id: &str, end: &str) -> PathBuf {
    home.join(format!(".{id}.{end}"))
}

impl Left {
    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    fn write(&self, home: &Path) -> Result<()> {
        let path = path(home, &self.id, NOTE);
        let fresh = path.with_extension("new");
        make(home)?;
        let written = serde_json::to_vec(self)
            .map_err(std::io::Error::from)
            .and_then(|text| fs::write(&fresh, text))
            .and_then(|()| fs::rename(&fresh, &path));
        written.map_err(ContainerError::io(format!("write {}", path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_goes_that_somebody_needs() {
        let room = tempfile::tempdir().expect("a directory");
        let home = room.path();
        let (rootfs, directory) = (home.join("web"), home.join("arrival"));
        let us = std::process::id() as i32;
        let lives = Some((us, start_time(us).expect("a time")));
        let ended = Some((us, 0));
        let records = Records::at(home).expect("a directory");
        let elsewhere = Records { inode: records.inode + 1, ..records.clone() };
        let make = |conmon| {
            fs::create_dir_all(&rootfs)
                .and_then(|()| fs::create_dir_all(&directory))
                .expect("made");
            let (rootfs, directory) = (rootfs.clone(), directory.clone());
            let records = records.clone();
            Left { id: "7".into(), rootfs, directory, conmon, records }.write(home).expect("noted");
        };
        let there = || Some(records.clone());
        for (has, records, used, conmon, stays) in [
            (Some(true), there(), false, lives, (true, true)),
            (Some(true), there(), false, None, (true, true)),
            (Some(true), there(), false, ended, (true, false)),
            (None, there(), false, ended, (true, true)),
            (Some(false), there(), true, ended, (true, false)),
            // It looked elsewhere, or does not say where.
            (Some(false), Some(elsewhere), false, ended, (true, true)),
            (Some(false), None, false, ended, (true, true)),
            (Some(false), there(), false, ended, (false, false)),
        ] {
            make(conmon);
            let known = |_: &str| Known { has, records: records.clone() };
            let going = clear_in(home, known, |path| used && path == rootfs);
            assert_eq!((rootfs.exists(), directory.exists()), stays, "{has:?} {used} {conmon:?}");
            assert_eq!(path(home, "7", NOTE).exists(), stays.0);
            assert_eq!(going.len(), usize::from(!stays.0));
        }
        assert_eq!(fs::metadata(home).expect("there").mode() & 0o777, 0o700);
        // What could not be removed is tried again.
        let known = |_: &str| Known { has: None, records: None };
        assert_eq!(clear_in(home, known, |_| false), [path(home, "7", GOING)]);
    }

    #[test]
    fn a_root_of_a_process_is_lived_in() {
        let room = tempfile::tempdir().expect("a directory");
        assert!(is_lived_in(Path::new("/")) && !is_lived_in(room.path()));
        assert!(!is_lived_in(&room.path().join("nothing")));
    }

    #[test]
    fn what_stands_elsewhere_stays() {
        let (room, other) = (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("two"));
        let (rootfs, directory) = (other.path().to_owned(), room.path().join("arrival"));
        let records = Records::at(room.path()).expect("a directory");
        let known = |_: &str| Known { has: Some(false), records: Some(records.clone()) };
        let left =
            Left { id: "7".into(), rootfs, directory, conmon: None, records: records.clone() };
        left.write(room.path()).expect("noted");
        assert!(clear_in(room.path(), known, |_| false).is_empty());
        assert!(other.path().exists() && !path(room.path(), "7", NOTE).exists());
    }
}
