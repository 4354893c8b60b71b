//! The end of a workload by itself: how it is told to its keeper, and what the keeper writes down of it.

use std::fs;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Server;
use crate::keeper::{ExitRecord, Phase};
use crate::workload::Place;

/// How a workload says that it ended by itself.
#[derive(Clone, Debug)]
pub struct ExitSignal {
    pub(super) event: Arc<EventFd>,
    record: Arc<Mutex<Option<ExitRecord>>>,
}

impl ExitSignal {
    /// A signal that nobody raised yet.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { event: Arc::new(event), record: Arc::default() })
    }

    /// Says that the workload ended. The first to say so is believed.
    pub fn raise(&self, record: ExitRecord) {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(record);
        // Cannot fail below 2^64 raises.
        let _ = self.event.write(1);
    }

    pub(super) fn raised(&self) -> Option<ExitRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Server<'_> {
    pub(super) fn record_exit(&self) {
        if matches!(self.phase, Phase::Incoming | Phase::Prepared) {
            // A record would say that it had run here.
            tracing::error!("The workload ended before it ever ran here");
            return;
        }
        let record =
            self.exit.raised().unwrap_or(ExitRecord { status: 1, text: "ended".to_owned() });
        tracing::info!(text = %record.text, "The workload ended");
        self.kept.note_end(&self.config.place, &record);
    }
}

/// Writes down how the workload at `place` ended. That it cannot be written is told, and ends nothing.
pub fn write_exit_record(place: &Place, record: &ExitRecord) {
    let path = place.exit_record();
    // Under its name it is whole.
    let fresh = path.with_extension("new");
    let written = serde_json::to_vec(record)
        .map_err(io::Error::from)
        .and_then(|bytes| fs::write(&fresh, bytes))
        .and_then(|()| fs::rename(&fresh, &path));
    if let Err(error) = written {
        tracing::error!(%error, path = %path.display(), "Cannot write the exit record");
    }
}
