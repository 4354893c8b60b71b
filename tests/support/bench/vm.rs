//! Scenario `vm`: the same guest moved by us and by QEMU, in turns, watched by the same observer. Scenario
//! `vm-sparse`: the same guest with memory that it never touches.
//!
//! Each move is of a fresh machine whose memory has been filled. A machine whose own checks are not
//! clean after the move ends the benchmark: a fast move that loses a page is none.

use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::beat::Observer;
use crate::decamp::Decamp;
use crate::error::{BenchError, Result};
use crate::hosts::{DESTINATION, Hosts, SOURCE, copy};
use crate::load::OtherWork;
use crate::memory::{Sampler, Usage};
use crate::qemu::{Guest, Qemu};
use crate::row::Row;
use crate::{Bench, median_of, ms, tell};

/// The guest that both sides move: 1 GiB filled, 32 MiB of it hot.
const GUEST: Guest<'static> =
    Guest { cmdline: "fill=1024 hot=32 rate=20000 seed=7 report=200 beat=1", memory_mib: 2048 };
/// Memory of a guest that is mostly untouched, MiB, and the most that its move may take of the others' time.
const SPARSE_MIB: u32 = 16 * 1024;
const SPARSE_MOST: f64 = 1.2;
const NAME: &str = "bench";
/// How long heartbeats are watched after the move, and before it.
const WATCH: Duration = Duration::from_secs(1);
/// The most of QEMU's total time that ours may be.
const TARGET: f64 = 0.8;

/// One move, by either side.
struct Sample {
    /// From the command to its end, as seen from outside.
    total: Duration,
    /// The longest silence of the guest over the whole move.
    gap: Duration,
    /// From the source's last heartbeat to the destination's first.
    switchover: Duration,
    /// The longest silence just before, when nothing moved.
    quiet: Duration,
    /// What the tool says of itself: total time and downtime, in milliseconds.
    said: (f64, f64),
}

/// All rows of the scenario.
pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let hosts = Hosts::up(&bench.work, &bench.root, false)?;
    let mut rows = Vec::new();
    for tls in [false, true] {
        if tls {
            hosts.encrypt_pages(true)?;
        }
        let mut other = OtherWork::default();
        let pairs = take_pairs(bench, &hosts, tls, &mut other)?;
        rows.extend(compare(&pairs, tls, &other)?);
    }
    rows.push(memory_row(bench, &hosts)?);
    Ok(rows)
}

/// One pair that does not count, then those that do: ours, theirs, ours, theirs.
fn take_pairs(
    bench: &Bench,
    hosts: &Hosts,
    tls: bool,
    other: &mut OtherWork,
) -> Result<Vec<(Sample, Sample)>> {
    let with = if tls { "with TLS" } else { "without encryption" };
    let mut pairs = Vec::new();
    for number in 0..=bench.pairs {
        let ours = ours(bench, hosts, &GUEST, tls, None, other)?;
        let theirs = theirs(bench, hosts, tls, other)?;
        let which = if number == 0 { "warm-up".to_owned() } else { format!("pair {number}") };
        tell(format_args!(
            "vm {with}, {which}: ours {:.0} ms, gap {:.1} ms; QEMU {:.0} ms, gap {:.1} ms",
            ms(ours.total),
            ms(ours.gap),
            ms(theirs.total),
            ms(theirs.gap)
        ));
        if number > 0 {
            pairs.push((ours, theirs));
        }
    }
    Ok(pairs)
}

fn compare(pairs: &[(Sample, Sample)], tls: bool, other: &OtherWork) -> Result<Vec<Row>> {
    let peer = Qemu::describe(tls)?;
    let of = |value: fn(&Sample) -> Duration| -> Vec<(f64, f64)> {
        pairs.iter().map(|(ours, theirs)| (ms(value(ours)), ms(value(theirs)))).collect()
    };
    let said = |value: fn(&Sample) -> f64| {
        let ours = median_of(pairs.iter().map(|pair| value(&pair.0)));
        let theirs = median_of(pairs.iter().map(|pair| value(&pair.1)));
        format!("{ours:.0} and {theirs:.0} ms")
    };
    let [total, gap, switchover] = match tls {
        true => ["total_tls", "downtime_tls", "switchover_tls"],
        false => ["total", "downtime", "switchover"],
    };
    let total_note = format!(
        "From the command to its end, by one clock outside. Ours includes starting `decamp \
         migrate`, the checks, building the destination and carrying the kernel file; QEMU's \
         destination was built before, with its kernel in place, and its end is the source's \
         `completed`. Medians that the tools state: {}. {}",
        said(|sample| sample.said.0),
        other.text()
    );
    let quiet = pairs.iter().flat_map(|(ours, theirs)| [ms(ours.quiet), ms(theirs.quiet)]);
    let gap_note = format!(
        "The longest gap between heartbeats that the guest prints each millisecond, over the whole \
         move, both consoles read by one observer; up to {:.1} ms of it happen when nothing moves. \
         The guest shares {} processors with both ends of the move, which two real hosts would not. \
         Medians that the tools state: {}. {}",
        quiet.fold(0.0, f64::max),
        std::thread::available_parallelism().map_or(0, usize::from),
        said(|sample| sample.said.1),
        other.text()
    );
    let switchover_note = "From the source's last heartbeat to the destination's first: what the \
        switch itself takes of the downtime. A gap that is longer lies within the rounds, where the \
        guest waits for a processor, or for a page that it may write again."
        .to_owned();
    let target = Some(TARGET);
    let rows = [
        Row::beside(("vm", total, "ms"), &peer, &of(|sample| sample.total), target, total_note),
        Row::beside(("vm", gap, "ms"), &peer, &of(|sample| sample.gap), None, gap_note),
        Row::beside(
            ("vm", switchover, "ms"),
            &peer,
            &of(|sample| sample.switchover),
            None,
            switchover_note,
        ),
    ];
    rows.into_iter()
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| BenchError::wrong("There are no pairs to compare"))
}

/// Moves of their own: taking samples costs time that the others must not pay.
fn memory_row(bench: &Bench, hosts: &Hosts) -> Result<Row> {
    let mut most = Vec::new();
    for number in 1..=bench.pairs {
        let mut usage = Usage::default();
        ours(bench, hosts, &GUEST, true, Some(&mut usage), &mut OtherWork::default())?;
        tell(format_args!("vm, memory {number}: {}", usage.text()));
        most.push(usage);
    }
    crate::memory::row(("vm", "with TLS"), &most, u64::from(GUEST.memory_mib) << 20)
}

/// All rows of the scenario `vm-sparse`: the same guest with 2 GiB and with 16 GiB of memory, in turns.
pub(crate) fn run_sparse(bench: &Bench) -> Result<Vec<Row>> {
    let hosts = Hosts::up(&bench.work, &bench.root, true)?;
    let (mut totals, mut gaps, mut other) = (Vec::new(), Vec::new(), OtherWork::default());
    for number in 0..=bench.pairs {
        let sparse = Guest { memory_mib: SPARSE_MIB, ..GUEST };
        let sparse = ours(bench, &hosts, &sparse, true, None, &mut other)?;
        let dense = ours(bench, &hosts, &GUEST, true, None, &mut other)?;
        tell(format_args!(
            "vm-sparse, turn {number}: {SPARSE_MIB} MiB in {:.0} ms, gap {:.1} ms; {} MiB in {:.0} ms, gap {:.1} ms",
            ms(sparse.total),
            ms(sparse.gap),
            GUEST.memory_mib,
            ms(dense.total),
            ms(dense.gap)
        ));
        // The first turn warms the machine up.
        if number > 0 {
            totals.push((ms(sparse.total), ms(dense.total)));
            gaps.push((ms(sparse.gap), ms(dense.gap)));
        }
    }
    let peer = format!("itself with {} MiB", GUEST.memory_mib);
    let note = format!(
        "A guest with {SPARSE_MIB} MiB of memory, of which 1 GiB was ever written, beside one with {} MiB and \
         the same 1 GiB; encrypted. {}",
        GUEST.memory_mib,
        other.text()
    );
    let rows = [
        Row::beside(("vm-sparse", "total", "ms"), &peer, &totals, Some(SPARSE_MOST), note.clone()),
        Row::beside(("vm-sparse", "downtime", "ms"), &peer, &gaps, None, note),
    ];
    rows.into_iter()
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| BenchError::wrong("There are no turns to compare"))
}

/// One move of `guest` by us.
fn ours(
    bench: &Bench,
    hosts: &Hosts,
    guest: &Guest<'_>,
    tls: bool,
    usage: Option<&mut Usage>,
    other: &mut OtherWork,
) -> Result<Sample> {
    let (here, there) = (Decamp::at(hosts, SOURCE)?, Decamp::at(hosts, DESTINATION)?);
    copy(&bench.guest(), &hosts.srv(SOURCE).join("guest.elf"))?;
    let memory = format!("{}M", guest.memory_mib);
    here.verb(&[
        "run",
        "vm",
        NAME,
        "--kernel",
        "/srv/guest.elf",
        "--memory",
        &memory,
        "--cmdline",
        guest.cmdline,
    ])?;
    let mut observer = Observer::new();
    for host in [SOURCE, DESTINATION] {
        let state = hosts.root(host)?.join("var/lib/decamp/workloads").join(NAME);
        observer.watch(host, state.join("console.sock"))?;
    }
    await_filled(&observer)?;
    let sampler = usage.is_some().then(|| Sampler::start(hosts.init(SOURCE)?)).transpose()?;
    let before = hosts.mark()?;
    let moved = here.migrate(NAME, DESTINATION)?;
    other.add(&before, &hosts.mark()?);
    if let (Some(usage), Some(sampler)) = (usage, sampler) {
        *usage = sampler.most()?;
    }
    if moved.report["encrypted"] != json!(tls) {
        return Err(BenchError::wrong(format!(
            "The move says encrypted: {}",
            moved.report["encrypted"]
        )));
    }
    bench.keep_report("vm", &moved.report);
    let said = (moved.reported("total_ms"), moved.reported("downtime_ms"));
    let sample = finish(&observer, moved.started, moved.wall, said)?;
    there.verb(&["stop", NAME])?;
    there.verb(&["rm", NAME, "--yes"])?;
    here.verb(&["rm", NAME, "--yes"])?;
    hosts.clear_srv(SOURCE)?;
    hosts.clear_srv(DESTINATION)?;
    Ok(sample)
}

/// One move by QEMU.
fn theirs(bench: &Bench, hosts: &Hosts, tls: bool, other: &mut OtherWork) -> Result<Sample> {
    for host in [SOURCE, DESTINATION] {
        copy(&bench.guest(), &hosts.srv(host).join("guest.elf"))?;
    }
    let mut qemu = Qemu::start(hosts, &GUEST, tls)?;
    let mut observer = Observer::new();
    for (host, console) in [SOURCE, DESTINATION].into_iter().zip(qemu.consoles()) {
        observer.watch(host, console)?;
    }
    await_filled(&observer)?;
    let before = hosts.mark()?;
    let (started, wall, said) = qemu.migrate()?;
    other.add(&before, &hosts.mark()?);
    let number = |key: &str| said.get(key).and_then(Value::as_f64).unwrap_or(0.0);
    let sample = finish(&observer, started, wall, (number("total-time"), number("downtime")))?;
    hosts.clear_srv(SOURCE)?;
    hosts.clear_srv(DESTINATION)?;
    Ok(sample)
}

/// Waits until the guest has filled its memory and is at its work.
fn await_filled(observer: &Observer) -> Result<()> {
    observer.await_text(SOURCE, "the guest to fill its memory", |text| {
        let at_work = text.rsplit_once("filled pages=")?.1;
        (at_work.matches("count=").count() >= 3).then_some(())
    })?;
    sleep(WATCH);
    Ok(())
}

/// Watches on for a while, has the guest verify everything, and does the sums.
fn finish(
    observer: &Observer,
    started: Instant,
    total: Duration,
    said: (f64, f64),
) -> Result<Sample> {
    let ended = started + total;
    sleep((ended + WATCH).saturating_duration_since(Instant::now()));
    let gap = |from, to| {
        let gap = observer.longest_gap(from, to);
        gap.ok_or_else(|| BenchError::wrong("The guest's heartbeat was never seen"))
    };
    let sample = Sample {
        total,
        gap: gap(started, ended + WATCH)?,
        switchover: observer
            .switchover(SOURCE, DESTINATION)
            .ok_or_else(|| BenchError::wrong("One of the consoles showed no heartbeat"))?,
        quiet: gap(started - WATCH / 2, started)?,
        said,
    };
    observer.type_at(DESTINATION, b"v")?;
    let verdict =
        observer.await_text(DESTINATION, "the guest's verdict after the move", |text| {
            let verdict = text.split("verified pages=").nth(1)?;
            Some(verdict.split_once('\n')?.0.to_owned())
        })?;
    if !verdict.contains(" bad=0 ") || !verdict.trim_end().ends_with("verdict=clean") {
        return Err(BenchError::wrong(format!("The guest lost memory in the move: {verdict}")));
    }
    Ok(sample)
}
