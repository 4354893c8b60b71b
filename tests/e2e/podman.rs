//! Containers of podman: adopted, or registered by their hook, and moved into the charge of the next host's
//! podman with all that they have; and files that podman and decamp restore from each other.

use std::time::Duration;

use crate::checkpoints::File;
use crate::hosts::{ALPHA, BETA, Hosts, hosts};
use crate::redis::Redis;
use crate::refusals::refused;
use crate::running::until;
use crate::{Needs, Test};

/// What is awaited happens within this, on however slow a machine.
const SOON: Duration = Duration::from_secs(120);
/// Of what is in podman's network.
const ADDRESS: &str = "10.77.1.60";
/// What podman runs. The file is replaced in one step, so that no reader ever sees half a number, and by another process,
/// so that the first one's streams are what they are.
const LINE: &str = "i=0; while :; do i=$((i+1)); echo $i; \
    /bin/busybox sh -c \"echo $i >/data/new; /bin/busybox mv /data/new /data/count\"; sleep 0.1; done";
/// Where a host's podman has what it is told, for itself.
const CONF: &str = "/etc/containers";
/// Gives a host a podman of its own.
const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/podman");

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("podman::adopted_and_moved", Needs::Containers, adopted_and_moved),
        Test::new("podman::registered_by_its_hook", Needs::Containers, registered_by_its_hook),
        Test::new("podman::volume_and_directory", Needs::Containers, volume_and_directory),
        Test::new("podman::terminal_of_one_that_is_removed", Needs::Containers, terminal),
        Test::new("podman::init_and_secret", Needs::Init, init_and_secret),
        Test::new("podman::restores_our_checkpoint", Needs::Containers, restores_ours),
        Test::new("podman::its_checkpoint_is_restored", Needs::Containers, its_is_restored),
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
        self.run_line(name, before, more, LINE);
    }

    /// Starts what prints a number again and again.
    fn run_line(&self, name: &str, before: &[&str], more: &[&str], line: &str) {
        let first = ["run", "--detach", "--name", name];
        let last = ["localhost/shell", "/bin/sh", "-c", line];
        self.says(ALPHA, &[before, &first, more, &last].concat());
        until("it to count", SOON, || self.says(ALPHA, &["logs", name]).lines().count() > 2);
    }

    /// Whether a host's podman has a container, volume, … of that name.
    fn has(&self, host: &str, kind: &str, name: &str) -> bool {
        self.0.exec(host, &["podman", kind, "exists", name]).code == Some(0)
    }

    fn adopt(&self, name: &str) {
        self.0.decamp(ALPHA, &["adopt", &format!("podman:{name}")]).expect(0);
    }

    /// What is in a file of the container.
    fn reads(&self, host: &str, name: &str, path: &str) -> String {
        self.says(host, &["exec", name, "/bin/cat", path])
    }

    fn status(&self, host: &str, name: &str) -> String {
        self.says(host, &["inspect", "--format", "{{.State.Status}}", name])
    }

    fn count(&self, host: &str, name: &str) -> u64 {
        self.reads(host, name, "/data/count").parse().expect("a number")
    }

    /// Waits until it is reached from the first host, wherever it is.
    fn answers(&self) {
        until("it to answer", SOON, || {
            let words = ["busybox", "ping", "-c", "1", "-W", "1", ADDRESS];
            self.0.exec(ALPHA, &words).code == Some(0)
        });
    }

    /// Moves it, and sees who is in charge of it then.
    fn migrate(&self, name: &str, options: &[&str]) {
        let hosts = self.0;
        let removes =
            self.says(ALPHA, &["inspect", "--format", "{{.HostConfig.AutoRemove}}", name]);
        let before = self.count(ALPHA, name);
        hosts.decamp(ALPHA, &[&["migrate", name, "--to", BETA], options].concat()).expect(0);
        assert_eq!(hosts.state(ALPHA, name).as_deref(), Some("moved"));
        until("podman to know that it has left", SOON, || match removes == "true" {
            true => !self.has(ALPHA, "container", name),
            false => self.status(ALPHA, name) == "exited",
        });
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
            self.says(host, &["rm", "--ignore", name]);
        }
    }
}

impl Drop for Podmans {
    fn drop(&mut self) {
        for host in [ALPHA, BETA] {
            self.0.exec(host, &["podman", "rm", "--all", "--force", "--time", "0"]);
            self.0.exec(host, &["podman", "rmi", "--all", "--force"]);
            self.0.exec(host, &["podman", "volume", "prune", "--force"]);
            self.0.exec(host, &["podman", "secret", "rm", "--all"]);
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
    podmans.migrate("pea", &[]);
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
    podmans.migrate("bean", &[]);
    podmans.end("bean");
    hosts.decamp(ALPHA, &[&["hook", "remove"][..], &places].concat()).expect(0);
}

/// A volume of podman's and a directory of the host: what is in them is there, and podman has them in its care.
fn volume_and_directory() {
    let hosts = hosts();
    let podmans = Podmans::prepare(hosts);
    let conf = "mkdir -p /srv/plum-conf && echo of the first host >/srv/plum-conf/file";
    hosts.exec(ALPHA, &["sh", "-c", conf]).expect(0);
    let mounts = ["--network=none", "--volume=plum-data:/vol", "--volume=/srv/plum-conf:/conf:ro"];
    let line = "i=0; while :; do i=$((i+1)); echo $i; for at in vol data; do \
        /bin/busybox sh -c \"echo $i >/$at/new; /bin/busybox mv /$at/new /$at/count\"; done; sleep 0.1; done";
    podmans.run_line("plum", &[], &mounts, line);
    podmans.adopt("plum");
    refused(hosts.decamp(ALPHA, &["migrate", "plum", "--to", BETA]), &["--storage /vol=copy"]);
    let before: u64 = podmans.reads(ALPHA, "plum", "/vol/count").parse().expect("a number");
    podmans.migrate("plum", &["--storage", "copy"]);
    let count = || podmans.reads(BETA, "plum", "/vol/count").parse::<u64>().expect("a number");
    let now = count();
    assert!(now >= before);
    until("it to write in its volume", SOON, || count() > now);
    assert_eq!(podmans.reads(BETA, "plum", "/conf/file"), "of the first host");
    assert!(podmans.has(BETA, "volume", "plum-data"));
    let users = ["ps", "--filter", "volume=plum-data", "--format", "{{.Names}}"];
    assert_eq!(podmans.says(BETA, &users), "plum");
    podmans.end("plum");
    for host in [ALPHA, BETA] {
        podmans.says(host, &["volume", "rm", "plum-data"]);
        hosts.exec(host, &["rm", "-r", "/srv/plum-conf"]).expect(0);
    }
}

/// Whoever attaches at the next host types into it, its log goes on there, and it is removed where it has left and
/// where it ends.
fn terminal() {
    let hosts = hosts();
    let podmans = Podmans::prepare(hosts);
    let line = format!("({LINE}) & exec cat >/data/typed");
    podmans.run_line("fig", &[], &["--network=none", "-t", "-i", "--rm"], &line);
    podmans.adopt("fig");
    podmans.migrate("fig", &[]);
    let lines = || podmans.says(BETA, &["logs", "fig"]).lines().count();
    let before = lines();
    until("its log to go on", SOON, || lines() > before);
    let attach =
        "(echo typed; sleep 2) | timeout 60 podman attach --sig-proxy=false fig >/dev/null";
    hosts.exec(BETA, &["sh", "-c", attach]);
    until("what is typed", SOON, || podmans.reads(BETA, "fig", "/data/typed").contains("typed"));
    podmans.says(BETA, &["stop", "--time", "0", "fig"]);
    until("podman to remove it", SOON, || !podmans.has(BETA, "container", "fig"));
    for host in [BETA, ALPHA] {
        hosts.decamp(host, &["rm", "fig", "--yes"]).expect(0);
    }
}

/// The next podman has to have the secret, and has its own program for `--init`.
fn init_and_secret() {
    let hosts = hosts();
    let podmans = Podmans::prepare(hosts);
    let keep = |host: &str, contents: &str| {
        let line =
            format!("podman secret rm date-key; echo {contents} | podman secret create date-key -");
        hosts.exec(host, &["sh", "-c", &line]).expect(0);
    };
    keep(ALPHA, "word");
    podmans.run("date", &[], &["--network=none", "--init", "--secret=date-key,mode=0400"]);
    podmans.adopt("date");
    let migrate = ["migrate", "date", "--to", BETA];
    refused(hosts.decamp(ALPHA, &migrate), &["podman secret create date-key"]);
    keep(BETA, "ward");
    refused(hosts.decamp(ALPHA, &migrate), &["secret date-key there is another"]);
    keep(BETA, "word");
    podmans.migrate("date", &[]);
    assert_eq!(podmans.reads(BETA, "date", "/run/secrets/date-key"), "word");
    let first = podmans.reads(BETA, "date", "/proc/1/cmdline");
    assert!(first.contains("podman-init"), "{first:?}");
    podmans.end("date");
}

/// By the very commands that `decamp checkpoint` prints: memory and files are as they were, and podman controls it.
fn restores_ours() {
    let hosts = hosts();
    hosts.mend();
    let podmans = Podmans::prepare(hosts);
    let redis = Redis::start(hosts, ALPHA, "olive", 61);
    redis.client(32, 500).finish();
    let digest = |host: &str, at: &[&str]| {
        let words = [at, &["DEBUG", "DIGEST"]].concat();
        hosts.exec(host, &words).expect(0).stdout
    };
    let before = digest(ALPHA, &["redis-cli", "-h", "10.77.1.61"]);
    hosts.exec(ALPHA, &["sh", "-c", "echo kept >/srv/olive/rootfs/data/note"]).expect(0);
    let file = File::new(hosts, "olive.tar.zst");
    let said = hosts.decamp(ALPHA, &["checkpoint", "olive", "-o", file.path()]).expect(0);
    let said = [said.stdout, said.stderr].concat();
    let command = |begins: &str| {
        let at = said.find(begins).unwrap_or_else(|| panic!("{begins:?} is not in {said}"));
        said[at..].lines().next().expect("a line").to_owned()
    };
    for begins in ["tar -cf", "podman container restore"] {
        hosts.exec(BETA, &["sh", "-c", &command(begins)]).expect(0);
    }
    assert_eq!(podmans.status(BETA, "olive"), "running");
    let pid = podmans.says(BETA, &["inspect", "--format", "{{.State.Pid}}", "olive"]);
    assert_eq!(digest(BETA, &["nsenter", "--net", "--target", &pid, "redis-cli"]), before);
    let note = hosts.exec(BETA, &["cat", &format!("/proc/{pid}/root/data/note")]).expect(0);
    assert_eq!(note.stdout, "kept\n");
    if hosts.exec(BETA, &["sh", "-c", "command -v checkpointctl"]).code == Some(0) {
        let shown = hosts.exec(BETA, &["checkpointctl", "show", file.path()]).expect(0);
        assert!(shown.stdout.contains("olive"), "{shown}");
    } else {
        eprintln!("no checkpointctl: what it shows of the file is not looked at");
    }
    podmans.says(BETA, &["stop", "--time", "5", "olive"]);
    until("podman to note its end", SOON, || podmans.status(BETA, "olive") == "exited");
    podmans.says(BETA, &["rm", "olive"]);
}

/// As podman compresses it by itself, and not at all: it goes on here from where it was, at its address.
fn its_is_restored() {
    let hosts = hosts();
    let podmans = Podmans::prepare(hosts);
    let network = format!("--network=garden:ip={ADDRESS},mac=02:77:01:00:00:60");
    let image = File::new(hosts, "shell.tar");
    podmans.says(ALPHA, &["save", "--quiet", "--output", image.path(), "localhost/shell"]);
    podmans.says(BETA, &["load", "--quiet", "--input", image.path()]);
    let here = "/var/lib/containers/decamp/lime";
    for how in [&[][..], &["--compress=none"]] {
        podmans.run("lime", &[], &[&network]);
        podmans.answers();
        let file = File::new(hosts, "lime.tar");
        let export = ["container", "checkpoint", "--export", file.path()];
        podmans.says(ALPHA, &[&export, how, &["lime"]].concat());
        let lines = podmans.says(ALPHA, &["logs", "lime"]).lines().count() as u64;
        podmans.says(ALPHA, &["rm", "lime"]);
        hosts.decamp(BETA, &["restore", file.path()]).expect(0);
        podmans.answers();
        let count = || -> u64 {
            let words = ["cat", &format!("{here}/rootfs/data/count")];
            hosts.exec(BETA, &words).expect(0).stdout.trim().parse().unwrap_or(0)
        };
        until("it to go on", SOON, || count() > lines);
        assert_eq!(hosts.state(BETA, "lime").as_deref(), Some("running"));
        hosts.decamp(BETA, &["stop", "lime"]).expect(0);
        hosts.decamp(BETA, &["rm", "lime", "--yes"]).expect(0);
        hosts.exec(BETA, &["rm", "-r", here]).expect(0);
    }
}
