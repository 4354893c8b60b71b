//! What answers when a guest leaves KVM: its I/O ports, memory that is not there, and the ways in
//! which a guest ends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use decamp_shared::keeper::ExitRecord;
use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::VcpuExit;

use crate::power::{self, Asked, EVENT_PORT as POWER, LAST_PORT as POWER_LAST, Power};
use crate::serial::{PORT as SERIAL, SerialPort};
use crate::vcpu::Reset;
use crate::virtio::bus::VirtioBus;

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
    /// The machine shall be reset.
    Reset(Reset),
}

/// The devices that a guest reaches by I/O ports or by memory that is none. Clones are the same devices.
#[derive(Clone, Debug)]
pub(crate) struct Ports {
    serial: Arc<Mutex<SerialPort>>,
    power: Arc<Mutex<Power>>,
    virtio: Arc<VirtioBus>,
}

impl Ports {
    /// Ports with `serial` and `power` at their usual places, and the devices of `virtio` in memory.
    pub(crate) fn new(serial: SerialPort, power: Power, virtio: VirtioBus) -> Self {
        Self {
            serial: Arc::new(Mutex::new(serial)),
            power: Arc::new(Mutex::new(power)),
            virtio: Arc::new(virtio),
        }
    }

    /// The virtio devices.
    pub(crate) fn virtio(&self) -> &VirtioBus {
        &self.virtio
    }

    /// The serial port.
    pub(crate) fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The power device.
    pub(crate) fn power(&self) -> MutexGuard<'_, Power> {
        self.power.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers one exit of a vCPU. What has to be read is filled in before this returns; KVM takes
    /// it when the vCPU is entered again.
    pub(crate) fn answer(&self, exit: VcpuExit<'_>) -> Flow {
        match exit {
            VcpuExit::IoIn(port @ POWER..=POWER_LAST, data) => {
                self.power().read(port, data);
                Flow::Continue
            }
            VcpuExit::IoIn(port, data) => {
                data.iter_mut().for_each(|byte| *byte = self.read(port));
                Flow::Continue
            }
            VcpuExit::IoOut(port @ POWER..=POWER_LAST, data) => {
                match self.power().write(port, data) {
                    Asked::Nothing => Flow::Continue,
                    Asked::Off => end(0, "powered off"),
                }
            }
            VcpuExit::IoOut(port, data) if power::resets(port, data) => Flow::Reset(Reset::Asked),
            VcpuExit::IoOut(port, data) => data
                .iter()
                .map(|byte| self.write(port, *byte))
                .find(|flow| *flow != Flow::Continue)
                .unwrap_or(Flow::Continue),
            VcpuExit::MmioRead(address, data) => {
                if !self.virtio.read(address, data) {
                    data.fill(FLOATING);
                }
                Flow::Continue
            }
            VcpuExit::MmioWrite(address, data) => {
                self.virtio.write(address, data);
                Flow::Continue
            }
            VcpuExit::Intr
            | VcpuExit::IrqWindowOpen
            | VcpuExit::IoapicEoi(_)
            | VcpuExit::SetTpr
            | VcpuExit::TprAccess => Flow::Continue,
            VcpuExit::Hlt => end(1, "halted for ever"),
            VcpuExit::Shutdown => Flow::Reset(Reset::Fault),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => end(0, "powered off"),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Flow::Reset(Reset::Asked),
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
            KEYBOARD_COMMAND if value == PULSE_RESET => return Flow::Reset(Reset::Asked),
            _ => {}
        }
        Flow::Continue
    }
}

fn end(status: i32, text: impl Into<String>) -> Flow {
    Flow::End(ExitRecord { status, text: text.into() })
}
