//! When to stop: predicted downtime against its target, round after round.
//!
//! Pure: fed with what each round measured, it says what to do next.

use std::time::Duration;

use super::MaxDowntime;
use crate::pages::PAGE_SIZE;

/// What is known after a round, before the next.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Remaining {
    /// Pages written since they were read last.
    pub dirty_pages: u64,
    /// Bytes on the wire for each byte of memory, over the last round (at most about 1).
    pub wire_ratio: f64,
    /// Bytes on the wire a second, over the last round that was long enough to measure.
    pub wire_rate: f64,
    /// What the look for written pages will take in the stop, and restoring, where that is not part of what
    /// every stop costs.
    pub look: Duration,
    /// What restoring would take beside that, and is left out where there is no time for it.
    pub wished: Duration,
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

/// Whether those who copy a workload that runs let it go first, `elapsed` after the move began: that makes rounds
/// longer, and shall not be why a move does not end in time.
pub fn has_time_to_give_way(elapsed: Duration, timeout: Duration) -> bool {
    elapsed < timeout / 4
}

/// What goes, for the words of a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// A workload, over a link.
    Workload,
    /// Disks, from one file to another.
    Disks,
}

/// The policy of one move.
#[derive(Clone, Debug)]
pub struct Policy {
    target: MaxDowntime,
    timeout: Duration,
    /// What a stop costs beyond its memory.
    fixed: Duration,
    what: What,
    rounds: u32,
    /// The stop that was predicted when that last became shorter, with as much taken from the workload as now.
    least: Option<Duration>,
    /// Rounds since the predicted stop last became shorter.
    stuck: u32,
    percent: u8,
}

/// Rounds without progress before the workload is throttled, and before each further step.
const PATIENCE: u32 = 3;
/// Percent of processor time taken at a time.
const STEP: u8 = 20;
/// No more is ever taken.
const MOST: u8 = 80;
/// A stop counts as shorter when it falls below this share of the one that last did: rounds that gain less are not worth
/// their round trips.
const SHORTER: f64 = 0.9;
/// What is aimed at, and not promised, may be missed by so much where nothing brings the stop any nearer to it.
const MISSED: f64 = 2.0;
/// An aim is raised to so much of what a stop costs beyond its memory.
const RAISED: f64 = 1.25;
/// Rounds that are made to get below a target that is already met.
const POLISH: u32 = 8;

impl Policy {
    /// A policy for a stop of at most `target`, given up after `timeout`; `fixed` is what a stop
    /// costs beyond its memory. An aim that is below that is raised: to a stop that is little longer.
    pub fn new(target: MaxDowntime, timeout: Duration, fixed: Duration) -> Self {
        let (what, least) = (What::Workload, None);
        Self { target, timeout, fixed, what, rounds: 0, least, stuck: 0, percent: 0 }
    }

    /// The same of disks that are copied within a host, and held for as long as a workload would be stopped.
    pub fn of_disks(self) -> Self {
        Self { what: What::Disks, ..self }
    }

    /// Downtime if the workload were stopped now.
    pub fn predict(&self, remaining: &Remaining) -> Duration {
        let shortest = self.shortest(remaining);
        let all = shortest.saturating_add(remaining.wished);
        if all <= self.target(remaining) { all } else { shortest }
    }

    /// What of the target a stop now would leave for what is only wished.
    pub fn spare(&self, remaining: &Remaining) -> Duration {
        self.target(remaining).saturating_sub(self.shortest(remaining))
    }

    /// Without what is only wished.
    fn shortest(&self, remaining: &Remaining) -> Duration {
        let bytes = remaining.dirty_pages as f64 * PAGE_SIZE as f64 * remaining.wire_ratio;
        let seconds = bytes / remaining.wire_rate.max(1.0);
        let sending = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 4);
        self.cost(remaining).saturating_add(sending)
    }

    /// What a stop costs beyond sending memory.
    fn cost(&self, remaining: &Remaining) -> Duration {
        self.fixed + remaining.look
    }

    fn target(&self, remaining: &Remaining) -> Duration {
        match self.target {
            MaxDowntime::Promised(target) => target,
            MaxDowntime::Aimed(aim) => aim.max(self.cost(remaining).mul_f64(RAISED)),
        }
    }

    /// Whether a stop now would miss the target.
    pub fn misses(&self, remaining: &Remaining) -> bool {
        self.shortest(remaining) > self.target(remaining)
    }

    /// Whether no more processor time is taken from the workload to get to a stop as short as is aimed at: rounds under a
    /// throttle would cost it more than the part of the stop that they can make shorter. (What a disk takes to be stored
    /// they make shorter, too.)
    pub fn spares(&self, remaining: &Remaining) -> bool {
        let sending_is_less = self.shortest(remaining) < self.cost(remaining) * 2;
        self.what == What::Workload && sending_is_less && self.nearly(remaining)
    }

    /// Whether what is aimed at is met, or missed by no more than may be.
    fn nearly(&self, remaining: &Remaining) -> bool {
        let aimed = matches!(self.target, MaxDowntime::Aimed(_));
        aimed && self.shortest(remaining) <= self.target(remaining).mul_f64(MISSED)
    }

    /// Nothing can be taken from this workload: no more of it is asked for.
    pub fn cannot_throttle(&mut self) {
        self.percent = MOST;
    }

    /// What to do now that a round is over.
    pub fn decide(&mut self, remaining: &Remaining) -> Decision {
        self.rounds += 1;
        let predicted = self.shortest(remaining);
        let target = self.target(remaining);
        // Against the last that counted as shorter: several small gains are a large one.
        let falling = self.least.is_none_or(|least| predicted < least.mul_f64(SHORTER));
        if falling {
            self.least = Some(predicted);
        }
        self.stuck = if falling { 0 } else { self.stuck + 1 };
        if predicted <= target {
            // Within the target: go on only as long as each round makes the stop shorter.
            let done = remaining.dirty_pages == 0 || !falling || self.rounds >= POLISH;
            return if done { Decision::Stop } else { Decision::Another };
        }
        let too_dear = self.cost(remaining) > target;
        if remaining.elapsed >= self.timeout || (too_dear && self.stuck >= PATIENCE) {
            return Decision::GiveUp { reason: self.reason(remaining, predicted) };
        }
        let nearly = self.nearly(remaining);
        if self.stuck >= PATIENCE && self.percent < MOST && !self.spares(remaining) {
            self.stuck = 0;
            self.least = Some(predicted);
            // Where it is stopped all the same, all that may be taken shows soonest whether that helps.
            self.percent = if nearly { MOST } else { self.percent + STEP };
            return Decision::Throttle { percent: self.percent };
        }
        if nearly && self.stuck >= PATIENCE {
            return Decision::Stop;
        }
        Decision::Another
    }

    fn reason(&self, remaining: &Remaining, predicted: Duration) -> String {
        let (cost, target) = (self.cost(remaining), self.target(remaining));
        let too_dear = cost > target;
        let [cost, target] = [cost, target].map(|duration| duration.as_millis());
        let (predicted, enough) = (predicted.as_millis(), predicted.as_millis() + 1);
        let mib = (remaining.dirty_pages * PAGE_SIZE as u64) >> 20;
        let rate = remaining.wire_rate / 1e6;
        match (self.what, too_dear) {
            (What::Workload, true) => format!(
                "A stop costs about {cost} ms on these hosts before any memory is sent, more than --max-downtime \
                 {target} ms; --max-downtime {enough}ms would have worked"
            ),
            (What::Workload, false) => format!(
                "{mib} MiB are written again in each round, at {rate:.0} MB/s that is a stop of about {predicted} ms, \
                 more than --max-downtime {target} ms; --max-downtime {enough}ms or a faster link would have worked"
            ),
            (What::Disks, true) => format!(
                "Holding the disks, having what is written stored and going over to it takes about {cost} ms here \
                 before anything is copied, more than --max-downtime {target} ms; --max-downtime {enough}ms would have \
                 worked"
            ),
            (What::Disks, false) => format!(
                "The guest writes {mib} MiB of its disks again in each round; at {rate:.0} MB/s from the old place to \
                 the new one they would be held for about {predicted} ms, more than --max-downtime {target} ms; \
                 --max-downtime {enough}ms, a faster place or a guest that writes less would have worked"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(dirty_pages: u64) -> Remaining {
        let elapsed = Duration::from_secs(1);
        Remaining { dirty_pages, wire_ratio: 1.0, wire_rate: 1e9, elapsed, ..Remaining::default() }
    }

    fn policy(target_ms: u64) -> Policy {
        Policy::new(
            MaxDowntime::Promised(Duration::from_millis(target_ms)),
            Duration::from_secs(60),
            Duration::from_millis(10),
        )
    }

    #[test]
    fn who_has_little_time_gives_way_to_nobody() {
        let seconds = Duration::from_secs;
        assert!(has_time_to_give_way(seconds(0), seconds(60)));
        assert!(has_time_to_give_way(seconds(14), seconds(60)));
        assert!(!has_time_to_give_way(seconds(15), seconds(60)));
        assert!(!has_time_to_give_way(seconds(0), seconds(0)));
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

    /// Disks travel over no link.
    #[test]
    fn what_would_have_worked_is_true_of_what_goes() {
        let reason = |policy: Policy, remaining: Remaining| {
            let mut policy = policy;
            let late = Remaining { elapsed: Duration::from_secs(61), ..remaining };
            let Decision::GiveUp { reason } = policy.decide(&late) else { panic!("must give up") };
            reason
        };
        let dear = Remaining { look: Duration::from_millis(800), ..after(10) };
        for remaining in [after(100_000), dear] {
            let [link, disks] = [policy(50), policy(50).of_disks()].map(|of| reason(of, remaining));
            let milliseconds =
                |text: &str| text.split_once("; --max-downtime ").map(|(_, rest)| rest.to_owned());
            let enough = milliseconds(&disks).expect("what would have worked");
            assert_eq!(
                enough.split("ms").next(),
                milliseconds(&link).expect("too").split("ms").next()
            );
            for word in ["link", "memory", "hosts", "stop"] {
                assert!(!disks.contains(word), "{disks}");
            }
            assert!(disks.contains("disks"), "{disks}");
        }
    }

    #[test]
    fn an_aim_below_what_a_stop_costs_is_raised_and_a_promise_is_not() {
        let fixed = Duration::from_millis(400);
        let policy = |target| Policy::new(target, Duration::from_secs(60), fixed);
        let within = Duration::from_millis(300);
        let mut aimed = policy(MaxDowntime::Aimed(within));
        let stops = (0..10).any(|_| aimed.decide(&after(5_000)) == Decision::Stop);
        assert!(stops, "an aim is no reason to give up");
        let mut promised = policy(MaxDowntime::Promised(within));
        let gives_up = |decision| matches!(decision, Decision::GiveUp { .. });
        assert!((0..10).any(|_| gives_up(promised.decide(&after(10)))));
        // What is written faster than it can be sent is throttled all the same.
        let mut busy = policy(MaxDowntime::Aimed(within));
        let throttled = |decision| matches!(decision, Decision::Throttle { .. });
        assert!((0..10).any(|_| throttled(busy.decide(&after(200_000)))));
    }

    #[test]
    fn what_is_wished_is_done_where_the_target_leaves_time_for_it() {
        let ms = Duration::from_millis;
        // 10 ms and 40.96 ms for 10,000 pages.
        let remaining = Remaining { wished: ms(60), ..after(10_000) };
        for (target, predicted) in [(40, 50), (100, 50), (111, 110), (300, 110)] {
            let policy = policy(target);
            assert_eq!(policy.predict(&remaining).as_millis(), predicted, "{target}");
            let spare = policy.spare(&remaining);
            assert_eq!(spare >= remaining.wished, target > 110, "{spare:?} of {target}");
            assert!(spare + ms(50) <= ms(target.max(50)), "{spare:?} of {target}");
        }
        // It is no reason to wait, and none to give up.
        let mut tight = policy(60);
        assert!((0..10).any(|_| tight.decide(&remaining) == Decision::Stop));
        // Nor does it raise what is aimed at.
        let aim = MaxDowntime::Aimed(ms(5));
        let aimed = Policy::new(aim, Duration::from_secs(60), ms(10));
        assert!(aimed.spare(&Remaining { dirty_pages: 0, ..remaining }) < ms(3));
    }

    /// How often `policy` looks at a guest that writes `pages` again in each round over 12.5 MB/s, and what it says last.
    fn rounds_of(mut policy: Policy, pages: impl Fn(u32) -> u64) -> (u32, Decision) {
        let mut elapsed = Duration::ZERO;
        for round in 1.. {
            let dirty_pages = pages(round);
            let remaining = Remaining { wire_rate: 12.5e6, elapsed, ..after(dirty_pages) };
            match policy.decide(&remaining) {
                Decision::Another | Decision::Throttle { .. } => {}
                last => return (round, last),
            }
            // What is sent, and a round trip with a look.
            elapsed += Duration::from_secs_f64(dirty_pages as f64 * 4096.0 / 12.5e6 + 0.06);
        }
        unreachable!("rounds have no end")
    }

    #[test]
    fn what_no_round_makes_shorter_is_stopped_where_an_aim_is_only_just_missed() {
        let fixed = Duration::from_millis(200);
        let policy = |target| Policy::new(target, Duration::from_secs(60), fixed);
        let target = Duration::from_millis(300);
        // 3 MiB are 252 ms, whatever is taken from the guest; 8 MiB are more than twice too much.
        let busy = |pages: u64| move |round: u32| pages + u64::from(round % 3) * 8;
        let (rounds, last) = rounds_of(policy(MaxDowntime::Aimed(target)), busy(768));
        assert_eq!(last, Decision::Stop);
        assert_eq!(rounds, 2 * PATIENCE + 1);
        // 2 MiB are 168 ms: no throttle makes the stop half as long, so none is tried.
        let (rounds, last) = rounds_of(policy(MaxDowntime::Aimed(target)), busy(512));
        assert_eq!((rounds, last), (PATIENCE + 1, Decision::Stop));
        // What is promised is worth it, and disks are stored the faster for it.
        let much = Remaining { wire_rate: 12.5e6, ..after(512) };
        let disks = policy(MaxDowntime::Aimed(target)).of_disks();
        for mut policy in [policy(MaxDowntime::Promised(target)), disks] {
            assert!(!policy.spares(&much));
            let throttled =
                (0..10).any(|_| matches!(policy.decide(&much), Decision::Throttle { .. }));
            assert!(throttled, "{policy:?}");
        }
        for (target, pages) in
            [(MaxDowntime::Promised(target), 512), (MaxDowntime::Aimed(target), 2048)]
        {
            let (_, last) = rounds_of(policy(target), busy(pages));
            assert!(matches!(last, Decision::GiveUp { .. }), "{target:?} {pages}");
        }
        // Who cannot be slowed down is not waited for either.
        let mut whole = policy(MaxDowntime::Aimed(target));
        whole.cannot_throttle();
        let (rounds, last) = rounds_of(whole, busy(768));
        assert_eq!((rounds, last), (PATIENCE + 1, Decision::Stop));
    }

    /// Each round leaves a fifth less: a handful of pages that is nothing beside what the stop costs anyway.
    #[test]
    fn rounds_that_save_nothing_are_not_made() {
        let fixed = Duration::from_millis(200);
        let target = MaxDowntime::Promised(Duration::from_millis(300));
        let policy = Policy::new(target, Duration::from_secs(60), fixed);
        let handful = |round: u32| (100.0 * 0.8_f64.powi(round as i32)) as u64;
        assert_eq!(rounds_of(policy.clone(), handful), (2, Decision::Stop));
        // Those that save much are.
        let much = |round: u32| (2000.0 * 0.5_f64.powi(round as i32)) as u64;
        // The third was within the target.
        assert_eq!(rounds_of(policy, much), (5, Decision::Stop));
    }

    #[test]
    fn a_long_look_in_the_stop_counts() {
        let long = |pages| Remaining { look: Duration::from_millis(800), ..after(pages) };
        let mut promised = policy(300);
        let said: Vec<_> = (0..10).map(|_| promised.decide(&long(10))).collect();
        assert!(!said.contains(&Decision::Stop), "it would be longer than promised");
        let reason = said.iter().find_map(|said| match said {
            Decision::GiveUp { reason } => Some(reason),
            _ => None,
        });
        let reason = reason.expect("no round makes it shorter");
        assert!(reason.contains("A stop costs about 810 ms"), "{reason}");
        let aim = MaxDowntime::Aimed(Duration::from_millis(300));
        let mut aimed = Policy::new(aim, Duration::from_secs(60), Duration::from_millis(10));
        assert!((0..10).any(|_| aimed.decide(&long(10)) == Decision::Stop));
    }

    #[test]
    fn gives_up_early_when_the_fixed_cost_alone_is_too_much() {
        let mut policy = policy(5);
        let given_up =
            (0..10).any(|_| matches!(policy.decide(&after(10)), Decision::GiveUp { .. }));
        assert!(given_up);
    }
}
