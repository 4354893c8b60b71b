//! An agent in a directory of its own, with a backend that starts nothing, for the tests of the agent's
//! rooms.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use decamp_shared::keeper::{
    Beginning, ExitRecord, ExitSignal, Harvest, KeeperClient, KeeperConfig, Kept, Phase, serve_on,
};
use decamp_shared::pages::{PageSet, SpaceId};
use decamp_shared::session::commit::Record;
use decamp_shared::session::journal::{Role, SessionRow, boot_id};
use decamp_shared::workload::{
    Backend, DestinationWorkload, HostTools, Kind, Liveness, Manifest, Place, PlacedTree, Refusal,
    Result, Section, SourceWorkload, SpaceInfo, WorkloadError,
};
use serde_json::{Value, json};

use super::Agent;
use super::config::{Config, Overrides};
use super::registry::Workload;
use super::restores::landing_record;
use crate::backend::Backends;
use crate::messages::State;

/// Of every session in these tests.
pub(crate) const MIGRATION: &str = "6d3d5d0e-0000-4000-8000-00000000000a";
/// Of every workload in these tests.
pub(crate) const UUID: &str = "6d3d5d0e-0000-4000-8000-000000000001";

/// An agent for the host `alpha`, which knows a host `beta` where nobody listens.
pub(crate) struct Bench {
    pub(crate) agent: Arc<Agent>,
    pub(crate) backend: Arc<Fake>,
    dir: tempfile::TempDir,
}

/// Says what it was asked to do. What it runs is a socket that listens, as a keeper's does.
#[derive(Default)]
pub(crate) struct Fake {
    pub(crate) swept: AtomicUsize,
    pub(crate) stopped: AtomicUsize,
    pub(crate) cannot_sweep: AtomicBool,
    keeper: Mutex<Option<UnixListener>>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let pki = dir.path().join("pki");
        crate::pki::init(&pki).expect("an authority");
        crate::pki::issue(&pki, "alpha", &["127.0.0.1".to_owned()]).expect("a certificate");
        let text = format!(
            "name = \"alpha\"\nlisten = \"127.0.0.1:0\"\nsocket = \"{0}/decamp.sock\"\n\
             state_dir = \"{0}/state\"\nca = \"pki/ca.pem\"\ncertificate = \"pki/alpha.pem\"\n\
             key = \"pki/alpha.key\"\n[hosts]\nbeta = \"127.0.0.1:1\"\n",
            dir.path().display()
        );
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, text).expect("written");
        let config = Config::load(&path, Overrides::default()).expect("a configuration");
        let backend = Arc::new(Fake::default());
        let (mut agent, _) = Agent::open(config).expect("an agent");
        Arc::get_mut(&mut agent).expect("nobody else has it").backends =
            Backends::both(backend.clone());
        Self { agent, backend, dir }
    }

    /// Enters the workload `web`, of the one session, with a place.
    pub(crate) fn enter(&self, state: State) -> Workload {
        let mut web = Workload::new("web", UUID, Kind::Vm, json!({}), state);
        web.migration = Some(MIGRATION.to_owned());
        self.agent.registry.create(&web).expect("entered");
        self.agent.state_dir.make_place(&self.agent.place(&web)).expect("a place");
        web
    }

    /// Its session, with `beta`.
    pub(crate) fn journal(&self, role: Role, record: Record) {
        let row = SessionRow {
            migration: MIGRATION.to_owned(),
            role,
            workload: "web".to_owned(),
            uuid: UUID.to_owned(),
            peer: "beta".to_owned(),
            peer_address: "127.0.0.1:1".to_owned(),
            token: 1,
            record,
            boot_id: boot_id(),
            updated_ms: 0,
            manifest: Vec::new(),
        };
        self.agent.journal.begin(&row).expect("written");
    }

    pub(crate) fn state(&self) -> Option<State> {
        self.agent.registry.get("web").expect("reads").map(|web| web.state)
    }

    pub(crate) fn record(&self, role: Role) -> Option<Record> {
        self.agent.journal.session(MIGRATION, role).expect("reads").map(|row| row.record)
    }

    /// From now on the registry takes no workload in that state.
    pub(crate) fn fill_disk(&self, state: State) {
        self.registry_says(&format!(
            "CREATE TRIGGER full BEFORE INSERT ON workloads WHEN NEW.state = '{state}'
             BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END;"
        ));
    }

    pub(crate) fn free_disk(&self) {
        self.registry_says("DROP TRIGGER full;");
    }

    fn registry_says(&self, statement: &str) {
        let path = self.dir.path().join("state/registry.db");
        let database = rusqlite::Connection::open(path).expect("opens");
        database.execute_batch(statement).expect("is done");
    }

    /// Waits for what happens beside the test.
    pub(crate) async fn until(&self, what: &str, there: impl Fn(&Self) -> bool) {
        // More time than it takes on however slow and busy a machine.
        for _ in 0..6000 {
            if there(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("waited in vain for {what}");
    }
}

/// Somebody who listens at a place and never answers, as a keeper that is busy.
pub(crate) fn keeper(place: &Place) -> UnixListener {
    UnixListener::bind(place.socket()).expect("a socket")
}

/// A keeper that hangs up on a question, and on the look whether anybody is there.
pub(crate) fn deaf(place: &Place) -> JoinHandle<()> {
    let listener = keeper(place);
    std::thread::spawn(move || {
        for _ in 0..2 {
            drop(listener.accept().expect("accepts"));
        }
    })
}

/// A real keeper, of nothing, that stands still under `token`.
pub(crate) fn fenced(place: &Place, token: u64) -> Holder {
    let listener = keeper(place);
    let (said, exit) = (Said::default(), ExitSignal::new().expect("a signal"));
    let refuses = Arc::new(AtomicUsize::new(0));
    let config = KeeperConfig {
        kind: Kind::Vm,
        beginning: Beginning::Run,
        place: place.clone(),
        tools: HostTools {
            decamp: "decamp".into(),
            criu: "criu".into(),
            runc: "runc".into(),
            crun: "crun".into(),
            resume_after: Duration::from_secs(60),
            methods: Default::default(),
            bridges: Default::default(),
            users: Default::default(),
        },
        spec: Value::Null,
    };
    let nothing = Nothing { said: Arc::clone(&said), refuses: Arc::clone(&refuses) };
    let signal = exit.clone();
    let server =
        std::thread::spawn(move || serve_on(&listener, &config, Box::new(nothing), &signal));
    let mut client = KeeperClient::connect(place).expect("a keeper");
    client.pause().expect("pauses");
    client.fence(token).expect("fences");
    said.lock().expect("no panic").clear();
    Holder { said, refuses, exit, place: place.clone(), server: Some(server) }
}

/// What was asked of a keeper, and the keeper, which ends with this.
pub(crate) struct Holder {
    said: Said,
    /// So many times it fails.
    pub(crate) refuses: Arc<AtomicUsize>,
    exit: ExitSignal,
    place: Place,
    server: Option<JoinHandle<std::io::Result<()>>>,
}

type Said = Arc<Mutex<Vec<&'static str>>>;

impl Holder {
    pub(crate) fn said(&self) -> Vec<&'static str> {
        self.said.lock().expect("no panic").clone()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.exit.raise(ExitRecord { status: 0, text: "the test is over".to_owned() });
        // While it is fenced, that alone ends no keeper.
        self.refuses.store(0, Ordering::SeqCst);
        if let Ok(mut client) = KeeperClient::connect(&self.place)
            && let Ok(Phase::Fenced { token }) = client.phase()
        {
            let _ = client.release(token);
        }
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

struct Nothing {
    said: Said,
    refuses: Arc<AtomicUsize>,
}

impl Nothing {
    fn say(&self, what: &'static str) -> Result<()> {
        self.said.lock().expect("no panic").push(what);
        let less = |left: usize| left.checked_sub(1);
        match self.refuses.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less) {
            Ok(_) => Err(WorkloadError::plain("Fails, because the test says so")),
            Err(_) => Ok(()),
        }
    }
}

impl Kept for Nothing {
    fn liveness(&self) -> Liveness {
        Liveness::StopOnly { reason: "there is nothing".to_owned() }
    }

    fn facts(&mut self) -> Result<Value> {
        Ok(json!({}))
    }

    fn spaces(&mut self) -> Result<Vec<SpaceInfo>> {
        Ok(Vec::new())
    }

    fn make_spaces(&mut self, _: &[SpaceInfo]) -> Result<()> {
        self.say("make spaces")
    }

    fn memory(&mut self, _: SpaceId) -> Result<OwnedFd> {
        Err(WorkloadError::Unsupported("Memory"))
    }

    fn track(&mut self) -> Result<()> {
        self.say("track")
    }

    fn harvest(&mut self, _: &mut PageSet) -> Result<Harvest> {
        Ok(Harvest::default())
    }

    fn pause(&mut self) -> Result<()> {
        self.say("pause")
    }

    fn save(&mut self) -> Result<Vec<Section>> {
        Ok(Vec::new())
    }

    fn resume(&mut self) -> Result<()> {
        self.say("resume")
    }

    fn load(&mut self, _: Vec<Section>) -> Result<()> {
        self.say("load")
    }

    fn activate(&mut self) -> Result<()> {
        self.say("activate")
    }

    fn release(&mut self) -> Result<()> {
        self.say("release")
    }

    fn discard(&mut self) -> Result<()> {
        self.say("discard")
    }

    fn stop(&mut self, _: Duration) -> Result<()> {
        self.say("stop")
    }
}

/// A tree that a restore put on the disk for the workload at `place`, as its record says.
pub(crate) fn landed(place: &Place) -> PathBuf {
    let state = place.dir.ancestors().nth(2).expect("the agent's state");
    let tree = state.with_file_name("bundle");
    std::fs::create_dir(&tree).expect("made");
    let meta = tree.metadata().expect("is there");
    let line = json!({"tree": {"path": tree, "identity": [meta.dev(), meta.ino()]}});
    std::fs::write(landing_record(place), format!("{line}\n")).expect("written");
    tree
}

impl Fake {
    pub(crate) fn runs(&self) -> bool {
        self.keeper.lock().expect("no panic").is_some()
    }
}

impl Backend for Fake {
    fn kind(&self) -> Kind {
        Kind::Vm
    }

    fn check(&self, _: &Value) -> Vec<Refusal> {
        Vec::new()
    }

    fn run(&self, _: &Value, place: &Place) -> Result<()> {
        *self.keeper.lock().expect("no panic") = Some(keeper(place));
        Ok(())
    }

    fn source(&self, _: &Value, _: &Place) -> Result<Box<dyn SourceWorkload>> {
        Err(WorkloadError::Unsupported("Leaving"))
    }

    fn preflight(&self, _: &Manifest, _: &[PlacedTree]) -> Vec<Refusal> {
        Vec::new()
    }

    fn respec(&self, _: &Manifest, _: &[PlacedTree]) -> Result<Value> {
        Ok(json!({}))
    }

    fn relocated(&self, _: &Value, files: &[(PathBuf, PathBuf)]) -> Result<Value> {
        let disks: Vec<_> = files.iter().map(|(_, new)| json!({ "path": new })).collect();
        Ok(json!({ "disks": disks }))
    }

    fn prepare(&self, _: &Manifest, _: &Value, _: &Place) -> Result<Box<dyn DestinationWorkload>> {
        Err(WorkloadError::Unsupported("Arriving"))
    }

    fn stop(&self, _: &Value, _: &Place, _: Option<Duration>) -> Result<()> {
        self.stopped.fetch_add(1, Ordering::SeqCst);
        self.keeper.lock().expect("no panic").take();
        Ok(())
    }

    fn sweep(&self, _: &Value, _: &Place) -> Result<()> {
        self.swept.fetch_add(1, Ordering::SeqCst);
        match self.cannot_sweep.load(Ordering::SeqCst) {
            true => Err(WorkloadError::plain("Cannot sweep, because the test says so")),
            false => Ok(()),
        }
    }
}
