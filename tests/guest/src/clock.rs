//! Time by the time stamp counter alone: no timer, no interrupt, no paravirtual clock. After a move
//! the counter may stand anywhere and run at another rate, so time here is a sum of steps, a step
//! backwards counts as nothing, and only differences between neighbours are ever used.

use crate::sys::{cpuid, port_in, port_out, tsc};

const PIT_HZ: u64 = 1_193_182;
/// Ticks of the timer that a calibration takes: 20 ms.
const PIT_TICKS: u64 = PIT_HZ / 50;
/// Used when nothing tells the frequency; the report says so.
const ASSUMED_KHZ: u64 = 2_000_000;

/// Steps of the counter, summed up.
pub(crate) struct Clock {
    khz: u64,
    last: u64,
    elapsed: u64,
    longest: u64,
}

/// A steady rate of events.
pub(crate) struct Pace {
    interval: u64,
    next: u64,
    /// How far behind it may fall before it forgets: a pause is not followed by a burst.
    backlog: u64,
}

impl Clock {
    /// A clock for a counter of so many kHz.
    pub(crate) fn new(khz: u64) -> Clock {
        Clock { khz, last: tsc(), elapsed: 0, longest: 0 }
    }

    /// Looks at the counter; cycles since the start.
    pub(crate) fn tick(&mut self) -> u64 {
        let now = tsc();
        let step = now.saturating_sub(self.last);
        self.last = now;
        self.longest = self.longest.max(step);
        self.elapsed = self.elapsed.wrapping_add(step);
        self.elapsed
    }

    /// Milliseconds since the start.
    pub(crate) fn milliseconds(&self) -> u64 {
        self.elapsed / self.khz
    }

    /// Microseconds of the longest step since the last call.
    pub(crate) fn take_longest_gap(&mut self) -> u64 {
        let longest = core::mem::take(&mut self.longest);
        (u128::from(longest) * 1000 / u128::from(self.khz)) as u64
    }

    /// A pace of `rate` events a second from now on; 0 is as fast as one asks.
    pub(crate) fn pace(&self, rate: u64) -> Pace {
        let interval = (self.khz * 1000).checked_div(rate).unwrap_or(0);
        let backlog = (self.khz * 10).max(interval);
        Pace { interval, next: self.elapsed, backlog }
    }
}

impl Pace {
    /// Whether an event is due at `now`; takes it when so.
    pub(crate) fn due(&mut self, now: u64) -> bool {
        if self.interval == 0 {
            return true;
        }
        if now < self.next {
            return false;
        }
        self.next = (self.next + self.interval).max(now.saturating_sub(self.backlog));
        true
    }
}

/// The counter's kHz, and who said so.
pub(crate) fn calibrate() -> (u64, &'static str) {
    from_hypervisor()
        .map(|khz| (khz, "hypervisor"))
        .or_else(|| from_crystal().map(|khz| (khz, "cpuid")))
        .or_else(|| from_timer().map(|khz| (khz, "pit")))
        .or_else(|| from_base_frequency().map(|khz| (khz, "base")))
        .unwrap_or((ASSUMED_KHZ, "assumed"))
}

/// Leaf 0x40000010, which KVM's users may offer.
fn from_hypervisor() -> Option<u64> {
    let present = cpuid(1).ecx >> 31 == 1;
    if !present || !(0x4000_0010..0x4001_0000).contains(&cpuid(0x4000_0000).eax) {
        return None;
    }
    plausible(u64::from(cpuid(0x4000_0010).eax))
}

/// Leaf 0x15: the crystal's frequency and the counter's ratio to it.
fn from_crystal() -> Option<u64> {
    if cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = cpuid(0x15);
    let product = u64::from(leaf.ecx) * u64::from(leaf.ebx);
    plausible(product.checked_div(u64::from(leaf.eax))? / 1000)
}

/// Leaf 0x16: the base frequency in MHz, which the counter mostly has.
fn from_base_frequency() -> Option<u64> {
    if cpuid(0).eax < 0x16 {
        return None;
    }
    plausible(u64::from(cpuid(0x16).eax & 0xFFFF) * 1000)
}

/// Channel 2 of the timer, counted down once and watched through port 0x61.
fn from_timer() -> Option<u64> {
    port_out(0x61, (port_in(0x61) & !0x02) | 0x01);
    port_out(0x43, 0xB0);
    port_out(0x42, PIT_TICKS as u8);
    port_out(0x42, (PIT_TICKS >> 8) as u8);
    let start = tsc();
    let mut looks = 0;
    while port_in(0x61) & 0x20 == 0 {
        looks += 1;
        if looks > 1_000_000 {
            return None;
        }
    }
    let cycles = tsc().saturating_sub(start);
    // A bus without a timer reads as all ones and would be done at the first look.
    if looks < 4 { None } else { plausible(cycles * PIT_HZ / PIT_TICKS / 1000) }
}

fn plausible(khz: u64) -> Option<u64> {
    (100_000..20_000_000).contains(&khz).then_some(khz)
}
