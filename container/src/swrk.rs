//! A CRIU of our own: `criu swrk`, one process for one request, spoken to over a socket.
//!
//! The messages are those of rust-criu; its client lacks descriptors, notifications that hold state,
//! and the fields we need. What is asked of CRIU is decided in `dump` and `restore`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use protobuf::Message;
use rust_criu::rust_criu_protobuf::rpc::{Criu_opts, Criu_req, Criu_req_type, Criu_resp};

use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};
use crate::watch::Watch;
use crate::{sys, terminal};

/// No answer of CRIU is longer: its own buffers are smaller.
const ANSWER_CAP: usize = 1 << 20;
/// The oldest CRIU that works on kernels of today.
pub(crate) const WANTED: (i32, i32) = (4, 1);

/// A CRIU that was killed, or has said its last word, is gone within this.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// A CRIU process that waits for its request. Killed when dropped; what it held then runs.
pub(crate) struct Swrk {
    pid: i32,
    /// Nothing where somebody else started it, and waits for it.
    child: Option<Child>,
    /// Its descriptor: half restored tasks keep the socket open when CRIU itself has died.
    process: OwnedFd,
    socket: OwnedFd,
}

/// What CRIU tells while it works; it waits until the callback returns.
pub(crate) struct Notice<'a> {
    /// Name of the step: `setup-namespaces`, `pre-resume`, ...
    pub(crate) step: &'a str,
    /// CRIU's own process.
    pub(crate) criu: i32,
    /// The first process that it restores, once there is one; else 0 or less.
    pub(crate) init: i32,
    /// What came with it: the master of a terminal.
    pub(crate) descriptor: Option<OwnedFd>,
}

/// CRIU's answer at the end.
pub(crate) struct Outcome {
    /// Process id of the restored first process, when it was a restore.
    pub(crate) pid: i32,
}

impl Swrk {
    /// Starts CRIU. It inherits `descriptors` under the numbers that they have here.
    pub(crate) fn start(criu: &Path, descriptors: &[BorrowedFd<'_>]) -> Result<Self> {
        Self::start_with(criu, descriptors, false)
    }

    /// Starts a CRIU that waits for ever when we die before we have answered it. For it has our end
    /// of the socket too, and never learns that nobody else has: with tasks in its hands it would
    /// let them run if it did.
    pub(crate) fn start_waiting(criu: &Path, descriptors: &[BorrowedFd<'_>]) -> Result<Self> {
        Self::start_with(criu, descriptors, true)
    }

    fn start_with(criu: &Path, descriptors: &[BorrowedFd<'_>], waiting: bool) -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(ContainerError::errno("make a socket for CRIU"))?;
        let mut command = Command::new(criu);
        command
            .arg("swrk")
            .arg(theirs.as_raw_fd().to_string())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let mut inherited = vec![theirs.as_fd()];
        inherited.extend_from_slice(descriptors);
        if waiting {
            inherited.push(ours.as_fd());
        }
        sys::inherit(&mut command, &inherited);
        let child =
            command.spawn().map_err(ContainerError::io(format!("start {}", criu.display())))?;
        // Our child, and not yet waited for: the number is its.
        let process = sys::pidfd_open(child.id() as i32);
        let process = process.map_err(ContainerError::io("open the process of CRIU"))?;
        Ok(Self { pid: child.id() as i32, child: Some(child), process, socket: ours })
    }

    /// A CRIU that `begin` has somebody else start: it is given the descriptors that it inherits, of which
    /// the first is the one that it speaks on, and says which process it is.
    pub(crate) fn started_by(
        descriptors: &[BorrowedFd<'_>],
        begin: impl FnOnce(&[BorrowedFd<'_>]) -> Result<i32>,
    ) -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(ContainerError::errno("make a socket for CRIU"))?;
        let mut inherited = vec![theirs.as_fd()];
        inherited.extend_from_slice(descriptors);
        // As for one of ours that waits.
        inherited.push(ours.as_fd());
        let pid = begin(&inherited)?;
        let process = sys::pidfd_open(pid);
        let process = process.map_err(ContainerError::io("open the process of CRIU"))?;
        Ok(Self { pid, child: None, process, socket: ours })
    }

    /// CRIU's process id.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Has CRIU do one thing and waits until its process has ended. `notified` is called at each
    /// step; what it returns is CRIU's to heed (it does not, for some). What it restores it restores into
    /// the cgroups `into`, if it does.
    ///
    /// # Errors
    /// When CRIU refuses, ends without an answer, or says nothing for too long (sooner once it was
    /// `called_off`). Then it may still live and hold tasks: dropping this kills it. The errors in its
    /// log are the caller's to add.
    pub(crate) fn request(
        &mut self,
        kind: Criu_req_type,
        options: Criu_opts,
        into: Option<&Cgroups>,
        called_off: Option<&EventFd>,
        mut notified: impl FnMut(Notice<'_>) -> bool,
    ) -> Result<Outcome> {
        let mut request = Criu_req::new();
        request.set_type(kind);
        request.opts = Some(options).into();
        self.send(&request)?;
        let answer = loop {
            self.await_word(into, called_off)?;
            let (answer, descriptor) = self.receive()?;
            if answer.type_() != Criu_req_type::NOTIFY {
                break answer;
            }
            let (step, init) = (answer.notify.script(), answer.notify.pid());
            let fine = notified(Notice { step, criu: self.pid(), init, descriptor });
            let mut reply = Criu_req::new();
            reply.set_type(Criu_req_type::NOTIFY);
            reply.set_notify_success(fine);
            self.send(&reply)?;
        };
        if !answer.success() {
            return Err(ContainerError::Criu {
                what: if kind == Criu_req_type::DUMP { "dump" } else { "restore" },
                number: answer.cr_errno(),
                said: answer.cr_errmsg().trim().to_owned(),
            });
        }
        self.finish()?;
        Ok(Outcome { pid: answer.restore.pid() })
    }

    fn finish(&mut self) -> Result<()> {
        let _ =
            nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Write);
        if !self.is_gone_within(GONE_WITHIN) {
            return Err(ContainerError::CriuProtocol("succeeded, but does not end".to_owned()));
        }
        let Some(child) = &mut self.child else { return Ok(()) };
        let status = child.wait().map_err(ContainerError::io("wait for CRIU"))?;
        if status.success() {
            Ok(())
        } else {
            Err(ContainerError::CriuProtocol(format!(
                "ended with {status} after it had said that it succeeded"
            )))
        }
    }

    fn send(&self, request: &Criu_req) -> Result<()> {
        let bytes = request
            .write_to_bytes()
            .map_err(|error| ContainerError::CriuProtocol(format!("cannot be asked: {error}")))?;
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)
            .map_err(ContainerError::errno("send a request to CRIU"))?;
        Ok(())
    }

    /// Returns when there is something to receive.
    fn await_word(&self, into: Option<&Cgroups>, mut called_off: Option<&EventFd>) -> Result<()> {
        let told = |what: &str| Err(ContainerError::CriuProtocol(what.to_owned()));
        let mut watch = Watch::begin(self.pid(), into);
        loop {
            let mut wanted = vec![self.socket.as_fd(), self.process.as_fd()];
            wanted.extend(called_off.map(AsFd::as_fd));
            let ready = readable(&wanted, watch.until_next_look())?;
            match ready[..] {
                [true, ..] => return Ok(()),
                // It may have answered and ended after its socket was looked at.
                [_, true, ..] if readable(&wanted[..1], Duration::ZERO)?[0] => return Ok(()),
                [_, true, ..] => return told("died without an answer"),
                [_, _, true] => {
                    watch.called_off();
                    called_off = None;
                }
                _ => watch.look()?,
            }
        }
    }

    fn is_gone_within(&self, patience: Duration) -> bool {
        readable(&[self.process.as_fd()], patience).is_ok_and(|ready| ready[0])
    }

    fn receive(&self) -> Result<(Criu_resp, Option<OwnedFd>)> {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
        let length = receive(&self.socket, &mut [], peek)
            .map_err(ContainerError::io("receive CRIU's answer"))?;
        if length == 0 {
            return Err(ContainerError::CriuProtocol("ended without an answer".to_owned()));
        }
        if length > ANSWER_CAP {
            return Err(ContainerError::CriuProtocol(format!("answered with {length} bytes")));
        }
        let mut bytes = vec![0; length];
        let (_, descriptor) = terminal::receive(&self.socket, &mut bytes, MsgFlags::empty())
            .map_err(ContainerError::io("receive CRIU's answer"))?;
        let answer = Criu_resp::parse_from_bytes(&bytes).map_err(|error| {
            ContainerError::CriuProtocol(format!("answered what makes no sense: {error}"))
        });
        Ok((answer?, descriptor))
    }
}

impl Drop for Swrk {
    fn drop(&mut self) {
        // After a success it has been waited for, and both do nothing.
        let _ = sys::pidfd_kill(self.process.as_fd());
        if self.is_gone_within(GONE_WITHIN) {
            let _ = self.child.as_mut().map(Child::wait);
        } else {
            tracing::error!(pid = self.pid(), "CRIU was killed and does not end");
        }
    }
}

/// Which of `descriptors` can be read from, or are at their end, as soon as one is or time is up.
fn readable(descriptors: &[BorrowedFd<'_>], within: Duration) -> Result<Vec<bool>> {
    let begun = Instant::now();
    loop {
        let mut events: Vec<_> =
            descriptors.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        let left = within.saturating_sub(begun.elapsed()).as_millis();
        match poll(&mut events, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(ContainerError::errno("wait for CRIU")(errno)),
            Ok(_) => return Ok(events.iter().map(|event| event.any() == Some(true)).collect()),
        }
    }
}

fn receive(socket: &OwnedFd, into: &mut [u8], flags: MsgFlags) -> io::Result<usize> {
    loop {
        match recv(socket.as_raw_fd(), into, flags) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

/// The version that a CRIU executable reports.
///
/// # Errors
/// When it cannot be started or says nothing of the kind.
pub(crate) fn version(criu: &Path) -> Result<(i32, i32)> {
    let said = Command::new(criu)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(ContainerError::io(format!("start {}", criu.display())))?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    text.lines()
        .find_map(|line| line.strip_prefix("Version:"))
        .and_then(|version| two_numbers(version.trim()))
        .ok_or_else(|| ContainerError::Tool {
            tool: "criu",
            what: "say its version".to_owned(),
            said: text,
        })
}

/// The first two numbers of a version such as `4.1.1`.
pub(crate) fn two_numbers(version: &str) -> Option<(i32, i32)> {
    let mut parts = version.split(['.', '-', '+', '~', ' ']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
