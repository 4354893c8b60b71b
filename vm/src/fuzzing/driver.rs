//! A hostile driver of one device: it goes by a script, and may write anything anywhere in guest memory and in the
//! device's registers. Whatever it does, the device comes back, can be saved and loaded, and works again for a
//! driver that resets it.

use vm_memory::{Bytes, GuestAddress};

use super::script::Script;
use super::stand::{MEMORY, Stand};
use crate::virtio::tried::{Hurry, Tried};

/// Where buffers lie. Rings are below, [`APART`] bytes for each queue.
const BUFFERS: u64 = 0x4000;
const APART: u64 = 0x400;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
/// Entries of each queue.
const ENTRIES: u16 = 16;
/// No device has more queues.
const QUEUES: usize = 8;
/// The most steps of one script.
const MOST_STEPS: usize = 256;

/// Registers (Virtual I/O Device 1.2, section 4.2.2).
const OFFERED: u64 = 0x10;
const OFFERED_HALF: u64 = 0x14;
const TAKEN: u64 = 0x20;
const TAKEN_HALF: u64 = 0x24;
const QUEUE: u64 = 0x30;
const MOST_ENTRIES: u64 = 0x34;
const SIZE: u64 = 0x38;
const READY: u64 = 0x44;
const KICK: u64 = 0x50;
const STATUS: u64 = 0x70;
const PARTS: [(u64, u64); 3] = [(0x80, 0), (0x90, AVAILABLE), (0xa0, USED)];
/// Steps to a device that works, and what it says when it does not.
const SEEN: u32 = 3;
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const NEEDS_RESET: u32 = 64;
const VERSION_1: u64 = 1 << 32;

/// Flags of descriptors.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Kinds of step, as a script names them.
pub(super) mod step {
    pub(crate) const OFFER: u8 = 0;
    pub(crate) const POKE: u8 = 1;
    pub(crate) const KICK: u8 = 2;
    pub(crate) const WRITE: u8 = 3;
    pub(crate) const READ: u8 = 4;
    pub(crate) const ACT: u8 = 5;
    pub(crate) const MOVE: u8 = 6;
    pub(crate) const SET_UP: u8 = 7;
    pub(crate) const KINDS: u8 = 8;
}

/// What a script says of a descriptor.
pub(super) mod piece {
    /// The device may write there.
    pub(crate) const WRITABLE: u8 = 1;
    /// Its address and length are whatever follows.
    pub(crate) const WILD: u8 = 2;
    /// What it holds follows.
    pub(crate) const DATA: u8 = 4;
    /// It is a table of descriptors.
    pub(crate) const INDIRECT: u8 = 8;
    /// The next one is not the next.
    pub(crate) const ASTRAY: u8 = 16;
}

/// A device whose driver is hostile: the first byte says which device, the next eight which features it takes of
/// those that it may; the rest are steps.
pub fn device(bytes: &[u8]) {
    // Nothing is to be said of a host that has no device to give.
    let _ = run(Script::new(bytes));
}

fn run(mut script: Script<'_>) -> Option<()> {
    let stand = Stand::new(script.byte().into())?;
    let tried = stand.tried()?;
    let mut driver = Driver { stand, tried, next: [0; QUEUES], offered: [0; QUEUES] };
    driver.set_up(script.long());
    for _ in 0..MOST_STEPS {
        if script.is_over() {
            break;
        }
        let what = script.byte();
        driver = match what % step::KINDS {
            step::MOVE => driver.moved()?,
            kind => {
                driver.step(kind, &mut script);
                driver
            }
        };
        driver.tried.turn(match what / step::KINDS % 4 {
            2 => Hurry::Wanted,
            3 => Hurry::Pausing,
            _ => Hurry::None,
        });
    }
    driver = driver.moved()?;
    driver.tried.turn(Hurry::None);
    driver.set_up(u64::MAX);
    driver.tried.turn(Hurry::None);
    assert_eq!(driver.tried.read_word(STATUS) & NEEDS_RESET, 0, "a reset does not help");
    Some(())
}

struct Driver {
    stand: Stand,
    tried: Tried,
    /// The next descriptor of each queue.
    next: [u16; QUEUES],
    /// How many chains each has.
    offered: [u16; QUEUES],
}

impl Driver {
    /// Resets the device and sets it up as a driver does that takes what it may of `features`.
    fn set_up(&mut self, features: u64) {
        let tried = &self.tried;
        tried.write_word(STATUS, 0);
        tried.write_word(STATUS, SEEN);
        let mut offered = 0;
        for half in [0, 1] {
            tried.write_word(OFFERED_HALF, half);
            offered |= u64::from(tried.read_word(OFFERED)) << (half * 32);
        }
        let taken = features & offered | VERSION_1;
        for half in [0, 1] {
            tried.write_word(TAKEN_HALF, half);
            tried.write_word(TAKEN, (taken >> (half * 32)) as u32);
        }
        tried.write_word(STATUS, SEEN | FEATURES_OK);
        let map = self.stand.memory.map();
        map.write_slice(&[0; BUFFERS as usize], GuestAddress(0)).expect("rings are in memory");
        for queue in 0..QUEUES as u32 {
            tried.write_word(QUEUE, queue);
            let most = tried.read_word(MOST_ENTRIES);
            tried.write_word(SIZE, most.min(ENTRIES.into()));
            for (register, part) in PARTS {
                tried.write_word(register, (u64::from(queue) * APART + part) as u32);
                tried.write_word(register + 4, 0);
            }
            tried.write_word(READY, 1);
        }
        tried.write_word(STATUS, SEEN | FEATURES_OK | DRIVER_OK);
        (self.next, self.offered) = ([0; QUEUES], [0; QUEUES]);
    }

    fn step(&mut self, kind: u8, script: &mut Script<'_>) {
        match kind {
            step::OFFER => self.offer(script),
            step::POKE => {
                let at = script.short();
                let count = script.byte();
                self.poke(at.into(), script.bytes(count.into()));
            }
            step::KICK => self.tried.write_word(KICK, script.byte().into()),
            step::WRITE => {
                let at = script.short() & 0x1ff;
                let length = 1 << (script.byte() % 4);
                self.tried.write(at.into(), &script.long().to_le_bytes()[..length]);
            }
            step::READ => {
                let at = script.short() & 0x1ff;
                let length = 1 << (script.byte() % 4);
                self.tried.read(at.into(), &mut [0; 8][..length]);
            }
            step::ACT => self.stand.act(script),
            _ => self.set_up(script.long()),
        }
    }

    /// Offers a chain of up to eight descriptors, and kicks.
    fn offer(&mut self, script: &mut Script<'_>) {
        let queue = usize::from(script.byte()) % QUEUES;
        let count = script.byte() % 8 + 1;
        let head = self.next[queue];
        for number in 0..count {
            let here = self.next[queue];
            self.next[queue] = (here + 1) % ENTRIES;
            let kind = script.byte();
            let (at, length) = if kind & piece::WILD != 0 {
                (script.long(), script.word())
            } else {
                (BUFFERS + u64::from(script.short()) * 16, script.short().into())
            };
            if kind & piece::DATA != 0 {
                let count = script.byte();
                self.poke(at, script.bytes(count.into()));
            }
            let mut flags = if number + 1 < count { NEXT } else { 0 };
            flags |= if kind & piece::WRITABLE != 0 { WRITE } else { 0 };
            flags |= if kind & piece::INDIRECT != 0 { INDIRECT } else { 0 };
            let astray = kind & piece::ASTRAY != 0;
            let next = if astray { script.short() } else { self.next[queue] };
            let mut row = at.to_le_bytes().to_vec();
            row.extend(length.to_le_bytes());
            row.extend(flags.to_le_bytes());
            row.extend(next.to_le_bytes());
            self.poke(queue as u64 * APART + u64::from(here) * 16, &row);
        }
        let ring = queue as u64 * APART + AVAILABLE;
        let place = u64::from(self.offered[queue] % ENTRIES);
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        self.poke(ring + 4 + place * 2, &head.to_le_bytes());
        self.poke(ring + 2, &self.offered[queue].to_le_bytes());
        self.tried.write_word(KICK, queue as u32);
    }

    /// Writes into guest memory, where there is any.
    fn poke(&self, at: u64, bytes: &[u8]) {
        if at < MEMORY {
            let _ = self.stand.memory.map().write(bytes, GuestAddress(at));
        }
    }

    /// Stops the device, whatever is under way, and has another go on from its state.
    fn moved(self) -> Option<Self> {
        let section = self.tried.save();
        // There is one at a time.
        drop(self.tried);
        let tried = self.stand.tried()?;
        tried.load(&section).expect("what a device saved");
        assert_eq!(tried.save(), section, "it is not what it was");
        tried.resume();
        Some(Self { tried, ..self })
    }
}
