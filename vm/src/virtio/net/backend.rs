//! Where a network device's frames come from and go to: a tap device of the host, or anything else that keeps
//! frames apart. Each frame has a virtio header of [`HEADER`] bytes in front.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use crate::memory::Map;
use crate::sys::frames::{read_frame, write_frame};
use crate::sys::tap::{Offloads, set_offloads};

/// Bytes of the virtio header (`virtio_net_hdr_v1`), as a modern driver always has it.
pub(crate) const HEADER: usize = 12;
/// The largest frame with its header: a segment that the other end cuts, with a tag of a VLAN.
pub(super) const LARGEST: usize = HEADER + 18 + 65535;

/// A piece of guest memory.
pub(super) type Piece<'a> = vm_memory::VolatileSlice<'a, vm_memory::bitmap::MS<'a, Map>>;

/// A descriptor that gives and takes frames, without waiting.
#[derive(Debug)]
pub(crate) struct Frames {
    fd: OwnedFd,
    is_tap: bool,
}

impl Frames {
    /// Frames of a tap device, which has headers of [`HEADER`] bytes and does not block.
    pub(crate) fn tap(fd: OwnedFd) -> Self {
        Self { fd, is_tap: true }
    }

    /// Frames of a socket that keeps messages apart and does not block, for tests and fuzzers.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn socket(fd: OwnedFd) -> Self {
        Self { fd, is_tap: false }
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Reads the next frame into `pieces`, what is too much for them into `rest`. Gives its length.
    pub(super) fn read(&self, pieces: &[Piece<'_>], rest: &mut [u8]) -> io::Result<usize> {
        read_frame(self.fd.as_fd(), pieces, rest)
    }

    /// Writes a frame.
    pub(super) fn write(&self, pieces: &[Piece<'_>]) -> io::Result<usize> {
        write_frame(self.fd.as_fd(), pieces)
    }

    /// Lets frames come as a driver that took `features` can have them: without checksums, or in large segments.
    pub(super) fn set_features(&self, features: u64) -> io::Result<()> {
        if !self.is_tap {
            return Ok(());
        }
        let took = |feature: u32| features & (1 << feature) != 0;
        let checksums = took(VIRTIO_NET_F_GUEST_CSUM);
        set_offloads(
            self.fd.as_fd(),
            Offloads {
                checksums,
                segments4: checksums && took(VIRTIO_NET_F_GUEST_TSO4),
                segments6: checksums && took(VIRTIO_NET_F_GUEST_TSO6),
            },
        )
    }

    /// Whether nothing ever comes or goes here again.
    pub(super) fn is_gone(&self) -> bool {
        let mut polled = [PollFd::new(self.fd.as_fd(), PollFlags::empty())];
        let ended = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        matches!(poll(&mut polled, PollTimeout::ZERO), Ok(1..))
            && polled[0].revents().is_some_and(|seen| seen.intersects(ended))
    }
}
