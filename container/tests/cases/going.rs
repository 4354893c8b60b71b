//! Containers that go on elsewhere as they were here: the number they had reached, their limits, mounts,
//! connections and memory.

use std::io::Write as _;
use std::path::Path;

use decamp_shared::keeper::Phase;

use super::support::redis::{Busy, Redis};
use super::support::{Case, Host, Spot};

pub(crate) const CASES: [Case; 6] = [
    Case { name: "counter_goes_on_elsewhere", run: counter_goes_on_elsewhere },
    Case { name: "counter_moves_back_and_forth", run: counter_moves_back_and_forth },
    Case { name: "as_many_tasks_as_there_may_be", run: as_many_tasks_as_there_may_be },
    Case { name: "mounts_behind_links_move", run: mounts_behind_links_move },
    Case {
        name: "redis_keeps_its_connection_and_memory",
        run: redis_keeps_its_connection_and_memory,
    },
    Case { name: "measure_redis", run: measure_redis },
];

fn counter_goes_on_elsewhere(host: &Host) {
    let source = host.counter("a");
    source.run();
    source.await_count(3);
    let destination = source.twin("b");
    let moved = source.move_to(&destination);
    assert!(moved.pages > 0, "no page was hidden from CRIU");
    let before = source.last_count();
    destination.await_count(before + 3);
    let first = destination.counts()[0];
    // A number that stood in the pipe at the freeze may be logged on either side, but none is lost.
    assert!(first <= before + 1, "went on at {first} after {before}");
    assert_eq!(destination.phase(), Phase::Running);
    host.assert_nothing_left("a");
    let name = destination.place.name.as_str();
    let said = host.runc(&["exec", name, "/bin/busybox", "cat", "/data/count"]);
    assert!(said.trim().parse::<u64>().expect("a number") >= before);
    let open = host.runc(&["exec", name, "/bin/busybox", "ls", "-l", "/proc/1/fd"]);
    assert!(open.contains("pipe:") && !open.contains("socket:"), "CRIU left something: {open}");
    host.assert_listed_as_running(name);
    host.runc(&["kill", name, "KILL"]);
    destination.await_exit();
    assert_eq!(destination.exit_record()["status"], 137);
    host.assert_nothing_left("b");
}

fn counter_moves_back_and_forth(host: &Host) {
    let mut here = host.counter("c0");
    here.run();
    here.await_count(2);
    for turn in 1..=6 {
        let there = here.twin(&format!("c{turn}"));
        here.move_to(&there);
        let before = here.last_count();
        there.await_count(before + 2);
        here = there;
    }
    here.stop();
    host.assert_nothing_left("c6");
}

/// Who restores it is not counted among its tasks.
fn as_many_tasks_as_there_may_be(host: &Host) {
    let pids = |spot: &Spot<'_>, file: &str| {
        Path::new("/sys/fs/cgroup/pids/decamp").join(&spot.place.name).join(file)
    };
    let here = host.shell("tl", "sleep 600 & echo 1; wait");
    here.run();
    here.await_count(1);
    let now = std::fs::read_to_string(pids(&here, "pids.current")).expect("a number");
    std::fs::write(pids(&here, "pids.max"), now.trim()).expect("a limit");
    let there = here.twin("tl2");
    here.move_to(&there);
    let max = std::fs::read_to_string(pids(&there, "pids.max")).expect("a number");
    assert_eq!(max, now, "its limit");
    there.stop();
    host.assert_nothing_left("tl2");
}

fn mounts_behind_links_move(host: &Host) {
    let place =
        host.shell("l", "while :; do n=$((n+1)); echo $n; echo $n >/far/n; usleep 100000; done");
    let bundle = place.bundle();
    std::fs::create_dir(bundle.join("far")).expect("a directory");
    std::fs::create_dir(bundle.join("rootfs/really")).expect("a directory");
    std::os::unix::fs::symlink("/really", bundle.join("rootfs/far")).expect("a link");
    place.change_config(|config| {
        let mounts = config["mounts"].as_array_mut().expect("mounts");
        let options = ["rbind", "rw"];
        mounts.push(serde_json::json!({"destination": "/far/", "type": "bind", "source": "far",
            "options": options}));
    });
    place.run();
    place.await_count(2);
    let twin = place.twin("l2");
    place.move_to(&twin);
    twin.await_count(place.last_count() + 3);
    assert!(bundle.join("far/n").exists(), "it was not mounted at all");
    // What it takes away by itself is said before anything is frozen.
    let name = twin.place.name.as_str();
    host.runc(&["exec", "--cap", "CAP_SYS_ADMIN", name, "/bin/busybox", "umount", "/really"]);
    let needs = String::from_utf8(twin.source().manifest().expect("a manifest").needs);
    assert!(needs.expect("text").contains("mounts /far/"));
    twin.stop();
}

fn redis_keeps_its_connection_and_memory(host: &Host) {
    let place = host.redis("red", "10.99.0.5/24", &[]);
    let bridge = host.bridge_address();
    place.run();
    let mut redis = Redis::connect("10.99.0.5:6379");
    redis.fill(48 << 20, 7);
    let digest = redis.ask(&["DEBUG", "DIGEST"]);
    let mut here = place;
    for turn in 0..4 {
        let there = here.twin(&format!("red{turn}"));
        let acknowledged = turn.to_string();
        assert_eq!(redis.ask(&["SET", "acknowledged", &acknowledged]), "OK");
        // Another client writes and reads on its one connection all the while.
        let busy = Busy::begin("10.99.0.5:6379");
        let moved = here.move_to(&there);
        let seen = busy.end();
        // Whoever speaks to the host's bridge knows it by its address.
        assert_eq!(host.bridge_address(), bridge);
        seen.assert_no_longer_than(&moved);
        assert_eq!(redis.ask(&["DEL", "busy"]), "1");
        assert_eq!(redis.ask(&["GET", "acknowledged"]), acknowledged);
        assert_eq!(redis.ask(&["DEL", "acknowledged"]), "1");
        assert_eq!(redis.ask(&["DEBUG", "DIGEST"]), digest);
        here = there;
    }
    // New connections reach it too.
    assert_eq!(Redis::connect("10.99.0.5:6379").ask(&["DBSIZE"]), redis.ask(&["DBSIZE"]));
    here.stop();
    host.assert_nothing_left("red3");
}

/// Not a test that can pass or fail: the figures of a move of Redis with 256 MiB.
fn measure_redis(host: &Host) {
    let megabytes: usize = match std::env::var("DECAMP_MEASURE_MIB").map(|text| text.parse()) {
        Ok(Ok(megabytes)) => megabytes,
        _ => return host.skip("set DECAMP_MEASURE_MIB to measure"),
    };
    let mut here = host.redis("m", "10.99.0.6/24", &[]);
    here.run();
    let mut redis = Redis::connect("10.99.0.6:6379");
    redis.fill(megabytes << 20, 3);
    let mut rows = Vec::new();
    for turn in 0..7 {
        let there = here.twin(&format!("m{turn}"));
        let moved = here.move_live(&there, 3);
        assert_eq!(redis.ask(&["PING"]), "PONG");
        rows.push(moved.times);
        here = there;
    }
    here.stop();
    for step in ["pause", "harvest", "copy", "save", "load", "activate"] {
        let mut times: Vec<f64> = rows.iter().map(|row| row[step]).collect();
        times.sort_by(f64::total_cmp);
        let line = format!(
            "    {step:9} min {:7.1}  median {:7.1}  max {:7.1} ms",
            times[0],
            times[times.len() / 2],
            times[times.len() - 1]
        );
        writeln!(std::io::stderr(), "{line}").expect("stderr");
    }
}
