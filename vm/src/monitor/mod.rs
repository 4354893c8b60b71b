//! The monitor: a small process beside a keeper that may do on the host what the keeper may not, as in the
//! privilege separation of OpenSSH. It does a short list of things ([`Request`]), to what its one VM has on the host
//! ([`host`]), and reads nothing that a guest wrote: of a guest's doing only the number of a port comes to it, and
//! how the guest ended.
//!
//! It is forked off before the keeper gives its rights up, and ends when the keeper has ended. Should it end before,
//! the guest runs on, and what is asked for fails: a move then fails, and its guest stays where it is.
//!
//! | file | what lives there |
//! |---|---|
//! | `message` | how that is said |
//! | `disks` | what its disks are, also after they went over to other files |
//! | `host` | how it is done |
//!
//! Where a keeper is not confined nothing of this is used.

mod disks;
mod host;
mod message;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use decamp_shared::keeper::ExitRecord;
use decamp_shared::sys::{receive_with_descriptor, send_with_descriptor};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockFlag, SockType, setsockopt, shutdown, socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::Pid;

use self::host::{Done, Failure};
use self::message::{LONGEST, Reply};
use crate::error::{Result, VmError};
use crate::ids::end_all_of;
use crate::sys::process::{self, Fork};

pub(crate) use self::host::{Host, clear};

/// Seconds within which a keeper makes room for an answer; it asks one thing at a time.
const HEARD_WITHIN: i64 = 10;

/// What a keeper asks of its monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// A disk, opened.
    Disk {
        /// Among the VM's disks.
        number: u8,
        /// To be written, too.
        write: bool,
    },
    /// The kernel, opened.
    Kernel,
    /// The initial ramdisk, opened.
    Initrd,
    /// The file that comes along, opened once more.
    Again {
        /// To be written, too.
        write: bool,
    },
    /// The file that comes along is what a disk goes over to with the next switch.
    Next {
        /// Among the VM's disks.
        number: u8,
    },
    /// A disk does not go over to another file.
    Stay {
        /// Among the VM's disks.
        number: u8,
    },
    /// Those disks go over that have where to, once it is noted that they did so in this migration.
    Switch(String),
    /// Who has the lock of the file that comes along, for people.
    Holder,
    /// An interface taken off its network, or put back.
    Port {
        /// Among the VM's interfaces.
        number: u8,
        /// Which of it.
        change: Change,
    },
    /// A connection to the program that waits for the guest there.
    Reach {
        /// The host's port, as the guest names it.
        port: u32,
    },
    /// How the guest ended, written down.
    Ended(ExitRecord),
    /// The sockets in the VM's directory, and an empty log, removed.
    Clear,
}

/// What becomes of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Off the network.
    Disconnect,
    /// On the network.
    Connect,
    /// On the network, whatever was done to it meanwhile.
    Reconnect,
}

impl Change {
    fn number(self) -> u8 {
        match self {
            Self::Disconnect => 0,
            Self::Connect => 1,
            Self::Reconnect => 2,
        }
    }

    fn of(number: u8) -> Option<Self> {
        [Self::Disconnect, Self::Connect, Self::Reconnect].get(usize::from(number)).copied()
    }
}

/// A keeper's end. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Monitor(Arc<Mutex<OwnedFd>>);

impl Monitor {
    /// Forks a monitor off that looks after `host`, and holds `held` for as long as this process lives. When it has ended
    /// nothing runs as `user` any more, the one that is its own. Descriptors that are open here are closed there. Gives
    /// which process it is, too.
    ///
    /// # Errors
    /// When this process has several threads, the kernel refuses, or it does not come up.
    pub(crate) fn fork(
        mut host: Host,
        user: Option<u32>,
        held: Option<OwnedFd>,
    ) -> io::Result<(Self, Pid)> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        // Whoever asks and does not hear the answers holds nobody up.
        setsockopt(&theirs, sockopt::SendTimeout, &TimeVal::seconds(HEARD_WITHIN))?;
        match process::fork()? {
            Fork::Parent { child } => {
                drop((theirs, held));
                Ok((Self::that_is_up(ours)?, child))
            }
            Fork::Child { parent } => {
                let title = format!("decamp monitor of VM {}", host.name());
                process::live_as_child(parent, &title, theirs, held, |socket, parent| {
                    if greet(socket).is_ok() {
                        serve(&mut host, socket, parent);
                        user.into_iter().for_each(end_all_of);
                    }
                })
            }
        }
    }

    /// The one behind `socket`, once it has said that it is there: whoever gives its rights up for one that could not
    /// do its work would have nothing left to build a machine with.
    fn that_is_up(socket: OwnedFd) -> io::Result<Self> {
        let mut bytes = [0; LONGEST];
        let (count, _) = again(|| receive_with_descriptor(socket.as_fd(), &mut bytes))?;
        if Reply::decode(&bytes[..count]) != Some(greeting()) {
            return Err(io::Error::other("it did not come up"));
        }
        Ok(Self(Arc::new(Mutex::new(socket))))
    }

    /// Whether it ended, as far as can be seen without waiting for what it does now.
    pub(crate) fn has_ended(&self) -> bool {
        let Ok(socket) = self.0.try_lock() else { return false };
        let mut events = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        let looked = poll(&mut events, PollTimeout::ZERO);
        looked.is_ok_and(|count| count > 0)
    }

    /// Asks for something to be done.
    ///
    /// # Errors
    /// When it was not, or the monitor is gone.
    pub(crate) fn ask(&self, request: &Request) -> Result<String> {
        self.ask_of(request, None)
    }

    /// The same; `of` comes along.
    ///
    /// # Errors
    /// As of [`Monitor::ask`].
    pub(crate) fn ask_of(&self, request: &Request, of: Option<BorrowedFd<'_>>) -> Result<String> {
        self.exchange(request, of).map(|done| done.text).map_err(|failure| match failure {
            Failure::Kernel(error) => VmError::refused("have its monitor do it", error),
            Failure::Text(text) => VmError::State(text),
            Failure::Unanswered(text) => VmError::Unanswered(text),
        })
    }

    /// Asks for something to be opened; `of` comes along.
    ///
    /// # Errors
    /// The kernel's, or that the monitor is gone.
    pub(crate) fn open(
        &self,
        request: &Request,
        of: Option<BorrowedFd<'_>>,
    ) -> io::Result<OwnedFd> {
        match self.exchange(request, of) {
            Ok(Done { descriptor: Some(descriptor), .. }) => Ok(descriptor),
            Ok(_) => Err(nonsense()),
            Err(Failure::Kernel(error)) => Err(error),
            Err(Failure::Text(text) | Failure::Unanswered(text)) => Err(io::Error::other(text)),
        }
    }

    fn exchange(
        &self,
        request: &Request,
        of: Option<BorrowedFd<'_>>,
    ) -> std::result::Result<Done, Failure> {
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let said = again(|| send_with_descriptor(socket.as_fd(), &request.encode(), of));
        said.map_err(|error| Failure::Text(gone(error)))?;
        let unanswered = |error| Failure::Unanswered(gone(error));
        let mut bytes = [0; LONGEST];
        let heard = again(|| receive_with_descriptor(socket.as_fd(), &mut bytes));
        let (count, descriptor) = heard.map_err(unanswered)?;
        match Reply::decode(&bytes[..count]) {
            Some(Reply::Done(text)) => Ok(Done { descriptor, text }),
            Some(Reply::Errno(number)) => {
                Err(Failure::Kernel(io::Error::from_raw_os_error(number)))
            }
            Some(Reply::Failed(text)) => Err(Failure::Text(text)),
            None if count == 0 => Err(unanswered(io::ErrorKind::UnexpectedEof.into())),
            None => Err(unanswered(nonsense())),
        }
    }
}

/// What a monitor says first, without being asked.
fn greeting() -> Reply {
    Reply::Done(String::new())
}

fn greet(socket: BorrowedFd<'_>) -> io::Result<()> {
    again(|| send_with_descriptor(socket, &greeting().encode(), None))
}

/// Answers until `keeper`, a descriptor of the process, has ended, whatever else it does.
fn serve(host: &mut Host, socket: BorrowedFd<'_>, keeper: BorrowedFd<'_>) {
    let mut hears = true;
    loop {
        let mut events = vec![PollFd::new(keeper, PollFlags::POLLIN)];
        if hears {
            events.push(PollFd::new(socket, PollFlags::POLLIN));
        }
        if poll(&mut events, PollTimeout::NONE).is_err() {
            continue;
        }
        let is_ready = |at: usize| events.get(at).and_then(PollFd::any) == Some(true);
        // First: whoever asks when it has ended is not it.
        if is_ready(0) {
            return;
        }
        if is_ready(1) {
            hears = answer(host, socket);
            if !hears {
                // Whoever still waits for an answer, or asks, is told that there will be none.
                let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
            }
        }
    }
}

/// Answers one request; false when there will be no more.
fn answer(host: &mut Host, socket: BorrowedFd<'_>) -> bool {
    let mut bytes = [0; LONGEST + 1];
    let (count, descriptor) = match again(|| receive_with_descriptor(socket, &mut bytes)) {
        Ok((0, _)) => return false,
        Ok(heard) => heard,
        Err(error) => {
            tracing::error!(%error, "The monitor cannot hear its keeper any more");
            return false;
        }
    };
    let done = match Request::decode(&bytes[..count]) {
        Some(request) => host.act(&request, descriptor),
        None => {
            tracing::error!("The keeper asks its monitor for what there is not");
            Err(Failure::Text("There is no such request".into()))
        }
    };
    let (reply, descriptor) = match done {
        Ok(Done { descriptor, text }) => (Reply::Done(text), descriptor),
        Err(Failure::Kernel(error)) => match error.raw_os_error() {
            Some(number) => (Reply::Errno(number), None),
            None => (Reply::Failed(error.to_string()), None),
        },
        Err(Failure::Text(text) | Failure::Unanswered(text)) => (Reply::Failed(text), None),
    };
    let said = again(|| {
        send_with_descriptor(socket, &reply.encode(), descriptor.as_ref().map(AsFd::as_fd))
    });
    said.is_ok()
}

fn again<T>(mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match work() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

fn gone(error: io::Error) -> String {
    format!(
        "The monitor of this VM's keeper is gone ({error}): the guest runs on, and can be stopped, but not moved"
    )
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the monitor's answer makes no sense")
}

#[cfg(test)]
pub(crate) mod tests;
