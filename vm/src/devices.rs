//! Which virtio devices a VM has: the list that its spec means, in the order of their places. A guest that moves
//! finds each where it was, so the order for a spec never changes.

use std::sync::Arc;

use crate::console::{Listening, Output};
use crate::disk::Disk;
use crate::error::Result;
use crate::files::Files;
use crate::layout::Slot;
use crate::spec::VmSpec;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::bus::Named;
use crate::virtio::console::{Typing, VirtioConsole};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, Way};

/// How many devices every VM has.
const ALWAYS: usize = 3;
/// The name of the socket where programs of the host meet those of the guest.
pub(crate) const VSOCK_SOCKET: &str = "vsock.sock";

/// The places of the devices of a VM with this spec.
pub(crate) fn slots(spec: &VmSpec) -> Vec<Slot> {
    let count = ALWAYS + usize::from(spec.vsock.is_some()) + spec.disks.len() + spec.net.len();
    (0..count).filter_map(Slot::of).collect()
}

/// The disks of a VM with this spec, none of them open, which `files` open.
pub(crate) fn disks_of(spec: &VmSpec, files: &Files) -> Vec<Arc<Disk>> {
    let numbered = spec.disks.iter().enumerate();
    let disk = |(number, disk)| Arc::new(Disk::opened_by(files.clone(), number, disk));
    numbered.map(disk).collect()
}

/// The devices of a VM with this spec, these disks and the network interfaces `nets`, which prints to `output` and is
/// typed at by `typing`; host programs meet it at `vsock`, if it has sockets.
pub(crate) fn of(
    spec: &VmSpec,
    disks: &[Arc<Disk>],
    output: &Output,
    typing: &Typing,
    vsock: Option<(Listening, Way)>,
    nets: Vec<Named>,
) -> Result<Vec<Named>> {
    let mut devices = vec![
        Named::new("rng", Rng),
        Named::new("balloon", Balloon::default()),
        Named::new("console", VirtioConsole::new(output, typing)),
    ];
    if let Some((asked, (socket, way))) = spec.vsock.as_ref().zip(vsock) {
        devices.push(Named::new("vsock", Vsock::at(asked.cid, socket, way)?));
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
            let socket = dir.path().join(VSOCK_SOCKET);
            let way = Way::Path(socket.clone());
            let vsock = Some((Listening::at(&socket).expect("a socket"), way));
            let disks = disks_of(&spec, &Files::Own);
            let devices = of(&spec, &disks, &output, &typing, vsock, Vec::new());
            assert_eq!(devices.expect("devices").len(), slots(&spec).len());
            spec.disks.push(DiskSpec::default());
        }
    }
}
