//! A client on one connection, in a thread of its own in the clients' network namespace: it asks, checks
//! the answer, and remembers the longest time between two answers. What is asked is known elsewhere.

use std::fs::File;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};

use super::talks::Talk;
use crate::error::{BenchError, Result};
use crate::hosts::{CLIENT, await_that};

/// From one question to the next; an observer that never rests keeps a processor from what it observes.
const REST: Duration = Duration::from_millis(2);
/// How long an answer may take before the connection counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// The client. It is told to end when this is dropped.
pub(crate) struct Observer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Default)]
struct Shared {
    end: AtomicBool,
    answers: AtomicU64,
    longest_us: AtomicU64,
}

impl Observer {
    /// Connects as soon as somebody listens, and waits until the first questions are answered.
    pub(crate) fn start(to: (&'static str, u16), talk: Box<dyn Talk>) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = thread::Builder::new()
            .name("observer".to_owned())
            .spawn(move || watch(to, talk, &theirs))
            .map_err(BenchError::io("start a thread"))?;
        let mut observer = Self { shared, thread: Some(thread) };
        observer.gap()?;
        Ok(observer)
    }

    /// The longest time between two answers since this was asked last. A silence that goes on is waited
    /// for, so it counts.
    pub(crate) fn gap(&mut self) -> Result<Duration> {
        let answered = self.shared.answers.load(Ordering::Acquire);
        await_that("an answer", 2 * PATIENCE, || {
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                self.join()?;
                return Err(BenchError::wrong("The client has ended"));
            }
            Ok((self.shared.answers.load(Ordering::Acquire) > answered).then_some(()))
        })?;
        Ok(Duration::from_micros(self.shared.longest_us.swap(0, Ordering::AcqRel)))
    }

    /// Has everything verified that was ever written.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        self.shared.end.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().unwrap_or_else(|_| Err(BenchError::wrong("The client panicked")))
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        // Whoever drops it without stopping it has an error already.
        let _ = self.join();
    }
}

fn watch(
    (address, port): (&'static str, u16),
    mut talk: Box<dyn Talk>,
    shared: &Shared,
) -> Result<()> {
    let namespace = format!("/run/netns/{CLIENT}");
    let namespace = File::open(&namespace).map_err(BenchError::io(format!("open {namespace}")))?;
    setns(namespace, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| BenchError::io("enter the clients' network")(errno.into()))?;
    let mut stream = await_that("the application to answer", Duration::from_secs(30), || {
        if shared.end.load(Ordering::Acquire) {
            return Err(BenchError::wrong("The client was ended before it was connected"));
        }
        let Ok(mut stream) = TcpStream::connect((address, port)) else { return Ok(None) };
        let ready = stream.set_nodelay(true).and_then(|()| stream.set_read_timeout(Some(PATIENCE)));
        ready.map_err(BenchError::io("set up a connection"))?;
        Ok(talk.greet(&mut stream)?.then_some(stream))
    })?;
    talk.begin(&mut stream)?;
    let mut last = Instant::now();
    let mut number = 0;
    while !shared.end.load(Ordering::Acquire) {
        number += 1;
        talk.ask(&mut stream, number)?;
        let now = Instant::now();
        let gap = now.duration_since(last).as_micros() as u64;
        shared.longest_us.fetch_max(gap, Ordering::AcqRel);
        shared.answers.store(number, Ordering::Release);
        last = now;
        sleep(REST);
    }
    talk.verify(&mut stream)
}
