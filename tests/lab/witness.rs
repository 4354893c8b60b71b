//! What runs in the lab's guests: it counts, watches the clocks, keeps memory and disk busy and verifies them,
//! answers who asks on the console or on the network, and says whether anything was ever wrong.
//!
//! Built by rustc alone, without libraries, into one static program. On the console a line is a question: `time`,
//! `state`, `cpuid LEAF` (its four registers), `registers` (which are watched), `written FROM TO` (bytes that the disk's
//! writer wrote from one time to another), `rest` (it stops, and all of it is on the disk), `verify` (all of the file is
//! read from the disk), `go`, or `sh COMMAND`. Answers begin with `@`, so that they are told from what the kernel prints.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io::{self, BufRead, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

mod registers;
mod sockets;
mod writer;

/// A beat of the clocks' watch.
const BEAT: Duration = Duration::from_millis(20);
/// Real time may part from monotonic time by this from one beat to the next.
const STEP: u128 = 2_000_000;
const PAGE: usize = 4096;

#[derive(Default)]
struct Watch {
    beats: AtomicU64,
    /// The longest time between two beats, by the monotonic clock, in nanoseconds.
    longest: AtomicU64,
    /// How often real time stepped against monotonic time, or either went back.
    steps: AtomicU64,
    /// Passes over all of the memory.
    passes: AtomicU64,
    /// Bytes of the file, once it is there; and that were written and verified since.
    file: AtomicU64,
    written: AtomicU64,
    verified: AtomicU64,
    /// At each beat: real time in nanoseconds, and `written`.
    history: Mutex<Vec<(i128, u64)>>,
    wrong: Mutex<Vec<String>>,
}

static WATCH: OnceLock<Watch> = OnceLock::new();

fn watch() -> &'static Watch {
    WATCH.get_or_init(Watch::default)
}

fn wrong(text: String) {
    let mut list = watch().wrong.lock().unwrap();
    if list.len() < 20 {
        list.push(text);
    }
}

fn real() -> i128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i128)
}

/// How far real time is ahead of monotonic time since `begin`; nothing if something came in between the readings.
fn apart(begin: Instant) -> Option<i128> {
    let before = begin.elapsed();
    let real = real();
    let after = begin.elapsed();
    (after - before < Duration::from_millis(1)).then(|| real - after.as_nanos() as i128)
}

/// Beats, and compares the clocks from beat to beat.
fn keep_time() {
    let watch = watch();
    let begin = Instant::now();
    let (mut last, mut known) = (Duration::ZERO, None::<i128>);
    loop {
        let now = begin.elapsed();
        let gap = now.saturating_sub(last).as_nanos() as u64;
        watch.longest.fetch_max(gap, Ordering::Relaxed);
        watch.beats.fetch_add(1, Ordering::Relaxed);
        last = now;
        let written = watch.written.load(Ordering::Relaxed);
        watch.history.lock().unwrap().push((real(), written));
        if let Some(found) = apart(begin)
            && let Some(before) = known.replace(found)
            && before.abs_diff(found) > STEP
        {
            watch.steps.fetch_add(1, Ordering::Relaxed);
            wrong(format!("real time stepped by {} ns against monotonic time", found - before));
        }
        thread::sleep(BEAT);
    }
}

/// What page `page` holds in pass `pass`, word for word.
fn word(page: u64, pass: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    (page, pass).hash(&mut hasher);
    hasher.finish()
}

/// Whether each word of a block is another: no compression makes anything of that.
static VARIED: AtomicBool = AtomicBool::new(false);

/// The words of a block.
fn words(page: u64, pass: u64) -> impl Iterator<Item = [u8; 8]> {
    let step = if VARIED.load(Ordering::Relaxed) { 0x9e37_79b9_7f4a_7c15 } else { 0 };
    let first = word(page, pass);
    (0..).scan(first, move |next, _: u64| {
        let word = *next;
        // Weyl's sequence, and a fold so that neighbours have no bytes in common.
        *next = next.wrapping_add(step);
        Some((if step == 0 { word } else { (word ^ word >> 29).wrapping_mul(step) }).to_le_bytes())
    })
}

fn fill(block: &mut [u8], page: u64, pass: u64) {
    block
        .as_chunks_mut::<8>()
        .0
        .iter_mut()
        .zip(words(page, pass))
        .for_each(|(old, new)| *old = new);
}

fn is_whole(block: &[u8], page: u64, pass: u64) -> bool {
    block
        .as_chunks::<8>()
        .0
        .iter()
        .copied()
        .zip(words(page, pass))
        .all(|(found, word)| found == word)
}

/// Rewrites `kibibytes` of memory again and again; each page is verified before it is written anew.
fn keep_memory(kibibytes: usize) {
    let mut memory = vec![0u8; kibibytes << 10];
    for pass in 1.. {
        for (page, block) in (0u64..).zip(memory.chunks_exact_mut(PAGE)) {
            if pass > 1 && !is_whole(block, page, pass - 1) {
                wrong(format!("memory page {page} is not what was written in pass {}", pass - 1));
            }
            fill(block, page, pass);
            // A guest that does nothing else would be throttled before it moves.
            if page % 64 == 0 {
                thread::sleep(Duration::from_millis(2));
            }
        }
        watch().passes.fetch_add(1, Ordering::Relaxed);
    }
}

/// Bytes that were written in beats from `from` to `to`, both included, in nanoseconds of real time.
fn written_in(from: i128, to: i128) -> u64 {
    let history = watch().history.lock().unwrap();
    let within: Vec<u64> = history
        .iter()
        .filter(|(at, _)| (from..=to).contains(at))
        .map(|(_, bytes)| *bytes)
        .collect();
    within.last().zip(within.first()).map_or(0, |(last, first)| last - first)
}

/// Sends back what comes, on TCP.
fn echo(port: u16) -> io::Result<()> {
    for stream in TcpListener::bind(("0.0.0.0", port))?.incoming() {
        let stream = stream?;
        stream.set_nodelay(true)?;
        thread::spawn(move || send_back(stream));
    }
    Ok(())
}

/// Until either end has enough.
fn send_back(mut stream: impl Read + Write) {
    // As much as came at once goes back at once: offloads have something to do.
    let mut bytes = vec![0; 64 << 10];
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        if stream.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
}

/// Answers each datagram with itself and the time.
fn tell_time(port: u16) -> io::Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", port))?;
    let mut bytes = [0; 64];
    loop {
        let (count, from) = socket.recv_from(&mut bytes)?;
        let answer = format!("{} {}", String::from_utf8_lossy(&bytes[..count]), real());
        socket.send_to(answer.as_bytes(), from)?;
    }
}

/// One line, at once, so that the kernel's stay out of it.
fn answer(text: &str) {
    let mut out = io::stdout();
    let _ = out.write_all(format!("@{text}\n").as_bytes());
    let _ = out.flush();
}

fn state() -> String {
    let watch = watch();
    let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
    let list: Vec<_> =
        watch.wrong.lock().unwrap().iter().map(|text| format!("\"{text}\"")).collect();
    format!(
        "{{\"beats\":{},\"longest_ms\":{:.1},\"steps\":{},\"passes\":{},\
         \"file\":{},\"written\":{},\"verified\":{},\"wrong\":[{}]}}",
        get(&watch.beats),
        get(&watch.longest) as f64 / 1e6,
        get(&watch.steps),
        get(&watch.passes),
        get(&watch.file),
        get(&watch.written),
        get(&watch.verified),
        list.join(",")
    )
}

/// `FROM TO`.
fn written(words: &str) -> String {
    let mut times = words.split_whitespace().map(str::parse);
    match (times.next(), times.next()) {
        (Some(Ok(from)), Some(Ok(to))) => written_in(from, to).to_string(),
        _ => "what?".to_owned(),
    }
}

/// EAX, EBX, ECX and EDX.
fn cpuid(words: &str) -> String {
    let Ok(leaf) = words.trim().parse() else { return "what?".to_owned() };
    let found = std::arch::x86_64::__cpuid(leaf);
    format!("{} {} {} {}", found.eax, found.ebx, found.ecx, found.edx)
}

/// Switches the guest off when its power button is pressed, of which `device` tells (linux/input.h).
fn obey_button(device: &std::path::Path) -> io::Result<()> {
    const EV_KEY: u16 = 1;
    const KEY_POWER: u16 = 116;
    let mut device = std::fs::File::open(device)?;
    loop {
        // A time of 16 bytes, kind, code and value.
        let mut event = [0; 24];
        device.read_exact(&mut event)?;
        let word = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
        if (word(16), word(18), event[20]) == (EV_KEY, KEY_POWER, 1) {
            Command::new("/bin/sh").args(["-c", "sync; poweroff -f"]).spawn()?.wait()?;
        }
    }
}

fn shell(command: &str) {
    let run = Command::new("/bin/sh").args(["-c", command]).stdin(Stdio::null()).output();
    match run {
        Ok(output) => {
            for line in String::from_utf8_lossy(&output.stdout).lines() {
                answer(&format!("|{line}"));
            }
            answer(&format!("ended {}", output.status.code().unwrap_or(-1)));
        }
        Err(error) => answer(&format!("ended {error}")),
    }
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let size = |at: usize| words.get(at).and_then(|text| text.parse().ok());
    let (memory, on_disk) = (size(1).unwrap_or(32 << 10), size(3).unwrap_or(16));
    VARIED.store(words.get(2).is_some_and(|text| text == "varied"), Ordering::Relaxed);
    thread::spawn(keep_time);
    thread::spawn(move || keep_memory(memory));
    thread::spawn(registers::keep);
    if std::fs::exists("/disk").unwrap_or(false) {
        thread::spawn(move || {
            writer::keep(on_disk).unwrap_or_else(|error| wrong(format!("the disk: {error}")))
        });
    }
    for device in std::fs::read_dir("/dev/input").into_iter().flatten().flatten() {
        thread::spawn(move || obey_button(&device.path()));
    }
    thread::spawn(|| echo(7777).unwrap_or_else(|error| wrong(format!("echo: {error}"))));
    thread::spawn(|| tell_time(7778).unwrap_or_else(|error| wrong(format!("time: {error}"))));
    if std::fs::exists("/dev/vsock").unwrap_or(false) {
        thread::spawn(|| {
            sockets::echo(7779).unwrap_or_else(|error| wrong(format!("its host's socket: {error}")))
        });
    }
    answer("witness");
    for line in io::stdin().lock().lines().map_while(Result::ok) {
        match line.trim() {
            "time" => answer(&format!("time {}", real())),
            "state" => answer(&format!("state {}", state())),
            "registers" => answer(&format!("registers {}", registers::watched())),
            "rest" => answer(&format!("rest {}", writer::rest())),
            "verify" => answer(&format!("verify {}", writer::verify_all())),
            "go" => {
                writer::go();
                answer("go on");
            }
            other => match other.split_once(' ') {
                Some(("sh", command)) => shell(command),
                Some(("cpuid", words)) => answer(&format!("cpuid {}", cpuid(words))),
                Some(("written", words)) => answer(&format!("written {}", written(words))),
                _ => answer("what?"),
            },
        }
    }
}
