//! UNIX sockets as the kernel lists them: which are connected to what is not in the container.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
    setsockopt, socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::TimeVal;

use super::sockets::Wrong;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const UDIAG_SHOW_PEER: u32 = 4;
const UNIX_DIAG_PEER: u16 = 2;
const HEADER: usize = 16;
/// `struct unix_diag_msg` behind the header.
const MESSAGE: usize = 16;

/// All UNIX sockets of the calling thread's network namespace by inode, and the inodes of their peers: 0
/// where there is none, or it has not been accepted yet.
pub(crate) fn list() -> io::Result<BTreeMap<u64, u64>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::new(1, 0))?;
    let mut question = Vec::with_capacity(40);
    question.extend_from_slice(&40u32.to_ne_bytes());
    question.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    question.extend_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    question.extend_from_slice(&[0; 8]);
    question.extend_from_slice(&[libc::AF_UNIX as u8, 0, 0, 0]);
    // Every state, every inode.
    question.extend_from_slice(&u32::MAX.to_ne_bytes());
    question.extend_from_slice(&0u32.to_ne_bytes());
    question.extend_from_slice(&UDIAG_SHOW_PEER.to_ne_bytes());
    question.extend_from_slice(&[0xff; 8]);
    sendto(socket.as_raw_fd(), &question, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut found = BTreeMap::new();
    let mut buffer = vec![0; 32 << 10];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if enter(&buffer[..length], &mut found)? {
            return Ok(found);
        }
    }
}

/// Enters what a part of the kernel's answer lists; whether it was the last.
fn enter(mut part: &[u8], found: &mut BTreeMap<u64, u64>) -> io::Result<bool> {
    while part.len() >= HEADER {
        let length = number(part, 0)? as usize;
        let kind = i32::from(short(part, 4)?);
        match kind {
            libc::NLMSG_DONE => return Ok(true),
            libc::NLMSG_ERROR => {
                let error = number(part, HEADER)? as i32;
                return Err(io::Error::from_raw_os_error(-error));
            }
            _ => {}
        }
        let message = part.get(HEADER..length).filter(|message| message.len() >= MESSAGE);
        let message = message.ok_or(io::ErrorKind::InvalidData)?;
        let inode = number(message, 4)?;
        found.insert(inode.into(), peer(&message[MESSAGE..])?.into());
        part = part.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn peer(mut attributes: &[u8]) -> io::Result<u32> {
    while attributes.len() >= 4 {
        let length = usize::from(short(attributes, 0)?);
        if short(attributes, 2)? == UNIX_DIAG_PEER {
            return number(attributes, 4);
        }
        // One that is shorter than its own head would go on for ever.
        attributes = attributes.get(length.max(4).next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(0)
}

fn number(from: &[u8], at: usize) -> io::Result<u32> {
    let bytes = from.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map(u32::from_ne_bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn short(from: &[u8], at: usize) -> io::Result<u16> {
    let bytes = from.get(at..at + 2).and_then(|bytes| bytes.try_into().ok());
    bytes.map(u16::from_ne_bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// What is wrong with UNIX socket `inode`, where the container has the sockets `held` and its network
/// namespace lists `listed`.
pub(crate) fn judge(
    inode: u64,
    listed: &BTreeMap<u64, u64>,
    held: &BTreeSet<u64>,
) -> Option<Wrong> {
    match listed.get(&inode) {
        None => Some((
            "it is a UNIX socket that was made outside of the container".to_owned(),
            "have it close that, or start it without (a notify socket, a socket that a service manager opened)",
        )),
        Some(0) => None,
        Some(peer) if held.contains(peer) => None,
        Some(_) => Some((
            "it is a UNIX socket connected to a process outside of the container".to_owned(),
            "have it disconnect (the host's D-Bus, syslog, a database or engine by its socket), or reach that \
             over the network",
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    #[test]
    fn both_ends_of_a_pair_are_listed() {
        let (one, other) = UnixStream::pair().expect("a pair");
        let alone = UnixDatagram::unbound().expect("a socket");
        let inode =
            |socket: &dyn std::os::fd::AsFd| crate::sys::inode(socket.as_fd()).expect("one");
        let (one, other, alone) = (inode(&one), inode(&other), inode(&alone));
        let listed = list().expect("a list");
        assert_eq!((listed[&one], listed[&other], listed[&alone]), (other, one, 0));
        let both = BTreeSet::from([one, other]);
        assert_eq!(judge(one, &listed, &both), None);
        assert_eq!(judge(alone, &listed, &both), None);
        let outside = judge(one, &listed, &BTreeSet::from([one])).expect("outside");
        assert!(outside.0.contains("connected to a process outside"), "{outside:?}");
        assert!(judge(1, &listed, &both).expect("unknown").0.contains("made outside"));
    }

    #[test]
    fn an_answer_that_is_cut_is_refused() {
        let mut found = BTreeMap::new();
        assert!(enter(&[40, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &mut found).is_err());
        assert_eq!(peer(&[0, 0, 9, 0, 8, 0, 2, 0, 7, 0, 0, 0]).expect("a peer"), 7);
    }
}
