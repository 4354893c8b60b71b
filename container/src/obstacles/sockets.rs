//! Sockets: which of them CRIU refuses. A descriptor is borrowed for as long as the kernel is asked about it;
//! nothing is read from it.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::descriptors::{Ends, Held};
use super::said::plain;
use crate::sys::{look, pidfd_getfd, pidfd_open};

const IPPROTO_MPTCP: i32 = 262;
const SO_GET_FILTER: i32 = libc::SO_ATTACH_FILTER;
const TCP_ULP: i32 = 31;
const TCP_SYN_RECV: u8 = 3;
const UDP_CORK: i32 = 1;
const NETLINK_LIST_MEMBERSHIPS: i32 = 9;

/// What is wrong with a socket, and the remedy.
pub(crate) type Wrong = (String, &'static str);

/// Borrows descriptors of processes.
#[derive(Debug, Default)]
pub(crate) struct Lender {
    processes: HashMap<i32, Option<OwnedFd>>,
}

impl Lender {
    /// A duplicate of what `held` is by; nothing when it has been closed.
    pub(crate) fn borrow(&mut self, held: &Held) -> Option<OwnedFd> {
        let (pid, number) = held.by;
        let process = self.processes.entry(pid).or_insert_with(|| pidfd_open(pid).ok());
        pidfd_getfd(process.as_ref()?.as_fd(), number).ok()
    }
}

/// What is wrong with each of the sockets, by inode; and which are UNIX sockets.
pub(crate) fn look(ends: &Ends, lender: &mut Lender) -> (Vec<(Held, Wrong)>, Vec<u64>) {
    let (mut wrong, mut unix) = (Vec::new(), Vec::new());
    for (inode, held) in &ends.sockets {
        let Some(socket) = lender.borrow(held) else { continue };
        // The number may have been given to something else meanwhile.
        let Ok(family) = look::option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN) else {
            continue;
        };
        if family == libc::AF_UNIX {
            unix.push(*inode);
        }
        let one = judge(family, socket.as_fd());
        wrong.extend(one.map(|one| (held.clone(), one)));
    }
    (wrong, unix)
}

/// Whether the other end of a pipe, of which the container has but one, is open somewhere else.
pub(crate) fn has_other_end(pipe: &Held, lender: &mut Lender) -> bool {
    let Some(end) = lender.borrow(pipe) else { return false };
    let closed = if pipe.reads { PollFlags::POLLHUP } else { PollFlags::POLLERR };
    let asked = poll_now(end.as_fd());
    asked.is_some_and(|events| !events.intersects(closed))
}

fn poll_now(fd: BorrowedFd<'_>) -> Option<PollFlags> {
    let mut asked = [PollFd::new(fd, PollFlags::POLLIN | PollFlags::POLLOUT)];
    poll(&mut asked, PollTimeout::ZERO).ok()?;
    asked[0].revents()
}

fn judge(family: i32, socket: BorrowedFd<'_>) -> Option<Wrong> {
    let wrong = match family {
        libc::AF_UNIX => None,
        libc::AF_INET | libc::AF_INET6 => inet(family, socket),
        libc::AF_NETLINK => netlink(socket),
        libc::AF_PACKET => Some((
            "it is a packet socket, which belongs to an interface of this host's numbering"
                .to_owned(),
            "end what captures packets in the container",
        )),
        other => Some((
            format!("it is a socket of a kind that CRIU does not know ({})", family_name(other)),
            "have it close that; what is tied to this host's devices or kernel cannot move",
        )),
    };
    wrong.or_else(|| filter(socket))
}

fn family_name(family: i32) -> String {
    let name = match family {
        libc::AF_VSOCK => "AF_VSOCK",
        libc::AF_ALG => "AF_ALG",
        libc::AF_BLUETOOTH => "AF_BLUETOOTH",
        libc::AF_CAN => "AF_CAN",
        libc::AF_XDP => "AF_XDP",
        libc::AF_KEY => "AF_KEY",
        libc::AF_TIPC => "AF_TIPC",
        libc::AF_RDS => "AF_RDS",
        43 => "AF_SMC",
        _ => return format!("family {family}"),
    };
    name.to_owned()
}

/// An eBPF program in the place of a classic filter: the kernel does not give it back.
fn filter(socket: BorrowedFd<'_>) -> Option<Wrong> {
    let asked = look::option_bytes(socket, libc::SOL_SOCKET, SO_GET_FILTER, &mut []);
    (asked.err()?.raw_os_error() == Some(libc::EACCES)).then(|| {
        (
            "it has an eBPF program for a filter, which CRIU cannot dump".to_owned(),
            "have it use a classic filter, or none",
        )
    })
}

fn inet(family: i32, socket: BorrowedFd<'_>) -> Option<Wrong> {
    let of_socket = |name| look::option(socket, libc::SOL_SOCKET, name).unwrap_or(0);
    let (kind, protocol) = (of_socket(libc::SO_TYPE), of_socket(libc::SO_PROTOCOL));
    match (kind, protocol) {
        (libc::SOCK_RAW, _) => {
            return Some((
                "it is a raw IP socket, of which CRIU loses what it is bound to on many kernels"
                    .to_owned(),
                "end what uses it (ping, traceroute, a VPN) while it moves",
            ));
        }
        (_, IPPROTO_MPTCP) => {
            return Some((
                "it is a multipath TCP socket, which CRIU cannot dump".to_owned(),
                "have it use plain TCP (programs in Go: GODEBUG=multipathtcp=0)",
            ));
        }
        (libc::SOCK_STREAM, libc::IPPROTO_TCP | 0) => {
            return tcp(socket).or_else(|| scope(family, socket));
        }
        (libc::SOCK_DGRAM, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE) => {
            if look::option(socket, libc::IPPROTO_UDP, UDP_CORK).is_ok_and(|corked| corked != 0) {
                return Some((
                    "it is a corked UDP socket, which CRIU cannot dump".to_owned(),
                    "wait until it sends what it collects, or have it do without UDP_CORK",
                ));
            }
        }
        (libc::SOCK_DGRAM, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6 | 0) => {}
        (_, protocol) => {
            let name = match protocol {
                libc::IPPROTO_SCTP => "SCTP".to_owned(),
                libc::IPPROTO_DCCP => "DCCP".to_owned(),
                115 => "L2TP".to_owned(),
                other => format!("protocol {other}"),
            };
            return Some((
                format!("it is a socket of {name}, which CRIU cannot dump"),
                "have it use TCP or UDP, or end its connections",
            ));
        }
    }
    scope(family, socket)
}

/// A name of this link's only, without the interface that it is of: CRIU could not bind it again.
fn scope(family: i32, socket: BorrowedFd<'_>) -> Option<Wrong> {
    if family != libc::AF_INET6 {
        return None;
    }
    let mut address = [0; 128];
    // Family, port, flow, then the address.
    if look::own_address(socket, &mut address).ok()? < 24 {
        return None;
    }
    let local = address[8] == 0xfe && address[9] & 0xc0 == 0x80;
    let port = u16::from_be_bytes([address[2], address[3]]);
    let mut device = [0; 16];
    let bound =
        look::option_bytes(socket, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, &mut device).ok()?;
    (local && port != 0 && bound == 0).then(|| {
        (
            "it is bound to an IPv6 address of the link only, and to no interface".to_owned(),
            "have it bind to its interface too (SO_BINDTODEVICE), or to another address",
        )
    })
}

fn tcp(socket: BorrowedFd<'_>) -> Option<Wrong> {
    let mut name = [0; 16];
    let length = look::option_bytes(socket, libc::IPPROTO_TCP, TCP_ULP, &mut name).unwrap_or(0);
    let name = name[..length].split(|byte| *byte == 0).next().filter(|name| !name.is_empty());
    if let Some(name) = name {
        return Some((
            format!("it is a TCP connection that the kernel handles further ({})", plain(name)),
            "have it do TLS by itself (OpenSSL: without Options = KTLS; nginx: without ssl_conf_command)",
        ));
    }
    let mut state = [0; 1];
    let told = look::option_bytes(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut state);
    (told.is_ok_and(|length| length == 1) && state[0] == TCP_SYN_RECV).then(|| {
        (
            "it is a TCP connection that is being made (TCP Fast Open)".to_owned(),
            "wait until it is made",
        )
    })
}

fn netlink(socket: BorrowedFd<'_>) -> Option<Wrong> {
    if poll_now(socket).is_some_and(|events| events.contains(PollFlags::POLLIN)) {
        return Some((
            "it is a netlink socket with messages that nobody has read, which CRIU cannot dump"
                .to_owned(),
            "have it read them, or restart it",
        ));
    }
    let mut groups = [0; 256];
    let told = look::option_bytes(socket, libc::SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, &mut groups)
        .ok()?;
    let groups = &groups[..told.min(256)];
    if groups.iter().skip(4).any(|byte| *byte != 0) {
        return Some((
            "it is a netlink socket in a group above 32, which CRIU cannot dump".to_owned(),
            "end what listens to the kernel by it",
        ));
    }
    let mut address = [0; 128];
    let told = look::own_address(socket, &mut address).ok()?;
    let number = u32::from_ne_bytes(address[4..8].try_into().ok()?);
    (told >= 8 && number == 0 && groups.iter().any(|byte| *byte != 0)).then(|| {
        (
            "it is a netlink socket in a group, and without an address, which CRIU cannot dump"
                .to_owned(),
            "end what listens to the kernel by it, or have it bind before it joins",
        )
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

    use super::*;

    fn said(socket: impl AsFd) -> String {
        let family = look::option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN).expect("one");
        judge(family, socket.as_fd()).map(|(what, _)| what).unwrap_or_default()
    }

    #[test]
    fn ordinary_sockets_are_nothing() {
        assert_eq!(said(TcpListener::bind("127.0.0.1:0").expect("a socket")), "");
        assert_eq!(said(UdpSocket::bind("[::1]:0").expect("a socket")), "");
        let (one, _other) = std::os::unix::net::UnixStream::pair().expect("a pair");
        assert_eq!(said(one), "");
        let flags = SockFlag::SOCK_CLOEXEC;
        let netlink =
            socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute);
        assert_eq!(said(netlink.expect("a socket")), "");
    }

    #[test]
    fn the_other_end_of_a_pipe_is_seen() {
        use std::os::fd::AsRawFd;
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let me = std::process::id() as i32;
        let held = Held { by: (me, reader.as_raw_fd()), reads: true, writes: false };
        let mut lender = Lender::default();
        assert!(has_other_end(&held, &mut lender));
        drop(writer);
        assert!(!has_other_end(&held, &mut lender));
    }
}
