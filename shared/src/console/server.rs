//! The sockets of one console: who connects, types, and tells how large its window is. What is printed
//! is [`Output`]'s.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{ConsoleError, Output, Size};

/// The most clients at once; the next is turned away.
pub const MAX_CLIENTS: usize = 16;
/// A host without descriptors refuses again at once; the client keeps its place in the queue.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// A workload that has no room for what is typed is tried again after this.
const TYPE_AGAIN_AFTER: Duration = Duration::from_millis(20);
/// What a client that is gone has typed is tried for so long.
const TYPED_WITHIN: Duration = Duration::from_secs(5);
/// How long clients are given the last words.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// A console is for root, whatever umask the keeper was started with.
const SOCKET_MODE: u32 = 0o600;

/// Takes what a client typed; how many bytes of it. Those that it has no room for come again.
pub type Keyboard = Box<dyn Fn(&[u8]) -> usize + Send>;
/// Takes the size of a client's window.
pub type Resizer = Box<dyn Fn(Size) + Send>;

/// The sockets of one console, served by a thread of its own until this is dropped.
#[derive(Debug)]
pub struct Console {
    /// Dropped last: who sees that it is gone knows that nobody serves any more.
    socket: Option<Listening>,
    sizes: Option<PathBuf>,
    end: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// A socket at a path, for root alone, that is listened on. The path goes with it.
#[derive(Debug)]
pub struct Listening {
    path: PathBuf,
    listener: UnixListener,
}

impl Listening {
    /// Listens on `path`; as [`listen_privately`].
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), listener: listen_privately(path)? })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who connects, without waiting for anybody.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Console {
    /// Listens on `path` (a socket left by a keeper that died is replaced) and serves clients. `sizes`:
    /// where sizes come in, and what takes them.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn listen(
        path: &Path,
        output: Output,
        keyboard: Keyboard,
        sizes: Option<(PathBuf, Resizer)>,
    ) -> Result<Self, ConsoleError> {
        let failed = |source: io::Error| ConsoleError::Listen { path: path.to_owned(), source };
        Self::on(Listening::at(path).map_err(failed)?, output, keyboard, sizes)
    }

    /// The same on a socket that is listened on already.
    ///
    /// # Errors
    /// As [`Console::listen`].
    pub fn on(
        socket: Listening,
        output: Output,
        keyboard: Keyboard,
        sizes: Option<(PathBuf, Resizer)>,
    ) -> Result<Self, ConsoleError> {
        let path = socket.path.clone();
        let failed = |source: io::Error| ConsoleError::Listen { path: path.clone(), source };
        let listener = socket.listener.try_clone().map_err(failed)?;
        let (mut sized, mut of_sizes) = (None, None);
        if let Some((path, resizer)) = sizes {
            let failed = |source| ConsoleError::Listen { path: path.clone(), source };
            let socket = bind(&path, |path| UnixDatagram::bind(path)).map_err(failed)?;
            socket.set_nonblocking(true).map_err(failed)?;
            sized = Some((socket, resizer));
            of_sizes = Some(path);
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let end = EventFd::from_flags(flags).map_err(|error| failed(error.into()))?;
        let end = Arc::new(end);
        let server =
            Server { listener, sized, output, keyboard, clients: Vec::new(), rests_until: None };
        let stop = end.clone();
        let thread = std::thread::Builder::new()
            .name("console".into())
            .spawn(move || server.serve(&stop))
            .map_err(failed)?;
        Ok(Self { socket: Some(socket), sizes: of_sizes, end, thread: Some(thread) })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.end.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        drop(self.socket.take());
        if let Some(path) = &self.sizes {
            let _ = fs::remove_file(path);
        }
    }
}

/// Listens on `path`, for root alone, without waiting for clients. A socket that is there already, left by a
/// keeper that died, is replaced.
///
/// # Errors
/// When it cannot be made.
pub fn listen_privately(path: &Path) -> io::Result<UnixListener> {
    let listener = bind(path, |path| UnixListener::bind(path))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Makes a socket at `path`, for root alone. A path may be longer than an address; the way to it by a
/// descriptor is not.
fn bind<S>(path: &Path, make: impl FnOnce(&Path) -> io::Result<S>) -> io::Result<S> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let none = || io::Error::from(io::ErrorKind::InvalidInput);
    let (parent, name) = path.parent().zip(path.file_name()).ok_or_else(none)?;
    let parent = File::open(parent)?;
    let short = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(name);
    let socket = make(&short)?;
    fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))?;
    Ok(socket)
}

struct Server {
    listener: UnixListener,
    sized: Option<(UnixDatagram, Resizer)>,
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
    /// What it typed and nobody took yet, and since when. Nothing more is read until it is.
    untyped: Vec<u8>,
    untyped_since: Instant,
}

impl Server {
    fn serve(mut self, end: &EventFd) {
        loop {
            self.type_again();
            let ready = match self.wait(end) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::warn!("The console socket is not served any more: {error}");
                    return;
                }
            };
            if ready.iter().any(|(fd, _)| *fd == Ready::End) {
                self.last_words();
                return;
            }
            // From the end, so that indexes stay true while clients leave.
            for (fd, events) in ready.iter().rev() {
                match fd {
                    Ready::Client(index) if !self.attend(*index, *events) => self.lose(*index),
                    Ready::Listener => self.accept(),
                    Ready::Size => self.resize(),
                    _ => {}
                }
            }
        }
    }

    /// What has something to say, in the order of clients; nothing when it is time for something else.
    fn wait(&self, end: &EventFd) -> nix::Result<Vec<(Ready, PollFlags)>> {
        let rest = self.rests_until.map(|until| until.saturating_duration_since(Instant::now()));
        let rests = rest.is_some_and(|rest| !rest.is_zero());
        let waiting = self.output.waiting();
        let mut who = vec![Ready::End, Ready::Kept];
        let mut polled = vec![
            PollFd::new(end.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.output.kept().as_fd(), PollFlags::POLLIN),
        ];
        if !rests {
            who.push(Ready::Listener);
            polled.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN));
        }
        if let Some((socket, _)) = &self.sized {
            who.push(Ready::Size);
            polled.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        }
        let mut again = rest.filter(|_| rests);
        for (index, client) in self.clients.iter().enumerate() {
            if !client.untyped.is_empty() {
                // A hang-up is told without being asked for, and again and again.
                again = Some(again.unwrap_or(TYPE_AGAIN_AFTER).min(TYPE_AGAIN_AFTER));
                continue;
            }
            let mut events = PollFlags::empty();
            events.set(PollFlags::POLLIN, client.types);
            events.set(PollFlags::POLLOUT, waiting.contains(&client.number));
            who.push(Ready::Client(index));
            polled.push(PollFd::new(client.stream.as_fd(), events));
        }
        // Rounded up, so that it does not end a moment too early.
        let timeout = again.map_or(PollTimeout::NONE, |rest| {
            PollTimeout::try_from(rest + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        poll(&mut polled, timeout)?;
        let events = polled.iter().map(|fd| fd.revents().unwrap_or(PollFlags::POLLERR));
        Ok(who.into_iter().zip(events).filter(|(_, events)| !events.is_empty()).collect())
    }

    fn accept(&mut self) {
        self.rests_until = None;
        let mut client = match self.listener.accept() {
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
        match seer.map(|seer| self.output.add(seer)) {
            Ok(Some(number)) => self.clients.push(Client {
                number,
                stream: client,
                types: true,
                untyped: Vec::new(),
                untyped_since: Instant::now(),
            }),
            Ok(None) => {
                let full =
                    format!("[decamp: {MAX_CLIENTS} clients are at this console already]\r\n");
                let _ = client.write(full.as_bytes());
            }
            Err(error) => tracing::warn!("The console cannot take a client: {error}"),
        }
    }

    /// Hands on what the client typed, and shows it what was kept; `false` when it is gone.
    fn attend(&mut self, index: usize, events: PollFlags) -> bool {
        let gone = events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
        let Self { clients, output, keyboard, .. } = self;
        let Some(client) = clients.get_mut(index) else { return true };
        if events.contains(PollFlags::POLLOUT) {
            output.catch_up(client.number);
        }
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
                let typed = bytes.get(..count).unwrap_or_default();
                let taken = keyboard(typed).min(count);
                client.untyped.extend(&typed[taken..]);
                client.untyped_since = Instant::now();
                true
            }
            Err(error) => passes(&error),
        }
    }

    /// Tries once more to type what there was no room for.
    fn type_again(&mut self) {
        for index in (0..self.clients.len()).rev() {
            let Self { clients, keyboard, .. } = self;
            let client = &mut clients[index];
            if client.untyped.is_empty() {
                continue;
            }
            let taken = keyboard(&client.untyped).min(client.untyped.len());
            client.untyped.drain(..taken);
            if taken > 0 {
                client.untyped_since = Instant::now();
            } else if client.untyped_since.elapsed() > TYPED_WITHIN && client.is_gone() {
                self.lose(index);
            }
        }
    }

    fn lose(&mut self, index: usize) {
        let gone = self.clients.swap_remove(index);
        self.output.forget(gone.number);
    }

    fn resize(&self) {
        let Some((socket, resizer)) = &self.sized else { return };
        // One byte more than there may be, so that a longer one is seen to be.
        let mut bytes = [0; Size::BYTES + 1];
        while let Ok(count) = socket.recv(&mut bytes) {
            if let Some(size) = Size::from_bytes(&bytes[..count]) {
                resizer(size);
            }
        }
    }

    /// What was printed last and not taken yet.
    fn last_words(&self) {
        let until = Instant::now() + LAST_WORDS;
        loop {
            let waiting = self.output.waiting();
            let rest = until.saturating_duration_since(Instant::now());
            let clients = self.clients.iter().filter(|one| waiting.contains(&one.number));
            let mut polled: Vec<_> =
                clients.map(|one| PollFd::new(one.stream.as_fd(), PollFlags::POLLOUT)).collect();
            let timeout = PollTimeout::try_from(rest).unwrap_or(PollTimeout::ZERO);
            if polled.is_empty() || rest.is_zero() || poll(&mut polled, timeout).is_err() {
                return;
            }
            waiting.iter().for_each(|&number| self.output.catch_up(number));
        }
    }
}

impl Client {
    fn is_gone(&self) -> bool {
        let mut polled = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0)
    }
}

/// What a poll found ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    End,
    /// Something was kept for a client: it is polled in another way now.
    Kept,
    Listener,
    Size,
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

    /// More time than anything that is awaited takes, on however slow and busy a machine.
    const PATIENCE: Duration = Duration::from_secs(120);

    /// Takes all that is typed, and tells of it.
    fn keyboard(typed: mpsc::Sender<Vec<u8>>) -> Keyboard {
        Box::new(move |bytes: &[u8]| {
            let _ = typed.send(bytes.to_vec());
            bytes.len()
        })
    }

    #[test]
    fn a_client_sees_what_is_printed_and_types() {
        let dir = tempfile::tempdir().expect("directory");
        let mut output = Output::to_log(&dir.path().join("log")).expect("log");
        let (typed, typing) = mpsc::channel();
        let keyboard = keyboard(typed);
        let socket = dir.path().join("console.sock");
        let console = Console::listen(&socket, output.clone(), keyboard, None).expect("listen");
        let mut client = UnixStream::connect(&socket).expect("connect");
        client.write_all(b"v").expect("type");
        assert_eq!(typing.recv_timeout(PATIENCE).expect("typed"), b"v");
        output.write_all(b"hello").expect("print");
        let mut seen = [0; 5];
        client.read_exact(&mut seen).expect("see");
        assert_eq!(&seen, b"hello");
        drop(console);
        assert!(!socket.exists());
        assert_eq!(std::fs::read(dir.path().join("log")).expect("log"), b"hello");
    }

    /// Whether the console answers a client: it may be turned away, or wait in the queue.
    fn is_served(socket: &Path, typing: &mpsc::Receiver<Vec<u8>>) -> Option<UnixStream> {
        served_within(Duration::from_millis(200), socket, typing)
    }

    /// A client that the console answers.
    fn served(socket: &Path, typing: &mpsc::Receiver<Vec<u8>>) -> UnixStream {
        served_within(PATIENCE, socket, typing).expect("room")
    }

    fn served_within(
        time: Duration,
        socket: &Path,
        typing: &mpsc::Receiver<Vec<u8>>,
    ) -> Option<UnixStream> {
        let mut client = UnixStream::connect(socket).expect("connect");
        let _ = client.write_all(b"?");
        typing.recv_timeout(time).ok().map(|_| client)
    }

    #[test]
    fn clients_that_hang_up_make_room_though_the_guest_is_silent() {
        let dir = tempfile::tempdir().expect("directory");
        let output = Output::to_log(&dir.path().join("log")).expect("log");
        let (typed, typing) = mpsc::channel();
        let keyboard = keyboard(typed);
        let socket = dir.path().join("console.sock");
        let _console = Console::listen(&socket, output.clone(), keyboard, None).expect("listen");
        let mode = std::fs::metadata(&socket).expect("socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut clients = Vec::new();
        for _ in 0..MAX_CLIENTS {
            clients.push(served(&socket, &typing));
        }
        assert!(is_served(&socket, &typing).is_none(), "one too many");
        // One half closed is still there to see; it leaves its place when it is gone altogether.
        clients[0].shutdown(std::net::Shutdown::Write).expect("shut down");
        assert!(is_served(&socket, &typing).is_none(), "it looks on");
        clients.clear();
        let deadline = Instant::now() + PATIENCE;
        while is_served(&socket, &typing).is_none() {
            assert!(Instant::now() < deadline, "clients that are gone hold their places");
        }
    }

    #[test]
    fn a_client_that_types_no_more_still_sees() {
        let dir = tempfile::tempdir().expect("directory");
        let mut output = Output::to_log(&dir.path().join("log")).expect("log");
        let (typed, typing) = mpsc::channel();
        let keyboard = keyboard(typed);
        let socket = dir.path().join("console.sock");
        let _console = Console::listen(&socket, output.clone(), keyboard, None).expect("listen");
        let mut client = served(&socket, &typing);
        client.shutdown(std::net::Shutdown::Write).expect("shut down");
        // The next client is attended to after the first one's end was.
        let _next = served(&socket, &typing);
        output.write_all(b"hello").expect("print");
        let mut seen = [0; 5];
        client.read_exact(&mut seen).expect("see");
        assert_eq!(&seen, b"hello");
    }

    #[test]
    fn what_there_is_no_room_for_is_typed_later_in_its_order() {
        let dir = tempfile::tempdir().expect("directory");
        let output = Output::to_log(&dir.path().join("log")).expect("log");
        let (typed, typing) = mpsc::channel();
        let (slow, turns) = (keyboard(typed), std::cell::Cell::new(0));
        // One call in three finds room, for three bytes.
        let keyboard = Box::new(move |bytes: &[u8]| {
            turns.set(turns.get() + 1);
            if turns.get() % 3 == 0 { slow(&bytes[..bytes.len().min(3)]) } else { 0 }
        });
        let socket = dir.path().join("console.sock");
        let _console = Console::listen(&socket, output, keyboard, None).expect("listen");
        let mut client = UnixStream::connect(&socket).expect("connect");
        client.write_all(b"0123456789").expect("type");
        // It need not stay for that.
        drop(client);
        let mut seen = Vec::new();
        while seen.len() < 10 {
            seen.extend(typing.recv_timeout(PATIENCE).expect("typed"));
        }
        assert_eq!(seen, b"0123456789");
    }

    #[test]
    fn sizes_come_in_beside_what_is_typed_and_what_is_none_is_not_heeded() {
        let dir = tempfile::tempdir().expect("directory");
        let output = Output::to_log(&dir.path().join("log")).expect("log");
        let (sized, sizes) = mpsc::channel();
        let resizer = Box::new(move |size| {
            let _ = sized.send(size);
        });
        let (socket, way) = (dir.path().join("console.sock"), dir.path().join("console.size"));
        let keyboard = keyboard(mpsc::channel().0);
        let sizer = Some((way.clone(), resizer as Resizer));
        let console = Console::listen(&socket, output, keyboard, sizer).expect("listen");
        let mode = fs::metadata(&way).expect("socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let sender = UnixDatagram::unbound().expect("a socket");
        let size = Size { columns: 132, rows: 43 };
        for sent in [&b"80x25"[..], b"", &size.to_bytes()] {
            sender.send_to(sent, &way).expect("sent");
        }
        assert_eq!(sizes.recv_timeout(PATIENCE).expect("a size"), size);
        drop(console);
        assert!(!way.exists() && sizes.try_recv().is_err());
    }

    #[test]
    fn the_last_words_are_seen() {
        let dir = tempfile::tempdir().expect("directory");
        let mut output = Output::to_log(&dir.path().join("log")).expect("log");
        let (typed, typing) = mpsc::channel();
        let socket = dir.path().join("console.sock");
        let keyboard = keyboard(typed);
        let console = Console::listen(&socket, output.clone(), keyboard, None).expect("listen");
        let mut client = served(&socket, &typing);
        let reader = std::thread::spawn(move || {
            let mut seen = Vec::new();
            client.read_to_end(&mut seen).expect("see");
            seen
        });
        let words = vec![b'w'; 200 << 10];
        for piece in words.chunks(7) {
            output.write_all(piece).expect("print");
        }
        drop(console);
        drop(output);
        assert_eq!(reader.join().expect("no panic"), words);
    }
}
