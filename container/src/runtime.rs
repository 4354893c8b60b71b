//! OCI runtimes: starting a container with one, and the state that it keeps of one, so that its `list`,
//! `kill` and `exec` from outside work before and after a move. What the files of each look like is said
//! in `runc` and `crun`.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use decamp_shared::workload::HostTools;
use serde_json::Value;

use crate::bundle::Bundle;
use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};
use crate::swrk::two_numbers;
use crate::{crun, runc};

/// No state of a runtime is longer.
const STATE_CAP: u64 = 16 << 20;

/// A runtime that is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RuntimeKind {
    Runc,
    Crun,
}

/// What a runtime has written down of a container that it has made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    /// Its state.
    pub(crate) state: Value,
    /// The filter of system calls for what is brought in later, where that is kept in a file.
    pub(crate) filter: Option<Vec<u8>>,
}

/// One container as a runtime knows it.
#[derive(Clone, Debug)]
pub(crate) struct Runtime {
    kind: RuntimeKind,
    program: PathBuf,
    root: PathBuf,
    id: String,
}

/// What a runtime's state says of a container, in whatever form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    /// Its first process; 0 or less when there is none any more.
    pub(crate) init: i32,
    /// When that started, in the kernel's ticks.
    pub(crate) started: u64,
    /// Its bundle.
    pub(crate) bundle: PathBuf,
    /// Its root file system.
    pub(crate) rootfs: PathBuf,
}

impl RuntimeKind {
    /// Every one.
    pub(crate) const ALL: [Self; 2] = [Self::Runc, Self::Crun];

    /// Its name.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
        }
    }

    /// The one of that name.
    pub(crate) fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.word() == word)
    }

    /// Its executable on this host.
    pub(crate) fn program(self, tools: &HostTools) -> &Path {
        match self {
            Self::Runc => &tools.runc,
            Self::Crun => &tools.crun,
        }
    }

    /// The oldest version that is known to work.
    pub(crate) fn wanted(self) -> (i32, i32) {
        match self {
            Self::Runc => (1, 1),
            Self::Crun => (1, 8),
        }
    }

    fn root(self) -> &'static str {
        match self {
            Self::Runc => runc::ROOT,
            Self::Crun => crun::ROOT,
        }
    }

    fn state_file(self) -> &'static str {
        match self {
            Self::Runc => runc::STATE,
            Self::Crun => crun::STATE,
        }
    }
}

impl Runtime {
    /// Container `id` in the runtime's own place.
    pub(crate) fn new(kind: RuntimeKind, tools: &HostTools, id: &str) -> Self {
        let root = PathBuf::from(kind.root());
        Self { kind, program: kind.program(tools).to_owned(), root, id: id.to_owned() }
    }

    /// Container `id` in the runtime's own place, to be looked at and never started.
    pub(crate) fn looked_at(kind: RuntimeKind, id: &str) -> Self {
        Self { kind, program: PathBuf::new(), root: kind.root().into(), id: id.to_owned() }
    }

    /// The same container in a place where nobody looks.
    pub(crate) fn hidden_in(&self, root: &Path) -> Self {
        Self { root: root.to_owned(), ..self.clone() }
    }

    /// The executable that is its runtime.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Which runtime it is.
    pub(crate) fn kind(&self) -> RuntimeKind {
        self.kind
    }

    /// The container's name for the runtime.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Where the runtime has what it knows of the container.
    pub(crate) fn directory(&self) -> PathBuf {
        self.root.join(&self.id)
    }

    /// Whether the runtime knows a container of this name.
    pub(crate) fn exists(&self) -> bool {
        self.directory().exists()
    }

    /// Starts the container of `bundle`, with `output` as its standard output and error. Its first
    /// process becomes a child of this process (a subreaper); its number is returned. One that has a
    /// terminal needs a socket at `console`, to which its master is handed.
    pub(crate) fn run(
        &self,
        bundle: &Path,
        output: impl AsFd,
        console: Option<&Path>,
    ) -> Result<i32> {
        self.begin("run", bundle, output, console)
    }

    /// The same without starting its program.
    pub(crate) fn create(
        &self,
        bundle: &Path,
        output: impl AsFd,
        console: Option<&Path>,
    ) -> Result<i32> {
        self.begin("create", bundle, output, console)
    }

    /// Starts the program of the container that was made of `bundle`.
    pub(crate) fn start(&self, bundle: &Path) -> Result<()> {
        let log = bundle.join("runtime.log");
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.root).arg("--log").arg(&log).arg("start").arg(&self.id);
        let status = command
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map_err(ContainerError::io(format!("start {}", self.program.display())))?;
        if status.success() { Ok(()) } else { Err(self.failed("start", &log)) }
    }

    fn failed(&self, verb: &str, log: &Path) -> ContainerError {
        ContainerError::Tool {
            tool: self.kind.word(),
            what: format!("{verb} container {}", self.id),
            said: self.last_error(log),
        }
    }

    fn begin(
        &self,
        verb: &str,
        bundle: &Path,
        output: impl AsFd,
        console: Option<&Path>,
    ) -> Result<i32> {
        let log = bundle.join("runtime.log");
        let pid_file = bundle.join("init.pid");
        let copy = || {
            output
                .as_fd()
                .try_clone_to_owned()
                .map_err(ContainerError::io("copy the output descriptor"))
        };
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.root).arg("--log").arg(&log).arg(verb);
        if verb == "run" {
            command.arg("--detach");
        }
        if let Some(console) = console {
            command.arg("--console-socket").arg(console);
        }
        let status = command
            .arg("--bundle")
            .arg(bundle)
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(&self.id)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(copy()?)
            .stderr(copy()?)
            .status()
            .map_err(ContainerError::io(format!("start {}", self.program.display())))?;
        if !status.success() {
            return Err(self.failed(verb, &log));
        }
        let text = fs::read_to_string(&pid_file)
            .map_err(ContainerError::io(format!("read {}", pid_file.display())))?;
        text.trim()
            .parse()
            .map_err(|_| ContainerError::malformed(pid_file, "holds no process number"))
    }

    /// What the runtime has written down about the container.
    pub(crate) fn state(&self) -> Result<Value> {
        let path = self.directory().join(self.kind.state_file());
        let failed = || format!("read {}", path.display());
        let length = fs::metadata(&path).map_err(ContainerError::io(failed()))?.len();
        if length > STATE_CAP {
            return Err(ContainerError::malformed(path, "is longer than any state"));
        }
        let text = fs::read(&path).map_err(ContainerError::io(failed()))?;
        serde_json::from_slice(&text)
            .map_err(|error| ContainerError::malformed(path, format!("is no JSON: {error}")))
    }

    /// All that whoever adopts a container of the same configuration needs of it.
    pub(crate) fn written(&self) -> Result<Written> {
        let state = self.state()?;
        let path = self.directory().join(crun::FILTER);
        let filter = match (self.kind, fs::read(&path)) {
            (RuntimeKind::Runc, _) => None,
            (RuntimeKind::Crun, Err(error)) if error.kind() == std::io::ErrorKind::NotFound => None,
            (RuntimeKind::Crun, read) => {
                Some(read.map_err(ContainerError::io(format!("read {}", path.display())))?)
            }
        };
        Ok(Written { state, filter })
    }

    /// What a state says.
    pub(crate) fn known(&self, state: &Value) -> Result<Known> {
        let known = match self.kind {
            RuntimeKind::Runc => runc::known(state),
            RuntimeKind::Crun => crun::known(state),
        };
        let path = self.directory().join(self.kind.state_file());
        known.ok_or_else(|| {
            ContainerError::malformed(path, "does not say which process and bundle it speaks of")
        })
    }

    /// The cgroups of the container with that state, whose first process `init` lives.
    pub(crate) fn cgroups(&self, state: &Value, init: i32) -> Result<Cgroups> {
        match self.kind {
            RuntimeKind::Runc => Cgroups::from_state(&state["cgroup_paths"]),
            RuntimeKind::Crun => crun::cgroups(init),
        }
    }

    /// Writes down that the container runs: what was `written` of a stand-in made here, with the process,
    /// root and bundle of the real one, whose configuration reads as `config` here.
    pub(crate) fn adopt(
        &self,
        written: &Written,
        init: i32,
        bundle: &Bundle,
        config: &Value,
    ) -> Result<()> {
        let (state, started) = (written.state.clone(), start_time(init)?);
        let (rootfs, directory) = (bundle.rootfs(), bundle.directory());
        match self.kind {
            RuntimeKind::Runc => {
                let state = runc::adopted(state, init, started, &rootfs, directory);
                self.write_json(runc::STATE, &state)
            }
            RuntimeKind::Crun => {
                let state = crun::adopted(state, init, started, &rootfs, directory);
                self.write_json(crun::CONFIG, config)?;
                if let Some(filter) = &written.filter {
                    self.write(crun::FILTER, filter)?;
                }
                self.write_json(crun::STATE, &state)
            }
        }
    }

    fn write_json(&self, name: &str, content: &Value) -> Result<()> {
        self.write(name, content.to_string().as_bytes())
    }

    fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let directory = self.directory();
        fs::create_dir_all(&directory)
            .map_err(ContainerError::io(format!("make {}", directory.display())))?;
        let (path, fresh) = (directory.join(name), directory.join(format!("{name}.new")));
        let write = || -> std::io::Result<()> {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(content)?;
            fs::rename(&fresh, &path)
        };
        write().map_err(ContainerError::io(format!("write {}", path.display())))
    }

    /// Forgets the container. Harmless when it is not known.
    pub(crate) fn forget(&self) -> Result<()> {
        match fs::remove_dir_all(self.directory()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(ContainerError::io(format!("remove {}", self.directory().display()))(error))
            }
            _ => Ok(()),
        }
    }

    fn last_error(&self, log: &Path) -> String {
        let text = fs::read_to_string(log).unwrap_or_default();
        let last = match self.kind {
            RuntimeKind::Runc => runc::last_error(&text),
            RuntimeKind::Crun => crun::last_error(&text),
        };
        last.unwrap_or("it did not say why").to_owned()
    }
}

/// The version that the executable `program` of a runtime reports.
///
/// # Errors
/// When it cannot be started or says nothing of the kind.
pub(crate) fn version(kind: RuntimeKind, program: &Path) -> Result<(i32, i32)> {
    let said = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(ContainerError::io(format!("start {}", program.display())))?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    text.lines()
        .find_map(|line| line.strip_prefix(kind.word())?.strip_prefix(" version "))
        .and_then(two_numbers)
        .ok_or_else(|| ContainerError::Tool {
            tool: kind.word(),
            what: "say its version".to_owned(),
            said: text,
        })
}

/// When a process started, in the kernel's ticks; with its number it names a process for good.
pub(crate) fn start_time(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))?;
    // The name in parentheses may hold anything, so it is counted from its end: field 22 of 52.
    text.rsplit_once(") ")
        .and_then(|(_, rest)| rest.split(' ').nth(19))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| ContainerError::malformed(path, "has no start time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_start_time_is_read() {
        assert!(start_time(std::process::id() as i32).expect("ourselves") > 0);
    }

    #[test]
    fn what_is_adopted_has_the_filter_of_its_stand_in() {
        let bundle = Bundle::parse(Path::new("/r"), b"{}").expect("a bundle");
        for (kind, filter) in [
            (RuntimeKind::Crun, Some(b"bpf".to_vec())),
            (RuntimeKind::Crun, None),
            (RuntimeKind::Runc, None),
        ] {
            let room = tempfile::tempdir().expect("a directory");
            let at = |root: &str| Runtime {
                root: room.path().join(root),
                ..Runtime::looked_at(kind, "web")
            };
            let stand_in = at("hidden");
            fs::create_dir_all(stand_in.directory()).expect("made");
            fs::write(stand_in.directory().join(kind.state_file()), "{}").expect("written");
            if let Some(filter) = &filter {
                fs::write(stand_in.directory().join(crun::FILTER), filter).expect("written");
            }
            let written = stand_in.written().expect("a stand-in");
            let runtime = at("own");
            let us = std::process::id() as i32;
            runtime.adopt(&written, us, &bundle, &Value::Null).expect("adopted");
            assert_eq!(fs::read(runtime.directory().join(crun::FILTER)).ok(), filter);
            assert!(runtime.directory().join(kind.state_file()).exists());
        }
    }

    #[test]
    fn a_runtime_is_known_by_its_name() {
        for kind in RuntimeKind::ALL {
            assert_eq!(RuntimeKind::from_word(kind.word()), Some(kind));
        }
        assert_eq!(RuntimeKind::from_word("kata"), None);
    }
}
