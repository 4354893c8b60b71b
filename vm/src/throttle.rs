//! Takes a share of its time from a guest: in each period its vCPUs nap for that share.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Result, VmError};
use crate::vcpu::Vcpu;

/// A nap and the time until the next one, together.
const PERIOD: Duration = Duration::from_millis(20);

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
        while let Some(share) = *percent {
            let until = Instant::now() + PERIOD * u32::from(share) / 100;
            self.vcpus.iter().for_each(|vcpu| vcpu.nap(until));
            (percent, _) = self
                .control
                .changed
                .wait_timeout(percent, PERIOD)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
