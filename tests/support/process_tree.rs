//! Starts processes that do nothing but hold memory, and becomes another program: a tree to move.
//!
//! What belongs here: making the tree, with nothing but the standard library, so that `rustc` alone builds
//! it. What does not: moving it.
//!
//! `process-tree COUNT MIB PROGRAM ARGUMENTS...`: COUNT children, each with MIB of memory of its own.

#![deny(unsafe_code)]

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

/// The word by which a child knows that it is one.
const HOLD: &str = "hold-memory";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match &words[..] {
        [hold, number, mib] if hold == HOLD => hold_memory(number, mib),
        [count, mib, program, arguments @ ..] => grow(count, mib, program, arguments),
        _ => Err(io::Error::other("Usage: process-tree COUNT MIB PROGRAM ARGUMENTS...")),
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
    let myself = std::env::current_exe()?;
    for number in 0..parse(count)? {
        let mut child = Command::new(&myself)
            .args([HOLD, &number.to_string(), mib])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut ready = [0];
        child.stdout.take().ok_or_else(|| io::Error::other("no pipe"))?.read_exact(&mut ready)?;
    }
    Err(Command::new(program).args(arguments).exec())
}

/// Fills memory with bytes that no two children share, and keeps it for ever.
fn hold_memory(number: &str, mib: &str) -> io::Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(parse(number)? + 1);
    let words = parse(mib)? as usize * (1 << 20) / 8;
    let mut memory = Vec::with_capacity(words);
    for _ in 0..words {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memory.push(state);
    }
    // Or else nobody would have to write it.
    std::hint::black_box(&memory);
    let mut output = io::stdout();
    output.write_all(b".")?;
    output.flush()?;
    loop {
        std::thread::park();
    }
}

fn parse(word: &str) -> io::Result<u64> {
    word.parse().map_err(|_| io::Error::other(format!("{word} is no number")))
}
