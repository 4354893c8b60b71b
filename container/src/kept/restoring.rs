//! Restoring: the container that CRIU makes of what came, in the place of the runtime's stand-in, and
//! memory that comes after it.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use decamp_shared::workload::Section;

use super::Container;
use crate::cgroup::cgroups_path;
use crate::dump::ms;
use crate::error::{ContainerError, Result};
use crate::init::Init;
use crate::podman;
use crate::restore::{Restore, StandIn};
use crate::terminal::Terminal;
use crate::ways;

/// Memory that comes late is there within this: it is on this host already.
const FILLED_WITHIN: Duration = Duration::from_secs(120);

impl Container {
    /// Waits until all memory of the last move is in its place.
    pub(super) fn await_memory(&mut self) -> Result<()> {
        if let Some(filling) = &self.filling {
            filling.wait(FILLED_WITHIN)?;
            self.filling = None;
        }
        if let Some(settling) = self.settling.take() {
            let _ = settling.join();
        }
        Ok(())
    }

    pub(super) fn restore(&mut self, sections: Vec<Section>) -> Result<()> {
        let begun = Instant::now();
        let restored_before =
            || ContainerError::State("The container was restored before".to_owned());
        self.stand_in.as_ref().ok_or_else(restored_before)?;
        let criu = match self.criu.take() {
            None => podman::criu(self)?,
            Some(criu) => criu,
        };
        let stand_in = self.stand_in.as_ref().ok_or_else(restored_before)?;
        let holder = self.holder.take();
        let restored = self.restoring().run(criu, sections, holder)?;
        self.filling = restored.filling;
        if let Some(network) = restored.network {
            self.network = network;
        }
        let eager = self.eager.as_deref().unwrap_or("the source hid nothing from CRIU");
        let eager = self.filling.is_none().then_some(eager);
        self.arrived = Some(ways::arrived(eager, restored.forked));
        let mut terminal = restored.terminal;
        if self.arrival.is_none() {
            self.terminal = self.keep_terminal(terminal.take())?;
        }
        let (init, config) = match &self.arrival {
            None => {
                let init = Init::watch(restored.init, &self.exit)?;
                let namespace = format!("/proc/{}/ns/net", init.pid());
                let path = cgroups_path(&self.config.place)?;
                (init, self.bundle.for_runtime(&namespace, &path))
            }
            Some(arrival) => (podman::watch(restored.init, &self.exit)?, arrival.config().clone()),
        };
        self.runtime.adopt(&stand_in.written, init.pid(), &self.bundle, &config)?;
        if let Some(arrival) = &mut self.arrival {
            arrival.restored(init.pid(), terminal)?;
        }
        self.init = Some(init);
        self.stand_in = None;
        tracing::debug!(ms = ms(begun), "Loaded");
        Ok(())
    }

    fn keep_terminal(&self, master: Option<OwnedFd>) -> Result<Option<Terminal>> {
        master.map(|master| Terminal::keep(master, &self.config.place)).transpose()
    }

    pub(crate) fn restoring(&self) -> Restore<'_> {
        Restore {
            criu: &self.config.tools.criu,
            bundle: &self.bundle,
            cgroups: &self.cgroups,
            network: &self.network,
            planned: self.planned.as_ref(),
            streams: &self.streams,
            store: &self.store,
            landing: &self.landing,
            forked: self.methods.forked,
            cgroup_namespace: self.stand_in.as_ref().and_then(StandIn::cgroup_namespace),
        }
    }
}
