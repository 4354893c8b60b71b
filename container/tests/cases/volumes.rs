//! Directories and files of the host that are mounted into a container, moved with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use decamp_shared::workload::{Backend, FileRole, FileTree, PlacedTree};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::support::{Host, Spot, copy_pages};

const WRITER: &str =
    "exec 3>>/vol/log; echo kept >/vol/gone; exec 4</vol/gone; busybox rm /vol/gone
    while :; do
        n=$((n + 1)); echo $n; echo $n >&3; echo $n >/again/n
        { echo x >/ro/x; } 2>/dev/null && echo ro was written >&3
        usleep 50000
        if busybox test -e /vol/ask; then busybox cat <&4 >/vol/answer.new
            busybox cat /etc/conf >>/vol/answer.new
            busybox mv /vol/answer.new /vol/answer; busybox rm /vol/ask; fi
    done";

/// Mounted on itself and shared, as everything is on most hosts; unmounted in the end.
struct Peered(PathBuf);

impl Peered {
    fn make(path: &Path) -> Self {
        fs::create_dir_all(path).expect("a directory");
        let none = None::<&str>;
        mount(Some(path), path, none, MsFlags::MS_BIND, none).expect("mounted");
        mount(none, path, none, MsFlags::MS_SHARED, none).expect("shared");
        Self(path.to_owned())
    }
}

impl Drop for Peered {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn mounts(spot: &Spot<'_>, mounts: &[(&str, &Path, &[&str])]) {
    spot.change_config(|config| {
        let all = config["mounts"].as_array_mut().expect("mounts");
        all.extend(mounts.iter().map(|(destination, source, options)| {
            json!({"destination": destination, "type": "bind", "source": source,
                "options": options})
        }));
    });
}

/// A directory whose mount is a slave, a read-only one, one within another, one twice, a file; on the next
/// host all of them are elsewhere.
pub(crate) fn volumes_go_along(host: &Host) {
    let here = host.shell("v1", WRITER);
    let room = here.bundle().with_extension("room");
    let data = Peered::make(&room.join("data"));
    let file = room.join("conf");
    fs::create_dir_all(data.0.join("deep")).expect("a directory");
    fs::write(&file, "of the host\n").expect("written");
    mounts(
        &here,
        &[
            ("/vol", &data.0, &["rbind", "rw", "rslave"]),
            ("/again", &data.0.join("deep"), &["bind", "rw", "private"]),
            ("/ro", &data.0, &["rbind", "ro", "rprivate"]),
            ("/etc/conf", &file, &["bind", "ro"]),
        ],
    );
    here.run();
    here.await_count(3);
    let mut there = here.twin("v2");
    let mut source = here.source();
    let manifest = source.manifest().expect("a manifest");
    let roles: Vec<_> = manifest.files.iter().map(|tree| tree.role()).collect();
    assert_eq!(roles, [FileRole::Bundle, FileRole::VolumeFile, FileRole::Volume]);
    assert_eq!(manifest.files[2].mounts.len(), 3, "three mounts of one tree");
    let moved = room.with_extension("moved");
    let elsewhere = |path: &str| match Path::new(path).strip_prefix(&room) {
        Ok(below) => moved.join(below),
        Err(_) => path.into(),
    };
    let mut destination = there.prepare_at(&mut *source, |tree| elsewhere(&tree.path));
    source.pause().expect("pause");
    copy_pages(&mut *source, &mut *destination);
    let log = |room: &Path| fs::read_to_string(room.join("data/log")).expect("a log");
    let before = log(&room).lines().count() as u64;
    let copied = Command::new("cp").arg("-a").arg(&room).arg(&moved).status().expect("cp");
    assert!(copied.success());
    let sections = source.save().expect("save");
    destination.load(sections).expect("load");
    source.fence(1).expect("fence");
    destination.activate(1).expect("activate");
    source.release().expect("release");
    // A keeper listens to one at a time.
    drop((source, destination));
    there.await_count(before + 3);
    // It says a number and then writes it there.
    crate::support::await_that("as many numbers in its file", || {
        log(&moved).lines().count() as u64 >= before + 3
    });
    assert_eq!(log(&room).lines().count() as u64, before, "it wrote where it was");
    let numbers: Vec<u64> =
        log(&moved).lines().map(|line| line.parse().expect("numbers")).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    assert!(numbers.len() as u64 >= before + 3);
    // A file that was deleted, and one that is mounted by itself.
    fs::write(moved.join("data/ask"), "").expect("asked");
    let answer = moved.join("data/answer");
    crate::support::await_that("an answer", || answer.exists());
    assert_eq!(fs::read_to_string(&answer).expect("an answer"), "kept\nof the host\n");
    assert!(moved.join("data/deep/n").exists());
    // And on again, all in the same places.
    let placed = |tree: &FileTree| PlacedTree { tree: tree.clone(), path: elsewhere(&tree.path) };
    let trees: Vec<_> = manifest.files.iter().map(placed).collect();
    there.spec = there.backend().respec(&manifest, &trees).expect("a spec");
    let third = there.twin("v3");
    there.move_to(&third);
    third.await_count(there.last_count() + 3);
    third.stop();
    assert!(moved.join("data/log").exists());
    host.assert_nothing_left("v1");
    host.assert_nothing_left("v2");
    drop(data);
}

/// A process has mounted a directory and a file of a volume once more, and all of it read-only. They go along, from
/// the next host's copy; but not where a link stands in the way there, whoever made it.
pub(crate) fn parts_of_a_volume_go_along(host: &Host) {
    const PARTS: &str = "for one in /p/deep /p/all; do busybox mkdir -p $one; done; echo >/p/file
        busybox mount -o bind /vol/deep /p/deep && busybox mount -o bind /vol/conf /p/file &&
        busybox mount -o bind /vol /p/all && busybox mount -o remount,bind,ro /p/all || exit 9
        while :; do
            n=$((n + 1)); echo $n; echo $n >/p/deep/new; busybox mv /p/deep/new /p/deep/n
            { echo x >/p/all/x; } 2>/dev/null && exit 8
            busybox cat /p/file >/vol/new; busybox mv /vol/new /vol/copy
            usleep 50000
        done";
    let here = host.shell("v6", PARTS);
    let room = here.bundle().with_extension("room");
    fs::create_dir_all(room.join("data/deep")).expect("a directory");
    fs::write(room.join("data/conf"), "once\n").expect("written");
    mounts(&here, &[("/vol", &room.join("data"), &["rbind", "rw"])]);
    here.change_config(|config| {
        let rights = ["CAP_SYS_ADMIN"];
        config["process"]["capabilities"] =
            json!({"bounding": rights, "effective": rights, "permitted": rights});
    });
    here.run();
    here.await_count(3);
    let mut source = here.source();
    let moved = room.with_extension("moved");
    let elsewhere = |path: &str| match Path::new(path).strip_prefix(&room) {
        Ok(below) => moved.join(below),
        Err(_) => path.into(),
    };
    for linked in [true, false] {
        let there = here.twin("v7");
        let mut destination = there.prepare_at(&mut *source, |tree| elsewhere(&tree.path));
        source.pause().expect("pause");
        copy_pages(&mut *source, &mut *destination);
        let copied = Command::new("cp").arg("-aT").arg(&room).arg(&moved).status().expect("cp");
        assert!(copied.success());
        let sections = source.save().expect("save");
        if linked {
            let deep = moved.join("data/deep");
            fs::rename(&deep, deep.with_extension("away")).expect("renamed");
            std::os::unix::fs::symlink("deep.away", &deep).expect("a link");
            let error = destination.load(sections).expect_err("a link is in the way");
            assert!(error.to_string().contains("open deep of the mount /vol"), "{error}");
            destination.discard().expect("discard");
            host.assert_nothing_left("v7");
            let before = here.last_count();
            source.resume().expect("resume");
            here.await_count(before + 2);
            fs::remove_dir_all(&moved).expect("removed");
            continue;
        }
        destination.load(sections).expect("load");
        source.fence(1).expect("fence");
        destination.activate(1).expect("activate");
        source.release().expect("release");
        drop(destination);
        fs::write(moved.join("data/conf"), "twice\n").expect("written");
        // It may have run for a while before that.
        there.await_count(there.last_count().max(here.last_count()) + 4);
        let read = |path: &Path| fs::read_to_string(path).expect("written");
        let count = read(&moved.join("data/deep/n")).trim().parse::<u64>().expect("a number");
        assert!(count > here.last_count());
        assert_eq!(read(&moved.join("data/copy")), "twice\n");
        assert_eq!(read(&room.join("data/copy")), "once\n");
        there.stop();
    }
    drop(source);
    host.assert_nothing_left("v6");
    host.assert_nothing_left("v7");
}

/// Said before anything is frozen, and most of it before it is run.
pub(crate) fn what_is_not_there_does_not_move(host: &Host) {
    let spot = host.counter("v4");
    let room = spot.bundle().with_extension("room");
    let data = room.join("data");
    fs::create_dir_all(&data).expect("a directory");
    mounts(&spot, &[("/vol", &data, &["rbind", "rw"])]);
    spot.run();
    spot.await_count(2);
    let needs = || {
        let needs = spot.source().manifest().expect("a manifest").needs;
        String::from_utf8(needs).expect("text")
    };
    assert!(!needs().contains("/vol does not show"));
    fs::rename(&data, room.join("away")).expect("renamed");
    assert!(needs().contains("cannot be found"));
    fs::create_dir(&data).expect("another");
    assert!(needs().contains("/vol does not show"));
    spot.stop();
    let refusals = |source: &Path| {
        let spot = host.counter("v5");
        mounts(&spot, &[("/vol", source, &["rbind", "rw"])]);
        let refusals = spot.backend().check(&spot.spec);
        fs::remove_dir_all(spot.bundle()).expect("removed");
        refusals.len()
    };
    for bad in ["/proc/1", "/sys/kernel", "/dev/null", "/nowhere", "/"] {
        assert_eq!(refusals(Path::new(bad)), 1, "{bad}");
    }
    assert_eq!(refusals(&data), 0);
}
