//! The fixed hardware of ACPI (specification 6.5, chapter 4.8): the power button, switching off, and the ports
//! that reset the machine.
//!
//! Status, enable and control register of PM1a, and the system control interrupt, whose level follows status
//! and enable. There is no PM timer: kernels have better clocks.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::error::{Result, VmError};
use crate::sys::Backed;

/// First port of the event registers: status, then enable, two bytes each.
pub(crate) const EVENT_PORT: u16 = 0x600;
/// Bytes of the event registers.
pub(crate) const EVENT_BYTES: u8 = 4;
/// First of the two ports of the control register.
pub(crate) const CONTROL_PORT: u16 = 0x604;
/// The last port of these registers.
pub(crate) const LAST_PORT: u16 = 0x605;
/// Port of the reset register, where chipsets have it.
pub(crate) const RESET_PORT: u16 = 0xcf9;
/// What resets the machine when written there.
pub(crate) const RESET_VALUE: u8 = 6;
/// The bit of it that counts.
const RESET_NOW: u8 = 1 << 2;
/// Line of the system control interrupt.
pub(crate) const SCI: u32 = 9;
/// The sleep type that switches the machine off.
pub(crate) const SLEEP_TYPE_OFF: u8 = 0;

/// Status bits: bus master, global lock, power button, sleep button, clock, wake.
const STATUS_BITS: u16 = 1 << 4 | GLOBAL | BUTTON | 1 << 9 | 1 << 10 | 1 << 15;
/// Events that can be enabled: timer, global lock, power button, sleep button, clock.
const ENABLE_BITS: u16 = 1 | GLOBAL | BUTTON | 1 << 9 | 1 << 10;
const GLOBAL: u16 = 1 << 5;
const BUTTON: u16 = 1 << 8;
/// Control: ACPI is on, always.
const CONTROL_ACPI: u16 = 1;
const CONTROL_SLEEP_TYPE: u16 = 0b111 << SLEEP_TYPE_AT;
const SLEEP_TYPE_AT: u32 = 10;
const CONTROL_SLEEP: u16 = 1 << 13;
/// Control bits that are kept: bus master reload and the sleep type.
const CONTROL_BITS: u16 = 1 << 1 | CONTROL_SLEEP_TYPE;

/// The registers, as they travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PowerState {
    /// PM1 status.
    pub(crate) status: u16,
    /// PM1 enable.
    pub(crate) enable: u16,
    /// PM1 control, without the bit that is always set.
    pub(crate) control: u16,
}

/// What a write asks for beside the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Nothing.
    Nothing,
    /// The machine is to be switched off.
    Off,
}

/// The device.
pub(crate) struct Power {
    state: PowerState,
    line: Line,
}

/// Sets the level of the interrupt line.
pub(crate) type Line = Box<dyn Fn(bool) -> io::Result<()> + Send>;

impl Power {
    /// A device in its reset state whose interrupt goes to `guest`.
    pub(crate) fn new(guest: Arc<Backed>) -> Self {
        Self::with_line(Box::new(move |level| Ok(guest.vm().set_irq_line(SCI, level)?)))
    }

    /// The same, with whatever `line` interrupts.
    pub(crate) fn with_line(line: Line) -> Self {
        Self { state: PowerState::default(), line }
    }

    /// Somebody presses the power button. `false` when the guest would not notice.
    pub(crate) fn press(&mut self) -> bool {
        self.state.status |= BUTTON;
        self.follow();
        self.state.enable & BUTTON != 0
    }

    /// The guest reads `data.len()` bytes from `port` on.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        let PowerState { status, enable, control } = self.state;
        let mut registers = [0; 6];
        for (place, register) in registers.as_chunks_mut::<2>().0.iter_mut().zip([
            status,
            enable,
            control | CONTROL_ACPI,
        ]) {
            *place = register.to_le_bytes();
        }
        let from = usize::from(port.saturating_sub(EVENT_PORT));
        for (byte, at) in data.iter_mut().zip(from..) {
            *byte = registers.get(at).copied().unwrap_or(0xff);
        }
    }

    /// The guest writes `data` from `port` on.
    pub(crate) fn write(&mut self, port: u16, data: &[u8]) -> Asked {
        let mut asked = Asked::Nothing;
        for (byte, port) in data.iter().zip(port..) {
            let shift = u32::from(port & 1) * 8;
            let (value, mask) = (u16::from(*byte) << shift, 0xff << shift);
            match port.wrapping_sub(EVENT_PORT) / 2 {
                // Written ones clear.
                0 => self.state.status &= !(value & STATUS_BITS),
                1 => self.state.enable = (self.state.enable & !mask) | (value & ENABLE_BITS),
                2 => {
                    self.state.control = (self.state.control & !mask) | (value & CONTROL_BITS);
                    let type_ = (self.state.control & CONTROL_SLEEP_TYPE) >> SLEEP_TYPE_AT;
                    if value & CONTROL_SLEEP != 0 && type_ == u16::from(SLEEP_TYPE_OFF) {
                        asked = Asked::Off;
                    }
                }
                _ => {}
            }
        }
        self.follow();
        asked
    }

    /// The state, which leaves the device as it is.
    pub(crate) fn state(&self) -> PowerState {
        self.state
    }

    /// Puts the device into `state`. The interrupt line is in the state of the interrupt chip already.
    pub(crate) fn load(&mut self, state: PowerState) -> Result<()> {
        if state.status & !STATUS_BITS != 0
            || state.enable & !ENABLE_BITS != 0
            || state.control & !CONTROL_BITS != 0
        {
            return Err(VmError::section("power", "it has bits that no register has"));
        }
        self.state = state;
        Ok(())
    }

    fn follow(&self) {
        let level = self.state.status & self.state.enable != 0;
        if let Err(error) = (self.line)(level) {
            tracing::warn!("The system control interrupt did not follow its device: {error}");
        }
    }
}

/// Whether `data`, written to `port`, resets the machine by the reset register.
pub(crate) fn resets(port: u16, data: &[u8]) -> bool {
    matches!(data, [value] if port == RESET_PORT && value & RESET_NOW != 0)
}

impl fmt::Debug for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Power").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn device() -> (Power, Arc<AtomicBool>) {
        let level = Arc::new(AtomicBool::new(false));
        let seen = level.clone();
        let line = move |up| {
            seen.store(up, Ordering::SeqCst);
            Ok(())
        };
        (Power::with_line(Box::new(line)), level)
    }

    fn word(power: &Power, port: u16) -> u16 {
        let mut bytes = [0; 2];
        power.read(port, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    #[test]
    fn the_button_interrupts_once_it_is_enabled_and_until_it_is_cleared() {
        let (mut power, level) = device();
        assert!(!power.press(), "nobody listens");
        assert!(!level.load(Ordering::SeqCst));
        assert_eq!(power.write(EVENT_PORT + 2, &BUTTON.to_le_bytes()), Asked::Nothing);
        assert!(level.load(Ordering::SeqCst), "it was pressed before");
        power.write(EVENT_PORT, &BUTTON.to_le_bytes());
        assert!(!level.load(Ordering::SeqCst));
        assert!(power.press());
        assert!(level.load(Ordering::SeqCst));
        assert_eq!(word(&power, EVENT_PORT), BUTTON);
        power.write(EVENT_PORT + 1, &[1]);
        assert!(!level.load(Ordering::SeqCst), "the upper byte alone clears too");
    }

    #[test]
    fn registers_keep_what_they_have_and_acpi_is_on() {
        let (mut power, _) = device();
        assert_eq!(word(&power, CONTROL_PORT), CONTROL_ACPI);
        power.write(EVENT_PORT + 2, &[0xff, 0xff]);
        assert_eq!(word(&power, EVENT_PORT + 2), ENABLE_BITS);
        power.write(CONTROL_PORT, &0x1c00u16.to_le_bytes());
        assert_eq!(word(&power, CONTROL_PORT), 0x1c01);
        let mut all = [0; 8];
        power.read(EVENT_PORT, &mut all);
        assert_eq!(all[6..], [0xff, 0xff], "beyond the last register");
        let state = power.state();
        let (mut other, _) = device();
        other.load(state).expect("own state");
        assert_eq!(other.state(), state);
        assert!(other.load(PowerState { status: 2, ..state }).is_err());
    }

    #[test]
    fn only_sleep_of_the_right_type_switches_off() {
        let (mut power, _) = device();
        assert_eq!(power.write(CONTROL_PORT, &(5u16 << 10).to_le_bytes()), Asked::Nothing);
        let suspend = CONTROL_SLEEP | 1 << 10;
        assert_eq!(power.write(CONTROL_PORT, &suspend.to_le_bytes()), Asked::Nothing);
        assert_eq!(power.write(CONTROL_PORT, &CONTROL_SLEEP.to_le_bytes()), Asked::Off);
        assert_eq!(power.write(CONTROL_PORT + 1, &[0x20]), Asked::Off, "by its upper byte");
    }

    #[test]
    fn the_reset_register_is_one_byte() {
        assert!(resets(RESET_PORT, &[RESET_VALUE]));
        assert!(!resets(RESET_PORT, &[2]));
        assert!(!resets(RESET_PORT, &[0, 0, 0, 0x80]));
        assert!(!resets(RESET_PORT - 1, &[RESET_VALUE]));
    }
}
