//! How long anything is waited for while disks that move stand still, and what is said when it took longer. What is done
//! about it is decided elsewhere.

use std::time::Duration;

use crate::session::MaxDowntime;
use crate::session::error::SessionError;

/// However short the stop is to be, what is held is waited for as long as this.
pub(super) const HELD_AT_LEAST: Duration = Duration::from_secs(10);
/// What is held is waited for as many times as long as the stop is to be.
const HELD_TIMES: u32 = 10;

/// What is asked of a workload whose disks stand still, or are about to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Hold,
    Harvest,
    Switch,
}

impl Step {
    /// That it was not done `within` the time that there was.
    pub(super) fn late(self, within: Duration) -> SessionError {
        let seconds = within.as_secs_f32();
        SessionError::NotConverging(match self {
            Self::Hold => format!(
                "The disks were not held within {seconds} s: something that the guest asked of them before is not \
                 done. See what is wrong where they are"
            ),
            Self::Harvest => format!(
                "The keeper did not say within {seconds} s what was written to the disks last, in which nothing of them \
                 was read or written"
            ),
            Self::Switch => format!(
                "The keeper did not go over to the new files within {seconds} s, in which nothing of the disks was read \
                 or written. It notes that in the agent's state directory first: see what is wrong there"
            ),
        })
    }
}

/// How long what is held is waited for: to be held, to be asked, to be stored, and to be switched.
pub(super) fn held_for(wanted: MaxDowntime) -> Duration {
    let (MaxDowntime::Promised(wanted) | MaxDowntime::Aimed(wanted)) = wanted;
    wanted.saturating_mul(HELD_TIMES).max(HELD_AT_LEAST)
}

pub(super) fn not_stored(within: Duration) -> SessionError {
    SessionError::NotConverging(format!(
        "What was left of the disks was not stored within {} s, in which nothing of them was read or written. See what \
         is wrong with their new place",
        within.as_secs_f32()
    ))
}
