//! Two keepers' VMs with disks on the real `/dev/kvm`, without sockets between: a disk that is written all the
//! time is copied page by page, and one that both hosts see changes hands.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use decamp_shared::pages::{PAGE_SIZE, PageRange, PageReader};
use vm_memory::VolatileSlice;

use super::*;
use crate::interfaces::tests::{Far, GUEST, apart};
use crate::monitor;
use crate::reader::GuestReader;
use crate::spec::{DiskSpec, NetSpec};
use crate::testing::{guest_spec, wait_for};

const PAGE: u64 = PAGE_SIZE as u64;
/// A disk that ends within a page.
const BYTES: u64 = 1024 * PAGE + 1536;

struct Host {
    dir: tempfile::TempDir,
    kept: VmKept,
}

impl Host {
    /// A host with a VM on one disk.
    fn new(disk: &Path, incoming: bool) -> Self {
        Self::with_net(disk, incoming, Vec::new())
    }

    fn with_net(disk: &Path, incoming: bool, net: Vec<NetSpec>) -> Self {
        Self::given(disk, incoming, net, |given, _, _| given)
    }

    /// One whose VM's keeper has a monitor, cut off at a switch or not.
    fn monitored(disk: &Path, cut_off: bool) -> Self {
        Self::given(disk, false, Vec::new(), |given, spec, place| {
            given.monitored(monitor::tests::beside(spec, place, cut_off))
        })
    }

    fn given(
        disk: &Path,
        incoming: bool,
        net: Vec<NetSpec>,
        confined: impl FnOnce(Given, &VmSpec, &Place) -> Given,
    ) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let mut spec = VmSpec { net, ..guest_spec(dir.path()) };
        spec.disks = vec![DiskSpec { path: disk.to_owned(), ..DiskSpec::default() }];
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
        let exit = ExitSignal::new().expect("a signal");
        let given = confined(Given::own(&spec, &place, incoming).expect("given"), &spec, &place);
        let kept = VmKept::build(&spec, &place, given, incoming, exit).expect("built");
        if !incoming {
            kept.with(|machine| machine.run()).expect("runs");
        }
        Self { dir, kept }
    }

    fn disk(&self) -> Arc<Disk> {
        self.kept.with(|machine| Ok(machine.disks()[0].clone())).expect("a disk")
    }
}

fn make_disk(path: &Path) {
    let file = File::create(path).expect("made");
    file.set_len(BYTES).expect("sized");
    for page in [0, 7, 8, 500, 1024] {
        let bytes = vec![page as u8 | 1; if page == 1024 { 1536 } else { 4096 }];
        file.write_all_at(&bytes, page * PAGE).expect("written");
    }
}

/// Copies what `from` harvests to descriptors of `to`; how many pages that were.
fn round(from: &mut VmKept, to: &mut VmKept) -> u64 {
    let mut dirty = PageSet::new();
    from.harvest(&mut dirty).expect("harvest");
    let spaces = from.spaces().expect("spaces");
    to.make_spaces(&spaces).expect("room");
    let mut reader = GuestReader::default();
    for space in &spaces {
        let id = SpaceId(space.id);
        reader = reader.with(id, from.memory(id).expect("a descriptor"), space.page_limit);
    }
    for range in dirty.ranges() {
        let writer = File::from(to.memory(range.space).expect("a descriptor"));
        for page in range.first..range.end() {
            let mut bytes = [0; PAGE_SIZE];
            reader.read(PageRange::new(range.space, page, 1), &mut bytes).expect("read");
            writer.write_all_at(&bytes, page * PAGE).expect("written");
        }
    }
    dirty.len()
}

/// Writes somewhere on `disk`, as a device's thread does.
fn scribble(disk: &Disk, number: u64) {
    let mut bytes = vec![number as u8; 1024];
    let at = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % (BYTES / 512 - 1) * 512;
    disk.write(at, &[VolatileSlice::from(&mut bytes[..])]).expect("written");
    if number.is_multiple_of(9) {
        disk.discard(at / PAGE * PAGE, 512).expect("discarded");
    }
}

#[test]
fn a_disk_that_is_written_all_the_time_is_copied_whole() {
    let files = tempfile::tempdir().expect("directory");
    let [here, there] = ["here", "there"].map(|name| files.path().join(name));
    make_disk(&here);
    let mut source = Host::new(&here, false);
    let disk = source.disk();
    assert_eq!(source.kept.spaces().expect("spaces").len(), 1, "unless it is carried");
    assert!(source.kept.carry(&[SpaceId(2)]).is_err(), "it has no such disk");
    source.kept.carry(&[SpaceId(1)]).expect("carried");
    source.kept.track().expect("tracked");
    let mut destination = Host::new(&there, true);
    assert!(
        destination.kept.make_spaces(&source.kept.spaces().expect("spaces")).is_err(),
        "no file"
    );
    File::create(&there).expect("made");
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            // An end of its own, for who fails below.
            while !stop.load(Ordering::SeqCst) && written.load(Ordering::SeqCst) < 1 << 18 {
                scribble(&disk, written.fetch_add(1, Ordering::SeqCst) + 1);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let mut pages = Vec::new();
        for _ in 0..4 {
            pages.push(round(&mut source.kept, &mut destination.kept));
            // Since then, so that the next round finds some of them.
            let before = written.load(Ordering::SeqCst);
            wait_for("more writes", || written.load(Ordering::SeqCst) > before + 20);
        }
        stop.store(true, Ordering::SeqCst);
        writer.join().expect("no panic");
        assert!(pages[1..].iter().all(|pages| *pages > 0), "{pages:?}");
    });
    source.kept.pause().expect("paused");
    let sections = source.kept.save().expect("saved");
    round(&mut source.kept, &mut destination.kept);
    destination.kept.load(sections).expect("loaded");
    source.kept.fenced().expect("fenced");
    assert!(source.disk().is_open(), "what is copied stays its own");
    destination.kept.activate().expect("runs");
    assert!(fs::read(&here).expect("read") == fs::read(&there).expect("read"), "they differ");
    let found = fs::metadata(&there).expect("there");
    assert_eq!(found.len(), BYTES);
    assert!(found.blocks() * 512 < BYTES, "it is not sparse: {} blocks", found.blocks());
    // The guest there writes on.
    scribble(&destination.disk(), 3);
    source.kept.release().expect("released");
    assert!(!source.dir.path().join("exit.json").exists());
}

#[test]
fn a_shared_disk_changes_hands_and_comes_back_when_the_move_fails() {
    let files = tempfile::tempdir().expect("directory");
    let path = files.path().join("shared");
    make_disk(&path);
    let mut source = Host::new(&path, false);
    let mut destination = Host::new(&path, true);
    source.kept.track().expect("tracked");
    round(&mut source.kept, &mut destination.kept);
    source.kept.pause().expect("paused");
    let sections = source.kept.save().expect("saved");
    round(&mut source.kept, &mut destination.kept);
    destination.kept.load(sections).expect("loaded");
    let text = destination.kept.activate().expect_err("it is the source's").to_string();
    assert!(text.contains("locked by"), "{text}");
    source.kept.fenced().expect("fenced");
    assert!(!source.disk().is_open());
    // Somebody else is quicker: nobody runs.
    let thief = Disk::new(0, &DiskSpec { path: path.clone(), ..DiskSpec::default() });
    thief.open(Duration::ZERO).expect("free");
    assert!(destination.kept.activate().is_err());
    let text = source.kept.resume().expect_err("it is not its own").to_string();
    assert!(text.contains("locked by"), "{text}");
    thief.close();
    source.kept.resume().expect("its own again");
    assert!(destination.kept.activate().is_err(), "the source has it");
    scribble(&source.disk(), 5);
    source.kept.pause().expect("paused");
    source.kept.save().expect("saved");
    source.kept.fenced().expect("fenced");
    destination.kept.activate().expect("runs");
    scribble(&destination.disk(), 6);
    source.kept.release().expect("released");
}

#[test]
fn what_does_not_fit_the_guest_any_more_does_not_travel() {
    let files = tempfile::tempdir().expect("directory");
    let path = files.path().join("disk");
    make_disk(&path);
    let mut source = Host::new(&path, false);
    let mut destination = Host::new(&path, true);
    // A shared disk is not for a peer to fill, and neither is one with contents.
    let space = |id| SpaceInfo { id, page_limit: 8, ..SpaceInfo::default() };
    let text = destination.kept.make_spaces(&[space(1)]).expect_err("not empty").to_string();
    assert!(text.contains("empty alone"), "{text}");
    assert!(destination.kept.make_spaces(&[space(2)]).is_err());
    assert!(destination.kept.memory(SpaceId(1)).is_err(), "it is not open");
    source.kept.pause().expect("paused");
    let sections = source.kept.save().expect("saved");
    source.kept.resume().expect("runs on");
    let file = File::options().write(true).open(&path).expect("opened");
    file.set_len(BYTES + 512).expect("longer");
    let text = source.kept.pause().expect_err("it has grown").to_string();
    let sizes = format!("{BYTES} bytes, and it has {}", BYTES + 512);
    assert!(text.contains(&sizes), "{text}");
    let text = destination.kept.load(sections).expect_err("it has grown").to_string();
    assert!(text.contains(&sizes), "{text}");
    file.set_len(BYTES).expect("as it was");
    source.kept.pause().expect("paused");
}

/// Each try begins where the last one ended.
#[test]
fn a_guest_is_on_the_network_and_announced_once_it_runs_again_and_not_before() {
    apart(|| {
        let files = tempfile::tempdir().expect("directory");
        let path = files.path().join("shared");
        make_disk(&path);
        let net = vec![NetSpec { bridge: "br0".into(), mac: Some(GUEST) }];
        let mut host = Host::with_net(&path, false, net);
        let mut far = Far::listen();
        host.kept.pause().expect("paused");
        host.kept.save().expect("saved");
        host.kept.fenced().expect("fenced");
        let thief = Disk::new(0, &DiskSpec { path: path.clone(), ..DiskSpec::default() });
        thief.open(Duration::ZERO).expect("free");
        for _ in 0..2 {
            assert!(host.kept.resume().is_err(), "its disk is not its own");
            assert!(host.kept.interfaces.is_off(), "it stands, and is on the network");
        }
        assert!(far.heard(GUEST, Duration::from_millis(100)).is_empty());
        thief.close();
        host.kept.resume().expect("runs");
        assert!(!host.kept.interfaces.is_off());
        assert!(!far.hear_bytes(GUEST, 1).is_empty(), "it is not announced");
        host.kept.pause().expect("paused");
        host.kept.lock().as_mut().expect("a machine").halt();
        assert!(host.kept.resume().is_err(), "what has ended does not run");
        assert!(host.kept.interfaces.is_off(), "it stands, and is on the network");
    });
}

/// What the agent does between two harvests, with the descriptors that it has.
fn copy_disk(kept: &mut VmKept, reader: &File, copy: &File) -> u64 {
    let mut dirty = PageSet::new();
    kept.harvest(&mut dirty).expect("harvest");
    for range in dirty.ranges() {
        assert_eq!(range.space, SpaceId(1), "the guest's memory stays where it is");
        for page in range.first..range.end() {
            let at = page * PAGE;
            let mut bytes = vec![0; (BYTES - at).min(PAGE) as usize];
            reader.read_exact_at(&mut bytes, at).expect("read");
            copy.write_all_at(&bytes, at).expect("written");
        }
    }
    dirty.len()
}

fn empty(path: &Path) -> File {
    File::options().read(true).write(true).create_new(true).open(path).expect("made")
}

fn path_of(kept: &mut VmKept) -> String {
    kept.facts().expect("facts")["disks"][0]["path"].as_str().expect("a path").to_owned()
}

/// What a migration is called.
const MIGRATION: &str = "5f0c7a1e";

#[test]
fn a_disk_moves_alone_while_its_guest_runs() {
    moves_alone(|disk| Host::new(disk, false));
}

#[test]
fn a_disk_of_a_confined_keeper_moves_alone_too() {
    moves_alone(|disk| Host::monitored(disk, false));
}

fn moves_alone(host: impl FnOnce(&Path) -> Host) {
    let files = tempfile::tempdir().expect("directory");
    let [old, new] = ["old", "new"].map(|name| files.path().join(name));
    make_disk(&old);
    let mut host = host(&old);
    let disk = host.disk();
    let counted = |kept: &VmKept| {
        let at = vm_memory::GuestAddress(crate::testing::COUNTER);
        let read = kept.with(|machine| {
            Ok(vm_memory::Bytes::<vm_memory::GuestAddress>::read_obj::<u64>(
                machine.memory().map(),
                at,
            )
            .expect("count"))
        });
        read.expect("a machine")
    };
    assert!(
        host.kept.hold().is_err() && host.kept.switch(MIGRATION).is_err(),
        "nothing is mirrored"
    );
    let file = empty(&new);
    let copy = file.try_clone().expect("a descriptor");
    host.kept.mirror(SpaceId(1), &new, file).expect("mirrored");
    assert!(host.kept.mirror(SpaceId(1), &new, copy.try_clone().expect("one")).is_err(), "twice");
    assert!(host.kept.mirror(SpaceId(2), &new, copy.try_clone().expect("one")).is_err(), "no disk");
    assert!(host.kept.track().is_err(), "one thing at a time");
    assert!(host.kept.switch(MIGRATION).is_err(), "it is not held");
    let reader = File::from(host.kept.memory(SpaceId(1)).expect("a descriptor"));
    assert_eq!(copy_disk(&mut host.kept, &reader, &copy), 5);
    for number in 1..200 {
        scribble(&disk, number);
        if number % 40 == 0 {
            assert!(copy_disk(&mut host.kept, &reader, &copy) > 0);
        }
    }
    host.kept.hold().expect("held");
    assert!(host.kept.switch(MIGRATION).is_err(), "not all was copied");
    assert!(copy_disk(&mut host.kept, &reader, &copy) > 0);
    let before = counted(&host.kept);
    crate::testing::wait_for("the guest, which runs on", || counted(&host.kept) > before);
    assert_eq!(path_of(&mut host.kept), old.display().to_string());
    // What cannot be noted does not happen.
    let blocked = host.dir.path().join("switched.new");
    fs::create_dir(&blocked).expect("made");
    let text = host.kept.switch(MIGRATION).expect_err("it cannot be noted").to_string();
    assert!(text.contains("note that disks move"), "{text}");
    assert_eq!(path_of(&mut host.kept), old.display().to_string());
    fs::remove_dir(&blocked).expect("removed");
    let place = Place { name: "web".into(), uuid: "u".into(), dir: host.dir.path().to_owned() };
    assert!(!decamp_shared::keeper::switched_for(&place, MIGRATION).expect("looked"));
    host.kept.switch(MIGRATION).expect("switched");
    assert!(decamp_shared::keeper::switched_for(&place, MIGRATION).expect("looked"));
    assert_eq!(path_of(&mut host.kept), new.display().to_string());
    assert!(fs::read(&old).expect("read") == fs::read(&new).expect("read"), "they differ");
    assert_eq!(fs::metadata(&new).expect("there").len(), BYTES);
    host.kept.resume().expect("as ever");
    // Nowhere is that byte yet.
    scribble(&disk, 250);
    assert!(fs::read(&old).expect("read") != fs::read(&new).expect("read"), "both are written");
    // It moves on from there as ever.
    drop((copy, reader));
    disk::lock::check(&old, false).expect("it is nobody's");
    let there = files.path().join("there");
    File::create(&there).expect("made");
    let mut destination = Host::new(&there, true);
    host.kept.carry(&[SpaceId(1)]).expect("carried");
    host.kept.track().expect("tracked");
    round(&mut host.kept, &mut destination.kept);
    host.kept.pause().expect("paused");
    let sections = host.kept.save().expect("saved");
    round(&mut host.kept, &mut destination.kept);
    destination.kept.load(sections).expect("loaded");
    host.kept.fenced().expect("fenced");
    destination.kept.activate().expect("runs");
    assert!(fs::read(&new).expect("read") == fs::read(&there).expect("read"), "they differ");
    host.kept.release().expect("released");
}

#[test]
fn a_disk_that_does_not_move_after_all_stays_in_use() {
    let files = tempfile::tempdir().expect("directory");
    let [old, new] = ["old", "new"].map(|name| files.path().join(name));
    make_disk(&old);
    let mut host = Host::new(&old, false);
    let disk = host.disk();
    for held in [false, true] {
        host.kept.mirror(SpaceId(1), &new, empty(&new)).expect("mirrored");
        disk::lock::check(&new, false).expect_err("it is this VM's");
        host.kept.harvest(&mut PageSet::new()).expect("harvest");
        if held {
            host.kept.hold().expect("held");
        }
        host.kept.resume().expect("as if nothing had been");
        disk::lock::check(&new, false).expect("it is nobody's");
        fs::remove_file(&new).expect("removed");
        assert!(host.kept.switch(MIGRATION).is_err() && host.kept.hold().is_err());
        assert_eq!(path_of(&mut host.kept), old.display().to_string());
        scribble(&disk, 3);
    }
    disk::lock::check(&old, false).expect_err("it is this VM's");
    host.kept.track().expect("tracked");
    host.kept.resume().expect("runs on");
}

#[test]
fn a_guest_ends_when_nobody_knows_whether_its_disk_went_over() {
    let files = tempfile::tempdir().expect("directory");
    let [old, new] = ["old", "new"].map(|name| files.path().join(name));
    make_disk(&old);
    let mut host = Host::monitored(&old, true);
    host.kept.mirror(SpaceId(1), &new, empty(&new)).expect("mirrored");
    host.kept.harvest(&mut PageSet::new()).expect("harvest");
    host.kept.hold().expect("held");
    let error = host.kept.switch(MIGRATION).expect_err("nothing is said").to_string();
    assert!(error.contains("can be started again"), "{error}");
    let ended = format!("{:?}", host.kept.exit);
    assert!(ended.contains("nobody knows whether its disks"), "{ended}");
    assert!(host.kept.resume().is_err(), "it is gone");
    for path in [&old, &new] {
        disk::lock::check(path, false).expect("it is nobody's");
    }
    let place = Place { name: "web".into(), uuid: "u".into(), dir: host.dir.path().to_owned() };
    assert!(decamp_shared::keeper::switched_for(&place, MIGRATION).expect("looked"));
}
