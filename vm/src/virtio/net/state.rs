//! The device's own bytes in its section.

use decamp_shared::network::Mac;

use super::filter::{self, Filter};
use super::known::{self, Known, ROW};
use super::{MTU, Net};
use crate::state::fields::{FieldReader, FieldWriter};

/// Hardware address, MTU (`u16`) and flags (`u16`).
const INTERFACE: u16 = 1;
/// More addresses and groups that the driver wants, six bytes each.
const TABLE: u16 = 2;
/// Addresses of the guest's: an address of IPv6 (or one of IPv4, mapped) and a hardware address each.
const OWN: u16 = 3;
/// Neighbours, in the same way.
const NEIGHBOURS: u16 = 4;

const PROMISCUOUS: u16 = 1;
const ALL_GROUPS: u16 = 2;
const TOO_MANY_SINGLE: u16 = 4;
const TOO_MANY_GROUPS: u16 = 8;
const ANNOUNCE: u16 = 16;
const FLAGS: u16 = 31;

impl Net {
    pub(super) fn save_bytes(&self) -> Vec<u8> {
        let filter = &self.filter;
        let flags = [
            (filter.promiscuous, PROMISCUOUS),
            (filter.all_groups, ALL_GROUPS),
            (filter.too_many[0], TOO_MANY_SINGLE),
            (filter.too_many[1], TOO_MANY_GROUPS),
            (self.announce, ANNOUNCE),
        ];
        let flags = flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag);
        let mut fields = FieldWriter::default();
        let words = [self.mtu.to_le_bytes(), u16::to_le_bytes(flags)].concat();
        fields.put(INTERFACE, &[&filter.mac.0[..], &words].concat());
        fields.put(TABLE, &filter.table.iter().flat_map(|mac| mac.0).collect::<Vec<_>>());
        let [own, neighbours] = self.knowledge.lock().to_rows();
        fields.put(OWN, &own);
        fields.put(NEIGHBOURS, &neighbours);
        fields.finish()
    }

    pub(super) fn load_bytes(&mut self, bytes: &[u8]) -> Result<(), String> {
        let said = read(bytes).map_err(|error| error.to_string())?;
        let [a, b, c, d, e, f, mtu @ .., low, high] = said.interface;
        let mac = Mac([a, b, c, d, e, f]);
        let mtu = u16::from_le_bytes(mtu);
        let flags = u16::from_le_bytes([low, high]);
        if !mac.is_of_one() || flags & !FLAGS != 0 {
            return Err(format!("{mac} with flags {flags:#x} is no interface"));
        }
        if !MTU.contains(&mtu) || mtu > self.mtu_here {
            return Err(format!(
                "its frames carry {mtu} bytes, and those of the bridge here {}",
                self.mtu_here
            ));
        }
        self.mtu = mtu;
        self.knowledge.set_mtu(mtu);
        self.announce = flags & ANNOUNCE != 0;
        self.filter = Filter {
            mac,
            promiscuous: flags & PROMISCUOUS != 0,
            all_groups: flags & ALL_GROUPS != 0,
            too_many: [flags & TOO_MANY_SINGLE != 0, flags & TOO_MANY_GROUPS != 0],
            table: said.table.into_iter().map(Mac).collect(),
        };
        *self.knowledge.lock() = said.known;
        Ok(())
    }
}

struct Said {
    interface: [u8; 10],
    table: Vec<[u8; 6]>,
    known: Known,
}

fn read(bytes: &[u8]) -> crate::error::Result<Said> {
    let mut fields = FieldReader::new("virtio/net", bytes)?;
    let said = Said {
        interface: fields.take_array(INTERFACE)?,
        table: fields.take_rows(TABLE, 2 * filter::MOST)?,
        known: Known::from_rows(
            &fields.take_rows::<ROW>(OWN, known::MOST)?,
            &fields.take_rows::<ROW>(NEIGHBOURS, known::MOST)?,
        ),
    };
    fields.finish()?;
    Ok(said)
}
