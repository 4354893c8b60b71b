//! The one thing that the standard library does not do: hear SIGTERM.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};

const SIGTERM: c_int = 15;
static STOP: AtomicBool = AtomicBool::new(false);

unsafe extern "C" {
    fn signal(number: c_int, handler: extern "C" fn(c_int)) -> usize;
}

extern "C" fn note(_: c_int) {
    STOP.store(true, Ordering::Relaxed);
}

pub(super) fn stop_on_sigterm() {
    // SAFETY: the handler only stores to an atomic, which is safe in a signal handler, and lives for ever.
    unsafe { signal(SIGTERM, note) };
}

pub(super) fn told_to_stop() -> bool {
    STOP.load(Ordering::Relaxed)
}
