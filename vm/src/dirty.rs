//! Which pages of guest memory were written: KVM's dirty log for what vCPUs write, the bitmap of
//! guest memory for what the VMM writes.
//!
//! The log is cleared, and the pages protected again, by one call a slot before any of them is
//! read (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), so a page written while it is being read is found the
//! next time.

use decamp_shared::pages::{PAGE_SIZE, PageSet};
use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, kvm_enable_cap};
use kvm_ioctls::VmFd;

use crate::error::{Result, VmError};
use crate::memory::GUEST_MEMORY;
use crate::sys::Backed;

/// Clearing is a call of its own. The log does not begin with everything set.
const MANUAL_PROTECT: u64 = 1;

/// How the tracker of one VM stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Tracker {
    /// Nothing is logged.
    #[default]
    Off,
    /// Writes are logged; what was there before has not been reported yet.
    Fresh,
    /// Writes are logged and reported.
    Following,
}

impl Tracker {
    /// Makes the log of `vm` one that is cleared by hand. Once, before any slot is logged.
    pub(crate) fn prepare(vm: &VmFd) -> Result<()> {
        let mut cap =
            kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        cap.args[0] = MANUAL_PROTECT;
        vm.enable_cap(&cap)
            .map_err(|error| VmError::refused("clear KVM's dirty log by hand", error))
    }

    /// Starts tracking, or starts it anew: everything that exists is reported once.
    pub(crate) fn start(&mut self, guest: &Backed) -> Result<()> {
        if *self == Self::Off {
            let logged = guest.log_dirty(true);
            logged.map_err(|error| VmError::refused("switch the dirty log on", error))?;
            // What the VMM wrote before this is found by its being there. Of what it gave back nothing is there,
            // here or at a destination that has had nothing yet: those pages would be read for nothing.
            guest.memory().take_own_writes(&mut PageSet::new());
        }
        *self = Self::Fresh;
        Ok(())
    }

    /// Stops tracking; harmless when it is off.
    pub(crate) fn stop(&mut self, guest: &Backed) -> Result<()> {
        if *self != Self::Off {
            let logged = guest.log_dirty(false);
            logged.map_err(|error| VmError::refused("switch the dirty log off", error))?;
        }
        *self = Self::Off;
        Ok(())
    }

    /// Adds to `dirty` what was written since the last harvest, and arms it again; everything that
    /// exists when there was none, or when nothing is tracked.
    pub(crate) fn harvest(&mut self, guest: &Backed, dirty: &mut PageSet) -> Result<()> {
        if *self != Self::Off {
            take_log(guest, dirty)?;
        }
        guest.memory().take_own_writes(dirty);
        if *self != Self::Following {
            // After the log was cleared: a page that appears from now on is in the next one.
            guest.memory().populated(dirty)?;
        }
        if *self == Self::Fresh {
            *self = Self::Following;
        }
        Ok(())
    }
}

fn take_log(guest: &Backed, dirty: &mut PageSet) -> Result<()> {
    for (slot, (start, length)) in (0u32..).zip(guest.memory().ranges()) {
        let failed = |what: &str| format!("{what} the dirty log of slot {slot}");
        let bytes = usize::try_from(length).unwrap_or(usize::MAX);
        let mut bitmap = guest
            .vm()
            .get_dirty_log(slot, bytes)
            .map_err(|error| VmError::refused(failed("read"), error))?;
        if bitmap.iter().all(|word| *word == 0) {
            continue;
        }
        let pages = u32::try_from(length / PAGE_SIZE as u64).unwrap_or(u32::MAX);
        dirty.insert_bitmap(GUEST_MEMORY, start / PAGE_SIZE as u64, &bitmap);
        guest
            .clear_dirty(slot, pages, &mut bitmap)
            .map_err(|error| VmError::refused(failed("clear"), error))?;
    }
    Ok(())
}
