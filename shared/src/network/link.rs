//! Interfaces and bridges of the network namespace that the calling thread is in, as the kernel tells of them and as
//! they are changed.

use std::fs;
use std::net::IpAddr;

use nix::net::if_::if_nametoindex;

use super::error::{NetworkError, Result};
use super::frames::Neighbour;
use super::mac::Mac;
use super::netlink::{
    RTM_GETADDR, RTM_GETLINK, RTM_GETNEIGH, RTM_NEWLINK, RTM_SETLINK, Request, attributes, find,
    u16_at, u32_at,
};

const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const AF_BRIDGE: u8 = 7;
/// Bytes of `ifinfomsg`, `ifaddrmsg` and `ndmsg`, before the attributes.
const LINK_MESSAGE: usize = 16;
const ADDRESS_MESSAGE: usize = 8;
const NEIGHBOUR_MESSAGE: usize = 12;

const IFF_UP: u32 = 1;
const IFF_LOWER_UP: u32 = 0x1_0000;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const IFLA_BR_VLAN_DEFAULT_PVID: u16 = 39;
const IFLA_BRPORT_STATE: u16 = 1;
const IFLA_BRIDGE_VLAN_INFO: u16 = 2;
const BRIDGE_VLAN_INFO_PVID: u16 = 2;
const RTEXT_FILTER_BRVLAN: u32 = 2;
const IF_OPER_UNKNOWN: u8 = 0;
const IF_OPER_UP: u8 = 6;
const IFA_ADDRESS: u16 = 1;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// How a neighbour is known (linux/neighbour.h). Reachable, stale, delayed, probed, permanent: its hardware address is known.
const NUD_REACHABLE: u16 = 0x02;
const NUD_VALID: u16 = NUD_REACHABLE | 0x04 | 0x08 | 0x10 | 0x80;

/// How a bridge keeps virtual networks apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vlans {
    /// Whether it does so at all.
    pub filtering: bool,
    /// The network that a new port is in, 0 for none.
    pub default: u16,
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address, where it has one of Ethernet.
    pub mac: Option<Mac>,
    /// Bytes that a frame carries at most.
    pub mtu: u32,
    /// Whether it is switched on.
    pub is_up: bool,
    /// Whether the kernel has noticed that it works.
    pub is_running: bool,
    /// The number of the bridge, or the like, that it is a port of.
    pub master: Option<u32>,
    /// Set of a bridge.
    pub bridge: Option<Vlans>,
}

impl Link {
    /// The interface called `name`.
    ///
    /// # Errors
    /// When there is none, or the kernel does not say.
    pub fn find(name: &str) -> Result<Self> {
        let failed = || NetworkError::refused(format!("find the interface {name}"));
        let index = index_of(name)?;
        let said = Request::link(AF_UNSPEC, index, 0, 0).ask(RTM_GETLINK).map_err(failed())?;
        Self::read(&said).ok_or_else(|| failed()(std::io::ErrorKind::InvalidData.into()))
    }

    /// The bridge called `name`; nothing when there is no interface of that name, or it is none.
    pub fn bridge(name: &str) -> Option<Self> {
        Self::find(name).ok().filter(|link| link.bridge.is_some())
    }

    fn read(said: &[u8]) -> Option<Self> {
        let (index, flags) = (u32_at(said, 4)?, u32_at(said, 8)?);
        let said = said.get(LINK_MESSAGE..)?;
        let name = find(said, IFLA_IFNAME)?.split(|byte| *byte == 0).next()?;
        let number = |wanted: u16| find(said, wanted).and_then(|value| u32_at(value, 0));
        let state = find(said, IFLA_OPERSTATE).and_then(|value| value.first());
        Some(Self {
            index,
            name: String::from_utf8(name.to_vec()).ok()?,
            mac: find(said, IFLA_ADDRESS).and_then(|value| value.try_into().ok()).map(Mac),
            mtu: number(IFLA_MTU)?,
            is_up: flags & IFF_UP != 0,
            // A tap device has a carrier from the beginning, and its state is never looked at.
            is_running: state == Some(&IF_OPER_UP)
                || (state == Some(&IF_OPER_UNKNOWN) && flags & IFF_LOWER_UP != 0),
            master: number(IFLA_MASTER),
            bridge: find(said, IFLA_LINKINFO).and_then(vlans),
        })
    }

    /// Has it be switched on or off.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_up(&self, up: bool) -> Result<()> {
        let flags = if up { IFF_UP } else { 0 };
        let word = if up { "up" } else { "down" };
        Request::link(AF_UNSPEC, self.index, flags, IFF_UP)
            .carry_out(RTM_NEWLINK)
            .map_err(NetworkError::refused(format!("take {} {word}", self.name)))
    }

    /// Makes it a port of `bridge`, with a hardware address and frames of its own size, and no business with addresses:
    /// the bridge is the host's, and what hangs on it is the workload's.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn join(&self, bridge: &Self, mac: Mac, mtu: u32) -> Result<()> {
        let failed = || {
            NetworkError::refused(format!("make {} a port of bridge {}", self.name, bridge.name))
        };
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", self.name), "1");
        Request::link(AF_UNSPEC, self.index, 0, 0)
            .with(IFLA_ADDRESS, &mac.0)
            .with(IFLA_MTU, &mtu.to_ne_bytes())
            .carry_out(RTM_NEWLINK)
            .map_err(failed())?;
        Request::link(AF_UNSPEC, self.index, 0, 0)
            .with(IFLA_MASTER, &bridge.index.to_ne_bytes())
            .carry_out(RTM_NEWLINK)
            .map_err(failed())
    }

    /// Sets what it does as a port of a bridge: 0 to 4, as in linux/if_bridge.h.
    pub(super) fn set_port_state(index: u32, state: u8) -> std::io::Result<()> {
        Request::link(AF_BRIDGE, index, 0, 0)
            .with_nest(IFLA_PROTINFO, &[(IFLA_BRPORT_STATE, &[state])])
            .carry_out(RTM_SETLINK)
    }

    /// The virtual network that frames without a tag belong to which come in by this port of a bridge; 0 for none.
    pub fn port_vlan(&self) -> u16 {
        let listed = Request::link(AF_BRIDGE, 0, 0, 0)
            .with(IFLA_EXT_MASK, &RTEXT_FILTER_BRVLAN.to_ne_bytes())
            .list(RTM_GETLINK);
        let listed = listed.unwrap_or_default();
        let own = listed.iter().filter(|said| u32_at(said, 4) == Some(self.index));
        let infos = own
            .filter_map(|said| find(said.get(LINK_MESSAGE..)?, IFLA_AF_SPEC))
            .flat_map(attributes)
            .filter(|(kind, _)| *kind == IFLA_BRIDGE_VLAN_INFO)
            .filter_map(|(_, info)| Some((u16_at(info, 0)?, u16_at(info, 2)?)));
        let mut with_own = infos.filter(|(flags, _)| flags & BRIDGE_VLAN_INFO_PVID != 0);
        with_own.next().map_or(0, |(_, vlan)| vlan)
    }

    /// The addresses that this host has on it.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let mut found = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let about = [family, 0, 0, 0, 0, 0, 0, 0];
            let listed = Request::about(&about).list(RTM_GETADDR).unwrap_or_default();
            let own = listed.iter().filter(|said| u32_at(said, 4) == Some(self.index));
            found.extend(
                own.filter_map(|said| address(find(said.get(ADDRESS_MESSAGE..)?, IFA_ADDRESS)?)),
            );
        }
        found
    }

    /// Whom this host knows on it, with their hardware addresses; first those that answered lately.
    pub fn neighbours(&self) -> Vec<Neighbour> {
        let mut found = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let about = [family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            let listed = Request::about(&about).list(RTM_GETNEIGH).unwrap_or_default();
            found.extend(listed.iter().filter_map(|said| self.neighbour(said)));
        }
        found.sort_by_key(|(state, _)| state & NUD_REACHABLE == 0);
        found.into_iter().map(|(_, neighbour)| neighbour).collect()
    }

    /// One on it, with how it is known.
    fn neighbour(&self, said: &[u8]) -> Option<(u16, Neighbour)> {
        let state = u16_at(said, 8)?;
        let is_ours = u32_at(said, 4)? == self.index && state & NUD_VALID != 0;
        let said = said.get(NEIGHBOUR_MESSAGE..)?;
        let address = address(find(said, NDA_DST)?)?;
        let mac = Mac(find(said, NDA_LLADDR)?.try_into().ok()?);
        (is_ours && mac.is_of_one()).then_some((state, Neighbour { address, mac }))
    }
}

/// The number of the interface `name`.
///
/// # Errors
/// When there is none.
pub fn index_of(name: &str) -> Result<u32> {
    if_nametoindex(name)
        .map_err(|error| NetworkError::refused(format!("find the interface {name}"))(error.into()))
}

fn vlans(info: &[u8]) -> Option<Vlans> {
    let kind = find(info, IFLA_INFO_KIND)?.split(|byte| *byte == 0).next()?;
    if kind != b"bridge" {
        return None;
    }
    let data = find(info, IFLA_INFO_DATA).unwrap_or_default();
    let filtering = find(data, IFLA_BR_VLAN_FILTERING).and_then(|value| value.first());
    let default = find(data, IFLA_BR_VLAN_DEFAULT_PVID).and_then(|value| u16_at(value, 0));
    Some(Vlans {
        filtering: filtering.is_some_and(|on| *on != 0),
        default: default.unwrap_or_default(),
    })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(four.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}
