//! A virtual machine's interfaces: on the bridge where it runs and nowhere else, announced where it is, and
//! refused where the bridge does not lead where it must. The test guest has no driver: what is heard of it is what
//! the hosts say in its name.

use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use decamp_shared::network::{index_of, packet_socket};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::Value;

use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, CLIENT, Hosts, hosts};
use crate::refusals::refused;
use crate::running::until;
use crate::snapshot::Snapshot;
use crate::{Needs, Test};

const MAC: &str = "02:00:00:00:77:21";
const MAC_BYTES: [u8; 6] = [2, 0, 0, 0, 0x77, 0x21];

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("nets::announced_where_it_is", Needs::Kvm, announced),
        Test::new("nets::back_on_the_network", Needs::Kvm, rolled_back),
        Test::new("nets::refused_by_the_bridge", Needs::Kvm, refused_by_the_bridge),
        Test::new("nets::another_bridge", Needs::Kvm, another_bridge),
    ]
}

fn start(hosts: &'static Hosts) -> Guest {
    let net = format!("bridge=br0,mac={MAC}");
    Guest::start_with(hosts, ALPHA, "netted", "128M", "fill=16 hot=1 report=50", &["--net", &net])
}

/// The tap devices on a bridge of a host, with the state of their ports.
#[track_caller]
fn taps(hosts: &'static Hosts, host: &str, bridge: &str) -> Vec<(String, String)> {
    let words = ["ip", "-json", "-details", "link", "show", "master", bridge];
    let said = hosts.exec(host, &words).expect(0).stdout;
    let said: Value = serde_json::from_str(said.trim()).unwrap_or_default();
    let links = said.as_array().cloned().unwrap_or_default();
    let tap = |link: &Value| {
        let name = link["ifname"].as_str()?.to_owned();
        let state = link.pointer("/linkinfo/info_slave_data/state")?.as_str()?.to_owned();
        name.starts_with("dv").then_some((name, state))
    };
    links.iter().filter_map(tap).collect()
}

/// Nothing of it is on the network of the host that it left, and then its tap device goes with its keeper.
#[track_caller]
fn leaves(hosts: &'static Hosts, host: &str) {
    let left = taps(hosts, host, "br0");
    assert!(left.iter().all(|(_, state)| state != "forwarding"), "{left:?}");
    until("its tap device to go", Duration::from_secs(120), || taps(hosts, host, "br0").is_empty());
}

/// Who listens among the clients for frames of the guest's.
struct Ear {
    done: Arc<AtomicBool>,
    kinds: Arc<Mutex<Vec<[u8; 2]>>>,
    listener: JoinHandle<()>,
}

impl Ear {
    #[track_caller]
    fn open() -> Self {
        const ALL: u16 = 3;
        let done = Arc::new(AtomicBool::new(false));
        let stop = done.clone();
        let kinds = Arc::<Mutex<Vec<_>>>::default();
        let noted = kinds.clone();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let listener = std::thread::spawn(move || {
            let namespace = File::open(format!("/run/netns/{CLIENT}")).expect("a namespace");
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("entered");
            let link = std::process::Command::new("ip").args(["-o", "link"]).output().expect("ip");
            let link = String::from_utf8_lossy(&link.stdout).into_owned();
            let names = link.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next());
            let name = names.rev().find(|name| *name != "lo").expect("an interface").to_owned();
            let socket = packet_socket(index_of(&name).expect("it"), ALL).expect("a socket");
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50)).expect("set");
            ready.send(()).expect("awaited");
            let mut socket = File::from(socket);
            let mut frame = [0; 2048];
            while !stop.load(Ordering::SeqCst) {
                let Ok(length) = socket.read(&mut frame) else { continue };
                if length > 14 && frame[6..12] == MAC_BYTES {
                    let mut kinds = noted.lock().unwrap_or_else(PoisonError::into_inner);
                    kinds.push([frame[12], frame[13]]);
                }
            }
        });
        is_ready.recv().expect("it listens");
        Self { done, kinds, listener }
    }

    /// How many reverse ARP frames were heard, a while after the last of so many should have been.
    #[track_caller]
    fn heard(self, wanted: usize) -> usize {
        let count = || {
            let kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
            kinds.iter().filter(|kind| **kind == [0x80, 0x35]).count()
        };
        until("announcements", Duration::from_secs(120), || count() >= wanted);
        std::thread::sleep(Duration::from_millis(1600));
        self.done.store(true, Ordering::SeqCst);
        let heard = count();
        self.listener.join().expect("it listened");
        heard
    }
}

fn announced() {
    let hosts = hosts();
    hosts.mend();
    let guest = start(hosts);
    let before = taps(hosts, ALPHA, "br0");
    assert!(before.len() == 1 && before[0].1 == "forwarding", "{before:?}");
    let ear = Ear::open();
    hosts.decamp(ALPHA, &["migrate", "netted", "--to", BETA]).expect(0);
    guest.runs_clean(BETA);
    assert_eq!(ear.heard(6), 6, "one at once and five rounds after that");
    let there = taps(hosts, BETA, "br0");
    assert!(there.len() == 1 && there[0].1 == "forwarding", "{there:?}");
    leaves(hosts, ALPHA);
    hosts.decamp(BETA, &["migrate", "netted", "--to", ALPHA]).expect(0);
    guest.runs_clean(ALPHA);
    leaves(hosts, BETA);
}

/// The destination cannot load what came: it is back on the network where it was, and says so.
fn rolled_back() {
    let hosts = hosts();
    hosts.mend();
    let guest = start(hosts);
    for point in ["destination.load", "destination.prepare"] {
        hosts.with_failpoints(BETA, &format!("{point}=1*return"));
        let before = Snapshot::take(hosts);
        let ear = Ear::open();
        let ran = hosts.decamp(ALPHA, &["migrate", "netted", "--to", BETA]);
        ran.expect(4);
        before.is_restored();
        let stood = point == "destination.load";
        let wanted = if stood { 6 } else { 0 };
        assert_eq!(ear.heard(wanted), wanted, "{point}");
        let here = taps(hosts, ALPHA, "br0");
        assert!(here.len() == 1 && here[0].1 == "forwarding", "{here:?}");
        guest.runs_clean(ALPHA);
    }
    hosts.mend();
}

fn refused_by_the_bridge() {
    let hosts = hosts();
    hosts.mend();
    let words = ["run", "vm", "netted", "--kernel", "/srv/guest.elf", "--memory", "128M", "--net"];
    let run = |net: &str| hosts.decamp(ALPHA, &[&words[..], &[net]].concat());
    let before = Snapshot::take(hosts);
    refused(run("bridge=br9"), &["no bridge br9", "ip link add br9"]);
    refused(run("bridge=br0,mac=01:00:00:00:00:01"), &["01:00:00:00:00:01", "single interface"]);
    run("mac=02:00:00:00:00:01").expect(2);
    before.is_restored();
    let guest = start(hosts);
    let before = Snapshot::take(hosts);
    let mtu = |size: &str| {
        hosts.exec(BETA, &["ip", "link", "set", "br0", "mtu", size]).expect(0);
    };
    mtu("1400");
    let ran = hosts.decamp(ALPHA, &["migrate", "netted", "--to", BETA]);
    mtu("1500");
    refused(ran, &["1400", "1500", "MTU"]);
    before.is_restored();
    guest.runs_clean(ALPHA);
}

/// Beta's configuration sends what hung on br0 to a bridge of its own, which leads nowhere.
fn another_bridge() {
    let hosts = hosts();
    hosts.mend();
    let guest = start(hosts);
    hosts.exec(BETA, &["ip", "link", "add", "br7", "type", "bridge"]).expect(0);
    hosts.exec(BETA, &["ip", "link", "set", "br7", "up"]).expect(0);
    let reconfigured =
        hosts.reconfigure(BETA, |text| format!("{text}\n[bridges]\nbr0 = \"br7\"\n"));
    let before = Snapshot::take(hosts);
    let ran = hosts.decamp(ALPHA, &["migrate", "netted", "--to", BETA]);
    before.is_restored();
    refused(ran, &["br7 does not lead to the segment", "10.77.0.2", "--no-network-check"]);
    guest.runs_clean(ALPHA);
    let words = ["migrate", "netted", "--to", BETA, "--no-network-check"];
    let ran = hosts.decamp(ALPHA, &words).expect(0);
    assert!(ran.stdout.contains("Note: "), "{ran}");
    guest.runs_clean(BETA);
    assert_eq!(taps(hosts, BETA, "br7").len(), 1);
    drop(guest);
    drop(reconfigured);
    hosts.exec(BETA, &["ip", "link", "delete", "br7"]).expect(0);
}
