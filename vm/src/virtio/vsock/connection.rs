//! One connection between a program in the guest and one on the host: what the guest says of it, what the host's
//! stream does, and what the guest has to be told next. Nothing here waits.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::packet::{ENDED, Header, RECEIVES_NO_MORE, SENDS_NO_MORE, op};

/// Bytes of the guest's that wait at most for a host program to read them. The guest knows, and sends no more.
pub(super) const BUFFER: u32 = 256 * 1024;
/// The most data in one packet, either way.
pub(super) const MOST_DATA: usize = 64 * 1024;
/// The guest hears of room that it does not know of when there is so much.
const WORTH_TELLING: u32 = BUFFER / 4;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// A host program asked for it; whether the guest has been told.
    Asking(bool),
    /// The guest asked for it and has not been told yes.
    Answering,
    /// Both sides know.
    Open,
    /// The guest has left it in good order, before all that it sent was read.
    Draining,
    /// Over, and the guest has to be told.
    Broken,
    /// Over.
    Over,
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Lives,
    /// It is over, which the guest does not know.
    Broken,
    /// It is over.
    Over,
}

/// What the guest is told: operation, flags, bytes of data.
pub(super) type Said = (u16, u32, usize);

/// A connection. What either side `ended` is in flags of a shutdown.
#[derive(Debug)]
pub(super) struct Connection {
    stage: Stage,
    stream: UnixStream,
    /// The stream may have something to read, or have ended.
    readable: bool,
    /// Of the guest, for the host.
    waiting: VecDeque<u8>,
    /// Bytes that left `waiting`, modulo 2^32, and how many of those the guest knows of.
    forwarded: u32,
    told_forwarded: u32,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// What the guest said of its own buffer.
    guest_buffer: u32,
    guest_forwarded: u32,
    asked_for_room: bool,
    owes_credit: bool,
    guest_ended: u32,
    host_ended: u32,
    told_ended: u32,
}

impl Connection {
    fn new(stage: Stage, stream: UnixStream) -> Self {
        Self {
            stage,
            stream,
            readable: true,
            waiting: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            asked_for_room: false,
            owes_credit: false,
            guest_ended: 0,
            host_ended: 0,
            told_ended: 0,
        }
    }

    /// A connection that the host program behind `stream` (non-blocking, as all here) asks for.
    pub(super) fn asked_by_host(stream: UnixStream) -> Self {
        Self::new(Stage::Asking(false), stream)
    }

    /// A connection to `stream` that the guest asked for by `request`.
    pub(super) fn asked_by_guest(stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(Stage::Answering, stream);
        connection.hear_of_room(request);
        connection
    }

    /// What became of it.
    pub(super) fn fate(&self) -> Fate {
        match self.stage {
            Stage::Broken => Fate::Broken,
            Stage::Over => Fate::Over,
            _ => Fate::Lives,
        }
    }

    /// Bytes of the guest's that wait.
    #[cfg(test)]
    pub(super) fn waits(&self) -> usize {
        self.waiting.len()
    }

    /// Whether the guest has left it.
    pub(super) fn is_left(&self) -> bool {
        self.stage == Stage::Draining
    }

    /// Bytes that left the buffer. The guest is told now.
    pub(super) fn tell_forwarded(&mut self) -> u32 {
        self.owes_credit = false;
        self.told_forwarded = self.forwarded;
        self.forwarded
    }

    fn hear_of_room(&mut self, header: &Header) {
        self.guest_buffer = header.buffer;
        self.guest_forwarded = header.forwarded;
        self.asked_for_room = false;
    }

    /// The guest says `header`, with `data`.
    pub(super) fn take(&mut self, header: &Header, data: &[u8]) {
        self.hear_of_room(header);
        match (header.op, self.stage) {
            (op::RST, _) => {
                let in_order = self.guest_ended & SENDS_NO_MORE != 0 && !self.waiting.is_empty();
                self.stage = if in_order { Stage::Draining } else { Stage::Over };
            }
            (op::RESPONSE, Stage::Asking(true)) => self.say_yes(header.to_port),
            (op::RW, Stage::Open) => self.take_data(data),
            (op::SHUTDOWN, Stage::Open) => {
                self.guest_ended |= header.flags & ENDED;
                self.flush();
            }
            (op::CREDIT_UPDATE, Stage::Open) => {}
            (op::CREDIT_REQUEST, Stage::Open) => self.owes_credit = true,
            _ => self.stage = Stage::Broken,
        }
    }

    /// Tells the host program that it is through to the guest, by `port` of the host.
    fn say_yes(&mut self, port: u32) {
        let yes = format!("OK {port}\n");
        // Nothing was ever written to this stream: there is room.
        let written = (&self.stream).write(yes.as_bytes()).is_ok_and(|count| count == yes.len());
        self.stage = if written { Stage::Open } else { Stage::Broken };
    }

    fn take_data(&mut self, data: &[u8]) {
        let room = BUFFER as usize - self.waiting.len();
        if self.guest_ended & SENDS_NO_MORE != 0 || data.len() > room {
            self.stage = Stage::Broken;
            return;
        }
        self.waiting.extend(data);
        self.flush();
    }

    /// Hands on what the guest sent as far as the host takes it, and the end of it when there is one.
    fn flush(&mut self) {
        while !self.waiting.is_empty() && self.host_ended & RECEIVES_NO_MORE == 0 {
            let (front, _) = self.waiting.as_slices();
            match (&self.stream).write(front) {
                Ok(count) => self.forward(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.host_ended |= RECEIVES_NO_MORE,
            }
        }
        if self.host_ended & RECEIVES_NO_MORE != 0 {
            // Nobody will read it.
            self.forward(self.waiting.len());
        }
        if self.waiting.is_empty() {
            if self.stage == Stage::Draining {
                self.stage = Stage::Over;
            } else if self.guest_ended == ENDED {
                // The guest waits for this, so as to know that all was taken.
                self.stage = Stage::Broken;
            } else if self.guest_ended & SENDS_NO_MORE != 0 {
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
        if self.guest_ended & RECEIVES_NO_MORE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }

    fn forward(&mut self, count: usize) {
        self.waiting.drain(..count);
        // At most BUFFER.
        self.forwarded = self.forwarded.wrapping_add(count as u32);
    }

    /// The host's stream may have changed in any way.
    pub(super) fn ready(&mut self) {
        self.readable = true;
        match self.stage {
            Stage::Asking(told) if self.is_hung_up() => {
                self.stage = if told { Stage::Broken } else { Stage::Over };
            }
            Stage::Open if self.host_ended & SENDS_NO_MORE != 0 && self.is_hung_up() => {
                self.host_ended |= RECEIVES_NO_MORE;
            }
            _ => {}
        }
        self.flush();
    }

    /// What the guest is told next, with its data in `into`; nothing when there is nothing now.
    pub(super) fn next(&mut self, into: &mut [u8]) -> Option<Said> {
        match self.stage {
            Stage::Asking(false) => {
                self.stage = Stage::Asking(true);
                return Some((op::REQUEST, 0, 0));
            }
            Stage::Answering => {
                self.stage = Stage::Open;
                return Some((op::RESPONSE, 0, 0));
            }
            Stage::Open => {}
            _ => return None,
        }
        if let Some(count) = self.read(into) {
            return Some((op::RW, 0, count));
        }
        if self.stage != Stage::Open {
            return None;
        }
        if self.host_ended & !self.told_ended != 0 {
            self.told_ended = self.host_ended;
            return Some((op::SHUTDOWN, self.host_ended, 0));
        }
        if self.owes_credit || self.forwarded.wrapping_sub(self.told_forwarded) >= WORTH_TELLING {
            return Some((op::CREDIT_UPDATE, 0, 0));
        }
        if self.wants_to_read() && self.credit() == 0 && !self.asked_for_room {
            self.asked_for_room = true;
            return Some((op::CREDIT_REQUEST, 0, 0));
        }
        None
    }

    fn wants_to_read(&self) -> bool {
        let ended = self.host_ended & SENDS_NO_MORE | self.guest_ended & RECEIVES_NO_MORE;
        self.readable && ended == 0
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(under_way)
    }

    /// Reads what the host sends, as much as the guest has room for.
    fn read(&mut self, into: &mut [u8]) -> Option<usize> {
        let most = into.len().min(self.credit() as usize).min(MOST_DATA);
        if most == 0 || !self.wants_to_read() {
            return None;
        }
        loop {
            match (&self.stream).read(&mut into[..most]) {
                Ok(0) => {
                    self.host_ended |= SENDS_NO_MORE;
                    if self.is_hung_up() {
                        self.host_ended |= RECEIVES_NO_MORE;
                        self.flush();
                    }
                    return None;
                }
                Ok(count) => {
                    self.sent = self.sent.wrapping_add(count as u32);
                    return Some(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.readable = false;
                    if error.kind() != ErrorKind::WouldBlock {
                        self.stage = Stage::Broken;
                    }
                    return None;
                }
            }
        }
    }

    /// Whether the host program has closed its end altogether.
    fn is_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        poll(&mut polled, PollTimeout::ZERO).is_ok()
            && polled[0].revents().is_some_and(|events| events.intersects(gone))
    }
}
