//! One connection to Redis: commands out, whole replies in (RESP2, as far as SET and GET need it).
//! What does not belong here: what the values mean.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use super::ledger::identify;

/// The longest reply that is believed, in bytes.
pub(super) const LONGEST_REPLY: usize = 64 << 20;
/// The longest line of a reply (`+OK`, `-ERR ...`, `$123`), in bytes.
const LONGEST_LINE: usize = 4096;

/// Why there can be no good verdict.
#[derive(Debug)]
pub(super) enum Failure {
    /// The connection broke, or Redis said something that is not its protocol.
    Connection(String),
    /// Redis answered a command with an error.
    Refused(String),
}

/// What Redis says to one command.
#[derive(Debug, PartialEq)]
pub(super) enum Reply<'a> {
    Simple(&'a str),
    Error(&'a str),
    Value(&'a [u8]),
    Missing,
}

/// One connection, with whole replies read through one buffer.
pub(super) struct Connection {
    stream: TcpStream,
    reader: ReplyReader<BufReader<TcpStream>>,
    out: Vec<u8>,
}

/// Takes replies of the Redis protocol (RESP2) from a stream.
struct ReplyReader<R> {
    source: R,
    line: Vec<u8>,
    body: Vec<u8>,
}

impl Reply<'_> {
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Simple(text) | Self::Error(text) => format!("\"{text}\""),
            Self::Missing => "nothing".into(),
            Self::Value(held) => identify(held),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection(what) => write!(f, "Connection broke: {what}"),
            Self::Refused(what) => write!(f, "Redis refused a command: {what}"),
        }
    }
}

impl Connection {
    pub(super) fn open(address: &str, timeout: Duration) -> Result<Self, Failure> {
        let found = address
            .to_socket_addrs()
            .map_err(|error| broken("finding the address", &error))?
            .next()
            .ok_or_else(|| Failure::Connection(format!("no address for {address}")))?;
        let stream = TcpStream::connect_timeout(&found, timeout)
            .map_err(|error| broken("connecting", &error))?;
        let set = |result: io::Result<()>| {
            result.map_err(|error| broken("setting up the socket", &error))
        };
        set(stream.set_nodelay(true))?;
        set(stream.set_read_timeout(Some(timeout)))?;
        set(stream.set_write_timeout(Some(timeout)))?;
        let source = stream.try_clone().map_err(|error| broken("setting up the socket", &error))?;
        let reader = ReplyReader::new(BufReader::with_capacity(1 << 16, source));
        Ok(Self { stream, reader, out: Vec::new() })
    }

    /// Adds a command to what the next `send` sends.
    pub(super) fn queue(&mut self, words: &[&[u8]]) {
        self.out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
        for word in words {
            self.out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            self.out.extend_from_slice(word);
            self.out.extend_from_slice(b"\r\n");
        }
    }

    pub(super) fn send(&mut self) -> Result<(), Failure> {
        let sent = self.stream.write_all(&self.out);
        self.out.clear();
        sent.map_err(|error| broken("sending", &error))
    }

    pub(super) fn reply(&mut self) -> Result<Reply<'_>, Failure> {
        self.reader.next()
    }
}

impl<R: BufRead> ReplyReader<R> {
    fn new(source: R) -> Self {
        Self { source, line: Vec::new(), body: Vec::new() }
    }

    fn next(&mut self) -> Result<Reply<'_>, Failure> {
        self.read_line()?;
        let line = std::str::from_utf8(&self.line).map_err(|_| strange(&self.line))?;
        match line.split_at_checked(1) {
            Some(("+", text)) => Ok(Reply::Simple(text)),
            Some(("-", text)) => Ok(Reply::Error(text)),
            Some(("$", "-1")) => Ok(Reply::Missing),
            Some(("$", length)) => {
                let length: usize = length.parse().map_err(|_| strange(&self.line))?;
                if length > LONGEST_REPLY {
                    return Err(strange(&self.line));
                }
                self.body.resize(length + 2, 0);
                self.source
                    .read_exact(&mut self.body)
                    .map_err(|error| broken("receiving", &error))?;
                match self.body.strip_suffix(b"\r\n") {
                    Some(value) => Ok(Reply::Value(value)),
                    None => Err(strange(&self.line)),
                }
            }
            _ => Err(strange(&self.line)),
        }
    }

    fn read_line(&mut self) -> Result<(), Failure> {
        self.line.clear();
        let mut limited = (&mut self.source).take(LONGEST_LINE as u64);
        limited.read_until(b'\n', &mut self.line).map_err(|error| broken("receiving", &error))?;
        match self.line.strip_suffix(b"\r\n").map(<[u8]>::len) {
            Some(length) => self.line.truncate(length),
            None if self.line.is_empty() => {
                return Err(Failure::Connection("Redis closed it".into()));
            }
            None => return Err(strange(&self.line)),
        }
        Ok(())
    }
}

/// Takes anything but OK for a failure.
pub(super) fn expect_ok(reply: Reply<'_>) -> Result<(), Failure> {
    match reply {
        Reply::Simple("OK") => Ok(()),
        Reply::Error(text) => Err(Failure::Refused(text.to_owned())),
        other => Err(Failure::Connection(format!("SET was answered with {}", other.describe()))),
    }
}

fn broken(doing: &str, error: &io::Error) -> Failure {
    Failure::Connection(format!("{doing}: {error}"))
}

fn strange(line: &[u8]) -> Failure {
    Failure::Connection(format!("{:?} is not a reply", String::from_utf8_lossy(line)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read_one_after_the_other() {
        let mut reader = ReplyReader::new(&b"+OK\r\n$3\r\na\r\n\r\n$-1\r\n-ERR no\r\n"[..]);
        assert!(matches!(reader.next(), Ok(Reply::Simple("OK"))));
        assert!(matches!(reader.next(), Ok(Reply::Value(b"a\r\n"))));
        assert!(matches!(reader.next(), Ok(Reply::Missing)));
        assert!(matches!(reader.next(), Ok(Reply::Error("ERR no"))));
        assert!(matches!(reader.next(), Err(Failure::Connection(_))));
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        for bytes in [
            &b"\r\n"[..],
            b"?\r\n",
            b"$x\r\n",
            b"$-2\r\n",
            b"$99999999999\r\n",
            b"$1\r\nabc",
            b"+OK",
            b"$4\r\nab",
        ] {
            assert!(ReplyReader::new(bytes).next().is_err(), "{bytes:?}");
        }
    }
}
