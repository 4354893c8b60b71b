//! A client of Redis on one TCP connection, as small as it can be.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Moved, PATIENCE};

/// One connection, never opened again.
pub(crate) struct Redis {
    stream: BufReader<TcpStream>,
}

impl Redis {
    /// Connects, waiting for a server that is just starting.
    pub(crate) fn connect(address: &str) -> Self {
        let begun = Instant::now();
        let stream = loop {
            match TcpStream::connect(address) {
                Ok(stream) => break stream,
                Err(error) => {
                    assert!(begun.elapsed() < PATIENCE, "{address}: {error}")
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_nodelay(true).expect("no delay");
        Self { stream: BufReader::new(stream) }
    }

    /// Sends one command and returns its answer.
    pub(crate) fn ask(&mut self, words: &[&str]) -> String {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        self.send(&words);
        self.answer()
    }

    /// Fills it with values of 4 KiB that do not compress, `bytes` in all.
    pub(crate) fn fill(&mut self, bytes: usize, seed: u64) {
        let mut state = seed;
        let mut value = vec![0u8; 4096];
        for key in 0..bytes / 4096 {
            for word in value.chunks_exact_mut(8) {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                word.copy_from_slice(&(state ^ (state >> 31)).to_le_bytes());
            }
            let name = format!("key:{key}");
            self.send(&[b"SET", name.as_bytes(), &value]);
            assert_eq!(self.answer(), "OK");
        }
    }

    fn send(&mut self, words: &[&[u8]]) {
        let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            bytes.extend_from_slice(word);
            bytes.extend_from_slice(b"\r\n");
        }
        self.stream.get_mut().write_all(&bytes).expect("the connection lives");
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        let length = self.stream.read_line(&mut line).expect("the connection lives");
        assert!(length > 0, "the connection was closed");
        let line = line.trim_end();
        let Some(length) = line.strip_prefix('$').and_then(|length| length.parse::<usize>().ok())
        else {
            assert!(!line.starts_with('-'), "{line}");
            return line[1..].to_owned();
        };
        let mut bytes = vec![0; length + 2];
        self.stream.read_exact(&mut bytes).expect("the connection lives");
        bytes.truncate(length);
        String::from_utf8(bytes).expect("text")
    }
}

/// A client that writes and reads without a pause, and panics when a write was lost.
pub(crate) struct Busy {
    enough: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Duration)>,
    pulse: JoinHandle<Duration>,
}

/// What such a client saw.
pub(crate) struct Seen {
    pub(crate) writes: u64,
    /// The longest that a write and a read took.
    gap: Duration,
    /// The longest that as much took of somebody who did not move: the machine's own doing.
    pulse: Duration,
}

impl Seen {
    /// Panics when clients of what moved as in `moved` waited longer than for the move. A request that is lost at the
    /// freeze after all comes again within twice that time; a lost question for a neighbour would cost a second more.
    pub(crate) fn assert_no_longer_than(&self, moved: &Moved) {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let (writes, gap, pulse, stop) = (self.writes, ms(self.gap), ms(self.pulse), moved.stop);
        eprintln!(
            "    {writes} writes, longest gap {gap:.0} ms, the stop {stop:.0} ms, of it the move itself \
             {:.0} ms; others waited {pulse:.0} ms",
            moved.downtime()
        );
        let most = 2.0 * stop + 450.0 + 2.0 * pulse;
        assert!(
            gap < most,
            "a gap of {gap:.0} ms in a stop of {stop:.0} ms, others' of {pulse:.0} ms"
        );
    }
}

impl Busy {
    /// Connects, and begins once the first write was acknowledged.
    pub(crate) fn begin(address: &str) -> Self {
        let mut redis = Redis::connect(address);
        assert_eq!(redis.ask(&["SET", "busy", "0"]), "OK");
        let enough = Arc::new(AtomicBool::new(false));
        let stop = enough.clone();
        let thread = std::thread::spawn(move || {
            let (mut writes, mut longest, mut last) = (0u64, Duration::ZERO, Instant::now());
            while !stop.load(Ordering::Relaxed) {
                writes += 1;
                assert_eq!(redis.ask(&["INCR", "busy"]), writes.to_string());
                assert_eq!(redis.ask(&["GET", "busy"]), writes.to_string());
                longest = longest.max(last.elapsed());
                last = Instant::now();
            }
            (writes, longest)
        });
        let pulse = std::thread::spawn({
            let stop = enough.clone();
            move || pulse(&stop)
        });
        Self { enough, thread, pulse }
    }

    pub(crate) fn end(self) -> Seen {
        // So that some of them are after the move, whatever happened in it.
        std::thread::sleep(Duration::from_millis(300));
        self.enough.store(true, Ordering::Relaxed);
        let (writes, gap) = self.thread.join().expect("the busy client saw no error");
        Seen { writes, gap, pulse: self.pulse.join().expect("it goes on") }
    }
}

/// As the client does it, with a server that stays: the longest that a question and its answer took.
fn pulse(stop: &AtomicBool) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let mut asks =
        TcpStream::connect(listener.local_addr().expect("its address")).expect("connects");
    asks.set_nodelay(true).expect("no delay");
    let answers = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        stream.set_nodelay(true).expect("no delay");
        let mut byte = [0];
        while stream.read(&mut byte).is_ok_and(|length| length == 1) {
            stream.write_all(&byte).expect("it listens");
        }
    });
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        asks.write_all(b"x").and_then(|()| asks.read_exact(&mut [0])).expect("an answer");
        longest = longest.max(begun.elapsed());
        // So that it is no load by itself.
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(asks);
    answers.join().expect("it goes on");
    longest
}
