//! The outside observer of a guest: reads serial consoles, notes when each heartbeat came, keeps
//! the rest as text, and types. The same for every virtual machine monitor; it knows none of them.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use crate::error::{BenchError, Result};
use crate::hosts::await_that;

/// What the guest prints as its heartbeat, a line of its own.
const BEAT: u8 = b'+';

/// Reads any number of consoles until it is dropped.
pub(crate) struct Observer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    end: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// When heartbeats were read, and on which console.
    beats: Vec<(Instant, &'static str)>,
    /// All else, for each console.
    text: HashMap<&'static str, Vec<u8>>,
    keyboards: HashMap<&'static str, UnixStream>,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer {
    pub(crate) fn new() -> Self {
        Self { shared: Arc::default(), threads: Vec::new() }
    }

    /// Reads the console behind a socket, from the moment that the socket is there.
    pub(crate) fn watch(&mut self, console: &'static str, socket: PathBuf) -> Result<()> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("console {console}"))
            .spawn(move || read_console(&shared, console, &socket))
            .map_err(BenchError::io("start a thread"))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Waits until the text of a console holds something that `look` wants.
    pub(crate) fn await_text<T>(
        &self,
        console: &'static str,
        what: &str,
        look: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        await_that(what, Duration::from_secs(60), || {
            let seen = self.shared.seen();
            let text = seen.text.get(console).map(|bytes| String::from_utf8_lossy(bytes));
            Ok(text.and_then(|text| look(&text)))
        })
    }

    /// Types at a console.
    pub(crate) fn type_at(&self, console: &'static str, keys: &[u8]) -> Result<()> {
        let mut seen = self.shared.seen();
        let keyboard = seen.keyboards.get_mut(console).ok_or_else(|| {
            BenchError::wrong(format!("Nobody is connected to the console of {console}"))
        })?;
        keyboard
            .write_all(keys)
            .map_err(BenchError::io(format!("type at the console of {console}")))
    }

    /// The longest time between two heartbeats that follow each other and of which the second came
    /// within `from..to`; silence up to `to` counts.
    pub(crate) fn longest_gap(&self, from: Instant, to: Instant) -> Option<Duration> {
        let beats = self.shared.seen().beats.iter().map(|beat| beat.0).collect();
        longest_gap(beats, from, to)
    }

    /// The time from the last heartbeat on one console to the first on another.
    pub(crate) fn switchover(&self, from: &str, to: &str) -> Option<Duration> {
        let seen = self.shared.seen();
        let of = |console: &str| {
            let beats = seen.beats.iter().filter(|beat| beat.1 == console);
            beats.map(|beat| beat.0).collect::<Vec<_>>()
        };
        Some(of(to).into_iter().min()?.saturating_duration_since(of(from).into_iter().max()?))
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn longest_gap(mut beats: Vec<Instant>, from: Instant, to: Instant) -> Option<Duration> {
    beats.sort_unstable();
    beats.retain(|&beat| beat < to);
    // Without a beat before the window nobody knows how long its first gap is.
    let before = beats.iter().rposition(|&beat| beat < from)?;
    beats.push(to);
    beats[before..].windows(2).map(|pair| pair[1] - pair[0]).max()
}

fn read_console(shared: &Shared, console: &'static str, socket: &PathBuf) {
    hurry();
    let mut stream = loop {
        if shared.end.load(Ordering::Relaxed) {
            return;
        }
        match connect(socket) {
            Ok(stream) => break stream,
            Err(_) => sleep(Duration::from_millis(1)),
        }
    };
    match stream.try_clone() {
        Ok(keyboard) => drop(shared.seen().keyboards.insert(console, keyboard)),
        Err(error) => eprintln!("bench: nobody can type at the console of {console}: {error}"),
    }
    let mut bytes = [0; 4096];
    while !shared.end.load(Ordering::Relaxed) {
        let count = match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                continue;
            }
            Err(_) => return,
        };
        let now = Instant::now();
        let mut seen = shared.seen();
        if bytes[..count].contains(&BEAT) {
            seen.beats.push((now, console));
        }
        let text = bytes[..count].iter().filter(|&&byte| byte != BEAT);
        seen.text.entry(console).or_default().extend(text);
    }
}

fn connect(socket: &PathBuf) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    Ok(stream)
}

/// Lets this thread run before all that is measured: an observer that waits for a processor sees
/// gaps that are its own. Without the right to do so the gaps are a little longer, for both sides.
fn hurry() {
    let thread = nix::unistd::gettid().to_string();
    let _ = Command::new("chrt")
        .args(["--fifo", "--pid", "10", &thread])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_found_wherever_it_is() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let gap = |beats: &[u64], from, to| {
            let beats = beats.iter().map(|&ms| at(ms)).collect();
            longest_gap(beats, at(from), at(to)).map(|gap| gap.as_millis())
        };
        // Within, across the beginning, and open at the end; out of order, because two consoles are
        // read.
        assert_eq!(gap(&[0, 10, 11, 41, 42, 50], 10, 50), Some(30));
        assert_eq!(gap(&[0, 30, 31, 32], 10, 33), Some(30));
        assert_eq!(gap(&[0, 10, 11], 5, 100), Some(89));
        assert_eq!(gap(&[0, 41, 10, 11], 5, 42), Some(30));
        // What lies before or after does not count.
        assert_eq!(gap(&[0, 90, 91, 92, 200], 92, 93), Some(1));
        assert_eq!(gap(&[], 0, 10), None);
        assert_eq!(gap(&[5], 0, 10), None);
    }
}
