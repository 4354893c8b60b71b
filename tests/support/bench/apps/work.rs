//! A program that puts load on an application from the clients' network, until it is interrupted.

use std::io::Read;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{BenchError, Result};
use crate::hosts::{CLIENT, Reaped, await_that};

/// A program that was interrupted ends within this.
const ENDED_WITHIN: Duration = Duration::from_secs(30);

/// The program at work. Killed when this is dropped.
pub(crate) struct Work {
    program: String,
    process: Reaped,
    said: Vec<JoinHandle<String>>,
}

impl Work {
    /// Starts it.
    pub(crate) fn start(program: &str, words: &[&str]) -> Result<Self> {
        // A shell that starts us in the background has us ignore interrupts, and we would hand that on.
        let inside = inside(program, words);
        let mut child = Command::new("env")
            .arg("--default-signal=INT")
            .arg(inside.get_program())
            .args(inside.get_args())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(BenchError::io(format!("start {program}")))?;
        // Read all the time: a pipe that is full would stop it.
        let said = [child.stdout.take().map(read), child.stderr.take().map(read)];
        let said = said.into_iter().flatten().collect();
        Ok(Self { program: program.to_owned(), process: Reaped(child), said })
    }

    /// Interrupts it, and gives what it said. An error if it had ended before.
    pub(crate) fn interrupt(mut self) -> Result<String> {
        let early = self.process.0.try_wait().map_err(BenchError::io("look after a program"))?;
        if early.is_none() {
            let pid = Pid::from_raw(self.process.0.id() as i32);
            kill(pid, Signal::SIGINT)
                .map_err(|errno| BenchError::io("interrupt a program")(errno.into()))?;
            let what = format!("{} to end", self.program);
            await_that(&what, ENDED_WITHIN, || {
                self.process.0.try_wait().map_err(BenchError::io("wait for a program"))
            })?;
        }
        let said = self.said.drain(..).map(|thread| thread.join().unwrap_or_default());
        let said = said.collect::<Vec<_>>().join("\n");
        match early {
            None => Ok(said),
            Some(status) => {
                let program = &self.program;
                Err(BenchError::wrong(format!("{program} ended by itself with {status}: {said}")))
            }
        }
    }
}

/// A command in the clients' network.
pub(crate) fn inside(program: &str, words: &[&str]) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", CLIENT, program]).args(words);
    command
}

fn read(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is what there is to tell.
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
