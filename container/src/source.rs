//! A container as the leaving end of a session: its keeper's end, and beside it what only the agent knows,
//! for it is the agent that reads: what of the shared memory was sent.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use decamp_shared::keeper::KeeperClient;
use decamp_shared::keeper::ends::KeeperSource;
use decamp_shared::methods::Ways;
use decamp_shared::pages::{PageReader, PageSet};
use decamp_shared::workload::{
    Liveness, Manifest, Restoring, Result, Section, SourceWorkload, SpaceInfo,
};

use crate::forked;
use crate::reader::ProcessReader;
use crate::segments::sent::Sent;

/// The leaving end.
pub(crate) struct ContainerSource {
    keeper: KeeperSource,
    sent: Arc<Sent>,
    paused: bool,
    /// Compared in this pause: what stands still does not change.
    compared: bool,
    /// How long restoring may take for what can be left out, once that is known.
    spare: Option<Duration>,
}

impl ContainerSource {
    /// The container behind `client`, described by `manifest`.
    pub(crate) fn new(client: KeeperClient, manifest: Manifest) -> Result<Self> {
        let sent = Arc::new(Sent::default());
        let readers = sent.clone();
        let make_reader = move |client: &mut KeeperClient, spaces: &[SpaceInfo]| {
            ProcessReader::open(client, spaces, &readers)
        };
        let keeper = KeeperSource::new(client, manifest, Box::new(make_reader))?;
        Ok(Self { keeper, sent, paused: false, compared: false, spare: None })
    }
}

impl SourceWorkload for ContainerSource {
    fn manifest(&mut self) -> Result<Manifest> {
        self.keeper.manifest()
    }

    fn liveness(&self) -> Liveness {
        self.keeper.liveness()
    }

    fn spaces(&mut self) -> Result<Vec<SpaceInfo>> {
        self.keeper.spaces()
    }

    fn reader(&mut self) -> Result<Arc<dyn PageReader>> {
        self.keeper.reader()
    }

    fn track(&mut self) -> Result<()> {
        self.keeper.track()
    }

    /// The keeper's first: in the stop CRIU dumps beside the comparison.
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        self.keeper.harvest(dirty)?;
        if self.compared {
            return Ok(());
        }
        let spaces = self.keeper.spaces()?;
        self.sent.follow(self.keeper.client(), &spaces)?;
        self.sent.add_changed(self.paused, dirty)?;
        self.compared = self.paused;
        Ok(())
    }

    fn stall(&self) -> Duration {
        self.keeper.stall()
    }

    fn look(&self) -> Duration {
        self.keeper.look() + self.sent.look()
    }

    fn restoring(&self) -> Restoring {
        self.keeper.restoring()
    }

    fn spare(&mut self, time: Duration) {
        self.spare = Some(time);
    }

    fn call_off(&self) -> Option<Arc<AtomicBool>> {
        Some(self.sent.call_off())
    }

    fn ways(&self) -> Ways {
        self.keeper.ways()
    }

    fn throttle(&mut self, percent: u8) -> Result<()> {
        self.keeper.throttle(percent)
    }

    fn pause(&mut self) -> Result<()> {
        self.keeper.pause()?;
        self.paused = true;
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<Section>> {
        let mut sections = self.keeper.save()?;
        if sections.iter().any(|section| section.kind == forked::FORKED) {
            sections.extend(self.spare.map(forked::spare_section));
        }
        Ok(sections)
    }

    fn fence(&mut self, token: u64) -> Result<()> {
        self.keeper.fence(token)
    }

    fn resume(&mut self) -> Result<()> {
        self.keeper.resume()?;
        (self.paused, self.compared) = (false, false);
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        self.keeper.release()
    }
}
