//! The ways that a container's memory goes, as the configurations of both hosts force them, and as the
//! report names them.

use crate::hosts::{ALPHA, BETA, Hosts, Reconfigured, hosts};
use crate::redis::Redis;
use crate::refusals::stays;
use crate::{Needs, Test};

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("ways::compared_and_eager", Needs::Containers, compared_and_eager),
        Test::new("ways::all_in_criu_images", Needs::Containers, all_in_criu_images),
        Test::new("ways::forced_and_not_there", Needs::NoSoftDirty, forced_and_not_there),
    ]
}

/// The agent of `host` is told of ways.
fn with_ways<'a>(hosts: &'a Hosts, host: &'a str, ways: &str) -> Reconfigured<'a> {
    hosts.reconfigure(host, |text| format!("{text}\n[containers]\n{ways}\n"))
}

/// Found by comparison while it is written to, and all there before it runs again.
fn compared_and_eager() {
    let hosts = hosts();
    hosts.mend();
    let redis = Redis::start(hosts, ALPHA, "compared", 60);
    let mut client = redis.client(64, 2000);
    // The container runs already: what the configuration says now counts.
    let here = with_ways(hosts, ALPHA, "tracker = \"page-hash\"");
    let there = with_ways(hosts, BETA, "restore = \"eager\"");
    let report =
        hosts.decamp(ALPHA, &["migrate", "compared", "--to", BETA, "--json"]).expect(0).json();
    assert_eq!(report["mode"], "pre-copy", "{report:#}");
    assert_eq!(report["tracker"], "page-hash", "{report:#}");
    assert_eq!(report["dump"], "hidden", "{report:#}");
    assert_eq!(report["restore"], "eager", "{report:#}");
    let compared = report["compare_ms"].as_f64().expect("a number");
    assert!(compared > 0.0 && compared < report["downtime_ms"].as_f64().expect("a number"));
    let fallbacks = report["fallbacks"].as_array().expect("a list");
    assert!(fallbacks.iter().any(|why| why.as_str().is_some_and(|why| why.contains("eager"))));
    client.is_served();
    client.finish();
    drop((here, there));
}

/// Nothing is hidden from CRIU: all of it travels in the stop.
fn all_in_criu_images() {
    let hosts = hosts();
    hosts.mend();
    let redis = Redis::start(hosts, ALPHA, "whole", 61);
    let mut client = redis.client(32, 500);
    let here = with_ways(hosts, ALPHA, "hiding = \"none\"");
    let ran = hosts.decamp(ALPHA, &["migrate", "whole", "--to", BETA]).expect(0);
    for says in ["stop-and-copy", "hiding = \"none\"", "all memory in CRIU's images", "eagerly"] {
        assert!(format!("{}{}", ran.stdout, ran.stderr).contains(says), "{says}: {ran}");
    }
    client.is_served();
    client.finish();
    drop(here);
}

/// A tracker that is forced and that this kernel does not have.
fn forced_and_not_there() {
    let hosts = hosts();
    hosts.mend();
    let changed = with_ways(hosts, ALPHA, "tracker = \"soft-dirty\"");
    stays(hosts, "forced", 62, &[], &["soft-dirty\", which does not work here"]);
    drop(changed);
}
