//! What runtimes and CRIU call: containers that register when they start, leave when they end, and stay
//! what they are when they move; and checkpoints that a runtime makes, under decamp's look and its handling
//! of the network.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::hosts::{ALPHA, BETA, CLIENT, Hosts, hosts};
use crate::running::until;
use crate::{Needs, Test};

/// What is awaited happens within this, on however slow a machine.
const SOON: Duration = Duration::from_secs(120);
/// Below /run, which each host has for itself.
const PLACES: [&str; 4] = ["--hooks-dir", "/run/hooks.d", "--criu-conf", "/run/criu/runc.conf"];
/// Holds what CRIU cannot dump, or loses, and counts.
const STUBBORN: &str = r#"
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void) {
    unsigned long ring = 0;
    char parameters[256] = {0};
    if (syscall(SYS_io_setup, 8, &ring)) return 2;
    syscall(SYS_io_uring_setup, 8, parameters);
    for (unsigned n = 1;; n++) {
        FILE *file = fopen("/data/count.new", "w");
        fprintf(file, "%u\n", n);
        fclose(file);
        rename("/data/count.new", "/data/count");
        usleep(100000);
    }
}
"#;

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("hooks::registered_and_moved", Needs::Containers, registered_and_moved),
        Test::new("hooks::registered_under_crun", Needs::Containers, registered_under_crun),
        Test::new("hooks::left", Needs::Containers, left),
        Test::new("hooks::checkpoint_refused", Needs::Containers, checkpoint_refused),
        Test::new("hooks::checkpoint", Needs::Containers, checkpoint),
    ]
}

/// Puts the hooks in place on alpha; what `decamp.json` says of the hook.
fn install(hosts: &Hosts) -> Value {
    hosts.exec(ALPHA, &["mkdir", "-p", "/run/hooks.d", "/run/criu"]).expect(0);
    let words = [&["hook", "install"][..], &PLACES].concat();
    hosts.decamp(ALPHA, &words).expect(0);
    let text = hosts.exec(ALPHA, &["cat", "/run/hooks.d/decamp.json"]).expect(0).stdout;
    serde_json::from_str::<Value>(&text).expect("JSON")["hook"].clone()
}

/// Makes a bundle that counts, whose configuration `edit` completes.
fn make_bundle(hosts: &Hosts, name: &str, edit: impl FnOnce(&mut Value)) {
    let maker = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/counter-bundle");
    hosts.exec(ALPHA, &[maker, &format!("/srv/{name}")]).expect(0);
    let path = hosts.path(ALPHA, &format!("srv/{name}/config.json"));
    let text = fs::read_to_string(&path).expect("a configuration");
    let mut config = serde_json::from_str(&text).expect("JSON");
    edit(&mut config);
    fs::write(&path, config.to_string()).expect("written");
}

fn with_hook(hook: &Value, migratable: &str) -> impl FnOnce(&mut Value) {
    move |config| {
        config["annotations"] = json!({ "decamp.migratable": migratable });
        config["hooks"] = json!({ "poststart": [hook], "poststop": [hook] });
    }
}

fn start(hosts: &Hosts, name: &str) {
    let line = format!("runc run --detach --bundle /srv/{name} {name} </dev/null >/dev/null 2>&1");
    hosts.exec(ALPHA, &["sh", "-c", &line]).expect(0);
}

fn count(hosts: &Hosts, host: &str, name: &str) -> u64 {
    let said = hosts.exec(host, &["runc", "exec", name, "/bin/busybox", "cat", "/data/count"]);
    said.expect(0).stdout.trim().parse().expect("a number")
}

fn is(hosts: &Hosts, name: &str, state: Option<&str>) {
    until(&format!("{name} to be {state:?}"), SOON, || {
        hosts.state(ALPHA, name).as_deref() == state
    });
}

fn registered_and_moved() {
    let hosts = hosts();
    let hook = install(hosts);
    make_bundle(hosts, "hooked", with_hook(&hook, "true"));
    // Made and not started it is waited for.
    let line = "runc create --bundle /srv/hooked hooked </dev/null >/dev/null 2>&1";
    hosts.exec(ALPHA, &["sh", "-c", line]).expect(0);
    assert_eq!(hosts.state(ALPHA, "hooked"), None);
    hosts.exec(ALPHA, &["runc", "start", "hooked"]).expect(0);
    is(hosts, "hooked", Some("running"));
    until("it to count", SOON, || {
        let said = hosts.exec(ALPHA, &["cat", "/srv/hooked/rootfs/data/count"]);
        said.code == Some(0)
    });
    let before = count(hosts, ALPHA, "hooked");
    hosts.decamp(ALPHA, &["migrate", "hooked", "--to", BETA]).expect(0);
    assert!(count(hosts, BETA, "hooked") >= before);
    assert_eq!(hosts.state(ALPHA, "hooked").as_deref(), Some("moved"));
    // Its runtime here says that it has stopped, which is no news of it.
    let state = r#"{"ociVersion": "1.0.2", "id": "hooked", "status": "stopped", "bundle": "/srv/hooked",
        "annotations": {"decamp.migratable": "true"}}"#;
    fs::write(hosts.path(ALPHA, "srv/hooked.state"), state).expect("written");
    // The hook asks who called it.
    let line = "cp /bin/sh /srv/runc && /srv/runc -c 'decamp hook oci </srv/hooked.state; exit $?'";
    let ran = hosts.exec(ALPHA, &["sh", "-c", line]).expect(0);
    assert!(ran.stderr.contains("hooked is moved"), "{ran}");
    hosts.exec(ALPHA, &["rm", "/srv/runc", "/srv/hooked.state"]).expect(0);
    assert_eq!(hosts.state(ALPHA, "hooked").as_deref(), Some("moved"));
    assert_eq!(hosts.state(BETA, "hooked").as_deref(), Some("running"));
    // There it is a container of decamp, which ends and starts without the hook.
    hosts.decamp(BETA, &["stop", "hooked"]).expect(0);
    hosts.decamp(BETA, &["start", "hooked"]).expect(0);
    hosts.decamp(BETA, &["stop", "hooked"]).expect(0);
    hosts.decamp(BETA, &["rm", "hooked", "--yes"]).expect(0);
    hosts.decamp(ALPHA, &["rm", "hooked", "--yes"]).expect(0);
    hosts.exec(BETA, &["rm", "-r", "/srv/hooked"]).expect(0);
}

/// crun runs from a mount of its binary, which has no name there.
fn registered_under_crun() {
    const UNIFIED: &str = "/sys/fs/cgroup/unified";
    let hosts = hosts();
    // It starts nothing where that has controllers, or where there is a place for it.
    let mixed = hosts.exec(ALPHA, &["test", "-d", UNIFIED]).code == Some(0);
    for host in [ALPHA, BETA].into_iter().filter(|_| mixed) {
        let line = format!("umount -l {UNIFIED} && rmdir {UNIFIED}");
        hosts.exec(host, &["sh", "-c", &line]).expect(0);
    }
    let hook = install(hosts);
    make_bundle(hosts, "crunch", with_hook(&hook, "true"));
    let line = "crun run --detach --bundle /srv/crunch crunch </dev/null >/dev/null 2>&1";
    hosts.exec(ALPHA, &["sh", "-c", line]).expect(0);
    is(hosts, "crunch", Some("running"));
    // It ends, and its runtime lets go of it.
    hosts.exec(ALPHA, &["crun", "delete", "--force", "crunch"]).expect(0);
    is(hosts, "crunch", None);
    hosts.exec(ALPHA, &["sh", "-c", line]).expect(0);
    is(hosts, "crunch", Some("running"));
    let detail = hosts.decamp(ALPHA, &["inspect", "crunch", "--json"]).expect(0).json();
    assert_eq!(detail["spec"]["runtime"], "crun");
    let count = |host| {
        let words = ["crun", "exec", "crunch", "/bin/busybox", "cat", "/data/count"];
        let said = hosts.exec(host, &words).expect(0).stdout;
        said.trim().parse::<u64>().expect("a number")
    };
    let path = hosts.path(ALPHA, "srv/crunch/rootfs/data/count");
    until("it to count", SOON, || path.exists());
    let before = count(ALPHA);
    hosts.decamp(ALPHA, &["migrate", "crunch", "--to", BETA]).expect(0);
    assert!(count(BETA) >= before);
    assert_eq!(hosts.state(ALPHA, "crunch").as_deref(), Some("moved"));
    assert_eq!(hosts.state(BETA, "crunch").as_deref(), Some("running"));
    let list = hosts.exec(BETA, &["crun", "list"]).expect(0).stdout;
    assert!(list.lines().any(|line| line.starts_with("crunch ")), "{list}");
    hosts.decamp(BETA, &["stop", "crunch"]).expect(0);
    hosts.decamp(BETA, &["rm", "crunch", "--yes"]).expect(0);
    hosts.decamp(ALPHA, &["rm", "crunch", "--yes"]).expect(0);
    hosts.exec(BETA, &["rm", "-r", "/srv/crunch"]).expect(0);
    for host in [ALPHA, BETA].into_iter().filter(|_| mixed) {
        let line = format!("mkdir {UNIFIED} && mount -t cgroup2 cgroup2 {UNIFIED}");
        hosts.exec(host, &["sh", "-c", &line]).expect(0);
    }
}

fn left() {
    let hosts = hosts();
    let hook = install(hosts);
    make_bundle(hosts, "guest", with_hook(&hook, "true"));
    start(hosts, "guest");
    is(hosts, "guest", Some("running"));
    // It ends: noted. Its runtime lets go of it: forgotten.
    hosts.exec(ALPHA, &["runc", "kill", "guest", "KILL"]).expect(0);
    is(hosts, "guest", Some("stopped"));
    hosts.exec(ALPHA, &["runc", "delete", "guest"]).expect(0);
    is(hosts, "guest", None);
    // Both at once.
    let begun = Instant::now();
    start(hosts, "guest");
    let usual = begun.elapsed();
    is(hosts, "guest", Some("running"));
    hosts.exec(ALPHA, &["runc", "delete", "--force", "guest"]).expect(0);
    is(hosts, "guest", None);
    // Without an agent it starts all the same, and at once.
    hosts.hosts(&["agent", ALPHA, "stop"]).expect(0);
    let begun = Instant::now();
    start(hosts, "guest");
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5).max(5 * usual), "{took:?}, and {usual:?} with one");
    hosts.start_agent(ALPHA, "");
    hosts.exec(ALPHA, &["runc", "delete", "--force", "guest"]).expect(0);
    // What is not annotated so is left alone, with a word.
    hosts.exec(ALPHA, &["rm", "-r", "/srv/guest"]).expect(0);
    make_bundle(hosts, "guest", with_hook(&hook, "yes"));
    start(hosts, "guest");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(hosts.state(ALPHA, "guest"), None);
    hosts.exec(ALPHA, &["runc", "delete", "--force", "guest"]).expect(0);
    hosts.exec(ALPHA, &["rm", "-r", "/srv/guest"]).expect(0);
}

/// Has CRIU read what was installed, as if it stood in /etc.
fn with_criu(config: &mut Value) {
    config["annotations"] = json!({ "org.criu.config": "/run/criu/runc.conf" });
}

fn checkpoint_refused() {
    let hosts = hosts();
    install(hosts);
    make_bundle(hosts, "stubborn", with_criu);
    let source = hosts.path(ALPHA, "srv/stubborn/stubborn.c");
    fs::write(&source, STUBBORN).expect("written");
    let place = ["/srv/stubborn/stubborn.c", "/srv/stubborn/rootfs/bin/count"];
    hosts.exec(ALPHA, &["rm", place[1]]).expect(0);
    hosts.exec(ALPHA, &["cc", "-static", "-o", place[1], place[0]]).expect(0);
    start(hosts, "stubborn");
    until("it to count", SOON, || {
        hosts.exec(ALPHA, &["cat", "/srv/stubborn/rootfs/data/count"]).code == Some(0)
    });
    let before = count(hosts, ALPHA, "stubborn");
    let words = ["runc", "checkpoint", "--image-path", "/srv/img", "--work-path", "/srv/img"];
    let ran = hosts.exec(ALPHA, &[&words[..], &["stubborn"]].concat());
    assert_ne!(ran.code, Some(0), "{ran}");
    let log = hosts.exec(ALPHA, &["cat", "/srv/img/dump.log"]).expect(0).stdout;
    for said in [&ran.stderr, &log] {
        assert!(said.contains("cannot be checkpointed, and runs on"), "{said}");
        assert!(said.contains("libaio"), "{said}");
    }
    until("it to count on", SOON, || count(hosts, ALPHA, "stubborn") > before + 2);
    let list = hosts.exec(ALPHA, &["runc", "list"]).expect(0).stdout;
    assert!(list.contains("running"), "{list}");
    hosts.exec(ALPHA, &["runc", "delete", "--force", "stubborn"]).expect(0);
    hosts.exec(ALPHA, &["rm", "-r", "/srv/stubborn", "/srv/img"]).expect(0);
}

/// A connection through a checkpoint that the container survives, and through one with a restore; what was
/// said to it meanwhile arrives. Nothing of CRIU's or ours is left in its network.
fn checkpoint() {
    let hosts = hosts();
    install(hosts);
    let script = "ip netns add echo && ip link add vecho type veth peer name eth0 netns echo && \
        ip link set vecho master br0 up && ip -n echo link set lo up && ip -n echo link set eth0 up && \
        ip -n echo address add 10.77.1.66/16 dev eth0";
    hosts.exec(ALPHA, &["sh", "-c", script]).expect(0);
    make_bundle(hosts, "echo", |config| {
        with_criu(config);
        let words = ["/bin/busybox", "nc", "-ll", "-p", "7000", "-e", "/bin/busybox", "cat"];
        config["process"]["args"] = json!(words);
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("namespaces");
        for namespace in namespaces.iter_mut().filter(|one| one["type"] == "network") {
            namespace["path"] = json!("/run/netns/echo");
        }
    });
    start(hosts, "echo");
    let mut client = Command::new("ip")
        .args(["netns", "exec", CLIENT, "/bin/busybox", "nc", "10.77.1.66", "7000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a client");
    let mut says = client.stdin.take().expect("its input");
    let lines = BufReader::new(client.stdout.take().expect("its output")).lines();
    let (heard, hears) = mpsc::channel();
    std::thread::spawn(move || {
        lines.map_while(Result::ok).all(|line| heard.send(line).is_ok());
    });
    let echo = |text: &str| {
        assert_eq!(hears.recv_timeout(SOON).as_deref(), Ok(text), "what the container answers");
    };
    writeln!(says, "one").expect("said");
    echo("one");
    let port = || hosts.exec(ALPHA, &["bridge", "link", "show", "dev", "vecho"]).expect(0).stdout;
    let rules = || {
        let words = ["ip", "netns", "exec", "echo", "nft", "list", "ruleset"];
        hosts.exec(ALPHA, &words).expect(0).stdout
    };
    let options = ["--image-path", "/srv/img", "--work-path", "/srv/img", "--tcp-established"];
    let words = [&["runc", "checkpoint", "--leave-running"][..], &options, &["echo"]].concat();
    hosts.exec(ALPHA, &words).expect(0);
    // The kernel looks at what came up when it gets to it.
    until("the bridge to forward", SOON, || port().contains("state forwarding"));
    writeln!(says, "two").expect("said");
    echo("two");
    hosts.exec(ALPHA, &["rm", "-r", "/srv/img"]).expect(0);
    let words = [&["runc", "checkpoint"][..], &options, &["echo"]].concat();
    hosts.exec(ALPHA, &words).expect(0);
    assert!(port().contains("state disabled"), "{}", port());
    writeln!(says, "three").expect("said");
    let line = format!(
        "runc restore --detach --bundle /srv/echo {} echo </dev/null >/dev/null 2>&1",
        options.join(" ")
    );
    hosts.exec(ALPHA, &["sh", "-c", &line]).expect(0);
    // The kernel looks at what came up when it gets to it.
    until("the bridge to forward", SOON, || port().contains("state forwarding"));
    echo("three");
    assert_eq!(rules().trim(), "");
    client.kill().and_then(|()| client.wait()).expect("ended");
    hosts.exec(ALPHA, &["runc", "delete", "--force", "echo"]).expect(0);
    hosts.exec(ALPHA, &["ip", "netns", "delete", "echo"]).expect(0);
    hosts.exec(ALPHA, &["rm", "-r", "/srv/echo", "/srv/img"]).expect(0);
    let words = [&["hook", "remove"][..], &PLACES].concat();
    hosts.decamp(ALPHA, &words).expect(0);
    hosts.exec(ALPHA, &["sh", "-c", "rmdir /run/hooks.d /run/criu"]).expect(0);
}
