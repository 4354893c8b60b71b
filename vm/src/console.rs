//! Where a guest's serial console goes and comes from: the log file, and clients of the console
//! socket, who see what is printed while they are connected and may type.
//!
//! Nothing here may hold the guest up: a log that cannot be written and a client that does not read
//! lose bytes, and the loss is counted.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Result, VmError};

/// The most clients at once; the next is turned away.
const MAX_CLIENTS: usize = 16;

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
    clients: Vec<UnixStream>,
    lost: u64,
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
        let places = Places { log, clients: Vec::new(), lost: 0 };
        Self { inner: Arc::new(Mutex::new(places)) }
    }

    /// Bytes that some place could not take.
    pub(crate) fn lost(&self) -> u64 {
        self.places().lost
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there was room for the client.
    fn add(&self, client: UnixStream) -> bool {
        let mut places = self.places();
        let room = places.clients.len() < MAX_CLIENTS;
        if room {
            places.clients.push(client);
        }
        room
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
        places.clients.retain_mut(|client| match client.write(bytes) {
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
        listener.set_nonblocking(true).map_err(failed)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let end = EventFd::from_flags(flags).map_err(|error| failed(error.into()))?;
        let end = Arc::new(end);
        let server = Server { listener, output, keyboard, typists: Vec::new() };
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
    typists: Vec<UnixStream>,
}

impl Server {
    fn serve(mut self, end: &EventFd) {
        loop {
            let mut polled = vec![
                PollFd::new(end.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ];
            let clients = self.typists.iter();
            polled.extend(clients.map(|client| PollFd::new(client.as_fd(), PollFlags::POLLIN)));
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::warn!("The console socket is not served any more: {error}");
                    return;
                }
            }
            let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if ready[0] {
                return;
            }
            // From the end, so that indexes stay true while clients leave.
            for index in (0..self.typists.len()).rev() {
                if ready[index + 2] && !self.take_input(index) {
                    self.typists.swap_remove(index);
                }
            }
            if ready[1] {
                self.accept();
            }
        }
    }

    fn accept(&mut self) {
        let Ok((client, _)) = self.listener.accept() else { return };
        let seer = client.set_nonblocking(true).and_then(|()| client.try_clone());
        if seer.is_ok_and(|seer| self.output.add(seer)) {
            self.typists.push(client);
        }
    }

    /// Hands on what the client typed; `false` when it will type no more.
    fn take_input(&mut self, index: usize) -> bool {
        let mut bytes = [0; 1024];
        match self.typists[index].read(&mut bytes) {
            Ok(0) => false,
            Ok(count) => {
                (self.keyboard)(&bytes[..count]);
                true
            }
            Err(error) => {
                matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
            }
        }
    }
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
        assert!(output.add(here));
        for _ in 0..64 {
            output.write_all(&[b'x'; 65536]).expect("print");
        }
        assert!(output.lost() > 0);
        assert_eq!(std::fs::metadata(dir.path().join("log")).expect("log").len(), 64 * 65536);
        drop(there);
    }
}
