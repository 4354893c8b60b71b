//! What this host's podman has of images and networks, for containers that come out of a file of podman's.
//!
//! That an image is mounted for us is noted beforehand, for podman keeps it mounted until it is told that nobody
//! needs it any more, and who would tell it may be killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::found::HOME;
use super::{ask, leftover, podman, run};
use crate::error::{ContainerError, Result};
use crate::runtime::start_time;

/// Ends the names of notes.
const NOTE: &str = "image";

/// An image that podman has mounted for us. Dropped, it is mounted no more, unless for others.
#[derive(Debug)]
pub(crate) struct MountedImage {
    id: String,
    path: PathBuf,
    note: PathBuf,
}

/// Who has which image mounted: a process of ours, and when it started.
#[derive(Debug, Serialize, Deserialize)]
struct Mounting {
    id: String,
    process: (i32, u64),
}

/// The image of a container that podman has restored from a file of ours: an empty one.
pub(crate) const EMPTY: &str = "localhost/decamp/empty:latest";

/// Whether this is the name of an image by its content, or that of the empty one: nothing that podman could
/// take for an option, or fetch.
fn is_id(id: &str) -> bool {
    id == EMPTY || (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Why this host's podman cannot give the image `id`, which was called `name` where it was used.
pub(crate) fn obstacle(id: &str, name: &str) -> Option<String> {
    if !is_id(id) {
        return Some(format!("{id:?} is no identity of an image"));
    }
    match run(&mut podman(&["image", "exists", id])) {
        Ok(_) => None,
        Err(ContainerError::Tool { .. }) => Some(format!(
            "Its files are told as changes to the image {name} ({}), which this host's podman does not have: \
             podman pull {name}, or podman save {name} where it is and podman load here",
            &id[..12]
        )),
        Err(error) => Some(format!(
            "Its files are told as changes to the image {name}, for which podman is needed here: {error}"
        )),
    }
}

impl MountedImage {
    /// Has podman mount the image `id`.
    pub(crate) fn mount(id: &str) -> Result<Self> {
        let note = Mounting::note(Path::new(HOME), id)?;
        let said = run(&mut podman(&["image", "mount", id]));
        let said = said.inspect_err(|_| drop(fs::remove_file(&note)))?;
        let mounted = Self { id: id.to_owned(), path: PathBuf::from(said.trim()), note };
        match mounted.path.is_absolute() && mounted.path.is_dir() {
            true => Ok(mounted),
            false => Err(ContainerError::Tool {
                tool: super::PROGRAM,
                what: "image mount".to_owned(),
                said: format!("no directory: {}", said.trim()),
            }),
        }
    }

    /// Where its files are.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for MountedImage {
    fn drop(&mut self) {
        if let Err(error) = run(&mut podman(&["image", "unmount", &self.id])) {
            tracing::warn!(%error, image = self.id, "podman keeps an image mounted");
        }
        let _ = fs::remove_file(&self.note);
    }
}

impl Mounting {
    /// Notes that this process has the image `id` mounted.
    fn note(home: &Path, id: &str) -> Result<PathBuf> {
        static COUNTED: AtomicU32 = AtomicU32::new(0);
        leftover::make(home)?;
        let own = std::process::id() as i32;
        let mounting = Self { id: id.to_owned(), process: (own, start_time(own)?) };
        let count = COUNTED.fetch_add(1, Ordering::Relaxed);
        // Hidden, so that it is no container's.
        let path = home.join(format!(".{own}-{}-{count}.{NOTE}", mounting.process.1));
        let written = serde_json::to_vec(&mounting)
            .map_err(std::io::Error::from)
            .and_then(|text| fs::write(&path, text));
        written.map_err(ContainerError::io(format!("write {}", path.display())))?;
        Ok(path)
    }

    /// Whether whoever noted it still lives.
    fn is_held(&self) -> bool {
        let (process, started) = self.process;
        start_time(process).ok() == Some(started)
    }
}

/// Has podman unmount the images that were mounted by one of us who was killed meanwhile.
pub(super) fn unmount_left(home: &Path) {
    unmount_left_by(home, |id| {
        // That it is not mounted is no error.
        let unmounted = run(&mut podman(&["image", "unmount", id])).map(drop);
        unmounted.or_else(|error| match run(&mut podman(&["image", "exists", id])) {
            Err(ContainerError::Tool { .. }) => Ok(()),
            _ => Err(error),
        })
    });
}

fn unmount_left_by(home: &Path, unmount: impl Fn(&str) -> Result<()>) {
    let entries = fs::read_dir(home).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in entries.filter(|path| path.extension().is_some_and(|end| end == NOTE)) {
        let read = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let left: Option<Mounting> = read;
        match left.filter(|left| is_id(&left.id)) {
            Some(left) if left.is_held() => continue,
            Some(left) => {
                if let Err(error) = unmount(&left.id) {
                    tracing::warn!(%error, image = left.id, "podman keeps an image mounted");
                    continue;
                }
                tracing::info!(image = left.id, "Unmounted an image that had stayed mounted");
            }
            // It was being written when its writer was killed, before anything was mounted.
            None => {}
        }
        let _ = fs::remove_file(&path);
    }
}

/// The bridge of podman's network `name`, or why there is none.
pub(crate) fn bridge_of(name: &str) -> std::result::Result<String, String> {
    let said = ask(&["network", "inspect", "--", name]).map_err(|_| {
        format!(
            "It was in podman's network {name}, which this host's podman does not have: podman network \
             create {name}, with the same subnet"
        )
    })?;
    let bridge = said.pointer("/0/network_interface").and_then(Value::as_str);
    bridge
        .map(str::to_owned)
        .ok_or_else(|| format!("podman's network {name} has no bridge, and so is none for it"))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn what_one_left_who_was_killed_is_unmounted_once() {
        let room = tempfile::tempdir().expect("a directory");
        let home = room.path();
        let unmounted = RefCell::new(Vec::new());
        let sweep = |works: bool| {
            unmount_left_by(home, |id| {
                unmounted.borrow_mut().push(id.to_owned());
                if works { Ok(()) } else { Err(ContainerError::State("No podman".to_owned())) }
            });
            unmounted.take()
        };
        let held = Mounting::note(home, EMPTY).expect("noted");
        assert_eq!(sweep(true), [""; 0], "it is in use");
        let own = std::process::id() as i32;
        let write = |name: &str, id: &str| {
            let gone = Mounting { id: id.to_owned(), process: (own, 1) };
            let text = serde_json::to_vec(&gone).expect("JSON");
            fs::write(home.join(format!(".{name}.{NOTE}")), text).expect("written");
        };
        write("gone", EMPTY);
        // Nothing that podman could take for an option.
        write("odd", "--all");
        fs::write(home.join(".cut.image"), "{").expect("written");
        assert_eq!(sweep(false), [EMPTY], "tried, and noted on");
        assert_eq!(sweep(true), [EMPTY]);
        assert_eq!(sweep(true), [""; 0]);
        let left: Vec<_> = fs::read_dir(home).expect("a directory").flatten().collect();
        assert_eq!(left.iter().map(|entry| entry.path()).collect::<Vec<_>>(), [held]);
    }
}
