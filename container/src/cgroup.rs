//! A container's control groups: who is in them, freezing and thawing, limits, and their removal.
//!
//! The runtime makes them; both hierarchies (v1 with a freezer of its own, and v2) are spoken here.
//! CRIU never touches them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use decamp_shared::workload::Place;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{ContainerError, Result};
use crate::spec::runtime_id;
use crate::sys;

/// Below the mount point of each hierarchy, the one directory that is ours.
const PARENT: &str = "decamp";
/// Freezing takes microseconds; a task that does not stop for so long is stuck in the kernel.
const FREEZE_WITHIN: Duration = Duration::from_secs(5);
/// Tasks that were killed are gone within this, or something is wrong with the host.
const EMPTY_WITHIN: Duration = Duration::from_secs(10);
/// Files whose values travel, by v1 controller ("" is v2). What follows from the host alone (device
/// filters, processor sets) is made by the destination's own runtime.
const SETTINGS: [(&str, &[&str]); 4] = [
    ("memory", &["memory.limit_in_bytes", "memory.soft_limit_in_bytes"]),
    ("cpu", &["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us"]),
    ("pids", &["pids.max"]),
    ("", &["memory.max", "memory.high", "memory.low", "cpu.max", "cpu.weight", "pids.max"]),
];
/// A value of a setting is never longer.
const VALUE_CAP: usize = 128;

/// The directories of one container, by controller; one entry with an empty name on v2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cgroups {
    paths: BTreeMap<String, PathBuf>,
}

/// One limit, as it stands in a file of a controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Setting {
    /// v1 controller, or nothing on v2.
    controller: String,
    /// Name of the file.
    file: String,
    /// Its content without the newline.
    value: String,
}

impl Setting {
    /// Whether it limits how many tasks there are.
    pub(crate) fn limits_tasks(&self) -> bool {
        self.file == "pids.max"
    }

    /// The same, of no effect.
    pub(crate) fn lifted(&self) -> Self {
        Self { value: "max".to_owned(), ..self.clone() }
    }
}

/// What the runtime's configuration calls the container's cgroup.
pub(crate) fn cgroups_path(place: &Place) -> Result<String> {
    Ok(format!("/{PARENT}/{}", runtime_id(place)?))
}

impl Cgroups {
    /// The directories that a runtime's state names (`cgroup_paths`).
    pub(crate) fn from_state(paths: &Value) -> Result<Self> {
        let bad = |what: &str| ContainerError::State(format!("The runtime's state {what}"));
        let mut found = BTreeMap::new();
        for (controller, path) in paths.as_object().ok_or_else(|| bad("names no cgroups"))? {
            let path = path.as_str().ok_or_else(|| bad("names a cgroup that is no path"))?;
            found.insert(controller.clone(), PathBuf::from(path));
        }
        let cgroups = Self { paths: found };
        cgroups.freezer()?;
        Ok(cgroups)
    }

    /// Wherever a container of this place would have its directories on this host: for a sweep, which
    /// does not know what the runtime made of them.
    pub(crate) fn of_place(place: &Place) -> Result<Self> {
        Self::at(&format!("/{PARENT}/{}", runtime_id(place)?))
    }

    /// Those whose path is `path` in any hierarchy, whether they are there or not.
    pub(crate) fn at(path: &str) -> Result<Self> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo")
            .map_err(ContainerError::io("read /proc/self/mountinfo"))?;
        let below = |mount_point: &str| Path::new(mount_point).join(path.trim_start_matches('/'));
        let mounts = cgroup_mounts(&mountinfo).into_iter();
        Ok(Self {
            paths: mounts.map(|mount_point| (mount_point.to_owned(), below(mount_point))).collect(),
        })
    }

    /// Where a hierarchy of [`Cgroups::of_place`] is mounted: one that everybody on this host has.
    pub(crate) fn mount_point(&self) -> Result<PathBuf> {
        // One that another mount hides is still listed.
        let mut mounted = self.paths.keys().map(PathBuf::from);
        mounted.find(|path| path.is_dir()).ok_or_else(|| {
            ContainerError::State("No cgroup hierarchy is mounted on this host".to_owned())
        })
    }

    /// A directory, among these, those beside them and those below, that has tasks in it.
    pub(crate) fn peopled(&self) -> Result<Option<PathBuf>> {
        let found = self.paths.values().flat_map(|path| [path.clone(), beside(path)]);
        found.map(|path| peopled(&path)).find_map(Result::transpose).transpose()
    }

    /// All processes in the directories and below them, each with its directory: what killing and
    /// removing would reach.
    pub(crate) fn within_reach(&self) -> Result<Vec<(i32, PathBuf)>> {
        let mut found = Vec::new();
        let mut to_look: Vec<PathBuf> = self.paths.values().cloned().collect();
        while let Some(directory) = to_look.pop() {
            found.extend(processes_in(&directory)?.into_iter().map(|pid| (pid, directory.clone())));
            let entries = fs::read_dir(&directory)
                .map_err(ContainerError::io(format!("list {}", directory.display())))?;
            let below =
                entries.flatten().filter(|entry| entry.file_type().is_ok_and(|it| it.is_dir()));
            to_look.extend(below.map(|entry| entry.path()));
        }
        Ok(found)
    }

    fn is_v2(&self) -> bool {
        !self.paths.contains_key("freezer")
    }

    /// The directory whose tasks are frozen and thawed together.
    pub(crate) fn freezer(&self) -> Result<&Path> {
        let found = self.paths.get("freezer").or_else(|| self.paths.get(""));
        found.map(PathBuf::as_path).ok_or_else(|| {
            ContainerError::State("The container has no cgroup that can be frozen".to_owned())
        })
    }

    /// The directory of a v1 controller.
    pub(crate) fn controller(&self, name: &str) -> Option<&Path> {
        self.paths.get(name).map(PathBuf::as_path)
    }

    /// Stops every task, and returns when all of them stand still. On an error all of them run.
    pub(crate) fn freeze(&self) -> Result<()> {
        self.stop_all().inspect_err(|_| {
            if let Err(error) = self.thaw() {
                tracing::error!(%error, "Cannot thaw what could not be frozen");
            }
        })
    }

    fn stop_all(&self) -> Result<()> {
        let directory = self.freezer()?;
        let begun = Instant::now();
        let mut again = Instant::now();
        self.write_freezer(true)?;
        while !self.is_frozen()? {
            if begun.elapsed() > FREEZE_WITHIN {
                return Err(ContainerError::State(format!(
                    "The tasks in {} did not stop within {} s",
                    directory.display(),
                    FREEZE_WITHIN.as_secs()
                )));
            }
            if again.elapsed() > Duration::from_millis(20) {
                // A task that forked at the wrong moment is caught by asking v1 once more.
                again = Instant::now();
                self.write_freezer(true)?;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// Marks the directory as frozen without waiting: tasks that are traced just now stop as soon
    /// as their tracer lets them go.
    pub(crate) fn freeze_when_free(&self) -> Result<()> {
        self.write_freezer(true)
    }

    /// Lets every task run. Where the cgroup is gone, with all its tasks, there is nothing to do.
    pub(crate) fn thaw(&self) -> Result<()> {
        unless_gone(self.write_freezer(false))
    }

    /// Whether every task stands still.
    pub(crate) fn is_frozen(&self) -> Result<bool> {
        let directory = self.freezer()?;
        if self.is_v2() {
            let events = read(&directory.join("cgroup.events"))?;
            Ok(events.lines().any(|line| line == "frozen 1"))
        } else {
            Ok(read(&directory.join("freezer.state"))?.trim() == "FROZEN")
        }
    }

    /// Whether somebody has it stand still, or is about to.
    pub(crate) fn is_suspended(&self) -> Result<bool> {
        let directory = self.freezer()?;
        if self.is_v2() {
            return Ok(read(&directory.join("cgroup.freeze"))?.trim() == "1");
        }
        Ok(read(&directory.join("freezer.state"))?.trim() != "THAWED")
    }

    fn write_freezer(&self, frozen: bool) -> Result<()> {
        let directory = self.freezer()?;
        let (file, value) = match (self.is_v2(), frozen) {
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
        };
        write(&directory.join(file), value)
    }

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

    /// Limits as they are now.
    pub(crate) fn settings(&self) -> Vec<Setting> {
        let mut found = Vec::new();
        for (controller, files) in SETTINGS {
            let Some(directory) = self.paths.get(controller) else { continue };
            for file in files {
                // A controller that is not enabled has no such file.
                if let Ok(value) = fs::read_to_string(directory.join(file)) {
                    found.push(Setting {
                        controller: controller.to_owned(),
                        file: (*file).to_owned(),
                        value: value.trim().to_owned(),
                    });
                }
            }
        }
        found
    }

    /// Sets limits that came from the source. One that this host does not have is said and left out.
    pub(crate) fn apply(&self, settings: &[Setting]) -> Result<()> {
        for setting in settings {
            let known = SETTINGS.iter().any(|(controller, files)| {
                *controller == setting.controller && files.contains(&setting.file.as_str())
            });
            if !known || setting.value.len() > VALUE_CAP {
                return Err(ContainerError::section(
                    "container/state",
                    format!("sets {:?}, which is no limit", setting.file),
                ));
            }
            let Some(directory) = self.paths.get(&setting.controller) else { continue };
            let path = directory.join(&setting.file);
            let current = fs::read_to_string(&path).unwrap_or_default();
            if current.trim() == setting.value {
                continue;
            }
            if let Err(error) = fs::write(&path, &setting.value) {
                tracing::warn!(path = %path.display(), value = setting.value, %error, "Cannot set a limit as it was at the source");
            }
        }
        Ok(())
    }

    /// The memory limit in bytes, when there is one.
    pub(crate) fn memory_limit(&self) -> Option<u64> {
        let (directory, file) = match self.paths.get("memory") {
            Some(directory) => (directory, "memory.limit_in_bytes"),
            None => (self.paths.get("")?, "memory.max"),
        };
        let limit: u64 = fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok()?;
        // v1 says "none" by a number near 2^63.
        (limit < 1 << 60).then_some(limit)
    }

    /// Bytes that its members may have in swap beside their memory, as far as the host has that.
    pub(crate) fn swap_allowance(&self) -> u64 {
        let host = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let free = host.lines().find_map(|line| line.strip_prefix("SwapFree:"));
        let free = free.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        let number = |directory: &Path, file| -> Option<u64> {
            fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok()
        };
        let allowed = match self.paths.get("memory") {
            // Memory and swap together.
            Some(directory) => number(directory, "memory.memsw.limit_in_bytes")
                .map(|both| both.saturating_sub(self.memory_limit().unwrap_or(0))),
            None => self.paths.get("").and_then(|directory| number(directory, "memory.swap.max")),
        };
        (free.unwrap_or(0) * 1024).min(allowed.unwrap_or(u64::MAX))
    }

    /// Anonymous memory of its members in bytes, each page once; nothing when nobody counts it.
    pub(crate) fn anonymous_memory(&self) -> Option<u64> {
        let (directory, name) = match self.paths.get("memory") {
            Some(directory) => (directory, "total_rss "),
            None => (self.paths.get("")?, "anon "),
        };
        let text = fs::read_to_string(directory.join("memory.stat")).ok()?;
        text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
    }

    /// Kills every member, and those of cgroups below. Frozen members die when they are thawed, before
    /// they run anything. Where the cgroup is gone there is nothing to do.
    pub(crate) fn kill_all(&self) -> Result<()> {
        kill_in(self.freezer()?)
    }

    /// Removes the directories once their members are gone. What is not there is no error.
    pub(crate) fn remove(&self) -> Result<()> {
        let begun = Instant::now();
        for directory in self.paths.values() {
            for directory in [directory.clone(), beside(directory)] {
                remove_tree(&directory, begun)?;
            }
            // That of an adopted one is somebody else's.
            let ours = |parent: &&Path| parent.file_name().is_some_and(|name| name == PARENT);
            if let Some(parent) = directory.parent().filter(ours) {
                // Shared with the other containers: gone when the last of them is.
                let _ = fs::remove_dir(parent);
            }
        }
        Ok(())
    }

    /// Kills whatever is left in the directories, frozen or not, and removes them. Needs not know
    /// which hierarchy the container was frozen by.
    pub(crate) fn sweep(&self) -> Result<()> {
        // A CRIU that lost its keeper holds tasks that must not run when it is killed before them.
        self.write_freezers("FROZEN", "1")?;
        for directory in self.paths.values() {
            for directory in [directory.clone(), beside(directory)] {
                if directory.exists() {
                    kill_in(&directory)?;
                }
            }
        }
        self.write_freezers("THAWED", "0")?;
        self.remove()
    }

    /// Writes to whatever freezes in the directories: a state of v1, a switch of v2.
    fn write_freezers(&self, state: &str, switch: &str) -> Result<()> {
        for directory in self.paths.values() {
            for (file, value) in [("freezer.state", state), ("cgroup.freeze", switch)] {
                let path = directory.join(file);
                if path.exists() {
                    unless_gone(write(&path, value))?;
                }
            }
        }
        Ok(())
    }
}

/// Kills every task in `directory` and below it. On an error some of them live, and would run if they were
/// thawed.
fn kill_in(directory: &Path) -> Result<()> {
    // On v2 the kernel does it, newly forked ones included (Linux 5.14).
    let switch = directory.join("cgroup.kill");
    if switch.exists() {
        return unless_gone(write(&switch, "1"));
    }
    // Until nobody is found who was not killed before: what runs may have forked meanwhile. What is killed
    // forks no more, and stays here as long as it is frozen.
    let begun = Instant::now();
    let mut killed = BTreeSet::new();
    loop {
        let (found, unknown) = processes_below(directory)?;
        kill_each(&found)?;
        if found.is_subset(&killed) {
            return unknown.map_or(Ok(()), Err);
        }
        if begun.elapsed() > EMPTY_WITHIN {
            return Err(ContainerError::State(format!(
                "The tasks in {} fork faster than they can be killed",
                directory.display()
            )));
        }
        killed = found;
    }
}

fn kill_each(pids: &BTreeSet<i32>) -> Result<()> {
    let mut first = Ok(());
    for pid in pids {
        let killed = sys::pidfd_open(*pid).and_then(|process| sys::pidfd_kill(process.as_fd()));
        match killed {
            // One that has just died by itself is as dead as we want it.
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) && first.is_ok() => {
                first = Err(ContainerError::io(format!("kill process {pid}"))(error));
            }
            _ => {}
        }
    }
    first
}

/// Processes in `directory` and below it (a directory that is gone has none), and an error when there are
/// others, which have no number here.
fn processes_below(directory: &Path) -> Result<(BTreeSet<i32>, Option<ContainerError>)> {
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

/// A directory beside a container's own. No workload's name begins with a dot.
fn beside(directory: &Path) -> PathBuf {
    let mut name = OsString::from(".criu-");
    name.push(directory.file_name().unwrap_or_default());
    directory.with_file_name(name)
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

/// Whether an error says that a cgroup is no longer there.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// The outcome of something done to a cgroup, which need not be done where that is no longer there.
fn unless_gone(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(ContainerError::Io { source, .. }) if is_gone(&source) => Ok(()),
        outcome => outcome,
    }
}

fn remove_tree(directory: &Path, begun: Instant) -> Result<()> {
    if let Ok(entries) = fs::read_dir(directory) {
        for entry in
            entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        {
            remove_tree(&entry.path(), begun)?;
        }
    }
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(_) if begun.elapsed() < EMPTY_WITHIN => {
                std::thread::sleep(Duration::from_millis(1))
            }
            Err(error) => {
                return Err(ContainerError::io(format!("remove {}", directory.display()))(error));
            }
        }
    }
}

fn processes_in(directory: &Path) -> Result<Vec<i32>> {
    let path = directory.join("cgroup.procs");
    match parse_processes(&read(&path)?) {
        (pids, true) => Ok(pids),
        (_, false) => Err(stranger(path)),
    }
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

/// Mount points of all cgroup hierarchies.
fn cgroup_mounts(mountinfo: &str) -> Vec<&str> {
    let mount_point = |line| -> Option<&str> {
        let (left, right): (&str, &str) = str::split_once(line, " - ")?;
        right.starts_with("cgroup").then(|| left.split(' ').nth(4))?
    };
    mountinfo.lines().filter_map(mount_point).collect()
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(ContainerError::io(format!("read {}", path.display())))
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value)
        .map_err(ContainerError::io(format!("write {value:?} to {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_of_both_versions() {
        let text = "\
31 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:27 / /sys/fs/cgroup/freezer rw,relatime shared:4 - cgroup cgroup rw,freezer
34 31 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
        assert_eq!(cgroup_mounts(text), ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup/unified"]);
    }

    #[test]
    fn processes_of_other_namespaces_hide_no_others() {
        assert_eq!(parse_processes("12\n0\n7\n"), (vec![12, 7], false));
        assert_eq!(parse_processes("12\n7\n"), (vec![12, 7], true));
        assert_eq!(parse_processes(""), (Vec::new(), true));
    }

    #[test]
    fn what_is_gone_is_dead_and_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        let paths = BTreeMap::from([("freezer".to_owned(), directory.path().join("gone"))]);
        let cgroups = Cgroups { paths };
        for _ in 0..2 {
            cgroups.kill_all().expect("nobody to kill");
            cgroups.thaw().expect("nobody to thaw");
            cgroups.remove().expect("nothing to remove");
        }
        assert!(cgroups.freeze().is_err(), "nobody stands still who is not there");
    }

    /// On v1, where the kernel does not kill a whole tree.
    #[test]
    fn who_is_in_a_cgroup_below_is_killed_too() {
        let name = format!("decamp-below-{}", std::process::id());
        let top = Path::new("/sys/fs/cgroup/freezer").join(name);
        let below = top.join("below").join("further");
        if let Err(error) = fs::create_dir_all(&below) {
            return eprintln!("skipped: no freezer of cgroups v1 to use: {error}");
        }
        let cgroups = Cgroups { paths: BTreeMap::from([("freezer".to_owned(), top.clone())]) };
        let sleeps = || std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let mut children = [sleeps(), sleeps(), sleeps()];
        for (child, directory) in children.iter().zip([&top, &top.join("below"), &below]) {
            write(&directory.join("cgroup.procs"), &child.id().to_string()).expect("moved");
        }
        cgroups.freeze().expect("frozen");
        cgroups.kill_all().expect("killed");
        cgroups.thaw().expect("thawed");
        for child in &mut children {
            let status = child.wait().expect("dead");
            assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
        }
        cgroups.remove().expect("removed");
        assert!(!top.exists());
    }

    #[test]
    fn a_peer_sets_nothing_but_limits() {
        let cgroups =
            Cgroups { paths: BTreeMap::from([("pids".to_owned(), PathBuf::from("/nowhere"))]) };
        let setting = |file: &str| Setting {
            controller: "pids".to_owned(),
            file: file.to_owned(),
            value: "7".to_owned(),
        };
        assert!(cgroups.apply(&[setting("../../../tmp/x")]).is_err());
        assert!(cgroups.apply(&[setting("cgroup.procs")]).is_err());
        // The directory is missing, which is said in the log and no more.
        assert!(cgroups.apply(&[setting("pids.max")]).is_ok());
    }

    #[test]
    fn no_workload_has_the_name_of_what_stands_beside_another() {
        let place = |name: &str| Place { name: name.into(), uuid: "u".into(), dir: "/x".into() };
        for name in ["web", "web.criu", "-criu"] {
            let directory = Path::new("/sys/fs/cgroup/decamp").join(name);
            let beside = beside(&directory);
            assert_eq!(beside.parent(), directory.parent());
            let taken = beside.file_name().and_then(|name| name.to_str()).expect("a name");
            assert!(runtime_id(&place(taken)).is_err(), "{taken} can be a workload");
        }
    }

    fn in_one(hierarchy: &str, directory: &Path) -> Cgroups {
        Cgroups { paths: BTreeMap::from([(hierarchy.to_owned(), directory.to_owned())]) }
    }

    #[test]
    fn what_cannot_be_frozen_runs_again() {
        // A cgroup without the file that says whether all stand still.
        let directory = tempfile::tempdir().expect("a directory");
        let cgroups = in_one("", directory.path());
        cgroups.freeze().expect_err("nothing says whether it is frozen");
        assert_eq!(read(&directory.path().join("cgroup.freeze")).expect("readable"), "0");
    }

    #[test]
    fn only_the_dead_may_fail_to_be_killed() {
        let directory = tempfile::tempdir().expect("a directory");
        let sleeper = || std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let procs = |pids: &[u32]| {
            let text: String = pids.iter().map(|pid| format!("{pid}\n")).collect();
            fs::write(directory.path().join("cgroup.procs"), text).expect("written");
        };
        let mut dead = sleeper();
        dead.kill().and_then(|()| dead.wait()).expect("ended");
        let mut one = sleeper();
        procs(&[dead.id(), one.id()]);
        kill_in(directory.path()).expect("one was dead, one is now");
        assert!(!one.wait().expect("reaped").success());
        // A thread that is no process cannot be killed this way; whoever comes after it still is.
        let thread = nix::unistd::gettid().as_raw() as u32;
        assert_ne!(thread, std::process::id(), "tests run in threads");
        let mut two = sleeper();
        procs(&[thread, two.id()]);
        let error = kill_in(directory.path()).expect_err("not killed");
        assert!(error.to_string().contains(&format!("kill process {thread}")), "{error}");
        assert!(!two.wait().expect("reaped").success());
    }

    #[test]
    fn the_kernel_kills_where_it_can() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("cgroup.kill"), "").expect("written");
        kill_in(directory.path()).expect("killed");
        assert_eq!(read(&directory.path().join("cgroup.kill")).expect("readable"), "1");
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

    #[test]
    fn a_state_without_a_freezer_is_refused() {
        assert!(Cgroups::from_state(&serde_json::json!({"memory": "/x"})).is_err());
        assert!(Cgroups::from_state(&serde_json::json!({"": "/x"})).is_ok());
        assert!(Cgroups::from_state(&serde_json::json!({"freezer": 3})).is_err());
    }
}
