//! A guest that does what it likes to the serial port and the power device. Whatever it does, they go on elsewhere as
//! they were.

use std::sync::Arc;

use super::script::Script;
use crate::console::Output;
use crate::power::{EVENT_PORT, Power};
use crate::serial::SerialPort;
use crate::state::{power, serial};

/// Kinds of step, as a script names them.
pub(super) mod step {
    pub(crate) const SERIAL_WRITE: u8 = 0;
    pub(crate) const SERIAL_READ: u8 = 1;
    pub(crate) const TYPE: u8 = 2;
    pub(crate) const POWER_WRITE: u8 = 3;
    pub(crate) const POWER_READ: u8 = 4;
    pub(crate) const PRESS: u8 = 5;
    pub(crate) const MOVE: u8 = 6;
    pub(crate) const KINDS: u8 = 7;
}

/// The most steps of one script.
const MOST_STEPS: usize = 1024;

/// A guest that writes and reads ports by a script, and somebody who types and presses the button.
pub fn ports(bytes: &[u8]) {
    let mut ports = Ports::new();
    ports.drive(&mut Script::new(bytes));
    ports.move_on();
}

/// The two devices; their interrupts go nowhere.
pub(super) struct Ports {
    pub(super) serial: SerialPort,
    pub(super) power: Power,
}

impl Ports {
    pub(super) fn new() -> Self {
        Self {
            serial: SerialPort::with_line(Arc::new(|| Ok(())), Output::nowhere()),
            power: Power::with_line(Box::new(|_| Ok(()))),
        }
    }

    /// They go on elsewhere.
    pub(super) fn move_on(&mut self) {
        let sections = self.save();
        let mut there = Self::new();
        let serial = serial::decode(&sections[0]).expect("its own section");
        there.serial.load(serial).expect("its own state");
        let power = power::decode(&sections[1]).expect("its own section");
        there.power.load(power).expect("its own state");
        assert_eq!(there.save(), sections, "they are not what they were");
        *self = there;
    }

    fn save(&self) -> [decamp_shared::workload::Section; 2] {
        [serial::encode(&self.serial.state()), power::encode(&self.power.state())]
    }

    pub(super) fn drive(&mut self, script: &mut Script<'_>) {
        for _ in 0..MOST_STEPS {
            if script.is_over() {
                break;
            }
            let what = script.byte();
            match what % step::KINDS {
                step::SERIAL_WRITE => self.serial.write(script.byte() % 8, script.byte()),
                step::SERIAL_READ => {
                    let _ = self.serial.read(script.byte() % 8);
                }
                step::TYPE => {
                    // More than there is room for, at times.
                    let count = usize::from(script.byte()) * 64;
                    self.serial.type_in(&vec![what; count]);
                }
                step::POWER_WRITE => {
                    let port = EVENT_PORT + u16::from(script.byte() % 8);
                    let length = 1 << (script.byte() % 4);
                    self.power.write(port, &script.long().to_le_bytes()[..length]);
                }
                step::POWER_READ => {
                    let port = EVENT_PORT + u16::from(script.byte() % 8);
                    let length = 1 << (script.byte() % 4);
                    self.power.read(port, &mut [0; 8][..length]);
                }
                step::PRESS => {
                    let _ = self.power.press();
                }
                _ => self.move_on(),
            }
        }
    }
}
