//! The room against the kernel, each test in a network namespace of its own: a bridge `br0`, and a host behind the
//! pair that leads from it to a second namespace.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};

use super::need::{mapped, need, refusals};
use super::*;
use crate::protocol::manifest::{NetworkNeed, Refusal, VlanUse};

/// More time than anything that is awaited takes, on however slow and busy a machine.
const PATIENCE: Duration = Duration::from_secs(120);
const HOST: Mac = Mac([2, 0, 0, 0, 0, 0x11]);
const OTHER: Mac = Mac([2, 0, 0, 0, 0, 0x12]);

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Does `work` on a thread in such a namespace.
fn apart(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        let enter = || unshare(CloneFlags::CLONE_NEWNET).expect("the tests run as root");
        enter();
        let behind = File::open("/proc/thread-self/ns/net").expect("the host's namespace");
        enter();
        ip("link add br0 type bridge");
        ip("link set br0 up");
        let number = std::os::fd::AsRawFd::as_raw_fd(&behind);
        let path = format!("/proc/{}/fd/{number}", std::process::id());
        ip(&format!("link add near type veth peer name far address {HOST} netns {path}"));
        ip("link set near master br0 up");
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&behind, CloneFlags::CLONE_NEWNET).expect("entered");
                ip("link set far up");
                ip("address add 10.9.0.1/24 dev far");
                ip("address add fd09::1/64 dev far nodad");
            });
            inside.join().expect("the host is there");
        });
        await_forwarding("near");
        work();
    });
    thread.join().expect("no panic");
}

/// The kernel looks at what came up when it gets to it, and the bridge drops frames of the port until then.
fn await_forwarding(port: &str) {
    let begun = Instant::now();
    loop {
        let shown = Command::new("bridge").args(["link", "show", "dev", port]).output();
        let shown = shown.expect("bridge, of iproute2").stdout;
        if String::from_utf8_lossy(&shown).contains("state forwarding") {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{port} is not let to speak");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output().expect("ip, of iproute2");
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

fn asks_for(neighbours: &[(&str, Mac)]) -> NetworkNeed {
    let named =
        neighbours.iter().map(|(text, mac)| Neighbour { address: address(text), mac: *mac });
    let mut wanted = need("br0", "near", None, named);
    // What this host knows by itself is not the subject.
    wanted.neighbours.truncate(neighbours.len());
    wanted
}

fn texts(refusals: Vec<Refusal>) -> Vec<String> {
    refusals.into_iter().map(|refusal| refusal.text).collect()
}

fn checked(need: NetworkNeed) -> Vec<String> {
    texts(refusals(&[need], [], &BTreeMap::new()))
}

#[test]
fn the_kernel_tells_of_links_and_bridges() {
    apart(|| {
        let bridge = Link::bridge("br0").expect("a bridge");
        assert!(bridge.is_up && bridge.mtu == 1500 && bridge.master.is_none());
        let port = Link::find("near").expect("a port");
        assert_eq!((port.master, port.bridge), (Some(bridge.index), None));
        assert_eq!(index_of("near").expect("it"), port.index);
        assert!(Link::bridge("near").is_none() && Link::bridge("br9").is_none());
        let error = Link::find("br9").expect_err("there is none").to_string();
        assert_eq!(error, "Could not find the interface br9");
        ip("address add 10.9.0.7/24 dev br0");
        assert!(bridge.addresses().contains(&address("10.9.0.7")));
        assert!(!port.addresses().contains(&address("10.9.0.7")));
        let known = Neighbour { address: address("10.9.0.1"), mac: HOST };
        assert!(!bridge.neighbours().contains(&known), "nobody has asked for it yet");
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
        socket.send_to(b"are you there?", "10.9.0.1:9").expect("sent");
        let begun = Instant::now();
        while !bridge.neighbours().contains(&known) {
            assert!(begun.elapsed() < PATIENCE, "{:?}", bridge.neighbours());
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(port.neighbours(), []);
    });
}

#[test]
fn a_port_is_taken_off_and_put_back() {
    apart(|| {
        let reaches = || checked(asks_for(&[("10.9.0.1", HOST)])).is_empty();
        let mut port = Port::find("near").expect("a port");
        port.await_carrier().expect("it is up");
        assert!(reaches());
        port.disconnect().expect("off");
        port.disconnect().expect("still off");
        assert!(!reaches());
        port.connect().expect("on");
        assert!(reaches());
        // A bridge that decides by itself lets nobody.
        ip("link set br0 type bridge stp_state 1");
        port.disconnect().expect("off, by taking it down");
        assert!(!Link::find("near").expect("it").is_up);
        ip("link set br0 type bridge stp_state 0");
        port.reconnect().expect("on");
        assert!(Link::find("near").expect("it").is_up);
        assert!(Port::find("none").is_err());
        assert!(Port::numbered("lo", 1).disable().is_err(), "it is no port");
    });
}

#[test]
fn who_is_behind_a_bridge_answers() {
    apart(|| {
        for neighbours in [
            &[("10.9.0.1", HOST)][..],
            &[("fd09::1", HOST)],
            &[("10.9.0.2", OTHER), ("10.9.0.1", HOST)],
            &[],
        ] {
            // Who is not answered is asked for a second. A busy machine may be as slow once, and not each time.
            let ask = |_| {
                let begun = Instant::now();
                assert_eq!(checked(asks_for(neighbours)), Vec::<String>::new());
                begun.elapsed()
            };
            let quick = (0..10).map(ask).find(|took| *took < Duration::from_millis(800));
            assert!(quick.is_some(), "{neighbours:?} are asked for as if nobody answered");
        }
        // Itself it cannot ask.
        ip("address add 10.9.0.7/24 dev br0");
        let own = Link::bridge("br0").and_then(|bridge| bridge.mac).expect("an address");
        assert_eq!(checked(asks_for(&[("10.9.0.7", own)])), Vec::<String>::new());
    });
}

#[test]
fn a_bridge_that_leads_elsewhere_is_refused_with_all_that_was_asked() {
    apart(|| {
        let said = checked(asks_for(&[("10.9.0.8", OTHER), ("fd09::8", OTHER)]));
        assert_eq!(said.len(), 1, "{said:?}");
        for word in ["br0 does not lead", "10.9.0.8, fd09::8", need::OVERRIDE] {
            assert!(said[0].contains(word), "{said:?}");
        }
        // The same address on another segment is somebody else.
        let said = checked(asks_for(&[("10.9.0.1", OTHER)]));
        assert!(said[0].contains(&format!("10.9.0.1 is {HOST} there")), "{said:?}");
        let mut nonsense = asks_for(&[("10.9.0.1", HOST)]);
        nonsense.neighbours[0].address.push(0);
        assert!(checked(nonsense)[0].contains("in the manifest is none"));
    });
}

#[test]
fn every_bridge_is_looked_at_where_it_is_here() {
    apart(|| {
        ip("link set br0 mtu 1400");
        let map = BTreeMap::from([("vmbr3".to_owned(), "br0".to_owned())]);
        assert_eq!((mapped("vmbr3", &map), mapped("br1", &map)), ("br0", "br1"));
        let wanted = NetworkNeed { bridge: "vmbr3".into(), mtu: 1500, ..NetworkNeed::default() };
        let said = texts(refusals(std::slice::from_ref(&wanted), ["vmbr3", "br9"], &map));
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].contains("br0") && said[0].contains("1400") && said[0].contains("1500"));
        assert_eq!(said[1], "There is no bridge br9: make it with ip link add br9 type bridge");
        ip("link set br0 mtu 1500");
        assert_eq!(texts(refusals(&[wanted], [], &map)), Vec::<String>::new());
    });
}

#[test]
fn a_source_says_what_it_sees() {
    apart(|| {
        let itself = Neighbour { address: address("10.9.0.5"), mac: OTHER };
        ip("link set near mtu 1300");
        let said = need("br0", "near", None, [itself, itself]);
        assert_eq!((said.bridge.as_str(), said.mtu), ("br0", 1300));
        assert_eq!((said.vlans(), said.vlan), (VlanUse::Plain, 0));
        assert_eq!(said.neighbours.len(), 1);
        assert_eq!(need("br0", "near", Some(900), []).mtu, 900);
        let lost = need("br9", "none", None, []);
        assert_eq!((lost.mtu, lost.vlans()), (0, VlanUse::Unsaid));
        let many = (1..40).map(|last| Neighbour { address: [10, 9, 0, last].into(), mac: OTHER });
        assert_eq!(need("br0", "near", None, many).neighbours.len(), 8);
    });
}
