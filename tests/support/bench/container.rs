//! Scenario `container`: the same Redis moved by us and by runc's own checkpoint, in turns, watched
//! by the same client on one connection.
//!
//! A connection that breaks, or a key that is not what it was, ends the benchmark.

use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use crate::decamp::Decamp;
use crate::error::{BenchError, Result};
use crate::hosts::{DESTINATION, Hosts, SOURCE, done};
use crate::load::OtherWork;
use crate::memory::{Sampler, Usage};
use crate::redis::{ADDRESS, Client, FILL_MIB};
use crate::row::Row;
use crate::runc::Runc;
use crate::{Bench, median_of, ms, tell};

const NAME: &str = "bench";
/// How long the client works on before and after the move.
const WATCH: Duration = Duration::from_secs(1);

/// One move, by either side.
struct Sample {
    /// From the command to its end, as seen from outside.
    total: Duration,
    /// The client's longest wait for a reply over the whole move.
    gap: Duration,
    /// The same just before, when nothing moved.
    quiet: Duration,
    /// What the tool says of itself, in milliseconds: total time and downtime. runc says nothing.
    said: (f64, f64),
}

/// All rows of the scenario.
pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let hosts = Hosts::up(&bench.work, &bench.root, false)?;
    let (mut pairs, mut other) = (Vec::new(), OtherWork::default());
    for number in 0..=bench.pairs {
        let (ours, _) = ours(bench, &hosts, None, &mut other)?;
        let theirs = theirs(bench, &hosts, &mut other)?;
        let which = if number == 0 { "warm-up".to_owned() } else { format!("pair {number}") };
        tell(format_args!(
            "container, {which}: ours {:.0} ms, gap {:.0} ms; runc {:.0} ms, gap {:.0} ms",
            ms(ours.total),
            ms(ours.gap),
            ms(theirs.total),
            ms(theirs.gap)
        ));
        if number > 0 {
            pairs.push((ours, theirs));
        }
    }
    let mut rows = compare(&pairs, &other)?;
    rows.push(memory_row(bench, &hosts)?);
    Ok(rows)
}

fn compare(pairs: &[(Sample, Sample)], other: &OtherWork) -> Result<Vec<Row>> {
    let peer = Runc::describe()?;
    let of = |value: fn(&Sample) -> Duration| -> Vec<(f64, f64)> {
        pairs.iter().map(|(ours, theirs)| (ms(value(ours)), ms(value(theirs)))).collect()
    };
    let said = |value: fn(&Sample) -> f64| median_of(pairs.iter().map(|pair| value(&pair.0)));
    let total_note = format!(
        "From the command to its end, by one clock outside; no encryption of pages on either side \
         (our control connection and files stay encrypted). Ours includes starting `decamp \
         migrate`, the checks, and carrying the bundle; theirs had bundle, network namespace and \
         shells in place at the destination. We state {:.0} ms in the median. {}",
        said(|sample| sample.said.0),
        other.text()
    );
    let quiet = pairs.iter().flat_map(|(ours, theirs)| [ms(ours.quiet), ms(theirs.quiet)]);
    let gap_note = format!(
        "The longest that the checking client, on one connection, waited for a reply; up to {:.1} \
         ms of it happen when nothing moves. It contains the retransmission timers of TCP, which \
         double: a container that is back just after a retransmission may be noticed late. Every \
         key was verified after every move, ours and theirs. We state {:.0} ms in the median. {}",
        quiet.fold(0.0, f64::max),
        said(|sample| sample.said.1),
        other.text()
    );
    let rows = [
        Row::beside(
            ("container", "total", "ms"),
            &peer,
            &of(|sample| sample.total),
            None,
            total_note,
        ),
        Row::beside(
            ("container", "downtime", "ms"),
            &peer,
            &of(|sample| sample.gap),
            None,
            gap_note,
        ),
    ];
    rows.into_iter()
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| BenchError::wrong("There are no pairs to compare"))
}

/// Moves of their own: taking samples costs time that the others must not pay.
fn memory_row(bench: &Bench, hosts: &Hosts) -> Result<Row> {
    let mut most = Vec::new();
    let mut memory = 0;
    for number in 1..=bench.pairs {
        let mut usage = Usage::default();
        memory = ours(bench, hosts, Some(&mut usage), &mut OtherWork::default())?.1;
        tell(format_args!("container, memory {number}: {}", usage.text()));
        most.push(usage);
    }
    crate::memory::row(("container", "without encryption of pages"), &most, memory)
}

/// One move by us, and the memory that the container had.
fn ours(
    bench: &Bench,
    hosts: &Hosts,
    usage: Option<&mut Usage>,
    other: &mut OtherWork,
) -> Result<(Sample, u64)> {
    let (here, there) = (Decamp::at(hosts, SOURCE)?, Decamp::at(hosts, DESTINATION)?);
    done(
        Command::new(bench.root.join("tests/fixtures/redis-bundle"))
            .arg(hosts.srv(SOURCE).join("redis")),
    )?;
    let net = format!("bridge=br0,ip={ADDRESS}/16");
    here.verb(&["run", "container", NAME, "--bundle", "/srv/redis", "--net", &net])?;
    let mut client = Client::start(&bench.redis_client())?;
    let quiet = quiet(&mut client)?;
    let sampler = usage.is_some().then(|| Sampler::start(hosts.init(SOURCE)?)).transpose()?;
    let before = hosts.mark()?;
    let moved = here.migrate(NAME, DESTINATION)?;
    other.add(&before, &hosts.mark()?);
    if let (Some(usage), Some(sampler)) = (usage, sampler) {
        *usage = sampler.most()?;
    }
    if moved.report["encrypted"] != false {
        return Err(BenchError::wrong(format!(
            "The move says encrypted: {}",
            moved.report["encrypted"]
        )));
    }
    bench.keep_report("container", &moved.report);
    let said = (moved.reported("total_ms"), moved.reported("downtime_ms"));
    let sample = finish(client, moved.wall, quiet, said)?;
    there.verb(&["stop", NAME])?;
    there.verb(&["rm", NAME, "--yes"])?;
    here.verb(&["rm", NAME, "--yes"])?;
    hosts.clear_srv(SOURCE)?;
    hosts.clear_srv(DESTINATION)?;
    Ok((sample, moved.report["memory_bytes"].as_u64().unwrap_or(u64::from(FILL_MIB) << 20)))
}

/// One move by runc and tar.
fn theirs(bench: &Bench, hosts: &Hosts, other: &mut OtherWork) -> Result<Sample> {
    let mut runc = Runc::start(hosts, &bench.root)?;
    let mut client = Client::start(&bench.redis_client())?;
    let quiet = quiet(&mut client)?;
    let before = hosts.mark()?;
    let total = runc.migrate(hosts)?;
    other.add(&before, &hosts.mark()?);
    let sample = finish(client, total, quiet, (0.0, 0.0))?;
    runc.clear(hosts)?;
    Ok(sample)
}

/// The client's longest wait while nothing moves. From here on its gaps count anew.
fn quiet(client: &mut Client) -> Result<Duration> {
    client.gap()?;
    sleep(WATCH);
    client.gap()
}

/// Lets the client work on for a while, and has it verify everything.
fn finish(
    mut client: Client,
    total: Duration,
    quiet: Duration,
    said: (f64, f64),
) -> Result<Sample> {
    sleep(WATCH);
    let gap = client.gap()?;
    client.stop()?;
    Ok(Sample { total, gap, quiet, said })
}
