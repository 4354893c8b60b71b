//! What a container that came to podman has on this host and podman knows nothing of: its root file system,
//! where that stands in our own directory, and the directory of its arrival. Either is noted, and goes when
//! nobody needs it any more: the one when podman has no such container, the other when its `conmon` has ended.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::found::HOME;
use super::has;
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
}

/// Whoever comes to use these two: what was noted of them before is no more.
pub(super) fn supersede(rootfs: &Path, directory: &Path) -> Result<()> {
    let home = Path::new(HOME);
    fs::create_dir_all(home).map_err(ContainerError::io(format!("make {HOME}")))?;
    let _alone = alone(home)?;
    for (path, left) in notes(home) {
        if left.rootfs == rootfs || left.directory == directory {
            fs::remove_file(&path)
                .map_err(ContainerError::io(format!("remove {}", path.display())))?;
        }
    }
    Ok(())
}

/// Notes that podman has made the container `id`, with these.
pub(super) fn note(id: &str, rootfs: &Path, directory: &Path) -> Result<()> {
    let (rootfs, directory) = (rootfs.to_owned(), directory.to_owned());
    Left { id: id.to_owned(), rootfs, directory, conmon: None }.write(Path::new(HOME))
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

/// Takes away what nobody needs any more, but for root file systems that `is_used` says are. Nobody may come to
/// use one meanwhile. Gives directories that are still to be removed, which nobody can find any more.
pub fn clear(is_used: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let home = Path::new(HOME);
    match alone(home) {
        Ok(_alone) => clear_in(home, has, is_used),
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
    podman_has: impl Fn(&str) -> Option<bool>,
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
        let Some(has) = podman_has(&left.id) else { continue };
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
        let written = fs::create_dir_all(home)
            .and_then(|()| Ok(serde_json::to_vec(self)?))
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
        let make = |conmon| {
            fs::create_dir_all(&rootfs)
                .and_then(|()| fs::create_dir_all(&directory))
                .expect("made");
            let (rootfs, directory) = (rootfs.clone(), directory.clone());
            Left { id: "7".into(), rootfs, directory, conmon }.write(home).expect("noted");
        };
        for (has, used, conmon, stays) in [
            (Some(true), false, lives, (true, true)),
            (Some(true), false, None, (true, true)),
            (Some(true), false, ended, (true, false)),
            (None, false, ended, (true, true)),
            (Some(false), true, ended, (true, false)),
            (Some(false), false, ended, (false, false)),
        ] {
            make(conmon);
            let going = clear_in(home, |_| has, |path| used && path == rootfs);
            assert_eq!((rootfs.exists(), directory.exists()), stays, "{has:?} {used} {conmon:?}");
            assert_eq!(path(home, "7", NOTE).exists(), stays.0);
            assert_eq!(going.len(), usize::from(!stays.0));
        }
        // What could not be removed is tried again.
        assert_eq!(clear_in(home, |_| None, |_| false), [path(home, "7", GOING)]);
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
        let left = Left { id: "7".into(), rootfs, directory, conmon: None };
        left.write(room.path()).expect("noted");
        assert!(clear_in(room.path(), |_| Some(false), |_| false).is_empty());
        assert!(other.path().exists() && !path(room.path(), "7", NOTE).exists());
    }
}
