//! The look at a tree that stands still: which pages of its processes exist, and which were written. It goes on
//! in a thread of its own, for it takes the longer the more memory there is, while the tree is taken off the
//! network and CRIU begins to dump it.

use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::dump::ms;
use crate::error::{ContainerError, Result};
use crate::memory::HiddenProcess;
use crate::tracker::Tracker;

/// A look that goes on.
pub(crate) struct Looking(JoinHandle<Looked>);

/// Whoever tracked, and what was found.
type Looked = (Option<Box<dyn Tracker>>, Result<Vec<HiddenProcess>>);

impl Looking {
    /// Begins to look for the pages of `processes`, whose mappings are known; `tracker` knows what was written,
    /// and comes back in the end.
    pub(crate) fn begin(
        mut tracker: Option<Box<dyn Tracker>>,
        mut processes: Vec<HiddenProcess>,
    ) -> Result<Self> {
        let look = move || {
            let begun = Instant::now();
            let looked = match &mut tracker {
                Some(tracker) => tracker.last(&mut processes),
                None => processes.iter_mut().try_for_each(|process| process.look(false)),
            };
            tracing::debug!(
                ms = ms(begun),
                processes = processes.len(),
                "Found the pages that exist"
            );
            (tracker, looked.map(|()| processes))
        };
        let thread = thread::Builder::new().name("pages-that-exist".to_owned()).spawn(look);
        thread.map(Self).map_err(ContainerError::io("start a thread"))
    }

    /// Waits until it is done.
    pub(crate) fn finish(self) -> Looked {
        let panicked =
            || ContainerError::State("The thread that looks for pages panicked".to_owned());
        self.0.join().unwrap_or_else(|_| (None, Err(panicked())))
    }
}
