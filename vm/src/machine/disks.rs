//! The disks of a machine, all of them: whose they are, and which of them leave as pages.

use std::sync::Arc;
use std::time::Duration;

use decamp_shared::pages::SpaceId;

use super::Machine;
use crate::disk::Disk;
use crate::error::{Result, VmError};

impl Machine {
    /// Its disks, in the order of their numbers.
    pub(crate) fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// The disk whose pages are `space`, if its guest writes it.
    pub(crate) fn disk_of(&self, space: SpaceId) -> Option<Arc<Disk>> {
        let is_it = |disk: &&Arc<Disk>| disk.space() == space && !disk.is_readonly();
        self.disks.iter().find(is_it).cloned()
    }

    /// From now on the pages of these disks are tracked, harvested and read as guest memory is, until it resumes.
    pub(crate) fn carry(&mut self, disks: Vec<Arc<Disk>>) {
        self.carried = disks;
    }

    /// The disks whose content leaves as pages.
    pub(crate) fn carried(&self) -> &[Arc<Disk>] {
        &self.carried
    }

    fn is_carried(&self, disk: &Arc<Disk>) -> bool {
        self.carried.iter().any(|carried| Arc::ptr_eq(carried, disk))
    }

    /// That each is as large as the guest knows it.
    ///
    /// # Errors
    /// For the first that is not.
    pub(crate) fn check_disks(&self) -> Result<()> {
        self.disks.iter().filter(|disk| disk.is_open()).try_for_each(|disk| disk.check_size())
    }

    /// The same of those that it does not have yet.
    ///
    /// # Errors
    /// For the first that is not, or that is not there.
    pub(crate) fn check_closed_disks(&self) -> Result<()> {
        self.disks.iter().filter(|disk| !disk.is_open()).try_for_each(|disk| disk.check_file())
    }

    /// Has every disk stored that another host may open next.
    ///
    /// # Errors
    /// For the first that cannot be.
    pub(crate) fn store_disks(&self) -> Result<()> {
        let left = |disk: &&Arc<Disk>| !disk.is_readonly() && !self.is_carried(disk);
        self.disks.iter().filter(left).try_for_each(|disk| {
            let what = || format!("store disk {}", disk.path().display());
            disk.flush().map_err(|error| VmError::refused(what(), error))
        })
    }

    /// Those that another host may write from here on are not this one's any more. What nobody writes stays open,
    /// and so does what leaves as a copy.
    pub(crate) fn let_disks_go(&self) {
        let goes = |disk: &&Arc<Disk>| !disk.is_readonly() && !self.is_carried(disk);
        self.disks.iter().filter(goes).for_each(|disk| disk.close());
    }

    /// Takes every disk that is not this machine's now, waiting for each as long as `patience`.
    ///
    /// # Errors
    /// For the first that somebody else has, or that is not what the guest knows.
    pub(crate) fn take_disks(&self, patience: Duration) -> Result<()> {
        let mut closed = self.disks.iter().filter(|disk| !disk.is_open());
        closed.try_for_each(|disk| disk.open(patience))
    }
}
