//! Moves that go well: back and forth, again and again, with nothing lost. Downtimes are printed, not judged:
//! the benchmarks do that.

use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, hosts, other};
use crate::redis::Redis;
use crate::running::Ran;
use crate::{Needs, Test};

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("moves::vm_20_times", Needs::Kvm, vm),
        Test::new("moves::redis_10_times", Needs::Containers, redis),
        Test::new("moves::both_kinds_in_one_command", Needs::Both, both),
        Test::new("moves::remove_source_and_other_path", Needs::Containers, other_path),
        Test::new("moves::dry_run_touches_nothing", Needs::Kvm, dry_run),
    ]
}

/// 1 GiB filled, 32 MiB hot, 20 moves, clean each time.
fn vm() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "web", "2G", "fill=1024 hot=32 report=100");
    let mut downtimes = Vec::new();
    let mut from = ALPHA;
    for _ in 0..20 {
        let ran = hosts.decamp(from, &["migrate", "web", "--to", other(from), "--json"]).expect(0);
        from = other(from);
        guest.verify(from);
        downtimes.push(downtime(&ran));
    }
    summary("1 GiB, 32 MiB hot, downtime in ms", downtimes);
}

/// 256 MiB of random values, a client on one connection all the time.
fn redis() {
    let hosts = hosts();
    hosts.mend();
    let redis = Redis::start(hosts, ALPHA, "redis", 10);
    let mut client = redis.client(256, 2000);
    let (mut downtimes, mut gaps) = (Vec::new(), Vec::new());
    let mut from = ALPHA;
    for _ in 0..10 {
        client.report();
        let ran =
            hosts.decamp(from, &["migrate", "redis", "--to", other(from), "--json"]).expect(0);
        from = other(from);
        client.is_served_after(&mut gaps);
        downtimes.push(downtime(&ran));
    }
    let verdict = client.finish();
    println!("verdict of the client: {verdict}");
    summary("Redis 256 MiB, downtime in ms", downtimes);
    summary("Redis 256 MiB, longest silence that the client saw in ms", gaps);
}

fn both() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "one", "256M", "fill=64 hot=4 report=50");
    let redis = Redis::start(hosts, ALPHA, "two", 22);
    let client = redis.client(8, 500);
    let ran = hosts.decamp(ALPHA, &["migrate", "one", "two", "--to", "beta", "--json"]).expect(0);
    let reports = ran.json();
    let kinds: Vec<_> = reports
        .as_array()
        .unwrap_or_else(|| panic!("several reports are an array\n{ran}"))
        .iter()
        .map(|report| (report["kind"].clone(), report["outcome"].clone()))
        .collect();
    let wanted = [("vm", "completed"), ("container", "completed")];
    assert_eq!(kinds, wanted.map(|(kind, outcome)| (kind.into(), outcome.into())), "{ran}");
    guest.verify(BETA);
    client.finish();
}

/// The bundle goes elsewhere, and the source's files go away when they are told to.
fn other_path() {
    let hosts = hosts();
    hosts.mend();
    let redis = Redis::start(hosts, ALPHA, "mapped", 23);
    let client = redis.client(8, 500);
    let words = ["migrate", "mapped", "--to", "beta", "--remove-source", "--path"];
    hosts.decamp(ALPHA, &[&words[..], &["/srv/mapped=/srv/elsewhere/mapped"]].concat()).expect(0);
    assert!(hosts.path(BETA, "srv/elsewhere/mapped/config.json").exists());
    assert!(!hosts.path(ALPHA, "srv/mapped").exists(), "the source's files are still there");
    assert_eq!(hosts.state(ALPHA, "mapped"), None);
    client.finish();
    hosts.decamp(BETA, &["stop", "mapped"]).expect(0);
    hosts.decamp(BETA, &["rm", "mapped", "--yes"]).expect(0);
    hosts.exec(BETA, &["rm", "-r", "/srv/elsewhere"]).expect(0);
}

fn dry_run() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "still", "256M", "fill=16 report=50");
    let before = crate::snapshot::Snapshot::take(hosts);
    hosts.decamp(ALPHA, &["migrate", "still", "--to", "beta", "--dry-run"]).expect(0);
    before.is_restored();
    guest.runs_clean(ALPHA);
    assert_eq!(hosts.state(ALPHA, "still").as_deref(), Some("running"));
    assert_eq!(hosts.state(BETA, "still"), None);
}

fn downtime(ran: &Ran) -> f64 {
    let report = ran.json();
    assert_eq!(report["outcome"], "completed", "{ran}");
    report["downtime_ms"].as_f64().unwrap_or_else(|| panic!("no downtime\n{ran}"))
}

fn summary(what: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let (least, most) = (values[0], values[values.len() - 1]);
    let median = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
    println!("{what}: median {median:.1}, from {least:.1} to {most:.1}, {} moves", values.len());
}
