//! An outside observer of a guest on two hosts: sees from the growth of its logs where it runs, and that
//! it never runs at two places.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA};

/// A guest under watch reports every 20 ms.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// One look may catch the source's last line after the destination's first.
const CHANCE: usize = 1;

/// Watches until it is asked.
pub(crate) struct Watch {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Growth>>>,
}

/// One look at which a log had grown.
#[derive(Clone, Copy, Debug)]
struct Growth {
    host: &'static str,
    at: Duration,
}

impl Watch {
    /// Begins to watch `guest`, which should report every 20 ms.
    pub(crate) fn begin(guest: &Guest) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let over = end.clone();
        let logs = [ALPHA, BETA].map(|host| (host, guest.log_path(host)));
        let thread = std::thread::spawn(move || look(&logs, &over));
        Self { end, thread: Some(thread) }
    }

    /// Panics if the guest ran at two places at once: that is, if it came to run at one, and the other
    /// went on.
    #[track_caller]
    pub(crate) fn saw_no_two(mut self) {
        self.end.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("taken only here");
        let seen = thread.join().expect("the observer does not panic");
        for host in [ALPHA, BETA] {
            let Some(last) = seen.iter().rposition(|growth| growth.host == host) else { continue };
            let Some(first) = seen.iter().position(|growth| growth.host == host) else { continue };
            let others = seen[first..last].iter().filter(|growth| growth.host != host).count();
            assert!(others <= CHANCE, "it ran at two places: {:?}", tail(&seen));
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

fn look(logs: &[(&'static str, PathBuf); 2], over: &AtomicBool) -> Vec<Growth> {
    let size = |path: &PathBuf| fs::metadata(path).map_or(0, |found| found.len());
    let started = Instant::now();
    let mut sizes = logs.each_ref().map(|(_, path)| size(path));
    let mut seen = Vec::new();
    while !over.load(Ordering::Relaxed) {
        for ((host, path), before) in logs.iter().zip(&mut sizes) {
            let now = size(path);
            if now > *before {
                seen.push(Growth { host, at: started.elapsed() });
            }
            *before = now;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    seen
}

/// Where it ran, from when to when.
fn tail(seen: &[Growth]) -> Vec<(&'static str, Duration, Duration)> {
    let mut stays: Vec<(&'static str, Duration, Duration)> = Vec::new();
    for growth in seen {
        match stays.last_mut() {
            Some((host, _, until)) if *host == growth.host => *until = growth.at,
            _ => stays.push((growth.host, growth.at, growth.at)),
        }
    }
    stays
}
