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
use super::{Beginning, ExitRecord, Harvest, KeeperConfig, Kept, Phase, client, spawn};
use crate::pages::{PageSet, SpaceId};
use crate::workload::{Result, WorkloadError};

/// A peer that began a frame must end it within this.
const FRAME_WITHIN: Duration = Duration::from_secs(30);

/// What could not be undone after the agent was lost is tried again after this.
const SETTLE_AGAIN: Duration = Duration::from_secs(1);

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
    let ended = serve_on(&listener, config, kept, exit);
    let _ = fs::remove_file(&socket);
    ended.map_err(failed)
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
    Server::new(config, kept).run(listener, exit)
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

impl<'a> Server<'a> {
    fn new(config: &'a KeeperConfig, kept: Box<dyn Kept>) -> Self {
        let phase = match config.beginning {
            Beginning::Run | Beginning::Adopt => Phase::Running,
            Beginning::Incoming => Phase::Incoming,
        };
        Self { config, kept, phase, disturbed: false, over: false }
    }

    fn run(&mut self, listener: &UnixListener, exit: &ExitSignal) -> io::Result<()> {
        let mut agent: Option<UnixStream> = None;
        let mut asked = false;
        let mut lost_at = Instant::now();
        while !self.over {
            let waiting_on = agent.as_ref().map_or(listener.as_fd(), AsFd::as_fd);
            match wait(waiting_on, exit, self.patience(agent.is_some(), lost_at))? {
                Woken::Exit => {
                    self.record_exit(exit);
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

    fn record_exit(&mut self, exit: &ExitSignal) {
        if matches!(self.phase, Phase::Incoming | Phase::Prepared) {
            // A record would say that it had run here.
            tracing::error!("The workload ended before it ever ran here");
            return;
        }
        let record = exit.raised().unwrap_or(ExitRecord { status: 1, text: "ended".to_owned() });
        tracing::info!(text = %record.text, "The workload ended");
        let path = self.config.place.exit_record();
        // Under its name it is whole.
        let fresh = path.with_extension("new");
        let written = serde_json::to_vec(&record)
            .map_err(io::Error::from)
            .and_then(|bytes| fs::write(&fresh, bytes))
            .and_then(|()| fs::rename(&fresh, &path));
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
                reply.restoring_us = restoring.as_micros() as u64;
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread::{self, JoinHandle};

    use super::*;
    use crate::keeper::KeeperClient;
    use crate::methods::{Methods, Ways};
    use crate::pages::PageRange;
    use crate::workload::{HostTools, Kind, Liveness, Place, Section, SpaceInfo};

    /// Says what it was asked to do.
    struct Told(mpsc::Sender<&'static str>);

    impl Told {
        fn tell(&self, what: &'static str) -> Result<()> {
            self.0.send(what).map_err(|error| WorkloadError::new("Cannot tell", error))
        }
    }

    impl Kept for Told {
        fn liveness(&self) -> Liveness {
            Liveness::Tracked { tracker: "test".to_owned() }
        }

        fn configure(&mut self, methods: Methods) -> Result<()> {
            self.tell(methods.tracker.word())
        }

        fn ways(&self) -> Ways {
            Ways { restore: Some(Ways::EAGER.to_owned()), ..Ways::default() }
        }

        fn facts(&mut self) -> Result<serde_json::Value> {
            Ok(serde_json::json!({ "pid": 1 }))
        }

        fn spaces(&mut self) -> Result<Vec<SpaceInfo>> {
            Ok(Vec::new())
        }

        fn make_spaces(&mut self, _spaces: &[SpaceInfo]) -> Result<()> {
            self.tell("make_spaces")
        }

        fn memory(&mut self, space: SpaceId) -> Result<OwnedFd> {
            Err(WorkloadError::plain(format!("There is no {space}")))
        }

        fn track(&mut self) -> Result<()> {
            self.tell("track")
        }

        fn harvest(&mut self, dirty: &mut PageSet) -> Result<Harvest> {
            dirty.insert(PageRange::new(SpaceId(3), 70, 5));
            let exists = [PageRange::new(SpaceId(3), 60, 12)];
            let exists = Some(exists.into_iter().collect());
            let restoring = Duration::from_micros(250);
            Ok(Harvest { exists, stall: Duration::from_micros(140), restoring })
        }

        fn pause(&mut self) -> Result<()> {
            self.tell("pause")
        }

        fn save(&mut self) -> Result<Vec<Section>> {
            Ok(vec![Section { kind: "vcpu/0".to_owned(), version: 2, bytes: vec![7; 3_000_000] }])
        }

        fn resume(&mut self) -> Result<()> {
            self.tell("resume")
        }

        fn load(&mut self, sections: Vec<Section>) -> Result<()> {
            if sections == self.save()? {
                self.tell("load")
            } else {
                Err(WorkloadError::plain("Not what was saved"))
            }
        }

        fn activate(&mut self) -> Result<()> {
            self.tell("activate")
        }

        fn release(&mut self) -> Result<()> {
            self.tell("release")
        }

        fn discard(&mut self) -> Result<()> {
            self.tell("discard")
        }

        fn stop(&mut self, _grace: Duration) -> Result<()> {
            self.tell("stop")
        }
    }

    struct Fixture {
        place: Place,
        told: mpsc::Receiver<&'static str>,
        exit: ExitSignal,
        server: JoinHandle<io::Result<()>>,
        _directory: tempfile::TempDir,
    }

    fn config_of(beginning: Beginning, directory: &std::path::Path) -> KeeperConfig {
        let place =
            Place { name: "web".to_owned(), uuid: "u".to_owned(), dir: directory.to_owned() };
        KeeperConfig {
            kind: Kind::Vm,
            beginning,
            place,
            tools: HostTools {
                decamp: "decamp".into(),
                criu: "criu".into(),
                runc: "runc".into(),
                crun: "crun".into(),
                resume_after: Duration::from_millis(200),
                methods: Methods::default(),
            },
            spec: serde_json::Value::Null,
        }
    }

    fn keep(beginning: Beginning) -> Fixture {
        let directory = tempfile::tempdir().expect("a directory");
        let config = config_of(beginning, directory.path());
        let place = config.place.clone();
        let listener = UnixListener::bind(place.socket()).expect("a socket");
        let (tell, told) = mpsc::channel();
        let exit = ExitSignal::new().expect("a signal");
        let watched = exit.clone();
        let server = thread::spawn(move || {
            Server::new(&config, Box::new(Told(tell))).run(&listener, &watched)
        });
        Fixture { place, told, exit, server, _directory: directory }
    }

    impl Fixture {
        fn client(&self) -> KeeperClient {
            KeeperClient::connect(&self.place).expect("a keeper")
        }

        fn said(&self) -> &'static str {
            self.told.recv_timeout(Duration::from_secs(5)).expect("something is done")
        }
    }

    #[test]
    fn a_paused_workload_that_loses_its_agent_resumes() {
        let kept = keep(Beginning::Run);
        let mut client = kept.client();
        client.pause().expect("pauses");
        assert_eq!(kept.said(), "pause");
        let lost = Instant::now();
        drop(client);
        assert_eq!(kept.said(), "resume");
        assert!(lost.elapsed() >= Duration::from_millis(200), "not before its deadline");
        assert_eq!(kept.client().phase().expect("answers"), Phase::Running);
    }

    /// Whether the workload stands still after that nobody knows.
    #[test]
    fn a_pause_that_failed_is_undone_when_the_agent_is_lost() {
        let directory = tempfile::tempdir().expect("a directory");
        let config = config_of(Beginning::Run, directory.path());
        let (tell, told) = mpsc::channel();
        drop(told);
        let mut server = Server::new(&config, Box::new(Told(tell)));
        assert_eq!(server.patience(false, Instant::now()), None);
        let pause = Request { ask: Ask::Pause.into(), ..Request::default() };
        assert!(server.act(&pause, None, &mut None).is_err(), "it cannot be paused");
        assert_eq!(server.phase, Phase::Running);
        server.settle_after_loss();
        let again = server.patience(false, Instant::now());
        assert_eq!(again, Some(SETTLE_AGAIN), "what cannot be undone is tried again");
    }

    #[test]
    fn who_only_looks_does_not_put_it_off() {
        let kept = keep(Beginning::Run);
        let mut client = kept.client();
        client.pause().expect("pauses");
        assert_eq!(kept.said(), "pause");
        drop(client);
        for _ in 0..20 {
            drop(UnixStream::connect(kept.place.socket()).expect("connects"));
            thread::sleep(Duration::from_millis(30));
        }
        assert_eq!(kept.told.try_recv(), Ok("resume"));
    }

    #[test]
    fn what_never_ran_leaves_no_record_of_an_end() {
        let kept = keep(Beginning::Incoming);
        kept.exit.raise(ExitRecord { status: 137, text: "killed by SIGKILL".to_owned() });
        assert!(kept.server.join().expect("ends").is_ok());
        assert!(!kept.place.exit_record().exists());
    }

    #[test]
    fn an_agent_that_is_there_keeps_it_paused() {
        let kept = keep(Beginning::Run);
        let mut client = kept.client();
        client.pause().expect("pauses");
        assert_eq!(kept.said(), "pause");
        assert!(kept.told.recv_timeout(Duration::from_millis(500)).is_err());
        assert_eq!(client.phase().expect("answers"), Phase::Paused);
    }

    #[test]
    fn a_fenced_workload_stays_and_is_found() {
        let kept = keep(Beginning::Run);
        let mut client = kept.client();
        assert!(client.fence(4).is_err(), "what runs cannot be fenced");
        client.pause().expect("pauses");
        assert!(client.release(5).is_err(), "what is not fenced is not released");
        client.fence(5).expect("fences");
        assert!(client.fence(4).is_err(), "an older token");
        assert!(client.stop(Duration::ZERO).is_err(), "a fenced workload is not stopped");
        assert_eq!(kept.said(), "pause");
        drop(client);
        assert!(kept.told.recv_timeout(Duration::from_millis(500)).is_err(), "it never resumes");
        let mut client = kept.client();
        assert_eq!(client.phase().expect("answers"), Phase::Fenced { token: 5 });
        assert!(client.release(4).is_err(), "another's fence");
        client.release(5).expect("releases");
        assert_eq!(kept.said(), "release");
        assert!(kept.server.join().expect("ends").is_ok());
    }

    #[test]
    fn only_whoever_fenced_it_lets_it_run_again() {
        let kept = keep(Beginning::Run);
        let mut client = kept.client();
        client.resume(3).expect("what is not fenced runs on under any token");
        client.pause().expect("pauses");
        client.fence(5).expect("fences");
        for token in [0, 4, 6] {
            let error = client.resume(token).expect_err("not its own").to_string();
            assert!(error.contains("fenced under token 5"), "{error}");
        }
        assert_eq!(client.phase().expect("answers"), Phase::Fenced { token: 5 });
        client.resume(5).expect("its own");
        assert_eq!(client.phase().expect("answers"), Phase::Running);
        let said: Vec<_> = kept.told.try_iter().collect();
        assert_eq!(said, ["resume", "pause", "resume"]);
    }

    #[test]
    fn what_a_dead_agent_asked_is_done_before_the_next_is_served() {
        let kept = keep(Beginning::Incoming);
        let mut client = kept.client();
        let sections = Told(mpsc::channel().0).save().expect("saves");
        assert!(client.activate(1).is_err(), "nothing is loaded yet");
        client.load(sections).expect("loads");
        assert_eq!(kept.said(), "load");
        // An agent that asks and dies without waiting for the answer.
        let mut dying = UnixStream::connect(kept.place.socket()).expect("connects");
        let ask = Request { ask: Ask::Activate.into(), token: 1, ..Request::default() };
        protocol::send(&mut dying, &ask, None).expect("asks");
        drop(dying);
        drop(client);
        assert_eq!(kept.client().phase().expect("answers"), Phase::Running);
        assert_eq!(kept.said(), "activate");
        assert!(kept.client().discard().is_err(), "what ran is not discarded");
    }

    #[test]
    fn dirty_pages_and_state_come_through_whole() {
        let kept = keep(Beginning::Run);
        let mut client = kept.client();
        client.track().expect("tracks");
        let page = |first| PageRange::new(SpaceId(3), first, 1);
        let mut dirty: PageSet = [page(61), page(80)].into_iter().collect();
        client.harvest(&mut dirty).expect("harvests");
        // Of what was held before and of what is new, that which exists.
        let ranges: Vec<_> = dirty.ranges().collect();
        assert_eq!(ranges, [page(61), PageRange::new(SpaceId(3), 70, 2)]);
        assert_eq!(client.stall(), Duration::from_micros(140));
        assert_eq!(client.restoring(), Duration::from_micros(250));
        let error = client.memory(SpaceId(9)).expect_err("no such space").to_string();
        assert!(error.contains("space 9"), "{error}");
        client.pause().expect("pauses");
        assert_eq!(client.save().expect("saves")[0].bytes.len(), 3_000_000);
    }

    #[test]
    fn what_the_configuration_says_now_is_heard() {
        let kept = keep(Beginning::Run);
        let mut client = kept.client();
        let tracker = crate::methods::TrackerChoice::PageHash;
        client.configure(&Methods { tracker, ..Methods::default() }).expect("is heard");
        assert_eq!(kept.said(), "page-hash");
        assert_eq!(client.ways().expect("answers").restore.as_deref(), Some("eager"));
        client.pause().expect("pauses");
        assert!(client.configure(&Methods::default()).is_err(), "a move is under way");
    }

    #[test]
    fn tracking_ends_with_its_agent() {
        let kept = keep(Beginning::Run);
        let mut client = kept.client();
        client.track().expect("tracks");
        assert_eq!(kept.said(), "track");
        drop(client);
        assert_eq!(kept.said(), "resume");
    }

    #[test]
    fn an_end_by_itself_is_written_down() {
        let kept = keep(Beginning::Run);
        let record = ExitRecord { status: 137, text: "killed by SIGKILL".to_owned() };
        kept.exit.raise(record.clone());
        assert!(kept.server.join().expect("ends").is_ok());
        let bytes = fs::read(kept.place.exit_record()).expect("is there");
        assert_eq!(serde_json::from_slice::<ExitRecord>(&bytes).expect("parses"), record);
    }

    #[test]
    fn hostile_frames_end_the_connection_and_nothing_else() {
        use std::io::Write;
        let kept = keep(Beginning::Run);
        let mut liar = UnixStream::connect(kept.place.socket()).expect("connects");
        liar.write_all(&u32::MAX.to_le_bytes()).expect("writes");
        let mut garbler = UnixStream::connect(kept.place.socket()).expect("connects");
        garbler.write_all(&[4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]).expect("writes");
        drop(garbler);
        assert_eq!(kept.client().phase().expect("answers"), Phase::Running);
    }
}
