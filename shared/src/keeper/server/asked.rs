//! What an agent asks of a keeper, each in a phase that allows it, and what is answered.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::Server;
use crate::keeper::protocol::{self, Ask, Reply, Request};
use crate::keeper::{Harvest, Phase, client};
use crate::pages::{PageSet, SpaceId};
use crate::workload::{Result, WorkloadError};

impl Server<'_> {
    /// Answers one request; false when the connection is at its end.
    pub(super) fn answer_one(&mut self, stream: &mut UnixStream) -> bool {
        let (request, descriptor) = match protocol::receive::<Request>(stream, None) {
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

    pub(super) fn act(
        &mut self,
        request: &Request,
        descriptor: Option<OwnedFd>,
        attached: &mut Option<OwnedFd>,
    ) -> Result<Reply> {
        let mut reply = Reply::default();
        match request.ask() {
            Ask::Unspecified => return Err(WorkloadError::plain(protocol::OLDER)),
            Ask::Phase => reply.json = json(&self.phase)?,
            Ask::Facts => reply.json = json(&self.kept.facts()?)?,
            Ask::Liveness => reply.json = json(&self.kept.liveness())?,
            Ask::Configure => {
                self.must_be("configured", &[Phase::Running])?;
                let methods = serde_json::from_str(&request.json).map_err(|error| {
                    WorkloadError::new("Cannot read a choice of methods", error)
                })?;
                self.kept.configure(methods)?;
            }
            Ask::Ways => reply.json = json(&self.kept.ways())?,
            Ask::Spaces => reply.spaces = self.kept.spaces()?,
            Ask::MakeSpaces => {
                self.must_be("given memory", &[Phase::Incoming])?;
                self.kept.make_spaces(&request.spaces)?;
            }
            Ask::Memory => *attached = Some(self.kept.memory(SpaceId(request.space))?),
            Ask::Carry => {
                self.must_be("given spaces", &[Phase::Running])?;
                self.disturbed = true;
                let spaces: Vec<_> = request.spaces.iter().map(|space| SpaceId(space.id)).collect();
                self.kept.carry(&spaces)?;
            }
            Ask::Mirror => self.mirror(request, descriptor)?,
            Ask::Hold => {
                self.must_be("held", &[Phase::Running])?;
                self.disturbed = true;
                self.kept.hold()?;
            }
            Ask::Switch => {
                self.must_be("given other files", &[Phase::Running])?;
                self.kept.switch(&request.json)?;
            }
            Ask::Track => {
                self.must_be("tracked", &[Phase::Running])?;
                self.disturbed = true;
                self.kept.track()?;
            }
            Ask::Harvest => {
                let mut dirty = PageSet::new();
                let Harvest { exists, stall, restoring } = self.kept.harvest(&mut dirty)?;
                reply.dirty = protocol::pack_pages(&dirty);
                reply.bounded = exists.is_some();
                reply.exists = protocol::pack_pages(&exists.unwrap_or_default());
                reply.stall_us = stall.as_micros() as u64;
                reply.restoring_us = restoring.needed.as_micros() as u64;
                reply.wished_us = restoring.wished.as_micros() as u64;
            }
            Ask::Throttle => {
                self.must_be("throttled", &[Phase::Running])?;
                self.disturbed = true;
                self.kept.throttle(request.percent.min(99) as u8)?;
            }
            Ask::Pause => {
                self.must_be("paused", &[Phase::Running])?;
                // One that fails may leave it standing still, if what undoes it fails too.
                self.disturbed = true;
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
            Ask::Resume => self.resume(request.token)?,
            Ask::Fence => self.fence(request.token)?,
            Ask::Load => self.load(descriptor)?,
            Ask::Activate => self.activate()?,
            Ask::Release => {
                let Phase::Fenced { token } = self.phase else {
                    return Err(self.out_of_turn("released"));
                };
                self.must_hold(token, request.token)?;
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
            Ask::LetGo => {
                self.must_be("let go", &[Phase::Running])?;
                self.kept.let_go()?;
                self.over = true;
            }
        }
        Ok(reply)
    }

    /// Of a fenced workload nobody decides but the change of ownership that fenced it: another one, which
    /// was left open and is late, knows nothing of a copy that may run elsewhere.
    fn resume(&mut self, token: u64) -> Result<()> {
        if let Phase::Fenced { token: held } = self.phase {
            self.must_hold(held, token)?;
        }
        match self.phase {
            Phase::Running | Phase::Paused | Phase::Fenced { .. } => {
                let resumed = self.kept.resume();
                // One that ended by itself cannot run on; it is this host's again, and its end is told next.
                match self.exit.raised().zip(resumed.as_ref().err()) {
                    Some((_, error)) => tracing::warn!(%error, "What is resumed has ended"),
                    None => resumed?,
                }
                self.phase = Phase::Running;
                self.disturbed = false;
                Ok(())
            }
            Phase::Incoming | Phase::Prepared => Err(self.out_of_turn("resumed")),
        }
    }

    fn mirror(&mut self, request: &Request, descriptor: Option<OwnedFd>) -> Result<()> {
        self.must_be("mirrored", &[Phase::Running])?;
        if descriptor.is_none() && request.json.is_empty() {
            return Ok(());
        }
        let file = descriptor.ok_or_else(|| {
            WorkloadError::plain("A file to be mirrored to came without a descriptor")
        })?;
        let path: PathBuf = serde_json::from_str(&request.json)
            .map_err(|error| WorkloadError::new("Cannot read where a file stands", error))?;
        self.disturbed = true;
        self.kept.mirror(SpaceId(request.space), &path, File::from(file))
    }

    fn fence(&mut self, token: u64) -> Result<()> {
        match self.phase {
            Phase::Fenced { token: held } if held > token => {
                Err(WorkloadError::plain(format!("Fencing token {token} is older than {held}")))
            }
            Phase::Paused | Phase::Fenced { .. } => {
                // From here on it stands still whatever comes of the rest, and is resumed by whoever knows.
                self.phase = Phase::Fenced { token };
                self.kept.fenced()
            }
            _ => Err(self.out_of_turn("fenced")),
        }
    }

    fn load(&mut self, descriptor: Option<OwnedFd>) -> Result<()> {
        self.must_be("loaded", &[Phase::Incoming])?;
        let descriptor =
            descriptor.ok_or_else(|| WorkloadError::plain("State sections came without memory"))?;
        let sections = client::read_sections(descriptor, client::SECTIONS_CAP)
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

    fn must_hold(&self, held: u64, token: u64) -> Result<()> {
        if held == token {
            return Ok(());
        }
        Err(WorkloadError::plain(format!(
            "Workload {} is fenced under token {held}, and this was asked under token {token}",
            self.config.place.name
        )))
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
