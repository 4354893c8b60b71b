//! One request of the kernel's route netlink: the state of an interface's port of a bridge.
//!
//! `ip` and `bridge` could do it too, in a process each; this is on the path that users see as
//! downtime.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// What a port does with frames (linux/if_bridge.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortState {
    /// Drops all, in both directions.
    Disabled = 0,
    /// Passes all.
    Forwarding = 3,
}

const RTM_SETLINK: u16 = 19;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const AF_BRIDGE: u8 = 7;
const IFLA_PROTINFO: u16 = 12;
const NLA_F_NESTED: u16 = 1 << 15;
const IFLA_BRPORT_STATE: u16 = 1;

/// Sets the state of the port that interface `index` of our network namespace is.
pub(crate) fn set_port_state(index: u32, state: PortState) -> io::Result<()> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let request = request(index, state);
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 512];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    outcome(&answer[..length])
}

fn request(index: u32, state: PortState) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(48);
    // nlmsghdr: length (set below), type, flags, sequence, port.
    bytes.extend_from_slice(&0u32.to_ne_bytes());
    bytes.extend_from_slice(&RTM_SETLINK.to_ne_bytes());
    bytes.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    bytes.extend_from_slice(&1u32.to_ne_bytes());
    bytes.extend_from_slice(&0u32.to_ne_bytes());
    // ifinfomsg: family, padding, type, index, flags, mask.
    bytes.extend_from_slice(&[AF_BRIDGE, 0, 0, 0]);
    bytes.extend_from_slice(&index.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    // The nest, and in it one attribute of one byte, padded to four.
    bytes.extend_from_slice(&12u16.to_ne_bytes());
    bytes.extend_from_slice(&(IFLA_PROTINFO | NLA_F_NESTED).to_ne_bytes());
    bytes.extend_from_slice(&5u16.to_ne_bytes());
    bytes.extend_from_slice(&IFLA_BRPORT_STATE.to_ne_bytes());
    bytes.extend_from_slice(&[state as u8, 0, 0, 0]);
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

/// What the kernel answered: an error message whose number is 0 when all is well.
fn outcome(answer: &[u8]) -> io::Result<()> {
    let bad =
        || io::Error::new(io::ErrorKind::InvalidData, "The kernel's netlink answer makes no sense");
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let number = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, number) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(number)) => {
            Err(io::Error::from_raw_os_error(number.wrapping_neg()))
        }
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_as_long_as_it_says() {
        let bytes = request(7, PortState::Forwarding);
        assert_eq!(bytes.len(), 44);
        assert_eq!(bytes[..4], 44u32.to_ne_bytes());
        assert_eq!(bytes[40], 3);
    }

    #[test]
    fn the_loopback_interface_is_no_port() {
        // Interface 1 exists everywhere and is of no bridge: the kernel must say so.
        assert!(set_port_state(1, PortState::Disabled).is_err());
        assert!(outcome(&[0; 7]).is_err());
    }
}
