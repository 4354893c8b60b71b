//! All virtio devices of one VM: where a vCPU's access to their registers goes, and what is done to them all.

use std::fmt;

use decamp_shared::workload::Section;
use kvm_ioctls::IoEventAddress;

use super::device::Device;
pub(crate) use super::interrupt::Line;
use super::registers::{NOTIFY, Registers};
use super::state;
use super::worker::Worker;
use crate::error::{Result, VmError};
use crate::layout::{MAX_VIRTIO, Slot};
use crate::memory::Map;
use crate::sandbox::Allowed;
use crate::sys::Backed;

/// A device with the name that its section and its thread have.
#[derive(Debug)]
pub(crate) struct Named {
    /// `disk0`, `net0`, `rng`: the same on every host.
    pub(crate) label: String,
    /// The device.
    pub(crate) device: Box<dyn Device>,
}

impl Named {
    /// `device` as `label`.
    pub(crate) fn new(label: impl Into<String>, device: impl Device + 'static) -> Self {
        Self { label: label.into(), device: Box::new(device) }
    }
}

/// The virtio devices of one VM, paused until they are resumed.
#[derive(Default)]
pub(crate) struct VirtioBus {
    places: Vec<Placed>,
}

/// A device in its place.
#[derive(Debug)]
struct Placed {
    registers: Registers,
    worker: Worker,
}

impl VirtioBus {
    /// Puts `devices` into their places, in this order, on `memory`; `line` gives the interrupt of a place.
    ///
    /// # Errors
    /// When there are more than places, or the kernel gives no threads.
    pub(crate) fn new(
        devices: Vec<Named>,
        memory: &Map,
        line: impl Fn(Slot) -> Line,
    ) -> Result<Self> {
        let count = devices.len();
        let mut places = Vec::with_capacity(count);
        for (number, Named { label, device }) in devices.into_iter().enumerate() {
            let slot = Slot::of(number).ok_or_else(|| {
                VmError::Spec(format!("A VM has at most {MAX_VIRTIO} devices, not {count}"))
            })?;
            let worker = Worker::start(&label, device, memory.clone(), line(slot))?;
            places.push(Placed { registers: Registers::default(), worker });
        }
        Ok(Self { places })
    }

    /// Has KVM turn kicks into events, so that no vCPU leaves the guest for longer than that.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn register_kicks(&self, guest: &Backed) -> Result<()> {
        for (number, placed) in self.places.iter().enumerate() {
            let Some(slot) = Slot::of(number) else { continue };
            let poller = &placed.worker.shared().poller;
            for queue in 0u32.. {
                let Some(event) = poller.kick_event(queue as usize) else { break };
                let at = IoEventAddress::Mmio(slot.address + NOTIFY);
                guest.vm().register_ioevent(event, &at, queue).map_err(|error| {
                    VmError::refused("have KVM pass on kicks of a device", error)
                })?;
            }
        }
        Ok(())
    }

    /// The places that are taken.
    pub(crate) fn slots(&self) -> Vec<Slot> {
        (0..self.places.len()).filter_map(Slot::of).collect()
    }

    /// A device as its own thread has it.
    #[cfg(test)]
    pub(super) fn shared(&self, number: usize) -> &super::worker::Shared {
        self.places[number].worker.shared()
    }

    /// What all devices together ask of the kernel.
    pub(crate) fn allowed(&self) -> Allowed {
        let all = self.places.iter().map(|placed| placed.worker.shared().lock().device.allowed());
        all.fold(Allowed::default(), |sum, one| sum.and(&one))
    }

    /// A vCPU reads `data` at `address`; false when no device is there.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let found = self.find(address);
        if let Some((placed, offset)) = found {
            placed.registers.read(placed.worker.shared(), offset, data);
        }
        found.is_some()
    }

    /// A vCPU writes `data` at `address`; false when no device is there.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> bool {
        let found = self.find(address);
        if let Some((placed, offset)) = found {
            placed.registers.write(placed.worker.shared(), offset, data);
        }
        found.is_some()
    }

    fn find(&self, address: u64) -> Option<(&Placed, u64)> {
        let (number, offset) = Slot::find(address)?;
        Some((self.places.get(number)?, offset))
    }

    /// Stops every device. When this returns nothing of them is under way.
    pub(crate) fn pause(&self) {
        self.places.iter().for_each(|placed| placed.worker.pause());
    }

    /// Lets every device work.
    pub(crate) fn resume(&self) {
        self.places.iter().for_each(|placed| placed.worker.resume());
    }

    /// Stops the device called `label` until it is let go on, whatever becomes of the others. When this returns nothing
    /// of it is under way; false when there is none.
    pub(crate) fn hold(&self, label: &str) -> bool {
        let found = self.places.iter().find(|placed| placed.worker.shared().label == label);
        found.inspect(|placed| placed.worker.hold()).is_some()
    }

    /// None is held any more.
    pub(crate) fn let_go_on(&self) {
        self.places.iter().for_each(|placed| placed.worker.let_go_on());
    }

    /// Resets every device, as the machine's reset line does.
    pub(crate) fn reset(&self) {
        for placed in &self.places {
            placed.registers.write(placed.worker.shared(), 0x70, &[0; 4]);
        }
    }

    /// The kinds of the sections of all devices.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = String> {
        self.places.iter().map(|placed| state::kind(&placed.worker.shared().label))
    }

    /// The sections of all devices, while they are paused.
    pub(crate) fn save(&self) -> Vec<Section> {
        let one = |placed: &Placed| state::encode(placed.worker.shared(), &placed.registers);
        self.places.iter().map(one).collect()
    }

    /// Puts devices that never worked into the state that `take` gives of each, by the kind of its section.
    ///
    /// # Errors
    /// When one did not come, or is of another device.
    pub(crate) fn load<'a>(
        &self,
        mut take: impl FnMut(String) -> Result<&'a Section>,
    ) -> Result<()> {
        for placed in &self.places {
            let shared = placed.worker.shared();
            state::load(shared, &placed.registers, take(state::kind(&shared.label))?)?;
        }
        Ok(())
    }
}

impl fmt::Debug for VirtioBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.places.iter().map(|placed| placed.worker.shared())).finish()
    }
}
