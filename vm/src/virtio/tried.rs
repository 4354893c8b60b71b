//! A device without a thread, driven step by step: for fuzzers, which need every run to be the same. A driver has
//! the registers and guest memory, as in a VM.

use std::sync::atomic::Ordering;

use decamp_shared::workload::Section;

use super::device::Device;
use super::poller::Ready;
use super::registers::Registers;
use super::state;
use super::worker::Shared;
use crate::error::Result;
use crate::memory::Map;

/// Looks at what is ready, one after the other. A device that has itself looked at again for ever is left.
const ROUNDS: usize = 6;

/// Who waits for a device while it works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hurry {
    /// Nobody.
    None,
    /// A vCPU that reads a register.
    Wanted,
    /// Whoever is about to pause it.
    Pausing,
}

/// A device on trial.
#[derive(Debug)]
pub(crate) struct Tried {
    shared: Shared,
    registers: Registers,
}

impl Tried {
    /// `device` as `label` on `memory`; its interrupts go nowhere.
    ///
    /// # Errors
    /// When the kernel gives nothing to wait with.
    pub(crate) fn new(label: &str, device: Box<dyn Device>, memory: &Map) -> Result<Self> {
        let shared = Shared::new(label, device, memory.clone(), Box::new(|_| ()))?;
        Ok(Self { shared, registers: Registers::default() })
    }

    /// The kind of its section.
    pub(crate) fn kind(&self) -> String {
        state::kind(&self.shared.label)
    }

    /// Loads a section.
    ///
    /// # Errors
    /// When it is none of this device.
    pub(crate) fn load(&self, section: &Section) -> Result<()> {
        state::load(&self.shared, &self.registers, section)
    }

    /// Stops it and gives its state.
    pub(crate) fn save(&self) -> Section {
        let mut core = self.shared.lock();
        if core.works {
            self.shared.work(&mut core, |device, io| device.settle(io));
        }
        drop(core);
        state::encode(&self.shared, &self.registers)
    }

    /// Lets it work, where it came from elsewhere too.
    pub(crate) fn resume(&self) {
        let mut core = self.shared.lock();
        if std::mem::take(&mut core.came) && core.works {
            self.shared.work(&mut core, |device, io| device.arrived(io));
        }
        (0..core.queues.len()).for_each(|queue| self.shared.poller.kick(queue));
    }

    /// The driver reads `data` at `offset` of its registers.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        self.registers.read(&self.shared, offset, data);
    }

    /// The driver writes `data` at `offset` of its registers.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        self.registers.write(&self.shared, offset, data);
    }

    /// The same of a whole register.
    pub(crate) fn write_word(&self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Reads a whole register.
    pub(crate) fn read_word(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// What its thread does with what is ready, while somebody waits or nobody does.
    pub(crate) fn turn(&self, hurry: Hurry) {
        let waiting = &self.shared.waiting;
        let mut ready = Vec::new();
        for _ in 0..ROUNDS {
            // It returns at once so.
            self.shared.poller.wake();
            if self.shared.poller.wait(&mut ready).is_err() || ready.is_empty() {
                break;
            }
            let mut core = self.shared.lock();
            waiting.any.store((hurry != Hurry::None).into(), Ordering::SeqCst);
            waiting.to_pause.store(hurry == Hurry::Pausing, Ordering::SeqCst);
            for one in &ready {
                if core.works {
                    self.shared.work(&mut core, |device, io| match *one {
                        Ready::Queue(queue) => device.on_queue(queue, io),
                        Ready::Own(token) => device.on_ready(token, io),
                    });
                }
            }
            waiting.any.store(0, Ordering::SeqCst);
            waiting.to_pause.store(false, Ordering::SeqCst);
        }
    }
}
