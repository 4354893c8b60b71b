//! Who sees to what a guest does by itself, beside the keeper's server: resets it when it asks for that, and when
//! it has ended stops the rest of it and says so.
//!
//! A thread of its own, because a vCPU's thread cannot stop its own machine. It and the server take turns at
//! the machine by its lock.

use std::sync::mpsc::{Receiver, channel as queue};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use decamp_shared::keeper::{ExitRecord, ExitSignal};

use crate::error::{Result, VmError};
use crate::machine::Machine;
use crate::vcpu::{Event, OnEvent, Reset};
use crate::virtio::complaints::Complaints;

/// A guest whose vCPUs fault for good so soon after its start has come to nothing.
const SOON: Duration = Duration::from_secs(2);
/// How often in a row, before it is not started again.
const FAULTS: u32 = 3;

/// A machine that the server and the caretaker share; `None` once it is gone.
pub(crate) type Shared = Arc<Mutex<Option<Machine>>>;

/// Makes `machine` one that is shared.
pub(crate) fn share(machine: Machine) -> Shared {
    Arc::new(Mutex::new(Some(machine)))
}

/// What vCPUs tell, and where it arrives.
pub(crate) fn channel() -> (OnEvent, Events) {
    let (sender, events) = queue();
    // Nobody is told any more once the keeper ends.
    (Arc::new(move |event| drop(sender.send(event))), Events(events))
}

/// What a machine's vCPUs tell.
#[derive(Debug)]
pub(crate) struct Events(Receiver<Event>);

impl Events {
    /// Looks after `machine`, from which these events come, until it is gone; tells `exit` when the guest has
    /// ended.
    pub(crate) fn start(self, machine: &Shared, exit: ExitSignal) -> Result<End> {
        let end = End::default();
        let caretaker = Caretaker {
            machine: Arc::downgrade(machine),
            exit,
            end: end.clone(),
            started: Instant::now(),
            faults: 0,
            told: Complaints::default(),
        };
        std::thread::Builder::new()
            .name("caretaker".into())
            .spawn(move || caretaker.run(&self.0))
            .map_err(|error| VmError::refused("start the caretaker's thread", error))?;
        Ok(end)
    }
}

/// How the guest ended, once it has.
#[derive(Clone, Debug, Default)]
pub(crate) struct End(Arc<(Mutex<Option<ExitRecord>>, Condvar)>);

impl End {
    /// Waits for at most `limit`.
    pub(crate) fn wait(&self, limit: Duration) -> Option<ExitRecord> {
        let (record, told) = &*self.0;
        let record = record.lock().unwrap_or_else(PoisonError::into_inner);
        let (record, _) = told
            .wait_timeout_while(record, limit, |record| record.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        record.clone()
    }

    fn tell(&self, ended: ExitRecord) {
        let (record, told) = &*self.0;
        record.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(ended);
        told.notify_all();
    }
}

struct Caretaker {
    machine: Weak<Mutex<Option<Machine>>>,
    exit: ExitSignal,
    end: End,
    /// When the guest began, or was last reset.
    started: Instant,
    /// Faults in a row, each soon after a start.
    faults: u32,
    /// A guest may start anew as often as it likes, and nobody bounds the keeper's log.
    told: Complaints,
}

impl Caretaker {
    fn run(mut self, events: &Receiver<Event>) {
        while let Ok(event) = events.recv() {
            match event {
                Event::Ended(record) => self.ended(record),
                Event::Reset(_) => self.reset(),
            }
        }
    }

    /// The guest has ended: the rest of it is stopped before anybody hears of that.
    fn ended(&self, record: ExitRecord) {
        self.with(Machine::halt);
        self.tell(record);
    }

    fn tell(&self, record: ExitRecord) {
        self.end.tell(record.clone());
        self.exit.raise(record);
    }

    fn reset(&mut self) {
        let Some(machine) = self.machine.upgrade() else { return };
        let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(machine) = machine.as_mut() else { return };
        if let Err(record) = self.reset_locked(machine) {
            machine.halt();
            self.tell(record);
        }
    }

    /// Starts `machine` anew, if any of its vCPUs still waits for that. Several that ask together are served
    /// together, and the server does it itself when it pauses: what they told then comes late, and means nothing.
    ///
    /// # Errors
    /// How the guest ended, when it is not to be started again or cannot be.
    fn reset_locked(&mut self, machine: &mut Machine) -> std::result::Result<(), ExitRecord> {
        let Some(why) = machine.awaits_reset() else { return Ok(()) };
        let ran = self.started.elapsed();
        self.started = Instant::now();
        self.faults = if why == Reset::Fault && ran < SOON { self.faults + 1 } else { 0 };
        if self.faults >= FAULTS {
            return Err(ExitRecord { status: 1, text: "triple fault".into() });
        }
        if let Some(unsaid) = self.told.next(self.started) {
            tracing::info!(unsaid, "The guest is started anew after {ran:?} ({why:?})");
        }
        machine.reset_if_asked().map_err(|error| {
            let text = format!("could not be started anew: {}", error.with_causes());
            ExitRecord { status: 1, text }
        })
    }

    fn with(&self, work: impl FnOnce(&mut Machine)) {
        let Some(machine) = self.machine.upgrade() else { return };
        let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(machine) = machine.as_mut() {
            work(machine);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::ConsolePaths;
    use crate::spec::VmSpec;
    use crate::testing::{elf, guest_spec};

    /// A guest of `spec` in the care of a caretaker.
    fn kept(spec: &VmSpec, dir: &std::path::Path) -> (Shared, End) {
        let console = ConsolePaths { log: dir.join("log"), socket: dir.join("socket") };
        let (on_event, events) = channel();
        let machine = share(Machine::boot(spec, &console, Vec::new(), on_event).expect("machine"));
        let end = events.start(&machine, ExitSignal::new().expect("signal")).expect("caretaker");
        machine.lock().expect("machine").as_mut().expect("machine").run().expect("run");
        (machine, end)
    }

    #[test]
    fn a_guest_that_faults_for_ever_ends() {
        let dir = tempfile::tempdir().expect("directory");
        let spec = guest_spec(dir.path());
        std::fs::write(&spec.kernel, elf(&[0x0f, 0x0b], Some(0x10_0000))).expect("write");
        let (machine, end) = kept(&spec, dir.path());
        let record = end.wait(crate::testing::PATIENCE).expect("an end");
        assert_eq!((record.status, record.text.as_str()), (1, "triple fault"));
        let mut machine = machine.lock().expect("machine");
        let machine = machine.as_mut().expect("machine");
        assert!(!machine.press_power_button(), "there is nobody to hear it");
    }

    #[test]
    fn a_guest_that_cannot_be_started_anew_ends_with_the_reason() {
        let dir = tempfile::tempdir().expect("directory");
        let spec = guest_spec(dir.path());
        let (_machine, end) = kept(&spec, dir.path());
        assert_eq!(end.wait(Duration::from_millis(20)), None);
        std::fs::remove_file(&spec.kernel).expect("remove");
        let mut client =
            std::os::unix::net::UnixStream::connect(dir.path().join("socket")).expect("console");
        std::io::Write::write_all(&mut client, b"r").expect("type");
        let record = end.wait(crate::testing::PATIENCE).expect("an end");
        assert_eq!(record.status, 1);
        assert!(record.text.contains("guest.elf"), "{}", record.text);
    }

    /// Events that come late: from vCPUs that fault together, or after the server did what they ask for.
    #[test]
    fn what_was_reset_already_is_neither_counted_nor_ended() {
        let dir = tempfile::tempdir().expect("directory");
        let console =
            ConsolePaths { log: dir.path().join("log"), socket: dir.path().join("socket") };
        let (on_event, events) = channel();
        let late = on_event.clone();
        let spec = guest_spec(dir.path());
        let mut machine = Machine::boot(&spec, &console, Vec::new(), on_event).expect("machine");
        machine.run().expect("run");
        machine.pause().expect("pause");
        let machine = share(machine);
        let end = events.start(&machine, ExitSignal::new().expect("signal")).expect("caretaker");
        for _ in 0..2 * FAULTS {
            late(Event::Reset(Reset::Fault));
        }
        assert_eq!(end.wait(Duration::from_millis(200)), None, "it stands where it was paused");
        let mut machine = machine.lock().expect("machine");
        let machine = machine.as_mut().expect("machine");
        machine.save().expect("saved");
        machine.resume().expect("runs on");
        let count = |machine: &Machine| {
            let at = vm_memory::GuestAddress(crate::testing::COUNTER);
            let map = machine.memory().map();
            vm_memory::Bytes::<vm_memory::GuestAddress>::read_obj::<u64>(map, at).expect("count")
        };
        let stood = count(machine);
        crate::testing::wait_for("the guest to count", || count(machine) > stood);
    }
}
