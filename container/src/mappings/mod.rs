//! The mappings of a process with their flags, without a walk of its page tables.
//!
//! CRIU reads `/proc/PID/smaps`, for the flags of each mapping. The kernel counts all pages on the way, so
//! that takes longer the more memory there is (12 ms a GiB and more). The same flags come from a program of
//! ours in the kernel that looks at the mappings alone ([`program`]); with the lines of `/proc/PID/maps` they
//! are all that CRIU reads of smaps ([`smaps`]).
//!
//! What is told is what the kernel says of a process that stands still. Where anything does not fit (a flag
//! that is not known here or was not seen yet, two lists that differ) nothing is told, and CRIU reads the
//! kernel's own file.

mod program;
mod types;

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::error::{ContainerError, Result};
use crate::memory::{self, parse_range};

/// A process with less memory is read by CRIU itself within a millisecond.
const LARGE: u64 = 64 << 20;

/// Flags of a mapping, by their bit: what smaps calls them. CRIU goes by some of them.
const NAMES: [(u32, &str); 24] = [
    (0, "rd"),
    (1, "wr"),
    (2, "ex"),
    (3, "sh"),
    (8, "gd"),
    (10, "pf"),
    (13, "lo"),
    (14, "io"),
    (15, "sr"),
    (16, "rr"),
    (17, "dc"),
    (18, "de"),
    (20, "ac"),
    (21, "nr"),
    (22, "ht"),
    (23, "sf"),
    (24, "ar"),
    (25, "wf"),
    (26, "dd"),
    (27, "sd"),
    (28, "mm"),
    (29, "hg"),
    (30, "nh"),
    (31, "mg"),
];
/// Those of them that CRIU goes by (its `proc_parse.c`).
const HEEDED: [&str; 14] =
    ["gd", "lo", "nr", "ht", "sr", "rr", "dc", "dd", "mg", "hg", "nh", "wf", "io", "pf"];
/// What has a bit above is not known here: protection keys, shadow stacks, and what is to come.
const KNOWN: u64 = u32::MAX as u64;

/// The bits of what maps tells, in its order, and all of them.
const BITS: [u32; 4] = [0, 1, 2, 7];
const RIGHTS: u64 = 0x87;

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    flags: u64,
}

/// Sees to it beforehand that mappings can be looked at: that takes longer than a look.
pub(crate) fn prepare() {
    let _ = program::loaded();
}

/// What CRIU reads in the smaps of those of `pids` that have much memory; they stand still.
pub(crate) fn of_large(pids: &[i32]) -> Vec<(i32, String)> {
    let large = pids.iter().filter(|pid| memory::roughly_resident(**pid) >= LARGE);
    large.filter_map(|pid| Some((*pid, smaps(*pid)?))).collect()
}

/// Has the calling thread, and whom it starts, which are alone in their mount namespace, read these texts in
/// place of the kernel's. The files are in `directory`, an empty one.
pub(crate) fn cover(texts: &[(i32, String)], directory: &Path) -> Result<()> {
    for (pid, text) in texts {
        let (ours, over) = (directory.join(pid.to_string()), format!("/proc/{pid}/smaps"));
        fs::write(&ours, text).map_err(ContainerError::io(format!("write {}", ours.display())))?;
        mount(Some(&ours), over.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(ContainerError::errno(format!("mount a file of our own on {over}")))?;
    }
    Ok(())
}

/// What `/proc/PID/smaps` says, as far as CRIU goes by it.
fn smaps(pid: i32) -> Option<String> {
    let (mappings, seen) = program::mappings(pid)?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let text = with_flags(&maps, &mappings, seen);
    if text.is_none() {
        tracing::debug!(pid, "CRIU reads the kernel's own smaps: it has what is not known here");
    }
    text
}

/// The text of maps with the flags of each mapping; nothing when the two do not fit, or when there are flags that
/// CRIU goes by and that are none of `seen`.
fn with_flags(maps: &str, mappings: &[Mapping], seen: u64) -> Option<String> {
    let doubtful = heeded() & !seen;
    let (mut text, mut mappings) = (String::new(), mappings.iter());
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (range, rights) = (parse_range(words.next()?)?, words.next()?);
        // No mapping, but a page of the kernel's.
        let flags = match line.ends_with("[vsyscall]") {
            true => rights_in(rights)?,
            false => {
                let mapping = mappings.next()?;
                let same = range == (mapping.start..mapping.end)
                    && rights_in(rights)? == mapping.flags & RIGHTS
                    && mapping.flags & (!KNOWN | doubtful) == 0;
                same.then_some(mapping.flags)?
            }
        };
        text.push_str(line);
        text.push_str("\nVmFlags: ");
        text.extend(names(flags).flat_map(|name| [name, " "]));
        text.push('\n');
    }
    mappings.next().is_none().then_some(text)
}

/// Bits of the flags that CRIU goes by.
fn heeded() -> u64 {
    let heeded = NAMES.iter().filter(|(_, name)| HEEDED.contains(name));
    heeded.map(|(bit, _)| 1 << bit).sum()
}

fn names(flags: u64) -> impl Iterator<Item = &'static str> {
    NAMES.iter().filter(move |(bit, _)| flags >> bit & 1 == 1).map(|(_, name)| *name)
}

/// The flags that the word `rwxp` of a line of maps stands for. A file that is shared and cannot be written has
/// its last letter, and lacks the flag that smaps calls `sh`.
fn rights_in(word: &str) -> Option<u64> {
    let bytes: [u8; 4] = word.as_bytes().try_into().ok()?;
    Some(
        (0..4).filter(|place| bytes[*place] == b"rwxs"[*place]).map(|place| 1 << BITS[place]).sum(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
1000-3000 rw-p 00000000 00:00 0 
3000-4000 r--s 00001000 08:02 17                          /a file
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    fn mappings() -> Vec<Mapping> {
        let mapping = |start, end, flags| Mapping { start, end, flags };
        vec![mapping(0x1000, 0x3000, 0x0012_2073), mapping(0x3000, 0x4000, 0x0000_0091)]
    }

    #[test]
    fn lines_of_maps_get_their_flags() {
        let text = with_flags(MAPS, &mappings(), KNOWN).expect("they fit");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.iter().step_by(2).copied().collect::<Vec<_>>(), {
            MAPS.lines().collect::<Vec<_>>()
        });
        let flags = ["VmFlags: rd wr lo dc ac ", "VmFlags: rd ", "VmFlags: ex "];
        assert_eq!(lines.iter().skip(1).step_by(2).copied().collect::<Vec<_>>(), flags);
    }

    #[test]
    fn what_does_not_fit_is_not_told() {
        let all = mappings();
        assert_eq!(with_flags(MAPS, &all[..1], KNOWN), None, "one is missing");
        assert_eq!(with_flags(MAPS, &[&all[..], &all[..1]].concat(), KNOWN), None, "one too many");
        let changes: [fn(&mut Mapping); 4] = [
            |mapping| mapping.end += 0x1000,
            |mapping| mapping.start += 0x1000,
            |mapping| mapping.flags ^= 2,
            |mapping| mapping.flags |= 1 << 37,
        ];
        for change in changes {
            let mut changed = all.clone();
            change(&mut changed[0]);
            assert_eq!(with_flags(MAPS, &changed, KNOWN), None, "{changed:?}");
        }
        // Locked memory, a mark that was not seen yet; and what CRIU does not go by.
        assert_eq!(with_flags(MAPS, &all, KNOWN & !(1 << 13)), None);
        assert!(with_flags(MAPS, &all, KNOWN & !(1 << 20)).is_some());
    }
}
