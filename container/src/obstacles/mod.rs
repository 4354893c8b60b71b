//! What speaks against moving a container as it is now: everything that CRIU would refuse, or lose without a
//! word, found before anything is frozen and said all at once, with who, what and a remedy.
//!
//! Rooms: `process` (one process), `processes` (how they belong together), `namespaces`, `descriptors` (with
//! `files`, `watches`, `sockets`, `unix`), `mappings`, `mounts`; `said` (the words), and `host` (what a host
//! has that another lacks). Nothing here touches a process: /proc is read, and descriptors of sockets are
//! borrowed for a moment. What /proc says was written by strangers.

mod descriptors;
mod files;
pub(crate) mod host;
mod mappings;
mod mounts;
mod namespaces;
mod process;
mod processes;
mod said;
mod sockets;
mod unix;
mod watches;

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::bundle::Bundle;
use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};
use crate::network::Network;
use crate::rights::Rights;

use descriptors::{Descriptor, Ends, Judge};
use files::Files;
pub(crate) use files::astray;
use mappings::Mappings;
use mounts::Mounts;
use namespaces::Namespaces;
use process::{Process, Who, depth, look_at_all};
use said::Found;
use sockets::Lender;
use watches::Watches;

/// What may be gone in a moment is waited for so long when a move is asked for, and before a stop.
const PATIENCE: Duration = Duration::from_secs(1);
const SHORT_PATIENCE: Duration = Duration::from_millis(100);
const AGAIN: Duration = Duration::from_millis(5);

/// A container that is looked at.
pub(crate) struct Subject<'a> {
    pub(crate) init: i32,
    pub(crate) cgroups: &'a Cgroups,
    pub(crate) bundle: &'a Bundle,
    pub(crate) network: &'a Network,
    /// Pipes to the outside that the destination replaces, as CRIU calls them.
    pub(crate) pipes: Vec<String>,
}

impl Subject<'_> {
    /// Everything that speaks against a move now. What happens beside it may escape it; it takes some ten
    /// microseconds a process and descriptor, and stops none. Who is just being started or is about to end is
    /// waited for.
    pub(crate) fn look(&self) -> Result<Vec<String>> {
        self.look_patiently(PATIENCE)
    }

    /// The same shortly before the stop.
    pub(crate) fn look_before_stop(&self) -> Result<Vec<String>> {
        self.look_patiently(SHORT_PATIENCE)
    }

    fn look_patiently(&self, patience: Duration) -> Result<Vec<String>> {
        let begun = Instant::now();
        loop {
            let found = twice(|| self.find())?;
            if !found.may_pass() || begun.elapsed() > patience {
                return Ok(found.into_texts());
            }
            thread::sleep(AGAIN);
        }
    }

    fn find(&self) -> Result<Found> {
        let begun = (Instant::now(), worked());
        let init = self.init;
        let depth = depth(init).ok_or_else(|| gone(init))?;
        let mounts = Mounts::of(init)?;
        let mut found = Found::default();
        let pids = self.cgroups.processes()?;
        let rights = Rights::of(self.bundle);
        let ends = in_processes(&pids, (init, depth), Some(&rights), &mounts, &mut found);
        if rights.has_its_numbers(init) == Some(false) {
            found.say(
                &Who::named("The container's user namespace"),
                "it numbers users or groups otherwise than the configuration",
                "put its configuration back, or restart the container",
            );
        }
        self.ends(&ends, depth, &mut found)?;
        mounts.look(self.bundle, init, &mut found)?;
        tracing::debug!(
            ms = begun.0.elapsed().as_secs_f64() * 1000.0,
            cpu_ms = (worked() - begun.1).as_secs_f64() * 1000.0,
            processes = pids.len(),
            obstacles = !found.is_empty(),
            "Looked for obstacles"
        );
        Ok(found)
    }

    /// Sockets and pipes, and what is at their other ends.
    fn ends(&self, ends: &Ends, depth: usize, found: &mut Found) -> Result<()> {
        let mut lender = Lender::default();
        let mut say = |held: &descriptors::Held, what: &str, remedy: &str| {
            let process = Process::look(held.by.0, depth).unwrap_or_default();
            found.say_certain(&process.with_descriptor(held.by.1), what, remedy);
        };
        let (wrong, unix) = sockets::look(ends, &mut lender);
        for (held, (what, remedy)) in wrong {
            say(&held, &what, remedy);
        }
        let outside = self.outside(ends, &unix, &mut lender)?;
        if outside.is_empty() {
            return Ok(());
        }
        // Both ends may be there by now: then it was made, or accepted, while we looked.
        let mut again = Ends::default();
        for pid in self.cgroups.processes()? {
            again.enter(pid, &descriptors::of(pid));
        }
        let still = self.outside(&again, &unix, &mut lender)?;
        for (inode, held, (what, remedy)) in outside {
            if still.iter().any(|(other, _, _)| *other == inode) {
                say(&held, &what, remedy);
            }
        }
        Ok(())
    }

    /// Sockets and pipes whose other end is not in the container.
    fn outside(
        &self,
        ends: &Ends,
        unix: &[u64],
        lender: &mut Lender,
    ) -> Result<Vec<(u64, descriptors::Held, sockets::Wrong)>> {
        let mut found = Vec::new();
        if !unix.is_empty() {
            let list = || unix::list().map_err(ContainerError::io("list UNIX sockets"));
            let listed = self.network.inside(list)?;
            let held: BTreeSet<u64> = ends.sockets.keys().copied().collect();
            for inode in unix {
                let Some(by) = ends.sockets.get(inode) else { continue };
                let wrong = unix::judge(*inode, &listed, &held);
                found.extend(wrong.map(|wrong| (*inode, by.clone(), wrong)));
            }
        }
        for (inode, held) in &ends.pipes {
            let known = || self.pipes.contains(&format!("pipe:[{inode}]"));
            if (held.reads && held.writes) || known() || !sockets::has_other_end(held, lender) {
                continue;
            }
            let wrong = (
                "it is a pipe whose other end is outside of the container".to_owned(),
                "have it close that; what it says and hears belongs to its standard streams",
            );
            found.push((*inode, held.clone(), wrong));
        }
        Ok(found)
    }
}

/// What appeared since the last look in a container that stands still by now, as far as it is found within
/// `budget`: what makes CRIU wait for seconds, and what it does not know at all.
pub(crate) fn glance(init: i32, cgroups: &Cgroups, budget: Duration) -> Result<Vec<String>> {
    let (begun, before) = (Instant::now(), worked());
    let depth = depth(init).ok_or_else(|| gone(init))?;
    let mut found = Found::default();
    let mut pids = cgroups.processes()?;
    // The youngest first: they were seen least.
    pids.sort_unstable_by(|one, other| other.cmp(one));
    let mut seen = 0;
    for pid in &pids {
        if begun.elapsed() >= budget {
            break;
        }
        let Some(process) = Process::look(*pid, depth) else { continue };
        processes::glance(&process, &mut found);
        let descriptors: Vec<Descriptor> = descriptors::of(*pid);
        descriptors::glance(&process, &descriptors, &mut found);
        seen += 1;
    }
    let us = begun.elapsed().as_micros() as u64;
    let cpu_us = (worked() - before).as_micros() as u64;
    tracing::debug!(us, cpu_us, seen, processes = pids.len(), "Glanced at what stands still");
    Ok(found.into_texts())
}

/// How long this thread has worked so far, whatever else the machine does.
fn worked() -> Duration {
    let clock = ClockId::CLOCK_THREAD_CPUTIME_ID;
    clock_gettime(clock).map(Duration::from).unwrap_or_default()
}

/// Everything in `pids` that speaks against dumping them, and nothing of what they have to do with the
/// outside: for a dump by somebody who knows that better.
///
/// # Errors
/// When the first process cannot be looked at.
pub(crate) fn of_processes(pids: &[i32], init: i32) -> Result<Vec<String>> {
    let depth = depth(init).ok_or_else(|| gone(init))?;
    let find = || -> Result<Found> {
        let mut found = Found::default();
        in_processes(pids, (init, depth), None, &Mounts::of(init)?, &mut found);
        Ok(found)
    };
    Ok(twice(find)?.into_texts())
}

/// What `find` finds, and what of it is still there a moment later. A process is not looked at in one instant:
/// who ends, begins a program or opens a file meanwhile is seen half before and half after.
fn twice(find: impl Fn() -> Result<Found>) -> Result<Found> {
    let first = find()?;
    if first.is_empty() {
        return Ok(first);
    }
    thread::sleep(AGAIN);
    Ok(find()?.found_before(&first))
}

/// Adds what is found in each process. Gives what has another end.
fn in_processes(
    pids: &[i32],
    (init, depth): (i32, usize),
    rights: Option<&Rights>,
    mounts: &Mounts,
    found: &mut Found,
) -> Ends {
    let processes = look_at_all(pids, depth);
    let namespaces = Namespaces::of(init);
    processes::look(&processes, (init, depth), rights, found);
    let elsewhere = namespaces.look(&processes, found);
    let mut judge = Judge {
        files: Files::new(mounts, init),
        watches: Watches::new(mounts, init),
        namespaces: &namespaces,
        pids: processes.keys().copied().collect(),
    };
    let (mut ends, mut mappings) = (Ends::default(), Mappings::default());
    for process in processes.values().filter(|process| !process.has_ended()) {
        let descriptors = descriptors::of(process.pid);
        ends.enter(process.pid, &descriptors);
        // All files of who has other mounts are on none of ours.
        if !elsewhere.contains(&process.pid) {
            judge.look(process, &descriptors, found);
            judge.places(process, found);
            mappings.look(process, &mut judge.files, found);
        }
    }
    ends
}

/// A file that a process has open.
pub(crate) struct Holder {
    pub(crate) pid: i32,
    pub(crate) descriptor: i32,
    /// As the container sees it.
    pub(crate) link: PathBuf,
    depth: usize,
}

impl Holder {
    /// Who that is, for people.
    pub(crate) fn who(&self) -> String {
        let process = Process::look(self.pid, self.depth).unwrap_or_default();
        process.with_descriptor(self.descriptor).to_string()
    }
}

/// Every file with a name that `pids` have open, of the container whose first process is `init`.
pub(crate) fn holders(pids: &[i32], init: i32) -> impl Iterator<Item = Holder> {
    let depth = depth(init).unwrap_or_default();
    pids.iter().flat_map(move |pid| {
        let named = |held: &Descriptor| held.link.as_bytes().starts_with(b"/");
        descriptors::of(*pid).into_iter().filter(named).map(move |held| Holder {
            pid: *pid,
            descriptor: held.number,
            link: held.link.into(),
            depth,
        })
    })
}

fn gone(init: i32) -> ContainerError {
    ContainerError::State(format!("The container's first process {init} is gone"))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::process::{Child, Command, Stdio};

    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    /// A process that is ended with the test.
    struct Ended(Child);

    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn who_calls_itself_otherwise_at_each_look_is_found_all_the_same() {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_SEMAPHORE;
        let semaphore = EventFd::from_flags(flags).expect("an eventfd");
        let child = Command::new("/bin/sh")
            .args(["-c", "i=0; while :; do i=$((i+1)); echo \"a$i\" >/proc/self/comm; done"])
            .stdin(Stdio::from(OwnedFd::from(semaphore)))
            .spawn();
        let child = Ended(child.expect("a shell"));
        let pid = child.0.id() as i32;
        let look = || Process::look(pid, 1).expect("there").name;
        let began = look();
        let deadline = Instant::now() + Duration::from_secs(120);
        while !look().starts_with('a') || look() == began {
            assert!(Instant::now() < deadline, "it renames itself");
            thread::sleep(AGAIN);
        }
        for _ in 0..20 {
            let found = of_processes(&[pid], pid).expect("looked at");
            let said = |text: &String| {
                text.starts_with(&format!("Process {pid} (a"))
                    && text.contains("descriptor 0: it is an eventfd that counts down one by one")
            };
            assert!(found.iter().any(said), "{found:?}");
        }
    }
}
