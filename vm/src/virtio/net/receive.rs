//! The way of a frame into the guest.
//!
//! The device holds chains of the driver's that no frame is in yet, so that a large one finds enough of them and none
//! has to be looked up twice. Before a pause they are put back.

use std::collections::VecDeque;
use std::io;

use decamp_shared::network::Mac;
use nix::sys::epoll::EpollFlags;
use vm_memory::GuestAddress;

use super::backend::{LARGEST, Piece};
use super::transmit::{head, is_end};
use super::{AT_ONCE, HEADER, Net, RX, pieces};
use crate::memory::Map;
use crate::sys::frames::MOST_PIECES;
use crate::virtio::device::{Broken, Io};

/// Where in the header the number of chains stands that a frame is in.
const COUNT_AT: usize = 10;
/// A frame and its header are not shorter.
const SHORTEST: usize = HEADER + 14;
/// So many frames that cannot be read, with nothing between them, are no frames: a tap device's queue is far shorter.
const MOST_FAILURES: u32 = 1 << 16;

/// A chain of the driver's that no frame is in yet.
#[derive(Clone, Debug)]
struct Held {
    head: u16,
    /// Address and length of its pieces.
    pieces: Vec<(GuestAddress, usize)>,
    room: usize,
}

/// What a device needs to receive.
#[derive(Debug)]
pub(super) struct Receiver {
    held: VecDeque<Held>,
    /// What of a frame the held chains had no room for.
    rest: Vec<u8>,
    /// How often the host failed to give a frame since it last did, or had none.
    failures: u32,
}

impl Default for Receiver {
    fn default() -> Self {
        Self { held: VecDeque::new(), rest: vec![0; LARGEST], failures: 0 }
    }
}

/// What a look for a frame came to.
#[derive(Debug)]
enum Came {
    /// None was there.
    Nothing,
    /// One that is not for the guest, or that it has no room for.
    Lost,
    /// One is in these many chains.
    Frame(usize),
    /// None ever comes again.
    End(io::Error),
}

impl Receiver {
    /// Forgets the chains that it holds; gives their number.
    pub(super) fn forget(&mut self) -> usize {
        let count = self.held.len();
        self.held.clear();
        count
    }

    /// What it means that the host gave no frame. A tap device drops one that it cannot say to the guest, such as a
    /// segment of a kind that the driver did not take, and has the next.
    fn failed(&mut self, error: io::Error) -> Came {
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                self.failures = 0;
                Came::Nothing
            }
            io::ErrorKind::Interrupted => Came::Lost,
            _ if is_end(&error) || self.failures >= MOST_FAILURES => Came::End(error),
            _ => {
                self.failures += 1;
                tracing::debug!("A frame for the guest was not given: {error}");
                Came::Lost
            }
        }
    }

    fn room(&self) -> usize {
        self.held.iter().map(|held| held.room).sum()
    }

    /// Holds one chain more, if there is one.
    fn hold(&mut self, io: &mut Io<'_>) -> Result<bool, Broken> {
        let Some(chain) = io.take(RX)? else { return Ok(false) };
        let head = chain.head_index();
        let mut found = Vec::new();
        let descriptors: Vec<_> = chain.writable().take(MOST_PIECES + 1).collect();
        let room = pieces(io.memory, descriptors.iter().copied(), RX, &mut found)?;
        if room < HEADER {
            return Err(Broken::request(RX, format!("{room} bytes have no room for a header")));
        }
        let pieces = descriptors
            .iter()
            .filter(|descriptor| descriptor.len() > 0)
            .map(|descriptor| (descriptor.addr(), descriptor.len() as usize))
            .collect();
        self.held.push_back(Held { head, pieces, room });
        Ok(true)
    }
}

impl Net {
    /// Receives until there is no frame, no chain to put one into, or it is enough at once.
    pub(super) fn receive(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        let (mut came, mut together) = (false, false);
        let mut wanted = self.link;
        for _ in 0..AT_ONCE {
            self.fill(io)?;
            if self.receiver.held.is_empty() {
                // The tap device is left alone until the driver adds a chain.
                if io.listen(RX)? {
                    continue;
                }
                wanted = false;
                break;
            }
            match self.look(io)? {
                Came::Nothing => break,
                Came::Lost => {}
                Came::Frame(chains) => {
                    came = true;
                    together |= chains > 1;
                }
                Came::End(why) => {
                    self.lose_link(io, &why);
                    break;
                }
            }
        }
        self.watch_also(EpollFlags::EPOLLIN, wanted && self.link)?;
        match (came, together) {
            (false, _) => Ok(()),
            (true, false) => io.tell(RX),
            (true, true) => io.tell_in_any_case(RX),
        }
    }

    /// Holds as many chains as the largest frame needs that comes to this driver, or as there are.
    fn fill(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        let enough = if self.mergeable { self.largest } else { 1 };
        while self.receiver.room() < enough && self.receiver.hold(io)? {}
        Ok(())
    }

    /// Takes one frame from the host.
    fn look(&mut self, io: &mut Io<'_>) -> Result<Came, Broken> {
        let memory = io.memory;
        let mut into = Vec::new();
        let mut room = 0;
        for held in &self.receiver.held {
            if into.len() + held.pieces.len() > MOST_PIECES {
                break;
            }
            room += held.room;
            into.extend(slices(memory, &held.pieces)?);
        }
        let length = match self.frames.read(&into, &mut self.receiver.rest) {
            Ok(0) => return Ok(Came::End(io::ErrorKind::UnexpectedEof.into())),
            Ok(length) => length,
            Err(error) => {
                drop(into);
                return Ok(self.receiver.failed(error));
            }
        };
        self.receiver.failures = 0;
        let head = head(&into);
        let to = head.first_chunk().map(|to| Mac(*to));
        if length < SHORTEST || !to.is_some_and(|to| self.filter.wants(to)) {
            return Ok(Came::Lost);
        }
        self.knowledge.lock().received(&head);
        if length > room && !self.put_rest(io, room, length)? {
            return Ok(Came::Lost);
        }
        self.hand_over(io, length).map(Came::Frame)
    }

    /// Finds room for what of a frame of `length` bytes is beyond `room`; false when there is none.
    fn put_rest(&mut self, io: &mut Io<'_>, room: usize, length: usize) -> Result<bool, Broken> {
        if !self.mergeable {
            return Ok(false);
        }
        while self.receiver.room() < length {
            if !self.receiver.hold(io)? {
                return Ok(false);
            }
        }
        let mut rest = self.receiver.rest.get(..length - room).unwrap_or_default();
        let mut before = 0;
        for held in &self.receiver.held {
            let begins = before;
            before += held.room;
            if begins < room {
                continue;
            }
            for piece in slices(io.memory, &held.pieces)? {
                let (now, later) = rest.split_at(piece.len().min(rest.len()));
                piece.copy_from(now);
                rest = later;
            }
        }
        Ok(rest.is_empty())
    }

    /// Gives the driver a frame of `length` bytes, which is in the chains held first; in how many.
    fn hand_over(&mut self, io: &mut Io<'_>, length: usize) -> Result<usize, Broken> {
        let mut chains: Vec<(u16, u32)> = Vec::new();
        let mut left = length;
        let first = self.receiver.held.front().map(|held| held.pieces.clone()).unwrap_or_default();
        while left > 0 {
            let Some(held) = self.receiver.held.pop_front() else { break };
            let count = left.min(held.room);
            chains.push((held.head, count as u32));
            left -= count;
        }
        // Where a driver does not have frames in several chains the number stands there all the same.
        let count = (chains.len() as u16).to_le_bytes();
        write_at(&slices(io.memory, &first)?, COUNT_AT, &count);
        io.give_back_together(RX, &chains)?;
        Ok(chains.len())
    }
}

fn slices<'a>(memory: &'a Map, pieces: &[(GuestAddress, usize)]) -> Result<Vec<Piece<'a>>, Broken> {
    use vm_memory::GuestMemoryBackend;
    let one = |(at, length): &(GuestAddress, usize)| {
        memory.get_slice(*at, *length).map_err(|_| {
            Broken::request(RX, format!("{length} bytes at {:#x} are no memory", at.0))
        })
    };
    pieces.iter().map(one).collect()
}

/// Writes `bytes` at `at` of what `pieces` are together.
fn write_at(pieces: &[Piece<'_>], mut at: usize, mut bytes: &[u8]) {
    for piece in pieces {
        if at < piece.len() {
            let (now, later) = bytes.split_at(bytes.len().min(piece.len() - at));
            if let Ok(place) = piece.subslice(at, now.len()) {
                place.copy_from(now);
            }
            (at, bytes) = (0, later);
        } else {
            at -= piece.len();
        }
        if bytes.is_empty() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_the_host_cannot_give_is_lost_and_the_link_is_not() {
        let mut receiver = Receiver::default();
        let mut met = |number: i32| receiver.failed(io::Error::from_raw_os_error(number));
        for number in [libc::EINVAL, libc::ENOMEM, libc::EFAULT, libc::EIO, libc::EINTR] {
            assert!(matches!(met(number), Came::Lost), "{number}");
        }
        for number in [libc::EBADFD, libc::EBADF] {
            assert!(matches!(met(number), Came::End(_)), "{number}");
        }
        assert!(matches!(met(libc::EAGAIN), Came::Nothing));
        assert!((0..MOST_FAILURES).all(|_| matches!(met(libc::EINVAL), Came::Lost)));
        assert!(matches!(met(libc::EINVAL), Came::End(_)), "it would never end");
        assert!(matches!(met(libc::EAGAIN), Came::Nothing));
        assert!(matches!(met(libc::EINVAL), Came::Lost));
    }
}
