//! One connection from the first SYN to the answered first header: who dials, who accepts.
//!
//! What comes after the header belongs to [`super::control`] or [`super::join`].

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::Result;
use super::error::TransportError;
use super::identity::{Identity, Peer};
use super::socket;
use crate::protocol::ALPN;
use crate::protocol::header::{Answer, HEADER_LEN, Hello, Role, Turned, Versions};

/// How long a client may take from its connection to its first header.
const ACCEPT_DEADLINE: Duration = Duration::from_secs(10);
/// How long a client that is turned away may take to read why.
const LINGER: Duration = Duration::from_secs(1);
/// Clients in the middle of their handshake at one time; more are dropped unheard.
const HANDSHAKES: usize = 64;
/// Connections past their handshake at one time; more are told that the agent is busy.
const CONNECTIONS: usize = 1024;

/// Whom to dial. The certificate that is shown there must be for `name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// Host name, as in the configuration's `[hosts]` table.
    pub name: String,
    /// `host:port` or `address:port` to connect to.
    pub address: String,
}

impl PeerAddress {
    fn text(&self) -> String {
        format!("{} ({})", self.name, self.address)
    }
}

/// A TLS connection whose first headers have been exchanged.
#[derive(Debug)]
pub struct Connection {
    pub(super) stream: TlsStream<TcpStream>,
    pub(super) peer: Peer,
    pub(super) permit: Option<OwnedSemaphorePermit>,
    role: Role,
    version: u16,
}

impl Connection {
    /// What it is for.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The protocol version that both speak on it.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Who is at the other end, by the certificate.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The address at the other end, if the socket is still connected.
    pub fn remote(&self) -> Option<SocketAddr> {
        self.stream.get_ref().0.peer_addr().ok()
    }
}

/// Opens connections.
#[derive(Clone, Debug)]
pub struct Dialer {
    identity: Identity,
    versions: Versions,
}

impl Dialer {
    /// A dialer that shows `identity` and speaks `versions` ([`Versions::OURS`] as a rule).
    pub fn new(identity: Identity, versions: Versions) -> Self {
        Self { identity, versions }
    }

    /// Connects, shakes hands and exchanges first headers, all within `limit`.
    ///
    /// # Errors
    /// One variant for each way in which this fails; the text says what to do.
    pub async fn dial(&self, to: &PeerAddress, role: Role, limit: Duration) -> Result<Connection> {
        let peer = to.text();
        let late = |doing| TransportError::Deadline { peer: peer.clone(), doing, after: limit };
        let end = Instant::now() + limit;
        let tcp = timeout_at(end, connect(to)).await.map_err(|_| late("connecting"))??;
        let stream = timeout_at(end, self.handshake(to, tcp))
            .await
            .map_err(|_| late("the TLS handshake"))??;
        timeout_at(end, self.greet(to, stream, role)).await.map_err(|_| late("the first header"))?
    }

    async fn handshake(&self, to: &PeerAddress, tcp: TcpStream) -> Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(to.name.clone())
            .map_err(|_| TransportError::HostUnknown { host: to.name.clone(), source: None })?;
        let stream = TlsConnector::from(self.identity.client())
            .connect(name, tcp)
            .await
            .map_err(|e| handshake_error(e, &to.text(), Some(&to.name)))?;
        Ok(TlsStream::Client(stream))
    }

    async fn greet(
        &self,
        to: &PeerAddress,
        mut stream: TlsStream<TcpStream>,
        role: Role,
    ) -> Result<Connection> {
        let name = to.text();
        let failed = |e| TransportError::from_io(e, &name, None, "the first header");
        let peer = identify(&stream, &name)?;
        // A server that refuses our certificate says so only now, and may have hung up already:
        // what it said counts for more than that writing failed.
        let hello = Hello::new(self.versions, role).encode();
        let written = match stream.write_all(&hello).await {
            Ok(()) => stream.flush().await,
            failed => failed,
        };
        let mut bytes = [0; HEADER_LEN];
        match (stream.read_exact(&mut bytes).await, written) {
            (Ok(_), Ok(())) => {}
            (Err(read), Ok(())) => return Err(failed(read)),
            (Err(read), Err(write)) => {
                let told = failed(read);
                return Err(if told.is_certificate() { told } else { failed(write) });
            }
            (Ok(_), Err(write)) => return Err(failed(write)),
        }
        let answer = Answer::decode(&bytes, self.versions)
            .map_err(|source| TransportError::Header { peer: name.clone(), source })?;
        match answer.verdict {
            Ok(version) => Ok(Connection { stream, peer, permit: None, role, version }),
            Err(turned) => {
                Err(turned_error(turned, name, self.versions, answer.versions, role as u8))
            }
        }
    }
}

/// Takes connections in. Cheap to clone; clones share their limits.
#[derive(Clone, Debug)]
pub struct Acceptor {
    identity: Identity,
    versions: Versions,
    handshakes: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Acceptor {
    /// An acceptor that shows `identity` and speaks `versions` ([`Versions::OURS`] as a rule).
    pub fn new(identity: Identity, versions: Versions) -> Self {
        Self {
            identity,
            versions,
            handshakes: Arc::new(Semaphore::new(HANDSHAKES)),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
        }
    }

    /// The same, with at most `connections` open at one time.
    pub fn with_limit(mut self, connections: usize) -> Self {
        self.connections = Arc::new(Semaphore::new(connections));
        self
    }

    /// Shakes hands with a client and answers its first header, within ten seconds. A client that
    /// is turned away is told why before the error is returned.
    ///
    /// # Errors
    /// When the client is no peer of ours, or there is no room for it.
    pub async fn accept(&self, tcp: TcpStream) -> Result<Connection> {
        let peer = match tcp.peer_addr() {
            Ok(address) => address.to_string(),
            Err(_) => "a client that has gone".to_owned(),
        };
        let Ok(_handshake) = self.handshakes.try_acquire() else {
            return Err(TransportError::Busy { peer });
        };
        match timeout(ACCEPT_DEADLINE, self.handshake(tcp, &peer)).await {
            Ok(result) => result,
            Err(_) => Err(TransportError::Deadline {
                peer,
                doing: "the TLS handshake and its first header",
                after: ACCEPT_DEADLINE,
            }),
        }
    }

    async fn handshake(&self, tcp: TcpStream, peer: &str) -> Result<Connection> {
        socket::tune(&tcp).map_err(|source| TransportError::Broken {
            peer: peer.to_owned(),
            doing: "setting socket options",
            source,
        })?;
        let accepting = TlsAcceptor::from(self.identity.server()).accept(tcp).into_fallible();
        let stream = match accepting.await {
            Ok(stream) => TlsStream::Server(stream),
            Err((error, tcp)) => {
                linger(tcp).await;
                return Err(handshake_error(error, peer, None));
            }
        };
        self.answer(stream, peer).await
    }

    async fn answer(&self, mut stream: TlsStream<TcpStream>, address: &str) -> Result<Connection> {
        let failed = |e| TransportError::from_io(e, address, None, "the first header");
        let peer = identify(&stream, address)?;
        let mut bytes = [0; HEADER_LEN];
        stream.read_exact(&mut bytes).await.map_err(failed)?;
        let hello = Hello::decode(&bytes)
            .map_err(|source| TransportError::Header { peer: address.to_owned(), source })?;
        let permit = self.connections.clone().try_acquire_owned().ok();
        let verdict = match (self.versions.common(hello.versions), hello.role(), permit) {
            (None, _, _) => Err(Turned::Version),
            (_, None, _) => Err(Turned::Role),
            (_, _, None) => Err(Turned::Busy),
            (Some(version), Some(role), Some(permit)) => Ok((version, role, permit)),
        };
        let answer = Answer {
            versions: self.versions,
            role: hello.role,
            verdict: verdict.as_ref().map(|(version, ..)| *version).map_err(|turned| *turned),
        };
        stream.write_all(&answer.encode()).await.map_err(failed)?;
        stream.flush().await.map_err(failed)?;
        match verdict {
            Ok((version, role, permit)) => {
                Ok(Connection { stream, peer, permit: Some(permit), role, version })
            }
            Err(turned) => {
                let _ = stream.shutdown().await;
                if let TlsStream::Server(stream) = stream {
                    linger(stream.into_inner().0).await;
                }
                let (ours, theirs) = (self.versions, hello.versions);
                Err(turned_error(turned, peer.name, ours, theirs, hello.role))
            }
        }
    }
}

fn turned_error(
    turned: Turned,
    peer: String,
    ours: Versions,
    theirs: Versions,
    role: u8,
) -> TransportError {
    match turned {
        Turned::Version => TransportError::Version { peer, theirs, ours },
        Turned::Role => TransportError::RoleUnknown { peer, role },
        Turned::Busy => TransportError::Busy { peer },
    }
}

async fn connect(to: &PeerAddress) -> Result<TcpStream> {
    let unknown = |source| TransportError::HostUnknown { host: to.address.clone(), source };
    let mut last = None;
    for address in tokio::net::lookup_host(&to.address).await.map_err(|e| unknown(Some(e)))? {
        match TcpStream::connect(address).await.and_then(|tcp| socket::tune(&tcp).map(|()| tcp)) {
            Ok(tcp) => return Ok(tcp),
            Err(error) => last = Some(error),
        }
    }
    let peer = to.text();
    Err(match last {
        None => unknown(None),
        Some(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            TransportError::NobodyListens { peer }
        }
        Some(source) => TransportError::Unreachable { peer, source },
    })
}

/// Who the certificate says the peer is; both sides are known to have verified each other.
fn identify(stream: &TlsStream<TcpStream>, address: &str) -> Result<Peer> {
    let (_, tls) = stream.get_ref();
    if tls.alpn_protocol() != Some(ALPN) {
        return Err(TransportError::NotDecamp { peer: address.to_owned(), source: None });
    }
    match tls.peer_certificates().and_then(|chain| chain.first()) {
        Some(certificate) => Peer::of(certificate, address),
        None => Err(TransportError::PeerWithoutCertificate { peer: address.to_owned() }),
    }
}

fn handshake_error(error: io::Error, peer: &str, dialled: Option<&str>) -> TransportError {
    match TransportError::from_io(error, peer, dialled, "the TLS handshake") {
        // Whoever hangs up on a TLS hello speaks no TLS.
        TransportError::Ended { peer, .. } => TransportError::NotDecamp { peer, source: None },
        other => other,
    }
}

/// Lets a client read what it was told: closing a socket with unread bytes in it would reset the
/// connection and throw our last words away.
async fn linger(mut tcp: TcpStream) {
    let _ = tcp.shutdown().await;
    let mut scrap = [0; 4096];
    let drain = async {
        for _ in 0..64 {
            if !matches!(tcp.read(&mut scrap).await, Ok(n) if n > 0) {
                break;
            }
        }
    };
    let _ = timeout(LINGER, drain).await;
}
