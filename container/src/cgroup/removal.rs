//! The end of a container's control groups: whoever is left in them is killed, and they are removed.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use super::members::processes_below;
use super::{Cgroups, PARENT, beside, unless_gone, write};
use crate::error::{ContainerError, Result};
use crate::sys;

/// Tasks that were killed are gone within this, or something is wrong with the host.
const EMPTY_WITHIN: Duration = Duration::from_secs(10);

impl Cgroups {
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

/// Kills all of `pids`; one that has ended by itself is as good.
pub(crate) fn kill_each(pids: &BTreeSet<i32>) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::read;
    use super::*;

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
}
