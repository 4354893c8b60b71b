//! PostgreSQL under pgbench: a client of its own that raises a counter and sees every step, and after the
//! load the checks that PostgreSQL brings.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cases::Case;
use super::talks::{Talk, receive, send};
use super::work::{Work, inside};
use crate::error::{BenchError, Result};
use crate::hosts::done;

/// Where it listens.
pub(crate) const PORT: u16 = 5432;
/// The longest message that it answers with; a peer's length is not taken at its word.
const MESSAGE: usize = 1 << 20;
/// Version 3.0 of its protocol.
const PROTOCOL: u32 = 3 << 16;
/// Its error code while it is starting up.
const STARTING: &str = " C57P03 ";
/// What pgbench's transactions leave equal, and how many there were.
const SUMS: &str = "select count(distinct total) = 1 and (select count(*) > 0 from pgbench_history) from ( \
     select sum(abalance) as total from pgbench_accounts union all \
     select sum(bbalance) from pgbench_branches union all \
     select sum(tbalance) from pgbench_tellers union all \
     select sum(delta) from pgbench_history) as sums";

/// PostgreSQL that runs.
#[derive(Default)]
pub(crate) struct Postgres {
    pgbench: Option<Work>,
}

/// Raises a counter and is told what it is now.
#[derive(Default)]
struct Counter {
    count: u64,
}

impl Postgres {
    fn query(query: &str) -> Result<String> {
        let psql = tool("psql")?;
        let words = ["-h", super::ADDRESS, "-U", "postgres", "-AtXc", query];
        Ok(done(&mut inside(&psql, &words))?.trim().to_owned())
    }
}

impl Case for Postgres {
    fn talk(&mut self) -> Box<dyn Talk> {
        Box::new(Counter::default())
    }

    fn begin(&mut self) -> Result<()> {
        let pgbench = tool("pgbench")?;
        let to = ["-h", super::ADDRESS, "-U", "postgres"];
        done(inside(&pgbench, &to).args(["-i", "-q", "-s", "5", "postgres"]))?;
        let load = ["--no-vacuum", "-c", "4", "-j", "2", "-T", "3600", "postgres"];
        self.pgbench = Some(Work::start(&pgbench, &[&to[..], &load].concat())?);
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let pgbench = self.pgbench.take();
        let pgbench = pgbench.ok_or_else(|| BenchError::wrong("There is no pgbench to end"))?;
        // It says nothing when it is interrupted, and before that only what went wrong.
        let said = pgbench.interrupt()?;
        if ["error", "aborted", "fatal"].iter().any(|word| said.contains(word)) {
            return Err(BenchError::wrong(format!("Transactions of pgbench failed: {said}")));
        }
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        let sums = Self::query(SUMS)?;
        if sums != "t" {
            return Err(BenchError::wrong(format!(
                "The sums of pgbench's balances differ: {sums}"
            )));
        }
        let words = ["-h", super::ADDRESS, "-U", "postgres", "-d", "postgres"];
        let checks = ["--install-missing", "--heapallindexed", "--parent-check"];
        done(inside(&tool("pg_amcheck")?, &words).args(checks))?;
        Ok(())
    }

    fn check_files(&mut self, bundle: &Path) -> Result<()> {
        let data = bundle.join("rootfs/var/lib/postgresql/data");
        done(Command::new(tool("pg_checksums")?).arg("--check").arg("-D").arg(data))?;
        Ok(())
    }
}

impl Talk for Counter {
    fn greet(&mut self, stream: &mut TcpStream) -> Result<bool> {
        let words = b"user\0postgres\0database\0postgres\0\0";
        let mut message = (8 + words.len() as u32).to_be_bytes().to_vec();
        message.extend(PROTOCOL.to_be_bytes());
        message.extend(words);
        send(stream, &message)?;
        match answer(stream) {
            Err(BenchError::Wrong(text)) if text.contains(STARTING) => Ok(false),
            other => other.map(|_| true),
        }
    }

    fn begin(&mut self, stream: &mut TcpStream) -> Result<()> {
        ask(stream, "create table steps (count bigint); insert into steps values (0)")?;
        Ok(())
    }

    fn ask(&mut self, stream: &mut TcpStream, _number: u64) -> Result<()> {
        self.count += 1;
        let found = ask(stream, "update steps set count = count + 1 returning count")?;
        if found != Some(self.count.to_string()) {
            let count = self.count;
            return Err(BenchError::wrong(format!("Step {count} of a counter gave {found:?}")));
        }
        Ok(())
    }
}

/// A simple query, and the first column of the last row.
fn ask(stream: &mut TcpStream, query: &str) -> Result<Option<String>> {
    let mut message = vec![b'Q'];
    message.extend((5 + query.len() as u32).to_be_bytes());
    message.extend(query.as_bytes());
    message.push(0);
    send(stream, &message)?;
    answer(stream)
}

/// Reads until the server is ready for a query.
fn answer(stream: &mut TcpStream) -> Result<Option<String>> {
    let mut found = None;
    loop {
        let head = receive(stream, 5)?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if !(4..=MESSAGE).contains(&length) {
            return Err(BenchError::wrong(format!("PostgreSQL sends a message of {length} bytes")));
        }
        let body = receive(stream, length - 4)?;
        match head[0] {
            b'Z' => return Ok(found),
            b'E' => {
                let text = String::from_utf8_lossy(&body).replace('\0', " ");
                return Err(BenchError::wrong(format!("PostgreSQL says: {text}")));
            }
            // Two bytes: how many columns; four: how long the first is.
            b'D' => found = body.get(6..).map(|text| String::from_utf8_lossy(text).into_owned()),
            _ => {}
        }
    }
}

/// A program of the newest PostgreSQL of this machine.
fn tool(name: &str) -> Result<String> {
    let versions = Path::new("/usr/lib/postgresql");
    let entries =
        fs::read_dir(versions).map_err(BenchError::io(format!("read {}", versions.display())))?;
    let found: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path().join("bin").join(name)).collect();
    let number = |path: &PathBuf| -> Option<u32> {
        path.parent()?.parent()?.file_name()?.to_str()?.parse().ok()
    };
    let newest = found.into_iter().filter(|path| path.exists()).max_by_key(number);
    let newest = newest
        .ok_or_else(|| BenchError::wrong(format!("There is no {name} of PostgreSQL here")))?;
    Ok(newest.display().to_string())
}
