//! What a keeper and its monitor say to each other, as packets of a socket: a few fields of fixed places and a text,
//! never longer than [`LONGEST`]. A descriptor may come along.

use decamp_shared::keeper::ExitRecord;

use super::{Change, Request};

/// Bytes before the text: what, which, a flag, nothing, and a number.
const HEAD: usize = 8;
/// The longest text.
const LONGEST_TEXT: usize = 1024;
/// The longest packet.
pub(super) const LONGEST: usize = HEAD + LONGEST_TEXT;

const DISK: u8 = 1;
const KERNEL: u8 = 2;
const INITRD: u8 = 3;
const AGAIN: u8 = 4;
const HOLDER: u8 = 5;
const PORT: u8 = 6;
const REACH: u8 = 7;
const ENDED: u8 = 8;
const CLEAR: u8 = 9;
const NEXT: u8 = 10;
const STAY: u8 = 11;
const SWITCH: u8 = 12;

/// The longest name of a migration.
const LONGEST_MIGRATION: usize = 64;

/// What a monitor answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// It is done; the text is what was asked for, if it was a text.
    Done(String),
    /// The kernel did not do it.
    Errno(i32),
    /// It was not done, for this reason.
    Failed(String),
}

fn packet(what: u8, which: u8, flag: u8, number: u32, text: &str) -> Vec<u8> {
    let mut end = text.len().min(LONGEST_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = vec![what, which, flag, 0];
    bytes.extend(number.to_le_bytes());
    bytes.extend(&text.as_bytes()[..end]);
    bytes
}

/// The fields of a packet; nothing of what is none.
fn fields(bytes: &[u8]) -> Option<(u8, u8, u8, u32, &str)> {
    let (head, text) = bytes.split_first_chunk::<HEAD>()?;
    let [what, which, flag, 0, a, b, c, d] = *head else { return None };
    let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= LONGEST_TEXT)?;
    Some((what, which, flag, u32::from_le_bytes([a, b, c, d]), text))
}

impl Request {
    /// As it travels. A text that is too long is cut.
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Disk { number, write } => packet(DISK, *number, u8::from(*write), 0, ""),
            Self::Kernel => packet(KERNEL, 0, 0, 0, ""),
            Self::Initrd => packet(INITRD, 0, 0, 0, ""),
            Self::Again { write } => packet(AGAIN, 0, u8::from(*write), 0, ""),
            Self::Next { number } => packet(NEXT, *number, 0, 0, ""),
            Self::Stay { number } => packet(STAY, *number, 0, 0, ""),
            Self::Switch(migration) => packet(SWITCH, 0, 0, 0, migration),
            Self::Holder => packet(HOLDER, 0, 0, 0, ""),
            Self::Port { number, change } => packet(PORT, *number, change.number(), 0, ""),
            Self::Reach { port } => packet(REACH, 0, 0, *port, ""),
            Self::Ended(record) => packet(ENDED, 0, 0, record.status as u32, &record.text),
            Self::Clear => packet(CLEAR, 0, 0, 0, ""),
        }
    }

    /// The reverse. Nothing for what is no request.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let flag = |flag: u8| (flag <= 1).then_some(flag == 1);
        Some(match fields(bytes)? {
            (DISK, number, write, 0, "") => Self::Disk { number, write: flag(write)? },
            (KERNEL, 0, 0, 0, "") => Self::Kernel,
            (INITRD, 0, 0, 0, "") => Self::Initrd,
            (AGAIN, 0, write, 0, "") => Self::Again { write: flag(write)? },
            (NEXT, number, 0, 0, "") => Self::Next { number },
            (STAY, number, 0, 0, "") => Self::Stay { number },
            (SWITCH, 0, 0, 0, text) if is_migration(text) => Self::Switch(text.to_owned()),
            (HOLDER, 0, 0, 0, "") => Self::Holder,
            (PORT, number, change, 0, "") => Self::Port { number, change: Change::of(change)? },
            (REACH, 0, 0, port, "") => Self::Reach { port },
            (ENDED, 0, 0, status, text) => {
                Self::Ended(ExitRecord { status: status as i32, text: text.to_owned() })
            }
            (CLEAR, 0, 0, 0, "") => Self::Clear,
            _ => return None,
        })
    }
}

/// Whether `text` may name a migration: a UUID does.
fn is_migration(text: &str) -> bool {
    let usual = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-');
    (1..=LONGEST_MIGRATION).contains(&text.len()) && text.bytes().all(usual)
}

impl Reply {
    /// As it travels. A text that is too long is cut.
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Done(text) => packet(0, 0, 0, 0, text),
            Self::Errno(number) => packet(1, 0, 0, *number as u32, ""),
            Self::Failed(text) => packet(2, 0, 0, 0, text),
        }
    }

    /// The reverse. Nothing for what is no reply.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        Some(match fields(bytes)? {
            (0, 0, 0, 0, text) => Self::Done(text.to_owned()),
            (1, 0, 0, number, "") => Self::Errno(number as i32),
            (2, 0, 0, 0, text) => Self::Failed(text.to_owned()),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_asked_and_answered_arrives() {
        let record = ExitRecord { status: -3, text: "triple fault".into() };
        let mut requests = vec![Request::Kernel, Request::Initrd, Request::Clear];
        requests.extend([true, false].map(|write| Request::Disk { number: 7, write }));
        requests.extend([true, false].map(|write| Request::Again { write }));
        let changes = [Change::Disconnect, Change::Connect, Change::Reconnect];
        requests.extend(changes.map(|change| Request::Port { number: 200, change }));
        requests.extend([Request::Holder, Request::Reach { port: u32::MAX }]);
        requests.extend([Request::Next { number: 2 }, Request::Stay { number: 255 }]);
        requests.push(Request::Switch("5f0c7a1e-0b7d-4f7e-9a51-2f3c6d8e9b01".into()));
        requests.push(Request::Ended(record));
        for request in requests {
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
        let replies =
            [Reply::Done("VM web".into()), Reply::Errno(13), Reply::Failed("It is gone".into())];
        for reply in replies {
            assert_eq!(Reply::decode(&reply.encode()), Some(reply));
        }
    }

    #[test]
    fn what_is_too_long_is_cut_between_characters() {
        let bytes = Reply::Failed("ä".repeat(LONGEST)).encode();
        assert_eq!(bytes.len(), LONGEST);
        let odd = Reply::decode(&Reply::Failed(format!("x{}", "ä".repeat(LONGEST))).encode());
        assert!(matches!(odd, Some(Reply::Failed(text)) if text.len() == LONGEST_TEXT - 1));
    }

    #[test]
    fn only_what_was_meant_is_a_request() {
        let good = Request::Disk { number: 1, write: true }.encode();
        for (at, value) in [(0, 0), (0, 99), (2, 2), (3, 1), (4, 1)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(Request::decode(&bad), None, "byte {at} is {value}");
        }
        for name in ["", "..", "a/b", "A", "5f0c\n", "ä", &"0".repeat(65)] {
            assert_eq!(Request::decode(&Request::Switch(name.into()).encode()), None, "{name:?}");
        }
        assert_eq!(Request::decode(&good[..7]), None);
        assert_eq!(Request::decode(&[&good[..], b"x"].concat()), None);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic_and_mean_one_thing(
            bytes in prop::collection::vec(any::<u8>(), 0..40),
            what in 0u8..15,
        ) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = what;
            }
            if let Some(request) = Request::decode(&bytes) {
                prop_assert_eq!(request.encode(), bytes.clone());
            }
            let _ = Reply::decode(&bytes);
        }
    }
}
