//! The serial port at 0x3f8, interrupt 4: `vm-superio`'s 16550 with an input queue before it and a
//! line to KVM's interrupt chip behind it.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};

use crate::console::Output;
use crate::error::{Result, VmError};
use crate::sys::Backed;

/// First of the port's eight addresses.
pub(crate) const PORT: u16 = 0x3f8;
/// The port's interrupt line.
pub(crate) const INTERRUPT: u32 = 4;
/// The most typed bytes that wait for the guest; more are not taken yet.
pub(crate) const MAX_QUEUE: usize = 4096;
/// Bytes that the device's own receive FIFO holds.
pub(crate) const FIFO: usize = 64;

/// The state of the port, as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortState {
    /// The device's registers and receive FIFO.
    pub(crate) device: SerialState,
    /// Typed bytes that wait before it.
    pub(crate) queue: Vec<u8>,
}

/// The serial port of one VM.
pub(crate) struct SerialPort {
    device: Serial<Line, NoEvents, Output>,
    queue: VecDeque<u8>,
}

impl SerialPort {
    /// A port in its reset state whose interrupts go to `guest`.
    pub(crate) fn new(guest: Arc<Backed>, output: Output) -> Self {
        let raise = move || {
            guest.vm().set_irq_line(INTERRUPT, true)?;
            Ok(guest.vm().set_irq_line(INTERRUPT, false)?)
        };
        Self::with_line(Arc::new(raise), output)
    }

    /// The same, with whatever `raise` interrupts.
    pub(crate) fn with_line(raise: Raise, output: Output) -> Self {
        let line = Line { raise, live: Arc::new(AtomicBool::new(true)) };
        Self { device: Serial::new(line, output), queue: VecDeque::new() }
    }

    /// The guest reads register `offset` (0 to 7).
    pub(crate) fn read(&mut self, offset: u8) -> u8 {
        let value = self.device.read(offset);
        self.refill();
        value
    }

    /// The guest writes register `offset` (0 to 7).
    pub(crate) fn write(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.device.write(offset, value) {
            tracing::warn!("The serial port did not take a write of {value:#x}: {error}");
        }
        self.refill();
    }

    /// Somebody types; how many bytes were taken.
    pub(crate) fn type_in(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(MAX_QUEUE - self.queue.len());
        self.queue.extend(&bytes[..taken]);
        self.refill();
        taken
    }

    /// The state, which leaves the port as it is.
    pub(crate) fn state(&self) -> PortState {
        PortState { device: self.device.state(), queue: self.queue.iter().copied().collect() }
    }

    /// Puts the port into `state`. No interrupt is raised: one that was pending is in the state of
    /// the interrupt chip already.
    pub(crate) fn load(&mut self, state: PortState) -> Result<()> {
        let line = self.device.interrupt_evt().clone();
        let output = self.device.writer().clone();
        let live = line.live.clone();
        live.store(false, Ordering::SeqCst);
        let device = Serial::from_state(&state.device, line, NoEvents, output);
        live.store(true, Ordering::SeqCst);
        self.device = device.map_err(|error| VmError::section("serial", error.to_string()))?;
        self.queue = state.queue.into();
        Ok(())
    }

    /// Moves waiting bytes into the device's FIFO as far as there is room.
    fn refill(&mut self) {
        let count = self.queue.len().min(self.device.fifo_capacity());
        if count == 0 {
            return;
        }
        let waiting = &self.queue.make_contiguous()[..count];
        // In loopback mode the device takes nothing from outside: the bytes wait on.
        match self.device.enqueue_raw_bytes(waiting) {
            Ok(taken) => drop(self.queue.drain(..taken)),
            Err(error) => tracing::warn!("The serial port did not take typed bytes: {error}"),
        }
    }
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").field("state", &self.state()).finish()
    }
}

/// Raises the interrupt line and lowers it, in one go, by calls that are through when they return, so that nothing is
/// under way when the interrupt chip is saved.
pub(crate) type Raise = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// The interrupt line.
#[derive(Clone)]
struct Line {
    raise: Raise,
    live: Arc<AtomicBool>,
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if self.live.load(Ordering::SeqCst) { (self.raise)() } else { Ok(()) }
    }
}
