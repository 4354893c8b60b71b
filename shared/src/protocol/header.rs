//! The first fixed header of every connection, sent once in each direction right after the TLS
//! handshake, and nothing else.
//!
//! Its 32 bytes never change their place or meaning, whatever the protocol becomes, so that any
//! build can tell any other which versions it speaks and why it refuses. All integers are little
//! endian.

use std::fmt;

/// Bytes of a [`Hello`] and of an [`Answer`].
pub const HEADER_LEN: usize = 32;
/// First bytes of every connection, in both directions.
pub const MAGIC: [u8; 8] = *b"decamp\r\n";
/// The layout of the header that this build writes.
pub const HEADER_FORMAT: u16 = 1;

/// The range of protocol versions that a build speaks, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl Versions {
    /// What this build speaks.
    pub const OURS: Self = Self { min: 1, max: 1 };

    /// The newest version that both speak.
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (newest >= self.min && newest >= other.min).then_some(newest)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "{}", self.min)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// Control messages of one session.
    Control = 1,
    /// Batches of pages.
    Page = 2,
    /// File trees.
    File = 3,
}

impl Role {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Control, Self::Page, Self::File].into_iter().find(|role| *role as u8 == byte)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Page => "page",
            Self::File => "file",
        })
    }
}

/// Why a server turns a connection away before anything was said on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Turned {
    /// No protocol version in common.
    Version = 1,
    /// The server does not know the role.
    Role = 2,
    /// The server has too many connections.
    Busy = 3,
}

/// What is wrong with 32 bytes that should have been a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not decamp at all.
    #[error("The first bytes are not those of decamp")]
    Magic,
    /// A version range whose ends are in the wrong order, or zero.
    #[error("The version range {0} is impossible")]
    Range(Versions),
    /// The server chose a version that was not offered.
    #[error("The peer chose protocol {chosen}, which was not offered ({offered})")]
    Chosen {
        /// What it chose.
        chosen: u16,
        /// What this build offered.
        offered: Versions,
    },
    /// A refusal code that this build does not know.
    #[error("The peer turned the connection away for a reason unknown to this build (code {0})")]
    UnknownRefusal(u16),
}

/// What the client says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the client speaks.
    pub versions: Versions,
    /// What the connection is for, as the byte that was sent: the server may not know it.
    pub role: u8,
}

impl Hello {
    /// A hello of this build.
    pub fn new(versions: Versions, role: Role) -> Self {
        Self { versions, role: role as u8 }
    }

    /// The role, if this build knows it.
    pub fn role(&self) -> Option<Role> {
        Role::from_byte(self.role)
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        encode(self.versions, self.role, 0, 0)
    }

    /// Reads what a client sent.
    ///
    /// # Errors
    /// When the magic or the version range is wrong. Later header formats keep these fields where
    /// they are, so the format number is no reason to refuse.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let versions = decode_versions(bytes)?;
        Ok(Self { versions, role: bytes[14] })
    }
}

/// What the server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What the server speaks.
    pub versions: Versions,
    /// The role byte, as it was asked for.
    pub role: u8,
    /// The version that both use from now on, or why there is none.
    pub verdict: Result<u16, Turned>,
}

impl Answer {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        match self.verdict {
            Ok(chosen) => encode(self.versions, self.role, chosen, 0),
            Err(turned) => encode(self.versions, self.role, 0, turned as u16),
        }
    }

    /// Reads a server's answer to a client that speaks `offered`.
    ///
    /// # Errors
    /// When the magic or range is wrong, the refusal code unknown, or the choice was not offered.
    pub fn decode(bytes: &[u8; HEADER_LEN], offered: Versions) -> Result<Self, HeaderError> {
        let versions = decode_versions(bytes)?;
        let verdict = match u16_at(bytes, 18) {
            0 => Ok(u16_at(bytes, 16)),
            1 => Err(Turned::Version),
            2 => Err(Turned::Role),
            3 => Err(Turned::Busy),
            code => return Err(HeaderError::UnknownRefusal(code)),
        };
        match verdict {
            Ok(chosen) if chosen < offered.min || chosen > offered.max => {
                Err(HeaderError::Chosen { chosen, offered })
            }
            _ => Ok(Self { versions, role: bytes[14], verdict }),
        }
    }
}

fn encode(versions: Versions, role: u8, chosen: u16, refusal: u16) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&HEADER_FORMAT.to_le_bytes());
    bytes[10..12].copy_from_slice(&versions.min.to_le_bytes());
    bytes[12..14].copy_from_slice(&versions.max.to_le_bytes());
    bytes[14] = role;
    bytes[16..18].copy_from_slice(&chosen.to_le_bytes());
    bytes[18..20].copy_from_slice(&refusal.to_le_bytes());
    bytes
}

fn decode_versions(bytes: &[u8; HEADER_LEN]) -> Result<Versions, HeaderError> {
    if bytes[..8] != MAGIC {
        return Err(HeaderError::Magic);
    }
    let versions = Versions { min: u16_at(bytes, 10), max: u16_at(bytes, 12) };
    if versions.min == 0 || versions.min > versions.max {
        return Err(HeaderError::Range(versions));
    }
    Ok(versions)
}

fn u16_at(bytes: &[u8; HEADER_LEN], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOLDEN_HELLO: [u8; HEADER_LEN] = [
        b'd', b'e', b'c', b'a', b'm', b'p', b'\r', b'\n', 1, 0, 1, 0, 3, 0, 2, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];

    #[test]
    fn the_bytes_of_a_hello_never_change() {
        let hello = Hello::new(Versions { min: 1, max: 3 }, Role::Page);
        assert_eq!(hello.encode(), GOLDEN_HELLO);
        assert_eq!(Hello::decode(&GOLDEN_HELLO), Ok(hello));
    }

    #[test]
    fn the_bytes_of_an_answer_never_change() {
        let mut golden = GOLDEN_HELLO;
        golden[16] = 2;
        let versions = Versions { min: 1, max: 3 };
        let chosen = Answer { versions, role: 2, verdict: Ok(2) };
        assert_eq!(chosen.encode(), golden);
        assert_eq!(Answer::decode(&golden, versions), Ok(chosen));
        golden[16] = 0;
        golden[18] = 3;
        let busy = Answer { versions, role: 2, verdict: Err(Turned::Busy) };
        assert_eq!(busy.encode(), golden);
        assert_eq!(Answer::decode(&golden, versions), Ok(busy));
    }

    #[test]
    fn the_document_says_the_same() {
        let document = include_str!("../../PROTOCOL.md");
        let versions = Versions { min: 1, max: 3 };
        let answer = Answer { versions, role: 2, verdict: Ok(2) }.encode();
        for bytes in [GOLDEN_HELLO, answer] {
            let line = bytes.map(|byte| format!("{byte:02x}")).join(" ");
            assert!(document.contains(&line), "PROTOCOL.md lacks {line}");
        }
    }

    #[test]
    fn lies_are_named() {
        let mut bytes = GOLDEN_HELLO;
        bytes[0] = b'D';
        assert_eq!(Hello::decode(&bytes), Err(HeaderError::Magic));
        let mut bytes = GOLDEN_HELLO;
        bytes[10] = 9;
        assert_eq!(Hello::decode(&bytes), Err(HeaderError::Range(Versions { min: 9, max: 3 })));
        let mut bytes = GOLDEN_HELLO;
        bytes[16] = 7;
        let offered = Versions::OURS;
        assert_eq!(
            Answer::decode(&bytes, offered),
            Err(HeaderError::Chosen { chosen: 7, offered })
        );
        bytes[18] = 77;
        assert_eq!(Answer::decode(&bytes, offered), Err(HeaderError::UnknownRefusal(77)));
    }

    #[test]
    fn a_later_header_format_is_still_understood() {
        let mut bytes = GOLDEN_HELLO;
        bytes[8] = 2;
        bytes[15] = 0xff;
        bytes[31] = 0xff;
        assert!(Hello::decode(&bytes).is_ok());
    }

    proptest! {
        #[test]
        fn common_is_the_newest_of_both(a in 1u16..9, b in 0u16..9, c in 1u16..9, d in 0u16..9) {
            let left = Versions { min: a, max: a + b };
            let right = Versions { min: c, max: c + d };
            let both = (left.min..=left.max).filter(|v| (right.min..=right.max).contains(v)).max();
            prop_assert_eq!(left.common(right), both);
            prop_assert_eq!(right.common(left), both);
        }

        #[test]
        fn any_bytes_are_an_answer_or_an_error(bytes in prop::array::uniform32(any::<u8>())) {
            let _ = Hello::decode(&bytes);
            let _ = Answer::decode(&bytes, Versions::OURS);
        }
    }
}
