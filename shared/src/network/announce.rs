//! Telling a segment, again and again, that something is behind another port now.

use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::Duration;

use super::frames::{Neighbour, gratuitous_arps, reverse_arp, unsolicited_advertisement};
use super::mac::Mac;

/// Waits between rounds, as QEMU has them: the first after 50 ms, then 100 ms more each.
const WAITS_MS: [u64; 5] = [50, 150, 250, 350, 450];

/// Announces what is behind one interface.
#[derive(Debug)]
pub struct Announcer {
    to: OwnedFd,
    frames: Vec<Vec<u8>>,
}

impl Announcer {
    /// Frames go to `to`, each in one write and with `header` zero bytes in front: to a packet socket that is bound to
    /// an interface, as what that sends; or to a tap device, as what the workload behind it sends.
    pub fn new(to: OwnedFd, header: usize, frames: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let with_header = |frame: Vec<u8>| {
            let mut bytes = vec![0; header];
            bytes.extend(frame);
            bytes
        };
        Self { to, frames: frames.into_iter().map(with_header).collect() }
    }

    /// Where frames go.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.to.as_fd()
    }

    /// Sends one round.
    pub fn once(&self) {
        if let Ok(to) = self.to.try_clone() {
            round(&mut File::from(to), &self.frames);
        }
    }

    /// Sends all rounds after the first, and returns when the last one is out.
    pub fn repeat(&self) {
        for wait in WAITS_MS {
            thread::sleep(Duration::from_millis(wait));
            self.once();
        }
    }

    /// Sends the first round now and the others from a thread of their own.
    pub fn begin(&self) {
        let Ok(to) = self.to.try_clone() else { return };
        let (mut to, frames) = (File::from(to), self.frames.clone());
        round(&mut to, &frames);
        let spawned = thread::Builder::new().name("announce".to_owned()).spawn(move || {
            for wait in WAITS_MS {
                thread::sleep(Duration::from_millis(wait));
                round(&mut to, &frames);
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "Cannot repeat the announcement");
        }
    }
}

fn round(to: &mut File, frames: &[Vec<u8>]) {
    for frame in frames {
        // An interface that is gone again needs no announcement.
        if let Err(error) = to.write_all(frame) {
            tracing::debug!(%error, "Cannot announce");
        }
    }
}

/// What says that these addresses are where they are.
pub fn of_addresses(own: &[Neighbour]) -> Vec<Vec<u8>> {
    own.iter()
        .flat_map(|one| match one.address {
            IpAddr::V4(address) => gratuitous_arps(one.mac, address).to_vec(),
            IpAddr::V6(address) => vec![unsolicited_advertisement(one.mac, address)],
        })
        .collect()
}

/// The same, and for `mac` and every other hardware address what brings bridges and switches to learn it.
pub fn of_machine(mac: Mac, own: &[Neighbour]) -> Vec<Vec<u8>> {
    let mut macs: Vec<Mac> = own.iter().map(|one| one.mac).chain([mac]).collect();
    macs.sort_unstable();
    macs.dedup();
    macs.into_iter().map(reverse_arp).chain(of_addresses(own)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_announced_by_all_that_it_has() {
        let (mac, other) = (Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2]));
        let v6: IpAddr = "fd00::1".parse().expect("an address");
        let own = [
            Neighbour { address: [10, 0, 0, 1].into(), mac },
            Neighbour { address: v6, mac: other },
        ];
        let frames = of_machine(mac, &own);
        let kinds: Vec<_> = frames.iter().map(|frame| [frame[12], frame[13]]).collect();
        assert_eq!(kinds, [[0x80, 0x35], [0x80, 0x35], [8, 6], [8, 6], [0x86, 0xdd]]);
        assert_eq!(
            of_machine(mac, &[]).len(),
            1,
            "who has said nothing has an address all the same"
        );
    }
}
