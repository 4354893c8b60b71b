//! What this host offers to guests: a usable `/dev/kvm`, the capabilities that this VMM builds on,
//! and free memory.

use std::fs;

use decamp_shared::workload::{Refusal, RefusalCode};
use kvm_ioctls::{Cap, Kvm};

use crate::error::{Result, VmError};

/// The one version of KVM's interface that there is.
const API_VERSION: i32 = 12;

/// What is used without a second way, with the kernel's names.
const REQUIRED: [(Cap, &str); 13] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Xsave2, "KVM_CAP_XSAVE2"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
];
/// The same for capabilities that `kvm-ioctls` has no name for.
const REQUIRED_RAW: [(u32, &str); 2] = [
    (kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"),
    (kvm_bindings::KVM_CAP_SREGS2, "KVM_CAP_SREGS2"),
];

/// Opens KVM and checks that it has all that this VMM builds on.
///
/// # Errors
/// When `/dev/kvm` cannot be opened, speaks another version, or lacks something; the text names it.
pub(crate) fn open_kvm() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|error| {
        VmError::refused(
            "open /dev/kvm (is the kvm module loaded, and may this user use the device?)",
            error,
        )
    })?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(VmError::State(format!(
            "/dev/kvm speaks version {version} of its interface, {API_VERSION} is needed"
        )));
    }
    let lacking: Vec<_> =
        required(&kvm).filter(|(_, there)| !there).map(|(name, _)| name).collect();
    if lacking.is_empty() {
        Ok(kvm)
    } else {
        let lacking = lacking.join(", ");
        Err(VmError::State(format!("/dev/kvm lacks {lacking}: a newer kernel is needed")))
    }
}

/// Names of the capabilities that a guest here builds on.
pub(crate) fn capabilities(kvm: &Kvm) -> Vec<String> {
    required(kvm).filter(|(_, there)| *there).map(|(name, _)| name.to_owned()).collect()
}

fn required(kvm: &Kvm) -> impl Iterator<Item = (&'static str, bool)> + '_ {
    let named = REQUIRED.iter().map(|(cap, name)| (*name, kvm.check_extension(*cap)));
    let raw =
        REQUIRED_RAW.iter().map(|(cap, name)| (*name, kvm.check_extension_raw((*cap).into()) > 0));
    named.chain(raw)
}

/// Why a guest with `needed` bytes of memory has no room here, if so.
pub(crate) fn lacks_memory(needed: u64) -> Option<Refusal> {
    match fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text)) {
        Some(free) if free >= needed => None,
        Some(free) => Some(Refusal::new(
            RefusalCode::Memory,
            format!(
                "The guest needs {} MiB of memory, and this host has {} MiB available",
                needed.div_ceil(1 << 20),
                free >> 20
            ),
        )),
        None => Some(Refusal::new(
            RefusalCode::Memory,
            "Could not read from /proc/meminfo how much memory this host has available",
        )),
    }
}

/// Bytes that the text of `/proc/meminfo` says are available.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:       24684092 kB\nMemFree: 1 kB\nMemAvailable:   24209968 kB\n";
        assert_eq!(available(text), Some(24_209_968 * 1024));
        assert_eq!(available("MemTotal: 5 kB"), None);
        assert_eq!(available("MemAvailable: x kB"), None);
    }

    #[test]
    fn a_guest_that_is_too_big_is_refused_with_numbers() {
        let refusal = lacks_memory(1 << 50).expect("a petabyte");
        assert_eq!(refusal.code, i32::from(RefusalCode::Memory));
        assert!(refusal.text.contains("1073741824 MiB"), "{}", refusal.text);
        assert!(lacks_memory(1 << 20).is_none());
    }
}
