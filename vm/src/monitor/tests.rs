//! A monitor as a thread, which a process with threads can have; that it is a process of its own is tried with
//! keepers (`tests/moving.rs`).

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use decamp_shared::keeper::switched_for;
use decamp_shared::workload::Place;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{MsgFlags, recv};

use super::*;
use crate::disk::{Disk, lock};
use crate::files::Files;
use crate::interfaces::Interfaces;
use crate::interfaces::tests::apart;
use crate::spec::{DiskSpec, NetSpec, VmSpec};
use crate::testing::guest_spec;

struct Bench {
    dir: tempfile::TempDir,
    spec: VmSpec,
    monitor: Monitor,
    /// Closed when the keeper has ended.
    keeper: Option<io::PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Bench {
    fn new(ports: Vec<decamp_shared::network::Port>) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let disk = |name: &str, readonly| {
            let path = dir.path().join(name);
            fs::write(&path, [7; 4096]).expect("a disk");
            DiskSpec { path, readonly, shared: false }
        };
        let disks = vec![disk("written", false), disk("read", true)];
        let spec = VmSpec { disks, ..guest_spec(dir.path()) };
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
        let vsock = Some(dir.path().join("vsock.sock"));
        let mut host = Host::of(&spec, &place, ports, vsock);
        let kind = SockType::SeqPacket;
        let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
        let (ours, theirs) = pair.expect("a pair");
        let (ended, keeper) = io::pipe().expect("a pipe");
        let thread = std::thread::spawn(move || serve(&mut host, theirs.as_fd(), ended.as_fd()));
        let monitor = Monitor(Arc::new(Mutex::new(ours)));
        Self { dir, spec, monitor, keeper: Some(keeper), thread: Some(thread) }
    }

    fn open(&self, request: &Request) -> io::Result<File> {
        self.monitor.open(request, None).map(File::from)
    }

    fn end(&mut self) {
        drop(self.keeper.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it ends with its keeper");
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.end();
    }
}

fn number_of(error: &io::Error) -> Option<i32> {
    error.raw_os_error()
}

#[test]
fn what_is_the_vms_is_opened_and_nothing_else() {
    let bench = Bench::new(Vec::new());
    let disk = |number, write| bench.open(&Request::Disk { number, write });
    disk(0, true).expect("a disk").write_all_at(b"x", 5).expect("it can be written");
    assert_eq!(fs::read(&bench.spec.disks[0].path).expect("a disk")[5], b'x');
    disk(0, false).expect("a disk").write_all_at(b"y", 5).expect_err("it was to be read");
    disk(1, false).expect("a disk");
    assert_eq!(number_of(&disk(1, true).expect_err("it is read alone")), Some(libc::EACCES));
    assert_eq!(number_of(&disk(2, false).expect_err("there is none")), Some(libc::ENOENT));
    let mut kernel = Vec::new();
    bench.open(&Request::Kernel).expect("the kernel").read_to_end(&mut kernel).expect("read");
    assert_eq!(kernel, fs::read(&bench.spec.kernel).expect("the kernel"));
    assert_eq!(number_of(&bench.open(&Request::Initrd).expect_err("none")), Some(libc::ENOENT));
    let port = Request::Port { number: 0, change: Change::Connect };
    bench.monitor.ask(&port).expect_err("there is no interface");
}

#[test]
fn what_is_opened_again_has_no_more_rights() {
    let bench = Bench::new(Vec::new());
    let again = |file: BorrowedFd<'_>, write| {
        bench.monitor.open(&Request::Again { write }, Some(file)).map(File::from)
    };
    let path = &bench.spec.disks[0].path;
    let both = File::options().read(true).write(true).open(path).expect("a disk");
    again(both.as_fd(), true).expect("again").write_all_at(b"z", 0).expect("written");
    again(both.as_fd(), false).expect("again").write_all_at(b"z", 0).expect_err("read alone");
    let refuses = |file: BorrowedFd<'_>, write| {
        assert_eq!(number_of(&again(file, write).expect_err("refused")), Some(libc::EACCES));
    };
    let only_read = File::open(path).expect("a disk");
    again(only_read.as_fd(), false).expect("again");
    refuses(only_read.as_fd(), true);
    let only_written = File::options().write(true).open(path).expect("a disk");
    refuses(only_written.as_fd(), false);
    refuses(only_written.as_fd(), true);
    let mut nothing = File::options();
    let nothing = nothing.read(true).custom_flags(libc::O_PATH).open("/etc/shadow");
    refuses(nothing.expect("its path").as_fd(), false);
    let (pipe, _writer) = io::pipe().expect("a pipe");
    refuses(pipe.as_fd(), false);
    let null = File::options().read(true).write(true).open("/dev/null").expect("a device");
    refuses(null.as_fd(), true);
    assert_eq!(
        number_of(&bench.open(&Request::Again { write: false }).expect_err("nothing came")),
        Some(libc::ENOENT)
    );
    let memory = File::from(memfd_create(c"m", MFdFlags::empty()).expect("memory"));
    memory.set_len(8).expect("sized");
    let mut other = again(memory.as_fd(), true).expect("again");
    other.write_all(b"12345678").expect("written");
    let mut text = String::new();
    (&memory).read_to_string(&mut text).expect("read");
    assert_eq!(text, "12345678", "each has a position of its own");
}

#[test]
fn a_disk_is_locked_and_let_go_as_ever() {
    let bench = Bench::new(Vec::new());
    let files = Files::Monitored(bench.monitor.clone());
    let disk = |number| Disk::opened_by(files.clone(), number, &bench.spec.disks[number]);
    let (one, other) = (disk(0), disk(0));
    one.open(Duration::ZERO).expect("opened");
    assert_eq!(one.bytes(), 4096);
    let error = other.open(Duration::ZERO).expect_err("it is locked").to_string();
    let pid = std::process::id();
    assert!(error.contains("is locked by") && error.contains(&pid.to_string()), "{error}");
    drop(one.descriptor(false).expect("a descriptor"));
    assert!(other.open(Duration::ZERO).is_err(), "the lock stays");
    one.close();
    other.open(Duration::ZERO).expect("the monitor keeps nothing open");
    other.check_file().expect("it is what it was");
    fs::write(&bench.spec.disks[0].path, [7; 512]).expect("cut");
    let error = other.check_file().expect_err("it was cut").to_string();
    assert!(error.contains("4096 bytes") && error.contains("512"), "{error}");
    disk(1).open(Duration::ZERO).expect("read alone");
}

/// A monitor of the VM of `spec` at `place`, as a thread. One that is `cut_off` ends when it has noted a switch, before
/// it says so.
pub(crate) fn beside(spec: &VmSpec, place: &Place, cut_off: bool) -> Monitor {
    let kind = SockType::SeqPacket;
    let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
    let (ours, theirs) = pair.expect("a pair");
    let mut host = Host::of(spec, place, Vec::new(), None);
    let asked_to_switch = move |socket: BorrowedFd<'_>| {
        let mut bytes = [0; LONGEST];
        let count = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK).unwrap_or_default();
        Request::decode(&bytes[..count]).filter(|asked| matches!(asked, Request::Switch(_)))
    };
    std::thread::spawn(move || {
        loop {
            if cut_off && let Some(request) = asked_to_switch(theirs.as_fd()) {
                host.act(&request, None).expect("noted");
                return;
            }
            if !answer(&mut host, theirs.as_fd()) {
                return;
            }
        }
    });
    Monitor(Arc::new(Mutex::new(ours)))
}

const MIGRATION: &str = "5f0c7a1e-0b7d-4f7e-9a51-2f3c6d8e9b01";

fn made(path: &Path) -> File {
    File::options().read(true).write(true).create_new(true).open(path).expect("made")
}

#[test]
fn a_disk_that_went_over_to_another_file_is_opened_as_that_whatever_it_is_called() {
    let bench = Bench::new(Vec::new());
    let files = Files::Monitored(bench.monitor.clone());
    let disk = Disk::opened_by(files, 0, &bench.spec.disks[0]);
    disk.open(Duration::ZERO).expect("opened");
    let new = bench.dir.path().join("new");
    let switch = || bench.monitor.ask(&Request::Switch(MIGRATION.into()));
    let place = Place { name: "web".into(), uuid: "u".into(), dir: bench.dir.path().to_owned() };
    let noted = || switched_for(&place, MIGRATION).expect("looked");
    let there = |text: &str| {
        let file = bench.open(&Request::Disk { number: 0, write: true }).expect("opened");
        file.write_all_at(text.as_bytes(), 0).expect("written");
    };
    switch().expect_err("there is no other file");
    // One that stays after all.
    disk.give_next(made(&new), &new).expect("given");
    disk.drop_next();
    switch().expect_err("it stays");
    assert!(!noted());
    fs::remove_file(&new).expect("removed");
    disk.give_next(made(&new), &new).expect("given");
    there("old");
    assert!(fs::read(&bench.spec.disks[0].path).expect("read").starts_with(b"old"));
    // What cannot be noted does not happen.
    let blocked = bench.dir.path().join("switched.new");
    fs::create_dir(&blocked).expect("made");
    switch().expect_err("it cannot be noted");
    there("OLD");
    assert!(fs::read(&bench.spec.disks[0].path).expect("read").starts_with(b"OLD"));
    fs::remove_dir(&blocked).expect("removed");
    disk.check_next().expect("it can go over");
    switch().expect("noted");
    assert!(noted());
    disk.go_over();
    // Another file takes its name, as one that was named by a guest's keeper could.
    let renamed = bench.dir.path().join("renamed");
    fs::rename(&new, &renamed).expect("renamed");
    fs::write(&new, [9; 4096]).expect("another");
    there("new");
    assert!(fs::read(&renamed).expect("read").starts_with(b"new"));
    assert_eq!(fs::read(&new).expect("read"), [9; 4096]);
    // Its lock is its VM's, and the monitor does not keep it.
    let error = lock::check(&renamed, false).expect_err("it is locked").to_string();
    assert!(error.contains(&std::process::id().to_string()), "{error}");
    disk.close();
    lock::check(&renamed, false).expect("it is nobody's");
    disk.open(Duration::ZERO).expect("its own again");
    lock::check(&renamed, false).expect_err("it is this VM's");
    lock::check(&bench.spec.disks[0].path, false).expect("the old one is nobody's");
}

#[test]
fn a_disk_goes_over_to_no_file_that_its_keeper_could_not_write_itself() {
    let bench = Bench::new(Vec::new());
    let path = bench.dir.path().join("new");
    let both = made(&path);
    let give = |number, file: BorrowedFd<'_>| {
        bench.monitor.ask_of(&Request::Next { number }, Some(file)).map_err(|error| match error {
            VmError::Refused { source, .. } => number_of(&source),
            error => panic!("{error}"),
        })
    };
    let number_of_none = Err(Some(libc::ENOENT));
    assert_eq!(give(2, both.as_fd()), number_of_none, "there is no such disk");
    let refused = Err(Some(libc::EACCES));
    assert_eq!(give(1, both.as_fd()), refused, "it is only read");
    let mut append = File::options();
    let append = append.read(true).append(true).open(&path).expect("opened");
    let read = File::open(&path).expect("opened");
    let write = File::options().write(true).open(&path).expect("opened");
    let mut named = File::options();
    let named = named.read(true).custom_flags(libc::O_PATH).open("/etc/shadow").expect("its path");
    let null = File::options().read(true).write(true).open("/dev/null").expect("a device");
    let (pipe, _writer) = io::pipe().expect("a pipe");
    let files =
        [append.as_fd(), read.as_fd(), write.as_fd(), named.as_fd(), null.as_fd(), pipe.as_fd()];
    for file in files {
        assert_eq!(give(0, file), refused, "{file:?}");
    }
    bench.monitor.ask(&Request::Next { number: 0 }).expect_err("nothing came");
    bench.monitor.ask(&Request::Switch(MIGRATION.into())).expect_err("none was given");
    assert_eq!(give(0, both.as_fd()), Ok(String::new()));
}

#[test]
fn ends_are_written_down_and_sockets_removed() {
    let bench = Bench::new(Vec::new());
    let record = ExitRecord { status: 1, text: "triple fault".into() };
    bench.monitor.ask(&Request::Ended(record.clone())).expect("written");
    let text = fs::read(bench.dir.path().join("exit.json")).expect("a record");
    assert_eq!(serde_json::from_slice::<ExitRecord>(&text).expect("a record"), record);
    let odd = ExitRecord { status: 1, text: "\u{1b}]0;ä\u{9b}2J\r\nb".into() };
    bench.monitor.ask(&Request::Ended(odd)).expect("written");
    let text = fs::read(bench.dir.path().join("exit.json")).expect("a record");
    let text = serde_json::from_slice::<ExitRecord>(&text).expect("a record").text;
    assert_eq!(text, " ]0;ä 2J  b", "no terminal is told anything");
    let path = |name: &str| bench.dir.path().join(name);
    let _sockets = ["keeper.sock", "console.sock", "other.sock", "vsock.sock_9"]
        .map(|name| UnixListener::bind(path(name)).expect("a socket"));
    fs::write(path("vsock.sock"), "a file").expect("written");
    fs::write(path("console.log"), "").expect("written");
    bench.monitor.ask(&Request::Clear).expect("removed");
    let left =
        ["keeper.sock", "console.sock", "other.sock", "vsock.sock"].map(|it| path(it).exists());
    assert_eq!(left, [false, false, true, true], "its own, and no file");
    assert!(!path("console.log").exists(), "there is nothing in it");
    fs::write(path("console.log"), "x").expect("written");
    bench.monitor.ask(&Request::Clear).expect("again");
    assert!(path("console.log").exists(), "there is something in it");
    bench.open(&Request::Reach { port: 9 }).expect("somebody waits there");
    bench.open(&Request::Reach { port: 8 }).expect_err("nobody waits there");
}

#[test]
fn nonsense_is_refused_and_the_next_request_heard() {
    let bench = Bench::new(Vec::new());
    for bytes in [&[0; 3][..], &[99; 8], &[1; 4000]] {
        let socket = bench.monitor.0.lock().expect("the socket");
        send_with_descriptor(socket.as_fd(), bytes, None).expect("sent");
        let mut answer = [0; LONGEST];
        let (count, _) = receive_with_descriptor(socket.as_fd(), &mut answer).expect("answered");
        let said = Reply::decode(&answer[..count]);
        assert_eq!(said, Some(Reply::Failed("There is no such request".into())));
    }
    bench.open(&Request::Kernel).expect("it goes on");
}

#[test]
fn one_that_is_gone_is_said_to_be() {
    let mut bench = Bench::new(Vec::new());
    bench.end();
    let error = bench.open(&Request::Kernel).expect_err("nobody answers").to_string();
    assert!(error.contains("monitor of this VM's keeper is gone"), "{error}");
    let error = bench.monitor.ask(&Request::Clear).expect_err("nobody answers");
    assert!(error.to_string().contains("the guest runs on"), "{error}");
}

#[test]
fn one_that_hears_no_more_leaves_nobody_waiting() {
    let bench = Bench::new(Vec::new());
    {
        let socket = bench.monitor.0.lock().expect("the socket");
        // Nothing is no request, and all that can be heard from one that is gone.
        send_with_descriptor(socket.as_fd(), &[], None).expect("sent");
    }
    let error = bench.open(&Request::Kernel).expect_err("nobody answers").to_string();
    assert!(error.contains("monitor of this VM's keeper is gone"), "{error}");
    assert!(bench.monitor.has_ended());
}

#[test]
fn whether_it_is_there_is_seen() {
    let mut bench = Bench::new(Vec::new());
    assert!(!bench.monitor.has_ended());
    bench.open(&Request::Kernel).expect("it answers");
    assert!(!bench.monitor.has_ended());
    let busy = bench.monitor.clone();
    let held = busy.0.lock().expect("the socket");
    assert!(!bench.monitor.has_ended(), "nobody waits for what it does now");
    drop(held);
    bench.end();
    assert!(bench.monitor.has_ended());
}

#[test]
fn one_that_does_not_come_up_is_none() {
    let pair = || {
        let kind = SockType::SeqPacket;
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).expect("a pair")
    };
    let (ours, theirs) = pair();
    greet(theirs.as_fd()).expect("said");
    Monitor::that_is_up(ours).expect("it is there");
    let (ours, theirs) = pair();
    drop(theirs);
    let error = Monitor::that_is_up(ours).expect_err("it ended").to_string();
    assert!(error.contains("did not come up"), "{error}");
    let (ours, theirs) = pair();
    send_with_descriptor(theirs.as_fd(), &Reply::Errno(1).encode(), None).expect("sent");
    Monitor::that_is_up(ours).expect_err("that is no greeting");
}

#[test]
fn it_stays_when_its_keeper_says_no_more() {
    let mut bench = Bench::new(Vec::new());
    let (other, _) = UnixStream::pair().expect("a pair");
    bench.monitor = Monitor(Arc::new(Mutex::new(other.into())));
    std::thread::sleep(Duration::from_millis(50));
    let lives = bench.thread.as_ref().is_some_and(|thread| !thread.is_finished());
    assert!(lives, "what it holds is held until its keeper has ended");
}

#[test]
fn a_process_with_threads_has_none() {
    let bench = Bench::new(Vec::new());
    let place = Place { name: "web".into(), uuid: "u".into(), dir: bench.dir.path().to_owned() };
    let host = Host::of(&bench.spec, &place, Vec::new(), None);
    let error = Monitor::fork(host, None, None).expect_err("tests run in threads").to_string();
    assert!(error.contains("threads"), "{error}");
}

#[test]
fn interfaces_are_taken_off_and_put_back() {
    apart(|| {
        let dir = tempfile::tempdir().expect("directory");
        let net = vec![NetSpec { bridge: "br0".into(), mac: None }];
        let spec = VmSpec { net, ..guest_spec(dir.path()) };
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
        let (interfaces, _devices) = Interfaces::make(&spec, &place, true).expect("made");
        let tap = interfaces.facts()[0].tap.clone();
        interfaces.ports()[0].await_carrier().expect("it comes up");
        let bench = Bench::new(interfaces.ports());
        let mut interfaces = interfaces.monitored(&bench.monitor);
        assert_eq!(interfaces.facts()[0].tap, tap);
        let state = || bridge_state(&tap);
        interfaces.disconnect().expect("off");
        assert!(interfaces.is_off());
        assert_eq!(state(), "disabled");
        interfaces.connect().expect("on");
        assert_eq!(state(), "forwarding");
        interfaces.disconnect().expect("off");
        interfaces.reconnect();
        assert!(!interfaces.is_off());
        assert_eq!(state(), "forwarding");
        drop(bench);
        interfaces.disconnect().expect_err("nobody does it");
        assert!(!interfaces.is_off(), "it is on the network as before");
    });
}

/// The state of the bridge's port `link`, as `bridge` (of iproute2) says it.
fn bridge_state(link: &str) -> String {
    let said = std::process::Command::new("bridge").args(["link", "show", "dev", link]).output();
    let text = String::from_utf8(said.expect("bridge, of iproute2").stdout).expect("text");
    let mut words = text.split_whitespace().skip_while(|word| *word != "state");
    words.nth(1).unwrap_or_default().to_owned()
}
