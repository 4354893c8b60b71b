//! A device's interrupt: the causes that its driver has not acknowledged yet, and the line, which is high for
//! as long as there are any.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A chain came back.
const USED: u32 = 1;
/// The configuration changed.
const CONFIG: u32 = 2;

/// Sets the level of an interrupt line. Through when it returns, so that nothing is on its way when the
/// interrupt chip is saved.
pub(crate) type Line = Box<dyn Fn(bool) + Send + Sync>;

/// The interrupt of one device.
pub(super) struct Interrupt {
    causes: Mutex<u32>,
    generation: AtomicU32,
    line: Line,
}

impl Interrupt {
    /// An interrupt on `line`, which is low.
    pub(super) fn new(line: Line) -> Self {
        Self { causes: Mutex::new(0), generation: AtomicU32::new(0), line }
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.causes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A chain came back.
    pub(super) fn used(&self) {
        self.raise(USED);
    }

    /// The configuration changed.
    pub(super) fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG);
    }

    fn raise(&self, cause: u32) {
        let mut causes = self.lock();
        let was = *causes;
        *causes |= cause;
        if was == 0 {
            (self.line)(true);
        }
    }

    /// What the driver has not acknowledged.
    pub(super) fn causes(&self) -> u32 {
        *self.lock()
    }

    /// The driver has seen `seen`.
    pub(super) fn acknowledge(&self, seen: u32) {
        let mut causes = self.lock();
        let was = *causes;
        *causes &= !seen;
        if was != 0 && *causes == 0 {
            (self.line)(false);
        }
    }

    /// How often the configuration changed.
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Takes over the state of another host's. The line's level is in the state of the interrupt chip.
    pub(super) fn load(&self, causes: u32, generation: u32) {
        *self.lock() = causes & (USED | CONFIG);
        self.generation.store(generation, Ordering::SeqCst);
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupt").field("causes", &self.causes()).finish_non_exhaustive()
    }
}
