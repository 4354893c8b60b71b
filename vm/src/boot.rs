//! Booting: an ELF kernel, its command line and its initial ramdisk put into guest memory, and the
//! registers that a vCPU begins with. Only the PVH protocol (Xen's `docs/misc/pvh.pandoc`) is
//! spoken: 32-bit protected mode without paging, EBX pointing at the start info.

use std::fs::File;
use std::path::Path;

use decamp_shared::pages::PageSet;
use kvm_bindings::kvm_segment;
use kvm_ioctls::VcpuFd;
use linux_loader::configurator::{BootConfigurator, BootParams, pvh::PvhBootConfigurator};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress};

use crate::error::{Result, VmError};
use crate::memory::{GUEST_MEMORY, HOLE_START, Memory};
use crate::spec::VmSpec;

/// Where the start info lies.
const START_INFO: u64 = 0x6000;
/// Where the list of modules lies.
const MODULES: u64 = 0x6800;
/// Where the memory map lies.
const MEMORY_MAP: u64 = 0x7000;
/// Where the command line lies.
const CMDLINE: u64 = 0x2_0000;
/// Pages that the four of them take, as (first, one past the last).
const BOOT_PAGES: [(u64, u64); 2] = [(0x6, 0x8), (0x20, 0x22)];

/// End of conventional memory: what follows up to 1 MiB is not reported as RAM.
const CONVENTIONAL_END: u64 = 0x9_fc00;
const ONE_MIB: u64 = 0x10_0000;

const START_MAGIC: u32 = 0x336e_c578;
const START_VERSION: u32 = 1;
const RAM: u32 = 1;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const RFLAGS_ALWAYS_ONE: u64 = 2;

/// Where the first instruction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    address: u64,
}

/// Puts everything that `spec` boots from into `memory`, which must be fresh.
///
/// # Errors
/// [`VmError::Image`] when a file cannot be read, is not an ELF with a PVH entry, or does not fit.
pub(crate) fn load(spec: &VmSpec, memory: &Memory) -> Result<Entry> {
    let (address, kernel_end) = load_kernel(&spec.kernel, memory)?;
    let module = match &spec.initrd {
        Some(path) => Some(load_initrd(path, memory, kernel_end)?),
        None => None,
    };
    write_start_info(spec, memory, module)
        .map_err(|reason| VmError::Image { path: spec.kernel.clone(), reason })?;
    Ok(Entry { address })
}

/// Sets the registers of a fresh vCPU so that it begins at `entry`.
pub(crate) fn enter(vcpu: &VcpuFd, entry: Entry) -> Result<()> {
    let failed = |error| VmError::refused("set the registers of the boot vCPU", error);
    let mut sregs = vcpu.get_sregs().map_err(failed)?;
    sregs.cs = segment(1, 0xb, true);
    let data = segment(2, 0x3, false);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr =
        kvm_segment { limit: 0x67, selector: 3 << 3, type_: 0xb, present: 1, ..Default::default() };
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    sregs.cr4 = 0;
    sregs.efer = 0;
    sregs.idt.limit = 0;
    sregs.gdt.limit = 0;
    vcpu.set_sregs(&sregs).map_err(failed)?;
    let mut regs = vcpu.get_regs().map_err(failed)?;
    regs.rflags = RFLAGS_ALWAYS_ONE;
    regs.rip = entry.address;
    regs.rbx = START_INFO;
    vcpu.set_regs(&regs).map_err(failed)
}

/// A flat segment of 4 GiB, as PVH wants them.
fn segment(index: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index << 3,
        type_: if code { 0xb } else { type_ },
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Loads the kernel; its entry and one past its last byte.
fn load_kernel(path: &Path, memory: &Memory) -> Result<(u64, u64)> {
    let wrong = |reason: String| VmError::Image { path: path.to_owned(), reason };
    let mut file = open(path)?;
    let loaded = Elf::load(memory.map(), None, &mut file, None).map_err(|error| {
        wrong(format!("it is no 64-bit ELF kernel that fits the guest's memory ({error})"))
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(wrong(
            "it has no PVH entry note; use an uncompressed ELF kernel (vmlinux) built with CONFIG_PVH"
                .into(),
        ));
    };
    let mut taken = PageSet::new();
    memory.populated(&mut taken)?;
    if BOOT_PAGES
        .iter()
        .any(|(from, to)| (*from..*to).any(|page| taken.contains(GUEST_MEMORY, page)))
    {
        return Err(wrong("it wants to be loaded where the start info must lie".into()));
    }
    Ok((entry.0, loaded.kernel_end))
}

/// Loads the initial ramdisk at the top of low memory; its address and length.
fn load_initrd(path: &Path, memory: &Memory, kernel_end: u64) -> Result<(u64, u64)> {
    let wrong = |reason: String| VmError::Image { path: path.to_owned(), reason };
    let mut file = open(path)?;
    let unread = |error: std::io::Error| wrong(format!("it cannot be read ({error})"));
    let length = file.metadata().map_err(unread)?.len();
    let low_end = memory.ranges().first().map_or(0, |(_, len)| *len);
    let start = low_end
        .checked_sub(length)
        .map(|start| start & !0xfff)
        .filter(|start| *start >= kernel_end.max(ONE_MIB))
        .ok_or_else(|| {
            wrong(format!("its {length} bytes do not fit beside the kernel in {low_end} bytes"))
        })?;
    let count = usize::try_from(length).map_err(|_| wrong("it is too long".into()))?;
    memory
        .map()
        .read_exact_volatile_from(GuestAddress(start), &mut file, count)
        .map_err(|error| wrong(format!("it cannot be copied to {start:#x} ({error})")))?;
    Ok((start, length))
}

fn open(path: &Path) -> Result<File> {
    let wrong = |reason: String| VmError::Image { path: path.to_owned(), reason };
    let file = File::open(path).map_err(|error| wrong(format!("it cannot be opened ({error})")))?;
    let meta = file.metadata().map_err(|error| wrong(format!("it cannot be read ({error})")))?;
    if meta.is_file() { Ok(file) } else { Err(wrong("it is no regular file".into())) }
}

fn write_start_info(
    spec: &VmSpec,
    memory: &Memory,
    module: Option<(u64, u64)>,
) -> std::result::Result<(), String> {
    let map = memory_map(memory);
    let start = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: if module.is_some() { MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut cmdline = spec.cmdline.clone().into_bytes();
    cmdline.push(0);
    memory
        .map()
        .write_slice(&cmdline, GuestAddress(CMDLINE))
        .map_err(|error| format!("the command line does not fit ({error})"))?;
    let mut params = BootParams::new(&start, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    if let Some((paddr, size)) = module {
        let entry = hvm_modlist_entry { paddr, size, ..Default::default() };
        params.set_modules(&[entry], GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory.map())
        .map_err(|error| format!("the start info does not fit ({error})"))
}

fn memory_map(memory: &Memory) -> Vec<hvm_memmap_table_entry> {
    let ram = |addr, size| hvm_memmap_table_entry { addr, size, type_: RAM, reserved: 0 };
    let mut map = vec![ram(0, CONVENTIONAL_END)];
    for (start, len) in memory.ranges() {
        if start < HOLE_START {
            map.push(ram(ONE_MIB, len.saturating_sub(ONE_MIB)));
        } else {
            map.push(ram(start, len));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use vm_memory::ByteValued;

    use super::*;
    use crate::memory::HOLE_END;
    use crate::testing::{elf, guest_spec};

    fn read<T: ByteValued>(memory: &Memory, address: u64) -> T {
        memory.map().read_obj(GuestAddress(address)).expect("guest memory")
    }

    #[test]
    fn the_start_info_tells_memory_command_line_and_ramdisk() {
        let dir = tempfile::tempdir().expect("directory");
        let mut spec = guest_spec(dir.path());
        let initrd = dir.path().join("initrd");
        std::fs::write(&initrd, b"ramdisk").expect("write");
        spec.initrd = Some(initrd);
        spec.cmdline = "console=ttyS0".into();
        spec.memory_bytes = HOLE_START + (512 << 20);
        let memory = Memory::create(spec.memory_bytes).expect("memory");
        let entry = load(&spec, &memory).expect("load");
        assert_eq!(entry, Entry { address: 0x10_0000 });

        let start: hvm_start_info = read(&memory, START_INFO);
        assert_eq!((start.magic, start.version, start.nr_modules), (START_MAGIC, 1, 1));
        let mut cmdline = [0; 14];
        memory.map().read_slice(&mut cmdline, GuestAddress(start.cmdline_paddr)).expect("cmdline");
        assert_eq!(&cmdline, b"console=ttyS0\0");
        let module: hvm_modlist_entry = read(&memory, start.modlist_paddr);
        assert_eq!((module.paddr, module.size), (HOLE_START - 4096, 7));
        let mut ramdisk = [0; 7];
        memory.map().read_slice(&mut ramdisk, GuestAddress(module.paddr)).expect("ramdisk");
        assert_eq!(&ramdisk, b"ramdisk");
        let ranges: Vec<_> = (0..u64::from(start.memmap_entries))
            .map(|at| read::<hvm_memmap_table_entry>(&memory, start.memmap_paddr + at * 24))
            .map(|entry| (entry.addr, entry.size, entry.type_))
            .collect();
        assert_eq!(
            ranges,
            [
                (0, CONVENTIONAL_END, RAM),
                (ONE_MIB, HOLE_START - ONE_MIB, RAM),
                (HOLE_END, 512 << 20, RAM)
            ]
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let dir = tempfile::tempdir().expect("directory");
        let mut spec = guest_spec(dir.path());
        let initrd = dir.path().join("initrd");
        std::fs::write(&initrd, vec![1; 15 << 20]).expect("write");
        spec.initrd = Some(initrd);
        let memory = Memory::create(spec.memory_bytes).expect("memory");
        let error = load(&spec, &memory).expect_err("no room for the ramdisk").to_string();
        assert!(error.contains("do not fit"), "{error}");

        spec.initrd = None;
        std::fs::write(&spec.kernel, elf(&vec![0x90; 20 << 20], Some(0x10_0000))).expect("write");
        let memory = Memory::create(spec.memory_bytes).expect("memory");
        assert!(load(&spec, &memory).is_err(), "a kernel bigger than memory");

        // Its load address, in the first program header, moved onto the start info.
        let mut low = elf(&[0x90; 4096], Some(0x10_0000));
        low[64 + 24..64 + 32].copy_from_slice(&START_INFO.to_le_bytes());
        std::fs::write(&spec.kernel, low).expect("write");
        let memory = Memory::create(spec.memory_bytes).expect("memory");
        let error = load(&spec, &memory).expect_err("in the way").to_string();
        assert!(error.contains("start info"), "{error}");
    }
}
