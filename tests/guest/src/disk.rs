//! A disk (virtio-blk) that is kept busy: its blocks are rewritten in a cycle, each read and checked before, and all
//! is flushed now and then. One request at a time, and nobody waits for it: a disk that does not answer is a line in
//! the report that does not go on. When told to, its ring is spoiled, in one way after the other, as a guest's driver
//! with a bug would; and it is reset and goes on.

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

/// The status register, and what it says of a device that stands until it is reset.
const DEVICE_STATUS: u64 = 0x70;
const NEEDS_RESET: u32 = 64;
/// Where no memory is.
const NOWHERE: u64 = 1 << 46;

/// Ways to spoil a ring.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Spoiled {
    /// A chain that leads back into itself.
    Loop,
    /// A chain with a buffer that lies outside of memory.
    Outside,
    /// More chains than the ring has.
    Index,
    /// A chain that begins beyond the table.
    Head,
}

impl Spoiled {
    /// Its name.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Spoiled::Loop => "loop",
            Spoiled::Outside => "outside",
            Spoiled::Index => "index",
            Spoiled::Head => "head",
        }
    }

    fn next(self) -> Spoiled {
        match self {
            Spoiled::Loop => Spoiled::Outside,
            Spoiled::Outside => Spoiled::Index,
            Spoiled::Index => Spoiled::Head,
            Spoiled::Head => Spoiled::Loop,
        }
    }
}

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
    /// How its ring is spoiled next, whether that is due, and whether it is.
    way: Spoiled,
    due: bool,
    spoiled: Option<Spoiled>,
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
        let mut disk = Disk {
            device,
            blocks,
            asked: Asked::Flush,
            offered: 0,
            next: 0,
            passes: 0,
            way: Spoiled::Loop,
            due: false,
            spoiled: None,
        };
        disk.set_up()?;
        Ok(disk)
    }

    /// Resets the device, and has it do what it did last.
    pub(crate) fn set_up(&mut self) -> Result<(), &'static str> {
        let device = &mut self.device;
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
        // It never interrupts, and begins anew: before the device looks at it.
        for (at, value) in [(OFFERED, 1_u16), (OFFERED + 2, 0), (BACK, 0), (BACK + 2, 0)] {
            device.put(at, value);
        }
        device.write(0x44, 1);
        device.write(0x70, 15);
        let sectors = u64::from(device.read(0x100)) | u64::from(device.read(0x104)) << 32;
        if self.blocks > sectors / SECTORS {
            return Err("it is smaller");
        }
        (self.offered, self.spoiled, self.due) = (0, None, false);
        self.ask(self.asked);
        Ok(())
    }

    /// Spoils its ring, as soon as the device is done with what it does.
    pub(crate) fn spoil(&mut self) {
        self.due = self.spoiled.is_none();
    }

    /// How its ring is spoiled, and whether the device says that it has to be reset.
    pub(crate) fn spoiled(&self) -> Option<(Spoiled, bool)> {
        let needs_reset = self.device.read(DEVICE_STATUS) & NEEDS_RESET != 0;
        self.spoiled.map(|way| (way, needs_reset))
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
        if self.due {
            self.offer_nonsense();
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
                found =
                    fault.map_or(Ok(()), |fault| Err(BadBlock { block, want, fault: Some(fault) }));
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
        self.asked = asked;
        // Always the same chain, at whichever place it is offered.
        self.offer(0, 1);
    }

    /// Offers the chain that begins at `head`, and says that there are so many.
    fn offer(&mut self, head: u16, count: u16) {
        self.device.put(OFFERED + 4 + u64::from(self.offered % SIZE) * 2, head);
        self.offered = self.offered.wrapping_add(count);
        self.device.put(OFFERED + 2, self.offered);
        self.device.write(0x50, 0);
    }

    /// What was asked last is asked once more after this, when the device was reset.
    fn offer_nonsense(&mut self) {
        match self.way {
            Spoiled::Loop => {
                self.describe(1, PAGE, PAGE as u32, NEXT, 0);
                self.offer(0, 1);
            }
            Spoiled::Outside => {
                self.device.put(DESCRIPTORS + 2 * 16, NOWHERE);
                self.offer(0, 1);
            }
            Spoiled::Index => self.offer(0, 0x7000),
            Spoiled::Head => self.offer(u16::MAX, 1),
        }
        (self.spoiled, self.due) = (Some(self.way), false);
        self.way = self.way.next();
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
