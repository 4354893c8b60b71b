//! The keeper's own loop: one connection at a time, the workload's phase, and the deadline after
//! which a workload that lost its agent runs on.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::protocol::{self, Ask, Reply, Request};
use super::{Beginning, ExitRecord, KeeperConfig, Kept, Phase, client, spawn};
use crate::pages::{PageSet, SpaceId};
use crate::workload::{Result, WorkloadError};

/// A peer that began a frame must end it within this.
const FRAME_WITHIN: Duration = Duration::from_secs(30);

/// How a workload says that it ended by itself.
#[derive(Clone, Debug)]
pub struct ExitSignal {
    event: Arc<EventFd>,
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

    fn raised(&self) -> Option<ExitRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Serves the workload `kept` until it was released, discarded, stopped or ended by itself.
///
/// # Errors
/// When the socket cannot be made or the ready message not given; never because of what a peer did.
pub fn serve(config: &KeeperConfig, kept: Box<dyn Kept>, exit: &ExitSignal) -> Result<()> {
    let socket = config.place.socket();
    let failed = |error: io::Error| {
        WorkloadError::new(
            format!("Cannot listen on the keeper's socket {}", socket.display()),
            error,
        )
    };
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).map_err(failed)?;
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    spawn::report_ready().map_err(failed)?;
    let phase = match config.beginning {
        Beginning::Run => Phase::Running,
        Beginning::Incoming => Phase::Incoming,
    };
    let mut server = Server { config, kept, phase, disturbed: false, over: false };
    let ended = server.run(&listener, exit);
    let _ = fs::remove_file(&socket);
    ended.map_err(failed)
}

struct Server<'a> {
    config: &'a KeeperConfig,
    kept: Box<dyn Kept>,
    phase: Phase,
    /// Tracking or throttling was switched on.
    disturbed: bool,
    /// The workload is no longer here.
    over: bool,
}

impl Server<'_> {
    fn run(&mut self, listener: &UnixListener, exit: &ExitSignal) -> io::Result<()> {
        let mut agent: Option<UnixStream> = None;
        let mut lost_at = Instant::now();
        while !self.over {
            let waiting_on = agent.as_ref().map_or(listener.as_fd(), AsFd::as_fd);
            match wait(waiting_on, exit, self.patience(agent.is_some(), lost_at))? {
                Woken::Exit => {
                    self.record_exit(exit);
                    return Ok(());
                }
                Woken::Deadline => self.resume_alone(),
                Woken::Ready => match &mut agent {
                    None => agent = accept(listener),
                    Some(stream) => {
                        if !self.answer_one(stream) {
                            agent = None;
                            lost_at = Instant::now();
                            self.settle_after_loss();
                        }
                    }
                },
            }
        }
        Ok(())
    }

    /// How long to wait for an agent before the workload runs on by itself.
    fn patience(&self, has_agent: bool, lost_at: Instant) -> Option<Duration> {
        let paused = self.phase == Phase::Paused && !has_agent;
        paused.then(|| self.config.tools.resume_after.saturating_sub(lost_at.elapsed()))
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

    fn record_exit(&mut self, exit: &ExitSignal) {
        let record = exit.raised().unwrap_or(ExitRecord { status: 1, text: "ended".to_owned() });
        tracing::info!(text = %record.text, "The workload ended");
        let path = self.config.place.exit_record();
        let written = serde_json::to_vec(&record)
            .map_err(io::Error::from)
            .and_then(|bytes| fs::write(&path, bytes));
        if let Err(error) = written {
            tracing::error!(%error, path = %path.display(), "Cannot write the exit record");
        }
    }

    /// Answers one request; false when the connection is at its end.
    fn answer_one(&mut self, stream: &mut UnixStream) -> bool {
        let (request, descriptor) = match protocol::receive::<Request>(stream) {
            Ok(Some(received)) => received,
            Ok(None) => return false,
            Err(error) => {
                tracing::warn!(%error, "Lost the agent's connection");
                return false;
            }
        };
        let mut attached = None;
        let reply = match self.act(&request, descriptor, &mut attached) {
            Ok(reply) => reply,
            Err(error) => {
                tracing::warn!(ask = ?request.ask(), %error, "Refused or failed");
                Reply { error: chain(&error), ..Reply::default() }
            }
        };
        match protocol::send(stream, &reply, attached.as_ref().map(AsFd::as_fd)) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "Cannot answer the agent");
                false
            }
        }
    }

    fn act(
        &mut self,
        request: &Request,
        descriptor: Option<OwnedFd>,
        attached: &mut Option<OwnedFd>,
    ) -> Result<Reply> {
        let mut reply = Reply::default();
        match request.ask() {
            Ask::Unspecified => return Err(WorkloadError::plain("This keeper is older than that")),
            Ask::Phase => reply.json = json(&self.phase)?,
            Ask::Facts => reply.json = json(&self.kept.facts()?)?,
            Ask::Liveness => reply.json = json(&self.kept.liveness())?,
            Ask::Spaces => reply.spaces = self.kept.spaces()?,
            Ask::MakeSpaces => {
                self.must_be("given memory", &[Phase::Incoming])?;
                self.kept.make_spaces(&request.spaces)?;
            }
            Ask::Memory => *attached = Some(self.kept.memory(SpaceId(request.space))?),
            Ask::Track => {
                self.must_be("tracked", &[Phase::Running])?;
                self.disturbed = true;
                self.kept.track()?;
            }
            Ask::Harvest => {
                let mut dirty = PageSet::new();
                self.kept.harvest(&mut dirty)?;
                reply.dirty = protocol::pack_pages(&dirty);
            }
            Ask::Throttle => {
                self.must_be("throttled", &[Phase::Running])?;
                self.disturbed = true;
                self.kept.throttle(request.percent.min(99) as u8)?;
            }
            Ask::Pause => {
                self.must_be("paused", &[Phase::Running])?;
                self.kept.pause()?;
                self.phase = Phase::Paused;
            }
            Ask::Save => {
                self.must_be("saved", &[Phase::Paused])?;
                let sections = self.kept.save()?;
                let blob = client::write_sections(sections);
                *attached =
                    Some(blob.map_err(|error| {
                        WorkloadError::new("Cannot hand the state over", error)
                    })?);
            }
            Ask::Resume => self.resume()?,
            Ask::Fence => self.fence(request.token)?,
            Ask::Load => self.load(descriptor)?,
            Ask::Activate => self.activate()?,
            Ask::Release => {
                let Phase::Fenced { .. } = self.phase else {
                    return Err(self.out_of_turn("released"));
                };
                self.kept.release()?;
                self.over = true;
            }
            Ask::Discard => {
                self.must_be("discarded", &[Phase::Incoming, Phase::Prepared])?;
                self.kept.discard()?;
                self.over = true;
            }
            Ask::Stop => {
                self.must_be("stopped", &[Phase::Running, Phase::Paused])?;
                self.kept.stop(Duration::from_millis(request.grace_ms))?;
                self.over = true;
            }
        }
        Ok(reply)
    }

    fn resume(&mut self) -> Result<()> {
        match self.phase {
            Phase::Running | Phase::Paused | Phase::Fenced { .. } => {
                self.kept.resume()?;
                self.phase = Phase::Running;
                self.disturbed = false;
                Ok(())
            }
            Phase::Incoming | Phase::Prepared => Err(self.out_of_turn("resumed")),
        }
    }

    fn fence(&mut self, token: u64) -> Result<()> {
        match self.phase {
            Phase::Fenced { token: held } if held > token => {
                Err(WorkloadError::plain(format!("Fencing token {token} is older than {held}")))
            }
            Phase::Paused | Phase::Fenced { .. } => {
                self.phase = Phase::Fenced { token };
                Ok(())
            }
            _ => Err(self.out_of_turn("fenced")),
        }
    }

    fn load(&mut self, descriptor: Option<OwnedFd>) -> Result<()> {
        self.must_be("loaded", &[Phase::Incoming])?;
        let descriptor =
            descriptor.ok_or_else(|| WorkloadError::plain("State sections came without memory"))?;
        let sections = client::read_sections(descriptor)
            .map_err(|error| WorkloadError::new("Cannot read the state sections", error))?;
        self.kept.load(sections)?;
        self.phase = Phase::Prepared;
        Ok(())
    }

    fn activate(&mut self) -> Result<()> {
        match self.phase {
            // Asked twice: it runs, and that is the answer.
            Phase::Running => Ok(()),
            Phase::Prepared => {
                self.kept.activate()?;
                self.phase = Phase::Running;
                Ok(())
            }
            _ => Err(self.out_of_turn("activated")),
        }
    }

    fn must_be(&self, verb: &str, phases: &[Phase]) -> Result<()> {
        if phases.contains(&self.phase) { Ok(()) } else { Err(self.out_of_turn(verb)) }
    }

    fn out_of_turn(&self, verb: &str) -> WorkloadError {
        WorkloadError::plain(format!(
            "Workload {} cannot be {verb} while it is {:?}",
            self.config.place.name, self.phase
        ))
    }
}

enum Woken {
    Ready,
    Exit,
    Deadline,
}

fn wait(on: impl AsFd, exit: &ExitSignal, patience: Option<Duration>) -> io::Result<Woken> {
    let timeout = patience.map_or(PollTimeout::NONE, |left| {
        // Rounded up, so that the deadline has passed when the timer has.
        PollTimeout::try_from(left.as_millis() as u64 + 1).unwrap_or(PollTimeout::MAX)
    });
    loop {
        let mut events = [
            PollFd::new(exit.event.as_fd(), PollFlags::POLLIN),
            PollFd::new(on.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut events, timeout) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(0) => return Ok(Woken::Deadline),
            Ok(_) if events[0].any() == Some(true) => return Ok(Woken::Exit),
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

fn json<T: serde::Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|error| WorkloadError::new("Cannot write the answer as JSON", error))
}

/// The messages of an error and of all beneath it, outermost first.
fn chain(error: &dyn std::error::Error) -> Vec<String> {
    let mut messages = vec![error.to_string()];
    let mut source = error.source();
    while let Some(inner) = source {
        messages.push(inner.to_string());
        source = inner.source();
    }
    messages
}
