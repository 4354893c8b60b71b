//! A workload's console as its keeper serves it: a guest's serial port, a container's terminal. Where
//! what it prints goes, and clients that see it and type.
//!
//! What travels on the console's socket ([`Place::console`](crate::workload::Place::console)) is bytes
//! and nothing else, both ways, so that any tool can be a client. Its size goes another way:
//! [`Size`] as a datagram to [`Place::console_size`](crate::workload::Place::console_size), where the
//! console has one.
//!
//! Nothing here may hold a workload up: a log that cannot be written and a client that does not read
//! lose bytes, and the loss is counted and told.

mod log;
mod output;
mod server;

use std::io;
use std::path::PathBuf;

use crate::workload::WorkloadError;
pub use log::{KEPT, Log, LogReader};
pub use output::Output;
pub use server::{Console, Keyboard, Listening, MAX_CLIENTS, Resizer, listen_privately};

/// Why a console cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The log.
    #[error("Cannot open the console log {path}", path = path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A socket, or the thread that serves it.
    #[error("Cannot listen on the console socket {path}", path = path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl From<ConsoleError> for WorkloadError {
    fn from(error: ConsoleError) -> Self {
        let what = error.to_string();
        let (ConsoleError::Log { source, .. } | ConsoleError::Listen { source, .. }) = error;
        WorkloadError::new(what, source)
    }
}

/// How large a terminal is, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Characters in a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

impl Size {
    /// Bytes of a datagram.
    pub const BYTES: usize = 4;

    /// As it travels: columns and rows, little-endian.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let ([a, b], [c, d]) = (self.columns.to_le_bytes(), self.rows.to_le_bytes());
        [a, b, c, d]
    }

    /// The reverse. Nothing for what is no size: another length, or no character at all.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let &[a, b, c, d] = bytes else { return None };
        let size = Self { columns: u16::from_le_bytes([a, b]), rows: u16::from_le_bytes([c, d]) };
        (size.columns > 0 && size.rows > 0).then_some(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_has_four_bytes_and_at_least_one_character() {
        let size = Size { columns: 97, rows: 0x0121 };
        assert_eq!(size.to_bytes(), [97, 0, 0x21, 0x01]);
        assert_eq!(Size::from_bytes(&size.to_bytes()), Some(size));
        for bad in [&[][..], &[1, 0, 1], &[1, 0, 1, 0, 0], &[0, 0, 1, 0], &[1, 0, 0, 0]] {
            assert_eq!(Size::from_bytes(bad), None, "{bad:?}");
        }
    }
}
