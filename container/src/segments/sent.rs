//! What of the segments of shared memory was sent, and what differs from it: the agent's side.
//!
//! Each page that is read for sending leaves a hash of what was read. A harvest reads what is there, and
//! what has another hash is dirty. So it does not matter who wrote it, or how: a process that maps it, one
//! that came and went between two harvests, or a `pwrite` to a descriptor. In the stop that is the
//! last word. Pages are compared by a hash with a secret key (see `keyed_hash`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use decamp_shared::keeper::KeeperClient;
use decamp_shared::pages::{PAGE_SIZE, PageRange, PageSet, SpaceId};
use decamp_shared::sparse::Data;
use decamp_shared::workload::{Result, SpaceInfo, WorkloadError};

use super::hashes::{Hashes, NEVER};
use super::is_segment;
use crate::dump::ms;
use crate::huge;
use crate::keyed_hash::NarrowKey;
use crate::sys::view::View;

const PAGE: u64 = PAGE_SIZE as u64;
/// Pages that are read at once: what fits into a processor's own cache.
const AT_ONCE: u64 = 32;
/// Pages that one thread takes at a time.
const PIECE: u64 = 1024;
/// In the stop so many threads compare at most.
const THREADS: usize = 4;
/// What one of them takes for a page that is read in place: 10 GiB a second.
const COMPARED_IN: Duration = Duration::from_nanos(400);

/// The segments of one workload and what was sent of them in one session.
pub(crate) struct Sent {
    segments: Mutex<BTreeMap<SpaceId, Arc<Segment>>>,
    key: Arc<NarrowKey>,
    /// Pages that the last harvest had to compare.
    compared: AtomicU64,
    /// Set when nobody wants to know any more.
    called_off: Arc<AtomicBool>,
}

/// One segment.
pub(crate) struct Segment {
    space: SpaceId,
    file: File,
    system_v: bool,
    /// Of huge pages. To look at a hole in it through a mapping would fill that.
    huge: bool,
    key: Arc<NarrowKey>,
    /// The hash of what was sent last, by page.
    hashes: Mutex<Hashes>,
    /// Mapped while it runs, to be read when it stands still: a copy would cost several times as much.
    view: Mutex<Option<Arc<View>>>,
}

/// Ascending page ranges.
#[derive(Default)]
struct Extents {
    data: Vec<Range<u64>>,
    holes: Vec<Range<u64>>,
}

/// A part of a segment to be compared.
struct Piece {
    segment: Arc<Segment>,
    pages: Range<u64>,
    /// Where it can be read in place, because nobody writes.
    view: Option<Arc<View>>,
}

impl Default for Sent {
    fn default() -> Self {
        Self {
            segments: Mutex::default(),
            key: Arc::new(NarrowKey::draw()),
            compared: AtomicU64::new(0),
            called_off: Arc::default(),
        }
    }
}

impl Sent {
    /// Opens what of `spaces` is new here, and gives all segments that are among them.
    pub(crate) fn follow(
        &self,
        client: &mut KeeperClient,
        spaces: &[SpaceInfo],
    ) -> Result<BTreeMap<SpaceId, Arc<Segment>>> {
        let wanted = spaces.iter().map(|info| SpaceId(info.id)).filter(|space| is_segment(*space));
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = BTreeMap::new();
        for space in wanted {
            let segment = match segments.remove(&space) {
                Some(segment) => segment,
                None => {
                    Arc::new(Segment::new(space, client.memory(space)?.into(), self.key.clone()))
                }
            };
            found.insert(space, segment);
        }
        // Those of spaces that are gone never come again under the same number.
        segments.clone_from(&found);
        Ok(found)
    }

    /// Adds every page to `dirty` that is not as it was sent last.
    pub(crate) fn add_changed(&self, stands_still: bool, dirty: &mut PageSet) -> Result<()> {
        let begun = Instant::now();
        let segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut pieces = Vec::new();
        let mut changed = 0;
        let mut add = |found: Vec<PageRange>| {
            changed += found.iter().map(|range| range.count).sum::<u64>();
            found.into_iter().for_each(|range| dirty.insert(range));
        };
        for segment in segments.values() {
            let Extents { data, holes } = segment
                .extents()
                .map_err(|error| WorkloadError::new("Cannot look for shared memory", error))?;
            for hole in holes {
                add(segment.emptied(&hole));
            }
            let view = segment.view();
            if !stands_still {
                view.iter().for_each(|view| prepare(view, &data));
            }
            // While it runs it may be cut short at any time.
            let view = view.filter(|_| stands_still);
            pieces.extend(data.into_iter().flat_map(|data| cut(segment, &data, view.as_ref())));
        }
        let pages = pieces.iter().map(|piece| piece.pages.end - piece.pages.start).sum();
        self.compared.store(pages, Ordering::Relaxed);
        // While it runs its processors are its own.
        let most = if stands_still { threads() } else { 1 };
        add(compare(&pieces, most.min(pieces.len()), &self.called_off)?);
        if !segments.is_empty() {
            tracing::debug!(ms = ms(begun), changed, "Compared shared memory");
        }
        Ok(())
    }

    /// Set, it ends a comparison that is under way, and all that follow, with an error.
    pub(crate) fn call_off(&self) -> Arc<AtomicBool> {
        self.called_off.clone()
    }

    /// How long the comparison will take in the stop, as the last harvest had it.
    pub(crate) fn look(&self) -> Duration {
        COMPARED_IN * self.compared.load(Ordering::Relaxed).min(u64::from(u32::MAX)) as u32
            / threads() as u32
    }
}

/// How many threads compare in the stop.
fn threads() -> usize {
    available_parallelism().map_or(1, usize::from).min(THREADS)
}

impl Segment {
    fn new(space: SpaceId, file: File, key: Arc<NarrowKey>) -> Self {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let system_v =
            link.is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"/SYSV"));
        let huge = file.metadata().is_ok_and(|found| huge::page_on(found.dev()).is_some());
        Self { space, file, system_v, huge, key, hashes: Mutex::default(), view: Mutex::default() }
    }

    fn hashes(&self) -> MutexGuard<'_, Hashes> {
        self.hashes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads pages for sending. What is behind the end is zeros, as it is to whoever has it mapped when
    /// it grows again.
    pub(crate) fn read(&self, range: PageRange, into: &mut [u8]) -> io::Result<()> {
        self.fill(range.address(), into)?;
        let fresh: Vec<u128> = into.chunks_exact(PAGE_SIZE).map(|page| self.hash(page)).collect();
        self.hashes().set(range.first, &fresh);
        Ok(())
    }

    fn fill(&self, mut at: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            match self.file.read_at(into, at) {
                Ok(0) => {
                    into.fill(0);
                    return self.fill_tail(at, into);
                }
                Ok(length) => {
                    at += length as u64;
                    into = &mut into[length..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A System V segment is memory up to the end of its last page, wherever its file ends.
    fn fill_tail(&self, end: u64, into: &mut [u8]) -> io::Result<()> {
        let length = (end.next_multiple_of(PAGE) - end).min(into.len() as u64);
        let view = if self.system_v && length > 0 { self.view() } else { None };
        let covers = |view: &Arc<View>| view.length() == end.next_multiple_of(PAGE);
        match view.filter(covers) {
            Some(view) => view.copy(end, &mut into[..length as usize]),
            None => Ok(()),
        }
    }

    /// A mapping of all that it is now. Without one it is read by copying.
    fn view(&self) -> Option<Arc<View>> {
        let found = self.file.metadata().ok()?;
        let length = found.len().next_multiple_of(PAGE);
        if self.huge && found.blocks().saturating_mul(512) < length {
            return None;
        }
        let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        if view.as_ref().is_none_or(|view| view.length() != length) {
            *view = View::of(&self.file, length).map(Arc::new).ok();
        }
        view.clone()
    }

    /// The next one is mapped afresh.
    fn forget_view(&self) {
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn hash(&self, page: &[u8]) -> u128 {
        self.key.hash(page)
    }

    /// What of it holds data, and what does not, up to the last page that was sent.
    fn extents(&self) -> io::Result<Extents> {
        let Extents { mut data, mut holes } = Extents::default();
        let mut past = 0;
        for piece in Data::of(&self.file).pages() {
            let piece = piece?;
            holes.push(past..piece.start);
            past = piece.end;
            data.push(piece);
        }
        let sent = self.hashes().end();
        if past < sent {
            holes.push(past..sent);
        }
        Ok(Extents { data, holes })
    }

    /// Of a hole, the pages that were sent as something else than zeros.
    fn emptied(&self, hole: &Range<u64>) -> Vec<PageRange> {
        let zero = self.hash(&[0; PAGE_SIZE]);
        let mut found = Found::of(self.space);
        let hashes = self.hashes();
        hashes.sent(hole).filter(|(_, hash)| *hash != zero).for_each(|(page, _)| found.add(page));
        found.ranges
    }

    /// Which of `pages` are not as they were sent.
    fn changed(
        &self,
        pages: &Range<u64>,
        view: Option<&View>,
        buffer: &mut [u8],
    ) -> io::Result<Vec<PageRange>> {
        let mut found = Found::of(self.space);
        let sent = self.hashes().of(pages);
        if sent.iter().all(|hash| *hash == NEVER) {
            return Ok(vec![PageRange::new(self.space, pages.start, pages.end - pages.start)]);
        }
        let mut look = |first: u64, sent: &[u128], bytes: &[u8]| {
            for (page, (bytes, sent)) in (first..).zip(bytes.chunks_exact(PAGE_SIZE).zip(sent)) {
                if *sent == NEVER || self.hash(bytes) != *sent {
                    found.add(page);
                }
            }
        };
        let place = pages.start * PAGE..pages.end * PAGE;
        let in_place = view.map(|view| view.with(&place, |bytes| look(pages.start, &sent, bytes)));
        let in_place = in_place.transpose().inspect_err(|_| self.forget_view())?.flatten();
        if in_place.is_none() {
            let starts = pages.clone().step_by(AT_ONCE as usize);
            for (first, sent) in starts.zip(sent.chunks(AT_ONCE as usize)) {
                let bytes = &mut buffer[..sent.len() * PAGE_SIZE];
                self.fill(first * PAGE, bytes)?;
                look(first, sent, bytes);
            }
        }
        Ok(found.ranges)
    }
}

/// Pages of a space, joined where they touch.
struct Found {
    space: SpaceId,
    ranges: Vec<PageRange>,
}

impl Found {
    fn of(space: SpaceId) -> Self {
        Self { space, ranges: Vec::new() }
    }

    fn add(&mut self, page: u64) {
        match self.ranges.last_mut() {
            Some(last) if last.end() == page => last.count += 1,
            _ => self.ranges.push(PageRange::new(self.space, page, 1)),
        }
    }
}

/// Puts `data` into our page tables, so that it is found there when everything stands still.
fn prepare(view: &View, data: &[Range<u64>]) {
    data.iter().for_each(|data| view.populate(&(data.start * PAGE..data.end * PAGE)));
}

fn cut(segment: &Arc<Segment>, data: &Range<u64>, view: Option<&Arc<View>>) -> Vec<Piece> {
    let starts = data.clone().step_by(PIECE as usize);
    let piece = |start: u64| Piece {
        segment: segment.clone(),
        pages: start..data.end.min(start + PIECE),
        view: view.cloned(),
    };
    starts.map(piece).collect()
}

/// Compares on so many threads.
fn compare(pieces: &[Piece], threads: usize, called_off: &AtomicBool) -> Result<Vec<PageRange>> {
    let next = AtomicUsize::new(0);
    let work = || -> io::Result<Vec<PageRange>> {
        let mut buffer = vec![0; AT_ONCE as usize * PAGE_SIZE];
        let mut found = Vec::new();
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            if called_off.load(Ordering::Relaxed) {
                return Err(io::Error::other("it was called off"));
            }
            let view = piece.view.as_deref();
            found.extend(piece.segment.changed(&piece.pages, view, &mut buffer)?);
        }
        Ok(found)
    };
    let found = thread::scope(|scope| {
        // One of them is ours.
        let others = (1..threads).map(|_| thread::Builder::new().spawn_scoped(scope, work));
        let others: Vec<_> = others.filter_map(std::result::Result::ok).collect();
        let ours = work();
        let panicked = |_| Err(io::Error::other("a thread that compares panicked"));
        let others = others.into_iter().map(|thread| thread.join().unwrap_or_else(panicked));
        others.chain([ours]).collect::<io::Result<Vec<_>>>()
    });
    let found = found.map_err(|error| WorkloadError::new("Cannot read shared memory", error))?;
    Ok(found.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::segments::FIRST_SPACE;

    const SPACE: SpaceId = SpaceId(FIRST_SPACE);

    /// A memory file, and what was sent of it: nothing.
    fn segment(pages: u64) -> (File, Sent) {
        let file = File::from(memfd_create("sent", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        file.set_len(pages * PAGE).expect("a size");
        let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        let sent = Sent::default();
        let segment =
            Segment::new(SPACE, File::open(path).expect("opened again"), sent.key.clone());
        sent.segments.lock().expect("whole").insert(SPACE, Arc::new(segment));
        (file, sent)
    }

    fn write(file: &File, pages: Range<u64>, byte: u8) {
        let bytes = vec![byte; (pages.end - pages.start) as usize * PAGE_SIZE];
        file.write_all_at(&bytes, pages.start * PAGE).expect("written");
    }

    /// What changed; it is sent.
    fn harvest(sent: &Sent) -> Vec<(u64, u64)> {
        let mut dirty = PageSet::new();
        sent.add_changed(true, &mut dirty).expect("compared");
        let segment = sent.segments.lock().expect("whole")[&SPACE].clone();
        for range in dirty.ranges() {
            segment.read(range, &mut vec![1; range.bytes()]).expect("read");
        }
        dirty.ranges().map(|range| (range.first, range.count)).collect()
    }

    #[test]
    fn whatever_differs_from_what_was_sent_is_told() {
        let (file, sent) = segment(5000);
        assert_eq!(harvest(&sent), []);
        write(&file, 10..2000, 1);
        write(&file, 4999..5000, 1);
        assert_eq!(harvest(&sent), [(10, 1990), (4999, 1)]);
        assert_eq!(harvest(&sent), []);
        write(&file, 12..13, 2);
        write(&file, 1500..1502, 2);
        // The same again is no change.
        write(&file, 20..30, 1);
        assert_eq!(harvest(&sent), [(12, 1), (1500, 2)]);
        // What is punched out, or cut off, has become zeros.
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, hole, 100 * PAGE as i64, 5 * PAGE as i64).expect("punched");
        file.set_len(4000 * PAGE).expect("cut");
        assert_eq!(harvest(&sent), [(100, 5), (4999, 1)]);
        assert_eq!(harvest(&sent), []);
        write(&file, 100..101, 1);
        file.set_len(6000 * PAGE).expect("grown");
        write(&file, 5999..6000, 0);
        assert_eq!(harvest(&sent), [(100, 1), (5999, 1)]);
    }

    #[test]
    fn what_was_read_counts_and_not_what_was_there_before_or_after() {
        let (file, sent) = segment(8);
        write(&file, 0..8, 1);
        let mut dirty = PageSet::new();
        sent.add_changed(false, &mut dirty).expect("compared");
        assert_eq!(dirty.len(), 8);
        // Another content is sent than the harvest saw, and the old one comes back.
        write(&file, 3..4, 2);
        let segment = sent.segments.lock().expect("whole")[&SPACE].clone();
        let mut bytes = vec![0; 8 * PAGE_SIZE];
        segment.read(PageRange::new(SPACE, 0, 8), &mut bytes).expect("read");
        write(&file, 3..4, 1);
        assert_eq!(harvest(&sent), [(3, 1)]);
    }

    #[test]
    fn nobody_waits_for_a_comparison_that_is_called_off() {
        let (file, sent) = segment(8);
        write(&file, 0..8, 1);
        assert_eq!(harvest(&sent), [(0, 8)]);
        sent.call_off().store(true, Ordering::Relaxed);
        let error = sent.add_changed(true, &mut PageSet::new()).expect_err("called off");
        let cause = std::error::Error::source(&error).expect("a cause").to_string();
        assert!(cause.contains("called off"), "{cause}");
    }

    #[test]
    fn behind_the_end_are_zeros() {
        let (file, sent) = segment(1);
        file.write_all_at(b"x", 0).expect("written");
        file.set_len(1).expect("cut");
        let segment = sent.segments.lock().expect("whole")[&SPACE].clone();
        let mut bytes = vec![7; 2 * PAGE_SIZE];
        segment.read(PageRange::new(SPACE, 0, 2), &mut bytes).expect("read");
        assert_eq!(bytes[0], b'x');
        assert!(bytes[1..].iter().all(|byte| *byte == 0));
    }
}
