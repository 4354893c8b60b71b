//! The keeper's own loop: one connection at a time, the workload's phase, and the deadline after
//! which a workload that lost its agent runs on.
//!
//! What is asked is answered in `asked`; an end that nobody asked for is told in `exit`.

mod asked;
mod exit;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::console::Listening;
use crate::keeper::{Beginning, KeeperConfig, Kept, Phase, spawn};
use crate::workload::{Place, Result, WorkloadError};

pub use exit::{ExitSignal, write_exit_record};

/// A peer that began a frame must end it within this.
const FRAME_WITHIN: Duration = Duration::from_secs(30);

/// What could not be undone after the agent was lost is tried again after this.
const SETTLE_AGAIN: Duration = Duration::from_secs(1);

/// Serves the workload `kept` until it was released, discarded, stopped or ended by itself.
///
/// # Errors
/// When the socket cannot be made or the ready message not given; never because of what a peer did.
pub fn serve(config: &KeeperConfig, kept: Box<dyn Kept>, exit: &ExitSignal) -> Result<()> {
    serve_from(&listen(&config.place)?, config, kept, exit)
}

/// Listens on the socket of the keeper at `place`, which is not served yet.
///
/// # Errors
/// When the socket cannot be made.
pub fn listen(place: &Place) -> Result<Listening> {
    let listening = Listening::at(&place.socket()).and_then(|listening| {
        listening.listener().set_nonblocking(false)?;
        Ok(listening)
    });
    listening.map_err(|error| no_socket(&place.socket(), error))
}

/// As [`serve`], on the socket that [`listen`] made.
///
/// # Errors
/// As [`serve`].
pub fn serve_from(
    listening: &Listening,
    config: &KeeperConfig,
    kept: Box<dyn Kept>,
    exit: &ExitSignal,
) -> Result<()> {
    let failed = |error| no_socket(listening.path(), error);
    spawn::report_ready().map_err(failed)?;
    serve_on(listening.listener(), config, kept, exit).map_err(failed)
}

fn no_socket(path: &Path, error: io::Error) -> WorkloadError {
    WorkloadError::new(format!("Cannot listen on the keeper's socket {}", path.display()), error)
}

/// As [`serve`], on a socket that listens already.
///
/// # Errors
/// When the kernel does not let it wait.
pub fn serve_on(
    listener: &UnixListener,
    config: &KeeperConfig,
    kept: Box<dyn Kept>,
    exit: &ExitSignal,
) -> io::Result<()> {
    Server::new(config, kept, exit.clone()).run(listener)
}

struct Server<'a> {
    config: &'a KeeperConfig,
    kept: Box<dyn Kept>,
    phase: Phase,
    /// Tracking or throttling was switched on.
    disturbed: bool,
    /// The workload is no longer here.
    over: bool,
    /// Raised when it ended by itself.
    exit: ExitSignal,
}

impl<'a> Server<'a> {
    fn new(config: &'a KeeperConfig, kept: Box<dyn Kept>, exit: ExitSignal) -> Self {
        let phase = match config.beginning {
            Beginning::Run | Beginning::Adopt => Phase::Running,
            Beginning::Incoming => Phase::Incoming,
        };
        Self { config, kept, phase, disturbed: false, over: false, exit }
    }

    fn run(&mut self, listener: &UnixListener) -> io::Result<()> {
        let mut agent: Option<UnixStream> = None;
        let mut asked = false;
        let mut lost_at = Instant::now();
        while !self.over {
            let waiting_on = agent.as_ref().map_or(listener.as_fd(), AsFd::as_fd);
            // A copy of a fenced one may run elsewhere: whoever knows is answered, and an end here counts only if
            // it is given back. The signal stays raised until then.
            let fenced = matches!(self.phase, Phase::Fenced { .. });
            let exit = (!fenced).then_some(&self.exit);
            match wait(waiting_on, exit, self.patience(agent.is_some(), lost_at))? {
                Woken::Exit => {
                    self.record_exit();
                    return Ok(());
                }
                Woken::Deadline if self.phase == Phase::Running => self.settle_after_loss(),
                Woken::Deadline => self.resume_alone(),
                Woken::Ready => match &mut agent {
                    None => {
                        agent = accept(listener);
                        asked = false;
                    }
                    Some(stream) => {
                        if self.answer_one(stream) {
                            asked = true;
                            continue;
                        }
                        agent = None;
                        // Somebody who only looks whether we are there does not put it off.
                        if asked {
                            lost_at = Instant::now();
                        }
                        self.settle_after_loss();
                    }
                },
            }
        }
        Ok(())
    }

    /// How long to wait for an agent before the workload runs on by itself.
    fn patience(&self, has_agent: bool, lost_at: Instant) -> Option<Duration> {
        match self.phase {
            _ if has_agent => None,
            Phase::Paused => Some(self.config.tools.resume_after.saturating_sub(lost_at.elapsed())),
            // What could not be undone is tried again.
            Phase::Running => self.disturbed.then_some(SETTLE_AGAIN),
            _ => None,
        }
    }

    /// Nobody came back in time, and nobody fenced it: nothing can run elsewhere.
    fn resume_alone(&mut self) {
        match self.kept.resume() {
            Ok(()) => {
                tracing::warn!("Lost the agent while paused: resumed");
                self.phase = Phase::Running;
                self.disturbed = false;
            }
            Err(error) => {
                tracing::error!(%error, "Cannot resume after the agent was lost; trying again");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }

    /// The agent went away while the workload runs: nobody will harvest, so stop tracking.
    fn settle_after_loss(&mut self) {
        if self.phase == Phase::Running && self.disturbed {
            match self.kept.resume() {
                Ok(()) => self.disturbed = false,
                Err(error) => tracing::error!(%error, "Cannot undo dirty tracking"),
            }
        }
    }
}

enum Woken {
    Ready,
    Exit,
    Deadline,
}

/// Waits for `on`, for `exit` if there is one, and for no longer than `patience`.
fn wait(on: impl AsFd, exit: Option<&ExitSignal>, patience: Option<Duration>) -> io::Result<Woken> {
    let timeout = patience.map_or(PollTimeout::NONE, |left| {
        // Rounded up, so that the deadline has passed when the timer has.
        PollTimeout::try_from(left.as_millis() as u64 + 1).unwrap_or(PollTimeout::MAX)
    });
    loop {
        let mut events = vec![PollFd::new(on.as_fd(), PollFlags::POLLIN)];
        events.extend(exit.map(|exit| PollFd::new(exit.event.as_fd(), PollFlags::POLLIN)));
        match poll(&mut events, timeout) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(0) => return Ok(Woken::Deadline),
            Ok(_) if events.get(1).and_then(PollFd::any) == Some(true) => return Ok(Woken::Exit),
            Ok(_) => return Ok(Woken::Ready),
        }
    }
}

fn accept(listener: &UnixListener) -> Option<UnixStream> {
    let accepted = listener.accept().and_then(|(stream, _)| {
        stream.set_read_timeout(Some(FRAME_WITHIN))?;
        stream.set_write_timeout(Some(FRAME_WITHIN))?;
        Ok(stream)
    });
    accepted.map_err(|error| tracing::warn!(%error, "Cannot accept an agent's connection")).ok()
}

#[cfg(test)]
mod tests;
