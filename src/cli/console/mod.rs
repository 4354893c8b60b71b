//! `decamp console`: at the console of a workload. [`keys`] find what detaches, [`raw`] sets the terminal,
//! [`streams`] read and write, [`session`] carries between them and the agent.

mod keys;
mod raw;
mod session;
mod streams;

use std::time::Duration;

use clap::Args;

use super::client::Client;
use super::failure::Failure;
use super::{output, values};
use crate::frames::PROTOCOL;
use crate::messages::ConsoleEnd;
use keys::{DetachKeys, Watch};
use raw::Raw;
use session::{Left, Session};
use streams::Screen;

/// Nobody knows where it has to run: as after a move that ended so.
const UNRESOLVED: u8 = 5;

/// Sit at a workload's console: a guest's serial port, the terminal of a container with --tty
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp console web\n\
    Example: echo uname -r | decamp console web --for 2s\n\n\
    What is printed from now on is shown; `decamp logs` has what was printed before. On a terminal every\n\
    key goes through but the one that detaches, and a container's terminal gets the size of yours. Several\n\
    may be at one console: all see the same, and what they type is mixed.\n\n\
    Without a terminal, what comes in on standard input is typed as it is (no key detaches), as fast as\n\
    it is taken. At its end it goes on printing until nothing has come for a second, for ten seconds at\n\
    most, or for as long as --for says.\n\n\
    Exit codes: 0 detached, or the workload has ended or moved to another host; 3 there is no such\n\
    workload or console; 5 nobody knows on which host it runs; 1 the agent was lost.")]
pub(crate) struct Console {
    /// Its name
    #[arg(value_parser = values::workload)]
    name: String,
    /// Keys that detach, one after the other: ctrl-X or a letter, with commas; \"\" for none
    #[arg(long, value_name = "KEYS", default_value = "ctrl-]", value_parser = DetachKeys::parse)]
    detach_key: DetachKeys,
    /// Leave after this time; without a terminal, this long after the end of the input
    #[arg(long = "for", value_name = "TIME", value_parser = values::time)]
    stay: Option<Duration>,
}

impl Console {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let Self { name, detach_key, stay } = self;
        let connection = client.upgrade(&format!("/v1/workloads/{name}/console"), PROTOCOL).await?;
        let terminal = Raw::is_terminal();
        if terminal {
            eprintln!("{}", greeting(&name, &detach_key));
        }
        let screen = Screen::open(json);
        let session = Session::begin(connection, terminal, stay)?;
        let left = session.last(Watch::new(detach_key), &screen.pieces).await;
        screen.close().await;
        if json && let Left::Ended(end) = &left {
            output::line(serde_json::to_string(end).unwrap_or_default());
        }
        if terminal {
            // Whatever is on the line.
            eprintln!();
        }
        let (said, code) = told(&name, &left)?;
        if let Some(said) = said.filter(|_| terminal || code != 0 || matches!(left, Left::Ended(_)))
        {
            eprintln!("{said}");
        }
        Ok(code)
    }
}

fn greeting(name: &str, keys: &DetachKeys) -> String {
    match keys.to_string() {
        none if none.is_empty() => format!("At the console of {name}. No key detaches."),
        keys => format!("At the console of {name}. {keys} detaches."),
    }
}

/// What to say at the end, and the exit code.
fn told(name: &str, left: &Left) -> Result<(Option<String>, u8), Failure> {
    let said = match left {
        Left::Detached => Some(format!("Detached from {name}")),
        Left::TimeIsUp | Left::NobodyReads => None,
        Left::Interrupted => {
            return Err(Failure::other(format!("Interrupted at the console of {name}")));
        }
        Left::Lost(why) => {
            return Err(Failure::lost(format!(
                "Lost the agent ({why}): {name} itself does not depend on it. `decamp console {name}` \
                 again once an agent runs"
            )));
        }
        Left::Ended(ConsoleEnd::Closed) => {
            return Err(Failure::other(format!(
                "The keeper of {name} has closed its console: see what it says in keeper.log beside the \
                 log that `decamp inspect {name}` names"
            )));
        }
        Left::Ended(ConsoleEnd::Stopped { exit: Some(exit) }) => {
            Some(format!("{name} has ended: {}", exit.text))
        }
        Left::Ended(ConsoleEnd::Stopped { exit: None }) => Some(format!("{name} has ended")),
        Left::Ended(ConsoleEnd::Moved { to }) => {
            let to = to.as_deref().unwrap_or("another host");
            Some(format!(
                "{name} has moved to {to}: `decamp console {name}` there goes on. What was typed while it \
                 moved may not have been taken"
            ))
        }
        Left::Ended(ConsoleEnd::Unresolved { migration }) => {
            let migration = migration.as_deref().unwrap_or("MIGRATION");
            let said = format!(
                "Nobody knows on which host {name} has to run: `decamp resolve {migration}` decides"
            );
            return Ok((Some(said), UNRESOLVED));
        }
    };
    Ok((said, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use decamp_shared::keeper::ExitRecord;

    #[test]
    fn it_says_how_to_leave() {
        let greets = |keys| greeting("web", &DetachKeys::parse(keys).expect("keys"));
        assert_eq!(greets("ctrl-]"), "At the console of web. Ctrl-] detaches.");
        assert_eq!(greets("ctrl-p,ctrl-q"), "At the console of web. Ctrl-P Ctrl-Q detaches.");
        assert_eq!(greets(""), "At the console of web. No key detaches.");
    }

    #[test]
    fn every_end_says_what_is_next() {
        let exit = Some(ExitRecord { status: 0, text: "powered off".into() });
        for (left, says, code) in [
            (Left::Detached, "Detached from web", 0),
            (Left::Ended(ConsoleEnd::Stopped { exit }), "web has ended: powered off", 0),
            (Left::Ended(ConsoleEnd::Moved { to: Some("beta".into()) }), "moved to beta", 0),
            (
                Left::Ended(ConsoleEnd::Unresolved { migration: Some("m1".into()) }),
                "decamp resolve m1",
                5,
            ),
        ] {
            let (said, exit) = told("web", &left).expect("no failure");
            assert!(said.is_some_and(|said| said.contains(says)), "{left:?}");
            assert_eq!(exit, code, "{left:?}");
        }
        let lost = told("web", &Left::Lost("closed".into())).expect_err("a failure");
        assert!(lost.is_lost() && lost.exit == 1, "{lost:?}");
        assert_eq!(told("web", &Left::TimeIsUp), Ok((None, 0)));
    }
}
