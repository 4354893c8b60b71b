//! A container that never holds still: what is seen of it while it changes speaks against nothing, neither
//! against taking charge of it nor against moving it.

use std::collections::BTreeMap;

use decamp_shared::workload::Backend;

use super::adoption::Stranger;
use super::obstacles::{made, obstacles_of};
use super::support::{Case, Host};

pub(crate) const CASES: [Case; 2] = [
    Case { name: "what_is_seen_once_keeps_none_from_adoption", run: adoption },
    Case { name: "what_is_seen_once_keeps_none_here", run: moving },
];

/// What the program does, each in a process of its own.
const RESTLESS: [&str; 12] = [
    "files",
    "saves",
    "redirects",
    "temporaries",
    "walks",
    "maps",
    "forks",
    "programs",
    "sessions",
    "pipelines",
    "connections",
    "zombie",
];
/// How often they are looked at.
const LOOKS: usize = 30;

/// Looks so often, and panics with all that was ever said.
fn nothing_is_said(mut look: impl FnMut() -> Vec<String>) {
    let mut said: BTreeMap<String, usize> = BTreeMap::new();
    for text in (0..LOOKS).flat_map(|_| look()) {
        *said.entry(text).or_default() += 1;
    }
    assert!(said.is_empty(), "in {LOOKS} looks: {said:#?}");
}

fn adoption(host: &Host) {
    let Some(spot) = host.program_with("ra", "restless", &RESTLESS.join(" ")) else {
        return host.skip("needs cc (tests/setup)");
    };
    let stranger = Stranger::start("runc", spot);
    stranger.await_said("tick 2\n");
    let backend = stranger.spot.backend();
    nothing_is_said(|| {
        let against = backend.find_foreign(&stranger.what()).err();
        against.into_iter().flatten().map(|refusal| refusal.text).collect()
    });
}

fn moving(host: &Host) {
    let Some(place) = host.program_with("rm", "restless", &RESTLESS.join(" ")) else {
        return host.skip("needs cc (tests/setup)");
    };
    place.run();
    let (made, lacking) = made(&place);
    assert_eq!((made.len(), lacking), (RESTLESS.len(), Vec::new()));
    nothing_is_said(|| obstacles_of(&place));
    place.stop();
    host.assert_nothing_left("rm");
}
