//! Trackers tried with a program whose memory never stands still (`tests/fixtures/churn.c`): what one does not
//! tell of in a stop must be what was read of it last. No memory is moved; so nothing else can be at fault.

use std::collections::HashMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use decamp_shared::methods::TrackerChoice;
use decamp_shared::pages::{PAGE_SIZE, PageRange, PageSet, SpaceId};
use serde_json::json;

use super::{Tracker, choose, start};
use crate::cgroup::Cgroups;
use crate::memory::{self, HiddenProcess, Process};

const STOPS: usize = 10;
const ROUNDS: usize = 4;
const BETWEEN: Duration = Duration::from_millis(30);

/// The program in a cgroup. Both are gone when this is dropped.
struct Churning {
    child: Child,
    cgroups: Cgroups,
    directory: tempfile::TempDir,
}

impl Churning {
    fn begin(name: &str) -> Result<Self, String> {
        let directory = tempfile::tempdir().expect("a directory");
        let program = directory.path().join("churn");
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/churn.c");
        let mut made = Command::new("cc");
        made.args(["-static", "-pthread", "-O1", "-o"]).arg(&program).arg(fixture);
        if !made.status().is_ok_and(|status| status.success()) {
            return Err("needs cc".to_owned());
        }
        let v1 = Path::new("/sys/fs/cgroup/freezer");
        let (controller, top) =
            if v1.is_dir() { ("freezer", v1) } else { ("", Path::new("/sys/fs/cgroup")) };
        let path = top.join(format!("decamp-tried-{}-{name}", std::process::id()));
        fs::create_dir(&path).map_err(|error| format!("cannot make a cgroup: {error}"))?;
        let cgroups = Cgroups::from_state(&json!({controller: path})).expect("a freezer");
        let mut command = Command::new("sh");
        command.args(["-c", "read line; exec \"$0\""]).arg(&program).stdin(Stdio::piped());
        command.stdout(File::create(directory.path().join("said")).expect("a file"));
        let child = command.spawn().expect("sh");
        let mut churning = Self { child, cgroups, directory };
        churning.cgroups.enter(churning.child.id() as i32).expect("entered");
        let input = churning.child.stdin.as_mut().expect("a pipe");
        input.write_all(b"go\n").expect("it reads");
        while !churning.said().contains("ok") {
            sleep(BETWEEN);
        }
        Ok(churning)
    }

    fn said(&self) -> String {
        fs::read_to_string(self.directory.path().join("said")).expect("what it said")
    }

    /// Lets it run for a while, of which a busy machine may give it nothing.
    fn let_it_work(&self) {
        let path = format!("/proc/{}/schedstat", self.child.id());
        let ran = || {
            let text = fs::read_to_string(&path).expect("it lives");
            let spent = text.split(' ').next().and_then(|word| word.parse().ok());
            Duration::from_nanos(spent.expect("a number"))
        };
        let before = ran();
        sleep(BETWEEN);
        while ran() < before + BETWEEN / 6 {
            sleep(BETWEEN / 10);
        }
    }

    fn processes(&self) -> Vec<Process> {
        let pids = self.cgroups.processes().expect("members");
        memory::processes(&pids, self.child.id() as i32).expect("its processes")
    }

    /// Rounds, and a stop. Where `one_is_lost`, nobody hears of what the last round told.
    fn stop(&self, tracker: &mut dyn Tracker, one_is_lost: bool) -> Stop {
        let mut sent = Sent::default();
        for round in 0..ROUNDS {
            let mut dirty = PageSet::new();
            tracker.harvest(&self.processes(), &mut dirty).expect("a harvest");
            if !one_is_lost || round + 1 < ROUNDS {
                sent.note(&self.processes(), &dirty);
            }
            self.let_it_work();
        }
        self.cgroups.freeze().expect("frozen");
        let processes = self.processes();
        let mut hidden: Vec<HiddenProcess> = processes
            .iter()
            .map(|process| HiddenProcess::mapped(process).expect("mappings"))
            .collect();
        tracker.last(&mut hidden).expect("the last look");
        let mut stop = Stop::default();
        for hidden in &hidden {
            sent.compare(hidden, &mut stop);
        }
        self.cgroups.thaw().expect("thawed");
        stop
    }
}

impl Drop for Churning {
    fn drop(&mut self) {
        self.cgroups.sweep().expect("swept");
        self.child.wait().expect("ended");
    }
}

/// What a stop was like: pages that exist, of which the tracker told nothing, and of which it should have.
#[derive(Debug, Default)]
struct Stop {
    exist: u64,
    untold: u64,
    missed: Vec<PageRange>,
}

/// Hashes of what was read of each page last.
#[derive(Default)]
struct Sent(HashMap<(SpaceId, u64), u64>);

impl Sent {
    fn note(&mut self, processes: &[Process], dirty: &PageSet) {
        for process in processes {
            let Ok(memory) = File::open(format!("/proc/{}/mem", process.pid)) else { continue };
            for range in dirty.ranges().filter(|range| range.space == process.space()) {
                for page in range.first..range.end() {
                    self.0.insert((range.space, page), hash(&memory, page));
                }
            }
        }
    }

    fn compare(&self, hidden: &HiddenProcess, stop: &mut Stop) {
        let space = hidden.process.space();
        let (mut pages, mut written) = (PageSet::new(), PageSet::new());
        hidden.process.add_to(&mut pages, &hidden.pages);
        hidden.process.add_to(&mut written, &hidden.written);
        stop.exist += pages.len();
        pages.subtract(&written);
        stop.untold += pages.len();
        let memory = File::open(format!("/proc/{}/mem", hidden.process.pid)).expect("its memory");
        for page in pages.ranges().flat_map(|range| range.first..range.end()) {
            if self.0.get(&(space, page)) != Some(&hash(&memory, page)) {
                stop.missed.push(PageRange::new(space, page, 1));
            }
        }
    }
}

/// What is gone reads as zeros.
fn hash(memory: &File, page: u64) -> u64 {
    let mut bytes = [0; PAGE_SIZE];
    if memory.read_exact_at(&mut bytes, page * PAGE_SIZE as u64).is_err() {
        bytes.fill(0);
    }
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn tell_all(choice: TrackerChoice) {
    if let Err(reason) = choose(choice) {
        return eprintln!("skipped: {reason}");
    }
    let churning = match Churning::begin(choice.word()) {
        Ok(churning) => churning,
        Err(reason) => return eprintln!("skipped: {reason}"),
    };
    let begin = || start(choice, &churning.cgroups).expect("it was chosen");
    let mut untold = 0;
    for number in 0..STOPS {
        let mut tracker = begin();
        let stop = churning.stop(&mut *tracker, false);
        eprintln!(
            "{} stop {number}: {} of {} pages not told of, {} of them wrongly; stalled {:?}",
            choice.word(),
            stop.untold,
            stop.exist,
            stop.missed.len(),
            tracker.stall(),
        );
        assert!(stop.missed.is_empty(), "{stop:?}");
        untold += stop.untold;
    }
    assert!(untold > 0, "it told of everything each time");
    let stop = churning.stop(&mut *begin(), true);
    assert!(!stop.missed.is_empty(), "this would notice nothing");
    let said = churning.said();
    assert!(!said.contains("BAD"), "{said}");
}

#[test]
fn write_protection_tells_of_all_that_changes() {
    tell_all(TrackerChoice::WriteProtect);
}

#[test]
fn soft_dirty_bits_tell_of_all_that_changes() {
    tell_all(TrackerChoice::SoftDirty);
}
