//! The port of a bridge that a workload's interface hangs on: taken off the network, and put back.
//!
//! It is taken off by disabling the port: at once, without loss of carrier, and undone as fast.

use std::thread;
use std::time::{Duration, Instant};

use super::error::{NetworkError, Result};
use super::link::{Link, index_of};

/// Drops all frames, in both directions (linux/if_bridge.h).
const DISABLED: u8 = 0;
/// Passes all.
const FORWARDING: u8 = 3;
/// The kernel tells a bridge of a new carrier within this.
const CARRIER_WITHIN: Duration = Duration::from_secs(2);

/// The host's end of a workload's interface, a port of a bridge. Dropped, it stays as it is.
#[derive(Clone, Debug)]
pub struct Port {
    name: String,
    index: u32,
    /// How it was taken off the network: by its port, or, where the bridge speaks the spanning tree
    /// protocol and does not let us, by taking the interface down.
    by_port: bool,
}

impl Port {
    /// The interface called `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(name: &str) -> Result<Self> {
        Ok(Self::numbered(name, index_of(name)?))
    }

    /// The interface called `name`, of this number.
    pub fn numbered(name: &str, index: u32) -> Self {
        Self { name: name.to_owned(), index, by_port: true }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Disables the port; an error where it is none of a bridge, or the bridge keeps its ports to itself.
    ///
    /// # Errors
    /// The kernel's.
    pub fn disable(&self) -> Result<()> {
        Link::set_port_state(self.index, DISABLED)
            .map_err(NetworkError::refused(format!("keep {} from forwarding", self.name)))
    }

    /// Has the port pass frames again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn enable(&self) -> Result<()> {
        Link::set_port_state(self.index, FORWARDING)
            .map_err(NetworkError::refused(format!("let {} forward again", self.name)))
    }

    /// Takes the interface off the network: nothing in, nothing out. Twice is as good as once.
    ///
    /// # Errors
    /// When it can be by no means.
    pub fn disconnect(&mut self) -> Result<()> {
        if let Err(error) = self.disable() {
            tracing::debug!(%error, link = self.name, "The bridge keeps its ports to itself; taking the interface down");
            self.by_port = false;
            self.set_up(false)?;
        }
        Ok(())
    }

    /// Puts the interface back. Twice is as good as once.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn connect(&mut self) -> Result<()> {
        if !self.by_port {
            self.set_up(true)?;
            self.by_port = true;
            return Ok(());
        }
        self.enable()
    }

    /// Puts the interface back after somebody took its carrier, turned the spanning tree protocol
    /// on, or took the port out of its bridge; as far as can be.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn reconnect(&mut self) -> Result<()> {
        let Err(error) = self.connect() else { return Ok(()) };
        tracing::warn!(%error, link = self.name, "Taking the interface down and up");
        // The bridge enables the port of an interface that comes up; one that is up does not.
        self.by_port = false;
        self.set_up(false)?;
        self.connect()
    }

    fn set_up(&self, up: bool) -> Result<()> {
        Link::find(&self.name)?.set_up(up)
    }

    /// Waits until the kernel has noticed that both ends are up: what the bridge then does to the port
    /// would undo what we do to it.
    ///
    /// # Errors
    /// When it does not.
    pub fn await_carrier(&self) -> Result<()> {
        let begun = Instant::now();
        while !Link::find(&self.name)?.is_running {
            if begun.elapsed() > CARRIER_WITHIN {
                return Err(NetworkError::State(format!("{} did not come up", self.name)));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}
