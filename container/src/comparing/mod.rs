//! The leaving end of a container whose kernel does not tell what was written: the keeper names all pages
//! that exist, and here those are left out that hold what the destination has.
//!
//! Here and not in the keeper, because here the bytes are read that are sent. What is remembered of a page
//! is the hash of just those bytes: of a page that is written while it is read, the hash of what came of
//! it; of one that was gone, the hash of the zeros that were given for it. So it does not matter when a
//! page was written, nor what process or mapping it is of by now: it is left out if the destination has
//! what it holds, and in the stop, where nothing is written any more, each page is looked at once more.

mod sums;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use decamp_shared::methods::Ways;
use decamp_shared::pages::{PAGE_SIZE, PageRange, PageReader, PageSet, SpaceId};
use decamp_shared::workload::{
    Liveness, Manifest, Restoring, Result, Section, SourceWorkload, SpaceInfo, WorkloadError,
};

use crate::keyed_hash::WideKey;
use sums::Sums;

/// Pages that are read and compared at a time.
const PIECE: u64 = 128;
/// More threads than this gain nothing: they wait for memory.
const THREADS_MOST: usize = 16;

/// A workload that is compared with what was sent of it.
pub(crate) struct Comparing {
    inner: Box<dyn SourceWorkload>,
    /// Set when nobody wants to know any more.
    called_off: Arc<AtomicBool>,
    sums: Arc<Sums>,
    tracked: bool,
    paused: bool,
    /// In this pause all pages were compared.
    compared: bool,
    look: Duration,
}

impl Comparing {
    /// `inner` names all pages that exist as written.
    pub(crate) fn new(inner: Box<dyn SourceWorkload>) -> Self {
        Self {
            called_off: inner.call_off().unwrap_or_default(),
            inner,
            sums: Arc::new(Sums::new(WideKey::draw())),
            tracked: false,
            paused: false,
            compared: false,
            look: Duration::ZERO,
        }
    }

    /// Of pages that exist those that the destination does not have as they are.
    fn written(&mut self, exist: &PageSet) -> Result<PageSet> {
        let begun = Instant::now();
        let reader = self.inner.reader()?;
        let cores = thread::available_parallelism().map_or(1, usize::from);
        // What runs has half of the host for itself.
        let threads = if self.paused { cores } else { cores / 2 };
        let threads = threads.clamp(1, THREADS_MOST);
        let found = Look::new(exist, &*reader, &self.sums, &self.called_off).by(threads)?;
        self.look = begun.elapsed();
        tracing::debug!(
            ms = self.look.as_millis(),
            exist = exist.len(),
            written = found.len(),
            threads,
            "Compared pages with what was sent"
        );
        Ok(found)
    }
}

impl SourceWorkload for Comparing {
    fn manifest(&mut self) -> Result<Manifest> {
        self.inner.manifest()
    }

    fn liveness(&self) -> Liveness {
        self.inner.liveness()
    }

    fn spaces(&mut self) -> Result<Vec<SpaceInfo>> {
        self.inner.spaces()
    }

    fn reader(&mut self) -> Result<Arc<dyn PageReader>> {
        let inner = self.inner.reader()?;
        Ok(Arc::new(Noting { inner, sums: self.sums.clone() }))
    }

    fn track(&mut self) -> Result<()> {
        self.inner.track()?;
        // Everything counts as dirty once, whatever an earlier attempt sent.
        self.sums = Arc::new(Sums::new(WideKey::draw()));
        self.tracked = true;
        Ok(())
    }

    /// What is in `dirty` already stays there as long as it exists.
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        if !self.tracked {
            return self.inner.harvest(dirty);
        }
        if self.paused && self.compared {
            // Nothing that stands still writes.
            return self.inner.harvest(dirty);
        }
        let mut exist = PageSet::new();
        self.inner.harvest(&mut exist)?;
        dirty.intersect(&exist);
        dirty.union(&self.written(&exist)?);
        self.compared = self.paused;
        Ok(())
    }

    fn stall(&self) -> Duration {
        self.inner.stall()
    }

    fn look(&self) -> Duration {
        self.look
    }

    fn restoring(&self) -> Restoring {
        self.inner.restoring()
    }

    fn spare(&mut self, time: Duration) {
        self.inner.spare(time);
    }

    fn call_off(&self) -> Option<Arc<AtomicBool>> {
        Some(self.called_off.clone())
    }

    fn ways(&self) -> Ways {
        self.inner.ways()
    }

    fn throttle(&mut self, percent: u8) -> Result<()> {
        self.inner.throttle(percent)
    }

    fn pause(&mut self) -> Result<()> {
        self.inner.pause()?;
        (self.paused, self.compared) = (true, false);
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<Section>> {
        self.inner.save()
    }

    fn fence(&mut self, token: u64) -> Result<()> {
        self.inner.fence(token)
    }

    fn resume(&mut self) -> Result<()> {
        (self.paused, self.tracked) = (false, false);
        self.inner.resume()
    }

    fn release(&mut self) -> Result<()> {
        self.inner.release()
    }
}

/// Reads for the page engine, and remembers what it gave.
struct Noting {
    inner: Arc<dyn PageReader>,
    sums: Arc<Sums>,
}

impl PageReader for Noting {
    fn read(&self, range: PageRange, into: &mut [u8]) -> Result<()> {
        self.inner.read(range, into)?;
        self.sums.note(range, into);
        Ok(())
    }

    fn take_missed(&self) -> PageSet {
        self.inner.take_missed()
    }
}

/// One look at many pages, by several threads.
struct Look<'a> {
    pages: &'a PageSet,
    reader: &'a dyn PageReader,
    sums: &'a Sums,
    called_off: &'a AtomicBool,
    at: Mutex<(SpaceId, u64)>,
    failed: AtomicBool,
}

impl<'a> Look<'a> {
    fn new(
        pages: &'a PageSet,
        reader: &'a dyn PageReader,
        sums: &'a Sums,
        called_off: &'a AtomicBool,
    ) -> Self {
        Self {
            pages,
            reader,
            sums,
            called_off,
            at: Mutex::default(),
            failed: AtomicBool::new(false),
        }
    }

    fn by(&self, threads: usize) -> Result<PageSet> {
        thread::scope(|scope| {
            // One of them is ours. Where no more can be started fewer do it all.
            let others: Vec<_> = (1..threads)
                .map_while(|_| thread::Builder::new().spawn_scoped(scope, || self.walk()).ok())
                .collect();
            let (mut found, mut outcome) = (PageSet::new(), Ok(()));
            match self.walk() {
                Ok(part) => found.union(&part),
                Err(error) => outcome = Err(error),
            }
            for thread in others {
                let panicked = |_| Err(WorkloadError::plain("A thread that compares panicked"));
                match thread.join().unwrap_or_else(panicked) {
                    Ok(part) => found.union(&part),
                    Err(error) => outcome = outcome.and(Err(error)),
                }
            }
            outcome.map(|()| found)
        })
    }

    fn walk(&self) -> Result<PageSet> {
        let mut found = PageSet::new();
        let mut bytes = vec![0; PIECE as usize * PAGE_SIZE];
        while let Some(piece) = self.take() {
            if self.called_off.load(Ordering::Relaxed) {
                return Err(WorkloadError::plain("The comparison was called off"));
            }
            if let Err(error) = self.compare(piece, &mut bytes, &mut found) {
                self.failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(found)
    }

    fn take(&self) -> Option<PageRange> {
        if self.failed.load(Ordering::Relaxed) {
            return None;
        }
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = self.pages.next_run(at.0, at.1, PIECE)?;
        *at = (piece.space, piece.end());
        Some(piece)
    }

    fn compare(&self, piece: PageRange, bytes: &mut [u8], found: &mut PageSet) -> Result<()> {
        let sums = self.sums.of(piece);
        if sums.iter().all(Option::is_none) {
            found.insert(piece);
            return Ok(());
        }
        let bytes = &mut bytes[..piece.bytes()];
        // Of what runs, memory that is gone by now reads as zeros; it exists no more at the next look.
        self.reader.read(piece, bytes)?;
        for (index, (page, sum)) in bytes.chunks_exact(PAGE_SIZE).zip(&sums).enumerate() {
            if sum.as_ref().is_none_or(|sum| !self.sums.is(page, sum)) {
                found.insert(PageRange::new(piece.space, piece.first + index as u64, 1));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
