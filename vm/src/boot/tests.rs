//! Kernels that boot and files that do not, looked at in guest memory that nobody runs.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes};

use super::*;
use crate::layout::{HOLE_END, HOLE_START};
use crate::testing::{elf, guest_spec};

fn read<T: ByteValued>(memory: &Memory, address: u64) -> T {
    memory.map().read_obj(GuestAddress(address)).expect("guest memory")
}

/// A bzImage of `code` bytes of code that begins with `mark`, with its header changed by `change`.
fn bzimage(code: usize, mark: &[u8], change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        syssize: (code / 16) as u32,
        boot_flag: 0xaa55,
        jump: 0x6aeb,
        header: 0x5372_6448,
        version: 0x020f,
        loadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x20_0000,
        relocatable_kernel: 1,
        xloadflags: 1,
        cmdline_size: 2047,
        pref_address: 0x100_0000,
        init_size: 0x80_0000,
        ..Default::default()
    };
    change(&mut header);
    let mut file = vec![0; 1024 + code];
    file[0x1f1..0x1f1 + 123].copy_from_slice(header.as_slice());
    file[1024..1024 + mark.len()].copy_from_slice(mark);
    file
}

fn spec_in(dir: &Path) -> VmSpec {
    VmSpec { memory_bytes: 64 << 20, cmdline: "console=ttyS0".into(), ..guest_spec(dir) }
}

/// What loading `kernel` is refused with; the memory has nothing then.
fn refusal(spec: &VmSpec, kernel: &[u8]) -> String {
    std::fs::write(&spec.kernel, kernel).expect("write");
    let memory = Memory::create(spec.memory_bytes).expect("memory");
    let error = load(spec, &Files::Own, &memory, &[]).expect_err("no kernel").to_string();
    let mut populated = decamp_shared::pages::PageSet::new();
    memory.populated(&mut populated).expect("populated");
    assert!(populated.is_empty(), "{error}: memory was touched");
    error
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
    let entry = load(&spec, &Files::Own, &memory, &[]).expect("load");
    assert_eq!(entry, Entry::Pvh(0x10_0000));

    let start: hvm_start_info = read(&memory, pvh::START_INFO);
    assert_eq!((start.magic, start.version, start.nr_modules), (pvh::START_MAGIC, 1, 1));
    assert_eq!(&read::<u64>(&memory, start.rsdp_paddr).to_le_bytes(), b"RSD PTR ");
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
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x400, 2),
            (0xe_0000, 0x2_0000, 3),
            (ONE_MIB, HOLE_START - ONE_MIB, 1),
            (HOLE_END, 512 << 20, 1)
        ]
    );
}

#[test]
fn a_bzimage_is_loaded_with_its_zero_page() {
    let dir = tempfile::tempdir().expect("directory");
    let mut spec = spec_in(dir.path());
    spec.memory_bytes = HOLE_START + (512 << 20);
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, b"ramdisk").expect("write");
    spec.initrd = Some(initrd);
    // Three bytes of signature follow.
    let kernel = [&bzimage(0x4000, b"code", |_| ())[..], b"sig"].concat();
    std::fs::write(&spec.kernel, kernel).expect("write");
    let memory = Memory::create(spec.memory_bytes).expect("memory");
    let entry = load(&spec, &Files::Own, &memory, &[]).expect("load");
    assert_eq!(entry, Entry::Linux(0x100_0200));
    assert_eq!(&read::<u32>(&memory, 0x100_0000).to_le_bytes(), b"code");

    let params: boot_params = read(&memory, linux::ZERO_PAGE);
    let header = params.hdr;
    assert_eq!(({ header.header }, header.type_of_loader), (0x5372_6448, 0xff));
    assert_eq!(({ header.init_size }, { header.cmd_line_ptr }), (0x80_0000, CMDLINE as u32));
    assert_eq!(({ header.ramdisk_image }, { header.ramdisk_size }), (0x7fff_f000, 7));
    assert_eq!(&read::<u64>(&memory, params.acpi_rsdp_addr).to_le_bytes(), b"RSD PTR ");
    assert_eq!(&read::<u64>(&memory, CMDLINE).to_le_bytes(), b"console=");
    let table = params.e820_table;
    let last = table[usize::from(params.e820_entries) - 1];
    assert_eq!(last, boot_e820_entry { addr: HOLE_END, size: 512 << 20, r#type: 1 });
    // The first 4 GiB are mapped to themselves.
    for address in [0u64, 0x100_0200, 0xfec0_0000] {
        let table = |table: u64, shift: u64| {
            read::<u64>(&memory, (table & !0xfff) + (address >> shift & 511) * 8)
        };
        let entry = table(table(table(linux::PAGE_TABLES, 39), 30), 21);
        assert_eq!(entry, address & !0x1f_ffff | 0x83);
    }
}

#[test]
fn an_elf_kernel_of_linux_without_a_note_is_entered_by_its_own_protocol() {
    let dir = tempfile::tempdir().expect("directory");
    let spec = spec_in(dir.path());
    let mut kernel = elf(&[0x90; 4096], None);
    // Virtual address of the first program header.
    kernel[64 + 16..64 + 24].copy_from_slice(&0xffff_ffff_8100_0000u64.to_le_bytes());
    std::fs::write(&spec.kernel, kernel).expect("write");
    let memory = Memory::create(spec.memory_bytes).expect("memory");
    assert_eq!(load(&spec, &Files::Own, &memory, &[]).expect("load"), Entry::Linux(0x10_0000));
    let params: boot_params = read(&memory, linux::ZERO_PAGE);
    assert_eq!(({ params.hdr.header }, { params.hdr.boot_flag }), (0x5372_6448, 0xaa55));
}

#[test]
fn a_bzimage_that_cannot_boot_is_refused_with_its_reason() {
    let dir = tempfile::tempdir().expect("directory");
    let mut spec = spec_in(dir.path());
    let whole = bzimage(0x4000, b"", |_| ());
    assert!(refusal(&spec, &whole[..whole.len() - 1]).contains("cut off"));
    assert!(refusal(&spec, &whole[..0x230]).contains("cut off"));
    let change = |change: &dyn Fn(&mut setup_header)| bzimage(0x4000, b"", change);
    assert!(refusal(&spec, &change(&|header| header.xloadflags = 0)).contains("32-bit"));
    assert!(refusal(&spec, &change(&|header| header.version = 0x0204)).contains("version 2.4"));
    assert!(refusal(&spec, &change(&|header| header.loadflags = 0)).contains("640 KiB"));
    assert!(refusal(&spec, &change(&|header| header.syssize = 0)).contains("cut off"));
    let far = change(&|header| header.pref_address = u64::MAX - 5);
    assert!(refusal(&spec, &far).contains("needs memory"));
    let big = change(&|header| header.init_size = 0x400_0000);
    assert!(refusal(&spec, &big).contains("to 0x5000000, and the guest's ends at 0x4000000"));
    let short = change(&|header| header.cmdline_size = 5);
    assert!(refusal(&spec, &short).contains("at most 5 bytes, not 13"));
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, vec![1; 41 << 20]).expect("write");
    spec.initrd = Some(initrd.clone());
    let error = refusal(&spec, &whole);
    assert!(error.contains("do not fit") && error.contains("initrd"), "{error}");
    std::fs::write(&initrd, b"").expect("write");
    assert!(refusal(&spec, &whole).contains("it is empty"));
    std::fs::remove_file(&initrd).expect("remove");
    assert!(refusal(&spec, &whole).contains("cannot be opened"));
}

#[test]
fn kernel_and_ramdisk_are_both_looked_at_whatever_is_wrong_with_one() {
    let dir = tempfile::tempdir().expect("directory");
    let mut spec = spec_in(dir.path());
    assert!(problems(&spec).is_empty());
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, vec![1; 64 << 20]).expect("write");
    spec.initrd = Some(initrd);
    std::fs::write(&spec.kernel, b"#!/bin/sh\n").expect("write");
    let said: Vec<_> = problems(&spec).iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains("neither an ELF kernel"), "{said:?}");
    assert!(said[1].contains("do not fit"), "{said:?}");
    // It would fit if the kernel did not lie there.
    std::fs::write(&spec.kernel, bzimage(0x4000, b"", |_| ())).expect("write");
    let length = |bytes| std::fs::write(spec.initrd.as_ref().expect("one"), vec![1; bytes]);
    length(48 << 20).expect("write");
    assert!(problems(&spec)[0].to_string().contains("takes memory up to 0x1800000"));
    length(8 << 20).expect("write");
    assert!(problems(&spec).is_empty());
}

#[test]
fn what_is_no_kernel_for_these_machines_says_what_it_is() {
    let dir = tempfile::tempdir().expect("directory");
    let spec = spec_in(dir.path());
    assert!(refusal(&spec, b"").contains("neither an ELF kernel nor a Linux bzImage"));
    assert!(refusal(&spec, b"#!/bin/sh\n").contains("neither"));
    assert!(refusal(&spec, b"\x1f\x8b\x08\0").contains("gzip"));
    let arm = [&[0; 0x38][..], b"ARM\x64", &[0; 64]].concat();
    assert!(refusal(&spec, &arm).contains("ARM"));
    let good = elf(&[0x90; 4096], Some(0x10_0000));
    let change = |at: usize, bytes: &[u8]| {
        let mut kernel = good.clone();
        kernel[at..at + bytes.len()].copy_from_slice(bytes);
        kernel
    };
    assert!(refusal(&spec, &change(4, &[1])).contains("32-bit"));
    assert!(refusal(&spec, &change(18, &[183, 0])).contains("machine 183"));
    assert!(refusal(&spec, &change(16, &[1, 0])).contains("no executable"));
    assert!(refusal(&spec, &change(32, &u64::MAX.to_le_bytes())).contains("cut off"));
    assert!(refusal(&spec, &change(56, &[0xff, 0xff])).contains("program headers"));
    assert!(refusal(&spec, &good[..40]).contains("cut off"));
    assert!(refusal(&spec, &good[..good.len() - 1]).contains("cut off"));
    assert!(refusal(&spec, &good[..2000]).contains("cut off"));
    assert!(refusal(&spec, &elf(&[0xf4], None)).contains("PVH"));
    let outside = elf(&[0x90; 4096], Some(0x50_0000));
    assert!(refusal(&spec, &outside).contains("entry at 0x500000"));
    // Bytes in memory, beyond what the guest has.
    let big = change(64 + 40, &(1u64 << 40).to_le_bytes());
    assert!(refusal(&spec, &big).contains("needs memory"));
    let endless = change(64 + 24, &u64::MAX.to_le_bytes());
    assert!(refusal(&spec, &endless).contains("needs memory"));
    for low in [pvh::START_INFO, 0xe_0000] {
        assert!(refusal(&spec, &change(64 + 24, &low.to_le_bytes())).contains("must lie"));
    }
}

#[test]
fn hostile_headers_never_panic() {
    use proptest::prelude::*;
    let dir = tempfile::tempdir().expect("directory");
    let mut spec = spec_in(dir.path());
    spec.memory_bytes = 32 << 20;
    let seeds = [bzimage(0x800, b"", |_| ()), elf(&[0x90; 512], Some(0x10_0000))];
    let config = ProptestConfig::with_cases(256);
    let bytes = prop::collection::vec((0usize..0x300, any::<u8>()), 1..40);
    proptest!(config, |(which in 0usize..2, changes in bytes, length in 0usize..4000)| {
        let mut kernel = seeds[which].clone();
        for (at, byte) in changes {
            if let Some(place) = kernel.get_mut(at) { *place = byte; }
        }
        kernel.truncate(length.max(512));
        std::fs::write(&spec.kernel, &kernel).expect("write");
        let memory = Memory::create(spec.memory_bytes).expect("memory");
        let _ = load(&spec, &Files::Own, &memory, &[]);
    });
}

/// Whoever opens one waits for a writer, and a machine that is reset would wait with it.
#[test]
fn a_fifo_is_refused_at_once() {
    let dir = tempfile::tempdir().expect("directory");
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().expect("mkfifo");
    assert!(made.success());
    let good = spec_in(dir.path());
    let kernel = VmSpec { kernel: fifo.clone(), ..good.clone() };
    let initrd = VmSpec { initrd: Some(fifo), ..good };
    for spec in [kernel, initrd] {
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let memory = Memory::create(spec.memory_bytes).expect("memory");
            tell.send(load(&spec, &Files::Own, &memory, &[]).expect_err("a FIFO").to_string())
        });
        let error = told.recv_timeout(std::time::Duration::from_secs(10)).expect("an answer");
        assert!(error.contains("no regular file"), "{error}");
    }
}
