//! Disks that move alone, to another file system of the same host, under a guest that writes and checks its disk all
//! the time: nothing is lost, whatever fails and whenever; and what cannot be is refused.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::failures::{Failure, arm, hold_to};
use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, Hosts, SmallDisk, hosts};
use crate::refusals::refused;
use crate::running::{Ran, find, until};
use crate::snapshot::Snapshot;
use crate::{Needs, Test};

/// Something is seen within this.
const SOON: Duration = Duration::from_secs(180);
/// A disk that ends within a page.
const BYTES: u64 = (32 << 20) + 1536;
/// The guest rewrites the first MiB of it all the time.
const GUEST: &str = "fill=16 hot=2 report=50 disk=1";
const OLD: &str = "/srv/disks/data.img";
const NEW: &str = "/srv/fast/data.img";
const MAPPED: &str = "/srv/disks/data.img=/srv/fast/data.img";

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("relocation::under_a_guest_that_writes", Needs::Kvm, moves),
        Test::new("relocation::two_at_once", Needs::Kvm, two),
        Test::new("relocation::refused_before_anything_is_touched", Needs::Kvm, refusals),
        Test::new("relocation::cancelled_or_failed_in_each_phase", Needs::Kvm, given_up),
        Test::new("relocation::no_room_in_the_middle", Needs::Kvm, no_room),
        Test::new("relocation::agent_killed_in_each_phase", Needs::Kvm, agent_killed),
        Test::new("relocation::keeper_killed_with_the_agent", Needs::Kvm, keeper_killed),
    ]
}

/// A host with a guest that writes its disk, and another file system.
struct Room {
    hosts: &'static Hosts,
    guest: Guest,
    fast: SmallDisk<'static>,
}

impl Room {
    fn new(name: &'static str, fast: &str) -> Self {
        let hosts = hosts();
        hosts.mend();
        for host in [ALPHA, BETA] {
            hosts.exec(host, &["sh", "-c", "rm -rf /srv/disks /srv/fast"]).expect(0);
        }
        hosts.exec(ALPHA, &["mkdir", "-p", "/srv/disks", "/srv/fast"]).expect(0);
        let file = File::create(on(hosts, ALPHA, OLD)).expect("made");
        file.set_len(BYTES).expect("sized");
        let fast = hosts.small_disk(ALPHA, "/srv/fast", fast);
        let guest = Guest::start_with(hosts, ALPHA, name, "128M", GUEST, &["--disk", OLD]);
        Self { hosts, guest, fast }
    }

    fn migrate(&self, paths: &str, options: &[&str]) -> Ran {
        let words = ["migrate", self.guest.name(), "--to", ALPHA, "--path", paths];
        self.hosts.decamp(ALPHA, &[&words[..], options].concat())
    }

    /// Where the agent and the keeper say that the first disk is.
    #[track_caller]
    fn path(&self) -> String {
        let told = self.hosts.decamp(ALPHA, &["inspect", self.guest.name(), "--json"]).expect(0);
        let told = told.json();
        let path = told["spec"]["disks"][0]["path"].as_str().expect("a path").to_owned();
        let files = told["files"].as_array().expect("files");
        assert!(files.iter().any(|file| file["path"] == path.as_str()), "{told}");
        if told["state"] == "running" {
            assert_eq!(told["keeper"]["facts"]["disks"][0]["path"], path.as_str(), "{told}");
        }
        path
    }

    /// The guest goes twice over all of its disk, and finds nothing wrong.
    #[track_caller]
    fn writes_clean(&self, host: &str) {
        let mark = self.guest.log(host).len();
        let first = passes(&self.guest.log(host));
        find("two passes over the disk", SOON, || {
            let log = self.guest.log(host);
            assert!(!log.contains("BAD") && !log.contains("FAILED"), "{}", log[mark..].trim_end());
            (passes(&log[mark..]) >= first + 2).then_some(())
        });
        self.guest.runs_clean(host);
    }

    /// All that there is of it once it is over.
    fn end(self) {
        let Self { hosts, guest, fast } = self;
        guest.verify(ALPHA);
        drop(guest);
        drop(fast);
        hosts.exec(ALPHA, &["rm", "-rf", "/srv/disks", "/srv/fast"]).expect(0);
    }
}

/// A file of a host, as seen from outside; nothing that is mounted in the host is.
fn on(hosts: &Hosts, host: &str, path: &str) -> PathBuf {
    hosts.path(host, path.trim_start_matches('/'))
}

/// Passes over its disk that the guest told of last.
fn passes(log: &str) -> u64 {
    let whole = &log[..log.rfind('\n').map_or(0, |end| end + 1)];
    let last = whole.lines().rev().find_map(|line| line.strip_prefix("disk passes="));
    last.and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap_or(0)
}

/// What `sh` says of a file in the host.
#[track_caller]
fn sum(hosts: &Hosts, path: &str) -> String {
    hosts.exec(ALPHA, &["sha256sum", path]).expect(0).stdout
}

fn moves() {
    let room = Room::new("mover", "64M");
    let hosts = room.hosts;
    room.writes_clean(ALPHA);
    let before = Snapshot::take(hosts);
    let dry = room.migrate(MAPPED, &["--dry-run"]).expect(0);
    assert!(dry.stdout.contains("nothing was touched"), "{dry}");
    before.is_restored();
    let ran = room.migrate(MAPPED, &["--json"]).expect(0);
    let report = ran.json();
    for (key, value) in
        [("from", "alpha"), ("to", "alpha"), ("outcome", "completed"), ("mode", "pre-copy")]
    {
        assert_eq!(report[key], value, "{ran}");
    }
    let held = report["downtime_ms"].as_f64().expect("it was held");
    assert!(held > 0.0 && report["wire_bytes"] == 0 && !report["rounds"][1].is_null(), "{ran}");
    println!("held for {held:.1} ms of {:.0} ms", report["total_ms"].as_f64().unwrap_or_default());
    let old = sum(hosts, OLD);
    assert_eq!(room.path(), NEW);
    room.writes_clean(ALPHA);
    assert_eq!(sum(hosts, OLD), old, "the old file is still written");
    assert_ne!(sum(hosts, NEW).split(' ').next(), old.split(' ').next());
    let size = hosts.exec(ALPHA, &["stat", "-c", "%s %b", NEW]).expect(0).stdout;
    let mut size = size.split_whitespace().map(|word| word.parse::<u64>().expect("a number"));
    assert_eq!(size.next(), Some(BYTES));
    assert!(size.next().expect("blocks") * 512 < 3 << 20, "it is not sparse");
    // Its lock is where it is.
    let run = |disk: &str| {
        let words = ["run", "vm", "other", "--kernel", "/srv/guest.elf", "--memory", "64M"];
        // What it would fill by itself does not fit: it would switch itself off.
        hosts.decamp(ALPHA, &[&words[..], &["--cmdline", "fill=16", "--disk", disk]].concat())
    };
    refused(run(NEW), &["locked by VM mover"]);
    run(OLD).expect(0);
    hosts.decamp(ALPHA, &["stop", "other"]).expect(0);
    hosts.decamp(ALPHA, &["rm", "other", "--yes", "--keep-files"]).expect(0);
    // The next agent, and the next keeper.
    hosts.restart_agent(ALPHA);
    assert_eq!(room.path(), NEW);
    room.writes_clean(ALPHA);
    hosts.decamp(ALPHA, &["stop", "mover"]).expect(0);
    refused(room.migrate("/srv/fast/data.img=/srv/disks/back.img", &[]), &["decamp start mover"]);
    hosts.decamp(ALPHA, &["start", "mover"]).expect(0);
    assert_eq!(room.path(), NEW);
    room.writes_clean(ALPHA);
    // Away, by its new path, and back.
    let away = ["migrate", "mover", "--storage", "copy", "--to"];
    hosts.decamp(ALPHA, &[&away[..], &[BETA]].concat()).expect(0);
    room.writes_clean(BETA);
    assert_eq!(fs::metadata(on(hosts, BETA, NEW)).expect("there").size(), BYTES);
    hosts.decamp(BETA, &[&away[..], &[ALPHA, "--remove-source"]].concat()).expect(0);
    room.writes_clean(ALPHA);
    let back = "/srv/fast/data.img=/srv/disks/back.img";
    let told = room.migrate(back, &["--remove-source"]).expect(0);
    assert!(told.stdout.contains("was removed"), "{told}");
    hosts.exec(ALPHA, &["test", "!", "-e", NEW]).expect(0);
    assert_eq!(room.path(), "/srv/disks/back.img");
    room.writes_clean(ALPHA);
    room.end();
}

fn two() {
    let room = Room::new("two-disks", "64M");
    let hosts = room.hosts;
    hosts.decamp(ALPHA, &["stop", "two-disks"]).expect(0);
    hosts.decamp(ALPHA, &["rm", "two-disks", "--yes", "--keep-files"]).expect(0);
    let more = on(hosts, ALPHA, "/srv/disks/more.img");
    fs::write(&more, vec![7; 1 << 20]).expect("written");
    let disks = ["--disk", OLD, "--disk", "/srv/disks/more.img"];
    let guest = Guest::start_with(hosts, ALPHA, "two-disks", "128M", GUEST, &disks);
    let both = ["--path", "/srv/disks/more.img=/srv/fast/more.img"];
    let taken = ["--path", "/srv/disks/more.img=/srv/disks"];
    refused(room.migrate(MAPPED, &taken), &["/srv/disks exists"]);
    hosts.exec(ALPHA, &["test", "!", "-e", NEW]).expect(0);
    room.migrate(MAPPED, &both).expect(0);
    assert_eq!(room.path(), NEW);
    let told = hosts.decamp(ALPHA, &["inspect", "two-disks", "--json"]).expect(0).json();
    assert_eq!(told["keeper"]["facts"]["disks"][1]["path"], "/srv/fast/more.img", "{told}");
    let same = ["cmp", "/srv/disks/more.img", "/srv/fast/more.img"];
    hosts.exec(ALPHA, &same).expect(0);
    room.writes_clean(ALPHA);
    drop(guest);
    drop(room.fast);
    hosts.exec(ALPHA, &["rm", "-rf", "/srv/disks", "/srv/fast"]).expect(0);
}

fn refusals() {
    let room = Room::new("stays", "64M");
    let hosts = room.hosts;
    fs::write(on(hosts, ALPHA, "/srv/disks/taken.img"), "somebody's").expect("written");
    hosts.exec(ALPHA, &["ln", OLD, "/srv/disks/again.img"]).expect(0);
    let stays = |paths: &[&str], options: &[&str], code: i32, says: &[&str]| {
        let before = Snapshot::take(hosts);
        let paths: Vec<_> = paths.iter().flat_map(|path| ["--path", path]).collect();
        let words = [&["migrate", "stays", "--to", ALPHA], &paths[..], options].concat();
        let ran = hosts.decamp(ALPHA, &words).expect(code);
        before.is_restored();
        let text = format!("{}{}", ran.stdout, ran.stderr);
        says.iter().for_each(|word| assert!(text.contains(word), "not a word of {word:?}\n{ran}"));
        room.guest.runs_clean(ALPHA);
    };
    let to = |new: &str| format!("{OLD}={new}");
    stays(&[], &[], 3, &["this very host", "--path OLD=NEW"]);
    stays(&["/srv/guest.elf=/srv/fast/k"], &[], 3, &["no disk of it", OLD]);
    stays(&["/srv/none.img=/srv/fast/k"], &[], 3, &["no disk of it", OLD]);
    stays(&[&to(OLD)], &[], 3, &["is already"]);
    stays(&[&to("/srv/disks/again.img")], &[], 3, &["is already"]);
    stays(&[&to("/srv/disks/taken.img")], &[], 3, &["nothing is overwritten"]);
    stays(&[&to("/srv/none/data.img")], &[], 3, &["There is no directory /srv/none"]);
    stays(&[&to("/var/lib/decamp/data.img")], &[], 3, &["the agent's state"]);
    stays(&[&to("/dev/data.img")], &[], 3, &["no place for files"]);
    stays(&[MAPPED, &to("/srv/fast/other.img")], &[], 3, &["two places"]);
    stays(&[MAPPED], &["--storage", "copy"], 2, &["--storage means nothing"]);
    stays(&[MAPPED], &["--mode", "stop-and-copy"], 2, &["--mode stop-and-copy means nothing"]);
    stays(&["/srv/disks/data.img"], &[], 2, &["OLD=NEW"]);
    hosts.exec(ALPHA, &["mount", "-n", "-o", "remount,ro", "/srv/fast"]).expect(0);
    stays(&[MAPPED], &[], 3, &["read-only file system"]);
    hosts.exec(ALPHA, &["mount", "-n", "-o", "remount,rw,size=256k", "/srv/fast"]).expect(0);
    stays(&[MAPPED], &[], 3, &["Not enough room", "bytes needed"]);
    assert_eq!(room.path(), OLD);
    room.writes_clean(ALPHA);
    room.end();
    let disks = ["/srv/disks/ro.img,readonly", "/srv/disks/nas.img,shared"];
    hosts.exec(ALPHA, &["mkdir", "-p", "/srv/disks"]).expect(0);
    for name in ["ro", "nas"] {
        fs::write(on(hosts, ALPHA, &format!("/srv/disks/{name}.img")), [1; 4096]).expect("written");
    }
    let disks: Vec<_> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
    let guest = Guest::start_with(hosts, ALPHA, "stays-too", "128M", "fill=16 report=50", &disks);
    for (name, says) in [("ro", "only read"), ("nas", "shared with other hosts")] {
        let path = format!("/srv/disks/{name}.img=/srv/disks/new.img");
        let words = ["migrate", "stays-too", "--to", ALPHA, "--path", &path];
        refused(hosts.decamp(ALPHA, &words), &[says]);
    }
    drop(guest);
    hosts.exec(ALPHA, &["rm", "-rf", "/srv/disks"]).expect(0);
}

/// Where it can be held, before and after the device is.
const POINTS: [&str; 5] = [
    "relocate.prepare",
    "relocate.pre-copy",
    "relocate.pause",
    "relocate.final",
    "relocate.commit",
];

fn given_up() {
    let room = Room::new("given-up", "64M");
    let hosts = room.hosts;
    for point in POINTS {
        for failure in [Failure::Cancel, Failure::Error] {
            println!("{point}: {failure}");
            arm(hosts, ALPHA, point, failure);
            let before = Snapshot::take(hosts);
            let held = hold_to(hosts, ALPHA, ALPHA, "given-up", point, &["--path", MAPPED]);
            held.inflict(failure);
            let ran = held.ended().expect(4);
            let report = ran.json();
            let outcome = if failure == Failure::Cancel { "cancelled" } else { "failed" };
            assert_eq!(report["outcome"], outcome, "{ran}");
            assert!(ran.stdout.contains("runs on at alpha"), "{ran}");
            before.is_restored();
            assert_eq!(room.path(), OLD);
            room.writes_clean(ALPHA);
        }
    }
    hosts.mend();
    room.migrate(MAPPED, &[]).expect(0);
    room.writes_clean(ALPHA);
    room.end();
}

fn no_room() {
    let room = Room::new("no-room", "8M");
    let hosts = room.hosts;
    arm(hosts, ALPHA, "relocate.pre-copy", Failure::Cancel);
    let words = ["--path", MAPPED];
    let held = hold_to(hosts, ALPHA, ALPHA, "no-room", "relocate.pre-copy", &words);
    let fill = "dd if=/dev/zero of=/srv/fast/full bs=64k 2>/dev/null; true";
    hosts.exec(ALPHA, &["sh", "-c", fill]).expect(0);
    let ran = held.ended().expect(4);
    assert!(
        ran.stdout.contains("No space left") && ran.stdout.contains("runs on at alpha"),
        "{ran}"
    );
    let listed = hosts.exec(ALPHA, &["ls", "-A", "/srv/fast"]).expect(0).stdout;
    assert_eq!(listed.trim(), "full", "something is left behind");
    assert_eq!(room.path(), OLD);
    room.writes_clean(ALPHA);
    hosts.exec(ALPHA, &["rm", "/srv/fast/full"]).expect(0);
    hosts.mend();
    room.migrate(MAPPED, &[]).expect(0);
    room.writes_clean(ALPHA);
    room.end();
}

fn agent_killed() {
    let room = Room::new("orphaned", "64M");
    let hosts = room.hosts;
    for point in POINTS {
        println!("{point}: agent killed");
        arm(hosts, ALPHA, point, Failure::KillSource);
        let before = Snapshot::take(hosts);
        let held = hold_to(hosts, ALPHA, ALPHA, "orphaned", point, &["--path", MAPPED]);
        held.inflict(Failure::KillSource);
        // Nobody is there, and it goes on with the disk that it has.
        room.writes_clean(ALPHA);
        hosts.start_agent(ALPHA, "");
        held.ended().expect(4);
        before.is_restored();
        assert_eq!(room.path(), OLD);
        room.writes_clean(ALPHA);
    }
    let words = ["--path", MAPPED, "--remove-source"];
    // The new file is not where it was made when the next agent comes: the old one is all that there is to be found.
    println!("relocate.switched: agent killed, the new file gone");
    arm(hosts, ALPHA, "relocate.switched", Failure::KillSource);
    let held = hold_to(hosts, ALPHA, ALPHA, "orphaned", "relocate.switched", &words);
    held.inflict(Failure::KillSource);
    hosts.exec(ALPHA, &["mv", NEW, "/srv/fast/elsewhere"]).expect(0);
    hosts.start_agent(ALPHA, "");
    held.ended();
    assert!(on(hosts, ALPHA, OLD).exists(), "it was all that there was");
    hosts.exec(ALPHA, &["mv", "/srv/fast/elsewhere", NEW]).expect(0);
    assert_eq!(room.path(), NEW);
    room.writes_clean(ALPHA);
    hosts.exec(ALPHA, &["rm", OLD]).expect(0);
    hosts.mend();
    room.migrate("/srv/fast/data.img=/srv/disks/data.img", &["--remove-source"]).expect(0);
    println!("relocate.switched: agent killed");
    arm(hosts, ALPHA, "relocate.switched", Failure::KillSource);
    let held = hold_to(hosts, ALPHA, ALPHA, "orphaned", "relocate.switched", &words);
    held.inflict(Failure::KillSource);
    room.writes_clean(ALPHA);
    hosts.start_agent(ALPHA, "");
    held.ended().expect(0);
    assert_eq!(room.path(), NEW);
    assert!(!on(hosts, ALPHA, OLD).exists(), "it was to be removed");
    room.writes_clean(ALPHA);
    room.end();
}

/// Nobody is left to be asked: what the keeper wrote down decides.
fn keeper_killed() {
    let room = Room::new("lost-both", "64M");
    let hosts = room.hosts;
    for (point, path) in [("relocate.commit", OLD), ("relocate.switched", NEW)] {
        println!("{point}: agent and keeper killed");
        arm(hosts, ALPHA, point, Failure::KillSource);
        let held = hold_to(hosts, ALPHA, ALPHA, "lost-both", point, &["--path", MAPPED]);
        held.inflict(Failure::KillSource);
        room.writes_clean(ALPHA);
        hosts.signal_keeper(ALPHA, "lost-both", "KILL");
        hosts.start_agent(ALPHA, "");
        held.ended();
        until("it is noted", SOON, || {
            hosts.state(ALPHA, "lost-both").as_deref() == Some("stopped")
        });
        assert_eq!(room.path(), path);
        let listed = hosts.exec(ALPHA, &["ls", "-A", "/srv/fast"]).expect(0).stdout;
        assert_eq!(listed.trim(), if path == NEW { "data.img" } else { "" });
        hosts.decamp(ALPHA, &["start", "lost-both"]).expect(0);
        assert_eq!(room.path(), path);
        room.writes_clean(ALPHA);
    }
    room.end();
}
