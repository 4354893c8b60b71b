//! Whose a disk is. A VM that writes one holds a lock for writing over the whole of it, one that only reads a
//! lock for reading: open file description locks (fcntl(2)), which end with their keeper however that ends, and
//! which network file systems pass on to other hosts. They are given up by a word, and not with the last
//! descriptor alone: a process that is forked at that moment has all descriptors until it is another program.

use std::fs::{self, File, Metadata};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::error::{Result, VmError};

/// Between two tries to take a lock that somebody is about to give up.
const AGAIN: Duration = Duration::from_millis(5);

/// An open file with its lock, which is given up when this is dropped.
#[derive(Debug)]
pub(crate) struct Locked(File);

impl Deref for Locked {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Where that fails it ends with the descriptor.
        let _ = fcntl(&self.0, FcntlArg::F_OFD_SETLK(&whole(libc::F_UNLCK)));
    }
}

/// Takes the lock of `file`, which stands at `path`, for reading alone if `readonly`; waits as long as `patience`
/// for whoever has it. The file comes back without it when somebody has it all the time.
///
/// # Errors
/// When the file system has no locks.
pub(crate) fn take(
    file: File,
    path: &Path,
    readonly: bool,
    patience: Duration,
) -> Result<std::result::Result<Locked, File>> {
    let until = Instant::now() + patience;
    let wanted = whole(if readonly { libc::F_RDLCK } else { libc::F_WRLCK });
    loop {
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&wanted)) {
            Ok(_) => return Ok(Ok(Locked(file))),
            Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < until => {
                std::thread::sleep(AGAIN);
            }
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(Err(file)),
            Err(error) => {
                return Err(VmError::refused(format!("lock disk {}", path.display()), error));
            }
        }
    }
}

/// Whether whoever opens `path` could lock it now, for reading alone if `readonly`.
///
/// # Errors
/// When somebody has it, named where this host can tell, or the file system has no locks; nothing is locked after.
pub(crate) fn check(path: &Path, readonly: bool) -> Result<()> {
    let failed =
        |error: io::Error| VmError::refused(format!("open disk {}", path.display()), error);
    let file = File::options().read(true).write(!readonly).open(path).map_err(failed)?;
    let mut wanted = whole(if readonly { libc::F_RDLCK } else { libc::F_WRLCK });
    let asked = fcntl(&file, FcntlArg::F_OFD_GETLK(&mut wanted));
    asked.map_err(|error| {
        VmError::refused(format!("ask for the lock of disk {}", path.display()), error)
    })?;
    let is_free = i32::from(wanted.l_type) == libc::F_UNLCK;
    let holder = || holder(&file.metadata().ok()?);
    if is_free { Ok(()) } else { Err(locked(path, holder())) }
}

fn whole(kind: i32) -> libc::flock {
    // To the end, however far away that will be.
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// That the disk at `path` has another `holder`, if that is known.
pub(crate) fn locked(path: &Path, holder: Option<String>) -> VmError {
    let reason = match holder {
        Some(holder) => format!("it is locked by {holder}"),
        None => "it is locked by another process, of another host or one that cannot be seen here"
            .to_owned(),
    };
    VmError::Disk { path: path.to_owned(), reason }
}

/// The process on this host that holds a lock of `file`, for people.
pub(crate) fn holder(file: &Metadata) -> Option<String> {
    let (device, inode) = (file.dev(), file.ino());
    let file = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let process = numbers.into_iter().find(|number| holds(*number, &file).unwrap_or(false))?;
    Some(match vm_of(process) {
        Some(name) => format!("VM {name} (process {process})"),
        None => {
            let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            format!("process {process} ({})", name.trim())
        }
    })
}

/// Whether one of the descriptors of `process` has a lock of `file`, as proc_pid_fdinfo(5) writes both.
fn holds(process: u32, file: &str) -> io::Result<bool> {
    for entry in fs::read_dir(format!("/proc/{process}/fdinfo"))? {
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        let mut locks = text.lines().filter(|line| line.starts_with("lock:"));
        if locks.any(|line| line.split_whitespace().any(|word| word == file)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The VM that `process` keeps: its keeper was told so in a file in the VM's own directory.
fn vm_of(process: u32) -> Option<String> {
    let words = fs::read(format!("/proc/{process}/cmdline")).ok()?;
    let mut words = words.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    words.find(|word| word == "--config")?;
    let config = words.next()?;
    Some(Path::new(&*config).parent()?.file_name()?.to_str()?.to_owned())
}

/// Number of the device's driver (makedev(3)).
fn major(device: u64) -> u64 {
    ((device >> 8) & 0xfff) | ((device >> 32) & !0xfff)
}

/// Number of the device among its driver's.
fn minor(device: u64) -> u64 {
    (device & 0xff) | ((device >> 12) & !0xff)
}
