//! What a container has still to read from the pipe that is its standard input: it goes along, and so does the
//! pipe's end, where nobody can write into it any more.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;

use crate::error::{ContainerError, Result};
use crate::sys;

/// What is left of the input.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rest {
    /// What was written and not read.
    pub(crate) bytes: Vec<u8>,
    /// Whether nothing can come after that.
    pub(crate) ended: bool,
}

impl Rest {
    /// That of the pipe which CRIU calls `key`, as `pids` have it, which stand still; nothing when none of them
    /// has it. It stays in the pipe.
    pub(crate) fn of(pids: &[i32], key: &str) -> Result<Option<Self>> {
        let Some(path) = pids.iter().find_map(|pid| held_by(*pid, key)) else { return Ok(None) };
        let look = |what: &str| format!("{what} the container's input");
        let pipe = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let pipe = pipe.map_err(ContainerError::io(look("open")))?;
        let mut event = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        poll(&mut event, PollTimeout::ZERO).map_err(ContainerError::errno(look("look at")))?;
        let told = event[0].revents().unwrap_or(PollFlags::empty());
        let mut bytes = Vec::new();
        if told.contains(PollFlags::POLLIN) {
            let room = fcntl(&pipe, FcntlArg::F_GETPIPE_SZ);
            let room = room.map_err(ContainerError::errno(look("measure")))?;
            let copied = copy(&pipe, room).map_err(ContainerError::io(look("copy")))?;
            bytes = copied;
        }
        Ok(Some(Self { bytes, ended: told.contains(PollFlags::POLLHUP) }))
    }
}

/// Where process `pid` has the reading end of the pipe that is called `key`.
fn held_by(pid: i32, key: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let is_it = |path: &PathBuf| fs::read_link(path).is_ok_and(|link| link.as_os_str() == key);
    entries.flatten().map(|entry| entry.path()).find(is_it)
}

/// A copy of what is in `pipe`, of `room` bytes.
fn copy(pipe: &File, room: i32) -> std::io::Result<Vec<u8>> {
    let (from, to) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    fcntl(&to, FcntlArg::F_SETPIPE_SZ(room))?;
    let length = sys::tee(pipe.as_fd(), to.as_fd(), room as usize)?;
    drop(to);
    let mut bytes = Vec::with_capacity(length);
    File::from(from).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_in_a_pipe_and_its_end_are_seen() {
        let (from, to) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        let key = format!("pipe:[{}]", sys::inode(from.as_fd()).expect("a number"));
        let pids = [std::process::id() as i32];
        let rest = || Rest::of(&pids, &key).expect("looked at").expect("we have it");
        // We have both ends ourselves.
        assert_eq!(rest(), Rest::default());
        let mut to = File::from(to);
        let written: Vec<u8> = (0..50_000u32).map(|at| at as u8).collect();
        to.write_all(&written).expect("there is room");
        for _ in 0..2 {
            assert_eq!(rest(), Rest { bytes: written.clone(), ended: false });
        }
        drop(to);
        assert_eq!(rest(), Rest { bytes: written, ended: true });
        assert_eq!(Rest::of(&pids, "pipe:[1]").expect("looked at"), None);
    }
}
