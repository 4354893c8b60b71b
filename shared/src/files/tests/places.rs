//! Full disks, arrivals that are given up, probes, and what keeps a tree from landing.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::trees::Room;
use super::*;

/// A small tmpfs in this test's own room. Unmounted when dropped.
pub(super) struct SmallDisk(PathBuf);

impl SmallDisk {
    pub(super) fn mount(room: &Room, options: &str) -> Self {
        let path = room.path("disk");
        fs::create_dir(&path).expect("a mount point");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&path)
            .status()
            .expect("mount runs");
        assert!(mounted.success(), "a small disk");
        Self(path)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

/// Unmounts `path`. A program that another test starts at that moment has what was open there as well, until it is that
/// program.
fn unmount(path: &Path) {
    let begun = Instant::now();
    while !Command::new("umount").arg(path).status().expect("umount runs").success() {
        assert!(begun.elapsed() < Duration::from_secs(120), "{} stays mounted", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_full_disk_is_told_to_both_and_leaves_nothing() {
    if !is_root("a_full_disk_is_told_to_both_and_leaves_nothing") {
        return;
    }
    // More than the window and all buffers, so that the sender is in the middle of writing.
    for (files, size, options) in [
        (1_u64, 100 << 20, "size=4m"),
        (4000, 40_000, "size=16m"),
        (500, 10, "size=4m,nr_inodes=100"),
    ] {
        let room = Room::new();
        for number in 0..files {
            room.write(&format!("source/{number}"), &noise(number, size));
        }
        let disk = SmallDisk::mount(&room, options);
        let tree = bundle(&room.path("source"));
        let landing = Landing::new();
        let to = disk.0.join("new/tree");
        let outcome =
            stream(vec![incoming(&tree, &to, false)], &landing, |sender| sender.send(&tree));
        assert!(matches!(outcome.received, Err(FileError::DiskFull { .. })), "{outcome:?}");
        let told = outcome.sent.expect_err("told");
        assert!(
            matches!(&told, FileError::Peer { text } if text.contains("No room is left")),
            "{told}"
        );
        drop(landing);
        assert_eq!(fs::read_dir(&disk.0).expect("the disk").count(), 0, "something is left");
    }
}

#[test]
fn a_disk_that_fills_up_in_the_tail_is_told() {
    if !is_root("a_disk_that_fills_up_in_the_tail_is_told") {
        return;
    }
    let room = Room::new();
    room.write("source/file", b"small");
    let disk = SmallDisk::mount(&room, "size=4m");
    let tree = bundle(&room.path("source"));
    let landing = Landing::new();
    let to = disk.0.join("tree");
    let outcome = stream(vec![incoming(&tree, &to, false)], &landing, |sender| {
        sender.send(&tree)?;
        room.write("source/large", &noise(1, 8 << 20));
        sender.send_changes(&tree)
    });
    assert!(matches!(outcome.received, Err(FileError::DiskFull { .. })), "{outcome:?}");
    assert!(matches!(outcome.sent, Err(FileError::Peer { .. })), "{outcome:?}");
    assert_eq!(fs::read_dir(&to).expect("the tree").count(), 1, "no temporary file is left");
}

#[test]
fn giving_up_removes_only_what_was_made() {
    let room = Room::new();
    room.write("source/a/b/file", b"new");
    symlink("/etc", room.path("source/a/etc")).expect("a link");
    let tree = bundle(&room.path("source"));
    fs::create_dir(room.path("there")).expect("a directory");
    fs::create_dir(room.path("there/empty")).expect("a directory");
    let inode = room.path("there/empty").metadata().expect("it").ino();
    let kept_before = room.write("there/kept/file", b"old");
    let places = [("new/deep/tree", false), ("there/empty", false), ("there/kept", true)];
    for (place, keep_equal) in places {
        let landing = Landing::new();
        let to = incoming(&tree, &room.path(place), keep_equal);
        stream(vec![to], &landing, |sender| sender.send(&tree)).well();
        assert_eq!(Picture::of(&room.path("source")), Picture::of(&room.path(place)));
        drop(landing);
    }
    assert!(!room.path("new").exists());
    assert_eq!(fs::read_dir(room.path("there/empty")).expect("it").count(), 0);
    assert_eq!(room.path("there/empty").metadata().expect("it").ino(), inode);
    assert!(room.path("there/kept/a/b/file").exists(), "an earlier copy stays");
    assert!(!kept_before.exists(), "and is as the source's");
    assert!(Path::new("/etc/passwd").exists());
}

#[test]
fn giving_up_leaves_what_others_put_there() {
    let room = Room::new();
    room.write("source/file", b"new");
    let landing = Landing::new();
    let tree = bundle(&room.path("source"));
    let to = room.path("new/tree");
    stream(vec![incoming(&tree, &to, false)], &landing, |sender| sender.send(&tree)).well();
    // Somebody made another thing of it, and put something beside it.
    fs::rename(&to, room.path("moved")).expect("moved away");
    room.write("new/tree/other", b"other");
    landing.remove();
    assert_eq!(read_all(&room.path("new/tree/other")), b"other");
    assert_eq!(read_all(&room.path("moved/file")), b"new");
}

#[test]
fn a_crash_is_cleaned_up_by_the_record() {
    let room = Room::new();
    room.write("source/file", b"new");
    room.write("there/kept/file", b"old");
    let record = room.path("record");
    let trees = [
        FileTree { id: 1, ..bundle(&room.path("source")) },
        FileTree { id: 2, ..kernel(&room.write("kernel", &noise(1, 100_000))) },
        FileTree { id: 3, ..bundle(&room.path("source")) },
    ];
    let places = [("new/a/tree", false), ("new/b/kernel", false), ("there/kept", true)];
    let expected =
        trees.iter().zip(places).map(|(tree, (to, keep))| incoming(tree, &room.path(to), keep));
    let landing = Landing::recorded(&record).expect("a record");
    stream(expected.collect(), &landing, |sender| {
        trees.iter().try_for_each(|tree| sender.send(tree))
    })
    .well();
    // The process ends without a word, in the middle of another file.
    std::mem::forget(landing);
    room.write("new/b/.decamp-new-0123456789abcdef", b"half");
    let half = room.path("new/b/.decamp-new-0123456789abcdef");
    let line = format!("{{\"temporary\":{half:?}}}\n{{\"tree\":{{\"pa");
    let mut text = fs::read(&record).expect("the record");
    text.extend_from_slice(line.as_bytes());
    fs::write(&record, text).expect("the record");
    assert!(Landing::recorded(&record).is_err(), "a record is never overwritten");
    Landing::recover(&record).expect("the record").remove();
    assert!(!room.path("new").exists());
    assert!(room.path("there/kept/file").exists());
    assert!(!record.exists());
    Landing::recover(&record).expect("nothing").remove();
}

#[test]
fn a_mount_in_an_earlier_copy_is_not_emptied() {
    if !is_root("a_mount_in_an_earlier_copy_is_not_emptied") {
        return;
    }
    let room = Room::new();
    room.write("source/file", b"new");
    let _disk = SmallDisk::mount(&room, "size=1m");
    room.write("disk/precious", b"precious");
    // The index knows nothing of the disk in the earlier copy.
    fs::create_dir(room.path("parent")).expect("a directory");
    let tree = bundle(&room.path("source"));
    let place = room.path("parent");
    let point = place.join("mounted here");
    fs::create_dir(&point).expect("a mount point");
    room.write("beside/precious", b"precious");
    assert_eq!(check_place(&tree, &place, true), None);
    // A bind mount of the same file system has the same device.
    for shown in ["disk", "beside"] {
        let mut bind = Command::new("mount");
        bind.arg("--bind").arg(room.path(shown)).arg(&point);
        assert!(bind.status().expect("mount runs").success());
        let outcome = stream(vec![incoming(&tree, &place, true)], &Landing::new(), |sender| {
            sender.send(&tree)
        });
        let checked = check_place(&tree, &place, true);
        unmount(&point);
        let told = outcome.sent.expect_err("refused").to_string();
        assert!(
            told.contains("something is mounted at") && told.contains("mounted here"),
            "{told}"
        );
        assert!(matches!(outcome.received, Err(FileError::PathTaken { .. })));
        let why = checked.expect("refused before anything is touched");
        assert!(why.contains(&format!("mounted at {}", point.display())), "{why}");
        assert_eq!(read_all(&room.path(shown).join("precious")), b"precious");
        assert!(!place.join("file").exists(), "nothing was touched");
    }
}

#[test]
fn kept_landings_stay() {
    let room = Room::new();
    room.write("source/file", b"new");
    let landing = Landing::new();
    room.send(false, &landing, || {}).well();
    landing.keep();
    landing.remove();
    drop(landing);
    room.assert_equal();
}

#[test]
fn receiving_ends_when_the_landing_is_removed() {
    let room = Room::new();
    room.write("source/file", &noise(1, 8 << 20));
    let landing = Landing::new();
    let outcome = room.send(false, &landing, || {
        room.write("source/more", &noise(2, 8 << 20));
        landing.remove();
    });
    assert!(matches!(outcome.received, Err(FileError::GivenUp)), "{outcome:?}");
    assert!(!room.path("destination").exists());
}

#[test]
fn deep_trees_arrive_and_go() {
    let room = Room::new();
    let mut path = room.path("source");
    for _ in 0..1500 {
        // By steps, because the whole path is longer than the kernel takes at once.
        path.push("d");
    }
    // Made by a shell that walks down itself.
    let made = Command::new("sh")
        .arg("-c")
        .arg(
            "cd source; for i in $(seq 1500); do mkdir d && cd -P d || exit 1; done; echo x > file",
        )
        .current_dir(room.path(""))
        .status()
        .expect("sh runs");
    assert!(made.success());
    let landing = Landing::new();
    room.send(false, &landing, || {}).well();
    assert_eq!(read_all(&room.path("destination").join("d/".repeat(1500)).join("file")), b"x\n");
    landing.remove();
    assert!(!room.path("destination").exists());
}

#[test]
fn probes_tell_the_same_place() {
    let room = Room::new();
    let tree = room.path("source");
    let probe = Probe::create(&tree).expect("a probe");
    let name = probe.name().to_owned();
    assert!(is_same_place(&tree, &name));
    symlink("source", room.path("other")).expect("a link");
    assert!(is_same_place(&room.path("other"), &name), "a link leads to the same place");
    fs::create_dir(room.path("beside")).expect("a directory");
    assert!(!is_same_place(&room.path("beside"), &name), "another tree in the same directory");
    assert!(!is_same_place(&Room::new().path("source"), &name), "another directory");
    drop(probe);
    assert!(!is_same_place(&tree, &name));
    assert_eq!(fs::read_dir(room.path("")).expect("it").count(), 3, "the probe is gone");
}

#[test]
fn hostile_probe_names_are_nothing() {
    let room = Room::new();
    let tree = room.path("source");
    let probe = Probe::create(&tree).expect("a probe");
    let name = probe.name();
    room.write("sourc", b"");
    let lies = [
        "",
        "sourc",
        ".",
        "..",
        "../sourc",
        ".decamp-probe-",
        "/etc/passwd",
        &name.to_uppercase(),
        &name[1..],
        &name[..name.len() - 1],
        &format!("{name}0"),
        &format!("../{}/{name}", room.path("").file_name().expect("it").to_string_lossy()),
        &name.replace(|c: char| c.is_ascii_digit(), "/"),
        &format!("{name}\0"),
    ];
    for lie in lies {
        assert!(!is_same_place(&tree, lie), "{lie:?}");
    }
}

#[test]
fn places_are_checked_before_anything_is_touched() {
    let room = Room::new();
    let directory = bundle(&room.path("source"));
    let file = kernel(&room.path("source"));
    room.write("full/file", b"x");
    symlink("full", room.path("link")).expect("a link");
    let says = |tree: &FileTree, place: &str, keep_equal: bool| {
        check_place(tree, &room.path(place), keep_equal)
    };
    assert_eq!(says(&directory, "new/deep", false), None);
    assert_eq!(says(&directory, "source", false), None, "an empty directory will do");
    assert_eq!(says(&directory, "full", true), None);
    assert_eq!(says(&file, "full/file", false), None, "the content decides");
    assert_eq!(says(&file, "full/new", false), None);
    for (tree, place, keep_equal, why) in [
        (&directory, "full", false, "is not empty"),
        (&directory, "full/file", true, "not a directory"),
        (&directory, "full/file/below", false, "is not a directory"),
        (&directory, "link", true, "not a directory"),
        (&file, "full", false, "not a file"),
    ] {
        let said = says(tree, place, keep_equal).expect(why);
        assert!(said.contains(why), "{said}");
    }
    assert!(check_place(&directory, Path::new("relative"), false).is_some());
    assert!(check_place(&directory, Path::new("/"), false).is_some());
    assert!(check_place(&directory, Path::new("/srv/../etc/x"), false).is_some());
    assert!(!room.path("new").exists());
}

#[test]
fn a_read_only_disk_is_noticed() {
    if !is_root("a_read_only_disk_is_noticed") {
        return;
    }
    let room = Room::new();
    let disk = SmallDisk::mount(&room, "size=1m,ro");
    let why = check_place(&bundle(&room.path("source")), &disk.0.join("new/tree"), false);
    assert!(why.expect("refused").contains("read-only"));
    assert!(Probe::create(&disk.0.join("tree")).is_err());
}

#[test]
fn sizes_of_trees_and_disks() {
    let room = Room::new();
    room.write("source/a", &[1; 1000]);
    room.write("source/dir/b", &[1; 234]);
    fs::hard_link(room.path("source/a"), room.path("source/dir/a-too")).expect("a link");
    symlink("/etc/passwd", room.path("source/link")).expect("a link");
    assert_eq!(tree_bytes(&room.path("source")).expect("counted"), 1234);
    assert_eq!(tree_bytes(&room.path("source/a")).expect("counted"), 1000);
    assert!(matches!(tree_bytes(&room.path("nowhere")), Err(FileError::Io { .. })));
    assert!(free_bytes(&room.path("not/there/yet")).expect("an answer") > 0);
    if is_root("the size of a small disk") {
        let disk = SmallDisk::mount(&room, "size=4m");
        assert_eq!(free_bytes(&disk.0.join("new")).expect("an answer"), 4 << 20);
    }
}
