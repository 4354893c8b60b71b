//! The control groups of one VM's keeper, in which its processor time and memory are counted, and can be limited by
//! whoever wants to. They lie where those of containers lie, outside of the agent's own: ending a service does not
//! end its guests.
//!
//! A keeper enters them before it has threads or memory to speak of; its agent removes them when it has gone.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use decamp_shared::workload::Place;

/// Below the root of each hierarchy, the one directory that is ours.
const PARENT: &str = "decamp";
/// What is counted, and may be limited.
const CONTROLLERS: [&str; 4] = ["cpu", "cpuacct", "memory", "pids"];
/// A keeper that has ended has left its groups within this, or something is wrong with the host.
const EMPTY_WITHIN: Duration = Duration::from_secs(10);
/// Somebody may remove the parent, which is empty, just when one is made in it.
const TRIES: usize = 10;

/// The directories of one keeper, one in each hierarchy that there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cgroups {
    hierarchies: Vec<Hierarchy>,
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    root: PathBuf,
    /// Those of [`CONTROLLERS`] that are in it; of version 2, none is named.
    controllers: Vec<&'static str>,
}

impl Cgroups {
    /// Those of the keeper at `place`, whether they are there or not.
    ///
    /// # Errors
    /// When the kernel does not say what is mounted.
    pub(crate) fn of(place: &Place) -> io::Result<Self> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
        Ok(Self { hierarchies: hierarchies(&mountinfo), name: place.name.clone() })
    }

    /// Their directories.
    pub(crate) fn directories(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.hierarchies.iter().map(|one| one.root.join(PARENT).join(&self.name))
    }

    /// Makes them, and has this process be in them. Gives the controllers that it is under then, and why not under
    /// others.
    pub(crate) fn enter(&self) -> (Vec<&'static str>, Vec<String>) {
        let (mut under, mut lacks) = (Vec::new(), Vec::new());
        for (hierarchy, directory) in self.hierarchies.iter().zip(self.directories()) {
            match hierarchy.enter(&directory) {
                Ok(()) => under.extend(hierarchy.controllers_at(&directory)),
                Err(error) => {
                    lacks.push(format!("a control group in {} ({error})", directory.display()));
                }
            }
        }
        let all_entered = lacks.is_empty();
        for (wanted, what) in [("cpu", "processor time"), ("memory", "memory")] {
            if all_entered && !under.contains(&wanted) {
                lacks.push(format!("a control group that limits {what}"));
            }
        }
        (under, lacks)
    }

    /// Removes them. What is not there is no error.
    ///
    /// # Errors
    /// When somebody is still in one, or it may not be removed; the others are removed all the same.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let until = Instant::now() + EMPTY_WITHIN;
        let mut done = Ok(());
        for directory in self.directories() {
            done = done.and(remove(&directory, until));
            if let Some(parent) = directory.parent() {
                // Shared with the other workloads: gone when the last of them is.
                let _ = fs::remove_dir(parent);
            }
        }
        done
    }
}

/// Removes one, once nobody is in it, `until` when that is waited for.
fn remove(directory: &Path, until: Instant) -> io::Result<()> {
    loop {
        match fs::remove_dir(directory) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
            }
            // What can be read alone, as within a container, says that before it says that there is none.
            Err(_) if !directory.exists() => return Ok(()),
            done => return done,
        }
    }
}

impl Hierarchy {
    fn is_v2(&self) -> bool {
        self.controllers.is_empty()
    }

    fn enter(&self, directory: &Path) -> io::Result<()> {
        let mut tries = 0..TRIES;
        loop {
            let entered = self.make(directory).and_then(|()| {
                // 0: the process that writes.
                fs::write(directory.join("cgroup.procs"), "0")
            });
            match entered {
                Err(error) if is_gone(&error) && tries.next().is_some() => {}
                entered => return entered,
            }
        }
    }

    fn make(&self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        if self.is_v2() {
            // Each level hands its controllers down. One that cannot be is missed below.
            for parent in [&self.root, &self.root.join(PARENT)] {
                for controller in CONTROLLERS {
                    let _ =
                        fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
                }
            }
        }
        Ok(())
    }

    fn controllers_at(&self, directory: &Path) -> Vec<&'static str> {
        if !self.is_v2() {
            return self.controllers.clone();
        }
        let text = fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
        let has = |wanted: &&str| text.split_whitespace().any(|word| word == *wanted);
        CONTROLLERS.into_iter().filter(has).collect()
    }
}

/// Whether an error says that a cgroup is no longer there.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// The hierarchies in `mountinfo` that are of use: those of version 1 that have one of [`CONTROLLERS`], or else that
/// of version 2.
fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let (mut first, mut second) = (BTreeMap::new(), None);
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(root) = left.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut words = right.split(' ');
        match words.next() {
            Some("cgroup") => {
                let options = words.nth(1).unwrap_or_default();
                let has = |wanted: &&str| options.split(',').any(|option| option == *wanted);
                let controllers: Vec<_> = CONTROLLERS.into_iter().filter(has).collect();
                // The last of several mounts of one is the one that can be seen.
                if !controllers.is_empty() {
                    first.insert(controllers, root);
                }
            }
            Some("cgroup2") => second = Some(root),
            _ => {}
        }
    }
    if first.is_empty() {
        return second
            .map(|root| Hierarchy { root, controllers: Vec::new() })
            .into_iter()
            .collect();
    }
    first.into_iter().map(|(controllers, root)| Hierarchy { root, controllers }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: &str = "\
31 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:27 / /sys/fs/cgroup/freezer rw,relatime shared:4 - cgroup cgroup rw,freezer
33 31 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
34 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:30 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
36 31 0:31 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn hierarchies_that_count_are_found() {
        let found = hierarchies(BOTH);
        let roots: Vec<_> = found.iter().map(|one| one.root.to_str().expect("text")).collect();
        assert_eq!(roots, ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/memory"]);
        let second = hierarchies("36 31 0:31 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
        assert_eq!(second.len(), 1);
        assert!(second[0].is_v2());
        assert_eq!(hierarchies("no mounts\n - cgroup\n"), []);
    }

    #[test]
    fn what_may_not_be_removed_is_said_at_once_and_the_others_are() {
        let dir = tempfile::tempdir().expect("directory");
        let hierarchies = ["first", "second", "third"].map(|name| {
            let root = dir.path().join(name);
            fs::create_dir_all(root.join("decamp/web")).expect("made");
            Hierarchy { root, controllers: vec!["cpu"] }
        });
        let groups = Cgroups { hierarchies: hierarchies.to_vec(), name: "web".into() };
        fs::write(dir.path().join("first/decamp/web/x"), "").expect("written");
        fs::create_dir(dir.path().join("second/decamp/other")).expect("made");
        let begun = Instant::now();
        let error = groups.remove().expect_err("there is something in it");
        assert_eq!(error.kind(), ErrorKind::DirectoryNotEmpty);
        assert!(begun.elapsed() < EMPTY_WITHIN / 2);
        let there = |path: &str| dir.path().join(path).exists();
        assert!(there("first/decamp/web") && !there("second/decamp/web"));
        assert!(there("second/decamp/other"), "that is another's");
        assert!(there("third") && !there("third/decamp"), "nobody else is in it");
    }

    #[test]
    fn where_there_is_none_it_is_said() {
        let none = Cgroups { hierarchies: Vec::new(), name: "web".into() };
        let (under, lacks) = none.enter();
        assert!(under.is_empty());
        assert_eq!(lacks.len(), 2, "{lacks:?}");
        none.remove().expect("nothing to remove");
        let hierarchy = Hierarchy { root: "/proc/nowhere".into(), controllers: vec!["cpu"] };
        let none = Cgroups { hierarchies: vec![hierarchy], name: "web".into() };
        let (_, lacks) = none.enter();
        assert!(lacks[0].contains("/proc/nowhere/decamp/web"), "{lacks:?}");
    }
}
