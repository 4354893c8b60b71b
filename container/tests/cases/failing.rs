//! Keepers that die, a CRIU that is broken, and state that is damaged: nothing runs twice, nothing is left
//! behind, and what was not moved runs on.

use std::time::{Duration, Instant};

use decamp_shared::pages::PageSet;
use decamp_shared::workload::Backend;

use super::support::{self, Case, Host};

pub(crate) const CASES: [Case; 4] = [
    Case { name: "keeper_dead_in_a_restore", run: keeper_dead_in_a_restore },
    Case { name: "a_broken_criu_is_noticed", run: a_broken_criu_is_noticed },
    Case { name: "keeper_dead_in_a_filling", run: keeper_dead_in_a_filling },
    Case { name: "failed_load_leaves_nothing", run: failed_load_leaves_nothing },
];

/// CRIU holds what it restored while its keeper says nothing, for as long as that may be.
fn keeper_dead_in_a_restore(host: &Host) {
    if !cfg!(feature = "failpoints") {
        return host.skip("needs --features failpoints");
    }
    let place = host.counter("h");
    place.run();
    place.await_count(3);
    let twin = place.twin(support::HELD);
    let mut source = place.source();
    let mut destination = twin.prepare(&mut *source);
    source.pause().expect("pause");
    support::copy_pages(&mut *source, &mut *destination);
    let sections = source.save().expect("save");
    let count =
        || std::fs::read_to_string(place.bundle().join("rootfs/data/count")).expect("a count");
    let before = count();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| destination.load(sections));
        twin.await_keeper_log("CRIU holds the restored tasks");
        twin.kill_keeper();
        load.join().expect("a thread").expect_err("a dead keeper loaded");
    });
    drop(destination);
    std::thread::sleep(Duration::from_millis(1000));
    assert_eq!(count(), before, "it ran when its keeper had died");
    twin.backend().sweep(&twin.spec, &twin.place).expect("sweep");
    host.assert_nothing_left(&twin.place.name);
    assert_eq!(count(), before, "it ran when it was swept");
    source.resume().expect("resume");
    place.await_count(place.last_count() + 3);
    drop(source);
    place.stop();
}

/// So long somebody has the socket of a CRIU that died, and as long CRIU may do nothing before it is called stuck.
const WITHOUT_END: Duration = Duration::from_secs(20);

/// A CRIU that died is noticed at once, although others have its socket, and one that is stuck is not
/// waited for without end.
fn a_broken_criu_is_noticed(host: &Host) {
    host.break_criu("source", "sleep 20 & exit 1");
    let place = host.counter("n");
    place.run();
    place.await_count(2);
    let mut source = place.source();
    source.pause().expect("pause");
    let begun = Instant::now();
    let error = source.save().expect_err("it died");
    assert!(error.to_string().contains("CRIU died"), "{error}");
    assert!(begun.elapsed() < WITHOUT_END - Duration::from_secs(2));
    source.resume().expect("resume");
    place.await_count(place.last_count() + 3);

    host.break_criu("source", "exec sleep 600");
    source.pause().expect("pause");
    source.harvest(&mut PageSet::new()).expect("harvest");
    let begun = Instant::now();
    source.resume().expect("resume");
    assert!(begun.elapsed() < Duration::from_secs(60));
    place.await_count(place.last_count() + 3);

    // What does nothing at all is given up in a stated time.
    host.break_criu("still", "exec sleep 600");
    let twin = place.twin("n3");
    let mut destination = twin.prepare(&mut *source);
    host.break_criu("source", ":");
    source.pause().expect("pause");
    support::copy_pages(&mut *source, &mut *destination);
    let sections = source.save().expect("save");
    let begun = Instant::now();
    let error = destination.load(sections).expect_err("it does nothing");
    assert!(error.to_string().contains("nothing has worked for 20 s"), "{error}");
    assert!(begun.elapsed() < 2 * WITHOUT_END);
    destination.discard().expect("discard");
    host.assert_nothing_left("n3");
    source.resume().expect("resume");
    place.await_count(place.last_count() + 3);
    drop(destination);

    let twin = place.twin("n2");
    // Under a name of its own: a shell that was just started may not have read its script yet.
    host.break_criu("destination", "sleep 1; sleep 20 & exit 1");
    let mut destination = twin.prepare(&mut *source);
    host.break_criu("source", ":");
    source.pause().expect("pause");
    support::copy_pages(&mut *source, &mut *destination);
    let sections = source.save().expect("save");
    let begun = Instant::now();
    let error = destination.load(sections).expect_err("it died");
    assert!(error.to_string().contains("CRIU died"), "{error}");
    assert!(begun.elapsed() < WITHOUT_END - Duration::from_secs(2));
    destination.discard().expect("discard");
    host.assert_nothing_left("n2");
    source.resume().expect("resume");
    place.await_count(place.last_count() + 3);
    drop(source);
    place.stop();
    host.assert_nothing_left("n");
}

/// Memory that has not come when the keeper dies is waited for, and never read as zeros.
fn keeper_dead_in_a_filling(host: &Host) {
    if !cfg!(feature = "failpoints") {
        return host.skip("needs --features failpoints");
    }
    let Some(place) = host.program("z", "memory") else {
        return host.skip("needs cc (tests/setup)");
    };
    place.run();
    place.await_rounds(3);
    let twin = place.twin(support::HUNGRY);
    place.move_live(&twin, 2);
    let before = twin.settled_rounds();
    twin.kill_keeper();
    std::thread::sleep(Duration::from_millis(1000));
    let bad = place.bundle().join("rootfs/data/BAD");
    assert!(!bad.exists(), "memory that was missing was read");
    assert_eq!(twin.rounds(), before, "it ran without its memory");
    twin.backend().sweep(&twin.spec, &twin.place).expect("sweep");
    host.assert_nothing_left(&twin.place.name);
    host.await_no_holder();
    assert!(!bad.exists(), "memory that was missing was read in a sweep");
}

fn failed_load_leaves_nothing(host: &Host) {
    let place = host.counter("f");
    place.run();
    place.await_count(2);
    type Damage = fn(&mut Vec<decamp_shared::workload::Section>);
    let damages: [(&str, Damage); 6] = [
        ("images that are cut short", |sections| {
            let name =
                |section: &decamp_shared::workload::Section| section.kind == "container/images";
            let packed = sections.iter_mut().find(|section| name(section)).expect("images");
            packed.bytes.truncate(packed.bytes.len() / 2);
        }),
        ("a missing image", |sections| {
            *sections = support::apart(std::mem::take(sections));
            sections.retain(|section| section.kind != "criu/core-1.img")
        }),
        ("an unknown section", |sections| {
            let extra = decamp_shared::workload::Section {
                kind: "vcpu/0".into(),
                version: 1,
                bytes: vec![],
            };
            sections.push(extra);
        }),
        ("a name that leaves the directory", |sections| {
            sections[0].kind = "criu/../../x.img".into()
        }),
        ("another version", |sections| sections[0].version = 9),
        ("a torn pagemap", |sections| {
            *sections = support::apart(std::mem::take(sections));
            let pagemap = sections.iter_mut().find(|section| section.kind == "criu/pagemap-1.img");
            pagemap.expect("a pagemap").bytes.truncate(21);
        }),
    ];
    for (what, damage) in damages {
        let twin = place.twin("f2");
        let mut source = place.source();
        let mut destination = twin.prepare(&mut *source);
        source.pause().expect("pause");
        support::copy_pages(&mut *source, &mut *destination);
        let mut sections = source.save().expect("save");
        damage(&mut sections);
        let error = destination.load(sections).expect_err(what);
        eprintln!("    {what}: {error}");
        destination.discard().expect("discard");
        host.assert_nothing_left("f2");
        let before = place.last_count();
        source.resume().expect("resume");
        place.await_count(before + 2);
    }
    place.stop();
}
