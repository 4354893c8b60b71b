//! The block device (Virtual I/O Device 1.2, section 5.2): one queue of requests to a [`Disk`], done in their order
//! by the device's own thread.
//!
//! A request is read whole before it is done, and given back with its status alone when it is wrong or the host
//! fails: that is the driver's to deal with. Only a chain that has no room for a status breaks the device.

mod request;

use std::io;
use std::sync::Arc;

use libc::{
    SYS_fallocate, SYS_fcntl, SYS_fdatasync, SYS_fstat, SYS_preadv, SYS_pwrite64, SYS_pwritev,
    SYS_statx,
};
use virtio_bindings::virtio_blk as virtio;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Bytes, GuestMemory, Permissions, VolatileSlice};

use super::device::{Broken, Device, Io, Served};
use crate::disk::{Disk, MOST, SECTOR};
use crate::memory::Map;
use crate::sandbox::Allowed;
use request::{Asked, MAX_RANGES, Piece, Range, Request};

/// One queue. A chain of as many descriptors has two that are no data.
const QUEUES: [u16; 1] = [256];
/// The most sectors of one range to discard or to fill with zeros: 256 MiB.
const MAX_RANGE_SECTORS: u32 = 1 << 19;
/// A block of the host is so many sectors, as a power of two: 4096 bytes.
const PHYSICAL: u8 = 3;
/// Where the driver says whether there is a cache that it flushes.
const WRITEBACK: u64 = 32;
/// Bytes of the device's own state: capacity in sectors (`u64`), writeback, read-only (`u8` each).
const STATE: usize = 10;

/// A block device on a disk.
#[derive(Debug)]
pub(crate) struct Block {
    disk: Arc<Disk>,
    /// The driver flushes; otherwise each write is stored before it is through.
    writeback: bool,
    /// What comes first in the queue was put off already, for who only wanted to look at the device.
    put_off: bool,
}

impl Block {
    /// A device on `disk`.
    pub(crate) fn new(disk: Arc<Disk>) -> Self {
        Self { disk, writeback: true, put_off: false }
    }

    /// Whether each write has to be stored before it is through: the driver cannot, or does not want to, flush.
    fn stores_at_once(&self, features: u64) -> bool {
        let has = |bit: u32| features & (1 << bit) != 0;
        !has(virtio::VIRTIO_BLK_F_FLUSH)
            || (has(virtio::VIRTIO_BLK_F_CONFIG_WCE) && !self.writeback)
    }

    /// Does what is asked, and gives the status and how many bytes were surely written before it; nothing when
    /// `stop` ended it, and it is to be asked once more.
    fn answer(
        &self,
        memory: &Map,
        features: u64,
        request: &Request,
        stop: &dyn Fn() -> bool,
    ) -> Option<(u32, u64)> {
        let done = match &request.asked {
            Asked::Unknown => return Some((virtio::VIRTIO_BLK_S_UNSUPP, 0)),
            Asked::Wrong(reason) => Err(io::Error::other(*reason)),
            asked => self.carry_out(memory, features, asked, stop),
        };
        Some(match done {
            Ok(false) => return None,
            Ok(true) => {
                let written = match &request.asked {
                    Asked::Read { .. } => request.writable,
                    Asked::Name { .. } => request.writable.min(virtio::VIRTIO_BLK_ID_BYTES.into()),
                    _ => 0,
                };
                (virtio::VIRTIO_BLK_S_OK, written)
            }
            Err(error) => {
                // A guest may ask for nonsense as often as it likes.
                tracing::debug!("{} does not do {:?}: {error}", self.disk.label(), request.asked);
                (virtio::VIRTIO_BLK_S_IOERR, 0)
            }
        })
    }

    /// Does what is asked and gives it back. One by one: whoever waits for the first does not wait for the last.
    /// False when it was put off for somebody who waits, which happens once unless that is to pause the device.
    fn finish(&mut self, queue: usize, request: &Request, io: &mut Io<'_>) -> Result<bool, Broken> {
        let (waiting, put_off) = (io.waiting, self.put_off);
        let stop = || waiting.is_pausing() || (waiting.is_wanted() && !put_off);
        let answer = self.answer(io.memory, io.features, request, &stop);
        self.put_off = answer.is_none();
        let Some((status, written)) = answer else { return Ok(false) };
        let told = io.memory.write_obj(status as u8, request.status);
        told.map_err(|_| Broken::request(queue, "its status is not in memory"))?;
        // From the first byte on, so only what is followed by the status reaches it.
        let length = written + u64::from(written == request.writable);
        // Parsed so that it fits.
        io.give_back(queue, request.head, length as u32)?;
        io.tell(queue)?;
        Ok(true)
    }

    fn carry_out(
        &self,
        memory: &Map,
        features: u64,
        asked: &Asked,
        stop: &dyn Fn() -> bool,
    ) -> io::Result<bool> {
        match asked {
            Asked::Read { at, into } => {
                let into = slices(memory, into, Permissions::Write)?;
                return self.disk.read(*at, &into).map(|()| true);
            }
            Asked::Write { at, from } => {
                let from = slices(memory, from, Permissions::Read)?;
                self.disk.write(*at, &from)?;
            }
            Asked::Flush => return self.disk.flush().map(|()| true),
            Asked::Name { into } => return name(memory, &self.disk.label(), into).map(|()| true),
            Asked::Discard(ranges) => {
                self.check(ranges)?;
                for (number, range) in ranges.iter().enumerate() {
                    if number > 0 && stop() {
                        return Ok(false);
                    }
                    self.disk.discard(range.at, range.length)?;
                }
            }
            Asked::Zero(ranges) => {
                self.check(ranges)?;
                for (number, range) in ranges.iter().enumerate() {
                    let stopped = number > 0 && stop();
                    let Range { at, length, unmap } = *range;
                    if stopped || !self.disk.write_zeros(at, length, unmap, stop)? {
                        return Ok(false);
                    }
                }
            }
            Asked::Wrong(_) | Asked::Unknown => return Err(io::ErrorKind::InvalidInput.into()),
        }
        if self.stores_at_once(features) {
            self.disk.flush()?;
        }
        Ok(true)
    }

    /// That all of `ranges` are on the disk, before any of them is touched.
    fn check(&self, ranges: &[Range]) -> io::Result<()> {
        let inside = |range: &Range| range.at + range.length <= self.disk.bytes();
        if ranges.iter().all(inside) { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn version(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            virtio::VIRTIO_BLK_F_SEG_MAX,
            virtio::VIRTIO_BLK_F_BLK_SIZE,
            virtio::VIRTIO_BLK_F_FLUSH,
            virtio::VIRTIO_BLK_F_TOPOLOGY,
            virtio::VIRTIO_BLK_F_CONFIG_WCE,
        ];
        if self.disk.is_readonly() {
            bits.push(virtio::VIRTIO_BLK_F_RO);
        } else {
            bits.extend([virtio::VIRTIO_BLK_F_DISCARD, virtio::VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    /// `struct virtio_blk_config`, to the end of what its features speak of.
    fn config(&self) -> Vec<u8> {
        let mut config = (self.disk.bytes() / SECTOR).to_le_bytes().to_vec();
        let segments = u32::from(QUEUES[0]) - 2;
        config.extend([0, segments].map(u32::to_le_bytes).concat());
        // No geometry.
        config.extend([0; 4]);
        config.extend((SECTOR as u32).to_le_bytes());
        // Topology: the host's block, where the first one begins, what is written at best.
        config.extend([PHYSICAL, 0]);
        config.extend((1u16 << PHYSICAL).to_le_bytes());
        config.extend(0u32.to_le_bytes());
        config.extend([u8::from(self.writeback), 0, 1, 0]);
        let ranges = [MAX_RANGE_SECTORS, MAX_RANGES as u32, 1 << PHYSICAL];
        config.extend(ranges.map(u32::to_le_bytes).concat());
        config.extend([MAX_RANGE_SECTORS, MAX_RANGES as u32].map(u32::to_le_bytes).concat());
        // Room for what is filled with zeros need not be kept.
        config.extend([1, 0, 0, 0]);
        config
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        match data {
            [writeback] if offset == WRITEBACK => self.writeback = *writeback != 0,
            _ => tracing::debug!("Nothing can be written at {offset} ({} bytes)", data.len()),
        }
    }

    fn allowed(&self) -> Allowed {
        let calls = vec![
            SYS_fallocate,
            SYS_fcntl,
            SYS_fdatasync,
            SYS_fstat,
            SYS_preadv,
            SYS_pwrite64,
            SYS_pwritev,
            SYS_statx,
        ];
        Allowed { calls, requests: Vec::new() }
    }

    /// What is in the queue is done, as long as nobody waits for the device: what is left then is put back and comes
    /// next. One request is done in any case, so that no vCPU that reads registers all the time holds up a disk.
    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        loop {
            let (mut requests, mut more) = (Vec::new(), false);
            io.serve(queue, |memory, chain| {
                // As many as a driver can have there. One that goes on giving what it has not got back is no
                // reason to remember ever more.
                if requests.len() == usize::from(QUEUES[0]) {
                    more = true;
                    return Ok(Served::Later);
                }
                let request = Request::read(memory, chain);
                requests.push(request.map_err(|reason| Broken::request(queue, reason))?);
                Ok(Served::Kept)
            })?;
            for (number, request) in requests.iter().enumerate() {
                if (number > 0 && io.is_wanted()) || !self.finish(queue, request, io)? {
                    io.put_back(queue, requests.len() - number);
                    io.again(queue);
                    return Ok(());
                }
            }
            if !more {
                return Ok(());
            }
            if io.is_wanted() {
                io.again(queue);
                return Ok(());
            }
        }
    }

    fn reset(&mut self) {
        self.writeback = true;
        self.put_off = false;
    }

    fn save(&self) -> Vec<u8> {
        let mut bytes = (self.disk.bytes() / SECTOR).to_le_bytes().to_vec();
        bytes.extend([self.writeback, self.disk.is_readonly()].map(u8::from));
        bytes
    }

    fn load(&mut self, bytes: &[u8], _features: u64) -> Result<(), String> {
        let state: [u8; STATE] = bytes
            .try_into()
            .map_err(|_| format!("{} bytes that should be {STATE}", bytes.len()))?;
        let [capacity @ .., writeback, readonly] = state;
        let capacity = u64::from_le_bytes(capacity);
        let bytes = capacity.checked_mul(SECTOR).filter(|bytes| (SECTOR..=MOST).contains(bytes));
        let bytes = bytes.ok_or_else(|| format!("a disk of {capacity} sectors"))?;
        if writeback > 1 || readonly != u8::from(self.disk.is_readonly()) {
            let ours = self.disk.is_readonly();
            return Err(format!("writeback {writeback}, read-only {readonly} where it is {ours}"));
        }
        if self.disk.is_open() && self.disk.bytes() != 0 && self.disk.bytes() != bytes {
            let ours = self.disk.bytes();
            return Err(format!("a disk of {bytes} bytes, here is one of {ours} bytes"));
        }
        self.disk.set_bytes(bytes);
        self.writeback = writeback == 1;
        Ok(())
    }
}

/// The guest memory that `pieces` name.
fn slices<'m>(
    memory: &'m Map,
    pieces: &[Piece],
    access: Permissions,
) -> io::Result<Vec<VolatileSlice<'m, Slice<'m>>>> {
    let mut all = Vec::new();
    for (at, length) in pieces {
        let length = usize::try_from(*length).map_err(io::Error::other)?;
        let found = memory.get_slices(*at, length, access).map_err(io::Error::other)?;
        for slice in found {
            all.push(slice.map_err(io::Error::other)?);
        }
    }
    Ok(all)
}

/// The bitmap behind a slice of guest memory.
type Slice<'m> = vm_memory::bitmap::BS<'m, vm_memory::bitmap::AtomicBitmap>;

/// Writes `label` into `pieces`, with zeros behind it, no more than a name has.
fn name(memory: &Map, label: &str, pieces: &[Piece]) -> io::Result<()> {
    let mut name = [0; virtio::VIRTIO_BLK_ID_BYTES as usize];
    let length = label.len().min(name.len());
    name[..length].copy_from_slice(&label.as_bytes()[..length]);
    let mut left = &name[..];
    for (at, length) in pieces {
        let (part, rest) = left.split_at(left.len().min(*length as usize));
        memory.write_slice(part, *at).map_err(io::Error::other)?;
        left = rest;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
