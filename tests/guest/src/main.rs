//! The test guest: a machine of its own in one file, which fills memory with pages that describe
//! themselves, rewrites some of them all the time, and says at once when a page is not what it
//! wrote. It needs a CPU, memory and COM1; no interrupt, no timer, no firmware.
//!
//! Here stands the order of things; what each is, its own file says.

#![no_std]
#![no_main]
#![deny(unsafe_code)]

mod arena;
mod clock;
mod disk;
mod hot;
mod loader;
mod options;
mod pattern;
mod serial;
#[allow(unsafe_code)]
mod sys;
mod watch;
mod witness;

use core::fmt::Arguments;
use core::panic::PanicInfo;

use arena::Arena;
use clock::Clock;
use disk::Disk;
use loader::Loader;
use options::Options;
use watch::Watch;

/// Called by the entry code, once, in 64-bit mode with the first 4 GiB mapped one to one.
fn start(magic: u32, info: u32) -> ! {
    serial::open();
    let Some(loader) = Loader::read(magic, info) else {
        give_up(format_args!("Loader unknown: magic {magic:#x}"));
    };
    let Some(text) = loader.command_line() else {
        give_up(format_args!("Command line longer than {} bytes, or no text", options::LENGTH - 1));
    };
    let options = match Options::parse(text) {
        Ok(options) => options,
        Err(word) => give_up(format_args!("Command line not understood: {}", word.0)),
    };
    let (khz, source) = options.tsc.map_or_else(clock::calibrate, |khz| (khz, "told"));
    let mut clock = Clock::new(khz);
    let mut arena = Arena::new(loader.ranges());
    let (protocol, frames) = (loader.protocol, arena.frames());
    serial::line(
        &mut clock,
        format_args!("guest by={protocol} frames={frames} tsc_khz={khz} tsc_by={source}"),
    );
    if !arena.lay_out(options.fill) {
        give_up(format_args!("Pages do not fit: {} into {frames} frames", options.fill));
    }
    let disk = match options.disk {
        0 => None,
        blocks => match Disk::open(blocks) {
            Ok(disk) => Some(disk),
            Err(why) => give_up(format_args!("No disk of {blocks} blocks: {why}")),
        },
    };
    let clean = Watch::begin(&options, arena, disk, clock).run();
    power_off(clean)
}

/// Says why, and ends.
fn give_up(why: Arguments<'_>) -> ! {
    serial::line(&mut Clock::new(1), format_args!("FAILED {why}"));
    power_off(false)
}

/// Ends by whatever way the machine has: QEMU's debug exit, ACPI as QEMU places it, and at last the
/// keyboard controller's reset line, which every VMM knows.
fn power_off(clean: bool) -> ! {
    sys::port_out(0xF4, if clean { 0x10 } else { 0x11 });
    sys::port_out_word(0x604, 0x2000);
    sys::port_out(0x64, 0xFE);
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    give_up(format_args!("{info}"))
}
