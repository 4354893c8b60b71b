//! A container's terminal: its master end, which the keeper holds. What comes out of it goes into the log
//! and to whoever is connected to its console; what such a client sends is typed into it.
//!
//! The runtime makes the terminal within the container's own devpts and hands the master over through a
//! socket; at a restore CRIU makes it again and does the same. Nothing here knows what a restore is.

use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use decamp_shared::console::{Console, Output, Resizer, Size};
use decamp_shared::workload::Place;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::error::{ContainerError, Result};
use crate::sys;

/// A terminal that nobody has open is asked again after this.
const NOBODY_THERE: Duration = Duration::from_millis(20);
/// What is still to be read when the last process has ended is copied within this.
const FINISH_WITHIN: Duration = Duration::from_millis(500);

/// Where a runtime hands over the master of the terminal that it makes.
pub(crate) struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

/// The master of a container's terminal, kept.
pub(crate) struct Terminal {
    over: Arc<EventFd>,
    copier: Option<JoinHandle<()>>,
    console: Option<Console>,
}

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
    /// Keeps `master`: what comes out of it goes into the log and to clients of the console of `place`,
    /// which type into it.
    pub(crate) fn keep(master: OwnedFd, place: &Place) -> Result<Self> {
        let output = Output::to_log(&place.log()).map_err(ContainerError::Console)?;
        fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK | OFlag::O_RDWR))
            .map_err(ContainerError::errno("have a terminal not block"))?;
        let copied =
            || master.try_clone().map_err(ContainerError::io("copy the terminal's descriptor"));
        let (typed, sized) = (File::from(copied()?), copied()?);
        // With no room left there is an error that passes; without anybody there is nobody to type to.
        let keyboard = Box::new(move |bytes: &[u8]| match (&typed).write(bytes) {
            Err(error) if passes(&error) => 0,
            taken => taken.unwrap_or(bytes.len()),
        });
        let sizes: Resizer = Box::new(move |size| {
            if let Err(error) = resize(&sized, size) {
                tracing::debug!(%error, "Cannot set the size of a terminal");
            }
        });
        let sizes = Some((place.console_size(), sizes));
        let console = Console::listen(&place.console(), output.clone(), keyboard, sizes)
            .map_err(ContainerError::Console)?;
        let over = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(ContainerError::errno("make an event descriptor"))?;
        let over = Arc::new(over);
        let ended = over.clone();
        let copier = thread::Builder::new()
            .name("terminal".to_owned())
            .spawn(move || copy(&File::from(master), output, &ended))
            .map_err(ContainerError::io("start a thread"))?;
        Ok(Self { over, copier: Some(copier), console: Some(console) })
    }

    /// Takes what was written until now into the log: call it when every process has ended.
    pub(crate) fn finish(&mut self) {
        let _ = self.over.write(1);
        if let Some(copier) = self.copier.take() {
            let begun = Instant::now();
            while !copier.is_finished() && begun.elapsed() < FINISH_WITHIN {
                thread::sleep(Duration::from_millis(1));
            }
        }
        self.console = None;
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Copies what the terminal says until it is `over` and it has said all.
fn copy(mut master: &File, mut output: Output, over: &EventFd) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = master.read(&mut buffer);
        let mut polled = [PollFd::new(over.as_fd(), PollFlags::POLLIN)];
        let is_over = poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        match read {
            // It never fails.
            Ok(length) if length > 0 => drop(output.write_all(&buffer[..length])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ if is_over => return,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let said = PollFd::new(master.as_fd(), PollFlags::POLLIN);
                let ended = PollFd::new(over.as_fd(), PollFlags::POLLIN);
                let _ = poll(&mut [said, ended], PollTimeout::NONE);
            }
            // Nobody has the other end open just now; who knows its name may open it again.
            _ => thread::sleep(NOBODY_THERE),
        }
    }
}

/// Tells the terminal, and so whoever runs in its foreground, how large it is.
fn resize(terminal: &OwnedFd, size: Size) -> io::Result<()> {
    let size = rustix::termios::Winsize {
        ws_col: size.columns,
        ws_row: size.rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

/// Whether the next attempt may well succeed.
fn passes(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
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
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn until(what: &str, holds: impl Fn() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(begun.elapsed() < Duration::from_secs(120), "waited in vain for {what}");
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

    /// A terminal that is kept, and its other end.
    fn kept(directory: &Path) -> (Terminal, File, Place) {
        let pair = openpty(None, None).expect("a terminal");
        let place = Place { name: "web".into(), uuid: "u".into(), dir: directory.to_owned() };
        let terminal = Terminal::keep(pair.master, &place).expect("kept");
        (terminal, File::from(pair.slave), place)
    }

    #[test]
    fn what_it_says_is_logged_and_shown_and_what_clients_type_arrives() {
        let directory = tempfile::tempdir().expect("a directory");
        let (mut terminal, mut slave, place) = kept(directory.path());
        slave.write_all(b"before\n").expect("says");
        let logged =
            |text: &str| fs::read_to_string(place.log()).is_ok_and(|log| log.contains(text));
        until("the log", || logged("before"));
        let mut clients = [(); 2].map(|()| UnixStream::connect(place.console()).expect("connects"));
        for (turn, client) in clients.iter_mut().enumerate() {
            client.write_all(format!("typed{turn}\n").as_bytes()).expect("types");
            let mut line = [0; 7];
            slave.read_exact(&mut line).expect("arrives");
            assert_eq!(line, format!("typed{turn}\n").as_bytes());
        }
        slave.write_all(b"to all\n").expect("says");
        for client in &mut clients {
            let mut seen = String::new();
            while !seen.contains("to all") {
                let mut piece = [0; 64];
                let count = client.read(&mut piece).expect("shown");
                assert_ne!(count, 0, "it was let go");
                seen.push_str(&String::from_utf8_lossy(&piece[..count]));
            }
            // The terminal echoes what the other one typed, too.
            assert!(seen.contains("typed1"), "{seen}");
        }
        // Closed and opened again by somebody who knows its name, it is the same terminal.
        slave.write_all(b"last words").expect("says");
        drop(slave);
        terminal.finish();
        assert!(logged("last words"));
        assert!(!place.console().exists() && !place.console_size().exists());
        for mut client in clients {
            let mut rest = Vec::new();
            client.read_to_end(&mut rest).expect("it is let go");
            assert!(rest.ends_with(b"last words"));
        }
    }

    #[test]
    fn a_client_says_how_large_it_is() {
        let directory = tempfile::tempdir().expect("a directory");
        let (_terminal, slave, place) = kept(directory.path());
        let sender = std::os::unix::net::UnixDatagram::unbound().expect("a socket");
        let size = Size { columns: 97, rows: 33 };
        sender.send_to(&size.to_bytes(), place.console_size()).expect("told");
        until("the size", || {
            let found = rustix::termios::tcgetwinsize(&slave).expect("a size");
            (found.ws_col, found.ws_row) == (97, 33)
        });
    }

    #[test]
    fn more_is_typed_than_a_terminal_takes_at_once() {
        let directory = tempfile::tempdir().expect("a directory");
        let (_terminal, mut slave, place) = kept(directory.path());
        let mut settings = rustix::termios::tcgetattr(&slave).expect("settings");
        settings.make_raw();
        rustix::termios::tcsetattr(&slave, rustix::termios::OptionalActions::Now, &settings)
            .expect("set");
        let typed: Vec<u8> = (0..200_000u32).map(|at| (at % 251) as u8).collect();
        let mut client = UnixStream::connect(place.console()).expect("connects");
        let all = typed.clone();
        let typist = thread::spawn(move || client.write_all(&all).expect("typed"));
        let mut seen = vec![0; typed.len()];
        slave.read_exact(&mut seen).expect("arrives");
        typist.join().expect("no panic");
        assert!(seen == typed, "something is missing, or in another order");
    }
}
