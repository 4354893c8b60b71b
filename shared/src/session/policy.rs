//! When to stop: predicted downtime against its target, round after round.
//!
//! Pure: fed with what each round measured, it says what to do next.

use std::time::Duration;

use crate::pages::PAGE_SIZE;

/// What is known after a round, before the next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Remaining {
    /// Pages written since they were read last.
    pub dirty_pages: u64,
    /// Bytes on the wire for each byte of memory, over the last round (at most about 1).
    pub wire_ratio: f64,
    /// Bytes on the wire a second, over the last round that was long enough to measure.
    pub wire_rate: f64,
    /// Since the move began.
    pub elapsed: Duration,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Send what is dirty, and look again.
    Another,
    /// Send what is dirty with this share of its processor time taken from the workload.
    Throttle {
        /// Percent taken.
        percent: u8,
    },
    /// Stop it now.
    Stop,
    /// It will not get there.
    GiveUp {
        /// Why, and what would have worked.
        reason: String,
    },
}

/// The policy of one move.
#[derive(Clone, Debug)]
pub struct Policy {
    target: Duration,
    timeout: Duration,
    /// What a stop costs beyond its memory.
    fixed: Duration,
    rounds: u32,
    least: u64,
    /// Rounds since the remaining pages last became fewer.
    stuck: u32,
    percent: u8,
}

/// Rounds without progress before the workload is throttled, and before each further step.
const PATIENCE: u32 = 3;
/// Percent of processor time taken at a time.
const STEP: u8 = 20;
/// No more is ever taken.
const MOST: u8 = 80;
/// The remaining pages count as fewer when they fall below this share of the least so far.
const FEWER: f64 = 0.9;
/// Rounds that are made to get below a target that is already met.
const POLISH: u32 = 8;

impl Policy {
    /// A policy for a stop of at most `target`, given up after `timeout`; `fixed` is what a stop
    /// costs beyond its memory.
    pub fn new(target: Duration, timeout: Duration, fixed: Duration) -> Self {
        Self { target, timeout, fixed, rounds: 0, least: u64::MAX, stuck: 0, percent: 0 }
    }

    /// Downtime if the workload were stopped now.
    pub fn predict(&self, remaining: &Remaining) -> Duration {
        let bytes = remaining.dirty_pages as f64 * PAGE_SIZE as f64 * remaining.wire_ratio;
        let seconds = bytes / remaining.wire_rate.max(1.0);
        self.fixed + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 2)
    }

    /// What to do now that a round is over.
    pub fn decide(&mut self, remaining: &Remaining) -> Decision {
        self.rounds += 1;
        let falling = (remaining.dirty_pages as f64) < self.least as f64 * FEWER;
        self.least = self.least.min(remaining.dirty_pages);
        self.stuck = if falling { 0 } else { self.stuck + 1 };
        let predicted = self.predict(remaining);
        if predicted <= self.target {
            // Within the target: go on only as long as each round makes the stop shorter.
            let done = remaining.dirty_pages == 0 || !falling || self.rounds >= POLISH;
            return if done { Decision::Stop } else { Decision::Another };
        }
        if remaining.elapsed >= self.timeout || (self.fixed > self.target && self.stuck >= PATIENCE)
        {
            return Decision::GiveUp { reason: self.reason(remaining, predicted) };
        }
        if self.stuck >= PATIENCE && self.percent < MOST {
            self.stuck = 0;
            self.least = remaining.dirty_pages;
            self.percent += STEP;
            return Decision::Throttle { percent: self.percent };
        }
        Decision::Another
    }

    fn reason(&self, remaining: &Remaining, predicted: Duration) -> String {
        let ms = |duration: Duration| duration.as_millis();
        if self.fixed > self.target {
            return format!(
                "A stop costs about {} ms on these hosts before any memory is sent, more than \
                 --max-downtime {} ms; --max-downtime {}ms would have worked",
                ms(self.fixed),
                ms(self.target),
                ms(predicted) + 1
            );
        }
        format!(
            "{} MiB are written again in each round, at {:.0} MB/s that is a stop of about {} ms, \
             more than --max-downtime {} ms; --max-downtime {}ms or a faster link would have worked",
            (remaining.dirty_pages * PAGE_SIZE as u64) >> 20,
            remaining.wire_rate / 1e6,
            ms(predicted),
            ms(self.target),
            ms(predicted) + 1
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(dirty_pages: u64) -> Remaining {
        Remaining { dirty_pages, wire_ratio: 1.0, wire_rate: 1e9, elapsed: Duration::from_secs(1) }
    }

    fn policy(target_ms: u64) -> Policy {
        Policy::new(
            Duration::from_millis(target_ms),
            Duration::from_secs(60),
            Duration::from_millis(10),
        )
    }

    #[test]
    fn stops_at_a_local_minimum_within_the_target() {
        let mut policy = policy(300);
        assert_eq!(policy.decide(&after(20_000)), Decision::Another);
        assert_eq!(policy.decide(&after(8_000)), Decision::Another);
        assert_eq!(policy.decide(&after(8_100)), Decision::Stop);
    }

    #[test]
    fn throttles_in_steps_what_does_not_converge() {
        let mut policy = policy(50);
        let decisions: Vec<_> = (0..20).map(|_| policy.decide(&after(100_000))).collect();
        let percents: Vec<u8> = decisions
            .iter()
            .filter_map(|decision| match decision {
                Decision::Throttle { percent } => Some(*percent),
                _ => None,
            })
            .collect();
        assert_eq!(percents, [20, 40, 60, 80]);
    }

    #[test]
    fn gives_up_at_the_timeout_and_says_what_would_have_worked() {
        let mut policy = policy(50);
        let late = Remaining { elapsed: Duration::from_secs(61), ..after(100_000) };
        let Decision::GiveUp { reason } = policy.decide(&late) else { panic!("must give up") };
        assert!(reason.contains("--max-downtime 420ms"), "{reason}");
    }

    #[test]
    fn gives_up_early_when_the_fixed_cost_alone_is_too_much() {
        let mut policy = policy(5);
        let given_up =
            (0..10).any(|_| matches!(policy.decide(&after(10)), Decision::GiveUp { .. }));
        assert!(given_up);
    }
}
