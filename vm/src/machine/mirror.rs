//! Disks of a machine that go over to other files of the host while the guest runs: followed without its memory,
//! held for an instant, and switched all together or not at all. Who fills those files is not known here.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use decamp_shared::pages::PageSet;

use super::{Machine, Tracker};
use crate::disk::Disk;
use crate::error::{Result, VmError};

/// How far that is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mirroring {
    /// All that the disks hold was given.
    harvested: bool,
    /// Their devices stand.
    held: bool,
}

impl Machine {
    /// From now on writes to `disk` are noted, until the machine is resumed; it will go over to `file`, which stands
    /// at `path`.
    ///
    /// # Errors
    /// When the guest has ended, anything else is followed, or the file is none that a disk can go over to.
    pub(crate) fn mirror(&mut self, disk: Arc<Disk>, file: File, path: &Path) -> Result<()> {
        self.must_live()?;
        let others = self.mirroring.is_none() && !self.carried.is_empty();
        let late = self.mirroring.is_some_and(|mirroring| mirroring.harvested);
        let twice = self.carried.iter().any(|carried| Arc::ptr_eq(carried, &disk));
        if self.paused || self.tracker != Tracker::Off || others || late || twice {
            return Err(VmError::State(format!(
                "{} cannot move alone while more of the VM is moving",
                disk.label()
            )));
        }
        disk.give_next(file, path)?;
        disk.track();
        self.carried.push(disk);
        self.mirroring.get_or_insert_default();
        Ok(())
    }

    /// Adds what was written of the disks that are mirrored; at first all that they hold.
    pub(super) fn harvest_mirrored(&mut self, dirty: &mut PageSet) -> Result<()> {
        let Some(mirroring) = &mut self.mirroring else { return Ok(()) };
        let all = !mirroring.harvested;
        self.carried.iter().try_for_each(|disk| disk.harvest(all, dirty))?;
        mirroring.harvested = true;
        Ok(())
    }

    /// The guest runs, and its disks that are mirrored do nothing until they are switched, or it is resumed.
    ///
    /// # Errors
    /// When none is mirrored, or one has no device.
    pub(crate) fn hold(&mut self) -> Result<()> {
        let Some(mirroring) = &mut self.mirroring else {
            return Err(VmError::State("No disk of this VM is being moved".to_owned()));
        };
        mirroring.held = true;
        for disk in &self.carried {
            if !self.ports.virtio().hold(&disk.label()) {
                return Err(VmError::State(format!("There is no device of {}", disk.label())));
            }
        }
        Ok(())
    }

    /// The disks that are held go over to their new files and go on; `record` says so where it lasts, before anything
    /// is written to those. On an error all stay where they are, held.
    ///
    /// # Errors
    /// When they are not held, were written since the last harvest, or `record` says so.
    pub(crate) fn switch(&mut self, record: impl FnOnce() -> Result<()>) -> Result<()> {
        if !self.mirroring.is_some_and(|mirroring| mirroring.held && mirroring.harvested) {
            return Err(VmError::State("The disks of this VM are not held".to_owned()));
        }
        self.carried.iter().try_for_each(|disk| disk.check_next())?;
        record()?;
        // From here on nothing fails.
        for disk in self.carried.drain(..) {
            disk.go_over();
            disk.stop_tracking();
        }
        for (spec, disk) in self.spec.disks.iter_mut().zip(&self.disks) {
            spec.path = disk.path();
        }
        self.end_mirroring();
        Ok(())
    }

    /// What is mirrored stays where it is; what was held goes on.
    pub(super) fn end_mirroring(&mut self) {
        if self.mirroring.take().is_some() {
            self.carried.iter().for_each(|disk| disk.drop_next());
            self.ports.virtio().let_go_on();
        }
    }

    /// That nothing is mirrored.
    pub(super) fn must_not_mirror(&self) -> Result<()> {
        match self.mirroring {
            None => Ok(()),
            Some(_) => Err(VmError::State("A disk of this VM is moving alone".to_owned())),
        }
    }
}
