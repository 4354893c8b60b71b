//! COM1, polled: lines out, command bytes in. Each access to a port leaves the guest, so the line
//! status is asked once for each 16 bytes (the depth of the FIFO), and for input only when told to.

use core::fmt::{self, Write};

use crate::clock::Clock;
use crate::sys::{port_in, port_out};

const PORT: u16 = 0x3F8;
const LINE_STATUS: u16 = PORT + 5;
const DATA_READY: u8 = 0x01;
const TRANSMITTER_EMPTY: u8 = 0x20;
const FIFO_DEPTH: u32 = 16;
/// A console that nobody reads must not stop the guest: after so many looks the rest of the line is
/// dropped.
const PATIENCE: u32 = 2_000;

/// Sets up 115200 8n1, FIFO on, interrupts off.
pub(crate) fn open() {
    for (offset, value) in
        [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x03)]
    {
        port_out(PORT + offset, value);
    }
}

/// Writes one line. Ticks the clock at each byte, so that a pause in the middle of a line is seen.
pub(crate) fn line(clock: &mut Clock, text: fmt::Arguments<'_>) {
    let mut writer = Writer { clock, room: 0 };
    // An error means that the line was cut short, which its reader sees.
    let _ = writer.write_fmt(text).and_then(|()| writer.write_str("\n"));
}

/// The next byte received, if there is one.
pub(crate) fn received() -> Option<u8> {
    let status = port_in(LINE_STATUS);
    // All ones: no UART here.
    (status != 0xFF && status & DATA_READY != 0).then(|| port_in(PORT))
}

struct Writer<'a> {
    clock: &'a mut Clock,
    room: u32,
}

impl Write for Writer<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.room == 0 {
                self.wait().ok_or(fmt::Error)?;
                self.room = FIFO_DEPTH;
            }
            self.room -= 1;
            port_out(PORT, byte);
            self.clock.tick();
        }
        Ok(())
    }
}

impl Writer<'_> {
    fn wait(&mut self) -> Option<()> {
        (0..PATIENCE).find(|_| {
            self.clock.tick();
            port_in(LINE_STATUS) & TRANSMITTER_EMPTY != 0
        })?;
        Some(())
    }
}
