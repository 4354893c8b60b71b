//! What this host offers to guests: a usable `/dev/kvm`, the capabilities that this VMM builds on,
//! and free memory.

use std::fs;

use decamp_shared::workload::{Refusal, RefusalCode};
use kvm_ioctls::{Cap, Kvm};

use crate::error::{Result, VmError};
use crate::sys;

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
        sys::permit_guest_tiles();
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

/// Why a guest with `wanted` vCPUs has no room here, if so: more of them than processors make a guest slower,
/// and its vCPUs wait for each other's locks.
pub(crate) fn lacks_cpus(wanted: u32) -> Option<Refusal> {
    let text = fs::read_to_string("/sys/devices/system/cpu/online").ok();
    match text.and_then(|text| online(&text)) {
        Some(online) if online >= wanted => None,
        Some(online) => Some(Refusal::new(
            RefusalCode::Cpu,
            format!("The guest has {wanted} vCPUs, and this host has {online} processors online"),
        )),
        None => Some(Refusal::new(
            RefusalCode::Cpu,
            "Could not read from /sys/devices/system/cpu/online how many processors are online",
        )),
    }
}

/// How many processors a list such as `0-3,8` names.
fn online(list: &str) -> Option<u32> {
    list.trim().split(',').try_fold(0u32, |sum, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
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
    fn processors_are_counted_and_too_many_vcpus_refused_with_numbers() {
        assert_eq!(online("0-1\n"), Some(2));
        assert_eq!(online("0-3,8,10-11"), Some(7));
        assert_eq!((online(""), online("3-1"), online("0-x")), (None, None, None));
        let refusal = lacks_cpus(100_000).expect("too many");
        assert_eq!(refusal.code, i32::from(RefusalCode::Cpu));
        assert!(refusal.text.contains("100000 vCPUs"), "{}", refusal.text);
        assert!(lacks_cpus(1).is_none());
    }

    #[test]
    fn a_guest_that_is_too_big_is_refused_with_numbers() {
        let refusal = lacks_memory(1 << 50).expect("a petabyte");
        assert_eq!(refusal.code, i32::from(RefusalCode::Memory));
        assert!(refusal.text.contains("1073741824 MiB"), "{}", refusal.text);
        assert!(lacks_memory(1 << 20).is_none());
    }
}
