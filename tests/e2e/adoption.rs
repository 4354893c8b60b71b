//! Containers that somebody started with a runtime: adopted, moved, listed by the destination's runtime,
//! and given back.

use std::time::Duration;

use crate::hosts::{ALPHA, BETA, Hosts, hosts};
use crate::refusals::refused;
use crate::running::until;
use crate::{Needs, Test};

/// What is awaited happens within this, on however slow a machine.
const SOON: Duration = Duration::from_secs(120);

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("adoption::adopted_and_moved", Needs::Containers, adopted_and_moved),
        Test::new("adoption::given_back", Needs::Containers, given_back),
        Test::new("adoption::refused", Needs::Containers, not_adopted),
        Test::new("adoption::terminal", Needs::Containers, terminal),
    ]
}

/// Makes a bundle that counts, and has the host's runc start it.
fn start(hosts: &Hosts, name: &str) {
    make_bundle(hosts, name);
    let line = format!("runc run --detach --bundle /srv/{name} {name} </dev/null >/dev/null 2>&1");
    hosts.exec(ALPHA, &["sh", "-c", &line]).expect(0);
}

fn make_bundle(hosts: &Hosts, name: &str) {
    let maker = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/counter-bundle");
    hosts.exec(ALPHA, &[maker, &format!("/srv/{name}")]).expect(0);
}

/// What the container has counted, by its runtime's own `exec`.
fn count(hosts: &Hosts, host: &str, name: &str) -> u64 {
    let said = hosts.exec(host, &["runc", "exec", name, "/bin/busybox", "cat", "/data/count"]);
    said.expect(0).stdout.trim().parse().expect("a number")
}

#[track_caller]
fn listed(hosts: &Hosts, host: &str, name: &str, status: Option<&str>) {
    let list = hosts.exec(host, &["runc", "list"]).expect(0).stdout;
    let line = list.lines().find(|line| line.split_whitespace().next() == Some(name));
    match (line, status) {
        (None, None) => {}
        (Some(line), Some(status)) if line.contains(status) => {}
        _ => panic!("wanted {name} as {status:?} in\n{list}"),
    }
}

fn adopted_and_moved() {
    let hosts = hosts();
    start(hosts, "stray");
    let adopted = hosts.decamp(ALPHA, &["adopt", "runc:stray", "--json"]).expect(0).json();
    assert_eq!(
        (adopted["name"].as_str(), adopted["state"].as_str()),
        (Some("stray"), Some("running"))
    );
    refused(hosts.decamp(ALPHA, &["adopt", "runc:stray"]), &["adopted already"]);
    // The next agent finds it.
    hosts.restart_agent(ALPHA);
    assert_eq!(hosts.state(ALPHA, "stray").as_deref(), Some("running"));
    let detail = hosts.decamp(ALPHA, &["inspect", "stray", "--json"]).expect(0).json();
    assert_eq!(detail["spec"]["adopted"], "stray");
    assert_eq!(detail["keeper"]["facts"]["container"], "stray");
    listed(hosts, ALPHA, "stray", Some("running"));
    let before = count(hosts, ALPHA, "stray");
    hosts.decamp(ALPHA, &["migrate", "stray", "--to", BETA]).expect(0);
    listed(hosts, ALPHA, "stray", None);
    listed(hosts, BETA, "stray", Some("running"));
    assert!(count(hosts, BETA, "stray") >= before);
    assert_eq!(hosts.state(BETA, "stray").as_deref(), Some("running"));
    // There it is the runtime's to end, and decamp notes it.
    hosts.exec(BETA, &["runc", "kill", "stray", "KILL"]).expect(0);
    until("the end to be noted", SOON, || hosts.state(BETA, "stray").as_deref() == Some("stopped"));
    hosts.decamp(BETA, &["rm", "stray", "--yes"]).expect(0);
    hosts.exec(BETA, &["rm", "-r", "/srv/stray"]).expect(0);
    hosts.decamp(ALPHA, &["rm", "stray", "--yes"]).expect(0);
}

fn given_back() {
    let hosts = hosts();
    start(hosts, "lent");
    hosts.decamp(ALPHA, &["adopt", "runc:lent"]).expect(0);
    hosts.decamp(ALPHA, &["rm", "lent", "--yes"]).expect(0);
    assert_eq!(hosts.state(ALPHA, "lent"), None);
    let before = count(hosts, ALPHA, "lent");
    until("it to run on", SOON, || count(hosts, ALPHA, "lent") > before);
    // Adopted again and stopped, it is left to its runtime.
    hosts.decamp(ALPHA, &["adopt", "runc:lent"]).expect(0);
    hosts.decamp(ALPHA, &["stop", "lent"]).expect(0);
    listed(hosts, ALPHA, "lent", Some("stopped"));
    refused(hosts.decamp(ALPHA, &["start", "lent"]), &["adopt it again"]);
    hosts.decamp(ALPHA, &["rm", "lent", "--yes"]).expect(0);
    hosts.exec(ALPHA, &["runc", "delete", "lent"]).expect(0);
    hosts.exec(ALPHA, &["rm", "-r", "/srv/lent"]).expect(0);
}

fn not_adopted() {
    let hosts = hosts();
    refused(hosts.decamp(ALPHA, &["adopt", "runc:nobody"]), &["runc has no container nobody"]);
    refused(hosts.decamp(ALPHA, &["adopt", "kata:web"]), &["cannot be adopted in this version"]);
    refused(hosts.decamp(ALPHA, &["adopt", "podman:nobody"]), &["nobody"]);
    hosts.decamp(ALPHA, &["adopt", "web"]).expect(2);
    hosts
        .decamp(ALPHA, &["run", "container", "x", "--bundle", "/srv/x", "--runtime", "kata"])
        .expect(2);
    // Every reason at once, and it runs on.
    start(hosts, "odd");
    hosts.exec(ALPHA, &["runc", "pause", "odd"]).expect(0);
    hosts.exec(ALPHA, &["mv", "/srv/odd", "/srv/away"]).expect(0);
    let ran = hosts.decamp(ALPHA, &["adopt", "runc:odd"]).expect(3);
    let text = format!("{}{}", ran.stdout, ran.stderr);
    assert!(text.contains("is paused") && text.contains("/srv/odd is gone"), "{ran}");
    assert_eq!(hosts.state(ALPHA, "odd"), None);
    listed(hosts, ALPHA, "odd", Some("paused"));
    hosts.exec(ALPHA, &["runc", "resume", "odd"]).expect(0);
    hosts.exec(ALPHA, &["runc", "delete", "--force", "odd"]).expect(0);
    hosts.exec(ALPHA, &["rm", "-r", "/srv/away"]).expect(0);
}

/// A container with a terminal, by the command.
fn terminal() {
    let hosts = hosts();
    make_bundle(hosts, "shell");
    let words = ["run", "container", "shell", "--bundle", "/srv/shell", "--tty"];
    hosts.decamp(ALPHA, &words).expect(0);
    hosts.decamp(ALPHA, &["migrate", "shell", "--to", BETA]).expect(0);
    let lines = || hosts.decamp(BETA, &["logs", "shell"]).expect(0).stdout.lines().count();
    let before = lines();
    until("its terminal to say more", SOON, || lines() > before + 2);
    let open = ["runc", "exec", "shell", "/bin/busybox", "ls", "-l", "/proc/1/fd"];
    assert!(hosts.exec(BETA, &open).expect(0).stdout.contains("/dev/pts/0"));
    hosts.decamp(BETA, &["stop", "shell"]).expect(0);
    hosts.decamp(BETA, &["rm", "shell", "--yes"]).expect(0);
    hosts.exec(BETA, &["rm", "-r", "/srv/shell"]).expect(0);
    hosts.decamp(ALPHA, &["rm", "shell", "--yes"]).expect(0);
}
