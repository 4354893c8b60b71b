//! A joined connection as a blocking stream for a plain thread: pages and files travel on it.
//!
//! Page data is CPU and copy work, so it does not go through the asynchronous runtime. Each read
//! and write has a stall limit, another thread can cancel it at any moment, and TLS is fed whole
//! records from a large buffer, because a system call for each four kilobytes would cost more than
//! the cipher.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio_rustls::TlsStream;

use super::Result;
use super::connection::Connection;
use super::error::TransportError;
use super::identity::Peer;

/// How long one read or write may make no progress at all.
pub const STALL_LIMIT: Duration = Duration::from_secs(30);

/// Bytes taken from the socket at a time under TLS.
const INCOMING: usize = 256 << 10;
/// Plain bytes given to TLS at a time: the ciphertext is still in the cache when it is sent.
const OUTGOING: usize = 256 << 10;
/// Bytes that the TLS layer offers to read at a time.
const TLS_READ: usize = 4096;
/// Header of a TLS record: its type, version and length.
const RECORD_HEADER: usize = 5;

/// A stream of page batches.
pub type PageStream = DataStream;
/// A stream that file trees travel on.
pub type FileStream = DataStream;

/// A joined page or file connection.
#[derive(Debug)]
pub struct DataStream {
    socket: Arc<TcpStream>,
    tls: Option<Box<Tls>>,
    peer: Peer,
    index: u32,
    stall_limit: Duration,
    cancelled: Arc<AtomicBool>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// The TLS layer of a stream.
#[derive(Debug)]
struct Tls {
    connection: rustls::Connection,
    incoming: Incoming,
}

/// Cancels a stream from any thread.
#[derive(Clone, Debug)]
pub struct Canceller {
    socket: Weak<TcpStream>,
    cancelled: Arc<AtomicBool>,
}

impl Canceller {
    /// Ends every read and write of the stream, now and from now on, with
    /// [`TransportError::Cancelled`]. The peer sees the connection end.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        if let Some(socket) = self.socket.upgrade() {
            // Fails only if the peer has ended the connection already, which serves as well.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl DataStream {
    /// The stream inside TLS that a joined connection becomes.
    pub(super) fn encrypted(connection: Connection, index: u32) -> Result<Self> {
        let Connection { stream, peer, permit, .. } = connection;
        let (socket, mut tls) = match stream {
            TlsStream::Client(stream) => {
                let (socket, tls) = stream.into_inner();
                (socket, rustls::Connection::Client(tls))
            }
            TlsStream::Server(stream) => {
                let (socket, tls) = stream.into_inner();
                (socket, rustls::Connection::Server(tls))
            }
        };
        tls.set_buffer_limit(Some(2 * OUTGOING));
        let tls = Tls { connection: tls, incoming: Incoming::new() };
        Self::new(socket, Some(Box::new(tls)), peer, index, permit)
    }

    /// The bare stream that a connection becomes once nothing is left in its TLS layer.
    pub(super) fn plain(connection: Connection, index: u32) -> Result<Self> {
        let Connection { stream, peer, permit, .. } = connection;
        let socket = match stream {
            TlsStream::Client(stream) => stream.into_inner().0,
            TlsStream::Server(stream) => stream.into_inner().0,
        };
        Self::new(socket, None, peer, index, permit)
    }

    fn new(
        socket: tokio::net::TcpStream,
        tls: Option<Box<Tls>>,
        peer: Peer,
        index: u32,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<Self> {
        let prepare = || {
            let socket = socket.into_std()?;
            socket.set_nonblocking(false)?;
            socket.set_read_timeout(Some(STALL_LIMIT))?;
            socket.set_write_timeout(Some(STALL_LIMIT))?;
            Ok(socket)
        };
        match prepare() {
            Ok(socket) => Ok(Self {
                socket: Arc::new(socket),
                tls,
                peer,
                index,
                stall_limit: STALL_LIMIT,
                cancelled: Arc::default(),
                _permit: permit,
            }),
            Err(source) => {
                let doing = "setting socket options";
                Err(TransportError::Broken { peer: peer.name, doing, source })
            }
        }
    }

    /// Which stream of its session and role this is.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Whether it is inside TLS.
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// A handle that cancels the stream from another thread.
    pub fn canceller(&self) -> Canceller {
        Canceller { socket: Arc::downgrade(&self.socket), cancelled: self.cancelled.clone() }
    }

    /// Sets how long one read or write may make no progress ([`STALL_LIMIT`] at first).
    ///
    /// # Errors
    /// When `limit` is zero or the socket refuses it.
    pub fn set_stall_limit(&mut self, limit: Duration) -> Result<()> {
        let set = self
            .socket
            .set_read_timeout(Some(limit))
            .and_then(|()| self.socket.set_write_timeout(Some(limit)));
        set.map_err(|e| self.named(e, "setting a deadline"))?;
        self.stall_limit = limit;
        Ok(())
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    /// When the stream ends, breaks, stalls or is cancelled first.
    pub fn read_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read_some(&mut buffer[filled..]) {
                Ok(0) => return Err(self.named(io::ErrorKind::UnexpectedEof.into(), "reading")),
                Ok(count) => filled += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.named(e, "reading")),
            }
        }
        Ok(())
    }

    /// Fills `buffer`, and waits for its first byte as long as it takes: a peer may have nothing to
    /// say for a while, and the socket itself notices if it is dead. False: the stream ended
    /// before that byte.
    ///
    /// # Errors
    /// As [`DataStream::read_exact`], once a byte has come.
    pub fn read_next(&mut self, buffer: &mut [u8]) -> Result<bool> {
        loop {
            match self.read_some(buffer) {
                Ok(0) if self.cancelled.load(Ordering::SeqCst) => {
                    return Err(self.named(io::ErrorKind::UnexpectedEof.into(), "reading"));
                }
                Ok(0) => return Ok(buffer.is_empty()),
                Ok(count) => return self.read_exact(&mut buffer[count..]).map(|()| true),
                Err(e) if is_timeout(&e) || e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.named(e, "reading")),
            }
        }
    }

    /// Writes all of `bytes` and hands them to the kernel.
    ///
    /// # Errors
    /// When the stream breaks, stalls or is cancelled.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_slices(&mut [IoSlice::new(bytes)])
    }

    /// Writes all of `slices`, in order and without joining them first, and hands them to the
    /// kernel. The slices are used up.
    ///
    /// # Errors
    /// As [`DataStream::write_all`].
    pub fn write_slices(&mut self, mut slices: &mut [IoSlice<'_>]) -> Result<()> {
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            match self.write_some(slices) {
                Ok(0) => return Err(self.named(io::ErrorKind::WriteZero.into(), "writing")),
                Ok(count) => IoSlice::advance_slices(&mut slices, count),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.named(e, "writing")),
            }
        }
        self.flush_tls().map_err(|e| self.named(e, "writing"))
    }

    /// Says that nothing more will be written; the peer reads to an orderly end.
    ///
    /// # Errors
    /// As [`DataStream::write_all`].
    pub fn end_writing(&mut self) -> Result<()> {
        if let Some(tls) = &mut self.tls {
            tls.connection.send_close_notify();
        }
        let shut = self.flush_tls().and_then(|()| match self.socket.shutdown(Shutdown::Write) {
            // The peer has read our end and closed its side too: nothing is left to shut.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            shut => shut,
        });
        shut.map_err(|e| self.named(e, "closing"))
    }

    #[cfg(test)]
    pub(crate) fn raw_socket(&self) -> &TcpStream {
        &self.socket
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => (&*self.socket).read(buffer),
            Some(tls) => tls.read(&self.socket, buffer),
        }
    }

    fn write_some(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.tls {
            None => (&*self.socket).write_vectored(slices),
            Some(tls) => tls.write(&self.socket, slices),
        }
    }

    fn flush_tls(&mut self) -> io::Result<()> {
        match &mut self.tls {
            None => Ok(()),
            Some(tls) => tls.flush(&self.socket),
        }
    }

    /// Names what an I/O error of this stream really was.
    fn named(&self, error: io::Error, doing: &'static str) -> TransportError {
        let peer = self.peer.name.clone();
        if self.cancelled.load(Ordering::SeqCst) {
            return TransportError::Cancelled { peer };
        }
        if is_timeout(&error) {
            return TransportError::Deadline { peer, doing, after: self.stall_limit };
        }
        TransportError::from_io(error, &peer, None, doing)
    }
}

impl Tls {
    fn read(&mut self, socket: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match self.connection.reader().read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // An end without a TLS close is reported as UnexpectedEof, by rustls.
                done => return done,
            }
            self.next_record(socket)?;
        }
    }

    /// Gives the TLS layer one whole record, or the end of the stream.
    fn next_record(&mut self, socket: &TcpStream) -> io::Result<()> {
        let length = self.incoming.record(socket)?;
        let mut record = &self.incoming.bytes[self.incoming.start..self.incoming.start + length];
        self.incoming.start += length;
        loop {
            let taken = self.connection.read_tls(&mut record.by_ref().take(TLS_READ as u64))?;
            if taken == 0 || record.is_empty() {
                break;
            }
        }
        match self.connection.process_new_packets() {
            Ok(_) => Ok(()),
            Err(error) => {
                // An alert that says why goes out as far as it can; the error counts either way.
                let _ = self.flush(socket);
                Err(io::Error::new(io::ErrorKind::InvalidData, error))
            }
        }
    }

    fn write(&mut self, socket: &TcpStream, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.flush(socket)?;
        let mut taken = 0;
        for slice in slices {
            let room = OUTGOING - taken;
            let part = &slice[..slice.len().min(room)];
            taken += self.connection.writer().write(part)?;
            if taken == OUTGOING {
                break;
            }
        }
        Ok(taken)
    }

    fn flush(&mut self, socket: &TcpStream) -> io::Result<()> {
        let mut socket = socket;
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut socket) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Bytes from the socket that the TLS layer has not had yet.
#[derive(Debug)]
struct Incoming {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Incoming {
    fn new() -> Self {
        Self { bytes: vec![0; INCOMING].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Length of the record at `start`, all of which is in the buffer on return. 0 at the end of
    /// the stream; less than a record when the stream ends within one.
    fn record(&mut self, socket: &TcpStream) -> io::Result<usize> {
        loop {
            let have = self.end - self.start;
            let whole = match self.bytes[self.start..self.end] {
                [_, _, _, high, low, ..] => {
                    RECORD_HEADER + usize::from(u16::from_be_bytes([high, low]))
                }
                _ => RECORD_HEADER,
            };
            if have >= whole && have >= RECORD_HEADER {
                return Ok(whole);
            }
            // The longest record is far shorter than the buffer.
            if self.start + whole > self.bytes.len() || have == 0 {
                self.bytes.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, have);
            }
            let mut socket = socket;
            match socket.read(&mut self.bytes[self.end..]) {
                Ok(0) => return Ok(have),
                Ok(count) => self.end += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
