//! Connections: TLS 1.3 with certificates on both sides, the first header, control messages,
//! and the blocking streams that pages and files travel on.
//!
//! A connection begins asynchronous ([`Dialer`], [`Acceptor`], [`Connection`]). Control
//! connections stay so ([`Control`]); page and file connections prove that they belong to a session
//! ([`join`]) and become a [`DataStream`] for a plain thread. Every wait has a deadline, everything
//! can be cancelled, and nothing is allocated because a peer named a length. What the bytes mean is
//! the business of the rooms above.

pub mod connection;
pub mod control;
pub mod error;
pub mod identity;
pub mod join;
mod socket;
pub mod stream;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use connection::{Acceptor, Connection, Dialer, PeerAddress};
pub use control::{Control, ControlReader, ControlWriter};
pub use error::TransportError;
pub use identity::{Identity, Peer};
pub use join::{Join, JoinRefusal, Joining, Secret};
pub use stream::{Canceller, DataStream, FileStream, PageStream};

pub use crate::protocol::header::{Role, Versions};

/// Result of what a transport does.
pub type Result<T> = std::result::Result<T, TransportError>;
