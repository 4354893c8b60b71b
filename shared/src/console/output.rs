//! Where what a workload prints goes: its log, and the clients that look on. Written by whoever runs the
//! workload, who is never made to wait; what a slow client has still to see is kept for it up to a limit.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::server::MAX_CLIENTS;
use super::{ConsoleError, Log};

/// What is kept for a client that does not take it now. A socket alone holds little of what comes byte by
/// byte.
const KEPT: usize = 256 << 10;

/// Where a workload's output goes. Clones write to the same places.
#[derive(Clone, Debug)]
pub struct Output {
    places: Arc<Mutex<Places>>,
    /// Tells the console's thread that something is kept for a client.
    kept: Arc<EventFd>,
}

#[derive(Debug)]
struct Places {
    log: Option<Log>,
    clients: Vec<Seer>,
    next_number: u64,
    lost: u64,
}

/// The reading end of a client, which never blocks.
#[derive(Debug)]
struct Seer {
    number: u64,
    stream: UnixStream,
    kept: VecDeque<u8>,
    /// Bytes that it will never see, and has not been told of.
    missed: u64,
}

impl Output {
    /// Output that is appended to `log`, made when it is not there.
    ///
    /// # Errors
    /// When the log cannot be opened.
    pub fn to_log(log: &Path) -> Result<Self, ConsoleError> {
        let failed = |source| ConsoleError::Log { path: log.to_owned(), source };
        Log::open(log).and_then(Self::to).map_err(failed)
    }

    /// Output to a log that is open already.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn to(log: Log) -> io::Result<Self> {
        Self::new(Some(log))
    }

    /// Output that nobody sees until there are clients.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn nowhere() -> io::Result<Self> {
        Self::new(None)
    }

    fn new(log: Option<Log>) -> io::Result<Self> {
        let kept = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let places = Places { log, clients: Vec::new(), next_number: 0, lost: 0 };
        Ok(Self { places: Arc::new(Mutex::new(places)), kept: Arc::new(kept) })
    }

    /// `bytes` that could not be taken count as lost.
    pub fn lose(&self, bytes: u64) {
        self.places().lost += bytes;
    }

    /// Bytes that some place could not take.
    pub fn lost(&self) -> u64 {
        self.places().lost
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the client, whose `stream` does not block, what is printed from now on; a number to know it
    /// by, if there was room.
    pub(super) fn add(&self, stream: UnixStream) -> Option<u64> {
        let mut places = self.places();
        if places.clients.len() >= MAX_CLIENTS {
            return None;
        }
        let number = places.next_number;
        places.next_number += 1;
        places.clients.push(Seer { number, stream, kept: VecDeque::new(), missed: 0 });
        Some(number)
    }

    /// Makes room for another client; a silent workload would never find out that this one is gone.
    pub(super) fn forget(&self, number: u64) {
        self.places().clients.retain(|client| client.number != number);
    }

    /// Readable when something has been kept since [`Self::waiting`] was called.
    pub(super) fn kept(&self) -> &EventFd {
        &self.kept
    }

    /// The clients for which something is kept.
    pub(super) fn waiting(&self) -> Vec<u64> {
        // Before they are looked at, so that none is overlooked.
        let _ = self.kept.read();
        let places = self.places();
        places.clients.iter().filter(|one| !one.kept.is_empty()).map(|one| one.number).collect()
    }

    /// Gives the client what was kept for it, as far as it takes it.
    pub(super) fn catch_up(&self, number: u64) {
        let mut places = self.places();
        places.clients.retain_mut(|client| client.number != number || client.catch_up().is_ok());
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut places = self.places();
        let (mut lost, mut keeps) = (0, false);
        if let Some(log) = &mut places.log
            && log.write_all(bytes).is_err()
        {
            lost += bytes.len() as u64;
        }
        // One that is gone is forgotten.
        places.clients.retain_mut(|client| {
            let was_empty = client.kept.is_empty();
            let Ok(missed) = client.show(bytes) else { return false };
            lost += missed;
            keeps |= was_empty && !client.kept.is_empty();
            true
        });
        places.lost += lost;
        drop(places);
        if keeps {
            let _ = self.kept.write(1);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seer {
    /// Shows it `bytes`, now or later; how many of them it misses. An error: it is gone.
    fn show(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let taken = if self.kept.is_empty() { self.take(bytes)? } else { 0 };
        let rest = &bytes[taken..];
        // After a gap it sees nothing until it has been told of the gap.
        let room = if self.missed > 0 { 0 } else { KEPT.saturating_sub(self.kept.len()) };
        let (kept, missed) = rest.split_at(room.min(rest.len()));
        self.kept.extend(kept);
        self.missed += missed.len() as u64;
        Ok(missed.len() as u64)
    }

    fn catch_up(&mut self) -> io::Result<()> {
        loop {
            let piece = self.kept.make_contiguous();
            if piece.is_empty() {
                if self.missed == 0 {
                    return Ok(());
                }
                let gap = format!("\r\n[decamp: {} bytes were lost here]\r\n", self.missed);
                self.kept.extend(gap.as_bytes());
                self.missed = 0;
                continue;
            }
            let taken = match self.stream.write(piece) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                taken => taken?,
            };
            self.kept.drain(..taken);
        }
    }

    /// How many of `bytes` its socket takes at once.
    fn take(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.stream.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            taken => taken,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_client_that_does_not_read_is_kept_what_there_is_room_for_and_told_of_the_gap() {
        let dir = tempfile::tempdir().expect("directory");
        let mut output = Output::to_log(&dir.path().join("log")).expect("log");
        let (here, mut there) = UnixStream::pair().expect("pair");
        here.set_nonblocking(true).expect("non-blocking");
        let number = output.add(here).expect("room");
        let mut printed = Vec::new();
        for count in 0..64u8 {
            let bytes = [b'0' + count % 10; 65536];
            printed.extend(bytes);
            output.write_all(&bytes).expect("print");
        }
        let lost = output.lost();
        assert!(lost > 0);
        assert_eq!(std::fs::read(dir.path().join("log")).expect("log"), printed);
        assert_eq!(output.waiting(), [number]);
        there.set_nonblocking(true).expect("non-blocking");
        let mut seen = Vec::new();
        while !output.waiting().is_empty() {
            output.catch_up(number);
            let _ = there.read_to_end(&mut seen);
        }
        output.write_all(b"after").expect("print");
        let _ = there.read_to_end(&mut seen);
        let told = format!("\r\n[decamp: {lost} bytes were lost here]\r\nafter");
        let whole = printed.len() - lost as usize;
        assert_eq!(seen[..whole], printed[..whole]);
        assert_eq!(String::from_utf8_lossy(&seen[whole..]), told);
    }

    #[test]
    fn single_bytes_of_a_burst_all_arrive() {
        let dir = tempfile::tempdir().expect("directory");
        let mut output = Output::to_log(&dir.path().join("log")).expect("log");
        let (here, mut there) = UnixStream::pair().expect("pair");
        here.set_nonblocking(true).expect("non-blocking");
        let number = output.add(here).expect("room");
        let count = 100_000;
        for turn in 0..count {
            output.write_all(&[turn as u8]).expect("print");
        }
        there.set_nonblocking(true).expect("non-blocking");
        let mut seen = Vec::new();
        while !output.waiting().is_empty() {
            output.catch_up(number);
            let _ = there.read_to_end(&mut seen);
        }
        let _ = there.read_to_end(&mut seen);
        assert_eq!(output.lost(), 0);
        assert!(seen.len() == count && seen.iter().enumerate().all(|(at, &byte)| byte == at as u8));
    }

    #[test]
    fn one_that_is_gone_is_forgotten() {
        let dir = tempfile::tempdir().expect("directory");
        let mut output = Output::to_log(&dir.path().join("log")).expect("log");
        let (here, there) = UnixStream::pair().expect("pair");
        output.add(here).expect("room");
        drop(there);
        output.write_all(b"x").expect("print");
        assert!(output.places().clients.is_empty());
        assert_eq!(output.lost(), 0);
    }
}
