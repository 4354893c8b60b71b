//! One process as the kernel describes it: what obstacles are told of, and by what name.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use super::said::plain;
use crate::rights::Held;
use crate::runtime::start_time;

/// What `/proc/PID/status` tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Process {
    /// Its number here.
    pub(crate) pid: i32,
    /// Its number in the container, 0 where it has none.
    pub(crate) inner: i32,
    /// Its name, fit to be shown.
    pub(crate) name: String,
    /// `R`, `S`, `D`, `T`, `Z` and so on.
    pub(crate) state: u8,
    /// Its parent's number here.
    pub(crate) parent: i32,
    /// Number here of the process that traces it, or 0.
    pub(crate) tracer: i32,
    /// Its session, as the container numbers processes; 0 when that is led from outside.
    pub(crate) session: i32,
    pub(crate) threads: u32,
    /// How often its first thread has stopped running, by itself or not.
    pub(crate) switches: u64,
    pub(crate) held: Held,
}

impl Process {
    /// Looks at `pid`, in a container whose processes are numbered `depth` times, from here inwards. Nothing
    /// when it has gone.
    pub(crate) fn look(pid: i32, depth: usize) -> Option<Self> {
        let text = fs::read(format!("/proc/{pid}/status")).ok()?;
        Self::parse(pid, depth, &text)
    }

    fn parse(pid: i32, depth: usize, text: &[u8]) -> Option<Self> {
        let mut found = Self { pid, held: Held::parse(text), ..Self::default() };
        for line in text.split(|byte| *byte == b'\n') {
            let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
            let (key, value) = (&line[..colon], line[colon + 1..].trim_ascii());
            if key == b"Name" {
                found.name = plain(value);
                continue;
            }
            let Ok(value) = std::str::from_utf8(value) else { continue };
            let number = || value.parse::<i32>().ok();
            let numbered = |at: usize| {
                value.split_whitespace().nth(at).and_then(|word| word.parse::<i32>().ok())
            };
            match key {
                b"State" => found.state = value.bytes().next()?,
                b"PPid" => found.parent = number()?,
                b"TracerPid" => found.tracer = number()?,
                b"Threads" => found.threads = value.parse().ok()?,
                b"voluntary_ctxt_switches" | b"nonvoluntary_ctxt_switches" => {
                    found.switches += value.parse::<u64>().ok()?;
                }
                b"NSpid" => found.inner = numbered(depth.checked_sub(1)?).unwrap_or(0),
                b"NSsid" => found.session = numbered(depth.checked_sub(1)?).unwrap_or(0),
                _ => {}
            }
        }
        (found.state != 0).then_some(found)
    }

    /// "Process 4711 (redis-server)", with its number in the container where that is another.
    pub(crate) fn label(&self) -> Who<'_> {
        Who { process: Some(self), what: String::new() }
    }

    /// The same with a descriptor.
    pub(crate) fn with_descriptor(&self, number: i32) -> Who<'_> {
        self.with(&format!("descriptor {number}"))
    }

    /// The same with anything else of it.
    pub(crate) fn with(&self, what: &str) -> Who<'_> {
        Who { process: Some(self), what: format!(", {what}") }
    }

    /// Whether it has ended, and has nothing any more but a number.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }
}

/// Who has an obstacle, as people are shown it. A process gives itself any name, and another at any time: so it
/// is known by what it cannot choose.
#[derive(Clone, Debug)]
pub(crate) struct Who<'a> {
    process: Option<&'a Process>,
    /// What of it, or the whole of what is no process.
    what: String,
}

impl Who<'_> {
    /// What is no process, and has this name for good.
    pub(crate) fn named(name: impl Into<String>) -> Self {
        Self { process: None, what: name.into() }
    }

    /// The same for the same one at each look, whatever it calls itself, and for no other.
    pub(crate) fn key(&self) -> String {
        match self.process {
            // One that has just ended has no start any more, and is not found again.
            Some(process) => {
                format!("{} {:?}{}", process.pid, start_time(process.pid).ok(), self.what)
            }
            None => self.what.clone(),
        }
    }
}

impl fmt::Display for Who<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(Process { pid, inner, name, .. }) = self.process {
            write!(formatter, "Process {pid} ({name}")?;
            if inner != pid && *inner != 0 {
                write!(formatter, ", {inner} in the container")?;
            }
            formatter.write_str(")")?;
        }
        formatter.write_str(&self.what)
    }
}

/// How many times the processes of a container are numbered, whose first process is `init`.
pub(crate) fn depth(init: i32) -> Option<usize> {
    let status = fs::read(format!("/proc/{init}/status")).ok()?;
    let line = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"NSpid:"))?;
    Some(std::str::from_utf8(line).ok()?.split_whitespace().count())
}

/// All of `pids` that are there, by number.
pub(crate) fn look_at_all(pids: &[i32], depth: usize) -> BTreeMap<i32, Process> {
    pids.iter().filter_map(|pid| Some((*pid, Process::look(*pid, depth)?))).collect()
}

/// The threads of a process, without the first.
pub(crate) fn other_threads(pid: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    numbers.filter(|thread| *thread != pid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_whatever_the_name() {
        let text = b"Name:\ta\\nTracerPid:\\t7\nState:\tS (sleeping)\nPPid:\t3\nTracerPid:\t0\n\
            NSpid:\t100\t5\t1\nNSsid:\t0\t4\t0\nThreads:\t2\nvoluntary_ctxt_switches:\t7\n\
            nonvoluntary_ctxt_switches:\t2\n";
        let found = Process::parse(100, 2, text).expect("parsed");
        assert_eq!((found.inner, found.session, found.parent, found.tracer), (5, 4, 3, 0));
        assert_eq!((found.threads, found.state, found.switches), (2, b'S', 9));
        assert_eq!(
            found.label().to_string(),
            "Process 100 (a\\nTracerPid:\\t7, 5 in the container)"
        );
        assert_eq!(Process::parse(100, 2, b"Name:\tx\nPPid: y"), None);
    }

    #[test]
    fn we_ourselves_are_found() {
        let me = std::process::id() as i32;
        let found = Process::look(me, depth(me).expect("numbered")).expect("there");
        assert!(found.inner > 0 && found.threads > 0 && !found.has_ended());
        let renamed = Process { name: "another".into(), ..found.clone() };
        assert_eq!(renamed.with_descriptor(3).key(), found.with_descriptor(3).key());
        assert_ne!(renamed.with_descriptor(3).key(), found.with_descriptor(4).key());
        let another = Process { pid: 1, ..found.clone() };
        assert_ne!(another.label().key(), found.label().key());
    }
}
