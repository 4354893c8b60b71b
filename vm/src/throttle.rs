//! Takes a share of its processor time from a guest: each vCPU naps in proportion to what its thread has had since its
//! last nap. What it waits for a processor counts as taken already: a guest whose host is busy, as with copying it, loses
//! no more than one that has a processor of its own.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Result, VmError};
use crate::vcpu::Vcpu;

/// A nap and the time until the next one, together, of a vCPU that has a processor of its own.
const PERIOD: Duration = Duration::from_millis(20);
/// No nap is longer, for the guest answers late enough as it is: of what a vCPU has, 95 % are taken at most.
const LONGEST: Duration = Duration::from_millis(40);
/// Time between two looks at what vCPUs have had, at least.
const LOOK: Duration = Duration::from_millis(2);

#[derive(Debug)]
struct Control {
    /// Percent taken away; `None`: end.
    percent: Mutex<Option<u8>>,
    changed: Condvar,
}

/// Throttles until it is dropped.
#[derive(Debug)]
pub(crate) struct Throttle {
    control: Arc<Control>,
    vcpus: Arc<Vec<Vcpu>>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// Takes `percent` (at most 99) of their time from `vcpus`.
    pub(crate) fn start(vcpus: &Arc<Vec<Vcpu>>, percent: u8) -> Result<Self> {
        let control = Arc::new(Control {
            percent: Mutex::new(Some(percent.min(99))),
            changed: Condvar::new(),
        });
        let worker = Worker { control: control.clone(), vcpus: vcpus.clone() };
        let thread = std::thread::Builder::new()
            .name("throttle".into())
            .spawn(move || worker.run())
            .map_err(|error| VmError::refused("start the throttle's thread", error))?;
        Ok(Self { control, vcpus: vcpus.clone(), thread: Some(thread) })
    }

    /// Takes `percent` (at most 99) from now on.
    pub(crate) fn set(&self, percent: u8) {
        self.tell(Some(percent.min(99)));
    }

    fn tell(&self, percent: Option<u8>) {
        *self.control.percent.lock().unwrap_or_else(PoisonError::into_inner) = percent;
        self.control.changed.notify_all();
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.tell(None);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.vcpus.iter().for_each(|vcpu| vcpu.wake());
    }
}

struct Worker {
    control: Arc<Control>,
    vcpus: Arc<Vec<Vcpu>>,
}

impl Worker {
    fn run(self) {
        let mut percent = self.control.percent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut had: Vec<_> = self.vcpus.iter().map(Vcpu::processor_time).collect();
        while let Some(taken) = *percent {
            (percent, _) = self
                .control
                .changed
                .wait_timeout(percent, run_between(taken))
                .unwrap_or_else(PoisonError::into_inner);
            for (vcpu, had) in self.vcpus.iter().zip(&mut had) {
                let Some((now, before)) = vcpu.processor_time().zip(*had) else { continue };
                if let Some(nap) = nap_after(now.saturating_sub(before), taken) {
                    *had = Some(now);
                    vcpu.nap(Instant::now() + nap);
                }
            }
        }
    }
}

/// What a vCPU may have between two naps of one from which `taken` percent are taken.
fn run_between(taken: u8) -> Duration {
    (PERIOD * (100 - u32::from(taken)) / 100).max(LOOK)
}

/// How long a vCPU naps that has had `ran` since its last nap, if that is worth being kicked for.
fn nap_after(ran: Duration, taken: u8) -> Option<Duration> {
    let nap = ran * u32::from(taken) / (100 - u32::from(taken));
    (ran >= run_between(taken) / 2).then(|| nap.min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn naps_are_in_proportion_to_what_a_vcpu_has_had() {
        let ms = Duration::from_millis;
        // All of a processor: so much of each period.
        for (taken, run) in [(20, 16), (50, 10), (80, 4)] {
            assert_eq!(run_between(taken), ms(run));
            assert_eq!(nap_after(ms(run), taken), Some(PERIOD - ms(run)));
        }
        // Half of one, and less than is worth it.
        assert_eq!(nap_after(ms(2), 80), Some(ms(8)));
        assert_eq!(nap_after(ms(1), 80), None);
        assert_eq!(nap_after(Duration::ZERO, 99), None);
        assert_eq!(nap_after(ms(2), 99), Some(LONGEST));
    }
}
