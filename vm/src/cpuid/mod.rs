//! What a guest sees of its CPU: the CPUID entries that a fresh guest gets, and the comparison of
//! one host's entries with another's before a move. What features are called is in [`names`], what several
//! hosts have in common in [`baseline`], and what registers tell beside the entries in [`registers`].

pub(crate) mod baseline;
mod names;
pub(crate) mod registers;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::error::{Result, VmError};
use crate::topology;
use names::feature_name;
use registers::FeatureRegister;

/// The most entries that KVM takes.
pub(crate) const MAX_ENTRIES: usize = KVM_MAX_CPUID_ENTRIES;
/// Bytes of one entry in a state section.
pub(crate) const ENTRY_BYTES: usize = 28;

const ECX_VMX: u32 = 1 << 5;
/// In leaf 0x8000_0001.
const ECX_SVM: u32 = 1 << 2;
const SVM_LEAF: u32 = 0x8000_000a;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_OSXSAVE: u32 = 1 << 27;
const ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF7_ECX_OSPKE: u32 = 1 << 4;
const LEAF6_EAX_ARAT: u32 = 1 << 2;
/// Vectors of 128, 256 and 512 bits.
const LEAF24_EBX_LENGTHS: u32 = 0b111 << 16;
/// The leaf that names the hypervisor and its last leaf.
const HYPERVISOR: u32 = 0x4000_0000;
/// Frequencies of the time stamp counter and of the local APIC's bus, in kHz.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// KVM's local APIC counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// One CPUID leaf (and subleaf) as a guest reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidEntry {
    /// Leaf (EAX on the way in).
    pub leaf: u32,
    /// Subleaf (ECX on the way in).
    pub subleaf: u32,
    /// KVM_CPUID_FLAG_*.
    pub flags: u32,
    /// EAX on the way out.
    pub eax: u32,
    /// EBX on the way out.
    pub ebx: u32,
    /// ECX on the way out.
    pub ecx: u32,
    /// EDX on the way out.
    pub edx: u32,
}

impl CpuidEntry {
    /// As it stands in a state section: seven little-endian words.
    pub(crate) fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let words = [self.leaf, self.subleaf, self.flags, self.eax, self.ebx, self.ecx, self.edx];
        let mut bytes = [0; ENTRY_BYTES];
        for (chunk, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *chunk = word.to_le_bytes();
        }
        bytes
    }

    /// The reverse of [`CpuidEntry::to_bytes`].
    pub(crate) fn from_bytes(bytes: [u8; ENTRY_BYTES]) -> Self {
        let mut words = [0u32; 7];
        for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*chunk);
        }
        let [leaf, subleaf, flags, eax, ebx, ecx, edx] = words;
        Self { leaf, subleaf, flags, eax, ebx, ecx, edx }
    }
}

impl From<&kvm_cpuid_entry2> for CpuidEntry {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        Self {
            leaf: entry.function,
            subleaf: entry.index,
            flags: entry.flags,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        }
    }
}

impl From<&CpuidEntry> for kvm_cpuid_entry2 {
    fn from(entry: &CpuidEntry) -> Self {
        Self {
            function: entry.leaf,
            index: entry.subleaf,
            flags: entry.flags,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
            ..Default::default()
        }
    }
}

/// What a fresh guest sees on this host: what KVM supports, with the bits that the VMM answers for, and the
/// counter's frequency in the leaf that hypervisors have agreed on for it. What differs from one vCPU to the
/// next is [`crate::topology`]'s. Virtualisation within the guest is left out: its state does not travel.
pub(crate) fn for_guest(kvm: &Kvm, tsc_khz: u32) -> Result<Vec<CpuidEntry>> {
    let supported = kvm
        .get_supported_cpuid(MAX_ENTRIES)
        .map_err(|error| VmError::refused("read the CPUID that KVM supports", error))?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut entries: Vec<_> = supported.as_slice().iter().map(CpuidEntry::from).collect();
    entries.retain(|entry| ![HYPERVISOR_TIMING, SVM_LEAF].contains(&entry.leaf));
    for entry in &mut entries {
        match entry.leaf {
            1 => {
                entry.ecx |= ECX_HYPERVISOR;
                entry.ecx &= !ECX_VMX;
                if deadline {
                    entry.ecx |= ECX_TSC_DEADLINE;
                }
            }
            0x8000_0001 => entry.ecx &= !ECX_SVM,
            HYPERVISOR => entry.eax = entry.eax.max(HYPERVISOR_TIMING),
            _ => {}
        }
    }
    entries.push(CpuidEntry {
        leaf: HYPERVISOR_TIMING,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    });
    Ok(entries)
}

/// Gives `vcpu`, which has not run, these entries, and says what it has then. That can be more: a
/// KVM without hardware virtualisation cannot keep an instruction from saying what the CPU has.
pub(crate) fn grant(vcpu: &VcpuFd, entries: &[CpuidEntry]) -> Result<Vec<CpuidEntry>> {
    vcpu.set_cpuid2(&to_kvm(entries)?)
        .map_err(|error| VmError::refused("set the CPUID of a vCPU", error))?;
    read(vcpu).map_err(|error| VmError::refused("read the CPUID of a vCPU", error))
}

/// What `vcpu` has.
pub(crate) fn read(vcpu: &VcpuFd) -> std::result::Result<Vec<CpuidEntry>, kvm_ioctls::Error> {
    Ok(filled(vcpu.get_cpuid2(MAX_ENTRIES)?.as_slice().iter().map(CpuidEntry::from).collect()))
}

/// Without the entries at the end that KVM did not fill in: Linux 6.1 gives back the number that there is
/// room for instead of the one that there are.
fn filled(mut entries: Vec<CpuidEntry>) -> Vec<CpuidEntry> {
    let last = entries.iter().rposition(|entry| *entry != CpuidEntry::default());
    entries.truncate(last.map_or(0, |last| last + 1));
    entries
}

/// What a host can offer a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offered {
    /// What a fresh guest sees.
    pub(crate) entries: Vec<CpuidEntry>,
    /// What it can be told by registers.
    pub(crate) registers: Vec<FeatureRegister>,
    /// Frequency of its counter.
    pub(crate) tsc_khz: u32,
}

impl Offered {
    /// By this host, as a vCPU has it that is made for the purpose.
    pub(crate) fn here(kvm: &Kvm) -> Result<Self> {
        let (_vm, vcpu) = trial(kvm)?;
        let (entries, tsc_khz) = own(kvm, &vcpu)?;
        Ok(Self { entries, registers: registers::of_this_host(kvm, &vcpu)?, tsc_khz })
    }

    /// Everything that a guest with `entries` and `registers` was told and would not be here, in words; empty when it
    /// can come.
    pub(crate) fn lacks(
        &self,
        entries: &[CpuidEntry],
        registers: &[FeatureRegister],
    ) -> Vec<String> {
        let mut lacks = missing(entries, &self.entries);
        lacks.extend(registers::missing(entries, registers, &self.registers));
        lacks
    }
}

/// What a guest on this host sees, and the frequency of its counter in kHz, from a vCPU made for
/// the purpose.
pub(crate) fn of_this_host(kvm: &Kvm) -> Result<(Vec<CpuidEntry>, u32)> {
    let (_vm, vcpu) = trial(kvm)?;
    own(kvm, &vcpu)
}

/// Grants `vcpu`, which is the first of a VM of its own, what a fresh guest gets here.
fn own(kvm: &Kvm, vcpu: &VcpuFd) -> Result<(Vec<CpuidEntry>, u32)> {
    let khz = vcpu
        .get_tsc_khz()
        .map_err(|error| VmError::refused("read the frequency of a vCPU's counter", error))?;
    let mut entries = for_guest(kvm, khz)?;
    topology::place(&mut entries, 0, 1);
    Ok((grant(vcpu, &entries)?, khz))
}

/// A vCPU that nobody runs, in a VM without memory, to see what KVM makes of it.
fn trial(kvm: &Kvm) -> Result<(VmFd, VcpuFd)> {
    let failed = |error| VmError::refused("make a vCPU to see its CPUID", error);
    let vm = kvm.create_vm().map_err(failed)?;
    vm.create_irq_chip().map_err(failed)?;
    let vcpu = vm.create_vcpu(0).map_err(failed)?;
    Ok((vm, vcpu))
}

/// The entries as KVM takes them.
pub(crate) fn to_kvm(entries: &[CpuidEntry]) -> Result<CpuId> {
    let raw: Vec<kvm_cpuid_entry2> = entries.iter().map(kvm_cpuid_entry2::from).collect();
    CpuId::from_entries(&raw)
        .map_err(|_| VmError::State(format!("{} CPUID entries are too many", entries.len())))
}

/// Everything that a guest with `guest` sees and a guest on a host with `host` would not, in words;
/// empty when it can come.
pub(crate) fn missing(guest: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<String> {
    let mut missing = Vec::new();
    for entry in guest {
        let here = host
            .iter()
            .find(|other| (other.leaf, other.subleaf) == (entry.leaf, entry.subleaf))
            .copied()
            .unwrap_or_default();
        match (entry.leaf, entry.subleaf) {
            (0xd, 0..=1) | (0xd, 63..) => {}
            (0xd, component) => missing.extend(moved_component(component, entry, &here)),
            (0x8000_0008, _) => missing.extend(narrower_addresses(entry, &here)),
            _ => {}
        }
        missing.extend(fewer(entry, &here));
        let features = feature_registers(entry, &here);
        for (register, wanted, have) in features.into_iter().chain(features_of_host(entry, &here)) {
            let absent = wanted & !have;
            missing.extend(
                (0..32)
                    .filter(|bit| absent & (1 << bit) != 0)
                    .map(|bit| feature_name(entry.leaf, entry.subleaf, register, bit)),
            );
        }
    }
    missing
}

/// Registers of `entry` that are sets of feature bits, as (name, the guest's, the host's).
fn feature_registers(entry: &CpuidEntry, here: &CpuidEntry) -> Vec<(&'static str, u32, u32)> {
    let (wanted_edx, wanted_ecx) = topology::without_counts(entry.leaf, entry.edx, entry.ecx);
    let eax = ("EAX", entry.eax, here.eax);
    let ebx = ("EBX", entry.ebx, here.ebx);
    let ecx = ("ECX", wanted_ecx, here.ecx);
    let edx = ("EDX", wanted_edx, here.edx);
    match (entry.leaf, entry.subleaf) {
        // OSXSAVE and OSPKE follow the guest's CR4; KVM sets them.
        (1, _) => vec![("ECX", entry.ecx & !ECX_OSXSAVE, here.ecx), edx],
        (7, 0) => vec![ebx, ("ECX", entry.ecx & !LEAF7_ECX_OSPKE, here.ecx), edx],
        (7, 1) => vec![eax, ebx, ecx, edx],
        (7, 2) => vec![edx],
        (0xd, 0) => vec![eax, edx],
        (0xd, 1) => vec![eax, ecx, edx],
        (0x8000_0001, _) => vec![ecx, edx],
        (0x8000_0007, _) => vec![edx],
        (0x8000_0008, _) => vec![ebx],
        (0x8000_0021, _) => vec![eax, ecx],
        (0x4000_0001, _) => vec![eax, edx],
        _ => Vec::new(),
    }
}

/// The same of leaves that a baseline takes whole or not at all.
fn features_of_host(entry: &CpuidEntry, here: &CpuidEntry) -> Option<(&'static str, u32, u32)> {
    match (entry.leaf, entry.subleaf) {
        // That the timer goes on in deep sleep; the rest is of what guests do not have.
        (6, _) => Some(("EAX", entry.eax & LEAF6_EAX_ARAT, here.eax)),
        (0x1e, 1) => Some(("EAX", entry.eax, here.eax)),
        (0x24, 0) => Some(("EBX", entry.ebx & LEAF24_EBX_LENGTHS, here.ebx)),
        (0x8000_0022, _) => Some(("EAX", entry.eax, here.eax)),
        _ => None,
    }
}

/// Bits of a register that are a number: leaf, subleaf, register, lowest bit, how many, and what they count.
type Count = (u32, u32, fn(&CpuidEntry) -> u32, u32, u32, &'static str);

const COUNTS: &[Count] = &[
    (0xa, 0, |one| one.eax, 0, 8, "version of performance monitoring"),
    (0xa, 0, |one| one.eax, 8, 8, "performance counters"),
    (0xa, 0, |one| one.eax, 16, 8, "bits of a performance counter"),
    (0xa, 0, |one| one.edx, 0, 5, "fixed performance counters"),
    (0xa, 0, |one| one.edx, 5, 8, "bits of a fixed performance counter"),
    (0x24, 0, |one| one.ebx, 0, 8, "version of AVX10"),
    (0x8000_0022, 0, |one| one.ebx, 0, 4, "performance counters of a core"),
];

/// What a guest counts on more of than there is here; and tiles of other sizes, which are others.
fn fewer(entry: &CpuidEntry, here: &CpuidEntry) -> Vec<String> {
    let sizes = |one: &CpuidEntry| (one.eax, one.ebx, one.ecx, one.edx);
    // KVM has the leaf, without any, also where there are no tiles.
    if entry.leaf == 0x1d && sizes(entry) != (0, 0, 0, 0) && sizes(entry) != sizes(here) {
        return vec![format!("tiles of the same sizes (CPUID 0x1d.{})", entry.subleaf)];
    }
    let at = |count: &&Count| (count.0, count.1) == (entry.leaf, entry.subleaf);
    COUNTS
        .iter()
        .filter(at)
        .map(|(.., register, shift, bits, what)| {
            let number = |one| (register(one) >> shift) & ((1 << bits) - 1);
            (what, number(entry), number(here))
        })
        .filter(|(_, wanted, have)| wanted > have)
        .map(|(what, wanted, have)| format!("{what}: {wanted} (here {have})"))
        .collect()
}

fn find(entries: &[CpuidEntry], leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
    entries.iter().find(|entry| (entry.leaf, entry.subleaf) == (leaf, subleaf))
}

/// Who made the CPU.
fn maker(entries: &[CpuidEntry]) -> String {
    let Some(entry) = find(entries, 0, 0) else { return String::new() };
    let words = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes);
    String::from_utf8_lossy(words.as_flattened()).into_owned()
}

/// Whether AMD made it, or Hygon by AMD's design.
fn is_amd(entries: &[CpuidEntry]) -> bool {
    ["AuthenticAMD", "HygonGenuine"].contains(&maker(entries).as_str())
}

/// How many bytes the extended state takes that a guest with `guest` may have.
pub(crate) fn extended_state_bytes(guest: &[CpuidEntry]) -> usize {
    let whole = guest.iter().find(|entry| (entry.leaf, entry.subleaf) == (0xd, 0));
    // The user's alone: KVM keeps what the supervisor has elsewhere, in registers.
    whole.map_or(0, |entry| entry.ecx as usize)
}

/// A component of the extended state must have the size and the place that the guest knows.
fn moved_component(component: u32, entry: &CpuidEntry, here: &CpuidEntry) -> Option<String> {
    // Size 0: the guest has no such component. Bit 0 of ECX: a supervisor component, no place.
    let fits =
        entry.eax == 0 || (entry.eax == here.eax && (entry.ecx & 1 != 0 || entry.ebx == here.ebx));
    (!fits).then(|| {
        format!(
            "extended state component {component} of {} bytes at {} (here {} bytes at {})",
            entry.eax, entry.ebx, here.eax, here.ebx
        )
    })
}

/// The guest's page tables may use as many address bits as it was told.
fn narrower_addresses(entry: &CpuidEntry, here: &CpuidEntry) -> Vec<String> {
    [("physical", 0u32), ("linear", 8)]
        .into_iter()
        .map(|(what, shift)| (what, (entry.eax >> shift) & 0xff, (here.eax >> shift) & 0xff))
        .filter(|(_, wanted, have)| wanted > have)
        .map(|(what, wanted, have)| format!("{wanted} bits of {what} address (here {have})"))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(leaf: u32, subleaf: u32, registers: [u32; 4]) -> CpuidEntry {
        let [eax, ebx, ecx, edx] = registers;
        CpuidEntry { leaf, subleaf, flags: 0, eax, ebx, ecx, edx }
    }

    #[test]
    fn what_kvm_did_not_fill_in_is_left_out() {
        let own = [entry(0, 0, [13, 1, 2, 3]), entry(2, 0, [0; 4]), entry(7, 0, [0; 4])];
        let room = [&own[..], &[CpuidEntry::default(); 5]].concat();
        assert_eq!(filled(room), own);
        assert_eq!(filled(own.to_vec()), own);
        assert_eq!(filled(vec![CpuidEntry::default(); 3]), []);
    }

    #[test]
    fn a_missing_feature_is_named() {
        let guest = [entry(7, 0, [0, 1 << 5 | 1 << 20, 0, 0])];
        let host = [entry(7, 0, [0, 1 << 20, 0, 0])];
        assert_eq!(missing(&guest, &host), ["avx2 (CPUID 0x7.0 EBX bit 5)"]);
        assert!(missing(&host, &guest).is_empty());
        assert!(missing(&guest, &guest).is_empty());
    }

    #[test]
    fn fewer_of_what_a_guest_counts_on_is_named() {
        let counters = |many: u32| entry(0xa, 0, [2 | many << 8 | 48 << 16, 0, 0, 3 | 48 << 5]);
        assert_eq!(missing(&[counters(8)], &[counters(4)]), ["performance counters: 8 (here 4)"]);
        assert!(missing(&[counters(4)], &[counters(8)]).is_empty());
        assert_eq!(missing(&[counters(4)], &[]).len(), 5);
        let zen = |eax: u32, many: u32| entry(0x8000_0022, 0, [eax, many, 0, 0]);
        assert_eq!(
            missing(&[zen(1, 6)], &[zen(0, 4)]),
            [
                "performance counters of a core: 6 (here 4)",
                "perfmon_v2 (CPUID 0x80000022.0 EAX bit 0)"
            ]
        );
        let avx = |version: u32| entry(0x24, 0, [0, 0b11 << 16 | version, 0, 0]);
        assert_eq!(missing(&[avx(2)], &[avx(1)]), ["version of AVX10: 2 (here 1)"]);
        let tiles = |bytes: u32| entry(0x1d, 1, [bytes, 0, 0, 0]);
        assert_eq!(missing(&[tiles(8192)], &[tiles(4096)]).len(), 1);
        assert!(missing(&[tiles(8192)], &[tiles(8192)]).is_empty());
        assert!(missing(&[tiles(0)], &[tiles(8192)]).is_empty());
        // What is said of a processor's heat is nothing to a guest.
        assert_eq!(missing(&[entry(6, 0, [7, 1, 1, 0])], &[]), ["arat (CPUID 0x6.0 EAX bit 2)"]);
    }

    #[test]
    fn a_leaf_that_is_not_there_lacks_every_bit() {
        let guest = [entry(7, 2, [0, 0, 0, 0b11])];
        assert_eq!(missing(&guest, &[]).len(), 2);
    }

    #[test]
    fn bits_that_follow_the_guests_cr4_do_not_count() {
        let guest = [entry(1, 0, [0, 0, ECX_OSXSAVE, 0]), entry(7, 0, [0, 0, LEAF7_ECX_OSPKE, 0])];
        assert!(missing(&guest, &[]).is_empty());
    }

    #[test]
    fn the_place_of_extended_state_and_address_widths_count() {
        let pkru = |at| entry(0xd, 9, [8, at, 0, 0]);
        assert!(
            missing(&[pkru(2688)], &[pkru(2432)])[0].contains("at 2688 (here 8 bytes at 2432)")
        );
        let width = |bits| entry(0x8000_0008, 0, [bits, 0, 0, 0]);
        assert!(missing(&[width(0x3030)], &[width(0x302e)])[0].contains("48 bits of physical"));
        assert!(missing(&[width(0x302e)], &[width(0x3030)]).is_empty());
    }

    proptest! {
        #[test]
        fn bytes_round_trip(words in prop::array::uniform7(any::<u32>())) {
            let [leaf, subleaf, flags, eax, ebx, ecx, edx] = words;
            let entry = CpuidEntry { leaf, subleaf, flags, eax, ebx, ecx, edx };
            prop_assert_eq!(CpuidEntry::from_bytes(entry.to_bytes()), entry);
        }
    }
}
