//! Messages of a control connection. The source asks, the destination answers; both directions are
//! one envelope each, so that a reader always knows what it may expect.
//!
//! Tags are explicit and never reused; unknown fields are skipped. A message whose `body` is not
//! known is refused as a protocol error: nothing here may be ignored.

use super::manifest::{Manifest, Refusal, SpaceInfo};

/// Source to destination.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// Exactly one of these.
    #[prost(oneof = "request::Body", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10")]
    pub body: Option<request::Body>,
}

/// Destination to source.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reply {
    /// Exactly one of these.
    #[prost(oneof = "reply::Body", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9")]
    pub body: Option<reply::Body>,
}

/// Bodies of [`Request`].
pub mod request {
    /// What a source says.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Body {
        /// First message of a session.
        #[prost(message, tag = "1")]
        Hello(super::Hello),
        /// What is to come; answered by [`super::Verdict`].
        #[prost(message, tag = "2")]
        Offer(super::Offer),
        /// Build the empty workload; answered by [`super::Ready`].
        #[prost(message, tag = "3")]
        Prepare(super::Prepare),
        /// A round of pages follows on the page connections; answered by [`super::RoundDone`].
        #[prost(message, tag = "4")]
        Round(super::Round),
        /// A piece of a state section.
        #[prost(message, tag = "5")]
        Part(super::Part),
        /// All pages, files and sections are there: load. Answered by [`super::Loaded`].
        #[prost(message, tag = "6")]
        Load(super::Load),
        /// Run. Also the first message of a connection that asks again. Answered by
        /// [`super::Settled`].
        #[prost(message, tag = "7")]
        Commit(super::Commit),
        /// Nothing will come. Never sent by a source that is fenced.
        #[prost(message, tag = "8")]
        Abort(super::Abort),
        /// Are you there; answered by [`super::Pong`] at once, whatever else goes on.
        #[prost(message, tag = "9")]
        Ping(super::Ping),
        /// What CPU can you offer a guest; the first message of a connection that asks nothing else.
        /// Answered by [`super::CpuAnswer`].
        #[prost(message, tag = "10")]
        CpuQuestion(super::CpuQuestion),
    }
}

/// Bodies of [`Reply`].
pub mod reply {
    /// What a destination says.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Body {
        /// Answers Hello.
        #[prost(message, tag = "1")]
        Welcome(super::Welcome),
        /// Answers Offer.
        #[prost(message, tag = "2")]
        Verdict(super::Verdict),
        /// Answers Prepare.
        #[prost(message, tag = "3")]
        Ready(super::Ready),
        /// Answers Round.
        #[prost(message, tag = "4")]
        RoundDone(super::RoundDone),
        /// Answers Load.
        #[prost(message, tag = "5")]
        Loaded(super::Loaded),
        /// Answers Commit.
        #[prost(message, tag = "6")]
        Settled(super::Settled),
        /// The session is over; nothing has run here.
        #[prost(message, tag = "7")]
        Failed(super::Failed),
        /// Answers Ping.
        #[prost(message, tag = "8")]
        Pong(super::Pong),
        /// Answers CpuQuestion.
        #[prost(message, tag = "9")]
        CpuAnswer(super::CpuAnswer),
    }
}

/// Who wants to move what.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Hello {
    /// Id of the migration, the session's name on both hosts.
    #[prost(string, tag = "1")]
    pub migration: String,
    /// Name of the source host, as in its certificate.
    #[prost(string, tag = "2")]
    pub host: String,
    /// Whether the source's configuration allows unencrypted page connections.
    #[prost(bool, tag = "3")]
    pub plain_pages: bool,
}

/// Answers [`Hello`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Welcome {
    /// Name of the destination host.
    #[prost(string, tag = "1")]
    pub host: String,
    /// Whether both configurations allow unencrypted page connections.
    #[prost(bool, tag = "2")]
    pub plain_pages: bool,
}

/// What is to come.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Offer {
    /// The workload.
    #[prost(message, optional, tag = "1")]
    pub manifest: Option<Manifest>,
    /// Fencing token of this change of ownership.
    #[prost(uint64, tag = "2")]
    pub token: u64,
    /// Path mappings that the user asked for.
    #[prost(message, repeated, tag = "3")]
    pub paths: Vec<PathMapping>,
    /// Page connections wanted.
    #[prost(uint32, tag = "4")]
    pub streams: u32,
    /// Only check.
    #[prost(bool, tag = "5")]
    pub dry_run: bool,
    /// For each file tree, in the manifest's order: the name of a file that the source has just
    /// made beside it, by which the destination sees whether it is the same directory.
    #[prost(string, repeated, tag = "6")]
    pub probes: Vec<String>,
}

/// `--path OLD=NEW`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PathMapping {
    /// Path on the source.
    #[prost(string, tag = "1")]
    pub old: String,
    /// Path on the destination.
    #[prost(string, tag = "2")]
    pub new: String,
}

/// Whether the destination takes it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Verdict {
    /// Every reason against it; empty when it is welcome.
    #[prost(message, repeated, tag = "1")]
    pub refusals: Vec<Refusal>,
    /// What page and file connections prove that they belong to this session with: 32 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub secret: Vec<u8>,
    /// Page connections that it takes.
    #[prost(uint32, tag = "3")]
    pub streams: u32,
}

/// Build the empty workload.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Prepare {}

/// It is built.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ready {}

/// A round begins.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Round {
    /// Number, from 1.
    #[prost(uint32, tag = "1")]
    pub round: u32,
    /// Spaces that pages of this round may belong to and that were not named before.
    #[prost(message, repeated, tag = "2")]
    pub spaces: Vec<SpaceInfo>,
}

/// Every page of the round is in its place.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RoundDone {
    /// Which round.
    #[prost(uint32, tag = "1")]
    pub round: u32,
    /// Pages that arrived in it.
    #[prost(uint64, tag = "2")]
    pub pages: u64,
}

/// A piece of a state section; pieces of one section come in order, sections one after another.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Part {
    /// Kind of the section.
    #[prost(string, tag = "1")]
    pub kind: String,
    /// Version of its payload.
    #[prost(uint32, tag = "2")]
    pub version: u32,
    /// Length of the whole section in bytes.
    #[prost(uint64, tag = "3")]
    pub total: u64,
    /// This piece.
    #[prost(bytes = "vec", tag = "4")]
    pub bytes: Vec<u8>,
}

/// Load the workload.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Load {
    /// Number of sections that were sent.
    #[prost(uint32, tag = "1")]
    pub sections: u32,
    /// Number of the last round, whose pages may still be on their way.
    #[prost(uint32, tag = "2")]
    pub round: u32,
}

/// Everything is restored, nothing runs.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Loaded {
    /// How long loading took, in microseconds.
    #[prost(uint64, tag = "1")]
    pub load_us: u64,
    /// When memory came, for the report: `lazy`, `eager`, or nothing where that is not known.
    #[prost(string, tag = "2")]
    pub restore: String,
    /// Why it was not restored in the best way, for the report.
    #[prost(string, repeated, tag = "3")]
    pub fallbacks: Vec<String>,
}

/// Run.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Commit {
    /// Id of the migration.
    #[prost(string, tag = "1")]
    pub migration: String,
    /// Fencing token of this change of ownership.
    #[prost(uint64, tag = "2")]
    pub token: u64,
}

/// What the destination's journal durably says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Settlement {
    /// Never valid on the wire.
    Unspecified = 0,
    /// It runs here.
    Running = 1,
    /// It never ran here under this session, and never will.
    Aborted = 2,
    /// The destination host restarted in between; an operator must say.
    Undecided = 3,
}

/// Answers [`Commit`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Settled {
    /// What the journal says.
    #[prost(enumeration = "Settlement", tag = "1")]
    pub settlement: i32,
    /// For people: why, when it is not running.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Nothing will come.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Abort {
    /// For people.
    #[prost(string, tag = "1")]
    pub reason: String,
}

/// The session is over; nothing has run here and everything prepared is taken away.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Failed {
    /// What went wrong, outermost first.
    #[prost(string, tag = "1")]
    pub text: String,
}

/// Are you there.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Ping {}

/// Here.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Pong {}

/// What CPU can you offer a guest.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct CpuQuestion {}

/// Answers [`CpuQuestion`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CpuAnswer {
    /// What a fresh guest would see of its CPU, in the backend's own JSON.
    #[prost(bytes = "vec", tag = "1")]
    pub offer: Vec<u8>,
}

impl From<request::Body> for Request {
    fn from(body: request::Body) -> Self {
        Self { body: Some(body) }
    }
}

impl From<reply::Body> for Reply {
    fn from(body: reply::Body) -> Self {
        Self { body: Some(body) }
    }
}
