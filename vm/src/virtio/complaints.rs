//! How often a device speaks of its driver in the log: a guest may do wrong as often as it likes, and the log has an
//! end. What is said, and whether it is a reason to stop, is said elsewhere.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two complaints of one device.
const EVERY: Duration = Duration::from_secs(60);

/// Counts a device's complaints. The first is said at once.
#[derive(Debug, Default)]
pub(crate) struct Complaints(Mutex<Said>);

#[derive(Debug, Default)]
struct Said {
    last: Option<Instant>,
    unsaid: u64,
}

impl Complaints {
    /// Whether one may be said `now`: then how many were not since the one before.
    pub(crate) fn next(&self, now: Instant) -> Option<u64> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.last.is_some_and(|last| now.saturating_duration_since(last) < EVERY) {
            said.unsaid += 1;
            return None;
        }
        said.last = Some(now);
        Some(std::mem::take(&mut said.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_said_a_minute_and_the_rest_is_counted() {
        let (complaints, now) = (Complaints::default(), Instant::now());
        assert_eq!(complaints.next(now), Some(0));
        assert_eq!(complaints.next(now), None);
        assert_eq!(complaints.next(now + EVERY - Duration::from_millis(1)), None);
        assert_eq!(complaints.next(now + EVERY), Some(2));
        assert_eq!(complaints.next(now + EVERY), None);
    }
}
