//! How a move ended, for people: a headline, and a compact table of what it cost. The JSON form is
//! the report itself.

use decamp_shared::methods::Ways;
use decamp_shared::session::{Outcome, Report};

use super::failure::with_reasons;
use super::units;

/// What happened, in one sentence or a few.
pub(crate) fn headline(report: &Report, dry_run: bool) -> String {
    if is_within(report) {
        return headline_within(report, dry_run);
    }
    let Report { workload, from, to, .. } = report;
    let reason =
        with_reasons(report.reason.as_deref().unwrap_or("no reason was given"), &report.refusals);
    // The session says where it runs as a rule; a refusal of the agent's own may not.
    let runs_on = match report.lost || reason.contains("runs on at") {
        true => String::new(),
        false => format!("\n{workload} runs on at {from}."),
    };
    match report.outcome {
        Outcome::Completed if dry_run => {
            format!("{workload} can move from {from} to {to}; nothing was touched")
        }
        Outcome::Completed => {
            let stop = report.downtime_ms.map_or_else(String::new, |ms| {
                format!(", stopped for {}", units::milliseconds(ms))
            });
            let total = units::milliseconds(report.total_ms);
            format!("{workload} moved from {from} to {to} in {total}{stop}")
        }
        Outcome::Refused | Outcome::Failed => {
            format!("{workload} did not move to {to}: {reason}{runs_on}")
        }
        Outcome::Cancelled => {
            let reason = reason.strip_prefix("Cancelled. ").unwrap_or(&reason);
            format!("The move of {workload} to {to} was cancelled: {reason}{runs_on}")
        }
        Outcome::Unresolved => format!(
            "Nobody knows whether {workload} runs at {to}: {reason}\n\
             It stands still at {from}. See where it runs (`decamp ls --all` on both hosts), then say \
             the same on both:\n  \
             decamp resolve {id} --keep source        it is to run at {from}\n  \
             decamp resolve {id} --keep destination   it is to run at {to}",
            id = report.migration
        ),
    }
}

/// Whether it tells of disks that moved within a host.
fn is_within(report: &Report) -> bool {
    report.from == report.to
}

/// The same of disks that moved within a host. Where they are, its notes say.
fn headline_within(report: &Report, dry_run: bool) -> String {
    let Report { workload, from, .. } = report;
    let reason = report.reason.as_deref().unwrap_or("no reason was given");
    match report.outcome {
        Outcome::Completed if dry_run => {
            format!("Disks of {workload} can move so within {from}; nothing was touched")
        }
        Outcome::Completed => {
            let held = report.downtime_ms.map_or_else(String::new, |ms| {
                format!(", in which nothing was read or written for {}", units::milliseconds(ms))
            });
            let total = units::milliseconds(report.total_ms);
            format!("Disks of {workload} moved within {from} in {total}{held}")
        }
        Outcome::Cancelled => {
            let reason = reason.strip_prefix("Cancelled. ").unwrap_or(reason);
            format!("The move of disks of {workload} was cancelled: {reason}")
        }
        _ => format!("Disks of {workload} did not move: {reason}"),
    }
}

/// The headline and what the move cost.
pub(crate) fn text(report: &Report, dry_run: bool) -> String {
    let head = headline(report, dry_run);
    let notes = report.notes.iter().map(|note| format!("Note: {note}"));
    let mut lines: Vec<_> = [head].into_iter().chain(notes).collect();
    if report.outcome == Outcome::Refused || dry_run {
        return lines.join("\n");
    }
    lines.push(String::new());
    for (key, value) in rows(report) {
        lines.push(format!("  {key:<11} {value}").trim_end().to_owned());
    }
    lines.join("\n")
}

fn rows(report: &Report) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    if let Some(ms) = report.downtime_ms {
        rows.push(("downtime", format!("{:<10} {}", units::milliseconds(ms), parts(report))));
    }
    if let Some(ms) = report.predicted.downtime_ms {
        rows.push(("predicted", units::milliseconds(ms)));
    }
    let total = units::milliseconds(report.total_ms);
    let stall = report.source_stall_ms;
    rows.push((
        "total",
        match stall > 0.0 {
            true => format!("{total:<10} tracking stalled it for {}", units::milliseconds(stall)),
            false => total,
        },
    ));
    if report.compare_ms > 0.0 {
        let compared = units::milliseconds(report.compare_ms);
        rows.push(("", format!("{compared:<10} of the downtime to compare all memory")));
    }
    if !is_within(report) {
        let memory = units::bytes(report.memory_bytes);
        rows.push(("memory", format!("{memory:<10} {}", wire(report))));
    }
    let pages = pages(report);
    if !pages.is_empty() {
        rows.push(("pages", pages));
    }
    if report.disk_bytes > 0 {
        rows.push(("disks", format!("{} on the wire", units::bytes(report.disk_bytes))));
    }
    if report.file_bytes > 0 {
        rows.push(("files", format!("{} on the wire", units::bytes(report.file_bytes))));
    }
    rows.extend(rounds(report));
    let tracker = report.tracker.as_deref().map_or_else(String::new, |by| format!(" ({by})"));
    rows.push(("mode", format!("{}{tracker}", report.mode)));
    if let Some(memory) = ways(report) {
        rows.push(("ways", memory));
    }
    let keys = std::iter::once("because").chain(std::iter::repeat(""));
    rows.extend(keys.zip(report.fallbacks.iter().cloned()));
    rows.push(("migration", report.migration.clone()));
    rows
}

/// How the memory of a container left and came.
fn ways(report: &Report) -> Option<String> {
    let dump = report.dump.as_deref().map(|dump| match dump {
        Ways::HIDDEN => "memory hidden from CRIU",
        Ways::MOUNTS => "memory hidden from CRIU by mounts",
        _ => "all memory in CRIU's images",
    });
    let restore = report.restore.as_deref().map(|restore| match restore {
        Ways::LAZY => "restored lazily",
        _ => "restored eagerly",
    });
    let ways: Vec<_> = dump.into_iter().chain(restore).collect();
    (!ways.is_empty()).then(|| ways.join(", "))
}

fn parts(report: &Report) -> String {
    let parts = &report.downtime;
    [
        ("pause", parts.pause_ms),
        ("memory", parts.memory_ms),
        ("state", parts.state_ms),
        ("restore", parts.restore_ms),
        ("switch", parts.switch_ms),
    ]
    .map(|(name, ms)| format!("{name} {ms:.1}"))
    .join(" + ")
}

fn wire(report: &Report) -> String {
    let streams = match report.streams {
        1 => "1 stream".to_owned(),
        many => format!("{many} streams"),
    };
    let secrecy = if report.encrypted { "encrypted" } else { "NOT encrypted" };
    format!(
        "{} on the wire, {streams}, {secrecy}",
        units::bytes(report.wire_bytes.saturating_sub(report.disk_bytes))
    )
}

fn pages(report: &Report) -> String {
    let pages = &report.pages;
    [
        (pages.raw, "raw"),
        (pages.zero, "zero"),
        (pages.lz4, "lz4"),
        (pages.zstd, "zstd"),
        (pages.delta, "delta"),
        (pages.same, "same"),
    ]
    .iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, name)| format!("{} {name}", units::count(*count)))
    .collect::<Vec<_>>()
    .join(", ")
}

/// A line a round; of very many only the first and the last.
fn rounds(report: &Report) -> Vec<(&'static str, String)> {
    const SHOWN: usize = 12;
    let lines: Vec<String> = report
        .rounds
        .iter()
        .map(|round| {
            format!(
                "{:>2}  {:>11} pages  {:>10}  {:>9}",
                round.round,
                units::count(round.dirty_pages),
                units::bytes(round.wire_bytes),
                units::milliseconds(round.ms)
            )
        })
        .collect();
    let shown: Vec<String> = if lines.len() > SHOWN {
        let left_out = format!("…   {} more rounds", lines.len() - SHOWN);
        let (head, tail) = (&lines[..SHOWN / 2], &lines[lines.len() - SHOWN / 2..]);
        [head, &[left_out], tail].concat()
    } else {
        lines
    };
    let keys = std::iter::once("rounds").chain(std::iter::repeat(""));
    keys.zip(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use decamp_shared::session::report::{DowntimeParts, PageCounts, Predicted, Round};
    use decamp_shared::workload::{Kind, Refusal, RefusalCode};

    fn report() -> Report {
        Report {
            migration: "3f2a9c81d04e5b76".into(),
            workload: "web".into(),
            kind: Kind::Vm,
            from: "alpha".into(),
            to: "beta".into(),
            outcome: Outcome::Completed,
            reason: None,
            lost: false,
            refusals: Vec::new(),
            mode: "pre-copy".into(),
            tracker: Some("KVM dirty log".into()),
            total_ms: 1420.0,
            downtime_ms: Some(12.3),
            downtime: DowntimeParts {
                pause_ms: 0.4,
                memory_ms: 6.1,
                state_ms: 0.8,
                restore_ms: 3.0,
                switch_ms: 2.0,
            },
            rounds: vec![
                Round { round: 1, dirty_pages: 262_144, wire_bytes: 1 << 30, ms: 1110.0 },
                Round { round: 2, dirty_pages: 8_301, wire_bytes: 33 << 20, ms: 26.0 },
            ],
            memory_bytes: 1 << 30,
            wire_bytes: (1 << 30) + (33 << 20),
            disk_bytes: 0,
            file_bytes: 12 << 10,
            pages: PageCounts { zero: 62_144, raw: 208_301, ..PageCounts::default() },
            streams: 2,
            encrypted: true,
            predicted: Predicted { total_ms: None, downtime_ms: Some(11.0) },
            source_stall_ms: 0.0,
            compare_ms: 0.0,
            dump: None,
            restore: None,
            fallbacks: Vec::new(),
            notes: Vec::new(),
        }
    }

    #[test]
    fn a_completed_move() {
        let expected = "\
web moved from alpha to beta in 1.42 s, stopped for 12.3 ms

  downtime    12.3 ms    pause 0.4 + memory 6.1 + state 0.8 + restore 3.0 + switch 2.0
  predicted   11.0 ms
  total       1.42 s
  memory      1.0 GiB    1.0 GiB on the wire, 2 streams, encrypted
  pages       208,301 raw, 62,144 zero
  files       12.0 KiB on the wire
  rounds       1      262,144 pages     1.0 GiB     1.11 s
               2        8,301 pages    33.0 MiB    26.0 ms
  mode        pre-copy (KVM dirty log)
  migration   3f2a9c81d04e5b76";
        assert_eq!(text(&report(), false), expected);
    }

    #[test]
    fn disks_that_moved_within_a_host() {
        let moved = Report {
            to: "alpha".into(),
            notes: vec!["The disk /srv/a is /fast/a now".into()],
            tracker: Some("the disk's device".into()),
            wire_bytes: 0,
            file_bytes: 0,
            ..report()
        };
        let shown = text(&moved, false);
        let head = "Disks of web moved within alpha in 1.42 s, in which nothing was read or written for \
                    12.3 ms\nNote: The disk /srv/a is /fast/a now\n";
        assert!(shown.starts_with(head), "{shown}");
        assert!(!shown.contains("on the wire") && shown.contains("208,301 raw"), "{shown}");
        let reason = Some("Cancelled. web runs on at alpha".to_owned());
        let cancelled = Report { outcome: Outcome::Cancelled, reason, ..moved };
        assert_eq!(
            headline(&cancelled, false),
            "The move of disks of web was cancelled: web runs on at alpha"
        );
    }

    #[test]
    fn what_disks_took_is_told_apart_from_memory() {
        let moved = Report { disk_bytes: 33 << 20, ..report() };
        let text = text(&moved, false);
        let memory = "  memory      1.0 GiB    1.0 GiB on the wire, 2 streams, encrypted\n";
        assert!(text.contains(memory), "{text}");
        assert!(text.contains("\n  disks       33.0 MiB on the wire\n"), "{text}");
    }

    #[test]
    fn the_ways_of_a_container_are_named_with_their_reasons() {
        let moved = Report {
            kind: Kind::Container,
            tracker: Some("page-hash".into()),
            dump: Some("hidden".into()),
            restore: Some("eager".into()),
            fallbacks: vec!["Tracker write-protect: too old".into(), "All memory first".into()],
            compare_ms: 4.0,
            ..report()
        };
        let expected = "
  mode        pre-copy (page-hash)
  ways        memory hidden from CRIU, restored eagerly
  because     Tracker write-protect: too old
              All memory first
  migration   3f2a9c81d04e5b76";
        let text = text(&moved, false);
        assert!(text.ends_with(expected), "{text}");
        assert!(text.contains("\n              4.0 ms     of the downtime to compare"), "{text}");
    }

    #[test]
    fn a_dry_run_says_that_nothing_was_touched() {
        let text = text(&report(), true);
        assert_eq!(text, "web can move from alpha to beta; nothing was touched");
    }

    #[test]
    fn a_refusal_names_every_reason() {
        let refused = Report {
            outcome: Outcome::Refused,
            reason: Some("beta refuses it".into()),
            refusals: vec![
                Refusal::new(RefusalCode::Memory, "Not enough memory: 1 GiB needed, 200 MiB free"),
                Refusal::new(RefusalCode::Bridge, "There is no bridge br0"),
            ],
            ..report()
        };
        let expected = "\
web did not move to beta: beta refuses it
  - Not enough memory: 1 GiB needed, 200 MiB free
  - There is no bridge br0
web runs on at alpha.";
        assert_eq!(text(&refused, false), expected);
    }

    #[test]
    fn an_unresolved_move_spells_out_both_choices() {
        let unresolved =
            Report { outcome: Outcome::Unresolved, reason: Some("no answer".into()), ..report() };
        let text = text(&unresolved, false);
        assert!(text.contains(
            "decamp resolve 3f2a9c81d04e5b76 --keep source        it is to run at alpha"
        ));
        assert!(
            text.contains(
                "decamp resolve 3f2a9c81d04e5b76 --keep destination   it is to run at beta"
            )
        );
    }

    #[test]
    fn failed_and_cancelled_moves_say_where_it_runs() {
        for outcome in [Outcome::Failed, Outcome::Cancelled] {
            let ended = Report {
                outcome,
                reason: Some("connection cut".into()),
                downtime_ms: None,
                ..report()
            };
            let text = text(&ended, false);
            assert!(text.contains("connection cut\nweb runs on at alpha."), "{text}");
            assert!(!text.contains("downtime "), "{text}");
        }
    }

    #[test]
    fn a_workload_that_ended_is_not_said_to_run_on() {
        let lost = Report {
            outcome: Outcome::Failed,
            reason: Some("web ended, or its keeper was killed, while it was being moved".into()),
            lost: true,
            ..report()
        };
        assert!(!text(&lost, false).contains("runs on"), "{}", text(&lost, false));
        assert_eq!(lost.exit_code(), 1);
        assert_eq!(Report { lost: false, ..lost }.exit_code(), 4);
    }

    #[test]
    fn what_the_reason_says_is_not_said_twice() {
        let cancelled = Report {
            outcome: Outcome::Cancelled,
            reason: Some("Cancelled. web was not touched and runs on at alpha".into()),
            ..report()
        };
        assert_eq!(
            headline(&cancelled, false),
            "The move of web to beta was cancelled: web was not touched and runs on at alpha"
        );
    }

    #[test]
    fn of_many_rounds_the_middle_is_left_out() {
        let round = |round| Round { round, dirty_pages: 1, wire_bytes: 1, ms: 1.0 };
        let long = Report { rounds: (1..=40).map(round).collect(), ..report() };
        let text = text(&long, false);
        assert!(text.contains("28 more rounds"), "{text}");
        assert!(text.contains(" 40  "), "{text}");
    }

    #[test]
    fn pages_in_the_clear_are_said_loudly() {
        let clear = Report { encrypted: false, ..report() };
        assert!(text(&clear, false).contains("NOT encrypted"));
    }
}
