//! Ways in for fuzzers: bytes that a guest or a peer could have made, given to what has to stand them. Nothing is
//! asserted but that it comes back. Each way is also gone by a property test, so that it is never stale.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Duration;

use decamp_shared::network::Mac;
use decamp_shared::workload::Section;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::gettid;
use vm_memory::{Bytes, GuestAddress};

use crate::console::Output;
use crate::disk::Disk;
use crate::memory::Memory;
use crate::spec::DiskSpec;
use crate::state::vcpu::VcpuState;
use crate::state::vm::VmState;
use crate::state::{power, serial};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::bus::Named;
use crate::virtio::console::{Typing, VirtioConsole};
use crate::virtio::net::{Frames, Knowledge, Net};
use crate::virtio::rng::Rng;
use crate::virtio::tried::Tried;
use crate::virtio::vsock::Vsock;

/// Bytes of guest memory that a device under trial has.
const MEMORY: u64 = 2 << 20;
/// The most bytes of input that are made into guest memory.
const MOST: usize = 64 * 1024;

/// A state section from a peer: the first byte says of what, the second its version.
pub fn section(bytes: &[u8]) {
    let [what, version, bytes @ ..] = bytes else { return };
    let section = |kind: &str| Section {
        kind: kind.into(),
        version: u32::from(*version),
        bytes: bytes.to_vec(),
    };
    match what % 5 {
        0 => drop(VmState::decode(&section("vm"))),
        1 => drop(VcpuState::decode(&section("vcpu/0"))),
        2 => drop(serial::decode(&section("serial"))),
        3 => drop(power::decode(&section("power"))),
        _ => {
            let which = usize::from(what / 5);
            let Some(named) = take(which) else { return };
            let kind = format!("virtio/{}", named.label);
            let Ok(memory) = Memory::create(MEMORY) else { return };
            if let Ok(mut tried) = Tried::new(named.device, memory.map()) {
                drop(tried.load(&section(&kind)));
            }
        }
    }
}

/// A device whose driver is hostile: the first byte says which device, the next eight which features it takes of
/// those that it may, and what follows is guest memory, in which its rings lie.
pub fn device(bytes: &[u8]) {
    let [which, features @ ..] = bytes else { return };
    let Some((features, contents)) = features.split_first_chunk::<8>() else { return };
    let Some(named) = take(usize::from(*which)) else { return };
    let Ok(memory) = Memory::create(MEMORY) else { return };
    let contents = &contents[..contents.len().min(MOST)];
    if memory.map().write_slice(contents, GuestAddress(0)).is_err() {
        return;
    }
    if let Ok(mut tried) = Tried::new(named.device, memory.map()) {
        tried.drive(u64::from_le_bytes(*features), MOST as u64 / 4);
    }
}

/// A device of each kind, by number.
fn take(which: usize) -> Option<Named> {
    let mut all = devices()?;
    let which = which % all.len();
    Some(all.swap_remove(which))
}

fn devices() -> Option<Vec<Named>> {
    let frames = UnixDatagram::unbound().ok()?;
    frames.set_nonblocking(true).ok()?;
    let mac = Mac([2, 0, 0, 0, 0, 1]);
    let net = Net::new(Frames::socket(frames.into()), mac, 1500, Knowledge::default());
    let console = VirtioConsole::new(&Output::nowhere(), &Typing::new().ok()?);
    // Nobody connects there: a name of this thread's own, which is gone when the device is.
    let socket = std::env::temp_dir().join(format!("decamp-tried-{}", gettid()));
    let vsock = Vsock::new(3, &socket).ok()?;
    Some(vec![
        Named::new("rng", Rng),
        Named::new("balloon", Balloon::default()),
        Named::new("console", console),
        Named::new("vsock", vsock),
        Named::new("disk0", Block::new(disk()?)),
        Named::new("net0", net),
    ])
}

/// A disk in memory.
fn disk() -> Option<Arc<Disk>> {
    let file = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC).ok()?);
    file.set_len(64 << 10).ok()?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    let disk = Disk::new(0, &DiskSpec { path, ..DiskSpec::default() });
    disk.open(Duration::ZERO).ok()?;
    Some(Arc::new(disk))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn whatever_a_peer_sends_comes_back(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            section(&bytes);
        }

        #[test]
        fn whatever_a_guest_does_comes_back(bytes in prop::collection::vec(any::<u8>(), 9..4096)) {
            device(&bytes);
        }
    }
}
