//! The command contract, held against the real binary: help, bad usage, exit codes, certificates, and
//! the agent as a process. Moves are not here; they need hosts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

const VERBS: [&[&str]; 25] = [
    &["agent"],
    &["pki"],
    &["pki", "init"],
    &["pki", "issue"],
    &["run"],
    &["run", "vm"],
    &["run", "container"],
    &["ls"],
    &["inspect"],
    &["logs"],
    &["console"],
    &["cpu"],
    &["cpu", "baseline"],
    &["start"],
    &["stop"],
    &["rm"],
    &["migrate"],
    &["cancel"],
    &["resolve"],
    &["hook"],
    &["hook", "install"],
    &["hook", "remove"],
    &["hook", "oci"],
    &["hook", "criu"],
    &[],
];

/// `decamp` with no socket of the environment.
fn decamp() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_decamp"));
    command.env_remove("DECAMP_SOCKET").env_remove("DECAMP_LOG").stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    decamp().args(arguments).output().expect("decamp runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn assert_exit(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{}\n{}", stdout(output), stderr(output));
}

/// An agent of its own in a directory of its own.
struct Agent {
    dir: TempDir,
    child: Child,
}

impl Agent {
    /// Certificates and configuration for a host `alpha` that knows a host `beta`, where nobody is.
    fn prepare() -> TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        let pki = dir.path().join("pki");
        let pki = pki.to_str().expect("UTF-8");
        assert_exit(&run(&["pki", "init", pki]), 0);
        assert_exit(&run(&["pki", "issue", pki, "alpha", "--address", "127.0.0.1"]), 0);
        let config = format!(
            "name = \"alpha\"\nlisten = \"127.0.0.1:0\"\nsocket = \"{0}/decamp.sock\"\n\
             state_dir = \"{0}/state\"\nca = \"pki/ca.pem\"\ncertificate = \"pki/alpha.pem\"\n\
             key = \"pki/alpha.key\"\n[hosts]\nbeta = \"127.0.0.1:9\"\n",
            dir.path().display()
        );
        fs::write(dir.path().join("agent.toml"), config).expect("written");
        dir
    }

    fn command(dir: &Path) -> Command {
        let mut command = decamp();
        command.arg("agent").arg("--config").arg(dir.join("agent.toml"));
        command
    }

    fn start() -> Self {
        Self::start_in(Self::prepare())
    }

    fn start_in(dir: TempDir) -> Self {
        let log = fs::File::create(dir.path().join("agent.log")).expect("a log");
        let child = Self::command(dir.path()).stderr(log).spawn().expect("the agent starts");
        let agent = Self { dir, child };
        let deadline = Instant::now() + Duration::from_secs(120);
        while agent.ask(&["ls"]).status.code() != Some(0) {
            assert!(Instant::now() < deadline, "{}", agent.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        agent
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("decamp.sock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("agent.log")).unwrap_or_default()
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        decamp().env("DECAMP_SOCKET", self.socket()).args(arguments).output().expect("decamp runs")
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(signal).arg(self.child.id().to_string()).status();
        assert!(sent.expect("kill runs").success());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // One that ended already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_verb_has_help_with_an_example() {
    for verb in VERBS {
        let output = run(&[verb, &["--help"]].concat());
        assert_exit(&output, 0);
        let help = stdout(&output);
        assert!(help.contains("Example: decamp "), "{verb:?}\n{help}");
        assert!(help.contains("--json") && help.contains("--socket"), "{verb:?}\n{help}");
    }
}

#[test]
fn the_keeper_is_not_advertised() {
    assert!(!stdout(&run(&["--help"])).contains("keeper"));
}

#[test]
fn bad_usage_exits_with_2() {
    for arguments in [
        &[][..],
        &["dance"],
        &["ls", "--sideways"],
        &["inspect"],
        &["inspect", "Web"],
        &["run", "vm", "web"],
        &["run", "vm", "web", "--kernel", "k", "--memory", "much"],
        &["run", "vm", "web", "--kernel", "k", "--cpus", "0"],
        &["run", "container", "web", "--bundle", "b", "--net", "br0"],
        &["run", "container", "web", "--bundle", "b", "--runtime", "kata"],
        &["migrate", "web"],
        &["migrate", "--to", "beta"],
        &["migrate", "web", "--to", "be ta"],
        &["migrate", "web", "--to", "beta", "--max-downtime", "300"],
        &["migrate", "web", "--to", "beta", "--streams", "0"],
        &["migrate", "web", "--to", "beta", "--streams", "65"],
        &["migrate", "web", "--to", "beta", "--compress", "gzip"],
        &["migrate", "web", "--to", "beta", "--mode", "fast"],
        &["migrate", "web", "--to", "beta", "--path", "/a"],
        &["migrate", "web", "--to", "beta", "--timeout", "0s"],
        &["console"],
        &["console", "web", "--detach-key", "ctrl-1"],
        &["console", "web", "--for", "long"],
        &["cpu", "baseline"],
        &["run", "vm", "web", "--kernel", "k", "--cpu-baseline", "/dev/null"],
        &["run", "vm", "web", "--kernel", "k", "--cpu-baseline", "/nowhere/at/all"],
        &["resolve", "m"],
        &["resolve", "m", "--keep", "both"],
        &["pki", "issue", "."],
        &["agent"],
    ] {
        let output = run(arguments);
        assert_exit(&output, 2);
        assert!(!stderr(&output).is_empty(), "{arguments:?}");
    }
}

#[test]
fn without_an_agent_it_says_how_to_start_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("nobody.sock");
    let socket = socket.to_str().expect("UTF-8");
    for arguments in
        [&["ls"][..], &["migrate", "web", "--to", "beta"], &["stop", "web"], &["console", "web"]]
    {
        let output = run(&[arguments, &["--socket", socket]].concat());
        assert_exit(&output, 1);
        let text = stderr(&output);
        assert!(text.contains(socket) && text.contains("decamp agent --config"), "{text}");
    }
    let output = run(&["ls", "--json", "--socket", socket]);
    assert_exit(&output, 1);
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(answer["error"]["message"].as_str().is_some_and(|text| text.contains(socket)));
}

#[test]
fn certificates_are_issued_and_never_overwritten() {
    let dir = tempfile::tempdir().expect("a directory");
    let pki = dir.path().join("pki");
    let at = pki.to_str().expect("UTF-8");
    let orphan = run(&["pki", "issue", at, "alpha"]);
    assert_exit(&orphan, 3);
    assert!(stderr(&orphan).contains("decamp pki init"));
    assert_exit(&run(&["pki", "init", at]), 0);
    let issued = run(&["pki", "issue", at, "alpha", "--address", "10.0.0.1", "--json"]);
    assert_exit(&issued, 0);
    let files: Value = serde_json::from_slice(&issued.stdout).expect("JSON");
    assert_eq!(files["certificate"], pki.join("alpha.pem").to_str().expect("UTF-8"));
    let key = fs::read(pki.join("alpha.key")).expect("the key");
    for key in ["ca.key", "alpha.key"] {
        let mode = fs::metadata(pki.join(key)).expect("the key").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    for again in [&["pki", "init", at][..], &["pki", "issue", at, "alpha"]] {
        let output = run(again);
        assert_exit(&output, 3);
        assert!(stderr(&output).contains("exists already"));
    }
    assert_eq!(fs::read(pki.join("alpha.key")).expect("the key"), key);
    assert_exit(&run(&["pki", "issue", at, "../beta"]), 2);
    assert!(!dir.path().join("beta.pem").exists());
}

#[test]
fn a_wrong_configuration_is_named_with_its_place() {
    let dir = Agent::prepare();
    let path = dir.path().join("agent.toml");
    let good = fs::read_to_string(&path).expect("the configuration");
    for (text, says) in [
        (good.replace("listen", "lisen"), "unknown field `lisen`"),
        (good.replace("127.0.0.1:0", "somewhere"), "is not ADDR or ADDR:PORT"),
        ("name = ".to_owned(), "line 1"),
    ] {
        fs::write(&path, &text).expect("written");
        let output = Agent::command(dir.path()).output().expect("decamp runs");
        assert_exit(&output, 2);
        let told = stderr(&output);
        assert!(
            told.contains(says) && told.contains("line ") && told.contains("column "),
            "{told}"
        );
        assert!(told.contains("agent.toml"), "{told}");
    }
    fs::remove_file(&path).expect("removed");
    let output = Agent::command(dir.path()).output().expect("decamp runs");
    assert_exit(&output, 2);
    assert!(!dir.path().join("state").exists(), "nothing was begun");
}

#[test]
fn a_certificate_of_another_host_is_noticed_at_the_start() {
    let dir = Agent::prepare();
    let path = dir.path().join("agent.toml");
    let text = fs::read_to_string(&path).expect("the configuration");
    fs::write(&path, text.replace("name = \"alpha\"", "name = \"omega\"")).expect("written");
    let output = Agent::command(dir.path()).output().expect("decamp runs");
    assert_exit(&output, 1);
    assert!(stderr(&output).contains("decamp pki issue"), "{}", stderr(&output));
    assert!(!dir.path().join("decamp.sock").exists());
}

#[test]
fn one_agent_a_state_directory_and_a_stale_socket_is_no_hindrance() {
    let agent = Agent::start();
    let mode = fs::metadata(agent.socket()).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = Agent::command(agent.dir.path()).output().expect("decamp runs");
    assert_exit(&second, 1);
    assert!(stderr(&second).contains("Another agent works in"), "{}", stderr(&second));
    assert_exit(&agent.ask(&["ls"]), 0);
    // Killed, it leaves its socket behind; the next one takes over.
    agent.signal("-KILL");
    let mut agent = agent;
    agent.child.wait().expect("reaped");
    assert!(agent.socket().exists());
    assert_exit(&agent.ask(&["ls"]), 1);
    let log = fs::File::create(agent.dir.path().join("agent.log")).expect("a log");
    agent.child = Agent::command(agent.dir.path()).stderr(log).spawn().expect("starts again");
    let deadline = Instant::now() + Duration::from_secs(120);
    while agent.ask(&["ls"]).status.code() != Some(0) {
        assert!(Instant::now() < deadline, "{}", agent.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    agent.signal("-TERM");
    let ended = agent.child.wait().expect("reaped");
    assert_eq!(ended.code(), Some(0), "{}", agent.log());
    assert!(!agent.socket().exists());
}

#[test]
fn refusals_exit_with_3_and_touch_nothing() {
    let agent = Agent::start();
    for arguments in [
        &["inspect", "nobody"][..],
        &["logs", "nobody"],
        &["start", "nobody"],
        &["stop", "nobody"],
        &["rm", "nobody"],
        &["migrate", "nobody", "--to", "beta"],
        &["cancel", "nobody"],
        &["resolve", "nobody", "--keep", "source"],
        &["run", "vm", "web", "--kernel", "/no/such/kernel"],
        &["run", "container", "web", "--bundle", "/no/such/bundle"],
    ] {
        let output = agent.ask(arguments);
        assert_exit(&output, 3);
        assert!(stdout(&output).is_empty(), "{arguments:?}: {}", stdout(&output));
    }
    let list = agent.ask(&["ls", "--all", "--json"]);
    assert_eq!(stdout(&list).trim(), "[]");
    let workloads = agent.dir.path().join("state/workloads");
    assert_eq!(fs::read_dir(workloads).expect("there").count(), 0);
}

#[test]
fn a_refused_migration_is_an_object_for_machines() {
    let agent = Agent::start();
    let one = agent.ask(&["migrate", "nobody", "--to", "beta", "--json"]);
    assert_exit(&one, 3);
    let report: Value = serde_json::from_slice(&one.stdout).expect("one object");
    assert_eq!(report["outcome"], "refused");
    assert_eq!(report["workload"], "nobody");
    let two = agent.ask(&["migrate", "nobody", "neither", "--to", "beta", "--json"]);
    assert_exit(&two, 3);
    let reports: Value = serde_json::from_slice(&two.stdout).expect("an array");
    assert_eq!(reports.as_array().map(Vec::len), Some(2));
}

#[test]
fn the_api_speaks_json_to_any_client() {
    let agent = Agent::start();
    let ask = |request: &str| {
        use std::io::{Read, Write};
        let mut stream = std::os::unix::net::UnixStream::connect(agent.socket()).expect("connects");
        write!(stream, "{request}").expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        let status = head.split(' ').nth(1).expect("a status").to_owned();
        (status, serde_json::from_str::<Value>(body).expect("JSON"))
    };
    let get =
        |path: &str| ask(&format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
    let (status, host) = get("/v1/host");
    assert_eq!((status.as_str(), &host["name"]), ("200", &Value::from("alpha")));
    assert_eq!(get("/v1/migrations"), ("200".into(), Value::Array(Vec::new())));
    let (status, error) = get("/v1/workloads/nobody");
    assert_eq!((status.as_str(), &error["code"]), ("404", &Value::from("unknown-workload")));
    assert_eq!(get("/v2/anything").0, "400");
    let body = "{\"name\":\"web\",\"kind\":\"vm\",\"spec\":{},\"colour\":\"red\"}";
    let (status, error) = ask(&format!(
        "POST /v1/workloads HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    ));
    assert_eq!(status, "400");
    assert!(error["message"].as_str().is_some_and(|text| text.contains("colour")), "{error}");
}

/// Something that listens like an agent: takes one request for a move, and lets the test go on with it.
struct Feigned {
    dir: TempDir,
    listener: std::os::unix::net::UnixListener,
}

impl Feigned {
    fn listen() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = std::os::unix::net::UnixListener::bind(dir.path().join("decamp.sock"));
        Self { listener: listener.expect("listens"), dir }
    }

    /// The next connection, and the path and body of what was asked on it.
    fn request(&self) -> (std::os::unix::net::UnixStream, String) {
        use std::io::{BufRead, BufReader, Read};
        let (stream, _) = self.listener.accept().expect("a connection");
        let mut reader = BufReader::new(stream.try_clone().expect("cloned"));
        let (mut head, mut length) = (String::new(), 0);
        while !head.ends_with("\r\n\r\n") {
            let start = head.len();
            assert!(reader.read_line(&mut head).expect("a line") > 0, "{head}");
            let line = head[start..].to_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().expect("a number");
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("a body");
        (stream, head + &String::from_utf8_lossy(&body))
    }

    fn migrate(&self, names: &[&str]) -> Child {
        let mut command = decamp();
        command.env("DECAMP_SOCKET", self.dir.path().join("decamp.sock")).arg("migrate");
        command.args(names).args(["--to", "beta", "--json"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("decamp runs")
    }

    /// Whether something is asked within the time.
    fn is_asked_within(&self, time: Duration) -> bool {
        use std::os::fd::AsFd;
        let mut polled =
            [nix::poll::PollFd::new(self.listener.as_fd(), nix::poll::PollFlags::POLLIN)];
        let timeout = nix::poll::PollTimeout::try_from(time).expect("a time");
        nix::poll::poll(&mut polled, timeout).expect("polled") > 0
    }
}

const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\r\n";

fn interrupt(child: &Child) {
    let sent = Command::new("kill").arg("-INT").arg(child.id().to_string()).status();
    assert!(sent.expect("kill runs").success());
}

/// The report of a move that went well.
fn completed(name: &str) -> Value {
    use decamp_shared::session::report::{DowntimeParts, PageCounts, Predicted};
    serde_json::json!({
        "migration": "m", "workload": name, "kind": "vm", "from": "alpha", "to": "beta",
        "outcome": "completed", "reason": null, "mode": "pre-copy", "tracker": null,
        "total_ms": 1.0, "downtime_ms": 1.0, "downtime": DowntimeParts::default(), "rounds": [],
        "memory_bytes": 0, "wire_bytes": 0, "file_bytes": 0, "pages": PageCounts::default(),
        "streams": 1, "encrypted": true, "predicted": Predicted::default(), "source_stall_ms": 0.0,
    })
}

/// Reads standard error until a line of it says that.
fn await_remark(child: &mut Child, remark: &str) -> std::io::BufReader<std::process::ChildStderr> {
    use std::io::BufRead;
    let mut reader = std::io::BufReader::new(child.stderr.take().expect("a pipe"));
    let mut line = String::new();
    while !line.contains(remark) {
        line.clear();
        assert!(reader.read_line(&mut line).expect("a line") > 0, "it never said {remark}");
    }
    reader
}

fn outcomes(output: &Output) -> Vec<String> {
    let reports: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let reports = reports.as_array().cloned().unwrap_or_else(|| vec![reports]);
    reports.iter().map(|one| one["outcome"].as_str().unwrap_or("none").to_owned()).collect()
}

#[test]
fn a_move_that_is_not_watched_to_its_end_is_unresolved_and_no_other_begins() {
    use std::io::Write;
    let agent = Feigned::listen();
    let mut child = agent.migrate(&["web", "db"]);
    let (mut moving, asked) = agent.request();
    assert!(asked.starts_with("POST /v1/migrations "), "{asked}");
    moving.write_all(STREAM_HEAD.as_bytes()).expect("written");
    interrupt(&child);
    let _stderr = await_remark(&mut child, "Cancelling");
    let (_cancelling, asked) = agent.request();
    assert!(asked.starts_with("POST /v1/migrations/web/cancel "), "{asked}");
    interrupt(&child);
    let output = child.wait_with_output().expect("ended");
    assert_exit(&output, 5);
    assert_eq!(outcomes(&output), ["unresolved", "cancelled"]);
    assert!(!agent.is_asked_within(Duration::ZERO), "db was not begun");
}

#[test]
fn an_interrupt_that_comes_too_late_for_one_move_stops_the_others() {
    use std::io::Write;
    let agent = Feigned::listen();
    let mut child = agent.migrate(&["web", "db"]);
    let (mut moving, _) = agent.request();
    // Before the agent has answered: there is nothing to cancel yet, and nothing is forgotten.
    interrupt(&child);
    let _stderr = await_remark(&mut child, "Cancelling");
    moving.write_all(STREAM_HEAD.as_bytes()).expect("written");
    let (mut cancelling, asked) = agent.request();
    assert!(asked.starts_with("POST /v1/migrations/web/cancel "), "{asked}");
    let refusal = "{\"code\":\"too-late\",\"message\":\"It is fenced\",\"refusals\":[]}";
    write!(
        cancelling,
        "HTTP/1.1 409 Conflict\r\nContent-Length: {}\r\n\r\n{refusal}",
        refusal.len()
    )
    .expect("written");
    let report = serde_json::json!({ "event": "report", "report": completed("web") });
    writeln!(moving, "{report}").expect("written");
    drop(moving);
    let output = child.wait_with_output().expect("ended");
    assert_exit(&output, 4);
    assert_eq!(outcomes(&output), ["completed", "cancelled"]);
    assert!(!agent.is_asked_within(Duration::ZERO), "db was not begun");
}

#[test]
fn an_agent_that_is_lost_before_it_answers_leaves_the_outcome_open() {
    let agent = Feigned::listen();
    let mut child = agent.migrate(&["web", "db"]);
    drop(agent.request());
    let _stderr = await_remark(&mut child, "Lost the agent");
    interrupt(&child);
    let output = child.wait_with_output().expect("ended");
    assert_exit(&output, 5);
    assert_eq!(outcomes(&output), ["unresolved", "cancelled"]);
}

#[test]
fn whatever_ends_a_stay_at_a_console_the_terminal_is_as_before() {
    use nix::sys::termios::{LocalFlags, tcgetattr};
    use std::io::{Read, Write};
    let agent = Feigned::listen();
    for signal in ["-INT", "-TERM", "-HUP", "-QUIT"] {
        let terminal = nix::pty::openpty(None, None).expect("a terminal");
        let (mut screen, slave) = (fs::File::from(terminal.master), terminal.slave);
        let before = tcgetattr(&slave).expect("settings");
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        let mut command = decamp();
        command.env("DECAMP_SOCKET", agent.dir.path().join("decamp.sock"));
        command.args(["console", "web"]).stdin(end()).stdout(end()).stderr(end());
        let mut child = command.spawn().expect("decamp runs");
        let (mut console, asked) = agent.request();
        assert!(asked.starts_with("GET /v1/workloads/web/console "), "{asked}");
        let head = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\
            Upgrade: decamp-console\r\n\r\n";
        console.write_all(head.as_bytes()).expect("written");
        let deadline = Instant::now() + Duration::from_secs(120);
        let is_raw = || {
            let settings = tcgetattr(&slave).expect("settings");
            !settings.local_flags.contains(LocalFlags::ICANON)
        };
        while !is_raw() {
            assert!(Instant::now() < deadline, "it never took every key");
            std::thread::sleep(Duration::from_millis(1));
        }
        let sent = Command::new("kill").arg(signal).arg(child.id().to_string()).status();
        assert!(sent.expect("kill runs").success());
        assert_eq!(child.wait().expect("a child").code(), Some(1), "{signal}");
        assert_eq!(tcgetattr(&slave).expect("settings"), before, "{signal}");
        let mut shown = [0; 1024];
        let count = screen.read(&mut shown).expect("what it said");
        let shown = String::from_utf8_lossy(&shown[..count]);
        assert!(shown.contains("At the console of web. Ctrl-] detaches."), "{shown}");
    }
}
