//! What can go wrong with a connection, in words that say what to do about it.
//!
//! Certificate troubles have a variant each, for the side that noticed and for the side that was
//! turned away, because each of them is mended differently.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError};

use crate::protocol::header::{HeaderError, Versions};

use super::join::JoinRefusal;

/// What went wrong with a connection or its certificates. `peer` is the peer's name or address.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// A certificate or key file could not be read.
    #[error("Could not read the {what} {path}; `decamp pki issue` writes it")]
    CredentialFile {
        /// `CA certificate`, `certificate` or `key`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The credentials were read and cannot be used.
    #[error("The {what} {path} cannot be used: {reason}")]
    CredentialUseless {
        /// `CA certificate`, `certificate` or `key`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The host's address could not be found out.
    #[error("Host {host} is unknown; name it in the [hosts] table of the agent's configuration")]
    HostUnknown {
        /// As it was dialled.
        host: String,
        /// What the resolver said, if it was asked.
        #[source]
        source: Option<io::Error>,
    },
    /// Connection refused.
    #[error("Nobody listens at {peer}; is `decamp agent` running there?")]
    NobodyListens {
        /// Name and address.
        peer: String,
    },
    /// No connection for another reason.
    #[error("Could not connect to {peer}")]
    Unreachable {
        /// Name and address.
        peer: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The peer's certificate is past its end.
    #[error("The certificate of {peer} has expired; issue a new one with `decamp pki issue`")]
    PeerExpired {
        /// Who.
        peer: String,
    },
    /// The peer's certificate begins in the future.
    #[error("The certificate of {peer} is not valid yet; compare the clocks of both hosts")]
    PeerNotYetValid {
        /// Who.
        peer: String,
    },
    /// The peer's certificate comes from another authority.
    #[error(
        "The certificate of {peer} was not issued by this host's certificate authority; \
         issue one from the same `decamp pki` directory"
    )]
    PeerForeign {
        /// Who.
        peer: String,
    },
    /// The peer's certificate is for another name than was dialled.
    #[error(
        "The certificate of {peer} is not for the name {name}; \
         dial it by its name, or issue one with `decamp pki issue DIR {name}`"
    )]
    PeerName {
        /// Who.
        peer: String,
        /// The name that was dialled.
        name: String,
    },
    /// The peer showed no certificate.
    #[error("{peer} showed no certificate; give it one with `decamp pki issue`")]
    PeerWithoutCertificate {
        /// Who.
        peer: String,
    },
    /// The peer's certificate is wrong in another way.
    #[error("The certificate of {peer} is not acceptable: {reason}")]
    PeerCertificate {
        /// Who.
        peer: String,
        /// Why not.
        reason: String,
    },
    /// The peer says that our certificate has expired.
    #[error(
        "{peer} refuses this host's certificate because it has expired (or is not valid yet by \
         its clock); issue a new one with `decamp pki issue`"
    )]
    OursExpired {
        /// Who says so.
        peer: String,
    },
    /// The peer does not know our authority.
    #[error(
        "{peer} refuses this host's certificate because another authority issued it; \
         issue one from the same `decamp pki` directory"
    )]
    OursForeign {
        /// Who says so.
        peer: String,
    },
    /// The peer wants a certificate and got none.
    #[error("{peer} wants a certificate and this host showed none; `decamp pki issue` makes one")]
    OursMissing {
        /// Who says so.
        peer: String,
    },
    /// The peer refuses our certificate for another reason.
    #[error("{peer} refuses this host's certificate ({alert})")]
    OursRefused {
        /// Who says so.
        peer: String,
        /// The TLS alert that it sent.
        alert: String,
    },
    /// Whatever listens there speaks something else.
    #[error("{peer} does not speak decamp's protocol")]
    NotDecamp {
        /// Who.
        peer: String,
        /// How that showed.
        #[source]
        source: Option<io::Error>,
    },
    /// The first header is wrong.
    #[error("The first header from {peer} is wrong")]
    Header {
        /// Who.
        peer: String,
        /// How.
        #[source]
        source: HeaderError,
    },
    /// No protocol version in common.
    #[error(
        "Peer speaks protocol {theirs}, this build {ours} ({peer}); \
         bring both hosts to neighbouring versions of decamp"
    )]
    Version {
        /// Who.
        peer: String,
        /// What it speaks.
        theirs: Versions,
        /// What this build speaks.
        ours: Versions,
    },
    /// One side does not know what the other wants of a connection.
    #[error("Connection role {role} is not known to both this build and {peer}")]
    RoleUnknown {
        /// Who.
        peer: String,
        /// The role byte.
        role: u8,
    },
    /// Too many connections.
    #[error(
        "There is no room for another connection between this host and {peer}; try again later"
    )]
    Busy {
        /// The other side.
        peer: String,
    },
    /// The peer does not take this connection into a session.
    #[error("{peer} does not take this connection into the session: {reason}")]
    NotJoined {
        /// Who.
        peer: String,
        /// Why.
        reason: JoinRefusal,
    },
    /// A peer's connection was not taken into a session.
    #[error("A connection of {peer} was not taken into a session: {reason}")]
    JoinRefused {
        /// Who.
        peer: String,
        /// Why.
        reason: JoinRefusal,
    },
    /// Bytes of a join, or of the change to plain TCP, that make no sense.
    #[error("{peer} broke the protocol while joining a session: {what}")]
    JoinBroken {
        /// Who.
        peer: String,
        /// What was wrong.
        what: &'static str,
    },
    /// Something took too long.
    #[error("{peer} took longer than {} ms for {doing}", after.as_millis())]
    Deadline {
        /// Who.
        peer: String,
        /// For what.
        doing: &'static str,
        /// How long was allowed.
        after: Duration,
    },
    /// The peer ended the connection in the middle of something.
    #[error("{peer} ended the connection during {doing}")]
    Ended {
        /// Who.
        peer: String,
        /// During what.
        doing: &'static str,
    },
    /// Reading or writing failed.
    #[error("The connection to {peer} failed during {doing}")]
    Broken {
        /// Who.
        peer: String,
        /// During what.
        doing: &'static str,
        /// How.
        #[source]
        source: io::Error,
    },
    /// A message longer than the cap, ours or theirs.
    #[error("A control message of {length} bytes to or from {peer} is over the limit of {limit}")]
    TooLong {
        /// Who.
        peer: String,
        /// Its length.
        length: u64,
        /// The cap.
        limit: u64,
    },
    /// A message that is no valid protobuf of the type expected.
    #[error("A control message from {peer} cannot be read")]
    Message {
        /// Who.
        peer: String,
        /// Why not.
        #[source]
        source: prost::DecodeError,
    },
    /// An earlier message was only written in part, so nothing can follow it.
    #[error("The control connection to {peer} carries half a message and cannot be used any more")]
    Torn {
        /// Who.
        peer: String,
    },
    /// Cancelled from this side.
    #[error("The connection to {peer} was cancelled")]
    Cancelled {
        /// The other side.
        peer: String,
    },
}

impl TransportError {
    /// Whether certificates, on either side, are what keeps the two apart.
    pub fn is_certificate(&self) -> bool {
        matches!(
            self,
            Self::PeerExpired { .. }
                | Self::PeerNotYetValid { .. }
                | Self::PeerForeign { .. }
                | Self::PeerName { .. }
                | Self::PeerWithoutCertificate { .. }
                | Self::PeerCertificate { .. }
                | Self::OursExpired { .. }
                | Self::OursForeign { .. }
                | Self::OursMissing { .. }
                | Self::OursRefused { .. }
        )
    }

    /// Names what an I/O error on a connection really was: a TLS alert, a bad certificate, an end.
    pub(super) fn from_io(
        error: io::Error,
        peer: &str,
        dialled: Option<&str>,
        doing: &'static str,
    ) -> Self {
        let peer = peer.to_owned();
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(why)) => {
                Self::peer_certificate(why, peer, dialled)
            }
            Some(rustls::Error::NoCertificatesPresented) => Self::PeerWithoutCertificate { peer },
            Some(rustls::Error::AlertReceived(alert)) => Self::from_alert(*alert, peer, error),
            Some(_) => Self::NotDecamp { peer, source: Some(error) },
            None if error.kind() == io::ErrorKind::UnexpectedEof => Self::Ended { peer, doing },
            None => Self::Broken { peer, doing, source: error },
        }
    }

    fn peer_certificate(why: &CertificateError, peer: String, dialled: Option<&str>) -> Self {
        use CertificateError as C;
        match why {
            C::Expired | C::ExpiredContext { .. } => Self::PeerExpired { peer },
            C::NotValidYet | C::NotValidYetContext { .. } => Self::PeerNotYetValid { peer },
            // A foreign authority of the same name shows as a signature that does not fit.
            C::UnknownIssuer | C::BadSignature => Self::PeerForeign { peer },
            C::NotValidForName | C::NotValidForNameContext { .. } => {
                let name = dialled.unwrap_or("that was dialled").to_owned();
                Self::PeerName { peer, name }
            }
            other => Self::PeerCertificate { peer, reason: other.to_string() },
        }
    }

    fn from_alert(alert: AlertDescription, peer: String, error: io::Error) -> Self {
        use AlertDescription as A;
        match alert {
            A::CertificateExpired => Self::OursExpired { peer },
            A::UnknownCA | A::DecryptError => Self::OursForeign { peer },
            A::CertificateRequired => Self::OursMissing { peer },
            A::BadCertificate
            | A::UnsupportedCertificate
            | A::CertificateRevoked
            | A::CertificateUnknown
            | A::AccessDenied => Self::OursRefused { peer, alert: format!("{alert:?}") },
            _ => Self::NotDecamp { peer, source: Some(error) },
        }
    }
}
