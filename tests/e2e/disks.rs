//! Disks of virtual machines: copied while their guest runs, or used by both hosts, one after the other. The test
//! guest writes its disk where it is told to; in most of these tests it does not, so that contents can be compared.
//! Disks that move alone are in `relocation`.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::failures::{Failure, arm};
use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, Hosts, hosts};
use crate::refusals::refused;
use crate::running::until;
use crate::snapshot::Snapshot;
use crate::{Needs, Test};

/// Something is taken away within this.
const SOON: Duration = Duration::from_secs(120);
/// A disk that ends within a page, of which a part holds anything.
const BYTES: u64 = (64 << 20) + 1536;
/// What the guest does beside.
const GUEST: &str = "fill=16 hot=2 report=50";

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("disks::copied_there_and_back", Needs::Kvm, copied),
        Test::new("disks::shared_changes_hands", Needs::Kvm, shared),
        Test::new("disks::a_guest_that_spoils_its_ring_loses_its_disk_alone", Needs::Kvm, spoiled),
        Test::new("disks::refused_before_anything_is_touched", Needs::Kvm, refusals),
    ]
}

fn make(path: &Path) -> Vec<u8> {
    let file = File::create(path).expect("made");
    file.set_len(BYTES).expect("sized");
    for at in [0u64, 3 << 20, 40 << 20, (64 << 20) - 4096] {
        let noise: Vec<u8> =
            (0..300_000u64).map(|n| (((n + at) * 2_654_435_761) >> 13) as u8).collect();
        let length = noise.len().min((BYTES - at) as usize);
        file.write_all_at(&noise[..length], at).expect("written");
    }
    fs::read(path).expect("read")
}

fn start(hosts: &'static Hosts, name: &'static str, disks: &[&str]) -> Guest {
    let disks: Vec<_> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
    Guest::start_with(hosts, ALPHA, name, "128M", GUEST, &disks)
}

/// A file of a host, as seen from outside.
fn on(hosts: &Hosts, host: &str, path: &str) -> PathBuf {
    hosts.path(host, path.trim_start_matches('/'))
}

fn clear(hosts: &Hosts) {
    for host in [ALPHA, BETA] {
        hosts.exec(host, &["sh", "-c", "rm -rf /srv/disks /srv/elsewhere"]).expect(0);
    }
    hosts.exec(ALPHA, &["mkdir", "-p", "/srv/disks"]).expect(0);
}

fn copied() {
    let hosts = hosts();
    hosts.mend();
    clear(hosts);
    let here = on(hosts, ALPHA, "/srv/disks/data.img");
    let there = on(hosts, BETA, "/srv/disks/data.img");
    let content = make(&here);
    let iso = on(hosts, ALPHA, "/srv/disks/iso.img");
    fs::write(&iso, vec![5; 1 << 20]).expect("written");
    let guest = start(hosts, "disked", &["/srv/disks/data.img", "/srv/disks/iso.img,readonly"]);
    let move_to = |from: &str, to: &str, options: &[&str]| {
        let words = ["migrate", "disked", "--to", to, "--storage", "copy"];
        hosts.decamp(from, &[&words[..], options].concat())
    };
    // What fails leaves nothing there.
    for point in ["destination.prepare", "destination.load", "destination.activate"] {
        arm(hosts, ALPHA, point, Failure::Error);
        move_to(ALPHA, BETA, &[]).expect(4);
        hosts.mend();
        guest.runs_clean(ALPHA);
        until("what came is gone", SOON, || !on(hosts, BETA, "/srv/disks").exists());
    }
    let ran = move_to(ALPHA, BETA, &["--json"]).expect(0);
    let report = ran.json();
    assert_eq!(report["memory_bytes"], 128 << 20, "a disk is no memory: {ran}");
    guest.runs_clean(BETA);
    assert!(fs::read(&there).expect("read") == content, "the copy differs");
    let found = fs::metadata(&there).expect("there");
    assert!(found.blocks() * 512 < 4 << 20, "it is not sparse: {} blocks", found.blocks());
    assert_eq!(fs::read(on(hosts, BETA, "/srv/disks/iso.img")).expect("read"), vec![5; 1 << 20]);
    // Back onto its own earlier copy, which nobody has had meanwhile.
    fs::write(&here, b"what the earlier copy held").expect("written");
    move_to(BETA, ALPHA, &["--remove-source"]).expect(0);
    assert!(fs::read(&here).expect("read") == content, "the copy differs");
    assert!(!there.exists(), "the source's copy is still there");
    let mapped = "/srv/disks=/srv/elsewhere/of/it";
    move_to(ALPHA, BETA, &["--path", mapped]).expect(0);
    let elsewhere = on(hosts, BETA, "/srv/elsewhere/of/it/data.img");
    assert!(fs::read(&elsewhere).expect("read") == content, "the copy differs");
    // It has its lock there.
    let words = ["run", "vm", "other", "--kernel", "/srv/guest.elf", "--disk"];
    let ran = hosts.decamp(BETA, &[&words[..], &["/srv/elsewhere/of/it/data.img"]].concat());
    refused(ran, &["locked by VM disked"]);
    guest.verify(BETA);
    drop(guest);
    clear(hosts);
}

fn shared() {
    let hosts = hosts();
    hosts.mend();
    let path = hosts.shared().join("shared.img");
    let content = make(&path);
    let disk = path.display().to_string();
    let guest = start(hosts, "sharing-disk", &[&disk]);
    let words = ["migrate", "sharing-disk", "--to", BETA];
    let copy = hosts.decamp(ALPHA, &[&words[..], &["--storage", "copy"]].concat());
    refused(copy, &["very same place", "=shared"]);
    for point in ["destination.load", "destination.activate"] {
        arm(hosts, ALPHA, point, Failure::Error);
        hosts.decamp(ALPHA, &[&words[..], &["--storage", "shared"]].concat()).expect(4);
        hosts.mend();
        guest.runs_clean(ALPHA);
    }
    // It has its lock again.
    let run = ["run", "vm", "other", "--kernel", "/srv/guest.elf", "--disk", &disk];
    refused(hosts.decamp(ALPHA, &run), &["locked by VM sharing-disk"]);
    // Recognised without a word, and never removed.
    hosts.decamp(ALPHA, &[&words[..], &["--remove-source"]].concat()).expect(0);
    guest.runs_clean(BETA);
    // The image that other tests boot from was a file of this one's.
    let image = "/srv/guest.elf";
    fs::copy(on(hosts, BETA, image), on(hosts, ALPHA, image)).expect("copied");
    // From here nobody sees who it is.
    refused(hosts.decamp(ALPHA, &run), &["it is locked by another process"]);
    assert!(fs::read(&path).expect("read") == content, "it differs");
    guest.verify(BETA);
    drop(guest);
    assert!(path.exists(), "what was shared is gone");
    fs::remove_file(&path).expect("removed");
}

/// Each way of spoiling a ring ends the device, and only that: the guest runs on, moves as it is, and has its disk
/// again where it arrives, once it resets the device.
fn spoiled() {
    let hosts = hosts();
    hosts.mend();
    clear(hosts);
    let path = "/srv/disks/spoiled.img";
    File::create(on(hosts, ALPHA, path)).and_then(|file| file.set_len(8 << 20)).expect("made");
    let options = format!("{GUEST} disk=4");
    let guest = Guest::start_with(hosts, ALPHA, "spoiler", "128M", &options, &["--disk", path]);
    let (mut here, mut there) = (ALPHA, BETA);
    for way in ["loop", "outside", "index", "head"] {
        guest.tell(here, b's');
        let broken = format!("disk spoiled={way} needs_reset");
        guest.says(here, &broken);
        guest.runs_clean(here);
        let words = ["migrate", "spoiler", "--to", there, "--storage", "copy"];
        hosts.decamp(here, &words).expect(0);
        guest.says(there, &broken);
        guest.runs_clean(there);
        guest.tell(there, b'm');
        until("its disk to go on", SOON, || {
            let mark = guest.log(there).len();
            guest.runs_clean(there);
            let news = guest.log(there).split_off(mark);
            let done: BTreeSet<_> =
                news.lines().filter(|line| line.starts_with("disk passes=")).collect();
            done.len() > 1 && !news.contains("spoiled")
        });
        (here, there) = (there, here);
    }
    guest.verify(here);
    drop(guest);
    clear(hosts);
}

fn refusals() {
    let hosts = hosts();
    hosts.mend();
    clear(hosts);
    make(&on(hosts, ALPHA, "/srv/disks/data.img"));
    fs::write(on(hosts, ALPHA, "/srv/disks/odd.img"), vec![1; 1000]).expect("written");
    hosts.exec(ALPHA, &["ln", "/srv/disks/data.img", "/srv/disks/again.img"]).expect(0);
    let run = |disks: &[&str]| {
        let words = ["run", "vm", "wrong", "--kernel", "/srv/guest.elf"];
        let disks: Vec<_> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
        hosts.decamp(ALPHA, &[&words[..], &disks[..]].concat())
    };
    refused(run(&["/srv/disks/none.img"]), &["/srv/disks/none.img", "No such file"]);
    refused(run(&["/srv/disks/odd.img"]), &["1000 bytes is not a multiple of 512"]);
    refused(run(&["/srv/disks"]), &["neither a file nor a block device"]);
    refused(run(&["/srv/disks/data.img", "/srv/disks/again.img"]), &["the same as"]);
    run(&["/srv/disks/data.img,writeonly"]).expect(2);
    let guest = start(hosts, "refusing", &["/srv/disks/data.img"]);
    let stays = |options: &[&str], says: &[&str]| {
        let before = Snapshot::take(hosts);
        let words = [&["migrate", "refusing", "--to", BETA], options].concat();
        let ran = hosts.decamp(ALPHA, &words);
        before.is_restored();
        refused(ran, says);
        guest.runs_clean(ALPHA);
    };
    stays(&[], &["--storage /srv/disks/data.img=copy"]);
    stays(&["--storage", "shared"], &["not seen to be the same storage"]);
    hosts.exec(BETA, &["mkdir", "-p", "/srv/disks"]).expect(0);
    hosts.exec(BETA, &["sh", "-c", "echo theirs >/srv/disks/data.img"]).expect(0);
    stays(&["--storage", "copy"], &["/srv/disks/data.img exists", "--path"]);
    hosts.exec(BETA, &["rm", "-r", "/srv/disks"]).expect(0);
    let disk = hosts.small_disk(BETA, "/srv", "600k");
    stays(&["--storage", "copy"], &["Not enough room", "bytes needed"]);
    drop(disk);
    let output = ["checkpoint", "refusing", "--output", "/tmp/refusing.tar.zst"];
    refused(hosts.decamp(ALPHA, &output), &["Disks do not go into a checkpoint"]);
    let file = File::options().write(true).open(on(hosts, ALPHA, "/srv/disks/data.img"));
    let file = file.expect("opened");
    for (length, how) in [(BYTES - 512, "cut"), (BYTES + 512, "grown")] {
        file.set_len(length).expect(how);
        let lengths = [BYTES, length].map(|bytes| bytes.to_string());
        stays(&["--storage", "copy"], &["changed its size", &lengths[0], &lengths[1]]);
        file.set_len(BYTES).expect("as it was");
    }
    guest.verify(ALPHA);
    drop(guest);
    clear(hosts);
}
