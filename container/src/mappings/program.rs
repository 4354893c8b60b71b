//! The program that lists mappings: it runs in the kernel, once for each mapping of the process asked for,
//! and writes where it begins and ends, and its flags (an iterator, `bpf_iter_task_vma`, Linux 6.1).
//!
//! It finds them by the kernel's own description of its types. That the bits mean what they are taken for is
//! tried on mappings of this very process before anything is made of them, with those that the kernel maps
//! into it like a device. Of a mark that none of them has nothing is told.

use std::fs;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use super::types::Types;
use super::{KNOWN, Mapping, NAMES, names};
use crate::memory::parse_range;
use crate::sys::{bpf, marked::Marked};

/// What the program writes for each mapping: three numbers.
const RECORD: usize = 24;
/// A process has no more mappings than a few of the kernel's `vm.max_map_count`.
const LONGEST: u64 = (RECORD as u64) << 22;

/// Mappings that the kernel makes in each process, of its own pages.
const OF_KERNEL: [&str; 3] = ["[vvar]", "[vvar_vclock]", "[vdso]"];

/// The program, loaded.
pub(super) struct Program {
    descriptor: OwnedFd,
    /// Flags that were seen to mean what they are taken for.
    seen: u64,
}

/// The program, or nothing where it cannot be: why is in the log.
pub(super) fn loaded() -> Option<&'static Program> {
    static PROGRAM: OnceLock<Option<Program>> = OnceLock::new();
    let tried = PROGRAM.get_or_init(|| match load().and_then(checked) {
        Ok(program) => Some(program),
        Err(error) => {
            tracing::info!(%error, "Mappings are not listed without a walk of page tables: a stop takes longer the more memory there is");
            None
        }
    });
    tried.as_ref()
}

/// The mappings of a process, ascending, and which of their flags are known; nothing where they cannot be
/// listed.
pub(super) fn mappings(pid: i32) -> Option<(Vec<Mapping>, u64)> {
    let program = loaded()?;
    let listed = list(&program.descriptor, pid);
    let listed = listed.inspect_err(|error| tracing::debug!(pid, %error, "Cannot list mappings"));
    Some((listed.ok()?, program.seen))
}

fn load() -> io::Result<OwnedFd> {
    let types = Types::read()?;
    let find = || {
        let member = |name| i16::try_from(types.offset("vm_area_struct", name)?).ok();
        let context = |name| i16::try_from(types.offset("bpf_iter__task_vma", name)?).ok();
        let function = types.function("bpf_iter_task_vma")?;
        let members = [member("vm_start")?, member("vm_end")?, member("vm_flags")?];
        let seq = i16::try_from(types.offset("bpf_iter_meta", "seq")?).ok()?;
        Some((function, program([context("meta")?, context("vma")?], seq, members)))
    };
    let unknown = || io::Error::other("the kernel's types are not what they were");
    let (function, program) = find().ok_or_else(unknown)?;
    bpf::load_walk(&program, function)
}

/// One instruction of the kernel's machine: what, to and from which register, offset, number.
const fn instruction(code: u8, to: u8, from: u8, offset: i16, number: i32) -> u64 {
    code as u64
        | (to as u64) << 8
        | (from as u64) << 12
        | (offset as u16 as u64) << 16
        | (number as u32 as u64) << 32
}

/// Writes the three `members` of the mapping in the context to the file in it.
fn program([meta, mapping]: [i16; 2], seq: i16, members: [i16; 3]) -> Vec<u64> {
    const LOAD: u8 = 0x79;
    const STORE: u8 = 0x7b;
    const COPY: u8 = 0xbf;
    const ADD: u8 = 0x07;
    const SET: u8 = 0xb7;
    const JUMP_IF_EQUAL: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    /// Number of `bpf_seq_write` (linux/bpf.h).
    const SEQ_WRITE: i32 = 127;
    const RECORD: i32 = super::program::RECORD as i32;
    let mut program = vec![
        instruction(LOAD, 6, 1, meta, 0),
        instruction(LOAD, 7, 1, mapping, 0),
        // The end of the walk, which has no mapping: over all that follows but the end.
        instruction(JUMP_IF_EQUAL, 7, 0, 11, 0),
    ];
    for (place, member) in (0..).zip(members) {
        program.push(instruction(LOAD, 1, 7, member, 0));
        program.push(instruction(STORE, 10, 1, place * 8 - RECORD as i16, 0));
    }
    program.extend([
        instruction(LOAD, 1, 6, seq, 0),
        instruction(COPY, 2, 10, 0, 0),
        instruction(ADD, 2, 0, 0, -RECORD),
        instruction(SET, 3, 0, 0, RECORD),
        instruction(CALL, 0, 0, 0, SEQ_WRITE),
        instruction(SET, 0, 0, 0, 0),
        instruction(EXIT, 0, 0, 0, 0),
    ]);
    program
}

fn list(program: &OwnedFd, pid: i32) -> io::Result<Vec<Mapping>> {
    let mut bytes = Vec::new();
    File::from(bpf::walk(program.as_fd(), pid)?).take(LONGEST).read_to_end(&mut bytes)?;
    let records = bytes.as_chunks::<RECORD>();
    if !records.1.is_empty() || bytes.len() as u64 == LONGEST {
        return Err(io::Error::other("the list of mappings has no end"));
    }
    let number = |record: &[u8; RECORD], place: usize| {
        record.as_chunks::<8>().0.get(place).map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    };
    let mapping = |record| Mapping {
        start: number(record, 0),
        end: number(record, 1),
        flags: number(record, 2),
    };
    Ok(records.0.iter().map(mapping).collect())
}

/// The program, if it says of mappings of ours what the kernel's own smaps says.
fn checked(program: OwnedFd) -> io::Result<Program> {
    let marked = Marked::make()?;
    let listed = list(&program, std::process::id() as i32)?;
    let smaps = fs::read_to_string("/proc/self/smaps")?;
    let (mut found_ours, mut seen) = (0, 0);
    let mut current = None;
    let mut of_kernel = false;
    for line in smaps.lines() {
        if let Some(range) = line.split(' ').next().and_then(parse_range) {
            current = Some(range);
            of_kernel = OF_KERNEL.iter().any(|name| line.ends_with(name));
        }
        let (Some(flags), Some(range)) = (line.strip_prefix("VmFlags:"), &current) else {
            continue;
        };
        // What others of this process map comes and goes meanwhile.
        let ours = marked.ranges().any(|ours| ours == range);
        if !ours && !of_kernel {
            continue;
        }
        let found = listed.iter().find(|found| (found.start..found.end) == *range);
        let is_ours = |name: &&str| NAMES.iter().any(|(_, ours)| ours == name);
        let said: Vec<&str> = flags.split_ascii_whitespace().filter(is_ours).collect();
        let fits = found.is_some_and(|found| {
            found.flags & !KNOWN == 0 && names(found.flags).eq(said.iter().copied())
        });
        if !fits {
            return Err(io::Error::other(format!("{flags} is not {found:x?}")));
        }
        seen |= found.map_or(0, |found| found.flags);
        found_ours += usize::from(ours);
    }
    match found_ours == marked.ranges().count() {
        true => Ok(Program { descriptor: program, seen }),
        false => Err(io::Error::other("not all mappings of our own were listed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_of_our_own_mappings_is_what_we_say() {
        let program = match load().and_then(checked) {
            Ok(program) => program,
            Err(error) => return eprintln!("skipped: {error}: needs root, BPF and BTF"),
        };
        // Of a device, in every process; and of huge pages, where there are such.
        let huge = fs::exists("/sys/kernel/mm/hugepages/hugepages-2048kB").is_ok_and(|there| there);
        let wanted: u64 = 1 << 10 | 1 << 14 | u64::from(huge) << 22;
        assert_eq!(program.seen & wanted, wanted, "{:x}", program.seen);
        // One that a child has, which stands still.
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let pid = child.id() as i32;
        while fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|path| !path.ends_with("sleep")) {
            std::thread::yield_now();
        }
        let calls = || fs::read_to_string(format!("/proc/{pid}/syscall")).expect("it lives");
        let sleeps = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep];
        while !sleeps.iter().any(|call| calls().starts_with(&format!("{call} "))) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let listed = list(&program.descriptor, pid).expect("it lives");
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives");
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("it lives");
        let text = super::super::with_flags(&maps, &listed, program.seen);
        child.kill().and_then(|()| child.wait()).expect("ended");
        let text = text.expect("they fit");
        let is_ours = |name: &&str| NAMES.iter().any(|(_, ours)| ours == name);
        let told = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| {
                line.starts_with("VmFlags:")
                    || line.split(' ').next().and_then(parse_range).is_some()
            });
            let ours = |line: &str| match line.strip_prefix("VmFlags:") {
                Some(flags) => {
                    flags.split_whitespace().filter(is_ours).collect::<Vec<_>>().join(" ")
                }
                None => line.to_owned(),
            };
            lines.map(ours).collect()
        };
        assert_eq!(told(&text), told(&smaps));
        assert!(told(&text).len() > 20, "{text}");
    }
}
