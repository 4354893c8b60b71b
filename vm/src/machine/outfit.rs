//! What a machine is given of its host, opened or to be opened: files, KVM, its console's log and sockets.

use std::path::{Path, PathBuf};

use decamp_shared::console::Log;
use decamp_shared::workload::Place;
use kvm_ioctls::Kvm;

use crate::console::Listening;
use crate::devices::VSOCK_SOCKET;
use crate::error::{Result, VmError};
use crate::files::Files;
use crate::monitor::Monitor;
use crate::spec::VmSpec;
use crate::virtio::bus::Named;
use crate::virtio::vsock::Way;

/// Where a machine's console goes.
#[derive(Clone, Debug)]
pub(crate) struct ConsolePaths {
    /// What the guest prints is appended here.
    pub(crate) log: PathBuf,
    /// Socket for clients.
    pub(crate) socket: PathBuf,
}

impl ConsolePaths {
    /// Those of the keeper at `place`.
    pub(crate) fn of(place: &Place) -> Self {
        Self { log: place.log(), socket: place.console() }
    }

    /// Where programs of the host meet those of the guest, beside the console's socket.
    pub(crate) fn vsock(&self) -> PathBuf {
        self.socket.with_file_name(VSOCK_SOCKET)
    }
}

/// The same, opened.
#[derive(Debug)]
pub(crate) struct Ends {
    /// What the guest prints goes here.
    pub(super) log: Log,
    /// Where clients of the console come.
    pub(super) console: Listening,
    /// Where programs come that want to speak to the guest's, with how it reaches those that wait for it.
    pub(super) vsock: Option<(Listening, Way)>,
}

impl Ends {
    /// Opens what is at `paths`, and what `spec` wants beside it.
    ///
    /// # Errors
    /// When the log cannot be opened, or nobody can listen there.
    pub(crate) fn open(paths: &ConsolePaths, spec: &VmSpec) -> Result<Self> {
        let failed = |path: &Path, what: &str| {
            let what = format!("{what} {}", path.display());
            move |error| VmError::refused(what, error)
        };
        let log = Log::open(&paths.log).map_err(failed(&paths.log, "open the console log"))?;
        let listen =
            |path: &Path| Listening::at(path).map_err(failed(path, "listen on the socket"));
        let vsock = match spec.vsock {
            Some(_) => Some((listen(&paths.vsock())?, Way::Path(paths.vsock()))),
            None => None,
        };
        Ok(Self { log, console: listen(&paths.socket)?, vsock })
    }
}

/// What a machine is given.
#[derive(Debug)]
pub(crate) struct Outfit {
    /// How its files are opened.
    pub(super) files: Files,
    /// Opened when it is needed, where it is not yet.
    pub(super) kvm: Option<Kvm>,
    /// Likewise.
    pub(super) ends: Option<Ends>,
    /// Where those are.
    pub(super) paths: ConsolePaths,
    /// Its interfaces.
    pub(super) nets: Vec<Named>,
}

impl Outfit {
    /// That of a machine that opens all of it by itself.
    pub(crate) fn own(paths: &ConsolePaths, nets: Vec<Named>) -> Self {
        Self { files: Files::Own, kvm: None, ends: None, paths: paths.clone(), nets }
    }

    /// The same, opened now as far as can be.
    ///
    /// # Errors
    /// When something cannot.
    pub(crate) fn opened(mut self, spec: &VmSpec) -> Result<Self> {
        self.kvm = Some(crate::host::open_kvm()?);
        self.ends = Some(Ends::open(&self.paths, spec)?);
        Ok(self)
    }

    /// From now on `monitor` opens what is still to be opened.
    pub(crate) fn monitored(mut self, monitor: &Monitor) -> Self {
        self.files = Files::Monitored(monitor.clone());
        if let Some((_, way)) = self.ends.as_mut().and_then(|ends| ends.vsock.as_mut()) {
            *way = Way::Monitored(monitor.clone());
        }
        self
    }

    /// KVM.
    pub(super) fn take_kvm(&mut self) -> Result<Kvm> {
        self.kvm.take().map_or_else(crate::host::open_kvm, Ok)
    }

    /// The console's ends.
    pub(super) fn take_ends(&mut self, spec: &VmSpec) -> Result<Ends> {
        self.ends.take().map_or_else(|| Ends::open(&self.paths, spec), Ok)
    }
}
