//! What this host's podman has of images and networks, for containers that come out of a file of podman's.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{ask, podman, run};
use crate::error::{ContainerError, Result};

/// An image that podman has mounted for us. Dropped, it is mounted no more, unless for others.
#[derive(Debug)]
pub(crate) struct MountedImage {
    id: String,
    path: PathBuf,
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
        let said = run(&mut podman(&["image", "mount", id]))?;
        let mounted = Self { id: id.to_owned(), path: PathBuf::from(said.trim()) };
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
