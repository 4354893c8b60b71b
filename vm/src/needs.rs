//! What a guest needs of a host, as its keeper says it, and as it travels in the manifest; and why
//! a host cannot give it.

use decamp_shared::workload::{Refusal, RefusalCode};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use crate::cpuid::registers::{self, FeatureRegister};
use crate::cpuid::{self, CpuidEntry, Offered};
use crate::error::{Result, VmError};
use crate::host;
use crate::state::msrs;
use crate::sys::XsaveSize;

/// A host whose counter runs at another rate than the guest's by more than this many parts in a
/// million must be able to scale it. It is KVM's own tolerance.
const TSC_TOLERANCE_PPM: u64 = 250;
/// The most bytes of JSON that are read from a peer.
const MAX_BYTES: usize = 1 << 20;
/// How many missing features are named one by one.
const NAMED: usize = 12;

/// What a guest needs of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// Version of the VMM that runs it.
    pub vmm: String,
    /// What the guest sees of its CPU.
    pub cpuid: Vec<CpuidEntry>,
    /// Frequency of the guest's time stamp counter, kHz.
    pub tsc_khz: u32,
    /// KVM capabilities that the VMM builds on, with the kernel's names.
    pub capabilities: Vec<String>,
    /// Model-specific registers that hold anything for a vCPU of the guest, and that travel. Whoever was started by
    /// an older decamp does not say.
    #[serde(default)]
    pub msrs: Vec<u32>,
    /// What the guest is told of its CPU by registers. Whoever was started by an older decamp does not say.
    #[serde(default)]
    pub registers: Vec<FeatureRegister>,
}

impl Needs {
    /// Reads them from a manifest.
    ///
    /// # Errors
    /// When they are too long or not what they should be.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let wrong = |reason: String| {
            VmError::Spec(format!("The needs of the VM in its manifest cannot be read: {reason}"))
        };
        if json.len() > MAX_BYTES {
            return Err(wrong(format!("{} bytes", json.len())));
        }
        let needs: Self = serde_json::from_slice(json).map_err(|error| wrong(error.to_string()))?;
        if needs.cpuid.len() > cpuid::MAX_ENTRIES {
            return Err(wrong(format!("{} CPUID entries", needs.cpuid.len())));
        }
        if needs.msrs.len() > msrs::MAX {
            return Err(wrong(format!("{} model-specific registers", needs.msrs.len())));
        }
        registers::check(&needs.registers).map_err(wrong)?;
        Ok(needs)
    }

    /// Every reason why `kvm` cannot run the guest.
    pub(crate) fn refusals(&self, kvm: &Kvm) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        let ours = host::capabilities(kvm);
        let lacking: Vec<_> =
            self.capabilities.iter().filter(|name| !ours.contains(name)).cloned().collect();
        if !lacking.is_empty() {
            refusals.push(Refusal::new(
                RefusalCode::Kvm,
                format!("KVM here lacks {}, which the guest's VMM builds on", lacking.join(", ")),
            ));
        }
        match Offered::here(kvm) {
            Ok(here) => {
                refusals.extend(features_refusal(&here.lacks(&self.cpuid, &self.registers)));
                let scales = kvm.check_extension(Cap::TscControl);
                refusals.extend(frequency_refusal(self.tsc_khz, here.tsc_khz, scales));
            }
            Err(error) => refusals.push(Refusal::new(RefusalCode::Kvm, error.with_causes())),
        }
        match self.state_refusals(kvm) {
            Ok(found) => refusals.extend(found),
            Err(error) => refusals.push(Refusal::new(RefusalCode::Kvm, error.with_causes())),
        }
        refusals
    }

    /// State that a vCPU of the guest has and one of `kvm` has no room for.
    fn state_refusals(&self, kvm: &Kvm) -> Result<Vec<Refusal>> {
        let failed = |error| VmError::refused("make a vCPU to see its state", error);
        let vm = kvm.create_vm().map_err(failed)?;
        vm.create_irq_chip().map_err(failed)?;
        let vcpu = vm.create_vcpu(0).map_err(failed)?;
        cpuid::grant(&vcpu, &cpuid::of_this_host(kvm)?.0)?;
        let mut refusals = Vec::new();
        let listed = msrs::listed(kvm)?;
        let mut unknown: Vec<u32> =
            self.msrs.iter().filter(|index| !listed.contains(index)).copied().collect();
        // A kernel need not list what it keeps.
        let kept = msrs::read(&vcpu, 0, &unknown)?;
        unknown.retain(|index| !kept.iter().any(|msr| msr.index == *index));
        refusals.extend(registers_refusal(&unknown));
        let (needed, room) = (cpuid::extended_state_bytes(&self.cpuid), XsaveSize::of(&vm).bytes());
        if needed > room {
            refusals.push(Refusal::new(
                RefusalCode::Cpu,
                format!(
                    "The guest has {needed} bytes of extended state, and KVM here keeps {room}"
                ),
            ));
        }
        Ok(refusals)
    }
}

fn features_refusal(missing: &[String]) -> Option<Refusal> {
    if missing.is_empty() {
        return None;
    }
    let text = format!("The CPU here lacks what the guest sees: {}", named(missing));
    Some(Refusal::new(RefusalCode::Cpu, text))
}

/// The first of them, and how many more there are.
pub(crate) fn named(missing: &[String]) -> String {
    let named = missing.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    match missing.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

fn registers_refusal(unknown: &[u32]) -> Option<Refusal> {
    if unknown.is_empty() {
        return None;
    }
    let numbers: Vec<String> = unknown.iter().map(|index| format!("{index:#x}")).collect();
    let text = format!(
        "KVM here does not keep model-specific registers that the guest has: {}",
        named(&numbers)
    );
    Some(Refusal::new(RefusalCode::Cpu, text))
}

fn frequency_refusal(guest: u32, host: u32, scales: bool) -> Option<Refusal> {
    let apart = u64::from(guest.abs_diff(host)) * 1_000_000;
    let same = apart <= u64::from(host) * TSC_TOLERANCE_PPM;
    (!same && !scales).then(|| {
        Refusal::new(
            RefusalCode::Cpu,
            format!(
                "The guest's time stamp counter runs at {guest} kHz, this host's at {host} kHz, \
                 and this CPU cannot scale it"
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(kvm: &Kvm) -> Needs {
        let here = Offered::here(kvm).expect("an offer");
        Needs {
            vmm: "0".into(),
            cpuid: here.entries,
            tsc_khz: here.tsc_khz,
            capabilities: host::capabilities(kvm),
            msrs: msrs::listed(kvm).expect("a list"),
            registers: here.registers,
        }
    }

    #[test]
    fn a_guest_of_this_host_can_come_back() {
        let kvm = host::open_kvm().expect("KVM");
        let needs = own(&kvm);
        assert_eq!(needs.refusals(&kvm), []);
        let json = serde_json::to_vec(&needs).expect("to JSON");
        assert_eq!(Needs::parse(&json).expect("own JSON"), needs);
    }

    #[test]
    fn everything_that_is_missing_is_named_at_once() {
        let kvm = host::open_kvm().expect("KVM");
        let mut needs = own(&kvm);
        needs.capabilities.push("KVM_CAP_TELEPATHY".into());
        let leaf = CpuidEntry { leaf: 7, subleaf: 2, edx: !0, ..Default::default() };
        needs.cpuid.retain(|entry| (entry.leaf, entry.subleaf) != (7, 2));
        needs.cpuid.push(leaf);
        let refusals = needs.refusals(&kvm);
        let codes: Vec<_> = refusals.iter().map(|refusal| refusal.code).collect();
        assert_eq!(codes, [RefusalCode::Kvm, RefusalCode::Cpu].map(i32::from));
        assert!(refusals[0].text.contains("KVM_CAP_TELEPATHY"));
        assert!(
            refusals[1].text.contains("CPUID 0x7.2 EDX bit 31")
                || refusals[1].text.contains("more")
        );
    }

    #[test]
    fn state_that_there_is_no_room_for_is_named() {
        let kvm = host::open_kvm().expect("KVM");
        let mut needs = own(&kvm);
        needs.msrs.push(0xdead_beef);
        let state = needs.cpuid.iter_mut().find(|one| (one.leaf, one.subleaf) == (0xd, 0));
        state.expect("leaf 0xD").ecx = 1 << 20;
        let texts: Vec<_> = needs.refusals(&kvm).into_iter().map(|one| one.text).collect();
        assert!(texts.iter().any(|text| text.contains("has: 0xdeadbeef")), "{texts:?}");
        assert!(texts.iter().any(|text| text.contains("1048576 bytes of extended")), "{texts:?}");
        // Older keepers say nothing of them.
        let mut json = serde_json::to_value(own(&kvm)).expect("JSON");
        for unsaid in ["msrs", "registers"] {
            json.as_object_mut().expect("an object").remove(unsaid);
        }
        let old = Needs::parse(json.to_string().as_bytes()).expect("needs");
        assert!(old.msrs.is_empty() && old.registers.is_empty() && old.refusals(&kvm).is_empty());
    }

    #[test]
    fn what_the_guest_was_told_of_flaws_is_compared_beside_its_cpuid() {
        let kvm = host::open_kvm().expect("KVM");
        let mut needs = own(&kvm);
        // Bits that no CPU has.
        needs.registers.retain(|one| one.index != 0x10a);
        needs.registers.push(FeatureRegister { index: 0x10a, value: 1 << 50 });
        let leaf = needs.cpuid.iter_mut().find(|one| (one.leaf, one.subleaf) == (7, 0));
        let leaf = leaf.expect("leaf 7");
        (leaf.ebx, leaf.edx) = (leaf.ebx | 1 << 22, leaf.edx | 1 << 29);
        let texts: Vec<_> = needs.refusals(&kvm).into_iter().map(|one| one.text).collect();
        assert_eq!(texts.len(), 1, "{texts:?}");
        let lacks = "The CPU here lacks what the guest sees: (CPUID 0x7.0 EBX bit 22), ";
        assert!(texts[0].starts_with(lacks), "{texts:?}");
        assert!(texts[0].ends_with("(IA32_ARCH_CAPABILITIES bit 50)"), "{texts:?}");
    }

    #[test]
    fn frequencies_must_agree_or_scale() {
        assert!(frequency_refusal(2_600_000, 2_600_100, false).is_none());
        assert!(frequency_refusal(2_600_000, 3_000_000, true).is_none());
        let refusal = frequency_refusal(2_600_000, 3_000_000, false).expect("refusal");
        assert!(refusal.text.contains("2600000 kHz"));
    }

    #[test]
    fn needs_of_a_hostile_peer_are_refused() {
        assert!(Needs::parse(b"{}").is_err());
        assert!(Needs::parse(&vec![b' '; MAX_BYTES + 1]).is_err());
        let entry = serde_json::to_value(CpuidEntry::default()).expect("to JSON");
        let many = serde_json::json!({
            "vmm": "0", "cpuid": vec![entry; 300], "tsc_khz": 1, "capabilities": []
        });
        assert!(Needs::parse(many.to_string().as_bytes()).is_err());
    }
}
