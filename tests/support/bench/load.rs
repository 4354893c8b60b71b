//! How busy the machine is with other work: what a benchmark on a shared machine must say of
//! itself.

use std::thread::sleep;
use std::time::Duration;

/// How long one look takes.
const LOOK: Duration = Duration::from_millis(500);
/// Above this share the numbers tell more of the other work than of what was measured.
const BUSY: f64 = 0.1;

/// Looks taken while nothing of ours ran.
#[derive(Default)]
pub(crate) struct OtherWork {
    looks: Vec<f64>,
}

impl OtherWork {
    /// Looks for half a second. To be called when nothing of ours runs.
    pub(crate) fn look(&mut self) {
        let before = ticks();
        sleep(LOOK);
        if let (Some(before), Some(after)) = (before, ticks()) {
            let all = after.0.saturating_sub(before.0).max(1);
            self.looks.push(after.1.saturating_sub(before.1) as f64 / all as f64);
        }
    }

    /// A sentence for a note.
    pub(crate) fn text(&self) -> String {
        if self.looks.is_empty() {
            return "How busy the machine was with other work is not known.".to_owned();
        }
        let mean = self.looks.iter().sum::<f64>() / self.looks.len() as f64;
        let most = self.looks.iter().copied().fold(0.0, f64::max);
        let warning = if mean > BUSY { ": too much for these numbers to be relied on" } else { "" };
        format!(
            "Other work took {:.0} % of the processors between the moves, {:.0} % at the \
             most{warning}.",
            mean * 100.0,
            most * 100.0
        )
    }
}

/// Ticks of all processors since the machine started: all of them, and those that were not idle.
fn ticks() -> Option<(u64, u64)> {
    parse(&std::fs::read_to_string("/proc/stat").ok()?)
}

/// The first line of /proc/stat (proc(5)): user, nice, system, idle, iowait, irq, softirq, steal,
/// guest, ... Guest time is within user time already.
fn parse(text: &str) -> Option<(u64, u64)> {
    let fields = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
    let fields = fields.map(|field| field.parse().ok()).collect::<Option<Vec<u64>>>()?;
    let all: u64 = fields.iter().sum();
    Some((all, all - fields.get(3)? - fields.get(4)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_line_is_read() {
        let text = "cpu  10 1 5 70 4 1 2 7 3 0\ncpu0 1 2 3\n";
        assert_eq!(parse(text), Some((100, 26)));
        assert_eq!(parse("cpu0 1 2"), None);
        assert!(ticks().is_some_and(|(all, busy)| all >= busy));
    }

    #[test]
    fn a_busy_machine_is_called_one() {
        let text = |looks: &[f64]| OtherWork { looks: looks.to_vec() }.text();
        assert!(
            text(&[0.02, 0.06])
                .ends_with("took 4 % of the processors between the moves, 6 % at the most.")
        );
        assert!(text(&[0.5]).contains("relied on"));
        assert!(text(&[]).contains("not known"));
    }
}
