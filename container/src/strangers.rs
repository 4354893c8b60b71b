//! Processes that are a container's in part: in its cgroup and in another PID namespace, or in one of its
//! namespaces and not in its cgroup. Whoever has one of those is not adopted. Who is only on the way is none of
//! them: forked and not in the cgroup yet, being brought in by the runtime's `exec`, or ended and not waited
//! for. So nobody is said to be one who was seen once.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};

/// Namespaces that a container must not share with anybody, as the kernel and as people call them.
pub(crate) const OWN_NAMESPACES: [(&str, &str); 5] =
    [("pid", "PID"), ("net", "network"), ("ipc", "IPC"), ("uts", "UTS"), ("mnt", "mount")];
/// Who is on the way has arrived within this, an `exec` on a busy host too.
const PATIENCE: Duration = Duration::from_millis(500);
const AGAIN: Duration = Duration::from_millis(5);

/// A process, whoever has its number later, and what it is in.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Stranger {
    pid: i32,
    /// When it started.
    started: u64,
    part: Part,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    /// In this directory, and not in the container's PID namespace.
    Cgroup(PathBuf),
    /// In the container's namespace of this name, and not in its cgroup.
    Namespace(&'static str),
}

/// What speaks against adopting the container with these cgroups, whose first process is `init`: of each kind
/// one that stays.
///
/// # Errors
/// When the cgroups or `/proc` cannot be read.
pub(crate) fn find(cgroups: &Cgroups, init: i32) -> Result<Vec<String>> {
    let begun = Instant::now();
    let mut found = look(cgroups, init, &all_processes()?)?;
    while !found.is_empty() && begun.elapsed() < PATIENCE {
        thread::sleep(AGAIN);
        let pids: Vec<i32> = found.iter().map(|stranger| stranger.pid).collect();
        let now = look(cgroups, init, &pids)?;
        found.retain(|stranger| now.contains(stranger));
    }
    let first = |is_it: fn(&Part) -> bool| found.iter().find(|stranger| is_it(&stranger.part));
    let member = first(|part| matches!(part, Part::Cgroup(_)));
    let sharer = first(|part| matches!(part, Part::Namespace(_)));
    Ok([member, sharer].into_iter().flatten().map(Stranger::said).collect())
}

impl Stranger {
    fn said(&self) -> String {
        let Self { pid, part, .. } = self;
        match part {
            Part::Cgroup(directory) => format!(
                "Process {pid} is in the container's cgroup {} and not in its PID namespace",
                directory.display()
            ),
            Part::Namespace(name) => format!(
                "Process {pid} is in the container's {name} namespace and not in its cgroup: it would lose \
                 what is moved away with that"
            ),
        }
    }
}

/// Those among `pids`, and among all in the cgroups, as they are now.
fn look(cgroups: &Cgroups, init: i32, pids: &[i32]) -> Result<BTreeSet<Stranger>> {
    let mut found = BTreeSet::new();
    let mut enter = |pid: i32, part: Part| {
        if let Some(started) = living(pid) {
            found.insert(Stranger { pid, started, part });
        }
    };
    let ours = namespace(init, "pid");
    // In every hierarchy: a runtime may have left it in a cgroup that others are in, or in the root.
    for (pid, directory) in cgroups.within_reach()? {
        // One that ends just now has none.
        if namespace(pid, "pid").is_some_and(|its| Some(its) != ours) {
            enter(pid, Part::Cgroup(directory));
        }
    }
    // What it has in common with the host is said elsewhere.
    let us = std::process::id() as i32;
    let own = OWN_NAMESPACES.map(|(kind, name)| (kind, name, namespace(init, kind)));
    let own = own.iter().filter(|(kind, _, ours)| {
        ours.is_some() && *ours != namespace(1, kind) && *ours != namespace(us, kind)
    });
    let own: Vec<_> = own.collect();
    let members = cgroups.processes()?;
    for pid in pids.iter().filter(|pid| !members.contains(pid)) {
        let shared = own.iter().find(|(kind, _, ours)| namespace(*pid, kind) == *ours);
        if let Some((_, name, _)) = shared {
            enter(*pid, Part::Namespace(name));
        }
    }
    Ok(found)
}

fn namespace(pid: i32, kind: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

/// When a process started, unless it has ended. One that nobody waits for yet is in its PID namespace for as
/// long, and in no cgroup any more.
fn living(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so it is counted from its end.
    let words: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
    // Fields 3, 20 and 22. Where only the first of its threads has ended, it lives.
    let (state, threads, started) = (words.first()?, words.get(17)?, words.get(19)?);
    let ended = *state == "X" || (*state == "Z" && *threads == "1");
    (!ended).then(|| started.parse().ok()).flatten()
}

fn all_processes() -> Result<Vec<i32>> {
    let entries = fs::read_dir("/proc").map_err(ContainerError::io("list /proc"))?;
    let pid = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    Ok(entries.filter_map(pid).collect())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn who_has_ended_lives_no_more_although_nobody_waits() {
        let me = std::process::id() as i32;
        assert_eq!(living(me), Some(crate::runtime::start_time(me).expect("ourselves")));
        let mut child = Command::new("true").spawn().expect("started");
        let stat = format!("/proc/{}/stat", child.id());
        while !fs::read_to_string(&stat).expect("not waited for").contains(") Z ") {
            std::thread::yield_now();
        }
        let pid = child.id() as i32;
        // It has its number, and that is in a namespace.
        assert_eq!(namespace(pid, "pid"), namespace(me, "pid"));
        assert_eq!(living(pid), None);
        child.wait().expect("ended");
        assert_eq!(living(pid), None);
    }
}
