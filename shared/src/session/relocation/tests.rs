//! Files of a workload that only says what it was asked to do, and goes on writing its file meanwhile.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard};

use super::limits::HELD_AT_LEAST;
use super::*;
use crate::keeper::record_switch;
use crate::pages::{PageRange, PageReader, SpaceId};
use crate::session::MaxDowntime;
use crate::workload::{
    FileRole, FileTree, Liveness, Manifest, Result as Worked, Section, SpaceInfo,
};

const PAGE: u64 = PAGE_SIZE as u64;
const SPACE: SpaceId = SpaceId(1);
const PAGES: u64 = 600;
/// It ends within a page.
const BYTES: u64 = PAGES * PAGE - 1024;

/// What a disk is to whoever moves it.
#[derive(Default)]
struct Disk {
    old: Option<File>,
    next: Option<File>,
    dirty: PageSet,
    harvests: u32,
    held: bool,
    switched: bool,
    said: Vec<&'static str>,
    /// It fails when this is asked for.
    fails_at: &'static str,
    /// This it does not answer, and does all the same.
    silent_at: &'static str,
    /// How long it is waited for.
    limit: Option<Duration>,
    /// Pages that are written while each of the first harvests is away, and how often.
    writes: u32,
    /// Nothing is read of it while it is held; that it was tried is told here.
    stalls: Option<CancellationToken>,
}

impl Disk {
    fn say(&mut self, what: &'static str) -> Worked<()> {
        self.said.push(what);
        match self.fails_at == what {
            true => Err(WorkloadError::plain(format!("Fails at {what}, because the test says so"))),
            false => Ok(()),
        }
    }

    /// As its guest does.
    fn write(&mut self, page: u64, byte: u8) {
        assert!(!self.held, "written while it is held");
        let file = if self.switched { &self.next } else { &self.old };
        let length = (BYTES - page * PAGE).min(PAGE) as usize;
        let file = file.as_ref().expect("a file");
        file.write_all_at(&vec![byte; length], page * PAGE).expect("written");
        self.dirty.insert(PageRange::new(SPACE, page, 1));
    }
}

#[derive(Clone)]
struct Fake(Arc<Mutex<Disk>>, Place, Arc<Condvar>);

impl Fake {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().expect("no panic")
    }

    /// As a keeper that is busy for longer than anybody waits.
    fn answer(&self, disk: MutexGuard<'_, Disk>, what: &'static str) -> Worked<()> {
        let (silent, limit) = (disk.silent_at == what, disk.limit);
        drop(disk);
        if !silent {
            return Ok(());
        }
        std::thread::sleep(limit.expect("it is waited for without a limit"));
        Err(WorkloadError::KeeperGone { name: "web".into(), what: format!("asked to {what}") })
    }
}

impl PageReader for Fake {
    fn read(&self, range: PageRange, into: &mut [u8]) -> Worked<()> {
        let mut disk = self.disk();
        if let (true, Some(stalls)) = (disk.held, disk.stalls.clone()) {
            stalls.cancel();
            disk = self.2.wait_while(disk, |disk| disk.held).expect("no panic");
        }
        into.fill(0);
        let length = (BYTES - range.address()).min(into.len() as u64) as usize;
        let file = disk.old.as_ref().expect("a file");
        file.read_exact_at(&mut into[..length], range.address())
            .map_err(|error| WorkloadError::new("Cannot read", error))
    }

    fn take_missed(&self) -> PageSet {
        PageSet::new()
    }
}

impl SourceWorkload for Fake {
    fn manifest(&mut self) -> Worked<Manifest> {
        Ok(Manifest::default())
    }

    fn liveness(&self) -> Liveness {
        Liveness::Tracked { tracker: "test".into() }
    }

    fn spaces(&mut self) -> Worked<Vec<SpaceInfo>> {
        Ok(Vec::new())
    }

    fn reader(&mut self) -> Worked<Arc<dyn PageReader>> {
        Ok(Arc::new(self.clone()))
    }

    fn can_mirror(&mut self) -> Worked<bool> {
        Ok(true)
    }

    fn answer_within(&mut self, limit: Option<Duration>) -> Worked<()> {
        self.disk().limit = limit;
        Ok(())
    }

    fn mirror(&mut self, tree: &FileTree, path: &Path, file: OwnedFd) -> Worked<()> {
        assert_eq!((tree.space, path.is_file()), (1, true));
        let file = File::from(file);
        file.set_len(BYTES).expect("sized");
        self.disk().next = Some(file);
        self.disk().say("mirror")
    }

    fn hold(&mut self) -> Worked<()> {
        let mut disk = self.disk();
        if disk.stalls.is_some() {
            // So that something is left.
            disk.write(3, 5);
        }
        disk.held = true;
        disk.say("hold")?;
        self.answer(disk, "hold")
    }

    fn switch(&mut self, migration: &str) -> Worked<()> {
        let mut disk = self.disk();
        disk.say("switch")?;
        assert!(disk.held && disk.dirty.is_empty());
        record_switch(&self.1, migration).expect("noted");
        (disk.switched, disk.held) = (true, false);
        self.answer(disk, "switch")
    }

    fn track(&mut self) -> Worked<()> {
        Err(WorkloadError::plain("Nothing but the file is tracked"))
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Worked<()> {
        let mut disk = self.disk();
        if disk.harvests == 0 {
            // As what is sparse says where it holds anything.
            dirty.insert(PageRange::new(SPACE, 0, 20));
            dirty.insert(PageRange::new(SPACE, 300, PAGES - 300));
        }
        dirty.union(&std::mem::take(&mut disk.dirty));
        disk.harvests += 1;
        let harvests = disk.harvests;
        if !disk.held && harvests <= disk.writes {
            // Fewer each time; page 305 becomes zero after it was copied as something else.
            for page in 0..u64::from(100 / harvests) {
                disk.write(page * 6, harvests as u8);
            }
            disk.write(305, if harvests == 1 { 9 } else { 0 });
            disk.write(PAGES - 1, harvests as u8);
        }
        disk.say("harvest")?;
        let asked = if disk.held { "last harvest" } else { "harvest" };
        self.answer(disk, asked)
    }

    fn stall(&self) -> Duration {
        Duration::ZERO
    }

    fn throttle(&mut self, _: u8) -> Worked<()> {
        self.disk().say("throttle")
    }

    fn pause(&mut self) -> Worked<()> {
        Err(WorkloadError::plain("It is never stopped"))
    }

    fn save(&mut self) -> Worked<Vec<Section>> {
        Err(WorkloadError::plain("It is never stopped"))
    }

    fn fence(&mut self, _: u64) -> Worked<()> {
        Err(WorkloadError::plain("It is never stopped"))
    }

    fn resume(&mut self) -> Worked<()> {
        let mut disk = self.disk();
        disk.held = false;
        self.2.notify_all();
        disk.say("resume")
    }

    fn release(&mut self) -> Worked<()> {
        Err(WorkloadError::plain("It is never stopped"))
    }
}

struct Room {
    dir: tempfile::TempDir,
    fake: Fake,
    cancel: CancellationToken,
}

impl Room {
    fn new(writes: u32) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let old = dir.path().join("old");
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&old).expect("made");
        file.set_len(BYTES).expect("sized");
        for page in (0..20).chain(300..PAGES) {
            let length = (BYTES - page * PAGE).min(PAGE) as usize;
            file.write_all_at(&vec![page as u8; length], page * PAGE).expect("written");
        }
        file.set_permissions(fs::Permissions::from_mode(0o640)).expect("set");
        let disk = Disk { old: Some(file), writes, ..Disk::default() };
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().join("place") };
        fs::create_dir(&place.dir).expect("made");
        Self {
            fake: Fake(Arc::new(Mutex::new(disk)), place, Arc::default()),
            dir,
            cancel: Default::default(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn relocate(&self, options: MoveOptions) -> Report {
        let tree = FileTree {
            role: FileRole::Disk.into(),
            path: self.path("old").display().to_string(),
            live: true,
            space: 1,
            ..FileTree::default()
        };
        relocate(Relocation {
            migration: "m".into(),
            host: "alpha".into(),
            kind: Kind::Vm,
            place: self.fake.1.clone(),
            workload: Box::new(self.fake.clone()),
            files: vec![PlacedTree { tree, path: self.path("new") }],
            options,
            landing: self.fake.1.dir.join("made"),
            progress: ProgressSender::default(),
            cancel: self.cancel.clone(),
        })
        .await
    }

    /// What whoever asked for it does when it did not come to be.
    fn take_back(&self) {
        Landing::recover(&self.fake.1.dir.join("made")).expect("a record").remove();
        assert!(!self.path("new").exists(), "it is left behind");
        assert_eq!(fs::read_dir(self.dir.path()).expect("listed").count(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_written_all_the_time_moves_whole() {
    let room = Room::new(4);
    let report = room.relocate(MoveOptions::default()).await;
    assert_eq!((report.outcome, &report.reason), (Outcome::Completed, &None));
    assert_eq!((report.from.as_str(), report.to.as_str()), ("alpha", "alpha"));
    assert_eq!((report.wire_bytes, report.mode.as_str()), (0, "pre-copy"));
    let parts = report.downtime;
    let held = report.downtime_ms.expect("it was held");
    assert!(held >= parts.pause_ms + parts.memory_ms + parts.switch_ms, "{report:?}");
    assert!(report.rounds.len() >= 3 && report.pages.zero > 0 && report.pages.raw >= 320);
    let (old, new) = (room.path("old"), room.path("new"));
    assert!(fs::read(&old).expect("read") == fs::read(&new).expect("read"), "they differ");
    let found = fs::metadata(&new).expect("there");
    assert_eq!((found.len(), found.mode() & 0o777), (BYTES, 0o640));
    assert!(found.blocks() * 512 <= (PAGES - 180) * PAGE, "it is not sparse: {}", found.blocks());
    let mut disk = room.fake.disk();
    let said: Vec<_> = disk.said.iter().filter(|said| **said != "harvest").collect();
    assert_eq!(said, [&"mirror", &"hold", &"switch", &"resume"]);
    disk.write(4, 77);
    drop(disk);
    assert!(fs::read(&old).expect("read") != fs::read(&new).expect("read"), "both are written");
    // It stays, however whoever asked for it ends.
    Landing::recover(&room.fake.1.dir.join("made")).expect("a record").keep();
    assert!(new.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_before_the_switch_changes_nothing() {
    for point in ["mirror", "harvest", "hold", "switch"] {
        let room = Room::new(2);
        room.fake.disk().fails_at = point;
        let report = room.relocate(MoveOptions::default()).await;
        let reason = report.reason.expect("a reason");
        assert_eq!(
            (report.outcome, report.downtime_ms, report.lost),
            (Outcome::Failed, None, false)
        );
        assert!(reason.contains(&format!("Fails at {point}")), "{reason}");
        assert!(
            reason.ends_with("web runs on at alpha, with the disks where they were"),
            "{reason}"
        );
        let mut disk = room.fake.disk();
        assert_eq!((disk.said.last(), disk.held), (Some(&"resume"), false), "{point}");
        disk.write(1, 3);
        drop(disk);
        room.take_back();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stands_there_already_is_not_touched() {
    let room = Room::new(0);
    fs::write(room.path("new"), "somebody's").expect("written");
    let report = room.relocate(MoveOptions::default()).await;
    assert_eq!(report.outcome, Outcome::Failed);
    Landing::recover(&room.fake.1.dir.join("made")).expect("a record").remove();
    assert_eq!(fs::read(room.path("new")).expect("read"), b"somebody's");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_called_off_and_tried_without_a_trace() {
    let room = Room::new(2);
    let dry = room.relocate(MoveOptions { dry_run: true, ..MoveOptions::default() }).await;
    assert_eq!(dry.outcome, Outcome::Completed);
    assert!(dry.reason.is_some_and(|reason| reason.starts_with("Dry run")));
    assert!(room.fake.disk().said.is_empty() && !room.path("new").exists());
    room.cancel.cancel();
    let report = room.relocate(MoveOptions::default()).await;
    assert_eq!(report.outcome, Outcome::Cancelled);
    assert_eq!(room.fake.disk().said, ["resume"]);
    room.take_back();
}

/// More than can be copied in the time that it may be held.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_switched_in_time_is_given_up_and_not_held() {
    let room = Room::new(u32::MAX);
    let options = MoveOptions { max_downtime_ms: Some(1), ..MoveOptions::default() };
    let report = room.relocate(options).await;
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(report.reason.is_some_and(|reason| reason.contains("--max-downtime")));
    assert!(!room.fake.disk().said.contains(&"hold"));
    room.take_back();
}

/// What it is copied to, or from, stands still in the middle of the last round, and stays so until the disk goes on.
#[tokio::test]
async fn a_disk_that_is_held_goes_on_whatever_its_copy_does() {
    for calls_off in [true, false] {
        let (room, stalled) = (Room::new(2), CancellationToken::new());
        room.fake.disk().stalls = Some(stalled.clone());
        let meanwhile = async {
            stalled.cancelled().await;
            if calls_off {
                room.cancel.cancel();
            }
        };
        let (report, ()) = tokio::join!(room.relocate(MoveOptions::default()), meanwhile);
        let outcome = if calls_off { Outcome::Cancelled } else { Outcome::Failed };
        let reason = report.reason.expect("a reason");
        let says = if calls_off { "Cancelled" } else { "not stored within 10 s" };
        assert!(report.outcome == outcome && reason.contains(says), "{reason}");
        let mut disk = room.fake.disk();
        assert_eq!((disk.said.last(), disk.held, disk.switched), (Some(&"resume"), false, false));
        disk.write(1, 3);
        drop(disk);
        room.take_back();
    }
}

/// Whatever is asked while the disks stand still has a limit. What is done in the end counts, and not what was heard.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_does_not_answer_in_time_is_not_waited_for() {
    let silent = |point: &'static str| async move {
        let room = Room::new(2);
        room.fake.disk().silent_at = point;
        let begun = Instant::now();
        let report = room.relocate(MoveOptions::default()).await;
        assert!(begun.elapsed() >= HELD_AT_LEAST && begun.elapsed() < HELD_AT_LEAST * 3);
        (room, report)
    };
    let ((hold, held), (last, harvested), (switch, switched)) =
        tokio::join!(silent("hold"), silent("last harvest"), silent("switch"));
    for (room, report, says) in [
        (hold, held, "not held within 10 s"),
        (last, harvested, "did not say within 10 s what was written"),
    ] {
        let reason = report.reason.expect("a reason");
        assert!(report.outcome == Outcome::Failed && reason.contains(says), "{reason}");
        assert!(reason.ends_with("with the disks where they were"), "{reason}");
        let mut disk = room.fake.disk();
        assert_eq!((disk.said.last(), disk.held, disk.limit), (Some(&"resume"), false, None));
        disk.write(1, 3);
        drop(disk);
        room.take_back();
    }
    assert_eq!((switched.outcome, switched.reason), (Outcome::Completed, None));
    assert!(switch.fake.disk().switched && switch.path("new").exists());
    let late = chain(&Step::Switch.late(Duration::from_secs(12)));
    assert!(late.contains("go over to the new files within 12 s"), "{late}");
}

#[test]
fn what_is_held_is_waited_for_in_proportion() {
    let promised = |ms| held_for(MaxDowntime::Promised(Duration::from_millis(ms)));
    assert_eq!([promised(1), promised(2000)].map(|held| held.as_secs()), [10, 20]);
    assert_eq!(promised(u64::MAX), Duration::from_millis(u64::MAX) * 10);
}
