//! One process as the kernel describes it: what obstacles are told of, and by what name.

use std::collections::BTreeMap;
use std::fs;

use super::said::plain;

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
    /// Bytes of huge pages of hugetlbfs that it has.
    pub(crate) huge: u64,
}

impl Process {
    /// Looks at `pid`, in a container whose processes are numbered `depth` times, from here inwards. Nothing
    /// when it has gone.
    pub(crate) fn look(pid: i32, depth: usize) -> Option<Self> {
        let text = fs::read(format!("/proc/{pid}/status")).ok()?;
        Self::parse(pid, depth, &text)
    }

    fn parse(pid: i32, depth: usize, text: &[u8]) -> Option<Self> {
        let mut found = Self { pid, ..Self::default() };
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
                b"NSpid" => found.inner = numbered(depth.checked_sub(1)?).unwrap_or(0),
                b"NSsid" => found.session = numbered(depth.checked_sub(1)?).unwrap_or(0),
                b"HugetlbPages" => {
                    let kib = value.strip_suffix("kB").and_then(|kib| kib.trim().parse().ok());
                    found.huge = kib.unwrap_or(0u64).saturating_mul(1024);
                }
                _ => {}
            }
        }
        (found.state != 0).then_some(found)
    }

    /// "Process 4711 (redis-server)", with its number in the container where that is another.
    pub(crate) fn label(&self) -> String {
        if self.inner == self.pid || self.inner == 0 {
            format!("Process {} ({})", self.pid, self.name)
        } else {
            format!("Process {} ({}, {} in the container)", self.pid, self.name, self.inner)
        }
    }

    /// The same with a descriptor.
    pub(crate) fn with_descriptor(&self, number: i32) -> String {
        format!("{}, descriptor {number}", self.label())
    }

    /// Whether it has ended, and has nothing any more but a number.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
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
            NSpid:\t100\t5\t1\nNSsid:\t0\t4\t0\nHugetlbPages:\t    2048 kB\nThreads:\t2\n";
        let found = Process::parse(100, 2, text).expect("parsed");
        assert_eq!((found.inner, found.session, found.parent, found.tracer), (5, 4, 3, 0));
        assert_eq!((found.huge, found.threads, found.state), (2 << 20, 2, b'S'));
        assert_eq!(found.label(), "Process 100 (a\\nTracerPid:\\t7, 5 in the container)");
        assert_eq!(Process::parse(100, 2, b"Name:\tx\nPPid: y"), None);
    }

    #[test]
    fn we_ourselves_are_found() {
        let me = std::process::id() as i32;
        let found = Process::look(me, depth(me).expect("numbered")).expect("there");
        assert!(found.inner > 0 && found.threads > 0 && !found.has_ended());
    }
}
