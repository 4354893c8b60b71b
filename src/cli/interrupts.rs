//! Ctrl-C, noted from the moment a verb asks for it until that verb ends. A press is never lost between
//! two places that wait for one; what it means is for the verb to say.

use std::future;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::failure::Failure;

/// The interrupts of one verb. As long as this exists, Ctrl-C does not end the process by itself.
#[derive(Debug)]
pub(crate) struct Interrupts {
    signal: Signal,
    any: bool,
}

impl Interrupts {
    /// Takes Ctrl-C over.
    pub(crate) fn listen() -> Result<Self, Failure> {
        let signal = signal(SignalKind::interrupt())
            .map_err(|error| Failure::other(format!("Cannot take over Ctrl-C: {error}")))?;
        Ok(Self { signal, any: false })
    }

    /// Waits for the next press, or takes the one that nobody waited for. Can be dropped and called
    /// again.
    pub(crate) async fn next(&mut self) {
        match self.signal.recv().await {
            Some(()) => self.any = true,
            // The runtime ends; so does whoever waits.
            None => future::pending().await,
        }
    }

    /// Whether there was a press since the beginning.
    pub(crate) async fn any(&mut self) -> bool {
        tokio::select! {
            biased;
            () = self.next() => {}
            () = future::ready(()) => {}
        }
        self.any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_press_that_nobody_waited_for_is_not_lost() {
        let mut interrupts = Interrupts::listen().expect("listen");
        assert!(!interrupts.any().await);
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGINT).expect("raise");
        interrupts.next().await;
        assert!(interrupts.any().await, "it stays true");
    }
}
