//! A container that somebody else started, while it is in a keeper's charge: what of it is not the keeper's
//! to take away, and its standard streams, whose other ends somebody else holds.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use decamp_shared::workload::Place;
use nix::fcntl::Flock;

use crate::cgroup::Cgroups;
use crate::claim::{self, Adopted};
use crate::dump::ContainerState;
use crate::error::{ContainerError, Result};
use crate::kept::Container;
use crate::podman::Conmon;
use crate::restore::oci_directory;
use crate::runtime::Runtime;

/// A killed tree is gone within this.
const DEAD_WITHIN: Duration = Duration::from_secs(10);
/// Standard streams that change are looked at for so long.
const PATIENCE: Duration = Duration::from_millis(250);
const AGAIN: Duration = Duration::from_millis(5);
/// A descriptor that changes while it is looked at is looked at so many times.
const LOOKS: usize = 8;

/// What is known of a container that somebody else started.
pub(crate) struct Foreign {
    /// While this is held nobody else adopts it.
    pub(crate) _lock: Flock<File>,
    pub(crate) streams: ForeignStreams,
    /// Its first process, and when that started.
    pub(crate) init: i32,
    pub(crate) started: u64,
    /// Whether podman is in charge of it.
    pub(crate) podman: bool,
    /// The parent of one that came to podman here.
    pub(crate) _conmon: Option<Conmon>,
}

/// Standard streams that a container was started with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ForeignStreams {
    /// Pipes that it writes to, and whose reader is outside, as CRIU calls them: two at most.
    pub(crate) outputs: Vec<String>,
    /// The pipe that it reads from, and whose writer is outside.
    pub(crate) input: Option<String>,
    /// Owner of the first pipe that it writes to.
    pub(crate) owner: Option<(u32, u32)>,
    /// Whether it has a terminal, whose master is outside.
    pub(crate) terminal: bool,
}

impl Foreign {
    /// Writes down that the container is in our charge.
    pub(crate) fn note(&self, place: &Place, runtime: &Runtime, cgroups: &Cgroups) -> Result<()> {
        let adopted = self.mark(runtime, cgroups);
        claim::note_adopted(place, runtime.kind(), adopted)
    }

    /// What is written down while it is not held.
    pub(crate) fn mark(&self, runtime: &Runtime, cgroups: &Cgroups) -> Adopted {
        let (id, cgroups) = (runtime.id().to_owned(), cgroups.clone());
        let (init, started, podman) = (self.init, self.started, self.podman);
        Adopted { id, cgroups, held: false, init, started, podman }
    }
}

impl ForeignStreams {
    /// Enters them where the destination looks for what to put in their place.
    pub(crate) fn enter(&self, state: &mut ContainerState) {
        let mut outputs = self.outputs.iter();
        if let Some(output) = outputs.next() {
            state.output = output.clone();
        }
        state.output_owner = self.owner.unwrap_or(state.output_owner);
        state.second_output = outputs.next().cloned();
        state.input = self.input.clone();
    }

    /// Those of the processes `pids`, of a container whose first process is `init`; or every reason why
    /// they cannot be taken along. The container runs: what a shell turns to a file for an instant, or the end
    /// of a pipeline that has just lost its other one, is none of them. So one look says what the next one says
    /// too.
    pub(crate) fn find(pids: &[i32], init: i32) -> Result<std::result::Result<Self, Vec<String>>> {
        let begun = Instant::now();
        let mut before = Self::look(pids, init)?;
        loop {
            thread::sleep(AGAIN);
            let now = Self::look(pids, init)?;
            if now == before || begun.elapsed() > PATIENCE {
                return Ok(now.or(before));
            }
            before = now;
        }
    }

    /// The same of one that stands still.
    pub(crate) fn look(pids: &[i32], init: i32) -> Result<std::result::Result<Self, Vec<String>>> {
        let path = format!("/proc/{init}/mountinfo");
        let mountinfo =
            fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))?;
        let mounts: Vec<&str> =
            mountinfo.lines().filter_map(|line| line.split(' ').next()).collect();
        let mut pipes: BTreeMap<String, Ends> = BTreeMap::new();
        let (mut found, mut against) = (Self::default(), Vec::new());
        for pid in pids {
            for descriptor in descriptors(*pid) {
                if descriptor.link.starts_with("pipe:[") {
                    let ends = pipes.entry(descriptor.link.clone()).or_default();
                    ends.add(&descriptor);
                } else if descriptor.number <= 2 {
                    found.judge(&descriptor, &mounts, &mut against);
                }
            }
        }
        for (pipe, ends) in pipes.into_iter().filter(|(_, ends)| ends.standard) {
            match (ends.reads, ends.writes) {
                // Both ends are within: a pipeline of its own.
                (true, true) => {}
                (true, false) if found.input.is_none() => found.input = Some(pipe),
                (false, true) if found.outputs.len() < 2 => {
                    found.owner = found.owner.or(ends.owner);
                    found.outputs.push(pipe);
                }
                _ => against.push(format!(
                    "Its standard streams are more pipes to the outside than three ({pipe})"
                )),
            }
        }
        // Output before errors, whatever their numbers are like.
        let first = fs::read_link(format!("/proc/{init}/fd/1")).ok();
        found.outputs.sort_by_key(|pipe| first.as_deref() != Some(Path::new(pipe)));
        against.sort();
        against.dedup();
        Ok(if against.is_empty() { Ok(found) } else { Err(against) })
    }

    fn judge(&mut self, descriptor: &Descriptor, mounts: &[&str], against: &mut Vec<String>) {
        let Descriptor { number, link, mount, .. } = descriptor;
        let name = ["input", "output", "error"][(*number).min(2) as usize];
        let inside = mounts.contains(&mount.as_str());
        if link.starts_with("socket:[") {
            // One to its own kind would have no number below three.
            against.push(format!("Its standard {name} is a socket, whose other end stays here"));
        } else if inside && link.starts_with("/dev/pts/") {
            self.terminal = true;
        } else if !inside && link != "/dev/null" && link.starts_with('/') {
            against.push(format!(
                "Its standard {name} is {link}, which is outside of the container: start it with \
                 /dev/null, a pipe or a terminal there"
            ));
        }
    }
}

/// Which ends of a pipe a container has.
#[derive(Default)]
struct Ends {
    reads: bool,
    writes: bool,
    /// Whether one of them is a standard stream of some process.
    standard: bool,
    owner: Option<(u32, u32)>,
}

impl Ends {
    fn add(&mut self, descriptor: &Descriptor) {
        let mode = descriptor.flags & libc::O_ACCMODE as u32;
        self.reads |= mode != libc::O_WRONLY as u32;
        self.writes |= mode != libc::O_RDONLY as u32;
        self.standard |= descriptor.number <= 2;
        self.owner = self.owner.or(descriptor.owner);
    }
}

/// An open descriptor of a process.
struct Descriptor {
    number: u32,
    link: String,
    flags: u32,
    mount: String,
    owner: Option<(u32, u32)>,
}

/// Descriptors of process `pid`; what goes away meanwhile is left out.
fn descriptors(pid: i32) -> Vec<Descriptor> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter_map(|number| descriptor(pid, number)).collect()
}

/// All that is known of descriptor `number` of process `pid`, at one time.
fn descriptor(pid: i32, number: u32) -> Option<Descriptor> {
    use std::os::unix::fs::MetadataExt;
    let path = PathBuf::from(format!("/proc/{pid}/fd/{number}"));
    let link = || fs::read_link(&path).ok()?.to_str().map(str::to_owned);
    for _ in 0..LOOKS {
        let before = link()?;
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
        let owner = fs::metadata(&path).ok().map(|found| (found.uid(), found.gid()));
        // By the same number there may be something else by now.
        if link()? != before {
            continue;
        }
        let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name));
        return Some(Descriptor {
            number,
            link: before,
            flags: u32::from_str_radix(field("flags:")?.trim(), 8).ok()?,
            mount: field("mnt_id:")?.trim().to_owned(),
            owner,
        });
    }
    None
}

impl Container {
    /// Gives the container back to its runtime, as it is.
    pub(crate) fn leave_foreign(&mut self) -> Result<()> {
        claim::give_back(&self.config.place)?;
        remove(&oci_directory(&self.config.place));
        self.store.empty();
        self.over = true;
        Ok(())
    }

    /// Ends what is left of it. Its runtime still knows it then, as stopped.
    pub(crate) fn end_foreign(&mut self) -> Result<()> {
        self.cgroups.kill_all()?;
        self.cgroups.thaw()?;
        if self.init.as_ref().is_some_and(|init| !init.wait(DEAD_WITHIN)) {
            return Err(ContainerError::State("The killed container does not die".to_owned()));
        }
        self.leave_foreign()
    }
}

fn remove(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %directory.display(), "Cannot remove a directory");
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::fd::OwnedFd;
    use std::process::{Command, Stdio};

    use super::*;

    fn streams_of(command: &mut Command) -> std::result::Result<ForeignStreams, Vec<String>> {
        command.args(["-c", "echo ready >&2; exec sleep 60"]).stderr(Stdio::piped());
        let mut child = command.spawn().expect("started");
        let mut line = String::new();
        let error = child.stderr.take().expect("its errors");
        BufReader::new(error).read_line(&mut line).expect("a line");
        let pid = child.id() as i32;
        // While the shell speaks its output is elsewhere.
        let name = || fs::read_to_string(format!("/proc/{pid}/comm")).expect("it lives");
        while name() != "sleep\n" {
            std::thread::sleep(Duration::from_millis(1));
        }
        let found = ForeignStreams::find(&[pid], pid).expect("looked");
        child.kill().and_then(|()| child.wait()).expect("ended");
        found
    }

    #[test]
    fn pipes_are_told_apart_and_a_file_within_is_no_matter() {
        let mut shell = Command::new("sh");
        let found = streams_of(shell.stdin(Stdio::piped()).stdout(Stdio::piped())).expect("pipes");
        assert_eq!((found.outputs.len(), found.input.is_some(), found.terminal), (2, true, false));
        let mut shell = Command::new("sh");
        let file = tempfile::tempfile().expect("a file");
        // We and it see the same mounts: a container would not.
        let found = streams_of(shell.stdin(Stdio::null()).stdout(file)).expect("a file");
        assert_eq!((found.outputs.len(), found.input), (1, None));
    }

    #[test]
    fn a_socket_is_refused() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let mut shell = Command::new("sh");
        let against = streams_of(shell.stdin(Stdio::null()).stdout(OwnedFd::from(theirs)));
        assert!(against.expect_err("a socket")[0].contains("standard output is a socket"));
        drop(ours);
    }
}
