//! The network device on a socket instead of a tap device.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use decamp_shared::network::frames::{gratuitous_arps, reverse_arp};
use decamp_shared::pages::PageSet;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt,
};

use super::*;
use crate::testing::{PATIENCE, wait_for};
use crate::virtio::conformance::{Driver, conforms};

const GUEST: Mac = Mac([2, 0, 0, 0, 0, 1]);
const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);
const MRG: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const TSO: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;
const CTRL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;
const RX_MODE: u64 = CTRL | 1 << VIRTIO_NET_F_CTRL_RX;
const ANNOUNCES: u64 = CTRL | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;

/// The network behind a device.
struct Wire(OwnedFd);

impl Wire {
    /// Whether there was room for the frame.
    fn send(&self, frame: &[u8]) -> bool {
        match send(self.0.as_raw_fd(), frame, MsgFlags::MSG_NOSIGNAL) {
            Ok(length) => length == frame.len(),
            Err(nix::errno::Errno::EAGAIN) => false,
            Err(error) => panic!("{error}"),
        }
    }

    fn receive(&self) -> Vec<u8> {
        let mut bytes = vec![0; LARGEST];
        let mut length = None;
        wait_for("a frame", || {
            length = recv(self.0.as_raw_fd(), &mut bytes, MsgFlags::empty()).ok();
            length.is_some()
        });
        bytes.truncate(length.expect("one came"));
        bytes
    }
}

fn net_knowing(knowledge: &Knowledge) -> (Net, Wire) {
    let kind = SockType::SeqPacket;
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags).expect("sockets");
    for end in [&ours, &theirs] {
        setsockopt(end, sockopt::SndBuf, &(256 << 10)).expect("a size");
    }
    (Net::new(Frames::socket(ours), GUEST, 1500, knowledge.clone()), Wire(theirs))
}

fn net() -> (Net, Wire) {
    net_knowing(&Knowledge::default())
}

fn started(features: u64) -> (Driver, Wire) {
    let (net, wire) = net();
    let driver = Driver::of(Box::new(net));
    driver.start(features);
    (driver, wire)
}

/// A frame with its header, of `length` bytes in all.
fn frame(to: Mac, length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes.extend([&to.0[..], &OTHER.0, &[0x88, 0xb5]].concat());
    bytes.extend((bytes.len()..length).map(|at| (at as u8).wrapping_mul(31) ^ seed));
    bytes
}

/// The same as a driver gets it, in `chains` chains.
fn counted(mut frame: Vec<u8>, chains: u16) -> Vec<u8> {
    frame[10..12].copy_from_slice(&chains.to_le_bytes());
    frame
}

#[test]
fn it_is_a_virtio_device() {
    conforms(|| {
        // The other end is open for as long as the test runs.
        let (net, wire) = net();
        std::mem::forget(wire);
        Box::new(net)
    });
}

#[test]
fn it_says_what_it_is() {
    let (driver, _wire) = started(0);
    let config = driver.config(0, 12);
    assert_eq!(config[..6], GUEST.0);
    assert_eq!(config[6..], [1, 0, 1, 0, 0xdc, 0x05]);
}

#[test]
fn a_frame_comes_in_and_its_page_is_dirty() {
    let (driver, wire) = started(0);
    let offer = driver.offer(RX, &[], &[12, 1514]);
    driver.kick(RX);
    let mut own = PageSet::new();
    driver.memory.take_own_writes(&mut own);
    let sent = frame(GUEST, 700, 1);
    assert!(wire.send(&sent));
    let (head, length) = driver.take(RX);
    assert_eq!((head, length as usize), (offer.head, sent.len()));
    assert_eq!(driver.written(&offer, length), counted(sent, 1));
    assert!(driver.interrupts());
    let mut own = PageSet::new();
    driver.memory.take_own_writes(&mut own);
    assert!(own.len() >= 2, "the frame's page and the ring's: {own:?}");
}

#[test]
fn a_large_frame_is_in_several_chains() {
    let (driver, wire) = started(MRG | TSO);
    let offers: Vec<_> = (0..60).map(|_| driver.offer(RX, &[], &[1000, 526])).collect();
    driver.kick(RX);
    for length in [70, 1526, 1527, 40_000] {
        let sent = frame(GUEST, length, 7);
        assert!(wire.send(&sent));
        let chains = length.div_ceil(1526);
        let mut got = Vec::new();
        for _ in 0..chains {
            let (head, length) = driver.take(RX);
            let offer = offers.iter().find(|offer| offer.head == head).expect("one of ours");
            got.extend(driver.written(offer, length));
        }
        assert_eq!(got, counted(sent, chains as u16), "{length} bytes");
    }
    assert_eq!(driver.back(RX), 0);
}

#[test]
fn what_the_chains_have_no_room_for_goes_into_later_ones() {
    // Without segments it holds chains for 1500 bytes only, and a host may send more all the same.
    let (driver, wire) = started(MRG);
    let offers: Vec<_> = (0..10).map(|_| driver.offer(RX, &[], &[1000])).collect();
    driver.kick(RX);
    let sent = frame(GUEST, 7300, 3);
    assert!(wire.send(&sent));
    let mut got = Vec::new();
    for offer in &offers[..8] {
        let (head, length) = driver.take(RX);
        assert_eq!(head, offer.head);
        got.extend(driver.written(offer, length));
    }
    assert_eq!(got, counted(sent, 8));
    // Two chains are left, which such a frame is lost on, and no other.
    assert!(wire.send(&frame(GUEST, 7300, 4)));
    assert!(wire.send(&frame(GUEST, 100, 5)));
    let (_, length) = driver.take(RX);
    assert_eq!(driver.written(&offers[8], length), counted(frame(GUEST, 100, 5), 1));
}

#[test]
fn a_frame_without_room_in_its_one_chain_is_lost() {
    let (driver, wire) = started(0);
    let offer = driver.offer(RX, &[], &[200]);
    driver.kick(RX);
    assert!(wire.send(&frame(GUEST, 201, 1)) && wire.send(&[0; 20]));
    assert!(wire.send(&frame(GUEST, 200, 2)));
    let (_, length) = driver.take(RX);
    assert_eq!(driver.written(&offer, length), counted(frame(GUEST, 200, 2), 1));
}

#[test]
fn without_chains_frames_wait_outside() {
    let (driver, wire) = started(0);
    let mut sent = 0u8;
    while wire.send(&frame(GUEST, 1000, sent)) {
        sent += 1;
    }
    // It took none of them, and does not look at them all the time.
    wait_for("the socket to be left alone", || {
        format!("{:?}", driver.bus).contains("watched: EpollFlags(0x0)")
    });
    for number in 0..sent {
        let offer = driver.offer(RX, &[], &[2000]);
        driver.kick(RX);
        let (_, length) = driver.take(RX);
        assert_eq!(driver.written(&offer, length), counted(frame(GUEST, 1000, number), 1));
    }
}

#[test]
fn only_what_the_driver_wants_comes_in() {
    let (driver, wire) = started(RX_MODE);
    let offers: Vec<_> = (0..2).map(|_| driver.offer(RX, &[], &[2000])).collect();
    driver.kick(RX);
    assert!(wire.send(&frame(OTHER, 100, 1)), "it is wanted as long as nothing was said");
    let (_, length) = driver.take(RX);
    assert_eq!(driver.written(&offers[0], length), counted(frame(OTHER, 100, 1), 1));
    assert_eq!(driver.request(CONTROL, &[&[0, 0], &[0]], 1), [0]);
    assert_eq!(driver.request(CONTROL, &[&[0, 7], &[0]], 1), [1], "there is no such command");
    assert!(wire.send(&frame(OTHER, 100, 2)) && wire.send(&frame(GUEST, 100, 3)));
    let (_, length) = driver.take(RX);
    assert_eq!(driver.written(&offers[1], length), counted(frame(GUEST, 100, 3), 1));
}

#[test]
fn a_frame_goes_out_as_the_guest_gave_it() {
    let (driver, wire) = started(0);
    let sent = frame(OTHER, 5000, 9);
    let pieces = [&sent[..12], &sent[12..20], &sent[20..4000], &sent[4000..]];
    assert!(driver.request(TX, &pieces, 0).is_empty());
    assert_eq!(wire.receive(), sent);
    assert!(driver.request(TX, &[&[0; 5]], 0).is_empty(), "what is no frame is nobody's");
}

#[test]
fn a_host_that_takes_no_more_has_the_driver_wait() {
    let (driver, wire) = started(0);
    let number = |seed: u8| frame(OTHER, 30_000, seed);
    let count = 40;
    for seed in 0..count {
        driver.offer(TX, &[&number(seed)], &[]);
        driver.kick(TX);
    }
    wait_for("some to be sent", || driver.back(TX) > 0);
    std::thread::sleep(Duration::from_millis(50));
    assert!(driver.back(TX) < count.into(), "the socket has no room for all of them");
    for seed in 0..count {
        assert_eq!(wire.receive(), number(seed));
    }
    wait_for("all to be sent", || driver.back(TX) == u16::from(count));
}

#[test]
fn a_pause_comes_through_while_frames_flood_in() {
    let (driver, wire) = started(RX_MODE);
    assert_eq!(driver.request(CONTROL, &[&[0, 0], &[0]], 1), [0]);
    (0..8).for_each(|_| drop(driver.offer(RX, &[], &[2000])));
    driver.kick(RX);
    let done = Arc::new(AtomicBool::new(false));
    let sent = Arc::new(AtomicU64::new(0));
    let (stop, count) = (done.clone(), sent.clone());
    let flood = std::thread::spawn(move || {
        while !stop.load(Ordering::SeqCst) {
            // Not for this guest, so that it never runs out of chains.
            if wire.send(&frame(OTHER, 100, 1)) {
                count.fetch_add(1, Ordering::SeqCst);
            } else {
                std::thread::yield_now();
            }
        }
    });
    let sent = || sent.load(Ordering::SeqCst);
    // Until pauses and frames were at it together often enough, however the threads come to run.
    let begun = Instant::now();
    let mut pauses = Vec::new();
    while pauses.len() < 20 || sent() <= 1000 {
        assert!(begun.elapsed() < PATIENCE, "{pauses:?}, {} frames", sent());
        let before = sent();
        wait_for("frames", || sent() > before);
        let begun = Instant::now();
        driver.bus.pause();
        pauses.push(begun.elapsed());
        driver.bus.resume();
    }
    done.store(true, Ordering::SeqCst);
    flood.join().expect("it ends");
    println!(
        "{} frames came, {} pauses; the longest took {:?}",
        sent(),
        pauses.len(),
        pauses.iter().max()
    );
    // Now and then somebody else has the processor for as long.
    pauses.sort();
    assert!(pauses[pauses.len() * 3 / 4] < Duration::from_millis(100), "{pauses:?}");
}

#[test]
fn chains_that_it_holds_are_there_after_a_move() {
    let (driver, _wire) = started(MRG | TSO);
    let offers: Vec<_> = (0..20).map(|_| driver.offer(RX, &[], &[1526])).collect();
    driver.kick(RX);
    let (net, wire) = net();
    let there = driver.moved_to(Box::new(net)).expect("loaded");
    there.bus.resume();
    for (seed, offer) in (0..).zip(&offers) {
        assert!(wire.send(&frame(GUEST, 500, seed)));
        let (head, length) = there.take(RX);
        assert_eq!(head, offer.head);
        assert_eq!(there.written(offer, length), counted(frame(GUEST, 500, seed), 1));
    }
    // And at home, if it comes to nothing.
    driver.bus.resume();
    assert!(_wire.send(&frame(GUEST, 500, 99)));
    let (head, length) = driver.take(RX);
    assert_eq!(head, offers[0].head);
    assert_eq!(driver.written(&offers[0], length), counted(frame(GUEST, 500, 99), 1));
}

#[test]
fn who_came_is_asked_to_announce_himself() {
    let (driver, _wire) = started(ANNOUNCES);
    let (net, _there_wire) = net();
    let there = driver.moved_to(Box::new(net)).expect("loaded");
    assert_eq!(there.config(6, 2), [1, 0]);
    there.bus.resume();
    assert_eq!(there.config(6, 2), [3, 0]);
    assert!(there.interrupts());
    assert_eq!(there.read(0x60) & 2, 2, "its configuration changed");
    there.acknowledge();
    assert_eq!(there.request(CONTROL, &[&[3, 0]], 1), [0]);
    assert_eq!(there.config(6, 2), [1, 0]);
    // Who runs on where he was need not.
    driver.bus.resume();
    assert_eq!(driver.config(6, 2), [1, 0]);
}

#[test]
fn a_driver_that_cannot_announce_is_not_asked() {
    let (driver, _wire) = started(CTRL);
    let (net, _there_wire) = net();
    let there = driver.moved_to(Box::new(net)).expect("loaded");
    there.bus.resume();
    assert_eq!(there.config(6, 2), [1, 0]);
}

#[test]
fn what_is_known_of_the_guest_travels() {
    let knowledge = Knowledge::default();
    let (net, wire) = net_knowing(&knowledge);
    let driver = Driver::of(Box::new(net));
    driver.start(0);
    let with_header = |frame: &[u8]| [&[0; HEADER][..], frame].concat();
    let [own, _] = gratuitous_arps(GUEST, Ipv4Addr::new(10, 0, 0, 5));
    assert!(driver.request(TX, &[&with_header(&own)], 0).is_empty());
    assert!(driver.request(TX, &[&with_header(&reverse_arp(GUEST))], 0).is_empty());
    let offer = driver.offer(RX, &[], &[2000]);
    driver.kick(RX);
    let [theirs, _] = gratuitous_arps(OTHER, Ipv4Addr::new(10, 0, 0, 1));
    assert!(wire.send(&with_header(&theirs)));
    assert_eq!(driver.take(RX).0, offer.head);
    let address = |last: u8| IpAddr::from([10, 0, 0, last]);
    {
        let known = knowledge.lock();
        assert_eq!((known.own().len(), known.own()[0].address), (1, address(5)));
        assert_eq!((known.neighbours().len(), known.neighbours()[0].mac), (1, OTHER));
    }
    let at_the_other = Knowledge::default();
    let (net, _there_wire) = net_knowing(&at_the_other);
    let _there = driver.moved_to(Box::new(net)).expect("loaded");
    assert_eq!(*at_the_other.lock(), *knowledge.lock());
}

#[test]
fn a_bridge_with_smaller_frames_is_no_place_to_come_to() {
    let (driver, _wire) = started(0);
    let (small, _there_wire) = net();
    let small = Net { mtu: 1400, mtu_here: 1400, ..small };
    let error = driver.moved_to(Box::new(small)).expect_err("too small").to_string();
    assert!(error.contains("1500") && error.contains("1400"), "{error}");
    let (large, _there_wire) = net();
    let large = Net { mtu: 9000, mtu_here: 9000, ..large };
    let there = driver.moved_to(Box::new(large)).expect("loaded");
    assert_eq!(there.config(10, 2), [0xdc, 0x05], "the guest was told once");
}

#[test]
fn a_network_that_is_gone_takes_the_link_down_and_nothing_else() {
    let (driver, wire) = started(0);
    let offer = driver.offer(RX, &[], &[2000]);
    driver.kick(RX);
    drop(wire);
    wait_for("the link to go down", || driver.config(6, 2) == [0, 0]);
    assert!(driver.interrupts() && !driver.needs_reset());
    assert!(driver.request(TX, &[&frame(OTHER, 100, 1)], 0).is_empty(), "it goes nowhere");
    driver.bus.pause();
    driver.bus.resume();
    assert_eq!(driver.back(RX), 0);
    drop(offer);
    driver.start(0);
    assert_eq!(driver.config(6, 2), [0, 0]);
}

#[test]
fn chains_that_are_none_break_it() {
    for (queue, readable, writable) in [
        (RX, &[0u8; 64][..], &[][..]),
        (RX, &[], &[11]),
        (CONTROL, &[0], &[1]),
        (CONTROL, &[0, 0, 1], &[]),
    ] {
        let (driver, _wire) = started(RX_MODE);
        let readable: &[&[u8]] = if readable.is_empty() { &[] } else { &[readable] };
        driver.offer(queue, readable, writable);
        driver.kick(queue);
        wait_for("the device to give up", || driver.needs_reset());
        driver.start(0);
        assert!(!driver.needs_reset());
    }
}

#[test]
fn commands_as_long_as_memory_are_read_to_a_limit() {
    let (driver, _wire) = started(RX_MODE);
    let long = vec![0xff; 1 << 20];
    assert_eq!(driver.request(CONTROL, &[&[1, 0], &long, &long], 1), [1]);
}
