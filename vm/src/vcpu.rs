//! A vCPU and the thread that runs it: run, park, nap, end.
//!
//! The thread holds the vCPU's descriptor while it runs and lets go of it while parked, so whoever
//! parked it may read and write its state. It parks only with every exit answered and taken by KVM,
//! so that no half-done instruction is left in the shared page, which does not travel.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use decamp_shared::keeper::ExitRecord;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::Killable;

use crate::error::{Result, VmError};
use crate::ports::{Flow, Ports};
use crate::sys::{Backed, Kickable, install_kick, kick_signal};

/// How long a vCPU may take to park before that counts as an error.
const PARK_LIMIT: Duration = Duration::from_secs(5);

/// Told when the guest ends by itself.
pub(crate) type OnEnd = Arc<dyn Fn(ExitRecord) + Send + Sync>;

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
    Ended(ExitRecord),
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    doing: Doing,
    /// The vCPU sleeps until then before it runs on.
    nap_until: Option<Instant>,
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
        on_end: OnEnd,
    ) -> Result<Self> {
        let failed = |error| VmError::refused(format!("start the thread of vCPU {number}"), error);
        install_kick().map_err(failed)?;
        let fd = Arc::new(Mutex::new(fd));
        let state = State { wanted: Wanted::Park, doing: Doing::Parked, nap_until: None };
        let control = Arc::new(Control { state: Mutex::new(state), changed: Condvar::new() });
        let runner = Runner {
            fd: fd.clone(),
            control: control.clone(),
            ports,
            on_end,
            entered: false,
            _guest: guest,
        };
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{number}"))
            .spawn(move || {
                // Whoever waits for it is there until it comes.
                let _ = tell.send(nix::unistd::gettid().as_raw());
                runner.run();
            })
            .map_err(failed)?;
        let thread_id = told.recv().map_err(|error| failed(std::io::Error::other(error)))?;
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

    /// Lets it run.
    ///
    /// # Errors
    /// When the guest has ended; nothing runs then.
    pub(crate) fn run(&self) -> Result<()> {
        let mut state = self.control.lock();
        if let Doing::Ended(record) = &state.doing {
            return Err(VmError::State(format!("The guest has ended: {}", record.text)));
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
                state.doing == Doing::Running
            })
            .unwrap_or_else(PoisonError::into_inner);
        match &state.doing {
            Doing::Parked => Ok(()),
            Doing::Running => Err(VmError::State(format!(
                "vCPU {} did not stop within {} s",
                self.number,
                PARK_LIMIT.as_secs()
            ))),
            Doing::Ended(record) => {
                Err(VmError::State(format!("The guest has ended: {}", record.text)))
            }
        }
    }

    /// The descriptor of the parked vCPU. Waits while it runs.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
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

/// What the thread owns.
struct Runner {
    fd: Arc<Mutex<VcpuFd>>,
    control: Arc<Control>,
    ports: Ports,
    on_end: OnEnd,
    /// Whether the vCPU was entered since it was parked.
    entered: bool,
    /// Memory stays mapped for as long as this vCPU may run.
    _guest: Arc<Backed>,
}

impl Runner {
    fn run(mut self) {
        let _kickable = Kickable::new(&self.fd);
        while self.wait_to_run() {
            let fd = self.fd.clone();
            let mut fd = fd.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = self.run_until_asked(&mut fd);
            drop(fd);
            if let Some(record) = ended {
                self.control.lock().doing = Doing::Ended(record.clone());
                self.control.changed.notify_all();
                (self.on_end)(record);
                return;
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

    /// Runs until it is asked for something else, with every exit done; or until the guest ends.
    fn run_until_asked(&mut self, fd: &mut VcpuFd) -> Option<ExitRecord> {
        loop {
            // Reset before the wish is looked at: a kick that comes after it is a wish that came
            // before it.
            fd.set_kvm_immediate_exit(0);
            if !self.wants_to_run() {
                return if self.entered { self.settle(fd) } else { None };
            }
            self.entered = true;
            if let Entered::Ended(record) = self.enter(fd) {
                return Some(record);
            }
        }
    }

    /// Whether the vCPU shall run on now; naps first if it was told to.
    fn wants_to_run(&self) -> bool {
        let mut state = self.control.lock();
        while state.wanted == Wanted::Run {
            let now = Instant::now();
            let Some(until) = state.nap_until.filter(|until| *until > now) else {
                state.nap_until = None;
                return true;
            };
            (state, _) = self
                .control
                .changed
                .wait_timeout(state, until - now)
                .unwrap_or_else(PoisonError::into_inner);
        }
        false
    }

    /// Lets KVM finish the exit that was answered last, without running the guest on.
    fn settle(&mut self, fd: &mut VcpuFd) -> Option<ExitRecord> {
        loop {
            fd.set_kvm_immediate_exit(1);
            match self.enter(fd) {
                // Finishing one exit may give the next part of the same instruction.
                Entered::Exited => {}
                Entered::Interrupted => break,
                Entered::Ended(record) => return Some(record),
            }
        }
        fd.set_kvm_immediate_exit(0);
        self.entered = false;
        None
    }

    fn enter(&self, fd: &mut VcpuFd) -> Entered {
        match fd.run() {
            Ok(exit) => match self.ports.answer(exit) {
                Flow::Continue => Entered::Exited,
                Flow::End(record) => Entered::Ended(record),
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
}
