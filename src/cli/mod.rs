//! The command line: one file a verb. A verb turns its arguments into a request to the local agent
//! and draws the answer; what the agent does is no business of this room.
//!
//! [`client`] speaks to the agent, [`failure`] holds the exit codes, [`values`] reads sizes, times and
//! names, [`units`] writes them, [`display`] and [`report`] draw a move, [`archive`] follows a checkpoint
//! or a restore, [`aftermath`]
//! finds out how one ended that nobody could watch, [`interrupts`] notes Ctrl-C.

mod adopt;
mod aftermath;
mod agent;
mod archive;
mod cancel;
mod checkpoint;
mod client;
mod console;
mod cpu;
mod display;
mod failure;
mod hook;
mod inspect;
mod interrupts;
mod keeper;
mod logs;
mod ls;
mod migrate;
mod output;
mod pki;
mod report;
mod resolve;
mod restore;
mod rm;
mod run;
mod shim;
mod start;
mod stop;
mod units;
mod values;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use client::Client;
use failure::Failure;
pub(crate) use failure::chain;

/// Where an agent's socket is unless somebody says otherwise.
const SOCKET: &str = "/run/decamp.sock";

/// Moves running virtual machines and containers between hosts.
#[derive(Debug, Parser)]
#[command(name = "decamp", version, arg_required_else_help = true, max_term_width = 100)]
#[command(after_help = "Example: decamp migrate web --to edge-2\n\n\
    Exit codes: 0 done; 2 bad usage; 3 refused before anything was touched; 4 failed or\n\
    cancelled, the workload runs on at the source; 5 outcome not known, `decamp resolve`\n\
    needed; 1 anything else.")]
pub(crate) struct Arguments {
    /// Socket of the local agent [default: /run/decamp.sock]
    #[arg(long, global = true, env = "DECAMP_SOCKET", value_name = "PATH", hide_env_values = true)]
    socket: Option<PathBuf>,

    /// Answer in JSON, for machines
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Agent(agent::Agent),
    Pki(pki::Pki),
    Run(run::Run),
    Adopt(adopt::Adopt),
    Ls(ls::Ls),
    Inspect(inspect::Inspect),
    Logs(logs::Logs),
    Console(console::Console),
    Cpu(cpu::Cpu),
    Start(start::Start),
    Stop(stop::Stop),
    Rm(rm::Rm),
    Migrate(migrate::Migrate),
    Cancel(cancel::Cancel),
    Resolve(resolve::Resolve),
    Checkpoint(checkpoint::Checkpoint),
    Restore(restore::Restore),
    Hook(hook::Hook),
    #[command(hide = true)]
    Keeper(keeper::Keeper),
    #[command(hide = true)]
    Shim(shim::Shim),
}

/// Runs the verb and gives the exit code of the command contract.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    let Arguments { socket, json, verb } = arguments;
    let ended = match verb {
        // A keeper forks and has no use for threads that it did not start.
        Verb::Keeper(verb) => verb.run(),
        Verb::Shim(verb) => Ok(verb.run()),
        Verb::Pki(verb) => verb.run(json),
        Verb::Agent(verb) => verb.run(socket, json),
        Verb::Hook(verb) => verb.run(socket, SOCKET, json),
        verb => {
            let client = Client::new(socket.unwrap_or_else(|| SOCKET.into()));
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| Failure::other(format!("Cannot start: {error}")))
                .and_then(|runtime| runtime.block_on(ask(verb, &client, json)))
        }
    };
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.tell(json);
            ExitCode::from(failure.exit)
        }
    }
}

async fn ask(verb: Verb, client: &Client, json: bool) -> Result<u8, Failure> {
    match verb {
        Verb::Run(verb) => verb.run(client, json).await,
        Verb::Adopt(verb) => verb.run(client, json).await,
        Verb::Ls(verb) => verb.run(client, json).await,
        Verb::Inspect(verb) => verb.run(client, json).await,
        Verb::Logs(verb) => verb.run(client, json).await,
        Verb::Console(verb) => verb.run(client, json).await,
        Verb::Cpu(verb) => verb.run(client, json).await,
        Verb::Start(verb) => verb.run(client, json).await,
        Verb::Stop(verb) => verb.run(client, json).await,
        Verb::Rm(verb) => verb.run(client, json).await,
        Verb::Migrate(verb) => verb.run(client, json).await,
        Verb::Cancel(verb) => verb.run(client, json).await,
        Verb::Resolve(verb) => verb.run(client, json).await,
        Verb::Checkpoint(verb) => verb.run(client, json).await,
        Verb::Restore(verb) => verb.run(client, json).await,
        Verb::Agent(_) | Verb::Pki(_) | Verb::Hook(_) | Verb::Keeper(_) | Verb::Shim(_) => {
            Err(Failure::other("This verb does not speak to an agent"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_verb_has_an_example() {
        fn check(command: &clap::Command) {
            if command.get_subcommands().next().is_none() && !command.is_hide_set() {
                let help = command.clone().render_long_help().to_string();
                assert!(help.contains("Example: decamp "), "{}:\n{help}", command.get_name());
            }
            command.get_subcommands().filter(|one| one.get_name() != "help").for_each(check);
        }
        check(&Arguments::command());
    }
}
