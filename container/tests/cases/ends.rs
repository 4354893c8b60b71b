//! The beginning and the end of a container that is not moved: what is refused, what is told, and that
//! nothing is left.

use std::time::{Duration, Instant};

use decamp_shared::keeper::KeeperClient;
use decamp_shared::workload::Backend;

use super::support::{Case, Host};

pub(crate) const CASES: [Case; 4] = [
    Case { name: "exit_is_told_and_nothing_stays", run: exit_is_told_and_nothing_stays },
    Case { name: "stop_and_sweep_leave_nothing", run: stop_and_sweep_leave_nothing },
    Case { name: "refusals_come_all_at_once", run: refusals_come_all_at_once },
    Case { name: "a_name_that_others_have_is_theirs", run: a_name_that_others_have_is_theirs },
];

fn exit_is_told_and_nothing_stays(host: &Host) {
    let place = host.shell("e", "echo hello; exit 7");
    place.run();
    place.await_exit();
    assert_eq!(place.exit_record()["status"], 7);
    assert_eq!(std::fs::read_to_string(place.place.log()).expect("a log"), "hello\n");
    host.assert_nothing_left("e");
}

fn stop_and_sweep_leave_nothing(host: &Host) {
    let place = host.counter("s");
    place.run();
    place.await_count(2);
    // A shell that is PID 1 heeds no SIGTERM, so this is the forced end.
    let begun = Instant::now();
    let mut client = KeeperClient::connect(&place.place).expect("connect");
    client.stop(Duration::from_millis(300)).expect("stop");
    assert!(begun.elapsed() >= Duration::from_millis(300));
    host.assert_nothing_left("s");
    for paused in [false, true] {
        let place = host.counter(if paused { "s2" } else { "s1" });
        place.run();
        place.await_count(2);
        let mut source = place.source();
        if paused {
            source.pause().expect("pause");
        }
        place.kill_keeper();
        place.backend().sweep(&place.spec, &place.place).expect("sweep");
        host.assert_nothing_left(&place.place.name);
        place.backend().sweep(&place.spec, &place.place).expect("twice");
    }
}

fn refusals_come_all_at_once(host: &Host) {
    let place = host.counter("q");
    let backend = place.backend();
    let mut spec = place.spec.clone();
    assert_eq!(backend.check(&spec), []);
    spec["bundle"] = "/nowhere".into();
    spec["net"] = serde_json::json!({"bridge": "nobridge", "ip": "10.99.0.9/24"});
    let codes: Vec<i32> = backend.check(&spec).iter().map(|refusal| refusal.code).collect();
    assert_eq!(codes, [12, 4], "{:?}", backend.check(&spec));
    let mut tools = host.tools();
    tools.criu = "/nowhere/criu".into();
    tools.runc = "/bin/true".into();
    let poor = decamp_container::ContainerBackend::new(tools);
    assert_eq!(poor.check(&place.spec).len(), 2, "{:?}", poor.check(&place.spec));
    assert!(place.try_run(&spec).is_err());
    host.assert_nothing_left("q");
}

/// What another agent, or a user, runs under a name is neither killed nor forgotten by a start under
/// that name that fails.
fn a_name_that_others_have_is_theirs(host: &Host) {
    let theirs = host.counter("t");
    theirs.run();
    theirs.await_count(2);
    let ours = theirs.rival();
    let error = ours.try_run(&ours.spec).expect_err("the name is taken");
    assert!(error.to_string().contains("has a container"), "{error}");
    let error = ours.spawn_keeper().expect_err("the keeper looks too");
    assert!(error.to_string().contains("has a container"), "{error}");
    ours.backend().sweep(&ours.spec, &ours.place).expect("sweep");
    theirs.await_count(theirs.last_count() + 3);
    host.assert_listed_as_running(&theirs.place.name);
    theirs.stop();

    let cgroup = host.cgroup(&theirs.place.name);
    std::fs::create_dir_all(&cgroup).expect("a cgroup");
    let mut sleeper = std::process::Command::new("sleep").arg("600").spawn().expect("sleep");
    std::fs::write(cgroup.join("cgroup.procs"), sleeper.id().to_string()).expect("entered");
    let error = ours.spawn_keeper().expect_err("the cgroup is taken");
    assert!(error.to_string().contains("Processes run in"), "{error}");
    ours.backend().sweep(&ours.spec, &ours.place).expect("sweep");
    assert!(sleeper.try_wait().expect("its state").is_none(), "a stranger was killed");
    sleeper.kill().and_then(|()| sleeper.wait()).expect("ended");
    // An empty cgroup is nobody's.
    ours.run();
    ours.await_count(2);
    ours.stop();
    host.assert_nothing_left("t");
}
