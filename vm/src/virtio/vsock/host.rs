//! The host's side: a UNIX socket where programs say `CONNECT PORT\n` to be connected to that port of the guest
//! (they read `OK HOST-PORT\n` once they are), and the sockets named like it with `_PORT` behind, where programs
//! wait for the guest to connect to that port of the host. Firecracker's convention, which tools know.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;

use nix::sys::epoll::EpollFlags;

use super::super::poller::Poller;
use super::reacher::{Reacher, Way};
use crate::console::Listening;
use crate::error::{Result as VmResult, VmError};

/// The listener itself.
pub(super) const LISTENER: u32 = 0;
/// The longest line that asks for a connection, its end included.
const LONGEST_LINE: usize = "CONNECT 4294967295\n".len();

/// A program that has not said yet what it wants.
#[derive(Debug)]
struct Greeter {
    stream: UnixStream,
    line: Vec<u8>,
}

/// A program that wants to be connected to a port of the guest.
#[derive(Debug)]
pub(super) struct Caller {
    /// The guest's port.
    pub(super) port: u32,
    /// Its stream, non-blocking.
    pub(super) stream: UnixStream,
    /// What that is watched as.
    pub(super) token: u32,
}

/// The host's side. Streams are watched for every change there is, and told of once for each.
#[derive(Debug)]
pub(super) struct Host {
    socket: Listening,
    reacher: Reacher,
    poller: Option<Poller>,
    greeters: BTreeMap<u32, Greeter>,
    next_token: u32,
}

impl Host {
    /// Meets programs at `socket`, and reaches others by `way`.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub(super) fn at(socket: Listening, way: Way) -> VmResult<Self> {
        Ok(Self {
            socket,
            reacher: Reacher::start(way)?,
            poller: None,
            greeters: BTreeMap::new(),
            next_token: LISTENER,
        })
    }

    /// Watches with `poller` from now on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn attach(&mut self, poller: &Poller) -> VmResult<()> {
        poller
            .watch(self.socket.listener(), EpollFlags::EPOLLIN | EpollFlags::EPOLLET, LISTENER)
            .map_err(|error| {
            let path = self.socket.path().display();
            VmError::refused(format!("watch the socket {path}"), error)
        })?;
        self.poller = Some(poller.clone());
        Ok(())
    }

    /// Programs that have not said what they want.
    pub(super) fn len(&self) -> usize {
        self.greeters.len()
    }

    /// Nobody waits to be connected.
    pub(super) fn clear(&mut self) {
        self.greeters.clear();
    }

    /// Takes programs that came, at most `room` of them; the rest is turned away. `taken` says which tokens are.
    pub(super) fn accept(&mut self, mut room: usize, taken: impl Fn(u32) -> bool) {
        loop {
            match self.socket.listener().accept() {
                Ok((stream, _)) if room > 0 => {
                    let watched =
                        stream.set_nonblocking(true).and_then(|()| self.watch(&stream, &taken));
                    match watched {
                        Ok(token) => {
                            self.greeters.insert(token, Greeter { stream, line: Vec::new() });
                            room -= 1;
                        }
                        Err(error) => tracing::warn!("Vsock cannot watch a program: {error}"),
                    }
                }
                Ok(_) => tracing::warn!("Vsock turns a program away: there are too many"),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != ErrorKind::WouldBlock {
                        // Who waits is taken when the next one comes.
                        tracing::warn!("Vsock cannot take a program: {error}");
                    }
                    return;
                }
            }
        }
    }

    /// Hears what the program watched as `token` says; that it wants to be connected, when it has said so.
    pub(super) fn hear(&mut self, token: u32) -> Option<Caller> {
        let greeter = self.greeters.get_mut(&token)?;
        let port = match greeter.read_line() {
            Ok(None) => return None,
            Ok(Some(port)) => Some(port),
            Err(error) => {
                tracing::debug!("Vsock turns a program away: {error}");
                None
            }
        };
        let Greeter { stream, .. } = self.greeters.remove(&token)?;
        port.map(|port| Caller { port, stream, token })
    }

    /// Every program may have said something: those that want to be connected.
    pub(super) fn hear_all(&mut self) -> Vec<Caller> {
        let tokens: Vec<u32> = self.greeters.keys().copied().collect();
        tokens.into_iter().filter_map(|token| self.hear(token)).collect()
    }

    /// A stream to the program that waits for the guest at `port`, and what it is watched as.
    ///
    /// # Errors
    /// When none does, or too many want it.
    pub(super) fn reach(
        &mut self,
        port: u32,
        taken: impl Fn(u32) -> bool,
    ) -> io::Result<(UnixStream, u32)> {
        let stream = self.reacher.reach(port)?;
        let token = self.watch(&stream, &taken)?;
        Ok((stream, token))
    }

    fn watch(&mut self, stream: &UnixStream, taken: &impl Fn(u32) -> bool) -> io::Result<u32> {
        let poller = self.poller.as_ref().ok_or(ErrorKind::NotConnected)?;
        let mut token = self.next_token;
        loop {
            token = token.wrapping_add(1);
            if token != LISTENER && !self.greeters.contains_key(&token) && !taken(token) {
                break;
            }
        }
        self.next_token = token;
        let events = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLET;
        poller.watch(stream, events, token)?;
        Ok(token)
    }
}

impl Greeter {
    /// The port that the program asks for, once it has.
    fn read_line(&mut self) -> io::Result<Option<u32>> {
        loop {
            let mut byte = [0];
            // One by one: what comes behind the line is for the guest.
            match self.stream.read(&mut byte) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => self.line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
            if byte == *b"\n" {
                return port_of(&self.line)
                    .map(Some)
                    .ok_or_else(|| io::Error::other("it does not ask for a connection"));
            }
            if self.line.len() >= LONGEST_LINE {
                return Err(io::Error::other("its first line does not end"));
            }
        }
    }
}

fn port_of(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let port = line.strip_prefix("CONNECT ")?;
    // `parse` takes a sign, too.
    port.parse().ok().filter(|_| port.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_line_that_asks_for_a_port_does() {
        assert_eq!(port_of(b"CONNECT 52\n"), Some(52));
        assert_eq!(port_of(b"CONNECT 4294967295\n"), Some(u32::MAX));
        for line in
            ["CONNECT +5\n", "CONNECT \n", "CONNECT 4294967296\n", "connect 5\n", "CONNECT 5", "\n"]
        {
            assert_eq!(port_of(line.as_bytes()), None, "{line:?}");
        }
        assert_eq!(port_of(b"CONNECT \xff\n"), None);
    }
}
