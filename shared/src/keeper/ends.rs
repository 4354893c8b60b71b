//! A keeper's workload as the two ends of a session see it, the same for both kinds.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};

use super::{KeeperClient, Phase};
use crate::pages::{PageRange, PageReader, PageSet, PageWriter, SpaceId};
use crate::workload::{
    DestinationWorkload, Liveness, Manifest, Result, Section, SourceWorkload, SpaceInfo,
    WorkloadError,
};

/// Makes a reader of the spaces given, through the keeper where it must.
pub type ReaderFactory =
    Box<dyn Fn(&mut KeeperClient, &[SpaceInfo]) -> Result<Arc<dyn PageReader>> + Send>;

/// The leaving end.
pub struct KeeperSource {
    client: KeeperClient,
    manifest: Manifest,
    liveness: Liveness,
    make_reader: ReaderFactory,
}

impl KeeperSource {
    /// The workload behind `client`, described by `manifest`; `make_reader` reads its memory.
    ///
    /// # Errors
    /// When the keeper does not answer.
    pub fn new(
        mut client: KeeperClient,
        manifest: Manifest,
        make_reader: ReaderFactory,
    ) -> Result<Self> {
        let liveness = client.liveness()?;
        Ok(Self { client, manifest, liveness, make_reader })
    }
}

impl SourceWorkload for KeeperSource {
    fn manifest(&mut self) -> Result<Manifest> {
        Ok(self.manifest.clone())
    }

    fn liveness(&self) -> Liveness {
        self.liveness.clone()
    }

    fn spaces(&mut self) -> Result<Vec<SpaceInfo>> {
        self.client.spaces()
    }

    fn reader(&mut self) -> Result<Arc<dyn PageReader>> {
        let spaces = self.client.spaces()?;
        (self.make_reader)(&mut self.client, &spaces)
    }

    fn track(&mut self) -> Result<()> {
        self.client.track()
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        self.client.harvest(dirty)
    }

    fn throttle(&mut self, percent: u8) -> Result<()> {
        self.client.throttle(percent)
    }

    fn pause(&mut self) -> Result<()> {
        self.client.pause()
    }

    fn save(&mut self) -> Result<Vec<Section>> {
        self.client.save()
    }

    fn fence(&mut self, token: u64) -> Result<()> {
        self.client.fence(token)
    }

    fn resume(&mut self) -> Result<()> {
        match self.client.resume() {
            // Only a keeper that nobody can reach any more is gone.
            Err(WorkloadError::KeeperGone { .. }) => {
                self.client.reconnect()?;
                self.client.resume()
            }
            result => result,
        }
    }

    fn release(&mut self) -> Result<()> {
        self.client.release()
    }
}

/// The arriving end.
pub struct KeeperDestination {
    client: KeeperClient,
    writer: Arc<DescriptorWriter>,
}

impl KeeperDestination {
    /// The empty workload behind `client`, whose keeper is in its incoming phase.
    pub fn new(client: KeeperClient) -> Self {
        Self { client, writer: Arc::new(DescriptorWriter::default()) }
    }

    /// The connection broke while the workload was being let run: what became of it?
    fn look_after_loss(&mut self) -> Result<()> {
        let phase = self.client.reconnect().and_then(|()| self.client.phase());
        match phase {
            Ok(Phase::Running) => Ok(()),
            Ok(phase) => Err(WorkloadError::plain(format!(
                "The keeper's connection broke before it let the workload run: it is {phase:?}"
            ))),
            Err(error) => Err(WorkloadError::Uncertain { source: error.into() }),
        }
    }
}

impl DestinationWorkload for KeeperDestination {
    fn writer(&mut self, spaces: &[SpaceInfo]) -> Result<Arc<dyn PageWriter>> {
        let mut open = self.writer.spaces.clone();
        let fresh: Vec<_> =
            spaces.iter().filter(|info| !open.contains_key(&SpaceId(info.id))).cloned().collect();
        if !fresh.is_empty() {
            self.client.make_spaces(&fresh)?;
            for info in &fresh {
                let file = File::from(self.client.memory(SpaceId(info.id))?);
                open.insert(SpaceId(info.id), (Arc::new(file), info.page_limit));
            }
            self.writer = Arc::new(DescriptorWriter { spaces: open });
        }
        Ok(self.writer.clone())
    }

    fn load(&mut self, sections: Vec<Section>) -> Result<()> {
        self.client.load(sections)
    }

    fn activate(&mut self, token: u64) -> Result<()> {
        match self.client.activate(token) {
            Err(WorkloadError::KeeperGone { .. }) => self.look_after_loss(),
            result => result,
        }
    }

    fn discard(&mut self) -> Result<()> {
        self.client.discard()
    }
}

/// Writes pages through descriptors whose offset is the address. No mapping is kept, so nothing
/// that arrives can touch memory that a running workload already uses.
#[derive(Default)]
struct DescriptorWriter {
    spaces: BTreeMap<SpaceId, (Arc<File>, u64)>,
}

impl DescriptorWriter {
    fn space(&self, range: PageRange) -> Result<&File> {
        let (file, limit) = self
            .spaces
            .get(&range.space)
            .ok_or_else(|| WorkloadError::plain(format!("There is no {}", range.space)))?;
        if range.first.checked_add(range.count).is_none_or(|end| end > *limit) {
            return Err(WorkloadError::plain(format!("{range} leave it")));
        }
        Ok(file)
    }
}

impl PageWriter for DescriptorWriter {
    fn write(&self, range: PageRange, bytes: &[u8]) -> Result<()> {
        if bytes.len() != range.bytes() {
            return Err(WorkloadError::plain(format!("{} bytes are not {range}", bytes.len())));
        }
        self.space(range)?
            .write_all_at(bytes, range.address())
            .map_err(|error| WorkloadError::new(format!("Cannot store {range}"), error))
    }

    fn zero(&self, range: PageRange) -> Result<()> {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let file = self.space(range)?;
        fallocate(file, hole, range.address() as i64, range.bytes() as i64)
            .map_err(|error| WorkloadError::new(format!("Cannot clear {range}"), error))
    }
}
