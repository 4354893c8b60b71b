//! What the CPUs of several hosts have in common, and what a guest sees of one host's CPU that is held to that:
//! entries of CPUID narrowed until nothing in them stands alone. Files and offers are not known here.

use super::super::{CpuidEntry, HYPERVISOR, HYPERVISOR_TIMING, feature_registers, find};

/// What the legacy area and the header of XSAVE take.
pub(super) const XSAVE_BASE: u32 = 576;

/// Features that need a component of the user's extended state: (component, leaf, subleaf, register, bits). The
/// first of a component is what stands for it: without that feature the component goes, too.
#[rustfmt::skip]
const NEED_STATE: &[(u32, u32, u32, Register, u32)] = &[
    (2, 1, 0, Register::Ecx, 1 << 28),
    (2, 1, 0, Register::Ecx, 1 << 12 | 1 << 29),
    (2, 7, 0, Register::Ebx, 1 << 5),
    (2, 7, 0, Register::Ecx, 1 << 9 | 1 << 10),
    (2, 7, 1, Register::Eax, 1 | 1 << 1 | 1 << 2 | 1 << 4 | 1 << 23),
    (2, 7, 1, Register::Edx, 1 << 4 | 1 << 5 | 1 << 10),
    (2, 0x8000_0001, 0, Register::Ecx, 1 << 11 | 1 << 16),
    (5, 7, 0, Register::Ebx, 1 << 16),
    (5, 7, 0, Register::Ebx, 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31),
    (5, 7, 0, Register::Ecx, 1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14),
    (5, 7, 0, Register::Edx, 1 << 2 | 1 << 3 | 1 << 8 | 1 << 23),
    (5, 7, 1, Register::Eax, 1 << 5),
    (5, 7, 1, Register::Edx, 1 << 19),
    (9, 7, 0, Register::Ecx, 1 << 3),
    (17, 7, 0, Register::Edx, 1 << 24),
    (17, 7, 0, Register::Edx, 1 << 22 | 1 << 25),
    (17, 7, 1, Register::Eax, 1 << 21),
    (17, 7, 1, Register::Edx, 1 << 8),
    (19, 7, 1, Register::Edx, 1 << 21),
];
/// Components that are there together or not at all.
const TOGETHER: &[&[u32]] = &[&[3, 4], &[5, 6, 7], &[17, 18]];
/// What needs another component: AVX-512 without AVX is no CPU.
const NEED_COMPONENT: &[(u32, u32)] = &[(5, 2)];

/// Leaves that tell how much there is of something, or what it is called, and no feature: the first host's.
const DESCRIBING: &[u32] = &[
    0x2,
    0x4,
    0xb,
    0x15,
    0x16,
    0x1a,
    0x1f,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0019,
    0x8000_001d,
    0x8000_001e,
    HYPERVISOR_TIMING,
];
/// Of those, and of leaf 1, what a guest is told of the host that it was started on.
const OF_THE_HOST: &[u32] = &[
    0x2,
    0x4,
    0xb,
    0x15,
    0x16,
    0x1a,
    0x1f,
    0x8000_0005,
    0x8000_0006,
    0x8000_0019,
    0x8000_001d,
    0x8000_001e,
    HYPERVISOR_TIMING,
];

/// In leaf 1: that there is IA32_PERF_CAPABILITIES, which nobody can be held to.
pub(super) const ECX_PDCM: u32 = 1 << 15;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// What a guest that is held to `baseline` sees of a CPU on which it would see `own`. Call it only where
/// [`super::Held::refusals`] has nothing to say.
pub(super) fn pin(own: &[CpuidEntry], baseline: &[CpuidEntry]) -> Vec<CpuidEntry> {
    let mut pinned = common(baseline, own);
    for entry in &mut pinned {
        let Some(here) = find(own, entry.leaf, entry.subleaf) else { continue };
        if OF_THE_HOST.contains(&entry.leaf) {
            *entry = *here;
        }
        if entry.leaf == 1 {
            entry.ebx = here.ebx;
        }
    }
    // Of the leaves that describe, each host has its own, and as many as it has.
    pinned.retain(|entry| {
        !OF_THE_HOST.contains(&entry.leaf) || find(own, entry.leaf, entry.subleaf).is_some()
    });
    for here in own.iter().filter(|here| OF_THE_HOST.contains(&here.leaf)) {
        if find(&pinned, here.leaf, here.subleaf).is_none() {
            pinned.push(*here);
        }
    }
    settle(&mut pinned, standing_alone(own) & standing_alone(baseline));
    pinned
}

/// What both have, described as the first is.
pub(super) fn common(one: &[CpuidEntry], other: &[CpuidEntry]) -> Vec<CpuidEntry> {
    let both = |entry: &CpuidEntry| {
        let there = find(other, entry.leaf, entry.subleaf).copied();
        narrow(*entry, there.unwrap_or_default(), there.is_some())
    };
    one.iter().filter_map(both).collect()
}

/// The entry with what both have of it; nothing when it says something that is no set of features and differs.
fn narrow(mut entry: CpuidEntry, other: CpuidEntry, is_there: bool) -> Option<CpuidEntry> {
    let sets = feature_registers(&entry, &other);
    for (register, _, have) in &sets {
        let slot = match *register {
            "EAX" => &mut entry.eax,
            "EBX" => &mut entry.ebx,
            "ECX" => &mut entry.ecx,
            _ => &mut entry.edx,
        };
        *slot &= have;
    }
    match (entry.leaf, entry.subleaf) {
        (0 | 0x8000_0000 | HYPERVISOR, _) => entry.eax = entry.eax.min(other.eax),
        (7, 0) => entry.eax = entry.eax.min(other.eax),
        (0xd, 2..) if (entry.eax, entry.ebx, entry.ecx) != (other.eax, other.ebx, other.ecx) => {
            return None;
        }
        (0x8000_0008, _) => {
            let width = |shift: u32| {
                ((entry.eax >> shift) & 0xff).min((other.eax >> shift) & 0xff) << shift
            };
            entry.eax = width(0) | width(8) | width(16);
        }
        (leaf, _) if sets.is_empty() && !DESCRIBING.contains(&leaf) => {
            return (is_there && entry == other).then_some(entry);
        }
        _ => {}
    }
    // The flags are KVM's, and the same for a leaf wherever it is.
    Some(entry)
}

/// Takes out what stands alone: components without their features, features without their components, and
/// sizes that count what is gone. And what no guest can be held to. Components that stand alone on each of the hosts
/// themselves, `alone`, stay: a guest sees them wherever it runs.
pub(super) fn settle(entries: &mut [CpuidEntry], alone: u64) {
    hide(entries);
    let mut kept = components(entries);
    let has = |entries: &[CpuidEntry], component: u32| {
        find(entries, 0xd, component).is_some_and(|entry| entry.eax > 0)
    };
    for component in 2..63 {
        if !has(entries, component) {
            kept &= !(1 << component);
        }
    }
    kept &= alone | !standing_alone(entries);
    for group in TOGETHER {
        if group.iter().any(|one| kept & 1 << one == 0) {
            group.iter().for_each(|one| kept &= !(1 << one));
        }
    }
    for (component, needed) in NEED_COMPONENT {
        if kept & 1 << needed == 0 {
            let group = TOGETHER.iter().find(|group| group.contains(component));
            group.into_iter().flat_map(|group| group.iter()).for_each(|one| kept &= !(1 << one));
        }
    }
    for &(component, leaf, subleaf, register, bits) in NEED_STATE {
        let entry = entries.iter_mut().find(|one| (one.leaf, one.subleaf) == (leaf, subleaf));
        if let Some(entry) = entry.filter(|_| kept & 1 << component == 0) {
            clear(entry, register, bits);
        }
    }
    resize(entries, kept);
}

/// The user's components of the extended state.
fn components(entries: &[CpuidEntry]) -> u64 {
    find(entries, 0xd, 0).map_or(0, |entry| u64::from(entry.eax) | u64::from(entry.edx) << 32)
}

/// Components that `entries` show without the feature that stands for them, as a hypervisor does that hides the one and
/// not the other.
pub(super) fn standing_alone(entries: &[CpuidEntry]) -> u64 {
    let (mut alone, mut seen) = (0, u32::MAX);
    for &(component, leaf, subleaf, register, bits) in NEED_STATE {
        let stands_for_it = component != std::mem::replace(&mut seen, component);
        let is_there =
            find(entries, leaf, subleaf).is_some_and(|entry| get(entry, register) & bits != 0);
        if stands_for_it && !is_there {
            alone |= 1 << component;
        }
    }
    alone & components(entries)
}

/// Takes out what leads to registers that are in no baseline.
pub(super) fn hide(entries: &mut [CpuidEntry]) {
    entries
        .iter_mut()
        .filter(|entry| entry.leaf == 1)
        .for_each(|entry| clear(entry, Register::Ecx, ECX_PDCM));
}

/// Makes leaf 0xD say that the components `kept` are there, and no others of the user's.
fn resize(entries: &mut [CpuidEntry], kept: u64) {
    let end = (2..63)
        .filter(|component| kept & 1 << component != 0)
        .filter_map(|component| find(entries, 0xd, component))
        .map(|entry| entry.eax.saturating_add(entry.ebx))
        .fold(XSAVE_BASE, u32::max);
    let supervisor =
        find(entries, 0xd, 1).map_or(0, |one| u64::from(one.ecx) | u64::from(one.edx) << 32);
    let lost: Vec<u32> =
        (2..63).filter(|component| (kept | supervisor) & 1 << component == 0).collect();
    let there = |component: u32| find(entries, 0xd, component).is_some_and(|one| one.eax > 0);
    let supervised =
        (2..63).filter(|&component| there(component)).fold(0u64, |all, one| all | 1 << one);
    for entry in entries.iter_mut().filter(|entry| entry.leaf == 0xd) {
        match entry.subleaf {
            0 => {
                (entry.eax, entry.edx) = (kept as u32, (kept >> 32) as u32);
                (entry.ebx, entry.ecx) = (entry.ebx.min(end), end);
            }
            1 => {
                entry.ecx &= supervised as u32;
                entry.edx &= (supervised >> 32) as u32;
            }
            component if lost.contains(&component) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            _ => {}
        }
    }
}

fn get(entry: &CpuidEntry, register: Register) -> u32 {
    match register {
        Register::Eax => entry.eax,
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    }
}

pub(super) fn clear(entry: &mut CpuidEntry, register: Register, bits: u32) {
    match register {
        Register::Eax => entry.eax &= !bits,
        Register::Ebx => entry.ebx &= !bits,
        Register::Ecx => entry.ecx &= !bits,
        Register::Edx => entry.edx &= !bits,
    }
}
