//! The workload of one end of a session, which threads that may block borrow one after the other.

use super::error::Result;
use crate::workload::{self, WorkloadError};

/// A workload, or the knowledge that this end has none (yet, or any more).
pub(super) struct Held<W: ?Sized>(Option<Box<W>>);

impl<W: ?Sized + Send + 'static> Held<W> {
    /// Of what there is.
    pub(super) fn new(workload: Option<Box<W>>) -> Self {
        Self(workload)
    }

    /// Whether there is none.
    pub(super) fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// Lets `work` use it on a thread that may block; `absent` says that there is none.
    ///
    /// # Errors
    /// What `work` gives; `absent`; that the thread panicked, after which there is none.
    pub(super) async fn with<R: Send + 'static>(
        &mut self,
        absent: &str,
        work: impl FnOnce(&mut W) -> workload::Result<R> + Send + 'static,
    ) -> Result<R> {
        let mut held = self.0.take().ok_or_else(|| WorkloadError::plain(absent))?;
        let (held, result) = tokio::task::spawn_blocking(move || {
            let result = work(&mut *held);
            (held, result)
        })
        .await?;
        self.0 = Some(held);
        Ok(result?)
    }

    /// Gives it away.
    pub(super) fn take(&mut self) -> Option<Box<W>> {
        self.0.take()
    }
}
