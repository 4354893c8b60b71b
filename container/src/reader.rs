//! Reading a container's memory from outside, for the page engine.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use decamp_shared::keeper::KeeperClient;
use decamp_shared::pages::{PageRange, PageReader, SpaceId};
use decamp_shared::workload::{Result, SpaceInfo, WorkloadError};

use crate::facts::Facts;
use crate::sys;

/// Reads processes by `process_vm_readv`, and by `/proc/PID/mem` what that refuses (mappings without
/// the right to read).
pub struct ProcessReader {
    processes: BTreeMap<SpaceId, (i32, File)>,
}

impl ProcessReader {
    /// A reader of the spaces given, for [`decamp_shared::keeper::ends::KeeperSource`].
    ///
    /// # Errors
    /// When the keeper does not know one of the spaces (any more).
    pub fn open(client: &mut KeeperClient, spaces: &[SpaceInfo]) -> Result<Arc<dyn PageReader>> {
        let facts: Facts = serde_json::from_value(client.facts()?)
            .map_err(|error| WorkloadError::new("Cannot read the container's facts", error))?;
        let mut processes = BTreeMap::new();
        for info in spaces {
            let space = SpaceId(info.id);
            let pid = facts.processes.get(&info.process).copied();
            let pid =
                pid.ok_or_else(|| WorkloadError::plain(format!("The process of {space} is gone")))?;
            processes.insert(space, (pid, File::from(client.memory(space)?)));
        }
        Ok(Arc::new(Self { processes }))
    }
}

impl PageReader for ProcessReader {
    fn read(&self, range: PageRange, into: &mut [u8]) -> Result<()> {
        if into.len() != range.bytes() {
            return Err(WorkloadError::plain(format!("{} bytes are not {range}", into.len())));
        }
        let process = self.processes.get(&range.space);
        let (pid, file) =
            process.ok_or_else(|| WorkloadError::plain(format!("There is no {}", range.space)))?;
        sys::read_memory(*pid, range.address(), into)
            // What was copied until then is copied once more; the process stands still or is read again.
            .or_else(|_| file.read_exact_at(into, range.address()))
            .map_err(|error: io::Error| WorkloadError::new(format!("Cannot read {range}"), error))
    }
}
