//! The 64-bit boot protocol of Linux (the kernel's `Documentation/arch/x86/boot.rst`): long mode, the first
//! 4 GiB mapped to themselves, RSI pointing at the zero page.

use kvm_bindings::kvm_segment;
use kvm_ioctls::VcpuFd;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::{CMDLINE, Ramdisk, map, pvh};
use crate::memory::Memory;
use crate::spec::VmSpec;

/// Where the descriptors of the segments lie.
const DESCRIPTORS: u64 = 0x1000;
/// Where the zero page lies.
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// Where the page tables lie: one of the fourth level, one of the third, four of the second.
pub(super) const PAGE_TABLES: u64 = 0x9000;
const PAGE: u64 = 0x1000;
/// GiB that are mapped.
const MAPPED: u64 = 4;

/// A loader that has no number of its own.
const LOADER_UNKNOWN: u8 = 0xff;

const ENTRY_PRESENT: u64 = 1;
const ENTRY_WRITABLE: u64 = 1 << 1;
const ENTRY_LARGE: u64 = 1 << 7;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
const RFLAGS_ALWAYS_ONE: u64 = 2;

/// Where the protocol wants code and data in the descriptor table.
const CODE: u16 = 2;
const DATA: u16 = 3;
const TASK: u16 = 4;
/// The same as the descriptors that they stand for: flat 64-bit code, flat data.
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

/// Sets the registers so that the vCPU begins at `address`.
pub(super) fn enter(vcpu: &VcpuFd, address: u64) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = kvm_segment { l: 1, ..segment(CODE, 0xb) };
    let data = kvm_segment { db: 1, ..segment(DATA, 0x3) };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    let task = kvm_segment { limit: 0x67, selector: TASK << 3, type_: 0xb, ..Default::default() };
    sregs.tr = kvm_segment { present: 1, ..task };
    sregs.gdt.base = DESCRIPTORS;
    sregs.gdt.limit = TASK * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PHYSICAL_EXTENSION;
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
    sregs.efer = EFER_LONG_MODE | EFER_LONG_MODE_ACTIVE;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rflags = RFLAGS_ALWAYS_ONE;
    regs.rip = address;
    regs.rsi = ZERO_PAGE;
    vcpu.set_regs(&regs)
}

fn segment(index: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector: index << 3,
        type_,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// Writes the zero page, and the tables that the entry needs.
pub(super) fn write_zero_page(
    spec: &VmSpec,
    memory: &Memory,
    ramdisk: Option<Ramdisk>,
    rsdp: u64,
    header: setup_header,
) -> Result<(), String> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNKNOWN;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    if let Some(ramdisk) = ramdisk {
        let low = |value: u64| {
            u32::try_from(value).map_err(|_| "its ramdisk lies above 4 GiB".to_owned())
        };
        params.hdr.ramdisk_image = low(ramdisk.address)?;
        params.hdr.ramdisk_size = low(ramdisk.bytes)?;
    }
    let ranges = map::of(memory);
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(&ranges) {
        *entry =
            boot_e820_entry { addr: range.start, size: range.bytes, r#type: range.used as u32 };
    }
    params.e820_table = table;
    params.e820_entries = ranges.len() as u8;
    pvh::write_cmdline(spec, memory)?;
    write_tables(memory).map_err(|error| format!("the page tables do not fit ({error})"))?;
    let params = BootParams::new(&params, GuestAddress(ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, memory.map())
        .map_err(|error| format!("the zero page does not fit ({error})"))
}

/// Writes the descriptors, and page tables that map the first 4 GiB to themselves by pages of 2 MiB.
fn write_tables(memory: &Memory) -> Result<(), vm_memory::GuestMemoryError> {
    let map = memory.map();
    let write = |value: u64, address: u64| map.write_obj(value.to_le(), GuestAddress(address));
    write(0, DESCRIPTORS)?;
    write(CODE_DESCRIPTOR, DESCRIPTORS + u64::from(CODE) * 8)?;
    write(DATA_DESCRIPTOR, DESCRIPTORS + u64::from(DATA) * 8)?;
    let (third, second) = (PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
    let flags = ENTRY_PRESENT | ENTRY_WRITABLE;
    write(third | flags, PAGE_TABLES)?;
    for table in 0..MAPPED {
        write((second + table * PAGE) | flags, third + table * 8)?;
    }
    for page in 0..MAPPED * 512 {
        write((page << 21) | ENTRY_LARGE | flags, second + page * 8)?;
    }
    Ok(())
}
