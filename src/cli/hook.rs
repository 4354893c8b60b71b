//! `decamp hook`: has container runtimes call decamp, and is what they call.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::client::Client;
use super::failure::{Failure, chain};
use super::output;
use crate::hook::install::{self, Did, InstallError, Places, Program};
use crate::hook::{criu, oci, say};
use crate::messages::HookAnswer;

/// An agent that does not answer within this is not waited for: the container is.
const ANSWERED_WITHIN: Duration = Duration::from_secs(2);

/// Have container runtimes register containers, and checkpoint them with decamp's checks
///
/// `install` puts a hook for podman and CRI-O in place, by which containers with the annotation
/// decamp.migratable=true register with the agent when they start and leave when they end; and an action
/// script for CRIU, by which `runc checkpoint` and `podman container checkpoint` refuse what cannot be
/// checkpointed before anything stops, and have the container's network held still by decamp.
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp hook install")]
pub(crate) struct Hook {
    #[command(subcommand)]
    verb: HookVerb,
}

#[derive(Debug, Subcommand)]
enum HookVerb {
    /// Put the hooks in place; what is in place already stays
    #[command(after_help = "Example: decamp hook install\n\
        Example: decamp hook install --hooks-dir /etc/containers/oci/hooks.d\n\n\
        A --socket that is named here is the one that the hook speaks to. For a bundle of your own\n\
        copy what `hook` holds in decamp.json to the poststart and poststop hooks of its config.json.")]
    Install(At),
    /// Take out what `install` put in place, and nothing else
    #[command(after_help = "Example: decamp hook remove")]
    Remove(At),
    /// What OCI runtimes call: registers a container, or has it forgotten
    ///
    /// Reads the container's state from standard input. A container's start is never held up or broken:
    /// whatever goes wrong is said in one line, with exit code 0.
    #[command(after_help = "Example: decamp hook oci </run/state.json   (runtimes do this)")]
    Oci {
        /// Exit with 1 when the container could not be registered: its runtime then ends it
        #[arg(long)]
        strict: bool,
    },
    /// What CRIU calls at each step of a dump or restore (its action script)
    ///
    /// CRIU says in its environment which step it is at. A dump is refused with exit code 1, with every
    /// reason in CRIU's log and on the runtime's standard error.
    #[command(after_help = "Example: decamp hook criu   (CRIU does this)")]
    Criu,
}

#[derive(Debug, Args)]
struct At {
    /// Where podman and CRI-O look for hooks
    #[arg(long, value_name = "DIR", default_value = install::HOOKS_DIR)]
    hooks_dir: PathBuf,
    /// The configuration that runtimes have CRIU read
    #[arg(long, value_name = "FILE", default_value = install::CRIU_CONF)]
    criu_conf: PathBuf,
}

impl Hook {
    /// `socket` is what was named, `usual` the one that an agent has otherwise.
    pub(crate) fn run(
        self,
        socket: Option<PathBuf>,
        usual: &str,
        json: bool,
    ) -> Result<u8, Failure> {
        match self.verb {
            HookVerb::Install(at) => {
                let path = std::env::current_exe().map_err(|error| {
                    Failure::other(format!("Cannot find this program: {error}"))
                })?;
                let socket = socket.filter(|socket| socket.as_os_str() != usual);
                show(install::install(&at.places(), &Program { path, socket }), json)
            }
            HookVerb::Remove(at) => show(install::remove(&at.places()), json),
            HookVerb::Oci { strict } => called(socket.unwrap_or_else(|| usual.into()), strict),
            HookVerb::Criu => step(),
        }
    }
}

impl At {
    fn places(self) -> Places {
        Places { hooks_dir: self.hooks_dir, criu_conf: self.criu_conf }
    }
}

fn show(done: Result<Vec<install::Done>, InstallError>, json: bool) -> Result<u8, Failure> {
    let done = done.map_err(|error| match error {
        InstallError::InTheWay(_) => Failure::refused(chain(&error)),
        InstallError::File { .. } => Failure::other(chain(&error)),
    })?;
    if json {
        output::json(&serde_json::json!({ "files": done }));
        return Ok(0);
    }
    for one in &done {
        let word = match one.did {
            Did::Written => "written",
            Did::Unchanged => "unchanged",
            Did::Removed => "removed",
            Did::Absent => "not there",
        };
        output::line(format!("{word:<10} {}", one.path.display()));
    }
    Ok(0)
}

/// Whatever happens, a container that is started goes on.
fn called(socket: PathBuf, strict: bool) -> Result<u8, Failure> {
    if io::stdin().is_terminal() {
        return Err(Failure::usage(oci::CallError::Terminal.to_string()));
    }
    match tell_agent(socket) {
        Ok(()) => Ok(0),
        Err(text) => {
            say(&format!("decamp hook: {}", text.replace('\n', " ")));
            Ok(u8::from(strict))
        }
    }
}

fn tell_agent(socket: PathBuf) -> Result<(), String> {
    let called = oci::read().map_err(|error| chain(&error))?;
    let of_it = |text: String| format!("container {}: {text}", called.name());
    let request = called.request(&oci::caller()).map_err(|error| of_it(chain(&error)))?;
    let Some(request) = request else { return Ok(()) };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| of_it(format!("Cannot start: {error}")))?;
    let answer = runtime.block_on(async {
        let client = Client::new(socket);
        let asked = client.post::<HookAnswer>("/v1/hook", &request);
        tokio::time::timeout(ANSWERED_WITHIN, asked).await
    });
    match answer {
        Ok(Ok(HookAnswer { said })) => {
            say(&format!("decamp hook: {said}"));
            Ok(())
        }
        Ok(Err(failure)) => Err(of_it(format!("not in the charge of decamp: {}", failure.text()))),
        Err(_) => Err(of_it(format!(
            "not in the charge of decamp, as far as is known: its agent does not answer within {} s",
            ANSWERED_WITHIN.as_secs()
        ))),
    }
}

fn step() -> Result<u8, Failure> {
    match criu::step() {
        Ok(()) => Ok(0),
        Err(Some(reasons)) => {
            criu::complain(&reasons);
            Ok(1)
        }
        Err(None) => Err(Failure::usage(
            "CRIU calls this at each step of a dump or restore, and says in CRTOOLS_SCRIPT_ACTION which: \
             `decamp hook install` has it do so",
        )),
    }
}
