//! Section `power`: the registers of the power device.

use decamp_shared::workload::Section;

use super::fields::{FieldReader, FieldWriter};
use super::payload;
use crate::error::Result;
use crate::power::PowerState;

/// The section's kind.
pub(crate) const KIND: &str = "power";
const VERSION: u32 = 1;

/// Status, enable and control, two bytes each.
const REGISTERS: u16 = 1;

/// Writes the section.
pub(crate) fn encode(state: &PowerState) -> Section {
    let mut fields = FieldWriter::default();
    let words = [state.status, state.enable, state.control].map(u16::to_le_bytes);
    fields.put(REGISTERS, words.as_flattened());
    Section { kind: KIND.into(), version: VERSION, bytes: fields.finish() }
}

/// Reads the section. Whether the registers can hold this is the device's to say.
pub(crate) fn decode(section: &Section) -> Result<PowerState> {
    let mut fields = FieldReader::new(KIND, payload(section, VERSION)?)?;
    let [a, b, c, d, e, f] = fields.take_array(REGISTERS)?;
    fields.finish()?;
    let word = |low, high| u16::from_le_bytes([low, high]);
    Ok(PowerState { status: word(a, b), enable: word(c, d), control: word(e, f) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests_support::refuses_damage;
    use super::*;

    proptest! {
        #[test]
        fn a_device_comes_back_and_damage_is_found(status: u16, enable: u16, control: u16) {
            let state = PowerState { status, enable, control };
            let section = encode(&state);
            prop_assert_eq!(decode(&section).expect("own section"), state);
            refuses_damage(&section, |section| decode(section).is_ok());
        }
    }
}
