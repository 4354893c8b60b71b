//! All that is unsafe: ports, CPU instructions, physical memory. Everything outside this module is
//! safe Rust that cannot reach memory except through [`Memory`].

mod entry;
mod intrinsics;
mod virtio;

use core::arch::asm;
use core::arch::x86_64::{__cpuid, _rdtsc, CpuidResult};

pub(crate) use entry::{MULTIBOOT_MAGIC, PVH_MAGIC};
pub(crate) use virtio::Device;

/// Bytes in a page.
pub(crate) const PAGE: u64 = 4096;
/// Everything below this address belongs to the image, its tables and its stack.
pub(crate) const FLOOR: u64 = 16 << 20;
/// What the tables in the image map.
const MAPPED_AT_START: u64 = 4 << 30;
/// Page directories in the image for memory above 4 GiB, each for 1 GiB.
const SPARE_DIRECTORIES: usize = 124;
/// Present, writable, for ring 3, accessed, dirty.
const TABLE_FLAGS: u64 = 0x67;
/// The same, and 2 MiB large.
const LARGE_FLAGS: u64 = 0xE7;

/// One page of guest memory, as words.
pub(crate) type Page = [u64; 512];

#[repr(C, align(4096))]
struct Directory([u64; 512]);

static mut SPARE: [Directory; SPARE_DIRECTORIES] =
    [const { Directory([0; 512]) }; SPARE_DIRECTORIES];

unsafe extern "C" {
    static mut level3: [u64; 512];
}

/// The right to touch physical memory from [`FLOOR`] upward. There is one.
pub(crate) struct Memory {
    mapped: u64,
}

impl Memory {
    /// Takes the memory and maps it up to `top`; less when that is beyond what the tables hold,
    /// see [`Memory::mapped`]. Called once, at the start.
    pub(crate) fn take(top: u64) -> Memory {
        let (mut mapped, mut spare) = (MAPPED_AT_START, 0);
        while mapped < top && spare < SPARE_DIRECTORIES {
            // SAFETY: one CPU, no interrupts, and `take` is called once, so nothing else looks at
            // the tables but the page walker, which meets an entry only when its table is full.
            unsafe {
                let directory = &raw mut SPARE[spare];
                for (at, entry) in (*directory).0.iter_mut().enumerate() {
                    *entry = (mapped + ((at as u64) << 21)) | LARGE_FLAGS;
                }
                let slot = (&raw mut level3).cast::<u64>().add((mapped >> 30) as usize);
                slot.write_volatile(directory as u64 | TABLE_FLAGS);
            }
            mapped += 1 << 30;
            spare += 1;
        }
        Memory { mapped }
    }

    /// The end of what is mapped.
    pub(crate) fn mapped(&self) -> u64 {
        self.mapped
    }

    /// The page at a physical address. Always read anew: a move may have changed what is there.
    pub(crate) fn page(&mut self, address: u64) -> &mut Page {
        assert!(address >= FLOOR && address < self.mapped && address.is_multiple_of(PAGE));
        // SAFETY: mapped one to one, outside of the image, aligned; any bits are valid words. The
        // borrow of the only `Memory` keeps a second reference away. The empty statement tells the
        // compiler that memory may have changed, so nothing read earlier is taken for granted.
        unsafe {
            asm!("", options(nostack, preserves_flags));
            &mut *(address as *mut Page)
        }
    }
}

/// Copies bytes that the loader left somewhere below 4 GiB; what lies beyond reads as zero.
pub(crate) fn copy_from_loader(address: u64, into: &mut [u8]) {
    for (at, byte) in into.iter_mut().enumerate() {
        let from = address.wrapping_add(at as u64);
        *byte = if from != 0 && from < MAPPED_AT_START {
            // SAFETY: mapped one to one since the entry; a volatile read of a byte has no effect on
            // memory, and nothing in Rust's hands is written meanwhile.
            unsafe { (from as *const u8).read_volatile() }
        } else {
            0
        };
    }
}

/// Writes a byte to a port.
pub(crate) fn port_out(port: u16, value: u8) {
    // SAFETY: no device here reaches into memory.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    }
}

/// Writes two bytes to a port.
pub(crate) fn port_out_word(port: u16, value: u16) {
    // SAFETY: as for `port_out`.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags))
    }
}

/// Reads a byte from a port.
pub(crate) fn port_in(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as for `port_out`.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    }
    value
}

/// The time stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: every 64-bit CPU has it, and nothing here forbids it.
    unsafe { _rdtsc() }
}

/// A CPUID leaf, subleaf 0.
pub(crate) fn cpuid(leaf: u32) -> CpuidResult {
    __cpuid(leaf)
}

/// Puts two words into the MMX registers 0 and 1, which no compiled code touches. So they move with
/// the CPU's state and not with memory.
pub(crate) fn keep_in_registers(words: [u64; 2]) {
    // SAFETY: no floating point of the x87 kind is used anywhere, so its state is ours.
    unsafe {
        asm!("movq mm0, {}", "movq mm1, {}", in(reg) words[0], in(reg) words[1],
             options(nomem, nostack, preserves_flags));
    }
}

/// What [`keep_in_registers`] put there.
pub(crate) fn kept_in_registers() -> [u64; 2] {
    let (first, second): (u64, u64);
    // SAFETY: reads two registers.
    unsafe {
        asm!("movq {}, mm0", "movq {}, mm1", out(reg) first, out(reg) second,
             options(nomem, nostack, preserves_flags));
    }
    [first, second]
}
