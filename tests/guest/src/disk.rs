//! A disk (virtio-blk) that is kept busy: its blocks are rewritten in a cycle, each read and checked before, and all
//! is flushed now and then. One request at a time, and nobody waits for it: a disk that does not answer is a line in
//! the report that does not go on.

use crate::pattern::{Fault, Pattern};
use crate::sys::{Device, PAGE};

/// Identifier of a block device (Virtual I/O Device 1.2, section 5).
const BLOCK: u32 = 2;
/// VIRTIO_BLK_F_FLUSH, and VIRTIO_F_VERSION_1 in the second half.
const FLUSH: u32 = 1 << 9;
const VERSION_1: u32 = 1;
/// Sectors of a block, which is a page.
const SECTORS: u64 = PAGE / 512;
/// Requests, as the device knows them.
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSHED: u32 = 4;
/// Blocks between two flushes.
const FLUSH_EVERY: u64 = 32;
/// Blocks are numbered apart from the pages of memory.
const APART: u64 = 1 << 40;
/// Descriptors, and where what is shared lies: descriptors, what is offered, what came back, the request's head and
/// status.
const SIZE: u16 = 4;
const DESCRIPTORS: u64 = 0;
const OFFERED: u64 = 0x400;
const BACK: u64 = 0x800;
const HEAD: u64 = 0xC00;
const STATUS: u64 = 0xC20;
/// Flags of a descriptor: another follows; the device writes it.
const NEXT: u16 = 1;
const WRITABLE: u16 = 2;

/// What is under way.
#[derive(Clone, Copy, PartialEq)]
enum Asked {
    Read,
    Write,
    Flush,
}

/// A disk that is kept busy.
pub(crate) struct Disk {
    device: Device,
    blocks: u64,
    asked: Asked,
    /// Requests that were offered.
    offered: u16,
    next: u64,
    passes: u64,
}

/// What is wrong with a block.
pub(crate) struct BadBlock {
    /// Which.
    pub(crate) block: u64,
    /// The version that it should have.
    pub(crate) want: u64,
    /// What it has instead; nothing when the device failed.
    pub(crate) fault: Option<Fault>,
}

impl Disk {
    /// The first disk, of which `blocks` are used; `Err` when there is none, or it is none that this can use.
    pub(crate) fn open(blocks: u64) -> Result<Disk, &'static str> {
        let device = Device::find(BLOCK).ok_or("there is none")?;
        for status in [0, 1, 3] {
            device.write(0x70, status);
        }
        for (half, features) in [(0, FLUSH), (1, VERSION_1)] {
            device.write(0x14, half);
            if device.read(0x10) & features != features {
                return Err("it lacks features");
            }
            device.write(0x24, half);
            device.write(0x20, features);
        }
        device.write(0x70, 11);
        if device.read(0x70) & 8 == 0 {
            return Err("it does not take these features");
        }
        device.write(0x30, 0);
        device.write(0x38, SIZE.into());
        for (at, register) in [(DESCRIPTORS, 0x80), (OFFERED, 0x90), (BACK, 0xA0)] {
            let address = device.address(at);
            device.write(register, address as u32);
            device.write(register + 4, (address >> 32) as u32);
        }
        device.write(0x44, 1);
        device.write(0x70, 15);
        let sectors = u64::from(device.read(0x100)) | u64::from(device.read(0x104)) << 32;
        if blocks > sectors / SECTORS {
            return Err("it is smaller");
        }
        let mut disk =
            Disk { device, blocks, asked: Asked::Flush, offered: 0, next: 0, passes: 0 };
        // It never interrupts.
        disk.device.put(OFFERED, 1_u16);
        disk.ask(Asked::Flush);
        Ok(disk)
    }

    /// Passes over all blocks, and how many of the next are done.
    pub(crate) fn done(&self) -> (u64, u64) {
        (self.passes, self.next)
    }

    /// Goes on if the device is done with what it was asked: that nothing is wrong, or what is.
    pub(crate) fn step(&mut self, pattern: &Pattern) -> Result<(), BadBlock> {
        if self.device.get(BACK + 2) != self.offered {
            return Ok(());
        }
        let (block, want) = (self.next, self.passes);
        let status = self.device.get(STATUS) & 0xFF;
        if status != 0 {
            // Asked again, as a driver does.
            self.ask(self.asked);
            return Err(BadBlock { block, want, fault: None });
        }
        let mut found = Ok(());
        match self.asked {
            Asked::Read => {
                // Nobody knows what it held before it was written first.
                let fault = match want {
                    0 => None,
                    _ => pattern.check(self.device.page(), APART + block, want).err(),
                };
                found = fault.map_or(Ok(()), |fault| Err(BadBlock { block, want, fault: Some(fault) }));
                pattern.write(self.device.page(), APART + block, want + 1);
                self.ask(Asked::Write);
            }
            Asked::Write => {
                self.next = (block + 1) % self.blocks;
                self.passes += u64::from(self.next == 0);
                let due = self.next.is_multiple_of(FLUSH_EVERY);
                self.ask(if due { Asked::Flush } else { Asked::Read });
            }
            Asked::Flush => self.ask(Asked::Read),
        }
        found
    }

    /// Offers a request for the next block.
    fn ask(&mut self, asked: Asked) {
        let kind = match asked {
            Asked::Read => READ,
            Asked::Write => WRITE,
            Asked::Flush => FLUSHED,
        };
        let sector = if asked == Asked::Flush { 0 } else { self.next * SECTORS };
        self.device.put(HEAD, u64::from(kind));
        self.device.put(HEAD + 8, sector);
        self.device.put(STATUS, 0xFF_u16);
        let page = if asked == Asked::Read { WRITABLE } else { 0 };
        match asked {
            Asked::Flush => self.describe(0, HEAD, 16, NEXT, 2),
            _ => self.describe(0, HEAD, 16, NEXT, 1),
        }
        self.describe(1, PAGE, PAGE as u32, NEXT | page, 2);
        self.describe(2, STATUS, 1, WRITABLE, 0);
        // Always the same chain, at whichever place it is offered.
        self.device.put(OFFERED + 4 + u64::from(self.offered % SIZE) * 2, 0_u16);
        self.asked = asked;
        self.offered = self.offered.wrapping_add(1);
        self.device.put(OFFERED + 2, self.offered);
        self.device.write(0x50, 0);
    }

    fn describe(&mut self, number: u64, at: u64, length: u32, flags: u16, next: u16) {
        let row = DESCRIPTORS + number * 16;
        let address = self.device.address(at);
        self.device.put(row, address);
        self.device.put(row + 8, length);
        self.device.put(row + 12, flags);
        self.device.put(row + 14, next);
    }
}
