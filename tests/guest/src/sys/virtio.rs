//! Registers of virtio devices over MMIO, where decamp puts them, and the two pages that one device shares with the
//! CPU. What is said through them is not known here.

use core::arch::asm;

use super::{PAGE, Page};

/// Where the registers of the first device are, how far apart they are, and how many devices there may be.
const START: u64 = 0xD000_0000;
const STRIDE: u64 = 0x1000;
const PLACES: u64 = 14;
/// `virt`, and the version of the interface.
const MAGIC: u32 = 0x7472_6976;
const MODERN: u32 = 2;

#[repr(C, align(4096))]
struct Shared([Page; 2]);

static mut SHARED: Shared = Shared([[0; 512]; 2]);

/// A device, and the right to the pages that are shared with one. There is one.
pub(crate) struct Device {
    registers: u64,
}

impl Device {
    /// The first device with that identifier. Called once.
    pub(crate) fn find(id: u32) -> Option<Device> {
        let at = |place| Device { registers: START + place * STRIDE };
        let is_it = |one: &Device| {
            one.read(0x00) == MAGIC && one.read(0x04) == MODERN && one.read(0x08) == id
        };
        (0..PLACES).map(at).find(is_it)
    }

    /// Reads a register.
    pub(crate) fn read(&self, at: u64) -> u32 {
        let value: u32;
        // SAFETY: mapped one to one, and no memory is there: a read of a register has no effect on any. By an
        // instruction that every KVM emulates.
        unsafe {
            asm!("mov {:e}, [{}]", out(reg) value, in(reg) self.registers + at, options(nostack, preserves_flags));
        }
        value
    }

    /// Writes a register.
    pub(crate) fn write(&self, at: u64, value: u32) {
        // SAFETY: as for `read`; what the device does to memory then, it does to the shared pages.
        unsafe {
            asm!("mov [{}], {:e}", in(reg) self.registers + at, in(reg) value, options(nostack, preserves_flags));
        }
    }

    /// Where a byte of the shared pages is in physical memory.
    pub(crate) fn address(&self, at: u64) -> u64 {
        &raw const SHARED as u64 + at
    }

    /// Writes a word of the first shared page, after all that was written before.
    pub(crate) fn put<T: Copy>(&mut self, at: u64, value: T) {
        assert!(at + size_of::<T>() as u64 <= PAGE && at.is_multiple_of(align_of::<T>() as u64));
        // SAFETY: within the page and aligned; other than through `self` only the device looks at it. x86 keeps the
        // order of writes, and the empty statement that of the compiler.
        unsafe {
            asm!("", options(nostack, preserves_flags));
            (self.address(at) as *mut T).write_volatile(value);
        }
    }

    /// Reads a word of the first shared page, before all that is read after.
    pub(crate) fn get(&self, at: u64) -> u16 {
        assert!(at < PAGE && at.is_multiple_of(2));
        // SAFETY: as for `put`; any bits are a word.
        unsafe {
            let value = (self.address(at) as *const u16).read_volatile();
            asm!("", options(nostack, preserves_flags));
            value
        }
    }

    /// The second shared page. The device must be done with it.
    pub(crate) fn page(&mut self) -> &mut Page {
        // SAFETY: a page of the image, aligned; any bits are words. The borrow of the only `Device` keeps a second
        // reference away, and the device is done. The empty statement tells the compiler that it has changed.
        unsafe {
            asm!("", options(nostack, preserves_flags));
            &mut *(self.address(PAGE) as *mut Page)
        }
    }
}
