//! The socket device (Virtual I/O Device 1.2, section 5.10): streams between programs in the guest and programs on
//! the host, who meet at UNIX sockets ([`host`]).
//!
//! | file | what lives there |
//! |---|---|
//! | `packet` | a packet's header |
//! | `connection` | one connection: what is said next, and how much there is room for |
//! | `table` | all connections of the guest |
//! | `host` | the host's sockets |
//! | `reacher` | what connects to programs of the host |
//!
//! Data of the host waits in its socket until the guest has room; data of the guest waits here, at most
//! [`connection::BUFFER`] bytes a connection. Connections do not travel, as the programs of the host do not: the
//! guest is told, where it arrives, that they are all gone. They go on when a move fails.

mod connection;
mod host;
mod packet;
mod reacher;
mod table;

use std::io::{Read, Write};

use libc::{SYS_accept4, SYS_recvfrom, SYS_shutdown};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::connection::MOST_DATA;
use self::host::{Caller, Host};
use self::packet::{HEADER, Header, STREAM, op};
pub(crate) use self::reacher::{Way, reach};
use self::table::{HOST, Pair, Table};
use super::device::{Broken, Chain, Device, Io, Served};
use super::poller::Poller;
use crate::console::Listening;
use crate::error::Result as VmResult;
use crate::memory::Map;
use crate::sandbox::Allowed;

/// What the guest receives.
const RECEIVE: usize = 0;
/// What it sends.
const TRANSMIT: usize = 1;
/// What it has to know.
const EVENT: usize = 2;
const QUEUES: [u16; 3] = [256, 256, 16];

/// Streams.
const F_STREAM: u64 = 1 << 0;
/// Event: every connection is gone, and the guest's identifier may be another.
const TRANSPORT_RESET: u32 = 0;
/// Makes a stream one that does not wait (`asm-generic/ioctls.h`).
const FIONBIO: u32 = libc::FIONBIO as u32;
/// The most connections, those that programs have not asked for yet included.
const MOST_CONNECTIONS: usize = 128;

/// Sockets between guest and host.
#[derive(Debug)]
pub(crate) struct Vsock {
    cid: u64,
    host: Host,
    table: Table,
    /// The guest has to be told that its connections are gone.
    owes_reset: bool,
    /// Something may have come that nobody looked at.
    missed: bool,
    scratch: Vec<u8>,
}

impl Vsock {
    /// Sockets of the guest with identifier `cid`; host programs meet it at `socket`.
    ///
    /// # Errors
    /// When nobody can listen there.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn new(cid: u32, socket: &std::path::Path) -> VmResult<Self> {
        let failed = |error| crate::error::VmError::refused("listen on the vsock socket", error);
        Self::at(cid, Listening::at(socket).map_err(failed)?, Way::Path(socket.to_owned()))
    }

    /// Sockets of the guest with identifier `cid`; host programs meet it at `socket`, and it reaches them by `way`.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub(crate) fn at(cid: u32, socket: Listening, way: Way) -> VmResult<Self> {
        let cid = cid.into();
        Ok(Self {
            cid,
            host: Host::at(socket, way)?,
            table: Table::new(cid),
            owes_reset: false,
            missed: false,
            scratch: vec![0; MOST_DATA],
        })
    }

    /// Looks at all that may have come while nobody looked.
    fn catch_up(&mut self) {
        if std::mem::take(&mut self.missed) {
            self.accept();
            let callers = self.host.hear_all();
            callers.into_iter().for_each(|caller| self.connect(caller));
            self.table.all_ready();
        }
    }

    fn accept(&mut self) {
        let there_are = self.table.len() + self.host.len();
        let room = MOST_CONNECTIONS.saturating_sub(there_are);
        self.host.accept(room, |token| self.table.has_token(token));
    }

    fn connect(&mut self, caller: Caller) {
        self.table.connect(caller.port, caller.stream, caller.token);
    }

    /// Takes what the guest sends and gives it what there is, until neither goes on.
    fn exchange(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        self.catch_up();
        loop {
            let mut stands = false;
            io.serve(TRANSMIT, |memory, chain| {
                if self.table.is_full_of_resets() {
                    stands = true;
                    return Ok(Served::Later);
                }
                self.take(memory, chain)
            })?;
            io.serve(RECEIVE, |memory, chain| self.give(memory, chain))?;
            if !stands || self.table.is_full_of_resets() {
                return Ok(());
            }
        }
    }

    /// Takes one packet.
    fn take(&mut self, map: &Map, chain: Chain<'_>) -> Result<Served, Broken> {
        let wrong = |reason: String| Broken::request(TRANSMIT, reason);
        let mut reader = chain.reader(map).map_err(|error| wrong(error.to_string()))?;
        let mut header = [0; HEADER];
        reader.read_exact(&mut header).map_err(|error| wrong(error.to_string()))?;
        let header = Header::from_bytes(&header);
        let length = header.length as usize;
        let Some(data) = self.scratch.get_mut(..length).filter(|_| header.op == op::RW) else {
            if length == 0 {
                self.hear(&header, 0);
                return Ok(Served::Done(0));
            }
            return Err(wrong(format!("a packet for {} with {length} bytes", header.op)));
        };
        reader.read_exact(data).map_err(|error| wrong(error.to_string()))?;
        self.hear(&header, length);
        Ok(Served::Done(0))
    }

    /// The guest says `header`, with so many bytes in `scratch`.
    fn hear(&mut self, header: &Header, length: usize) {
        let pair = Pair::of(header);
        if header.from != self.cid {
            tracing::debug!("The guest sends in the name of {}", header.from);
        } else if header.to != HOST || header.kind != STREAM {
            self.table.refuse(header);
        } else if self.table.has(pair) {
            self.table.take(header, &self.scratch[..length]);
        } else if header.op == op::REQUEST && self.table.len() + self.host.len() < MOST_CONNECTIONS
        {
            match self.host.reach(header.to_port, |token| self.table.has_token(token)) {
                Ok((stream, token)) => self.table.accept(header, stream, token),
                Err(error) => {
                    tracing::debug!("Nobody waits for the guest at {}: {error}", header.to_port);
                    self.table.refuse(header);
                }
            }
        } else {
            self.table.refuse(header);
        }
    }

    /// Fills one buffer with the next packet for the guest.
    fn give(&mut self, map: &Map, chain: Chain<'_>) -> Result<Served, Broken> {
        let wrong = |reason: String| Broken::request(RECEIVE, reason);
        let mut writer = chain.writer(map).map_err(|error| wrong(error.to_string()))?;
        let room = writer.available_bytes().saturating_sub(HEADER);
        if room == 0 {
            let length = writer.available_bytes();
            return Err(wrong(format!("{length} bytes are too few for a packet with data")));
        }
        let into = &mut self.scratch[..room.min(MOST_DATA)];
        let Some(header) = self.table.next(into) else { return Ok(Served::Later) };
        let data = &self.scratch[..header.length as usize];
        let written = writer.write_all(&header.to_bytes()).and_then(|()| writer.write_all(data));
        written.map_err(|error| wrong(error.to_string()))?;
        Ok(Served::Done((HEADER + data.len()) as u32))
    }

    fn tell_events(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        io.serve(EVENT, |memory, chain| {
            if !self.owes_reset {
                return Ok(Served::Later);
            }
            let wrong = |reason: String| Broken::request(EVENT, reason);
            let mut writer = chain.writer(memory).map_err(|error| wrong(error.to_string()))?;
            let event = TRANSPORT_RESET.to_le_bytes();
            writer.write_all(&event).map_err(|error| wrong(error.to_string()))?;
            self.owes_reset = false;
            Ok(Served::Done(event.len() as u32))
        })
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn version(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn allowed(&self) -> Allowed {
        // To take programs in, to read their streams and to end one side of them. To connect is the reacher's.
        let calls = vec![SYS_accept4, SYS_recvfrom, SYS_shutdown];
        Allowed { calls, requests: vec![FIONBIO] }
    }

    fn attach(&mut self, poller: &Poller) -> VmResult<()> {
        self.host.attach(poller)
    }

    fn start(&mut self, _io: &mut Io<'_>) -> Result<(), Broken> {
        self.missed = true;
        Ok(())
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        if queue == EVENT { self.tell_events(io) } else { self.exchange(io) }
    }

    fn on_ready(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), Broken> {
        if token == host::LISTENER {
            self.accept();
        } else if let Some(caller) = self.host.hear(token) {
            self.connect(caller);
        } else {
            self.table.ready(token);
        }
        self.exchange(io)
    }

    /// Streams tell of each change once, and nobody listens during a pause.
    fn settle(&mut self, _io: &mut Io<'_>) -> Result<(), Broken> {
        self.missed = true;
        Ok(())
    }

    fn arrived(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        self.missed = true;
        self.owes_reset = true;
        self.tell_events(io)
    }

    fn reset(&mut self) {
        self.table.clear();
        self.host.clear();
        self.owes_reset = false;
    }

    /// The guest's identifier, eight bytes; whether it has to be told that its connections are gone, one byte.
    fn save(&self) -> Vec<u8> {
        let mut bytes = self.cid.to_le_bytes().to_vec();
        bytes.push(self.owes_reset.into());
        bytes
    }

    fn load(&mut self, bytes: &[u8], _features: u64) -> Result<(), String> {
        let (cid, owes_reset) = match bytes {
            [cid @ .., owes @ (0 | 1)] if cid.len() == 8 => (cid, *owes == 1),
            _ => return Err(format!("{} bytes are no sockets' state", bytes.len())),
        };
        if cid != self.cid.to_le_bytes() {
            return Err(format!("it is of a guest with another identifier than {}", self.cid));
        }
        self.owes_reset = owes_reset;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
