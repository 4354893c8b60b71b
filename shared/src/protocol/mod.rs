//! The wire of protocol 1: messages, versions, error codes. No I/O, no unsafe.
//!
//! `PROTOCOL.md` beside this crate says the same in prose; a test holds the two together.

pub mod control;
pub mod header;
pub mod manifest;

/// The one port of an agent.
pub const PORT: u16 = 7420;
/// Application protocol in the TLS handshake.
pub const ALPN: &[u8] = b"decamp";
