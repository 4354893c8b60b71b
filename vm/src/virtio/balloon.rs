//! The balloon device (Virtual I/O Device 1.2, section 5.5): the guest gives memory back that it does not use, by
//! itself as pages become free (free page reporting), and in a balloon, of which nobody asks for any yet.
//!
//! A page that was given back is a hole of guest memory. It is not sent when the guest moves, unless the
//! destination has its former contents already: then it is sent as zeros, which are a mark of a few bytes. A driver
//! lets nobody read what such a page holds; yet the two hosts never differ, so that nothing has to be believed of
//! drivers, and memory that a guest gave back is given back on both.

use std::io::{ErrorKind, Read};

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::device::{Broken, Chain, Device, Io, Served};
use crate::memory::{self, Map};
use crate::sandbox::Allowed;

/// Pages that go into the balloon.
const INFLATE: usize = 0;
/// Pages that come out of it.
const DEFLATE: usize = 1;
/// Where the reports of free pages come is 4 by the specification. Drivers of Linux leave no gap for the two queues
/// of features that are not offered here, so that it is 2 for them. Nothing else can come in any of the three.
const QUEUES: [u16; 5] = [128; 5];

/// The guest takes pages out of the balloon rather than run out of memory.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// The driver says what free pages hold.
const PAGE_POISON: u64 = 1 << 4;
/// The driver reports free pages.
const REPORTING: u64 = 1 << 5;

/// The configuration: pages that the balloon should have, pages that it has, the number of a request for free
/// pages (not offered), what free pages hold; a `u32` each.
const CONFIG: usize = 16;
/// What the driver writes of it.
const ACTUAL: std::ops::Range<usize> = 4..8;
const POISON: std::ops::Range<usize> = 12..16;

/// Bytes of a page frame number. Frames are of 4096 bytes, whatever pages the guest has.
const FRAME_NUMBER: usize = 4;
const FRAME_SHIFT: u32 = 12;
/// The most bytes of frame numbers that one request has. Linux sends 1 KiB.
const MOST_NUMBERS: usize = 64 * 1024;

/// The balloon.
#[derive(Debug, Default)]
pub(crate) struct Balloon {
    /// What the driver wrote, at its place; the rest stays zero.
    config: [u8; CONFIG],
    /// The host would not take a page, and that was said.
    complained: bool,
}

impl Balloon {
    /// Whether free pages hold anything but zeros, so that none may become zeros.
    fn is_poisoned(&self, features: u64) -> bool {
        features & PAGE_POISON != 0 && self.config[POISON] != [0; 4]
    }

    fn give_back(&mut self, queue: usize, map: &Map, start: u64, bytes: u64) -> Result<(), Broken> {
        match memory::discard(map, start, bytes) {
            Err(error) if error.kind() == ErrorKind::InvalidInput => Err(Broken::request(
                queue,
                format!("{bytes} bytes at {start:#x} are not all memory"),
            )),
            // It costs memory of the host, and the guest nothing.
            Err(error) if !std::mem::replace(&mut self.complained, true) => {
                tracing::warn!("The host does not take memory back from the guest: {error}");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn inflate(&mut self, map: &Map, chain: Chain<'_>) -> Result<(), Broken> {
        let wrong = |reason: String| Broken::request(INFLATE, reason);
        let mut reader = chain.reader(map).map_err(|error| wrong(error.to_string()))?;
        let bytes = reader.available_bytes();
        if bytes > MOST_NUMBERS || !bytes.is_multiple_of(FRAME_NUMBER) {
            return Err(wrong(format!("{bytes} bytes of frame numbers")));
        }
        let mut numbers = vec![0; bytes];
        reader.read_exact(&mut numbers).map_err(|error| wrong(error.to_string()))?;
        let (numbers, _) = numbers.as_chunks::<FRAME_NUMBER>();
        let mut frames: Vec<u32> =
            numbers.iter().map(|number| u32::from_le_bytes(*number)).collect();
        frames.sort_unstable();
        frames.dedup();
        for run in frames.chunk_by(|one, next| one.checked_add(1) == Some(*next)) {
            let start = u64::from(run[0]) << FRAME_SHIFT;
            self.give_back(INFLATE, map, start, (run.len() as u64) << FRAME_SHIFT)?;
        }
        Ok(())
    }

    /// Every buffer is free memory: what a device writes into it is nothing. A chain has no more of them than its queue
    /// has places, also where they stand in a table of their own (virtio 1.2, 2.7.5.3.1).
    fn report(&mut self, queue: usize, map: &Map, chain: Chain<'_>) -> Result<(), Broken> {
        for (number, buffer) in chain.enumerate() {
            if number == usize::from(QUEUES[queue]) {
                return Err(Broken::request(queue, "a chain that is longer than its queue"));
            }
            if !buffer.is_write_only() {
                return Err(Broken::request(queue, "free pages that cannot be written"));
            }
            self.give_back(queue, map, buffer.addr().0, buffer.len().into())?;
        }
        Ok(())
    }
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn version(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | PAGE_POISON | REPORTING
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            let at = usize::try_from(at).unwrap_or(CONFIG);
            if ACTUAL.contains(&at) || POISON.contains(&at) {
                self.config[at] = *byte;
            }
        }
    }

    fn allowed(&self) -> Allowed {
        Allowed { calls: vec![libc::SYS_fallocate], ..Allowed::default() }
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        let (features, poisoned) = (io.features, self.is_poisoned(io.features));
        io.serve(queue, |memory, chain| {
            match queue {
                INFLATE => self.inflate(memory, chain)?,
                // A page that is touched is there again.
                DEFLATE => {}
                _ if features & REPORTING == 0 => {
                    return Err(Broken::request(queue, "no queue for what the driver took"));
                }
                _ if poisoned => {}
                _ => self.report(queue, memory, chain)?,
            }
            Ok(Served::Done(0))
        })
    }

    fn reset(&mut self) {
        self.config = [0; CONFIG];
    }

    fn save(&self) -> Vec<u8> {
        [&self.config[ACTUAL], &self.config[POISON]].concat()
    }

    fn load(&mut self, bytes: &[u8], _features: u64) -> Result<(), String> {
        let (actual, poison) = bytes
            .split_at_checked(ACTUAL.len())
            .filter(|(_, rest)| rest.len() == POISON.len())
            .ok_or_else(|| format!("{} bytes of a balloon", bytes.len()))?;
        self.config[ACTUAL].copy_from_slice(actual);
        self.config[POISON].copy_from_slice(poison);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
