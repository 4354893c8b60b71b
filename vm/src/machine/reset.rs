//! A machine that begins anew because its guest asked for it.

use super::Machine;
use crate::boot;
use crate::error::Result;
use crate::vcpu::{Reset, Vcpu};

impl Machine {
    /// Why the guest is to be started anew, if a vCPU waits for that: a fault only if none asked.
    pub(crate) fn awaits_reset(&self) -> Option<Reset> {
        let mut whys = self.vcpus.iter().filter_map(Vcpu::awaits_reset);
        let first = whys.next()?;
        Some(whys.find(|why| *why == Reset::Asked).unwrap_or(first))
    }

    /// Starts the guest anew if a vCPU asked for it: everything but its memory's size, its counter and its clock
    /// is as it was at the very first. It runs on, unless it is paused.
    ///
    /// # Errors
    /// When the guest cannot go on: what it boots from is gone, or KVM refuses. No vCPU runs then, nor ever again.
    pub(crate) fn reset_if_asked(&mut self) -> Result<()> {
        if self.awaits_reset().is_none() {
            return Ok(());
        }
        self.must_live()?;
        let reset = self.reset();
        if let Err(error) = &reset {
            // Its memory may be gone.
            self.vcpus.iter().for_each(Vcpu::ask_to_park);
            self.dead = Some(format!("it could not be started anew: {}", error.with_causes()));
        }
        reset
    }

    fn reset(&mut self) -> Result<()> {
        self.park()?;
        // Nothing of what its drivers asked for reaches memory after this.
        self.ports.virtio().pause();
        self.ports.virtio().reset();
        let memory = self.guest.memory();
        // A move under way sends it as the zeros that it is now: it counts as written.
        memory.clear()?;
        let entry = boot::load(&self.spec, &self.files, memory, &self.ports.virtio().slots())?;
        self.ports.serial().load(self.first.serial.clone())?;
        self.ports.power().load(self.first.power)?;
        for (vcpu, state) in self.vcpus.iter().zip(&self.first.vcpus) {
            state.write_again(&vcpu.fd(), vcpu.number(), &self.host)?;
        }
        self.first.vm.write_again(self.guest.vm())?;
        if let Some(first) = self.vcpus.first() {
            boot::enter(&first.fd(), entry)?;
        }
        self.vcpus.iter().for_each(Vcpu::was_reset);
        if self.paused { Ok(()) } else { self.run() }
    }
}
