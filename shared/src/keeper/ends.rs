//! A keeper's workload as the two ends of a session see it, the same for both kinds.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::resource::{Resource, getrlimit};

use super::{KeeperClient, Phase};
use crate::methods::Ways;
use crate::pages::{PAGE_SIZE, PageRange, PageReader, PageSet, PageWriter, SpaceId};
use crate::sys;
use crate::workload::{
    DestinationWorkload, FileTree, Liveness, Manifest, Restoring, Result, Section, SourceWorkload,
    SpaceInfo, WorkloadError,
};

/// So many bytes are written between two looks at how much memory there is.
const LOOK_EVERY: u64 = 32 << 20;
/// Memory that a workload that comes leaves to the host: no more than a backend asks for before it comes. Of a file system
/// it leaves that, or a hundredth of a small one.
const LEFT: u64 = 32 << 20;

/// Makes a reader of the spaces given, through the keeper where it must.
pub type ReaderFactory =
    Box<dyn Fn(&mut KeeperClient, &[SpaceInfo]) -> Result<Arc<dyn PageReader>> + Send>;

/// The leaving end.
pub struct KeeperSource {
    client: KeeperClient,
    /// What it was fenced with; 0 before.
    token: u64,
    manifest: Manifest,
    liveness: Liveness,
    ways: Ways,
    make_reader: ReaderFactory,
    /// Whether its spaces stay what they are, unless they are asked to be others.
    lasting: bool,
    /// The spaces that it had last, if they are lasting, and who reads them.
    known: Option<(Vec<SpaceInfo>, Arc<dyn PageReader>)>,
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
        let ways = ways_of(&mut client)?;
        let (lasting, known) = (false, None);
        Ok(Self { client, token: 0, manifest, liveness, ways, make_reader, lasting, known })
    }

    /// One whose spaces neither come nor go by themselves: the keeper is not asked for them in each round, and in the
    /// stop.
    pub fn with_lasting_spaces(self) -> Self {
        Self { lasting: true, ..self }
    }

    /// One that may be fenced already, with `token`.
    pub fn fenced_with(self, token: u64) -> Self {
        Self { token, ..self }
    }

    /// The connection to its keeper, for a backend that asks it for more.
    pub fn client(&mut self) -> &mut KeeperClient {
        &mut self.client
    }
}

/// Asks again over a new connection when the one at hand broke. Only a keeper that nobody can reach any more
/// is gone: one that listens and does not answer may still hold the workload.
fn insist(client: &mut KeeperClient, ask: impl Fn(&mut KeeperClient) -> Result<()>) -> Result<()> {
    match ask(client) {
        Err(WorkloadError::KeeperGone { .. }) => {}
        result => return result,
    }
    match client.reconnect().and_then(|()| ask(client)) {
        Err(gone @ WorkloadError::KeeperGone { .. }) if client.is_kept() => {
            Err(WorkloadError::new("The keeper is there and does not answer", gone))
        }
        result => result,
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
        match &self.known {
            Some((spaces, _)) => Ok(spaces.clone()),
            None => self.client.spaces(),
        }
    }

    fn carry(&mut self, trees: &[FileTree]) -> Result<()> {
        self.known = None;
        let paged = trees.iter().filter(|tree| tree.is_paged());
        let spaces: Vec<_> = paged.map(|tree| SpaceId(tree.space)).collect();
        // A keeper that is older than the question has none.
        if spaces.is_empty() { Ok(()) } else { self.client.carry(&spaces) }
    }

    fn can_mirror(&mut self) -> Result<bool> {
        self.client.can_mirror()
    }

    fn answer_within(&mut self, limit: Option<Duration>) -> Result<()> {
        self.client.answer_within(limit)
    }

    fn mirror(&mut self, tree: &FileTree, path: &Path, file: OwnedFd) -> Result<()> {
        self.known = None;
        self.client.mirror(SpaceId(tree.space), path, file)
    }

    fn hold(&mut self) -> Result<()> {
        self.client.hold()
    }

    fn switch(&mut self, migration: &str) -> Result<()> {
        self.client.switch(migration)
    }

    fn reader(&mut self) -> Result<Arc<dyn PageReader>> {
        if let Some((_, reader)) = &self.known {
            return Ok(reader.clone());
        }
        let spaces = self.client.spaces()?;
        let reader = (self.make_reader)(&mut self.client, &spaces)?;
        self.known = self.lasting.then(|| (spaces, reader.clone()));
        Ok(reader)
    }

    fn track(&mut self) -> Result<()> {
        self.client.track()
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        self.client.harvest(dirty)
    }

    fn stall(&self) -> Duration {
        self.client.stall()
    }

    fn restoring(&self) -> Restoring {
        self.client.restoring()
    }

    fn ways(&self) -> Ways {
        self.ways.clone()
    }

    fn throttle(&mut self, percent: u8) -> Result<()> {
        self.client.throttle(percent)
    }

    fn pause(&mut self) -> Result<()> {
        self.client.pause()
    }

    fn save(&mut self) -> Result<Vec<Section>> {
        let sections = self.client.save()?;
        // It may have gone another way than it had set out on.
        self.ways = ways_of(&mut self.client)?;
        Ok(sections)
    }

    fn fence(&mut self, token: u64) -> Result<()> {
        // Before it is asked: it may do so without answering.
        self.token = token;
        self.client.fence(token)
    }

    fn resume(&mut self) -> Result<()> {
        let token = self.token;
        insist(&mut self.client, |client| client.resume(token))
    }

    fn release(&mut self) -> Result<()> {
        let token = self.token;
        insist(&mut self.client, |client| client.release(token))
    }
}

/// The arriving end.
pub struct KeeperDestination {
    client: KeeperClient,
    writer: Arc<DescriptorWriter>,
    ways: Ways,
}

impl KeeperDestination {
    /// The empty workload behind `client`, whose keeper is in its incoming phase.
    pub fn new(client: KeeperClient) -> Self {
        Self { client, writer: Arc::new(DescriptorWriter::default()), ways: Ways::default() }
    }

    /// The same of memory that grows as pages come: to `most` bytes, and never to the last that this host has.
    pub fn growing_to(client: KeeperClient, most: u64) -> Self {
        let room = Arc::new(Room { most, ..Room::default() });
        let writer = Arc::new(DescriptorWriter { room: Some(room), ..DescriptorWriter::default() });
        Self { client, writer, ways: Ways::default() }
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
            room_for(open.len() + fresh.len())?;
            self.client.make_spaces(&fresh)?;
            let mut stored = self.writer.stored.clone();
            for info in &fresh {
                let (id, file) =
                    (SpaceId(info.id), File::from(self.client.memory(SpaceId(info.id))?));
                if is_stored(&file) {
                    stored.insert(id, Arc::default());
                }
                open.insert(id, (Arc::new(file), info.page_limit));
            }
            let room = self.writer.room.clone();
            self.writer = Arc::new(DescriptorWriter { spaces: open, room, stored });
        }
        Ok(self.writer.clone())
    }

    fn load(&mut self, sections: Vec<Section>) -> Result<()> {
        self.client.load(sections)?;
        self.ways = ways_of(&mut self.client)?;
        Ok(())
    }

    fn ways(&self) -> Ways {
        self.ways.clone()
    }

    fn activate(&mut self, token: u64) -> Result<()> {
        match self.client.activate(token) {
            Err(WorkloadError::KeeperGone { .. }) => self.look_after_loss(),
            result => result,
        }
    }

    fn discard(&mut self) -> Result<()> {
        insist(&mut self.client, KeeperClient::discard)
    }
}

/// Each space is an open file here: what names more than this process may have leaves it no descriptor for
/// anything else.
fn room_for(spaces: usize) -> Result<()> {
    let (allowed, _) = getrlimit(Resource::RLIMIT_NOFILE)
        .map_err(|error| WorkloadError::new("Cannot tell how many files may be open", error))?;
    if spaces as u64 <= allowed / 2 {
        return Ok(());
    }
    Err(WorkloadError::plain(format!(
        "Its memory is {spaces} spaces, each of which is an open file here, and {allowed} may be open: \
         raise the agent's limit (LimitNOFILE of its service, or `ulimit -n`)"
    )))
}

/// What the report says of a keeper's ways is no reason to fail: one that is older than the question
/// knows of none.
fn ways_of(client: &mut KeeperClient) -> Result<Ways> {
    match client.ways() {
        Err(gone @ WorkloadError::KeeperGone { .. }) => Err(gone),
        answered => Ok(answered.unwrap_or_default()),
    }
}

/// Writes pages through descriptors whose offset is the address. No mapping is kept, so nothing
/// that arrives can touch memory that a running workload already uses.
#[derive(Default)]
pub(crate) struct DescriptorWriter {
    spaces: BTreeMap<SpaceId, (Arc<File>, u64)>,
    room: Option<Arc<Room>>,
    /// Those of them that are files on a file system which may become full.
    stored: BTreeMap<SpaceId, Arc<Stored>>,
}

/// A file on a file system: what is on that beside it needs room, too.
#[derive(Default)]
struct Stored {
    /// Bytes that were written, also over others.
    written: AtomicU64,
    /// Blocks that it had at the last look.
    blocks: AtomicU64,
}

/// How much memory may come. A source says beforehand how much that will be, and may lie.
#[derive(Default)]
struct Room {
    /// Bytes that all spaces may take.
    most: u64,
    /// Bytes that were written, also over others.
    written: AtomicU64,
}

impl Room {
    /// Has `bytes` come next into one of `spaces`.
    fn take(&self, bytes: u64, spaces: &BTreeMap<SpaceId, (Arc<File>, u64)>) -> Result<()> {
        let before = self.written.fetch_add(bytes, Ordering::Relaxed);
        if before / LOOK_EVERY == before.saturating_add(bytes) / LOOK_EVERY {
            return Ok(());
        }
        let taken = |(file, _): &(Arc<File>, u64)| {
            file.metadata().map_or(0, |facts| facts.blocks().saturating_mul(512))
        };
        let taken: u64 = spaces.values().map(taken).sum();
        if taken > self.most {
            return Err(WorkloadError::plain(format!(
                "{} MiB of its memory have come, and no more than {} MiB were to be expected of what the source \
                 announced: move it again, if it has grown since",
                taken >> 20,
                self.most >> 20
            )));
        }
        match available_memory() {
            Some(free) if free < LEFT => Err(WorkloadError::plain(format!(
                "This host has {} MiB of memory left, and more of the workload is coming: free some, and move \
                 it again",
                free >> 20
            ))),
            _ => Ok(()),
        }
    }
}

/// Whether what is written to `file` takes room of a file system other than memory.
fn is_stored(file: &File) -> bool {
    /// `TMPFS_MAGIC` and `HUGETLBFS_MAGIC` (linux/magic.h).
    const MEMORY: [u32; 2] = [0x0102_1994, 0x9584_58f6];
    let is_file = file.metadata().is_ok_and(|facts| facts.is_file());
    is_file && rustix::fs::fstatfs(file).is_ok_and(|found| !MEMORY.contains(&(found.f_type as u32)))
}

impl Stored {
    /// Has `bytes` come next into `file`.
    fn take(&self, file: &File, bytes: u64) -> Result<()> {
        let before = self.written.fetch_add(bytes, Ordering::Relaxed);
        if before / LOOK_EVERY == before.saturating_add(bytes) / LOOK_EVERY {
            return Ok(());
        }
        let blocks = file.metadata().map_or(0, |facts| facts.blocks());
        // What is written over needs no more.
        let grows = blocks > self.blocks.swap(blocks, Ordering::Relaxed);
        let Ok(found) = rustix::fs::fstatvfs(file) else { return Ok(()) };
        let size = found.f_blocks.saturating_mul(found.f_frsize);
        // Not every file system tells its size.
        let least = if size > 0 { LEFT.min(size / 100) } else { LEFT };
        match found.f_bavail.saturating_mul(found.f_frsize) {
            free if grows && free < least => Err(WorkloadError::plain(format!(
                "The file system that its disk comes to has {} MiB left, and more of it is coming: free some, and \
                 move it again",
                free >> 20
            ))),
            _ => Ok(()),
        }
    }
}

/// Bytes of memory that this host has available.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Bytes of a page of a file of huge pages, which takes no writes.
fn huge_page(file: &File) -> Option<u64> {
    /// `HUGETLBFS_MAGIC` (linux/magic.h).
    const MAGIC: u32 = 0x9584_58f6;
    let found = rustix::fs::fstatfs(file).ok()?;
    let page = u64::try_from(found.f_bsize).ok()?;
    (found.f_type as u32 == MAGIC && page.is_power_of_two()).then_some(page)
}

impl DescriptorWriter {
    /// Of these files, each with one past its last page.
    pub(crate) fn of(spaces: BTreeMap<SpaceId, (Arc<File>, u64)>) -> Self {
        let on_disk = spaces.iter().filter(|(_, (file, _))| is_stored(file));
        let stored = on_disk.map(|(space, _)| (*space, Arc::default())).collect();
        Self { spaces, stored, room: None }
    }

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
        if let Some(room) = &self.room {
            room.take(bytes.len() as u64, &self.spaces)?;
        }
        let file = self.space(range)?;
        if let Some(stored) = self.stored.get(&range.space) {
            stored.take(file, bytes.len() as u64)?;
        }
        let stored = match file.write_all_at(bytes, range.address()) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => match huge_page(file) {
                Some(page) => sys::write_mapped(file, range.address(), bytes, page),
                None => Err(error),
            },
            stored => stored,
        };
        stored.map_err(|error| WorkloadError::new(format!("Cannot store {range}"), error))
    }

    fn zero(&self, range: PageRange) -> Result<()> {
        let file = self.space(range)?;
        let punched = match punch(file, range.address(), range.bytes() as u64) {
            // A file system without holes keeps zeros.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                let page = [0; PAGE_SIZE];
                let pages = (range.first..range.end()).map(|page| page * PAGE_SIZE as u64);
                pages.into_iter().try_for_each(|at| file.write_all_at(&page, at))
            }
            punched => punched,
        };
        punched
            .and_then(|()| match huge_page(file) {
                Some(page) => clear_parts(file, range.address(), range.bytes() as u64, page),
                None => Ok(()),
            })
            .map_err(|error| WorkloadError::new(format!("Cannot clear {range}"), error))
    }
}

fn punch(file: &File, at: u64, length: u64) -> io::Result<()> {
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, hole, at as i64, length as i64)?)
}

/// Has zeros be in those of `length` bytes that are not whole huge pages, of `page` bytes each, where anything else
/// is: kernels before Linux 5.19 make holes of whole ones alone, and say nothing of the rest.
fn clear_parts(file: &File, at: u64, length: u64, page: u64) -> io::Result<()> {
    let end = at + length;
    let (first, last) = (at.next_multiple_of(page).min(end), end / page * page);
    // Within one page there is no whole one between.
    let parts = if first <= last { [at..first, last..end] } else { [at..end, end..end] };
    let size = file.metadata()?.len();
    let mut bytes = vec![0; PAGE_SIZE];
    for part in parts {
        // A hole is read as zeros, and stays one; behind the end there is nothing.
        for at in (part.start..part.end.min(size)).step_by(PAGE_SIZE) {
            bytes.fill(0);
            file.read_exact_at(&mut bytes, at)?;
            if bytes.iter().any(|byte| *byte != 0) {
                bytes.fill(0);
                sys::write_mapped(file, at, &bytes, page)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;
    use crate::workload::Place;

    fn source(client: KeeperClient) -> KeeperSource {
        KeeperSource {
            client,
            token: 0,
            manifest: Manifest::default(),
            liveness: Liveness::StopOnly { reason: "the test says so".to_owned() },
            ways: Ways::default(),
            make_reader: Box::new(|_, _| Err(WorkloadError::plain("Nothing is read"))),
            lasting: false,
            known: None,
        }
    }

    /// A keeper that hangs up on `count` connections and is gone then.
    fn hangs_up(place: &Place, count: usize) -> thread::JoinHandle<()> {
        let listener = UnixListener::bind(place.socket()).expect("a socket");
        thread::spawn(move || {
            for _ in 0..count {
                drop(listener.accept().expect("accepts"));
            }
        })
    }

    /// Its keeper answers nothing here.
    #[test]
    fn spaces_that_last_are_asked_for_once_and_again_when_they_were_changed() {
        struct Nothing;
        impl PageReader for Nothing {
            fn read(&self, _: PageRange, _: &mut [u8]) -> Result<()> {
                Err(WorkloadError::plain("Nothing is read"))
            }

            fn take_missed(&self) -> PageSet {
                PageSet::new()
            }
        }
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place { name: "x".into(), uuid: "x".into(), dir: dir.path().to_owned() };
        let keeper = hangs_up(&place, 1);
        let client = KeeperClient::connect(&place).expect("connected");
        keeper.join().expect("it is gone");
        let mut source = source(client).with_lasting_spaces();
        let spaces = vec![SpaceInfo { id: 7, ..SpaceInfo::default() }];
        source.known = Some((spaces.clone(), Arc::new(Nothing)));
        assert_eq!(source.spaces().expect("known"), spaces);
        source.reader().map(drop).expect("known");
        source.carry(&[]).expect("no disk");
        source.spaces().expect_err("they may be others now");
        source.reader().map(drop).expect_err("so may their reader");
    }

    #[test]
    fn no_more_memory_comes_than_was_to_be_expected() {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = nix::sys::memfd::memfd_create("room", flags).expect("a memory file");
        let file = Arc::new(File::from(file));
        let space = SpaceId(1);
        let most = 2 * LOOK_EVERY;
        let writer = DescriptorWriter {
            spaces: BTreeMap::from([(space, (file, 1 << 20))]),
            room: Some(Arc::new(Room { most, ..Room::default() })),
            ..DescriptorWriter::default()
        };
        let bytes = vec![1; 1 << 20];
        let pages = (bytes.len() / crate::pages::PAGE_SIZE) as u64;
        let write = |at: u64| writer.write(PageRange::new(space, at * pages, pages), &bytes);
        // However often the same pages come.
        (0..LOOK_EVERY >> 17).for_each(|at| write(at % 16).expect("it fits"));
        let all = (0..LOOK_EVERY >> 18).map(write).find_map(std::result::Result::err);
        let error = all.expect("too much").to_string();
        assert!(error.contains("announced"), "{error}");
    }

    #[test]
    fn what_comes_does_not_fill_a_file_system() {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = nix::sys::memfd::memfd_create("full", flags).expect("a memory file");
        let file = Arc::new(File::from(file));
        assert!(
            !is_stored(&file) && is_stored(&tempfile::tempfile_in("/var/tmp").expect("a file"))
        );
        let space = SpaceId(1);
        // Where memory files are, the kernel tells of no room at all.
        let mut writer = DescriptorWriter::of(BTreeMap::from([(space, (file, 1 << 20))]));
        writer.stored.insert(space, Arc::default());
        let bytes = vec![1; 1 << 20];
        let pages = (bytes.len() / crate::pages::PAGE_SIZE) as u64;
        let wrote = (0..LOOK_EVERY >> 20)
            .map(|at| writer.write(PageRange::new(space, at * pages, pages), &bytes));
        let failed: Vec<_> = wrote.filter_map(std::result::Result::err).collect();
        assert_eq!(failed.len(), 1, "it is looked at once");
        assert!(failed[0].to_string().contains("0 MiB left"), "{}", failed[0]);
    }

    #[test]
    fn a_file_of_huge_pages_is_written_and_cleared() {
        const PAGE: usize = crate::pages::PAGE_SIZE;
        let flags = nix::sys::memfd::MFdFlags::from_bits_retain(4 | libc::MFD_CLOEXEC);
        let Ok(file) = nix::sys::memfd::memfd_create("huge", flags) else {
            return eprintln!("skipped: the kernel has no huge pages");
        };
        let file = Arc::new(File::from(file));
        let page = huge_page(&file).expect("its size");
        let space = SpaceId(1);
        let spaces = BTreeMap::from([(space, (file.clone(), 1 << 20))]);
        let writer = DescriptorWriter::of(spaces);
        // Across where two of them meet.
        let range = PageRange::new(space, page / PAGE as u64 - 1, 2);
        let bytes = [[1; PAGE], [2; PAGE]].concat();
        if let Err(error) = writer.write(range, &bytes) {
            // As it has to be where there are none, and nothing worse.
            return eprintln!("skipped: {error}: needs two huge pages (vm.nr_hugepages)");
        }
        let mut read = vec![7; 2 * PAGE];
        file.read_exact_at(&mut read, range.address()).expect("read");
        assert_eq!(read, bytes);
        writer.zero(PageRange::new(space, range.first, 1)).expect("cleared");
        file.read_exact_at(&mut read, range.address()).expect("read");
        assert_eq!(read, [[0; PAGE], [2; PAGE]].concat());
        // As on an older kernel, which does nothing for a part of a huge page.
        writer.write(range, &bytes).expect("written");
        clear_parts(&file, range.address() + PAGE as u64, PAGE as u64, page).expect("cleared");
        file.read_exact_at(&mut read, range.address()).expect("read");
        assert_eq!(read, [[1; PAGE], [0; PAGE]].concat());
        let pages = |count: u64| count * page / PAGE as u64;
        file.set_len(5 * page).expect("longer");
        let blocks = || file.metadata().expect("a file").blocks();
        let before = blocks();
        // The end of one and a whole one, which are there, and the beginning of the next, which is not.
        writer.zero(PageRange::new(space, range.first, pages(1) + 2)).expect("cleared");
        file.read_exact_at(&mut read, range.address()).expect("read");
        assert_eq!((read, blocks()), (vec![0; 2 * PAGE], before / 2));
        writer.zero(PageRange::new(space, pages(4) + 3, 5)).expect("a hole");
        writer.zero(PageRange::new(space, pages(5), pages(1) + 5)).expect("behind its end");
        assert_eq!(blocks(), before / 2);
        assert_eq!(huge_page(&tempfile::tempfile().expect("a file")), None);
    }

    #[test]
    fn more_spaces_than_files_may_be_open_are_refused() {
        room_for(8).expect("a few");
        let error = room_for(usize::MAX >> 1).expect_err("too many").to_string();
        assert!(error.contains("LimitNOFILE"), "{error}");
    }

    #[test]
    fn only_a_keeper_that_nobody_can_reach_is_gone() {
        for ask in [SourceWorkload::resume, SourceWorkload::release] {
            let directory = tempfile::tempdir().expect("a directory");
            let place = Place {
                name: "web".to_owned(),
                uuid: "u".to_owned(),
                dir: directory.path().to_owned(),
            };
            // The first, the second, and the look whether anybody is there.
            let keeper = hangs_up(&place, 3);
            let mut source = source(KeeperClient::connect(&place).expect("connects"));
            let error = ask(&mut source).expect_err("it never answers");
            assert!(!matches!(error, WorkloadError::KeeperGone { .. }), "{error}");
            keeper.join().expect("ends");
            // A program that another test starts at that moment has its descriptor as well, until it is that program.
            let begun = std::time::Instant::now();
            while KeeperClient::connect(&place).is_ok() {
                assert!(begun.elapsed() < std::time::Duration::from_secs(120), "somebody listens");
                thread::sleep(std::time::Duration::from_millis(1));
            }
            let error = ask(&mut source).expect_err("nobody listens");
            assert!(matches!(error, WorkloadError::KeeperGone { .. }), "{error}");
        }
    }
}
