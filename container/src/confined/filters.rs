//! That threads get the filter of system calls that is a process's. CRIU notes it once, where all threads of a
//! process have the same, and marks it to be for all of them (`try_use_tsync` in its `seccomp.c`): without that
//! mark a thread that has none of its own would run under none.

use std::collections::BTreeMap;
use std::path::Path;

use super::remaps::{self, FILES_MOST};
use super::{Fault, number_of, read};
use crate::error::{ContainerError, Result};
use crate::rights::{FILTERED, seccomp_of};
use crate::segments::message::Message;

const PROCESSES: &str = "pstree.img";
const PROCESSES_MARKS: &[u32] = &[0x5456_4319, 0x5027_3030];
const FILTERS: &str = "seccomp.img";
const FILTERS_MARKS: &[u32] = &[0x5456_4319, 0x6441_3049];

/// Fields of CRIU's `pstree_entry`, `seccomp_entry` and `seccomp_filter`.
const PROCESS: u32 = 1;
const THREADS: u32 = 5;
const ALL: u32 = 1;
const BEFORE: u32 = 2;
const FLAGS: u32 = 3;
/// `SECCOMP_FILTER_FLAG_TSYNC` (linux/seccomp.h).
const FOR_ALL_THREADS: u64 = 1;

/// What the tasks of images are under, by their numbers.
#[derive(Default)]
pub(super) struct Filters(BTreeMap<u32, (u64, Option<u64>)>);

impl Filters {
    /// Enters the task of `core-NUMBER.img`.
    pub(super) fn add(&mut self, name: &str, core: &Message) {
        let number = name.strip_prefix("core-").and_then(|name| name.strip_suffix(".img"));
        let number: Option<u32> = number.and_then(|number| number.parse().ok());
        // CRIU does not look for it by any other name.
        let number = number.filter(|number| format!("core-{number}.img") == name);
        if let (Some(number), Some(seccomp)) = (number, seccomp_of(core)) {
            self.0.insert(number, seccomp);
        }
    }

    /// Looks at the processes in this directory.
    ///
    /// # Errors
    /// When one has a thread that would be under no filter.
    pub(super) fn check(&self, images: &Path) -> Result<()> {
        let processes = read(&images.join(PROCESSES), FILES_MOST, PROCESSES_MARKS)?.messages;
        let bad = |what: &str| ContainerError::malformed(images.join(PROCESSES), what);
        let mut leaders = Vec::new();
        for process in &processes {
            let pid = number_of(process, PROCESS) as u32;
            let threads =
                process.numbers(THREADS).ok_or_else(|| bad("has threads in another form"))?;
            let is_bare =
                |thread: &u32| self.0.get(thread).is_some_and(|(mode, _)| *mode != FILTERED);
            if threads
                .iter()
                .map(|thread| *thread as u32)
                .any(|thread| thread != pid && is_bare(&thread))
            {
                leaders.push(pid);
            }
        }
        if leaders.is_empty() {
            return Ok(());
        }
        let all = remaps::read(images, FILTERS, FILTERS_MARKS)?.unwrap_or_default();
        let all: Option<Vec<_>> = all.iter().flat_map(|all| all.each(ALL)).collect();
        let all = all.unwrap_or_default();
        for leader in leaders {
            let Some((_, Some(first))) = self.0.get(&leader) else { continue };
            are_for_all(&all, *first).map_err(|what| {
                bad(&format!("has a thread of process {leader} under none of its {what}"))
            })?;
        }
        Ok(())
    }
}

/// Whether the filter of that place in the list, and all before it, are for all threads.
fn are_for_all(all: &[Message], first: u64) -> std::result::Result<(), Fault> {
    let mut next = Some(first);
    for _ in 0..=all.len() {
        let Some(place) = next else { return Ok(()) };
        let filter = all.get(place as usize).ok_or("filters: they are not there")?;
        if number_of(filter, FLAGS) & FOR_ALL_THREADS == 0 {
            return Err("filters".to_owned());
        }
        next = filter.number(BEFORE).map(|_| number_of(filter, BEFORE));
    }
    Err("filters: they are in a circle".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::remaps::tests::write;
    use super::*;
    use crate::rights::tests::core;

    fn filter(before: Option<u64>, flags: u64) -> Message {
        let mut filter = Message::default();
        filter.set_bytes(1, vec![0; 8]);
        if let Some(before) = before {
            filter.set_number(BEFORE, before);
        }
        filter.set_number(FLAGS, flags);
        filter
    }

    #[test]
    fn threads_are_under_the_filter_of_their_process() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = directory.path();
        let mut process = Message::default();
        process.set_number(PROCESS, 7);
        [7, 8].iter().for_each(|thread| process.add_number(THREADS, *thread));
        write(at, PROCESSES, PROCESSES_MARKS, &[process]);
        let checked = |thread_mode: u64, filters: &[Message]| {
            let mut all = Message::default();
            filters.iter().for_each(|filter| all.add_bytes(ALL, filter.to_bytes()));
            write(at, FILTERS, FILTERS_MARKS, &[all]);
            let mut found = Filters::default();
            // Without a place of its own it is the first.
            found.add("core-7.img", &core(0, 0, 1, FILTERED));
            found.add("core-8.img", &core(0, 0, 1, thread_mode));
            found.add("core-08.img", &core(0, 0, 1, FILTERED));
            found.check(at)
        };
        checked(0, &[filter(None, 1)]).expect("as CRIU dumps it");
        checked(0, &[filter(Some(1), 3), filter(None, 1)]).expect("two, one before the other");
        checked(FILTERED, &[filter(None, 0)]).expect("each has its own");
        for (what, forged) in [
            ("not for all", &[filter(None, 2)][..]),
            ("the one before is not", &[filter(Some(1), 1), filter(None, 0)]),
            ("none", &[]),
            ("not there", &[filter(Some(9), 1)]),
            ("a circle", &[filter(Some(0), 1)]),
        ] {
            assert!(checked(0, forged).is_err(), "{what}");
        }
    }
}
