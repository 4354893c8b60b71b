//! A guest's console as its devices see it: by which of them it prints, the serial port or the virtio console. Who
//! looks on and types is [`decamp_shared::console`]'s.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use decamp_shared::console;
pub(crate) use decamp_shared::console::{Console, Keyboard, Listening};

use crate::error::{Result, VmError};

/// By which of its devices a guest prints. What is typed goes to the one it used last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Voice {
    /// The serial port, which every kernel and firmware knows.
    #[default]
    Serial,
    /// The virtio console.
    Virtio,
}

/// Where a guest's output goes. Clones write to the same places.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    places: console::Output,
    voice: Voice,
    /// Whether the virtio console was heard last.
    virtio: Arc<AtomicBool>,
}

impl Output {
    /// Output that is appended to `log`, made when it is not there.
    #[cfg(test)]
    pub(crate) fn to_log(log: &std::path::Path) -> Result<Self> {
        console::Output::to_log(log).map(Self::new).map_err(VmError::Console)
    }

    /// Output to a log that is open already.
    pub(crate) fn to(log: console::Log) -> Result<Self> {
        let places = console::Output::to(log);
        places.map(Self::new).map_err(|error| VmError::refused("make the console's output", error))
    }

    /// Output that nobody sees until there are clients.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn nowhere() -> Self {
        Self::new(console::Output::nowhere().expect("an event descriptor"))
    }

    fn new(places: console::Output) -> Self {
        Self { places, voice: Voice::default(), virtio: Arc::default() }
    }

    /// The places, for the console that shows them.
    pub(crate) fn places(&self) -> console::Output {
        self.places.clone()
    }

    /// The same places for another voice.
    pub(crate) fn of(&self, voice: Voice) -> Self {
        Self { voice, ..self.clone() }
    }

    /// Which voice was heard last.
    pub(crate) fn heard(&self) -> Voice {
        if self.virtio.load(Ordering::SeqCst) { Voice::Virtio } else { Voice::Serial }
    }

    /// As if `voice` had been heard last.
    pub(crate) fn hear(&self, voice: Voice) {
        self.virtio.store(voice == Voice::Virtio, Ordering::SeqCst);
    }

    /// `bytes` that could not be taken count as lost.
    pub(crate) fn lose(&self, bytes: u64) {
        self.places.lose(bytes);
    }

    /// Bytes that some place could not take.
    pub(crate) fn lost(&self) -> u64 {
        self.places.lost()
    }
}

/// Whether a machine takes what is typed. While it stands it does not: its state may be read already, and what
/// is in no state is in no machine. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gate(Arc<Mutex<bool>>);

impl Gate {
    /// From when this returns what is typed is taken, or nothing of it is.
    pub(crate) fn set(&self, is_open: bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = is_open;
    }

    /// Has `take` take something, if anything is taken now; how much was. Who is told of none tries again.
    pub(crate) fn pass(&self, take: impl FnOnce() -> usize) -> usize {
        let is_open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Held meanwhile: nothing is half taken when the machine stands.
        if *is_open { take() } else { 0 }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hear(self.voice);
        self.places.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.places.flush()
    }
}
