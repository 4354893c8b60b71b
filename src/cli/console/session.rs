//! One stay at a console: what is typed goes to the agent, what is printed to the screen, until somebody
//! or something ends it. What is said about that is not known here.

use std::future;
use std::io;
use std::pin::pin;
use std::time::Duration;

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use nix::sys::signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::signal::unix::{Signal, SignalKind, signal as listen};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::keys::Watch;
use super::raw::{self, Raw};
use super::streams::{self, Typed};
use crate::cli::failure::Failure;
use crate::frames::{Decoder, FRAME_CAP, Frame};
use crate::messages::ConsoleEnd;

/// Without a terminal, and once the input has ended: nothing printed for so long is an end.
const QUIET: Duration = Duration::from_secs(1);
/// Whoever is never quiet is left after this.
const QUIET_WITHIN: Duration = Duration::from_secs(10);

type Connection = TokioIo<Upgraded>;

/// Why the stay has ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Left {
    /// By the keys.
    Detached,
    /// It was to last so long.
    TimeIsUp,
    /// Nobody takes what is printed.
    NobodyReads,
    /// By a signal.
    Interrupted,
    /// The agent is gone.
    Lost(String),
    /// The agent says that there is nothing more to see.
    Ended(ConsoleEnd),
}

/// One stay.
pub(crate) struct Session {
    connection: Connection,
    raw: Option<Raw>,
    signals: Signals,
    stay: Option<Duration>,
}

/// What others may send. Taken before the terminal is set, so that none of them leaves it so.
pub(crate) struct Signals {
    ends: [Signal; 4],
    stops: Signal,
    continues: Signal,
    resizes: Signal,
}

/// When to leave by oneself.
struct Clock {
    stay: Option<Duration>,
    /// The end of the input, or the beginning where no end of it counts.
    since: Option<Instant>,
    printed: Instant,
}

impl Session {
    /// On a connection that has been upgraded, at a terminal or not.
    ///
    /// # Errors
    /// When it cannot have signals, or the terminal.
    pub(crate) fn begin(
        connection: Connection,
        terminal: bool,
        stay: Option<Duration>,
    ) -> Result<Self, Failure> {
        let signals = Signals::take()
            .map_err(|error| Failure::other(format!("Cannot wait for signals: {error}")))?;
        let raw = terminal.then(|| Raw::enter(&signals)).transpose().map_err(|error| {
            Failure::other(format!("Cannot set the terminal to take every key: {error}"))
        })?;
        Ok(Self { connection, raw, signals, stay })
    }

    /// Lasts until it ends. The terminal is as before then.
    pub(crate) async fn last(self, watch: Watch, screen: &mpsc::Sender<Vec<u8>>) -> Left {
        let Self { connection, raw, signals, stay } = self;
        let (mut printed, agent) = split(connection);
        let Signals { mut ends, mut stops, mut continues, resizes } = signals;
        let terminal = raw.is_some();
        let mut clock = Clock::start(Instant::now(), stay, terminal);
        let mut typing = pin!(type_on(agent, terminal.then_some((watch, resizes))));
        let (mut decoder, mut input_is_open) = (Decoder::default(), true);
        let [interrupt, terminate, hangup, quit] = &mut ends;
        loop {
            tokio::select! {
                what = typing.as_mut(), if input_is_open => match what {
                    Typed::End if !terminal => {
                        input_is_open = false;
                        clock.input_ended(Instant::now());
                    }
                    _ => return Left::Detached,
                },
                piece = next(&mut printed, &mut decoder, screen) => match piece {
                    Ok(()) => clock.printed = Instant::now(),
                    Err(left) => return left,
                },
                () = clock.leave() => return Left::TimeIsUp,
                _ = interrupt.recv() => return Left::Interrupted,
                _ = terminate.recv() => return Left::Interrupted,
                _ = hangup.recv() => return Left::Interrupted,
                _ = quit.recv() => return Left::Interrupted,
                _ = stops.recv() => stop(raw.as_ref()),
                _ = continues.recv() => go_on(raw.as_ref()),
            }
        }
    }
}

impl Signals {
    fn take() -> io::Result<Self> {
        Ok(Self {
            ends: [
                listen(SignalKind::interrupt())?,
                listen(SignalKind::terminate())?,
                listen(SignalKind::hangup())?,
                listen(SignalKind::quit())?,
            ],
            stops: listen(SignalKind::from_raw(signal::Signal::SIGTSTP as i32))?,
            continues: listen(SignalKind::from_raw(signal::Signal::SIGCONT as i32))?,
            resizes: listen(SignalKind::window_change())?,
        })
    }
}

impl Clock {
    fn start(now: Instant, stay: Option<Duration>, terminal: bool) -> Self {
        Self { stay, since: (terminal && stay.is_some()).then_some(now), printed: now }
    }

    fn input_ended(&mut self, now: Instant) {
        (self.since, self.printed) = (Some(now), now);
    }

    fn end(&self) -> Option<Instant> {
        let since = self.since?;
        Some(match self.stay {
            Some(stay) => since + stay,
            None => (self.printed + QUIET).min(since + QUIET_WITHIN),
        })
    }

    async fn leave(&self) {
        match self.end() {
            Some(end) => tokio::time::sleep_until(end).await,
            None => future::pending().await,
        }
    }
}

/// Has the screen show what is printed next. Nothing is lost when it is dropped and called again.
async fn next(
    printed: &mut ReadHalf<Connection>,
    decoder: &mut Decoder,
    screen: &mpsc::Sender<Vec<u8>>,
) -> Result<(), Left> {
    let room = screen.reserve().await.map_err(|_| Left::NobodyReads)?;
    let mut buffer = vec![0; FRAME_CAP];
    let count = printed.read(&mut buffer).await.map_err(|error| Left::Lost(error.to_string()))?;
    if count == 0 {
        return Err(Left::Lost("it closed the connection".into()));
    }
    decoder.push(&buffer[..count]);
    let (mut shown, mut end) = (Vec::new(), None);
    while end.is_none() {
        match decoder.next() {
            Ok(None) => break,
            Ok(Some(Frame::Bytes(bytes))) => shown.extend(bytes),
            Ok(Some(Frame::End(how))) => end = Some(Left::Ended(how)),
            Ok(Some(other)) => end = Some(Left::Lost(format!("it sent {other:?}"))),
            Err(error) => end = Some(Left::Lost(error.to_string())),
        }
    }
    room.send(shown);
    end.map_or(Ok(()), Err)
}

/// Sends what is typed, and how large the window is, until one or the other end. Whether the agent is still
/// there is found out by who reads.
async fn type_on(mut agent: WriteHalf<Connection>, terminal: Option<(Watch, Signal)>) -> Typed {
    let typed = match terminal {
        Some((watch, resizes)) => at_a_terminal(&mut agent, watch, resizes).await,
        None => from_a_file(&mut agent).await,
    };
    match typed {
        Ok(typed) => typed,
        Err(_) => future::pending().await,
    }
}

async fn at_a_terminal(
    agent: &mut WriteHalf<Connection>,
    watch: Watch,
    mut resizes: Signal,
) -> io::Result<Typed> {
    let mut typed = streams::keyboard(watch);
    if let Some(size) = raw::size() {
        send(agent, &Frame::Size(size)).await?;
    }
    let mut waiting = Vec::new();
    loop {
        // The keys are found also when nobody takes what was typed before.
        tokio::select! {
            written = agent.write(&waiting), if !waiting.is_empty() => {
                waiting.drain(..written?);
            }
            next = typed.recv() => match next {
                Some(Typed::Bytes(bytes)) => {
                    let frames = bytes.chunks(FRAME_CAP).map(|piece| Frame::Bytes(piece.to_vec()));
                    waiting.extend(frames.flat_map(|frame| frame.to_bytes()));
                }
                other => return Ok(other.unwrap_or(Typed::End)),
            },
            _ = resizes.recv() => {
                waiting.extend(raw::size().map(|size| Frame::Size(size).to_bytes()).unwrap_or_default());
            }
        }
    }
}

async fn from_a_file(agent: &mut WriteHalf<Connection>) -> io::Result<Typed> {
    let mut typed = streams::file();
    while let Some(Typed::Bytes(bytes)) = typed.recv().await {
        for piece in bytes.chunks(FRAME_CAP) {
            send(agent, &Frame::Bytes(piece.to_vec())).await?;
        }
    }
    send(agent, &Frame::InputEnd).await?;
    Ok(Typed::End)
}

async fn send(agent: &mut WriteHalf<Connection>, frame: &Frame) -> io::Result<()> {
    agent.write_all(&frame.to_bytes()).await
}

/// Stops, as others asked, with the terminal as it was.
fn stop(raw: Option<&Raw>) {
    if let Some(raw) = raw {
        raw.rest();
    }
    let _ = signal::raise(signal::Signal::SIGSTOP);
    go_on(raw);
}

fn go_on(raw: Option<&Raw>) {
    // A terminal that is gone is noticed by who reads it.
    if let Some(raw) = raw {
        let _ = raw.again();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_no_terminal_leaves_when_it_is_quiet() {
        let begun = Instant::now();
        let mut clock = Clock::start(begun, None, false);
        assert_eq!(clock.end(), None, "the input has not ended");
        clock.input_ended(begun + QUIET);
        assert_eq!(clock.end(), Some(begun + 2 * QUIET));
        clock.printed = begun + 3 * QUIET / 2;
        assert_eq!(clock.end(), Some(begun + 5 * QUIET / 2));
        clock.printed = begun + QUIET_WITHIN;
        assert_eq!(clock.end(), Some(begun + QUIET + QUIET_WITHIN), "it is never quiet");
    }

    #[test]
    fn a_time_counts_from_the_beginning_or_from_the_end_of_the_input() {
        let (begun, stay) = (Instant::now(), Duration::from_secs(5));
        assert_eq!(Clock::start(begun, Some(stay), true).end(), Some(begun + stay));
        assert_eq!(Clock::start(begun, None, true).end(), None);
        let mut clock = Clock::start(begun, Some(stay), false);
        assert_eq!(clock.end(), None);
        clock.input_ended(begun + stay);
        assert_eq!(clock.end(), Some(begun + 2 * stay));
    }
}
