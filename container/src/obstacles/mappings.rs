//! Mappings: those of files are judged as the files are; devices and what the kernel made for itself cannot
//! be mapped again.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use super::files::{Files, Seen};
use super::process::Process;
use super::said::{Found, plain};
use crate::segments::found::SMALL;

/// Memory that has a name for the kernel's sake only.
const MEMORY: [&[u8]; 4] = [b"/dev/zero", b"/memfd:", b"/SYSV", b"/anon_hugepage"];

/// Judges mappings of one container, those of one file once in each process.
#[derive(Debug, Default)]
pub(crate) struct Mappings {
    judged: HashSet<(Vec<u8>, Vec<u8>)>,
}

/// A line of `maps`, as far as it matters.
#[derive(Debug, PartialEq, Eq)]
struct Mapping<'a> {
    range: &'a str,
    shared: bool,
    device: &'a [u8],
    inode: &'a [u8],
    /// Empty, or what is mapped.
    name: &'a [u8],
}

impl Mappings {
    /// Says what is wrong with the mappings of one process.
    pub(crate) fn look(&mut self, process: &Process, files: &mut Files<'_>, found: &mut Found) {
        let text = fs::read(format!("/proc/{}/maps", process.pid)).unwrap_or_default();
        for mapping in text.split(|byte| *byte == b'\n').filter_map(parse) {
            self.judge(process, &mapping, files, found);
        }
    }

    fn judge(
        &mut self,
        process: &Process,
        mapping: &Mapping<'_>,
        files: &mut Files<'_>,
        found: &mut Found,
    ) {
        let who = || process.with(&format!("mapping {}", mapping.range));
        let name = mapping.name;
        if name.starts_with(b"/[aio]") && mapping.device.starts_with(b"00:") {
            found.say(
                &process.label(),
                "it uses the kernel's asynchronous I/O (libaio): what is in flight would be lost",
                "tell it not to (MariaDB and MySQL: innodb_use_native_aio=0)",
            );
            return;
        }
        if name == b"[uprobes]" {
            found.say(&who(), "a uprobe is set in it", "end the tracing tool that set it");
            return;
        }
        if name.starts_with(b"/memfd:") && is_small_and_sealed(process.pid, mapping) {
            found.say(
                &who(),
                &format!(
                    "it has {} mapped, a memory file of less than {} KiB that nobody may write any more \
                     (F_SEAL_WRITE), which CRIU cannot seal again",
                    plain(name),
                    SMALL >> 10
                ),
                "have it unmap or close that, or make it larger",
            );
            return;
        }
        let is_own = name.is_empty() || name.starts_with(b"[") || name.starts_with(b"socket:[");
        if is_own || MEMORY.iter().any(|known| name.starts_with(known)) {
            return;
        }
        if !name.starts_with(b"/") {
            let what = format!("it has {} mapped, which CRIU cannot map again", plain(name));
            found.say(
                &who(),
                &what,
                "end what uses it (a profiler, a driver, io_uring), or restart it",
            );
            return;
        }
        let file = (mapping.device.to_vec(), mapping.inode.to_vec());
        if self.judged.contains(&file) {
            return;
        }
        let path = PathBuf::from(format!("/proc/{}/map_files/{}", process.pid, mapping.range));
        let seen = match Seen::at(&path) {
            Ok(Some(seen)) => seen,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, who = %who(), "Cannot look at a mapping");
                return;
            }
        };
        // Another may have been mapped there meanwhile.
        if seen.link.as_bytes() == name {
            self.judged.insert(file);
        }
        match seen.facts.kind() {
            libc::S_IFREG if files.shows_host(&seen.facts) => {
                let what = format!(
                    "it has {} mapped, which shows memory of this host's kernel or of a device",
                    plain(name)
                );
                found.say(&who(), &what, "have it unmap that, or stop what uses it");
            }
            libc::S_IFREG => files.judge(&who(), &seen, found),
            libc::S_IFCHR if seen.facts.node == (1, 5) => {}
            _ => {
                let what = format!("it has {} mapped, a device of this host", plain(name));
                found.say(&who(), &what, "stop what uses the device");
            }
        }
    }
}

/// Whether a memory file that is mapped, and shared, is sealed against writing and too small to be moved as
/// shared memory.
fn is_small_and_sealed(pid: i32, mapping: &Mapping<'_>) -> bool {
    if !mapping.shared {
        return false;
    }
    let path = format!("/proc/{pid}/map_files/{}", mapping.range);
    // What has just gone is mapped no more.
    let Ok(file) = File::open(path) else { return false };
    let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
    seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_WRITE))
        && file.metadata().is_ok_and(|facts| facts.len() < SMALL)
}

fn parse(line: &[u8]) -> Option<Mapping<'_>> {
    // Names may have blanks; the five words before them have none.
    let mut words = line.splitn(6, |byte| *byte == b' ');
    let range = std::str::from_utf8(words.next()?).ok().filter(|range| range.contains('-'))?;
    let shared = words.next()?.ends_with(b"s");
    let device = words.nth(1)?;
    let inode = words.next()?;
    let name = words.next().unwrap_or_default().trim_ascii_start();
    Some(Mapping { range, shared, device, inode, name })
}

#[cfg(test)]
mod tests {
    use super::super::mounts::Mounts;
    use super::*;

    fn said(line: &str) -> Vec<String> {
        let mounts = Mounts::default();
        let mut files = Files::new(&mounts, 1);
        let mut found = Found::default();
        let process = Process { pid: 7, name: "x".into(), ..Process::default() };
        let mapping = parse(line.as_bytes()).expect("a line");
        Mappings::default().judge(&process, &mapping, &mut files, &mut found);
        found.into_texts()
    }

    #[test]
    fn the_ring_of_asynchronous_requests_is_seen() {
        let ring =
            said("7f74e47d2000-7f74e47d3000 rw-s 00000000 00:13 195501        /[aio] (deleted)");
        assert!(ring[0].contains("innodb_use_native_aio=0"), "{ring:?}");
        for line in [
            "559ab1898000-559ab1899000 rw-p 00000000 00:00 0 ",
            "559ab1898000-559ab1899000 rw-p 00000000 00:00 0                          [heap]",
            "7f74e47d2000-7f74e47d3000 rw-s 00000000 00:01 195501       /dev/zero (deleted)",
            "7f74e47d2000-7f74e47d3000 rw-s 00000000 00:08 195501       socket:[195501]",
        ] {
            assert_eq!(said(line), [""; 0]);
        }
        let perf =
            said("7f74e47d2000-7f74e47d3000 rw-s 00000000 00:0d 1054   anon_inode:[perf_event]");
        assert!(
            perf[0].starts_with(
                "Process 7 (x), mapping 7f74e47d2000-7f74e47d3000: it has anon_inode:"
            )
        );
    }

    #[test]
    fn our_own_mappings_are_nothing() {
        let me = std::process::id() as i32;
        let mounts = Mounts::of(me).expect("a table");
        let mut files = Files::new(&mounts, me);
        let mut found = Found::default();
        let process = Process::look(me, 1).expect("there");
        Mappings::default().look(&process, &mut files, &mut found);
        assert!(found.is_empty(), "{found:?}");
    }
}
