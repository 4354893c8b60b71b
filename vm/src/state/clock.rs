//! Time across a move: the VM's clock and the guest's time stamp counter go on by the time that
//! passed, so that a guest sees neither a step back nor a second that was lost.
//!
//! The arithmetic is that of the kernel's `Documentation/virt/kvm/devices/vcpu.rst`. Where KVM does not say
//! the real time that belongs to its clock (it does so only while its master clock runs), it is taken right
//! after; where it cannot say a counter's offset, or scales the counter, the counter goes on from its saved value by the time that the
//! clock moved.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::VmFd;

use crate::error::{Result, VmError};
use crate::sys::{self, CLOCK};

/// Two hosts' clocks may differ by this beyond what a move may have lasted; where they differ by more the hosts' real time
/// is not believed, and the guest's clock just goes on.
const DIFFER: Duration = Duration::from_secs(1);

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
        let read = Self {
            nanoseconds: word(CLOCK_AT),
            flags: word(FLAGS_AT) as u32,
            realtime: word(REALTIME_AT),
            host_tsc: word(HOST_TSC_AT),
        };
        Ok(read.with_realtime(real_now()))
    }

    /// With the real time of `now`, if it has none.
    fn with_realtime(self, now: u64) -> Self {
        if self.flags & KVM_CLOCK_REALTIME != 0 {
            return self;
        }
        Self { flags: self.flags | KVM_CLOCK_REALTIME, realtime: now, ..self }
    }

    /// Sets the VM's clock to this one, moved on by the time that passed since it was read, which is no more than
    /// `lasted`. Hosts whose clocks tell another story are not believed: the clock goes on from where it stood.
    pub(crate) fn write(&self, vm: &VmFd, lasted: Duration) -> Result<()> {
        let moves_on = self.flags & KVM_CLOCK_REALTIME != 0 && self.is_believed(real_now(), lasted);
        let by_kvm = if moves_on { KVM_CLOCK_REALTIME } else { 0 };
        match self.set(vm, self.nanoseconds, by_kvm) {
            // Kernels before 5.16 do not move it on themselves.
            Err(error) if moves_on && error.raw_os_error() == Some(libc::EINVAL) => {
                self.set(vm, self.moved_to(real_now()), 0)
            }
            done => done,
        }
        .map_err(|error| VmError::refused("set the VM's clock", error))
    }

    fn set(&self, vm: &VmFd, nanoseconds: u64, flags: u32) -> std::io::Result<()> {
        let mut bytes = [0; CLOCK.size];
        bytes[CLOCK_AT..CLOCK_AT + 8].copy_from_slice(&nanoseconds.to_le_bytes());
        bytes[FLAGS_AT..FLAGS_AT + 4].copy_from_slice(&flags.to_le_bytes());
        if flags & KVM_CLOCK_REALTIME != 0 {
            bytes[REALTIME_AT..REALTIME_AT + 8].copy_from_slice(&self.realtime.to_le_bytes());
        }
        sys::set_block(vm, &CLOCK, &bytes)
    }

    /// What it reads at the real time `now`; never less than it read.
    fn moved_to(&self, now: u64) -> u64 {
        self.nanoseconds.saturating_add(now.saturating_sub(self.realtime))
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

    fn is_believed(&self, now: u64, lasted: Duration) -> bool {
        let (passed, differ) =
            (i128::from(now) - i128::from(self.realtime), DIFFER.as_nanos() as i128);
        let most = i128::try_from(lasted.as_nanos()).unwrap_or(i128::MAX - differ) + differ;
        let is_believed = (-differ..=most).contains(&passed);
        if !is_believed {
            tracing::warn!(
                "By this host's clock and that of the one that it comes from the guest has stood still for {} ms, and it \
                 began to arrive {} ms ago: it was in a file, or the clocks differ. Its clock goes on from where it stood",
                passed / 1_000_000,
                lasted.as_millis()
            );
        }
        is_believed
    }
}

/// The host's real time, nanoseconds since 1970.
fn real_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
    u64::try_from(now).unwrap_or(u64::MAX)
}

const CLOCK_AT: usize = std::mem::offset_of!(kvm_clock_data, clock);
const FLAGS_AT: usize = std::mem::offset_of!(kvm_clock_data, flags);
const REALTIME_AT: usize = std::mem::offset_of!(kvm_clock_data, realtime);
const HOST_TSC_AT: usize = std::mem::offset_of!(kvm_clock_data, host_tsc);

/// The TSC offset that a guest needs on this host, whose clock reads `here`, so that its counter
/// has moved on with its clock since the source's clock read `there` under `offset`.
pub(crate) fn moved_offset(offset: u64, there: &ClockState, here: &ClockState, khz: u32) -> u64 {
    let passed = i128::from(here.nanoseconds) - i128::from(there.nanoseconds);
    // Counters and offsets are numbers modulo 2^64.
    offset
        .wrapping_add(there.host_tsc)
        .wrapping_sub(here.host_tsc)
        .wrapping_add(cycles(passed, khz))
}

/// Whether a guest's counter, which read `counter` when the clock read `there`, is no more than the host's with
/// `offset` added. Where KVM scales it is not, and an offset says nothing to another host. Registers are read one
/// after the other: less than a second apart counts as the same.
pub(crate) fn is_offset_alone(counter: u64, offset: u64, there: &ClockState, khz: u32) -> bool {
    let expected = there.host_tsc.wrapping_add(offset);
    (counter.wrapping_sub(expected) as i64).unsigned_abs() < cycles(1_000_000_000, khz)
}

/// What a counter that read `value` when the clock read `there` reads when it is `here`; it never goes back.
pub(crate) fn moved_counter(value: u64, there: &ClockState, here: &ClockState, khz: u32) -> u64 {
    let passed = here.nanoseconds.saturating_sub(there.nanoseconds);
    value.wrapping_add(cycles(passed.into(), khz))
}

fn cycles(nanoseconds: i128, khz: u32) -> u64 {
    (nanoseconds * i128::from(khz) / 1_000_000) as u64
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

    #[test]
    fn a_scaled_counter_is_told_from_one_with_an_offset() {
        // A 2 GHz guest; its counter was 500 when the host's was 1,000,000.
        let offset = 500u64.wrapping_sub(1_000_000);
        let is = |counter| is_offset_alone(counter, offset, &clock(7, 1_000_000), 2_000_000);
        assert!(is(500) && is(1_999_999_000) && is(0u64.wrapping_sub(1_999_999_000)));
        assert!(!is(2_000_001_000) && !is(0u64.wrapping_sub(2_000_000_000)));
        // After a day on a host of 3 GHz it is far off what its offset says.
        let day = clock(86_400_000_000_000, 86_400 * 3_000_000_000);
        assert!(is_offset_alone(86_400 * 3_000_000_000, 0, &day, 2_000_000));
        assert!(!is_offset_alone(86_400 * 2_000_000_000, 0, &day, 2_000_000));
    }

    #[test]
    fn a_counter_without_an_offset_moves_on_with_the_clock_and_never_back() {
        let moved = |here| moved_counter(500, &clock(7, 0), &clock(here, 0), 2_000_000);
        assert_eq!(moved(1_000_000_007), 2_000_000_500);
        assert_eq!(moved(3), 500);
    }

    #[test]
    fn a_clock_has_a_real_time_and_moves_on_by_it() {
        let plain = ClockState { nanoseconds: 10, ..Default::default() };
        let read = plain.with_realtime(1000);
        assert_eq!((read.flags, read.realtime), (KVM_CLOCK_REALTIME, 1000));
        assert_eq!(read.with_realtime(5), read, "what KVM said stands");
        assert_eq!((read.moved_to(1500), read.moved_to(900)), (510, 10));
        let second = DIFFER.as_nanos() as u64;
        let believed = |now, lasted| read.is_believed(now, Duration::from_nanos(lasted));
        assert!(believed(1500, 500) && believed(1000 + second, 0) && believed(0, 0));
        assert!(believed(1000 + second * 60, second * 59) && believed(u64::MAX, u64::MAX));
        assert!(!believed(1001 + second, 0) && !believed(1000 + second * 60, second * 58));
        let behind = ClockState { realtime: second * 2, ..read };
        assert!(
            !behind.is_believed(0, Duration::MAX) && behind.is_believed(second, Duration::ZERO)
        );
        assert!(!read.is_complete(), "the host's counter is not known");
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
            let _ = is_offset_alone(c, offset, &clock(a, b), khz);
            let _ = moved_counter(offset, &clock(a, b), &clock(c, d), khz);
            let _ = clock(a, b).moved_to(c);
        }
    }
}
