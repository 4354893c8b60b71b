//! Whole trees and what is special in them: holes, links, capabilities, files that change or vanish
//! while they are read, single files, and the way back.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicBool;

use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat, setxattr};

use super::*;

/// A room with a source directory and a place for a destination.
pub(super) struct Room {
    dir: tempfile::TempDir,
}

impl Room {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("source")).expect("the source");
        Self { dir }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("its directory");
        fs::write(&path, bytes).expect("a file");
        path
    }

    /// Sends `source` to `destination` as a live tree, with `meanwhile` between the passes.
    pub(super) fn send(
        &self,
        keep_equal: bool,
        landing: &Landing,
        meanwhile: impl FnOnce(),
    ) -> Outcome {
        let tree = bundle(&self.path("source"));
        let to = incoming(&tree, &self.path("destination"), keep_equal);
        stream(vec![to], landing, |sender| {
            sender.send(&tree)?;
            meanwhile();
            sender.send_changes(&tree)
        })
    }

    /// Sends, and keeps what arrived.
    #[track_caller]
    pub(super) fn arrive(&self, keep_equal: bool, meanwhile: impl FnOnce()) -> Arc<FileCounters> {
        let landing = Landing::new();
        let counters = self.send(keep_equal, &landing, meanwhile).well();
        landing.keep();
        counters
    }

    #[track_caller]
    pub(super) fn assert_equal(&self) {
        assert_same(&self.path("source"), &self.path("destination"), "at the end");
    }
}

/// Whether a file that did not change is known not to have: not on a tmpfs.
fn has_writeback(room: &Room, test: &str) -> bool {
    let kind = rustix::fs::statfs(room.path("source")).expect("its file system").f_type;
    let has = kind != 0x0102_1994;
    if !has {
        eprintln!("SKIPPED {test}: TMPDIR is on a tmpfs, which has no writeback");
    }
    has
}

#[test]
fn unchanged_files_are_not_sent_again() {
    let room = Room::new();
    if !has_writeback(&room, "unchanged_files_are_not_sent_again") {
        return;
    }
    for number in 0..50 {
        room.write(&format!("source/dir{}/file{number}", number % 5), &noise(number, 5000));
    }
    settle();
    let landing = Landing::new();
    let counters = room.send(false, &landing, || {
        room.write("source/dir1/file1", b"changed");
    });
    let counters = counters.well();
    assert_eq!(sent_bytes(&counters), 50 * 5000 + 7);
    assert_eq!(counters.total_bytes.load(Ordering::Relaxed), sent_bytes(&counters));
    assert!(
        counters.wire_bytes.load(Ordering::Relaxed) > sent_bytes(&counters),
        "noise does not shrink"
    );
    room.assert_equal();
}

#[test]
fn compressible_trees_are_compressed() {
    let room = Room::new();
    room.write("source/text", &b"all work and no play ".repeat(100_000));
    let counters = room.arrive(false, || {});
    assert!(counters.wire_bytes.load(Ordering::Relaxed) < sent_bytes(&counters) / 20);
}

#[test]
fn the_way_back_sends_only_what_changed() {
    let room = Room::new();
    if !has_writeback(&room, "the_way_back_sends_only_what_changed") {
        return;
    }
    for number in 0..20 {
        room.write(&format!("source/{number}"), &noise(number, 10_000));
    }
    fs::hard_link(room.path("source/3"), room.path("source/3-too")).expect("a link");
    let landing = Landing::new();
    room.send(false, &landing, || {}).well();
    landing.keep();
    room.write("destination/7", b"written while it was away");
    fs::remove_file(room.path("destination/8")).expect("removed");
    settle();

    let tree = bundle(&room.path("destination"));
    let landing = Landing::new();
    let back = stream(vec![incoming(&tree, &room.path("source"), true)], &landing, |sender| {
        sender.send(&tree)?;
        sender.send_changes(&tree)
    });
    assert_eq!(sent_bytes(&back.well()), 25);
    room.assert_equal();
    drop(landing);
    assert!(room.path("source/7").exists(), "what was there before is never removed");
}

/// Gives `to` the modification time of `from`, as `touch -r` does.
fn same_time(from: &Path, to: &Path) {
    let time = from.metadata().and_then(|meta| meta.modified()).expect("a time");
    File::options().write(true).open(to).and_then(|f| f.set_modified(time)).expect("a time");
}

#[test]
fn another_content_of_the_same_size_and_time_is_noticed() {
    // As `cp -p`, `touch -r` and builds with clamped times leave it.
    let room = Room::new();
    for number in 0..20 {
        room.write(&format!("source/{number}"), &noise(number, 10_000));
    }
    room.write("source/empty", b"");
    room.arrive(false, || {});
    room.write("destination/7", &noise(100, 10_000));
    same_time(&room.path("source/7"), &room.path("destination/7"));
    settle();

    let tree = bundle(&room.path("destination"));
    let back =
        stream(vec![incoming(&tree, &room.path("source"), true)], &Landing::new(), |sender| {
            sender.send(&tree)
        });
    assert_eq!(sent_bytes(&back.well()), 10_000, "that file and no other");
    room.assert_equal();
}

#[test]
fn an_earlier_file_of_the_same_size_and_time_is_compared() {
    let room = Room::new();
    let there = room.write("vmlinuz", &noise(1, 1000));
    let path = room.write("new/vmlinuz", &noise(2, 1000));
    same_time(&there, &path);
    let tree = kernel(&path);
    for sent in [1000, 0] {
        let counters =
            stream(vec![incoming(&tree, &there, true)], &Landing::new(), |s| s.send(&tree)).well();
        assert_eq!(sent_bytes(&counters), sent);
        assert_eq!(Picture::of(&path), Picture::of(&there));
    }
}

#[test]
fn links_that_were_parted_stay_parted() {
    // Equal in size, time and mode, so only the number of names tells.
    let room = Room::new();
    let one = room.write("source/one", b"same");
    let two = room.write("source/two", b"same");
    let time = std::time::SystemTime::UNIX_EPOCH;
    for path in [&one, &two] {
        File::options().write(true).open(path).and_then(|f| f.set_modified(time)).expect("a time");
    }
    let other = room.write("destination/one", b"same");
    File::options().write(true).open(&other).and_then(|f| f.set_modified(time)).expect("a time");
    fs::hard_link(&other, room.path("destination/two")).expect("a link");
    settle();
    room.arrive(true, || {});
    room.assert_equal();
    assert_eq!(room.path("destination/one").metadata().expect("it").nlink(), 1);
}

#[test]
fn a_link_made_to_an_unchanged_file_stays_a_link() {
    let room = Room::new();
    room.write("source/one", b"content");
    fs::hard_link(room.path("source/one"), room.path("source/two")).expect("a link");
    settle();
    room.arrive(false, || {
        fs::hard_link(room.path("source/one"), room.path("source/dir-less")).expect("a link");
        fs::remove_file(room.path("source/two")).expect("removed");
    });
    room.assert_equal();
    assert_eq!(room.path("destination/one").metadata().expect("it").nlink(), 2);
}

#[test]
fn links_in_a_renamed_directory_stay_links() {
    // The files themselves do not change at all.
    let room = Room::new();
    room.write("source/before/one", b"content");
    fs::create_dir(room.path("source/other")).expect("a directory");
    fs::hard_link(room.path("source/before/one"), room.path("source/other/two")).expect("a link");
    settle();
    room.arrive(false, || {
        fs::rename(room.path("source/before"), room.path("source/after")).expect("renamed");
    });
    room.assert_equal();
    assert_eq!(room.path("destination/other/two").metadata().expect("it").nlink(), 2);
}

#[test]
fn holes_stay_holes() {
    let room = Room::new();
    let path = room.path("source/sparse");
    let mut file = File::create(&path).expect("a file");
    file.seek(SeekFrom::Start(64 << 20)).expect("a hole");
    file.write_all(b"end").expect("an end");
    drop(file);
    room.arrive(false, || {});
    let copy = room.path("destination/sparse").metadata().expect("the copy");
    assert_eq!(copy.len(), (64 << 20) + 3);
    assert!(copy.blocks() * 512 < 1 << 20, "{} blocks", copy.blocks());
    room.assert_equal();
}

#[test]
fn capabilities_acls_and_devices_arrive() {
    if !is_root("capabilities_acls_and_devices_arrive") {
        return;
    }
    let room = Room::new();
    let tool = room.write("source/bin/tool", b"tool");
    std::os::unix::fs::chown(&tool, Some(1234), Some(4321)).expect("an owner");
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o4755)).expect("set-user-ID");
    // cap_net_raw=ep, revision 2.
    let mut capability = vec![1, 0, 0, 2, 0, 0x20];
    capability.resize(20, 0);
    setxattr(&tool, "security.capability", &capability, XattrFlags::empty()).expect("a capability");
    // A default ACL: user::rwx user:33:rwx group::r-x mask::rwx other::---
    let entries: [(u16, u16, u32); 5] =
        [(1, 7, !0), (2, 7, 33), (4, 5, !0), (0x10, 7, !0), (0x20, 0, !0)];
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    let shared = room.path("source/shared");
    fs::create_dir(&shared).expect("a directory");
    // Made before the ACL, so it must not get one from it over there either.
    room.write("source/shared/plain", b"plain");
    setxattr(&shared, "system.posix_acl_default", &acl, XattrFlags::empty()).expect("an ACL");
    room.write("source/shared/inherited", b"inherited");
    let null = room.path("source/null");
    mknodat(CWD, &null, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 3))
        .expect("a device");
    let _socket = UnixListener::bind(room.path("source/socket")).expect("a socket");
    settle();
    room.arrive(false, || {
        room.write("source/shared/plain", b"changed");
    });
    room.assert_equal();
    assert!(!room.path("destination/socket").exists());
    assert_eq!(room.path("destination/null").metadata().expect("it").rdev(), makedev(1, 3));
}

#[test]
fn a_tree_that_is_written_all_the_time_is_whole_in_the_end() {
    let room = Room::new();
    for number in 0..300 {
        room.write(&format!("source/{}/{number}", number % 7), &noise(number, 20_000));
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let mut turn = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let number = turn % 300;
                let path = room.path(&format!("source/{}/{number}", number % 7));
                match turn % 4 {
                    0 => fs::write(&path, noise(turn, 100 + turn as usize % 50_000))
                        .expect("written"),
                    1 => fs::rename(&path, room.path("source/moved")).unwrap_or(()),
                    2 => fs::remove_file(&path).unwrap_or(()),
                    _ => {
                        // In place, as a database does.
                        if let Ok(file) = File::options().write(true).open(&path) {
                            file.write_all_at(&noise(turn, 64), turn % 20_000).expect("written");
                        }
                    }
                }
                turn += 1;
            }
            turn
        });
        let landing = Landing::new();
        let outcome = room.send(false, &landing, || {
            stop.store(true, Ordering::Relaxed);
            while !busy.is_finished() {
                std::thread::yield_now();
            }
        });
        stop.store(true, Ordering::Relaxed);
        outcome.well();
        room.assert_equal();
        landing.keep();
        assert!(busy.join().expect("no panic") > 10, "something was written meanwhile");
    });
}

#[test]
fn stores_through_a_mapping_are_not_missed() {
    let room = Room::new();
    if !has_writeback(&room, "stores_through_a_mapping_are_not_missed")
        || !is_root("stores_through_a_mapping_are_not_missed")
    {
        return;
    }
    // To elsewhere, or bringing the copy to the disk would sync the source as well. Tests beside this
    // one may do that too, so only alone is it sure to fail without the sync.
    let disk = places::SmallDisk::mount(&room, "size=4m");
    store_while_sent(&room.path("source"), &disk.path("tree"));
}

#[test]
fn stores_through_a_mapping_are_not_missed_on_a_tmpfs() {
    if !is_root("stores_through_a_mapping_are_not_missed_on_a_tmpfs") {
        return;
    }
    let room = Room::new();
    let disk = places::SmallDisk::mount(&room, "size=4m");
    fs::create_dir(disk.path("tree")).expect("a directory");
    store_while_sent(&disk.path("tree"), &room.path("destination"));
}

/// The page is dirty and writable before the first pass, so a second store leaves no stamp of itself.
fn store_while_sent(from: &Path, to: &Path) {
    let path = from.join("mapped");
    fs::write(&path, [1; 8192]).expect("a file");
    let file = File::options().read(true).write(true).open(&path).expect("a file");
    let mut mapping = crate::sys::SharedMapping::of(&file, 8192).expect("mapped");
    mapping.store(0, 2);
    settle();
    let tree = bundle(from);
    let landing = Landing::new();
    stream(vec![incoming(&tree, to, false)], &landing, |sender| {
        sender.send(&tree)?;
        mapping.store(1, 3);
        sender.send_changes(&tree)
    })
    .well();
    assert_eq!(read_all(&to.join("mapped"))[..3], [2, 3, 1]);
}

#[test]
fn a_write_while_paused_is_an_error() {
    let room = Room::new();
    let path = room.write("source/file", &noise(1, 64 << 20));
    settle();
    let tree = bundle(&room.path("source"));
    let landing = Landing::new();
    let outcome =
        stream(vec![incoming(&tree, &room.path("destination"), false)], &landing, |sender| {
            sender.send(&tree)?;
            File::options()
                .append(true)
                .open(&path)
                .and_then(|mut f| f.write_all(b"x"))
                .expect("grown");
            std::thread::scope(|scope| {
                // Cut as soon as it is being read.
                let before = sender.sent_so_far();
                let counters = sender.counters();
                scope.spawn(move || {
                    while sent_bytes(&counters) == before {
                        std::thread::yield_now();
                    }
                    File::options()
                        .write(true)
                        .open(&path)
                        .and_then(|f| f.set_len(1))
                        .expect("cut");
                });
                sender.send_changes(&tree)
            })
        });
    assert!(matches!(outcome.sent, Err(FileError::ChangedWhilePaused { .. })), "{outcome:?}");
    let told = outcome.received.expect_err("the receiver is told");
    assert!(told.to_string().contains("while the workload stood still"), "{told}");
}

#[test]
fn a_single_file_arrives_and_is_removed_with_its_directories() {
    let room = Room::new();
    let path = room.write("vmlinuz", &noise(1, 300_000));
    let tree = kernel(&path);
    let landing = Landing::new();
    let to = room.path("new/boot/vmlinuz");
    stream(vec![incoming(&tree, &to, false)], &landing, |sender| sender.send(&tree)).well();
    assert_eq!(Picture::of(&path), Picture::of(&to));
    landing.remove();
    assert!(!room.path("new").exists());
}

#[test]
fn an_equal_file_is_taken_as_it_is() {
    let room = Room::new();
    let path = room.write("vmlinuz", &noise(1, 300_000));
    let there = room.write("there/vmlinuz", &noise(1, 300_000));
    let link = room.path("there/link");
    std::os::unix::fs::symlink("vmlinuz", &link).expect("a link");
    let before = Picture::of(&room.path("there"));
    let tree = kernel(&path);
    for to in [&there, &link] {
        let landing = Landing::new();
        let counters =
            stream(vec![incoming(&tree, to, false)], &landing, |sender| sender.send(&tree)).well();
        assert_eq!(sent_bytes(&counters), 0);
        landing.remove();
        assert_eq!(Picture::of(&room.path("there")), before, "nothing written, nothing removed");
    }
}

#[test]
fn another_file_in_the_place_is_refused() {
    let room = Room::new();
    let path = room.write("vmlinuz", &noise(1, 1000));
    for (other, keep_equal) in
        [(noise(2, 1000), false), (noise(2, 999), false), (noise(2, 1000), true)]
    {
        let there = room.write("there/vmlinuz", &other);
        let tree = kernel(&path);
        let landing = Landing::new();
        let outcome = stream(vec![incoming(&tree, &there, keep_equal)], &landing, |sender| {
            sender.send(&tree)
        });
        if keep_equal {
            outcome.well();
            assert_eq!(
                Picture::of(&path),
                Picture::of(&there),
                "an older copy of ours is replaced"
            );
            continue;
        }
        assert!(matches!(outcome.received, Err(FileError::PathTaken { .. })), "{outcome:?}");
        assert!(matches!(outcome.sent, Err(FileError::Peer { text }) if text.contains("is taken")));
        drop(landing);
        assert_eq!(read_all(&there), other);
    }
}

#[test]
fn a_directory_with_something_in_it_is_refused() {
    let room = Room::new();
    room.write("source/file", b"new");
    room.write("destination/other", b"other");
    let outcome = room.send(false, &Landing::new(), || {});
    assert!(matches!(outcome.received, Err(FileError::PathTaken { .. })), "{outcome:?}");
    assert_eq!(read_all(&room.path("destination/other")), b"other");
    assert!(!room.path("destination/file").exists());
}

#[test]
fn several_trees_share_a_stream() {
    let room = Room::new();
    room.write("source/file", b"file");
    let trees = [
        FileTree { id: 7, ..bundle(&room.path("source")) },
        FileTree { id: 9, ..kernel(&room.write("kernel", &noise(4, 1 << 20))) },
    ];
    let places = ["destination", "kernel-too"];
    let expected =
        trees.iter().zip(places).map(|(tree, place)| incoming(tree, &room.path(place), false));
    let landing = Landing::new();
    stream(expected.collect(), &landing, |sender| {
        trees.iter().try_for_each(|tree| sender.send(tree))?;
        room.write("source/more", b"more");
        sender.send_changes(&trees[0])
    })
    .well();
    room.assert_equal();
    assert_eq!(Picture::of(&room.path("kernel")), Picture::of(&room.path("kernel-too")));
}

#[test]
fn a_kernel_made_file_system_in_a_tree_is_refused() {
    // The root itself may be anything; /proc has more of its kind below it only as mounts.
    let found = Path::new("/proc/sys/fs/binfmt_misc");
    let error = tree_bytes(Path::new("/dev")).err();
    match error {
        Some(FileError::Unsendable { what, .. }) => {
            assert!(what.contains("is mounted there"), "{what}")
        }
        other => {
            eprintln!("SKIPPED: nothing is mounted below /dev or {} ({other:?})", found.display())
        }
    }
}

#[test]
fn a_tree_travels_over_a_joined_connection() {
    let room = Room::new();
    for number in 0..40 {
        room.write(&format!("source/{number}"), &noise(number, 100_000));
    }
    let pairs = crate::transport::testing::stream_pairs(crate::transport::Role::File, true, 1);
    let tree = bundle(&room.path("source"));
    let expected = vec![incoming(&tree, &room.path("destination"), false)];
    let landing = Landing::new();
    for (here, there) in pairs {
        std::thread::scope(|scope| {
            let expected = expected.clone();
            let receiving = scope.spawn(|| receive(there, expected, &landing));
            let mut sender = TreeSender::new(here, Arc::default());
            sender.send(&tree).expect("sent");
            sender.send_changes(&tree).expect("changes sent");
            sender.finish().expect("finished");
            receiving.join().expect("no panic").expect("received");
        });
    }
    room.assert_equal();
}
