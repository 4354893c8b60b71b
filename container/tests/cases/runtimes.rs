//! The runtimes beside runc, terminals, and containers that somebody else started: they move, and the
//! destination's runtime lists and controls them.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use decamp_shared::workload::Backend;
use serde_json::json;

use crate::support::{Host, Spot};

/// What a program says; it must succeed.
pub(crate) fn says(program: &str, arguments: &[&str]) -> String {
    let said = Command::new(program).args(arguments).output().expect(program);
    let error = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8_lossy(&said.stdout).into_owned()
}

/// Has a program make something that lives on: its output is nobody's.
pub(crate) fn does(program: &str, arguments: &[&str]) {
    let null = || Stdio::null();
    let mut command = Command::new(program);
    let done = command.args(arguments).stdin(null()).stdout(null()).stderr(null()).status();
    assert!(done.expect(program).success(), "{program} {arguments:?}");
}

pub(crate) fn assert_listed(runtime: &str, id: &str, status: &str) {
    let has = |line: &str| line.split_whitespace().next() == Some(id) && line.contains(status);
    // What was asked of a runtime a moment ago may still be on its way.
    let begun = Instant::now();
    loop {
        let list = says(runtime, &["list"]);
        if list.lines().any(has) {
            return;
        }
        let patience = Duration::from_secs(120);
        assert!(begun.elapsed() < patience, "{id} is not {status}:\n{list}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Whether crun starts anything here; where it does not, the test at hand is skipped.
pub(crate) fn crun_starts(host: &Host) -> bool {
    let can = crun_can_start();
    if !can {
        host.skip("needs a machine whose root may lock all memory (crun, cgroup v2)");
    }
    can
}

/// On cgroup v2 it raises its limit of locked memory for a filter of devices, which takes a right that not
/// every machine's root has.
pub(crate) fn crun_can_start() -> bool {
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK);
    let most = limit.expect("a limit").1;
    let v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    !v2 || most == nix::libc::RLIM_INFINITY
}

fn crun_counter<'a>(host: &'a Host, name: &str) -> Spot<'a> {
    let mut spot = host.counter(name);
    spot.spec["runtime"] = json!("crun");
    spot
}

/// crun has no part in dump and restore, and is in charge before and after.
pub(crate) fn crun_is_in_charge_elsewhere(host: &Host) {
    if !crun_starts(host) {
        return;
    }
    let source = crun_counter(host, "cr");
    source.run();
    source.await_count(3);
    assert_listed("crun", &source.place.name, "running");
    let mut here = source;
    for turn in 0..3 {
        let there = here.twin(&format!("cr{turn}"));
        match turn {
            0 => here.move_to(&there),
            _ => here.move_live(&there, 2),
        };
        let before = here.last_count();
        there.await_count(before + 2);
        let first = there.counts()[0];
        assert!(first <= before + 1, "went on at {first} after {before}");
        host.assert_nothing_left(&here.place.name);
        here = there;
    }
    let id = here.place.name.clone();
    assert_listed("crun", &id, "running");
    let state: serde_json::Value =
        serde_json::from_str(&says("crun", &["state", &id])).expect("JSON");
    assert_eq!(state["status"], "running");
    assert_eq!(state["bundle"], here.bundle().to_str().expect("UTF-8"));
    let said = says("crun", &["exec", &id, "/bin/busybox", "cat", "/data/count"]);
    assert!(said.trim().parse::<u64>().expect("a number") >= 3);
    // It is in the container's namespaces and cgroups, and has its rights.
    let seen = says("crun", &["exec", &id, "/bin/busybox", "cat", "/proc/self/cgroup"]);
    assert!(seen.contains(&format!("/decamp/{id}")), "{seen}");
    let host_name = says("crun", &["exec", &id, "/bin/busybox", "hostname"]);
    assert_eq!(host_name.trim(), "counter");
    says("crun", &["pause", &id]);
    assert_listed("crun", &id, "paused");
    says("crun", &["resume", &id]);
    says("crun", &["kill", &id, "KILL"]);
    here.await_exit();
    assert_eq!(here.exit_record()["status"], 137);
    assert_eq!(here.backend().sweep(&here.spec, &here.place).ok(), Some(()));
    host.assert_nothing_left(&id);
}

/// A user may also have it deleted: that ends it, and nothing of it stays.
pub(crate) fn crun_deletes_what_came(host: &Host) {
    if !crun_starts(host) {
        return;
    }
    let source = crun_counter(host, "cd");
    source.run();
    source.await_count(2);
    let there = source.twin("cd2");
    source.move_to(&there);
    there.await_count(source.last_count() + 2);
    says("crun", &["delete", "--force", &there.place.name]);
    there.await_exit();
    there.backend().sweep(&there.spec, &there.place).expect("sweep");
    host.assert_nothing_left("cd2");
    // And it may be stopped by its keeper.
    let again = there.twin("cd3");
    again.run();
    again.await_count(2);
    again.stop();
    host.assert_nothing_left("cd3");
}

const TERMINAL: &str = "stty -echo -icanon rows 33 cols 97 2>/dev/null; trap 'echo interrupted' INT; n=0; \
    while :; do n=$((n+1)); echo \"$n $(stty size) $(stty -g) $(tty)\"; \
    read -t 1 -r line && kept=$line; echo \"kept=$kept\"; done";

/// A shell on a terminal keeps its variables, and the terminal its settings and size, there and back.
fn terminal_goes_along(host: &Host, runtime: &str) {
    use std::io::{Read, Write};
    let mut here = host.shell(&format!("tty-{runtime}"), TERMINAL);
    here.spec["runtime"] = json!(runtime);
    here.spec["tty"] = json!(true);
    here.run();
    here.await_log("33 97");
    let mut settings: Option<String> = None;
    for turn in 0..4 {
        let word = format!("word-{turn}");
        let console = here.place.dir.join("console.sock");
        let mut client = std::os::unix::net::UnixStream::connect(&console).expect("a console");
        client.write_all(format!("{word}\n").as_bytes()).expect("typed");
        here.await_log(&format!("kept={word}"));
        let mut seen = [0; 16];
        assert!(client.read(&mut seen).expect("shown") > 0);
        client.write_all(b"\x03").expect("typed");
        here.await_log("interrupted");
        let count = here.terminal_counts().last().cloned().expect("counts");
        let there = here.twin(&format!("tty-{runtime}-{turn}"));
        match turn {
            0 => here.move_to(&there),
            _ => here.move_live(&there, 2),
        };
        assert!(!console.exists(), "its socket stayed");
        there.await_log(&format!("kept={word}"));
        there.await_log("/dev/pts/0\r\n");
        let went_on = there.terminal_counts().first().cloned().expect("counts");
        let left_off = here.terminal_counts().last().cloned().expect("counts");
        assert!((left_off.0..=left_off.0 + 5).contains(&went_on.0), "{left_off:?}, {went_on:?}");
        assert_eq!(count.1, went_on.1, "the terminal is another");
        let first = settings.get_or_insert_with(|| count.1.clone());
        assert_eq!(*first, went_on.1);
        host.assert_nothing_left(&here.place.name);
        here = there;
    }
    let id = here.place.name.clone();
    assert_listed(runtime, &id, "running");
    let said = says(runtime, &["exec", &id, "/bin/busybox", "ls", "-l", "/proc/1/fd"]);
    assert!(said.contains("/dev/pts/0") && !said.contains("pipe:"), "{said}");
    here.stop();
    host.assert_nothing_left(&id);
}

pub(crate) fn terminal_goes_along_under_runc(host: &Host) {
    terminal_goes_along(host, "runc");
}

pub(crate) fn terminal_goes_along_under_crun(host: &Host) {
    if crun_starts(host) {
        terminal_goes_along(host, "crun");
    }
}

impl Spot<'_> {
    /// What the shell on a terminal counted, and the rest of that line: the terminal's size, settings
    /// and name.
    fn terminal_counts(&self) -> Vec<(u64, String)> {
        let text = std::fs::read_to_string(self.place.log()).unwrap_or_default();
        let line = |line: &str| -> Option<(u64, String)> {
            let (count, rest) = line.trim_end().split_once(' ')?;
            rest.contains("/dev/pts/").then(|| Some((count.parse().ok()?, rest.to_owned())))?
        };
        // The last line may be half written.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().filter_map(line).collect()
    }
}

/// A runtime that nobody knows, one that is not there, and a name that crun has.
pub(crate) fn runtimes_that_do_not_do(host: &Host) {
    if !crun_starts(host) {
        return;
    }
    let mut spot = host.counter("rn");
    let refused = |spot: &Spot<'_>| -> Vec<String> {
        spot.backend().check(&spot.spec).into_iter().map(|refusal| refusal.text).collect()
    };
    spot.spec["runtime"] = json!("kata");
    let said = refused(&spot);
    assert!(said.len() == 1 && said[0].contains("use runc or crun"), "{said:?}");
    spot.spec["runtime"] = json!("crun");
    let mut tools = host.tools();
    tools.crun = "/nowhere/crun".into();
    let backend = decamp_container::ContainerBackend::new(tools);
    let said = backend.check(&spot.spec);
    assert!(said.len() == 1 && said[0].text.contains("/nowhere/crun"), "{said:?}");
    assert_eq!(refused(&spot), [] as [String; 0]);
    let name = spot.place.name.clone();
    let bundle = spot.bundle().display().to_string();
    does("crun", &["create", "--bundle", &bundle, &name]);
    let tried = spot.try_run(&spot.spec);
    let list = says("crun", &["list"]);
    does("crun", &["delete", "--force", &name]);
    let error = tried.expect_err("the name is taken").to_string();
    assert!(error.contains("crun has a container"), "{error}");
    assert!(list.contains("created"), "{list}");
}

/// Its own cgroups are at the root of what it sees of them, here and there.
pub(crate) fn cgroup_namespace_goes_along(host: &Host) {
    let source = host.counter("cn");
    source.change_config(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("namespaces");
        namespaces.push(json!({"type": "cgroup"}));
        let mount = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]});
        config["mounts"].as_array_mut().expect("mounts").push(mount);
    });
    source.run();
    source.await_count(3);
    let sees = |spot: &Spot<'_>| {
        let words = ["exec", &spot.place.name, "/bin/busybox", "cat", "/proc/1/cgroup"];
        let all = says("runc", &words);
        assert!(all.lines().all(|line| line.ends_with(":/")), "{all}");
        let inside =
            says("runc", &[&words[..2], &["/bin/busybox", "ls", "/sys/fs/cgroup"]].concat());
        inside.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let before = sees(&source);
    let there = source.twin("cn2");
    source.move_live(&there, 1);
    assert_eq!(sees(&there), before);
    let count = there.last_count();
    there.await_count(count + 3);
    host.assert_nothing_left("cn");
}
