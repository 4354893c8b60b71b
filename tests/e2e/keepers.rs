//! What lives without an agent: workloads while it is away, one that it left paused, one that it left fenced.

use std::time::{Duration, Instant};

use crate::failures::{Failure, arm, hold, report};
use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, hosts};
use crate::redis::Redis;
use crate::running::until;
use crate::{Needs, Test};

/// The configuration's default is 5 s; what is awaited comes within this, on however slow and busy a machine.
const SOON: Duration = Duration::from_secs(120);
/// Longer than that default: a fenced workload still stands then.
const LONGER: Duration = Duration::from_secs(8);

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("keepers::live_without_an_agent", Needs::Both, without_agent),
        Test::new("keepers::agent_stopped_and_started", Needs::Kvm, stopped),
        Test::new("keepers::paused_resumes_by_itself", Needs::Both, paused),
        Test::new("keepers::paused_is_resumed_by_the_next_agent", Needs::Kvm, paused_and_found),
        Test::new("keepers::fenced_stays_and_is_found", Needs::Both, fenced),
        Test::new("keepers::killed_while_it_is_moved", Needs::Kvm, killed),
        Test::new("keepers::stuck_does_not_keep_the_agent", Needs::Kvm, stuck),
        Test::new("keepers::out_of_reach_is_there_and_is_stopped", Needs::Both, out_of_reach),
    ]
}

/// A keeper at whose socket nobody can ask any more holds its workload all the same: that counts as running, is not
/// started a second time, and can be stopped.
fn out_of_reach() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "deaf", "64M", "fill=8 hot=1 report=50");
    let _redis = Redis::start(hosts, ALPHA, "mute", 43);
    for name in ["deaf", "mute"] {
        let socket = format!("/var/lib/decamp/workloads/{name}/keeper.sock");
        hosts.exec(ALPHA, &["rm", &socket]).expect(0);
    }
    // Several looks of the agent's, and those of the next.
    for again in [false, true] {
        if again {
            hosts.hosts(&["agent", ALPHA, "kill"]).expect(0);
            hosts.start_agent(ALPHA, "");
        }
        std::thread::sleep(Duration::from_secs(4));
        for name in ["deaf", "mute"] {
            assert_eq!(hosts.state(ALPHA, name).as_deref(), Some("running"), "{name}");
            let ran = hosts.decamp(ALPHA, &["start", name]).expect(3);
            assert!(ran.stderr.contains("runs already"), "{ran}");
        }
        guest.runs_clean(ALPHA);
    }
    for name in ["deaf", "mute"] {
        hosts.decamp(ALPHA, &["stop", name]).expect(0);
        assert_eq!(hosts.state(ALPHA, name).as_deref(), Some("stopped"), "{name}");
        let left = format!("[d]ecamp keeper .*/{name}/|[m]onitor of VM {name}");
        hosts.exec(ALPHA, &["pgrep", "-f", &left]).expect(1);
        hosts.decamp(ALPHA, &["start", name]).expect(0);
    }
    guest.runs_clean(ALPHA);
}

fn without_agent() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "calm", "256M", "fill=64 hot=4 report=50");
    let redis = Redis::start(hosts, ALPHA, "quiet", 40);
    let mut client = redis.client(8, 500);
    hosts.hosts(&["agent", ALPHA, "kill"]).expect(0);
    guest.runs_clean(ALPHA);
    client.is_served();
    let ran = hosts.decamp(ALPHA, &["ls"]).expect(1);
    assert!(ran.stderr.contains("/run/decamp.sock"), "{ran}");
    hosts.start_agent(ALPHA, "");
    for name in ["calm", "quiet"] {
        assert_eq!(hosts.state(ALPHA, name).as_deref(), Some("running"), "{name}");
    }
    guest.verify(ALPHA);
    // They can be moved by the new agent, and stopped.
    hosts.decamp(ALPHA, &["migrate", "calm", "quiet", "--to", "beta"]).expect(0);
    guest.verify(BETA);
    client.is_served();
    client.finish();
    hosts.decamp(BETA, &["stop", "quiet"]).expect(0);
    assert_eq!(hosts.state(BETA, "quiet").as_deref(), Some("stopped"));
}

/// An agent that is told to end calls its moves off, and leaves the workloads alone.
fn stopped() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "steady", "256M", "fill=64 hot=4 report=50");
    arm(hosts, ALPHA, "source.pre-copy", Failure::Cancel);
    let held = hold(hosts, ALPHA, "steady", "source.pre-copy", &[]);
    let mark = hosts.log_mark(ALPHA);
    let stopping = hosts.begin_hosts(&["agent", ALPHA, "stop"]);
    until("the agent to be told", SOON, || hosts.log_since(ALPHA, mark).contains("Told to end"));
    held.let_go();
    stopping.ended(SOON).expect(0);
    guest.runs_clean(ALPHA);
    hosts.start_agent(ALPHA, "");
    held.ended().expect(4);
    assert_eq!(hosts.state(ALPHA, "steady").as_deref(), Some("running"));
    until("beta to give its copy up", SOON, || hosts.state(BETA, "steady").is_none());
    guest.verify(ALPHA);
}

/// The agent dies while the workload stands still, and does not come back: the keeper lets it run.
fn paused() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "orphan", "256M", "fill=64 hot=4 report=50");
    let redis = Redis::start(hosts, ALPHA, "waif", 41);
    let mut client = redis.client(8, 500);
    for name in ["orphan", "waif"] {
        arm(hosts, ALPHA, "source.final", Failure::KillSource);
        let held = hold(hosts, ALPHA, name, "source.final", &[]);
        held.inflict(Failure::KillSource);
        let stood = guest.log(ALPHA).len();
        if name == "orphan" {
            until("the guest to run again", SOON, || guest.log(ALPHA).len() > stood);
        }
        guest.runs_clean(ALPHA);
        client.is_served();
        hosts.start_agent(ALPHA, "");
        held.ended().expect(4);
        assert_eq!(hosts.state(ALPHA, name).as_deref(), Some("running"), "{name}");
        until("beta to give its copy up", SOON, || hosts.state(BETA, name).is_none());
    }
    guest.verify(ALPHA);
    client.finish();
}

/// The same, and the next agent is there at once.
fn paused_and_found() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "found", "256M", "fill=64 hot=4 report=50");
    arm(hosts, ALPHA, "source.final", Failure::KillSource);
    let held = hold(hosts, ALPHA, "found", "source.final", &[]);
    held.inflict(Failure::KillSource);
    hosts.start_agent(ALPHA, "");
    guest.runs_clean(ALPHA);
    held.ended().expect(4);
    assert_eq!(hosts.state(ALPHA, "found").as_deref(), Some("running"));
    guest.verify(ALPHA);
}

/// Killed after the fence: nobody but the destination's word lets it run again.
fn fenced() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "bound", "256M", "fill=64 hot=4 report=50");
    let redis = Redis::start(hosts, ALPHA, "tied", 42);
    let mut client = redis.client(8, 500);
    for name in ["bound", "tied"] {
        arm(hosts, ALPHA, "source.commit", Failure::KillSource);
        let held = hold(hosts, ALPHA, name, "source.commit", &[]);
        held.inflict(Failure::KillSource);
        let stood = guest.log(ALPHA).len();
        // There is no event to wait for: it is to be seen that nothing happens.
        std::thread::sleep(LONGER);
        if name == "bound" {
            assert_eq!(guest.log(ALPHA).len(), stood, "a fenced guest ran by itself");
        }
        hosts.start_agent(ALPHA, "");
        held.ended().expect(4);
        assert_eq!(hosts.state(ALPHA, name).as_deref(), Some("running"), "{name}");
        guest.runs_clean(ALPHA);
        client.is_served();
        if name == "tied" {
            let silence = client.longest_silence();
            assert!(silence > LONGER, "a fenced container answered by itself after {silence:?}");
        }
    }
    guest.verify(ALPHA);
    client.finish();
}

/// The workload is gone with its keeper: nobody says that it runs on.
fn killed() {
    let hosts = hosts();
    hosts.mend();
    let _guest = Guest::start(hosts, ALPHA, "mortal", "256M", "fill=64 hot=4 report=50");
    arm(hosts, ALPHA, "source.pre-copy", Failure::Cancel);
    let held = hold(hosts, ALPHA, "mortal", "source.pre-copy", &[]);
    hosts.signal_keeper(ALPHA, "mortal", "KILL");
    let ran = held.ended().expect(1);
    let report = report(&ran).unwrap_or_else(|| panic!("no report\n{ran}"));
    let reason = report["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("ended") && !reason.contains("runs on"), "{ran}");
    assert_eq!(report["lost"], true, "{ran}");
    until("alpha to notice", SOON, || hosts.state(ALPHA, "mortal").as_deref() == Some("stopped"));
    until("beta to give its copy up", SOON, || hosts.state(BETA, "mortal").is_none());
}

/// A thread of the agent waits minutes for a keeper's answer: the agent ends all the same when it is told to.
fn stuck() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "stuck", "128M", "fill=16 hot=1 report=50");
    hosts.signal_keeper(ALPHA, "stuck", "STOP");
    hosts.decamp(ALPHA, &["inspect", "stuck"]).expect(0);
    let told = Instant::now();
    hosts.hosts(&["agent", ALPHA, "stop"]).expect(0);
    let took = told.elapsed();
    hosts.signal_keeper(ALPHA, "stuck", "CONT");
    assert!(took < Duration::from_secs(45), "the agent took {took:?} to end");
    hosts.start_agent(ALPHA, "");
    guest.runs_clean(ALPHA);
}
