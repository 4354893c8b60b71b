//! A vCPU and the thread that runs it: run, park, nap, end.
//!
//! The thread holds the vCPU's descriptor while it runs and lets go of it while parked, so whoever
//! parked it may read and write its state. It parks only with every exit answered and taken by KVM,
//! so that no half-done instruction is left in the shared page, which does not travel. A visitor who
//! only looks at what no exit changes is let in between two entries, without all that.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use decamp_shared::keeper::ExitRecord;
use kvm_ioctls::VcpuFd;
use nix::time::{ClockId, clock_gettime};
use vmm_sys_util::signal::Killable;

use crate::error::{Result, VmError};
use crate::ports::{Flow, Ports};
use crate::sandbox::Allowed;
use crate::sys::{Backed, Kickable, install_kick, kick_signal};

/// How long a vCPU may take to park before that counts as an error.
const PARK_LIMIT: Duration = Duration::from_secs(5);

/// What a guest does by itself, and its VMM has to see to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// It ended. Its other vCPUs may run yet.
    Ended(ExitRecord),
    /// It asked to be reset. The vCPU that did is parked until it was.
    Reset(Reset),
}

/// Why a machine is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reset {
    /// The guest used a port that does it.
    Asked,
    /// A vCPU could go on no more (triple fault). It resets a PC, and is the last way in which kernels restart.
    Fault,
}

/// Told what the guest does by itself, by a vCPU's thread.
pub(crate) type OnEvent = Arc<dyn Fn(Event) + Send + Sync>;

/// What the thread is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Park,
    Run,
    Quit,
}

/// What the thread does.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Doing {
    Parked,
    Running,
    /// Waits, its descriptor free, for visitors to leave.
    Visited,
    Ended(ExitRecord),
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    doing: Doing,
    /// The vCPU sleeps until then before it runs on.
    nap_until: Option<Instant>,
    /// It asked for a reset of the machine, and why: it does not run on before that.
    awaits_reset: Option<Reset>,
    /// How many want its descriptor, or have it, while it would run.
    visitors: u32,
}

#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One vCPU with its thread.
#[derive(Debug)]
pub(crate) struct Vcpu {
    number: u32,
    fd: Arc<Mutex<VcpuFd>>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
    thread_id: i32,
}

impl Vcpu {
    /// Gives `fd`, vCPU `number` of `guest`, a thread of its own, parked. No instruction runs.
    pub(crate) fn start(
        number: u32,
        fd: VcpuFd,
        guest: Arc<Backed>,
        ports: Ports,
        on_event: OnEvent,
    ) -> Result<Self> {
        let failed = |error| VmError::refused(format!("start the thread of vCPU {number}"), error);
        install_kick().map_err(failed)?;
        let fd = Arc::new(Mutex::new(fd));
        let state = State {
            wanted: Wanted::Park,
            doing: Doing::Parked,
            nap_until: None,
            awaits_reset: None,
            visitors: 0,
        };
        let control = Arc::new(Control { state: Mutex::new(state), changed: Condvar::new() });
        let runner = Runner {
            fd: fd.clone(),
            control: control.clone(),
            ports,
            on_event,
            entered: false,
            _guest: guest,
        };
        let allowed = Allowed::vcpu(&runner.ports.virtio().allowed());
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{number}"))
            .spawn(move || {
                let confined = allowed.confine().map(|()| nix::unistd::gettid().as_raw());
                let works = confined.is_ok();
                // Whoever waits for it is there until it comes.
                let _ = tell.send(confined);
                if works {
                    runner.run();
                }
            })
            .map_err(failed)?;
        let thread_id = told.recv().map_err(|error| failed(std::io::Error::other(error)))??;
        Ok(Self { number, fd, control, thread: Some(thread), thread_id })
    }

    /// Number of its thread.
    pub(crate) fn thread_id(&self) -> i32 {
        self.thread_id
    }

    /// Number of the vCPU.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Lets it run, unless it waits for the machine's reset.
    ///
    /// # Errors
    /// When the guest has ended; nothing runs then.
    pub(crate) fn run(&self) -> Result<()> {
        let mut state = self.control.lock();
        if let Doing::Ended(record) = &state.doing {
            return Err(VmError::State(format!("The guest has ended: {}", record.text)));
        }
        if state.awaits_reset.is_some() {
            return Ok(());
        }
        state.wanted = Wanted::Run;
        self.control.changed.notify_all();
        Ok(())
    }

    /// Asks it to park, without waiting, so that several can be asked before one is waited for.
    pub(crate) fn ask_to_park(&self) {
        self.control.lock().wanted = Wanted::Park;
        self.control.changed.notify_all();
        self.kick();
    }

    /// Waits until it is parked.
    ///
    /// # Errors
    /// When the guest has ended, or does not stop in time.
    pub(crate) fn wait_parked(&self) -> Result<()> {
        let (state, _) = self
            .control
            .changed
            .wait_timeout_while(self.control.lock(), PARK_LIMIT, |state| {
                matches!(state.doing, Doing::Running | Doing::Visited)
            })
            .unwrap_or_else(PoisonError::into_inner);
        match &state.doing {
            Doing::Parked => Ok(()),
            Doing::Running | Doing::Visited => Err(self.does_not_stop()),
            Doing::Ended(record) => {
                Err(VmError::State(format!("The guest has ended: {}", record.text)))
            }
        }
    }

    /// Looks at it while it runs, between two entries into the guest, or as it stands. For what is the same whether
    /// or not an exit is answered: registers that KVM keeps. It must not take long, for the guest waits.
    ///
    /// # Errors
    /// When it does not let anybody in in time.
    pub(crate) fn visit<T>(&self, look: impl FnOnce(&VcpuFd) -> T) -> Result<T> {
        self.control.lock().visitors += 1;
        let visit = Visit(&self.control);
        self.control.changed.notify_all();
        self.kick();
        let (state, waited) = self
            .control
            .changed
            .wait_timeout_while(self.control.lock(), PARK_LIMIT, |state| {
                state.doing == Doing::Running
            })
            .unwrap_or_else(PoisonError::into_inner);
        drop(state);
        if waited.timed_out() {
            return Err(self.does_not_stop());
        }
        let found = look(&self.fd());
        drop(visit);
        Ok(found)
    }

    fn does_not_stop(&self) -> VmError {
        let (number, limit) = (self.number, PARK_LIMIT.as_secs());
        VmError::State(format!("vCPU {number} did not stop within {limit} s"))
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&self) -> Option<String> {
        match &self.control.lock().doing {
            Doing::Ended(record) => Some(record.text.clone()),
            Doing::Parked | Doing::Running | Doing::Visited => None,
        }
    }

    /// Why it waits for the machine's reset, if it does.
    pub(crate) fn awaits_reset(&self) -> Option<Reset> {
        self.control.lock().awaits_reset
    }

    /// The machine was reset, the vCPU parked: it may run again.
    pub(crate) fn was_reset(&self) {
        self.control.lock().awaits_reset = None;
    }

    /// The descriptor of the parked vCPU. Waits while it runs.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Processor time that its thread has had so far; `None` when it has ended.
    pub(crate) fn processor_time(&self) -> Option<Duration> {
        // A thread's own clock by its number, as clock_getcpuclockid(3) makes that of a process.
        const PER_THREAD_SCHEDULED: libc::clockid_t = 0b110;
        let clock = ClockId::from_raw((!self.thread_id << 3) | PER_THREAD_SCHEDULED);
        clock_gettime(clock).ok().map(Duration::from)
    }

    /// Sleeps until `until` before it runs on, from the next kick; see [`crate::throttle`].
    pub(crate) fn nap(&self, until: Instant) {
        self.control.lock().nap_until = Some(until);
        self.kick();
    }

    /// Wakes it from its nap.
    pub(crate) fn wake(&self) {
        self.control.lock().nap_until = None;
        self.control.changed.notify_all();
    }

    /// Sends the kick; lost on a thread that is gone.
    fn kick(&self) {
        if let Some(thread) = &self.thread
            && let Err(error) = thread.kill(kick_signal())
        {
            tracing::warn!("Could not kick vCPU {}: {error}", self.number);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.control.lock().wanted = Wanted::Quit;
        self.control.changed.notify_all();
        self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Somebody who wants the descriptor of a vCPU that would run, or has it.
struct Visit<'a>(&'a Control);

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.0.lock().visitors -= 1;
        self.0.changed.notify_all();
    }
}

/// What a vCPU's thread does next.
enum Next {
    Enter,
    /// Lets visitors in.
    Wait,
    /// It was asked for something else than to run.
    Leave,
}

/// What the thread owns.
struct Runner {
    fd: Arc<Mutex<VcpuFd>>,
    control: Arc<Control>,
    ports: Ports,
    on_event: OnEvent,
    /// Whether the vCPU was entered since it was parked.
    entered: bool,
    /// Memory stays mapped for as long as this vCPU may run.
    _guest: Arc<Backed>,
}

impl Runner {
    fn run(mut self) {
        let _kickable = Kickable::new(&self.fd);
        while self.wait_to_run() {
            match self.run_until_asked() {
                None => {}
                Some(Event::Ended(record)) => {
                    self.control.lock().doing = Doing::Ended(record.clone());
                    self.control.changed.notify_all();
                    (self.on_event)(Event::Ended(record));
                    return;
                }
                Some(event @ Event::Reset(_)) => (self.on_event)(event),
            }
        }
    }

    /// Parks until asked to run; `false` when asked to quit.
    fn wait_to_run(&mut self) -> bool {
        let mut state = self.control.lock();
        state.doing = Doing::Parked;
        self.control.changed.notify_all();
        let mut state = self
            .control
            .changed
            .wait_while(state, |state| state.wanted == Wanted::Park)
            .unwrap_or_else(PoisonError::into_inner);
        if state.wanted == Wanted::Run {
            state.doing = Doing::Running;
        }
        state.wanted == Wanted::Run
    }

    /// Runs until it is asked for something else, or asks for a reset itself, with every exit done; or until
    /// the guest ends.
    fn run_until_asked(&mut self) -> Option<Event> {
        let shared = self.fd.clone();
        let mut fd = shared.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // Reset before the wish is looked at: a kick that comes after it is a wish that came
            // before it.
            fd.set_kvm_immediate_exit(0);
            match self.next() {
                Next::Enter => {}
                Next::Leave => return if self.entered { self.settle(&mut fd) } else { None },
                Next::Wait => {
                    drop(fd);
                    self.let_visitors_in();
                    fd = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            }
            self.entered = true;
            match self.enter(&mut fd) {
                Entered::Exited | Entered::Interrupted => {}
                Entered::Ended(record) => return Some(Event::Ended(record)),
                // Nobody lets it run on before the reset; the instruction that asked for it is done first.
                Entered::Reset(why) => {
                    self.await_reset(why);
                    return self.settle(&mut fd).or(Some(Event::Reset(why)));
                }
            }
        }
    }

    /// What the vCPU shall do now; naps first if it was told to.
    fn next(&self) -> Next {
        let mut state = self.control.lock();
        while state.wanted == Wanted::Run {
            if state.visitors > 0 {
                return Next::Wait;
            }
            let now = Instant::now();
            let Some(until) = state.nap_until.filter(|until| *until > now) else {
                state.nap_until = None;
                return Next::Enter;
            };
            (state, _) = self
                .control
                .changed
                .wait_timeout(state, until - now)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Next::Leave
    }

    /// Waits until nobody wants the descriptor, which it has let go of.
    fn let_visitors_in(&self) {
        let mut state = self.control.lock();
        state.doing = Doing::Visited;
        self.control.changed.notify_all();
        state = self
            .control
            .changed
            .wait_while(state, |state| state.visitors > 0)
            .unwrap_or_else(PoisonError::into_inner);
        state.doing = Doing::Running;
    }

    /// Lets KVM finish the exit that was answered last, without running the guest on.
    fn settle(&mut self, fd: &mut VcpuFd) -> Option<Event> {
        let mut asked = None;
        loop {
            fd.set_kvm_immediate_exit(1);
            match self.enter(fd) {
                // Finishing one exit may give the next part of the same instruction.
                Entered::Exited => {}
                Entered::Interrupted => break,
                Entered::Ended(record) => return Some(Event::Ended(record)),
                Entered::Reset(why) => {
                    self.await_reset(why);
                    asked = Some(Event::Reset(why));
                }
            }
        }
        fd.set_kvm_immediate_exit(0);
        self.entered = false;
        asked
    }

    fn await_reset(&self, why: Reset) {
        let mut state = self.control.lock();
        state.awaits_reset = Some(why);
        if state.wanted == Wanted::Run {
            state.wanted = Wanted::Park;
        }
    }

    fn enter(&self, fd: &mut VcpuFd) -> Entered {
        match fd.run() {
            Ok(exit) => match self.ports.answer(exit) {
                Flow::Continue => Entered::Exited,
                Flow::End(record) => Entered::Ended(record),
                Flow::Reset(why) => Entered::Reset(why),
            },
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
                Entered::Interrupted
            }
            Err(error) => Entered::Ended(ExitRecord {
                status: 1,
                text: format!("KVM could not run the guest ({error})"),
            }),
        }
    }
}

enum Entered {
    Exited,
    Interrupted,
    Ended(ExitRecord),
    Reset(Reset),
}
