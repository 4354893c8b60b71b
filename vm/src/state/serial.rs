//! Section `serial`: the serial port's registers and the bytes that the guest has not read yet.

use decamp_shared::workload::Section;
use vm_superio::serial::SerialState;

use super::fields::{FieldReader, FieldWriter};
use super::payload;
use crate::error::{Result, VmError};
use crate::serial::{FIFO, MAX_QUEUE, PortState};

/// The section's kind.
pub(crate) const KIND: &str = "serial";
const VERSION: u32 = 1;

/// The nine registers, one byte each.
const REGISTERS: u16 = 1;
/// Bytes in the receive FIFO.
const RECEIVED: u16 = 2;
/// Bytes that wait before it.
const QUEUE: u16 = 3;

/// Writes the section.
pub(crate) fn encode(state: &PortState) -> Section {
    let device = &state.device;
    let mut fields = FieldWriter::default();
    fields.put(
        REGISTERS,
        &[
            device.baud_divisor_low,
            device.baud_divisor_high,
            device.interrupt_enable,
            device.interrupt_identification,
            device.line_control,
            device.line_status,
            device.modem_control,
            device.modem_status,
            device.scratch,
        ],
    );
    fields.put(RECEIVED, &device.in_buffer);
    fields.put(QUEUE, &state.queue);
    Section { kind: KIND.into(), version: VERSION, bytes: fields.finish() }
}

/// Reads the section.
pub(crate) fn decode(section: &Section) -> Result<PortState> {
    let mut fields = FieldReader::new(KIND, payload(section, VERSION)?)?;
    let [low, high, enable, identification, line, status, modem, modem_status, scratch] =
        fields.take_array(REGISTERS)?;
    let received = fields.take(RECEIVED)?;
    let queue = fields.take(QUEUE)?;
    fields.finish()?;
    if received.len() > FIFO || queue.len() > MAX_QUEUE {
        return Err(VmError::section(
            KIND,
            format!("{} received and {} waiting bytes are too many", received.len(), queue.len()),
        ));
    }
    let device = SerialState {
        baud_divisor_low: low,
        baud_divisor_high: high,
        interrupt_enable: enable,
        interrupt_identification: identification,
        line_control: line,
        line_status: status,
        modem_control: modem,
        modem_status,
        scratch,
        in_buffer: received.to_vec(),
    };
    Ok(PortState { device, queue: queue.to_vec() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests_support::refuses_damage;
    use super::*;

    proptest! {
        #[test]
        fn a_port_comes_back_and_damage_is_found(
            registers: [u8; 9],
            in_buffer in prop::collection::vec(any::<u8>(), 0..=FIFO),
            queue in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let [a, b, c, d, e, f, g, h, i] = registers;
            let device = SerialState {
                baud_divisor_low: a,
                baud_divisor_high: b,
                interrupt_enable: c,
                interrupt_identification: d,
                line_control: e,
                line_status: f,
                modem_control: g,
                modem_status: h,
                scratch: i,
                in_buffer,
            };
            let state = PortState { device, queue };
            let section = encode(&state);
            prop_assert_eq!(decode(&section).expect("own section"), state);
            refuses_damage(&section, |section| decode(section).is_ok());
        }
    }

    #[test]
    fn a_fifo_that_is_too_full_is_refused() {
        let device = SerialState { in_buffer: vec![0; FIFO + 1], ..Default::default() };
        assert!(decode(&encode(&PortState { device, queue: Vec::new() })).is_err());
    }
}
