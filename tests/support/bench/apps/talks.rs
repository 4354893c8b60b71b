//! What clients say to applications: lines to the programs that check themselves, HTTP, and memcached's
//! protocol. Each answer is checked, and an answer that is not right is an error.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use crate::error::{BenchError, Result};

/// The longest line that any of them answers with.
const LINE: usize = 4096;

/// One client's words, on one connection.
pub(crate) trait Talk: Send {
    /// The first words on a connection; false if the application is not ready yet.
    fn greet(&mut self, _stream: &mut TcpStream) -> Result<bool> {
        Ok(true)
    }
    /// Before the first question.
    fn begin(&mut self, _stream: &mut TcpStream) -> Result<()> {
        Ok(())
    }
    /// One question, and its answer.
    fn ask(&mut self, stream: &mut TcpStream, number: u64) -> Result<()>;
    /// After the last question.
    fn verify(&mut self, _stream: &mut TcpStream) -> Result<()> {
        Ok(())
    }
}

/// `beat N` is answered with `beat N ok COUNT`, and the count of checks grows.
pub(crate) struct Lines {
    checks: u64,
}

/// Files fetched by HTTP in turns; their contents by name.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Files {
    contents: BTreeMap<String, Vec<u8>>,
}

/// Values that follow from their key and version, and which version each key has.
pub(crate) struct Memcached {
    versions: Vec<u64>,
}

pub(crate) fn send(stream: &mut TcpStream, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).map_err(BenchError::io("speak to the application"))
}

pub(crate) fn receive(stream: &mut TcpStream, count: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).map_err(BenchError::io("hear from the application"))?;
    Ok(bytes)
}

/// A line without its end. Byte by byte, so that nothing of what follows is taken.
fn line(stream: &mut TcpStream) -> Result<String> {
    let mut bytes = Vec::new();
    while bytes.last() != Some(&b'\n') {
        if bytes.len() > LINE {
            return Err(BenchError::wrong("The application answers with a line that has no end"));
        }
        bytes.extend(receive(stream, 1)?);
    }
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

impl Lines {
    pub(crate) fn new() -> Self {
        Self { checks: 0 }
    }
}

impl Talk for Lines {
    fn ask(&mut self, stream: &mut TcpStream, number: u64) -> Result<()> {
        send(stream, format!("beat {number}\n").as_bytes())?;
        let answer = line(stream)?;
        let checks = answer.strip_prefix(&format!("beat {number} ok "));
        let checks: Option<u64> = checks.and_then(|count| count.parse().ok());
        match checks.filter(|checks| *checks >= self.checks) {
            Some(checks) => self.checks = checks,
            None => return Err(BenchError::wrong(format!("The program says: {answer}"))),
        }
        Ok(())
    }
}

impl Files {
    /// All in a directory.
    pub(crate) fn of(directory: &Path) -> Result<Self> {
        let failed = || BenchError::io(format!("read {}", directory.display()));
        let mut contents = BTreeMap::new();
        for entry in fs::read_dir(directory).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            let name = entry.file_name().to_string_lossy().into_owned();
            contents.insert(name, fs::read(entry.path()).map_err(failed())?);
        }
        Ok(Self { contents })
    }
}

impl Talk for Files {
    fn ask(&mut self, stream: &mut TcpStream, number: u64) -> Result<()> {
        let Some((name, content)) =
            self.contents.iter().nth(number as usize % self.contents.len().max(1))
        else {
            return Err(BenchError::wrong("There is no file to fetch"));
        };
        send(stream, format!("GET /{name} HTTP/1.1\r\nHost: bench\r\n\r\n").as_bytes())?;
        let status = line(stream)?;
        let mut length = None;
        loop {
            let header = line(stream)?;
            if header.is_empty() {
                break;
            }
            if let Some(("content-length", value)) = header.to_ascii_lowercase().split_once(": ") {
                length = value.parse().ok();
            }
        }
        let right = status == "HTTP/1.1 200 OK" && length == Some(content.len());
        if !right || receive(stream, content.len())? != *content {
            return Err(BenchError::wrong(format!("/{name} is not what it was: {status}")));
        }
        Ok(())
    }
}

impl Memcached {
    /// 64 MiB of values, and few enough keys to write each of them often.
    const KEYS: usize = 16384;
    const VALUE: usize = 4096;

    pub(crate) fn new() -> Self {
        Self { versions: vec![1; Self::KEYS] }
    }

    /// Bytes that no other version and no other key has.
    fn value(key: usize, version: u64) -> Vec<u8> {
        let mut state = (key as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version;
        let mut bytes = Vec::with_capacity(Self::VALUE);
        while bytes.len() < Self::VALUE {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
        }
        bytes
    }

    fn set(stream: &mut TcpStream, key: usize, version: u64) -> Result<()> {
        let mut command = format!("set key-{key} 0 0 {}\r\n", Self::VALUE).into_bytes();
        command.extend(Self::value(key, version));
        command.extend(b"\r\n");
        send(stream, &command)?;
        match line(stream)?.as_str() {
            "STORED" => Ok(()),
            answer => {
                Err(BenchError::wrong(format!("memcached did not store key {key}: {answer}")))
            }
        }
    }

    fn get(&self, stream: &mut TcpStream, key: usize) -> Result<()> {
        send(stream, format!("get key-{key}\r\n").as_bytes())?;
        let head = line(stream)?;
        if head != format!("VALUE key-{key} 0 {}", Self::VALUE) {
            return Err(BenchError::wrong(format!("memcached lost key {key}: {head}")));
        }
        let value = receive(stream, Self::VALUE)?;
        if value != Self::value(key, self.versions[key]) {
            return Err(BenchError::wrong(format!("memcached has another value of key {key}")));
        }
        match (line(stream)?.as_str(), line(stream)?.as_str()) {
            ("", "END") => Ok(()),
            other => Err(BenchError::wrong(format!("memcached answered {other:?}"))),
        }
    }
}

impl Talk for Memcached {
    fn begin(&mut self, stream: &mut TcpStream) -> Result<()> {
        (0..Self::KEYS).try_for_each(|key| Self::set(stream, key, 1))
    }

    fn ask(&mut self, stream: &mut TcpStream, number: u64) -> Result<()> {
        // One key in sixteen is written over and over; any may be read.
        let key = (number as usize * 7) % (Self::KEYS / 16);
        self.versions[key] += 1;
        Self::set(stream, key, self.versions[key])?;
        self.get(stream, (number as usize * 4099) % Self::KEYS)
    }

    fn verify(&mut self, stream: &mut TcpStream) -> Result<()> {
        (0..Self::KEYS).try_for_each(|key| self.get(stream, key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_differ_by_key_and_version() {
        let value = Memcached::value(3, 1);
        assert_eq!(value.len(), Memcached::VALUE);
        assert_eq!(value, Memcached::value(3, 1));
        assert_ne!(value, Memcached::value(3, 2));
        assert_ne!(value, Memcached::value(4, 1));
    }
}
