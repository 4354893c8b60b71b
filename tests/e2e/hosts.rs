//! The hosts of all tests: made once, entered, their agents restarted with fail points, taken down.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::running::{Pending, Ran, run};

/// Where `tests/setup` puts CRIU.
pub(crate) const CRIU: &str = "/opt/decamp-criu/bin/criu";
/// One end of most moves.
pub(crate) const ALPHA: &str = "alpha";
/// The other.
pub(crate) const BETA: &str = "beta";
/// The namespace that clients run in.
pub(crate) const CLIENT: &str = "e2e-clients";
/// Longest that any command but a move may take, on however slow and busy a machine.
const SOON: Duration = Duration::from_secs(180);
/// Longest that the test guest and the client take to be built.
const BUILT_WITHIN: Duration = Duration::from_secs(900);
/// What agents log: enough to see a move arrive at a fail point.
const LOG: &str = "info,decamp_shared::failpoint=debug";

static HOSTS: OnceLock<Hosts> = OnceLock::new();

/// Two hosts with agents.
pub(crate) struct Hosts {
    script: PathBuf,
    dir: PathBuf,
    /// A directory that both hosts see at this path.
    shared: PathBuf,
    /// Built once: the test guest and the Redis client.
    tools: PathBuf,
    failpoints: Mutex<BTreeMap<String, String>>,
}

/// Which configuration key of an agent is set to what, for the length of a test.
pub(crate) struct Reconfigured<'a> {
    hosts: &'a Hosts,
    host: &'a str,
    before: String,
}

/// A small disk in the place of a directory of a host, until the guard is dropped.
pub(crate) struct SmallDisk<'a> {
    hosts: &'a Hosts,
    host: &'a str,
    path: &'a str,
}

/// The hosts; made at the first call.
pub(crate) fn hosts() -> &'static Hosts {
    HOSTS.get_or_init(Hosts::up)
}

/// Takes the hosts away, if there are any.
pub(crate) fn down() {
    if let Some(hosts) = HOSTS.get() {
        eprintln!("{}", run(hosts.script().arg("down"), SOON));
        let _ = fs::remove_dir_all(&hosts.shared);
    }
}

/// Turns `alpha` into `beta` and back.
pub(crate) fn other(host: &str) -> &'static str {
    if host == ALPHA { BETA } else { ALPHA }
}

impl Hosts {
    fn up() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let dir = std::env::var_os("DECAMP_HOSTS_DIR").map(PathBuf::from);
        let hosts = Self {
            script: root.join("tests/hosts"),
            dir: dir.unwrap_or_else(|| "/run/decamp-e2e".into()),
            shared: "/tmp/decamp-e2e-shared".into(),
            tools: Path::new(env!("CARGO_TARGET_TMPDIR")).to_owned(),
            failpoints: Mutex::default(),
        };
        fs::create_dir_all(&hosts.shared).expect("a shared directory");
        fs::create_dir_all(&hosts.tools).expect("a directory for tools");
        let guest = root.join("tests/guest/build");
        run(Command::new(guest).arg(hosts.tools.join("guest.elf")), BUILT_WITHIN).expect(0);
        let mut rustc = Command::new("rustc");
        rustc.args(["--edition", "2024", "-O", "-o"]).arg(hosts.redis_client());
        run(rustc.arg(root.join("tests/support/redis_client.rs")), BUILT_WITHIN).expect(0);
        run(hosts.script().args(["up", "2"]), SOON).expect(0);
        run(hosts.script().args(["client", CLIENT, "10.77.1.9/16"]), SOON).expect(0);
        for host in [ALPHA, BETA] {
            fs::copy(hosts.tools.join("guest.elf"), hosts.path(host, "srv/guest.elf"))
                .expect("the guest's image can be copied");
        }
        hosts
    }

    /// `tests/hosts` on these hosts.
    fn script(&self) -> Command {
        let mut command = Command::new(&self.script);
        command
            .env("DECAMP_HOSTS_DIR", &self.dir)
            .env("DECAMP_HOSTS_SHARE", &self.shared)
            .env("DECAMP_BIN", env!("CARGO_BIN_EXE_decamp"))
            .env("DECAMP_LOG", LOG)
            .env_remove("FAILPOINTS");
        command
    }

    /// A path of a host as seen from outside: below `srv`, `state`, `conf`, or `agent.log`.
    pub(crate) fn path(&self, host: &str, below: &str) -> PathBuf {
        self.dir.join(host).join(below)
    }

    /// A directory that both hosts see at its own path.
    pub(crate) fn shared(&self) -> &Path {
        &self.shared
    }

    /// The client that notices.
    pub(crate) fn redis_client(&self) -> PathBuf {
        self.tools.join("redis-client")
    }

    /// `tests/hosts VERB...`
    #[track_caller]
    pub(crate) fn hosts(&self, words: &[&str]) -> Ran {
        run(self.script().args(words), SOON)
    }

    /// The same, begun.
    pub(crate) fn begin_hosts(&self, words: &[&str]) -> Pending {
        Pending::start(self.script().args(words))
    }

    /// Runs a command in a host.
    #[track_caller]
    pub(crate) fn exec(&self, host: &str, words: &[&str]) -> Ran {
        run(self.script().args(["exec", host, "--"]).args(words), SOON)
    }

    /// Runs `decamp` in a host.
    #[track_caller]
    pub(crate) fn decamp(&self, host: &str, words: &[&str]) -> Ran {
        self.begin(host, words).ended(Duration::from_secs(300))
    }

    /// Starts `decamp` in a host.
    pub(crate) fn begin(&self, host: &str, words: &[&str]) -> Pending {
        Pending::start(&mut self.command(host, words))
    }

    /// `decamp` in a host, to be started.
    pub(crate) fn command(&self, host: &str, words: &[&str]) -> Command {
        let mut command = self.script();
        command.args(["exec", host, "--", "decamp"]).args(words);
        command
    }

    /// The state of a workload on a host as `decamp ls --all` has it; nothing when it has none.
    #[track_caller]
    pub(crate) fn state(&self, host: &str, name: &str) -> Option<String> {
        let listed = self.decamp(host, &["ls", "--all", "--json"]).expect(0).json();
        let found = listed.as_array()?.iter().find(|one| one["name"] == name)?.clone();
        Some(found["state"].as_str()?.to_owned())
    }

    /// Sends a signal to the keeper of a workload.
    #[track_caller]
    pub(crate) fn signal_keeper(&self, host: &str, name: &str, signal: &str) {
        // The brackets keep the pattern from finding whoever has it on its own command line.
        let keeper = format!("[k]eeper --config /var/lib/decamp/workloads/{name}/");
        self.exec(host, &["pkill", &format!("-{signal}"), "-f", &keeper]).expect(0);
    }

    /// Whether an agent runs there.
    pub(crate) fn agent_runs(&self, host: &str) -> bool {
        self.hosts(&["agent", host, "pid"]).code == Some(0)
    }

    /// Restarts a host's agent with these fail points. One that runs without any may stay as it is; one
    /// that had the same ones may not: those that hold once are spent.
    #[track_caller]
    pub(crate) fn with_failpoints(&self, host: &str, failpoints: &str) {
        let had = self.held().get(host).cloned().unwrap_or_default();
        let is_plain = had.is_empty() && failpoints.is_empty();
        if !is_plain || !self.agent_runs(host) {
            self.hosts(&["agent", host, "stop"]).expect(0);
            self.start_agent(host, failpoints);
        }
    }

    /// Starts a host's agent that does not run.
    #[track_caller]
    pub(crate) fn start_agent(&self, host: &str, failpoints: &str) {
        run(self.script().args(["agent", host, "start"]).env("FAILPOINTS", failpoints), SOON)
            .expect(0);
        self.held().insert(host.to_owned(), failpoints.to_owned());
    }

    /// A host that booted has an agent without fail points.
    pub(crate) fn forget_failpoints(&self, host: &str) {
        self.held().remove(host);
    }

    /// Restarts a host's agent as it is.
    #[track_caller]
    pub(crate) fn restart_agent(&self, host: &str) {
        self.hosts(&["agent", host, "stop"]).expect(0);
        self.start_agent(host, "");
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.failpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Both agents run without fail points, no cut anywhere.
    #[track_caller]
    pub(crate) fn mend(&self) {
        for host in [ALPHA, BETA] {
            self.hosts(&["heal", host]).expect(0);
            self.with_failpoints(host, "");
        }
    }

    /// How long the log of a host's agent is.
    pub(crate) fn log_mark(&self, host: &str) -> usize {
        self.agent_log(host).len()
    }

    /// What a host's agent logged since a mark.
    pub(crate) fn log_since(&self, host: &str, mark: usize) -> String {
        self.agent_log(host).get(mark..).unwrap_or_default().to_owned()
    }

    fn agent_log(&self, host: &str) -> String {
        let bytes = fs::read(self.path(host, "agent.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Puts a small, empty disk over a directory of a host. Over an agent's state it needs an agent that is
    /// not there: it is stopped, and started when the disk is there.
    #[track_caller]
    pub(crate) fn small_disk<'a>(
        &'a self,
        host: &'a str,
        path: &'a str,
        size: &str,
    ) -> SmallDisk<'a> {
        let words = ["mount", "-n", "-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", path];
        self.around_state(host, path, || self.exec(host, &words).expect(0));
        SmallDisk { hosts: self, host, path }
    }

    /// Does something to a directory; while the agent is away if its state is there.
    #[track_caller]
    fn around_state(&self, host: &str, path: &str, act: impl FnOnce() -> Ran) {
        let is_state = path == "/var/lib/decamp";
        if is_state {
            self.hosts(&["agent", host, "stop"]).expect(0);
        }
        act();
        if is_state {
            self.start_agent(host, "");
        }
    }

    /// Edits a host's configuration and restarts its agent, until the guard is dropped.
    #[track_caller]
    pub(crate) fn reconfigure<'a>(
        &'a self,
        host: &'a str,
        edit: impl FnOnce(&str) -> String,
    ) -> Reconfigured<'a> {
        let path = self.path(host, "conf/agent.toml");
        let before = fs::read_to_string(&path).expect("a configuration");
        let after = edit(&before);
        assert_ne!(before, after, "the edit changed nothing");
        fs::write(&path, after).expect("a configuration can be written");
        let guard = Reconfigured { hosts: self, host, before };
        self.restart_agent(host);
        guard
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let Self { hosts, host, path } = self;
        // What a failed test left running there shall not keep it.
        hosts.around_state(host, path, || hosts.exec(host, &["umount", "-n", "-l", path]));
    }
}

impl Drop for Reconfigured<'_> {
    fn drop(&mut self) {
        let path = self.hosts.path(self.host, "conf/agent.toml");
        fs::write(&path, &self.before).expect("a configuration can be written");
        self.hosts.restart_agent(self.host);
    }
}
