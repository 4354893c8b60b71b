//! Who is in a container's control groups, beside them and below them, and how a process gets in and out.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Cgroups, beside, is_gone, read, write};
use crate::error::{ContainerError, Result};

/// A list that names a process without a number is read so many times.
const LOOKS: usize = 3;

impl Cgroups {
    /// Process ids of all members, as this process sees them.
    pub(crate) fn processes(&self) -> Result<Vec<i32>> {
        processes_in(self.freezer()?)
    }

    /// Whether the container made cgroups of its own below its directory.
    pub(crate) fn is_nested(&self) -> Result<bool> {
        let directory = self.freezer()?;
        let entries = fs::read_dir(directory)
            .map_err(ContainerError::io(format!("list {}", directory.display())))?;
        Ok(entries.flatten().any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())))
    }

    /// All processes in the directories and below them, each with its directory: what killing and
    /// removing would reach.
    pub(crate) fn within_reach(&self) -> Result<Vec<(i32, PathBuf)>> {
        let mut found = Vec::new();
        let mut to_look: Vec<PathBuf> = self.paths.values().cloned().collect();
        while let Some(directory) = to_look.pop() {
            let is_top = self.paths.values().any(|path| *path == directory);
            match look_into(&directory) {
                Ok((pids, below)) => {
                    found.extend(pids.into_iter().map(|pid| (pid, directory.clone())));
                    to_look.extend(below);
                }
                // The container may remove what it made.
                Err(ContainerError::Io { source, .. }) if !is_top && is_gone(&source) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// A directory, among these, those beside them and those below, that has tasks in it.
    pub(crate) fn peopled(&self) -> Result<Option<PathBuf>> {
        let found = self.paths.values().flat_map(|path| [path.clone(), beside(path)]);
        found.map(|path| peopled(&path)).find_map(Result::transpose).transpose()
    }

    /// Puts process `pid` into every one of the directories.
    pub(crate) fn enter(&self, pid: i32) -> Result<()> {
        for directory in self.paths.values() {
            write(&directory.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// Takes process `pid` out of the frozen directory into one beside it. It is removed with the
    /// others.
    pub(crate) fn step_aside(&self, pid: i32) -> Result<()> {
        let beside = beside(self.freezer()?);
        match fs::create_dir(&beside) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(ContainerError::io(format!("make {}", beside.display()))(error));
            }
            _ => {}
        }
        write(&beside.join("cgroup.procs"), &pid.to_string())
    }

    /// Removes what a restored one's CRIU stood aside in, once that is gone.
    pub(crate) fn remove_aside(&self) {
        for directory in self.paths.values() {
            let _ = fs::remove_dir(beside(directory));
        }
    }
}

/// `directory`, or one below it, when there are tasks in it: of whatever PID namespace.
fn peopled(directory: &Path) -> Result<Option<PathBuf>> {
    let failed = |error| ContainerError::io(format!("look into {}", directory.display()))(error);
    match fs::read_to_string(directory.join("cgroup.procs")) {
        Ok(text) if text.trim().is_empty() => {}
        Ok(_) => return Ok(Some(directory.to_owned())),
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(failed(error)),
    }
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let below = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    below.map(|entry| peopled(&entry.path())).find_map(Result::transpose).transpose()
}

/// Processes in a directory, and the directories below it.
fn look_into(directory: &Path) -> Result<(Vec<i32>, Vec<PathBuf>)> {
    let pids = processes_in(directory)?;
    let entries = fs::read_dir(directory)
        .map_err(ContainerError::io(format!("list {}", directory.display())))?;
    let below = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|it| it.is_dir()));
    Ok((pids, below.map(|entry| entry.path()).collect()))
}

fn processes_in(directory: &Path) -> Result<Vec<i32>> {
    let path = directory.join("cgroup.procs");
    numbered(|| read(&path))?.ok_or_else(|| stranger(path))
}

/// The numbers in what `read` reads, a `cgroup.procs`; nothing when one of its processes has none here. Where a
/// process is waited for while the kernel (of v2) writes the list, that has none there either, and is gone in the
/// next one.
fn numbered(read: impl Fn() -> Result<String>) -> Result<Option<Vec<i32>>> {
    for _ in 0..LOOKS {
        if let (pids, true) = parse_processes(&read()?) {
            return Ok(Some(pids));
        }
    }
    Ok(None)
}

/// Processes in `directory` and below it (a directory that is gone has none), and an error when there are
/// others, which have no number here.
pub(super) fn processes_below(directory: &Path) -> Result<(BTreeSet<i32>, Option<ContainerError>)> {
    let (mut found, mut unknown) = (BTreeSet::new(), None);
    let mut to_look = vec![directory.to_owned()];
    while let Some(directory) = to_look.pop() {
        let path = directory.join("cgroup.procs");
        match fs::read_to_string(&path) {
            Ok(text) => {
                let (pids, all) = parse_processes(&text);
                found.extend(pids);
                unknown = unknown.or_else(|| (!all).then(|| stranger(path)));
            }
            Err(error) if is_gone(&error) => continue,
            Err(error) => {
                return Err(ContainerError::io(format!("read {}", path.display()))(error));
            }
        }
        match fs::read_dir(&directory) {
            Ok(entries) => {
                let entries = entries.flatten();
                let below = entries.filter(|entry| entry.file_type().is_ok_and(|it| it.is_dir()));
                to_look.extend(below.map(|entry| entry.path()));
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => {
                return Err(ContainerError::io(format!("list {}", directory.display()))(error));
            }
        }
    }
    Ok((found, unknown))
}

/// The numbers in a `cgroup.procs`, and whether all of its processes have one here.
fn parse_processes(text: &str) -> (Vec<i32>, bool) {
    let number = |line: &str| line.trim().parse().ok().filter(|pid| *pid > 0);
    let pids: Vec<i32> = text.lines().filter_map(number).collect();
    let all = pids.len() == text.lines().count();
    (pids, all)
}

fn stranger(path: PathBuf) -> ContainerError {
    ContainerError::malformed(path, "names a process of another PID namespace")
}

#[cfg(test)]
mod tests {
    use super::super::tests::in_one;
    use super::*;

    #[test]
    fn processes_of_other_namespaces_hide_no_others() {
        assert_eq!(parse_processes("12\n0\n7\n"), (vec![12, 7], false));
        assert_eq!(parse_processes("12\n7\n"), (vec![12, 7], true));
        assert_eq!(parse_processes(""), (Vec::new(), true));
        let texts = |texts: [&'static str; LOOKS]| {
            let turn = std::cell::Cell::new(0);
            numbered(|| Ok(texts[turn.replace(turn.get() + 1)].to_owned())).expect("read")
        };
        assert_eq!(
            texts(["12\n0\n", "12\n7\n", "no more"]),
            Some(vec![12, 7]),
            "it was waited for"
        );
        assert_eq!(texts(["12\n0\n"; LOOKS]), None);
    }

    /// Made by the container, and removed by it.
    #[test]
    fn what_is_gone_below_has_nobody() {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("web");
        let cgroups = in_one("", &directory);
        cgroups.within_reach().expect_err("its own is gone");
        fs::create_dir_all(directory.join("below")).expect("a directory");
        fs::write(directory.join("cgroup.procs"), "7\n").expect("written");
        assert_eq!(cgroups.within_reach().expect("readable"), [(7, directory)]);
    }

    #[test]
    fn tasks_are_found_beside_and_below() {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("web");
        let cgroups = in_one("", &directory);
        assert_eq!(cgroups.peopled().expect("nothing there"), None);
        let procs = |path: &Path, text: &str| {
            fs::create_dir_all(path).expect("a directory");
            fs::write(path.join("cgroup.procs"), text).expect("written");
        };
        procs(&directory, "");
        assert_eq!(cgroups.peopled().expect("empty"), None);
        // Of another PID namespace.
        procs(&directory.join("below"), "0\n");
        assert_eq!(cgroups.peopled().expect("readable"), Some(directory.join("below")));
        procs(&directory.join("below"), "");
        procs(&beside(&directory), "7\n");
        assert_eq!(cgroups.peopled().expect("readable"), Some(beside(&directory)));
    }
}
