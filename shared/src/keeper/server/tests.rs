//! A keeper that serves a workload which only says what it was asked to do.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{ExitSignal, SETTLE_AGAIN, Server};
use crate::keeper::protocol::{self, Ask, Request};
use crate::keeper::{Beginning, ExitRecord, Harvest, KeeperClient, KeeperConfig, Kept, Phase};
use crate::methods::{Methods, Ways};
use crate::pages::{PageRange, PageSet, SpaceId};
use crate::workload::{
    HostTools, Kind, Liveness, Place, Restoring, Result, Section, SpaceInfo, WorkloadError,
};

/// More time than anything that is awaited takes, on however slow and busy a machine.
const PATIENCE: Duration = Duration::from_secs(120);

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
        let [needed, wished] = [250, 90].map(Duration::from_micros);
        let restoring = Restoring { needed, wished };
        Ok(Harvest { exists, stall: Duration::from_micros(140), restoring })
    }

    fn pause(&mut self) -> Result<()> {
        self.tell("pause")
    }

    fn save(&mut self) -> Result<Vec<Section>> {
        Ok(vec![Section { kind: "vcpu/0".to_owned(), version: 2, bytes: vec![7; 3_000_000] }])
    }

    fn carry(&mut self, spaces: &[SpaceId]) -> Result<()> {
        assert_eq!(spaces, [SpaceId(2), SpaceId(4)]);
        self.tell("carry")
    }

    fn fenced(&mut self) -> Result<()> {
        self.tell("fenced")
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
    let place = Place { name: "web".to_owned(), uuid: "u".to_owned(), dir: directory.to_owned() };
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
            bridges: Default::default(),
            users: Default::default(),
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
    let server =
        thread::spawn(move || Server::new(&config, Box::new(Told(tell)), watched).run(&listener));
    Fixture { place, told, exit, server, _directory: directory }
}

impl Fixture {
    fn client(&self) -> KeeperClient {
        KeeperClient::connect(&self.place).expect("a keeper")
    }

    fn said(&self) -> &'static str {
        self.told.recv_timeout(PATIENCE).expect("something is done")
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
    let exit = ExitSignal::new().expect("a signal");
    let mut server = Server::new(&config, Box::new(Told(tell)), exit);
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
    let begun = Instant::now();
    let told = loop {
        drop(UnixStream::connect(kept.place.socket()).expect("connects"));
        match kept.told.recv_timeout(Duration::from_millis(30)) {
            Err(mpsc::RecvTimeoutError::Timeout) if begun.elapsed() < PATIENCE => {}
            told => break told,
        }
    };
    assert_eq!(told, Ok("resume"));
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
    assert_eq!(kept.said(), "fenced");
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
    assert_eq!(said, ["resume", "pause", "fenced", "resume"]);
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
fn what_is_carried_is_let_go_when_the_agent_is_lost() {
    let kept = keep(Beginning::Run);
    let mut client = kept.client();
    client.carry(&[SpaceId(2), SpaceId(4)]).expect("carries");
    assert_eq!(kept.said(), "carry");
    drop(client);
    assert_eq!(kept.said(), "resume");
    let mut client = kept.client();
    client.pause().expect("pauses");
    assert!(client.carry(&[SpaceId(2)]).is_err(), "too late");
}

#[test]
fn whether_files_can_move_alone_is_asked_and_nothing_done() {
    let kept = keep(Beginning::Run);
    let mut client = kept.client();
    assert!(client.can_mirror().expect("answers"));
    drop(client);
    assert!(kept.told.recv_timeout(Duration::from_millis(300)).is_err(), "nothing is to be undone");
    let ask = |number| Request { ask: number, space: 1, ..Request::default() };
    let config = config_of(Beginning::Run, kept._directory.path());
    let exit = ExitSignal::new().expect("a signal");
    let mut server = Server::new(&config, Box::new(Told(mpsc::channel().0)), exit);
    // What a later build may ask.
    let older = server.act(&ask(9999), None, &mut None).expect_err("nobody knows that");
    assert_eq!(older.to_string(), protocol::OLDER);
    let named = Request { json: "\"/x\"".to_owned(), ..ask(Ask::Mirror.into()) };
    server.act(&named, None, &mut None).expect_err("a file is named, and none came");
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
    let [needed, wished] = [250, 90].map(Duration::from_micros);
    assert_eq!(client.restoring(), Restoring { needed, wished });
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

/// What runs elsewhere by now is not for its old keeper to declare ended.
#[test]
fn an_end_while_it_is_fenced_counts_once_it_is_given_back() {
    let record = ExitRecord { status: 1, text: "triple fault".to_owned() };
    let fenced = || {
        let kept = keep(Beginning::Run);
        let mut client = kept.client();
        client.pause().expect("pauses");
        client.fence(5).expect("fences");
        kept.exit.raise(record.clone());
        thread::sleep(Duration::from_millis(50));
        assert_eq!(client.phase().expect("answers"), Phase::Fenced { token: 5 });
        (kept, client)
    };
    let (kept, mut client) = fenced();
    client.release(5).expect("releases");
    assert!(kept.server.join().expect("ends").is_ok());
    assert!(!kept.place.exit_record().exists(), "it did not end: it left");

    // Given back it cannot run on, which changes nothing.
    for can_resume in [true, false] {
        let (mut kept, mut client) = fenced();
        if !can_resume {
            kept.told = mpsc::channel().1;
        }
        client.resume(5).expect("its own again");
        assert!(kept.server.join().expect("ends").is_ok());
        let bytes = fs::read(kept.place.exit_record()).expect("is there");
        assert_eq!(serde_json::from_slice::<ExitRecord>(&bytes).expect("parses"), record);
    }
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
