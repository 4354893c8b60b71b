//! Starts processes that do nothing but hold memory, and becomes another program: a tree to move.
//!
//! What belongs here: making the tree, with nothing but the standard library, so that `rustc` alone builds
//! it. What does not: moving it.
//!
//! `process-tree COUNT MIB PROGRAM ARGUMENTS...`: COUNT children, each with MIB of memory of its own.
//! `process-tree shared MIB PROGRAM ARGUMENTS...`: a child and its child, which share MIB of memory.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
#[path = "process_tree/sys.rs"]
mod sys;

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

/// The words by which a child knows that it is one.
const HOLD: &str = "hold-memory";
const HOLD_SHARED: &str = "hold-shared-memory";
/// The word in place of a number of children.
const SHARED: &str = "shared";
/// Where memory begins to differ from that of others.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match &words[..] {
        [hold, number, mib] if hold == HOLD => hold_memory(number, mib),
        [hold, mib] if hold == HOLD_SHARED => hold_shared_memory(mib),
        [shared, mib, program, arguments @ ..] if shared == SHARED => {
            start(&[HOLD_SHARED, mib]).and_then(|()| become_it(program, arguments))
        }
        [count, mib, program, arguments @ ..] => grow(count, mib, program, arguments),
        _ => Err(io::Error::other("Usage: process-tree COUNT|shared MIB PROGRAM ARGUMENTS...")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("process-tree: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the children one after another, so that all of them are ready, and becomes the program.
fn grow(count: &str, mib: &str, program: &str, arguments: &[String]) -> io::Result<()> {
    for number in 0..parse(count)? {
        start(&[HOLD, &number.to_string(), mib])?;
    }
    become_it(program, arguments)
}

/// Starts this program as a child, and waits until it is ready.
fn start(words: &[&str]) -> io::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut ready = [0];
    child.stdout.take().ok_or_else(|| io::Error::other("no pipe"))?.read_exact(&mut ready)
}

fn become_it(program: &str, arguments: &[String]) -> io::Result<()> {
    Err(Command::new(program).args(arguments).exec())
}

/// Fills memory with bytes that no two children share, and keeps it for ever.
fn hold_memory(number: &str, mib: &str) -> io::Result<()> {
    let mut random = SEED.wrapping_mul(parse(number)? + 1);
    let words = bytes(mib)? / size_of::<u64>();
    let mut memory = Vec::with_capacity(words);
    memory.extend((0..words).map(|_| draw(&mut random)));
    // Or else nobody would have to write it.
    std::hint::black_box(&memory);
    wait_for_ever()
}

/// Fills memory that it then shares with a child of its own.
fn hold_shared_memory(mib: &str) -> io::Result<()> {
    let mut random = SEED;
    sys::shared_words(bytes(mib)?)?.iter_mut().for_each(|word| *word = draw(&mut random));
    sys::go_on_twice()?;
    wait_for_ever()
}

/// Says that it is ready.
fn wait_for_ever() -> io::Result<()> {
    let mut output = io::stdout();
    // Of two the second may find nobody who listens any more.
    let _ = output.write_all(b".").and_then(|()| output.flush());
    loop {
        std::thread::park();
    }
}

fn draw(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn bytes(mib: &str) -> io::Result<usize> {
    Ok(parse(mib)? as usize * (1 << 20))
}

fn parse(word: &str) -> io::Result<u64> {
    word.parse().map_err(|_| io::Error::other(format!("{word} is no number")))
}
