//! A process that does nothing but hold descriptors.
//!
//! Memory whose userfaultfd is closed reads as zeros where it has not arrived. So a second process has
//! every such descriptor too: when the keeper dies, tasks that want a page wait, until whoever cleans up
//! ends them. It ends by itself when the container has.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use nix::unistd::Pid;

use crate::error::{ContainerError, Result};
use crate::sys::{self, HOLD, UNTIL};

/// The process. It is ended when this is dropped.
pub(crate) struct Holder {
    pid: i32,
    socket: OwnedFd,
}

impl Holder {
    /// Starts it. It has nothing of this process but what it is given.
    pub(crate) fn start() -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(ContainerError::errno("make a socket for the holder"))?;
        let pid =
            sys::fork_holder(theirs.as_fd()).map_err(ContainerError::io("start the holder"))?;
        Ok(Self { pid, socket: ours })
    }

    /// Gives it a descriptor to hold.
    pub(crate) fn hold(&self, descriptor: BorrowedFd<'_>) -> Result<()> {
        self.send(HOLD, descriptor)
    }

    /// It ends when the process behind `process` has.
    pub(crate) fn until(&self, process: BorrowedFd<'_>) -> Result<()> {
        self.send(UNTIL, process)
    }

    fn send(&self, what: u8, descriptor: BorrowedFd<'_>) -> Result<()> {
        let descriptors = [descriptor.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&descriptors)];
        let bytes = [what];
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(ContainerError::errno("give the holder a descriptor"))?;
        Ok(())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Not reaped by anybody else, so the number is its.
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        let _ = sys::reap(self.pid);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use nix::unistd::pipe;

    use super::*;

    #[test]
    fn what_it_holds_stays_open_until_the_process_ends() {
        let mut child =
            Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().expect("sleep");
        let process = sys::pidfd_open(child.id() as i32).expect("a process");
        let holder = Holder::start().expect("a holder");
        let (read, write) = pipe().expect("a pipe");
        holder.hold(write.as_fd()).expect("hold");
        holder.until(process.as_fd()).expect("until");
        drop(write);
        // As if we had died: nobody tells it to end.
        let pid = holder.pid;
        let socket = holder.socket.try_clone().expect("a descriptor");
        std::mem::forget(holder);
        drop(socket);
        std::thread::sleep(Duration::from_millis(100));
        child.kill().expect("kill");
        child.wait().expect("wait");
        // The end of the pipe comes with the end of who held it.
        let mut rest = Vec::new();
        std::fs::File::from(read).read_to_end(&mut rest).expect("read");
        assert!(rest.is_empty());
        assert_eq!(sys::reap(pid).expect("a child"), Ok(0));
    }
}
