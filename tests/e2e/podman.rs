//! Containers of podman: adopted, or registered by their hook, and moved into the charge of the next host's
//! podman.

use std::time::Duration;

use crate::hosts::{ALPHA, BETA, Hosts, hosts};
use crate::refusals::refused;
use crate::running::until;
use crate::{Needs, Test};

/// What is awaited happens within this, on however slow a machine.
const SOON: Duration = Duration::from_secs(30);
/// Of what is in podman's network.
const ADDRESS: &str = "10.77.1.60";
/// What podman runs.
const LINE: &str = "i=0; while :; do i=$((i+1)); echo $i; echo $i >/data/count; sleep 0.1; done";
/// Where a host's podman has what it is told, for itself.
const CONF: &str = "/etc/containers";
/// Gives a host a podman of its own.
const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/podman");

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("podman::adopted_and_moved", Needs::Containers, adopted_and_moved),
        Test::new("podman::registered_by_its_hook", Needs::Containers, registered_by_its_hook),
    ]
}

/// Both hosts with a podman of their own; taken away again when this is dropped.
struct Podmans(&'static Hosts);

impl Podmans {
    fn prepare(hosts: &'static Hosts) -> Self {
        let podmans = Self(hosts);
        for (host, gateway) in [(ALPHA, "10.77.0.1"), (BETA, "10.77.0.2")] {
            let network = ["--network", "garden", "br0", "10.77.0.0/16", gateway, "7"];
            let words = [&[FIXTURE, "/srv/podman"][..], &network, &["--shell"]].concat();
            hosts.exec(host, &words).expect(0);
        }
        podmans
    }

    fn says(&self, host: &str, words: &[&str]) -> String {
        self.0.exec(host, &[&["podman"], words].concat()).expect(0).stdout.trim().to_owned()
    }

    fn run(&self, name: &str, before: &[&str], more: &[&str]) {
        let first = ["run", "--detach", "--name", name];
        let last = ["localhost/shell", "/bin/sh", "-c", LINE];
        self.says(ALPHA, &[before, &first, more, &last].concat());
        until("it to count", SOON, || self.says(ALPHA, &["logs", name]).lines().count() > 2);
    }

    fn status(&self, host: &str, name: &str) -> String {
        self.says(host, &["inspect", "--format", "{{.State.Status}}", name])
    }

    fn count(&self, host: &str, name: &str) -> u64 {
        self.says(host, &["exec", name, "/bin/cat", "/data/count"]).parse().expect("a number")
    }

    /// Waits until it is reached from the first host, wherever it is.
    fn answers(&self) {
        until("it to answer", SOON, || {
            let words = ["busybox", "ping", "-c", "1", "-W", "1", ADDRESS];
            self.0.exec(ALPHA, &words).code == Some(0)
        });
    }

    /// Moves it, and sees who is in charge of it then.
    fn migrate(&self, name: &str) {
        let hosts = self.0;
        let before = self.count(ALPHA, name);
        hosts.decamp(ALPHA, &["migrate", name, "--to", BETA]).expect(0);
        assert_eq!(hosts.state(ALPHA, name).as_deref(), Some("moved"));
        until("podman to know that it has left", SOON, || self.status(ALPHA, name) == "exited");
        assert_eq!(self.status(BETA, name), "running");
        let listed = self.says(BETA, &["ps", "--format", "{{.Names}} {{.Status}}"]);
        assert!(listed.starts_with(&format!("{name} Up")), "{listed}");
        let now = self.count(BETA, name);
        assert!(now >= before);
        until("it to run on", SOON, || self.count(BETA, name) > now);
        assert_eq!(hosts.state(BETA, name).as_deref(), Some("running"));
    }

    /// Has the next host's podman end it, and removes what is left of it everywhere.
    fn end(&self, name: &str) {
        let hosts = self.0;
        self.says(BETA, &["stop", "--time", "1", name]);
        until("the end to be noted", SOON, || {
            hosts.state(BETA, name).as_deref() == Some("stopped")
        });
        hosts.decamp(BETA, &["rm", name, "--yes"]).expect(0);
        hosts.decamp(ALPHA, &["rm", name, "--yes"]).expect(0);
        for host in [ALPHA, BETA] {
            self.says(host, &["rm", name]);
        }
    }
}

impl Drop for Podmans {
    fn drop(&mut self) {
        for host in [ALPHA, BETA] {
            self.0.exec(host, &["podman", "rm", "--all", "--force", "--time", "0"]);
            self.0.exec(host, &["podman", "rmi", "--all", "--force"]);
            self.0.exec(host, &["umount", "-n", CONF]);
            self.0.exec(host, &["rm", "-rf", "/srv/podman", "/var/lib/containers/decamp"]);
        }
    }
}

fn adopted_and_moved() {
    let hosts = hosts();
    let podmans = Podmans::prepare(hosts);
    let network = format!("--network=garden:ip={ADDRESS},mac=02:77:01:00:00:60");
    podmans.run("pea", &[], &[&network, "--label=a=b", "--restart=always"]);
    podmans.answers();
    let adopted = hosts.decamp(ALPHA, &["adopt", "podman:pea", "--json"]).expect(0).json();
    assert_eq!(
        (adopted["name"].as_str(), adopted["state"].as_str()),
        (Some("pea"), Some("running"))
    );
    refused(hosts.decamp(ALPHA, &["adopt", "podman:pea"]), &["adopted already"]);
    refused(hosts.decamp(ALPHA, &["checkpoint", "pea", "-o", "/tmp/pea.tar.zst"]), &["podman"]);
    hosts.restart_agent(ALPHA);
    podmans.migrate("pea");
    podmans.answers();
    let label = podmans.says(BETA, &["inspect", "--format", "{{.Config.Labels.a}}", "pea"]);
    assert_eq!(label, "b");
    podmans.end("pea");
}

/// As its user would have it: a container that is annotated moves, and nobody has said more.
fn registered_by_its_hook() {
    let hosts = hosts();
    let podmans = Podmans::prepare(hosts);
    let places = ["--hooks-dir", "/run/hooks.d", "--criu-conf", "/run/criu/runc.conf"];
    hosts.exec(ALPHA, &["mkdir", "-p", "/run/hooks.d", "/run/criu"]).expect(0);
    hosts.decamp(ALPHA, &[&["hook", "install"][..], &places].concat()).expect(0);
    let annotated = ["--network=none", "--annotation=decamp.migratable=true"];
    podmans.run("bean", &["--hooks-dir", "/run/hooks.d"], &annotated);
    until("it to be registered", SOON, || hosts.state(ALPHA, "bean").as_deref() == Some("running"));
    podmans.migrate("bean");
    podmans.end("bean");
    hosts.decamp(ALPHA, &[&["hook", "remove"][..], &places].concat()).expect(0);
}
