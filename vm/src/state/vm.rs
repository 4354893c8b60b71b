//! Section `vm`: what all vCPUs share, the interrupt chips, the interval timer and the clock.

use std::time::Duration;

use decamp_shared::workload::Section;
use kvm_ioctls::VmFd;

use super::clock::{self, ClockState};
use super::fields::{FieldReader, FieldWriter};
use super::payload;
use crate::error::{Result, VmError};
use crate::sys::{self, Block, IRQCHIP, PIT2};

/// The section's kind.
pub(crate) const KIND: &str = "vm";
const VERSION: u32 = 1;

/// Bytes of guest memory.
const MEMORY: u16 = 1;
/// The first interrupt controller, and the second; then the I/O APIC.
const CHIPS: [u16; 3] = [2, 3, 4];
/// The interval timer.
const TIMER: u16 = 5;
/// The clock.
const TIME: u16 = 6;

/// Where the chip's own bytes begin in IRQCHIP.
const CHIP_AT: usize = 8;
const CHIP_BYTES: usize = IRQCHIP.size - CHIP_AT;

/// What all vCPUs share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VmState {
    /// Bytes of guest memory.
    pub(crate) memory_bytes: u64,
    /// The three interrupt chips, in KVM's order.
    pub(crate) chips: [Vec<u8>; 3],
    /// The interval timer.
    pub(crate) timer: Vec<u8>,
    /// The clock.
    pub(crate) clock: ClockState,
}

impl VmState {
    /// Reads it from KVM, vCPUs parked.
    pub(crate) fn read(vm: &VmFd, memory_bytes: u64) -> Result<Self> {
        let chip = |number: u32| {
            let mut bytes = vec![0; IRQCHIP.size];
            bytes[..4].copy_from_slice(&number.to_le_bytes());
            get(vm, &IRQCHIP, &mut bytes)?;
            Ok(bytes.split_off(CHIP_AT))
        };
        let mut timer = vec![0; PIT2.size];
        get(vm, &PIT2, &mut timer)?;
        Ok(Self {
            memory_bytes,
            chips: [chip(0)?, chip(1)?, chip(2)?],
            timer,
            clock: ClockState::read(vm)?,
        })
    }

    /// Gives it to KVM: timer, clock, interrupt controllers, I/O APIC, in this order. It was read no longer than `lasted`
    /// ago.
    pub(crate) fn write(&self, vm: &VmFd, lasted: Duration) -> Result<()> {
        set(vm, &PIT2, &self.timer)?;
        self.clock.write(vm, lasted)?;
        self.write_chips(vm)
    }

    /// Puts a VM that has run back into this, its first state. The clock goes on.
    pub(crate) fn write_again(&self, vm: &VmFd) -> Result<()> {
        set(vm, &PIT2, &self.timer)?;
        self.write_chips(vm)
    }

    fn write_chips(&self, vm: &VmFd) -> Result<()> {
        for (number, chip) in (0u32..).zip(&self.chips) {
            let mut bytes = vec![0; CHIP_AT];
            bytes[..4].copy_from_slice(&number.to_le_bytes());
            bytes.extend_from_slice(chip);
            set(vm, &IRQCHIP, &bytes)?;
        }
        Ok(())
    }

    /// One in which nothing ever ran, for fuzzers.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn blank() -> Self {
        let chip = || vec![0; CHIP_BYTES];
        Self {
            memory_bytes: 0,
            chips: [chip(), chip(), chip()],
            timer: vec![0; PIT2.size],
            clock: ClockState::default(),
        }
    }

    /// Writes the section.
    pub(crate) fn encode(&self) -> Section {
        let mut fields = FieldWriter::default();
        fields.put(MEMORY, &self.memory_bytes.to_le_bytes());
        CHIPS.iter().zip(&self.chips).for_each(|(number, chip)| fields.put(*number, chip));
        fields.put(TIMER, &self.timer);
        fields.put(TIME, &self.clock.to_bytes());
        Section { kind: KIND.into(), version: VERSION, bytes: fields.finish() }
    }

    /// Reads the section.
    pub(crate) fn decode(section: &Section) -> Result<Self> {
        let mut fields = FieldReader::new(KIND, payload(section, VERSION)?)?;
        let memory_bytes = u64::from_le_bytes(fields.take_array(MEMORY)?);
        let [first, second, io_apic] = CHIPS;
        let chips = [
            fields.take_exact(first, CHIP_BYTES)?.to_vec(),
            fields.take_exact(second, CHIP_BYTES)?.to_vec(),
            fields.take_exact(io_apic, CHIP_BYTES)?.to_vec(),
        ];
        let timer = fields.take_exact(TIMER, PIT2.size)?.to_vec();
        let clock = ClockState::from_bytes(fields.take_array::<{ clock::BYTES }>(TIME)?);
        fields.finish()?;
        Ok(Self { memory_bytes, chips, timer, clock })
    }
}

fn get(vm: &VmFd, block: &Block, bytes: &mut [u8]) -> Result<()> {
    sys::get_block(vm, block, bytes)
        .map_err(|error| VmError::refused(format!("read {} of the VM", block.name), error))
}

fn set(vm: &VmFd, block: &Block, bytes: &[u8]) -> Result<()> {
    sys::set_block(vm, block, bytes)
        .map_err(|error| VmError::refused(format!("set {} of the VM", block.name), error))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests_support::refuses_damage;
    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_vm_comes_back_and_damage_is_found(memory_bytes: u64, seed: u8, nanoseconds: u64, flags: u32) {
            let bytes = |length: usize, salt: u8| -> Vec<u8> {
                (0..length).map(|at| (at as u8).wrapping_mul(seed).wrapping_add(salt)).collect()
            };
            let state = VmState {
                memory_bytes,
                chips: [bytes(CHIP_BYTES, 1), bytes(CHIP_BYTES, 2), bytes(CHIP_BYTES, 3)],
                timer: bytes(PIT2.size, 4),
                clock: ClockState { nanoseconds, flags, realtime: 5, host_tsc: 6 },
            };
            let section = state.encode();
            prop_assert_eq!(VmState::decode(&section).expect("own section"), state);
            refuses_damage(&section, |section| VmState::decode(section).is_ok());
        }
    }
}
