//! CPUs that both hosts can offer, and guests that are held to one. Both hosts are on one machine, so what one of
//! them lacks is taken out of a baseline by hand.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, Hosts, hosts, other};
use crate::refusals::refused;
use crate::running::until;
use crate::{Needs, Test};

/// The file, as alpha sees it.
const FLEET: &str = "/srv/fleet.json";

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("cpu::a_guest_held_to_a_baseline_moves", Needs::Kvm, held),
        Test::new("cpu::a_baseline_with_less", Needs::Kvm, less),
        Test::new("cpu::what_registers_tell", Needs::Kvm, told),
        Test::new("cpu::what_is_no_baseline", Needs::Kvm, wrong),
    ]
}

/// Has alpha compute one.
#[track_caller]
fn baseline(hosts: &'static Hosts) -> PathBuf {
    hosts.exec(ALPHA, &["rm", "-f", FLEET]).expect(0);
    let ran = hosts.decamp(ALPHA, &["cpu", "baseline", "beta", "--output", FLEET]).expect(0);
    for host in [ALPHA, BETA] {
        assert!(ran.stderr.contains(&format!("{host}: loses nothing")), "{ran}");
    }
    hosts.path(ALPHA, "srv/fleet.json")
}

/// Changes register `register` of leaf 7.
fn change(path: &PathBuf, register: &str, act: impl FnOnce(u64) -> u64) {
    let mut baseline: Value =
        serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON");
    let entries = baseline["entries"].as_array_mut().expect("entries");
    let leaf = entries.iter_mut().find(|one| one["leaf"] == 7 && one["subleaf"] == 0);
    let leaf = leaf.expect("leaf 7");
    leaf[register] = act(leaf[register].as_u64().expect("a number")).into();
    fs::write(path, baseline.to_string()).expect("written");
}

const RUN: [&str; 10] = [
    "run",
    "vm",
    "pinned",
    "--kernel",
    "/srv/guest.elf",
    "--memory",
    "64M",
    "--cmdline",
    "fill=8 hot=1 report=50",
    "--cpu-baseline",
];

fn held() {
    let hosts = hosts();
    hosts.mend();
    let path = baseline(hosts);
    let file: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    assert_eq!((&file["version"], &file["hosts"]), (&2.into(), &vec![ALPHA, BETA].into()));
    refused(hosts.decamp(ALPHA, &["cpu", "baseline", "beta", "-o", FLEET]), &["exists"]);
    refused(hosts.decamp(ALPHA, &["cpu", "baseline", "gamma"]), &["Host gamma is unknown"]);
    let guest = Guest::found(hosts, "pinned");
    hosts.decamp(ALPHA, &[&RUN[..], &[FLEET]].concat()).expect(0);
    let mut from = ALPHA;
    for _ in 0..2 {
        guest.runs_clean(from);
        hosts.decamp(from, &["migrate", "pinned", "--to", other(from)]).expect(0);
        from = other(from);
    }
    guest.verify(from);
}

fn less() {
    let hosts = hosts();
    hosts.mend();
    let path = baseline(hosts);
    let mut had = 0;
    change(&path, "ebx", |ebx| {
        had = ebx & 1 << 5;
        ebx & !(1 << 5 | 1 << 16)
    });
    assert_ne!(had, 0, "this machine has no AVX2 to take away");
    let guest = Guest::found(hosts, "pinned");
    let ran = hosts.decamp(ALPHA, &[&RUN[..], &[FLEET]].concat());
    if ran.code == Some(3) {
        // A KVM without hardware virtualisation cannot keep an instruction from saying what the CPU has.
        refused(ran, &["a way to hide avx2 (CPUID 0x7.0 EBX bit 5) from a guest"]);
        return;
    }
    ran.expect(0);
    until("the guest", std::time::Duration::from_secs(120), || guest.advances(ALPHA));
    let seen = hosts.decamp(ALPHA, &["inspect", "pinned", "--json"]).expect(0).json();
    let entries = seen["keeper"]["facts"]["needs"]["cpuid"].as_array().expect("entries").clone();
    let leaf = entries.iter().find(|one| one["leaf"] == 7 && one["subleaf"] == 0).expect("leaf 7");
    assert_eq!(leaf["ebx"].as_u64().expect("a number") & (1 << 5), 0, "{leaf}");
    hosts.decamp(ALPHA, &["migrate", "pinned", "--to", "beta"]).expect(0);
    guest.runs_clean(BETA);
}

/// MSR_PLATFORM_INFO, which every KVM shows, and what it says of CPUID: that it can be made to fault.
const PLATFORM: u64 = 0xce;
const CPUID_FAULT: u64 = 1 << 31;

/// What `list` says that this register holds.
#[track_caller]
fn register(list: &Value) -> u64 {
    let list = list.as_array().unwrap_or_else(|| panic!("no registers: {list}"));
    let found = list.iter().find(|one| one["index"] == PLATFORM).expect("the register");
    let value = found["value"].as_str().and_then(|text| text.strip_prefix("0x"));
    u64::from_str_radix(value.expect("hexadecimal"), 16).expect("a number")
}

/// A guest is not told of what one of its hosts might not have, and comes back to where it was.
fn told() {
    let hosts = hosts();
    hosts.mend();
    let path = baseline(hosts);
    let mut file: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    let had = register(&file["registers"]);
    assert_ne!(had & CPUID_FAULT, 0, "this machine does not say cpuid_fault");
    let list = file["registers"].as_array_mut().expect("registers");
    let found = list.iter_mut().find(|one| one["index"] == PLATFORM).expect("it");
    found["value"] = format!("{:#x}", had & !CPUID_FAULT).into();
    fs::write(&path, file.to_string()).expect("written");
    let guest = Guest::found(hosts, "pinned");
    let run = || hosts.decamp(ALPHA, &[&RUN[..], &[FLEET]].concat());
    run().expect(0);
    let sees = |host: &'static str| {
        let said = hosts.decamp(host, &["inspect", "pinned", "--json"]).expect(0).json();
        register(&said["keeper"]["facts"]["needs"]["registers"]) & CPUID_FAULT
    };
    let mut from = ALPHA;
    for _ in 0..2 {
        guest.runs_clean(from);
        assert_eq!(sees(from), 0);
        hosts.decamp(from, &["migrate", "pinned", "--to", other(from)]).expect(0);
        from = other(from);
    }
    guest.verify(from);
    drop(guest);
    // A file of version 1 says nothing of them, and is read as ever.
    file["version"] = 1.into();
    file.as_object_mut().expect("an object").remove("registers");
    fs::write(&path, file.to_string()).expect("written");
    let guest = Guest::found(hosts, "pinned");
    run().expect(0);
    guest.runs_clean(ALPHA);
    assert_eq!(sees(ALPHA), CPUID_FAULT);
}

fn wrong() {
    let hosts = hosts();
    hosts.mend();
    let path = baseline(hosts);
    // A feature that no CPU has.
    change(&path, "ebx", |ebx| ebx | 1 << 22);
    let _guest = Guest::found(hosts, "pinned");
    let run = || hosts.decamp(ALPHA, &[&RUN[..], &[FLEET]].concat());
    refused(run(), &["cannot be held to the baseline", "CPUID 0x7.0 EBX bit 22"]);
    for text in ["", "{}", "[1]", "{\"version\": 9, \"hosts\": [], \"entries\": []}"] {
        fs::write(&path, text).expect("written");
        let ran = run().expect(2);
        assert!(ran.stderr.contains("/srv/fleet.json is no CPU baseline: "), "{ran}");
    }
    assert_eq!(hosts.state(ALPHA, "pinned"), None);
}
