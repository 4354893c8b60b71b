//! Failures after the fence, at every step: the move completes, or is undone, or nobody knows and `resolve`
//! works. Never two, never none.

use std::time::{Duration, Instant};

use crate::failures::{Failure, HOLDS, Held, Living, Served, arm, hold, report};
use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, Hosts, hosts};
use crate::redis::Redis;
use crate::running::{Ran, find, until};
use crate::watch::Watch;
use crate::{Needs, Test};

/// The steps from the fence to the answer, in order.
const STEPS: [&str; 7] = [
    "source.fence",
    "source.commit",
    "destination.prepared",
    "destination.committed",
    "destination.activate",
    "destination.running",
    "destination.answer",
];
/// A source asks a silent destination again after 2 s at most, and a destination that lost its source waits 5 s.
const SETTLES_WITHIN: Duration = Duration::from_secs(120);

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("after_fence::destination_killed_at_each_step", Needs::Kvm, destination_killed),
        Test::new("after_fence::source_killed_at_each_step", Needs::Kvm, source_killed),
        Test::new("after_fence::connection_reset_at_each_step", Needs::Kvm, reset),
        Test::new("after_fence::step_fails_at_each_step", Needs::Kvm, step_fails),
        Test::new("after_fence::source_killed_while_undone", Needs::Kvm, killed_while_undone),
        Test::new("after_fence::container", Needs::Containers, container),
        Test::new("after_fence::destination_restarts_uncertain", Needs::Kvm, uncertain),
        Test::new("after_fence::destination_lost_and_resolved", Needs::Kvm, lost_and_resolved),
        Test::new("after_fence::resolved_for_the_destination", Needs::Kvm, resolved_away),
        Test::new("after_fence::container_outlives_its_keeper", Needs::Containers, orphaned),
        Test::new("after_fence::source_disk_full", Needs::Kvm, source_disk_full),
    ]
}

fn destination_killed() {
    guest_through(Failure::KillDestination);
}

fn source_killed() {
    guest_through(Failure::KillSource);
}

fn reset() {
    guest_through(Failure::Reset);
}

fn step_fails() {
    guest_through(Failure::Error);
}

/// One guest lives through all of them, from whichever host it is on.
fn guest_through(failure: Failure) {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "brave", "256M", "fill=64 hot=8 report=20");
    let mut from = ALPHA;
    for step in STEPS {
        let watch = Watch::begin(&guest);
        let (ran, at) = break_at(hosts, from, "brave", step, failure);
        guest.runs_clean(at);
        watch.saw_no_two();
        println!("{step}: {failure}: exit {:?}, runs at the {}", ran.code, side(from, at));
        from = at;
    }
    hosts.mend();
    guest.verify(from);
}

fn side(from: &str, at: &str) -> &'static str {
    if from == at { "source" } else { "destination" }
}

/// Breaks a move at a step, mends what is broken, and waits until exactly one host says that it runs. That
/// the exit code says the same is checked here.
fn break_at(
    hosts: &'static Hosts,
    from: &'static str,
    name: &str,
    step: &str,
    failure: Failure,
) -> (Ran, &'static str) {
    arm(hosts, from, step, failure);
    let held = hold(hosts, from, name, step, &[]);
    held.inflict(failure);
    mend(held.hosts, &held, failure);
    let to = held.to;
    let ran = held.ended();
    let at = settled(hosts, name);
    let told = match ran.code {
        Some(0) => to,
        Some(4) => from,
        _ => panic!(
            "a move that both hosts know the end of, and an exit code that does not say\n{ran}"
        ),
    };
    assert_eq!(told, at, "the exit code says one thing and `ls` another\n{ran}");
    (ran, at)
}

fn mend(hosts: &'static Hosts, held: &Held, failure: Failure) {
    match failure {
        Failure::KillDestination => hosts.start_agent(held.to, ""),
        Failure::KillSource => hosts.start_agent(held.from, ""),
        Failure::Cut | Failure::Reset => {
            // Healed once the source has noticed; what it then says depends on the step.
            let noticed = ["asking again", "Move ended"];
            find("the source to notice the cut", SETTLES_WITHIN, || {
                let log = hosts.log_since(held.from, held.mark);
                noticed.iter().any(|text| log.contains(text)).then_some(())
            });
            hosts.hosts(&["heal", held.to]).expect(0);
        }
        Failure::Cancel | Failure::Error => {}
    }
}

/// Waits until exactly one host says that it runs there, and the other that it does not.
#[track_caller]
fn settled(hosts: &Hosts, name: &str) -> &'static str {
    let gone = |state: &Option<String>| matches!(state.as_deref(), None | Some("moved"));
    let deadline = Instant::now() + SETTLES_WITHIN;
    loop {
        let states = [ALPHA, BETA].map(|host| hosts.state(host, name));
        let running = states.each_ref().map(|state| state.as_deref() == Some("running"));
        assert!(running != [true, true], "{name} runs at both hosts");
        match running {
            [true, false] if gone(&states[1]) => return ALPHA,
            [false, true] if gone(&states[0]) => return BETA,
            _ => {}
        }
        assert!(Instant::now() < deadline, "{name} at alpha and beta: {states:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The destination undoes it, and the source is restarted before it has heard.
fn killed_while_undone() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "undone", "256M", "fill=64 hot=8 report=20");
    let watch = Watch::begin(&guest);
    hosts.with_failpoints(ALPHA, "");
    let aborted = format!("destination.aborted=1*return({HOLDS})");
    hosts.with_failpoints(BETA, &format!("destination.activate=1*return;{aborted}"));
    let held = hold(hosts, ALPHA, "undone", "destination.aborted", &[]);
    hosts.hosts(&["agent", ALPHA, "kill"]).expect(0);
    hosts.start_agent(ALPHA, "");
    let ran = held.ended().expect(4);
    assert_eq!(settled(hosts, "undone"), ALPHA, "{ran}");
    guest.verify(ALPHA);
    watch.saw_no_two();
}

/// A sample of the same with a container: its client's connection lives through it all.
fn container() {
    let hosts = hosts();
    hosts.mend();
    let redis = Redis::start(hosts, ALPHA, "kept", 30);
    let mut served = Served { name: "kept", client: redis.client(16, 500) };
    let mut from = ALPHA;
    for (step, failure) in [
        ("source.commit", Failure::KillSource),
        ("destination.activate", Failure::Error),
        ("destination.activate", Failure::KillDestination),
        ("destination.running", Failure::KillDestination),
        ("destination.answer", Failure::KillSource),
        ("destination.answer", Failure::Reset),
    ] {
        let (ran, at) = break_at(hosts, from, "kept", step, failure);
        served.lives(at);
        println!("{step}: {failure}: exit {:?}, runs at the {}", ran.code, side(from, at));
        from = at;
    }
    hosts.mend();
    served.client.finish();
}

/// The destination's host loses power between COMMITTED and RUNNING: nobody can know whether an instruction
/// ran there. Exit 5 at once; a word of the operator on each host ends it.
fn uncertain() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "torn", "256M", "fill=64 hot=8 report=20");
    let watch = Watch::begin(&guest);
    arm(hosts, ALPHA, "destination.activate", Failure::KillDestination);
    let held = hold(hosts, ALPHA, "torn", "destination.activate", &[]);
    hosts.hosts(&["crash", BETA]).expect(0);
    hosts.hosts(&["boot", BETA]).expect(0);
    hosts.forget_failpoints(BETA);
    let ran = held.ended().expect(5);
    let advice = report(&ran).expect("a report")["reason"].to_string();
    assert!(advice.contains("decamp resolve"), "{ran}");
    for host in [ALPHA, BETA] {
        assert_eq!(hosts.state(host, "torn").as_deref(), Some("unresolved"), "{host}");
    }
    let stood = guest.log(ALPHA).len();
    // Neither runs until somebody says so, however long the agents are up.
    hosts.restart_agent(ALPHA);
    assert_eq!(hosts.state(ALPHA, "torn").as_deref(), Some("unresolved"));
    assert_eq!(guest.log(ALPHA).len(), stood, "it ran before anybody decided");
    hosts.decamp(BETA, &["resolve", "torn", "--keep", "source"]).expect(0);
    hosts.decamp(ALPHA, &["resolve", "torn", "--keep", "source"]).expect(0);
    assert_eq!(settled(hosts, "torn"), ALPHA);
    guest.verify(ALPHA);
    watch.saw_no_two();
}

/// The destination dies before it committed and does not come back in time: exit 5. The operator keeps the
/// source; the destination, back later, takes its copy away.
fn lost_and_resolved() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "lone", "256M", "fill=64 hot=8 report=20");
    let watch = Watch::begin(&guest);
    let ran = lose_destination(hosts, "lone", "destination.committed");
    let migration = report(&ran).expect("a report")["migration"].clone();
    let migration = migration.as_str().expect("an id");
    hosts.decamp(ALPHA, &["resolve", migration, "--keep", "source"]).expect(0);
    guest.runs_clean(ALPHA);
    hosts.start_agent(BETA, "");
    assert_eq!(settled(hosts, "lone"), ALPHA);
    guest.verify(ALPHA);
    watch.saw_no_two();
}

/// The destination runs it, but its agent dies before it could say so: exit 5. The operator keeps the
/// destination's.
fn resolved_away() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "gone", "256M", "fill=64 hot=8 report=20");
    let watch = Watch::begin(&guest);
    lose_destination(hosts, "gone", "destination.running");
    guest.runs_clean(BETA);
    hosts.decamp(ALPHA, &["resolve", "gone", "--keep", "destination"]).expect(0);
    assert_eq!(hosts.state(ALPHA, "gone").as_deref(), Some("moved"));
    hosts.start_agent(BETA, "");
    assert_eq!(settled(hosts, "gone"), BETA);
    guest.verify(BETA);
    watch.saw_no_two();
}

/// The destination lets a container run, and then its agent and the container's keeper are killed: its
/// processes live on without one. Nobody is told that nobody knows before they are gone.
fn orphaned() {
    let hosts = hosts();
    hosts.mend();
    let _redis = Redis::start(hosts, ALPHA, "orphans", 31);
    arm(hosts, ALPHA, "destination.running", Failure::KillDestination);
    let held = hold(hosts, ALPHA, "orphans", "destination.running", &[]);
    held.inflict(Failure::KillDestination);
    let servers = || hosts.exec(BETA, &["pgrep", "-x", "redis-server"]).stdout.lines().count();
    assert_eq!(servers(), 1, "it runs at beta");
    hosts.signal_keeper(BETA, "orphans", "KILL");
    assert_eq!(servers(), 1, "and outlives its keeper");
    hosts.start_agent(BETA, "");
    let ran = held.ended().expect(5);
    assert_eq!(servers(), 0, "it still runs at beta, and an operator may keep alpha's\n{ran}");
    for host in [BETA, ALPHA] {
        assert_eq!(hosts.state(host, "orphans").as_deref(), Some("unresolved"), "{host}");
        hosts.decamp(host, &["resolve", "orphans", "--keep", "source"]).expect(0);
    }
    assert_eq!(settled(hosts, "orphans"), ALPHA);
}

/// The source cannot write its journal when it is to fence: the workload runs on, the move ends, and what
/// could not be noted is noted once the disk has room. The guest's log is on that disk too, so it is seen
/// through the agent.
fn source_disk_full() {
    let hosts = hosts();
    hosts.mend();
    let disk = hosts.small_disk(ALPHA, "/var/lib/decamp", "4m");
    let words = ["run", "vm", "cramped", "--kernel", "/srv/guest.elf", "--memory", "128M"];
    let options = ["--cmdline", "fill=16 hot=2 report=50"];
    hosts.decamp(ALPHA, &[&words[..], &options].concat()).expect(0);
    let reports = |host| {
        let said = hosts.decamp(host, &["logs", "cramped"]).expect(0).stdout;
        assert!(!said.contains("BAD") && !said.contains("FAILED"), "{said}");
        said.matches("verdict=clean").count()
    };
    let runs = |host| {
        let before = reports(host);
        until("cramped to report", SETTLES_WITHIN, || reports(host) > before + 1);
    };
    runs(ALPHA);
    arm(hosts, ALPHA, "source.final", Failure::Cancel);
    let held = hold(hosts, ALPHA, "cramped", "source.final", &[]);
    hosts.exec(ALPHA, &["dd", "if=/dev/zero", "of=/var/lib/decamp/filler", "bs=4k"]);
    let ran = held.ended().expect(4);
    let reason = report(&ran).expect("a report")["reason"].to_string();
    assert!(reason.contains("runs on at alpha"), "{ran}");
    hosts.exec(ALPHA, &["rm", "/var/lib/decamp/filler"]).expect(0);
    assert_eq!(settled(hosts, "cramped"), ALPHA);
    runs(ALPHA);
    // With room again it works.
    hosts.decamp(ALPHA, &["migrate", "cramped", "--to", "beta"]).expect(0);
    runs(BETA);
    hosts.decamp(BETA, &["stop", "cramped"]).expect(0);
    hosts.decamp(BETA, &["rm", "cramped", "--yes", "--keep-files"]).expect(0);
    drop(disk);
}

/// Kills the destination's agent at a step, for good, and waits for exit code 5.
fn lose_destination(hosts: &'static Hosts, name: &str, step: &str) -> Ran {
    arm(hosts, ALPHA, step, Failure::KillDestination);
    let held = hold(hosts, ALPHA, name, step, &[]);
    held.inflict(Failure::KillDestination);
    let ran = held.ended().expect(5);
    let advice = report(&ran).expect("a report")["reason"].to_string();
    assert!(advice.contains("decamp resolve") && advice.contains(name), "{ran}");
    // Whoever has seen the report may decide at once.
    assert_eq!(hosts.state(ALPHA, name).as_deref(), Some("unresolved"), "{ran}");
    ran
}
