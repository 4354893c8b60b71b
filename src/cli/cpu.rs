//! `decamp cpu`: CPUs that several hosts can offer a guest.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::client::Client;
use super::failure::Failure;
use super::{output, values};
use crate::messages::{BaselineAnswer, BaselineRequest};

/// How many features of a host are named.
const NAMED: usize = 8;

/// CPUs that several hosts can offer a guest
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp cpu baseline edge-2 edge-3 --output fleet.json")]
pub(crate) struct Cpu {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The widest CPU that this host and the named ones can all offer a guest
    #[command(after_help = "Example: decamp cpu baseline edge-2 edge-3 --output fleet.json\n\
        Then:    decamp run vm web --kernel /srv/vmlinux --cpu-baseline fleet.json\n\n\
        What each host has beyond it, and so what a guest that is held to it never sees, is said on\n\
        standard error. Make a new one when a host joins; guests keep what they were started with.")]
    Baseline(Baseline),
}

#[derive(Debug, Args)]
struct Baseline {
    /// Other hosts, of the agent's configuration
    #[arg(value_name = "HOST", required = true, value_parser = values::host)]
    hosts: Vec<String>,
    /// File to write it to, where nothing may stand [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Cpu {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let What::Baseline(Baseline { hosts, output }) = self.what;
        let answer: BaselineAnswer =
            client.post("/v1/cpu/baseline", &BaselineRequest { hosts }).await?;
        for (host, lost) in &answer.lost {
            eprintln!("{}", beyond(host, lost));
        }
        for host in &answer.silent {
            eprintln!("{}", silent(host));
        }
        match &output {
            Some(path) => write(path.clone(), &answer.baseline)?,
            None if !json => output::json(&answer.baseline),
            None => {}
        }
        if json {
            output::json(&answer);
        }
        Ok(0)
    }
}

fn write(path: PathBuf, baseline: &Value) -> Result<(), Failure> {
    let failed = |error: std::io::Error| {
        let text = format!("Cannot write {}: {error}", path.display());
        match error.kind() {
            std::io::ErrorKind::AlreadyExists => Failure::refused(text),
            _ => Failure::other(text),
        }
    };
    let text = serde_json::to_string_pretty(baseline)
        .map_err(|error| Failure::other(format!("Cannot write the baseline as JSON: {error}")))?;
    let mut file = File::create_new(&path).map_err(failed)?;
    writeln!(file, "{text}").and_then(|()| file.sync_all()).map_err(failed)
}

/// What a guest that is held to the baseline does not see of a host.
fn beyond(host: &str, lost: &[String]) -> String {
    let named = lost.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    match lost.len() {
        0 => format!("{host}: loses nothing"),
        count @ ..=NAMED => format!("{host}: loses {count}: {named}"),
        count => format!("{host}: loses {count}: {named} and {} more", count - NAMED),
    }
}

/// What is left out because a host does not say it.
fn silent(host: &str) -> String {
    format!(
        "{host}: its decamp is older and does not say which flaws its CPU does not have \
         (IA32_ARCH_CAPABILITIES and its like); the baseline leaves that out, and guests are told of it \
         what the host tells that they are started on"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_loses_is_named_and_counted() {
        assert_eq!(beyond("beta", &[]), "beta: loses nothing");
        assert_eq!(beyond("beta", &["avx2 (x)".into()]), "beta: loses 1: avx2 (x)");
        let many: Vec<String> = (0..10).map(|number| format!("f{number}")).collect();
        assert!(beyond("beta", &many).ends_with("f7 and 2 more"), "{}", beyond("beta", &many));
    }

    #[test]
    fn nothing_is_written_over() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("fleet.json");
        write(path.clone(), &serde_json::json!({"version": 1})).expect("written");
        let again = write(path, &Value::Null).expect_err("it is there");
        assert_eq!(again.exit, 3, "{again:?}");
    }
}
