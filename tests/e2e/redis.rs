//! A Redis container, and the client that writes and reads on one connection for as long as it is told to.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use crate::hosts::{ALPHA, BETA, CLIENT, Hosts};
use crate::running::until;

/// Filling 256 MiB, verifying them, and a move in between, on a busy machine.
const ANSWER_WITHIN: Duration = Duration::from_secs(300);

/// A Redis in a container; taken away from both hosts when it is dropped.
pub(crate) struct Redis {
    hosts: &'static Hosts,
    name: &'static str,
    address: String,
}

/// One connection to it.
pub(crate) struct Client {
    child: Child,
    commands: ChildStdin,
    lines: Receiver<String>,
    /// The longest between two answers, of all reports.
    silence: Duration,
}

impl Redis {
    /// Makes a bundle at `/srv/NAME` and runs it with the address 10.77.1.`last`.
    #[track_caller]
    pub(crate) fn start(hosts: &'static Hosts, host: &str, name: &'static str, last: u8) -> Self {
        let bundle = format!("/srv/{name}");
        let net = format!("bridge=br0,ip=10.77.1.{last}/16");
        let redis = Self { hosts, name, address: format!("10.77.1.{last}:6379") };
        redis.remove();
        make_bundle(hosts, host, &bundle);
        let words = ["run", "container", name, "--bundle", &bundle, "--net", &net];
        hosts.decamp(host, &words).expect(0);
        redis.await_listening();
        redis
    }

    /// A container runs before the Redis in it listens.
    #[track_caller]
    fn await_listening(&self) {
        let address = self.address.clone();
        let connected = std::thread::spawn(move || {
            let namespace =
                File::open(format!("/run/netns/{CLIENT}")).expect("the clients' network");
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("it can be entered");
            until("Redis to listen", ANSWER_WITHIN, || TcpStream::connect(&address).is_ok());
        });
        connected.join().expect("Redis listens");
    }

    /// Connects a client and waits until it has loaded its values.
    #[track_caller]
    pub(crate) fn client(&self, fill_mib: u32, rate: u32) -> Client {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", CLIENT]).arg(self.hosts.redis_client());
        command.arg(&self.address);
        command.args(["--fill-mib", &fill_mib.to_string(), "--rate", &rate.to_string()]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the client can be started");
        let commands = child.stdin.take().expect("a pipe");
        let output = child.stdout.take().expect("a pipe");
        let (said, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if said.send(line).is_err() {
                    return;
                }
            }
        });
        let client = Client { child, commands, lines, silence: Duration::ZERO };
        let ready = client.answer();
        assert_eq!(ready["ready"], true, "{ready}");
        client
    }

    fn remove(&self) {
        for host in [ALPHA, BETA] {
            if self.hosts.agent_runs(host) {
                self.hosts.decamp(host, &["stop", self.name]);
                self.hosts.decamp(host, &["rm", self.name, "--yes", "--keep-files"]);
            }
            self.hosts.exec(host, &["rm", "-rf", &format!("/srv/{}", self.name)]);
        }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.remove();
        }
    }
}

/// Makes a Redis bundle on a host.
#[track_caller]
pub(crate) fn make_bundle(hosts: &Hosts, host: &str, path: &str) {
    let maker = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/redis-bundle");
    hosts.exec(host, &[maker, path]).expect(0);
}

impl Client {
    #[track_caller]
    fn answer(&self) -> Value {
        match self.lines.recv_timeout(ANSWER_WITHIN) {
            Ok(line) => {
                serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
            }
            Err(RecvTimeoutError::Timeout) => panic!("the client says nothing"),
            Err(RecvTimeoutError::Disconnected) => panic!("the client has ended"),
        }
    }

    /// What happened since the last report. Panics if anything went wrong.
    #[track_caller]
    pub(crate) fn report(&mut self) -> Value {
        writeln!(self.commands, "report").expect("the client listens");
        let report = self.answer();
        assert_eq!(report["errors"], 0, "{report}");
        let gap = report["longest_gap_ms"].as_f64().expect("a report has a gap");
        self.silence = self.silence.max(Duration::from_secs_f64(gap / 1e3));
        report
    }

    /// Waits until it has had answers since the last report; panics when the connection is dead.
    #[track_caller]
    pub(crate) fn is_served(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(120);
        self.report();
        while self.report()["ops"].as_u64() < Some(10) {
            assert!(Instant::now() < deadline, "the client gets no answers");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The same; notes the longest silence since the last report.
    #[track_caller]
    pub(crate) fn is_served_after(&mut self, gaps: &mut Vec<f64>) {
        let gap = self.report()["longest_gap_ms"].as_f64();
        gaps.push(gap.expect("a report has a gap"));
        self.is_served();
    }

    /// The longest silence since the client began, as its reports had it.
    pub(crate) fn longest_silence(&self) -> Duration {
        self.silence
    }

    /// Asks for every key once more on the same connection. Panics unless all is as it should be.
    #[track_caller]
    pub(crate) fn finish(mut self) -> Value {
        writeln!(self.commands, "stop").expect("the client listens");
        let verdict = self.answer();
        assert_eq!(verdict["ok"], true, "{verdict}");
        let status = self.child.wait().expect("a child can be waited for");
        assert!(status.success(), "{verdict}");
        verdict
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
