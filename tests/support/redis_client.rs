//! A Redis client that notices: it writes and reads on one TCP connection for as long as it is told to,
//! remembers every write that was acknowledged, times the longest silence between two replies, and at the
//! end asks for every key once more on the same connection.
//!
//! What belongs here: one connection, its bookkeeping and its verdict, with nothing but the standard
//! library, so that `rustc --edition 2024 -O` alone builds it. What does not: moving anything, starting Redis.
//!
//! Standard output is JSON, one object a line: first `{"ready":true,...}` when the filling is done, then an
//! answer to each `report` line on standard input, last the verdict. Exit code 0 only if the verdict is ok,
//! 1 if it is not, 2 for bad usage.

#![deny(unsafe_code)]

#[path = "redis_client/ledger.rs"]
mod ledger;
#[path = "redis_client/resp.rs"]
mod resp;
#[allow(unsafe_code)]
#[path = "redis_client/sys.rs"]
mod sys;

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use ledger::{Ledger, Random, VALUE_HEAD};
use resp::{Connection, Failure, LONGEST_REPLY, Reply, expect_ok};

/// Commands sent ahead of their replies while filling and verifying.
const PIPELINE: usize = 64;

const USAGE: &str = "\
Usage: decamp-test-redis-client ADDRESS:PORT [OPTIONS]

  --fill-mib N      MiB of random values to load first (default 0)
  --value-bytes N   bytes of a value (default 4096, at least 16)
  --write-keys N    keys that are written over and over (default 10000)
  --rate N          operations a second at most; one is a SET and a GET (default 0: as fast as it goes)
  --seconds N       stop after so long; without it: at the end of standard input
  --timeout N       seconds without a reply that count as a broken connection (default 60)
  --seed N          of the values (default 1)

Lines on standard input: report, stop. SIGTERM stops too.

Example: decamp-test-redis-client 10.77.1.5:6379 --fill-mib 256";

/// What the command line asks for.
struct Options {
    address: String,
    fill_bytes: usize,
    value_bytes: usize,
    write_keys: usize,
    rate: u64,
    run_for: Option<Duration>,
    timeout: Duration,
    seed: u64,
}

/// What standard input asks for.
enum Command {
    Report,
    Stop,
}

/// The end of it all: how many keys were as they should be.
struct Verification {
    verified: u64,
    lost: u64,
    first_loss: Option<String>,
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(reason) => {
            eprintln!("{reason}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    sys::stop_on_sigterm();
    let mut ledger = Ledger::new(options.seed, options.value_bytes, options.keys());
    let outcome = run(&options, &mut ledger);
    let ok = print_verdict(&ledger, &outcome);
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Fills, works until told to stop, verifies.
fn run(options: &Options, ledger: &mut Ledger) -> Result<Verification, Failure> {
    let mut connection = Connection::open(&options.address, options.timeout)?;
    let started = Instant::now();
    fill(&mut connection, ledger, options)?;
    say(format_args!(
        "{{\"ready\":true,\"keys\":{},\"fill_ms\":{}}}",
        ledger.acknowledged,
        started.elapsed().as_millis()
    ));
    let commands = read_commands(options.run_for.is_none());
    work(&mut connection, ledger, options, &commands)?;
    verify(&mut connection, ledger)
}

/// Loads the first values, many commands ahead of their replies.
fn fill(
    connection: &mut Connection,
    ledger: &mut Ledger,
    options: &Options,
) -> Result<(), Failure> {
    let keys = options.fill_bytes / options.value_bytes;
    let mut value = Vec::with_capacity(options.value_bytes);
    for first in (0..keys).step_by(PIPELINE) {
        let batch = first..keys.min(first + PIPELINE);
        for key in batch.clone() {
            ledger.value(key, 1, &mut value);
            connection.queue(&[b"SET", name(key).as_bytes(), &value]);
        }
        connection.send()?;
        for key in batch {
            expect_ok(connection.reply()?)?;
            ledger.acknowledge(key, 1);
        }
    }
    Ok(())
}

/// Writes one key, reads another that was acknowledged before, again and again.
fn work(
    connection: &mut Connection,
    ledger: &mut Ledger,
    options: &Options,
    commands: &Receiver<Command>,
) -> Result<(), Failure> {
    let mut random = Random(options.seed ^ 0x5eed);
    let (mut value, mut readable) = (Vec::new(), ledger.acknowledged_keys());
    let started = Instant::now();
    ledger.last_reply = started;
    while !sys::told_to_stop() && options.run_for.is_none_or(|limit| started.elapsed() < limit) {
        match commands.try_recv() {
            Ok(Command::Report) => report(ledger),
            Ok(Command::Stop) => break,
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => {}
        }
        let key = random.below(options.write_keys);
        let version = ledger.versions[key] + 1;
        ledger.value(key, version, &mut value);
        connection.queue(&[b"SET", name(key).as_bytes(), &value]);
        connection.send()?;
        expect_ok(connection.reply()?)?;
        ledger.heard();
        if ledger.versions[key] == 0 {
            readable.push(key);
        }
        ledger.acknowledge(key, version);

        let key = readable[random.below(readable.len())];
        connection.queue(&[b"GET", name(key).as_bytes()]);
        connection.send()?;
        ledger.value(key, ledger.versions[key], &mut value);
        let right = connection.reply()? == Reply::Value(&value);
        ledger.heard();
        ledger.ops += 1;
        ledger.ops_since_report += 1;
        if !right {
            ledger.errors += 1;
            eprintln!("{} does not hold version {}", name(key), ledger.versions[key]);
        }
        pace(options.rate, started, ledger.ops);
    }
    Ok(())
}

/// Says what happened since the last time.
fn report(ledger: &mut Ledger) {
    say(format_args!(
        "{{\"ops\":{},\"longest_gap_ms\":{:.3},\"errors\":{}}}",
        ledger.ops_since_report,
        milliseconds(ledger.gap_since_report),
        ledger.errors
    ));
    ledger.reported();
}

/// Asks for every acknowledged key once more.
fn verify(connection: &mut Connection, ledger: &Ledger) -> Result<Verification, Failure> {
    let mut verification = Verification { verified: 0, lost: 0, first_loss: None };
    let mut value = Vec::new();
    for batch in ledger.acknowledged_keys().chunks(PIPELINE) {
        for &key in batch {
            connection.queue(&[b"GET", name(key).as_bytes()]);
        }
        connection.send()?;
        for &key in batch {
            let version = ledger.versions[key];
            ledger.value(key, version, &mut value);
            match connection.reply()? {
                Reply::Value(held) if held == value => verification.verified += 1,
                other => {
                    verification.lost += 1;
                    verification.first_loss.get_or_insert_with(|| {
                        format!(
                            "{} should hold version {version} and holds {}",
                            name(key),
                            other.describe()
                        )
                    });
                }
            }
        }
    }
    Ok(verification)
}

/// Prints the verdict and says whether it is a good one.
fn print_verdict(ledger: &Ledger, outcome: &Result<Verification, Failure>) -> bool {
    let (verified, lost, reason) = match outcome {
        Ok(found) => (found.verified.to_string(), found.lost.to_string(), found.first_loss.clone()),
        Err(failure) => ("null".into(), "null".into(), Some(failure.to_string())),
    };
    let errors = ledger.errors + u64::from(outcome.is_err());
    let complete = matches!(outcome, Ok(found) if found.lost == 0 && found.verified > 0);
    let ok = complete && errors == 0;
    say(format_args!(
        "{{\"ops\":{},\"acknowledged\":{},\"longest_gap_ms\":{:.3},\"errors\":{errors},\"lost\":{lost},\
         \"verified\":{verified},\"ok\":{ok},\"reason\":{}}}",
        ledger.ops,
        ledger.acknowledged,
        milliseconds(ledger.longest_gap),
        reason.map_or("null".into(), |text| format!("\"{}\"", escape(&text))),
    ));
    ok
}

impl Options {
    fn keys(&self) -> usize {
        (self.fill_bytes / self.value_bytes).max(self.write_keys)
    }

    /// Reads the command line; nothing if help is asked for.
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let mut options = Self {
            address: String::new(),
            fill_bytes: 0,
            value_bytes: 4096,
            write_keys: 10_000,
            rate: 0,
            run_for: None,
            timeout: Duration::from_secs(60),
            seed: 1,
        };
        while let Some(word) = words.next() {
            match word.as_str() {
                "-h" | "--help" => return Ok(None),
                "--fill-mib" => options.fill_bytes = number::<usize>(&word, words.next())? << 20,
                "--value-bytes" => options.value_bytes = number(&word, words.next())?,
                "--write-keys" => options.write_keys = number(&word, words.next())?,
                "--rate" => options.rate = number(&word, words.next())?,
                "--seconds" => {
                    options.run_for = Some(Duration::from_secs(number(&word, words.next())?))
                }
                "--timeout" => options.timeout = Duration::from_secs(number(&word, words.next())?),
                "--seed" => options.seed = number(&word, words.next())?,
                _ if word.starts_with('-') || !options.address.is_empty() => {
                    return Err(format!("What is {word}?"));
                }
                _ => options.address = word,
            }
        }
        let sound = !options.address.is_empty()
            && (VALUE_HEAD..=LONGEST_REPLY).contains(&options.value_bytes)
            && options.write_keys > 0
            && !options.timeout.is_zero();
        if sound {
            Ok(Some(options))
        } else {
            Err("An address is needed, and sizes that are not zero".into())
        }
    }
}

/// Reads standard input beside the work. Its end is a stop, if asked for.
fn read_commands(end_is_stop: bool) -> Receiver<Command> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            let command = match line.trim() {
                "report" => Command::Report,
                "stop" => Command::Stop,
                other => {
                    eprintln!("What is {other}? (report, stop)");
                    continue;
                }
            };
            if sender.send(command).is_err() {
                return;
            }
        }
        if end_is_stop {
            // Nobody listens any more: the work is over anyway.
            let _ = sender.send(Command::Stop);
        }
    });
    receiver
}

/// Waits until the next operation is due.
fn pace(rate: u64, started: Instant, ops: u64) {
    if rate > 0 {
        let due = Duration::from_secs_f64(ops as f64 / rate as f64);
        std::thread::sleep(due.saturating_sub(started.elapsed()));
    }
}

/// Prints one line. A reader that has gone away does not end the work: the exit code still tells.
fn say(line: fmt::Arguments<'_>) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn name(key: usize) -> String {
    format!("k{key}")
}

fn number<T: std::str::FromStr>(option: &str, word: Option<String>) -> Result<T, String> {
    word.as_deref()
        .and_then(|word| word.parse().ok())
        .ok_or_else(|| format!("{option} needs a number"))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '"' | '\\' => out.extend(['\\', character]),
            _ if character.is_control() => out.push(' '),
            _ => out.push(character),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &[&str]) -> Result<Option<Options>, String> {
        Options::parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn bad_usage_is_refused() {
        for words in [
            &[][..],
            &["a:1", "b:1"],
            &["a:1", "--rate"],
            &["a:1", "--value-bytes", "3"],
            &["a:1", "--what"],
        ] {
            assert!(options(words).is_err(), "{words:?}");
        }
    }
}
