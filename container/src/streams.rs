//! A container's standard output and error: one pipe, which the keeper empties into the log.
//!
//! A pipe, because CRIU knows how to dump its one end and to be handed another in its place.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use decamp_shared::console::Log;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Gid, Uid, fchown, pipe2};

use crate::error::{ContainerError, Result};
use crate::input::Rest;
use crate::sys;

/// What is still in the pipe when the last writer has ended is copied within this.
const FINISH_WITHIN: Duration = Duration::from_millis(500);

/// The keeper's end of a container's output.
pub(crate) struct Streams {
    /// The end that the container writes to; kept open so that a move needs no second pipe.
    write_end: Option<OwnedFd>,
    /// The same end again, where standard error is another pipe than standard output.
    second: Option<OwnedFd>,
    /// A pipe that only says what was left of another: where standard input was one.
    input: OwnedFd,
    /// Its other end, for as long as it has not ended.
    input_writer: Mutex<Option<OwnedFd>>,
    /// Whether the container was given it.
    has_input: AtomicBool,
    copier: Option<JoinHandle<()>>,
}

impl Streams {
    /// Makes the pipe and appends what comes out of it to `log` until the last writer is gone.
    pub(crate) fn open(log: &Path) -> Result<Self> {
        let (read_end, write_end) =
            pipe2(OFlag::O_CLOEXEC).map_err(ContainerError::errno("make a pipe"))?;
        let file = Log::open(log).map_err(ContainerError::io(format!("open {}", log.display())))?;
        let copier = thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || {
                if let Err(error) = copy(File::from(read_end), file) {
                    tracing::warn!(%error, "Cannot keep the container's output any longer");
                }
            })
            .map_err(ContainerError::io("start a thread"))?;
        let second =
            write_end.try_clone().map_err(ContainerError::io("copy the output descriptor"))?;
        let (input, input_writer) =
            pipe2(OFlag::O_CLOEXEC).map_err(ContainerError::errno("make a pipe"))?;
        Ok(Self {
            write_end: Some(write_end),
            second: Some(second),
            input,
            input_writer: Mutex::new(Some(input_writer)),
            has_input: AtomicBool::new(false),
            copier: Some(copier),
        })
    }

    /// Has the container write to `output` and `error`, which somebody else reads.
    pub(crate) fn are(&mut self, output: OwnedFd, error: OwnedFd) {
        self.write_end = Some(output);
        self.second = Some(error);
    }

    /// The end that the container writes to.
    pub(crate) fn write_end(&self) -> Result<BorrowedFd<'_>> {
        let gone = || ContainerError::State("The container's output is closed".to_owned());
        self.write_end.as_ref().map(AsFd::as_fd).ok_or_else(gone)
    }

    /// The same end, for a second pipe.
    pub(crate) fn second_end(&self) -> Result<BorrowedFd<'_>> {
        let gone = || ContainerError::State("The container's output is closed".to_owned());
        self.second.as_ref().map(AsFd::as_fd).ok_or_else(gone)
    }

    /// The end that a container reads its input from.
    pub(crate) fn input_end(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }

    /// What CRIU calls the pipe that the container reads its input from, if it has come with one.
    pub(crate) fn input_key(&self) -> Result<Option<String>> {
        if !self.has_input.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let inode = sys::inode(self.input_end()).map_err(ContainerError::io("look at a pipe"))?;
        Ok(Some(format!("pipe:[{inode}]")))
    }

    /// Has the container read `rest`, and then its end if it has one.
    pub(crate) fn give_input(&self, rest: &Rest) -> Result<()> {
        self.has_input.store(true, Ordering::Relaxed);
        let mut writer = self.input_writer.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = "hand the container what it had still to read";
        if let Some(writer) = writer.as_ref().filter(|_| !rest.bytes.is_empty()) {
            // All of it fits, or nothing is written: nobody reads yet.
            let room = i32::try_from(rest.bytes.len().next_power_of_two()).unwrap_or(i32::MAX);
            let has =
                fcntl(writer, FcntlArg::F_GETPIPE_SZ).map_err(ContainerError::errno(failed))?;
            if room > has {
                fcntl(writer, FcntlArg::F_SETPIPE_SZ(room))
                    .map_err(ContainerError::errno(failed))?;
            }
            let writer = writer.try_clone().map_err(ContainerError::io(failed))?;
            File::from(writer).write_all(&rest.bytes).map_err(ContainerError::io(failed))?;
        }
        if rest.ended {
            *writer = None;
        }
        Ok(())
    }

    /// Takes what was written until now into the log: call it when every writer has ended.
    pub(crate) fn finish(&mut self) {
        self.write_end = None;
        self.second = None;
        let Some(copier) = self.copier.take() else { return };
        // A writer that nobody knows of (a process that somebody else gave the pipe to) is not
        // waited for.
        let begun = Instant::now();
        while !copier.is_finished() && begun.elapsed() < FINISH_WITHIN {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// What CRIU calls the pipe.
    pub(crate) fn key(&self) -> Result<String> {
        let inode = sys::inode(self.write_end()?).map_err(ContainerError::io("look at a pipe"))?;
        Ok(format!("pipe:[{inode}]"))
    }

    /// Owner of the pipe: the user of the container, who may open `/dev/stdout` again.
    pub(crate) fn owner(&self) -> Result<(u32, u32)> {
        let found = nix::sys::stat::fstat(self.write_end()?)
            .map_err(ContainerError::errno("look at a pipe"))?;
        Ok((found.st_uid, found.st_gid))
    }

    /// Gives the pipe to the user of the container.
    pub(crate) fn give_to(&self, owner: (u32, u32)) -> Result<()> {
        fchown(self.write_end()?, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)))
            .map_err(ContainerError::errno("give a pipe to the container's user"))
    }
}

/// Copies until the end. A log that cannot be written (a full disk) loses output, but never stops
/// the container.
fn copy(mut from: File, mut to: Log) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                if let Err(error) = to.write_all(&buffer[..length]) {
                    tracing::debug!(%error, "Cannot write the container's log");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
