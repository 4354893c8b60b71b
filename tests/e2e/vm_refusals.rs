//! What no virtual machine can be made of, or moved with: refused with every reason at once, and nothing is touched.
//! Disks are in `disks`, bridges that lead elsewhere in `nets`, CPUs in `cpu`.

use std::fs;
use std::time::Duration;

use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, Hosts, hosts};
use crate::refusals::refused;
use crate::running::until;
use crate::snapshot::Snapshot;
use crate::{Needs, Test};

/// Something is seen within this.
const SOON: Duration = Duration::from_secs(10);

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("refusals::files_that_do_not_boot", Needs::Kvm, files),
        Test::new("refusals::more_vcpus_than_there", Needs::Kvm, vcpus),
        Test::new("refusals::monitor_killed", Needs::Kvm, monitor_killed),
        Test::new("refusals::bridge_gone_here", Needs::Kvm, bridge_gone_here),
        Test::new("refusals::bridge_gone_there", Needs::Kvm, bridge_gone_there),
    ]
}

/// Tries to start one, and finds that nothing came of it.
#[track_caller]
fn no_machine(hosts: &'static Hosts, words: &[&str], says: &[&str]) {
    let before = Snapshot::take(hosts);
    let ran = hosts.decamp(ALPHA, &[&["run", "vm", "odd"], words].concat());
    before.is_restored();
    refused(ran, says);
    assert_eq!(hosts.state(ALPHA, "odd"), None);
}

fn files() {
    let hosts = hosts();
    hosts.mend();
    let here = |name: &str| hosts.path(ALPHA, &format!("srv/{name}"));
    let whole = fs::read(here("guest.elf")).expect("the guest");
    fs::write(here("cut.elf"), &whole[..whole.len() / 2]).expect("written");
    fs::write(here("text"), "no kernel\n").expect("written");
    fs::write(here("empty"), "").expect("written");
    fs::write(here("large"), vec![1; 9 << 20]).expect("written");
    // An entry with a name and a content of 16 bytes, of which nothing came.
    let entry = format!("070701{}", "00000010".repeat(13));
    fs::write(here("cut.cpio"), entry).expect("written");
    fs::write(here("vast.elf"), vast(whole)).expect("written");
    let (good, cut, text) = ("/srv/guest.elf", "/srv/cut.elf", "/srv/text");
    let vast = "/srv/vast.elf";
    no_machine(hosts, &["--kernel", cut], &["/srv/cut.elf cannot be booted: it is cut off"]);
    no_machine(hosts, &["--kernel", vast, "--memory", "64M"], &[vast, "it needs memory"]);
    for (initrd, says) in [
        ("/srv/none", "/srv/none cannot be booted: it cannot be opened"),
        ("/srv/empty", "/srv/empty cannot be booted: it is empty"),
        ("/srv/large", "/srv/large cannot be booted: its 9437184 bytes do not fit"),
        ("/srv", "/srv cannot be booted: it is no regular file"),
        ("/srv/cut.cpio", "/srv/cut.cpio cannot be booted: it is cut off: its archive has no end"),
    ] {
        let words = ["--kernel", good, "--memory", "8M", "--initrd", initrd];
        no_machine(hosts, &words, &[says]);
    }
    // All of it at once, with what this host does not have.
    let words = ["--kernel", text, "--initrd", "/srv/none", "--memory", "3000G", "--cpus", "254"];
    let more = ["--disk", "/srv/none.img", "--net", "bridge=br9"];
    no_machine(
        hosts,
        &[&words[..], &more].concat(),
        &[
            "/srv/text cannot be booted: it is neither",
            "/srv/none cannot be booted",
            "needs 3072000 MiB of memory",
            "has 254 vCPUs",
            "/srv/none.img",
            "no bridge br9",
        ],
    );
    for name in ["cut.elf", "vast.elf", "text", "empty", "large", "cut.cpio"] {
        fs::remove_file(here(name)).expect("ours");
    }
}

/// The same program with a gigabyte of its own memory (ELF-64: where program headers begin, and in the first one the
/// size in memory).
fn vast(mut elf: Vec<u8>) -> Vec<u8> {
    let headers: [u8; 8] = elf[32..40].try_into().expect("eight bytes");
    let size = u64::from_le_bytes(headers) as usize + 40;
    elf[size..size + 8].copy_from_slice(&(1u64 << 30).to_le_bytes());
    elf
}

/// Beta believes that it has one processor.
fn vcpus() {
    let hosts = hosts();
    hosts.mend();
    let more = ["--cpus", "2"];
    let guest = Guest::start_with(hosts, ALPHA, "twofold", "64M", "fill=8 hot=1 report=50", &more);
    fs::write(hosts.path(BETA, "conf/online"), "0\n").expect("written");
    let online = "/sys/devices/system/cpu/online";
    let before = Snapshot::take(hosts);
    hosts.exec(BETA, &["mount", "-n", "--bind", "/run/decamp-host/online", online]).expect(0);
    let ran = hosts.decamp(ALPHA, &["migrate", "twofold", "--to", BETA]);
    hosts.exec(BETA, &["umount", "-n", online]).expect(0);
    before.is_restored();
    refused(ran, &["The guest has 2 vCPUs, and this host has 1 processors online"]);
    guest.runs_clean(ALPHA);
}

/// The VMM of a VM has nothing that it does not need, and a monitor. Without that the guest runs on, and stays.
fn monitor_killed() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "watched", "64M", "fill=8 hot=1 report=50");
    let how = |host: &str| {
        let said = hosts.decamp(host, &["inspect", "watched", "--json"]).expect(0).json();
        said["keeper"]["facts"]["confinement"].clone()
    };
    assert_eq!(how(ALPHA)["lacks"], serde_json::json!([]), "{}", how(ALPHA));
    hosts.decamp(ALPHA, &["migrate", "watched", "--to", BETA]).expect(0);
    guest.runs_clean(BETA);
    let here = how(BETA);
    assert_eq!((&here["monitor"], &here["lacks"]), (&"runs".into(), &serde_json::json!([])));
    assert!(here["user"].as_u64().is_some_and(|user| user >= 0x7000_0000), "{here}");
    hosts.exec(BETA, &["pkill", "-KILL", "-f", "[m]onitor of VM watched"]).expect(0);
    until("it to be seen", SOON, || how(BETA)["monitor"] == "ended");
    let before = Snapshot::take(hosts);
    let ran = hosts.decamp(BETA, &["migrate", "watched", "--to", ALPHA]);
    before.is_restored();
    refused(ran, &["its keeper has ended", "stopped and started"]);
    guest.runs_clean(BETA);
    hosts.decamp(BETA, &["stop", "watched"]).expect(0);
    hosts.decamp(BETA, &["start", "watched"]).expect(0);
    hosts.decamp(BETA, &["migrate", "watched", "--to", ALPHA]).expect(0);
    guest.runs_clean(ALPHA);
}

/// Somebody removes the bridge under the guest, which runs on; when it is there again the guest moves.
fn bridge_gone_here() {
    let hosts = hosts();
    hosts.mend();
    for host in [ALPHA, BETA] {
        hosts.exec(host, &["ip", "link", "add", "br7", "type", "bridge"]).expect(0);
        hosts.exec(host, &["ip", "link", "set", "br7", "up"]).expect(0);
    }
    let options = "fill=8 hot=1 report=50";
    let net = ["--net", "bridge=br7"];
    let guest = Guest::start_with(hosts, ALPHA, "stranded", "64M", options, &net);
    let said = hosts.decamp(ALPHA, &["inspect", "stranded", "--json"]).expect(0).json();
    let tap = &said["keeper"]["facts"]["networks"][0]["tap"];
    let tap = tap.as_str().expect("a tap device").to_owned();
    let words = ["migrate", "stranded", "--to", BETA];
    let stays = |says: &[&str]| {
        let before = Snapshot::take(hosts);
        let ran = hosts.decamp(ALPHA, &words);
        before.is_restored();
        refused(ran, says);
        guest.runs_clean(ALPHA);
    };
    hosts.exec(ALPHA, &["ip", "link", "delete", "br7"]).expect(0);
    let back = format!("ip link set {tap} master br7");
    stays(&["bridge br7 is gone", &back]);
    hosts.exec(ALPHA, &["ip", "link", "add", "br7", "type", "bridge"]).expect(0);
    hosts.exec(ALPHA, &["ip", "link", "set", "br7", "up"]).expect(0);
    stays(&["was taken off bridge br7", &back]);
    hosts.exec(ALPHA, &back.split(' ').collect::<Vec<_>>()).expect(0);
    hosts.decamp(ALPHA, &words).expect(0);
    guest.runs_clean(BETA);
    // The tap device itself, for which there is no remedy while it runs.
    let said = hosts.decamp(BETA, &["inspect", "stranded", "--json"]).expect(0).json();
    let tap = said["keeper"]["facts"]["networks"][0]["tap"].as_str().expect("one").to_owned();
    hosts.exec(BETA, &["ip", "link", "delete", &tap]).expect(0);
    let ran = hosts.decamp(BETA, &["migrate", "stranded", "--to", ALPHA]);
    refused(ran, &[&format!("{tap} on bridge br7 was removed from this host")]);
    guest.runs_clean(BETA);
    drop(guest);
    for host in [ALPHA, BETA] {
        hosts.exec(host, &["ip", "link", "delete", "br7"]).expect(0);
    }
}

/// What the guest's bridge is called at the destination is not there.
fn bridge_gone_there() {
    let hosts = hosts();
    hosts.mend();
    let options = "fill=8 hot=1 report=50";
    let net = ["--net", "bridge=br0"];
    let guest = Guest::start_with(hosts, ALPHA, "stranded", "64M", options, &net);
    let changed = hosts.reconfigure(BETA, |text| format!("{text}\n[bridges]\nbr0 = \"br9\"\n"));
    let before = Snapshot::take(hosts);
    let ran = hosts.decamp(ALPHA, &["migrate", "stranded", "--to", BETA]);
    before.is_restored();
    refused(ran, &["There is no bridge br9"]);
    guest.runs_clean(ALPHA);
    drop(changed);
}
