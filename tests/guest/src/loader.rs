//! What the loader left: command line and memory map, from PVH's `hvm_start_info` (version 1) or
//! from multiboot's information. Nothing beyond this file knows which of the two it was.

use crate::options::LENGTH;
use crate::sys::{FLOOR, MULTIBOOT_MAGIC, PAGE, PVH_MAGIC, copy_from_loader};

/// More ranges than any loader reports above 16 MiB.
const RANGES: usize = 16;
/// A cap on entries looked at, should the map be broken.
const ENTRIES: u32 = 256;
const USABLE: u32 = 1;
/// What firmware that ran before a multiboot loader may have scribbled on, below the end of a
/// range: SeaBIOS works there, and gives it back unclean. Pages never written must be zero.
const SCRIBBLED: u64 = 32 << 20;

/// A range of whole usable pages, from [`FLOOR`] upward.
#[derive(Clone, Copy, Default)]
pub(crate) struct Range {
    /// The first byte.
    pub(crate) start: u64,
    /// The first byte behind it.
    pub(crate) end: u64,
}

/// What the loader said.
pub(crate) struct Loader {
    /// `pvh` or `multiboot`.
    pub(crate) protocol: &'static str,
    ranges: [Range; RANGES],
    count: usize,
    text: [u8; LENGTH],
}

impl Loader {
    /// Reads it; `None` when the loader spoke neither protocol.
    pub(crate) fn read(magic: u32, info: u32) -> Option<Loader> {
        let mut loader = Loader {
            protocol: "",
            ranges: [Range::default(); RANGES],
            count: 0,
            text: [0; LENGTH],
        };
        let info = u64::from(info);
        match magic {
            PVH_MAGIC if word(info) == PVH_MAGIC => loader.read_pvh(info),
            MULTIBOOT_MAGIC => loader.read_multiboot(info),
            _ => return None,
        }
        Some(loader)
    }

    /// Usable memory, as reported.
    pub(crate) fn ranges(&self) -> &[Range] {
        &self.ranges[..self.count]
    }

    /// The command line; `None` when it is too long or no text.
    pub(crate) fn command_line(&self) -> Option<&str> {
        let end = self.text.iter().position(|&byte| byte == 0)?;
        core::str::from_utf8(&self.text[..end]).ok()
    }

    fn read_pvh(&mut self, info: u64) {
        self.protocol = "pvh";
        copy_from_loader(long(info + 24), &mut self.text);
        if word(info + 4) < 1 {
            return;
        }
        let map = long(info + 40);
        for entry in 0..word(info + 48).min(ENTRIES) {
            let at = map + 24 * u64::from(entry);
            self.add(long(at), long(at + 8), word(at + 16));
        }
    }

    fn read_multiboot(&mut self, info: u64) {
        self.protocol = "multiboot";
        let flags = word(info);
        if flags & 1 << 2 != 0 {
            copy_from_loader(u64::from(word(info + 16)), &mut self.text);
        }
        if flags & 1 << 6 == 0 {
            return;
        }
        let (length, mut at) = (u64::from(word(info + 44)), u64::from(word(info + 48)));
        let end = at + length;
        for _ in 0..ENTRIES {
            if at >= end {
                break;
            }
            self.add(long(at + 4), long(at + 12).saturating_sub(SCRIBBLED), word(at + 20));
            at += u64::from(word(at)) + 4;
        }
    }

    fn add(&mut self, start: u64, size: u64, kind: u32) {
        let end = start.saturating_add(size) / PAGE * PAGE;
        let start = start.max(FLOOR).next_multiple_of(PAGE);
        if kind == USABLE && start < end && self.count < RANGES {
            self.ranges[self.count] = Range { start, end };
            self.count += 1;
        }
    }
}

fn word(address: u64) -> u32 {
    let mut bytes = [0; 4];
    copy_from_loader(address, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn long(address: u64) -> u64 {
    let mut bytes = [0; 8];
    copy_from_loader(address, &mut bytes);
    u64::from_le_bytes(bytes)
}
