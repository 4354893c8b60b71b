//! A request to a block device as its driver wrote it (Virtual I/O Device 1.2, section 5.2.6), told apart from
//! guest memory that may say anything. Framing is free: the header, the data and the status byte may be cut into
//! buffers in any way.

use virtio_bindings::virtio_blk as virtio;
use vm_memory::{Address, Bytes, GuestAddress};

use super::super::device::Chain;
use crate::disk::SECTOR;
use crate::memory::Map;

/// Bytes of a request's header: type, reserved, sector.
const HEADER: u64 = 16;
/// Bytes of one range to discard or to fill with zeros: sector, sectors, flags.
const RANGE: u64 = 16;
/// The most bytes of data in one request: what it reads or writes is through before the device can be paused.
/// Drivers stay far below.
const MAX_DATA: u64 = 64 << 20;
/// The most buffers of one request: an indirect table could name more than it is worth to remember.
const MAX_PIECES: usize = 1024;
/// The most ranges of one request.
pub(super) const MAX_RANGES: u64 = 32;

/// A piece of guest memory: where, and how many bytes. Nobody has said yet that there is memory.
pub(super) type Piece = (GuestAddress, u64);

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Fill these from the disk, from byte `at` on.
    Read { at: u64, into: Vec<Piece> },
    /// Write these to the disk, from byte `at` on.
    Write { at: u64, from: Vec<Piece> },
    /// Have everything stored.
    Flush,
    /// Say what the disk is called.
    Name { into: Vec<Piece> },
    /// Forget these.
    Discard(Vec<Range>),
    /// Fill these with zeros.
    Zero(Vec<Range>),
    /// It is a request that makes no sense, or is out of bounds.
    Wrong(&'static str),
    /// It is none that this device knows.
    Unknown,
}

/// Bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// Where it begins.
    pub(super) at: u64,
    /// How long it is.
    pub(super) length: u64,
    /// The host need not keep room for it.
    pub(super) unmap: bool,
}

/// A request, and where its answer goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Its first descriptor.
    pub(super) head: u16,
    /// What is asked.
    pub(super) asked: Asked,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    /// Bytes before the status byte that the device may write.
    pub(super) writable: u64,
}

impl Request {
    /// The request in `chain`.
    ///
    /// # Errors
    /// When it has no room for an answer: then there is nobody to answer to.
    pub(super) fn read(memory: &Map, chain: Chain<'_>) -> Result<Self, &'static str> {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        for descriptor in chain {
            if readable.len() + writable.len() == MAX_PIECES {
                return Err("it is in more pieces than the device said that it takes");
            }
            let piece = (descriptor.addr(), u64::from(descriptor.len()));
            match descriptor.is_write_only() {
                true => writable.push(piece),
                false if writable.is_empty() => readable.push(piece),
                false => return Err("a buffer to read stands after one to write"),
            }
        }
        writable.retain(|(_, length)| *length > 0);
        let (last, length) = writable.pop().ok_or("it has no room for a status")?;
        let status = last.checked_add(length - 1).ok_or("its status lies beyond all memory")?;
        if length > 1 {
            writable.push((last, length - 1));
        }
        let total = |pieces: &[Piece]| pieces.iter().map(|(_, length)| length).sum::<u64>();
        let room = total(&writable);
        let asked = match split(readable, HEADER) {
            Some((_, data)) if room.max(total(&data)) > MAX_DATA => {
                Asked::Wrong("it is longer than the device takes")
            }
            Some((header, data)) => ask(memory, &header, data, writable),
            None => Asked::Wrong("it has no header"),
        };
        Ok(Self { head, asked, status, writable: room })
    }
}

/// What a header asks, with what stands after it.
fn ask(memory: &Map, header: &[Piece], data: Vec<Piece>, writable: Vec<Piece>) -> Asked {
    let Some(header) = bytes_of(memory, header) else {
        return Asked::Wrong("its header is not in memory");
    };
    let word = |at: usize| header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    let kind = word(0).map_or(u32::MAX, u32::from_le_bytes);
    let sector = header.get(8..16).and_then(|bytes| bytes.try_into().ok());
    let sector = sector.map_or(u64::MAX, u64::from_le_bytes);
    let Some(at) = sector.checked_mul(SECTOR) else {
        return Asked::Wrong("its sector is on no disk");
    };
    let whole = |pieces: &[Piece]| {
        pieces.iter().map(|(_, length)| length).sum::<u64>().is_multiple_of(SECTOR)
    };
    match kind {
        virtio::VIRTIO_BLK_T_IN if !data.is_empty() => Asked::Wrong("data to read has contents"),
        virtio::VIRTIO_BLK_T_IN if whole(&writable) => Asked::Read { at, into: writable },
        virtio::VIRTIO_BLK_T_OUT if whole(&data) => Asked::Write { at, from: data },
        virtio::VIRTIO_BLK_T_IN | virtio::VIRTIO_BLK_T_OUT => {
            Asked::Wrong("its data is not whole sectors")
        }
        virtio::VIRTIO_BLK_T_FLUSH => Asked::Flush,
        virtio::VIRTIO_BLK_T_GET_ID => Asked::Name { into: writable },
        virtio::VIRTIO_BLK_T_DISCARD => ranges(memory, &data, 0, Asked::Discard),
        virtio::VIRTIO_BLK_T_WRITE_ZEROES => {
            ranges(memory, &data, virtio::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, Asked::Zero)
        }
        _ => Asked::Unknown,
    }
}

/// The ranges in `data`, which may have the flags `known`.
fn ranges(
    memory: &Map,
    data: &[Piece],
    known: u32,
    asked: impl FnOnce(Vec<Range>) -> Asked,
) -> Asked {
    let length: u64 = data.iter().map(|(_, length)| length).sum();
    if length == 0 || !length.is_multiple_of(RANGE) || length / RANGE > MAX_RANGES {
        return Asked::Wrong("its ranges are not as many as a request has");
    }
    let Some(bytes) = bytes_of(memory, data) else {
        return Asked::Wrong("its ranges are not in memory");
    };
    let mut ranges = Vec::new();
    for row in bytes.chunks_exact(RANGE as usize) {
        let word = |at: usize| u32::from_le_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]]);
        let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
        let (sectors, flags) = (word(8), word(12));
        if flags & !known != 0 {
            return Asked::Unknown;
        }
        let length = u64::from(sectors) * SECTOR;
        let at = sector.checked_mul(SECTOR).filter(|at| at.checked_add(length).is_some());
        let Some(at) = at else { return Asked::Wrong("a range is on no disk") };
        if sectors > super::MAX_RANGE_SECTORS {
            return Asked::Wrong("a range is longer than the device takes");
        }
        ranges.push(Range { at, length, unmap: flags != 0 });
    }
    asked(ranges)
}

/// The first `count` bytes of `pieces`, and the rest; nothing when there are fewer.
fn split(pieces: Vec<Piece>, count: u64) -> Option<(Vec<Piece>, Vec<Piece>)> {
    let (mut first, mut rest, mut left) = (Vec::new(), Vec::new(), count);
    for (at, length) in pieces {
        let part = left.min(length);
        if part > 0 {
            first.push((at, part));
        }
        if part < length {
            // One that leaves all memory is found out by whoever looks there.
            rest.push((GuestAddress(at.raw_value().saturating_add(part)), length - part));
        }
        left -= part;
    }
    (left == 0).then_some((first, rest))
}

/// What is in `pieces`, if there is memory. Only for lengths that were checked.
fn bytes_of(memory: &Map, pieces: &[Piece]) -> Option<Vec<u8>> {
    let mut all = Vec::new();
    for (at, length) in pieces {
        let mut bytes = vec![0; usize::try_from(*length).ok()?];
        memory.read_slice(&mut bytes, *at).ok()?;
        all.extend(bytes);
    }
    Some(all)
}
