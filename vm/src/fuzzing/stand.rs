//! A device with all that it has around it: guest memory, and at its host's end whatever it speaks to. What the guest
//! does to it is the driver's business.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use decamp_shared::network::Mac;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::gettid;

use super::script::Script;
use crate::console::Output;
use crate::disk::Disk;
use crate::memory::Memory;
use crate::spec::DiskSpec;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::bus::Named;
use crate::virtio::console::{Typing, VirtioConsole};
use crate::virtio::net::{Frames, Knowledge, Net};
use crate::virtio::rng::Rng;
use crate::virtio::tried::Tried;
use crate::virtio::vsock::Vsock;

/// Bytes of guest memory.
pub(super) const MEMORY: u64 = 1 << 20;
/// Kinds of device, a disk that cannot be written among them.
pub(super) const KINDS: usize = 7;
/// Bytes of the disk.
const DISK: u64 = 64 << 10;
/// The port of the host where somebody waits for the guest.
pub(super) const PORT: u32 = 7;
/// The most programs at the other ends of sockets.
const MOST_PROGRAMS: usize = 8;
/// The guest's identifier among those that have sockets.
pub(super) const CID: u32 = 3;

/// The host of one device.
pub(super) struct Stand {
    pub(super) memory: Memory,
    end: End,
}

/// What a device speaks to.
enum End {
    Nothing(fn() -> Named),
    Console(Typing),
    Sockets(Sockets),
    Disk(Arc<Disk>),
    /// The device's end, and the other.
    Net(UnixDatagram, UnixDatagram),
}

/// Programs of the host, where the guest's sockets lead.
struct Sockets {
    path: PathBuf,
    listener: UnixListener,
    programs: Vec<UnixStream>,
}

impl Stand {
    /// A stand for a device of kind `which`; nothing when this host has none to give.
    pub(super) fn new(which: usize) -> Option<Self> {
        let end = match which % KINDS {
            0 => End::Nothing(|| Named::new("rng", Rng)),
            1 => End::Nothing(|| Named::new("balloon", Balloon::default())),
            2 => End::Console(Typing::new().ok()?),
            3 => End::Sockets(Sockets::new()?),
            4 => {
                let (ours, theirs) = UnixDatagram::pair().ok()?;
                ours.set_nonblocking(true).ok()?;
                theirs.set_nonblocking(true).ok()?;
                End::Net(ours, theirs)
            }
            5 => End::Disk(disk(false)?),
            _ => End::Disk(disk(true)?),
        };
        Some(Self { memory: Memory::create(MEMORY).ok()?, end })
    }

    /// The device as it is made, with the state of nobody. There is one at a time.
    pub(super) fn tried(&self) -> Option<Tried> {
        let Named { label, device } = match &self.end {
            End::Nothing(make) => make(),
            End::Console(typing) => {
                Named::new("console", VirtioConsole::new(&Output::nowhere(), typing))
            }
            End::Sockets(sockets) => Named::new("vsock", Vsock::new(CID, &sockets.path).ok()?),
            End::Disk(disk) => Named::new(disk.label(), Block::new(disk.clone())),
            End::Net(ours, _) => {
                let frames = Frames::socket(ours.try_clone().ok()?.into());
                let mac = Mac([2, 0, 0, 0, 0, 1]);
                Named::new("net0", Net::new(frames, mac, 1500, Knowledge::default()))
            }
        };
        Tried::new(&label, device, self.memory.map()).ok()
    }

    /// Something happens at the other end.
    pub(super) fn act(&mut self, script: &mut Script<'_>) {
        match &mut self.end {
            End::Nothing(_) | End::Disk(_) => {}
            End::Console(typing) => {
                let count = script.byte();
                typing.type_in(script.bytes(count.into()));
            }
            End::Net(_, theirs) => {
                let length = usize::from(script.short() % 4096);
                let mut frame = script.bytes(length.min(64)).to_vec();
                frame.resize(length, 0);
                // When the device takes none, frames are lost.
                let _ = theirs.send(&frame);
                while theirs.recv(&mut frame).is_ok() {}
            }
            End::Sockets(sockets) => sockets.act(script),
        }
    }
}

impl Sockets {
    fn new() -> Option<Self> {
        // A name of this thread's own.
        let name = format!("decamp-tried-{}-{}", std::process::id(), gettid());
        let path = std::env::temp_dir().join(name);
        let _ = fs::remove_file(waiting(&path));
        let listener = UnixListener::bind(waiting(&path)).ok()?;
        listener.set_nonblocking(true).ok()?;
        Some(Self { path, listener, programs: Vec::new() })
    }

    fn act(&mut self, script: &mut Script<'_>) {
        let what = script.byte();
        let which = usize::from(what / 8) % self.programs.len().max(1);
        match what % 8 {
            0 => {
                let line = format!("CONNECT {}\n", script.byte());
                self.call(line.as_bytes());
            }
            1 => {
                let count = script.byte() % 32;
                self.call(script.bytes(count.into()));
            }
            2 => {
                if let Ok((stream, _)) = self.listener.accept() {
                    self.keep(stream);
                }
            }
            3 | 4 => {
                let length = usize::from(script.short());
                if let Some(program) = self.programs.get_mut(which) {
                    let _ = program.write(&vec![what; length]);
                }
            }
            5 => {
                if let Some(program) = self.programs.get_mut(which) {
                    let _ = program.read(&mut [0; 8192]);
                }
            }
            6 => {
                if let Some(program) = self.programs.get(which) {
                    let _ = program.shutdown(std::net::Shutdown::Write);
                }
            }
            _ if !self.programs.is_empty() => drop(self.programs.swap_remove(which)),
            _ => {}
        }
    }

    /// A program comes and says `line`.
    fn call(&mut self, line: &[u8]) {
        if let Ok(mut stream) = UnixStream::connect(&self.path) {
            let _ = stream.write(line);
            self.keep(stream);
        }
    }

    fn keep(&mut self, stream: UnixStream) {
        if self.programs.len() < MOST_PROGRAMS && stream.set_nonblocking(true).is_ok() {
            self.programs.push(stream);
        }
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        let _ = fs::remove_file(waiting(&self.path));
    }
}

/// The name of the socket where a program waits for the guest at the port, beside `path`.
fn waiting(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{PORT}"));
    name.into()
}

/// A disk in memory.
fn disk(readonly: bool) -> Option<Arc<Disk>> {
    let file = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC).ok()?);
    file.set_len(DISK).ok()?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    let disk = Disk::new(0, &DiskSpec { path, readonly, ..DiskSpec::default() });
    disk.open(Duration::ZERO).ok()?;
    disk.track();
    Some(Arc::new(disk))
}
