//! Section `virtio/LABEL`: registers, interrupt, queues and the device's own, as they travel.

use decamp_shared::workload::Section;
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK};
use virtio_queue::{Queue, QueueState};

use super::registers::{self, Registers, Written};
use super::worker::{Core, Shared};
use crate::error::{Result, VmError};
use crate::state::fields::{FieldReader, FieldWriter};
use crate::state::payload;

/// Version of what is said here of registers and queues; that of a device's own is in [`DEVICE`].
const VERSION: u32 = 1;

/// Type of the device and version of its own bytes, two `u32`.
const DEVICE: u16 = 1;
/// Registers: status, halves of features, queue, causes, generation, broken (`u32` each), features (`u64`).
const REGISTERS: u16 = 2;
/// One row a queue.
const QUEUES: u16 = 3;
/// The device's own bytes.
const OWN: u16 = 4;

const REGISTER_BYTES: usize = 7 * 4 + 8;
const QUEUE_BYTES: usize = 4 * 2 + 3 * 8;
const READY: u16 = 1;
const EVENT_IDX: u16 = 2;
/// No device has more queues.
const MAX_QUEUES: usize = 64;

/// The kind of the section of the device called `label`.
pub(super) fn kind(label: &str) -> String {
    format!("virtio/{label}")
}

/// The state of a device that is paused.
pub(super) fn encode(shared: &Shared, registers: &Registers) -> Section {
    let written = registers.written();
    let core = shared.lock();
    let mut fields = FieldWriter::default();
    let words =
        |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    fields.put(DEVICE, &words(&[core.device.id(), core.device.version()]));
    let mut said = words(&[
        written.status,
        written.offered_half,
        written.taken_half,
        written.queue,
        shared.interrupt.causes(),
        shared.interrupt.generation(),
        core.broken.into(),
    ]);
    said.extend(core.features.to_le_bytes());
    fields.put(REGISTERS, &said);
    fields.put(QUEUES, &core.queues.iter().flat_map(queue_to_bytes).collect::<Vec<_>>());
    fields.put(OWN, &core.device.save());
    Section { kind: kind(&shared.label), version: VERSION, bytes: fields.finish() }
}

/// Puts a device that never worked into the state of `section`.
pub(super) fn load(shared: &Shared, registers: &Registers, section: &Section) -> Result<()> {
    let wrong = |reason: String| VmError::section(&section.kind, reason);
    let mut fields = FieldReader::new(&section.kind, payload(section, VERSION)?)?;
    let device = fields.take_array::<8>(DEVICE)?;
    let said = fields.take_array::<REGISTER_BYTES>(REGISTERS)?;
    let queues = fields.take_rows::<QUEUE_BYTES>(QUEUES, MAX_QUEUES)?;
    let own = fields.take(OWN)?;
    fields.finish()?;
    let mut core = shared.lock();
    let ours = (core.device.id(), core.device.version());
    let theirs = (word(&device, 0), word(&device, 1));
    if theirs != ours {
        return Err(wrong(format!(
            "it is of a device of type {} version {}, here is one of type {} version {}",
            theirs.0, theirs.1, ours.0, ours.1
        )));
    }
    let features = u64::from_le_bytes(said[28..36].try_into().unwrap_or_default());
    let mut written = Written {
        status: word(&said, 0),
        offered_half: word(&said, 1),
        taken_half: word(&said, 2),
        queue: word(&said, 3),
    };
    let (causes, generation, broken) = (word(&said, 4), word(&said, 5), word(&said, 6) != 0);
    if written.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
        // As the register would have it.
        written.status &= !VIRTIO_CONFIG_S_DRIVER_OK;
    }
    let works = written.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && !broken;
    if works && !registers::fits(&core, features) {
        let ours = registers::offered(&core);
        return Err(wrong(format!("its driver took features {features:#x} of {ours:#x}")));
    }
    set_queues(&mut core, &queues, &section.kind)?;
    if works && let Some(queue) = registers::misplaced(&core, shared) {
        return Err(wrong(format!("its queue {queue} lies where no memory is")));
    }
    core.device.load(own, features).map_err(wrong)?;
    core.features = features;
    core.broken = broken;
    core.works = works;
    core.came = true;
    shared.interrupt.load(causes, generation);
    registers.load(written);
    Ok(())
}

fn set_queues(core: &mut Core, rows: &[[u8; QUEUE_BYTES]], section: &str) -> Result<()> {
    let wrong = |reason: String| VmError::section(section, reason);
    if rows.len() != core.queues.len() {
        let ours = core.queues.len();
        return Err(wrong(format!("it has {} queues, the device here {ours}", rows.len())));
    }
    for (number, (queue, row)) in core.queues.iter_mut().zip(rows).enumerate() {
        let state = queue_from_bytes(row, queue.state().max_size);
        *queue = Queue::try_from(state)
            .map_err(|error| wrong(format!("its queue {number} is none ({error})")))?;
    }
    Ok(())
}

fn queue_to_bytes(queue: &Queue) -> [u8; QUEUE_BYTES] {
    let state = queue.state();
    let flags =
        if state.ready { READY } else { 0 } | if state.event_idx_enabled { EVENT_IDX } else { 0 };
    let mut bytes = [0; QUEUE_BYTES];
    let words = [state.size, state.next_avail, state.next_used, flags];
    for (place, word) in bytes.chunks_exact_mut(2).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let addresses = [state.desc_table, state.avail_ring, state.used_ring];
    for (place, address) in bytes[8..].chunks_exact_mut(8).zip(addresses) {
        place.copy_from_slice(&address.to_le_bytes());
    }
    bytes
}

fn queue_from_bytes(row: &[u8; QUEUE_BYTES], max_size: u16) -> QueueState {
    let short = |at: usize| u16::from_le_bytes([row[at * 2], row[at * 2 + 1]]);
    let long = |at: usize| {
        let bytes = row[8 + at * 8..16 + at * 8].try_into();
        u64::from_le_bytes(bytes.unwrap_or_default())
    };
    QueueState {
        max_size,
        size: short(0),
        next_avail: short(1),
        next_used: short(2),
        ready: short(3) & READY != 0,
        event_idx_enabled: short(3) & EVENT_IDX != 0,
        desc_table: long(0),
        avail_ring: long(1),
        used_ring: long(2),
    }
}

fn word(bytes: &[u8], number: usize) -> u32 {
    let word = bytes.get(number * 4..number * 4 + 4).and_then(|bytes| bytes.try_into().ok());
    word.map_or(0, u32::from_le_bytes)
}
