//! The hidden verb `keeper` for virtual machines alone, so that this crate's tests can start real
//! keepers without the whole program: `keeper keeper --config FILE`.

use std::error::Error;
use std::process::ExitCode;

use decamp_shared::keeper::{KeeperConfig, spawn};

fn main() -> ExitCode {
    spawn::detach();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    match keep() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            spawn::report_failure(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

fn keep() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (verb, flag, file) = (arguments.next(), arguments.next(), arguments.next());
    let file = match (verb.as_deref(), flag.as_deref(), file) {
        (Some(verb), Some(flag), Some(file)) if verb == "keeper" && flag == "--config" => file,
        _ => return Err("Usage: keeper keeper --config FILE".into()),
    };
    let config: KeeperConfig = serde_json::from_slice(&std::fs::read(file)?)?;
    Ok(decamp_vm::keeper_main(config)?)
}
