//! What comes into a disk is stored while more of it comes, so that little is left to be stored while the guest
//! stands still.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Disk;
use crate::error::{Result, VmError};

/// Between two times.
const EVERY: Duration = Duration::from_millis(500);

/// Stores what comes into a disk, until this is dropped.
#[derive(Debug)]
pub(crate) struct Storing {
    ends: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Storing {
    /// Begins to store what comes into `disk`, which is open.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub(crate) fn start(disk: Arc<Disk>) -> Result<Self> {
        let ends = Arc::new((Mutex::new(false), Condvar::new()));
        let told = ends.clone();
        let name = format!("store-{}", disk.label());
        let run = move || {
            let (ended, changed) = &*told;
            let mut held = ended.lock().unwrap_or_else(PoisonError::into_inner);
            while !*held {
                let waited = changed.wait_timeout(held, EVERY);
                held = waited.unwrap_or_else(PoisonError::into_inner).0;
                if *held {
                    return;
                }
                drop(held);
                // The disk keeps this, and says it in the end: the kernel would not say it twice.
                if let Err(error) = disk.flush() {
                    tracing::warn!("Cannot store what comes into {}: {error}", disk.label());
                    return;
                }
                held = ended.lock().unwrap_or_else(PoisonError::into_inner);
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(run);
        let thread = thread
            .map_err(|error| VmError::refused("start the thread that stores a disk", error))?;
        Ok(Self { ends, thread: Some(thread) })
    }
}

impl Drop for Storing {
    fn drop(&mut self) {
        let (ended, changed) = &*self.ends;
        *ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
