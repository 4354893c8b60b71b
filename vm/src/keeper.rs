//! How a VM's keeper begins: opens what it needs of the host, puts itself into its control groups, forks its monitor
//! off, gives up all that it can do without, and only then builds the machine.
//!
//! A host, or an agent that is itself in a container, may lack some of that. The guest runs all the same, and what it
//! is without is in the keeper's log and among its facts.

use std::io;
use std::os::fd::OwnedFd;

use decamp_shared::keeper::{
    Beginning, ExitRecord, ExitSignal, KeeperConfig, listen, note_processes, record_switch,
    serve_from, write_exit_record,
};
use decamp_shared::workload::{Place, Result, WorkloadError};
use nix::unistd::{Pid, getpid};

use crate::cgroup::Cgroups;
use crate::confinement::{Confinement, Presence};
use crate::error::VmError;
use crate::ids;
use crate::interfaces::Interfaces;
use crate::kept::VmKept;
use crate::machine::{ConsolePaths, Outfit};
use crate::monitor::{Host, Monitor, Request, clear};
use crate::spec::VmSpec;
use crate::sys::process::close_inherited;

/// What is said when a monitor ended while it noted that disks move.
const UNKNOWN: &str = "The monitor of this VM's keeper ended while it noted that disks go over to other files: the \
                       guest is ended, for only the agent can tell now which files are its disks. It can be started \
                       again when the move has ended";

/// What a VM lacks whose monitor ended.
const WITHOUT_MONITOR: &str =
    "its monitor, which has ended: the guest runs on, and can be stopped, but not moved";

/// What a VM is given of its host.
#[derive(Debug)]
pub(crate) struct Given {
    /// For the machine.
    pub(crate) outfit: Outfit,
    /// Its interfaces, as the host has them.
    pub(crate) interfaces: Interfaces,
    /// How its keeper is confined.
    pub(crate) confined: Confined,
}

/// A keeper that is confined, more or less.
#[derive(Debug, Default)]
pub(crate) struct Confined {
    /// How, when it began.
    how: Confinement,
    /// Who does for it what it may not, if there is anything.
    monitor: Option<Monitor>,
}

/// Runs the keeper of a VM until the VM was released, discarded, stopped or ended by itself.
/// It is the first thing that its process does: what that has open but for the standard streams is closed.
///
/// # Errors
/// When the VM could not be built (a file that cannot be booted, KVM that refuses) or the keeper's
/// socket could not be served. No instruction of the guest has run when it could not be built.
pub fn keeper_main(config: KeeperConfig) -> Result<()> {
    if let Err(error) = close_inherited() {
        tracing::warn!(%error, "The VM's keeper has open whatever its agent was started with");
    }
    let spec = VmSpec::parse(&config.spec)?;
    let exit = ExitSignal::new()
        .map_err(|error| WorkloadError::new("Could not make the exit signal", error))?;
    let incoming = config.beginning == Beginning::Incoming;
    let given = Given::own(&spec, &config.place, incoming)?;
    note_processes(&config.place, &[getpid().as_raw()])?;
    let listening = listen(&config.place)?;
    let given = given.confined(&spec, &config)?;
    let monitor = given.confined.monitor.clone();
    let begin = || {
        let kept = VmKept::build(&spec, &config.place, given, incoming, exit.clone())?;
        if !incoming {
            kept.with(|machine| machine.run())?;
        }
        serve_from(&listening, &config, Box::new(kept), &exit)
    };
    let ended = begin();
    // Before nobody listens any more: who comes after this one finds them gone, or makes them anew.
    match monitor.map(|monitor| monitor.ask(&Request::Clear)) {
        None => clear(
            &config.place,
            spec.vsock.map(|_| ConsolePaths::of(&config.place).vsock()).as_deref(),
        ),
        Some(Ok(_)) => {}
        Some(Err(error)) => tracing::warn!("Its sockets stay behind: {}", error.with_causes()),
    }
    ended
}

impl Given {
    /// What a VM of `spec` needs, opened by this process. No frame passes while it is `incoming`.
    ///
    /// # Errors
    /// When something cannot be opened.
    pub(crate) fn own(spec: &VmSpec, place: &Place, incoming: bool) -> Result<Self> {
        let (interfaces, nets) = Interfaces::make(spec, place, !incoming)?;
        let outfit = Outfit::own(&ConsolePaths::of(place), nets).opened(spec)?;
        Ok(Self { outfit, interfaces, confined: Confined::default() })
    }

    /// From now on `monitor` does what the keeper may not.
    pub(crate) fn monitored(mut self, monitor: Monitor) -> Self {
        self.outfit = self.outfit.monitored(&monitor);
        self.interfaces = self.interfaces.monitored(&monitor);
        self.confined.monitor = Some(monitor);
        self
    }

    /// Gives up what the keeper does not need, and leaves what it cannot do then to a monitor.
    fn confined(self, spec: &VmSpec, config: &KeeperConfig) -> Result<Self> {
        let place = &config.place;
        let mut how = Confinement::default();
        match Cgroups::of(place) {
            Ok(cgroups) => (how.controllers, how.lacks) = cgroups.enter(),
            Err(error) => how.lacks.push(format!("control groups of its own ({error})")),
        }
        let user = match take_user(spec, config) {
            Ok(user) => Some(user),
            Err(error) => {
                how.lacks.push(format!("a user of its own ({error})"));
                None
            }
        };
        let (user, held) = user.unzip();
        let vsock = spec.vsock.map(|_| ConsolePaths::of(place).vsock());
        let ports = self.interfaces.ports();
        let host = Host::of(spec, place, ports, vsock);
        let mut given = self;
        match Monitor::fork(host, user, held) {
            Ok((monitor, process)) => {
                note_processes(place, &[getpid(), process].map(Pid::as_raw))?;
                how.enter(&place.dir, user)?;
                given = given.monitored(monitor);
            }
            Err(error) => how.lacks.push(format!("a monitor, and so all rights ({error})")),
        }
        if !how.lacks.is_empty() {
            tracing::warn!(
                "The VM runs, less confined than it could be, without {}",
                how.lacks.join("; ")
            );
        }
        given.confined.how = how;
        Ok(given)
    }
}

impl Confined {
    /// How, for its users.
    pub(crate) fn how(&self) -> Confinement {
        let mut how = self.how.clone();
        how.monitor = match &self.monitor {
            None => Presence::None,
            Some(monitor) if monitor.has_ended() => Presence::Ended,
            Some(_) => Presence::Runs,
        };
        if how.monitor == Presence::Ended {
            how.lacks.push(WITHOUT_MONITOR.to_owned());
        }
        how
    }

    /// Has it noted, where it lasts, that the disks of the VM at `place` that had where to go over to went there in
    /// `migration`.
    ///
    /// # Errors
    /// When it was not, or [`VmError::Unanswered`] when nobody knows.
    pub(crate) fn note_switch(
        &self,
        place: &Place,
        migration: &str,
    ) -> std::result::Result<(), VmError> {
        match &self.monitor {
            None => record_switch(place, migration)
                .map_err(|error| VmError::refused("note that disks move", error)),
            Some(monitor) => {
                let noted = monitor.ask(&Request::Switch(migration.to_owned()));
                noted.map(drop).map_err(|error| match error {
                    VmError::Refused { source, .. } => {
                        VmError::refused("note that disks move", source)
                    }
                    VmError::Unanswered(_) => VmError::Unanswered(UNKNOWN.into()),
                    error => error,
                })
            }
        }
    }

    /// Has `record` written down for the agent.
    pub(crate) fn note_end(&self, place: &Place, record: &ExitRecord) {
        match &self.monitor {
            None => write_exit_record(place, record),
            Some(monitor) => {
                if let Err(error) = monitor.ask(&Request::Ended(record.clone())) {
                    let error = error.with_causes();
                    tracing::error!(
                        error,
                        "Cannot write down how the guest ended: {}",
                        record.text
                    );
                }
            }
        }
    }
}

/// A user of its own, and what has to be held for as long as there is this keeper. None where files of its VM could
/// not be used by one.
fn take_user(spec: &VmSpec, config: &KeeperConfig) -> io::Result<(u32, OwnedFd)> {
    let boots = [Some(&spec.kernel), spec.initrd.as_ref()].into_iter().flatten();
    let files = boots.chain(spec.disks.iter().map(|disk| &disk.path));
    if let Some(path) = ids::asked_who(files.map(|path| &**path)) {
        let path = path.display();
        return Err(io::Error::other(format!("{path} lies where only who mounted it may look")));
    }
    ids::take(config.tools.users, &config.place.users_lock(), rand::random())
}
