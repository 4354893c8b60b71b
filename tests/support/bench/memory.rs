//! What moving costs in memory: the proportional set size of the agent and its helpers on one host,
//! plus the tmpfs and memfd bytes that they hold, minus the workload's own.
//!
//! Shared memory is left out of the set sizes and counted by what is allocated, once for each
//! object, however many processes map it. A helper is every process of the host that is not of a
//! workload: those live in PID namespaces of their own. What the kernel holds (socket buffers, page
//! tables) is seen by neither figure.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use nix::sys::statvfs::statvfs;

use crate::error::{BenchError, Result};
use crate::median_of;
use crate::row::Row;

/// The memory of a guest, which is the workload's own: the name of its memfd.
const GUEST: &str = "/memfd:decamp-guest";
/// Between two samples.
const PERIOD: Duration = Duration::from_millis(10);
/// MiB that a move may cost, whatever the workload.
const ALLOWED: f64 = 64.0;

/// Samples one host until it is told to stop, and remembers the most.
pub(crate) struct Sampler {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Usage>,
}

/// Bytes of one sample, by what holds them; or the sample that held the most.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Private and file pages of the agent and its helpers.
    pub(crate) processes: u64,
    /// Memfds but the guest's memory.
    pub(crate) memfds: u64,
    /// Files on their tmpfs.
    pub(crate) tmpfs: u64,
    /// How many samples there were.
    pub(crate) samples: u32,
}

impl Usage {
    pub(crate) fn total(&self) -> u64 {
        self.processes + self.memfds + self.tmpfs
    }
}

impl Usage {
    pub(crate) fn text(&self) -> String {
        format!(
            "{:.1} MiB at the most: processes {:.1}, memfds {:.1}, tmpfs {:.1} ({} samples)",
            mib(self.total()),
            mib(self.processes),
            mib(self.memfds),
            mib(self.tmpfs),
            self.samples
        )
    }
}

/// The row of a scenario, one usage a move of a workload that has `memory` bytes.
pub(crate) fn row(
    (scenario, how): (&'static str, &str),
    most: &[Usage],
    memory: u64,
) -> Result<Row> {
    let target = ALLOWED + mib(memory) / 512.0;
    let totals: Vec<f64> = most.iter().map(|usage| mib(usage.total())).collect();
    let samples = most.iter().map(|usage| usage.samples).min().unwrap_or(0);
    let part = |part: fn(&Usage) -> u64| median_of(most.iter().map(|usage| mib(part(usage))));
    let note = format!(
        "The most at the source during a move {how}, of {samples} samples or more a move (a peak \
         between two of them is missed): set sizes of agent and helpers {:.1}, memfds {:.1}, tmpfs \
         {:.1} MiB in the median; the workload's own left out. What the kernel holds for them \
         (socket buffers, page tables) is not in it. Target: {ALLOWED} MiB and 1/512 of the \
         workload's {:.0} MiB, each move.",
        part(|usage| usage.processes),
        part(|usage| usage.memfds),
        part(|usage| usage.tmpfs),
        mib(memory)
    );
    Row::alone((scenario, "memory_overhead", "MiB"), &totals, target, note)
        .ok_or_else(|| BenchError::wrong("No move's memory was sampled"))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl Sampler {
    /// Starts. `init` is PID 1 of the host, as seen from here.
    pub(crate) fn start(init: i32) -> Result<Self> {
        let end = Arc::new(AtomicBool::new(false));
        let stop = end.clone();
        let thread = std::thread::Builder::new()
            .name("memory".into())
            .spawn(move || sample_until(&stop, init))
            .map_err(BenchError::io("start a thread"))?;
        Ok(Self { end, thread })
    }

    /// The sample with the largest total.
    pub(crate) fn most(self) -> Result<Usage> {
        self.end.store(true, Ordering::Relaxed);
        let most =
            self.thread.join().map_err(|_| BenchError::wrong("The sampling of memory panicked"))?;
        if most.samples == 0 || most.processes == 0 {
            return Err(BenchError::wrong("No sample of the agent's memory could be taken"));
        }
        Ok(most)
    }
}

fn sample_until(end: &AtomicBool, init: i32) -> Usage {
    let outside = own_filesystems();
    let mut most = Usage::default();
    let mut samples = 0;
    while !end.load(Ordering::Relaxed) {
        let usage = sample(init, &outside);
        samples += 1;
        if usage.total() > most.total() {
            most = usage;
        }
        sleep(PERIOD);
    }
    Usage { samples, ..most }
}

/// One look at all helpers. One that ends while it is looked at counts with what was seen of it.
fn sample(init: i32, outside: &HashSet<String>) -> Usage {
    let mut usage = Usage::default();
    let mut memfds = HashMap::new();
    // What this process sees too is the machine's, and no helper's.
    let mut filesystems: HashMap<String, u64> = outside.iter().map(|it| (it.clone(), 0)).collect();
    for process in helpers(init) {
        usage.processes += private_bytes(&process).unwrap_or(0);
        shared_objects(&process, &mut memfds);
        tmpfs_bytes(&process, &mut filesystems);
    }
    usage.memfds = memfds.values().sum();
    usage.tmpfs = filesystems.values().sum();
    usage
}

/// Directories below /proc of all processes in the host's own PID namespace, PID 1 left out.
fn helpers(init: i32) -> Vec<PathBuf> {
    let namespace =
        |process: &Path| fs::metadata(process.join("ns/pid")).map(|found| found.ino()).ok();
    let own = PathBuf::from(format!("/proc/{init}"));
    let Some(wanted) = namespace(&own) else { return Vec::new() };
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let processes = entries.flatten().map(|entry| entry.path());
    let numbered = processes.filter(|path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
    });
    numbered.filter(|path| *path != own && namespace(path) == Some(wanted)).collect()
}

/// The proportional set size without shared memory, in bytes.
fn private_bytes(process: &Path) -> Option<u64> {
    let text = fs::read_to_string(process.join("smaps_rollup")).ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    };
    Some((field("Pss:")? - field("Pss_Shmem:")?) * 1024)
}

/// Memfds and shared anonymous memory, by identity, the guest's left out.
fn shared_objects(process: &Path, found: &mut HashMap<(u64, u64), u64>) {
    for directory in ["fd", "map_files"] {
        let Ok(entries) = fs::read_dir(process.join(directory)) else { continue };
        for entry in entries.flatten() {
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let target = target.to_string_lossy();
            let shared = target.starts_with("/memfd:") || target.starts_with("/dev/zero (deleted)");
            if !shared || target.starts_with(GUEST) {
                continue;
            }
            if let Ok(object) = fs::metadata(entry.path()) {
                found.insert((object.dev(), object.ino()), object.blocks() * 512);
            }
        }
    }
}

/// What is in use on every tmpfs that the process sees.
fn tmpfs_bytes(process: &Path, found: &mut HashMap<String, u64>) {
    let Ok(mounts) = fs::read_to_string(process.join("mountinfo")) else { return };
    let mut hidden = HashSet::new();
    // From the end: what was mounted last lies over what stands before it.
    for line in mounts.lines().rev() {
        let Some((device, mount_point, kind)) = parse_mount(line) else { continue };
        if !hidden.insert(mount_point) || kind != "tmpfs" || found.contains_key(device) {
            continue;
        }
        let path = process.join("root").join(mount_point.trim_start_matches('/'));
        if let Ok(held) = statvfs(&path) {
            let used = held.blocks().saturating_sub(held.blocks_free());
            found.insert(device.to_owned(), used * held.fragment_size());
        }
    }
}

/// Devices of all file systems that this process sees.
fn own_filesystems() -> HashSet<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().filter_map(parse_mount).map(|mount| mount.0.to_owned()).collect()
}

/// Device, mount point and file system of a line of mountinfo (proc(5)).
fn parse_mount(line: &str) -> Option<(&str, &str, &str)> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(2);
    let device = fields.next()?;
    Some((device, fields.nth(1)?, filesystem.split(' ').next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line = "36 35 0:25 / /run/x rw,noatime master:1 - tmpfs decamp rw,size=1k";
        assert_eq!(parse_mount(line), Some(("0:25", "/run/x", "tmpfs")));
        assert_eq!(parse_mount("36 35 0:25 /"), None);
    }

    #[test]
    fn this_process_has_memory_of_its_own() {
        assert!(private_bytes(Path::new("/proc/self")).is_some_and(|bytes| bytes > 4096));
    }

    #[test]
    fn a_memfd_is_counted_once_and_by_what_is_allocated() {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        use std::io::Write;
        let count = || {
            let mut found = HashMap::new();
            shared_objects(Path::new("/proc/self"), &mut found);
            shared_objects(Path::new("/proc/self"), &mut found);
            found.values().sum::<u64>()
        };
        let before = count();
        let memfd = memfd_create(c"bench-test", MFdFlags::MFD_CLOEXEC).expect("a memfd");
        let mut file = fs::File::from(memfd);
        file.set_len(1 << 30).expect("length");
        file.write_all(&[1; 65536]).expect("written");
        assert_eq!(count() - before, 65536);
    }
}
