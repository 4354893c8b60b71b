//! How a page or file connection proves that it belongs to a session, and how it may leave TLS.
//!
//! The client says which session it wants and shows the session's secret, which it learnt on the
//! control connection; the server compares, checks that the certificate is the one of the control
//! connection, and answers. All of that is inside TLS. If both configurations want plain page
//! data, both then drop TLS at an exact byte: the server sends nothing after its answer until the
//! client's [`GO`] has arrived on the bare socket, and the client sends nothing between its join and
//! that, so neither TLS layer can have read a byte that was not meant for it.

use std::fmt;
use std::hint::black_box;
use std::time::Duration;

use rand::TryRngCore;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use uuid::Uuid;

use super::Result;
use super::connection::Connection;
use super::error::TransportError;
use super::identity::Peer;
use super::stream::DataStream;
use crate::protocol::header::Role;

/// Bytes of a join on the wire.
pub const JOIN_LEN: usize = 64;
/// Bytes of its answer.
pub const JOIN_ANSWER_LEN: usize = 16;
/// First bytes on the bare socket when TLS is left, client to server.
pub const GO: [u8; 16] = *b"decamp plain\r\n\0\0";

const JOIN_DEADLINE: Duration = Duration::from_secs(10);
const WITH_TLS: u8 = 1;
const WITHOUT_TLS: u8 = 2;

/// A session's secret: 32 random bytes that only its two agents know.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl Secret {
    /// A new one from the system's random source.
    ///
    /// # Errors
    /// When the system has no randomness to give.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 32];
        rand::rngs::OsRng.try_fill_bytes(&mut bytes).map_err(std::io::Error::other)?;
        Ok(Self(bytes))
    }

    /// The secret that `bytes` are, when they are 32.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// For the control message that tells it to the peer.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Compares in a time that does not depend on where the two differ.
    pub fn matches(&self, other: &Secret) -> bool {
        let differ = self.0.iter().zip(&other.0).fold(0, |sum, (a, b)| sum | black_box(a ^ b));
        black_box(differ) == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What a page or file connection says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// The session.
    pub session: Uuid,
    /// Its secret.
    pub secret: Secret,
    /// Which stream of the session this is, counted from 0 for each role.
    pub index: u32,
    /// Whether the stream stays inside TLS. False only if both configurations say so.
    pub encrypted: bool,
}

/// Why a connection is not taken into a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum JoinRefusal {
    /// No such session, or not its secret, or not its certificate. Which of them is not said.
    NotYours = 1,
    /// The session has such a stream already, or does not want it.
    Index = 2,
    /// One side wants TLS on it and the other does not.
    Encryption = 3,
    /// The session is over, or cannot take it now.
    Over = 4,
}

impl fmt::Display for JoinRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotYours => "session, secret or certificate do not belong together",
            Self::Index => "the session does not want this stream",
            Self::Encryption => "the two sides disagree on page encryption",
            Self::Over => "the session is over",
        })
    }
}

impl Join {
    fn encode(&self) -> [u8; JOIN_LEN] {
        let mut bytes = [0; JOIN_LEN];
        bytes[..16].copy_from_slice(self.session.as_bytes());
        bytes[16..48].copy_from_slice(&self.secret.0);
        bytes[48..52].copy_from_slice(&self.index.to_le_bytes());
        bytes[52] = if self.encrypted { WITH_TLS } else { WITHOUT_TLS };
        bytes
    }

    fn decode(bytes: &[u8; JOIN_LEN]) -> Option<Self> {
        let mut session = [0; 16];
        session.copy_from_slice(&bytes[..16]);
        let encrypted = match bytes[52] {
            WITH_TLS => true,
            WITHOUT_TLS => false,
            _ => return None,
        };
        Some(Self {
            session: Uuid::from_bytes(session),
            secret: Secret::from_bytes(&bytes[16..48])?,
            index: u32::from_le_bytes([bytes[48], bytes[49], bytes[50], bytes[51]]),
            encrypted,
        })
    }
}

impl Connection {
    /// Client: joins a session with this page or file connection, which becomes a stream for a
    /// plain thread.
    ///
    /// # Errors
    /// When the peer does not take it, or the connection fails.
    pub async fn join(self, join: &Join) -> Result<DataStream> {
        let peer = self.peer.name.clone();
        let late =
            TransportError::Deadline { peer, doing: "joining a session", after: JOIN_DEADLINE };
        timeout(JOIN_DEADLINE, self.join_now(join)).await.map_err(|_| late)?
    }

    async fn join_now(mut self, join: &Join) -> Result<DataStream> {
        let peer = self.peer.name.clone();
        let failed = |e| TransportError::from_io(e, &peer, None, "joining a session");
        self.stream.write_all(&join.encode()).await.map_err(failed)?;
        self.stream.flush().await.map_err(failed)?;
        let mut answer = [0; JOIN_ANSWER_LEN];
        self.stream.read_exact(&mut answer).await.map_err(failed)?;
        let reason = match u16::from_le_bytes([answer[0], answer[1]]) {
            0 => None,
            1 => Some(JoinRefusal::NotYours),
            2 => Some(JoinRefusal::Index),
            3 => Some(JoinRefusal::Encryption),
            4 => Some(JoinRefusal::Over),
            _ => return Err(TransportError::JoinBroken { peer, what: "an unknown answer" }),
        };
        if let Some(reason) = reason {
            return Err(TransportError::NotJoined { peer, reason });
        }
        if join.encrypted {
            return DataStream::encrypted(self, join.index);
        }
        let mut bare = Bare::leave_tls(self)?;
        bare.0.stream.get_mut().0.write_all(&GO).await.map_err(failed)?;
        DataStream::plain(bare.0, join.index)
    }

    /// Server: what session the client of this page or file connection wants to join.
    ///
    /// # Errors
    /// When nothing sensible came within ten seconds.
    pub async fn joining(mut self) -> Result<Joining> {
        let peer = self.peer.name.clone();
        let mut bytes = [0; JOIN_LEN];
        match timeout(JOIN_DEADLINE, self.stream.read_exact(&mut bytes)).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => return Err(TransportError::from_io(e, &peer, None, "joining a session")),
            Err(_) => {
                let doing = "saying which session it joins";
                return Err(TransportError::Deadline { peer, doing, after: JOIN_DEADLINE });
            }
        }
        match Join::decode(&bytes) {
            Some(join) => Ok(Joining { connection: self, join }),
            None => Err(TransportError::JoinBroken { peer, what: "an unknown kind of encryption" }),
        }
    }
}

/// A client that wants to join; its secret has not been checked yet.
#[derive(Debug)]
pub struct Joining {
    connection: Connection,
    join: Join,
}

impl Joining {
    /// The session that it names.
    pub fn session(&self) -> Uuid {
        self.join.session
    }

    /// The stream that it wants to be.
    pub fn index(&self) -> u32 {
        self.join.index
    }

    /// What the stream is for.
    pub fn role(&self) -> Role {
        self.connection.role()
    }

    /// Who it is, by its certificate.
    pub fn peer(&self) -> &Peer {
        self.connection.peer()
    }

    /// Takes it in, if it shows `secret`, is `peer` (the one on the session's control connection)
    /// and agrees on `encrypted`; tells it why not otherwise.
    ///
    /// # Errors
    /// When it was refused, or the connection failed.
    pub async fn admit(self, secret: &Secret, peer: &Peer, encrypted: bool) -> Result<DataStream> {
        let same_peer = self.connection.peer.fingerprint == peer.fingerprint;
        if !(self.join.secret.matches(secret) & same_peer) {
            return Err(self.refuse(JoinRefusal::NotYours).await);
        }
        if self.join.encrypted != encrypted {
            return Err(self.refuse(JoinRefusal::Encryption).await);
        }
        let Self { mut connection, join } = self;
        let late = TransportError::Deadline {
            peer: connection.peer.name.clone(),
            doing: "joining a session",
            after: JOIN_DEADLINE,
        };
        let admit = async move {
            answer(&mut connection, 0).await?;
            if encrypted {
                return DataStream::encrypted(connection, join.index);
            }
            let mut bare = Bare::leave_tls(connection)?;
            bare.await_go().await?;
            DataStream::plain(bare.0, join.index)
        };
        timeout(JOIN_DEADLINE, admit).await.map_err(|_| late)?
    }

    /// Tells it why it is not taken in, and hangs up. Gives the error to report here.
    pub async fn refuse(mut self, reason: JoinRefusal) -> TransportError {
        let peer = self.connection.peer.name.clone();
        let told = async {
            answer(&mut self.connection, reason as u16).await?;
            let _ = self.connection.stream.shutdown().await;
            Ok::<_, TransportError>(())
        };
        match timeout(JOIN_DEADLINE, told).await {
            Ok(Err(e)) => tracing::debug!(%peer, error = %e, "The refusal did not reach the peer"),
            Err(_) => tracing::debug!(%peer, "The peer did not take its refusal in time"),
            Ok(Ok(())) => {}
        }
        TransportError::JoinRefused { peer, reason }
    }
}

async fn answer(connection: &mut Connection, code: u16) -> Result<()> {
    let mut bytes = [0; JOIN_ANSWER_LEN];
    bytes[..2].copy_from_slice(&code.to_le_bytes());
    let peer = connection.peer.name.clone();
    let failed = |e| TransportError::from_io(e, &peer, None, "answering a join");
    connection.stream.write_all(&bytes).await.map_err(failed)?;
    connection.stream.flush().await.map_err(failed)
}

/// A connection whose TLS layer holds nothing more, in either direction.
struct Bare(Connection);

impl Bare {
    fn leave_tls(mut connection: Connection) -> Result<Self> {
        let broken =
            |peer: &Peer, what| TransportError::JoinBroken { peer: peer.name.clone(), what };
        let tls = match &mut connection.stream {
            tokio_rustls::TlsStream::Client(stream) => {
                let tls = stream.get_mut().1;
                (tls.wants_write(), tls.process_new_packets())
            }
            tokio_rustls::TlsStream::Server(stream) => {
                let tls = stream.get_mut().1;
                (tls.wants_write(), tls.process_new_packets())
            }
        };
        match tls {
            (false, Ok(state)) if state.plaintext_bytes_to_read() == 0 => Ok(Self(connection)),
            (true, _) => Err(broken(&connection.peer, "TLS bytes were left over")),
            _ => Err(broken(&connection.peer, "data before TLS was left")),
        }
    }

    async fn await_go(&mut self) -> Result<()> {
        let peer = self.0.peer.name.clone();
        let mut go = [0; GO.len()];
        match self.0.stream.get_mut().0.read_exact(&mut go).await {
            Ok(_) if go == GO => Ok(()),
            Ok(_) => Err(TransportError::JoinBroken { peer, what: "no clean end of TLS" }),
            Err(e) => Err(TransportError::from_io(e, &peer, None, "leaving TLS")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_join_never_change() {
        let join = Join {
            session: Uuid::from_bytes([7; 16]),
            secret: Secret([9; 32]),
            index: 0x0102_0304,
            encrypted: false,
        };
        let mut golden = [0; JOIN_LEN];
        golden[..16].fill(7);
        golden[16..48].fill(9);
        golden[48..53].copy_from_slice(&[4, 3, 2, 1, 2]);
        assert_eq!(join.encode(), golden);
        assert_eq!(Join::decode(&golden), Some(join));
        golden[52] = 0;
        assert_eq!(Join::decode(&golden), None);
    }

    #[test]
    fn secrets_differ_at_any_byte() {
        let secret = Secret([1; 32]);
        assert!(secret.matches(&Secret([1; 32])));
        for at in 0..32 {
            let mut other = [1; 32];
            other[at] ^= 0x80;
            assert!(!secret.matches(&Secret(other)));
        }
        assert_eq!(format!("{secret:?}"), "Secret(…)");
    }
}
