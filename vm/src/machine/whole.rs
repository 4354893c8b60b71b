//! The whole state of a machine but its memory: read from it, written as sections, and read from those.

use std::collections::BTreeMap;
use std::ops::Deref;

use decamp_shared::workload::Section;
use kvm_ioctls::VcpuFd;

use crate::error::{Result, VmError};
use crate::ports::Ports;
use crate::power::PowerState;
use crate::serial::PortState;
use crate::state::vcpu::{HostFacts, VcpuState};
use crate::state::vm::VmState;
use crate::state::{power, serial, vcpu, vm};
use crate::sys::Backed;

/// The state of everything but memory.
#[derive(Clone, Debug)]
pub(super) struct Whole {
    pub(super) serial: PortState,
    pub(super) power: PowerState,
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) virtio: Vec<Section>,
    pub(super) vm: VmState,
}

impl Whole {
    /// Reads it, every vCPU parked and every device paused.
    pub(super) fn read(
        ports: &Ports,
        vcpus: &[impl Deref<Target = VcpuFd>],
        guest: &Backed,
        host: &HostFacts,
        memory_bytes: u64,
    ) -> Result<Self> {
        // Before the interrupt chips, whose lines it drives. Nobody types meanwhile.
        let serial = ports.serial().state();
        let power = ports.power().state();
        let virtio = ports.virtio().save();
        let vcpus = (0u32..)
            .zip(vcpus)
            .map(|(number, fd)| VcpuState::read(fd, number, host))
            .collect::<Result<_>>()?;
        Ok(Self { serial, power, virtio, vcpus, vm: VmState::read(guest.vm(), memory_bytes)? })
    }

    /// Its sections.
    pub(super) fn encode(self) -> Vec<Section> {
        let vcpus = (0u32..).zip(&self.vcpus).map(|(number, state)| state.encode(number));
        let ports = [serial::encode(&self.serial), power::encode(&self.power)];
        let rest = ports.into_iter().chain(vcpus).chain([self.vm.encode()]);
        self.virtio.into_iter().chain(rest).collect()
    }

    /// Decodes the sections of a machine with the vCPUs `numbers`, the devices of `ports` and so much memory, all
    /// of them before any is put to use. Each must be used up.
    pub(super) fn decode(
        sections: &[Section],
        numbers: &[u32],
        ports: &Ports,
        memory_bytes: u64,
    ) -> Result<Self> {
        let mut rest = BTreeMap::new();
        for section in sections {
            if rest.insert(section.kind.clone(), section).is_some() {
                return Err(VmError::section(&section.kind, "it came twice"));
            }
        }
        let mut take = |kind: String| {
            let found = rest.remove(&kind);
            found.ok_or_else(|| VmError::section(kind, "it did not come"))
        };
        let vcpus = numbers.iter().map(|number| VcpuState::decode(take(vcpu::kind(*number))?));
        let vcpus = vcpus.collect::<Result<_>>()?;
        let virtio = ports.virtio().kinds().map(|kind| Ok(take(kind)?.clone()));
        let virtio = virtio.collect::<Result<_>>()?;
        let arrived = Self {
            serial: serial::decode(take(serial::KIND.into())?)?,
            power: power::decode(take(power::KIND.into())?)?,
            vm: VmState::decode(take(vm::KIND.into())?)?,
            vcpus,
            virtio,
        };
        if let Some(kind) = rest.keys().next() {
            return Err(VmError::section(kind, "this VM has nothing that it belongs to"));
        }
        if arrived.vm.memory_bytes != memory_bytes {
            let reason = format!(
                "it is of a VM with {} bytes of memory, this one has {memory_bytes}",
                arrived.vm.memory_bytes
            );
            return Err(VmError::section(vm::KIND, reason));
        }
        Ok(arrived)
    }
}
