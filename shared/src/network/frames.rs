//! Ethernet frames by which hosts tell each other where an address is: ARP (RFC 826, 5227), RARP (RFC 903) and
//! neighbour discovery (RFC 4861). What is read comes from anybody and is checked; nothing here sends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::mac::Mac;

/// No more of a frame than this has to be read to see who it is from.
pub const HEAD: usize = 128;

const ETHERNET: usize = 14;
const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
const IPV6: u16 = 0x86dd;
/// The shortest frame, without its checksum.
const SHORTEST: usize = 60;
const ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Options with a hardware address: of whoever asks, and of what was asked for.
const SOURCE_LINK: u8 = 1;
const TARGET_LINK: u8 = 2;

/// Who is where on a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Where it is.
    pub mac: Mac,
}

/// An ARP packet of Ethernet and IPv4, that says or asks where `target` is.
fn arp(kind: u16, operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SHORTEST);
    bytes.extend_from_slice(&Mac::BROADCAST.0);
    bytes.extend_from_slice(&sender.0.0);
    bytes.extend_from_slice(&kind.to_be_bytes());
    // Ethernet (1), IPv4 (0x0800), their address lengths.
    bytes.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    bytes.extend_from_slice(&operation.to_be_bytes());
    for (mac, address) in [sender, target] {
        bytes.extend_from_slice(&mac.0);
        bytes.extend_from_slice(&address.octets());
    }
    bytes.resize(SHORTEST, 0);
    bytes
}

/// Broadcasts that `address` is at `mac`: a request and a reply. Some peers heed only the one, some only the
/// other.
pub fn gratuitous_arps(mac: Mac, address: Ipv4Addr) -> [Vec<u8>; 2] {
    [1, 2].map(|operation| arp(ARP, operation, (mac, address), (Mac::BROADCAST, address)))
}

/// Asks who has `address`, without saying who asks: nobody's tables change (an ARP probe).
pub fn arp_probe(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    arp(ARP, 1, (mac, Ipv4Addr::UNSPECIFIED), (Mac([0; 6]), address))
}

/// Broadcasts that `mac` is here, whatever addresses it has: bridges and switches learn from it.
pub fn reverse_arp(mac: Mac) -> Vec<u8> {
    let unknown = Ipv4Addr::UNSPECIFIED;
    arp(RARP, 3, (mac, unknown), (mac, unknown))
}

/// Tells all nodes, unasked, that `address` is at `mac` and that what they knew before is old.
pub fn unsolicited_advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    const OVERRIDE: u8 = 0x20;
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend_from_slice(&address.octets());
    message.extend_from_slice(&[TARGET_LINK, 1]);
    message.extend_from_slice(&mac.0);
    icmpv6(mac, address, all_nodes, message)
}

/// Asks who has `address`, without saying who asks, as one does before taking an address.
pub fn solicitation(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    let [.., x, y, z] = address.octets();
    let group = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, x, y, z]);
    let mut message = vec![SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&address.octets());
    icmpv6(mac, Ipv6Addr::UNSPECIFIED, group, message)
}

/// `message`, whose checksum is zero, from `source` at `mac` to the group `to`.
fn icmpv6(mac: Mac, source: Ipv6Addr, to: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    let length = message.len() as u16;
    let pseudo = [source.octets(), to.octets()].concat();
    let sum = checksum(&[
        &pseudo,
        &u32::from(length).to_be_bytes(),
        &u32::from(ICMPV6).to_be_bytes(),
        &message,
    ]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let [.., a, b, c, d] = to.octets();
    let mut bytes = vec![0x33, 0x33, a, b, c, d];
    bytes.extend_from_slice(&mac.0);
    bytes.extend_from_slice(&IPV6.to_be_bytes());
    bytes.extend_from_slice(&[0x60, 0, 0, 0]);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(&[ICMPV6, 255]);
    bytes.extend_from_slice(&pseudo);
    bytes.extend_from_slice(&message);
    bytes
}

/// The Internet checksum of `parts`, each of an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.as_chunks::<2>().0);
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Who `frame` is from, if it is ARP or neighbour discovery that says so.
pub fn speaker(frame: &[u8]) -> Option<Neighbour> {
    let found = match u16_at(frame, 12)? {
        ARP => arp_speaker(frame.get(ETHERNET..)?),
        IPV6 => discovery_speaker(frame.get(ETHERNET..)?),
        _ => None,
    }?;
    let usable = match found.address {
        IpAddr::V4(address) => {
            !(address.is_unspecified()
                || address.is_multicast()
                || address.is_loopback()
                || address.is_broadcast())
        }
        IpAddr::V6(address) => {
            !(address.is_unspecified() || address.is_multicast() || address.is_loopback())
        }
    };
    (usable && found.mac.is_of_one()).then_some(found)
}

fn arp_speaker(packet: &[u8]) -> Option<Neighbour> {
    let head = packet.get(..8)?;
    if head[..6] != [0, 1, 8, 0, 6, 4] || !matches!(head[6..8], [0, 1 | 2]) {
        return None;
    }
    let mac = Mac(*packet.get(8..)?.first_chunk()?);
    let address: [u8; 4] = *packet.get(14..)?.first_chunk()?;
    Some(Neighbour { address: IpAddr::from(address), mac })
}

fn discovery_speaker(packet: &[u8]) -> Option<Neighbour> {
    // Anything that was forwarded has a lower hop limit than 255.
    if packet.get(6..8)? != [ICMPV6, 255] {
        return None;
    }
    let source: [u8; 16] = *packet.get(8..)?.first_chunk()?;
    let message = packet.get(40..)?;
    let target: [u8; 16] = *message.get(8..)?.first_chunk()?;
    let options = message.get(24..)?;
    let (address, mac) = match *message.first()? {
        SOLICITATION => (source, link_option(options, SOURCE_LINK)?),
        ADVERTISEMENT => (target, link_option(options, TARGET_LINK)?),
        _ => return None,
    };
    Some(Neighbour { address: IpAddr::from(address), mac })
}

/// The hardware address in the option `wanted`.
fn link_option(mut options: &[u8], wanted: u8) -> Option<Mac> {
    loop {
        let (kind, units) = (*options.first()?, *options.get(1)?);
        if kind == wanted && units == 1 {
            return Some(Mac(*options.get(2..)?.first_chunk()?));
        }
        // An option without a length would be read for ever.
        options = options.get(usize::from(units).checked_mul(8).filter(|length| *length > 0)?..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);

    fn v6() -> Ipv6Addr {
        "fd00::5:6".parse().expect("an address")
    }

    #[test]
    fn a_gratuitous_frame_names_the_address_twice() {
        for frame in gratuitous_arps(MAC, Ipv4Addr::new(10, 1, 2, 3)) {
            assert_eq!(frame.len(), 60);
            assert_eq!(frame[28..32], [10, 1, 2, 3]);
            assert_eq!(frame[38..42], [10, 1, 2, 3]);
            assert_eq!(frame[6..12], frame[22..28]);
            let address = IpAddr::from([10, 1, 2, 3]);
            assert_eq!(speaker(&frame), Some(Neighbour { address, mac: MAC }));
        }
    }

    #[test]
    fn an_advertisement_is_right_to_the_checksum() {
        let frame = unsolicited_advertisement(MAC, v6());
        assert_eq!(frame.len(), 86);
        assert_eq!(frame[..6], [0x33, 0x33, 0, 0, 0, 1]);
        let (pseudo, message) = (&frame[22..54], &frame[54..]);
        let length = (message.len() as u32).to_be_bytes();
        assert_eq!(checksum(&[pseudo, &length, &[0, 0, 0, 58], message]), 0);
        assert_eq!(speaker(&frame), Some(Neighbour { address: v6().into(), mac: MAC }));
    }

    #[test]
    fn who_only_asks_is_nobody() {
        assert_eq!(speaker(&arp_probe(MAC, Ipv4Addr::new(10, 0, 0, 1))), None);
        assert_eq!(speaker(&reverse_arp(MAC)), None);
        let asked = solicitation(MAC, v6());
        assert_eq!(asked[..6], [0x33, 0x33, 0xff, 5, 0, 6]);
        assert_eq!(speaker(&asked), None);
    }

    #[test]
    fn what_was_forwarded_or_says_nonsense_is_not_believed() {
        let mut forwarded = unsolicited_advertisement(MAC, v6());
        forwarded[21] = 254;
        assert_eq!(speaker(&forwarded), None);
        let mut endless = unsolicited_advertisement(MAC, v6());
        (endless[78], endless[79]) = (9, 0);
        assert_eq!(speaker(&endless), None);
        let [mut group, _] = gratuitous_arps(MAC, Ipv4Addr::new(10, 1, 2, 3));
        group[22] = 1;
        assert_eq!(speaker(&group), None);
    }

    proptest! {
        #[test]
        fn hostile_frames_never_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..120), kind in 0..3usize, cut in 0..86usize,
        ) {
            let _ = speaker(&bytes);
            if bytes.len() >= 14 {
                bytes[12..14].copy_from_slice(&[ARP, IPV6, RARP][kind].to_be_bytes());
                let _ = speaker(&bytes);
            }
            let whole = unsolicited_advertisement(MAC, v6());
            prop_assert_eq!(speaker(&whole[..cut]), None);
        }
    }
}
