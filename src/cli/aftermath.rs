//! What became of a move whose agent went away while it was watched: the next agent knows, as soon as
//! it has settled what the last one left.

use std::path::PathBuf;
use std::time::Duration;

use decamp_shared::session::Outcome;
use tokio::time::Instant;

use super::client::Client;
use super::failure::Failure;
use super::interrupts::Interrupts;
use crate::messages::{MigrationRequest, State, WorkloadDetail};

/// How long the next agent is waited for.
const WAIT_FOR: Duration = Duration::from_secs(90);
/// A move that is still asked about shows as unresolved for a moment.
const UNRESOLVED_FOR: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How the move ended, and what to say of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Aftermath {
    /// As far as it is known.
    pub(crate) outcome: Outcome,
    /// Whether it is known to run on neither host.
    pub(crate) lost: bool,
    /// In a sentence.
    pub(crate) text: String,
}

impl Aftermath {
    /// The exit code of the command contract.
    pub(crate) fn exit_code(&self) -> u8 {
        if self.lost { 1 } else { self.outcome.exit_code() }
    }
}

/// Waits until an agent answers that knows how the move ended; gives up after a while, or at Ctrl-C.
pub(crate) async fn wait(
    client: &Client,
    request: &MigrationRequest,
    interrupts: &mut Interrupts,
) -> Aftermath {
    let path = format!("/v1/workloads/{}", request.workload);
    let deadline = Instant::now() + WAIT_FOR;
    let mut unresolved_since = None;
    loop {
        // An agent may take the question and be stuck.
        let found = tokio::select! {
            found = client.get::<WorkloadDetail>(&path) => found,
            () = interrupts.next() => break,
            () = tokio::time::sleep_until(deadline) => break,
        };
        match judge(found, request) {
            Some(aftermath) if aftermath.outcome == Outcome::Unresolved => {
                let since = *unresolved_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= UNRESOLVED_FOR {
                    return aftermath;
                }
            }
            Some(aftermath) => return aftermath,
            None => unresolved_since = None,
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = interrupts.next() => break,
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    let name = &request.workload;
    Aftermath {
        outcome: Outcome::Unresolved,
        lost: false,
        text: format!(
            "The agent ended before the move of {name} did, and it is not known how that ended. Start \
             the agent again: it settles what was left open, and `decamp ls --all` shows where {name} is"
        ),
    }
}

/// What an agent's word on the workload says of the move; nothing as long as it is open.
fn judge(found: Result<WorkloadDetail, Failure>, request: &MigrationRequest) -> Option<Aftermath> {
    let MigrationRequest { workload: name, to, options } = request;
    let ended = |outcome, text| Some(Aftermath { outcome, lost: false, text });
    let detail = match found {
        Ok(detail) => detail,
        Err(failure) if failure.body.code == "unknown-workload" && options.remove_source => {
            return ended(
                Outcome::Completed,
                format!("{name} moved to {to}; nothing of it is left here"),
            );
        }
        Err(_) => return None,
    };
    match detail.view.state {
        State::Moved => ended(
            Outcome::Completed,
            format!(
                "{name} moved to {to}. The agent was restarted meanwhile, so there is no report"
            ),
        ),
        // Only of disks that were to move within the host anything is where it was to be here.
        State::Running if moved_within(&detail, &options.paths) => ended(
            Outcome::Completed,
            format!(
                "The disks of {name} moved. The agent was restarted meanwhile, so there is no report"
            ),
        ),
        State::Running => ended(
            Outcome::Failed,
            format!("{name} did not move to {to}, because the agent here ended. It runs on here"),
        ),
        State::Stopped => Some(Aftermath {
            outcome: Outcome::Failed,
            lost: true,
            text: format!("{name} did not move to {to}, and ended here meanwhile"),
        }),
        State::Unresolved => ended(
            Outcome::Unresolved,
            format!(
                "Nobody knows whether {name} runs at {to}. See there (`decamp ls --all`), then say the \
                 same on both hosts: decamp resolve {} --keep source|destination",
                detail.view.migration.as_deref().unwrap_or(name)
            ),
        ),
        State::Starting | State::Migrating | State::Incoming => None,
    }
}

/// Whether every file is at the new one of its `paths`, old and new, and no longer at the old one. Of a move to another
/// host that is never so here: its files stay where they were, and both may have the same path.
fn moved_within(detail: &WorkloadDetail, paths: &[(PathBuf, PathBuf)]) -> bool {
    let has = |path: &PathBuf| detail.view.files.iter().any(|file| file.path == *path);
    !paths.is_empty() && paths.iter().all(|(old, new)| old != new && has(new) && !has(old))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::{FileEntry, WorkloadView};
    use decamp_shared::session::MoveOptions;
    use decamp_shared::workload::Kind;

    fn outcome(state: State) -> Option<Outcome> {
        aftermath(state).map(|aftermath| aftermath.outcome)
    }

    fn aftermath(state: State) -> Option<Aftermath> {
        judge(Ok(detail(view(state))), &request(false))
    }

    fn view(state: State) -> WorkloadView {
        WorkloadView {
            name: "web".into(),
            uuid: "u".into(),
            kind: Kind::Vm,
            state,
            created_ms: 0,
            changed_ms: 0,
            moved_to: None,
            migration: Some("m".into()),
            exit: None,
            files: Vec::new(),
        }
    }

    fn detail(view: WorkloadView) -> WorkloadDetail {
        let spec = serde_json::json!({});
        WorkloadDetail { view, spec, log: "/log".into(), keeper: None }
    }

    fn request(remove_source: bool) -> MigrationRequest {
        MigrationRequest {
            workload: "web".into(),
            to: "beta".into(),
            options: MoveOptions { remove_source, ..MoveOptions::default() },
        }
    }

    #[test]
    fn the_next_agents_word_decides() {
        assert_eq!(outcome(State::Moved), Some(Outcome::Completed));
        assert_eq!(outcome(State::Running), Some(Outcome::Failed));
        assert_eq!(outcome(State::Stopped), Some(Outcome::Failed));
        assert_eq!(outcome(State::Unresolved), Some(Outcome::Unresolved));
        assert_eq!(outcome(State::Migrating), None);
        let exit = |state| aftermath(state).map(|aftermath| aftermath.exit_code());
        assert_eq!(exit(State::Running), Some(4), "it runs on here");
        assert_eq!(exit(State::Stopped), Some(1), "it runs nowhere");
    }

    #[test]
    fn where_the_disks_are_says_whether_they_moved() {
        let state = |files: &[&str]| {
            let entry =
                |path: &&str| FileEntry { role: "disk".into(), path: path.into(), shared: false };
            let files = files.iter().map(entry).collect();
            WorkloadView { files, ..view(State::Running) }
        };
        let options =
            MoveOptions { paths: vec![("/a".into(), "/b".into())], ..MoveOptions::default() };
        let request = MigrationRequest { to: "alpha".into(), options, ..request(false) };
        for (files, outcome) in
            [(["/k", "/a"], Outcome::Failed), (["/k", "/b"], Outcome::Completed)]
        {
            let found = judge(Ok(detail(state(&files))), &request).expect("known");
            assert_eq!(found.outcome, outcome);
        }
        // As where a disk is to have the same place on the other host.
        for paths in [("/k", "/k"), ("/a", "/k")] {
            let options = MoveOptions {
                paths: vec![(paths.0.into(), paths.1.into())],
                ..MoveOptions::default()
            };
            let request = MigrationRequest { options, ..request.clone() };
            let request = MigrationRequest { to: "beta".into(), ..request };
            let found = judge(Ok(detail(state(&["/k", "/a"]))), &request).expect("known");
            assert_eq!((found.outcome, found.exit_code()), (Outcome::Failed, 4), "{found:?}");
        }
    }

    #[test]
    fn an_agent_that_is_away_says_nothing() {
        let away = || Err(Failure::other("No agent listens"));
        assert_eq!(judge(away(), &request(true)), None);
        let mut unknown = Failure::refused("no such workload");
        unknown.body.code = "unknown-workload".into();
        assert_eq!(judge(Err(unknown.clone()), &request(false)), None);
        let removed = judge(Err(unknown), &request(true)).expect("removed after the move");
        assert_eq!(removed.outcome, Outcome::Completed);
    }
}
