//! The extended state of a processor: patterns that stand in its vector registers while time passes, and must still
//! stand there. What moves between two hosts in that time comes with them, or it is seen.
//!
//! What belongs here: the registers. What does not: what else is watched.

use std::arch::asm;
use std::thread;
use std::time::Duration;

use crate::wrong;

/// Between two looks; the pattern stands for a small part of that where processors are emulated.
const PAUSE: Duration = Duration::from_millis(50);
/// Turns of an empty loop in which the pattern stands.
const TURNS: u64 = 1 << 18;

/// What one register holds.
#[repr(C, align(32))]
#[derive(Clone, Copy, PartialEq)]
struct Register([u64; 4]);

/// The names of the registers that are watched.
pub fn watched() -> &'static str {
    if is_x86_feature_detected!("avx") { "ymm" } else { "xmm" }
}

/// Watches them for ever.
pub fn keep() {
    let wide = watched() == "ymm";
    for pass in 0u64.. {
        let put: [Register; 8] = std::array::from_fn(|register| {
            let first = (pass << 8 | register as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            // What is above the first half is not there without AVX.
            let above = |word: u64| if wide { word } else { 0 };
            Register([first, !first, above(first.rotate_left(17)), above(!first.rotate_left(31))])
        });
        let mut found = [Register([0; 4]); 8];
        // SAFETY: reads `put` and writes `found`, each of the eight registers' size, by instructions that this
        // processor has, and says which registers it spoils.
        unsafe { if wide { hold_wide(&put, &mut found) } else { hold(&put, &mut found) } }
        if found != put {
            wrong(format!("the registers {}0 to 7 do not hold what was put there", watched()));
        }
        thread::sleep(PAUSE);
    }
}

/// Puts `put` into the lower halves, waits, and gives what is `found` in them.
unsafe fn hold(put: &[Register; 8], found: &mut [Register; 8]) {
    unsafe {
        asm!(
            "movdqa xmm0, [{put}]", "movdqa xmm1, [{put} + 32]", "movdqa xmm2, [{put} + 64]",
            "movdqa xmm3, [{put} + 96]", "movdqa xmm4, [{put} + 128]", "movdqa xmm5, [{put} + 160]",
            "movdqa xmm6, [{put} + 192]", "movdqa xmm7, [{put} + 224]",
            "2:", "dec {turns}", "jnz 2b",
            "movdqa [{found}], xmm0", "movdqa [{found} + 32], xmm1", "movdqa [{found} + 64], xmm2",
            "movdqa [{found} + 96], xmm3", "movdqa [{found} + 128], xmm4", "movdqa [{found} + 160], xmm5",
            "movdqa [{found} + 192], xmm6", "movdqa [{found} + 224], xmm7",
            put = in(reg) put, found = in(reg) found, turns = inout(reg) TURNS => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            options(nostack),
        );
    }
}

/// The same of whole registers.
#[target_feature(enable = "avx")]
unsafe fn hold_wide(put: &[Register; 8], found: &mut [Register; 8]) {
    unsafe {
        asm!(
            "vmovdqa ymm0, [{put}]", "vmovdqa ymm1, [{put} + 32]", "vmovdqa ymm2, [{put} + 64]",
            "vmovdqa ymm3, [{put} + 96]", "vmovdqa ymm4, [{put} + 128]", "vmovdqa ymm5, [{put} + 160]",
            "vmovdqa ymm6, [{put} + 192]", "vmovdqa ymm7, [{put} + 224]",
            "2:", "dec {turns}", "jnz 2b",
            "vmovdqa [{found}], ymm0", "vmovdqa [{found} + 32], ymm1", "vmovdqa [{found} + 64], ymm2",
            "vmovdqa [{found} + 96], ymm3", "vmovdqa [{found} + 128], ymm4", "vmovdqa [{found} + 160], ymm5",
            "vmovdqa [{found} + 192], ymm6", "vmovdqa [{found} + 224], ymm7",
            put = in(reg) put, found = in(reg) found, turns = inout(reg) TURNS => _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
            out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
            options(nostack),
        );
    }
}
