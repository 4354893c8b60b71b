//! The registers of a virtio device over MMIO (Virtual I/O Device 1.2, section 4.2.2): what a driver reads, and
//! what its writes mean. Only the modern interface, version 2.

use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};

use super::worker::{Core, Shared};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// `DCMP`, little-endian.
const VENDOR: u32 = u32::from_le_bytes(*b"DCMP");
/// Where the device's own configuration begins.
const CONFIG: u64 = 0x100;
/// Where a driver kicks its queues.
pub(super) const NOTIFY: u64 = 0x50;

const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// What every device offers.
const COMMON: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What a driver wrote into registers that stand for themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Written {
    /// Device status, without that it is broken.
    pub(super) status: u32,
    /// Which half of the device's features is read.
    pub(super) offered_half: u32,
    /// Which half of the driver's features is written.
    pub(super) taken_half: u32,
    /// Which queue is meant.
    pub(super) queue: u32,
}

/// The registers of one device. Their lock is taken before the device's.
#[derive(Debug, Default)]
pub(super) struct Registers {
    written: Mutex<Written>,
}

impl Registers {
    fn lock(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was written.
    pub(super) fn written(&self) -> Written {
        *self.lock()
    }

    /// Takes over what was written elsewhere.
    pub(super) fn load(&self, written: Written) {
        *self.lock() = written;
    }

    /// The driver reads `data` at `offset`.
    pub(super) fn read(&self, shared: &Shared, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG) {
            let config = shared.lock().device.config();
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            let rest = config.get(at..).unwrap_or_default();
            let count = rest.len().min(data.len());
            data[..count].copy_from_slice(&rest[..count]);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_word(shared, offset).to_le_bytes();
        } else {
            tracing::debug!("Device {}: {offset:#x} is read as no register is", shared.label);
        }
    }

    fn read_word(&self, shared: &Shared, offset: u64) -> u32 {
        // What is read at every interrupt must not wait for the device.
        if offset == 0x60 {
            return shared.interrupt.causes();
        }
        let written = self.lock();
        let core = shared.lock();
        let queue = || core.queues.get(written.queue as usize);
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => core.device.id(),
            0x0c => VENDOR,
            0x10 => half(offered(&core), written.offered_half),
            0x34 => queue().map_or(0, |queue| queue.max_size().into()),
            0x44 => queue().is_some_and(QueueT::ready).into(),
            0x70 => written.status | if core.broken { NEEDS_RESET } else { 0 },
            // There is no shared memory: its length reads as all ones.
            0xb0..=0xbc => u32::MAX,
            0xfc => shared.interrupt.generation(),
            _ => 0,
        }
    }

    /// The driver writes `data` at `offset`.
    pub(super) fn write(&self, shared: &Shared, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            shared.lock().device.write_config(at, data);
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_word(shared, offset, u32::from_le_bytes(word));
        } else {
            tracing::debug!("Device {}: {offset:#x} is written as no register is", shared.label);
        }
    }

    fn write_word(&self, shared: &Shared, offset: u64, value: u32) {
        match offset {
            NOTIFY => return shared.poller.kick(value as usize),
            0x64 => return shared.interrupt.acknowledge(value),
            _ => {}
        }
        let mut written = self.lock();
        let mut core = shared.lock();
        match offset {
            0x14 => written.offered_half = value,
            0x24 => written.taken_half = value,
            0x30 => written.queue = value,
            0x20 if written.status & FEATURES_OK == 0 => {
                core.features = with_half(core.features, written.taken_half, value);
            }
            0x70 => set_status(shared, &mut written, &mut core, value),
            0x38..=0xa4 if written.status & DRIVER_OK == 0 => {
                if let Some(queue) = core.queues.get_mut(written.queue as usize) {
                    shape(queue, offset, value);
                }
            }
            _ => tracing::debug!("Device {}: nothing can be written at {offset:#x}", shared.label),
        }
    }
}

/// All that the device offers.
pub(super) fn offered(core: &Core) -> u64 {
    core.device.features() | COMMON
}

/// The driver writes `value` into a register of `queue` that shapes it.
fn shape(queue: &mut Queue, offset: u64, value: u32) {
    match offset {
        // Sizes and addresses that cannot be are left out by the queue, and found at the start.
        0x38 => queue.set_size(u16::try_from(value).unwrap_or(0)),
        0x44 => queue.set_ready(value == 1),
        0x80 => queue.set_desc_table_address(Some(value), None),
        0x84 => queue.set_desc_table_address(None, Some(value)),
        0x90 => queue.set_avail_ring_address(Some(value), None),
        0x94 => queue.set_avail_ring_address(None, Some(value)),
        0xa0 => queue.set_used_ring_address(Some(value), None),
        0xa4 => queue.set_used_ring_address(None, Some(value)),
        _ => {}
    }
}

fn set_status(shared: &Shared, written: &mut Written, core: &mut Core, status: u32) {
    if status == 0 {
        *written = Written::default();
        return shared.reset(core);
    }
    let mut status = status & !NEEDS_RESET;
    let began = status & !written.status;
    if began & FEATURES_OK != 0 && !fits(core, core.features) {
        // The driver sees that the bit did not stay.
        status &= !FEATURES_OK;
    }
    if (status | written.status) & FEATURES_OK == 0 {
        // Nothing was agreed on that it could work with.
        status &= !DRIVER_OK;
    }
    let starts = status & !written.status & DRIVER_OK != 0;
    // Only a reset takes anything back.
    written.status |= status;
    if starts {
        let event_idx = core.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        core.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
        match misplaced(core, shared) {
            None => shared.start(core),
            Some(queue) => {
                shared.complain(&format!("has a queue {queue} that lies where no memory is"));
                core.broken = true;
                shared.interrupt.config_changed();
            }
        }
    }
}

/// Whether a driver may take `features`.
pub(super) fn fits(core: &Core, features: u64) -> bool {
    features & !offered(core) == 0 && features & (1 << VIRTIO_F_VERSION_1) != 0
}

/// The first queue that was set up and is none.
pub(super) fn misplaced(core: &Core, shared: &Shared) -> Option<usize> {
    core.queues.iter().position(|queue| queue.ready() && !queue.is_valid(shared.memory()))
}

fn half(features: u64, which: u32) -> u32 {
    match which {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn with_half(features: u64, which: u32, value: u32) -> u64 {
    match which {
        0 => features & !0xffff_ffff | u64::from(value),
        1 => features & 0xffff_ffff | u64::from(value) << 32,
        // Features beyond those that there are are not offered: taking them is what no driver does.
        _ if value != 0 => u64::MAX,
        _ => features,
    }
}
