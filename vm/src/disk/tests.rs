//! Disks as their VMs open, lock and harvest them, without a guest.

use std::fs;
use std::os::unix::fs::FileExt;

use super::*;

const PAGE: u64 = PAGE_SIZE as u64;

fn spec(path: &Path) -> DiskSpec {
    DiskSpec { path: path.to_owned(), ..DiskSpec::default() }
}

fn file_of(dir: &tempfile::TempDir, bytes: u64) -> PathBuf {
    let path = dir.path().join("disk");
    File::create(&path).and_then(|file| file.set_len(bytes)).expect("a file");
    path
}

fn refused(path: &Path) -> String {
    let error = Disk::new(0, &spec(path)).open(Duration::ZERO).expect_err("no disk");
    assert_eq!(
        size_at(path).map_err(|error| error.to_string().replace("look at", "open")).err(),
        {
            let text = error.to_string();
            Some(text.replace("disk0", "disk"))
        }
    );
    error.with_causes()
}

#[test]
fn what_is_no_disk_is_refused_in_words() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("disk");
    assert!(refused(&path).contains("No such file"), "{}", refused(&path));
    fs::write(&path, "").expect("written");
    assert!(refused(&path).contains("it is empty"));
    fs::write(&path, "x").expect("written");
    assert!(refused(&path).contains("size of 1 bytes is not a multiple of 512"));
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    assert!(refused(&pipe).contains("neither a file nor a block device"));
}

#[test]
fn whoever_has_a_disk_has_it_alone_and_is_named() {
    let dir = tempfile::tempdir().expect("directory");
    let path = file_of(&dir, 8192);
    let [one, other] = [0, 1].map(|number| Disk::new(number, &spec(&path)));
    let readonly = || DiskSpec { readonly: true, ..spec(&path) };
    let [reader, another] = [2, 3].map(|number| Disk::new(number, &readonly()));
    lock::check(&path, false).expect("free");
    one.open(Duration::ZERO).expect("opened");
    for refused in [
        other.open(Duration::ZERO),
        reader.open(Duration::ZERO),
        lock::check(&path, false),
        lock::check(&path, true),
    ] {
        let text = refused.expect_err("it is locked").to_string();
        let own = format!("process {} (", std::process::id());
        assert!(text.contains("locked by") && text.contains(&own), "{text}");
    }
    // Other descriptors of it do not give its lock up.
    drop(one.descriptor(true).expect("a descriptor"));
    assert!(other.open(Duration::from_millis(20)).is_err());
    one.close();
    reader.open(Duration::ZERO).expect("read");
    another.open(Duration::ZERO).expect("read by two");
    lock::check(&path, true).expect("and by a third");
    assert!(other.open(Duration::ZERO).is_err());
    reader.close();
    another.close();
    std::thread::scope(|scope| {
        one.open(Duration::ZERO).expect("free again");
        let waits = scope.spawn(|| other.open(crate::testing::PATIENCE));
        std::thread::sleep(Duration::from_millis(30));
        one.close();
        waits.join().expect("no panic").expect("waited for it");
    });
}

#[test]
fn a_disk_that_changes_its_size_is_noticed() {
    let dir = tempfile::tempdir().expect("directory");
    let path = file_of(&dir, 8192);
    let disk = Disk::new(0, &spec(&path));
    disk.open(Duration::ZERO).expect("opened");
    disk.check_size().expect("as it was");
    let file = File::options().write(true).open(&path).expect("opened");
    file.set_len(4096).expect("cut");
    let text = disk.check_size().expect_err("it was cut").to_string();
    assert!(text.contains("8192 bytes, and it has 4096 now"), "{text}");
    disk.close();
    let text = disk.open(Duration::ZERO).expect_err("it was cut").to_string();
    assert!(text.contains("8192 bytes, and it has 4096 now"), "{text}");
    assert!(!disk.is_open() && disk.check_size().is_err());
    lock::check(&path, false).expect("its lock is given up");
    // One that grew has all that the guest knows of it.
    file.set_len(16384).expect("grown");
    disk.open(Duration::ZERO).expect("opened");
    assert_eq!(disk.bytes(), 8192);
    assert!(disk.discard(8192, 512).is_err(), "beyond what the guest knows");
}

#[test]
fn the_first_harvest_has_what_is_there_and_the_next_what_was_written() {
    let dir = tempfile::tempdir().expect("directory");
    let path = file_of(&dir, 64 * PAGE + 512);
    let file = File::options().write(true).open(&path).expect("opened");
    for page in [3, 4, 40] {
        file.write_all_at(&[1; 4096], page * PAGE).expect("written");
    }
    let disk = Disk::new(2, &spec(&path));
    disk.open(Duration::ZERO).expect("opened");
    assert_eq!((disk.page_limit(), disk.space(), disk.label()), (65, SpaceId(3), "disk2".into()));
    let harvest = |all| {
        let mut set = PageSet::new();
        disk.harvest(all, &mut set).expect("harvest");
        set.ranges().map(|range| (range.space.0, range.first, range.count)).collect::<Vec<_>>()
    };
    disk.track();
    assert_eq!(harvest(true), [(3, 3, 2), (3, 40, 1)]);
    assert_eq!(harvest(false), []);
    disk.write_zeros(64 * PAGE, 512, true, &|| false).expect("the last sector");
    disk.discard(4 * PAGE - 512, 1024).expect("in two pages");
    assert_eq!(harvest(false), [(3, 3, 2), (3, 64, 1)]);
    assert!(disk.discard(64 * PAGE, 1024).is_err(), "beyond the end");
    assert_eq!(harvest(false), []);
    disk.stop_tracking();
}

#[test]
fn what_takes_long_is_given_up_for_who_waits() {
    let dir = tempfile::tempdir().expect("directory");
    let length = 3 * content::ZEROS as u64;
    let path = dir.path().join("disk");
    fs::write(&path, vec![1; length as usize]).expect("written");
    let file = File::options().write(true).open(&path).expect("opened");
    let fill = |stop: bool| content::fill_with_zeros(&file, 0, length, &|| stop).expect("filled");
    let left = || fs::read(&path).expect("read").iter().filter(|byte| **byte != 0).count();
    assert!(!fill(true));
    assert_eq!(left(), 2 * content::ZEROS, "one part was under way");
    assert!(fill(false));
    assert_eq!(left(), 0);
}

#[test]
fn a_disk_that_was_filled_is_as_long_as_it_was() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("new");
    File::create(&path).expect("made");
    let disk = Disk::new(0, &spec(&path));
    disk.open_to_fill(3).expect("opened");
    assert_eq!(fs::metadata(&path).expect("there").len(), 3 * PAGE);
    let file = File::from(disk.descriptor(true).expect("a descriptor"));
    file.write_all_at(&[5; 4096], 2 * PAGE).expect("written");
    assert!(disk.filled().is_err(), "nobody has said how long it is");
    disk.set_bytes(2 * PAGE);
    assert!(disk.filled().is_err(), "it has more pages than that");
    disk.set_bytes(2 * PAGE + 1024);
    disk.filled().expect("filled");
    disk.check_size().expect("exact");
    assert_eq!(fs::read(&path).expect("read")[2 * 4096..], [5; 1024]);
    assert!(Disk::new(0, &spec(&path)).open_to_fill(1).is_err(), "it is locked");
    disk.close();
    let text = disk.open_to_fill(3).expect_err("it holds something").to_string();
    assert!(text.contains("empty alone"), "{text}");
    File::create(&path).expect("emptied");
    assert!(disk.open_to_fill(u64::MAX).is_err());
    assert!(disk.open_to_fill(1 << 60).is_err());
}

/// The kernel reports a failed write-back once: the sync after it succeeds, and the blocks are lost all the same.
#[test]
fn what_could_not_be_stored_once_is_never_said_to_be_stored() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("new");
    File::create(&path).expect("made");
    let disk = Disk::new(0, &spec(&path));
    disk.open_to_fill(2).expect("opened");
    disk.set_bytes(2 * PAGE);
    let interrupted = || Err(io::ErrorKind::Interrupted.into());
    disk.store_by(interrupted).expect_err("not now");
    disk.flush().expect("nothing was lost by that");
    disk.store_by(|| Err(io::Error::from_raw_os_error(libc::EIO))).expect_err("lost");
    for error in [disk.flush().map_err(|error| VmError::refused("flush", error)), disk.filled()] {
        let text = error.expect_err("blocks are missing").with_causes();
        assert!(text.contains("may not be there") && text.contains("os error 5"), "{text}");
    }
    disk.close();
    disk.open(Duration::ZERO).expect("opened again");
    disk.flush().expect_err("they are still missing");
}

#[test]
fn what_a_disk_cannot_go_over_to_is_refused() {
    let dir = tempfile::tempdir().expect("directory");
    let path = file_of(&dir, 8192);
    let open = |name: &str, write: bool| {
        let path = dir.path().join(name);
        let mut options = File::options();
        let file = options.read(true).write(write).open(&path).expect("opened");
        (file, path)
    };
    for name in ["new", "taken", "full"] {
        File::create(dir.path().join(name)).expect("made");
    }
    fs::write(dir.path().join("full"), "x").expect("written");
    let disk = Disk::new(0, &spec(&path));
    let give = |(file, path): (File, PathBuf)| disk.give_next(file, &path);
    let refused = |given: Result<()>, says: &str| {
        let text = given.expect_err(says).with_causes();
        assert!(text.contains(says), "{text}");
    };
    refused(give(open("new", true)), "not open here");
    disk.open(Duration::ZERO).expect("opened");
    refused(give(open("full", true)), "an empty file alone");
    refused(give(open("new", false)), "for reading and writing");
    let (taken, at) = open("taken", true);
    let _held = lock::take(taken, &at, false, Duration::ZERO).expect("locks").expect("free");
    refused(give(open("taken", true)), "locked by");
    refused(disk.check_next(), "no file that");
    let (old, _) = open("disk", true);
    old.set_len(4096).expect("cut");
    refused(give(open("new", true)), "8192 bytes, and it has 4096 now");
    old.set_len(8192).expect("as it was");
    give(open("new", true)).expect("given");
    disk.check_next().expect("it can go over");
    old.set_len(4096).expect("cut while it is copied");
    refused(disk.check_next(), "8192 bytes, and it has 4096 now");
    old.set_len(8192).expect("as it was");
    let (new, at) = open("new", true);
    assert_eq!(new.metadata().expect("there").len(), 8192);
    new.set_len(4096).expect("cut");
    refused(disk.check_next(), "8192 bytes, and it has 4096 now");
    refused(lock::check(&at, true), "locked by");
    disk.drop_next();
    lock::check(&at, true).expect("free again");
    disk.go_over();
    assert_eq!(disk.path(), path, "there is nothing to go over to");
    disk.store_by(|| Err(io::Error::from_raw_os_error(libc::EIO))).expect_err("lost");
    new.set_len(0).expect("emptied");
    refused(give(open("new", true)), "may not be there");
    let readonly = Disk::new(1, &DiskSpec { readonly: true, ..spec(&dir.path().join("new")) });
    new.set_len(512).expect("sized");
    readonly.open(Duration::ZERO).expect("opened");
    let (file, at) = open("taken", true);
    refused(readonly.give_next(file, &at), "only read");
}
