//! Time across a move: the VM's clock and the guest's time stamp counter go on by the time that
//! passed, so that a guest sees neither a step back nor a second that was lost.
//!
//! The arithmetic is that of the kernel's `Documentation/virt/kvm/devices/vcpu.rst`. Where KVM
//! cannot say its offset or the real time, the counter goes on from the saved value instead and the
//! clock stands still while the guest does.

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::VmFd;

use crate::error::{Result, VmError};
use crate::sys::{self, CLOCK};

/// Two hosts' clocks may differ by this and a move may last this long; beyond it the hosts' real
/// time is not believed, and the guest's clock just goes on.
const BELIEVED: u64 = 3_600_000_000_000;

/// The VM's clock as the kernel gave it at one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClockState {
    /// The paravirtual clock, nanoseconds.
    pub(crate) nanoseconds: u64,
    /// KVM_CLOCK_*: which of the next two are valid.
    pub(crate) flags: u32,
    /// The host's real time, nanoseconds since 1970.
    pub(crate) realtime: u64,
    /// The host's time stamp counter.
    pub(crate) host_tsc: u64,
}

/// Bytes of the clock in a section: the four numbers in order.
pub(crate) const BYTES: usize = 28;

impl ClockState {
    /// Asks the kernel.
    pub(crate) fn read(vm: &VmFd) -> Result<Self> {
        let mut bytes = [0; CLOCK.size];
        sys::get_block(vm, &CLOCK, &mut bytes)
            .map_err(|error| VmError::refused("read the VM's clock", error))?;
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        Ok(Self {
            nanoseconds: word(CLOCK_AT),
            flags: word(FLAGS_AT) as u32,
            realtime: word(REALTIME_AT),
            host_tsc: word(HOST_TSC_AT),
        })
    }

    /// Sets the VM's clock to this one, moved on by the time that passed since it was read.
    pub(crate) fn write(&self, vm: &VmFd) -> Result<()> {
        let mut bytes = [0; CLOCK.size];
        bytes[CLOCK_AT..CLOCK_AT + 8].copy_from_slice(&self.nanoseconds.to_le_bytes());
        if self.flags & KVM_CLOCK_REALTIME != 0 && self.is_recent() {
            bytes[FLAGS_AT..FLAGS_AT + 4].copy_from_slice(&KVM_CLOCK_REALTIME.to_le_bytes());
            bytes[REALTIME_AT..REALTIME_AT + 8].copy_from_slice(&self.realtime.to_le_bytes());
        }
        sys::set_block(vm, &CLOCK, &bytes)
            .map_err(|error| VmError::refused("set the VM's clock", error))
    }

    /// Whether the clock came with the host's counter and real time.
    pub(crate) fn is_complete(&self) -> bool {
        let both = KVM_CLOCK_HOST_TSC | KVM_CLOCK_REALTIME;
        self.flags & both == both
    }

    /// As it stands in a section.
    pub(crate) fn to_bytes(self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..8].copy_from_slice(&self.nanoseconds.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.realtime.to_le_bytes());
        bytes[20..].copy_from_slice(&self.host_tsc.to_le_bytes());
        bytes
    }

    /// The reverse of [`ClockState::to_bytes`].
    pub(crate) fn from_bytes(bytes: [u8; BYTES]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let mut flags = [0; 4];
        flags.copy_from_slice(&bytes[8..12]);
        Self {
            nanoseconds: word(0),
            flags: u32::from_le_bytes(flags),
            realtime: word(12),
            host_tsc: word(20),
        }
    }

    fn is_recent(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
        now.abs_diff(u128::from(self.realtime)) <= u128::from(BELIEVED)
    }
}

const CLOCK_AT: usize = std::mem::offset_of!(kvm_clock_data, clock);
const FLAGS_AT: usize = std::mem::offset_of!(kvm_clock_data, flags);
const REALTIME_AT: usize = std::mem::offset_of!(kvm_clock_data, realtime);
const HOST_TSC_AT: usize = std::mem::offset_of!(kvm_clock_data, host_tsc);

/// The TSC offset that a guest needs on this host, whose clock reads `here`, so that its counter
/// has moved on with its clock since the source's clock read `there` under `offset`.
pub(crate) fn moved_offset(offset: u64, there: &ClockState, here: &ClockState, khz: u32) -> u64 {
    let passed = i128::from(here.nanoseconds) - i128::from(there.nanoseconds);
    let cycles = passed * i128::from(khz) / 1_000_000;
    // Counters and offsets are numbers modulo 2^64.
    offset.wrapping_add(there.host_tsc).wrapping_sub(here.host_tsc).wrapping_add(cycles as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn clock(nanoseconds: u64, host_tsc: u64) -> ClockState {
        ClockState { nanoseconds, host_tsc, ..Default::default() }
    }

    #[test]
    fn the_counter_moves_on_with_the_clock() {
        // 2 GHz, guest counter 500 on the source; one second later on a host whose counter is 9.
        let offset = moved_offset(
            500u64.wrapping_sub(1_000_000),
            &clock(7, 1_000_000),
            &clock(1_000_000_007, 9),
            2_000_000,
        );
        assert_eq!(9u64.wrapping_add(offset), 2_000_000_500);
    }

    proptest! {
        #[test]
        fn bytes_round_trip(nanoseconds: u64, flags: u32, realtime: u64, host_tsc: u64) {
            let state = ClockState { nanoseconds, flags, realtime, host_tsc };
            prop_assert_eq!(ClockState::from_bytes(state.to_bytes()), state);
        }

        #[test]
        fn no_clock_of_a_peer_overflows(offset: u64, a: u64, b: u64, c: u64, d: u64, khz: u32) {
            let _ = moved_offset(offset, &clock(a, b), &clock(c, d), khz);
        }
    }
}
