//! Sitting at consoles: a guest's serial port and a container's terminal, from a terminal and from a pipe,
//! beside others, through a move, and what is said when there is nothing to sit at.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use serde_json::json;

use crate::guest::Guest;
use crate::hosts::{ALPHA, BETA, Hosts, hosts};
use crate::refusals::refused;
use crate::running::{Ran, until};
use crate::{Needs, Test};

/// Anything that somebody waits for at a console.
const SOON: Duration = Duration::from_secs(120);
/// Ctrl-].
const DETACH: &[u8] = b"\x1d";

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("console::of_a_vm", Needs::Kvm, of_a_vm),
        Test::new("console::of_a_vm_through_a_move", Needs::Kvm, through_a_move),
        Test::new("console::of_a_container", Needs::Containers, of_a_container),
        Test::new("console::where_there_is_none", Needs::Both, where_there_is_none),
    ]
}

/// Somebody at a console, on a terminal of his own.
struct Seat {
    hosts: &'static Hosts,
    host: &'static str,
    name: String,
    child: Child,
    master: File,
    /// Kept, so that the settings can be seen, and so that what is read last is not lost.
    slave: File,
    seen: Arc<Mutex<String>>,
    before: Termios,
}

impl Seat {
    /// Takes it, on a terminal of 97 columns and 33 rows, and waits until it is there.
    #[track_caller]
    fn take(hosts: &'static Hosts, host: &'static str, name: &str, more: &[&str]) -> Self {
        let size = Winsize { ws_row: 33, ws_col: 97, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(Some(&size), None).expect("a terminal");
        let (master, slave) = (File::from(pair.master), File::from(pair.slave));
        let before = tcgetattr(&slave).expect("settings");
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        let child = hosts
            .command(host, &[&["console", name], more].concat())
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .expect("it can be started");
        let seen = Arc::new(Mutex::new(String::new()));
        let (mut screen, shown) = (master.try_clone().expect("a descriptor"), seen.clone());
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut piece) {
                let text = String::from_utf8_lossy(&piece[..count]);
                shown.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
            }
        });
        let seat = Self { hosts, host, name: name.to_owned(), child, master, slave, seen, before };
        seat.shows(&format!("At the console of {name}. "));
        until("a raw terminal", SOON, || seat.is_raw());
        seat
    }

    fn seen(&self) -> String {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until it has shown `text`, and begins anew behind it.
    #[track_caller]
    fn shows(&self, text: &str) {
        until(&format!("{text:?} at the console of {}", self.name), SOON, || {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.find(text).map(|at| seen.drain(..at + text.len())).is_some()
        });
    }

    fn types(&mut self, keys: &[u8]) {
        self.master.write_all(keys).expect("the terminal takes keys");
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave).expect("settings").local_flags.contains(LocalFlags::ICANON)
    }

    /// Sends a signal to the command in the host.
    #[track_caller]
    fn signal(&self, signal: &str) {
        let pattern = format!("[d]ecamp console {}", self.name);
        self.hosts.exec(self.host, &["pkill", &format!("-{signal}"), "-f", &pattern]).expect(0);
    }

    /// Waits for its end, which says `text`, with that exit code and the terminal as it was.
    #[track_caller]
    fn ends(mut self, code: i32, text: &str) {
        self.shows(text);
        until("its end", SOON, || self.child.try_wait().expect("a child").is_some());
        let status = self.child.wait().expect("a child");
        assert_eq!(status.code(), Some(code), "{}", self.seen());
        assert_eq!(tcgetattr(&self.slave).expect("settings"), self.before, "its settings");
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `decamp console` in a host, with `input` from a pipe.
#[track_caller]
fn piped(hosts: &'static Hosts, host: &str, input: &str, words: &str) -> Ran {
    let script = format!("printf '{input}' | decamp console {words}");
    hosts.exec(host, &["/bin/sh", "-c", &script])
}

fn of_a_vm() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "seated", "128M", "fill=16 hot=1 report=50");
    let mut first = Seat::take(hosts, ALPHA, "seated", &[]);
    first.shows("verdict=clean");
    let keys = ["--detach-key", "ctrl-p,ctrl-q"];
    let mut second = Seat::take(hosts, ALPHA, "seated", &keys);
    // Both see what either asks for, and somebody behind a pipe sees it too.
    second.types(b"v");
    first.shows("verified pages=");
    second.shows("verified pages=");
    let third = piped(hosts, ALPHA, "v", "seated --for 10s").expect(0);
    assert!(third.stdout.contains("bad=0 verdict=clean") && third.stderr.is_empty(), "{third}");
    first.shows("verified pages=");
    // It is never quiet: it is left all the same.
    piped(hosts, ALPHA, "", "seated").expect(0);
    let lines = piped(hosts, ALPHA, "", "seated --for 5s --json").expect(0).stdout;
    let first_line = lines.lines().next().expect("a line");
    let line: serde_json::Value = serde_json::from_str(first_line).expect("JSON");
    assert!(line["output"].as_str().is_some_and(|text| !text.is_empty()), "{lines}");
    second.types(b"\x10x\x10\x11");
    second.ends(0, "Detached from seated");
    first.types(DETACH);
    first.ends(0, "Detached from seated");
    // Whatever ends it, the terminal is as before.
    let third = Seat::take(hosts, ALPHA, "seated", &[]);
    third.signal("TERM");
    third.ends(1, "Interrupted");
    let fourth = Seat::take(hosts, ALPHA, "seated", &[]);
    hosts.restart_agent(ALPHA);
    fourth.ends(1, "Lost the agent");
    // It is at its console again with the next agent, and until the guest has no more to say.
    let mut fifth = Seat::take(hosts, ALPHA, "seated", &[]);
    fifth.shows("verdict=clean");
    let logs = hosts.begin(ALPHA, &["logs", "--follow", "seated"]);
    fifth.types(b"q");
    fifth.shows("end");
    fifth.ends(0, "seated has ended: ");
    let logged = logs.ended(SOON).expect(0).stdout;
    assert!(logged.trim_end().ends_with("end"), "{logged}");
    assert_eq!(logged, guest.log(ALPHA));
    refused(piped(hosts, ALPHA, "", "seated"), &["decamp start seated"]);
}

fn through_a_move() {
    let hosts = hosts();
    hosts.mend();
    let guest = Guest::start(hosts, ALPHA, "seated", "128M", "fill=16 hot=1 report=50");
    let seat = Seat::take(hosts, ALPHA, "seated", &[]);
    seat.shows("verdict=clean");
    hosts.decamp(ALPHA, &["migrate", "seated", "--to", "beta"]).expect(0);
    seat.ends(0, "seated has moved to beta: `decamp console seated` there goes on");
    refused(piped(hosts, ALPHA, "", "seated"), &["it moved to beta"]);
    // A move that fails does not disturb it.
    hosts.with_failpoints(ALPHA, "vm-load=return");
    let mut seat = Seat::take(hosts, BETA, "seated", &[]);
    seat.shows("verdict=clean");
    hosts.decamp(BETA, &["migrate", "seated", "--to", "alpha"]).expect(4);
    seat.types(b"v");
    seat.shows("verified pages=");
    seat.types(DETACH);
    seat.ends(0, "Detached from seated");
    hosts.mend();
    guest.runs_clean(BETA);
}

/// A shell in a container.
struct Shell {
    hosts: &'static Hosts,
    name: &'static str,
}

impl Shell {
    #[track_caller]
    fn start(hosts: &'static Hosts, name: &'static str, more: &[&str]) -> Self {
        let shell = Self { hosts, name };
        shell.remove();
        let bundle = format!("/srv/{name}");
        let maker = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/counter-bundle");
        hosts.exec(ALPHA, &[maker, &bundle]).expect(0);
        let path = hosts.path(ALPHA, &format!("srv/{name}/config.json"));
        let text = fs::read_to_string(&path).expect("a configuration");
        let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        config["process"]["args"] = json!(["/bin/sh", "-i"]);
        fs::write(&path, config.to_string()).expect("written");
        let words = ["run", "container", name, "--bundle", &bundle];
        hosts.decamp(ALPHA, &[&words[..], more].concat()).expect(0);
        shell
    }

    fn remove(&self) {
        for host in [ALPHA, BETA] {
            self.hosts.decamp(host, &["stop", self.name]);
            self.hosts.decamp(host, &["rm", self.name, "--yes", "--keep-files"]);
            self.hosts.exec(host, &["rm", "-rf", &format!("/srv/{}", self.name)]);
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.remove();
        }
    }
}

fn of_a_container() {
    let hosts = hosts();
    hosts.mend();
    let _shell = Shell::start(hosts, "shell", &["--tty"]);
    let mut seat = Seat::take(hosts, ALPHA, "shell", &[]);
    // It has the size of whoever sits there, and hears when that changes.
    seat.types(b"echo size $(busybox stty size)\r");
    seat.shows("size 33 97");
    let size = rustix::termios::Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&seat.master, size).expect("a size");
    seat.signal("WINCH");
    until("another size", SOON, || {
        seat.types(b"echo size $(busybox stty size)\r");
        std::thread::sleep(Duration::from_millis(200));
        seat.seen().contains("size 24 80")
    });
    // Ctrl-C is the container's.
    seat.types(b"kept=$((6 * 7)); busybox sleep 1000\r");
    seat.shows("sleep 1000");
    until("the end of a sleep", SOON, || {
        seat.types(b"\x03\recho is $kept\r");
        std::thread::sleep(Duration::from_millis(200));
        seat.seen().contains("is 42")
    });
    let piped_in = piped(hosts, ALPHA, "echo from $((5 * 5)) afar\\n", "shell").expect(0);
    assert!(piped_in.stdout.contains("from 25 afar"), "{piped_in}");
    seat.shows("from 25 afar");
    hosts.decamp(ALPHA, &["migrate", "shell", "--to", "beta"]).expect(0);
    seat.ends(0, "shell has moved to beta");
    let mut seat = Seat::take(hosts, BETA, "shell", &[]);
    seat.types(b"echo still $kept $(busybox stty size)\r");
    seat.shows("still 42 33 97");
    hosts.decamp(BETA, &["stop", "shell"]).expect(0);
    seat.ends(0, "shell has ended: ");
}

fn where_there_is_none() {
    let hosts = hosts();
    hosts.mend();
    refused(piped(hosts, ALPHA, "", "nobody"), &["There is no workload nobody"]);
    let _shell = Shell::start(hosts, "mute", &[]);
    refused(
        piped(hosts, ALPHA, "", "mute"),
        &["mute has no terminal: it was started without --tty", "decamp logs --follow mute"],
    );
}
