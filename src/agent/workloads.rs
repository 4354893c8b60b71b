//! What can be done to a workload on this host: run, start, stop, remove, look at. Moving it is in
//! [`super::moves`].
//!
//! Every change claims the workload first, and is written in the registry before it is believed.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use decamp_shared::keeper::{ExitRecord, KeeperClient};
use decamp_shared::workload::{Backend, Kind, Place};
use serde_json::{Value, json};

use super::Agent;
use super::answer::{Answer, Result, chain};
use super::claims::Claim;
use super::leftovers;
use super::registry::Workload;
use super::supervise::NOTING;
use crate::messages::{
    LeftFile, RemoveAnswer, RunRequest, State, WorkloadDetail, WorkloadView, is_workload_name,
};

/// A keeper that does not answer `inspect` within this is not waited for.
const FACTS_WITHIN: Duration = Duration::from_secs(3);
/// How long it may take to note that a workload ended.
const ENDED_WITHIN: Duration = Duration::from_secs(10);

impl Agent {
    /// The workloads of this host; those that moved away only with `all`.
    pub(crate) fn list(&self, all: bool) -> Result<Vec<WorkloadView>> {
        let shown = |workload: &Workload| all || workload.state != State::Moved;
        Ok(self.registry.list()?.iter().filter(|one| shown(one)).map(Workload::view).collect())
    }

    /// All that is known of one.
    pub(crate) async fn inspect(&self, name: &str) -> Result<WorkloadDetail> {
        let workload = self.find(name)?;
        let place = self.place(&workload);
        let log = place.log();
        // A session has the keeper to itself.
        let keeper = match workload.state {
            State::Running if !self.claims.is_taken(name) => keeper_facts(place).await,
            _ => None,
        };
        Ok(WorkloadDetail { view: workload.view(), spec: workload.spec, log, keeper })
    }

    /// Starts a new workload and returns when it runs.
    pub(crate) async fn run_new(&self, request: RunRequest) -> Result<WorkloadView> {
        let RunRequest { name, kind, spec } = request;
        if !is_workload_name(&name) {
            return Err(Answer::Request(format!("{name:?} cannot be the name of a workload")));
        }
        let _claim = self.claim(&name, "being started").await?;
        if let Some(taken) = self.registry.get(&name)? {
            return Err(Answer::Conflict(taken_by(&taken)));
        }
        let backend = self.backends.of(kind).map_err(|error| Answer::Request(error.to_string()))?;
        self.check(&backend, &name, &spec).await?;
        let uuid = uuid::Uuid::new_v4().to_string();
        let workload = Workload::new(&name, &uuid, kind, spec, State::Starting);
        let place = self.place(&workload);
        self.state_dir.make_place(&place)?;
        self.registry.create(&workload)?;
        match self.bring_up(&backend, &workload, &place).await {
            Ok(running) => Ok(running.view()),
            Err(answer) => {
                self.registry.remove(&name)?;
                self.state_dir.remove_place(&place)?;
                Err(answer)
            }
        }
    }

    /// Runs a stopped workload again and returns when it runs.
    pub(crate) async fn start(&self, name: &str) -> Result<WorkloadView> {
        let _claim = self.claim(name, "being started").await?;
        let workload = self.find(name)?;
        if workload.state != State::Stopped {
            return Err(Answer::Conflict(not_in_state(&workload, "started", "stopped")));
        }
        let backend = self.backends.of(workload.kind)?;
        self.check(&backend, name, &workload.spec).await?;
        let place = self.place(&workload);
        self.registry.change(name, |workload| workload.state = State::Starting)?;
        match self.bring_up(&backend, &workload, &place).await {
            Ok(running) => Ok(running.view()),
            Err(answer) => {
                let exit = ExitRecord { status: 1, text: "could not be started".into() };
                self.registry.change(name, |workload| workload.becomes_stopped(exit))?;
                Err(answer)
            }
        }
    }

    /// Ends a running workload and returns when it is gone.
    pub(crate) async fn stop(&self, name: &str) -> Result<WorkloadView> {
        let _claim = self.claim(name, "being stopped").await?;
        let workload = self.find(name)?;
        if workload.state != State::Running {
            return Err(Answer::Conflict(not_in_state(&workload, "stopped", "running")));
        }
        let backend = self.backends.of(workload.kind)?;
        let place = self.place(&workload);
        let (spec, at) = (workload.spec, place.clone());
        blocking(move || {
            let ended = backend.stop(&spec, &at);
            if ended.is_err() && super::supervise::is_kept(&at) {
                return ended;
            }
            // It may have ended by itself in the same moment.
            backend.sweep(&spec, &at)
        })
        .await??;
        let exit = super::supervise::exit_record(&place)
            .unwrap_or_else(|| ExitRecord { status: 0, text: "stopped".into() });
        let stopped = self.registry.change(name, |workload| workload.becomes_stopped(exit))?;
        Ok(stopped.view())
    }

    /// Forgets a workload that does not run here. The files that one which moved away left are
    /// removed unless `keep_files`.
    pub(crate) async fn remove(&self, name: &str, keep_files: bool) -> Result<RemoveAnswer> {
        let _claim = self.claim(name, "being removed").await?;
        let workload = self.find(name)?;
        let answer = match workload.state {
            State::Stopped => stays(&workload, "files of a stopped workload are never removed"),
            State::Moved if keep_files => stays(&workload, "as asked"),
            State::Moved => self.remove_files(&workload).await?,
            _ => {
                return Err(Answer::Conflict(not_in_state(
                    &workload,
                    "removed",
                    "stopped or moved",
                )));
            }
        };
        let place = self.place(&workload);
        if super::supervise::is_kept(&place) {
            return Err(Answer::Conflict(format!(
                "The old copy of {name} is still being taken away: try again in a moment"
            )));
        }
        self.state_dir.remove_place(&place)?;
        self.registry.remove(name)?;
        Ok(answer)
    }

    /// Removes the files that `workload` left here.
    pub(crate) async fn remove_files(&self, workload: &Workload) -> Result<RemoveAnswer> {
        let mut others = self.registry.list()?;
        others.retain(|other| other.uuid != workload.uuid);
        let files = workload.files.clone();
        let state_dir = self.config.state_dir.clone();
        blocking(move || leftovers::remove(&files, &others, &state_dir)).await
    }

    /// The entry of `name`.
    pub(crate) fn find(&self, name: &str) -> Result<Workload> {
        self.registry.get(name)?.ok_or_else(|| Answer::UnknownWorkload(name.to_owned()))
    }

    /// Where a workload lives.
    pub(crate) fn place(&self, workload: &Workload) -> Place {
        self.state_dir.place(&workload.name, &workload.uuid)
    }

    /// The right to do something to a workload. One that is just ending is waited for.
    pub(crate) async fn claim(&self, name: &str, doing: &'static str) -> Result<Claim> {
        let deadline = Instant::now() + ENDED_WITHIN;
        loop {
            let already = match self.claims.take(name, doing) {
                Ok(claim) => return Ok(claim),
                Err(already) => already,
            };
            if already != NOTING || Instant::now() >= deadline {
                let hint = match already {
                    super::moves::DOING => format!("; `decamp cancel {name}` calls the move off"),
                    _ => String::new(),
                };
                return Err(Answer::Conflict(format!("{name} is {already} right now{hint}")));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn check(&self, backend: &Arc<dyn Backend>, name: &str, spec: &Value) -> Result<()> {
        let (backend, spec) = (Arc::clone(backend), spec.clone());
        let refusals = blocking(move || backend.check(&spec)).await?;
        if refusals.is_empty() {
            Ok(())
        } else {
            Err(Answer::refused_for(&format!("{name} cannot run here"), refusals))
        }
    }

    /// Starts the keeper; whatever is left of one that did not start is swept away.
    async fn bring_up(
        &self,
        backend: &Arc<dyn Backend>,
        workload: &Workload,
        place: &Place,
    ) -> Result<Workload> {
        let (backend, spec, at) = (Arc::clone(backend), workload.spec.clone(), place.clone());
        let started = blocking(move || {
            backend.run(&spec, &at).inspect_err(|_| {
                if let Err(error) = backend.sweep(&spec, &at) {
                    tracing::warn!("Cannot sweep after a failed start: {}", chain(&error));
                }
            })
        })
        .await?;
        started?;
        Ok(self.registry.change(&workload.name, Workload::becomes_running)?)
    }
}

/// Runs what blocks on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Answer::Failed(format!("The agent's own work broke off: {error}")))
}

async fn keeper_facts(place: Place) -> Option<Value> {
    let ask = move || -> decamp_shared::workload::Result<Value> {
        let mut keeper = KeeperClient::connect(&place)?;
        let phase = keeper.phase()?;
        Ok(json!({ "phase": phase, "facts": keeper.facts()? }))
    };
    let asked = tokio::time::timeout(FACTS_WITHIN, tokio::task::spawn_blocking(ask)).await;
    asked.ok()?.ok()?.ok()
}

fn stays(workload: &Workload, why: &str) -> RemoveAnswer {
    let left = |path: &PathBuf| LeftFile { path: path.clone(), why: why.to_owned() };
    RemoveAnswer {
        removed: Vec::new(),
        left: workload.files.iter().map(|file| left(&file.path)).collect(),
    }
}

fn taken_by(taken: &Workload) -> String {
    let name = &taken.name;
    let kind = match taken.kind {
        Kind::Vm => "a virtual machine",
        _ => "a container",
    };
    match taken.state {
        State::Moved => format!(
            "The name {name} is taken by what {kind} left here that moved to {}: choose another, or \
             `decamp rm {name}` first",
            taken.moved_to.as_deref().unwrap_or("another host")
        ),
        State::Stopped => format!(
            "The name {name} is taken by {kind} that is stopped: `decamp start {name}` runs it again, \
             `decamp rm {name}` forgets it"
        ),
        state => format!("The name {name} is taken by {kind} that is {state}: choose another"),
    }
}

/// Why something cannot be done, and what can be done instead.
pub(crate) fn not_in_state(workload: &Workload, done: &str, needed: &str) -> String {
    let name = &workload.name;
    let host = workload.moved_to.as_deref().unwrap_or("another host");
    let hint = match workload.state {
        State::Moved => format!("it moved to {host}: ask the agent there"),
        State::Migrating => {
            format!("it is moving to {host}: `decamp cancel {name}` calls that off")
        }
        State::Incoming => "it is still arriving".to_owned(),
        State::Unresolved => format!(
            "nobody knows whether it runs on {host}: `decamp resolve {}` decides",
            workload.migration.as_deref().unwrap_or("MIGRATION")
        ),
        State::Running => format!("it runs: `decamp stop {name}` first"),
        State::Starting => "it is being started".to_owned(),
        State::Stopped => format!("it is stopped: `decamp start {name}` first"),
    };
    match (workload.state, needed) {
        (State::Running, "stopped") => format!("{name} runs already"),
        (State::Stopped, "running") if done == "stopped" => format!("{name} is stopped already"),
        _ => format!("{name} cannot be {done}: {hint}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(state: State) -> Workload {
        let mut workload = Workload::new("web", "u-1", Kind::Vm, json!({}), state);
        workload.moved_to = Some("beta".into());
        workload
    }

    #[test]
    fn refusals_say_what_can_be_done_instead() {
        for (state, done, needed, says) in [
            (State::Running, "started", "stopped", "web runs already"),
            (State::Running, "removed", "stopped or moved", "decamp stop web"),
            (State::Stopped, "stopped", "running", "web is stopped already"),
            (State::Stopped, "moved", "running", "decamp start web"),
            (State::Moved, "started", "stopped", "it moved to beta"),
            (State::Migrating, "stopped", "running", "decamp cancel web"),
            (State::Unresolved, "started", "stopped", "decamp resolve"),
        ] {
            let text = not_in_state(&workload(state), done, needed);
            assert!(text.contains(says), "{text}");
        }
        assert!(taken_by(&workload(State::Moved)).contains("decamp rm web"));
        assert!(taken_by(&workload(State::Running)).contains("choose another"));
    }
}
