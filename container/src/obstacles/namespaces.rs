//! Namespaces: what is moved is a container in which every process has those of the first one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::process::{Process, other_threads};
use super::said::Found;

/// Kinds of namespaces as the kernel names them, and what makes them.
const KINDS: [(&str, &str); 9] = [
    ("cgroup", "cgroup"),
    ("ipc", "IPC"),
    ("mnt", "mount"),
    ("net", "network"),
    ("pid", "PID"),
    ("time", "time"),
    ("time_for_children", "time"),
    ("user", "user"),
    ("uts", "UTS"),
];

/// The namespaces of a container's first process.
#[derive(Debug, Default)]
pub(crate) struct Namespaces {
    /// As the kernel writes them ("net:[4026531840]"), in the order of the kinds; empty where it has none.
    of_init: Vec<String>,
}

impl Namespaces {
    /// Those of `init`.
    pub(crate) fn of(init: i32) -> Self {
        let read = |(kind, _): &(&str, &str)| namespace(init, init, kind).unwrap_or_default();
        Self { of_init: KINDS.iter().map(read).collect() }
    }

    /// Whether `link`, what a descriptor shows, is one of them.
    pub(crate) fn has(&self, link: &str) -> bool {
        self.of_init.iter().any(|known| known == link)
    }

    /// Says which of the processes have others; gives those that have other mounts.
    pub(crate) fn look(
        &self,
        processes: &BTreeMap<i32, Process>,
        found: &mut Found,
    ) -> BTreeSet<i32> {
        let mut elsewhere = BTreeSet::new();
        for process in processes.values().filter(|process| !process.has_ended()) {
            let mut said = "";
            for ((kind, name), ours) in KINDS.iter().zip(&self.of_init) {
                let theirs = namespace(process.pid, process.pid, kind);
                // One that cannot be read has just ended, or the kernel has none.
                if theirs.is_none_or(|theirs| theirs == *ours) || said == *name {
                    continue;
                }
                said = name;
                if *kind == "mnt" {
                    elsewhere.insert(process.pid);
                }
                found.say(
                    &process.label(),
                    &format!("it is in another {name} namespace than the container's first process"),
                    "what makes containers or sandboxes of its own (a browser, a build, a container engine) \
                     has to be stopped, or told to do without",
                );
            }
            if process.threads > 1 {
                self.threads(process, found);
            }
        }
        elsewhere
    }

    /// Threads may be elsewhere than their process, in these kinds.
    fn threads(&self, process: &Process, found: &mut Found) {
        for thread in other_threads(process.pid) {
            for kind in ["net", "uts"] {
                let theirs = namespace(process.pid, thread, kind);
                if theirs.is_some_and(|theirs| !self.has(&theirs)) {
                    found.say(
                        &process.with(&format!("thread {thread}")),
                        &format!("it is in another {kind} namespace than its process, which CRIU would lose"),
                        "have it return, or run in a process of its own",
                    );
                }
            }
        }
    }
}

fn namespace(pid: i32, thread: i32, kind: &str) -> Option<String> {
    let path = match pid == thread {
        true => format!("/proc/{pid}/ns/{kind}"),
        false => format!("/proc/{pid}/task/{thread}/ns/{kind}"),
    };
    fs::read_link(path).ok()?.into_os_string().into_string().ok()
}

/// Whether two processes are in one user namespace.
pub(super) fn shares_users(pid: i32, other: i32) -> bool {
    namespace(pid, pid, "user") == namespace(other, other, "user")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_are_in_our_own_namespaces() {
        let me = std::process::id() as i32;
        let ours = Namespaces::of(me);
        let process = Process::look(me, 1).expect("there");
        let mut found = Found::default();
        let elsewhere = ours.look(&BTreeMap::from([(me, process)]), &mut found);
        assert!(elsewhere.is_empty() && found.is_empty(), "{found:?}");
        let link = namespace(me, me, "uts").expect("one");
        assert!(ours.has(&link) && !ours.has("uts:[1]"));
    }
}
