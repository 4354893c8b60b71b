//! runc: starting a container with it, and the state that it keeps of one, so that `runc list`,
//! `kill` and `exec` from outside work before and after a move.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};
use crate::swrk::two_numbers;

/// Where runc keeps the state of containers when it is not told otherwise.
const ROOT: &str = "/run/runc";
/// The oldest runc that is known to work.
pub(crate) const WANTED: (i32, i32) = (1, 1);

/// One container as runc knows it.
#[derive(Clone, Debug)]
pub(crate) struct Runtime {
    runc: PathBuf,
    root: PathBuf,
    id: String,
}

impl Runtime {
    /// Container `id` in runc's own place.
    pub(crate) fn new(runc: &Path, id: &str) -> Self {
        Self { runc: runc.to_owned(), root: PathBuf::from(ROOT), id: id.to_owned() }
    }

    /// The same container in a place where nobody looks.
    pub(crate) fn hidden_in(&self, root: &Path) -> Self {
        Self { root: root.to_owned(), ..self.clone() }
    }

    fn directory(&self) -> PathBuf {
        self.root.join(&self.id)
    }

    /// Whether runc knows a container of this name.
    pub(crate) fn exists(&self) -> bool {
        self.directory().exists()
    }

    /// Starts the container of `bundle`, with `output` as its standard output and error. Its first
    /// process becomes a child of this process (a subreaper); its number is returned.
    pub(crate) fn run(&self, bundle: &Path, output: impl AsFd) -> Result<i32> {
        self.start("run", bundle, output)
    }

    /// Makes the container of `bundle` without starting its program.
    pub(crate) fn create(&self, bundle: &Path, output: impl AsFd) -> Result<i32> {
        self.start("create", bundle, output)
    }

    fn start(&self, verb: &str, bundle: &Path, output: impl AsFd) -> Result<i32> {
        let log = bundle.join("runc.log");
        let pid_file = bundle.join("init.pid");
        let copy = || {
            output
                .as_fd()
                .try_clone_to_owned()
                .map_err(ContainerError::io("copy the output descriptor"))
        };
        let mut command = Command::new(&self.runc);
        command.arg("--root").arg(&self.root).arg("--log").arg(&log).arg(verb);
        if verb == "run" {
            command.arg("--detach");
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
            .map_err(ContainerError::io(format!("start {}", self.runc.display())))?;
        if !status.success() {
            return Err(ContainerError::Tool {
                tool: "runc",
                what: format!("{verb} container {}", self.id),
                said: last_error(&log),
            });
        }
        let text = fs::read_to_string(&pid_file)
            .map_err(ContainerError::io(format!("read {}", pid_file.display())))?;
        text.trim()
            .parse()
            .map_err(|_| ContainerError::malformed(pid_file, "holds no process number"))
    }

    /// What runc has written down about the container.
    pub(crate) fn state(&self) -> Result<Value> {
        let path = self.directory().join("state.json");
        let text =
            fs::read(&path).map_err(ContainerError::io(format!("read {}", path.display())))?;
        serde_json::from_slice(&text)
            .map_err(|error| ContainerError::malformed(path, format!("is no JSON: {error}")))
    }

    /// Writes down that the container runs: `state` of a stand-in made here, with the process, root
    /// and bundle of the real one.
    pub(crate) fn adopt(
        &self,
        state: &Value,
        init: i32,
        rootfs: &Path,
        bundle: &Path,
    ) -> Result<()> {
        let state = adopted(state.clone(), init, start_time(init)?, rootfs, bundle);
        let directory = self.directory();
        fs::create_dir_all(&directory)
            .map_err(ContainerError::io(format!("make {}", directory.display())))?;
        let (path, fresh) = (directory.join("state.json"), directory.join("state.json.new"));
        let write = || -> std::io::Result<()> {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(&serde_json::to_vec(&state)?)?;
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
}

/// The cgroups that a state names.
pub(crate) fn cgroups(state: &Value) -> Result<Cgroups> {
    Cgroups::from_state(&state["cgroup_paths"])
}

/// The version that a runc executable reports.
///
/// # Errors
/// When it cannot be started or says nothing of the kind.
pub(crate) fn version(runc: &Path) -> Result<(i32, i32)> {
    let said = Command::new(runc)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(ContainerError::io(format!("start {}", runc.display())))?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    text.lines()
        .find_map(|line| line.strip_prefix("runc version "))
        .and_then(two_numbers)
        .ok_or_else(|| ContainerError::Tool {
            tool: "runc",
            what: "say its version".to_owned(),
            said: text,
        })
}

fn adopted(mut state: Value, init: i32, started: u64, rootfs: &Path, bundle: &Path) -> Value {
    state["init_process_pid"] = json!(init);
    state["init_process_start"] = json!(started);
    state["config"]["rootfs"] = json!(rootfs);
    if let Some(paths) = state["namespace_paths"].as_object_mut() {
        for path in paths.values_mut() {
            let kind = path.as_str().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
            *path = json!(format!("/proc/{init}/ns/{kind}"));
        }
    }
    if let Some(labels) = state["config"]["labels"].as_array_mut() {
        for label in labels
            .iter_mut()
            .filter(|label| label.as_str().is_some_and(|text| text.starts_with("bundle=")))
        {
            *label = json!(format!("bundle={}", bundle.display()));
        }
    }
    state
}

/// When a process started, in the kernel's ticks; with its number it names a process for good.
fn start_time(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))?;
    // The name in parentheses may hold anything, so it is counted from its end: field 22 of 52.
    text.rsplit_once(") ")
        .and_then(|(_, rest)| rest.split(' ').nth(19))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| ContainerError::malformed(path, "has no start time"))
}

/// The last error in a log of runc.
fn last_error(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let last = text.lines().rfind(|line| line.contains("level=error"));
    last.and_then(|line| line.split_once("msg=").map(|(_, message)| message))
        .unwrap_or("it did not say why")
        .trim_matches('"')
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adopted_state_points_at_the_real_container() {
        let state = json!({
            "id": "web", "init_process_pid": 5, "init_process_start": 6,
            "namespace_paths": {"NEWNET": "/proc/5/ns/net", "NEWPID": "/proc/5/ns/pid"},
            "config": {"rootfs": "/tmp/stand-in", "labels": ["a=b", "bundle=/tmp"]},
        });
        let state = adopted(state, 77, 88, Path::new("/srv/web/rootfs"), Path::new("/srv/web"));
        assert_eq!(state["namespace_paths"]["NEWPID"], "/proc/77/ns/pid");
        assert_eq!(state["config"]["labels"], json!(["a=b", "bundle=/srv/web"]));
        assert_eq!(
            (state["init_process_pid"].as_i64(), state["init_process_start"].as_i64()),
            (Some(77), Some(88))
        );
    }

    #[test]
    fn our_own_start_time_is_read() {
        assert!(start_time(std::process::id() as i32).expect("ourselves") > 0);
    }
}
