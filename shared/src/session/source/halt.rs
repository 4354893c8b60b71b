//! What ends the waiting of a move before its fence.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::session::error::{Result, SessionError};
use crate::session::progress::Phase;

/// What ends the waiting of a move before its fence: the user, or the timeout.
#[derive(Clone)]
pub(in crate::session) struct Halt {
    pub(in crate::session) cancel: CancellationToken,
    pub(in crate::session) deadline: tokio::time::Instant,
    pub(in crate::session) timeout: Duration,
    pub(in crate::session) phase: Phase,
}

impl Halt {
    /// Waits for `work`, unless the move is to end first. The timeout counts until the stop.
    pub(in crate::session) async fn or<T>(
        &self,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            error = self.halted() => Err(error),
            result = work => result,
        }
    }

    /// Returns when the move is to end.
    pub(in crate::session) async fn halted(&self) -> SessionError {
        let timeout = SessionError::Timeout { phase: self.phase, after: self.timeout };
        tokio::select! {
            () = self.cancel.cancelled() => SessionError::Cancelled,
            () = tokio::time::sleep_until(self.deadline), if self.phase < Phase::Pause => timeout,
        }
    }

    /// That the move is to end, if it is.
    pub(in crate::session) fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(SessionError::Cancelled) } else { Ok(()) }
    }
}
