//! Registers (MSRs) that tell a guest, beside CPUID, what its CPU is: which flaws it has not, and what can be done
//! about those that it has. Which they are, what their bits are called, how one host's are compared with another's,
//! and what several have in common. Registers that hold a guest's state are not these: [`crate::state::msrs`].
//!
//! Bits are those of Intel's manual (volume 4; IA32_ARCH_CAPABILITIES, IA32_CORE_CAPABILITIES,
//! IA32_PERF_CAPABILITIES, MSR_PLATFORM_INFO); `its_no` is Linux's own. The microcode's revision is not among them:
//! it changes under a running host. Nor is AMD's DE_CFG, which KVM does not list as what travels.

use std::collections::BTreeMap;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::{CpuidEntry, find, is_amd};
use crate::error::{Result, VmError};
use crate::state::msrs::{self, Msr};

/// The most that are taken from a peer or a file.
pub(crate) const MAX: usize = 64;

/// A register that says what a CPU is, and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureRegister {
    /// Number of the register.
    pub index: u32,
    /// What it holds. Written as `0x…`: programs that keep numbers as fractions lose the last bits of large ones.
    #[serde(with = "hexadecimal")]
    pub value: u64,
}

mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{value:#x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        let digits = text.strip_prefix("0x").filter(|digits| !digits.starts_with('+'));
        digits
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .ok_or_else(|| D::Error::custom(format_args!("{text:?} is no number such as 0x1f")))
    }
}

/// Where CPUID says that a register is there: leaf 1 ECX, or leaf 7.0 EDX.
#[derive(Clone, Copy, Debug)]
enum There {
    Always,
    Leaf1Ecx(u32),
    Leaf7Edx(u32),
}

/// Some bits of a register that only say something together: which, in words, and what they are called.
type Number = (u64, &'static str, &'static str);

/// What is known of a register.
struct Known {
    index: u32,
    name: &'static str,
    there: There,
    /// Bits that say something good: who was told so needs it.
    good: u64,
    /// Bits that warn: who was not warned must not come to where it is so.
    warnings: u64,
    /// Of the good ones those that say of AMD's CPUs what is always true, and which older kernels do not say.
    understood_on_amd: u64,
    numbers: &'static [Number],
    /// Whether a guest can be held to what hosts have in common of it.
    in_baselines: bool,
    bits: &'static [(u32, &'static str)],
}

const GDS_NO: u64 = 1 << 26;
const RFDS_NO: u64 = 1 << 27;
const ITS_NO: u64 = 1 << 62;
/// What returns are predicted by may be what others have trained (`rsba`, `rrsba`): a guest that clears its return
/// stack and was not told believes itself safe.
const RETURNS_UNSAFE: u64 = 1 << 2 | 1 << 19;
/// A hypervisor need not flush the first cache (`skip_l1dfl_vmentry`). That is nothing to a guest that cannot be one.
const FOR_HYPERVISORS: u64 = 1 << 3;

/// How a CPU writes down the branches that it took.
const LBR_FORMAT: u64 = 0x3f;
/// What a CPU writes down of itself when a counter overflows: the format, and the bits that change what it means.
const PEBS: u64 = 0xf00 | 1 << 6 | 1 << 7 | 1 << 14;

const KNOWN: &[Known] = &[
    Known {
        index: 0x10a,
        name: "IA32_ARCH_CAPABILITIES",
        there: There::Leaf7Edx(1 << 29),
        good: !(RETURNS_UNSAFE | FOR_HYPERVISORS),
        warnings: RETURNS_UNSAFE,
        understood_on_amd: GDS_NO | RFDS_NO | ITS_NO,
        numbers: &[],
        in_baselines: true,
        bits: &[
            (0, "rdcl_no"),
            (1, "ibrs_all"),
            (2, "rsba"),
            (4, "ssb_no"),
            (5, "mds_no"),
            (6, "pschange_mc_no"),
            (7, "tsx_ctrl"),
            (8, "taa_no"),
            (9, "mcu_control"),
            (10, "misc_package_ctls"),
            (11, "energy_filtering_ctl"),
            (12, "doitm"),
            (13, "sbdr_ssdp_no"),
            (14, "fbsdp_no"),
            (15, "psdp_no"),
            (16, "mcu_enumeration"),
            (17, "fb_clear"),
            (18, "fb_clear_ctrl"),
            (19, "rrsba"),
            (20, "bhi_no"),
            (21, "xapic_disable_status"),
            (23, "overclocking_status"),
            (24, "pbrsb_no"),
            (25, "gds_ctrl"),
            (26, "gds_no"),
            (27, "rfds_no"),
            (28, "rfds_clear"),
            (62, "its_no"),
        ],
    },
    Known {
        index: 0xcf,
        name: "IA32_CORE_CAPABILITIES",
        there: There::Leaf7Edx(1 << 30),
        good: !0,
        warnings: 0,
        understood_on_amd: 0,
        numbers: &[],
        in_baselines: true,
        bits: &[(3, "rsm_in_cpl0_only"), (4, "uc_lock_disable"), (5, "split_lock_detect")],
    },
    Known {
        index: 0x345,
        name: "IA32_PERF_CAPABILITIES",
        there: There::Leaf1Ecx(1 << 15),
        good: !(LBR_FORMAT | PEBS),
        warnings: 0,
        understood_on_amd: 0,
        numbers: &[
            (LBR_FORMAT, "bits 0 to 5", "lbr_format"),
            (PEBS, "bits 6 to 11 and 14", "pebs"),
        ],
        // KVM takes formats as its own CPU has them alone, and of a vCPU without counters nothing but zero.
        in_baselines: false,
        bits: &[
            (12, "freeze_while_smm"),
            (13, "full_width_write"),
            (15, "perf_metrics"),
            (16, "pebs_output_pt"),
        ],
    },
    Known {
        index: 0xce,
        name: "MSR_PLATFORM_INFO",
        there: There::Always,
        // The rest tells frequencies.
        good: 1 << 31,
        warnings: 0,
        understood_on_amd: 0,
        numbers: &[],
        in_baselines: true,
        bits: &[(31, "cpuid_fault")],
    },
];

impl Known {
    /// Whether a guest that sees these entries of CPUID can know of the register.
    fn is_there(&self, entries: &[CpuidEntry]) -> bool {
        match self.there {
            There::Always => true,
            There::Leaf1Ecx(bit) => find(entries, 1, 0).is_some_and(|one| one.ecx & bit != 0),
            There::Leaf7Edx(bit) => find(entries, 7, 0).is_some_and(|one| one.edx & bit != 0),
        }
    }

    /// What a guest that was told `guest` would miss where it is `host`.
    fn missing(&self, guest: u64, host: u64, amd: bool) -> Vec<String> {
        let understood = if amd { self.understood_on_amd } else { 0 };
        let lost = guest & !host & self.good & !understood;
        let unsaid = host & !guest & self.warnings;
        let bits = (0..64).filter(|bit| (lost | unsaid) & 1 << bit != 0).map(|bit| {
            let name = self.bit_name(bit);
            if lost & 1 << bit != 0 { name } else { format!("freedom from {name}") }
        });
        let numbers = self.numbers.iter().filter_map(|number| {
            let (ours, here) = (part(guest, *number), part(host, *number));
            let (_, place, name) = number;
            (ours != 0 && ours != here)
                .then(|| format!("{name} {ours:#x} ({} {place}, here {here:#x})", self.name))
        });
        bits.chain(numbers).collect()
    }

    /// A bit by its name where it has one, and always by its place.
    fn bit_name(&self, bit: u32) -> String {
        let named = self.bits.iter().find(|(place, _)| *place == bit);
        let name = named.map(|(_, name)| format!("{name} ")).unwrap_or_default();
        format!("{name}({} bit {bit})", self.name)
    }

    /// What holds of both, where the rest is `one`'s.
    fn common(&self, one: u64, other: u64) -> u64 {
        let mut both = one & !self.compared();
        both |= one & other & self.good;
        both |= (one | other) & self.warnings;
        both
    }

    fn compared(&self) -> u64 {
        self.good | self.warnings
    }
}

fn part(value: u64, (mask, ..): Number) -> u64 {
    (value & mask) >> mask.trailing_zeros()
}

fn value(registers: &[FeatureRegister], index: u32) -> Option<u64> {
    registers.iter().find(|one| one.index == index).map(|one| one.value)
}

/// Everything that a guest was told by `guest`, as far as CPUID with `entries` lets it look, and would not be by
/// `host`, in words.
pub(crate) fn missing(
    entries: &[CpuidEntry],
    guest: &[FeatureRegister],
    host: &[FeatureRegister],
) -> Vec<String> {
    let told = |known: &&Known| known.is_there(entries);
    let one = |known: &Known| {
        let guest = value(guest, known.index)?;
        let host = value(host, known.index).unwrap_or_default();
        Some(known.missing(guest, host, is_amd(entries)))
    };
    KNOWN.iter().filter(told).filter_map(one).flatten().collect()
}

/// Whether a guest that is held to a baseline may be told anything by the register.
pub(crate) fn in_baselines(register: &FeatureRegister) -> bool {
    KNOWN.iter().all(|known| known.index != register.index || known.in_baselines)
}

/// What both hosts can tell a guest that is held to what they have in common.
pub(crate) fn common(one: &[FeatureRegister], other: &[FeatureRegister]) -> Vec<FeatureRegister> {
    let both = |known: &Known| {
        let (ours, theirs) = (value(one, known.index), value(other, known.index));
        // One that a host does not have says nothing there, and so nothing good.
        (ours.is_some() || theirs.is_some()).then(|| FeatureRegister {
            index: known.index,
            value: known.common(ours.unwrap_or_default(), theirs.unwrap_or_default()),
        })
    };
    KNOWN.iter().filter(|known| known.in_baselines).filter_map(both).collect()
}

/// Why these cannot be what a host or a file says, if so.
pub(crate) fn check(registers: &[FeatureRegister]) -> std::result::Result<(), String> {
    if registers.len() > MAX {
        return Err(format!("it has {} registers, more than {MAX}", registers.len()));
    }
    let mut seen = BTreeMap::new();
    match registers.iter().find(|one| seen.insert(one.index, one.value).is_some()) {
        Some(twice) => Err(format!("register {:#x} is there twice", twice.index)),
        None => Ok(()),
    }
}

/// What a vCPU tells its guest.
pub(crate) fn of_vcpu(vcpu: &VcpuFd) -> Result<Vec<FeatureRegister>> {
    let indexes: Vec<u32> = KNOWN.iter().map(|known| known.index).collect();
    let read = msrs::read(vcpu, 0, &indexes)?;
    Ok(read.iter().map(|msr| FeatureRegister { index: msr.index, value: msr.value }).collect())
}

/// What this host can tell a guest, of which `vcpu` is a fresh one: what KVM says that it supports, and of what it
/// does not say that, what it tells unasked. (Older kernels keep from a guest what they would take for one.)
pub(crate) fn of_this_host(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<FeatureRegister>> {
    let supported = msrs::features(kvm)?;
    let mut said = of_vcpu(vcpu)?;
    for known in KNOWN.iter().filter(|known| supported.contains(&known.index)) {
        let wanted = kvm_msr_entry { index: known.index, ..Default::default() };
        let mut one = Msrs::from_entries(&[wanted])
            .map_err(|_| VmError::State("One register is too many".into()))?;
        // Of one that KVM lists and does not say here, what the fresh vCPU tells stands.
        if kvm.get_msrs(&mut one).unwrap_or_default() == 1 {
            said.retain(|other| other.index != known.index);
            let value = one.as_slice()[0].data;
            said.push(FeatureRegister { index: known.index, value });
        }
    }
    Ok(said)
}

/// Lets `vcpu`, which has not run and whose guest sees `entries`, tell what `baseline` does, as far as `here` does
/// too, and nothing by registers that are in none; what it tells then.
pub(crate) fn hold(
    vcpu: &VcpuFd,
    number: u32,
    entries: &[CpuidEntry],
    baseline: &[FeatureRegister],
    here: &[FeatureRegister],
) -> Result<Vec<FeatureRegister>> {
    let told = of_vcpu(vcpu)?;
    let wanted = rewritten(&told, entries, baseline, here);
    if wanted.is_empty() {
        return Ok(told);
    }
    msrs::write(vcpu, number, &wanted, &[])?;
    let told = of_vcpu(vcpu)?;
    // A KVM that ignores what it does not know says that it took it.
    match wanted.iter().find(|msr| value(&told, msr.index) != Some(msr.value)) {
        None => Ok(told),
        Some(msr) => Err(VmError::Msr {
            what: "write",
            index: msr.index,
            vcpu: number,
            detail: format!(" (value {:#x}, which KVM does not keep)", msr.value),
        }),
    }
}

/// What must be written so that a vCPU which tells `told` is held to `baseline`.
fn rewritten(
    told: &[FeatureRegister],
    entries: &[CpuidEntry],
    baseline: &[FeatureRegister],
    here: &[FeatureRegister],
) -> Vec<Msr> {
    let wanted = |known: &Known| {
        let now = value(told, known.index)?;
        if !known.in_baselines {
            // Written even where the guest cannot look: it travels, and not every KVM takes it.
            return (now != 0).then_some(Msr { index: known.index, value: 0 });
        }
        let held = value(baseline, known.index).filter(|_| known.is_there(entries))?;
        let both = known.common(value(here, known.index).unwrap_or_default(), held);
        let value = (now & !known.compared()) | (both & known.compared());
        (value != now).then_some(Msr { index: known.index, value })
    };
    KNOWN.iter().filter_map(wanted).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a CPU of this maker shows of leaves 0, 1 and 7 when all registers are there.
    fn maker(name: &[u8; 12]) -> Vec<CpuidEntry> {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| name[at + byte]));
        let (ebx, edx, ecx) = (word(0), word(4), word(8));
        vec![
            CpuidEntry { leaf: 0, ebx, ecx, edx, ..Default::default() },
            CpuidEntry { leaf: 1, ecx: 1 << 15, ..Default::default() },
            CpuidEntry { leaf: 7, edx: 1 << 29 | 1 << 30, ..Default::default() },
        ]
    }

    fn intel() -> Vec<CpuidEntry> {
        maker(b"GenuineIntel")
    }

    fn register(index: u32, value: u64) -> Vec<FeatureRegister> {
        vec![FeatureRegister { index, value }]
    }

    const CAPABILITIES: u32 = 0x10a;

    #[test]
    fn who_was_told_of_an_immunity_needs_it() {
        let told = register(CAPABILITIES, 1 | 1 << 5 | 1 << 40);
        let safe = |value| missing(&intel(), &told, &register(CAPABILITIES, value));
        assert_eq!(
            safe(1 << 5),
            ["rdcl_no (IA32_ARCH_CAPABILITIES bit 0)", "(IA32_ARCH_CAPABILITIES bit 40)"]
        );
        assert_eq!(safe(!(1 << 2 | 1 << 19)), Vec::<String>::new());
        assert_eq!(missing(&intel(), &told, &[]).len(), 3, "a host without the register");
        assert_eq!(missing(&intel(), &[], &told), Vec::<String>::new(), "an older source");
    }

    #[test]
    fn who_was_not_warned_stays_away_and_who_was_may_come() {
        let (calm, warned) = (register(CAPABILITIES, 0), register(CAPABILITIES, 1 << 2 | 1 << 19));
        assert_eq!(
            missing(&intel(), &calm, &warned),
            [
                "freedom from rsba (IA32_ARCH_CAPABILITIES bit 2)",
                "freedom from rrsba (IA32_ARCH_CAPABILITIES bit 19)"
            ]
        );
        assert!(missing(&intel(), &warned, &calm).is_empty());
    }

    #[test]
    fn what_cpuid_hides_does_not_count() {
        let told = register(CAPABILITIES, 1);
        let mut blind = intel();
        blind[2].edx = 0;
        assert!(missing(&blind, &told, &[]).is_empty());
    }

    #[test]
    fn what_does_not_travel_or_is_for_hypervisors_does_not_count() {
        let configuration = register(0xc001_1029, 1 << 1);
        assert!(missing(&maker(b"AuthenticAMD"), &configuration, &[]).is_empty());
        assert!(common(&configuration, &configuration).is_empty(), "an older peer says it");
        let told = register(CAPABILITIES, 1 | 1 << 3);
        assert!(missing(&intel(), &told, &register(CAPABILITIES, 1)).is_empty());
        assert_eq!(missing(&intel(), &told, &[]), ["rdcl_no (IA32_ARCH_CAPABILITIES bit 0)"]);
    }

    #[test]
    fn what_goes_without_saying_of_amds_cpus_does_not_count_there() {
        let told = register(CAPABILITIES, 1 | GDS_NO | RFDS_NO | ITS_NO);
        let old = register(CAPABILITIES, 1);
        assert!(missing(&maker(b"AuthenticAMD"), &told, &old).is_empty());
        assert!(missing(&maker(b"HygonGenuine"), &told, &old).is_empty());
        assert_eq!(missing(&intel(), &told, &old).len(), 3);
        assert_eq!(missing(&maker(b"AuthenticAMD"), &told, &register(CAPABILITIES, 0)).len(), 1);
    }

    #[test]
    fn formats_agree_or_are_not_there() {
        let told = register(0x345, 5 | 1 << 6 | 3 << 8 | 1 << 13);
        let here = |value| missing(&intel(), &told, &register(0x345, value));
        assert_eq!(
            here(6 | 1 << 6 | 3 << 8),
            [
                "full_width_write (IA32_PERF_CAPABILITIES bit 13)",
                "lbr_format 0x5 (IA32_PERF_CAPABILITIES bits 0 to 5, here 0x6)"
            ]
        );
        assert!(here(5 | 1 << 6 | 3 << 8 | 1 << 13 | 1 << 16).is_empty(), "a host may have more");
        // Each bit that changes what the format means.
        let pebs =
            |here| format!("pebs 0xd (IA32_PERF_CAPABILITIES bits 6 to 11 and 14, here {here})");
        let rest = 5 | 1 << 13;
        assert_eq!(here(rest | 3 << 8), [pebs("0xc")]);
        assert_eq!(here(rest | 1 << 6 | 1 << 7 | 3 << 8), [pebs("0xf")]);
        assert_eq!(here(rest | 1 << 6 | 3 << 8 | 1 << 14), [pebs("0x10d")]);
        assert_eq!(here(rest | 1 << 6 | 4 << 8), [pebs("0x11")]);
        let none = register(0x345, 0);
        assert!(missing(&intel(), &none, &told).is_empty(), "who was told of none needs none");
        assert!(common(&told, &told).is_empty(), "no guest is held to it");
        assert!(!in_baselines(&told[0]) && in_baselines(&register(CAPABILITIES, 1)[0]));
    }

    #[test]
    fn what_is_in_no_baseline_is_emptied_and_what_cpuid_hides_is_left() {
        let told = [register(CAPABILITIES, 1 | 1 << 5), register(0x345, 5 | 1 << 13)].concat();
        let held = [register(CAPABILITIES, 1), register(0x345, 1 << 13)].concat();
        let empty = Msr { index: 0x345, value: 0 };
        let narrow = Msr { index: CAPABILITIES, value: 1 };
        assert_eq!(rewritten(&told, &intel(), &held, &told), [narrow, empty]);
        assert_eq!(rewritten(&told, &intel(), &[], &told), [empty]);
        assert_eq!(rewritten(&told, &[], &held, &told), [empty]);
        let nothing = register(0x345, 0);
        assert!(rewritten(&nothing, &intel(), &held, &told).is_empty());
        assert!(rewritten(&[], &intel(), &held, &told).is_empty(), "a KVM without it");
    }

    #[test]
    fn frequencies_are_no_features() {
        let told = register(0xce, 1 << 31 | 0x1a00);
        assert!(missing(&intel(), &told, &register(0xce, 1 << 31 | 0x2200)).is_empty());
        assert_eq!(
            missing(&intel(), &told, &register(0xce, 0x1a00)),
            ["cpuid_fault (MSR_PLATFORM_INFO bit 31)"]
        );
    }

    #[test]
    fn values_are_written_so_that_nobody_rounds_them() {
        let one = FeatureRegister { index: CAPABILITIES, value: 0x4000_0000_0c00_0069 };
        let json = serde_json::to_string(&one).expect("JSON");
        assert_eq!(json, r#"{"index":266,"value":"0x400000000c000069"}"#);
        assert_eq!(serde_json::from_str::<FeatureRegister>(&json).expect("own JSON"), one);
        for bad in ["5", "\"5\"", "\"0x\"", "\"0x+5\"", "\"0x10000000000000000\"", "null"] {
            let json = format!("{{\"index\":1,\"value\":{bad}}}");
            assert!(serde_json::from_str::<FeatureRegister>(&json).is_err(), "{bad}");
        }
    }

    #[test]
    fn too_many_and_twice_the_same_are_refused() {
        let many: Vec<_> = (0..65).map(|index| FeatureRegister { index, value: 0 }).collect();
        assert!(check(&many).is_err_and(|why| why.contains("65")));
        assert!(check(&many[..64]).is_ok());
        let twice = [many[1], many[1]];
        assert!(check(&twice).is_err_and(|why| why.contains("0x1 is there twice")));
    }

    #[test]
    fn names_stand_once_and_within_what_is_compared() {
        for known in KNOWN {
            assert_eq!(known.good & known.warnings, 0, "{}", known.name);
            let mut last = None;
            for (bit, name) in known.bits {
                assert!(last < Some(bit), "{name} is out of order");
                last = Some(bit);
                assert_ne!((known.good | known.warnings) & 1 << bit, 0, "{name}");
            }
            for (mask, ..) in known.numbers {
                assert_eq!((known.good | known.warnings) & mask, 0, "{}", known.name);
                assert!(!known.in_baselines, "{}: nothing is common of a number", known.name);
            }
        }
    }

    proptest! {
        #[test]
        fn who_is_held_to_what_hosts_have_in_common_fits_each(values: [u64; 4], others: [u64; 4]) {
            let list = |values: [u64; 4]| -> Vec<FeatureRegister> {
                let all = KNOWN.iter().zip(values);
                all.map(|(known, value)| FeatureRegister { index: known.index, value }).collect()
            };
            let (one, other) = (list(values), list(others));
            let both = common(&one, &other);
            for cpu in [intel(), maker(b"AuthenticAMD")] {
                prop_assert_eq!(missing(&cpu, &both, &one), Vec::<String>::new());
                prop_assert_eq!(missing(&cpu, &both, &other), Vec::<String>::new());
                // No wider one would do: each good bit of both is there, and no warning of neither.
                prop_assert_eq!(missing(&cpu, &common(&one, &one), &one), Vec::<String>::new());
            }
            for known in KNOWN.iter().filter(|known| known.in_baselines) {
                let of = |list| value(list, known.index).expect("a value");
                let (both, one, other) = (of(&both), of(&one), of(&other));
                prop_assert_eq!(both & known.good, one & other & known.good);
                prop_assert_eq!(both & known.warnings, (one | other) & known.warnings);
            }
        }
    }
}
