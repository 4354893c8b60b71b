//! Making a task do a system call for us: a userfaultfd can only be made by the process whose memory it is
//! of, and a filter of system calls only be put on a thread by itself.
//!
//! The task is stopped for the fraction of a millisecond that this takes, calls through the instruction
//! in its own vdso (nothing of it is patched, so other threads may run on), and goes on where it was; a
//! system call that it was in is restarted by the kernel. Who traces is a thread that does nothing else,
//! because ptrace belongs to a thread, and whatever happens to that thread ends the tracing.

use std::cell::Cell;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use decamp_shared::pages::PAGE_SIZE;

use crate::error::{ContainerError, Result};
use crate::sys::trace::{self, Stop};
use crate::sys::{self, Calls, arch, userfault};

/// A task that does not stop within this is stuck in the kernel, and left alone.
const STOP_WITHIN: Duration = Duration::from_millis(500);
/// The same for all tasks of a process together.
const ALL_WITHIN: Duration = Duration::from_secs(1);
/// Once it calls for us it is waited for as long as it may take: left alone it would go on in our call
/// with nothing of its own. It is ready to run all the while, so this is the host's slowness alone.
const CALL_WITHIN: Duration = Duration::from_secs(3600);
/// A task that is in a system call which we answer comes out of it within this, once it was answered.
const BACK_WITHIN: Duration = Duration::from_secs(60);
/// Pages of a vdso that are looked at.
const VDSO_PAGES: u64 = 2;
/// Where a task's restartable sequences area has the address of the one it is in (linux/rseq.h).
const RSEQ_POINTER: u64 = 8;

/// A userfaultfd of another process, made by it.
pub(crate) struct Injected {
    /// The descriptor. The process itself has none.
    pub(crate) uffd: OwnedFd,
    /// For how long one of its tasks stood still.
    pub(crate) stopped: Duration,
}

/// Has process `pid` make a userfaultfd and takes it.
pub(crate) fn userfaultfd_of(pid: i32) -> Result<Injected> {
    let made = traced(|| {
        let process = sys::pidfd_open(pid)?;
        inject(pid, |task, instruction| task.make_userfaultfd(&process, instruction))
    });
    let (uffd, stopped) =
        made.map_err(ContainerError::io(format!("have process {pid} make a userfaultfd")))?;
    Ok(Injected { uffd, stopped })
}

/// Has process `pid`, which has every right, make a userfaultfd that sees the kernel's faults too, and takes
/// it. The process, and what it forks, has no huge pages from then on.
pub(crate) fn whole_userfaultfd_of(pid: i32) -> Result<OwnedFd> {
    let made = traced(|| {
        let process = sys::pidfd_open(pid)?;
        inject(pid, |task, instruction| {
            trace::set_signal_mask(task.task, u64::MAX)?;
            let option = libc::PR_SET_THP_DISABLE as u64;
            task.call(instruction, libc::SYS_prctl, [option, 1, 0])?;
            let flags = libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64;
            task.make(&process, instruction, libc::SYS_userfaultfd, [flags, 0, 0])
        })
    });
    let made = made.map_err(ContainerError::io(format!("have process {pid} make a userfaultfd")));
    made.map(|(uffd, _)| uffd)
}

/// A filter that a task will put itself under; gives the descriptor that the filter sends calls to.
pub(crate) type Filtering = JoinHandle<io::Result<OwnedFd>>;

/// Has `task`, the only one of its process, which waits in a system call for an answer of ours, put itself
/// under a filter that sends us `calls`, before it does anything else. To be answered when this has returned.
///
/// # Errors
/// When it cannot be traced; then it goes on as it would have.
pub(crate) fn filter_when_back(task: i32, calls: Calls) -> io::Result<Filtering> {
    let (say, told) = channel();
    let begun = thread::Builder::new().name("inject".to_owned()).spawn(move || {
        let since = match Stopped::ask(task) {
            Ok(since) => since,
            Err(error) => {
                // The same for who waits: it has no thread to join.
                let _ = say.send(Err(error));
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
        };
        let _ = say.send(Ok(()));
        let process = sys::pidfd_open(task)?;
        let stopped = Stopped::when_it_stands(task, task, since, BACK_WITHIN)?;
        let filtered = system_call_instruction(task)
            .and_then(|instruction| stopped.put_under_filter(&process, instruction, calls));
        stopped.let_go()?;
        filtered
    })?;
    let panicked = |_| Err(io::Error::other("the thread that traces panicked"));
    told.recv().unwrap_or_else(panicked)?;
    Ok(begun)
}

/// Has process `pid` close what it has of `ours`: descriptors of userfaultfds that it came by because it was
/// forked just when its parent had one for us.
pub(crate) fn take_back<'a>(pid: i32, ours: impl Iterator<Item = &'a OwnedFd>) -> Result<()> {
    let descriptors = descriptors_of_userfaultfds(pid);
    if descriptors.is_empty() {
        return Ok(());
    }
    for uffd in ours {
        for number in &descriptors {
            let is_ours = || sys::is_same_file(uffd.as_fd(), pid, *number);
            if !is_ours() {
                continue;
            }
            let closed = traced(|| {
                inject(pid, |task, instruction| match is_ours() {
                    true => task.close(*number, instruction),
                    false => Ok(()),
                })
            });
            closed.map_err(ContainerError::io(format!("have process {pid} close what is ours")))?;
            tracing::debug!(pid, number, "A process was forked with a descriptor of ours");
        }
    }
    Ok(())
}

fn descriptors_of_userfaultfds(pid: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let number = |entry: fs::DirEntry| {
        let link = fs::read_link(entry.path()).ok()?;
        let number = entry.file_name().to_str()?.parse().ok()?;
        (link.as_os_str() == "anon_inode:[userfaultfd]").then_some(number)
    };
    entries.filter_map(number).collect()
}

/// Does `work` on a thread that does nothing else.
fn traced<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("inject".to_owned());
        let panicked = |_| Err(io::Error::other("the thread that traces panicked"));
        thread.spawn_scoped(scope, work)?.join().unwrap_or_else(panicked)
    })
}

/// Has a task of process `pid` do `work`, which is given an address of a system call instruction. Gives also
/// for how long the task stood still.
fn inject<T>(pid: i32, work: impl Fn(&Stopped, u64) -> io::Result<T>) -> io::Result<(T, Duration)> {
    let mut last = io::Error::from_raw_os_error(libc::ESRCH);
    let begun = Instant::now();
    // A first thread that has ended leaves the others running.
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Some(task) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let left = ALL_WITHIN.saturating_sub(begun.elapsed());
        if left.is_zero() {
            break;
        }
        let stopped = match Stopped::stop(pid, task, STOP_WITHIN.min(left)) {
            Ok(stopped) => stopped,
            Err(error) => {
                last = error;
                continue;
            }
        };
        let begun = stopped.since;
        // Looked for now: an exec would have put it elsewhere.
        let made = system_call_instruction(pid).and_then(|instruction| work(&stopped, instruction));
        // Whatever came of the call, the task goes on as it was.
        stopped.let_go()?;
        return Ok((made?, begun.elapsed()));
    }
    Err(last)
}

/// A task that stands still because we stopped it.
struct Stopped {
    process: i32,
    task: i32,
    since: Instant,
    registers: arch::Registers,
    mask: u64,
    /// The restartable sequence that it was in, and where that begins anew.
    sequence: Option<(Range<u64>, u64)>,
    /// Whether it is to stop at the next opportunity, as somebody else wants it to.
    wanted_stop: Cell<bool>,
}

impl Stopped {
    fn stop(process: i32, task: i32, patience: Duration) -> io::Result<Self> {
        let since = Self::ask(task)?;
        Self::when_it_stands(process, task, since, patience)
    }

    /// Has a task stop before its next instruction; gives when that was.
    fn ask(task: i32) -> io::Result<Instant> {
        let options = trace::MARK_SYSTEM_CALLS | trace::SUSPEND_SECCOMP;
        trace::seize(task, options).or_else(|error| match is_filtered(task)? {
            // Without the right to suspend its filters they would judge our call, or kill it for that.
            true => Err(error),
            false => trace::seize(task, trace::MARK_SYSTEM_CALLS),
        })?;
        let since = Instant::now();
        trace::interrupt(task)?;
        Ok(since)
    }

    fn when_it_stands(
        process: i32,
        task: i32,
        since: Instant,
        patience: Duration,
    ) -> io::Result<Self> {
        let wanted_stop = Cell::new(false);
        await_interruption(task, patience, |signal| signal)?;
        let registers = arch::registers(task);
        let mask = trace::signal_mask(task);
        let (registers, mask) = match (registers, mask) {
            (Ok(registers), Ok(mask)) => (registers, mask),
            (Err(error), _) | (_, Err(error)) => {
                let _ = trace::detach(task);
                return Err(error);
            }
        };
        // Now: the first thing that the kernel does with a task that is led out of one is to forget it.
        let sequence = sequence(task);
        let stopped = Self { process, task, since, registers, mask, sequence, wanted_stop };
        if !arch::is_native(&stopped.registers) {
            trace::detach(task)?;
            return Err(io::Error::other("it runs code of another architecture"));
        }
        if trace::dispatches_system_calls(task) {
            trace::detach(task)?;
            return Err(io::Error::other(
                "it judges its system calls itself, and would judge ours",
            ));
        }
        Ok(stopped)
    }

    /// Has the task make a descriptor, takes it, and has it close its own.
    fn make_userfaultfd(&self, process: &OwnedFd, instruction: u64) -> io::Result<OwnedFd> {
        trace::set_signal_mask(self.task, u64::MAX)?;
        let flags = libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64 | userfault::USER_MODE_ONLY;
        self.make(process, instruction, libc::SYS_userfaultfd, [flags, 0, 0])
    }

    /// The same with the descriptor of a filter, which the task is under from then on.
    fn put_under_filter(
        &self,
        process: &OwnedFd,
        instruction: u64,
        calls: Calls,
    ) -> io::Result<OwnedFd> {
        trace::set_signal_mask(self.task, u64::MAX)?;
        let address = arch::below_the_stack(&self.registers, sys::FILTER_ROOM);
        sys::write_memory(self.task, address, &sys::filter_bytes(calls, address))?;
        let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
        self.make(process, instruction, libc::SYS_seccomp, [mode.into(), flags, address])
    }

    fn make(
        &self,
        process: &OwnedFd,
        instruction: u64,
        number: i64,
        arguments: [u64; 3],
    ) -> io::Result<OwnedFd> {
        let made = self.call(instruction, number, arguments)?;
        let taken = sys::pidfd_getfd(process.as_fd(), made as i32);
        let closed = self.call(instruction, libc::SYS_close, [made, 0, 0]);
        closed.and(taken)
    }

    fn close(&self, number: i32, instruction: u64) -> io::Result<()> {
        trace::set_signal_mask(self.task, u64::MAX)?;
        self.call(instruction, libc::SYS_close, [number as u64, 0, 0]).map(drop)
    }

    fn call(&self, instruction: u64, number: i64, arguments: [u64; 3]) -> io::Result<u64> {
        let calling = arch::calling(self.registers, instruction, number, arguments);
        arch::set_registers(self.task, calling)?;
        // Into the call, and out of it.
        for _ in 0..2 {
            trace::go_to_system_call(self.task)?;
            self.await_system_call()?;
        }
        arch::returned(&arch::registers(self.task)?)
    }

    fn await_system_call(&self) -> io::Result<()> {
        loop {
            match await_stop(self.task, CALL_WITHIN)? {
                (signal, _) if signal == libc::SIGTRAP | 0x80 => return Ok(()),
                (_, trace::EVENT_STOP) => {}
                (signal, _) => self.put_off(signal)?,
            }
            trace::go_to_system_call(self.task)?;
        }
    }

    /// All signals that can be blocked are, so this is one that stops the task, which it shall later; or
    /// what we had it do went wrong.
    fn put_off(&self, signal: i32) -> io::Result<()> {
        match signal {
            libc::SIGSTOP => {
                self.wanted_stop.set(true);
                Ok(())
            }
            other => Err(io::Error::other(format!("it got signal {other} in the call"))),
        }
    }

    /// Restores the task and stops tracing it.
    ///
    /// An interrupted system call is restarted only by a task that comes from the kernel's handling of
    /// signals, so it is interrupted once more before its registers are put back.
    fn let_go(self) -> io::Result<()> {
        trace::interrupt(self.task)?;
        trace::go_on(self.task, 0)?;
        await_interruption(self.task, CALL_WITHIN, |signal| {
            // Whatever else it is was caused by us.
            let _ = self.put_off(signal);
            0
        })?;
        arch::set_registers(self.task, self.outside_of_sequences())?;
        trace::set_signal_mask(self.task, self.mask)?;
        trace::detach(self.task)?;
        if self.wanted_stop.get() {
            trace::signal(self.process, self.task, libc::SIGSTOP)?;
        }
        Ok(())
    }

    /// The task's registers; in a restartable sequence, those with which the kernel has it begin anew.
    /// For the kernel saw it outside of the sequence, and will not do that itself any more.
    fn outside_of_sequences(&self) -> arch::Registers {
        match &self.sequence {
            Some((inside, abort)) if inside.contains(&arch::instruction(&self.registers)) => {
                arch::jumping(self.registers, *abort)
            }
            _ => self.registers,
        }
    }
}

/// The restartable sequence that a stopped task is in, and where it begins anew.
fn sequence(task: i32) -> Option<(Range<u64>, u64)> {
    let area = trace::restartable_sequences(task).ok()??;
    let mut pointer = [0; 8];
    sys::read_memory(task, area + RSEQ_POINTER, &mut pointer).ok()?;
    let address = u64::from_ne_bytes(pointer);
    if address == 0 {
        return None;
    }
    // struct rseq_cs: version and flags, start, length, abort.
    let mut words = [0; 32];
    sys::read_memory(task, address, &mut words).ok()?;
    let (start, length, abort) = (word(&words, 8)?, word(&words, 16)?, word(&words, 24)?);
    Some((start..start.checked_add(length)?, abort))
}

/// Whether system calls of a task are filtered.
fn is_filtered(task: i32) -> io::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{task}/status"))?;
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    Ok(mode.is_none_or(|mode| mode.trim() != "0"))
}

/// Waits until `task` stands still because it was interrupted. A signal that comes in between is
/// passed through `pass`, and what that gives is delivered.
fn await_interruption(
    task: i32,
    patience: Duration,
    mut pass: impl FnMut(i32) -> i32,
) -> io::Result<()> {
    loop {
        match await_stop(task, patience)? {
            (_, trace::EVENT_STOP) => return Ok(()),
            (signal, _) => trace::go_on(task, pass(signal & 0x7f))?,
        }
    }
}

fn await_stop(task: i32, patience: Duration) -> io::Result<(i32, i32)> {
    let begun = Instant::now();
    loop {
        match trace::report(task)? {
            Stop::Stopped { signal, event } => return Ok((signal, event)),
            Stop::Ended => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
            Stop::None if begun.elapsed() > patience => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not stop"));
            }
            Stop::None => thread::sleep(Duration::from_micros(20)),
        }
    }
}

/// Address of a system call instruction in the vdso of process `pid`.
fn system_call_instruction(pid: i32) -> io::Result<u64> {
    let none = || io::Error::other("it has no vdso with a system call in it");
    let auxiliary = fs::read(format!("/proc/{pid}/auxv"))?;
    let start = auxiliary
        .chunks_exact(16)
        .filter_map(|pair| Some((word(pair, 0)?, word(pair, 8)?)))
        .find_map(|(kind, value)| (kind == libc::AT_SYSINFO_EHDR).then_some(value))
        .ok_or_else(none)?;
    let call = arch::SYSTEM_CALL;
    let mut code = vec![0; PAGE_SIZE];
    for page in 0..VDSO_PAGES {
        // Where it ends nobody says; what follows it cannot be read, or is not looked at.
        sys::read_memory(pid, start + page * PAGE_SIZE as u64, &mut code).map_err(|_| none())?;
        if let Some(at) = code.windows(call.len()).position(|bytes| bytes == call) {
            return Ok(start + page * PAGE_SIZE as u64 + at as u64);
        }
    }
    Err(none())
}

/// The word at an offset of some bytes.
fn word(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().map(u64::from_ne_bytes).ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A shell that answers each line, and waits in `read` in between.
    fn echo() -> Child {
        let child = Command::new("sh")
            .args(["-c", "while read line; do echo $line; done"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        child.expect("sh")
    }

    fn answers(child: &mut Child) {
        child.stdin.as_mut().expect("a pipe").write_all(b"ping\n").expect("it listens");
        let mut answer = [0; 5];
        child.stdout.as_mut().expect("a pipe").read_exact(&mut answer).expect("it answers");
        assert_eq!(&answer, b"ping\n");
    }

    #[test]
    fn a_process_that_waits_goes_on_waiting() {
        let mut child = echo();
        answers(&mut child);
        for _ in 0..20 {
            let injected = userfaultfd_of(child.id() as i32).expect("a userfaultfd");
            let features = userfault::FEATURE_WP_ASYNC | userfault::FEATURE_WP_UNPOPULATED;
            userfault::agree(injected.uffd.as_fd(), features).expect("Linux 6.7 or newer");
            answers(&mut child);
        }
        let open = fs::read_dir(format!("/proc/{}/fd", child.id())).expect("descriptors");
        let left = open.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        assert!(!left.into_iter().any(|link| link.to_string_lossy().contains("userfaultfd")));
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    #[test]
    fn what_a_child_got_of_ours_is_taken_back() {
        let ours = sys::userfaultfd().expect("a userfaultfd");
        let other = sys::userfaultfd().expect("a userfaultfd");
        let mut command = Command::new("sh");
        command.args(["-c", "while read line; do echo $line; done"]);
        sys::inherit(&mut command, &[ours.as_fd(), other.as_fd()]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("sh");
        answers(&mut child);
        let pid = child.id() as i32;
        let has = |uffd: &OwnedFd| {
            let number = std::os::fd::AsRawFd::as_raw_fd(uffd);
            descriptors_of_userfaultfds(pid).contains(&number)
        };
        assert!(has(&ours) && has(&other));
        take_back(pid, [&ours].into_iter()).expect("taken back");
        assert!(!has(&ours) && has(&other), "its own stays");
        answers(&mut child);
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    #[test]
    fn a_process_that_is_stopped_stays_stopped() {
        let mut child = echo();
        answers(&mut child);
        let pid = child.id() as i32;
        trace::signal(pid, pid, libc::SIGSTOP).expect("stop");
        let state = || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
            status.lines().find(|line| line.starts_with("State:")).map(str::to_owned)
        };
        let stopped = || state().is_some_and(|state| state.contains("T (stopped)"));
        while !stopped() {
            thread::yield_now();
        }
        userfaultfd_of(pid).expect("a userfaultfd");
        while !stopped() {
            thread::yield_now();
        }
        trace::signal(pid, pid, libc::SIGCONT).expect("continue");
        answers(&mut child);
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    #[test]
    fn a_process_gets_a_filter_and_goes_on() {
        let mut child = Command::new("sh")
            .args(["-c", "while read line; do ulimit -n >/dev/null; echo $line; done"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh");
        answers(&mut child);
        let pid = child.id() as i32;
        let calls = Calls { scans: false, limits: true };
        let begun = filter_when_back(pid, calls).expect("it is traced");
        let listener = begun.join().expect("no panic").expect("a filter");
        assert!(is_filtered(pid).expect("status"));
        let answered = thread::spawn(move || {
            let call = sys::next_notification(listener.as_fd()).expect("a call");
            sys::answer(listener.as_fd(), &call, sys::Verdict::Continue).expect("it waits");
            // Held as long as it calls: without a listener its calls fail.
            (call.call, listener)
        });
        answers(&mut child);
        let (call, _listener) = answered.join().expect("no panic");
        assert_eq!(call, libc::SYS_prlimit64);
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    #[test]
    fn who_is_gone_is_an_error() {
        let mut child = echo();
        child.kill().expect("kill");
        child.wait().expect("wait");
        assert!(userfaultfd_of(child.id() as i32).is_err());
        assert!(filter_when_back(child.id() as i32, Calls::default()).is_err());
    }
}
