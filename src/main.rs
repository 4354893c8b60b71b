//! `decamp`: moves running virtual machines and containers between hosts.
//!
//! Parse, run, exit code. Rooms: [`cli`] (one file a verb), [`agent`] (the daemon), [`messages`] (the
//! JSON between the two), [`frames`] (the bytes of an attached console), [`hook`] (what container runtimes and CRIU call), [`backend`] (the only file that names both kinds of workload) and [`pki`]
//! (certificates). The agent runs in the same binary, and nothing of the CLI reaches into it.

#![deny(unsafe_code)]

mod agent;
mod backend;
mod cli;
mod frames;
mod hook;
mod messages;
mod pki;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    cli::run(cli::Arguments::parse())
}
