//! Which frames a driver wants, and what it says of that through the control queue (Virtual I/O Device 1.2, section
//! 5.1.6.5).

use decamp_shared::network::Mac;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC,
};

/// Groups or addresses beyond these are not told apart: all of them are wanted.
pub(super) const MOST: usize = 64;
/// The longest command: both tables as long as a driver may have them, that is far more than are kept.
pub(super) const LONGEST: usize = 16 * 1024;

const RX: u8 = VIRTIO_NET_CTRL_RX as u8;
const PROMISC: u8 = VIRTIO_NET_CTRL_RX_PROMISC as u8;
const ALLMULTI: u8 = VIRTIO_NET_CTRL_RX_ALLMULTI as u8;
const MAC: u8 = VIRTIO_NET_CTRL_MAC as u8;
const TABLE_SET: u8 = VIRTIO_NET_CTRL_MAC_TABLE_SET as u8;
const ADDR_SET: u8 = VIRTIO_NET_CTRL_MAC_ADDR_SET as u8;

/// What a driver wants to receive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// The interface's own address.
    pub(super) mac: Mac,
    /// Everything.
    pub(super) promiscuous: bool,
    /// Every group.
    pub(super) all_groups: bool,
    /// More addresses of its own, and groups. With more than are kept, all are wanted.
    pub(super) table: Vec<Mac>,
    /// The table had more single addresses, or groups, than are kept.
    pub(super) too_many: [bool; 2],
}

impl Filter {
    /// As before a driver says anything: everything.
    pub(super) fn new(mac: Mac) -> Self {
        Self { mac, promiscuous: true, all_groups: false, table: Vec::new(), too_many: [false; 2] }
    }

    /// Whether a frame to `to` is wanted.
    pub(super) fn wants(&self, to: Mac) -> bool {
        let is_group = to.0[0] & 1 == 1;
        self.promiscuous
            || to == self.mac
            || to == Mac::BROADCAST
            || (is_group && self.all_groups)
            || self.too_many[usize::from(is_group)]
            || self.table.contains(&to)
    }

    /// Carries out a command; false when it is none.
    pub(super) fn command(&mut self, class: u8, command: u8, data: &[u8]) -> bool {
        match (class, command, data) {
            (RX, PROMISC, &[on]) => self.promiscuous = on != 0,
            (RX, ALLMULTI, &[on]) => self.all_groups = on != 0,
            (MAC, ADDR_SET, _) => {
                let Some(mac) = <[u8; 6]>::try_from(data).ok().map(Mac) else { return false };
                if !mac.is_of_one() {
                    return false;
                }
                self.mac = mac;
            }
            (MAC, TABLE_SET, _) => {
                let Some(((single, groups), [])) = table(data)
                    .and_then(|(single, rest)| Some((single, table(rest)?)))
                    .map(|(single, (groups, rest))| ((single, groups), rest))
                else {
                    return false;
                };
                self.too_many = [single.len() > MOST, groups.len() > MOST];
                let kept = [single, groups].into_iter().filter(|list| list.len() <= MOST);
                self.table = kept.flatten().map(|bytes| Mac(*bytes)).collect();
            }
            _ => return false,
        }
        true
    }
}

/// A table at the beginning of `data`, and what is behind it.
fn table(data: &[u8]) -> Option<(&[[u8; 6]], &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    let (rows, rest) = rest.split_at_checked(length)?;
    Some((rows.as_chunks::<6>().0, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const GROUP: Mac = Mac([1, 0, 0x5e, 0, 0, 1]);

    fn tables(single: &[Mac], groups: &[Mac]) -> Vec<u8> {
        let one = |list: &[Mac]| {
            let mut bytes = (list.len() as u32).to_le_bytes().to_vec();
            bytes.extend(list.iter().flat_map(|mac| mac.0));
            bytes
        };
        [one(single), one(groups)].concat()
    }

    #[test]
    fn a_driver_gets_what_it_asked_for() {
        let mut filter = Filter::new(OWN);
        assert!(filter.wants(OTHER), "it has said nothing yet");
        assert!(filter.command(RX, PROMISC, &[0]));
        assert!(filter.wants(OWN) && filter.wants(Mac::BROADCAST));
        assert!(!filter.wants(OTHER) && !filter.wants(GROUP));
        assert!(filter.command(MAC, TABLE_SET, &tables(&[OTHER], &[GROUP])));
        assert!(filter.wants(OTHER) && filter.wants(GROUP));
        assert!(filter.command(MAC, TABLE_SET, &tables(&[], &[])));
        assert!(!filter.wants(OTHER) && !filter.wants(GROUP));
        assert!(filter.command(RX, ALLMULTI, &[1]));
        assert!(filter.wants(GROUP) && !filter.wants(OTHER));
        assert!(filter.command(MAC, ADDR_SET, &OTHER.0));
        assert!(filter.wants(OTHER) && !filter.wants(OWN));
    }

    #[test]
    fn a_table_that_is_too_long_is_all_of_its_kind() {
        let mut filter = Filter::new(OWN);
        filter.command(RX, PROMISC, &[0]);
        let many = vec![GROUP; MOST + 1];
        assert!(filter.command(MAC, TABLE_SET, &tables(&[OTHER], &many)));
        assert!(filter.wants(Mac([3, 0, 0, 0, 0, 9])) && filter.wants(OTHER));
        assert!(!filter.wants(Mac([4, 0, 0, 0, 0, 9])));
        assert_eq!(filter.table, [OTHER]);
    }

    #[test]
    fn commands_that_are_none_change_nothing() {
        let mut filter = Filter::new(OWN);
        let before = filter.clone();
        let cut = &tables(&[OTHER], &[GROUP])[..13];
        let endless = [&u32::MAX.to_le_bytes()[..], &[0; 40]].concat();
        let long = [tables(&[OTHER], &[]), vec![0]].concat();
        for (class, command, data) in [
            (RX, PROMISC, &[][..]),
            (RX, PROMISC, &[0, 0]),
            (RX, 9, &[1]),
            (MAC, ADDR_SET, &GROUP.0),
            (MAC, ADDR_SET, &[2, 0, 0]),
            (MAC, TABLE_SET, cut),
            (MAC, TABLE_SET, &endless),
            (MAC, TABLE_SET, &long),
            (77, 0, &[1]),
        ] {
            assert!(!filter.command(class, command, data), "{class} {command} {data:?}");
        }
        assert_eq!(filter, before);
    }
}
