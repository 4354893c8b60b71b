//! What of processes, and of how they belong together, CRIU refuses or loses: those that are traced, that
//! came from outside, that cannot be stopped, and sessions that cannot be made again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::thread;
use std::time::Duration;

use super::namespaces;
use super::process::{Process, Who, other_threads};
use super::said::{Found, plain};
use crate::rights::{Held, Rights};
use crate::sys::look;

const DEADLINE: i32 = 6;
/// Who sleeps uninterruptibly is looked at again so many times, this long apart.
const AGAIN: (u32, Duration) = (5, Duration::from_millis(10));

/// Everything about the processes of a container whose first process is `init`, and whose configuration gives
/// `rights`, where that is known.
pub(crate) fn look(
    processes: &BTreeMap<i32, Process>,
    (init, depth): (i32, usize),
    rights: Option<&Rights>,
    found: &mut Found,
) {
    for process in processes.values() {
        alone(process, found);
        if entered(process, processes, init, depth) {
            say_entered(process, found);
        } else if process.session == 0 {
            found.say(
                &process.label(),
                "its session is led by a process outside of the container",
                "have it start a session of its own (setsid)",
            );
        }
        if !process.has_ended() {
            // Who has other users has other rights, and is refused for that.
            let rights = rights.filter(|_| namespaces::shares_users(process.pid, init));
            of_rights(&process.label(), rights, &process.held, found);
            of_threads(process, rights, found);
        }
    }
    for pid in without_session(processes, init) {
        found.say(
            &processes[&pid].label(),
            "the process that began its session has ended, and its parent is not the container's first \
             process: CRIU could not make that session again",
            "restart it, or the service it belongs to",
        );
    }
    stuck(processes, found);
}

/// The part of it that makes CRIU wait for seconds, for a container that stands still.
pub(crate) fn glance(process: &Process, found: &mut Found) {
    traced(process, found);
    if is_in_vfork(process.pid) {
        say_vfork(process, found);
    }
}

fn alone(process: &Process, found: &mut Found) {
    traced(process, found);
    if process.state == b'Z' && process.threads > 1 {
        found.say(
            &process.label(),
            "its first thread has ended while others run, which CRIU cannot dump",
            "restart it, or have it end as a whole",
        );
    }
    if look::policy(process.pid).is_ok_and(|policy| policy & 0xff == DEADLINE) {
        say_deadline(process, found);
    }
}

fn say_deadline(process: &Process, found: &mut Found) {
    found.say(
        &process.label(),
        "it is scheduled by deadline (SCHED_DEADLINE), which CRIU cannot restore",
        "give it another policy while it moves (chrt --other --pid 0 NUMBER)",
    );
}

fn traced(process: &Process, found: &mut Found) {
    if process.tracer != 0 {
        say_traced(process, process.tracer, found);
    }
}

fn say_traced(process: &Process, tracer: i32, found: &mut Found) {
    let name = fs::read(format!("/proc/{tracer}/comm")).unwrap_or_default();
    let what = format!("it is traced by process {tracer} ({})", plain(name.trim_ascii_end()));
    found.say(&process.label(), &what, "end that debugger or tracer, or have it detach");
}

/// Whether a process came in from outside (`runc exec`): its parent is no process of the container. That
/// parent may have been born just now, or have ended just now: so it is looked at again.
fn entered(process: &Process, processes: &BTreeMap<i32, Process>, init: i32, depth: usize) -> bool {
    if process.pid == init || processes.contains_key(&process.parent) {
        return false;
    }
    let Some(again) = Process::look(process.pid, depth) else { return false };
    if processes.contains_key(&again.parent) {
        return false;
    }
    // Born since the list was made: it has a number in the container.
    Process::look(again.parent, depth).is_none_or(|parent| parent.inner == 0)
}

fn say_entered(process: &Process, found: &mut Found) {
    found.say_passing(
        &process.label(),
        "it was brought in from outside (exec, or a health check), and is no descendant of the container's \
         first process",
        "end it, or wait until it has ended",
    );
}

/// What a destination would not give a task, for its configuration does not.
fn of_rights(who: &Who<'_>, rights: Option<&Rights>, held: &Held, found: &mut Found) {
    for excess in rights.into_iter().flat_map(|rights| rights.exceeded(held)) {
        found.say(who, &excess.to_string(), excess.remedy());
    }
}

/// Looks at the threads beside the first.
fn of_threads(process: &Process, rights: Option<&Rights>, found: &mut Found) {
    if process.threads < 2 {
        return;
    }
    for thread in other_threads(process.pid) {
        let who = || process.with(&format!("thread {thread}"));
        if look::share_descriptors(process.pid, thread).is_ok_and(|shared| !shared) {
            found.say(
                &who(),
                "it has descriptors of its own (unshare(CLONE_FILES)), which CRIU would lose",
                "have it run in a process of its own",
            );
        }
        if look::policy(thread).is_ok_and(|policy| policy & 0xff == DEADLINE) {
            say_deadline(process, found);
        }
        let status = fs::read(format!("/proc/{}/task/{thread}/status", process.pid));
        let Ok(status) = status else { continue };
        let held = Held::parse(&status);
        if held != process.held {
            of_rights(&who(), rights, &held, found);
        }
        let tracer = tracer_of(&status).unwrap_or(0);
        if tracer != 0 && process.tracer == 0 {
            say_traced(process, tracer, found);
        }
    }
}

fn tracer_of(status: &[u8]) -> Option<i32> {
    let line =
        status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"TracerPid:"))?;
    std::str::from_utf8(line).ok()?.trim().parse().ok()
}

/// Who sleeps uninterruptibly and goes on doing so: it would not stop, and CRIU would wait for it. Who works on
/// files is often found asleep, and each time for another reason: that one has run in between.
fn stuck(processes: &BTreeMap<i32, Process>, found: &mut Found) {
    let mut asleep: Vec<&Process> =
        processes.values().filter(|process| process.state == b'D').collect();
    for _ in 0..AGAIN.0 {
        if asleep.is_empty() {
            return;
        }
        thread::sleep(AGAIN.1);
        asleep.retain(|process| {
            let now = Process::look(process.pid, 1);
            now.is_some_and(|now| now.state == b'D' && now.switches == process.switches)
        });
    }
    for process in asleep {
        if is_in_vfork(process.pid) {
            say_vfork(process, found);
            continue;
        }
        found.say_passing(
            &process.label(),
            "it waits in the kernel for a device or a file system (state D), and cannot be stopped",
            "wait until that is over, or see what storage it waits for",
        );
    }
}

fn say_vfork(process: &Process, found: &mut Found) {
    found.say_passing(
        &process.label(),
        "it waits for a child that it made by vfork and that has not begun a program yet",
        "wait until it has, or restart it",
    );
}

/// Whether a task stands in a call that waits for a child to begin a program or to end.
fn is_in_vfork(pid: i32) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    let mut words = text.split(' ');
    let Some(number) = words.next().and_then(|word| word.parse::<i64>().ok()) else { return false };
    let first =
        words.next().and_then(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    #[cfg(target_arch = "x86_64")]
    if number == libc::SYS_vfork {
        return true;
    }
    number == libc::SYS_clone && first.is_some_and(|flags| flags & libc::CLONE_VFORK as u64 != 0)
}

/// Processes that no restore could put into their sessions. CRIU makes a session again by way of its leader,
/// or of a helper that it puts below the container's first process; so who is in the session of a leader
/// that has gone must be a child of the first process, or descend from its leader.
fn without_session(processes: &BTreeMap<i32, Process>, init: i32) -> BTreeSet<i32> {
    let Some(root) = processes.get(&init) else { return BTreeSet::new() };
    let of_leader = |process: &Process| process.session == process.inner;
    let strays = processes.values().filter(|process| {
        if process.pid == init || process.session == 0 || of_leader(process) || process.inner == 0 {
            return false;
        }
        if process.parent == init || process.session == root.session {
            return false;
        }
        // Up to the leader, or to who is in the same session and will be put in its place.
        let mut at = processes.get(&process.parent);
        let mut steps = 0;
        while let Some(ancestor) = at {
            if ancestor.inner == process.session || ancestor.session == process.session {
                return false;
            }
            steps += 1;
            at = (steps < processes.len()).then(|| processes.get(&ancestor.parent)).flatten();
        }
        true
    });
    strays.map(|process| process.pid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32, session: i32) -> (i32, Process) {
        let inner = pid - 100;
        (
            pid,
            Process { pid, inner, parent, session, state: b'S', threads: 1, ..Process::default() },
        )
    }

    #[test]
    fn a_session_is_lost_below_a_reaper_that_is_not_the_first_process() {
        let tree = BTreeMap::from([
            process(101, 7, 1),
            // A daemon's orphan, which went to the first process: CRIU helps itself.
            process(102, 101, 90),
            // Its child.
            process(103, 102, 90),
            // A reaper in its own session, and an orphan of a leader that has gone.
            process(104, 101, 4),
            process(105, 104, 91),
            // A child of its leader, born before that began another session.
            process(106, 104, 1),
        ]);
        assert_eq!(without_session(&tree, 101), BTreeSet::from([105]));
    }

    /// Found asleep at each look, and it has run in between.
    #[test]
    fn who_works_is_not_stuck() {
        let me = std::process::id() as i32;
        let process = Process { state: b'D', switches: 0, ..Process::look(me, 1).expect("there") };
        let mut found = Found::default();
        stuck(&BTreeMap::from([(me, process)]), &mut found);
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn names_do_not_hide_states() {
        assert_eq!(tracer_of(b"Name:\tx\nTracerPid:\t12\n"), Some(12));
        let me = std::process::id() as i32;
        assert!(!is_in_vfork(me));
    }
}
