//! A device without a thread, driven step by step: for fuzzers, which need every run to be the same.

use decamp_shared::workload::Section;
use virtio_queue::QueueT;

use super::device::Device;
use super::registers::{self, Registers};
use super::state;
use super::worker::Shared;
use crate::error::Result;
use crate::memory::Map;

/// A device on trial.
#[derive(Debug)]
pub(crate) struct Tried {
    shared: Shared,
    registers: Registers,
}

impl Tried {
    /// `device` on `memory`; its interrupts go nowhere.
    ///
    /// # Errors
    /// When the kernel gives nothing to wait with.
    pub(crate) fn new(device: Box<dyn Device>, memory: &Map) -> Result<Self> {
        let shared = Shared::new("it", device, memory.clone(), Box::new(|_| ()))?;
        Ok(Self { shared, registers: Registers::default() })
    }

    /// Loads a section.
    ///
    /// # Errors
    /// When it is none of this device.
    pub(crate) fn load(&mut self, section: &Section) -> Result<()> {
        state::load(&self.shared, &self.registers, section)
    }

    /// A driver that takes what it may of `features` and whose rings lie one after another, `apart` bytes each,
    /// from the beginning of memory: every queue is kicked, everything that is watched said to be ready.
    pub(crate) fn drive(&mut self, features: u64, apart: u64) {
        let mut core = self.shared.lock();
        core.features = features & registers::offered(&core) | 1 << 32;
        for (number, queue) in (0u64..).zip(core.queues.iter_mut()) {
            let at = number * apart;
            queue.set_size(queue.max_size().min(16));
            queue.set_desc_table_address(Some(at as u32), Some(0));
            queue.set_avail_ring_address(Some(at as u32 + 256), Some(0));
            queue.set_used_ring_address(Some(at as u32 + 512), Some(0));
            queue.set_ready(true);
        }
        core.works = registers::misplaced(&core, &self.shared).is_none();
        let queues = core.queues.len();
        self.shared.work(&mut core, |device, io| device.start(io));
        for queue in 0..queues {
            if core.works {
                self.shared.work(&mut core, |device, io| device.on_queue(queue, io));
            }
        }
        for token in 0..4 {
            if core.works {
                self.shared.work(&mut core, |device, io| device.on_ready(token, io));
            }
        }
        if core.works {
            self.shared.work(&mut core, |device, io| device.settle(io));
        }
        drop(core);
        let section = state::encode(&self.shared, &self.registers);
        drop(section);
        self.shared.reset(&mut self.shared.lock());
    }
}
