//! The kernel's route netlink (linux/rtnetlink.h, rtnetlink(7)): requests with their attributes, and what comes back
//! for them. What the attributes mean is said where they are asked for.
//!
//! `ip` and `bridge` could do it too, in a process each; some of this is on the path that users see as downtime. And
//! /sys/class/net may be of another network namespace than the calling thread's.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

pub(super) const RTM_NEWLINK: u16 = 16;
pub(super) const RTM_GETLINK: u16 = 18;
pub(super) const RTM_SETLINK: u16 = 19;
pub(super) const RTM_GETADDR: u16 = 22;
pub(super) const RTM_GETNEIGH: u16 = 30;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
/// The flags of an attribute's type: that it is a nest, or in network order.
const TYPE_FLAGS: u16 = 0xc000;
const NESTED: u16 = 0x8000;
const HEADER: usize = 16;
/// A part of an answer is not longer: the kernel cuts lists to fit 32 KiB.
const LONGEST: usize = 64 << 10;
/// No list that anybody asks for here is longer.
const MOST: usize = 1 << 20;
/// The kernel answers at once, or never.
const WITHIN_SECONDS: i64 = 5;

/// A request: what it is about, and its attributes.
#[derive(Debug, Default)]
pub(super) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A request with the fixed part `about`, whose length is a multiple of four.
    pub(super) fn about(about: &[u8]) -> Self {
        Self { bytes: about.to_vec() }
    }

    /// A request about interface `index`, seen by `family` (`struct ifinfomsg`); those of `flags` in `mask` are set.
    pub(super) fn link(family: u8, index: u32, flags: u32, mask: u32) -> Self {
        let mut about = vec![family, 0, 0, 0];
        for word in [index, flags, mask] {
            about.extend_from_slice(&word.to_ne_bytes());
        }
        Self::about(&about)
    }

    /// With the attribute `kind`.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        attribute(&mut self.bytes, kind, value);
        self
    }

    /// With the attribute `kind`, in which are others.
    pub(super) fn with_nest(self, kind: u16, inside: &[(u16, &[u8])]) -> Self {
        let mut nest = Vec::new();
        inside.iter().for_each(|(kind, value)| attribute(&mut nest, *kind, value));
        self.with(kind | NESTED, &nest)
    }

    fn message(&self, kind: u16, flags: u16) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.bytes.len());
        bytes.extend_from_slice(&((HEADER + self.bytes.len()) as u32).to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        // Sequence, port.
        bytes.extend_from_slice(&1u32.to_ne_bytes());
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&self.bytes);
        bytes
    }

    /// Has the kernel do it, in the network namespace of the calling thread.
    pub(super) fn carry_out(&self, kind: u16) -> io::Result<()> {
        self.exchange(kind, NLM_F_ACK).map(|_| ())
    }

    /// Asks for one thing; gives what was said of it, without the header.
    pub(super) fn ask(&self, kind: u16) -> io::Result<Vec<u8>> {
        let mut said = self.exchange(kind, 0)?;
        said.pop().ok_or_else(nonsense)
    }

    /// Asks for a list; gives what was said of each, without headers.
    pub(super) fn list(&self, kind: u16) -> io::Result<Vec<Vec<u8>>> {
        self.exchange(kind, NLM_F_DUMP)
    }

    fn exchange(&self, kind: u16, flags: u16) -> io::Result<Vec<Vec<u8>>> {
        let socket = open()?;
        let message = self.message(kind, flags);
        sendto(socket.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut found = Vec::new();
        let mut answer = vec![0; LONGEST];
        loop {
            let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            match read(&answer[..length], flags == NLM_F_DUMP, &mut found)? {
                Read::All => return Ok(found),
                Read::Part if found.len() > MOST => return Err(nonsense()),
                Read::Part => {}
            }
        }
    }
}

fn open() -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(WITHIN_SECONDS))?;
    Ok(socket)
}

#[derive(Debug, PartialEq, Eq)]
enum Read {
    All,
    Part,
}

/// Takes the messages in `answer` apart.
fn read(mut answer: &[u8], is_list: bool, found: &mut Vec<Vec<u8>>) -> io::Result<Read> {
    while !answer.is_empty() {
        let length = u32_at(answer, 0).ok_or_else(nonsense)? as usize;
        let kind = u16_at(answer, 4).ok_or_else(nonsense)?;
        let body = answer.get(HEADER..length).ok_or_else(nonsense)?;
        match kind {
            NLMSG_ERROR => {
                let number = u32_at(body, 0).ok_or_else(nonsense)? as i32;
                return match number {
                    0 => Ok(Read::All),
                    _ => Err(io::Error::from_raw_os_error(number.wrapping_neg())),
                };
            }
            NLMSG_DONE => return Ok(Read::All),
            _ => found.push(body.to_vec()),
        }
        if !is_list {
            return Ok(Read::All);
        }
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Read::Part)
}

fn attribute(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    to.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// The attributes in `bytes`, up to the first that is none.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & !TYPE_FLAGS;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The attribute `wanted` in `bytes`.
pub(super) fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "The kernel's netlink answer makes no sense")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_is_as_long_as_it_says() {
        let request = Request::link(7, 9, 0, 0).with_nest(12, &[(1, &[3])]);
        let bytes = request.message(RTM_SETLINK, NLM_F_ACK);
        assert_eq!(bytes.len(), 44);
        assert_eq!(bytes[..4], 44u32.to_ne_bytes());
        assert_eq!(bytes[40], 3);
        let nest = find(&bytes[32..], 12).expect("the nest");
        assert_eq!(find(nest, 1), Some(&[3][..]));
    }

    #[test]
    fn errors_are_the_kernels() {
        let error = |number: i32| {
            let mut bytes = vec![36, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
            bytes.extend(number.to_ne_bytes());
            bytes.resize(36, 0);
            read(&bytes, false, &mut Vec::new())
        };
        assert_eq!(error(0).expect("all is well"), Read::All);
        assert_eq!(error(-1).expect_err("EPERM").raw_os_error(), Some(1));
        assert!(read(&[0; 7], false, &mut Vec::new()).is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut found = Vec::new();
            let _ = read(&bytes, true, &mut found);
            let _ = attributes(&bytes).count();
        }
    }
}
