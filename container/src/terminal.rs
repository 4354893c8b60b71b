//! A container's terminal: its master end, which the keeper holds. What comes out of it goes into the log
//! and to whoever is connected to the console socket; what such a client sends is typed into it.
//!
//! The runtime makes the terminal within the container's own devpts and hands the master over through a
//! socket; at a restore CRIU makes it again and does the same. Nothing here knows what a restore is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::error::{ContainerError, Result};
use crate::sys;

/// A terminal that nobody has open is asked again after this.
const NOBODY_THERE: Duration = Duration::from_millis(20);
/// What is still to be read when the last process has ended is copied within this.
const FINISH_WITHIN: Duration = Duration::from_millis(500);
/// Whoever does not take what the terminal says within this is let go.
const TAKEN_WITHIN: Duration = Duration::from_millis(100);

/// Where a runtime hands over the master of the terminal that it makes.
pub(crate) struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

/// The master of a container's terminal, kept.
pub(crate) struct Terminal {
    over: Arc<AtomicBool>,
    copier: Option<JoinHandle<()>>,
    socket: PathBuf,
    client: Client,
}

/// Who is connected, if anybody is: one at a time, the last to come.
#[derive(Clone, Default)]
struct Client(Arc<Mutex<Option<UnixStream>>>);

impl ConsoleSocket {
    /// Listens in `directory`.
    pub(crate) fn listen(directory: &Path) -> Result<Self> {
        let path = directory.join("tty.sock");
        let listener = bind(&path)?;
        listener
            .set_nonblocking(true)
            .map_err(ContainerError::io(format!("listen on {}", path.display())))?;
        Ok(Self { path, listener })
    }

    /// The path for the runtime.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The master, from a runtime that has done its work.
    pub(crate) fn master(&self) -> Result<OwnedFd> {
        let none = |why: String| {
            ContainerError::State(format!("The runtime handed over no terminal: {why}"))
        };
        let (stream, _) = self.listener.accept().map_err(|error| none(error.to_string()))?;
        stream.set_nonblocking(true).map_err(|error| none(error.to_string()))?;
        // The message is the terminal's name, of which nothing follows.
        let mut name = [0; 4096];
        let (_, master) = receive(&stream, &mut name, MsgFlags::empty())
            .map_err(|error| none(error.to_string()))?;
        let master = master.ok_or_else(|| none("no descriptor came".to_owned()))?;
        if !nix::unistd::isatty(&master).unwrap_or(false) {
            return Err(none("what came is no terminal".to_owned()));
        }
        Ok(master)
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Terminal {
    /// Keeps `master`: appends what comes out of it to `log`, and lets clients of `socket` type.
    pub(crate) fn keep(master: OwnedFd, log: &Path, socket: &Path) -> Result<Self> {
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .open(log)
            .map_err(ContainerError::io(format!("open {}", log.display())))?;
        let listener = bind(socket)?;
        let (over, client) = (Arc::new(AtomicBool::new(false)), Client::default());
        let keyboard =
            master.try_clone().map_err(ContainerError::io("copy the terminal's descriptor"))?;
        let (ended, screen) = (over.clone(), client.clone());
        let copier = thread::Builder::new()
            .name("terminal".to_owned())
            .spawn(move || copy(&File::from(master), log, &screen, &ended))
            .map_err(ContainerError::io("start a thread"))?;
        let (ended, typist) = (over.clone(), client.clone());
        thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || serve(&listener, &keyboard, &typist, &ended))
            .map_err(ContainerError::io("start a thread"))?;
        Ok(Self { over, copier: Some(copier), socket: socket.to_owned(), client })
    }

    /// Takes what was written until now into the log: call it when every process has ended.
    pub(crate) fn finish(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(copier) = self.copier.take() {
            let begun = Instant::now();
            while !copier.is_finished() && begun.elapsed() < FINISH_WITHIN {
                thread::sleep(Duration::from_millis(1));
            }
        }
        self.client.replace(None);
        // Whoever waits for a client sees that it is over.
        let _ = UnixStream::connect(&self.socket);
        let _ = fs::remove_file(&self.socket);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Client {
    fn held(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the one go that was there.
    fn replace(&self, with: Option<UnixStream>) {
        if let Some(earlier) = std::mem::replace(&mut *self.held(), with) {
            let _ = earlier.shutdown(Shutdown::Both);
        }
    }

    /// Shows it `bytes`; one that does not take them is let go, for the container does not wait.
    fn show(&self, bytes: &[u8]) {
        let mut held = self.held();
        let Some(stream) = held.as_mut() else { return };
        if stream.write_all(bytes).is_err() {
            let _ = stream.shutdown(Shutdown::Both);
            *held = None;
        }
    }
}

/// Copies what the terminal says until it is `over` and nobody has it open any more.
fn copy(mut master: &File, mut log: File, client: &Client, over: &AtomicBool) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match master.read(&mut buffer) {
            Ok(length) if length > 0 => {
                if let Err(error) = log.write_all(&buffer[..length]) {
                    tracing::debug!(%error, "Cannot write the container's log");
                }
                client.show(&buffer[..length]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Nobody has the other end open just now; who knows its name may open it again.
            _ if over.load(Ordering::SeqCst) => return,
            _ => thread::sleep(NOBODY_THERE),
        }
    }
}

/// Lets one client after another type.
fn serve(listener: &UnixListener, keyboard: &OwnedFd, client: &Client, over: &AtomicBool) {
    for stream in listener.incoming() {
        if over.load(Ordering::SeqCst) {
            return;
        }
        let attach = |stream: UnixStream| -> io::Result<()> {
            stream.set_write_timeout(Some(TAKEN_WITHIN))?;
            let (typing, keyboard) = (stream.try_clone()?, File::from(keyboard.try_clone()?));
            client.replace(Some(stream));
            thread::Builder::new().name("typing".to_owned()).spawn(move || {
                let (mut typing, mut keyboard) = (typing, keyboard);
                // To the end of either; the container runs on without a keyboard.
                let _ = io::copy(&mut typing, &mut keyboard);
            })?;
            Ok(())
        };
        if let Err(error) = stream.and_then(attach) {
            tracing::warn!(%error, "Cannot let a client at the terminal");
            thread::sleep(NOBODY_THERE);
        }
    }
}

/// Receives a message, with the first descriptor that came with it.
pub(crate) fn receive(
    socket: &impl AsRawFd,
    into: &mut [u8],
    flags: MsgFlags,
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut parts = [IoSliceMut::new(into)];
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            descriptors.extend(numbers.into_iter().map(sys::adopt_descriptor));
        }
    }
    Ok((message.bytes, descriptors.into_iter().next()))
}

/// Listens on `path`, for root alone. A path may be longer than an address; the way to it by a descriptor
/// is not.
fn bind(path: &Path) -> Result<UnixListener> {
    let failed = |error| ContainerError::io(format!("listen on {}", path.display()))(error);
    let _ = fs::remove_file(path);
    let none = || io::Error::from(io::ErrorKind::InvalidInput);
    let make = || -> io::Result<UnixListener> {
        let (parent, name) = path.parent().zip(path.file_name()).ok_or_else(none)?;
        let parent = File::open(parent)?;
        let short = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(name);
        let listener = UnixListener::bind(&short)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    make().map_err(failed)
}

#[cfg(test)]
mod tests {
    use nix::pty::openpty;
    use nix::sys::socket::{ControlMessage, sendmsg};
    use std::io::IoSlice;
    use std::os::fd::{AsFd, BorrowedFd};

    use super::*;

    fn until(what: &str, holds: impl Fn() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(begun.elapsed() < Duration::from_secs(5), "waited in vain for {what}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn hand_over(path: &Path, descriptor: BorrowedFd<'_>) {
        let stream = UnixStream::connect(path).expect("connects");
        let numbers = [descriptor.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&numbers)];
        let part = [IoSlice::new(b"/dev/ptmx")];
        sendmsg::<()>(stream.as_raw_fd(), &part, &control, MsgFlags::empty(), None).expect("sent");
    }

    #[test]
    fn a_runtime_hands_over_a_terminal_and_nothing_else() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = ConsoleSocket::listen(directory.path()).expect("listens");
        assert!(socket.master().is_err(), "nobody came");
        let pair = openpty(None, None).expect("a terminal");
        hand_over(socket.path(), pair.master.as_fd());
        socket.master().expect("a terminal");
        let file = File::open("/dev/null").expect("opens");
        hand_over(socket.path(), file.as_fd());
        assert!(socket.master().is_err_and(|error| error.to_string().contains("no terminal")));
    }

    #[test]
    fn what_it_says_is_logged_and_shown_and_what_a_client_types_arrives() {
        let directory = tempfile::tempdir().expect("a directory");
        let (log, socket) = (directory.path().join("log"), directory.path().join("console"));
        let pair = openpty(None, None).expect("a terminal");
        let mut terminal = Terminal::keep(pair.master, &log, &socket).expect("kept");
        let mut slave = File::from(pair.slave);
        slave.write_all(b"before\n").expect("says");
        let logged = |text: &str| fs::read_to_string(&log).is_ok_and(|log| log.contains(text));
        until("the log", || logged("before"));
        let mut client = UnixStream::connect(&socket).expect("connects");
        client.write_all(b"typed\n").expect("types");
        let mut line = [0; 6];
        slave.read_exact(&mut line).expect("arrives");
        assert_eq!(&line, b"typed\n");
        // The terminal echoes it.
        let mut seen = [0; 5];
        client.read_exact(&mut seen).expect("shown");
        assert_eq!(&seen, b"typed");
        // Closed and opened again by somebody who knows its name, it is the same terminal.
        slave.write_all(b"last words").expect("says");
        drop(slave);
        terminal.finish();
        assert!(logged("last words"));
        assert!(!socket.exists());
        assert_eq!(client.read(&mut [0; 64]).map(|_| ()).ok(), Some(()), "it is let go");
    }
}
