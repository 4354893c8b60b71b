//! Interfaces in a network namespace of their own: a bridge, a tap device on it, and a host behind a pair.

use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use decamp_shared::network::frames::gratuitous_arps;
use decamp_shared::network::{index_of, packet_socket};
use nix::net::if_::if_nameindex;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::*;
use crate::virtio::conformance::{Driver, Offer};

pub(crate) const GUEST: Mac = Mac([2, 0, 0, 0, 0, 5]);
const TX: usize = 1;
const RX: usize = 0;

/// Does `work` in a network namespace of its own, with bridge `br0` and the far end `far` of a pair that is on it.
pub(crate) fn apart(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET)
            .expect("a network namespace, for which the tests run as root");
        // Nobody speaks unasked.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").expect("no IPv6");
        ip("link add br0 type bridge");
        ip("link add near type veth peer name far");
        ip("link set near master br0");
        for name in ["br0", "near", "far"] {
            ip(&format!("link set {name} up"));
        }
        // The kernel looks at what came up when it gets to it, and the bridge drops frames until then.
        crate::testing::wait_for("the bridge to forward", || {
            let shown = Command::new("bridge").args(["link", "show", "dev", "near"]).output();
            let shown = shown.expect("bridge, of iproute2").stdout;
            String::from_utf8_lossy(&shown).contains("state forwarding")
        });
        work();
    });
    thread.join().expect("no panic");
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status().expect("ip, of iproute2");
    assert!(done.success(), "ip {arguments}");
}

fn spec(bridge: &str) -> VmSpec {
    let dir = tempfile::tempdir().expect("a directory");
    let net = vec![NetSpec { bridge: bridge.into(), mac: Some(GUEST) }];
    VmSpec { net, ..crate::testing::guest_spec(dir.path()) }
}

fn place() -> Place {
    Place { name: "web".into(), uuid: "u".into(), dir: "/var/lib/decamp/workloads/web".into() }
}

/// What comes out at the far end.
pub(crate) struct Far(File);

impl Far {
    pub(crate) fn listen() -> Self {
        const ALL: u16 = 3;
        let socket = packet_socket(index_of("far").expect("far"), ALL).expect("a socket");
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20)).expect("a time");
        Self(socket.into())
    }

    /// The frames from `mac` within `time`, with when they came.
    pub(crate) fn heard(&mut self, mac: Mac, time: Duration) -> Vec<(Duration, Vec<u8>)> {
        self.hear(mac, time, |_| false)
    }

    /// The frames from `mac` until they are so many bytes, or more time than any machine needs has passed.
    pub(crate) fn hear_bytes(&mut self, mac: Mac, bytes: usize) -> Vec<(Duration, Vec<u8>)> {
        let length = |found: &[(Duration, Vec<u8>)]| -> usize {
            found.iter().map(|(_, frame)| frame.len()).sum()
        };
        self.hear(mac, crate::testing::PATIENCE, |found| length(found) >= bytes)
    }

    /// The first so many frames from `mac`.
    fn hear_frames(&mut self, mac: Mac, count: usize) -> Vec<(Duration, Vec<u8>)> {
        self.hear(mac, crate::testing::PATIENCE, |found| found.len() >= count)
    }

    fn hear(
        &mut self,
        mac: Mac,
        time: Duration,
        enough: impl Fn(&[(Duration, Vec<u8>)]) -> bool,
    ) -> Vec<(Duration, Vec<u8>)> {
        let begun = Instant::now();
        let mut found = Vec::new();
        let mut frame = vec![0; 1 << 16];
        while begun.elapsed() < time && !enough(&found) {
            let Ok(length) = self.0.read(&mut frame) else { continue };
            if frame[6..12] == mac.0 {
                found.push((begun.elapsed(), frame[..length].to_vec()));
            }
        }
        found
    }
}

/// Somebody who sleeps for short times, and notes how late the machine wakes him at worst.
struct Metronome {
    done: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Duration>,
}

impl Metronome {
    fn start() -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let stop = done.clone();
        let thread = std::thread::spawn(move || {
            const BEAT: Duration = Duration::from_millis(5);
            let mut late = Duration::ZERO;
            while !stop.load(Ordering::SeqCst) {
                let begun = Instant::now();
                std::thread::sleep(BEAT);
                late = late.max(begun.elapsed().saturating_sub(BEAT));
            }
            late
        });
        Self { done, thread }
    }

    fn end(self) -> Duration {
        self.done.store(true, Ordering::SeqCst);
        self.thread.join().expect("no panic")
    }
}

/// A guest's driver of the interface.
fn driver(mut devices: Vec<Named>) -> Driver {
    let driver = Driver::of(devices.remove(0).device);
    driver.start_with_all();
    driver
}

fn send(driver: &Driver, frame: &[u8]) {
    let bytes = [&[0; HEADER][..], frame].concat();
    assert!(driver.request(TX, &[&bytes], 0).is_empty());
}

#[test]
fn a_device_that_nobody_holds_any_more_is_no_hindrance() {
    apart(|| {
        let made = Command::new("ip").args(["tuntap", "add", "dvleft", "mode", "tap"]).status();
        assert!(made.expect("ip, of iproute2").success());
        let ours = make_tap("dvleft", HEADER, UNSENT).expect("made anew");
        let error = make_tap("dvleft", HEADER, UNSENT).expect_err("somebody holds it");
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
        drop(ours);
        index_of("dvleft").expect_err("it does not stay");
    });
}

#[test]
fn frames_pass_while_it_is_on_the_network() {
    apart(|| {
        let (mut interfaces, devices) =
            Interfaces::make(&spec("br0"), &place(), true).expect("made");
        let tap = interfaces.facts()[0].tap.clone();
        let link = Link::find(&tap).expect("the tap device");
        assert_eq!((link.mac, link.mtu), (Some(GUEST.of_hosts_end()), 1500));
        assert_eq!(link.master, Link::bridge("br0").map(|bridge| bridge.index));
        interfaces.ports()[0].await_carrier().expect("it comes up");
        let driver = driver(devices);
        let offers: Vec<_> = (0..16).map(|_| driver.offer(RX, &[], &[2000])).collect();
        driver.kick(RX);
        let mut far = Far::listen();
        let [arp, _] = gratuitous_arps(GUEST, Ipv4Addr::new(10, 9, 0, 5));
        send(&driver, &arp);
        assert_eq!(far.hear_bytes(GUEST, 1).len(), 1);
        let facts = interfaces.facts();
        assert_eq!(facts[0].own[0].address, IpAddr::from([10, 9, 0, 5]));
        assert_eq!(facts[0].mtu, 1500);
        interfaces.disconnect().expect("off");
        send(&driver, &arp);
        assert!(far.heard(GUEST, Duration::from_millis(100)).is_empty(), "it is off the network");
        interfaces.connect().expect("on");
        send(&driver, &arp);
        assert_eq!(far.hear_bytes(GUEST, 1).len(), 1);
        is_asked_for(&driver, &offers);
        drop((interfaces, driver));
        gone(|| Link::find(&tap).is_err());
    });
}

/// Waits for a tap device to have gone with who had it. A program that another test starts at that moment has its
/// descriptor as well, until it is that program.
fn gone(is_gone: impl FnMut() -> bool) {
    crate::testing::wait_for("the tap device to go", is_gone);
}

/// The far end asks for the guest's address, and the guest hears it among what else comes.
fn is_asked_for(driver: &Driver, offers: &[Offer]) {
    ip("address add 10.9.0.1/24 dev far");
    let socket = UdpSocket::bind("10.9.0.1:0").expect("a socket");
    socket.send_to(b"are you there?", "10.9.0.5:9").expect("sent");
    let is_question = |frame: &[u8]| {
        frame[12..18] == [0xff; 6] && frame[24..26] == [8, 6] && frame[50..54] == [10, 9, 0, 5]
    };
    let mut heard = offers.iter().map(|offer| {
        let (head, length) = driver.take(RX);
        assert_eq!(head, offer.head);
        driver.written(offer, length)
    });
    assert!(heard.any(|frame| is_question(&frame)));
}

#[test]
fn who_comes_is_silent_until_he_is_there_and_then_announced_in_rounds() {
    apart(|| {
        let (mut interfaces, devices) =
            Interfaces::make(&spec("br0"), &place(), false).expect("made");
        let driver = driver(devices);
        let mut far = Far::listen();
        let [arp, _] = gratuitous_arps(GUEST, Ipv4Addr::new(10, 9, 0, 5));
        send(&driver, &arp);
        assert!(far.heard(GUEST, Duration::from_millis(100)).is_empty());
        interfaces.connect().expect("on");
        interfaces.announce();
        let metronome = Metronome::start();
        let mut heard = far.hear_frames(GUEST, 18);
        let late = metronome.end();
        // After the last round of all there is no other.
        heard.extend(far.heard(GUEST, Duration::from_millis(700)));
        let of = |kind: [u8; 2]| -> Vec<Duration> {
            let is_kind = |(_, frame): &&(Duration, Vec<u8>)| frame[12..14] == kind;
            heard.iter().filter(is_kind).map(|(when, _)| *when).collect()
        };
        let reverse = of([0x80, 0x35]);
        assert_eq!((reverse.len(), of([8, 6]).len()), (6, 12), "{heard:?}");
        let apart: Vec<_> = reverse.windows(2).map(|two| two[1] - two[0]).collect();
        for (got, wanted) in apart.iter().zip([50, 150, 250, 350, 450]) {
            // No earlier, but for what a frame was late the time before; and no later than who sleeps as long here is.
            let wanted = Duration::from_millis(wanted);
            let least = wanted.saturating_sub(Duration::from_millis(20) + late);
            let most = wanted + Duration::from_millis(200) + 3 * late;
            assert!((least..most).contains(got), "{apart:?}, where others were {late:?} late");
        }
    });
}

#[test]
fn what_cannot_be_leaves_nothing_behind() {
    apart(|| {
        let names = || if_nameindex().expect("names").iter().count();
        let before = names();
        let error = Interfaces::make(&spec("br9"), &place(), true).expect_err("no bridge");
        assert_eq!(error.to_string(), "There is no bridge br9");
        assert!(Interfaces::make(&spec("far"), &place(), true).is_err(), "it is no bridge");
        let mut two = spec("br0");
        two.net.push(NetSpec { bridge: "br9".into(), mac: None });
        assert!(Interfaces::make(&two, &place(), true).is_err());
        gone(|| names() == before);
        // The same VM twice.
        let (_held, _devices) = Interfaces::make(&spec("br0"), &place(), true).expect("made");
        let error = Interfaces::make(&spec("br0"), &place(), true).expect_err("it is there");
        assert!(error.to_string().contains("make the tap device"), "{error}");
    });
}

#[test]
fn a_tap_device_that_somebody_removes_takes_the_link_down() {
    apart(|| {
        let (interfaces, devices) = Interfaces::make(&spec("br0"), &place(), true).expect("made");
        let driver = driver(devices);
        (0..16).for_each(|_| drop(driver.offer(RX, &[], &[2000])));
        driver.kick(RX);
        ip(&format!("link delete {}", interfaces.facts()[0].tap));
        crate::testing::wait_for("the link to go down", || driver.config(6, 2)[0] & 1 == 0);
        assert!(!driver.needs_reset());
    });
}

#[test]
fn large_segments_come_and_go_whole() {
    apart(|| {
        let (interfaces, devices) = Interfaces::make(&spec("br0"), &place(), true).expect("made");
        interfaces.ports()[0].await_carrier().expect("it comes up");
        let driver = driver(devices);
        // TCP over IPv4 with 20000 bytes, which somebody on the way cuts into pieces of 1448, or nobody.
        let mut frame = [&[0xff; 6][..], &GUEST.0, &[8, 0]].concat();
        frame.extend([
            0x45, 0, 0x4e, 0x48, 0, 0, 0x40, 0, 64, 6, 0xd8, 0x98, 10, 9, 0, 5, 10, 9, 0, 1,
        ]);
        frame.extend([0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
        frame.resize(54 + 20_000, 7);
        // Checksum wanted (1), TCPv4 (1), headers, size of a segment, where the checksum begins and goes.
        let header = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
        let mut far = Far::listen();
        assert!(driver.request(TX, &[&header, &frame], 0).is_empty());
        // In one piece, as nobody here cuts it; then nothing more of it comes.
        let mut heard = far.hear_bytes(GUEST, 20_054);
        heard.extend(far.heard(GUEST, Duration::from_millis(50)));
        let bytes: usize = heard.iter().map(|(_, frame)| frame.len() - 54).sum();
        assert_eq!(bytes, 20_000, "{} frames", heard.len());
        // And a header that is nonsense is a lost frame.
        assert!(driver.request(TX, &[&[0xff; HEADER], &frame], 0).is_empty());
        assert!(!driver.needs_reset());
    });
}
