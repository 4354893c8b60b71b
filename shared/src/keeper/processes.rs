//! Which processes keep a workload, as they were noted when they began. A keeper is known by its socket for as long as it
//! serves that; one that does so no longer and has not ended either is known by this, and can be ended by force.
//!
//! A process is its number and when it began: a number alone comes back.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::session::journal::boot_id;
use crate::workload::{Place, Result, WorkloadError};

/// A note is a line for each process.
const NOTE_CAP: u64 = 4 << 10;
/// A keeper that is done needs that long to give back a large guest's memory.
const LEFT_WITHIN: Duration = Duration::from_secs(5);
/// What is killed has ended within this, or waits for the kernel.
const KILLED_WITHIN: Duration = Duration::from_secs(20);
/// What helps a keeper has something to do when that has ended, and this long for it.
const HELPERS_END_WITHIN: Duration = Duration::from_secs(5);

/// A process of this host's, which may have ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Process {
    pid: i32,
    /// Clock ticks between the host's boot and its beginning.
    began: u64,
    boot_id: String,
}

impl Process {
    /// The one that has the number `pid` now.
    ///
    /// # Errors
    /// `NotFound` when there is none; when the kernel does not tell when it began.
    fn of(pid: i32) -> io::Result<Self> {
        let began = began(pid)?.ok_or(ErrorKind::NotFound)?;
        Ok(Self { pid, began, boot_id: boot_id() })
    }

    /// A descriptor of it, unless it has ended and its parent knows.
    fn hold(&self) -> io::Result<Option<OwnedFd>> {
        if self.pid <= 0 || self.boot_id != boot_id() {
            return Ok(None);
        }
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let held = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(held) => held,
            // Kernels' words for a number that is no process's: nobody's, a thread's, or, to older ones, that of a process
            // that is just being taken away.
            Err(Errno::SRCH | Errno::NOENT | Errno::INVAL) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Of this very process, if it still has the number now.
        Ok((began(self.pid)? == Some(self.began)).then_some(held))
    }
}

/// Clock ticks between the boot and the beginning of process `pid`; nothing when there is none.
fn began(pid: i32) -> io::Result<Option<u64>> {
    let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error)
            if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    // Field 22 of proc_pid_stat(5); the third is the first behind the name.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
    let began = fields.and_then(|mut fields| fields.nth(22 - 3)?.parse().ok());
    began.map(Some).ok_or_else(|| ErrorKind::InvalidData.into())
}

/// Notes that the workload at `place` is kept by the processes with these numbers: first the keeper, then what helps it.
///
/// # Errors
/// When it cannot be written, or the kernel does not tell when one of them began; what stood there stands there still.
pub fn note_processes(place: &Place, pids: &[i32]) -> Result<()> {
    let processes = pids.iter().map(|pid| Process::of(*pid)).collect::<io::Result<Vec<_>>>();
    processes
        .and_then(|processes| write(place, &processes))
        .map_err(|error| WorkloadError::new("Cannot note which processes keep it", error))
}

fn write(place: &Place, processes: &[Process]) -> io::Result<()> {
    let (path, fresh) = (note(place), place.dir.join("keeper.processes.new"));
    fs::write(&fresh, serde_json::to_vec(processes)?)
        .and_then(|()| fs::rename(&fresh, path))
        .inspect_err(|_| drop(fs::remove_file(&fresh)))
}

/// Whether those that keep the workload at `place` have ended, or do `within` that time. Nobody that was noted has.
///
/// # Errors
/// When it cannot be found out.
pub fn end_within(place: &Place, within: Duration) -> io::Result<bool> {
    let until = Instant::now() + within;
    for process in noted(place)? {
        if let Some(held) = process.hold()?
            && !ends(&held, until)?
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Ends those that keep the workload at `place`, whatever they are doing, and gives how many had not ended by themselves.
/// What they hold goes with them, a guest that runs too.
///
/// # Errors
/// `TimedOut` when one has not ended `within` that time; when it cannot be found out.
pub fn end_by_force(place: &Place, within: Duration) -> io::Result<usize> {
    let until = Instant::now() + within;
    let held = noted(place)?.into_iter().map(|process| process.hold());
    let held: Vec<OwnedFd> = held.filter_map(io::Result::transpose).collect::<io::Result<_>>()?;
    let mut killed = 0;
    for (number, process) in held.iter().enumerate() {
        let leave = if number == 0 { Duration::ZERO } else { HELPERS_END_WITHIN };
        if ends(process, (Instant::now() + leave).min(until))? {
            continue;
        }
        match pidfd_send_signal(process, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        if !ends(process, until)? {
            return Err(ErrorKind::TimedOut.into());
        }
        killed += 1;
    }
    Ok(killed)
}

/// Ends what is left of those that kept the workload at `place`, which is not to run here: it ended, or went elsewhere,
/// and they have not ended with it.
///
/// # Errors
/// When one does not end even so, or it cannot be found out whether there is one.
pub fn end_left(place: &Place) -> Result<()> {
    let cannot_tell = |error| {
        WorkloadError::new(format!("Cannot tell whether the keeper of {} lives", place.name), error)
    };
    if end_within(place, LEFT_WITHIN).map_err(cannot_tell)? {
        return Ok(());
    }
    let ended = end_by_force(place, KILLED_WITHIN).map_err(|error| match error.kind() {
        ErrorKind::TimedOut => WorkloadError::new(
            format!(
                "The keeper of {} was killed and has not ended: the kernel waits, perhaps for a disk that does not \
                 answer. The workload may still run",
                place.name
            ),
            error,
        ),
        _ => cannot_tell(error),
    })?;
    tracing::warn!(workload = place.name, ended, "Its keeper did not end: ended by force");
    Ok(())
}

/// Whether the process behind `held` has ended, or does so before `until`.
fn ends(held: &OwnedFd, until: Instant) -> io::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(held.as_fd(), PollFlags::POLLIN)], timeout) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(0) if left.as_millis() > 0 => {}
            Ok(count) => return Ok(count > 0),
        }
    }
}

/// Those that were noted last.
fn noted(place: &Place) -> io::Result<Vec<Process>> {
    let mut text = String::new();
    match fs::File::open(note(place)) {
        Ok(file) => file.take(NOTE_CAP).read_to_string(&mut text)?,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => 0,
        Err(error) => return Err(error),
    };
    // A crash of the host may leave half of it, and nobody that it is about.
    Ok(serde_json::from_str(&text).unwrap_or_default())
}

fn note(place: &Place) -> PathBuf {
    place.dir.join("keeper.processes")
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    const NOW: Duration = Duration::ZERO;
    const LONG: Duration = Duration::from_secs(60);

    fn place() -> (tempfile::TempDir, Place) {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
        (dir, place)
    }

    /// One that ends when its standard input does.
    fn cat() -> Child {
        let mut command = Command::new("cat");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("started")
    }

    fn number(child: &Child) -> i32 {
        child.id() as i32
    }

    #[test]
    fn who_keeps_it_is_known_until_all_have_ended() {
        let (_dir, place) = place();
        assert!(end_within(&place, NOW).expect("looked"), "nobody was noted");
        let [mut keeper, mut helper] = [cat(), cat()];
        note_processes(&place, &[&keeper, &helper].map(number)).expect("noted");
        assert!(!end_within(&place, NOW).expect("looked"));
        drop(keeper.stdin.take());
        keeper.wait().expect("ended");
        assert!(!end_within(&place, Duration::from_millis(20)).expect("looked"), "one is left");
        drop(helper.stdin.take());
        // Ended, and nobody has asked how.
        assert!(end_within(&place, LONG).expect("looked"));
        helper.wait().expect("ended");
        assert!(end_within(&place, NOW).expect("looked"));
        assert_eq!(end_by_force(&place, NOW).expect("looked"), 0);
    }

    #[test]
    fn force_ends_one_that_stands_still_and_leaves_its_helper_time() {
        let (_dir, place) = place();
        let [mut keeper, mut helper] = [cat(), cat()];
        note_processes(&place, &[&keeper, &helper].map(number)).expect("noted");
        note_processes(&place, &[i32::MAX]).expect_err("there is none");
        let stopped = nix::unistd::Pid::from_raw(number(&keeper));
        nix::sys::signal::kill(stopped, nix::sys::signal::Signal::SIGSTOP).expect("stopped");
        drop(helper.stdin.take());
        assert_eq!(end_by_force(&place, LONG).expect("ended"), 1);
        let how = [keeper.wait().expect("ended"), helper.wait().expect("ended")];
        assert_eq!(how.map(|one| one.code()), [None, Some(0)]);
    }

    /// What has a number, began at another time or under another boot, and is somebody else.
    #[test]
    fn a_stranger_with_its_number_is_neither_waited_for_nor_ended() {
        let (_dir, place) = place();
        let mut stranger = cat();
        let there = Process::of(number(&stranger)).expect("a process");
        let began = Process { began: there.began + 1, ..there.clone() };
        let boot = Process { boot_id: "another".into(), ..there.clone() };
        let odd = Process { pid: -1, ..there };
        for gone in [began, boot, odd] {
            write(&place, std::slice::from_ref(&gone)).expect("noted");
            assert!(end_within(&place, NOW).expect("looked"), "{gone:?}");
            assert_eq!(end_by_force(&place, LONG).expect("looked"), 0, "{gone:?}");
        }
        assert!(stranger.try_wait().expect("looked").is_none());
        drop(stranger.stdin.take());
        stranger.wait().expect("ended");
    }

    #[test]
    fn half_a_note_is_nobodys_and_one_that_cannot_be_read_is_an_error() {
        let (_dir, place) = place();
        note_processes(&place, &[std::process::id() as i32]).expect("noted");
        assert!(!end_within(&place, NOW).expect("looked"));
        let text = fs::read(note(&place)).expect("read");
        fs::write(note(&place), &text[..text.len() / 2]).expect("written");
        assert!(end_within(&place, NOW).expect("looked"));
        fs::remove_file(note(&place)).expect("removed");
        std::os::unix::fs::symlink(note(&place), note(&place)).expect("linked");
        end_within(&place, NOW).expect_err("nobody can tell");
        end_by_force(&place, NOW).expect_err("nobody can tell");
    }
    /// Numbers of processes and of their threads are of one kind.
    #[test]
    fn a_thread_that_has_its_number_now_is_no_process() {
        let (_dir, place) = place();
        let looked = std::thread::spawn(move || {
            let thread = Process::of(nix::unistd::gettid().as_raw()).expect("a thread");
            write(&place, &[thread]).expect("noted");
            (end_within(&place, NOW).expect("looked"), end_by_force(&place, NOW).expect("looked"))
        });
        assert_eq!(looked.join().expect("looked"), (true, 0));
    }
}
