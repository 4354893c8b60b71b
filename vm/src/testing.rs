//! What this crate's tests share: a tiny guest in machine code and the ELF around it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::spec::VmSpec;

/// Where the guest counts, 8 bytes.
pub(crate) const COUNTER: u64 = 0x20_0000;
/// First of the pages that the guest writes in turn.
pub(crate) const WRITTEN: u64 = 0x40_0000;
/// How many those are.
pub(crate) const WRITTEN_PAGES: u64 = 64;
/// Where the guest is loaded and entered.
const BASE: u64 = 0x10_0000;

/// A guest that enters 64-bit mode with 1 GiB mapped flat by 2 MiB pages (tables at 0x10000), drops
/// to ring 3 (which a KVM without hardware virtualisation runs natively) with ports below 0x400
/// open (by the task segment, and by the privilege level, which an emulated SVM needs after a
/// restore), and then for ever: adds one to the counter; writes the count into one of the 64 pages in
/// turn; and at every 4096th count echoes a byte from the serial port, if there is one, or resets
/// the machine if that byte is `q`.
///
/// ```text
/// start:  mov $0x8000, %esp
///         movl $0x11007, 0x10000          # PML4 -> page directory pointers
///         movl $0x12007, 0x11000          # -> page directory
///         mov $0x12000, %edi; mov $0x87, %eax; mov $512, %ecx
///      1: mov %eax, (%edi); add $0x200000, %eax; add $8, %edi; dec %ecx; jnz 1b
///         movw $104, 0x13066; movb $0xff, 0x130e8         # task segment with its port bitmap
///         mov $0x10000, %eax; mov %eax, %cr3
///         mov $0x20, %eax; mov %eax, %cr4
///         mov $0xc0000080, %ecx; rdmsr; or $0x100, %eax; wrmsr
///         mov %cr0, %eax; or $0x80000001, %eax; mov %eax, %cr0
///         lgdt gdtr; ljmp $8, $long
/// long:   mov $0x20, %eax; ltr %ax
///         push $0x13; push $0x8000; push $0x3002; push $0x1b; push $user; iretq
/// user:   mov $0x13, %eax; mov %eax, %ds; mov %eax, %es
///         xor %r12d, %r12d
/// next:   inc %r12; mov %r12, 0x200000
///         mov %r12d, %eax; and $63, %eax; shl $12, %eax; mov %r12, 0x400000(%rax)
///         test $0xfff, %r12d; jnz next
///         mov $0x3fd, %edx; inb %dx, %al; test $1, %al; jz next
///         mov $0x3f8, %edx; inb %dx, %al; cmp $'q', %al; je quit; outb %al, %dx; jmp next
/// quit:   mov $0xfe, %al; outb %al, $0x64; jmp next
///         .balign 8
/// gdt:    .quad 0, 0x00af9b000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff
///         .quad 0x00008901300000e8, 0
/// gdtr:   .word 47; .long gdt; .long 0
/// ```
#[rustfmt::skip]
const CODE: [u8; 290] = [
    0xbc, 0x00, 0x80, 0x00, 0x00, 0xc7, 0x05, 0x00, 0x00, 0x01, 0x00, 0x07, 0x10, 0x01, 0x00, 0xc7,
    0x05, 0x00, 0x10, 0x01, 0x00, 0x07, 0x20, 0x01, 0x00, 0xbf, 0x00, 0x20, 0x01, 0x00, 0xb8, 0x87,
    0x00, 0x00, 0x00, 0xb9, 0x00, 0x02, 0x00, 0x00, 0x89, 0x07, 0x05, 0x00, 0x00, 0x20, 0x00, 0x83,
    0xc7, 0x08, 0x49, 0x75, 0xf3, 0x66, 0xc7, 0x05, 0x66, 0x30, 0x01, 0x00, 0x68, 0x00, 0xc6, 0x05,
    0xe8, 0x30, 0x01, 0x00, 0xff, 0xb8, 0x00, 0x00, 0x01, 0x00, 0x0f, 0x22, 0xd8, 0xb8, 0x20, 0x00,
    0x00, 0x00, 0x0f, 0x22, 0xe0, 0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x0d, 0x00, 0x01, 0x00,
    0x00, 0x0f, 0x30, 0x0f, 0x20, 0xc0, 0x0d, 0x01, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, 0x0f, 0x01,
    0x15, 0x18, 0x01, 0x10, 0x00, 0xea, 0x7c, 0x00, 0x10, 0x00, 0x08, 0x00, 0xb8, 0x20, 0x00, 0x00,
    0x00, 0x0f, 0x00, 0xd8, 0x6a, 0x13, 0x68, 0x00, 0x80, 0x00, 0x00, 0x68, 0x02, 0x30, 0x00, 0x00,
    0x6a, 0x1b, 0x68, 0x99, 0x00, 0x10, 0x00, 0x48, 0xcf, 0xb8, 0x13, 0x00, 0x00, 0x00, 0x8e, 0xd8,
    0x8e, 0xc0, 0x45, 0x31, 0xe4, 0x49, 0xff, 0xc4, 0x4c, 0x89, 0x24, 0x25, 0x00, 0x00, 0x20, 0x00,
    0x44, 0x89, 0xe0, 0x83, 0xe0, 0x3f, 0xc1, 0xe0, 0x0c, 0x4c, 0x89, 0xa0, 0x00, 0x00, 0x40, 0x00,
    0x41, 0xf7, 0xc4, 0xff, 0x0f, 0x00, 0x00, 0x75, 0xdc, 0xba, 0xfd, 0x03, 0x00, 0x00, 0xec, 0xa8,
    0x01, 0x74, 0xd2, 0xba, 0xf8, 0x03, 0x00, 0x00, 0xec, 0x3c, 0x71, 0x74, 0x03, 0xee, 0xeb, 0xc5,
    0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xbf, 0x66, 0x90, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0xff, 0xff, 0x00, 0x00, 0x00, 0x9b, 0xaf, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0xf3, 0xcf, 0x00,
    0xff, 0xff, 0x00, 0x00, 0x00, 0xfb, 0xaf, 0x00, 0xe8, 0x00, 0x00, 0x30, 0x01, 0x89, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x2f, 0x00, 0xe8, 0x00, 0x10, 0x00, 0x00, 0x00,
    0x00, 0x00,
];

/// Writes the guest as an ELF kernel with a PVH entry into `dir`.
pub(crate) fn write_guest(dir: &Path) -> PathBuf {
    let path = dir.join("guest.elf");
    fs::write(&path, elf(&CODE, Some(BASE as u32))).expect("write the guest");
    path
}

/// A spec for the guest, with 16 MiB.
pub(crate) fn guest_spec(dir: &Path) -> VmSpec {
    VmSpec {
        kernel: write_guest(dir),
        initrd: None,
        cmdline: "nothing".into(),
        cpus: 1,
        memory_bytes: 16 << 20,
    }
}

/// An ELF with `code` at [`BASE`], and a note with its PVH entry if there is one.
pub(crate) fn elf(code: &[u8], pvh_entry: Option<u32>) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM: u64 = 56;
    // A note of Xen's, type 18 (XEN_ELFNOTE_PHYS32_ENTRY), or one of another type.
    let kind = if pvh_entry.is_some() { 18u32 } else { 19 };
    let entry = pvh_entry.unwrap_or_default();
    let lengths = [4u32, 4, kind].map(u32::to_le_bytes).concat();
    let note = [&lengths[..], b"Xen\0", &entry.to_le_bytes()].concat();
    let code_at = HEADER + 2 * PROGRAM;
    let note_at = code_at + (code.len() as u64).next_multiple_of(4);
    let mut file = Vec::new();
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [BASE, HEADER, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&[0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    for (kind, at, address, length) in
        [(1u32, code_at, BASE, code.len() as u64), (4, note_at, 0, note.len() as u64)]
    {
        file.extend_from_slice(&kind.to_le_bytes());
        file.extend_from_slice(&5u32.to_le_bytes());
        for word in [at, address, address, length, length, 4] {
            file.extend_from_slice(&word.to_le_bytes());
        }
    }
    file.extend_from_slice(code);
    file.resize(note_at as usize, 0);
    file.extend_from_slice(&note);
    file
}

/// Waits until `done` says so; fails the test with `what` after ten seconds.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < limit, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
