//! The agent's end of a keeper: one connection, one question at a time.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use prost::Message;

use super::Phase;
use super::protocol::{self, Ask, Reply, Request, Sections};
use crate::pages::{PageSet, SpaceId};
use crate::workload::{Liveness, Place, Result, Section, SpaceInfo, WorkloadError};

/// Longer than any keeper may take for a dump or a restore of a large tree.
const ANSWER_WITHIN: Duration = Duration::from_secs(300);
/// State sections of one workload together are never longer.
pub(super) const SECTIONS_CAP: u64 = 16 << 30;

/// A connection to one workload's keeper. When it is dropped while the workload is paused and not
/// fenced, the keeper resumes the workload by itself after its deadline.
#[derive(Debug)]
pub struct KeeperClient {
    place: Place,
    name: String,
    stream: UnixStream,
}

impl KeeperClient {
    /// Connects to the keeper of the workload at `place`. Waits while the keeper still serves an
    /// earlier connection.
    ///
    /// # Errors
    /// [`WorkloadError::KeeperGone`] when no keeper listens there; another error when that could
    /// not be found out.
    pub fn connect(place: &Place) -> Result<Self> {
        let failed = |error: io::Error| {
            let what = format!("Cannot connect to {}", place.socket().display());
            match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    let name = place.name.clone();
                    WorkloadError::KeeperGone { name, what: format!("{what}: {error}") }
                }
                _ => WorkloadError::new(what, error),
            }
        };
        let stream = UnixStream::connect(place.socket()).map_err(failed)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(failed)?;
        stream.set_write_timeout(Some(ANSWER_WITHIN)).map_err(failed)?;
        Ok(Self { place: place.clone(), name: place.name.clone(), stream })
    }

    /// A new connection to the same keeper, after this one broke. What was asked on the old one is
    /// done, or refused, before the new one is served.
    ///
    /// # Errors
    /// As [`KeeperClient::connect`].
    pub fn reconnect(&mut self) -> Result<()> {
        *self = Self::connect(&self.place)?;
        Ok(())
    }

    /// What state the workload is in.
    pub fn phase(&mut self) -> Result<Phase> {
        let reply = self.ask(Request::of(Ask::Phase))?;
        self.json(&reply)
    }

    /// Facts in the backend's own JSON.
    pub fn facts(&mut self) -> Result<serde_json::Value> {
        let reply = self.ask(Request::of(Ask::Facts))?;
        self.json(&reply)
    }

    /// Whether and how it can be tracked.
    pub fn liveness(&mut self) -> Result<Liveness> {
        let reply = self.ask(Request::of(Ask::Liveness))?;
        self.json(&reply)
    }

    /// The spaces as they are now.
    pub fn spaces(&mut self) -> Result<Vec<SpaceInfo>> {
        Ok(self.ask(Request::of(Ask::Spaces))?.spaces)
    }

    /// Destination: makes room for these spaces.
    pub fn make_spaces(&mut self, spaces: &[SpaceInfo]) -> Result<()> {
        self.tell(Request { spaces: spaces.to_vec(), ..Request::of(Ask::MakeSpaces) })
    }

    /// A descriptor whose byte offset is the address within `space`.
    pub fn memory(&mut self, space: SpaceId) -> Result<OwnedFd> {
        let request = Request { space: space.0, ..Request::of(Ask::Memory) };
        match self.exchange(request, None)? {
            (_, Some(descriptor)) => Ok(descriptor),
            (_, None) => Err(self.gone("answering with a descriptor of its memory")),
        }
    }

    /// Starts dirty tracking.
    pub fn track(&mut self) -> Result<()> {
        self.tell(Request::of(Ask::Track))
    }

    /// Adds what was written since the last harvest, and re-arms.
    pub fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        let reply = self.ask(Request::of(Ask::Harvest))?;
        if protocol::unpack_pages(&reply.dirty, dirty) {
            Ok(())
        } else {
            Err(self.gone("answering with a page set that makes sense"))
        }
    }

    /// Takes `percent` of its processor time.
    pub fn throttle(&mut self, percent: u8) -> Result<()> {
        self.tell(Request { percent: percent.into(), ..Request::of(Ask::Throttle) })
    }

    /// Stops it.
    pub fn pause(&mut self) -> Result<()> {
        self.tell(Request::of(Ask::Pause))
    }

    /// State sections, while paused.
    pub fn save(&mut self) -> Result<Vec<Section>> {
        let (_, descriptor) = self.exchange(Request::of(Ask::Save), None)?;
        let descriptor = descriptor.ok_or_else(|| self.gone("answering with its state"))?;
        read_sections(descriptor).map_err(|error| {
            WorkloadError::new("Cannot read the state that the keeper saved", error)
        })
    }

    /// Rolls back: runs on as if nothing had been.
    pub fn resume(&mut self) -> Result<()> {
        self.tell(Request::of(Ask::Resume))
    }

    /// From the answer on, the keeper never resumes by itself.
    pub fn fence(&mut self, token: u64) -> Result<()> {
        self.tell(Request { token, ..Request::of(Ask::Fence) })
    }

    /// Restores everything, runs nothing.
    pub fn load(&mut self, sections: Vec<Section>) -> Result<()> {
        let blob = write_sections(sections).map_err(|error| {
            WorkloadError::new("Cannot hand the state sections to the keeper", error)
        })?;
        self.exchange(Request::of(Ask::Load), Some(blob)).map(|_| ())
    }

    /// Lets it run here.
    pub fn activate(&mut self, token: u64) -> Result<()> {
        self.tell(Request { token, ..Request::of(Ask::Activate) })
    }

    /// Takes the fenced copy away, quietly; the keeper ends.
    pub fn release(&mut self) -> Result<()> {
        self.tell(Request::of(Ask::Release))
    }

    /// Takes the never activated copy away; the keeper ends.
    pub fn discard(&mut self) -> Result<()> {
        self.tell(Request::of(Ask::Discard))
    }

    /// Ends the running workload; the keeper ends.
    pub fn stop(&mut self, grace: Duration) -> Result<()> {
        self.tell(Request { grace_ms: grace.as_millis() as u64, ..Request::of(Ask::Stop) })
    }

    fn tell(&mut self, request: Request) -> Result<()> {
        self.ask(request).map(|_| ())
    }

    fn ask(&mut self, request: Request) -> Result<Reply> {
        self.exchange(request, None).map(|(reply, _)| reply)
    }

    fn exchange(
        &mut self,
        request: Request,
        descriptor: Option<OwnedFd>,
    ) -> Result<(Reply, Option<OwnedFd>)> {
        let what = format!("{:?}", request.ask()).to_lowercase();
        let gone = |name: &str, why: String| WorkloadError::KeeperGone {
            name: name.to_owned(),
            what: format!("asked to {what}: {why}"),
        };
        protocol::send(&mut self.stream, &request, descriptor.as_ref().map(AsFd::as_fd))
            .map_err(|error| gone(&self.name, error.to_string()))?;
        let (reply, descriptor) = protocol::receive::<Reply>(&mut self.stream)
            .map_err(|error| gone(&self.name, error.to_string()))?
            .ok_or_else(|| gone(&self.name, "it ended".to_owned()))?;
        match chained(reply.error.clone()) {
            Some(error) => Err(error),
            None => Ok((reply, descriptor)),
        }
    }

    fn json<T: serde::de::DeserializeOwned>(&self, reply: &Reply) -> Result<T> {
        serde_json::from_str(&reply.json)
            .map_err(|error| WorkloadError::new("Cannot read the keeper's answer", error))
    }

    fn gone(&self, what: &str) -> WorkloadError {
        WorkloadError::KeeperGone { name: self.name.clone(), what: format!("instead of {what}") }
    }
}

impl Request {
    fn of(ask: Ask) -> Self {
        Self { ask: ask.into(), ..Self::default() }
    }
}

/// The error behind a chain of messages, outermost first.
fn chained(messages: Vec<String>) -> Option<WorkloadError> {
    messages.into_iter().rev().fold(None, |inner: Option<WorkloadError>, what| {
        Some(WorkloadError::Failed { what, source: inner.map(Into::into) })
    })
}

/// Writes sections into a fresh memfd, read position at its start.
pub(super) fn write_sections(sections: Vec<Section>) -> io::Result<OwnedFd> {
    let descriptor = memfd_create(c"decamp-sections", MFdFlags::MFD_CLOEXEC)?;
    let mut file = File::from(descriptor);
    for section in sections {
        // One message a section, each with its length, so that no single buffer holds all state.
        let one = Sections { sections: vec![section] };
        file.write_all(&(one.encoded_len() as u64).to_le_bytes())?;
        file.write_all(&one.encode_to_vec())?;
    }
    file.rewind()?;
    Ok(file.into())
}

/// Reads what [`write_sections`] wrote.
pub(super) fn read_sections(descriptor: OwnedFd) -> io::Result<Vec<Section>> {
    let bad = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut file = File::from(descriptor);
    let mut left = file.metadata()?.len();
    if left > SECTIONS_CAP {
        return Err(bad("State sections are longer than any may be"));
    }
    file.rewind()?;
    let mut found = Vec::new();
    while left > 0 {
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        left = left
            .checked_sub(8)
            .and_then(|left| left.checked_sub(length))
            .ok_or_else(|| bad("A state section is longer than its file"))?;
        let mut bytes = vec![0; length as usize];
        file.read_exact(&mut bytes)?;
        let one = Sections::decode(&bytes[..]).map_err(io::Error::other)?;
        found.extend(one.sections);
    }
    Ok(found)
}
