//! The thread of a device: waits, works with the device's lock held, stands still while it is paused, not set
//! up or broken, and ends when the device is dropped.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use virtio_queue::{Queue, QueueT};

use super::complaints::Complaints;
use super::device::{Broken, Device, Io, Waiting};
use super::interrupt::{Interrupt, Line};
use super::poller::{Poller, Ready};
use crate::error::{Result, VmError, with_causes};
use crate::memory::Map;
use crate::sandbox::Allowed;

/// What the lock of a device protects: all of it.
pub(super) struct Core {
    pub(super) device: Box<dyn Device>,
    pub(super) queues: Vec<Queue>,
    /// What the driver took.
    pub(super) features: u64,
    /// The driver set it up, and it is not broken.
    pub(super) works: bool,
    /// The driver has to reset it.
    pub(super) broken: bool,
    /// It came from elsewhere and has not worked here yet.
    pub(super) came: bool,
    paused: bool,
    /// It stands until it is let go on, whatever becomes of the others.
    held: bool,
    quits: bool,
}

impl Core {
    /// Whether nothing of it may be under way.
    fn stands(&self) -> bool {
        self.paused || self.held || !self.works
    }
}

/// A device with all that it works with.
pub(super) struct Shared {
    pub(super) label: String,
    pub(super) interrupt: Interrupt,
    pub(super) poller: Poller,
    pub(super) waiting: Waiting,
    complaints: Complaints,
    memory: Map,
    core: Mutex<Core>,
    changed: Condvar,
    /// Who wants the device while it works goes through here first, and so does the device's thread after each
    /// piece of work: else that might have the lock again before anybody else is awake.
    door: Mutex<()>,
}

impl Shared {
    /// `device`, paused, with nothing that drives it.
    ///
    /// # Errors
    /// When the kernel gives nothing to wait with.
    pub(super) fn new(
        label: &str,
        mut device: Box<dyn Device>,
        memory: Map,
        line: Line,
    ) -> Result<Self> {
        let mut queues = Vec::new();
        for most in device.queues() {
            queues.push(Queue::new(*most).map_err(|error| {
                VmError::refused(
                    format!("make a queue of device {label}"),
                    std::io::Error::other(error),
                )
            })?);
        }
        let poller = Poller::new(queues.len())?;
        device.attach(&poller)?;
        let core = Core {
            device,
            queues,
            features: 0,
            works: false,
            broken: false,
            came: false,
            paused: true,
            held: false,
            quits: false,
        };
        Ok(Self {
            label: label.to_owned(),
            interrupt: Interrupt::new(line),
            poller,
            waiting: Waiting::default(),
            complaints: Complaints::default(),
            memory,
            core: Mutex::new(core),
            changed: Condvar::new(),
            door: Mutex::new(()),
        })
    }

    /// For anybody but the device's own thread, which sees that somebody waits.
    pub(super) fn lock(&self) -> MutexGuard<'_, Core> {
        self.waiting.any.fetch_add(1, Ordering::SeqCst);
        let core = self.lock_to_work();
        self.waiting.any.fetch_sub(1, Ordering::SeqCst);
        core
    }

    fn lock_to_work(&self) -> MutexGuard<'_, Core> {
        let _door = self.door.lock().unwrap_or_else(PoisonError::into_inner);
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Guest memory.
    pub(super) fn memory(&self) -> &Map {
        &self.memory
    }

    /// Lets the device work, and breaks it when it cannot.
    pub(super) fn work(
        &self,
        core: &mut Core,
        work: impl FnOnce(&mut dyn Device, &mut Io<'_>) -> std::result::Result<(), Broken>,
    ) {
        let mut io = Io {
            memory: &self.memory,
            features: core.features,
            queues: &mut core.queues,
            interrupt: &self.interrupt,
            poller: &self.poller,
            waiting: &self.waiting,
        };
        if let Err(broken) = work(core.device.as_mut(), &mut io) {
            let why = with_causes(&broken);
            self.complain(&format!("stands until its driver resets it: {why}"));
            core.works = false;
            core.broken = true;
            self.interrupt.config_changed();
        }
    }

    /// Says `what` of the device in the log, where the guest may be at the root of it.
    pub(super) fn complain(&self, what: &str) {
        match self.complaints.next(Instant::now()) {
            Some(0) => tracing::warn!("Device {} {what}", self.label),
            Some(unsaid) => tracing::warn!("Device {} {what} ({unsaid} more unsaid)", self.label),
            None => tracing::debug!("Device {} {what}", self.label),
        }
    }

    /// The driver set the device up: it works from here on.
    pub(super) fn start(&self, core: &mut Core) {
        core.works = true;
        self.work(core, |device, io| device.start(io));
        self.kick_all(core);
        self.changed.notify_all();
    }

    /// As when it was made.
    pub(super) fn reset(&self, core: &mut Core) {
        core.works = false;
        core.broken = false;
        core.came = false;
        core.features = 0;
        core.device.reset();
        core.queues.iter_mut().for_each(QueueT::reset);
        self.interrupt.acknowledge(u32::MAX);
    }

    /// What may have been kicked is looked at.
    fn kick_all(&self, core: &Core) {
        (0..core.queues.len()).for_each(|queue| self.poller.kick(queue));
    }

    fn run(&self) {
        let mut ready = Vec::new();
        loop {
            if let Err(error) = self.poller.wait(&mut ready) {
                tracing::error!("Device {} cannot wait for its events: {error}", self.label);
                return;
            }
            let mut core = self.lock_to_work();
            if core.quits {
                return;
            }
            if core.stands() {
                // What was ready still is when it works again: kicks are given once more, the rest stays.
                core = self
                    .changed
                    .wait_while(core, |core| !core.quits && core.stands())
                    .unwrap_or_else(PoisonError::into_inner);
                self.kick_all(&core);
                continue;
            }
            for one in &ready {
                if !core.works {
                    break;
                }
                self.work(&mut core, |device, io| match *one {
                    Ready::Queue(queue) => device.on_queue(queue, io),
                    Ready::Own(token) => device.on_ready(token, io),
                });
            }
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Device");
        shown.field("label", &self.label).field("interrupt", &self.interrupt);
        if let Ok(core) = self.core.try_lock() {
            shown.field("device", &core.device).field("works", &core.works);
        }
        shown.finish_non_exhaustive()
    }
}

/// A device and its thread. Dropped, it is gone, and nothing of it is under way.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// `device`, paused, on `memory` and the interrupt `line`; `label` names it.
    ///
    /// # Errors
    /// When the kernel gives no thread, or nothing to wait with.
    pub(super) fn start(
        label: &str,
        device: Box<dyn Device>,
        memory: Map,
        line: Line,
    ) -> Result<Self> {
        let failed = |error| VmError::refused(format!("start the thread of device {label}"), error);
        let shared = Arc::new(Shared::new(label, device, memory, line)?);
        let allowed = Allowed::device().and(&shared.lock().device.allowed());
        let runner = shared.clone();
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(label.to_owned())
            .spawn(move || {
                let confined = allowed.confine();
                let works = confined.is_ok();
                let _ = tell.send(confined);
                if works {
                    runner.run();
                }
            })
            .map_err(failed)?;
        let worker = Self { shared, thread: Some(thread) };
        told.recv().map_err(|error| failed(std::io::Error::other(error)))??;
        Ok(worker)
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Stops the device; nothing of it is under way when this returns.
    pub(super) fn pause(&self) {
        self.stand(|core| &mut core.paused);
    }

    /// The same of this device alone: its driver finds it slow, until [`Worker::let_go_on`].
    pub(super) fn hold(&self) {
        self.stand(|core| &mut core.held);
    }

    /// It is not held any more.
    pub(super) fn let_go_on(&self) {
        let mut core = self.shared.lock();
        if std::mem::take(&mut core.held) {
            self.shared.kick_all(&core);
            self.shared.changed.notify_all();
        }
    }

    /// Sets what keeps the device from working, and settles it.
    fn stand(&self, flag: impl Fn(&mut Core) -> &mut bool) {
        // Before anything is waited for, so that no more is begun.
        self.shared.waiting.to_pause.store(true, Ordering::SeqCst);
        let mut core = self.shared.lock();
        self.shared.waiting.to_pause.store(false, Ordering::SeqCst);
        if !std::mem::replace(flag(&mut core), true) && core.works {
            self.shared.work(&mut core, |device, io| device.settle(io));
        }
    }

    /// Lets it work.
    pub(super) fn resume(&self) {
        let mut core = self.shared.lock();
        core.paused = false;
        if std::mem::take(&mut core.came) && core.works {
            self.shared.work(&mut core, |device, io| device.arrived(io));
        }
        self.shared.kick_all(&core);
        self.shared.changed.notify_all();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.pause();
        self.shared.lock().quits = true;
        self.shared.changed.notify_all();
        self.shared.poller.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
