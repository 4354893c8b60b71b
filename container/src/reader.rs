//! Reading a container's memory from outside, for the page engine.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use decamp_shared::keeper::{KeeperClient, Phase};
use decamp_shared::pages::{PAGE_SIZE, PageRange, PageReader, PageSet, SpaceId};
use decamp_shared::workload::{Result, SpaceInfo, WorkloadError};

use crate::segments::is_segment;
use crate::segments::sent::{Segment, Sent};
use crate::sys;

/// Reads the one process of a container by `process_vm_readv`, and by `/proc/PID/mem` what that refuses
/// (mappings without the right to read). Several are read by `/proc/PID/mem` alone: the other pins pages,
/// and the kernel gives a page that processes share since a fork to each of them before it is pinned.
///
/// Of a container that runs, memory may go away at any time: what is gone reads as zeros and is told by
/// [`PageReader::take_missed`]. Of one that stands still nothing goes away, and what cannot be read is an
/// error.
pub(crate) struct ProcessReader {
    processes: BTreeMap<SpaceId, (i32, File)>,
    segments: BTreeMap<SpaceId, Arc<Segment>>,
    runs: bool,
    missed: Mutex<PageSet>,
}

impl ProcessReader {
    /// A reader of the spaces given, for [`decamp_shared::keeper::ends::KeeperSource`]. What it reads of
    /// shared memory is noted in `sent`.
    ///
    /// # Errors
    /// When the keeper does not know one of the spaces (any more), and the container stands still.
    pub(crate) fn open(
        client: &mut KeeperClient,
        spaces: &[SpaceInfo],
        sent: &Sent,
    ) -> Result<Arc<dyn PageReader>> {
        let runs = client.phase()? == Phase::Running;
        let segments = sent.follow(client, spaces)?;
        let mut processes = BTreeMap::new();
        for info in spaces.iter().filter(|info| !is_segment(SpaceId(info.id))) {
            let space = SpaceId(info.id);
            match client.memory(space).and_then(opened) {
                Ok(opened) => drop(processes.insert(space, opened)),
                Err(error @ WorkloadError::KeeperGone { .. }) => return Err(error),
                // It ended meanwhile.
                Err(error) if runs => tracing::debug!(%space, %error, "A process is gone"),
                Err(error) => return Err(error),
            }
        }
        Ok(Arc::new(Self { processes, segments, runs, missed: Mutex::default() }))
    }

    fn read_strictly(&self, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        let gone = || io::Error::from_raw_os_error(libc::ESRCH);
        let (pid, file) = self.processes.get(&range.space).ok_or_else(gone)?;
        if self.processes.len() > 1 {
            return file.read_exact_at(into, range.address());
        }
        sys::read_memory(*pid, range.address(), into)
            // What was copied until then is copied once more; the process stands still or is read again.
            .or_else(|_| file.read_exact_at(into, range.address()))
    }

    /// Page by page, zeros for what is gone.
    fn read_what_is_there(&self, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        for (index, bytes) in into.chunks_exact_mut(PAGE_SIZE).enumerate() {
            let page = PageRange::new(range.space, range.first + index as u64, 1);
            match self.read_strictly(page, bytes) {
                Err(error) if is_gone(&error) => {
                    bytes.fill(0);
                    self.missed.lock().unwrap_or_else(PoisonError::into_inner).insert(page);
                }
                read => read?,
            }
        }
        Ok(())
    }
}

impl PageReader for ProcessReader {
    fn read(&self, range: PageRange, into: &mut [u8]) -> Result<()> {
        if into.len() != range.bytes() {
            return Err(WorkloadError::plain(format!("{} bytes are not {range}", into.len())));
        }
        if let Some(segment) = self.segments.get(&range.space) {
            let read = segment.read(range, into);
            return read.map_err(|error| WorkloadError::new(format!("Cannot read {range}"), error));
        }
        match self.read_strictly(range, into) {
            Err(error) if self.runs && is_gone(&error) => self.read_what_is_there(range, into),
            read => read,
        }
        .map_err(|error| WorkloadError::new(format!("Cannot read {range}"), error))
    }

    fn take_missed(&self) -> PageSet {
        std::mem::take(&mut *self.missed.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The process whose memory a descriptor of `/proc/PID/mem` is, with the descriptor.
fn opened(descriptor: std::os::fd::OwnedFd) -> Result<(i32, File)> {
    let link =
        fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd())).map_err(|error| {
            WorkloadError::new("Cannot tell whose memory a descriptor is of", error)
        })?;
    let pid = link.parent().and_then(|directory| directory.file_name());
    let pid = pid.and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
    let pid = pid.filter(|_| link.ends_with("mem")).ok_or_else(|| {
        WorkloadError::plain(format!("{} is no memory of a process", link.display()))
    })?;
    Ok((pid, File::from(descriptor)))
}

/// Whether an error says that memory, or its process, is not there.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EIO | libc::ESRCH))
        || error.kind() == io::ErrorKind::UnexpectedEof
}
