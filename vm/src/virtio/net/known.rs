//! What is seen of a guest's addresses, and of whom it speaks to, in the ARP and neighbour discovery that pass its
//! interface: whom to announce after a move, and whom to ask for before one.
//!
//! Only what says where an address is counts. The source of an IP packet does not: a guest that routes has
//! packets of all the world, and announcing those would turn them away from where they belong.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use decamp_shared::network::frames::speaker;
use decamp_shared::network::{Mac, Neighbour};

/// The most addresses of the guest, and the most neighbours, that are kept; the newest win.
pub(super) const MOST: usize = 16;
/// Bytes of a neighbour as it travels.
pub(super) const ROW: usize = 16 + 6;

/// What is known of one interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Known {
    /// Addresses of the guest's, the newest last, and where they are.
    own: Vec<Neighbour>,
    /// Whom it was answered by or asked from, the newest last.
    neighbours: Vec<Neighbour>,
}

impl Known {
    /// Addresses that the guest has said to be at one of its own hardware addresses.
    pub(crate) fn own(&self) -> &[Neighbour] {
        &self.own
    }

    /// Who spoke to the guest.
    pub(crate) fn neighbours(&self) -> &[Neighbour] {
        &self.neighbours
    }

    /// The guest sent `frame`.
    pub(super) fn sent(&mut self, frame: &[u8]) {
        let Some(said) = speaker(frame) else { return };
        self.neighbours.retain(|one| one.address != said.address);
        keep(&mut self.own, said);
    }

    /// `frame` came for the guest.
    pub(super) fn received(&mut self, frame: &[u8]) {
        let Some(said) = speaker(frame) else { return };
        if self.own.iter().any(|own| own.mac == said.mac) {
            return;
        }
        // Somebody else has it now: announcing it would take it from him.
        self.own.retain(|own| own.address != said.address);
        keep(&mut self.neighbours, said);
    }

    pub(super) fn to_rows(&self) -> [Vec<u8>; 2] {
        [&self.own, &self.neighbours].map(|list| list.iter().flat_map(row).collect())
    }

    pub(super) fn from_rows(own: &[[u8; ROW]], neighbours: &[[u8; ROW]]) -> Self {
        let all = |rows: &[[u8; ROW]]| rows.iter().map(neighbour).collect();
        Self { own: all(own), neighbours: all(neighbours) }
    }
}

/// What is known of an interface, for the device and for the host's side of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Knowledge {
    known: Arc<Mutex<Known>>,
    mtu: Arc<AtomicU16>,
}

impl Knowledge {
    /// What is known now.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that a frame of the guest's carries at most.
    pub(crate) fn mtu(&self) -> u16 {
        self.mtu.load(Ordering::Relaxed)
    }

    pub(super) fn set_mtu(&self, mtu: u16) {
        self.mtu.store(mtu, Ordering::Relaxed);
    }
}

fn keep(list: &mut Vec<Neighbour>, one: Neighbour) {
    if list.last() == Some(&one) {
        return;
    }
    list.retain(|other| other.address != one.address);
    if list.len() == MOST {
        list.remove(0);
    }
    list.push(one);
}

/// An address of IPv4 travels as one of IPv6 that is mapped.
fn row(one: &Neighbour) -> Vec<u8> {
    let address = match one.address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    [&address.octets()[..], &one.mac.0].concat()
}

fn neighbour(row: &[u8; ROW]) -> Neighbour {
    let (address, mac) = row.split_at(16);
    let address = <[u8; 16]>::try_from(address).unwrap_or_default();
    let mac = Mac(mac.try_into().unwrap_or_default());
    Neighbour { address: Ipv6Addr::from(address).to_canonical(), mac }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use decamp_shared::network::frames::{arp_probe, gratuitous_arps, unsolicited_advertisement};

    use super::*;

    const GUEST: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn v4(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, last)
    }

    #[test]
    fn what_the_guest_says_is_its_own_until_another_says_so() {
        let mut known = Known::default();
        known.sent(&arp_probe(GUEST, v4(1)));
        assert_eq!(known, Known::default(), "it only asks whether it may have it");
        known.sent(&gratuitous_arps(GUEST, v4(1))[0]);
        let v6: Ipv6Addr = "fe80::1".parse().expect("an address");
        known.sent(&unsolicited_advertisement(GUEST, v6));
        known.received(&gratuitous_arps(OTHER, v4(7))[1]);
        let own: Vec<_> = known.own().iter().map(|one| one.address).collect();
        assert_eq!(own, [IpAddr::from(v4(1)), IpAddr::from(v6)]);
        assert_eq!(known.neighbours(), [Neighbour { address: v4(7).into(), mac: OTHER }]);
        // Its own frame comes back to it from a bridge that floods.
        known.received(&gratuitous_arps(GUEST, v4(1))[0]);
        assert_eq!(known.own().len(), 2);
        known.received(&gratuitous_arps(OTHER, v4(1))[0]);
        assert_eq!(known.own().len(), 1);
        let [own, neighbours] = known.to_rows();
        let rows = |bytes: &[u8]| bytes.as_chunks::<ROW>().0.to_vec();
        assert_eq!(Known::from_rows(&rows(&own), &rows(&neighbours)), known);
    }

    #[test]
    fn no_guest_makes_it_remember_without_end() {
        let mut known = Known::default();
        for last in 0..200 {
            known.sent(&gratuitous_arps(GUEST, v4(last))[0]);
            known.received(&gratuitous_arps(OTHER, v4(last))[0]);
            known.sent(&gratuitous_arps(GUEST, v4(last))[0]);
        }
        assert_eq!((known.own().len(), known.neighbours().len()), (MOST, 0));
        assert_eq!(known.own()[MOST - 1].address, IpAddr::from(v4(199)));
    }
}
