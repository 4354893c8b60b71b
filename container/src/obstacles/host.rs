//! What of a host the processes of a container may depend on: told by the source, looked for by the
//! destination, which says everything that it lacks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use decamp_shared::workload::{Refusal, RefusalCode};
use serde::{Deserialize, Serialize};

use super::said::plain;
use crate::huge;

/// `criu check` has this long.
const CHECK_WITHIN: Duration = Duration::from_secs(10);
/// A list from a peer that is longer makes no sense.
const CAP: usize = 1000;
/// Features of x86 CPUs that programs find by CPUID and use, as the kernel names them in /proc/cpuinfo.
const X86: &str = "cmov cx8 fxsr mmx sse sse2 pni ssse3 sse4_1 sse4_2 sse4a popcnt abm lzcnt movbe cx16 \
    lahf_lm aes pclmulqdq xsave xsaveopt xsavec xgetbv1 avx f16c fma fma4 xop tbm avx2 bmi1 bmi2 adx \
    rdrand rdseed sha_ni sha512 sm3 sm4 gfni vaes vpclmulqdq fsgsbase rdtscp rdpid clflush clflushopt clwb \
    clzero cldemote prefetchi 3dnow 3dnowext mmxext rtm hle serialize waitpkg movdiri movdir64b enqcmd ospke \
    user_shstk avx_vnni avx_vnni_int8 avx_vnni_int16 avx_ifma avx_ne_convert cmpccxadd raoint amx_tile \
    amx_int8 amx_bf16 amx_fp16 amx_complex avx10 apx avx512f avx512dq avx512ifma avx512pf avx512er avx512cd \
    avx512bw avx512vl avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_4vnniw \
    avx512_4fmaps avx512_vp2intersect avx512_bf16 avx512_fp16 arat mwaitx";

/// What a container's processes may have found on their host. Empty where the source does not tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostNeeds {
    /// CPU features that programs may use, as the kernel names them.
    pub cpu: Vec<String>,
    /// Bytes that it takes to save all registers of a task (XSAVE), where that is known.
    pub registers: u32,
    /// Bytes of a page.
    pub page_size: u64,
    /// How the old system call page is: 2 it works and can be read, 1 it works, 0 there is none.
    pub vsyscall: u8,
    /// Kinds of namespaces that the kernel has.
    pub namespaces: Vec<String>,
    /// Version of the control groups, 1 or 2.
    pub cgroups: u8,
    /// The highest number that a process has in the container.
    pub highest_pid: i32,
    /// Huge pages (hugetlbfs) that its mappings want, written or not, by their size in bytes.
    pub huge: BTreeMap<u64, u64>,
    /// Security labels that its processes run under ("apparmor:docker-default").
    pub labels: Vec<String>,
}

impl HostNeeds {
    /// What this host has.
    pub(crate) fn of_this_host() -> Self {
        let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let kinds = fs::read_dir("/proc/self/ns").into_iter().flatten().flatten();
        let mut namespaces: Vec<String> =
            kinds.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        namespaces.retain(|kind| !kind.ends_with("_for_children"));
        namespaces.sort();
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        Self {
            cpu: features(&text),
            registers: registers(),
            page_size: page_size(),
            vsyscall: vsyscall(&fs::read_to_string("/proc/self/maps").unwrap_or_default()),
            namespaces,
            cgroups: if unified { 2 } else { 1 },
            ..Self::default()
        }
    }

    /// What the processes `pids` of a container need of this host; `highest_pid` is the highest of their
    /// numbers in it.
    pub(crate) fn of_processes(pids: &[i32], highest_pid: i32) -> Self {
        let labels: BTreeSet<String> = pids.iter().filter_map(|pid| label(*pid)).collect();
        Self {
            highest_pid,
            huge: huge::wanted(pids),
            labels: labels.into_iter().collect(),
            ..Self::of_this_host()
        }
    }

    /// Why a container that needs this cannot come to a host that has `here`.
    pub(crate) fn lacks(&self, here: &Self, free: &Free) -> Vec<Refusal> {
        let mut found = Vec::new();
        let mut refuse = |code, text: String| found.push(Refusal::new(code, text));
        let missing = missing(&self.cpu, &here.cpu);
        if !missing.is_empty() {
            refuse(
                RefusalCode::Cpu,
                format!(
                    "The CPU there lacks {}, which its processes may use: move it to a CPU that has that, \
                     or start it on one that lacks it too",
                    missing.join(", ")
                ),
            );
        } else if here.registers != 0 && self.registers > here.registers {
            refuse(
                RefusalCode::Cpu,
                format!(
                    "A task's registers take {} bytes at the source and {} there: its kernel or hypervisor \
                     has switched something off",
                    self.registers, here.registers
                ),
            );
        }
        if self.page_size != 0 && self.page_size != here.page_size {
            refuse(
                RefusalCode::Kernel,
                format!(
                    "Pages have {} bytes at the source and {} there; both kernels must have the same",
                    self.page_size, here.page_size
                ),
            );
        }
        if self.vsyscall > here.vsyscall {
            const MODES: [&str; 3] = ["none", "xonly", "emulate"];
            let mode = |mode: u8| MODES[usize::from(mode.min(2))];
            refuse(
                RefusalCode::Kernel,
                format!(
                    "The kernel there has less of the old system call page (vsyscall={}) than the source's \
                     ({}), and old programs call it: boot it with vsyscall={1}",
                    mode(here.vsyscall),
                    mode(self.vsyscall)
                ),
            );
        }
        let missing = self::missing(&self.namespaces, &here.namespaces);
        if !missing.is_empty() {
            refuse(
                RefusalCode::Kernel,
                format!(
                    "The kernel there has no namespaces of these kinds: {}",
                    missing.join(", ")
                ),
            );
        }
        if self.cgroups != 0 && self.cgroups != here.cgroups {
            refuse(
                RefusalCode::Kernel,
                format!(
                    "The source has control groups of version {} and the host there of version {}: limits \
                     cannot be kept",
                    self.cgroups, here.cgroups
                ),
            );
        }
        if free.pid_max != 0 && self.highest_pid >= free.pid_max {
            refuse(
                RefusalCode::Kernel,
                format!(
                    "A process of it has number {}, and numbers there end at {}: raise kernel.pid_max",
                    self.highest_pid, free.pid_max
                ),
            );
        }
        for (size, wanted) in self.huge.iter().take(CAP) {
            let there = free.huge.get(size).copied().unwrap_or(0);
            if *wanted > there {
                let kib = size / 1024;
                let more = match free.huge.contains_key(size) {
                    true => format!(
                        "raise /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages there by {}",
                        wanted - there
                    ),
                    false => "its kernel or CPU has none of that size".to_owned(),
                };
                refuse(
                    RefusalCode::Memory,
                    format!(
                        "It has mapped {wanted} huge pages of {kib} KiB, each process its own, and {there} \
                         are free there: {more}"
                    ),
                );
            }
        }
        for label in self.labels.iter().take(CAP).filter(|label| !free.labels.knows(label)) {
            refuse(
                RefusalCode::Kernel,
                format!(
                    "Processes of it run under the security label {}, which the host there does not have: \
                     load it there",
                    plain(label.as_bytes())
                ),
            );
        }
        found
    }
}

/// What a host has left.
#[derive(Debug, Default)]
pub(crate) struct Free {
    /// Processes are numbered below this.
    pid_max: i32,
    huge: huge::Pages,
    labels: Labels,
}

/// Security labels that a host knows.
#[derive(Debug, Default)]
struct Labels {
    /// The loaded profiles of AppArmor, one a line; nothing where it is not there.
    apparmor: Option<String>,
    selinux: bool,
}

impl Labels {
    fn knows(&self, label: &str) -> bool {
        match label.split_once(':') {
            Some(("apparmor", name)) => self.apparmor.as_ref().is_some_and(|profiles| {
                profiles
                    .lines()
                    .any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(" (")))
            }),
            Some(("selinux", _)) => self.selinux,
            _ => false,
        }
    }
}

impl Free {
    /// Of this host.
    pub(crate) fn here() -> Self {
        let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let pid_max = number("/proc/sys/kernel/pid_max").unwrap_or(0);
        Self {
            pid_max: i32::try_from(pid_max).unwrap_or(0),
            huge: huge::free(),
            labels: Labels {
                apparmor: fs::read_to_string("/sys/kernel/security/apparmor/profiles").ok(),
                selinux: Path::new("/sys/fs/selinux/enforce").exists(),
            },
        }
    }
}

/// Whether this host lets nobody make a user namespace.
pub(crate) fn makes_no_user_namespaces() -> bool {
    const SETTING: &str = "/proc/sys/user/max_user_namespaces";
    fs::read_to_string(SETTING).is_ok_and(|said| said.trim() == "0")
}

/// What `needed` has and `there` has not, fit to be shown.
fn missing(needed: &[String], there: &[String]) -> Vec<String> {
    let there: BTreeSet<&String> = there.iter().collect();
    let missing = needed.iter().take(CAP).filter(|one| !there.contains(one));
    missing.map(|one| plain(one.as_bytes())).collect()
}

/// The features in /proc/cpuinfo that programs may use, of the first CPU.
fn features(cpuinfo: &str) -> Vec<String> {
    let line = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1)
    };
    let known: BTreeSet<&str> = X86.split_whitespace().collect();
    let of_x86 = line("flags").map(|flags| {
        flags.split_whitespace().filter(|flag| known.contains(flag)).collect::<BTreeSet<_>>()
    });
    // All that arm64 kernels name is for programs.
    let all = of_x86.or_else(|| Some(line("Features")?.split_whitespace().collect()));
    all.unwrap_or_default().into_iter().map(str::to_owned).collect()
}

fn registers() -> u32 {
    #[cfg(target_arch = "x86_64")]
    return crate::sys::arch::saved_bytes();
    #[cfg(not(target_arch = "x86_64"))]
    0
}

fn page_size() -> u64 {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0)
}

fn vsyscall(maps: &str) -> u8 {
    let line = maps.lines().find(|line| line.ends_with("[vsyscall]"));
    match line.and_then(|line| line.split(' ').nth(1)) {
        Some(rights) if rights.starts_with('r') => 2,
        Some(_) => 1,
        None => 0,
    }
}

/// The security label of a process, unless it is confined by none.
fn label(pid: i32) -> Option<String> {
    let read = |path: String| {
        let text = fs::read(path).ok()?;
        let text = String::from_utf8(text).ok()?;
        Some(text.trim_end_matches(['\n', '\0']).to_owned()).filter(|text| !text.is_empty())
    };
    let apparmor = read(format!("/proc/{pid}/attr/apparmor/current"));
    if let Some(text) = apparmor.filter(|text| text != "unconfined") {
        let name = text.rsplit_once(" (").map_or(text.as_str(), |(name, _)| name);
        return Some(format!("apparmor:{name}"));
    }
    if !Path::new("/sys/fs/selinux/enforce").exists() {
        return None;
    }
    read(format!("/proc/{pid}/attr/current")).map(|text| format!("selinux:{text}"))
}

/// What `criu check` said of a file that was last changed at a time.
type Checked = BTreeMap<(PathBuf, Option<SystemTime>), Option<String>>;

/// Why the CRIU at `criu` does not work on this host, as it says itself; asked once for each CRIU.
pub(crate) fn criu_obstacle(criu: &Path) -> Option<String> {
    static KNOWN: Mutex<Checked> = Mutex::new(BTreeMap::new());
    let changed = fs::metadata(criu).and_then(|facts| facts.modified()).ok();
    let key = (criu.to_owned(), changed);
    let known = || KNOWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(answer) = known().get(&key) {
        return answer.clone();
    }
    let answer = check(criu);
    known().insert(key, answer.clone());
    answer
}

fn check(criu: &Path) -> Option<String> {
    let begun = Instant::now();
    let mut command = Command::new(criu);
    command.arg("check").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // One that cannot be started is said elsewhere.
    let mut child = command.spawn().ok()?;
    let mut said = child.stderr.take();
    let reader = thread::Builder::new().spawn(move || {
        let mut text = Vec::new();
        if let Some(said) = &mut said {
            let _ = std::io::Read::read_to_end(&mut std::io::Read::take(said, 64 << 10), &mut text);
        }
        text
    });
    let Ok(reader) = reader else {
        let _ = child.kill();
        let _ = child.wait();
        return None;
    };
    let Some(good) = ends_well(&mut child, begun) else {
        return Some(format!(
            "{} check did not end within {} s",
            criu.display(),
            CHECK_WITHIN.as_secs()
        ));
    };
    if good {
        return None;
    }
    let text = reader.join().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let errors: Vec<String> = text
        .lines()
        .filter(|line| line.contains("Error") || line.contains("rror:"))
        .map(|line| plain(line.as_bytes()))
        .take(3)
        .collect();
    Some(format!(
        "{} check finds that this kernel lacks something: {}",
        criu.display(),
        errors.join("; ")
    ))
}

/// Whether a child ended without an error; nothing when it did not end, and so was killed.
fn ends_well(child: &mut Child, begun: Instant) -> Option<bool> {
    while begun.elapsed() < CHECK_WITHIN {
        match child.try_wait() {
            Ok(None) => thread::sleep(Duration::from_millis(2)),
            Ok(Some(status)) => return Some(status.success()),
            Err(_) => return Some(false),
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn this_host_has_what_it_needs() {
        let here = HostNeeds::of_processes(&[std::process::id() as i32], 7);
        assert_eq!(here.lacks(&HostNeeds::of_this_host(), &Free::here()), []);
        assert!(!here.cpu.is_empty() && here.page_size >= 4096 && here.cgroups > 0);
        assert_eq!(HostNeeds::default().lacks(&here, &Free::here()), []);
    }

    #[test]
    fn everything_that_is_missing_is_named() {
        let needs = HostNeeds {
            cpu: words("sse2 avx2 avx512f x\u{1b}"),
            page_size: 65536,
            vsyscall: 2,
            namespaces: words("net time"),
            cgroups: 2,
            highest_pid: 40000,
            huge: BTreeMap::from([(2 << 20, 3), (1 << 30, 1)]),
            labels: words("apparmor:web selinux:x odd"),
            ..HostNeeds::default()
        };
        let here = HostNeeds {
            cpu: words("sse2 avx"),
            page_size: 4096,
            namespaces: words("net"),
            cgroups: 1,
            ..HostNeeds::default()
        };
        let labels = Labels { apparmor: Some("webx (enforce)\n".to_owned()), selinux: false };
        let free = Free { pid_max: 32768, huge: BTreeMap::from([(2 << 20, 2)]), labels };
        let found = needs.lacks(&here, &free);
        let texts: Vec<_> = found.iter().map(|refusal| refusal.text.as_str()).collect();
        assert_eq!(texts.len(), 11, "{texts:#?}");
        assert!(texts[0].contains("lacks avx2, avx512f, x\\u{1b},"), "{texts:#?}");
        assert!(texts[2].contains("vsyscall=emulate"), "{texts:#?}");
        let huge: Vec<_> = texts.iter().filter(|text| text.contains("huge pages")).collect();
        assert!(huge[0].contains("hugepages-2048kB/nr_hugepages there by 1"), "{texts:#?}");
        assert!(huge[1].contains("none of that size"), "{texts:#?}");
    }

    #[test]
    fn features_are_those_of_programs() {
        let x86 = "processor\t: 0\nflags\t\t: fpu avx2 sse2 svm avx512f nx\nflags\t\t: none\n";
        assert_eq!(features(x86), ["avx2", "avx512f", "sse2"]);
        assert_eq!(features("Features\t: fp asimd sve\n"), ["asimd", "fp", "sve"]);
        assert_eq!(vsyscall("ffffffffff600000-ffffffffff601000 --xp 0 00:00 0   [vsyscall]\n"), 1);
        let known = Labels { apparmor: Some("web (enforce)\n".to_owned()), selinux: true };
        assert!(
            known.knows("apparmor:web") && !known.knows("apparmor:we") && known.knows("selinux:a")
        );
    }

    #[test]
    fn a_criu_that_complains_is_quoted_and_one_that_hangs_is_ended() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("criu");
        // By somebody else: a program that another test starts while we have a file open for writing has it open too, and
        // nothing is executed then.
        let write = r#"printf '#!/bin/sh\n%s\n' "echo 'Error (x.c:1): no such thing' >&2; exit 1" >"$0" && chmod 755 "$0""#;
        let wrote = Command::new("sh").args(["-c", write]).arg(&path).status();
        assert!(wrote.expect("sh").success());
        let said = criu_obstacle(&path).expect("bad");
        assert!(said.ends_with("Error (x.c:1): no such thing"), "{said}");
        assert_eq!(criu_obstacle(&path), Some(said));
        assert_eq!(criu_obstacle(Path::new("/bin/true")), None);
    }
}
