//! Containers whose move is given up while they stand still: they run on here.

use std::time::Duration;

use decamp_shared::pages::PageSet;

use super::support::{Case, Host};

pub(crate) const CASES: [Case; 3] = [
    Case { name: "rolled_back_it_runs_on", run: rolled_back_it_runs_on },
    Case { name: "rolled_back_whatever_the_bridge", run: rolled_back_whatever_the_bridge },
    Case { name: "rolled_back_in_a_dump", run: rolled_back_in_a_dump },
];

fn rolled_back_it_runs_on(host: &Host) {
    let place = host.counter("r");
    place.run();
    place.await_count(2);
    let mut source = place.source();
    for save in [false, true, true] {
        source.pause().expect("pause");
        let before = place.noted();
        if save {
            assert!(!source.save().expect("save").is_empty());
        }
        std::thread::sleep(Duration::from_millis(250));
        assert_eq!(place.noted(), before, "it ran while it was paused");
        assert!(place.last_count() <= before + 1, "it ran while it was paused");
        source.resume().expect("resume");
        place.await_count(before + 3);
    }
    drop(source);
    let twin = place.twin("r2");
    place.move_to(&twin);
    twin.await_count(place.last_count() + 2);
    twin.stop();
}

/// What happens to a bridge while a container stands still does not keep it from running on.
fn rolled_back_whatever_the_bridge(host: &Host) {
    let place = host.counter_at("br", "10.99.0.8/24");
    place.run();
    place.await_count(2);
    let link = host.link();
    let up = ["link", "set", &link, "up"];
    let back = ["link", "set", &link, "master", "br0"];
    let no_stp = ["link", "set", "br0", "type", "bridge", "stp_state", "0"];
    let down = ["link", "set", &link, "down"];
    let out = ["link", "set", &link, "nomaster"];
    let stp = ["link", "set", "br0", "type", "bridge", "stp_state", "1"];
    let turns: [(&[&str], &[&str]); 3] = [(&down, &up), (&out, &back), (&stp, &no_stp)];
    for (what, undo) in turns {
        let mut source = place.source();
        source.pause().expect("pause");
        host.ip(what);
        let before = place.last_count();
        source.resume().unwrap_or_else(|error| panic!("after {what:?}: {error}"));
        place.await_count(before + 3);
        host.ip(undo);
        assert!(!host.ip(&["-d", "link", "show", &link]).contains("state disabled"), "{what:?}");
    }
    place.stop();
}

/// Rolled back at any moment of a dump, the container runs on with all that it had.
fn rolled_back_in_a_dump(host: &Host) {
    let Some(place) = host.program("d", "memory") else {
        return host.skip("needs cc (tests/setup)");
    };
    place.run();
    place.await_rounds(3);
    let turns = std::env::var("DECAMP_TURNS").ok().and_then(|text| text.parse().ok());
    for turn in 0..turns.unwrap_or(16_u64) {
        let mut source = place.source();
        source.pause().expect("pause");
        let before = place.rounds();
        source.harvest(&mut PageSet::new()).expect("harvest");
        std::thread::sleep(Duration::from_micros(turn * 7919 % 120_000));
        source.resume().expect("resume");
        drop(source);
        place.await_rounds(before + 3);
    }
    // And it can still move.
    let twin = place.twin("d2");
    let before = place.rounds();
    place.move_to(&twin);
    twin.await_rounds(before + 3);
    twin.stop();
    host.assert_nothing_left("d2");
}
