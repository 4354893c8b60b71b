//! Moves of containers whose processes share memory: what is shared travels in spaces of its own while
//! they run, and arrives where they map it.

use std::io::Write as _;

use decamp_shared::pages::{PageRange, PageSet, SpaceId};
use decamp_shared::workload::SourceWorkload;
use serde_json::{Value, json};

use crate::support::{self, Host};

/// Spaces from here on are shared memory.
const FIRST: u32 = 1 << 22;

/// What of the program's memory is moved as shared, and not by CRIU.
pub(crate) const MOVED: [&str; 7] =
    ["/dev/zero", "/dev/zero", "System V", "held", "mapped by two", "punched", "written"];

pub(crate) fn shared_memory_moves_live(host: &Host) {
    let Some(mut here) = host.program("x0", "segments") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    let descriptors = |spot: &support::Spot<'_>| {
        let name = spot.place.name.as_str();
        host.runc(&["exec", name, "/bin/busybox", "ls", "/proc/1/fd"])
    };
    let open = descriptors(&here);
    for turn in 1..=6 {
        let there = here.twin(&format!("x{turn}"));
        assert_eq!(names(&here), MOVED, "before move {turn}");
        here.move_live(&there, 4);
        let before = here.rounds();
        there.await_rounds(before + 8);
        here = there;
    }
    assert_eq!(descriptors(&here), open, "it has descriptors that it did not open");
    here.stop();
    host.assert_nothing_left("x6");
}

pub(crate) fn shared_memory_survives_a_stop(host: &Host) {
    let Some(mut here) = host.program("y0", "segments") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    for turn in 1..=3 {
        let there = here.twin(&format!("y{turn}"));
        here.move_to(&there);
        let before = here.rounds();
        there.await_rounds(before + 8);
        here = there;
    }
    // Rolled back it has what it had, and can still move.
    let mut source = here.source();
    source.pause().expect("pause");
    source.harvest(&mut PageSet::new()).expect("harvest");
    source.save().expect("save");
    source.resume().expect("resume");
    drop(source);
    here.await_rounds(here.rounds() + 8);
    let there = here.twin("y4");
    here.move_live(&there, 2);
    there.await_rounds(here.rounds() + 8);
    there.stop();
    host.assert_nothing_left("y4");
}

/// Files on a tmpfs, and System V segments, with all that programs see of them.
pub(crate) fn shared_files_move_live(host: &Host) {
    let Some(mut here) = host.program("z0", "shared_files") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    for turn in 1..=5 {
        let there = here.twin(&format!("z{turn}"));
        let moved = names(&here);
        for name in ["System V", " shm /dev/shm/mapped", " shm /dev/shm/sparse"] {
            assert!(moved.iter().any(|one| one.ends_with(name)), "{name} is not among {moved:?}");
        }
        // The last one all at once, after a move that was given up.
        if turn == 5 {
            let mut source = here.source();
            source.pause().expect("pause");
            source.harvest(&mut PageSet::new()).expect("harvest");
            source.save().expect("save");
            source.resume().expect("resume");
            drop(source);
            here.await_rounds(here.rounds() + 8);
            here.move_to(&there);
        } else {
            here.move_live(&there, 4);
        }
        there.await_rounds(here.rounds() + 8);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("z5");
}

/// The test above can fail: without what was written to a file last the program says so.
pub(crate) fn withheld_page_of_a_file_is_noticed(host: &Host) {
    let Some(here) = host.program("t0", "shared_files") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.run();
    here.await_rounds(3);
    for (turn, name) in ["System V", " shm /dev/shm/mapped"].into_iter().enumerate() {
        let there = here.twin(&format!("t{}", turn + 1));
        let mut source = here.source();
        let found = segments_of(&mut *source).into_iter().find(|(_, other)| other.ends_with(name));
        let (id, _) = found.expect("a segment");
        let mut destination = there.prepare(&mut *source);
        source.pause().expect("pause");
        let mut dirty = PageSet::new();
        source.harvest(&mut dirty).expect("harvest");
        let ours = dirty.ranges().filter(|range| range.space == SpaceId(id));
        let largest = ours.max_by_key(|range| range.count).expect("pages");
        dirty.remove(PageRange::new(largest.space, largest.first, largest.count));
        support::copy(&dirty, &mut *source, &mut *destination);
        destination.load(source.save().expect("save")).expect("load");
        destination.activate(1).expect("activate");
        there.await_log("BAD");
        eprintln!("    noticed without pages of {name}");
        source.resume().expect("resume");
        drop((source, destination));
        there.stop();
        std::fs::remove_file(here.bundle().join("rootfs/data/BAD")).expect("it was told");
        here.await_rounds(here.rounds() + 8);
    }
    here.stop();
}

/// The tests above can fail: without one page of a segment the program says which. For each segment that
/// is moved, whoever maps it or does not.
pub(crate) fn withheld_shared_page_is_noticed(host: &Host) {
    withheld_page_is_noticed(host, "w", |_| {});
}

/// The same with a configuration that is changed before.
pub(crate) fn withheld_page_is_noticed(host: &Host, name: &str, change: impl FnOnce(&mut Value)) {
    let Some(here) = host.program(&format!("{name}0"), "segments") else {
        return host.skip("needs cc (tests/setup)");
    };
    here.change_config(change);
    here.run();
    here.await_rounds(3);
    let segments = segments(&here);
    assert_eq!(segments.len(), MOVED.len());
    for (turn, (id, segment)) in segments.into_iter().enumerate() {
        let there = here.twin(&format!("{name}{}", turn + 1));
        let mut source = here.source();
        let mut destination = there.prepare(&mut *source);
        source.pause().expect("pause");
        let mut dirty = PageSet::new();
        source.harvest(&mut dirty).expect("harvest");
        let ours = dirty.ranges().filter(|range| range.space == SpaceId(id));
        // Of the one that most know least of, every third page has something.
        let largest = ours.max_by_key(|range| range.count).expect("pages");
        dirty.remove(PageRange::new(largest.space, largest.first, largest.count.min(64)));
        support::copy(&dirty, &mut *source, &mut *destination);
        destination.load(source.save().expect("save")).expect("load");
        destination.activate(1).expect("activate");
        there.await_log("BAD");
        let said = std::fs::read_to_string(there.place.log()).expect("a log");
        let said = said.lines().find(|line| line.contains("BAD")).unwrap_or_default();
        eprintln!("    without pages of {segment}: {said}");
        source.resume().expect("resume");
        // A keeper serves one connection at a time.
        drop((source, destination));
        there.stop();
        std::fs::remove_file(here.bundle().join("rootfs/data/BAD")).expect("it was told");
        here.await_rounds(here.rounds() + 8);
    }
    here.stop();
}

/// Not a test that can pass or fail: the figures of moves with shared memory that stands idle but for a
/// few pages.
pub(crate) fn measure_shared(host: &Host) {
    let Ok(sizes) = std::env::var("DECAMP_MEASURE_SHARED_MIB") else {
        return host.skip("set DECAMP_MEASURE_SHARED_MIB to sizes (64,256,1024) to measure");
    };
    // Anonymous, or in a file on a tmpfs.
    let files = std::env::var_os("DECAMP_MEASURE_FILES").is_some();
    let program = if files { "shared_files" } else { "stretch" };
    for size in sizes.split(',') {
        let Some(mut here) = host.program_with(&format!("ms{size}"), program, size) else {
            return host.skip("needs cc (tests/setup)");
        };
        here.change_config(|config| {
            let mounts = config["mounts"].as_array_mut().expect("mounts");
            let shm = mounts.iter_mut().find(|mount| mount["destination"] == "/dev/shm");
            shm.expect("/dev/shm")["options"] =
                serde_json::json!(["nosuid", "noexec", "nodev", "mode=1777", "size=2g"]);
        });
        here.run();
        here.await_rounds(3);
        let mut rows = Vec::new();
        for turn in 0..7 {
            let there = here.twin(&format!("ms{size}-{turn}"));
            let moved = here.move_live(&there, 3);
            there.await_rounds(here.rounds() + 3);
            rows.push(moved);
            here = there;
        }
        here.stop();
        let mut downtimes: Vec<f64> = rows.iter().map(|row| row.downtime()).collect();
        downtimes.sort_by(f64::total_cmp);
        let (least, middle, most) = (downtimes[0], downtimes[3], downtimes[6]);
        let line = format!(
            "    {size} MiB shared: downtime min {least:.0} median {middle:.0} max {most:.0} ms"
        );
        writeln!(std::io::stderr(), "{line}").expect("stderr");
        for step in ["pause", "harvest", "copy", "save", "load", "activate"] {
            let mut times: Vec<f64> = rows.iter().map(|row| row.times[step]).collect();
            times.sort_by(f64::total_cmp);
            writeln!(std::io::stderr(), "      {step:9} median {:7.1} ms", times[3])
                .expect("stderr");
        }
    }
}

/// What nobody maps, and a cgroup elsewhere may be charged for, is announced all the same.
pub(crate) fn what_lies_on_a_tmpfs_is_announced(host: &Host) {
    const MIB: u64 = 1 << 20;
    let line = "cat /dev/urandom | head -c 25165824 >/big/file; echo 1; exec sleep 600";
    let here = host.shell("ot0", line);
    here.change_config(|config| {
        let mounts = config["mounts"].as_array_mut().expect("mounts");
        mounts.push(json!({"destination": "/big", "type": "tmpfs", "source": "tmpfs"}));
    });
    here.run();
    here.await_count(1);
    let announced = |spot: &support::Spot<'_>| {
        let needs = spot.source().manifest().expect("a manifest").needs;
        let needs: Value = serde_json::from_slice(&needs).expect("JSON");
        needs["on_tmpfs"].as_u64().expect("a number")
    };
    assert!((24 * MIB..32 * MIB).contains(&announced(&here)), "{}", announced(&here));
    let there = here.twin("ot1");
    here.move_live(&there, 2);
    assert!((24 * MIB..32 * MIB).contains(&announced(&there)), "{}", announced(&there));
    there.stop();
    host.assert_nothing_left("ot1");
}

pub(crate) fn names(spot: &support::Spot<'_>) -> Vec<String> {
    segments(spot).into_iter().map(|(_, name)| name).collect()
}

/// Shared memory that has a space of its own, by name.
fn segments(spot: &support::Spot<'_>) -> Vec<(u32, String)> {
    segments_of(&mut *spot.source())
}

fn segments_of(source: &mut dyn SourceWorkload) -> Vec<(u32, String)> {
    let spaces = source.spaces().expect("spaces");
    let shared = spaces.into_iter().filter(|info| info.id >= FIRST);
    let name = |label: &str| match label.split_once(" segment ") {
        Some((system_v, _number)) => system_v.to_owned(),
        None => label.strip_prefix("shared memory ").unwrap_or(label).to_owned(),
    };
    let mut found: Vec<_> = shared.map(|info| (info.id, name(&info.label))).collect();
    found.sort_by(|one, other| one.1.cmp(&other.1));
    found
}
