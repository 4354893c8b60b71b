//! What answers when a guest leaves KVM: its I/O ports, memory that is not there, and the ways in
//! which a guest ends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use decamp_shared::keeper::ExitRecord;
use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::VcpuExit;

use crate::serial::{PORT as SERIAL, SerialPort};

const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;
/// The keyboard controller's command that pulls the processor's reset line.
const PULSE_RESET: u8 = 0xfe;
/// What a bus reads where nothing answers.
const FLOATING: u8 = 0xff;

/// What a vCPU does after an exit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Runs on.
    Continue,
    /// The guest has ended.
    End(ExitRecord),
}

/// The devices that a guest reaches by I/O ports. Clones are the same devices.
#[derive(Clone, Debug)]
pub(crate) struct Ports {
    serial: Arc<Mutex<SerialPort>>,
}

impl Ports {
    /// Ports with `serial` at its usual place.
    pub(crate) fn new(serial: SerialPort) -> Self {
        Self { serial: Arc::new(Mutex::new(serial)) }
    }

    /// The serial port.
    pub(crate) fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers one exit of a vCPU. What has to be read is filled in before this returns; KVM takes
    /// it when the vCPU is entered again.
    pub(crate) fn answer(&self, exit: VcpuExit<'_>) -> Flow {
        match exit {
            VcpuExit::IoIn(port, data) => {
                data.iter_mut().for_each(|byte| *byte = self.read(port));
                Flow::Continue
            }
            VcpuExit::IoOut(port, data) => data
                .iter()
                .map(|byte| self.write(port, *byte))
                .find(|flow| *flow != Flow::Continue)
                .unwrap_or(Flow::Continue),
            VcpuExit::MmioRead(_, data) => {
                data.fill(FLOATING);
                Flow::Continue
            }
            VcpuExit::MmioWrite(..)
            | VcpuExit::Intr
            | VcpuExit::IrqWindowOpen
            | VcpuExit::IoapicEoi(_)
            | VcpuExit::SetTpr
            | VcpuExit::TprAccess => Flow::Continue,
            VcpuExit::Hlt => end(1, "halted for ever"),
            VcpuExit::Shutdown => end(1, "triple fault"),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => end(0, "powered off"),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => end(0, "reset by the guest"),
            VcpuExit::FailEntry(reason, cpu) => {
                end(1, format!("KVM could not enter the guest on CPU {cpu} (reason {reason:#x})"))
            }
            other => end(1, format!("KVM stopped the guest ({other:?})")),
        }
    }

    fn read(&self, port: u16) -> u8 {
        match port {
            SERIAL..=0x3ff => self.serial().read((port - SERIAL) as u8),
            // Nothing to read, ready for a command.
            KEYBOARD_DATA | KEYBOARD_COMMAND => 0,
            _ => FLOATING,
        }
    }

    fn write(&self, port: u16, value: u8) -> Flow {
        match port {
            SERIAL..=0x3ff => self.serial().write((port - SERIAL) as u8, value),
            KEYBOARD_COMMAND if value == PULSE_RESET => return end(0, "reset by the guest"),
            _ => {}
        }
        Flow::Continue
    }
}

fn end(status: i32, text: impl Into<String>) -> Flow {
    Flow::End(ExitRecord { status, text: text.into() })
}
