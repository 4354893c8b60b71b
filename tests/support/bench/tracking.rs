//! Scenario `container-tracking`: what a container pays for being copied while it runs. How long one
//! of its threads stood still for the tracker, and how fast a client that asks without a pause is
//! answered, beside the same client just before.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::error::{BenchError, Result};
use crate::hosts::Hosts;
use crate::load::OtherWork;
use crate::redis_move::{Burden, begin, forget, moved};
use crate::row::Row;
use crate::{Bench, ms, tell};

const BURDEN: Burden = Burden { fill_mib: 256, children: 0, shared_mib: 0 };
/// How long the client is watched before.
const BEFORE: Duration = Duration::from_secs(3);
/// Throughput while it is copied is to be 0.85 of what it was: so much longer may an operation take.
const SLOWER: f64 = 1.0 / 0.85;
/// What a thread may stand still for the tracker, in milliseconds.
const STALL_MS: f64 = 1.0;

/// All rows of the scenario.
pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let hosts = Hosts::up(&bench.work, &bench.root, false)?;
    let (mut pairs, mut stalls, mut other) = (Vec::new(), Vec::new(), OtherWork::default());
    for number in 0..=bench.pairs {
        let mut client = begin(bench, &hosts, &BURDEN, 0)?;
        client.report()?;
        let started = Instant::now();
        sleep(BEFORE);
        let before = per_operation(client.report()?.0, started.elapsed())?;
        let mark = hosts.mark()?;
        let started = Instant::now();
        let report = moved(bench, &hosts, "container-tracking")?.report;
        let (ops, gap) = client.report()?;
        let during = per_operation(ops, started.elapsed().saturating_sub(gap))?;
        other.add(&mark, &hosts.mark()?);
        client.stop()?;
        forget(&hosts)?;
        let stall = report["source_stall_ms"].as_f64();
        let stall = stall.ok_or_else(|| BenchError::wrong("The report names no stall"))?;
        tell(format_args!(
            "container-tracking, turn {number}: {before:.1} µs before, {during:.1} µs during an \
             operation, stall {stall:.2} ms"
        ));
        if number > 0 {
            pairs.push((during, before));
            stalls.push(stall);
        }
    }
    let note = format!(
        "Time that an operation (a write and a read on one connection, without a pause) took, over \
         the whole move less the client's longest wait, beside the {:.0} s before. Here both hosts, \
         their agents and the client share the processors of one machine: encoding, sending and \
         storing the pages compete with Redis and its client for them. {}",
        BEFORE.as_secs_f64(),
        other.text()
    );
    let name = ("container-tracking", "operation", "µs");
    let rows = [
        Row::beside(name, "itself before the move", &pairs, Some(SLOWER), note),
        Row::alone(
            ("container-tracking", "stall", "ms"),
            &stalls,
            STALL_MS,
            "The longest that one thread stood still for the tracker, as the report has it.".into(),
        ),
    ];
    let rows = rows.into_iter().collect::<Option<Vec<_>>>();
    rows.ok_or_else(|| BenchError::wrong("There are no turns to compare"))
}

fn per_operation(ops: u64, time: Duration) -> Result<f64> {
    match ops {
        0 => Err(BenchError::wrong("The Redis client did nothing")),
        ops => Ok(ms(time) * 1000.0 / ops as f64),
    }
}
