//! A VM as its keeper holds it: what the keeper's server asks for, done to a [`Machine`]. The
//! keeper of a VM is its VMM; it ends with its guest.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use decamp_shared::keeper::{ExitRecord, ExitSignal, Harvest, Kept};
use decamp_shared::pages::{PageSet, SpaceId};
use decamp_shared::workload::{Liveness, Place, Result, Section, SpaceInfo, WorkloadError};
use fail::fail_point;

use crate::caretaker::{self, Shared};
use crate::disk::keeping::Storing;
use crate::disk::{self, Disk};
use crate::error::VmError;
use crate::interfaces::Interfaces;
use crate::keeper::{Confined, Given};
use crate::machine::Machine;
use crate::memory::GUEST_MEMORY;
use crate::needs::Needs;
use crate::spec::VmSpec;

/// Status of a guest that was switched off by force, as that of a process that was killed.
const FORCED: i32 = 128 + 9;

/// How long the lock of a disk is waited for that another host's keeper is about to give up.
const PATIENCE: Duration = Duration::from_secs(2);

/// A VM in its keeper.
#[derive(Debug)]
pub(crate) struct VmKept {
    machine: Shared,
    interfaces: Interfaces,
    exit: ExitSignal,
    end: caretaker::End,
    place: Place,
    memory_bytes: u64,
    /// Nothing has run here, and others may still write guest memory.
    incoming: bool,
    /// Disks whose content comes as pages, with what stores it.
    filling: Vec<(Arc<Disk>, Storing)>,
    confined: Confined,
}

impl VmKept {
    /// A VM of `spec` that was `given` its part of the host.
    ///
    /// # Errors
    /// When it could not be built. No instruction of the guest has run then.
    pub(crate) fn build(
        spec: &VmSpec,
        place: &Place,
        given: Given,
        incoming: bool,
        exit: ExitSignal,
    ) -> Result<Self> {
        let Given { outfit, interfaces, confined } = given;
        let (on_event, events) = caretaker::channel();
        let machine = Machine::build(spec, outfit, on_event, !incoming)?;
        let machine = caretaker::share(machine);
        let end = events.start(&machine, exit.clone())?;
        let (place, memory_bytes) = (place.clone(), spec.memory_bytes);
        let filling = Vec::new();
        Ok(Self {
            machine,
            interfaces,
            exit,
            end,
            place,
            memory_bytes,
            incoming,
            filling,
            confined,
        })
    }

    /// The machine, for as long as nobody else has it. A reset that is under way is waited for.
    fn lock(&self) -> MutexGuard<'_, Option<Machine>> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `work` to the machine, if it is still there.
    pub(crate) fn with<T>(
        &self,
        work: impl FnOnce(&mut Machine) -> crate::error::Result<T>,
    ) -> Result<T> {
        let mut machine = self.lock();
        let machine = machine.as_mut();
        let machine = machine.ok_or_else(|| WorkloadError::plain("The VM is gone already"))?;
        Ok(work(machine)?)
    }

    /// Ends it as it is, interfaces first, as ever.
    fn take_away(&mut self) {
        self.interfaces = Interfaces::default();
        drop(self.lock().take());
    }

    fn end_as(&self, record: ExitRecord) {
        self.confined.note_end(&self.place, &record);
        self.exit.raise(record);
    }

    fn space(&mut self) -> Result<SpaceInfo> {
        let page_limit = self.with(|machine| Ok(machine.memory().page_limit()))?;
        Ok(SpaceInfo { id: GUEST_MEMORY.0, page_limit, label: "guest memory".into(), process: 0 })
    }

    /// The disk whose pages are `space`, if its guest writes it.
    fn disk_of(&self, space: SpaceId) -> Result<Arc<Disk>> {
        let found = self.with(|machine| Ok(machine.disk_of(space)))?;
        found.ok_or_else(|| WorkloadError::plain(format!("A VM has no {space}")))
    }

    /// Makes room for the pages of a disk that comes.
    fn make_room(&mut self, space: &SpaceInfo) -> Result<()> {
        let disk = self.disk_of(SpaceId(space.id))?;
        if self.filling.iter().any(|(other, _)| other.space() == disk.space()) {
            return Ok(());
        }
        disk.open_to_fill(space.page_limit)?;
        let storing = Storing::start(disk.clone())?;
        self.filling.push((disk, storing));
        Ok(())
    }
}

/// A disk, for `inspect` and for the manifest.
fn facts_of(disk: &Arc<Disk>) -> serde_json::Value {
    serde_json::json!({
        "label": disk.label(),
        "path": disk.path(),
        "bytes": disk.bytes(),
        "readonly": disk.is_readonly(),
    })
}

/// A disk that is carried.
fn space_of(disk: &Arc<Disk>) -> SpaceInfo {
    SpaceInfo {
        id: disk.space().0,
        page_limit: disk.page_limit(),
        label: disk::shown(&disk.label(), &disk.path()),
        process: 0,
    }
}

impl Kept for VmKept {
    fn liveness(&self) -> Liveness {
        Liveness::Tracked { tracker: "KVM dirty log".into() }
    }

    fn facts(&mut self) -> Result<serde_json::Value> {
        let memory_bytes = self.memory_bytes;
        let networks = self.interfaces.facts();
        let confinement = self.confined.how();
        self.with(|machine| {
            let registers = machine.registers()?;
            let needs = Needs {
                vmm: env!("CARGO_PKG_VERSION").into(),
                cpuid: machine.cpuid().to_vec(),
                tsc_khz: machine.tsc_khz(),
                capabilities: machine.capabilities().to_vec(),
                msrs: registers.used,
                registers: registers.told,
            };
            Ok(serde_json::json!({
                "pid": std::process::id(),
                "memory_bytes": memory_bytes,
                "vcpu_threads": machine.vcpu_threads(),
                "console_lost_bytes": machine.console_losses(),
                "disks": machine.disks().iter().map(facts_of).collect::<Vec<_>>(),
                "needs": needs,
                "confinement": confinement,
                "networks": networks,
            }))
        })
    }

    fn spaces(&mut self) -> Result<Vec<SpaceInfo>> {
        let mut spaces = vec![self.space()?];
        spaces.extend(
            self.with(|machine| Ok(machine.carried().iter().map(space_of).collect::<Vec<_>>()))?,
        );
        Ok(spaces)
    }

    fn carry(&mut self, spaces: &[SpaceId]) -> Result<()> {
        let disks: Result<Vec<_>> = spaces.iter().map(|space| self.disk_of(*space)).collect();
        let disks = disks?;
        self.with(|machine| {
            machine.carry(disks);
            Ok(())
        })
    }

    fn mirror(&mut self, space: SpaceId, path: &Path, file: File) -> Result<()> {
        let disk = self.disk_of(space)?;
        self.with(|machine| machine.mirror(disk, file, path))
    }

    fn hold(&mut self) -> Result<()> {
        self.with(|machine| machine.hold())
    }

    fn switch(&mut self, migration: &str) -> Result<()> {
        fail_point!("vm-switch", |_| Err(WorkloadError::plain("Failpoint vm-switch")));
        let mut unknown = false;
        let switched = self.with(|machine| {
            machine.switch(|| {
                let noted = self.confined.note_switch(&self.place, migration);
                unknown = matches!(noted, Err(VmError::Unanswered(_)));
                noted
            })
        });
        if unknown {
            // Whichever files it wrote from here on could be the ones that are thrown away.
            let text = "taken away: nobody knows whether its disks went over to other files";
            self.take_away();
            self.end_as(ExitRecord { status: FORCED, text: text.into() });
        }
        switched
    }

    fn make_spaces(&mut self, spaces: &[SpaceInfo]) -> Result<()> {
        let own = self.space()?;
        for space in spaces {
            if space.id != GUEST_MEMORY.0 {
                self.make_room(space)?;
                continue;
            }
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
        let writable = self.incoming;
        if space != GUEST_MEMORY {
            return Ok(self.disk_of(space)?.descriptor(writable)?);
        }
        self.with(|machine| machine.memory_descriptor(writable))
    }

    fn track(&mut self) -> Result<()> {
        self.with(|machine| machine.track())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<Harvest> {
        self.with(|machine| machine.harvest(dirty))?;
        // Guest memory neither comes nor goes, and KVM tracks it without a stop.
        Ok(Harvest::default())
    }

    fn throttle(&mut self, percent: u8) -> Result<()> {
        self.with(|machine| machine.throttle(percent))
    }

    fn pause(&mut self) -> Result<()> {
        fail_point!("vm-pause", |_| Err(WorkloadError::plain("Failpoint vm-pause")));
        self.with(|machine| {
            // One that is not what the guest knows does not travel.
            machine.check_disks()?;
            machine.pause()
        })?;
        let disconnected = self.interfaces.disconnect();
        if disconnected.is_err() {
            self.with(|machine| machine.resume())?;
        }
        Ok(disconnected?)
    }

    fn save(&mut self) -> Result<Vec<Section>> {
        fail_point!("vm-save", |_| Err(WorkloadError::plain("Failpoint vm-save")));
        self.with(|machine| {
            let sections = machine.save()?;
            machine.store_disks()?;
            Ok(sections)
        })
    }

    /// What the destination opens where it lies is let go; it was stored before.
    fn fenced(&mut self) -> Result<()> {
        self.with(|machine| {
            machine.let_disks_go();
            Ok(())
        })
    }

    fn resume(&mut self) -> Result<()> {
        // Nothing runs, and nothing is on the network, before all of them are its own again.
        self.with(|machine| machine.take_disks(PATIENCE))?;
        let was_off = self.interfaces.is_off();
        // Before the guest runs, so that it finds what it speaks to.
        self.interfaces.reconnect();
        if let Err(error) = self.with(|machine| machine.resume()) {
            // What stands does not answer, and what runs one day is announced then.
            if was_off && let Err(error) = self.interfaces.disconnect() {
                let error = error.with_causes();
                tracing::error!(error, "A guest that stands stays on the network");
            }
            return Err(error);
        }
        if was_off {
            self.interfaces.announce();
        }
        Ok(())
    }

    fn load(&mut self, sections: Vec<Section>) -> Result<()> {
        fail_point!("vm-load", |_| Err(WorkloadError::plain("Failpoint vm-load")));
        self.with(|machine| machine.load(&sections))?;
        for (disk, storing) in self.filling.drain(..) {
            drop(storing);
            disk.filled()?;
        }
        self.with(|machine| machine.check_closed_disks())
    }

    fn activate(&mut self) -> Result<()> {
        fail_point!("vm-activate", |_| Err(WorkloadError::plain("Failpoint vm-activate")));
        self.with(|machine| machine.take_disks(PATIENCE))?;
        self.interfaces.connect()?;
        if let Err(error) = self.with(|machine| machine.run()) {
            self.interfaces.disconnect()?;
            return Err(error);
        }
        self.incoming = false;
        self.interfaces.announce();
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        self.take_away();
        Ok(())
    }

    fn discard(&mut self) -> Result<()> {
        self.take_away();
        Ok(())
    }

    fn note_end(&self, place: &Place, record: &ExitRecord) {
        self.confined.note_end(place, record);
    }

    /// Presses its power button and waits until it has switched itself off. One that has no handler for the
    /// button, is paused, or does not end in time is taken away as it is.
    fn stop(&mut self, grace: Duration) -> Result<()> {
        let listens = self.with(|machine| Ok(machine.press_power_button()))?;
        let record = if listens { self.end.wait(grace) } else { None };
        let record = record.unwrap_or_else(|| {
            let why = if listens {
                format!("did not switch itself off within {} s", grace.as_secs_f32())
            } else {
                "does not listen to its power button".into()
            };
            let text = format!("switched off by force: it {why}");
            tracing::warn!("The guest was {text}");
            ExitRecord { status: FORCED, text }
        });
        self.take_away();
        self.end_as(record);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
