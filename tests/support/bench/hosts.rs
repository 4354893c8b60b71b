//! The hosts that a benchmark runs on: a guard around `tests/hosts`, and the ways into a host from
//! here. What moves on them, and how, is known elsewhere.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::error::{BenchError, Result};
use crate::load::{Mark, Processors};
use crate::peak::Peak;

/// The source of every move.
pub(crate) const SOURCE: &str = "alpha";
/// The destination of every move.
pub(crate) const DESTINATION: &str = "beta";
/// Where the destination is reached, on the same path for us and for the peers.
pub(crate) const DESTINATION_ADDRESS: &str = "10.77.0.2";
/// The namespace that clients of a workload run in.
pub(crate) const CLIENT: &str = "bench-c";

/// Two hosts with their agents. Gone when this is dropped.
pub(crate) struct Hosts {
    script: PathBuf,
    dir: PathBuf,
    processors: Option<Processors>,
    /// What their cgroups are called.
    name: String,
}

impl Hosts {
    /// Makes them. Pages travel encrypted or not, as both agents are told.
    pub(crate) fn up(work: &Path, root: &Path, encrypt: bool) -> Result<Self> {
        let settings = work.join("agent.toml");
        fs::write(&settings, format!("{}\n", page_encryption(encrypt)))
            .map_err(BenchError::io(format!("write {}", settings.display())))?;
        let dir = std::env::var_os("DECAMP_HOSTS_DIR").ok_or_else(|| {
            BenchError::wrong("DECAMP_HOSTS_DIR is not set: start this by tests/bench")
        })?;
        let mut hosts = Self {
            script: root.join("tests/hosts"),
            dir: dir.into(),
            processors: None,
            name: String::new(),
        };
        done(Command::new(&hosts.script).args(["up", "2"]).env("DECAMP_AGENT_TOML", &settings))?;
        done(Command::new(&hosts.script).args(["client", CLIENT, "10.77.1.9/16"]))?;
        let name = hosts.dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        hosts.processors = Some(Processors::of(&name)?);
        hosts.name = name;
        Ok(hosts)
    }

    /// Their processor time, and everybody's.
    pub(crate) fn mark(&self) -> Result<Mark> {
        let processors = self.processors.as_ref();
        processors.ok_or_else(|| BenchError::wrong("The hosts are not up"))?.mark()
    }

    /// Begins to watch the memory of one of them.
    pub(crate) fn peak(&self, host: &str) -> Result<Peak> {
        Peak::begin(&self.name, host)
    }

    /// Has both agents start again with pages encrypted, or not.
    pub(crate) fn encrypt_pages(&self, encrypt: bool) -> Result<()> {
        for host in [SOURCE, DESTINATION] {
            let path = self.dir.join(host).join("conf/agent.toml");
            let text = fs::read_to_string(&path)
                .map_err(BenchError::io(format!("read {}", path.display())))?;
            let text = text.replace(&page_encryption(!encrypt), &page_encryption(encrypt));
            fs::write(&path, text).map_err(BenchError::io(format!("write {}", path.display())))?;
            done(Command::new(&self.script).args(["agent", host, "restart"]))?;
        }
        Ok(())
    }

    /// A command that runs in a host, in its namespaces and its cgroup. Start it from the main
    /// thread: it is told to end when the thread that started it does.
    pub(crate) fn command(&self, host: &str, program: &str) -> Command {
        let mut command = Command::new(&self.script);
        command.args(["exec", host, "--", program]);
        command
    }

    /// A host's file system as seen from here; its sockets can be reached below it.
    pub(crate) fn root(&self, host: &str) -> Result<PathBuf> {
        Ok(PathBuf::from(format!("/proc/{}/root", self.init(host)?)))
    }

    /// PID 1 of a host, as seen from here.
    pub(crate) fn init(&self, host: &str) -> Result<i32> {
        let path = self.dir.join(host).join("init.ready");
        let text = fs::read_to_string(&path)
            .map_err(BenchError::io(format!("read {}", path.display())))?;
        text.trim().parse().map_err(|_| BenchError::wrong(format!("Host {host} is not up")))
    }

    /// The directory that a host sees as `/srv`.
    pub(crate) fn srv(&self, host: &str) -> PathBuf {
        self.dir.join(host).join("srv")
    }

    /// Empties `/srv` of a host.
    pub(crate) fn clear_srv(&self, host: &str) -> Result<()> {
        let srv = self.srv(host);
        let failed = || BenchError::io(format!("empty {}", srv.display()));
        for entry in fs::read_dir(&srv).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            let removed =
                if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(failed())?;
        }
        Ok(())
    }

    /// Where certificates lie: `ca.pem`, and `HOST.pem` with `HOST.key`.
    pub(crate) fn certificates(&self) -> PathBuf {
        self.dir.join("pki")
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if let Err(error) = done(Command::new(&self.script).arg("down")) {
            eprintln!("bench: {error}");
        }
    }
}

/// A child that is killed and reaped when this is dropped.
pub(crate) struct Reaped(pub(crate) Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command to its end and gives what it printed.
pub(crate) fn done(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(BenchError::io(format!("start {}", words(command))))?;
    succeeded(&words(command), output)
}

/// What a program printed, if it ended well.
pub(crate) fn succeeded(command: &str, output: Output) -> Result<String> {
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().lines().rev().take(12).collect::<Vec<_>>();
        return Err(BenchError::Command {
            command: command.to_owned(),
            status: output.status.to_string(),
            said: said.into_iter().rev().collect::<Vec<_>>().join("\n"),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits for something that announces itself to nobody, looking every 5 ms.
pub(crate) fn await_that<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if started.elapsed() >= patience {
            return Err(BenchError::Late { what: what.to_owned(), waited: patience });
        }
        sleep(Duration::from_millis(5));
    }
}

/// Copies a file, and says which.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied: io::Result<u64> = fs::copy(from, to);
    copied.map_err(BenchError::io(format!("copy {} to {}", from.display(), to.display())))?;
    Ok(())
}

fn page_encryption(encrypt: bool) -> String {
    format!("page_encryption = \"{}\"", if encrypt { "on" } else { "off" })
}

fn words(command: &Command) -> String {
    let program =
        Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy();
    let arguments = command.get_args().map(|word| word.to_string_lossy());
    std::iter::once(program).chain(arguments).collect::<Vec<_>>().join(" ")
}
