//! A VM as its keeper holds it: what the keeper's server asks for, done to a [`Machine`]. The
//! keeper of a VM is its VMM; it ends with its guest.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use decamp_shared::keeper::{
    Beginning, ExitRecord, ExitSignal, Harvest, KeeperConfig, Kept, serve,
};
use decamp_shared::pages::{PageSet, SpaceId};
use decamp_shared::workload::{Liveness, Place, Result, Section, SpaceInfo, WorkloadError};
use fail::fail_point;

use crate::backend::console_socket;
use crate::host;
use crate::machine::{ConsolePaths, Machine};
use crate::memory::GUEST_MEMORY;
use crate::needs::Needs;
use crate::spec::VmSpec;

/// Runs the keeper of a VM until the VM was released, discarded, stopped or ended by itself.
///
/// # Errors
/// When the VM could not be built (a file that cannot be booted, KVM that refuses) or the keeper's
/// socket could not be served. No instruction of the guest has run when it could not be built.
pub fn keeper_main(config: KeeperConfig) -> Result<()> {
    let spec = VmSpec::parse(&config.spec)?;
    let exit = ExitSignal::new()
        .map_err(|error| WorkloadError::new("Could not make the exit signal", error))?;
    let incoming = config.beginning == Beginning::Incoming;
    let mut kept = VmKept::build(&spec, &config.place, incoming, exit.clone())?;
    if !incoming {
        kept.machine()?.run()?;
    }
    serve(&config, Box::new(kept), &exit)
}

/// A VM in its keeper.
#[derive(Debug)]
struct VmKept {
    machine: Option<Machine>,
    memory_bytes: u64,
    /// Nothing has run here, and others may still write guest memory.
    incoming: bool,
}

impl VmKept {
    fn build(spec: &VmSpec, place: &Place, incoming: bool, exit: ExitSignal) -> Result<Self> {
        let console = ConsolePaths { log: place.log(), socket: console_socket(place) };
        let on_end = Arc::new(move |record: ExitRecord| exit.raise(record));
        let machine = if incoming {
            Machine::empty(spec, &console, on_end)
        } else {
            Machine::boot(spec, &console, on_end)
        }?;
        Ok(Self { machine: Some(machine), memory_bytes: spec.memory_bytes, incoming })
    }

    fn machine(&mut self) -> Result<&mut Machine> {
        self.machine.as_mut().ok_or_else(|| WorkloadError::plain("The VM is gone already"))
    }

    fn space(&mut self) -> Result<SpaceInfo> {
        let page_limit = self.machine()?.memory().page_limit();
        Ok(SpaceInfo { id: GUEST_MEMORY.0, page_limit, label: "guest memory".into(), process: 0 })
    }
}

impl Kept for VmKept {
    fn liveness(&self) -> Liveness {
        Liveness::Tracked { tracker: "KVM dirty log".into() }
    }

    fn facts(&mut self) -> Result<serde_json::Value> {
        let memory_bytes = self.memory_bytes;
        let capabilities = host::capabilities(&host::open_kvm()?);
        let machine = self.machine()?;
        let needs = Needs {
            vmm: env!("CARGO_PKG_VERSION").into(),
            cpuid: machine.cpuid().to_vec(),
            tsc_khz: machine.tsc_khz(),
            capabilities,
        };
        Ok(serde_json::json!({
            "pid": std::process::id(),
            "memory_bytes": memory_bytes,
            "vcpu_threads": machine.vcpu_threads(),
            "console_lost_bytes": machine.console_losses(),
            "needs": needs,
        }))
    }

    fn spaces(&mut self) -> Result<Vec<SpaceInfo>> {
        Ok(vec![self.space()?])
    }

    fn make_spaces(&mut self, spaces: &[SpaceInfo]) -> Result<()> {
        let own = self.space()?;
        for space in spaces {
            if (space.id, space.page_limit) != (own.id, own.page_limit) {
                return Err(WorkloadError::plain(format!(
                    "Space {} with {} pages is not the guest memory of this VM, which is space {} \
                     with {} pages",
                    space.id, space.page_limit, own.id, own.page_limit
                )));
            }
        }
        Ok(())
    }

    fn memory(&mut self, space: SpaceId) -> Result<OwnedFd> {
        if space != GUEST_MEMORY {
            return Err(WorkloadError::plain(format!("A VM has no {space}")));
        }
        let writable = self.incoming;
        Ok(self.machine()?.memory().descriptor(writable)?)
    }

    fn track(&mut self) -> Result<()> {
        Ok(self.machine()?.track()?)
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<Harvest> {
        self.machine()?.harvest(dirty)?;
        // Guest memory neither comes nor goes, and KVM tracks it without a stop.
        Ok(Harvest::default())
    }

    fn throttle(&mut self, percent: u8) -> Result<()> {
        Ok(self.machine()?.throttle(percent)?)
    }

    fn pause(&mut self) -> Result<()> {
        fail_point!("vm-pause", |_| Err(WorkloadError::plain("Failpoint vm-pause")));
        Ok(self.machine()?.pause()?)
    }

    fn save(&mut self) -> Result<Vec<Section>> {
        fail_point!("vm-save", |_| Err(WorkloadError::plain("Failpoint vm-save")));
        Ok(self.machine()?.save()?)
    }

    fn resume(&mut self) -> Result<()> {
        Ok(self.machine()?.resume()?)
    }

    fn load(&mut self, sections: Vec<Section>) -> Result<()> {
        fail_point!("vm-load", |_| Err(WorkloadError::plain("Failpoint vm-load")));
        Ok(self.machine()?.load(&sections)?)
    }

    fn activate(&mut self) -> Result<()> {
        fail_point!("vm-activate", |_| Err(WorkloadError::plain("Failpoint vm-activate")));
        self.machine()?.run()?;
        self.incoming = false;
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        self.machine = None;
        Ok(())
    }

    fn discard(&mut self) -> Result<()> {
        self.machine = None;
        Ok(())
    }

    /// A guest of this version has no power button that it could be asked by (no ACPI), so it is
    /// taken away at once.
    fn stop(&mut self, _grace: Duration) -> Result<()> {
        self.machine = None;
        Ok(())
    }
}
