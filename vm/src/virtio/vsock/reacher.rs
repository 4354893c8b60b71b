//! A thread that connects to programs of the host on the device's behalf, which may make no connections itself:
//! whoever took the device over could otherwise talk to anything that listens on this host.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::error::{Result as VmResult, VmError};
use crate::monitor::{Monitor, Request};

/// Connects to sockets whose names begin the same, and to nothing else.
#[derive(Debug)]
pub(super) struct Reacher {
    asks: Option<SyncSender<u32>>,
    answers: Receiver<io::Result<UnixStream>>,
    thread: Option<JoinHandle<()>>,
}

impl Reacher {
    /// One that reaches ports by `way`.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub(super) fn start(way: Way) -> VmResult<Self> {
        let (asks, asked) = sync_channel(1);
        let (answer, answers) = sync_channel(1);
        let work = move || {
            for port in asked {
                if answer.send(way.reach(port)).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("vsock reach".into()).spawn(work).map_err(
            |error| VmError::refused("start the thread that connects the guest's sockets", error),
        )?;
        Ok(Self { asks: Some(asks), answers, thread: Some(thread) })
    }

    /// A stream, non-blocking, to the program that waits at `port`. Does not wait for that program.
    ///
    /// # Errors
    /// When none waits there, or as many as it lets already wait for it.
    pub(super) fn reach(&self, port: u32) -> io::Result<UnixStream> {
        let gone = || io::Error::other("the thread that connects is gone");
        let asks = self.asks.as_ref().ok_or_else(gone)?;
        asks.send(port).map_err(|_| gone())?;
        self.answers.recv().map_err(|_| gone())?
    }
}

impl Drop for Reacher {
    fn drop(&mut self) {
        self.asks = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How the programs are reached that wait for the guest.
#[derive(Debug)]
pub(crate) enum Way {
    /// At the socket called as this one, with `_` and the port behind.
    Path(PathBuf),
    /// By the monitor, which knows where.
    Monitored(Monitor),
}

impl Way {
    fn reach(&self, port: u32) -> io::Result<UnixStream> {
        match self {
            Self::Path(path) => reach(path, port),
            Self::Monitored(monitor) => {
                monitor.open(&Request::Reach { port }, None).map(UnixStream::from)
            }
        }
    }
}

/// A stream, non-blocking, to whoever listens at `path`_PORT.
///
/// # Errors
/// When nobody does, or as many as it lets already wait for it.
pub(crate) fn reach(path: &Path, port: u32) -> io::Result<UnixStream> {
    let none = || io::Error::from(io::ErrorKind::InvalidInput);
    let (parent, name) = path.parent().zip(path.file_name()).ok_or_else(none)?;
    let mut name = OsString::from(name);
    name.push(format!("_{port}"));
    // A path may be longer than an address; the way to it by a descriptor is not.
    let parent = File::open(parent)?;
    let short = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(name);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(&short)?)?;
    Ok(UnixStream::from(fd))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_program_with_a_long_path_is_reached() {
        let dir = tempfile::tempdir().expect("directory");
        let deep = dir.path().join("d".repeat(150));
        std::fs::create_dir(&deep).expect("made");
        let listener =
            decamp_shared::console::listen_privately(&deep.join("vsock_7")).expect("bound");
        let reacher = Reacher::start(Way::Path(deep.join("vsock"))).expect("started");
        let mut stream = reacher.reach(7).expect("reached");
        let (mut program, _) = listener.accept().expect("it came");
        program.write_all(b"x").expect("written");
        stream.set_nonblocking(false).expect("set");
        stream.read_exact(&mut [0]).expect("read");
        reacher.reach(8).expect_err("nobody waits there");
    }
}
