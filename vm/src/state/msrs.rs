//! Model-specific registers: which of them travel, and how they are read and written.
//!
//! KVM stops at the first register that it refuses and says how many it took. Here the refused one
//! is named. Two refusals are no loss and are let pass: a register that KVM lists but this vCPU
//! cannot read (the guest cannot have written it either), and a write of the very value that the
//! fresh vCPU has already, or of zero to a register that this KVM does not list (a guest that never
//! used it).

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::error::{Result, VmError};

/// The time stamp counter; travels only where there is no TSC offset.
pub(crate) const TSC: u32 = 0x10;
/// When the local APIC's timer fires in TSC-deadline mode.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
/// Supervisor state components; some kernels do not list it.
const XSS: u32 = 0xda0;
/// A write of these makes KVM write the wall clock into guest memory.
const WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];
/// Hyper-V's synthetic registers.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// Registers asked for in one call.
const CHUNK: usize = 64;
/// The most registers that a section may hold.
pub(crate) const MAX: usize = 2048;
/// Bytes of one register in a section: `index: u32, value: u64`.
pub(crate) const ROW_BYTES: usize = 12;

/// A register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Msr {
    pub(crate) index: u32,
    pub(crate) value: u64,
}

impl Msr {
    /// As it stands in a section.
    pub(crate) fn to_bytes(self) -> [u8; ROW_BYTES] {
        let mut row = [0; ROW_BYTES];
        row[..4].copy_from_slice(&self.index.to_le_bytes());
        row[4..].copy_from_slice(&self.value.to_le_bytes());
        row
    }

    /// The reverse of [`Msr::to_bytes`].
    pub(crate) fn from_bytes(row: [u8; ROW_BYTES]) -> Self {
        let [a, b, c, d, value @ ..] = row;
        Self { index: u32::from_le_bytes([a, b, c, d]), value: u64::from_le_bytes(value) }
    }
}

/// The registers that travel from this host: all that KVM lists as state, and IA32_XSS.
pub(crate) fn listed(kvm: &Kvm) -> Result<Vec<u32>> {
    let list = kvm
        .get_msr_index_list()
        .map_err(|error| VmError::refused("list the model-specific registers", error))?;
    let mut indexes = list.as_slice().to_vec();
    if !indexes.contains(&XSS) {
        indexes.push(XSS);
    }
    Ok(indexes)
}

/// The registers that say what a CPU is. KVM takes another value for one only before the vCPU runs.
pub(crate) fn features(kvm: &Kvm) -> Result<Vec<u32>> {
    if !kvm.check_extension(Cap::GetMsrFeatures) {
        return Ok(Vec::new());
    }
    let list = kvm.get_msr_feature_index_list();
    let list = list.map_err(|error| {
        VmError::refused("list the model-specific registers that say what a CPU is", error)
    })?;
    Ok(list.as_slice().to_vec())
}

/// Those of `read` that hold anything for a guest. Kernels list registers that the CPU does not have (Linux 6.1 those
/// of Intel's counters on AMD), which read as zero and are let go as such when they arrive. Hyper-V's are for those
/// who are told that they run on it, and no guest is.
pub(crate) fn of_the_guest(read: &[Msr]) -> Vec<u32> {
    let holds = |msr: &&Msr| msr.value != 0 && !HYPER_V.contains(&msr.index);
    read.iter().filter(holds).map(|msr| msr.index).collect()
}

/// Reads `indexes` from vCPU `number`, in chunks; those that it does not have are left out.
pub(crate) fn read(vcpu: &VcpuFd, number: u32, indexes: &[u32]) -> Result<Vec<Msr>> {
    let mut read = Vec::with_capacity(indexes.len());
    let mut rest = indexes;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(CHUNK)];
        let taken = read_chunk(vcpu, number, chunk, &mut read)?;
        if taken < chunk.len() {
            tracing::debug!("vCPU {number} has no model-specific register {:#x}", chunk[taken]);
            rest = &rest[taken + 1..];
        } else {
            rest = &rest[taken..];
        }
    }
    Ok(read)
}

/// Writes `msrs` to vCPU `number`, in chunks. `known` are the registers that this host lists.
pub(crate) fn write(vcpu: &VcpuFd, number: u32, msrs: &[Msr], known: &[u32]) -> Result<()> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(CHUNK)];
        let taken = vcpu
            .set_msrs(&entries(chunk, number)?)
            .map_err(|error| VmError::refused(format!("write MSRs of vCPU {number}"), error))?;
        if taken >= chunk.len() {
            rest = &rest[chunk.len()..];
            continue;
        }
        let refused = chunk[taken];
        let mut here = Vec::new();
        read_chunk(vcpu, number, &[refused.index], &mut here)?;
        let same = here.first().is_some_and(|msr| msr.value == refused.value);
        let unused = refused.value == 0 && !known.contains(&refused.index);
        if !same && !unused {
            return Err(VmError::Msr {
                what: "write",
                index: refused.index,
                vcpu: number,
                detail: format!(" (value {:#x})", refused.value),
            });
        }
        rest = &rest[taken + 1..];
    }
    Ok(())
}

/// Whether the register must be written after everything else: the deadline needs the local APIC, and the
/// counter and the wall clock need the clock.
pub(crate) fn is_late(index: u32) -> bool {
    index == TSC || index == TSC_DEADLINE || WALL_CLOCK.contains(&index)
}

/// How many of `chunk` were read before one was refused.
fn read_chunk(vcpu: &VcpuFd, number: u32, chunk: &[u32], into: &mut Vec<Msr>) -> Result<usize> {
    let wanted: Vec<_> = chunk.iter().map(|index| Msr { index: *index, value: 0 }).collect();
    let mut msrs = entries(&wanted, number)?;
    let taken = vcpu
        .get_msrs(&mut msrs)
        .map_err(|error| VmError::refused(format!("read MSRs of vCPU {number}"), error))?
        .min(chunk.len());
    let read = &msrs.as_slice()[..taken];
    into.extend(read.iter().map(|entry| Msr { index: entry.index, value: entry.data }));
    Ok(taken)
}

fn entries(msrs: &[Msr], number: u32) -> Result<Msrs> {
    let raw: Vec<_> = msrs
        .iter()
        .map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() })
        .collect();
    Msrs::from_entries(&raw)
        .map_err(|_| VmError::State(format!("{} MSRs of vCPU {number} are too many", raw.len())))
}
