//! Gratuitous ARP: telling the network that an address is behind another port now.

use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::Duration;

use crate::spec::Mac;
use crate::sys;

/// Waits between rounds, as QEMU has them: the first after 50 ms, then 100 ms more each.
const WAITS_MS: [u64; 5] = [50, 150, 250, 350, 450];

/// Announces one address from one interface.
pub(crate) struct Announcer {
    socket: OwnedFd,
    interface: &'static str,
    mac: Mac,
    frames: [Vec<u8>; 2],
}

impl Announcer {
    /// Frames go out through `socket`, a packet socket bound to `interface`.
    pub(crate) fn new(
        socket: OwnedFd,
        interface: &'static str,
        mac: Mac,
        address: Ipv4Addr,
    ) -> Self {
        Self { socket, interface, mac, frames: [frame(mac, address, 1), frame(mac, address, 2)] }
    }

    /// Forgets the neighbours that were asked for while nothing could pass: restored connections
    /// speak at once, and the kernel would ask again only a second after a question that was lost.
    pub(crate) fn forget_neighbours(&self) {
        if let Err(error) =
            sys::set_hardware_address(self.socket.as_fd(), self.interface, self.mac.0)
        {
            tracing::warn!(%error, "Cannot forget the neighbours; first answers may take a second");
        }
    }

    /// Sends one round.
    pub(crate) fn once(&self) {
        if let Ok(socket) = self.socket.try_clone() {
            round(&mut File::from(socket), &self.frames);
        }
    }

    /// Sends all rounds after the first, and returns when the last one is out.
    pub(crate) fn repeat(&self) {
        for wait in WAITS_MS {
            thread::sleep(Duration::from_millis(wait));
            self.once();
        }
    }

    /// Sends the first round now and the others from a thread of their own.
    pub(crate) fn begin(&self) {
        let Ok(socket) = self.socket.try_clone() else { return };
        let (mut socket, frames) = (File::from(socket), self.frames.clone());
        round(&mut socket, &frames);
        let spawned = thread::Builder::new().name("announce".to_owned()).spawn(move || {
            for wait in WAITS_MS {
                thread::sleep(Duration::from_millis(wait));
                round(&mut socket, &frames);
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "Cannot repeat the announcement");
        }
    }
}

fn round(socket: &mut File, frames: &[Vec<u8>; 2]) {
    for frame in frames {
        // An interface that is gone again needs no announcement.
        if let Err(error) = socket.write_all(frame) {
            tracing::debug!(%error, "Cannot announce the address");
        }
    }
}

/// An Ethernet broadcast with an ARP request (1) or reply (2) for one's own address. Some peers
/// heed only the one, some only the other.
fn frame(mac: Mac, address: Ipv4Addr, operation: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(60);
    bytes.extend_from_slice(&[0xff; 6]);
    bytes.extend_from_slice(&mac.0);
    bytes.extend_from_slice(&0x0806u16.to_be_bytes());
    // Ethernet (1), IPv4 (0x0800), their address lengths.
    bytes.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    bytes.extend_from_slice(&operation.to_be_bytes());
    bytes.extend_from_slice(&mac.0);
    bytes.extend_from_slice(&address.octets());
    bytes.extend_from_slice(&[0xff; 6]);
    bytes.extend_from_slice(&address.octets());
    bytes.resize(60, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_names_the_address_twice() {
        let bytes = frame(Mac([2, 0, 0, 0, 0, 9]), Ipv4Addr::new(10, 1, 2, 3), 1);
        assert_eq!(bytes.len(), 60);
        assert_eq!(bytes[28..32], [10, 1, 2, 3]);
        assert_eq!(bytes[38..42], [10, 1, 2, 3]);
        assert_eq!(bytes[6..12], bytes[22..28]);
    }
}
