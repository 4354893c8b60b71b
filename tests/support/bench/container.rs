//! Scenarios `container`, `container-local` and `container-tree`: the same Redis moved by us and by
//! runc's own checkpoint, in turns, watched by the same client on one connection. In the last two the
//! peer stays on its host, and so has no network to cross.
//!
//! A connection that breaks, or a key that is not what it was, ends the benchmark.

use std::time::Duration;

use crate::error::{BenchError, Result};
use crate::hosts::Hosts;
use crate::load::OtherWork;
use crate::memory::Usage;
use crate::redis_move::{Burden, Sample, ours, theirs};
use crate::row::Row;
use crate::runc::Runc;
use crate::{Bench, median_of, ms, tell};

/// What Redis has in each scenario.
const ACROSS: Burden = Burden { fill_mib: 256, children: 0, shared_mib: 0 };
const LOCAL: Burden = Burden { fill_mib: 1024, children: 0, shared_mib: 0 };
const TREE: Burden = Burden { fill_mib: 16, children: 200, shared_mib: 0 };
/// What the downtime is to be at most, beside a peer that stays where it is.
const LOCAL_DOWNTIME: f64 = 0.1;
const TREE_DOWNTIME: f64 = 0.7;
/// What the destination is to have at the most, in parts of the container's memory.
const PEAK: f64 = 1.15;

/// All rows of the scenario `container`.
pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let hosts = Hosts::up(&bench.work, &bench.root, false)?;
    let (pairs, other) = pairs(bench, &hosts, "container", &ACROSS, Runc::migrate)?;
    let mut rows = compare("container", &pairs, &other, Runc::describe()?, None)?;
    rows.push(memory_row(bench, &hosts)?);
    Ok(rows)
}

/// All rows of the scenario `container-local`.
pub(crate) fn run_local(bench: &Bench) -> Result<Vec<Row>> {
    let hosts = Hosts::up(&bench.work, &bench.root, false)?;
    let name = "container-local";
    let (pairs, other) = pairs(bench, &hosts, name, &LOCAL, |runc, _| runc.bounce())?;
    let mut rows = compare(name, &pairs, &other, Runc::describe_local()?, Some(LOCAL_DOWNTIME))?;
    rows.push(peak_row(name, &pairs)?);
    Ok(rows)
}

/// All rows of the scenario `container-tree`.
pub(crate) fn run_tree(bench: &Bench) -> Result<Vec<Row>> {
    let hosts = Hosts::up(&bench.work, &bench.root, false)?;
    let name = "container-tree";
    let (pairs, other) = pairs(bench, &hosts, name, &TREE, |runc, _| runc.bounce())?;
    compare(name, &pairs, &other, Runc::describe_local()?, Some(TREE_DOWNTIME))
}

pub(crate) type Pairs = Vec<(Sample, Sample)>;

/// Moves by us and by the peer, in turns.
fn pairs(
    bench: &Bench,
    hosts: &Hosts,
    scenario: &'static str,
    burden: &Burden,
    peer: fn(&mut Runc, &Hosts) -> Result<Duration>,
) -> Result<(Pairs, OtherWork)> {
    let (mut pairs, mut other) = (Vec::new(), OtherWork::default());
    for number in 0..=bench.pairs {
        let ours = ours(bench, hosts, scenario, burden, None, &mut other)?;
        let theirs = theirs(bench, hosts, burden, peer, &mut other)?;
        let which = if number == 0 { "warm-up".to_owned() } else { format!("pair {number}") };
        tell(format_args!(
            "{scenario}, {which}: ours {:.0} ms, gap {:.0} ms; runc {:.0} ms, gap {:.0} ms",
            ms(ours.total),
            ms(ours.gap),
            ms(theirs.total),
            ms(theirs.gap)
        ));
        if number > 0 {
            pairs.push((ours, theirs));
        }
    }
    Ok((pairs, other))
}

pub(crate) fn compare(
    scenario: &'static str,
    pairs: &[(Sample, Sample)],
    other: &OtherWork,
    peer: String,
    downtime: Option<f64>,
) -> Result<Vec<Row>> {
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
        Row::beside((scenario, "total", "ms"), &peer, &of(|sample| sample.total), None, total_note),
        Row::beside(
            (scenario, "downtime", "ms"),
            &peer,
            &of(|sample| sample.gap),
            downtime,
            gap_note,
        ),
    ];
    rows.into_iter()
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| BenchError::wrong("There are no pairs to compare"))
}

/// What the destination had at the most, as parts of the container's memory.
fn peak_row(scenario: &'static str, pairs: &[(Sample, Sample)]) -> Result<Row> {
    let part = |ours: &Sample| ours.peak as f64 / ours.memory.max(1) as f64;
    let parts: Vec<f64> = pairs.iter().map(|(ours, _)| part(ours)).collect();
    let note = "The most that the destination's cgroup had during the move and until its memory was \
                in place, less what it had before, in parts of the container's memory: agent, \
                keeper, page store, container, the bundle's files in the page cache, page tables \
                and buffers.";
    Row::alone((scenario, "memory_peak", "parts"), &parts, PEAK, note.to_owned())
        .ok_or_else(|| BenchError::wrong("There are no moves whose memory was counted"))
}

/// Moves of their own: taking samples costs time that the others must not pay.
fn memory_row(bench: &Bench, hosts: &Hosts) -> Result<Row> {
    let mut most = Vec::new();
    let mut memory = 0;
    for number in 1..=bench.pairs {
        let mut usage = Usage::default();
        let moved =
            ours(bench, hosts, "container", &ACROSS, Some(&mut usage), &mut OtherWork::default())?;
        memory = moved.memory;
        tell(format_args!("container, memory {number}: {}", usage.text()));
        most.push(usage);
    }
    crate::memory::row(("container", "without encryption of pages"), &most, memory)
}
