//! Moves of containers with processes under a seccomp filter: CRIU can be under none of ours at first, and
//! memory is hidden from it by mounts, and by a filter that it gets later.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use decamp_shared::methods::{HidingChoice, Methods, Ways};
use decamp_shared::pages::PageSet;
use decamp_shared::workload::Liveness;
use serde_json::{Value, json};

use super::runtimes::{crun_starts, says};
use super::segments::{MOVED, names, withheld_page_is_noticed};
use super::support::{self, Case, Host, Spot};

pub(crate) const CASES: [Case; 8] = [
    Case { name: "under_an_allow_list_it_moves_live", run: under_an_allow_list_it_moves_live },
    Case { name: "under_one_denial_it_moves", run: under_one_denial_it_moves },
    Case { name: "crun_executes_under_the_filter", run: crun_executes_under_the_filter },
    Case { name: "a_filter_that_comes_late_stays", run: a_filter_that_comes_late_stays },
    Case { name: "limits_that_nobody_may_ask_for", run: limits_that_nobody_may_ask_for },
    Case { name: "withheld_under_a_denial_is_noticed", run: withheld_under_a_denial_is_noticed },
    Case { name: "a_criu_that_others_trace", run: a_criu_that_others_trace },
    Case { name: "page_tables_that_are_read_hide_too", run: page_tables_that_are_read_hide_too },
];

/// As container engines do by default: what is not on the list fails. Much shorter than theirs.
pub(crate) const ALLOWED: &str = "access arch_prctl brk capget capset chdir clock_getres clock_gettime clock_nanosleep \
    clone clone3 close close_range copy_file_range dup dup2 dup3 epoll_create1 epoll_ctl epoll_pwait \
    epoll_wait eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir \
    fchmod fchown fcntl fdatasync flock fork fstat fstatfs fsync ftruncate futex getcwd getdents64 getegid \
    geteuid getgid getpgrp getpid getppid getrandom getrlimit getrusage gettid gettimeofday getuid ioctl \
    kill lseek lstat madvise membarrier memfd_create mincore mlock mlock2 mlockall mmap mprotect mremap \
    msync munlock munlockall munmap nanosleep newfstatat open openat pause pipe pipe2 poll ppoll prctl \
    pread64 prlimit64 pselect6 pwrite64 read readlink readlinkat readv restart_syscall rseq rt_sigaction \
    rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend sched_getaffinity sched_yield select sendfile \
    set_robust_list set_tid_address setgid setgroups setpgid setsid setuid shmat shmctl shmdt shmget \
    sigaltstack stat statfs statx sysinfo tgkill time times tkill umask uname unlink unlinkat vfork wait4 \
    waitid write writev";

pub(crate) fn profile(default: &str, names: &str, action: &str) -> Value {
    let names: Vec<_> = names.split_whitespace().collect();
    json!({"defaultAction": default, "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": names, "action": action}]})
}

fn under_an_allow_list_it_moves_live(host: &Host) {
    // With threads and a child; with shared memory.
    for (program, after) in [("memory", 3), ("segments", 8)] {
        let name = format!("al-{program}");
        let Some(mut here) = host.program(&format!("{name}0"), program) else {
            return host.skip("needs cc (tests/setup)");
        };
        let allow = profile("SCMP_ACT_ERRNO", ALLOWED, "SCMP_ACT_ALLOW");
        here.change_config(|config| config["linux"]["seccomp"] = allow);
        here.run();
        here.await_rounds(3);
        let filters = filters_of(host, &here);
        for turn in 1..=3 {
            let there = here.twin(&format!("{name}{turn}"));
            if program == "segments" {
                assert_eq!(names(&here), MOVED, "before move {turn}");
            }
            let moved = here.move_live(&there, 4);
            assert_by_mounts(&moved.left);
            let before = here.rounds();
            there.await_rounds(before + after);
            here = there;
            assert_eq!(filters_of(host, &here), filters);
        }
        here.stop();
        host.assert_nothing_left(&format!("{name}3"));
    }
}

fn under_one_denial_it_moves(host: &Host) {
    let Some(mut here) = host.program("od0", "segments") else {
        return host.skip("needs cc (tests/setup)");
    };
    let deny = profile("SCMP_ACT_ALLOW", "mkdir mkdirat", "SCMP_ACT_ERRNO");
    here.change_config(|config| config["linux"]["seccomp"] = deny);
    here.run();
    here.await_rounds(3);
    let filters = filters_of(host, &here);
    for turn in 1..=2 {
        let there = here.twin(&format!("od{turn}"));
        let moved = here.move_to(&there);
        assert!(moved.pages > 0, "nothing was hidden");
        assert_by_mounts(&moved.left);
        let before = here.rounds();
        there.await_rounds(before + 8);
        here = there;
        assert_eq!(filters_of(host, &here), filters);
    }
    // Rolled back it runs on, under its filter.
    let mut source = here.source();
    source.pause().expect("pause");
    source.harvest(&mut PageSet::new()).expect("harvest");
    source.save().expect("save");
    source.resume().expect("resume");
    drop(source);
    here.await_rounds(here.rounds() + 8);
    assert_eq!(filters_of(host, &here), filters);
    here.stop();
    host.assert_nothing_left("od2");
}

/// What is brought in after a move is under the filter of the configuration, as before: crun has it in a file.
fn crun_executes_under_the_filter(host: &Host) {
    if !crun_starts(host) {
        return;
    }
    let mut here = host.counter("ce0");
    here.spec["runtime"] = json!("crun");
    let deny = profile("SCMP_ACT_ALLOW", "mkdir mkdirat", "SCMP_ACT_ERRNO");
    here.change_config(|config| config["linux"]["seccomp"] = deny);
    here.run();
    here.await_count(2);
    for turn in 0..=2 {
        let id = here.place.name.as_str();
        let words = ["exec", id, "/bin/busybox", "grep", "Seccomp:", "/proc/self/status"];
        assert_eq!(says("crun", &words).split_whitespace().last(), Some("2"), "move {turn}");
        let filter = fs::metadata(format!("/run/crun/{id}/seccomp.bpf")).expect("crun's filter");
        assert_eq!(filter.permissions().mode() & 0o077, 0, "nobody else's to see");
        if turn == 2 {
            break;
        }
        let there = here.twin(&format!("ce{}", turn + 1));
        here.move_to(&there);
        let before = here.last_count();
        there.await_count(before + 2);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("ce2");
}

/// The tests above can fail: what CRIU is told to be empty it has nothing of in its images.
fn withheld_under_a_denial_is_noticed(host: &Host) {
    let deny = profile("SCMP_ACT_ALLOW", "mkdir mkdirat", "SCMP_ACT_ERRNO");
    withheld_page_is_noticed(host, "wd", |config| config["linux"]["seccomp"] = deny);
}

/// One thread puts itself under a filter when the rounds have begun: CRIU gets its own later, and nothing else
/// changes.
fn a_filter_that_comes_late_stays(host: &Host) {
    let Some(here) = host.program("fl0", "filtered") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    let there = here.twin("fl1");
    let mut source = here.source();
    assert!(matches!(source.liveness(), Liveness::Tracked { .. }), "{:?}", source.liveness());
    let mut destination = there.prepare(&mut *source);
    source.track().expect("track");
    let mut dirty = PageSet::new();
    for _ in 0..2 {
        source.harvest(&mut dirty).expect("harvest");
        dirty = support::copy(&dirty, &mut *source, &mut *destination);
    }
    assert_eq!(source.ways().dump.as_deref(), Some("hidden"));
    host.runc(&["exec", &here.place.name, "/bin/busybox", "touch", "/data/filter"]);
    here.await_log("filtered");
    source.pause().expect("pause");
    source.harvest(&mut dirty).expect("harvest");
    support::copy(&dirty, &mut *source, &mut *destination);
    destination.load(source.save().expect("save")).expect("load");
    assert_by_mounts(&source.ways());
    source.fence(1).expect("fence");
    destination.activate(1).expect("activate");
    source.release().expect("release");
    drop((source, destination));
    let before = here.rounds();
    there.await_rounds(before + 30);
    // Now it is known beforehand.
    let back = there.twin("fl2");
    assert_by_mounts(&there.move_live(&back, 3).left);
    back.await_rounds(there.rounds() + 30);
    back.stop();
    host.assert_nothing_left("fl2");
}

/// Of another user's process under a filter CRIU learns the limits, also on a host that lacks a capability.
fn limits_that_nobody_may_ask_for(host: &Host) {
    let mut here = host.shell("ln0", "while :; do n=$((n+1)); echo $n; usleep 100000; done");
    let deny = profile("SCMP_ACT_ALLOW", "mkdir mkdirat", "SCMP_ACT_ERRNO");
    here.change_config(|config| {
        config["linux"]["seccomp"] = deny;
        config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        config["process"]["rlimits"] = json!([{"type": "RLIMIT_CORE", "soft": 4711, "hard": 9999}]);
    });
    here.run();
    here.await_count(3);
    let limits = |spot: &Spot<'_>| {
        let name = spot.place.name.as_str();
        let said = host.runc(&["exec", name, "/bin/busybox", "grep", "core", "/proc/1/limits"]);
        assert!(said.contains(" 4711 ") && said.contains(" 9999 "), "{said}");
    };
    limits(&here);
    // However memory leaves, and whatever else CRIU needs a filter for.
    for (turn, hiding) in [HidingChoice::None, HidingChoice::Auto].into_iter().enumerate() {
        host.methods.set(Methods { hiding, ..Methods::default() });
        let there = here.twin(&format!("ln{}", turn + 1));
        here.move_to(&there);
        there.await_count(here.last_count() + 3);
        limits(&there);
        here = there;
    }
    here.stop();
}

/// Nobody can put that one under a filter: the container stays, runs on, and is told the reason.
fn a_criu_that_others_trace(host: &Host) {
    let (Some(here), Some(tool)) = (host.program("ot0", "segments"), host.program("ot", "traced"))
    else {
        return host.skip("needs cc (tests/setup)");
    };
    let traced = tool.bundle().join("rootfs/bin/traced").display().to_string();
    let deny = profile("SCMP_ACT_ALLOW", "mkdir mkdirat", "SCMP_ACT_ERRNO");
    here.change_config(|config| config["linux"]["seccomp"] = deny);
    host.break_criu("traced", &format!("exec {traced} {} \"$@\"", support::criu().display()));
    here.run();
    here.await_rounds(3);
    let mut source = here.source();
    source.pause().expect("pause");
    source.harvest(&mut PageSet::new()).expect("harvest");
    let error = source.save().expect_err("it cannot be put under a filter");
    let chain = std::iter::successors(Some(&error as &dyn std::error::Error), |one| one.source());
    let said: Vec<String> = chain.map(ToString::to_string).collect();
    assert!(said.iter().any(|text| text.contains("under a seccomp filter of ours")), "{said:?}");
    source.resume().expect("resume");
    drop(source);
    here.await_rounds(here.rounds() + 8);
    here.stop();
    host.assert_nothing_left("ot0");
}

/// What CRIU does where the kernel does not scan page tables, brought about by its own fault injection.
fn page_tables_that_are_read_hide_too(host: &Host) {
    host.break_criu("reads", "export CRIU_FAULT=135");
    let Some(mut here) = host.program("rd0", "memory") else {
        return host.skip("needs cc (tests/setup)");
    };
    let deny = profile("SCMP_ACT_ALLOW", "mkdir mkdirat", "SCMP_ACT_ERRNO");
    here.change_config(|config| config["linux"]["seccomp"] = deny);
    here.run();
    here.await_rounds(3);
    for turn in 1..=2 {
        let there = here.twin(&format!("rd{turn}"));
        assert_by_mounts(&here.move_live(&there, 3).left);
        let before = here.rounds();
        there.await_rounds(before + 3);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("rd2");
}

fn assert_by_mounts(left: &Ways) {
    assert_eq!(left.dump.as_deref(), Some("hidden-by-mounts"), "{left:?}");
    assert!(!left.fallbacks.iter().any(|text| text.contains("Shared memory")), "{left:?}");
}

/// What the kernel says of the filters of a container's first process.
fn filters_of(host: &Host, place: &Spot<'_>) -> String {
    let name = place.place.name.as_str();
    let said = host.runc(&["exec", name, "/bin/busybox", "grep", "Seccomp", "/proc/1/status"]);
    assert!(said.contains("Seccomp:\t2"), "{said}");
    said
}
