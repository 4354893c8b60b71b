//! Dirty tracking of a container's processes while they run, and which tracker a host has.
//!
//! A tracker sees the memory that the page engine moves, and nothing else of a container. What it cannot
//! be sure of counts as written.

mod frames;
mod page_hash;
mod soft_dirty;
#[cfg(test)]
mod tried;
mod write_protect;
mod zeros;

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use decamp_shared::methods::TrackerChoice;
use decamp_shared::pages::PageSet;

use crate::cgroup::Cgroups;
use crate::error::Result;
use crate::memory::{self, HiddenProcess, Process};
use crate::sys;

/// Those that there are, the best first.
const IN_ORDER: [TrackerChoice; 3] =
    [TrackerChoice::WriteProtect, TrackerChoice::SoftDirty, TrackerChoice::PageHash];

/// How often memories are compared anew because a process ended meanwhile.
const SHARING_TRIES: u32 = 3;

/// Tells which pages were written.
pub(crate) trait Tracker: Send {
    /// Adds every page of `processes`, which run, that was written since the last call, or that nobody
    /// has looked at yet. Pages are marked clean before they can be read for sending.
    fn harvest(&mut self, processes: &[Process], dirty: &mut PageSet) -> Result<()>;

    /// Looks at `processes` for the last time, while they stand still, and enters all pages that exist, and
    /// those that were written since the last harvest.
    fn last(&mut self, processes: &mut [HiddenProcess]) -> Result<()>;

    /// The longest that a task stood still for the tracking, so far.
    fn stall(&self) -> Duration;
}

/// The tracker that a move would use here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// Never `Auto` nor `None`.
    pub(crate) tracker: TrackerChoice,
    /// Why each better one is not it.
    pub(crate) fallbacks: Vec<String>,
}

/// The tracker that a choice comes to on this host.
///
/// # Errors
/// Why there is none.
pub(crate) fn choose(choice: TrackerChoice) -> std::result::Result<Chosen, String> {
    match choice {
        TrackerChoice::None => Err("the configuration says tracker = \"none\"".to_owned()),
        TrackerChoice::Auto => first_that_works(&IN_ORDER, probe),
        tracker => match probe(tracker) {
            Ok(()) => Ok(Chosen { tracker, fallbacks: Vec::new() }),
            Err(reason) => Err(format!(
                "the configuration says tracker = \"{}\", which does not work here: {reason}",
                tracker.word()
            )),
        },
    }
}

fn first_that_works(
    order: &[TrackerChoice],
    probe: impl Fn(TrackerChoice) -> std::result::Result<(), String>,
) -> std::result::Result<Chosen, String> {
    let mut fallbacks = Vec::new();
    for tracker in order {
        match probe(*tracker) {
            Ok(()) => return Ok(Chosen { tracker: *tracker, fallbacks }),
            Err(reason) => fallbacks.push(format!("Tracker {}: {reason}", tracker.word())),
        }
    }
    Err(format!("no tracker works here. {}", fallbacks.join(". ")))
}

fn probe(tracker: TrackerChoice) -> std::result::Result<(), String> {
    match tracker {
        TrackerChoice::WriteProtect => write_protect::probe(),
        TrackerChoice::SoftDirty => soft_dirty::probe(),
        TrackerChoice::PageHash => page_hash::probe(),
        TrackerChoice::Auto | TrackerChoice::None => Err("it is no tracker".to_owned()),
    }
}

/// Starts to track the processes in `cgroups`. The first harvest gives every page that exists.
///
/// # Errors
/// Why that cannot be done here.
pub(crate) fn start(
    choice: TrackerChoice,
    cgroups: &Cgroups,
) -> std::result::Result<Box<dyn Tracker>, String> {
    Ok(match choose(choice)?.tracker {
        TrackerChoice::SoftDirty => {
            Box::new(soft_dirty::SoftDirty::new(cgroups).map_err(|error| error.to_string())?)
        }
        TrackerChoice::PageHash => Box::new(page_hash::PageHash),
        _ => Box::new(write_protect::WriteProtect::default()),
    })
}

/// Has `look` look at each process that runs. One that ends, or replaces its memory, while it is looked
/// at is no error.
fn each_that_lives(
    processes: &[Process],
    mut look: impl FnMut(&Process) -> Result<()>,
) -> Result<()> {
    for process in processes {
        match look(process) {
            Ok(()) => {}
            // It ended while it was looked at.
            Err(error) if memory::began(process.pid)?.is_none() => {
                tracing::debug!(pid = process.pid, %error, "A process ended in a round");
            }
            // The memory that was looked at is gone, by an end or an exec. What comes after it is new to
            // the next harvest. Of one that has ended and is not yet reaped some files in /proc cannot
            // be read, for reasons of their own.
            Err(error) if error.is_gone() || memory::is_without_memory(process.pid)? => {
                tracing::debug!(pid = process.pid, %error, "A memory ended in a round");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Processes that have their memory in common with another one: a write by either is told once only.
fn sharing<'a>(processes: impl Iterator<Item = &'a Process>) -> BTreeSet<i32> {
    let pids: Vec<i32> = processes.map(|process| process.pid).collect();
    for _ in 0..SHARING_TRIES {
        // One that ends while it is compared leaves the others without an order.
        let living = pids.iter().copied().filter(|pid| sys::compare_memory(*pid, *pid).is_ok());
        if let Ok(found) = sharing_of(living, sys::compare_memory) {
            return found;
        }
    }
    pids.into_iter().collect()
}

fn sharing_of(
    pids: impl Iterator<Item = i32>,
    compare: impl Fn(i32, i32) -> io::Result<Ordering>,
) -> io::Result<BTreeSet<i32>> {
    let mut sharing = BTreeSet::new();
    // In the kernel's own order of memories.
    let mut ordered: Vec<i32> = Vec::new();
    for pid in pids {
        let mut failed = None;
        let found = ordered.binary_search_by(|other| {
            compare(*other, pid).unwrap_or_else(|error| {
                failed = Some(error);
                Ordering::Equal
            })
        });
        match (failed, found) {
            (Some(error), _) => return Err(error),
            (None, Ok(at)) => sharing.extend([ordered[at], pid]),
            (None, Err(at)) => ordered.insert(at, pid),
        }
    }
    Ok(sharing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_works_is_taken_and_says_why_no_better_one_is() {
        let order =
            [TrackerChoice::WriteProtect, TrackerChoice::SoftDirty, TrackerChoice::PageHash];
        let only = |works: TrackerChoice| {
            move |tracker| if tracker == works { Ok(()) } else { Err("not here".to_owned()) }
        };
        let best = first_that_works(&order, |_| Ok(())).expect("all work");
        assert_eq!((best.tracker, best.fallbacks.len()), (TrackerChoice::WriteProtect, 0));
        let last = first_that_works(&order, only(TrackerChoice::PageHash)).expect("one works");
        assert_eq!(last.tracker, TrackerChoice::PageHash);
        assert_eq!(
            last.fallbacks,
            ["Tracker write-protect: not here", "Tracker soft-dirty: not here"]
        );
        let none = first_that_works(&order, only(TrackerChoice::None)).expect_err("none works");
        assert!(none.contains("Tracker page-hash: not here"), "{none}");
    }

    #[test]
    fn who_shares_a_memory_is_known_or_nobody_is() {
        // Processes 1 and 2 share one, 3 has its own.
        let memory = |pid: i32| if pid <= 2 { 1 } else { pid };
        let compare = |one: i32, other: i32| Ok(memory(one).cmp(&memory(other)));
        let found = sharing_of([1, 3, 2].into_iter(), compare).expect("all live");
        assert_eq!(found, BTreeSet::from([1, 2]));
        // Were 3 left out because of 4, which ends, whoever shares with 3 would be taken for alone.
        let compare = |one: i32, other: i32| match one == 4 || other == 4 {
            true => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            false => compare(one, other),
        };
        assert!(sharing_of([4, 3, 1, 2].into_iter(), compare).is_err());
    }

    #[test]
    fn a_forced_one_is_that_one_or_none() {
        let forced = choose(TrackerChoice::PageHash).expect("it works everywhere");
        let expected = Chosen { tracker: TrackerChoice::PageHash, fallbacks: Vec::new() };
        assert_eq!(forced, expected);
        assert!(choose(TrackerChoice::None).is_err_and(|text| text.contains("the configuration")));
    }
}
