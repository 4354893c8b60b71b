//! A move as it goes on: a live display on a terminal, plain lines when piped, nothing with `--json`.
//! How it ended is drawn by [`super::report`].

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use decamp_shared::session::Progress;
use decamp_shared::session::progress::Phase;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{output, units};

const PAGE: f64 = 4096.0;
/// Plain lines tell of pages at most so often.
const PLAIN_EVERY: Duration = Duration::from_secs(1);

/// While there is nothing to count.
const WAITING: &str = "  {spinner} {prefix:10} {elapsed:>9}  {wide_msg}";
/// While there is; the figures have a line of their own.
const FILLING: &str =
    "  {spinner} {prefix:10} {elapsed:>9}  [{bar:36}] {percent:>3} %\n      {wide_msg}";

/// Where progress is shown.
pub(crate) enum Display {
    /// Nowhere.
    Quiet,
    /// As lines.
    Plain(Plain),
    /// Drawn on a terminal.
    Live(Box<Live>),
}

/// Lines for a file or a pipe.
#[derive(Default)]
pub(crate) struct Plain {
    last: Option<Instant>,
    round: u32,
}

/// A display that redraws itself.
pub(crate) struct Live {
    bar: ProgressBar,
    phase: Option<(Phase, Instant)>,
    round: Option<RoundShown>,
}

/// The round that the bar shows.
struct RoundShown {
    round: u32,
    began: Instant,
    pages: u64,
    wire_before: u64,
    wire_now: u64,
}

impl Display {
    /// The display that fits standard output.
    pub(crate) fn new(json: bool) -> Self {
        if json {
            Display::Quiet
        } else if io::stdout().is_terminal() {
            Display::Live(Box::new(Live::new()))
        } else {
            Display::Plain(Plain::default())
        }
    }

    /// Shows `event`.
    pub(crate) fn show(&mut self, event: &Progress) {
        match self {
            Display::Quiet => {}
            Display::Plain(plain) => {
                if let Some(text) = plain.line(event, Instant::now()) {
                    output::line(text);
                }
            }
            Display::Live(live) => live.show(event),
        }
    }

    /// Shows a remark of the CLI's own.
    pub(crate) fn remark(&mut self, text: &str) {
        match self {
            Display::Quiet => eprintln!("decamp: {text}"),
            Display::Plain(_) => output::line(text),
            Display::Live(live) => live.bar.println(format!("  {text}")),
        }
    }

    /// Takes the live part off the terminal.
    pub(crate) fn clear(&mut self) {
        if let Display::Live(live) = self {
            live.end_round();
            live.end_phase();
            live.bar.finish_and_clear();
        }
    }
}

impl Plain {
    fn line(&mut self, event: &Progress, now: Instant) -> Option<String> {
        match event {
            Progress::Started { migration, workload, to } => {
                Some(format!("{workload}: moving to {to} (migration {migration})"))
            }
            Progress::Phase { phase } => {
                self.last = None;
                Some(format!("{}: {}", word(*phase), doing(*phase)))
            }
            Progress::Files { total_bytes: 0, .. } => None,
            Progress::Files { sent_bytes, total_bytes } => {
                let due = self.is_due(now) || sent_bytes == total_bytes;
                due.then(|| format!("files: {}", files(*sent_bytes, *total_bytes)))
            }
            Progress::Pages { round, done_pages, round_pages, .. } => {
                let due = self.is_due(now) || *round != self.round;
                self.round = *round;
                due.then(|| {
                    let share = percent(*done_pages, *round_pages);
                    format!("round {round}: {share} %, {}", figures(event, None))
                })
            }
            Progress::Note { text } => Some(format!("note: {text}")),
            Progress::Report { .. } => None,
        }
    }

    fn is_due(&mut self, now: Instant) -> bool {
        let due = self.last.is_none_or(|last| now.duration_since(last) >= PLAIN_EVERY);
        if due {
            self.last = Some(now);
        }
        due
    }
}

impl Live {
    fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout_with_hz(20));
        bar.set_style(waiting_style());
        Self { bar, phase: None, round: None }
    }

    fn show(&mut self, event: &Progress) {
        match event {
            Progress::Started { migration, workload, to } => {
                self.bar.println(format!("Moving {workload} to {to} (migration {migration})"));
                // Not before: what is refused at once leaves no trace of a display.
                self.bar.enable_steady_tick(Duration::from_millis(100));
            }
            Progress::Phase { phase } => {
                self.end_round();
                self.end_phase();
                self.phase = Some((*phase, Instant::now()));
                self.bar.set_style(waiting_style());
                self.bar.set_prefix(word(*phase));
                self.bar.set_message(doing(*phase));
            }
            Progress::Files { total_bytes: 0, .. } => {}
            Progress::Files { sent_bytes, total_bytes } => {
                self.draw(*sent_bytes, *total_bytes, files(*sent_bytes, *total_bytes));
            }
            Progress::Pages { round, done_pages, round_pages, wire_bytes, .. } => {
                self.enter_round(*round, *round_pages, *wire_bytes);
                let left = self
                    .round
                    .as_ref()
                    .and_then(|shown| time_left(shown.began.elapsed(), *done_pages, *round_pages));
                let text = format!("round {round}  {}", figures(event, left));
                self.draw(*done_pages, *round_pages, text);
            }
            Progress::Note { text } => self.bar.println(format!("  note: {text}")),
            Progress::Report { .. } => {}
        }
    }

    fn draw(&self, done: u64, whole: u64, text: String) {
        self.bar.set_style(filling_style());
        self.bar.set_length(whole.max(1));
        self.bar.set_position(done.min(whole));
        self.bar.set_message(text);
    }

    /// The round of that number; what it had to send is what was told of it first.
    fn enter_round(&mut self, round: u32, pages: u64, wire_now: u64) -> &RoundShown {
        if self.round.as_ref().is_some_and(|shown| shown.round != round) {
            self.end_round();
        }
        let shown = self.round.get_or_insert_with(|| RoundShown {
            round,
            began: Instant::now(),
            pages,
            wire_before: wire_now,
            wire_now,
        });
        shown.wire_now = wire_now;
        shown
    }

    /// A round that is over leaves a line behind.
    fn end_round(&mut self) {
        let Some(shown) = self.round.take().filter(|shown| shown.pages > 0) else { return };
        self.bar.println(format!(
            "    round {:<3} {:>12} pages   {:>10}   {}",
            shown.round,
            units::count(shown.pages),
            units::bytes(shown.wire_now.saturating_sub(shown.wire_before)),
            units::duration(shown.began.elapsed()),
        ));
    }

    /// So does a phase.
    fn end_phase(&mut self) {
        if let Some((phase, began)) = self.phase.take() {
            let took = units::duration(began.elapsed());
            self.bar.println(format!("  ✓ {:<10} {took:>9}", word(phase)));
        }
    }
}

fn waiting_style() -> ProgressStyle {
    styled(WAITING)
}

fn filling_style() -> ProgressStyle {
    styled(FILLING)
}

fn styled(template: &str) -> ProgressStyle {
    // A template that does not parse is drawn plainly; the test below keeps these parsing.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸ ")
}

/// A phase as design and reports call it.
pub(crate) fn word(phase: Phase) -> &'static str {
    match phase {
        Phase::Negotiate => "negotiate",
        Phase::Prepare => "prepare",
        Phase::PreCopy => "pre-copy",
        Phase::Pause => "pause",
        Phase::Final => "final",
        Phase::Fence => "fence",
        Phase::Commit => "commit",
        Phase::Release => "release",
        Phase::Switch => "switch",
    }
}

fn doing(phase: Phase) -> &'static str {
    match phase {
        Phase::Negotiate => "asking whether it can be taken",
        Phase::Prepare => "making room, sending files",
        Phase::PreCopy => "copying while it runs",
        Phase::Pause => "stopping it for the switch",
        Phase::Final => "sending what is left, and its state",
        Phase::Fence => "giving it up here",
        Phase::Commit => "waiting for the destination to let it run",
        Phase::Release => "taking the copy here away",
        Phase::Switch => "holding the disks, copying what is left, and switching",
    }
}

fn files(sent: u64, total: u64) -> String {
    format!("{} of {}", units::bytes(sent), units::bytes(total))
}

/// Bytes, rate, dirty rate, predicted stop, time left: as far as they are known.
fn figures(event: &Progress, left: Option<Duration>) -> String {
    let Progress::Pages { wire_bytes, rate, dirty_rate, predicted_downtime_ms, .. } = event else {
        return String::new();
    };
    let mut parts = vec![format!("{} sent", units::bytes(*wire_bytes)), units::rate(*rate)];
    if let Some(pages) = dirty_rate {
        parts.push(format!("dirtied {}", units::rate(pages * PAGE)));
    }
    if let Some(ms) = predicted_downtime_ms {
        parts.push(format!("stop ≈ {}", units::milliseconds(*ms)));
    }
    if let Some(left) = left {
        parts.push(format!("{} left", units::duration(left)));
    }
    parts.join("  ")
}

fn percent(done: u64, whole: u64) -> u64 {
    if whole == 0 { 100 } else { (done.min(whole) as f64 * 100.0 / whole as f64) as u64 }
}

/// How long the rest of a round takes at the pace so far; nothing while that is a guess.
fn time_left(spent: Duration, done: u64, whole: u64) -> Option<Duration> {
    let rest = whole.checked_sub(done).filter(|&rest| rest > 0)?;
    let is_telling = spent >= Duration::from_secs(1) && done > 0;
    is_telling.then(|| Duration::from_secs_f64(spent.as_secs_f64() * rest as f64 / done as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(round: u32, done: u64) -> Progress {
        Progress::Pages {
            round,
            done_pages: done,
            round_pages: 1000,
            wire_bytes: 1 << 20,
            rate: 2.0 * 1024.0 * 1024.0,
            dirty_rate: Some(256.0),
            predicted_downtime_ms: Some(12.0),
        }
    }

    #[test]
    fn templates_parse() {
        for template in [WAITING, FILLING] {
            ProgressStyle::with_template(template).expect("a template");
        }
    }

    #[test]
    fn plain_lines_tell_of_pages_once_a_second_and_of_every_round() {
        let mut plain = Plain::default();
        let start = Instant::now();
        let first = plain.line(&pages(1, 500), start).expect("the first is told");
        assert_eq!(
            first,
            "round 1: 50 %, 1.0 MiB sent  2.0 MiB/s  dirtied 1.0 MiB/s  stop ≈ 12.0 ms"
        );
        assert_eq!(plain.line(&pages(1, 600), start + Duration::from_millis(100)), None);
        assert!(plain.line(&pages(2, 10), start + Duration::from_millis(200)).is_some());
        assert!(plain.line(&pages(2, 90), start + Duration::from_millis(1300)).is_some());
    }

    #[test]
    fn the_time_left_is_told_only_when_it_is_more_than_a_guess() {
        let second = Duration::from_secs(1);
        assert_eq!(time_left(second, 250, 1000), Some(3 * second));
        assert_eq!(time_left(second / 2, 250, 1000), None);
        assert_eq!(time_left(second, 0, 1000), None);
        assert_eq!(time_left(second, 1000, 1000), None);
        assert_eq!(percent(0, 0), 100);
        assert_eq!(percent(5, 4), 100);
    }
}
