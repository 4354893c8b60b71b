//! Whether a CRIU that says nothing still does something: a container stands still all the while, and whoever
//! waits for what never comes is given up within a stated time.

use std::fs;
use std::time::{Duration, Instant};

use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};
use crate::file_locks;

/// A CRIU that says nothing for so long, and has not worked either, is stuck. Where it has all memory to
/// dump by itself, it says nothing for as long as that takes.
const WORD_WITHIN: Duration = Duration::from_secs(120);
/// A restore in which neither it nor what it restores has worked for so long is stuck, and the container
/// runs on at the source.
const STALLED_AFTER: Duration = Duration::from_secs(20);
/// The longest that a restore says nothing while it works. Below what a session waits for that.
const RESTORED_WITHIN: Duration = Duration::from_secs(280);
/// A restore is looked at so often, and who waits for a lock in two looks waits for somebody who stands still.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A CRIU whose dump was called off lets the tree go within this: it can be in the middle of a task.
const LET_GO_WITHIN: Duration = Duration::from_secs(30);

/// What is known of one wait for a word of CRIU.
pub(crate) struct Watch<'a> {
    criu: i32,
    /// Where it restores, if it does.
    into: Option<&'a Cgroups>,
    /// However much it works.
    end: Option<Instant>,
    /// Since when the amount of work has been what it is.
    since: (Instant, u64),
    patience: Duration,
    /// Who waited for a lock in the last look.
    waiting: Option<(i32, String)>,
    next: Instant,
}

impl<'a> Watch<'a> {
    /// Watches process `criu`, which dumps, or restores `into` these cgroups.
    pub(crate) fn begin(criu: i32, into: Option<&'a Cgroups>) -> Self {
        let now = Instant::now();
        let mut watch = Self {
            criu,
            into,
            end: into.map(|_| now + RESTORED_WITHIN),
            since: (now, 0),
            patience: if into.is_some() { STALLED_AFTER } else { WORD_WITHIN },
            waiting: None,
            next: now + LOOK_EVERY,
        };
        watch.since.1 = watch.work();
        watch
    }

    /// How long may be waited before [`Watch::look`].
    pub(crate) fn until_next_look(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }

    /// It has been told that nobody wants what it does.
    pub(crate) fn called_off(&mut self) {
        let end = Instant::now() + LET_GO_WITHIN;
        self.end = Some(self.end.map_or(end, |before| before.min(end)));
    }

    /// Looks whether there is anything to wait for.
    ///
    /// # Errors
    /// When not, and why.
    pub(crate) fn look(&mut self) -> Result<()> {
        let now = Instant::now();
        self.next = now + LOOK_EVERY;
        let told = |what: String| Err(ContainerError::CriuProtocol(what));
        let work = self.work();
        if work != self.since.1 {
            self.since = (now, work);
        }
        if self.end.is_some_and(|end| now >= end) {
            return told("is stuck: it does not come to an end".to_owned());
        }
        if now >= self.since.0 + self.patience {
            return told(format!(
                "is stuck: it says nothing any more, and nothing has worked for {} s",
                self.patience.as_secs()
            ));
        }
        let before = self.waiting.take();
        self.waiting = self.into.and_then(|into| file_locks::waiting(&into.processes().ok()?));
        match &self.waiting {
            Some((pid, file)) if before.as_ref() == self.waiting.as_ref() => told(format!(
                "waits for a lock of {}, which somebody else has: what both hosts share stays locked at the \
                 source until the container runs elsewhere. Have it unlock the file for the move, or copy \
                 what is shared",
                file_locks::name(*pid, file)
                    .map_or(file.clone(), |name| name.display().to_string())
            )),
            _ => Ok(()),
        }
    }

    /// The processor time that CRIU, and what it restores, has used, in clock ticks. What has ended counts no
    /// more, and so changes it too.
    fn work(&self) -> u64 {
        let restored = self.into.and_then(|into| into.processes().ok()).unwrap_or_default();
        let restored = restored.into_iter().filter(|pid| *pid != self.criu);
        restored.chain([self.criu]).map(ticks).sum()
    }
}

/// The processor time of a process in clock ticks; 0 when it has ended.
fn ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Its name, in brackets, may hold anything. What follows it begins with the third field.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_ascii_whitespace());
    fields.map_or(0, |fields| fields.skip(11).take(2).flat_map(str::parse::<u64>).sum())
}
