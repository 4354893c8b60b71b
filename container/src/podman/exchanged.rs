//! The commands that podman gets for one start of a container that comes: the OCI runtime, for which `shim`
//! stands in, and netavark, before which the new network namespace is closed. They stand in a directory of
//! the arrival's own, with the configuration of podman that names them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use decamp_shared::workload::{HostTools, Place};

use super::config;
use crate::error::{ContainerError, Result};
use crate::runtime::RuntimeKind;
use crate::spec::veth_name;

/// Where the directories of arrivals are.
const RUN: &str = "/run/decamp-podman";
/// Closes a network namespace: nothing in, nothing out, no answer to anybody.
pub(super) const CLOSED: &str = "table inet decamp {
 chain in { type filter hook input priority -400; policy drop; }
 chain out { type filter hook output priority -400; policy drop; }
}
table arp decamp {
 chain in { type filter hook input priority -400; policy drop; }
 chain out { type filter hook output priority -400; policy drop; }
}
";
pub(super) const OPENED: &str = "delete table inet decamp\ndelete table arp decamp\n";

/// The directory of the arrival at `place`.
pub(crate) fn directory(place: &Place) -> PathBuf {
    Path::new(RUN).join(veth_name(place))
}

/// Makes the commands that podman gets, and the configuration that names them.
pub(super) fn prepare(directory: &Path, tools: &HostTools, kind: RuntimeKind) -> Result<()> {
    let _ = fs::remove_dir_all(directory);
    let bin = directory.join("bin");
    fs::create_dir_all(&bin).map_err(ContainerError::io(format!("make {}", bin.display())))?;
    let theirs = config::of_host()?;
    let netavark = config::helper(&theirs, "netavark").ok_or_else(|| {
        ContainerError::State("podman has no netavark here: install it".to_owned())
    })?;
    let (runtime, real) = (directory.join(kind.word()), kind.program(tools));
    let socket = directory.join("keeper.sock");
    let shim = format!(
        "#!/bin/sh\nif [ -S {socket} ]; then for word; do case $word in create|start)\n\
         exec {decamp} shim --socket {socket} -- \"$@\";; esac; done; fi\nexec {real} \"$@\"\n",
        socket = quoted(&socket),
        decamp = quoted(&tools.decamp),
        real = quoted(real),
    );
    write(&runtime, &shim, 0o700)?;
    let closed = directory.join("closed.nft");
    let closing = format!(
        "#!/bin/sh\nif [ -e {closed} ]; then case \" $* \" in *' setup '*) for last; do :; done\n\
         nsenter --net=\"$last\" nft -f {closed} || exit 1;; esac; fi\nexec {real} \"$@\"\n",
        closed = quoted(&closed),
        real = quoted(&netavark),
    );
    write(&bin.join("netavark"), &closing, 0o700)?;
    let text = config::with(theirs, kind.word(), &runtime, &bin)?;
    write(&directory.join("containers.conf"), &text, 0o600)
}

/// A path as a word for a shell.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

pub(super) fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    fs::write(path, text)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(ContainerError::io(format!("write {}", path.display())))
}

pub(super) fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}
