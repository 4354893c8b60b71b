//! The first instructions: two 32-bit doors (PVH and multiboot), the static page tables, long mode,
//! ring 3, and the call into Rust. Some KVMs (PVM, which needs no hardware virtualisation) run only
//! ring 3 natively and emulate every instruction before that, slowly and without SSE. So everything
//! that can wait is done there, with the ports opened by a task segment's bitmap: the I/O privilege
//! level gets lost under PVM.

use core::arch::global_asm;

/// What `%eax` holds when a multiboot loader enters.
pub(crate) const MULTIBOOT_MAGIC: u32 = 0x2BAD_B002;
/// The first word of `hvm_start_info`; the PVH door passes it on, so that one number tells both.
pub(crate) const PVH_MAGIC: u32 = 0x336E_C578;

// The multiboot header carries load addresses (flag bit 16): QEMU takes a 64-bit ELF only so.
// The tables map 4 GiB one to one in 2 MiB pages, for ring 3 too, accessed and dirty already set, so that the CPU
// (or a KVM that shadows them) never writes to them.
global_asm!(
    r#"
    .section .boot, "awx", @progbits
    .code32
    .balign 4
multiboot_header:
    .long 0x1BADB002
    .long 0x00010002
    .long -(0x1BADB002 + 0x00010002)
    .long multiboot_header
    .long image_start
    .long image_end
    .long memory_end
    .long multiboot_entry

    .globl pvh_entry
pvh_entry:
    movl $0x336EC578, %eax
multiboot_entry:
    cli
    cld
    movl %eax, %edi
    movl %ebx, %esi
    movl $stack_top, %esp
    movl $task, %eax            # the task segment's base, in the pieces that a descriptor wants
    movw %ax, gdt_task + 2
    shrl $16, %eax
    movb %al, gdt_task + 4
    movb %ah, gdt_task + 7
    lgdt gdt_pointer
    movl %cr4, %eax
    orl $0x620, %eax            # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $level4, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx      # EFER
    rdmsr
    orl $0x100, %eax            # LME
    wrmsr
    movl %cr0, %eax
    andl $0x9FFFFFF3, %eax      # not CD, NW, EM, TS
    orl $0x80010022, %eax       # PG, WP, NE, MP
    movl %eax, %cr0
    ljmp $0x08, $start64

    .code64
start64:
    movl $gdt_task - gdt, %eax
    ltr %ax
    pushq $0x1B                 # user data
    pushq $stack_top
    pushq $0x02                 # no interrupts
    pushq $0x23                 # user code
    pushq $ring3
    iretq

ring3:
    movl $0x1B, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %fs
    movl %eax, %gs
    fninit
    movl %edi, %r8d
    movl $bss_start, %edi
    movl $bss_end, %ecx
    subl %edi, %ecx
    shrl $3, %ecx
    xorl %eax, %eax
    rep stosq
    movl %r8d, %edi
    xorl %ebp, %ebp
    call guest_main
    ud2

    .balign 8
gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF    # 64-bit code
    .quad 0x00CF93000000FFFF    # data
    .quad 0x00CFF3000000FFFF    # user data
    .quad 0x00AFFB000000FFFF    # user 64-bit code
gdt_task:
    .word task_end - task - 1, 0
    .byte 0, 0x89, 0, 0
    .quad 0
gdt_pointer:
    .word . - gdt - 1
    .long gdt

    # Only there for its port bitmap: ports up to 0x7FF are open.
    .balign 8
task:
    .fill 102, 1, 0
    .word 104
    .fill 256, 1, 0
    .byte 0xFF
task_end:

    .section .note.pvh, "a", @note
    .long 4, 4, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

    .section .tables, "aw", @progbits
    .balign 4096
level4:
    .quad level3 + 0x67
    .fill 511, 8, 0
    .globl level3
level3:
    .quad level2 + 0x67, level2 + 0x1067, level2 + 0x2067, level2 + 0x3067
    .fill 508, 8, 0
level2:
    .set frame, 0
    .rept 2048
    .quad frame + 0xE7
    .set frame, frame + 0x200000
    .endr

    .section .stack, "aw", @nobits
    .balign 4096
    .skip 65536
stack_top:
    .text
    "#,
    options(att_syntax)
);

#[unsafe(no_mangle)]
extern "sysv64" fn guest_main(magic: u32, info: u32) -> ! {
    crate::start(magic, info)
}
