//! What the threads of a VMM that work on a guest's behalf may ask of the kernel: seccomp filters, one for each
//! kind of thread. Whoever took such a thread over through a device could read and write what the VMM has open,
//! and no more: no other file, no program, no connection.
//!
//! A call that is not listed fails with EPERM instead of ending the process: a list that lacks something costs a
//! device or a line in the log, not the guest.
//!
//! The lists hold what the thread's own work needs and what any thread of a Rust program with glibc does beside
//! it (allocation, locks, logging, its end). Found by running the crate's tests under them.

use std::collections::BTreeMap;
use std::io;

use libc::{SYS_brk, SYS_clock_gettime, SYS_clock_nanosleep, SYS_close, SYS_exit, SYS_exit_group};
use libc::{SYS_epoll_ctl, SYS_epoll_wait, SYS_fallocate, SYS_ftruncate, SYS_futex, SYS_getpid};
use libc::{
    SYS_getrandom, SYS_gettid, SYS_ioctl, SYS_lseek, SYS_madvise, SYS_mmap, SYS_mprotect,
    SYS_mremap, SYS_munmap, SYS_nanosleep,
};
use libc::{SYS_poll, SYS_ppoll, SYS_read, SYS_readv, SYS_restart_syscall, SYS_rt_sigprocmask};
use libc::{SYS_rt_sigreturn, SYS_sched_getaffinity, SYS_sched_yield, SYS_sendto, SYS_sigaltstack};
use libc::{SYS_tgkill, SYS_write, SYS_writev};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::error::{Result, VmError};

/// KVM_RUN and KVM_IRQ_LINE (`linux/kvm.h`).
const KVM_RUN: u32 = 0xae80;
const KVM_IRQ_LINE: u32 = 0x4008_ae61;

/// What nothing in a keeper does once it is confined, though any process may: programs, other processes, sockets, and
/// parts of the kernel that are of no use to it and large.
const NEVER: &[i64] = &[
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_fsopen,
    libc::SYS_io_uring_setup,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_ptrace,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_socket,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_vfork,
];
/// What a tap device takes from whoever holds it, without any capability: that it stays, whose it is, its carrier, and
/// its address on the host (`linux/if_tun.h`, `linux/sockios.h`), by which a bridge may choose its own.
const NEVER_ASKED: &[u64] =
    &[0x4004_54cb, 0x4004_54cc, 0x4004_54ce, 0x4004_54e2, libc::SIOCSIFHWADDR];

/// Holds the calling thread, and those that it makes, to what a keeper does, for good. The others of its process, if
/// there are any, go on as before.
///
/// # Errors
/// When the kernel has no seccomp filters.
pub(crate) fn confine_keeper() -> io::Result<()> {
    let when = |argument, length, operator, value| {
        let condition = SeccompCondition::new(argument, length, operator, value)?;
        SeccompRule::new(vec![condition])
    };
    let threads = libc::CLONE_THREAD as u64;
    let is_process = when(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(threads), 0);
    let asks = NEVER_ASKED
        .iter()
        .map(|request| when(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *request));
    let asks: std::result::Result<Vec<_>, _> = asks.collect();
    // Without rules a call is meant whatever its arguments are.
    let mut never: BTreeMap<i64, Vec<SeccompRule>> =
        NEVER.iter().map(|call| (*call, Vec::new())).collect();
    never.insert(libc::SYS_clone, vec![is_process.map_err(io::Error::other)?]);
    never.insert(SYS_ioctl, asks.map_err(io::Error::other)?);
    // Its flags lie in memory, where no filter looks: libraries fall back on the older call when there is none.
    let newer = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    for (calls, errno) in [(never, libc::EPERM), (newer, libc::ENOSYS)] {
        let refuse = SeccompAction::Errno(errno as u32);
        let filter = SeccompFilter::new(calls, SeccompAction::Allow, refuse, TargetArch::x86_64);
        let program: std::result::Result<BpfProgram, _> = filter.and_then(TryInto::try_into);
        let program = program.map_err(io::Error::other)?;
        seccompiler::apply_filter(&program).map_err(io::Error::other)?;
    }
    Ok(())
}

/// What any thread does.
const COMMON: &[i64] = &[
    SYS_brk,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_close,
    SYS_exit,
    SYS_exit_group,
    SYS_futex,
    SYS_getpid,
    SYS_getrandom,
    SYS_gettid,
    SYS_madvise,
    SYS_mmap,
    SYS_mprotect,
    SYS_mremap,
    SYS_munmap,
    SYS_nanosleep,
    SYS_poll,
    SYS_ppoll,
    SYS_read,
    SYS_restart_syscall,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_getaffinity,
    SYS_sched_yield,
    SYS_sigaltstack,
    SYS_tgkill,
    SYS_write,
    SYS_writev,
];

/// What a thread may do beside that: system calls, and requests of `ioctl`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Allowed {
    /// Numbers of system calls.
    pub(crate) calls: Vec<i64>,
    /// Requests that it may make with `ioctl`.
    pub(crate) requests: Vec<u32>,
}

impl Allowed {
    /// For a thread that runs a vCPU, which reaches the registers of `devices`, and so what those may do when
    /// their drivers set them up.
    pub(crate) fn vcpu(devices: &Self) -> Self {
        let mut allowed = Self::device().and(devices);
        allowed.requests.push(KVM_RUN);
        allowed
    }

    /// For the thread of a device that needs nothing of its own.
    pub(crate) fn device() -> Self {
        Self {
            // The console's clients are sockets, and its log is cut; devices are reset where a vCPU says so.
            calls: vec![
                SYS_epoll_ctl,
                SYS_epoll_wait,
                SYS_fallocate,
                SYS_ftruncate,
                SYS_lseek,
                SYS_readv,
                SYS_sendto,
            ],
            requests: vec![KVM_IRQ_LINE],
        }
    }

    /// Both of them.
    pub(crate) fn and(mut self, other: &Self) -> Self {
        self.calls.extend(&other.calls);
        self.requests.extend(&other.requests);
        self
    }

    /// Holds the calling thread to it, for good.
    ///
    /// # Errors
    /// When the kernel has no seccomp filters.
    pub(crate) fn confine(&self) -> Result<()> {
        let failed = |error| VmError::refused("put a thread under a seccomp filter", error);
        let program = self.program().map_err(|error| failed(io::Error::other(error)))?;
        seccompiler::apply_filter(&program).map_err(|error| failed(io::Error::other(error)))
    }

    fn program(&self) -> std::result::Result<BpfProgram, seccompiler::BackendError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for call in COMMON.iter().chain(&self.calls) {
            // Without rules a call is allowed whatever its arguments are.
            rules.insert(*call, Vec::new());
        }
        let request = |request: &u32| {
            let (length, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
            let condition = SeccompCondition::new(1, length, equal, u64::from(*request))?;
            SeccompRule::new(vec![condition])
        };
        let requests: Vec<_> =
            self.requests.iter().map(request).collect::<std::result::Result<_, _>>()?;
        if !requests.is_empty() {
            rules.insert(SYS_ioctl, requests);
        }
        let refuse = SeccompAction::Errno(libc::EPERM as u32);
        SeccompFilter::new(rules, refuse, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_confined_keeper_has_threads_and_no_processes() {
        let worker = std::thread::spawn(|| {
            confine_keeper().expect("confined");
            let thread = std::thread::spawn(|| {
                let error = std::net::UdpSocket::bind("127.0.0.1:0").expect_err("no socket");
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
                File::open("/etc/passwd").expect("that is for others to refuse");
            });
            thread.join().expect("a thread, of its own confinement");
            Command::new("/bin/true").status().expect_err("no process");
        });
        worker.join().expect("its work is done");
        Command::new("/bin/true").status().expect("others are not confined");
    }

    #[test]
    fn a_confined_thread_does_its_work_and_nothing_else() {
        let mut log = tempfile::tempfile().expect("a file");
        let kvm = crate::host::open_kvm().expect("KVM");
        let worker = std::thread::spawn(move || {
            Allowed::device().confine().expect("confined");
            let refused = |result: io::Result<()>| {
                result.expect_err("it is confined").kind() == io::ErrorKind::PermissionDenied
            };
            assert!(refused(File::open("/etc/passwd").map(drop)));
            assert!(refused(Command::new("/bin/true").status().map(drop)));
            assert!(refused(std::net::TcpListener::bind("127.0.0.1:0").map(drop)));
            assert!(kvm.create_vm().is_err(), "a request that it does not need");
            let many: Vec<Vec<u8>> = (0..64).map(|size| vec![1; size << 12]).collect();
            log.write_all(&many[3]).expect("written");
            std::thread::sleep(std::time::Duration::from_millis(1));
        });
        worker.join().expect("its work is done");
        File::open("/etc/passwd").expect("others are not confined");
    }
}
