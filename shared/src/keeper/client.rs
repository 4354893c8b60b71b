//! The agent's end of a keeper: one connection, one question at a time.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use prost::Message;

use super::Phase;
use super::processes;
use super::protocol::{self, Ask, Reply, Request, Sections};
use crate::methods::{Methods, Ways};
use crate::pages::{PageSet, SpaceId};
use crate::workload::{Liveness, Place, Restoring, Result, Section, SpaceInfo, WorkloadError};

/// Longer than any keeper may take for a dump or a restore of a large tree.
const ANSWER_WITHIN: Duration = Duration::from_secs(300);
/// A keeper at whose socket nobody listens any more has ended within this, or will not do so by itself.
const ENDING: Duration = Duration::from_secs(2);
/// State sections of one workload together are never longer.
pub(super) const SECTIONS_CAP: u64 = 16 << 30;
/// No error has more causes.
const MESSAGES_MOST: usize = 32;
/// Characters of a message of an error that are of use to anybody.
const MESSAGE_MOST: usize = 16 << 10;

/// Whether there is a keeper at `place`: one that listens there, or lives all the same. Does not wait for one that is
/// busy, but for one that is ending. Whoever cannot look, as without a descriptor to spare, does not know, and must not
/// sweep away what may be running. Blocks for a while where nobody listens.
pub fn is_kept(place: &Place) -> bool {
    listens(place) || lives(place)
}

/// Whether a keeper listens at `place`, and can be asked. Does not wait for one that is busy; true also where that cannot
/// be found out.
pub fn listens(place: &Place) -> bool {
    let Ok(address) = UnixAddr::new(&place.socket()) else {
        // Nobody can listen at a path that no address can hold.
        return false;
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let looked = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .and_then(|socket| connect(socket.as_raw_fd(), &address));
    match looked {
        // With EAGAIN so many wait for it already that there is no room for one more.
        Ok(()) | Err(Errno::EAGAIN) => true,
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ECONNREFUSED) => false,
        Err(error) => {
            tracing::warn!(workload = place.name, %error, "Cannot tell whether it has a keeper");
            true
        }
    }
}

/// Whether the keeper at `place`, which nobody can reach any more, has not ended, and does not do so soon.
fn lives(place: &Place) -> bool {
    match processes::end_within(place, ENDING) {
        Ok(ended) => !ended,
        Err(error) => {
            tracing::warn!(workload = place.name, %error, "Cannot tell whether its keeper lives");
            true
        }
    }
}

/// A connection to one workload's keeper. When it is dropped while the workload is paused and not
/// fenced, the keeper resumes the workload by itself after its deadline.
#[derive(Debug)]
pub struct KeeperClient {
    place: Place,
    name: String,
    stream: UnixStream,
    /// Something went wrong on it: an answer that still comes belongs to an earlier question.
    broken: bool,
    stall: Duration,
    restoring: Restoring,
    /// Bytes of its state.
    most_state: u64,
}

impl KeeperClient {
    /// Connects to the keeper of the workload at `place`. Waits while the keeper still serves an
    /// earlier connection.
    ///
    /// # Errors
    /// [`WorkloadError::KeeperGone`] when no keeper listens there; another error when that could
    /// not be found out.
    pub fn connect(place: &Place) -> Result<Self> {
        Self::connect_within(place, ANSWER_WITHIN)
    }

    /// As [`KeeperClient::connect`], for whoever waits no longer than `within` for each answer, and for the
    /// connection itself.
    ///
    /// # Errors
    /// As [`KeeperClient::connect`].
    pub fn connect_within(place: &Place, within: Duration) -> Result<Self> {
        let failed = |error: io::Error| {
            let what = format!("Cannot connect to {}", place.socket().display());
            match error.kind() {
                io::ErrorKind::NotFound
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::ConnectionRefused => {
                    let name = place.name.clone();
                    WorkloadError::KeeperGone { name, what: format!("{what}: {error}") }
                }
                _ => WorkloadError::new(what, error),
            }
        };
        let connect = || -> io::Result<UnixStream> {
            let address = UnixAddr::new(&place.socket())?;
            let flags = SockFlag::SOCK_CLOEXEC;
            let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            let stream = UnixStream::from(stream);
            stream.set_read_timeout(Some(within))?;
            // It is as long that the kernel lets it wait to be connected, too.
            stream.set_write_timeout(Some(within))?;
            connect(stream.as_raw_fd(), &address)?;
            Ok(stream)
        };
        let stream = connect().map_err(failed)?;
        let (name, stall, restoring) = (place.name.clone(), Duration::ZERO, Restoring::default());
        let (place, most_state) = (place.clone(), SECTIONS_CAP);
        Ok(Self { place, name, stream, broken: false, stall, restoring, most_state })
    }

    /// A new connection to the same keeper, after this one broke. What was asked on the old one is
    /// done, or refused, before the new one is served.
    ///
    /// # Errors
    /// As [`KeeperClient::connect`].
    pub fn reconnect(&mut self) -> Result<()> {
        let most_state = self.most_state;
        *self = Self { most_state, ..Self::connect(&self.place)? };
        Ok(())
    }

    /// The same; state of more than `most` bytes is not taken.
    #[must_use]
    pub fn with_state_of_at_most(self, most: u64) -> Self {
        Self { most_state: most, ..self }
    }

    /// Whether a keeper listens at the place of this one.
    pub fn is_kept(&self) -> bool {
        is_kept(&self.place)
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

    /// Says what the host's configuration says now.
    pub fn configure(&mut self, methods: &Methods) -> Result<()> {
        let json = serde_json::to_string(methods)
            .map_err(|error| WorkloadError::new("Cannot write a choice of methods", error))?;
        self.tell(Request { json, ..Request::of(Ask::Configure) })
    }

    /// How it leaves, or was restored.
    pub fn ways(&mut self) -> Result<Ways> {
        let reply = self.ask(Request::of(Ask::Ways))?;
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
        let (_, descriptor) = self.exchange(request, None)?;
        // Whoever reads a device or a pipe waits there for as long as its other end likes.
        let has_places = |descriptor: &File| {
            let kind = descriptor.metadata().map(|found| found.file_type());
            kind.is_ok_and(|kind| kind.is_file() || kind.is_block_device())
        };
        match descriptor.map(File::from).filter(has_places) {
            Some(descriptor) => Ok(descriptor.into()),
            None => Err(self.gone("answering with a descriptor of its memory")),
        }
    }

    /// From now on these are among its spaces, until it resumes.
    pub fn carry(&mut self, spaces: &[SpaceId]) -> Result<()> {
        let named = |space: &SpaceId| SpaceInfo { id: space.0, ..SpaceInfo::default() };
        let spaces = spaces.iter().map(named).collect();
        self.tell(Request { spaces, ..Request::of(Ask::Carry) })
    }

    /// Whether the keeper knows [`KeeperClient::mirror`]. Nothing is followed for that.
    pub fn can_mirror(&mut self) -> Result<bool> {
        match self.tell(Request::of(Ask::Mirror)) {
            Err(gone @ WorkloadError::KeeperGone { .. }) => Err(gone),
            // One that knows it may find fault with a question that names no file.
            Err(error) => Ok(error.to_string() != protocol::OLDER),
            Ok(()) => Ok(true),
        }
    }

    /// From now on an answer is waited for as long as `limit`, or as ever. What was not answered in time may be done
    /// all the same, and the connection is of no more use.
    ///
    /// # Errors
    /// When the limit is none that can be set.
    pub fn answer_within(&mut self, limit: Option<Duration>) -> Result<()> {
        let within = limit.unwrap_or(ANSWER_WITHIN);
        let set = self.stream.set_read_timeout(Some(within));
        set.map_err(|error| WorkloadError::new("Cannot limit the time of an answer", error))
    }

    /// From now on the file that is `space` is followed alone, and will be replaced by `file`, which stands at
    /// `path`.
    pub fn mirror(&mut self, space: SpaceId, path: &Path, file: OwnedFd) -> Result<()> {
        let json = serde_json::to_string(path)
            .map_err(|error| WorkloadError::new("Cannot write a path as JSON", error))?;
        let request = Request { space: space.0, json, ..Request::of(Ask::Mirror) };
        self.exchange(request, Some(file)).map(|_| ())
    }

    /// Nothing is written to the files that are mirrored from the answer on.
    pub fn hold(&mut self) -> Result<()> {
        self.tell(Request::of(Ask::Hold))
    }

    /// The new files take the place of those that are mirrored, for `migration`.
    pub fn switch(&mut self, migration: &str) -> Result<()> {
        self.tell(Request { json: migration.to_owned(), ..Request::of(Ask::Switch) })
    }

    /// Starts dirty tracking.
    pub fn track(&mut self) -> Result<()> {
        self.tell(Request::of(Ask::Track))
    }

    /// Adds what was written since the last harvest, and re-arms. Takes out what no longer exists, as
    /// soon as that can be said: while the workload stands still.
    pub fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        let reply = self.ask(Request::of(Ask::Harvest))?;
        let mut exists = PageSet::new();
        let sane = protocol::unpack_pages(&reply.dirty, dirty)
            && protocol::unpack_pages(&reply.exists, &mut exists);
        if !sane {
            return Err(self.gone("answering with a page set that makes sense"));
        }
        if reply.bounded {
            dirty.intersect(&exists);
        }
        self.stall = Duration::from_micros(reply.stall_us);
        let (needed, wished) = (reply.restoring_us, reply.wished_us);
        let [needed, wished] = [needed, wished].map(Duration::from_micros);
        self.restoring = Restoring { needed, wished };
        Ok(())
    }

    /// The longest that any part of the workload stood still for the tracking, as the last harvest had it.
    pub fn stall(&self) -> Duration {
        self.stall
    }

    /// How much longer restoring will take than it takes any workload of the kind, as the last harvest had it.
    pub fn restoring(&self) -> Restoring {
        self.restoring
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
        read_sections(descriptor, self.most_state).map_err(|error| {
            WorkloadError::new("Cannot read the state that the keeper saved", error)
        })
    }

    /// Rolls back: runs on as if nothing had been. What is fenced only does so under the token that it
    /// was fenced with; otherwise the token is not looked at.
    pub fn resume(&mut self, token: u64) -> Result<()> {
        self.tell(Request { token, ..Request::of(Ask::Resume) })
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

    /// Takes the copy away that is fenced under `token`, quietly; the keeper ends.
    pub fn release(&mut self, token: u64) -> Result<()> {
        self.tell(Request { token, ..Request::of(Ask::Release) })
    }

    /// Takes the never activated copy away; the keeper ends.
    pub fn discard(&mut self) -> Result<()> {
        self.tell(Request::of(Ask::Discard))
    }

    /// Ends the running workload; the keeper ends.
    pub fn stop(&mut self, grace: Duration) -> Result<()> {
        self.tell(Request { grace_ms: grace.as_millis() as u64, ..Request::of(Ask::Stop) })
    }

    /// Gives an adopted workload back as it runs; the keeper ends.
    pub fn let_go(&mut self) -> Result<()> {
        self.tell(Request::of(Ask::LetGo))
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
        if self.broken {
            return Err(gone(&self.name, "the connection broke before".to_owned()));
        }
        // Until it is answered.
        self.broken = true;
        protocol::send(&mut self.stream, &request, descriptor.as_ref().map(AsFd::as_fd))
            .map_err(|error| gone(&self.name, error.to_string()))?;
        let within = self.stream.read_timeout().unwrap_or(Some(ANSWER_WITHIN));
        let (reply, descriptor) = protocol::receive::<Reply>(&mut self.stream, within)
            .map_err(|error| gone(&self.name, error.to_string()))?
            .ok_or_else(|| gone(&self.name, "it ended".to_owned()))?;
        self.broken = false;
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

/// The error behind a chain of messages, outermost first. A keeper that its guest has taken over says what it likes:
/// dropping an error goes as deep as the error is, and what it says is shown on terminals.
fn chained(messages: Vec<String>) -> Option<WorkloadError> {
    let acts = |letter: char| letter.is_control() && !matches!(letter, '\n' | '\t');
    let plain = |text: String| -> String {
        let letters = text.chars().take(MESSAGE_MOST);
        letters.map(|letter| if acts(letter) { ' ' } else { letter }).collect()
    };
    let messages = messages.into_iter().take(MESSAGES_MOST).map(plain);
    messages.rev().fold(None, |inner: Option<WorkloadError>, what| {
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

/// Reads what [`write_sections`] wrote, if that is no more than `most` bytes.
pub(super) fn read_sections(descriptor: OwnedFd, most: u64) -> io::Result<Vec<Section>> {
    let bad = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut file = File::from(descriptor);
    let mut left = file.metadata()?.len();
    if left > most {
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    #[test]
    fn a_late_answer_is_nobodys() {
        let directory = tempfile::tempdir().expect("a directory");
        let place = at(directory.path().to_owned());
        let listener = std::os::unix::net::UnixListener::bind(place.socket()).expect("listens");
        let mut client = KeeperClient::connect(&place).expect("connects");
        client.stream.set_read_timeout(Some(Duration::from_millis(50))).expect("set");
        let (mut keeper, _) = listener.accept().expect("accepts");
        let slow = client.pause().expect_err("no answer");
        assert!(matches!(slow, WorkloadError::KeeperGone { .. }), "{slow}");
        protocol::send(&mut keeper, &Reply::default(), None).expect("answers at last");
        let next = client.fence(1).expect_err("that was the answer to another question");
        assert!(matches!(next, WorkloadError::KeeperGone { .. }), "{next}");
        client.reconnect().expect("connects");
        let (mut keeper, _) = listener.accept().expect("accepts");
        protocol::send(&mut keeper, &Reply::default(), None).expect("answers");
        client.fence(1).expect("its own answer");
    }

    /// What keepers say that have heard of no such thing, and those that find fault with a question without a file.
    #[test]
    fn an_older_keeper_is_told_from_one_that_refuses() {
        let directory = tempfile::tempdir().expect("a directory");
        let place = at(directory.path().to_owned());
        let listener = std::os::unix::net::UnixListener::bind(place.socket()).expect("listens");
        let mut client = KeeperClient::connect(&place).expect("connects");
        let (mut keeper, _) = listener.accept().expect("accepts");
        for (says, knows) in [
            ("This keeper is older than that", false),
            ("A file to be mirrored to came without a descriptor", true),
        ] {
            let reply = Reply { error: vec![says.to_owned()], ..Reply::default() };
            protocol::send(&mut keeper, &reply, None).expect("answers");
            assert_eq!(client.can_mirror().expect("an answer"), knows, "{says}");
        }
    }

    #[test]
    fn memory_is_what_has_places_to_read_at() {
        let directory = tempfile::tempdir().expect("a directory");
        let place = at(directory.path().to_owned());
        let listener = std::os::unix::net::UnixListener::bind(place.socket()).expect("listens");
        let mut client = KeeperClient::connect(&place).expect("connects");
        let (mut keeper, _) = listener.accept().expect("accepts");
        let (pipe, _writer) = io::pipe().expect("a pipe");
        let null = File::open("/dev/null").expect("a device");
        let memory = tempfile::tempfile().expect("a file");
        for (shown, is_memory) in
            [(pipe.as_fd(), false), (null.as_fd(), false), (memory.as_fd(), true)]
        {
            protocol::send(&mut keeper, &Reply::default(), Some(shown)).expect("answers");
            assert_eq!(client.memory(SpaceId(0)).is_ok(), is_memory, "{shown:?}");
        }
    }

    #[test]
    fn an_error_is_no_deeper_than_errors_are_and_moves_no_terminal() {
        let deep = chained(vec![String::new(); 1 << 20]).expect("an error");
        let (mut depth, mut at) = (0, Some(&deep as &dyn std::error::Error));
        while let Some(error) = at {
            (depth, at) = (depth + 1, error.source());
        }
        assert_eq!(depth, MESSAGES_MOST);
        let odd = chained(vec!["a\u{1b}[2J\nb\u{9b}c".to_owned()]).expect("an error");
        assert_eq!(odd.to_string(), "a [2J\nb c");
        assert!(chained(Vec::new()).is_none());
    }

    #[test]
    fn an_answer_is_waited_for_as_long_as_was_said() {
        let directory = tempfile::tempdir().expect("a directory");
        let place = at(directory.path().to_owned());
        let listener = std::os::unix::net::UnixListener::bind(place.socket()).expect("listens");
        let mut client = KeeperClient::connect(&place).expect("connects");
        let (_keeper, _) = listener.accept().expect("accepts");
        let limit = Duration::from_millis(50);
        client.answer_within(Some(limit)).expect("set");
        let begun = std::time::Instant::now();
        let late = client.hold().expect_err("no answer");
        assert!(matches!(late, WorkloadError::KeeperGone { .. }), "{late}");
        assert!(begun.elapsed() >= limit && begun.elapsed() < Duration::from_secs(30));
        client.answer_within(None).expect("set");
        assert_eq!(client.stream.read_timeout().expect("told"), Some(ANSWER_WITHIN));
    }

    fn at(dir: std::path::PathBuf) -> Place {
        Place { name: "web".to_owned(), uuid: "u".to_owned(), dir }
    }

    #[test]
    fn who_cannot_look_does_not_say_that_nobody_is_there() {
        let directory = tempfile::tempdir().expect("a directory");
        let [missing, file, looped] =
            ["missing", "file", "looped"].map(|name| directory.path().join(name));
        assert!(!is_kept(&at(missing)));
        std::fs::write(&file, "").expect("written");
        assert!(!is_kept(&at(file.clone())), "no directory");
        let gone = KeeperClient::connect(&at(file)).expect_err("no keeper");
        assert!(matches!(gone, WorkloadError::KeeperGone { .. }), "{gone}");
        symlink(&looped, &looped).expect("linked");
        assert!(is_kept(&at(looped)), "that says nothing of a keeper");
    }

    #[test]
    fn a_keeper_that_many_wait_for_is_not_waited_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let place = at(directory.path().to_owned());
        let address = UnixAddr::new(&place.socket()).expect("short");
        let busy = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
        let busy = busy.expect("a socket");
        bind(busy.as_raw_fd(), &address).expect("bound");
        listen(&busy, Backlog::new(0).expect("none")).expect("listens");
        for _ in 0..4 {
            assert!(is_kept(&place));
        }
        let error = KeeperClient::connect_within(&place, Duration::from_millis(50));
        let error = error.expect_err("no room for one more");
        assert!(!matches!(error, WorkloadError::KeeperGone { .. }), "{error}");
        drop(busy);
        // A program that another test starts at that moment has its descriptor as well, until it is that program.
        let begun = std::time::Instant::now();
        while is_kept(&place) {
            assert!(begun.elapsed() < Duration::from_secs(120), "nobody listens any more");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
