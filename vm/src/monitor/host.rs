//! What a monitor does of what it is asked for: to the files, ports and sockets of its one VM, and to no others.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use decamp_shared::keeper::{ExitRecord, record_switch, write_exit_record};
use decamp_shared::network::Port;
use decamp_shared::workload::Place;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::disks::Disks;
use super::{Change, Request};
use crate::disk::lock;
use crate::error::with_causes;
use crate::files::{Files, open_boot_file};
use crate::spec::VmSpec;
use crate::virtio::vsock::reach;

/// The one VM's part of the host.
#[derive(Debug)]
pub(crate) struct Host {
    /// What it boots from, by their paths.
    spec: VmSpec,
    disks: Disks,
    /// Its directory.
    place: Place,
    /// The host's ends of its interfaces, by number.
    ports: Vec<Port>,
    /// Where its sockets meet those of the host, if it has any.
    vsock: Option<PathBuf>,
}

/// What was asked for.
#[derive(Debug, Default)]
pub(super) struct Done {
    pub(super) descriptor: Option<OwnedFd>,
    pub(super) text: String,
}

/// Why it was not done.
#[derive(Debug)]
pub(super) enum Failure {
    Kernel(io::Error),
    Text(String),
    /// Nobody knows whether it was done.
    Unanswered(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Kernel(error)
    }
}

fn opened(file: impl Into<OwnedFd>) -> Done {
    Done { descriptor: Some(file.into()), text: String::new() }
}

fn none_such() -> Failure {
    Failure::Kernel(io::Error::from_raw_os_error(libc::ENOENT))
}

impl Host {
    /// That of the VM of `spec` at `place`, with `ports` and, if it has sockets, those at `vsock`.
    pub(crate) fn of(
        spec: &VmSpec,
        place: &Place,
        ports: Vec<Port>,
        vsock: Option<PathBuf>,
    ) -> Self {
        let (disks, spec) = (Disks::of(spec), spec.clone());
        Self { spec, disks, place: place.clone(), ports, vsock }
    }

    /// The VM's name.
    pub(super) fn name(&self) -> &str {
        &self.place.name
    }

    /// Does it.
    pub(super) fn act(
        &mut self,
        request: &Request,
        descriptor: Option<OwnedFd>,
    ) -> Result<Done, Failure> {
        match request {
            Request::Disk { number, write } => Ok(opened(self.disks.open(*number, *write)?)),
            Request::Kernel => Ok(opened(open_boot_file(&self.spec.kernel)?)),
            Request::Initrd => {
                let path = self.spec.initrd.as_ref().ok_or_else(none_such)?;
                Ok(opened(open_boot_file(path)?))
            }
            Request::Again { write } => {
                let file = descriptor.ok_or_else(none_such)?;
                Ok(opened(open_again(&File::from(file), *write)?))
            }
            Request::Next { number } => {
                let file = File::from(descriptor.ok_or_else(none_such)?);
                self.disks.give_next(*number, &file)?;
                Ok(Done::default())
            }
            Request::Stay { number } => {
                self.disks.drop_next(*number)?;
                Ok(Done::default())
            }
            Request::Switch(migration) => {
                self.disks.go_over(|| record_switch(&self.place, migration))?;
                Ok(Done::default())
            }
            Request::Holder => {
                let file = File::from(descriptor.ok_or_else(none_such)?);
                let text = lock::holder(&file.metadata()?).unwrap_or_default();
                Ok(Done { descriptor: None, text })
            }
            Request::Port { number, change } => self.change(*number, *change),
            Request::Reach { port } => {
                let path = self.vsock.as_ref().ok_or_else(none_such)?;
                Ok(opened(reach(path, *port)?))
            }
            Request::Ended(record) => {
                // It is shown on terminals, which control characters have do things.
                let text = record.text.chars().map(|it| if it.is_control() { ' ' } else { it });
                let record = ExitRecord { status: record.status, text: text.collect() };
                write_exit_record(&self.place, &record);
                Ok(Done::default())
            }
            Request::Clear => {
                clear(&self.place, self.vsock.as_deref());
                Ok(Done::default())
            }
        }
    }

    fn change(&mut self, number: u8, change: Change) -> Result<Done, Failure> {
        let port = self.ports.get_mut(usize::from(number)).ok_or_else(none_such)?;
        let changed = match change {
            Change::Disconnect => port.disconnect(),
            Change::Connect => port.connect(),
            Change::Reconnect => port.reconnect(),
        };
        changed.map(|()| Done::default()).map_err(|error| Failure::Text(with_causes(&error)))
    }
}

/// Opens what `file` is once more, with a position and locks of its own, and with no more rights than `file` has.
fn open_again(file: &File, write: bool) -> io::Result<OwnedFd> {
    let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL)?);
    let kind = file.metadata()?.file_type();
    let may = match flags & OFlag::O_ACCMODE {
        OFlag::O_RDWR => true,
        OFlag::O_RDONLY => !write && !flags.contains(OFlag::O_PATH),
        _ => false,
    };
    if !may || !(kind.is_file() || kind.is_block_device()) {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    Files::Own.again(file.as_fd(), write)
}

/// Removes what a keeper that ends leaves in its directory and nobody has a use for: its sockets, and a log in which
/// there is nothing.
pub(crate) fn clear(place: &Place, vsock: Option<&Path>) {
    let (socket, console, log) = (place.socket(), place.console(), place.log());
    for path in [Some(&*socket), Some(&*console), vsock, Some(&*log)].into_iter().flatten() {
        let Ok(meta) = fs::symlink_metadata(path) else { continue };
        let kind = meta.file_type();
        let is_useless = kind.is_socket() || (path == log && kind.is_file() && meta.len() == 0);
        if is_useless && let Err(error) = fs::remove_file(path) {
            tracing::warn!(%error, path = %path.display(), "Cannot remove what is left");
        }
    }
}
