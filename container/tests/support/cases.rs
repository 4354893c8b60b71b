//! The cases as a program: which of them are run, and how each is told to have ended. The same program is
//! the keeper and the shim that they need.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Instant;

use decamp_shared::keeper::KeeperConfig;

use super::host::{HELD, HUNGRY, Host, is_called, lacking};

/// One test.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Host),
}

/// Runs the cases whose names the arguments are part of; as `keeper`, is a keeper.
pub(crate) fn main_with(cases: &[Case]) {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "keeper") {
        std::process::exit(keep(Path::new(&arguments[2])));
    }
    if arguments.first().is_some_and(|first| first == "shim") {
        let shim = decamp_container::podman::shim::shim_main;
        let done = shim(Path::new(&arguments[2]), &arguments[4..]);
        std::process::exit(done.map_or_else(
            |error| {
                eprintln!("{error}");
                1
            },
            |()| 0,
        ));
    }
    let wanted: Vec<&String> =
        arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let cases = cases.iter().filter(|case| {
        wanted.is_empty() || wanted.iter().any(|part| case.name.contains(part.as_str()))
    });
    if arguments.iter().any(|argument| argument == "--list") {
        cases.for_each(|case| println!("{}: test", case.name));
        return;
    }
    if let Some(lacking) = lacking() {
        cases.for_each(|case| println!("test {} ... skipped: {lacking}", case.name));
        return;
    }
    let host = Host::make();
    let mut failed = 0;
    for case in cases {
        let begun = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (case.run)(&host)));
        let word = match (&outcome, host.skipped.take()) {
            (Err(_), _) => "FAILED".to_owned(),
            (Ok(()), Some(reason)) => format!("skipped: {reason}"),
            (Ok(()), None) => "ok".to_owned(),
        };
        failed += usize::from(outcome.is_err());
        println!("test {} ... {word} ({:.1} s)", case.name, begun.elapsed().as_secs_f64());
        if outcome.is_err() || std::env::var_os("DECAMP_SHOW_LOGS").is_some() {
            host.show_logs();
        }
        host.clear();
    }
    drop(host);
    std::process::exit(i32::from(failed > 0));
}

fn keep(config: &Path) -> i32 {
    let filter = std::env::var("DECAMP_LOG").unwrap_or_else(|_| "debug".to_owned());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    decamp_shared::keeper::spawn::detach();
    let config: KeeperConfig =
        serde_json::from_slice(&fs::read(config).expect("a configuration")).expect("JSON");
    let stuck = [(HELD, "container-hold"), (HUNGRY, "container-fill")];
    let stuck = stuck.iter().find(|(name, _)| is_called(&config.place.name, name));
    let scenario = stuck.map(|_| fail::FailScenario::setup());
    if let Some((_, point)) = stuck {
        fail::cfg(*point, "sleep(60000)").expect("a fail point");
    }
    let kept = decamp_container::keeper_main(&config);
    drop(scenario);
    match kept {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(%error, "The keeper failed");
            decamp_shared::keeper::spawn::report_failure(&error);
            1
        }
    }
}
