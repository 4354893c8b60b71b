//! How a guest's vCPUs lie together: one package, a core for each, no two threads in one. APIC identities are
//! the vCPUs' numbers.
//!
//! Leaves and bits are those of Intel's manual (volume 2, CPUID) and AMD's (APM volume 3, appendix E).

use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

use crate::cpuid::CpuidEntry;

/// Leaf 1, EDX: there is room for more than one logical processor in the package.
const SEVERAL: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: those are cores. AMD's alone.
const SEVERAL_CORES: u32 = 1 << 1;
/// Levels of the extended topology leaves, in ECX.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Cache levels from here on are shared by the whole package.
const SHARED_CACHE: u32 = 3;

/// Makes `entries` those of vCPU `number` of `cpus`.
pub(crate) fn place(entries: &mut Vec<CpuidEntry>, number: u32, cpus: u32) {
    let extended: Vec<_> = [0xb, 0x1f].into_iter().filter(|leaf| has(entries, *leaf)).collect();
    entries.retain(|entry| !extended.contains(&entry.leaf));
    let several = cpus > 1;
    let bits = identity_bits(cpus);
    let is_amd = is_amd(entries);
    for entry in entries.iter_mut() {
        match entry.leaf {
            1 => {
                // Identity, and room for so many; eight bits each.
                let room = (1u32 << bits).min(0xff);
                entry.ebx = (entry.ebx & 0xffff) | (number << 24) | (room << 16);
                entry.edx = with(entry.edx, SEVERAL, several);
            }
            4 if entry.eax & 0x1f != 0 => {
                let cores = ((1u32 << bits) - 1).min(0x3f);
                entry.eax = sharing(entry.eax & !(0x3f << 26), bits) | (cores << 26);
            }
            0x8000_0001 if is_amd => entry.ecx = with(entry.ecx, SEVERAL_CORES, several),
            0x8000_0008 if is_amd => {
                let count = (cpus - 1).min(0xff);
                entry.ecx = (entry.ecx & !0xf0ff) | (bits << 12) | count;
            }
            0x8000_001d if entry.eax & 0x1f != 0 => entry.eax = sharing(entry.eax, bits),
            // Identity; core's number, one thread in it; one node.
            0x8000_001e => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (number, number & 0xff, 0, 0)
            }
            _ => {}
        }
    }
    for leaf in extended {
        let level = |subleaf, eax, ebx, level| CpuidEntry {
            leaf,
            subleaf,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: level | subleaf,
            edx: number,
        };
        entries.extend([
            level(0, 0, 1, LEVEL_THREAD),
            level(1, bits, cpus, LEVEL_CORE),
            level(2, 0, 0, 0),
        ]);
    }
}

/// The register of feature bits `(leaf, register)` without those that only tell how many vCPUs there are:
/// every host can give them.
pub(crate) fn without_counts(leaf: u32, edx: u32, ecx: u32) -> (u32, u32) {
    match leaf {
        1 => (edx & !SEVERAL, ecx),
        0x8000_0001 => (edx, ecx & !SEVERAL_CORES),
        _ => (edx, ecx),
    }
}

/// Bits that tell the identities of `cpus` vCPUs apart.
fn identity_bits(cpus: u32) -> u32 {
    u32::BITS - cpus.saturating_sub(1).leading_zeros()
}

/// A cache's EAX with how many processors share it, less one.
fn sharing(eax: u32, bits: u32) -> u32 {
    let level = (eax >> 5) & 0b111;
    let others = if level >= SHARED_CACHE { (1u32 << bits) - 1 } else { 0 };
    (eax & !(0xfff << 14)) | (others.min(0xfff) << 14)
}

fn with(register: u32, bit: u32, set: bool) -> u32 {
    if set { register | bit } else { register & !bit }
}

fn has(entries: &[CpuidEntry], leaf: u32) -> bool {
    entries.iter().any(|entry| entry.leaf == leaf)
}

/// `AuthenticAMD` and `HygonGenuine`.
fn is_amd(entries: &[CpuidEntry]) -> bool {
    entries.iter().any(|entry| entry.leaf == 0 && matches!(entry.ecx, 0x444d_4163 | 0x656e_6975))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(vendor: u32) -> Vec<CpuidEntry> {
        let entry = |leaf, subleaf, eax| CpuidEntry { leaf, subleaf, eax, ..Default::default() };
        let mut entries = vec![
            entry(0, 0, 0x1f),
            entry(1, 0, 0),
            // Data cache of level 1; one of level 3, which the host's 16 threads share.
            entry(4, 0, 0x0400_4121),
            entry(4, 1, 0x043c_0163),
            entry(4, 2, 0),
            entry(0xb, 0, 1),
            entry(0xb, 1, 4),
            entry(0x8000_0001, 0, 0),
            entry(0x8000_0008, 0, 0x3030),
            entry(0x8000_001d, 3, 0x0003_c163),
            entry(0x8000_001e, 0, 77),
        ];
        entries[0].ecx = vendor;
        entries[1].ebx = 0x0710_0800;
        entries[8].ecx = 0x400f;
        entries
    }

    fn find(entries: &[CpuidEntry], leaf: u32, subleaf: u32) -> CpuidEntry {
        let found = entries.iter().filter(|entry| (entry.leaf, entry.subleaf) == (leaf, subleaf));
        let found: Vec<_> = found.collect();
        assert_eq!(found.len(), 1, "leaf {leaf:#x}.{subleaf}");
        *found[0]
    }

    #[test]
    fn a_vcpu_is_a_core_of_one_package() {
        let mut amd = entries(0x444d_4163);
        place(&mut amd, 5, 6);
        assert_eq!(find(&amd, 1, 0).ebx, 0x0508_0800);
        assert_eq!(find(&amd, 1, 0).edx, SEVERAL);
        assert_eq!(find(&amd, 4, 0).eax, 0x1c00_0121, "a cache of its own");
        assert_eq!(find(&amd, 4, 1).eax, 0x1c01_c163, "one for all eight identities");
        assert_eq!(find(&amd, 4, 2).eax, 0);
        let thread = find(&amd, 0xb, 0);
        assert_eq!((thread.eax, thread.ebx, thread.ecx, thread.edx), (0, 1, 0x100, 5));
        let core = find(&amd, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        assert!(!has(&amd, 0x1f), "what the host has not is not made up");
        assert_eq!(find(&amd, 0x8000_0001, 0).ecx, SEVERAL_CORES);
        assert_eq!(find(&amd, 0x8000_0008, 0).ecx, 0x3005);
        assert_eq!(find(&amd, 0x8000_001d, 3).eax, 0x0001_c163);
        let node = find(&amd, 0x8000_001e, 0);
        assert_eq!((node.eax, node.ebx, node.ecx, node.edx), (5, 5, 0, 0));
    }

    #[test]
    fn one_vcpu_is_alone_and_intel_has_none_of_amds_leaves() {
        let mut intel = entries(0x6c65_746e);
        place(&mut intel, 0, 1);
        assert_eq!(find(&intel, 1, 0).ebx, 0x0001_0800);
        assert_eq!(find(&intel, 1, 0).edx, 0);
        assert_eq!(find(&intel, 4, 1).eax, 0x163);
        assert_eq!((find(&intel, 0xb, 1).eax, find(&intel, 0xb, 1).ebx), (0, 1));
        assert_eq!(find(&intel, 0x8000_0001, 0).ecx, 0);
        assert_eq!(find(&intel, 0x8000_0008, 0).ecx, 0x400f, "left as it was");
    }

    #[test]
    fn identities_need_as_many_bits_as_tell_them_apart() {
        let bits = [1, 2, 3, 4, 5, 8, 9, 64, 254].map(identity_bits);
        assert_eq!(bits, [0, 1, 2, 2, 3, 3, 4, 6, 8]);
    }
}
