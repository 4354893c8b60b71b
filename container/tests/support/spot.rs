//! A workload's place on a host: what runs there, how far it is, and how it begins and ends.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use decamp_container::ContainerBackend;
use decamp_shared::keeper::{Beginning, KeeperClient, KeeperConfig, Phase};
use decamp_shared::workload::{Backend, Kind, Place, SourceWorkload};
use serde_json::{Value, json};

use super::host::Host;
use super::{await_that, keepers_of};

/// A workload's place on the host, and what runs there.
pub(crate) struct Spot<'a> {
    pub(super) host: &'a Host,
    pub(crate) place: Place,
    pub(crate) spec: Value,
}

impl Spot<'_> {
    pub(crate) fn backend(&self) -> ContainerBackend {
        ContainerBackend::new(self.host.tools())
    }

    pub(crate) fn run(&self) {
        assert_eq!(self.backend().check(&self.spec), []);
        self.try_run(&self.spec).expect("run");
    }

    pub(crate) fn try_run(&self, spec: &Value) -> decamp_shared::workload::Result<()> {
        self.backend().run(spec, &self.place)
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        self.spec["bundle"].as_str().expect("a bundle").into()
    }

    pub(crate) fn change_config(&self, change: impl FnOnce(&mut Value)) {
        let path = self.bundle().join("config.json");
        let mut config = serde_json::from_slice(&fs::read(&path).expect("a config")).expect("JSON");
        change(&mut config);
        fs::write(&path, config.to_string()).expect("a config");
    }

    pub(crate) fn await_keeper_log(&self, text: &str) {
        let path = self.place.dir.join("keeper.log");
        await_that(&format!("the keeper to say {text}"), || {
            fs::read_to_string(&path).is_ok_and(|log| log.contains(text))
        });
    }

    /// The same name in the hands of another agent on this host.
    pub(crate) fn rival(&self) -> Self {
        let dir = self.place.dir.with_extension("rival");
        Self {
            host: self.host,
            place: Place { dir, ..self.place.clone() },
            spec: self.spec.clone(),
        }
    }

    /// Starts a keeper for it without asking anything before.
    pub(crate) fn spawn_keeper(&self) -> decamp_shared::workload::Result<()> {
        decamp_shared::keeper::spawn(&KeeperConfig {
            kind: Kind::Container,
            beginning: Beginning::Run,
            place: self.place.clone(),
            tools: self.host.tools(),
            spec: self.spec.clone(),
        })
    }

    /// The same workload at another place.
    pub(crate) fn twin(&self, name: &str) -> Self {
        self.host.spot(name, self.spec.clone())
    }

    /// The same workload at another place, with files of its own.
    pub(crate) fn twin_with_files(&self, name: &str) -> Self {
        let mut twin = self.twin(name);
        twin.spec["bundle"] = json!(twin.place.dir.with_extension("files"));
        twin
    }

    pub(crate) fn source(&self) -> Box<dyn SourceWorkload> {
        self.backend().source(&self.spec, &self.place).expect("a source")
    }

    pub(crate) fn phase(&self) -> Phase {
        KeeperClient::connect(&self.place).and_then(|mut client| client.phase()).expect("a phase")
    }

    pub(crate) fn stop(&self) {
        KeeperClient::connect(&self.place)
            .and_then(|mut client| client.stop(Duration::from_millis(100)))
            .expect("stop");
    }

    pub(crate) fn kill_keeper(&self) {
        for pid in keepers_of(&self.place.dir) {
            let pid = nix::unistd::Pid::from_raw(pid);
            match nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL) {
                // It has just ended by itself.
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => panic!("kill the keeper: {error}"),
            }
        }
        await_that("the keeper's end", || keepers_of(&self.place.dir).is_empty());
    }

    /// What it has said so far, in whole lines: the last one may be half written.
    fn said(&self) -> String {
        let mut text = fs::read_to_string(self.place.log()).unwrap_or_default();
        text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
        text
    }

    pub(crate) fn counts(&self) -> Vec<u64> {
        self.said().lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// The number that the counter has in its file, which is always whole. While it stands still this is the one that
    /// it said last, or the one before: what it says goes through a pipe, whose reader may be late.
    pub(crate) fn noted(&self) -> u64 {
        let path = self.bundle().join("rootfs/data/count");
        fs::read_to_string(path).expect("a count").trim().parse().expect("a number")
    }

    /// The last tick that the program with obstacles has said, or 0.
    pub(crate) fn ticks(&self) -> u64 {
        let text = self.said();
        let last = text.lines().rev().find_map(|line| line.strip_prefix("tick ")?.parse().ok());
        last.unwrap_or(0)
    }

    pub(crate) fn last_count(&self) -> u64 {
        self.counts().last().copied().unwrap_or(0)
    }

    pub(crate) fn await_count(&self, count: u64) {
        await_that(&format!("{} to count to {count}", self.place.name), || {
            self.last_count() >= count
        });
    }

    /// The smallest of the counts that the memory program says last: rounds, its child's, its thread's.
    pub(crate) fn rounds(&self) -> u64 {
        let text = self.said();
        assert!(!text.contains("BAD") && !text.contains("no mlock"), "{text}");
        let last = text.lines().rfind(|line| line.starts_with("ok ")).unwrap_or("ok 0");
        last[3..].split(' ').map(|number| number.parse().expect("a number")).min().unwrap_or(0)
    }

    /// The same once nothing more is said of it: what a program said before it stood still may be on its way.
    pub(crate) fn settled_rounds(&self) -> u64 {
        let mut before = self.rounds();
        await_that(&format!("{} to stand still", self.place.name), || {
            std::thread::sleep(Duration::from_millis(300));
            std::mem::replace(&mut before, self.rounds()) == self.rounds()
        });
        before
    }

    pub(crate) fn await_rounds(&self, rounds: u64) {
        await_that(&format!("{} to check {rounds} rounds", self.place.name), || {
            self.rounds() >= rounds
        });
    }

    pub(crate) fn await_log(&self, text: &str) {
        await_that(&format!("{} to say {text}", self.place.name), || {
            fs::read_to_string(self.place.log()).is_ok_and(|log| log.contains(text))
        });
    }

    pub(crate) fn await_exit(&self) {
        await_that("the exit record", || self.place.exit_record().exists());
        await_that("the keeper's end", || keepers_of(&self.place.dir).is_empty());
    }

    pub(crate) fn exit_record(&self) -> Value {
        serde_json::from_slice(&fs::read(self.place.exit_record()).expect("a record"))
            .expect("JSON")
    }
}
