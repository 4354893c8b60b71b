//! The device as a driver and programs of the host see it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::conformance::{Driver, Offer, conforms};
use super::connection::BUFFER;
use super::packet::{ENDED, RECEIVES_NO_MORE, SENDS_NO_MORE};
use super::*;
use crate::testing::wait_for;

const CID: u32 = 42;
/// Bytes that a buffer of the driver's has.
const ROOM: usize = 4096;
/// A guest's own buffer, unless a test says otherwise.
const GUEST_BUFFER: u32 = 64 * 1024;

/// A place for sockets.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("directory") }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("vsock.sock")
    }

    fn device(&self) -> Box<Vsock> {
        Box::new(Vsock::new(CID, &self.socket()).expect("device"))
    }

    fn guest(&self) -> Guest {
        let guest = Guest { driver: Driver::of(self.device()), offers: RefCell::default() };
        guest.driver.start(F_STREAM);
        guest
    }

    /// A host program that has asked for `port`, with `more` behind that.
    fn caller(&self, port: u32, more: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.socket()).expect("connect");
        stream.set_read_timeout(Some(crate::testing::PATIENCE)).expect("timeout");
        stream.write_all(format!("CONNECT {port}\n{more}").as_bytes()).expect("ask");
        stream
    }

    /// A host program that waits for the guest at `port`.
    fn service(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("vsock.sock_{port}"))).expect("bind")
    }
}

/// A guest with its driver.
struct Guest {
    driver: Driver,
    offers: RefCell<VecDeque<Offer>>,
}

impl Guest {
    /// Gives the device `count` buffers to fill.
    fn give(&self, count: usize) {
        for _ in 0..count {
            self.offers.borrow_mut().push_back(self.driver.offer(RECEIVE, &[], &[ROOM]));
        }
        self.driver.kick(RECEIVE);
    }

    /// The next packet in a buffer that was given.
    fn receive(&self) -> (Header, Vec<u8>) {
        let (head, length) = self.driver.take(RECEIVE);
        let offer = self.offers.borrow_mut().pop_front().expect("a buffer");
        assert_eq!(offer.head, head, "buffers come back in order");
        let bytes = self.driver.written(&offer, length);
        let (header, data) = bytes.split_first_chunk::<HEADER>().expect("a header");
        let header = Header::from_bytes(header);
        assert_eq!(header.length as usize, data.len());
        assert_eq!((header.from, header.to, header.kind), (HOST, CID.into(), STREAM));
        (header, data.to_vec())
    }

    /// Gives a buffer and takes the next packet, which has to be `op`.
    fn expect(&self, op: u16) -> (Header, Vec<u8>) {
        self.give(1);
        let (header, data) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        (header, data)
    }

    /// Sends `header` as it is, with `data` in two buffers.
    fn send_raw(&self, header: &Header, data: &[u8]) {
        let bytes = header.to_bytes();
        let (first, second) = data.split_at(data.len() / 2);
        let parts: [&[u8]; 3] = [&bytes, first, second];
        let parts = &parts[..if data.is_empty() { 1 } else { 3 }];
        self.driver.offer(TRANSMIT, parts, &[]);
        self.driver.kick(TRANSMIT);
        self.driver.take(TRANSMIT);
    }

    /// Sends `op` from its `port` to the host's.
    fn send(&self, op: u16, port: u32, to_port: u32, data: &[u8]) {
        self.send_raw(&Header { op, length: data.len() as u32, ..header(port, to_port) }, data);
    }

    /// A connection that the host asked for: the host's program, and its port.
    fn connected(&self, bench: &Bench, port: u32) -> (UnixStream, u32) {
        let mut program = bench.caller(port, "");
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!(request.to_port, port);
        self.send(op::RESPONSE, port, request.from_port, &[]);
        assert_eq!(line(&mut program), format!("OK {}\n", request.from_port));
        (program, request.from_port)
    }
}

fn header(port: u32, to_port: u32) -> Header {
    Header {
        from: CID.into(),
        to: HOST,
        from_port: port,
        to_port,
        kind: STREAM,
        buffer: GUEST_BUFFER,
        ..Header::default()
    }
}

fn line(program: &mut UnixStream) -> String {
    let mut text = String::new();
    while !text.ends_with('\n') {
        let mut byte = [0];
        program.read_exact(&mut byte).expect("a line");
        text.push(byte[0].into());
    }
    text
}

fn read(program: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    program.read_exact(&mut bytes).expect("bytes");
    bytes
}

fn ends(program: &mut UnixStream) {
    let mut byte = [0];
    match program.read(&mut byte) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => panic!("{other:?} where the connection should end"),
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn it_is_a_virtio_device() {
    let bench = Bench::new();
    let next = AtomicU32::new(0);
    conforms(|| {
        let name = format!("{}.sock", next.fetch_add(1, Ordering::SeqCst));
        Box::new(Vsock::new(CID, &bench.dir.path().join(name)).expect("device"))
    });
}

#[test]
fn a_program_of_the_host_reaches_the_guest() {
    let bench = Bench::new();
    let guest = bench.guest();
    assert_eq!(guest.driver.config(0, 8), u64::from(CID).to_le_bytes());
    let mut program = bench.caller(1234, "early");
    let (request, _) = guest.expect(op::REQUEST);
    assert_eq!((request.to_port, request.buffer), (1234, BUFFER));
    guest.send(op::RESPONSE, 1234, request.from_port, &[]);
    assert_eq!(line(&mut program), format!("OK {}\n", request.from_port));
    assert_eq!(guest.expect(op::RW).1, b"early", "what came with the question is not lost");
    guest.send(op::RW, 1234, request.from_port, b"hello");
    assert_eq!(read(&mut program, 5), b"hello");
    program.write_all(b"world").expect("write");
    let (data, bytes) = guest.expect(op::RW);
    assert_eq!((bytes.as_slice(), data.forwarded), (&b"world"[..], 5));
    // The program is done sending, and still reads; then it is gone.
    program.shutdown(std::net::Shutdown::Write).expect("shut down");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SENDS_NO_MORE);
    guest.send(op::RW, 1234, request.from_port, b"late");
    assert_eq!(read(&mut program, 4), b"late");
    drop(program);
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, ENDED);
    guest.send(op::RST, 1234, request.from_port, &[]);
    guest.send(op::RW, 1234, request.from_port, b"?");
    guest.expect(op::RST);
}

#[test]
fn the_guest_reaches_a_program_of_the_host() {
    let bench = Bench::new();
    let guest = bench.guest();
    let service = bench.service(77);
    guest.send(op::REQUEST, 9000, 77, &[]);
    guest.expect(op::RESPONSE);
    let (mut program, _) = service.accept().expect("accept");
    guest.send(op::RW, 9000, 77, b"ping");
    assert_eq!(read(&mut program, 4), b"ping");
    program.write_all(b"pong").expect("write");
    assert_eq!(guest.expect(op::RW).1, b"pong");
    // Half, and then all of an orderly end.
    guest.send_raw(&Header { op: op::SHUTDOWN, flags: SENDS_NO_MORE, ..header(9000, 77) }, &[]);
    ends(&mut program);
    program.write_all(b"still").expect("write");
    assert_eq!(guest.expect(op::RW).1, b"still");
    guest.send_raw(&Header { op: op::SHUTDOWN, flags: RECEIVES_NO_MORE, ..header(9000, 77) }, &[]);
    guest.expect(op::RST);
    assert!(program.write_all(b"more").is_err(), "nobody is there");
    // Nobody waits at 78, and a second connection of the same ports is none.
    guest.send(op::REQUEST, 9000, 78, &[]);
    let (reset, _) = guest.expect(op::RST);
    assert_eq!((reset.from_port, reset.to_port), (78, 9000));
    guest.send(op::REQUEST, 9001, 77, &[]);
    guest.expect(op::RESPONSE);
    guest.send(op::REQUEST, 9001, 77, &[]);
    guest.expect(op::RST);
}

#[test]
fn the_guest_is_sent_no_more_than_it_has_room_for() {
    let bench = Bench::new();
    let guest = bench.guest();
    let (mut program, port) = guest.connected(&bench, 5);
    let said = |op, buffer, forwarded| {
        guest.send_raw(&Header { op, buffer, forwarded, ..header(5, port) }, &[]);
    };
    said(op::CREDIT_UPDATE, 6000, 0);
    let sent = pattern(20_000);
    program.write_all(&sent).expect("write");
    let mut got = Vec::new();
    while got.len() < 6000 {
        got.extend(guest.expect(op::RW).1);
    }
    assert_eq!(got.len(), 6000);
    guest.expect(op::CREDIT_REQUEST);
    guest.give(1);
    said(op::CREDIT_UPDATE, 6000, 100);
    let (_, more) = guest.receive();
    assert_eq!(more.len(), 100);
    got.extend(more);
    guest.expect(op::CREDIT_REQUEST);
    // Numbers that are none stop it, and nothing else.
    said(op::CREDIT_UPDATE, 6000, 1 << 31);
    guest.expect(op::CREDIT_REQUEST);
    said(op::CREDIT_UPDATE, 6000, 6100);
    said(op::CREDIT_UPDATE, u32::MAX, 6100);
    while got.len() < sent.len() {
        got.extend(guest.expect(op::RW).1);
    }
    assert!(got == sent);
}

#[test]
fn what_the_host_does_not_read_waits_up_to_a_bound() {
    let bench = Bench::new();
    let guest = bench.guest();
    let (mut program, port) = guest.connected(&bench, 5);
    // The socket takes some, and the buffer the rest, until the guest has no credit.
    let data = pattern(8 << 20);
    let (mut sent, mut forwarded) = (0, 0);
    loop {
        let room = (forwarded + BUFFER as usize - sent).min(MOST_DATA);
        if room == 0 {
            guest.send(op::CREDIT_REQUEST, 5, port, &[]);
            let now = guest.expect(op::CREDIT_UPDATE).0.forwarded as usize;
            if now == forwarded {
                break;
            }
            forwarded = now;
            continue;
        }
        guest.send(op::RW, 5, port, &data[sent..sent + room]);
        sent += room;
    }
    assert!(sent < 4 << 20, "{sent} bytes were taken of who is not read");
    // It is read: the guest hears of it unasked.
    guest.give(1);
    let mut got = read(&mut program, sent / 2);
    let (update, _) = guest.receive();
    assert!(update.op == op::CREDIT_UPDATE && update.forwarded as usize > forwarded);
    got.extend(read(&mut program, sent - got.len()));
    assert!(got == data[..sent], "nothing is lost or doubled");
    // Who sends what there is no room for is cut off.
    for _ in 0..100 {
        guest.send(op::RW, 5, port, &data[..MOST_DATA]);
    }
    loop {
        guest.give(1);
        match guest.receive().0.op {
            op::RST => break,
            op => assert_eq!(op, op::CREDIT_UPDATE),
        }
    }
}

#[test]
fn what_a_guest_sent_before_it_left_still_arrives() {
    let bench = Bench::new();
    let guest = bench.guest();
    let (mut program, port) = guest.connected(&bench, 5);
    let (mut other, other_port) = guest.connected(&bench, 6);
    let data = pattern(BUFFER as usize);
    for part in data.chunks(MOST_DATA) {
        guest.send(op::RW, 5, port, part);
        guest.send(op::RW, 6, other_port, part);
    }
    guest.send_raw(&Header { op: op::SHUTDOWN, flags: ENDED, ..header(5, port) }, &[]);
    guest.send(op::RST, 5, port, &[]);
    let mut got = Vec::new();
    program.read_to_end(&mut got).expect("read");
    assert!(got == data);
    // One that breaks off has not asked for that.
    guest.send(op::RST, 6, other_port, &[]);
    got.clear();
    other.read_to_end(&mut got).expect("read");
    assert!(got.len() <= data.len() && data.starts_with(&got));
}

#[test]
fn after_a_move_the_guest_knows_that_its_connections_are_gone() {
    let bench = Bench::new();
    let guest = bench.guest();
    let (mut program, port) = guest.connected(&bench, 5);
    // A move that fails: what came meanwhile is there, and so is who came.
    guest.driver.bus.pause();
    program.write_all(b"during").expect("write");
    let mut late = bench.caller(6, "");
    guest.give(2);
    guest.driver.bus.resume();
    let mut met: Vec<u16> = (0..2).map(|_| guest.receive().0.op).collect();
    met.sort_unstable();
    assert_eq!(met, [op::REQUEST, op::RW]);
    guest.send(op::RW, 5, port, b"on");
    assert_eq!(read(&mut program, 2), b"on");
    // One that succeeds.
    let elsewhere = Bench::new();
    let there = guest.driver.moved_to(elsewhere.device()).expect("moved");
    drop(guest);
    ends(&mut program);
    ends(&mut late);
    assert!(!bench.socket().exists());
    // Its event has to wait until there is room for it, and moves once more before.
    there.bus.resume();
    let last = Bench::new();
    let there = there.moved_to(last.device()).expect("moved");
    there.bus.resume();
    assert_eq!(there.request(EVENT, &[], 4), TRANSPORT_RESET.to_le_bytes());
    let again = there.offer(EVENT, &[], &[4]);
    there.kick(EVENT);
    let guest = Guest { driver: there, offers: RefCell::default() };
    guest.send(op::RW, 5, port, b"?");
    guest.expect(op::RST);
    guest.connected(&last, 7);
    assert_eq!(guest.driver.back(EVENT), 0, "{again:?}: it is told once");
    let other = Vsock::new(CID + 1, &bench.socket()).expect("device");
    let error = guest.driver.moved_to(Box::new(other)).expect_err("another guest");
    assert!(error.to_string().contains("identifier"), "{error}");
}

#[test]
fn a_new_driver_has_no_connections() {
    let bench = Bench::new();
    let guest = bench.guest();
    let (mut program, port) = guest.connected(&bench, 5);
    guest.driver.start(F_STREAM);
    guest.offers.borrow_mut().clear();
    ends(&mut program);
    guest.send(op::RW, 5, port, b"?");
    guest.expect(op::RST);
    guest.connected(&bench, 5);
}

#[test]
fn packets_that_belong_to_nothing_are_answered_and_never_pile_up() {
    let bench = Bench::new();
    let guest = bench.guest();
    let data = Header { op: op::RW, ..header(1, 2) };
    for wrong in [
        data,
        Header { op: 99, ..data },
        Header { op: op::REQUEST, kind: 2, ..data },
        Header { op: op::RESPONSE, ..data },
        Header { op: op::REQUEST, to: 7, ..data },
    ] {
        guest.driver.offer(TRANSMIT, &[&wrong.to_bytes()], &[]);
        guest.driver.kick(TRANSMIT);
        let answer = guest.driver.request(RECEIVE, &[], ROOM);
        let answer = Header::from_bytes(answer.first_chunk().expect("a header"));
        assert_eq!(answer, wrong.reset());
        guest.driver.take(TRANSMIT);
    }
    // In another's name, and what is never answered.
    guest.send_raw(&Header { from: 9, ..data }, &[]);
    guest.send_raw(&Header { op: op::RST, ..data }, &[]);
    // More than it keeps answers for: the rest waits in the queue.
    let bytes = data.to_bytes();
    for _ in 0..250 {
        guest.driver.offer(TRANSMIT, &[&bytes], &[]);
        guest.driver.kick(TRANSMIT);
        guest.driver.take(TRANSMIT);
    }
    for _ in 0..50 {
        guest.driver.offer(TRANSMIT, &[&bytes], &[]);
    }
    guest.driver.kick(TRANSMIT);
    wait_for("it to stand", || guest.driver.back(TRANSMIT) == 6);
    for _ in 0..300 {
        guest.expect(op::RST);
    }
    wait_for("all to be taken", || guest.driver.back(TRANSMIT) == 50);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn packets_that_are_none_break_the_device_alone() {
    let data = Header { op: op::RW, ..header(1, 2) };
    let long = Header { length: MOST_DATA as u32 + 1, ..data };
    let large = vec![0; MOST_DATA + 1];
    for (what, parts) in [
        ("half a header", vec![&data.to_bytes()[..20]]),
        ("less data than it says", vec![&Header { length: 9, ..data }.to_bytes()[..], b"12345678"]),
        ("more data than there may be", vec![&long.to_bytes()[..], &large]),
        (
            "data that asks for credit",
            vec![&Header { op: op::CREDIT_REQUEST, length: 1, ..data }.to_bytes()[..], b"1"],
        ),
    ] {
        let bench = Bench::new();
        let guest = bench.guest();
        guest.driver.offer(TRANSMIT, &parts, &[]);
        guest.driver.kick(TRANSMIT);
        wait_for(what, || guest.driver.needs_reset());
        guest.driver.start(F_STREAM);
        guest.connected(&bench, 5);
    }
    let bench = Bench::new();
    let guest = bench.guest();
    guest.driver.offer(RECEIVE, &[], &[HEADER]);
    guest.driver.kick(RECEIVE);
    wait_for("a buffer that is too small", || guest.driver.needs_reset());
}

#[test]
fn there_are_only_so_many_connections() {
    let bench = Bench::new();
    let guest = bench.guest();
    let service = bench.service(77);
    let mut programs = Vec::new();
    for _ in 0..MOST_CONNECTIONS {
        programs.push(UnixStream::connect(bench.socket()).expect("connect"));
    }
    let mut late = UnixStream::connect(bench.socket()).expect("connect");
    ends(&mut late);
    guest.send(op::REQUEST, 9000, 77, &[]);
    guest.expect(op::RST);
    // Who asks for nothing that there is makes room.
    for (number, mut program) in programs.drain(..).enumerate() {
        match number {
            0 => program.write_all(b"GET / HTTP/1.1\r\n").expect("write"),
            1 => program.write_all(b"CONNECT 99999999999\n").expect("write"),
            _ => continue,
        }
        ends(&mut program);
    }
    wait_for("room", || {
        guest.send(op::REQUEST, 9000, 77, &[]);
        guest.give(1);
        guest.receive().0.op == op::RESPONSE
    });
    service.accept().expect("accept");
}

#[test]
fn a_program_that_gives_up_is_no_connection() {
    let bench = Bench::new();
    let guest = bench.guest();
    let program = bench.caller(5, "");
    let (request, _) = guest.expect(op::REQUEST);
    drop(program);
    guest.expect(op::RST);
    guest.send(op::RESPONSE, 5, request.from_port, &[]);
    guest.expect(op::RST);
    // One that nobody in the guest wants.
    let mut program = bench.caller(5, "");
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(op::RST, 5, request.from_port, &[]);
    ends(&mut program);
}

#[test]
fn much_data_goes_both_ways_at_once() {
    const ALL: usize = 3 << 20;
    let bench = Bench::new();
    let guest = bench.guest();
    let (program, port) = guest.connected(&bench, 5);
    let data = pattern(ALL);
    let mut writer = program.try_clone().expect("clone");
    let to_write = data.clone();
    let writes = std::thread::spawn(move || writer.write_all(&to_write).expect("write"));
    let mut reader = program;
    let reads = std::thread::spawn(move || read(&mut reader, ALL));
    let (mut got, mut told, mut sent, mut forwarded) = (Vec::new(), 0, 0, 0);
    guest.give(64);
    while got.len() < ALL || sent < ALL {
        let room = (forwarded + BUFFER as usize - sent).min(MOST_DATA).min(ALL - sent);
        let header = Header { forwarded: got.len() as u32, ..header(5, port) };
        if room > 0 {
            let length = room as u32;
            guest.send_raw(&Header { op: op::RW, length, ..header }, &data[sent..sent + room]);
            sent += room;
        } else if told < got.len() {
            guest.send_raw(&Header { op: op::CREDIT_UPDATE, ..header }, &[]);
        } else {
            wait_for("the host to go on", || guest.driver.back(RECEIVE) > 0);
        }
        told = got.len();
        while guest.driver.back(RECEIVE) > 0 {
            let (header, bytes) = guest.receive();
            assert_ne!(header.op, op::RST);
            forwarded = header.forwarded as usize;
            got.extend(bytes);
            guest.give(1);
        }
    }
    assert!(got == data, "what the guest got");
    writes.join().expect("written");
    assert!(reads.join().expect("read") == data, "what the host got");
}
