//! End-to-end tests: real hosts of `tests/hosts`, real virtual machines, real containers, the real binary.
//!
//! What belongs here: what a user is promised, each promise a test. What does not: anything that can be
//! shown without two hosts.
//!
//! One test at a time, in the order below. The hosts come up with the first test that needs them and go
//! down with the process. A test that cannot run on this machine is skipped, and says what it lacks.
//!
//! `cargo test --release --features failpoints --test e2e -- [FILTER] [--list]`

mod adoption;
mod after_fence;
mod apps;
mod before_fence;
mod certificates;
mod checkpoints;
mod console;
mod cpu;
mod disks;
mod failures;
mod guest;
mod hooks;
mod hosts;
mod keepers;
mod moves;
mod nets;
mod peers;
mod podman;
mod redis;
mod refusals;
mod relocation;
mod running;
mod snapshot;
mod vm_refusals;
mod volumes;
mod watch;
mod ways;

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Trial};

/// What a test needs of the machine beyond hosts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// Nothing more.
    Hosts,
    /// A usable `/dev/kvm`.
    Kvm,
    /// CRIU, runc and Redis.
    Containers,
    /// Both.
    Both,
    /// What containers need, and PostgreSQL with its clients.
    Postgres,
    /// What containers need, and a kernel that keeps no soft-dirty bits.
    NoSoftDirty,
    /// What containers need, and the program that podman has for `--init`.
    Init,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let tests = [
        refusals::tests(),
        vm_refusals::tests(),
        peers::tests(),
        podman::tests(),
        moves::tests(),
        nets::tests(),
        apps::tests(),
        ways::tests(),
        volumes::tests(),
        disks::tests(),
        relocation::tests(),
        adoption::tests(),
        hooks::tests(),
        keepers::tests(),
        console::tests(),
        cpu::tests(),
        checkpoints::tests(),
        before_fence::tests(),
        after_fence::tests(),
    ];
    let trials = tests.into_iter().flatten().map(Test::trial).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    hosts::down();
    conclusion.exit_code()
}

/// One test: its name, what it needs, and what it does.
struct Test {
    name: &'static str,
    needs: Needs,
    body: fn(),
}

impl Test {
    fn new(name: &'static str, needs: Needs, body: fn()) -> Self {
        Self { name, needs, body }
    }

    fn trial(self) -> Trial {
        let Self { name, needs, body } = self;
        let lacks = needs.lacks();
        let test = Trial::test(name, move || {
            body();
            Ok(())
        });
        match lacks {
            None => test,
            Some(what) => test.with_kind(format!("skipped: no {what}")).with_ignored_flag(true),
        }
    }
}

impl Needs {
    /// The first thing that this machine lacks.
    fn lacks(self) -> Option<&'static str> {
        let runs = |program: &str| {
            Command::new(program)
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success())
        };
        if !nix::unistd::geteuid().is_root() {
            return Some("root");
        }
        if matches!(self, Needs::Kvm | Needs::Both) && !Path::new("/dev/kvm").exists() {
            return Some("/dev/kvm");
        }
        // Each mapping of a process that nobody tracks has the flag, where there is such a thing.
        let smaps = || std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        if self == Needs::NoSoftDirty && smaps().contains(" sd") {
            return Some("kernel without soft-dirty bits");
        }
        let mut programs = match self {
            Needs::Hosts | Needs::Kvm => vec![],
            _ => vec![hosts::CRIU, "runc", "redis-server"],
        };
        programs.extend_from_slice(match self {
            Needs::Postgres => &["psql", "pgbench"],
            Needs::Init => &["catatonit"],
            _ => &[],
        });
        programs.into_iter().find(|program| !runs(program))
    }
}
