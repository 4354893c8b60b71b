//! Control messages: protobuf in frames of a little-endian `u32` length, at most 4 MiB each.
//!
//! Reading is cancel safe: a `recv` that loses a `select!` goes on where it stopped. Writing is
//! not, so a writer that was interrupted refuses to write on.

use std::time::Duration;

use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tokio_rustls::TlsStream;

use super::Result;
use super::connection::Connection;
use super::error::TransportError;
use super::identity::Peer;

/// Longest control message in bytes, without its length prefix.
pub const MESSAGE_CAP: usize = 4 << 20;
/// How long a frame may take once its first byte is there, and a message to be written.
pub const FRAME_DEADLINE: Duration = Duration::from_secs(30);

/// Room made at a time for a frame's body: a length alone makes nobody allocate more than this.
const GROWTH: usize = 64 << 10;

/// Both directions of a control connection.
#[derive(Debug)]
pub struct Control {
    reader: ControlReader,
    writer: ControlWriter,
}

impl Control {
    /// Messages over `connection`.
    pub fn new(connection: Connection) -> Self {
        let Connection { stream, peer, permit, .. } = connection;
        let (read, write) = tokio::io::split(stream);
        Self {
            reader: ControlReader {
                stream: read,
                peer: peer.clone(),
                frame: Frame::default(),
                _permit: permit,
            },
            writer: ControlWriter { stream: write, peer, torn: false },
        }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.reader.peer
    }

    /// As [`ControlWriter::send`].
    ///
    /// # Errors
    /// As there.
    pub async fn send<M: Message>(&mut self, message: &M) -> Result<()> {
        self.writer.send(message).await
    }

    /// As [`ControlReader::recv`].
    ///
    /// # Errors
    /// As there.
    pub async fn recv<M: Message + Default>(&mut self, patience: Duration) -> Result<Option<M>> {
        self.reader.recv(patience).await
    }

    /// A reader and a writer that two tasks can use.
    pub fn split(self) -> (ControlReader, ControlWriter) {
        (self.reader, self.writer)
    }
}

/// The reading half.
#[derive(Debug)]
pub struct ControlReader {
    stream: ReadHalf<TlsStream<TcpStream>>,
    peer: Peer,
    frame: Frame,
    _permit: Option<OwnedSemaphorePermit>,
}

/// What has arrived of the frame being read; survives a cancelled `recv`.
#[derive(Debug, Default)]
struct Frame {
    prefix: [u8; 4],
    prefix_filled: usize,
    body: Vec<u8>,
    body_filled: usize,
}

impl ControlReader {
    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The next message. Waits up to `patience` for its first byte, then [`FRAME_DEADLINE`] for
    /// the rest. `None`: the peer closed the connection in good order, between two messages.
    ///
    /// # Errors
    /// When nothing came in time, the connection broke or ended within a message or without a
    /// TLS close, or what came is over [`MESSAGE_CAP`] or no `M`.
    pub async fn recv<M: Message + Default>(&mut self, patience: Duration) -> Result<Option<M>> {
        if self.frame.prefix_filled == 0 {
            let first = timeout(patience, self.more_prefix()).await;
            if !first.map_err(|_| self.late("its next control message", patience))?? {
                return Ok(None);
            }
        }
        timeout(FRAME_DEADLINE, self.rest_of_frame())
            .await
            .map_err(|_| self.late("the rest of a control message", FRAME_DEADLINE))??;
        let frame = std::mem::take(&mut self.frame);
        M::decode(&frame.body[..])
            .map(Some)
            .map_err(|source| TransportError::Message { peer: self.peer.name.clone(), source })
    }

    async fn rest_of_frame(&mut self) -> Result<()> {
        while self.frame.prefix_filled < 4 {
            if !self.more_prefix().await? {
                return Err(self.ended());
            }
        }
        let length = u32::from_le_bytes(self.frame.prefix) as usize;
        if length > MESSAGE_CAP {
            return Err(TransportError::TooLong {
                peer: self.peer.name.clone(),
                length: length as u64,
                limit: MESSAGE_CAP as u64,
            });
        }
        while self.frame.body_filled < length {
            let frame = &mut self.frame;
            if frame.body_filled == frame.body.len() {
                frame.body.resize(length.min(frame.body.len() + GROWTH), 0);
            }
            let read = self.stream.read(&mut frame.body[frame.body_filled..]).await;
            match read.map_err(|e| self.failed(e))? {
                0 => return Err(self.ended()),
                count => self.frame.body_filled += count,
            }
        }
        Ok(())
    }

    /// Reads some of the prefix; false at the end of the stream.
    async fn more_prefix(&mut self) -> Result<bool> {
        let at = self.frame.prefix_filled;
        let read = self.stream.read(&mut self.frame.prefix[at..]).await;
        let count = read.map_err(|e| self.failed(e))?;
        self.frame.prefix_filled += count;
        Ok(count > 0)
    }

    fn late(&self, doing: &'static str, after: Duration) -> TransportError {
        TransportError::Deadline { peer: self.peer.name.clone(), doing, after }
    }

    fn ended(&self) -> TransportError {
        TransportError::Ended { peer: self.peer.name.clone(), doing: "a control message" }
    }

    fn failed(&self, error: std::io::Error) -> TransportError {
        TransportError::from_io(error, &self.peer.name, None, "reading a control message")
    }
}

/// The writing half.
#[derive(Debug)]
pub struct ControlWriter {
    stream: WriteHalf<TlsStream<TcpStream>>,
    peer: Peer,
    torn: bool,
}

impl ControlWriter {
    /// Sends one message and hands it to the kernel, within [`FRAME_DEADLINE`].
    ///
    /// # Errors
    /// When it is over [`MESSAGE_CAP`] (nothing was sent then), or the connection broke. After an
    /// error or a cancelled call of this function nothing can be sent any more.
    pub async fn send<M: Message>(&mut self, message: &M) -> Result<()> {
        let peer = || self.peer.name.clone();
        let length = message.encoded_len();
        if length > MESSAGE_CAP {
            let (length, limit) = (length as u64, MESSAGE_CAP as u64);
            return Err(TransportError::TooLong { peer: peer(), length, limit });
        }
        if self.torn {
            return Err(TransportError::Torn { peer: peer() });
        }
        let mut bytes = Vec::with_capacity(4 + length);
        bytes.extend_from_slice(&(length as u32).to_le_bytes());
        bytes.extend_from_slice(&message.encode_to_vec());
        self.torn = true;
        let stream = &mut self.stream;
        let write = async move {
            stream.write_all(&bytes).await?;
            stream.flush().await
        };
        match timeout(FRAME_DEADLINE, write).await {
            Ok(Ok(())) => {
                self.torn = false;
                Ok(())
            }
            Ok(Err(e)) => {
                Err(TransportError::from_io(e, &peer(), None, "sending a control message"))
            }
            Err(_) => Err(TransportError::Deadline {
                peer: peer(),
                doing: "taking a control message",
                after: FRAME_DEADLINE,
            }),
        }
    }

    /// Ends the connection in good order: the peer's next `recv` gives `None`.
    ///
    /// # Errors
    /// When the peer is gone already.
    pub async fn close(&mut self) -> Result<()> {
        let peer = self.peer.name.clone();
        match timeout(FRAME_DEADLINE, self.stream.shutdown()).await {
            Ok(closed) => closed
                .map_err(|e| TransportError::from_io(e, &peer, None, "closing the connection")),
            Err(_) => Err(TransportError::Deadline {
                peer,
                doing: "closing the connection",
                after: FRAME_DEADLINE,
            }),
        }
    }
}
