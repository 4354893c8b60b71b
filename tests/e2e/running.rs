//! Commands run to their end or watched in the background, each with a deadline, and waiting for events.

use std::fmt;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Between two looks at something that is awaited.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How a command ended.
#[derive(Clone)]
pub(crate) struct Ran {
    pub(crate) what: String,
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Panics unless the exit code is this one.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert!(self.code == Some(code), "wanted exit code {code}\n{self}");
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}\n{self}"))
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{}\n  exit code {:?}\n  stdout: {}\n  stderr: {}",
            self.what,
            self.code,
            self.stdout.trim_end(),
            self.stderr.trim_end()
        )
    }
}

/// A command under way. Killed when it is dropped.
pub(crate) struct Pending {
    what: String,
    child: Child,
    output: Option<(JoinHandle<String>, JoinHandle<String>)>,
}

impl Pending {
    /// Starts it with its output taken.
    pub(crate) fn start(command: &mut Command) -> Self {
        let what = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let output = Some((collect(out), collect(err)));
        Self { what, child, output }
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_some()
    }

    /// Interrupts it (SIGINT).
    #[track_caller]
    pub(crate) fn interrupt(&self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT).expect("it can be interrupted");
    }

    /// Waits for its end; panics when it takes longer than `within`.
    #[track_caller]
    pub(crate) fn ended(mut self, within: Duration) -> Ran {
        let what = self.what.clone();
        until(&format!("the end of {what}"), within, || self.has_ended());
        let status = self.child.wait().expect("a child can be waited for");
        let (out, err) = self.output.take().expect("taken only here");
        let text = |thread: JoinHandle<String>| thread.join().expect("reading does not panic");
        Ran { what, code: status.code(), stdout: text(out), stderr: text(err) }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs a command to its end.
#[track_caller]
pub(crate) fn run(command: &mut Command, within: Duration) -> Ran {
    Pending::start(command).ended(within)
}

/// Waits until `there` says yes; panics with `what` when it does not within the time.
#[track_caller]
pub(crate) fn until(what: &str, within: Duration, mut there: impl FnMut() -> bool) {
    find(what, within, || there().then_some(()));
}

/// Waits until `look` finds something.
#[track_caller]
pub(crate) fn find<T>(what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "gave up after {within:?} waiting for {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}
