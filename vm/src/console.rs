//! Where a guest's serial console goes and comes from: the log file, and clients of the console
//! socket, who see what is printed while they are connected and may type.
//!
//! Nothing here may hold the guest up: a log that cannot be written and a client that does not read
//! lose bytes, and the loss is counted.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Result, VmError};

/// The most clients at once; the next is turned away.
const MAX_CLIENTS: usize = 16;
/// A host without descriptors refuses again at once; the client keeps its place in the queue.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// A guest's console is for root, whatever umask the keeper was started with.
const SOCKET_MODE: u32 = 0o600;

/// Something that takes what a client typed.
pub(crate) type Keyboard = Box<dyn Fn(&[u8]) + Send>;

/// Where a guest's output goes. Clones write to the same places.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    inner: Arc<Mutex<Places>>,
}

#[derive(Debug)]
struct Places {
    log: Option<File>,
    clients: Vec<Seer>,
    next_number: u64,
    lost: u64,
}

/// The reading end of a client.
#[derive(Debug)]
struct Seer {
    number: u64,
    stream: UnixStream,
}

impl Output {
    /// Output that is appended to `log`, made when it is not there.
    pub(crate) fn to_log(log: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(log).map_err(|error| {
            VmError::refused(format!("open the console log {}", log.display()), error)
        })?;
        Ok(Self::new(Some(file)))
    }

    fn new(log: Option<File>) -> Self {
        let places = Places { log, clients: Vec::new(), next_number: 0, lost: 0 };
        Self { inner: Arc::new(Mutex::new(places)) }
    }

    /// Bytes that some place could not take.
    pub(crate) fn lost(&self) -> u64 {
        self.places().lost
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the client what is printed from now on; a number to forget it by, if there was room.
    fn add(&self, stream: UnixStream) -> Option<u64> {
        let mut places = self.places();
        if places.clients.len() >= MAX_CLIENTS {
            return None;
        }
        let number = places.next_number;
        places.next_number += 1;
        places.clients.push(Seer { number, stream });
        Some(number)
    }

    /// Makes room for another client; a silent guest would never find out that this one is gone.
    fn forget(&self, number: u64) {
        self.places().clients.retain(|client| client.number != number);
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut places = self.places();
        let mut lost = 0;
        if let Some(log) = &mut places.log {
            lost += u64::from(log.write_all(bytes).is_err());
        }
        // Clients are non-blocking: one that cannot take it now is slow and misses it; one that is
        // gone is forgotten.
        places.clients.retain_mut(|client| match client.stream.write(bytes) {
            Ok(count) => {
                lost += (bytes.len() - count) as u64;
                true
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                lost += bytes.len() as u64;
                true
            }
            Err(_) => false,
        });
        places.lost += lost;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The console socket of one VM, served by a thread of its own until this is dropped.
#[derive(Debug)]
pub(crate) struct Console {
    path: PathBuf,
    end: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Console {
    /// Listens on `path` (a socket left by a keeper that died is replaced) and serves clients.
    pub(crate) fn listen(path: &Path, output: Output, keyboard: Keyboard) -> Result<Self> {
        let failed = |error: io::Error| {
            VmError::refused(format!("listen on the console socket {}", path.display()), error)
        };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        let mode = std::fs::Permissions::from_mode(SOCKET_MODE);
        std::fs::set_permissions(path, mode).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let end = EventFd::from_flags(flags).map_err(|error| failed(error.into()))?;
        let end = Arc::new(end);
        let server = Server { listener, output, keyboard, clients: Vec::new(), rests_until: None };
        let stop = end.clone();
        let thread = std::thread::Builder::new()
            .name("console".into())
            .spawn(move || server.serve(&stop))
            .map_err(failed)?;
        Ok(Self { path: path.to_owned(), end, thread: Some(thread) })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.end.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Server {
    listener: UnixListener,
    output: Output,
    keyboard: Keyboard,
    clients: Vec<Client>,
    /// Nobody is accepted before.
    rests_until: Option<Instant>,
}

/// A connected client.
struct Client {
    /// What [`Output`] knows it by.
    number: u64,
    stream: UnixStream,
    /// Has not said that it will type no more; it may go on seeing after that.
    types: bool,
}

impl Server {
    fn serve(mut self, end: &EventFd) {
        loop {
            let rest =
                self.rests_until.map(|until| until.saturating_duration_since(Instant::now()));
            let ready = match self.wait(end, rest) {
                Ok(ready) => ready,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => {
                    tracing::warn!("The console socket is not served any more: {error}");
                    return;
                }
            };
            if ready.iter().any(|(fd, _)| *fd == Ready::End) {
                return;
            }
            // From the end, so that indexes stay true while clients leave.
            for (fd, events) in ready.iter().rev() {
                match fd {
                    Ready::Client(index) if !self.attend(*index, *events) => {
                        let gone = self.clients.swap_remove(*index);
                        self.output.forget(gone.number);
                    }
                    Ready::Listener => self.accept(),
                    _ => {}
                }
            }
        }
    }

    /// What has something to say, in the order of clients; nothing when `rest` is over first.
    fn wait(&self, end: &EventFd, rest: Option<Duration>) -> nix::Result<Vec<(Ready, PollFlags)>> {
        let mut who = vec![Ready::End];
        let mut polled = vec![PollFd::new(end.as_fd(), PollFlags::POLLIN)];
        let rests = rest.is_some_and(|rest| !rest.is_zero());
        if !rests {
            who.push(Ready::Listener);
            polled.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN));
        }
        for (index, client) in self.clients.iter().enumerate() {
            // A hang-up is told without being asked for.
            let events = if client.types { PollFlags::POLLIN } else { PollFlags::empty() };
            who.push(Ready::Client(index));
            polled.push(PollFd::new(client.stream.as_fd(), events));
        }
        let timeout = match rest {
            // Rounded up, so that it does not end a moment too early.
            Some(rest) if rests => {
                PollTimeout::try_from(rest + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
            _ => PollTimeout::NONE,
        };
        poll(&mut polled, timeout)?;
        let events = polled.iter().map(|fd| fd.revents().unwrap_or(PollFlags::POLLERR));
        Ok(who.into_iter().zip(events).filter(|(_, events)| !events.is_empty()).collect())
    }

    fn accept(&mut self) {
        self.rests_until = None;
        let client = match self.listener.accept() {
            Ok((client, _)) => client,
            Err(error) => {
                if !passes(&error) && error.kind() != io::ErrorKind::ConnectionAborted {
                    tracing::warn!("The console cannot take a client: {error}");
                    self.rests_until = Some(Instant::now() + ACCEPT_AGAIN_AFTER);
                }
                return;
            }
        };
        let seer = client.set_nonblocking(true).and_then(|()| client.try_clone());
        if let Some(number) = seer.ok().and_then(|seer| self.output.add(seer)) {
            self.clients.push(Client { number, stream: client, types: true });
        }
    }

    /// Hands on what the client typed; `false` when it is gone.
    fn attend(&mut self, index: usize, events: PollFlags) -> bool {
        let gone = events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
        let client = &mut self.clients[index];
        if !client.types {
            return !gone;
        }
        let mut bytes = [0; 1024];
        match client.stream.read(&mut bytes) {
            // What it typed before it left is read first.
            Ok(0) => {
                client.types = false;
                !gone
            }
            Ok(count) => {
                (self.keyboard)(&bytes[..count]);
                true
            }
            Err(error) => passes(&error),
        }
    }
}

/// What a poll found ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    End,
    Listener,
    Client(usize),
}

/// Whether the next attempt may well succeed.
fn passes(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_client_sees_what_is_printed_and_types() {
        let dir = tempfile::tempdir().expect("directory");
        let mut output = Output::to_log(&dir.path().join("log")).expect("log");
        let (typed, typing) = mpsc::channel();
        let keyboard = Box::new(move |bytes: &[u8]| drop(typed.send(bytes.to_vec())));
        let socket = dir.path().join("console.sock");
        let console = Console::listen(&socket, output.clone(), keyboard).expect("listen");
        let mut client = UnixStream::connect(&socket).expect("connect");
        client.write_all(b"v").expect("type");
        assert_eq!(typing.recv_timeout(Duration::from_secs(5)).expect("typed"), b"v");
        output.write_all(b"hello").expect("print");
        let mut seen = [0; 5];
        client.read_exact(&mut seen).expect("see");
        assert_eq!(&seen, b"hello");
        drop(console);
        assert!(!socket.exists());
        assert_eq!(std::fs::read(dir.path().join("log")).expect("log"), b"hello");
    }

    #[test]
    fn a_client_that_never_reads_loses_bytes_and_holds_nobody_up() {
        let dir = tempfile::tempdir().expect("directory");
        let mut output = Output::to_log(&dir.path().join("log")).expect("log");
        let (here, there) = UnixStream::pair().expect("pair");
        here.set_nonblocking(true).expect("non-blocking");
        assert!(output.add(here).is_some());
        for _ in 0..64 {
            output.write_all(&[b'x'; 65536]).expect("print");
        }
        assert!(output.lost() > 0);
        assert_eq!(std::fs::metadata(dir.path().join("log")).expect("log").len(), 64 * 65536);
        drop(there);
    }

    /// Whether the console answers a client: it may be turned away, or wait in the queue.
    fn is_served(socket: &Path, typing: &mpsc::Receiver<Vec<u8>>) -> Option<UnixStream> {
        let mut client = UnixStream::connect(socket).expect("connect");
        let _ = client.write_all(b"?");
        typing.recv_timeout(Duration::from_millis(200)).ok().map(|_| client)
    }

    #[test]
    fn clients_that_hang_up_make_room_though_the_guest_is_silent() {
        let dir = tempfile::tempdir().expect("directory");
        let output = Output::to_log(&dir.path().join("log")).expect("log");
        let (typed, typing) = mpsc::channel();
        let keyboard = Box::new(move |bytes: &[u8]| drop(typed.send(bytes.to_vec())));
        let socket = dir.path().join("console.sock");
        let _console = Console::listen(&socket, output.clone(), keyboard).expect("listen");
        let mode = std::fs::metadata(&socket).expect("socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut clients = Vec::new();
        for _ in 0..MAX_CLIENTS {
            clients.push(is_served(&socket, &typing).expect("room"));
        }
        assert!(is_served(&socket, &typing).is_none(), "one too many");
        // One half closed is still there to see; it leaves its place when it is gone altogether.
        clients[0].shutdown(std::net::Shutdown::Write).expect("shut down");
        assert!(is_served(&socket, &typing).is_none(), "it looks on");
        clients.clear();
        let deadline = Instant::now() + Duration::from_secs(5);
        while is_served(&socket, &typing).is_none() {
            assert!(Instant::now() < deadline, "clients that are gone hold their places");
        }
        assert!(output.places().clients.len() <= 1);
    }

    #[test]
    fn a_client_that_types_no_more_still_sees() {
        let dir = tempfile::tempdir().expect("directory");
        let mut output = Output::to_log(&dir.path().join("log")).expect("log");
        let (typed, typing) = mpsc::channel();
        let keyboard = Box::new(move |bytes: &[u8]| drop(typed.send(bytes.to_vec())));
        let socket = dir.path().join("console.sock");
        let _console = Console::listen(&socket, output.clone(), keyboard).expect("listen");
        let mut client = is_served(&socket, &typing).expect("room");
        client.shutdown(std::net::Shutdown::Write).expect("shut down");
        // The next client is attended to after the first one's end was.
        let _next = is_served(&socket, &typing).expect("room");
        output.write_all(b"hello").expect("print");
        let mut seen = [0; 5];
        client.read_exact(&mut seen).expect("see");
        assert_eq!(&seen, b"hello");
    }
}
