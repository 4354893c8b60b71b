//! The PVH protocol (Xen's `docs/misc/pvh.pandoc`): 32-bit protected mode without paging, EBX pointing at the
//! start info.

use kvm_bindings::kvm_segment;
use kvm_ioctls::VcpuFd;
use linux_loader::configurator::{BootConfigurator, BootParams, pvh::PvhBootConfigurator};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress};

use super::{CMDLINE, Ramdisk, map};
use crate::memory::Memory;
use crate::spec::VmSpec;

/// Where the start info lies.
pub(super) const START_INFO: u64 = 0x6000;
/// Where the list of modules lies.
const MODULES: u64 = 0x6800;
/// Where the memory map lies.
const MEMORY_MAP: u64 = 0x7000;

pub(super) const START_MAGIC: u32 = 0x336e_c578;
const START_VERSION: u32 = 1;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const RFLAGS_ALWAYS_ONE: u64 = 2;

/// Sets the registers so that the vCPU begins at `address`.
pub(super) fn enter(vcpu: &VcpuFd, address: u64) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = segment(1, 0xb);
    let data = segment(2, 0x3);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr =
        kvm_segment { limit: 0x67, selector: 3 << 3, type_: 0xb, present: 1, ..Default::default() };
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    sregs.cr4 = 0;
    sregs.efer = 0;
    sregs.idt.limit = 0;
    sregs.gdt.limit = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rflags = RFLAGS_ALWAYS_ONE;
    regs.rip = address;
    regs.rbx = START_INFO;
    vcpu.set_regs(&regs)
}

/// A flat segment of 4 GiB, as PVH wants them.
fn segment(index: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index << 3,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// Writes the start info and what it points at.
pub(super) fn write_start_info(
    spec: &VmSpec,
    memory: &Memory,
    ramdisk: Option<Ramdisk>,
    rsdp: u64,
) -> Result<(), String> {
    let map: Vec<_> = map::of(memory)
        .into_iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.bytes,
            type_: range.used as u32,
            reserved: 0,
        })
        .collect();
    let start = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: u32::from(ramdisk.is_some()),
        modlist_paddr: if ramdisk.is_some() { MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    write_cmdline(spec, memory)?;
    let mut params = BootParams::new(&start, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    if let Some(ramdisk) = ramdisk {
        let entry =
            hvm_modlist_entry { paddr: ramdisk.address, size: ramdisk.bytes, ..Default::default() };
        params.set_modules(&[entry], GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory.map())
        .map_err(|error| format!("the start info does not fit ({error})"))
}

/// Writes the command line with its zero.
pub(super) fn write_cmdline(spec: &VmSpec, memory: &Memory) -> Result<(), String> {
    let mut cmdline = spec.cmdline.clone().into_bytes();
    cmdline.push(0);
    memory
        .map()
        .write_slice(&cmdline, GuestAddress(CMDLINE))
        .map_err(|error| format!("the command line does not fit ({error})"))
}
