//! A container in a checkpoint: which parts it consists of, and how they become one again.
//!
//! The layout is podman's, so that its tools can read it: `config.dump`, `spec.dump`, `network.status`,
//! CRIU's images in `checkpoint/` with all of its memory in them, the root file system in
//! `rootfs-diff.tar` (whole: it is the difference to nothing). What podman does not know is in `decamp/`.
//!
//! Rooms: `pack` and `unpack` (the two ways), `pages` (memory between CRIU's images and the page engine),
//! `podman` (what podman reads of it), `foreign` and
//! `foreign_unpack` (a checkpoint that podman made).

mod foreign;
mod foreign_unpack;
mod pack;
mod pages;
mod podman;
mod unpack;

use std::path::Component;

use decamp_shared::archive::ArchiveError;
use decamp_shared::workload::WorkloadError;

pub(crate) use foreign::{describe, wants};
pub(crate) use foreign_unpack::ForeignUnpacking;
pub(crate) use pack::{pack, refusals};
pub(crate) use podman::advice;
pub(crate) use unpack::ContainerUnpacking;

use crate::bundle::Bundle;
use crate::error::{ContainerError, Result};

/// Where CRIU's images are.
const IMAGES: &str = "checkpoint/";
/// The root file system.
const ROOTFS: &str = "rootfs-diff.tar";
/// The bundle without it; none for a bundle that is its own root.
const REST: &str = "decamp/bundle.tar";
/// For podman's tools; nothing here reads them.
const FOR_PODMAN: [&str; 5] = [
    "config.dump",
    "spec.dump",
    "network.status",
    "checkpoint/descriptors.json",
    podman::STATISTICS_PART,
];

/// Name of the root file system in the bundle; none when the bundle is its own root.
fn root_name(bundle: &Bundle) -> Result<Option<String>> {
    let root = bundle.rootfs();
    let elsewhere = || {
        ContainerError::State(format!(
            "The root file system {} is not directly in the bundle {}, as a checkpoint needs it",
            root.display(),
            bundle.directory().display()
        ))
    };
    let below = root.strip_prefix(bundle.directory()).map_err(|_| elsewhere())?;
    let mut parts = below.components();
    match (parts.next(), parts.next()) {
        (None, _) => Ok(None),
        (Some(Component::Normal(name)), None) => {
            name.to_str().map(|name| Some(name.to_owned())).ok_or_else(elsewhere)
        }
        _ => Err(elsewhere()),
    }
}

/// An error of this crate's on its way into an archive's.
fn failed(error: ContainerError) -> ArchiveError {
    WorkloadError::from(error).into()
}
