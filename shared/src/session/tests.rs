//! Whole moves between two hosts in one process: real TLS, real journals, real page streams; the
//! workload is memory that a thread keeps writing, and it says at any moment whether it runs.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::commit::Record;
use super::journal::{Journal, Role as End};
use super::progress::Progress;
use super::*;
use crate::methods::Ways;
use crate::pages::{PAGE_SIZE, PageRange, PageReader, PageSet, PageWriter, SpaceId};
use crate::transport::testing::Authority;
use crate::transport::{Acceptor, Control, Dialer, PeerAddress, Versions};
use crate::workload::{
    self, DestinationWorkload, Kind, Liveness, Manifest, PlacedTree, Refusal, RefusalCode, Section,
    SourceWorkload, SpaceInfo, WorkloadError,
};

mod open;

const PAGES: u64 = 2048;
const SPACE: SpaceId = SpaceId(0);

/// More time than anything that is awaited takes, on however slow and busy a machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits for what happens beside the test.
async fn until(there: impl Fn() -> bool) {
    let waited = async {
        while !there() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.expect("it comes");
}

/// Memory as words, one a page's eighth; every write bumps a version, so staleness shows.
#[derive(Default)]
struct Memory {
    pages: Mutex<Vec<Vec<u8>>>,
    dirty: Mutex<PageSet>,
}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            pages: Mutex::new(vec![vec![0; PAGE_SIZE]; PAGES as usize]),
            dirty: Mutex::default(),
        })
    }

    fn put(&self, page: u64, bytes: &[u8]) {
        lock(&self.pages)[page as usize].copy_from_slice(bytes);
        lock(&self.dirty).insert(PageRange::new(SPACE, page, 1));
    }
}

impl PageReader for Memory {
    fn read(&self, range: PageRange, into: &mut [u8]) -> workload::Result<()> {
        let pages = lock(&self.pages);
        for (index, chunk) in into.chunks_mut(PAGE_SIZE).enumerate() {
            chunk.copy_from_slice(&pages[range.first as usize + index]);
        }
        Ok(())
    }

    fn take_missed(&self) -> PageSet {
        PageSet::new()
    }
}

impl PageWriter for Memory {
    fn write(&self, range: PageRange, bytes: &[u8]) -> workload::Result<()> {
        let mut pages = lock(&self.pages);
        for (index, chunk) in bytes.chunks(PAGE_SIZE).enumerate() {
            pages[range.first as usize + index].copy_from_slice(chunk);
        }
        Ok(())
    }

    fn zero(&self, range: PageRange) -> workload::Result<()> {
        self.write(range, &vec![0; range.bytes()])
    }
}

/// What both ends and the test share of one workload: which copy runs.
#[derive(Default)]
struct Copies {
    source_runs: AtomicBool,
    destination_runs: AtomicBool,
    released: AtomicBool,
    discarded: AtomicBool,
    /// Writes made so far, by whichever copy runs.
    writes: AtomicU64,
    refuse_activation: AtomicBool,
    lose_activation: AtomicBool,
    /// The thread that activates panics when it has done so.
    die_activating: AtomicBool,
    undecided: AtomicBool,
    /// The destination is still finding out what became of it.
    recovers: AtomicBool,
    /// The source's keeper ends when it is told to pause.
    keeper_dies: AtomicBool,
    /// In the stop the source looks for written pages until that is called off.
    looks_for_ever: AtomicBool,
    called_off: Arc<AtomicBool>,
    /// In the stop all pages count as written, and the destination takes so many milliseconds for each piece of them.
    installs_in: AtomicU64,
    saved: AtomicBool,
    /// What was in the destination's memory when it was told to load.
    at_load: Mutex<Vec<Vec<u8>>>,
}

impl Copies {
    fn running(&self) -> usize {
        [&self.source_runs, &self.destination_runs]
            .iter()
            .filter(|flag| flag.load(Ordering::SeqCst))
            .count()
    }
}

struct Leaving {
    memory: Arc<Memory>,
    copies: Arc<Copies>,
    tracked: bool,
}

impl SourceWorkload for Leaving {
    fn manifest(&mut self) -> workload::Result<Manifest> {
        Ok(Manifest {
            name: "web".to_owned(),
            uuid: "6d3d5d0e-0000-4000-8000-000000000001".to_owned(),
            kind: Kind::Vm.into(),
            memory_bytes: PAGES * PAGE_SIZE as u64,
            spaces: space(),
            ..Manifest::default()
        })
    }

    fn liveness(&self) -> Liveness {
        if self.tracked {
            Liveness::Tracked { tracker: "test".to_owned() }
        } else {
            Liveness::StopOnly { reason: "the test says so".to_owned() }
        }
    }

    fn spaces(&mut self) -> workload::Result<Vec<SpaceInfo>> {
        Ok(space())
    }

    fn reader(&mut self) -> workload::Result<Arc<dyn PageReader>> {
        Ok(self.memory.clone())
    }

    fn track(&mut self) -> workload::Result<()> {
        lock(&self.memory.dirty).insert(PageRange::new(SPACE, 0, PAGES));
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> workload::Result<()> {
        if !self.tracked {
            dirty.insert(PageRange::new(SPACE, 0, PAGES));
        }
        let stands_still = !self.copies.source_runs.load(Ordering::SeqCst);
        if stands_still && self.copies.looks_for_ever.load(Ordering::SeqCst) {
            while !self.copies.called_off.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            return Err(WorkloadError::plain("It was called off"));
        }
        dirty.union(&std::mem::take(&mut *lock(&self.memory.dirty)));
        Ok(())
    }

    fn call_off(&self) -> Option<Arc<AtomicBool>> {
        Some(self.copies.called_off.clone())
    }

    fn stall(&self) -> Duration {
        Duration::ZERO
    }

    fn ways(&self) -> Ways {
        let fallbacks = vec!["the source's reason".to_owned()];
        Ways { dump: Some(Ways::HIDDEN.to_owned()), restore: None, fallbacks }
    }

    fn throttle(&mut self, _percent: u8) -> workload::Result<()> {
        Ok(())
    }

    fn pause(&mut self) -> workload::Result<()> {
        self.copies.source_runs.store(false, Ordering::SeqCst);
        if self.copies.keeper_dies.load(Ordering::SeqCst) {
            return Err(keeper_gone());
        }
        // The writer may be in the middle of a page.
        std::thread::sleep(Duration::from_millis(5));
        if self.copies.installs_in.load(Ordering::SeqCst) > 0 {
            lock(&self.memory.dirty).insert(PageRange::new(SPACE, 0, PAGES));
        }
        Ok(())
    }

    fn save(&mut self) -> workload::Result<Vec<Section>> {
        let writes = self.copies.writes.load(Ordering::SeqCst);
        self.copies.saved.store(true, Ordering::SeqCst);
        Ok(vec![Section {
            kind: "writes".to_owned(),
            version: 1,
            bytes: writes.to_le_bytes().into(),
        }])
    }

    fn fence(&mut self, _token: u64) -> workload::Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> workload::Result<()> {
        if self.copies.keeper_dies.load(Ordering::SeqCst) {
            return Err(keeper_gone());
        }
        self.copies.source_runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn release(&mut self) -> workload::Result<()> {
        self.copies.released.store(true, Ordering::SeqCst);
        Ok(())
    }
}

/// Puts pages in their places, slowly when told so.
struct Placing {
    memory: Arc<Memory>,
    copies: Arc<Copies>,
}

impl PageWriter for Placing {
    fn write(&self, range: PageRange, bytes: &[u8]) -> workload::Result<()> {
        let stands_still = !self.copies.source_runs.load(Ordering::SeqCst);
        if stands_still {
            let time = self.copies.installs_in.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(time));
        }
        self.memory.write(range, bytes)
    }

    fn zero(&self, range: PageRange) -> workload::Result<()> {
        self.write(range, &vec![0; range.bytes()])
    }
}

struct Arriving {
    memory: Arc<Memory>,
    copies: Arc<Copies>,
}

impl DestinationWorkload for Arriving {
    fn writer(&mut self, _spaces: &[SpaceInfo]) -> workload::Result<Arc<dyn PageWriter>> {
        let (memory, copies) = (self.memory.clone(), self.copies.clone());
        Ok(Arc::new(Placing { memory, copies }))
    }

    fn load(&mut self, sections: Vec<Section>) -> workload::Result<()> {
        *lock(&self.copies.at_load) = lock(&self.memory.pages).clone();
        let writes = self.copies.writes.load(Ordering::SeqCst).to_le_bytes();
        if sections.len() == 1 && sections[0].bytes == writes {
            Ok(())
        } else {
            Err(WorkloadError::plain("The state is not the one that was saved"))
        }
    }

    fn ways(&self) -> Ways {
        let fallbacks = vec!["the destination's reason".to_owned()];
        Ways { dump: None, restore: Some(Ways::EAGER.to_owned()), fallbacks }
    }

    fn activate(&mut self, _token: u64) -> workload::Result<()> {
        if self.copies.lose_activation.load(Ordering::SeqCst) {
            return Err(WorkloadError::Uncertain { source: "its keeper is gone".into() });
        }
        if self.copies.refuse_activation.load(Ordering::SeqCst) {
            return Err(WorkloadError::plain("It would not start"));
        }
        self.copies.destination_runs.store(true, Ordering::SeqCst);
        assert!(!self.copies.die_activating.load(Ordering::SeqCst), "the test says so");
        Ok(())
    }

    fn discard(&mut self) -> workload::Result<()> {
        self.copies.discarded.store(true, Ordering::SeqCst);
        Ok(())
    }
}

struct Beta {
    memory: Arc<Memory>,
    copies: Arc<Copies>,
    refusals: Vec<Refusal>,
}

impl DestinationHost for Beta {
    fn name(&self) -> &str {
        "beta"
    }

    fn page_encryption(&self) -> bool {
        true
    }

    fn cpu_offer(&self) -> workload::Result<Vec<u8>> {
        match &self.refusals[..] {
            [] => Ok(b"a fine CPU".to_vec()),
            [first, ..] => Err(WorkloadError::plain(first.text.clone())),
        }
    }

    fn place_trees(
        &self,
        _manifest: &Manifest,
        _paths: &[(PathBuf, PathBuf)],
    ) -> std::result::Result<Vec<PlacedTree>, Vec<Refusal>> {
        Ok(Vec::new())
    }

    fn preflight(&self, _manifest: &Manifest, _trees: &[PlacedTree]) -> Vec<Refusal> {
        self.refusals.clone()
    }

    fn known_copy(&self, _manifest: &Manifest, _tree: &PlacedTree) -> bool {
        false
    }

    fn prepare(
        &self,
        _migration: &str,
        _manifest: &Manifest,
        _trees: &[PlacedTree],
    ) -> workload::Result<Box<dyn DestinationWorkload>> {
        Ok(Box::new(Arriving { memory: self.memory.clone(), copies: self.copies.clone() }))
    }

    fn running(&self, _migration: &str, _manifest: &Manifest) {}

    fn gone(&self, _migration: &str, _manifest: &Manifest) {}

    fn undecided(&self, _migration: &str, _manifest: &Manifest) {
        self.copies.undecided.store(true, Ordering::SeqCst);
    }

    fn recovers(&self, _migration: &str) -> bool {
        self.copies.recovers.load(Ordering::SeqCst)
    }
}

fn keeper_gone() -> WorkloadError {
    WorkloadError::KeeperGone { name: "web".to_owned(), what: "it ended".to_owned() }
}

/// Two hosts, a workload that writes, and everything that a test looks at.
struct Pair {
    copies: Arc<Copies>,
    here: Arc<Memory>,
    there: Arc<Memory>,
    journals: (Arc<Journal>, Arc<Journal>),
    context: SourceContext,
    stop_writer: Arc<AtomicBool>,
    tracked: bool,
    _directory: tempfile::TempDir,
    _authority: Authority,
}

impl Pair {
    async fn new(tracked: bool, refusals: Vec<Refusal>) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let authority = Authority::new();
        let journal = |name: &str| {
            Arc::new(Journal::open(&directory.path().join(name)).expect("a journal opens"))
        };
        let journals = (journal("alpha.db"), journal("beta.db"));
        let copies = Arc::new(Copies::default());
        copies.source_runs.store(true, Ordering::SeqCst);
        let (here, there) = (Memory::new(), Memory::new());
        let host = Beta { memory: there.clone(), copies: copies.clone(), refusals };
        let sessions = DestinationSessions::new(Arc::new(host), journals.1.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let acceptor = Arc::new(Acceptor::new(authority.identity("beta"), Versions::OURS));
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (sessions, acceptor) = (sessions.clone(), acceptor.clone());
                tokio::spawn(async move {
                    if let Ok(connection) = acceptor.accept(tcp).await {
                        sessions.serve(connection).await;
                    }
                });
            }
        });
        let context = SourceContext {
            host: "alpha".to_owned(),
            dialer: Dialer::new(authority.identity("alpha"), Versions::OURS),
            peer: PeerAddress { name: "beta".to_owned(), address },
            page_encryption: true,
            journal: journals.0.clone(),
        };
        let stop_writer = Arc::new(AtomicBool::new(false));
        write_for_ever(&here, &copies, &stop_writer);
        Self {
            copies,
            here,
            there,
            journals,
            context,
            stop_writer,
            tracked,
            _directory: directory,
            _authority: authority,
        }
    }

    async fn migrate(&self, options: MoveOptions, cancel: CancellationToken) -> Ending {
        let (progress, mut told) = ProgressSender::channel();
        let workload = Box::new(Leaving {
            memory: self.here.clone(),
            copies: self.copies.clone(),
            tracked: self.tracked,
        });
        let request = SourceMove {
            migration: uuid::Uuid::new_v4().to_string(),
            workload,
            options,
            progress,
            cancel,
        };
        let ending = migrate(&self.context, request).await;
        let mut last = None;
        while let Ok(event) = told.try_recv() {
            last = Some(event);
        }
        assert!(matches!(last, Some(Progress::Report { .. })), "the report is told last");
        ending
    }

    fn records(&self, migration: &str) -> (Option<Record>, Option<Record>) {
        let record = |journal: &Journal, end| {
            journal.session(migration, end).expect("reads").map(|row| row.record)
        };
        (record(&self.journals.0, End::Source), record(&self.journals.1, End::Destination))
    }

    fn same_memory(&self) -> bool {
        *lock(&self.here.pages) == *lock(&self.there.pages)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop_writer.store(true, Ordering::SeqCst);
    }
}

/// Writes a page about every 50 µs for as long as the source's copy runs.
fn write_for_ever(memory: &Arc<Memory>, copies: &Arc<Copies>, stop: &Arc<AtomicBool>) {
    let (memory, copies, stop) = (memory.clone(), copies.clone(), stop.clone());
    std::thread::spawn(move || {
        let mut page = [0; PAGE_SIZE];
        while !stop.load(Ordering::SeqCst) {
            if copies.source_runs.load(Ordering::SeqCst) {
                let count = copies.writes.fetch_add(1, Ordering::SeqCst);
                page[..8].copy_from_slice(&count.to_le_bytes());
                memory.put(count * 7 % 300, &page);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    });
}

fn space() -> Vec<SpaceInfo> {
    vec![SpaceInfo { id: 0, page_limit: PAGES, label: "memory".to_owned(), process: 0 }]
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_workload_moves_and_only_one_copy_runs() {
    let pair = Pair::new(true, Vec::new()).await;
    let ending = pair.migrate(MoveOptions::default(), CancellationToken::new()).await;
    assert_eq!(ending.fate, Fate::Moved, "{:?}", ending.report.reason);
    assert_eq!(ending.report.outcome, Outcome::Completed);
    assert_eq!(ending.report.mode, "pre-copy");
    assert!(ending.report.rounds.len() >= 2, "{:?}", ending.report.rounds);
    assert!(ending.report.downtime_ms.is_some());
    let report = &ending.report;
    assert_eq!(
        (report.dump.as_deref(), report.restore.as_deref()),
        (Some("hidden"), Some("eager"))
    );
    assert_eq!(report.fallbacks, ["the source's reason", "the destination's reason"]);
    assert!(pair.same_memory());
    assert_eq!(pair.copies.running(), 1);
    assert!(pair.copies.released.load(Ordering::SeqCst));
    let records = pair.records(&ending.report.migration);
    assert_eq!(records, (Some(Record::Released), Some(Record::Running)));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_loaded_before_the_last_page_is_in_its_place() {
    let pair = Pair::new(true, Vec::new()).await;
    // Longer than anything else takes on a busy machine.
    pair.copies.installs_in.store(400, Ordering::SeqCst);
    let ending = pair.migrate(MoveOptions::default(), CancellationToken::new()).await;
    assert_eq!(ending.fate, Fate::Moved, "{:?}", ending.report.reason);
    assert!(*lock(&pair.copies.at_load) == *lock(&pair.here.pages), "it was loaded too early");
    // It was asked for long before: what waits for the pages is that, and not the state.
    let downtime = &ending.report.downtime;
    assert!(downtime.memory_ms >= 400.0 && downtime.state_ms < 400.0, "{downtime:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_is_cancelled_while_its_last_pages_travel_and_its_state_has_come() {
    let pair = Pair::new(true, Vec::new()).await;
    pair.copies.installs_in.store(3000, Ordering::SeqCst);
    let cancel = CancellationToken::new();
    let (copies, asked) = (pair.copies.clone(), cancel.clone());
    tokio::spawn(async move {
        while !copies.saved.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        asked.cancel();
    });
    let ending = pair.migrate(MoveOptions::default(), cancel).await;
    assert_eq!(ending.report.outcome, Outcome::Cancelled, "{:?}", ending.report.reason);
    assert_eq!((ending.fate, pair.copies.running()), (Fate::Here, 1));
    let gone = async {
        while !pair.copies.discarded.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the copy goes");
    assert!(lock(&pair.copies.at_load).is_empty(), "nothing was loaded");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_without_a_tracker_is_stopped_and_copied() {
    let pair = Pair::new(false, Vec::new()).await;
    let ending = pair.migrate(MoveOptions::default(), CancellationToken::new()).await;
    assert_eq!(ending.fate, Fate::Moved, "{:?}", ending.report.reason);
    assert_eq!(ending.report.mode, "stop-and-copy");
    assert!(pair.same_memory());
    let asked = MoveOptions { mode: Mode::PreCopy, ..MoveOptions::default() };
    let pair = Pair::new(false, Vec::new()).await;
    let ending = pair.migrate(asked, CancellationToken::new()).await;
    assert_eq!(ending.report.outcome, Outcome::Refused);
    assert_eq!(pair.copies.running(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_is_told_and_nothing_is_touched() {
    let refusals = vec![
        Refusal::new(RefusalCode::Memory, "Too little memory"),
        Refusal::new(RefusalCode::Bridge, "No bridge br9"),
    ];
    let pair = Pair::new(true, refusals).await;
    let ending = pair.migrate(MoveOptions::default(), CancellationToken::new()).await;
    assert_eq!(ending.report.outcome, Outcome::Refused);
    assert_eq!(ending.report.refusals.len(), 2);
    assert_eq!(pair.records(&ending.report.migration), (None, None));
    assert_eq!(pair.copies.running(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_checks_and_touches_nothing() {
    let pair = Pair::new(true, Vec::new()).await;
    let dry = MoveOptions { dry_run: true, ..MoveOptions::default() };
    let ending = pair.migrate(dry, CancellationToken::new()).await;
    assert_eq!((ending.fate, ending.report.outcome), (Fate::Here, Outcome::Completed));
    assert_eq!(pair.records(&ending.report.migration), (None, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_cannot_start_it_gives_it_back() {
    let pair = Pair::new(true, Vec::new()).await;
    pair.copies.refuse_activation.store(true, Ordering::SeqCst);
    let ending = pair.migrate(MoveOptions::default(), CancellationToken::new()).await;
    assert_eq!((ending.fate, ending.report.outcome), (Fate::Here, Outcome::Failed));
    let reason = ending.report.reason.clone().unwrap_or_default();
    assert!(reason.contains("It would not start") && reason.contains("alpha"), "{reason}");
    assert_eq!(pair.copies.running(), 1);
    assert!(pair.copies.discarded.load(Ordering::SeqCst));
    let records = pair.records(&ending.report.migration);
    assert_eq!(records, (Some(Record::RolledBack), Some(Record::Aborted)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_lost_while_it_is_let_run_is_for_an_operator() {
    let pair = Pair::new(true, Vec::new()).await;
    pair.copies.lose_activation.store(true, Ordering::SeqCst);
    let ending = pair.migrate(MoveOptions::default(), CancellationToken::new()).await;
    assert_eq!((ending.fate, ending.report.outcome), (Fate::Unresolved, Outcome::Unresolved));
    assert_eq!(pair.copies.running(), 0, "nothing is started on a guess");
    let records = pair.records(&ending.report.migration);
    assert_eq!(records, (Some(Record::Fenced), Some(Record::Committed)));
    until(|| pair.copies.undecided.load(Ordering::SeqCst)).await;
    assert!(!pair.copies.discarded.load(Ordering::SeqCst));
    let made = pair.journals.1.landing_record(&ending.report.migration);
    assert!(made.exists(), "what it made on the disk can still be taken away");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_move_leaves_the_workload_running_and_nothing_behind() {
    let pair = Pair::new(true, Vec::new()).await;
    let cancel = CancellationToken::new();
    let slow = MoveOptions { max_downtime_ms: Some(0), ..MoveOptions::default() };
    let later = cancel.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(150)).await;
        later.cancel();
    });
    let ending = pair.migrate(slow, cancel).await;
    assert!(matches!(ending.report.outcome, Outcome::Cancelled | Outcome::Failed));
    assert_eq!(ending.fate, Fate::Here);
    assert_eq!(pair.copies.running(), 1);
    let wanted = (Some(Record::RolledBack), Some(Record::Aborted));
    until(|| pair.copies.discarded.load(Ordering::SeqCst)).await;
    until(|| pair.records(&ending.report.migration) == wanted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_at_memory_in_the_stop_is_called_off() {
    let pair = Pair::new(true, Vec::new()).await;
    pair.copies.looks_for_ever.store(true, Ordering::SeqCst);
    let cancel = CancellationToken::new();
    let (copies, later) = (pair.copies.clone(), cancel.clone());
    tokio::spawn(async move {
        while copies.source_runs.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        later.cancel();
    });
    let moved = pair.migrate(MoveOptions::default(), cancel);
    let ending = tokio::time::timeout(PATIENCE, moved).await.expect("it ends");
    assert_eq!(ending.report.outcome, Outcome::Cancelled, "{:?}", ending.report.reason);
    assert_eq!(ending.fate, Fate::Here);
    assert_eq!(pair.copies.running(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_listening_is_a_refusal_that_says_so() {
    let mut pair = Pair::new(true, Vec::new()).await;
    pair.context.peer.address = "127.0.0.1:1".to_owned();
    let ending = pair.migrate(MoveOptions::default(), CancellationToken::new()).await;
    assert_eq!(ending.report.outcome, Outcome::Refused);
    assert!(ending.report.reason.unwrap_or_default().contains("beta"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_says_what_cpu_it_offers_or_why_not() {
    let pair = Pair::new(true, Vec::new()).await;
    let ask = |pair: &Pair| {
        let (dialer, peer) = (pair.context.dialer.clone(), pair.context.peer.clone());
        async move { asking::ask_cpu(&dialer, &peer).await }
    };
    assert_eq!(ask(&pair).await.expect("an answer"), b"a fine CPU");
    let unable = Pair::new(true, vec![Refusal::new(RefusalCode::Kvm, "No KVM here")]).await;
    let error = ask(&unable).await.expect_err("it has none");
    assert!(error.to_string().contains("No KVM here"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_does_not_know_the_question_is_named_as_older() {
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let acceptor = Acceptor::new(authority.identity("beta"), Versions::OURS);
    let older = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.expect("a connection");
        let connection = acceptor.accept(tcp).await.expect("a peer");
        let (mut reader, mut writer) = Control::new(connection).split();
        // What the first version does about a body that it does not know.
        let _ = reader.recv::<crate::protocol::control::Request>(Duration::from_secs(5)).await;
        let _ = writer.close().await;
    });
    let dialer = Dialer::new(authority.identity("alpha"), Versions::OURS);
    let peer = PeerAddress { name: "beta".to_owned(), address };
    let error = asking::ask_cpu(&dialer, &peer).await.expect_err("no answer");
    assert!(error.to_string().contains("older"), "{error}");
    older.await.expect("no panic");
}
