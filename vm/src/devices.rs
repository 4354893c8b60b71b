//! Which virtio devices a VM has: the list that its spec means, in the order of their places. A guest that moves
//! finds each where it was, so the order for a spec never changes.

use std::path::Path;
use std::sync::Arc;

use crate::console::Output;
use crate::disk::Disk;
use crate::error::Result;
use crate::layout::Slot;
use crate::spec::VmSpec;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::bus::Named;
use crate::virtio::console::{Typing, VirtioConsole};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;

/// How many devices every VM has.
const ALWAYS: usize = 3;
/// The name of the socket where programs of the host meet those of the guest.
pub(crate) const VSOCK_SOCKET: &str = "vsock.sock";

/// The places of the devices of a VM with this spec.
pub(crate) fn slots(spec: &VmSpec) -> Vec<Slot> {
    let count = ALWAYS + usize::from(spec.vsock.is_some()) + spec.disks.len() + spec.net.len();
    (0..count).filter_map(Slot::of).collect()
}

/// The disks of a VM with this spec, none of them open.
pub(crate) fn disks_of(spec: &VmSpec) -> Vec<Arc<Disk>> {
    let numbered = spec.disks.iter().enumerate();
    numbered.map(|(number, disk)| Arc::new(Disk::new(number, disk))).collect()
}

/// The devices of a VM with this spec, these disks and the network interfaces `nets`, which prints to `output` and is typed at by `typing`; it has its sockets where
/// that of its console is.
pub(crate) fn of(
    spec: &VmSpec,
    disks: &[Arc<Disk>],
    output: &Output,
    typing: &Typing,
    console: &Path,
    nets: Vec<Named>,
) -> Result<Vec<Named>> {
    let mut devices = vec![
        Named::new("rng", Rng),
        Named::new("balloon", Balloon::default()),
        Named::new("console", VirtioConsole::new(output, typing)),
    ];
    if let Some(vsock) = &spec.vsock {
        let socket = console.with_file_name(VSOCK_SOCKET);
        devices.push(Named::new("vsock", Vsock::new(vsock.cid, &socket)?));
    }
    devices.extend(disks.iter().map(|disk| Named::new(disk.label(), Block::new(disk.clone()))));
    devices.extend(nets);
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{DiskSpec, VsockSpec};
    use crate::testing::guest_spec;

    #[test]
    fn each_device_has_a_place_that_the_guest_is_told_of() {
        let dir = tempfile::tempdir().expect("directory");
        let (output, typing) = (Output::nowhere(), Typing::new().expect("typing"));
        let mut spec = guest_spec(dir.path());
        for vsock in [None, Some(VsockSpec { cid: 3 })] {
            spec.vsock = vsock;
            let console = dir.path().join("console.sock");
            let disks = disks_of(&spec);
            let devices = of(&spec, &disks, &output, &typing, &console, Vec::new());
            assert_eq!(devices.expect("devices").len(), slots(&spec).len());
            spec.disks.push(DiskSpec::default());
        }
    }
}
