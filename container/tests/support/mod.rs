//! What the tests of moves stand on: a host made of namespaces, places in it, and the steps of a
//! move without a wire. Here is what all of them look at processes with.

mod cases;
mod host;
pub(crate) mod redis;
mod spot;
mod transfer;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

pub(crate) use cases::{Case, main_with};
pub(crate) use host::{HELD, HUNGRY, Host, criu, program};
pub(crate) use spot::Spot;
pub(crate) use transfer::{Moved, apart, copy, copy_pages, tracker_of};

/// More time than anything that is awaited takes, on however slow and busy a machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Keepers (of this test run) whose place is `directory`.
fn keepers_of(directory: &Path) -> Vec<i32> {
    let config = directory.join("keeper.json");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        // A keeper's child that holds descriptors has its arguments, and another name.
        if fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name == "decamp-holder\n")
        {
            continue;
        }
        if line.split(|byte| *byte == 0).any(|word| word == config.as_os_str().as_encoded_bytes()) {
            found.push(pid);
        }
    }
    found
}

/// Whether a process, by its directory in /proc, is a child that holds descriptors of a keeper of workloads below
/// `workloads`: other runs have theirs.
fn is_holder(process: &Path, workloads: &Path) -> bool {
    let is_called = |name: String| name == "decamp-holder\n";
    let below = workloads.as_os_str().as_encoded_bytes();
    fs::read_to_string(process.join("comm")).is_ok_and(is_called)
        && fs::read(process.join("cmdline"))
            .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word.starts_with(below)))
}

pub(crate) fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
