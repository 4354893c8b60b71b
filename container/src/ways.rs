//! Which ways this host goes, of those that its configuration allows: what it lacks for one that the
//! configuration forces, and why a way that is not the best is taken. How each is gone is its own room's.

use decamp_shared::methods::{
    ForkedChoice, HidingChoice, Methods, RestoreChoice, TrackerChoice, Ways,
};
use decamp_shared::workload::Liveness;

use crate::filling;
use crate::forked::places;
use crate::hiding::{self, Way};
use crate::tracker;

/// How memory is hidden from CRIU when a container leaves, or why it is not.
pub(crate) type Hiding = std::result::Result<Way, String>;

/// The way for a container in which somebody is under a seccomp filter when it is `filtered`.
pub(crate) fn hiding(methods: &Methods, filtered: bool) -> Hiding {
    match methods.hiding {
        HidingChoice::None => Err("the configuration says hiding = \"none\"".to_owned()),
        HidingChoice::Auto | HidingChoice::Hidden => hiding::choose(filtered),
    }
}

/// What the configuration forces for a container that leaves, and this host cannot do.
pub(crate) fn obstacles(methods: &Methods, hiding: &Hiding) -> Vec<String> {
    let mut found = Vec::new();
    let tracks = !matches!(methods.tracker, TrackerChoice::Auto | TrackerChoice::None);
    if tracks && let Err(reason) = tracker::choose(methods.tracker) {
        found.push(format!(
            "It cannot be tracked as the source wants it: {reason}. Say tracker = \"auto\" there"
        ));
    }
    let forced = tracks || methods.hiding == HidingChoice::Hidden;
    if let Err(reason) = hiding
        && forced
    {
        found.push(format!(
            "Its memory cannot be hidden from CRIU at the source, as its configuration wants: {reason}. \
             Say hiding = \"auto\" and tracker = \"auto\" there"
        ));
    }
    found
}

/// Whether a container that leaves can be copied while it runs.
pub(crate) fn liveness(methods: &Methods, hiding: &Hiding) -> Liveness {
    let tracker = match hiding {
        Err(reason) => Err(format!("its memory is not hidden from CRIU: {reason}")),
        Ok(_) => tracker::choose(methods.tracker),
    };
    match tracker {
        Ok(chosen) => Liveness::Tracked { tracker: chosen.tracker.word().to_owned() },
        Err(reason) => Liveness::StopOnly { reason },
    }
}

/// Whether a container that leaves goes into a file, for all that its keeper knows: nobody tracks it.
pub(crate) fn is_for_file(methods: &Methods) -> bool {
    methods.tracker == TrackerChoice::None
}

/// Whether the page engine moves shared memory of a container that leaves: only beside the tracker that
/// it was made for, and only where CRIU can be under a filter. Otherwise it stays in CRIU's images.
pub(crate) fn moves_segments(methods: &Methods, hiding: &Hiding) -> bool {
    is_for_segments(methods) && matches!(hiding, Ok(way) if hiding::hides_segments(*way).is_ok())
}

fn is_for_segments(methods: &Methods) -> bool {
    tracker::choose(methods.tracker)
        .is_ok_and(|chosen| chosen.tracker == TrackerChoice::WriteProtect)
}

/// How a container leaves, for the report.
pub(crate) fn leaving(methods: &Methods, hiding: &Hiding) -> Ways {
    let (dump, mut fallbacks) = match hiding {
        Err(reason) => (Ways::CRIU, vec![format!("CRIU dumps all memory by itself: {reason}")]),
        Ok(way) => (
            if *way == Way::Filter { Ways::HIDDEN } else { Ways::MOUNTS },
            tracker::choose(methods.tracker).map(|chosen| chosen.fallbacks).unwrap_or_default(),
        ),
    };
    if let Ok(way) = hiding
        && is_for_segments(methods)
        && let Err(reason) = hiding::hides_segments(*way)
    {
        fallbacks.push(format!("Shared memory travels in CRIU's images: {reason}"));
    }
    if hiding.is_ok() && methods.forked != ForkedChoice::Each && !places::are_known() {
        let reason = "Pages that forked processes share travel once for each of them: the keeper may not \
                      know where pages lie (CAP_SYS_ADMIN)";
        fallbacks.push(reason.to_owned());
    }
    Ways { dump: Some(dump.to_owned()), restore: None, fallbacks }
}

/// Whether memory of a container that arrives may come when it runs already; `is_mapped` says that it has a
/// user namespace.
///
/// # Errors
/// Why all of it is put in its place before.
pub(crate) fn late(methods: &Methods, is_mapped: bool) -> std::result::Result<(), String> {
    match methods.restore {
        RestoreChoice::Eager => Err("the configuration says restore = \"eager\"".to_owned()),
        _ if filling::comes_behind(is_mapped) => filling::probe_descent().map_err(|reason| {
            format!(
                "its tasks are root in a user namespace only, and so may not make the userfaultfd that \
                 CRIU wants of them (sysctl vm.unprivileged_userfaultfd=1 there allows it), and {reason}"
            )
        }),
        RestoreChoice::Auto | RestoreChoice::Lazy => filling::probe(),
    }
}

/// What the configuration forces for a container that arrives, and this host cannot do.
pub(crate) fn arrival_obstacle(methods: &Methods, is_mapped: bool) -> Option<String> {
    let lacking = late(methods, is_mapped).err().filter(|_| methods.restore == RestoreChoice::Lazy);
    lacking.map(|reason| {
        format!(
            "The configuration there says restore = \"lazy\", which does not work: {reason}. Say \
             restore = \"auto\" there"
        )
    })
}

/// How a container was restored, for the report: `eager` says why its memory did not come late, `forked`
/// what became of what its processes shared.
pub(crate) fn arrived(eager: Option<&str>, forked: Option<String>) -> Ways {
    let restore = if eager.is_none() { Ways::LAZY } else { Ways::EAGER };
    let eager = eager.map(|reason| format!("All memory is restored before it runs: {reason}"));
    let fallbacks = eager.into_iter().chain(forked).collect();
    Ways { restore: Some(restore.to_owned()), dump: None, fallbacks }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forced_and_does_not_work_is_an_obstacle() {
        let auto = Methods::default();
        let no_kernel = Err("no such kernel".to_owned());
        assert_eq!(obstacles(&auto, &no_kernel), Vec::<String>::new());
        let hidden = Methods { hiding: HidingChoice::Hidden, ..auto };
        assert_eq!(obstacles(&hidden, &Ok(Way::Filter)), Vec::<String>::new());
        let [said] = &obstacles(&hidden, &no_kernel)[..] else { panic!("one") };
        assert!(said.contains("no such kernel"), "{said}");
        // What is not hidden is not tracked either.
        let tracked = Methods { tracker: TrackerChoice::PageHash, ..auto };
        assert_eq!(obstacles(&tracked, &Ok(Way::Mounts)), Vec::<String>::new());
        assert_eq!(obstacles(&tracked, &no_kernel).len(), 1);
        assert_eq!(
            arrival_obstacle(&Methods { restore: RestoreChoice::Eager, ..auto }, false),
            None
        );
    }

    #[test]
    fn what_the_configuration_says_is_a_reason() {
        let none = Methods { hiding: HidingChoice::None, ..Methods::default() };
        let none_hidden = hiding(&none, false);
        let Liveness::StopOnly { reason: told } = liveness(&none, &none_hidden) else {
            panic!("nothing is tracked")
        };
        assert!(told.contains("hiding = \"none\""), "{told}");
        let ways = leaving(&none, &none_hidden);
        assert_eq!(ways.dump.as_deref(), Some("criu"));
        assert!(ways.fallbacks[0].contains("hiding = \"none\""));
        let eager = Methods { restore: RestoreChoice::Eager, ..Methods::default() };
        let reason = late(&eager, false).expect_err("it says so");
        let ways = arrived(Some(&reason), None);
        assert_eq!(ways.restore.as_deref(), Some("eager"));
        assert!(ways.fallbacks[0].contains("restore = \"eager\""));
    }

    #[test]
    fn the_report_names_the_tracker_that_is_forced() {
        let forced = Methods { tracker: TrackerChoice::PageHash, ..Methods::default() };
        let expected = Liveness::Tracked { tracker: "page-hash".to_owned() };
        assert_eq!(liveness(&forced, &Ok(Way::Filter)), expected);
        assert_eq!(leaving(&forced, &Ok(Way::Filter)).dump.as_deref(), Some("hidden"));
        let by_mounts = leaving(&forced, &Ok(Way::Mounts)).dump;
        assert_eq!(by_mounts.as_deref(), Some("hidden-by-mounts"));
        let none = Methods { tracker: TrackerChoice::None, ..Methods::default() };
        assert!(matches!(liveness(&none, &Ok(Way::Filter)), Liveness::StopOnly { .. }));
    }
}
