//! What a guest needs of a host, as its keeper says it, and as it travels in the manifest; and why
//! a host cannot give it.

use decamp_shared::workload::{Refusal, RefusalCode};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use crate::cpuid::{self, CpuidEntry};
use crate::error::{Result, VmError};
use crate::host;

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
        match cpuid::of_this_host(kvm) {
            Ok((here, khz)) => {
                refusals.extend(features_refusal(&cpuid::missing(&self.cpuid, &here)));
                let scales = kvm.check_extension(Cap::TscControl);
                refusals.extend(frequency_refusal(self.tsc_khz, khz, scales));
            }
            Err(error) => refusals.push(Refusal::new(RefusalCode::Kvm, error.with_causes())),
        }
        refusals
    }
}

fn features_refusal(missing: &[String]) -> Option<Refusal> {
    if missing.is_empty() {
        return None;
    }
    let named = missing.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    let more = match missing.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Some(Refusal::new(
        RefusalCode::Cpu,
        format!("The CPU here lacks what the guest sees: {named}{more}"),
    ))
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
        let (cpuid, tsc_khz) = cpuid::of_this_host(kvm).expect("CPUID");
        Needs { vmm: "0".into(), cpuid, tsc_khz, capabilities: host::capabilities(kvm) }
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
