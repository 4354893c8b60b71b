//! Open descriptors: the kinds that CRIU knows, and what is wrong with the others.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::files::{Files, Seen};
use super::namespaces::Namespaces;
use super::process::Process;
use super::said::{Found, plain};
use super::watches::{self, Watches};

/// What the kernel makes without a name, and CRIU makes again.
const KNOWN: [&str; 6] = [
    "anon_inode:[eventfd]",
    "anon_inode:[eventpoll]",
    "anon_inode:inotify",
    "anon_inode:[signalfd]",
    "anon_inode:[timerfd]",
    "anon_inode:[pidfd]",
];
/// Words for what it does not, and a remedy.
const UNKNOWN: [(&str, &str, &str); 9] = [
    (
        "anon_inode:[io_uring]",
        "io_uring",
        "have it do without (nginx, Node.js: UV_USE_IO_URING=0; databases: their setting for asynchronous I/O)",
    ),
    (
        "anon_inode:[userfaultfd]",
        "a userfaultfd of its own",
        "restart it without what uses that (a JVM or a sandbox with such a garbage collector)",
    ),
    ("anon_inode:[perf_event]", "a performance counter", "end the profiler"),
    ("anon_inode:bpf-map", "a BPF map", "such programs belong on each host, not into what moves"),
    (
        "anon_inode:bpf-prog",
        "a BPF program",
        "such programs belong on each host, not into what moves",
    ),
    ("anon_inode:bpf_link", "a BPF link", "such programs belong on each host, not into what moves"),
    ("anon_inode:[fanotify]", "fanotify", "have it do without, or use inotify"),
    (
        "anon_inode:seccomp notify",
        "a seccomp supervisor's end",
        "end the supervisor and what it supervises",
    ),
    (
        "anon_inode:kvm-vm",
        "a virtual machine",
        "run virtual machines beside containers, not in them",
    ),
];
const CLOSE: &str = "have it close that";
/// `O_EXCL`, on a descriptor of a process: of one thread.
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;

/// One open descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) number: i32,
    /// What the kernel shows.
    pub(crate) link: OsString,
}

/// One end of a pipe, or a socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// A process that holds it, by what number.
    pub(crate) by: (i32, i32),
    /// Of a pipe: what it is open for.
    pub(crate) reads: bool,
    pub(crate) writes: bool,
}

/// Pipes and sockets that a container holds, by inode.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    pub(crate) pipes: BTreeMap<u64, Held>,
    pub(crate) sockets: BTreeMap<u64, Held>,
}

/// The descriptors of a process in the order of their numbers. One that is closed meanwhile is left out.
pub(crate) fn of(pid: i32) -> Vec<Descriptor> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let descriptor = |entry: fs::DirEntry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        Some(Descriptor { number, link: fs::read_link(entry.path()).ok()?.into_os_string() })
    };
    let mut found: Vec<_> = entries.filter_map(descriptor).collect();
    found.sort_by_key(|descriptor| descriptor.number);
    found
}

impl Ends {
    /// Enters what `process` has among `descriptors`.
    pub(crate) fn enter(&mut self, pid: i32, descriptors: &[Descriptor]) {
        for descriptor in descriptors {
            let link = descriptor.link.as_bytes();
            if let Some(inode) = inode_of(link, b"socket:[") {
                self.sockets
                    .entry(inode)
                    .or_insert_with(|| Held { by: (pid, descriptor.number), ..Held::default() });
            } else if let Some(inode) = inode_of(link, b"pipe:[") {
                let mode = fs::symlink_metadata(path(pid, descriptor.number))
                    .map_or(0o600, |facts| facts.permissions().mode());
                let by = (pid, descriptor.number);
                let held =
                    self.pipes.entry(inode).or_insert_with(|| Held { by, ..Held::default() });
                held.reads |= mode & 0o400 != 0;
                held.writes |= mode & 0o200 != 0;
            }
        }
    }
}

fn inode_of(link: &[u8], prefix: &[u8]) -> Option<u64> {
    let number = link.strip_prefix(prefix)?.strip_suffix(b"]")?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

/// Where the kernel shows a descriptor.
pub(crate) fn path(pid: i32, number: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/fd/{number}"))
}

/// What descriptors of one container are judged by.
pub(crate) struct Judge<'a> {
    pub(crate) files: Files<'a>,
    pub(crate) watches: Watches<'a>,
    pub(crate) namespaces: &'a Namespaces,
    /// All processes of the container.
    pub(crate) pids: BTreeSet<i32>,
}

impl Judge<'_> {
    /// Says what is wrong with the descriptors of one process.
    pub(crate) fn look(
        &mut self,
        process: &Process,
        descriptors: &[Descriptor],
        found: &mut Found,
    ) {
        let numbers: Vec<i32> = descriptors.iter().map(|descriptor| descriptor.number).collect();
        for descriptor in descriptors {
            let Some(link) = descriptor.link.to_str() else {
                self.file(process, descriptor, found);
                continue;
            };
            match link {
                "anon_inode:[eventpoll]" => {
                    watches::epoll(process, descriptor.number, &numbers, found);
                }
                "anon_inode:inotify" => self.watches.inotify(process, descriptor.number, found),
                "anon_inode:[eventfd]" => eventfd(process, descriptor.number, found),
                "anon_inode:[pidfd]" => self.pidfd(process, descriptor.number, found),
                _ if without_name(link) || self.namespaces.has(link) => {}
                _ if link.starts_with('/') => self.file(process, descriptor, found),
                _ => say_unknown(process, descriptor, found),
            }
        }
    }

    /// Its directory, root and program.
    pub(crate) fn places(&mut self, process: &Process, found: &mut Found) {
        for (place, name) in [("cwd", "current directory"), ("root", "root"), ("exe", "program")] {
            let path = PathBuf::from(format!("/proc/{}/{place}", process.pid));
            let Ok(Some(seen)) = Seen::at(&path) else { continue };
            self.files.judge(&process.with(name), &seen, found);
        }
    }

    fn file(&mut self, process: &Process, descriptor: &Descriptor, found: &mut Found) {
        let who = process.with_descriptor(descriptor.number);
        let path = path(process.pid, descriptor.number);
        let seen = match Seen::at(&path) {
            // There may be another file by now; what is none is not judged here.
            Ok(Some(seen)) if seen.link.as_bytes().starts_with(b"/") => seen,
            Ok(_) => return,
            Err(error) => {
                tracing::debug!(%error, %who, "Cannot look at a descriptor");
                return;
            }
        };
        let is_memory = seen.link.as_bytes().starts_with(b"/memfd:");
        match seen.facts.kind() {
            libc::S_IFCHR | libc::S_IFBLK if !is_known_device(&seen.facts) => {
                let (major, minor) = seen.facts.node;
                let shown = plain(seen.link.as_bytes());
                let what = format!(
                    "it has {shown} open, a device ({major}:{minor}) whose state stays in this host's kernel"
                );
                found.say(&who, &what, "have it close the device, or stop what uses it");
            }
            _ if is_memory => {}
            _ => self.files.judge(&who, &seen, found),
        }
    }

    fn pidfd(&self, process: &Process, number: i32, found: &mut Found) {
        let path = format!("/proc/{}/fdinfo/{number}", process.pid);
        let text = fs::read_to_string(path).unwrap_or_default();
        let word = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
        let who = process.with_descriptor(number);
        let flags =
            word("flags:").and_then(|flags| u32::from_str_radix(flags, 8).ok()).unwrap_or(0);
        if flags & PIDFD_THREAD != 0 {
            found.say(
                &who,
                "it stands for one thread (PIDFD_THREAD), which CRIU cannot dump",
                CLOSE,
            );
        }
        let of = word("Pid:").and_then(|pid| pid.parse::<i32>().ok()).unwrap_or(-1);
        // -1 is of a process that has ended, which is restored as such.
        if of != -1 && !self.pids.contains(&of) && !Path::new(&format!("/proc/{of}")).exists() {
            return;
        }
        if of != -1 && !self.pids.contains(&of) {
            found.say(&who, "it stands for a process outside of the container", CLOSE);
        }
    }
}

/// CRIU makes a semaphore again as a plain counter, of which one read takes all. An old kernel
/// does not tell one from the other.
fn eventfd(process: &Process, number: i32, found: &mut Found) {
    let path = format!("/proc/{}/fdinfo/{number}", process.pid);
    let text = fs::read_to_string(path).unwrap_or_default();
    let is_semaphore =
        |line: &str| line.strip_prefix("eventfd-semaphore:").map(str::trim) == Some("1");
    if text.lines().any(is_semaphore) {
        found.say(
            &process.with_descriptor(number),
            "it is an eventfd that counts down one by one (EFD_SEMAPHORE), which CRIU makes again as one that \
             does not",
            "have it close that, or use a POSIX semaphore",
        );
    }
}

/// What CRIU would refuse at the first look, from the links alone: for a container that stands still.
pub(crate) fn glance(process: &Process, descriptors: &[Descriptor], found: &mut Found) {
    for descriptor in descriptors {
        let Some(link) = descriptor.link.to_str() else { continue };
        if link.starts_with("anon_inode:") && !without_name(link) {
            say_unknown(process, descriptor, found);
        }
    }
}

/// Whether it is something without a name that CRIU knows, or that is judged elsewhere.
fn without_name(link: &str) -> bool {
    KNOWN.contains(&link) || link.starts_with("pipe:[") || link.starts_with("socket:[")
}

fn say_unknown(process: &Process, descriptor: &Descriptor, found: &mut Found) {
    let who = process.with_descriptor(descriptor.number);
    let link = descriptor.link.to_string_lossy();
    match UNKNOWN.iter().find(|(known, ..)| *known == link) {
        Some((_, name, remedy)) => {
            found.say(&who, &format!("it uses {name}, which CRIU cannot dump"), remedy);
        }
        None => {
            let shown = plain(descriptor.link.as_bytes());
            found.say(&who, &format!("it has {shown} open, which CRIU cannot dump"), CLOSE);
        }
    }
}

/// Devices that hold nothing (null, zero, random …), and terminals (criu/tty.c).
fn is_known_device(facts: &crate::sys::look::FileFacts) -> bool {
    facts.kind() == libc::S_IFCHR
        && match facts.node {
            (1, minor) => !matches!(minor, 1 | 2 | 4),
            (5, 0..=2) | (10, 235) => true,
            (4, minor) => (1..=63).contains(&minor),
            (major, _) => (128..=136).contains(&major),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_pipes_are_told_apart() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        use std::os::fd::AsRawFd;
        let me = std::process::id() as i32;
        let mine = |number| {
            let all = of(me);
            all.into_iter().find(|descriptor| descriptor.number == number).expect("open")
        };
        let mut ends = Ends::default();
        ends.enter(me, &[mine(reader.as_raw_fd())]);
        let held = ends.pipes.values().next().expect("one");
        assert_eq!((held.reads, held.writes), (true, false));
        ends.enter(me, &[mine(writer.as_raw_fd())]);
        let held = ends.pipes.values().next().expect("one");
        assert_eq!((held.reads, held.writes), (true, true));
        assert_eq!(inode_of(b"socket:[7]", b"socket:["), Some(7));
        assert_eq!(inode_of(b"socket:[7] ", b"socket:["), None);
    }

    #[test]
    fn what_criu_knows_is_not_said() {
        assert!(without_name("anon_inode:[eventfd]") && !without_name("anon_inode:[io_uring]"));
        let mut found = Found::default();
        let process = Process { pid: 7, name: "x".into(), ..Process::default() };
        let link = |link: &str| Descriptor { number: 3, link: link.into() };
        glance(
            &process,
            &[link("/a"), link("anon_inode:[io_uring]"), link("anon_inode:new\n")],
            &mut found,
        );
        let texts = found.into_texts();
        assert!(texts[0].starts_with("Process 7 (x), descriptor 3: it uses io_uring"), "{texts:?}");
        assert!(texts[1].contains("anon_inode:new\\u{a} open"), "{texts:?}");
    }
}
