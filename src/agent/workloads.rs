//! What can be done to a workload on this host: run, start, stop, remove, look at. Moving it is in
//! [`super::moves`].
//!
//! Every change claims the workload first, and is written in the registry before it is believed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use decamp_shared::keeper::{ExitRecord, KeeperClient};
use decamp_shared::workload::{Backend, Kind, Place, Refusal, RefusalCode};
use serde_json::{Value, json};

use super::Agent;
use super::answer::{Answer, Result, chain};
use super::claims::Claim;
use super::registry::Workload;
use super::supervise::{NOTING, is_kept, listens};
use super::{fenced, leftovers};
use crate::backend::{files_of, is_adopted, is_podmans};
use crate::messages::{
    FileEntry, LeftFile, RemoveAnswer, RunRequest, State, WorkloadDetail, WorkloadView,
    is_workload_name,
};

/// A keeper that does not answer `inspect` within this is not waited for.
const FACTS_WITHIN: Duration = Duration::from_secs(3);
/// How long whoever removes a workload waits for what a checkpoint left of it.
const RELEASED_WITHIN: Duration = Duration::from_secs(5);
/// Why files of a container of podman's are not removed when it is.
const PODMANS: &str = "it is podman's or yours: a root file system that came here goes once podman has its \
                       container no more (podman rm), and its volumes stay (podman volume rm)";
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
            State::Running if !self.claims.is_taken(name) => self.keeper_facts(place).await,
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
        let answer = match self.bring_up(&backend, &workload, &place).await {
            Ok(running) => return Ok(running.view()),
            Err(answer) => answer,
        };
        self.forget_unless_kept(&name, &place).await?;
        Err(answer)
    }

    /// Forgets a workload that did not come to be. One that could not be ended, or given back, is not forgotten: the next
    /// agent finds it.
    pub(super) async fn forget_unless_kept(&self, name: &str, place: &Place) -> Result<()> {
        if !kept(place).await? {
            self.registry.remove(name)?;
            self.state_dir.remove_place(place)?;
        }
        Ok(())
    }

    /// Runs a stopped workload again and returns when it runs.
    pub(crate) async fn start(&self, name: &str) -> Result<WorkloadView> {
        let _claim = self.claim(name, "being started").await?;
        let workload = self.find(name)?;
        if workload.state != State::Stopped {
            return Err(Answer::Conflict(not_in_state(&workload, "started", "stopped")));
        }
        let backend = self.backends.of(workload.kind)?;
        let place = self.place(&workload);
        if !gone(&place).await? {
            return Err(Answer::Conflict(format!(
                "{name} is noted as stopped, but a keeper of it is still there: it may run. See \
                 `decamp logs {name}`; restart the agent once that keeper has ended"
            )));
        }
        self.check(&backend, name, &workload.spec).await?;
        self.registry.change(name, |workload| workload.state = State::Starting)?;
        let answer = match self.bring_up(&backend, &workload, &place).await {
            Ok(running) => return Ok(running.view()),
            Err(answer) => answer,
        };
        if !kept(&place).await? {
            let exit = ExitRecord { status: 1, text: "could not be started".into() };
            self.registry.change(name, |workload| workload.becomes_stopped(exit))?;
        }
        Err(answer)
    }

    /// Ends a running workload and returns when it is gone. It is given `grace` to do so by itself, or as long as is usual.
    pub(crate) async fn stop(&self, name: &str, grace: Option<Duration>) -> Result<WorkloadView> {
        let _claim = self.claim(name, "being stopped").await?;
        let workload = self.find(name)?;
        if workload.state != State::Running {
            return Err(Answer::Conflict(not_in_state(&workload, "stopped", "running")));
        }
        let backend = self.backends.of(workload.kind)?;
        let place = self.place(&workload);
        end(backend, workload.spec, place.clone(), grace).await?;
        let exit = super::supervise::exit_record(&place)
            .unwrap_or_else(|| ExitRecord { status: 0, text: "stopped".into() });
        let stopped = self.registry.change(name, |workload| workload.becomes_stopped(exit))?;
        Ok(stopped.view())
    }

    /// Forgets a workload that does not run here, or gives an adopted one back as it runs. The files that
    /// one which moved away left are removed unless `keep_files`.
    pub(crate) async fn remove(
        self: &Arc<Self>,
        name: &str,
        keep_files: bool,
    ) -> Result<RemoveAnswer> {
        let _claim = self.claim(name, "being removed").await?;
        let workload = self.find(name)?;
        let place = self.place(&workload);
        // What a checkpoint left of it goes too.
        if workload.state == State::Stopped && listens(&place) {
            let (agent, owned) = (Arc::clone(self), name.to_owned());
            let settled = blocking(move || fenced::settle(&agent, &owned, RELEASED_WITHIN)).await?;
            if let Err(answer) = settled {
                tracing::warn!(workload = name, "Its keeper: {answer}");
            }
        }
        // Before its files go: a copy that is not gone yet may be the only one.
        if matches!(workload.state, State::Stopped | State::Moved) && !gone(&place).await? {
            return Err(Answer::Conflict(format!(
                "A keeper of {name} is still there, perhaps being taken away: try again in a moment"
            )));
        }
        let answer = match workload.state {
            State::Stopped if is_podmans(&workload.spec) => stays(&workload, PODMANS),
            State::Stopped => stays(&workload, "files of a stopped workload are never removed"),
            State::Running if is_adopted(&workload.spec) => {
                match self.let_go(&workload, &place).await? {
                    true => stays(&workload, "it runs on under its runtime"),
                    false if is_podmans(&workload.spec) => stays(&workload, PODMANS),
                    false => stays(&workload, "it has ended, and its runtime has it"),
                }
            }
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
        self.state_dir.remove_place(&place)?;
        self.registry.remove(name)?;
        if is_podmans(&workload.spec) {
            let agent = Arc::clone(self);
            blocking(move || leftovers::clear_podmans(&agent)).await?;
        }
        Ok(answer)
    }

    /// Removes the files that `workload` left here.
    pub(crate) async fn remove_files(&self, workload: &Workload) -> Result<RemoveAnswer> {
        if is_podmans(&workload.spec) {
            return Ok(stays(workload, PODMANS));
        }
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

    /// What a keeper says of itself, if it does so soon. While one is asked nobody else asks it: those who
    /// look often do not pile up before one that is silent.
    async fn keeper_facts(&self, place: Place) -> Option<Value> {
        let asking = self.asking.take(&place.name, "being asked").ok()?;
        let ask = move || -> decamp_shared::workload::Result<Value> {
            let _asking = asking;
            let mut keeper = KeeperClient::connect_within(&place, FACTS_WITHIN)?;
            let phase = keeper.phase()?;
            Ok(json!({ "phase": phase, "facts": keeper.facts()? }))
        };
        let asked = tokio::time::timeout(FACTS_WITHIN, tokio::task::spawn_blocking(ask)).await;
        asked.ok()?.ok()?.ok()
    }

    async fn check(&self, backend: &Arc<dyn Backend>, name: &str, spec: &Value) -> Result<()> {
        let (backend, spec) = (Arc::clone(backend), spec.clone());
        let state_dir = self.config.state_dir.clone();
        let refusals = blocking(move || {
            let mut refusals = backend.check(&spec);
            refusals.extend(exposed(&files_of(backend.kind(), &spec), &state_dir));
            refusals
        });
        let refusals = refusals.await?;
        if refusals.is_empty() {
            Ok(())
        } else {
            Err(Answer::refused_for(&format!("{name} cannot run here"), refusals))
        }
    }

    /// Has `start` make a keeper, sweeps away what is left of one that did not come to be, and notes that the
    /// workload runs. Why that could not be noted is the inner error: it does run then.
    pub(super) async fn begin_to_run(
        &self,
        backend: &Arc<dyn Backend>,
        workload: &Workload,
        place: &Place,
        start: impl FnOnce(&dyn Backend, &Value, &Place) -> decamp_shared::workload::Result<()>
        + Send
        + 'static,
    ) -> Result<std::result::Result<Workload, Answer>> {
        let (owned, spec, at) = (Arc::clone(backend), workload.spec.clone(), place.clone());
        let started = blocking(move || {
            start(&*owned, &spec, &at).inspect_err(|_| {
                if let Err(error) = owned.sweep(&spec, &at) {
                    tracing::warn!("Cannot sweep after a failed start: {}", chain(&error));
                }
            })
        });
        started.await??;
        Ok(self.registry.change(&workload.name, Workload::becomes_running).map_err(Answer::from))
    }

    /// Starts the keeper.
    async fn bring_up(
        &self,
        backend: &Arc<dyn Backend>,
        workload: &Workload,
        place: &Place,
    ) -> Result<Workload> {
        let start = |backend: &dyn Backend, spec: &Value, at: &Place| backend.run(spec, at);
        let written = match self.begin_to_run(backend, workload, place, start).await? {
            Ok(running) => return Ok(running),
            Err(error) => error,
        };
        // One that runs and that nobody knows of would be started a second time.
        match end(Arc::clone(backend), workload.spec.clone(), place.clone(), None).await {
            Ok(()) => Err(written),
            Err(answer) => Err(Answer::Failed(format!(
                "{written}. It was started and could not be ended again ({answer}): restart the agent \
                 and look with `decamp ls`"
            ))),
        }
    }
}

/// Nothing that a workload may write holds what the agent knows.
fn exposed(files: &[FileEntry], state_dir: &Path) -> Option<Refusal> {
    let holds =
        |file: &&FileEntry| file.path.starts_with(state_dir) || state_dir.starts_with(&file.path);
    let file = files.iter().find(holds)?;
    let text =
        format!("{} cannot be part of a workload: the agent's state is there", file.path.display());
    Some(Refusal::new(RefusalCode::File, text))
}

/// Ends a running workload and what is left of it.
async fn end(
    backend: Arc<dyn Backend>,
    spec: Value,
    place: Place,
    grace: Option<Duration>,
) -> Result<()> {
    let ended = blocking(move || {
        let ended = backend.stop(&spec, &place, grace);
        if ended.is_err() && listens(&place) {
            return ended;
        }
        // It may have ended by itself in the same moment. One that nobody can ask any more is ended by force.
        backend.sweep(&spec, &place)
    });
    Ok(ended.await??)
}

/// Whether there is a keeper at `place`.
async fn kept(place: &Place) -> Result<bool> {
    let place = place.clone();
    blocking(move || is_kept(&place)).await
}

/// Whether there is no keeper at `place`; one that is just ending is waited for.
pub(crate) async fn gone(place: &Place) -> Result<bool> {
    let place = place.clone();
    blocking(move || super::supervise::is_gone(&place)).await
}

/// Runs what blocks on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Answer::Failed(format!("The agent's own work broke off: {error}")))
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
    use std::sync::atomic::Ordering;

    use super::super::testing::{Bench, keeper};
    use super::*;

    fn workload(state: State) -> Workload {
        let mut workload = Workload::new("web", "u-1", Kind::Vm, json!({}), state);
        workload.moved_to = Some("beta".into());
        workload
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_cannot_be_entered_as_running_does_not_run() {
        let bench = Bench::new();
        bench.fill_disk(State::Running);
        let request = || RunRequest { name: "web".into(), kind: Kind::Vm, spec: json!({}) };
        let refused = bench.agent.run_new(request()).await;
        assert!(matches!(refused, Err(Answer::Failed(_))), "{refused:?}");
        assert!(!bench.backend.runs());
        assert_eq!(bench.state(), None, "forgotten, because it does not run");
        let web = bench.enter(State::Stopped);
        let refused = bench.agent.start("web").await;
        assert!(matches!(refused, Err(Answer::Failed(_))), "{refused:?}");
        assert!(!bench.backend.runs());
        assert_eq!(bench.backend.stopped.load(Ordering::SeqCst), 2);
        assert_eq!(bench.state(), Some(State::Stopped));
        bench.free_disk();
        std::fs::remove_file(bench.agent.place(&web).socket()).expect("there was one");
        bench.agent.start("web").await.expect("starts");
        assert!(bench.backend.runs());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_keeper_still_holds_is_neither_started_nor_removed() {
        let bench = Bench::new();
        let web = bench.enter(State::Stopped);
        let _keeper = keeper(&bench.agent.place(&web));
        let refused = bench.agent.start("web").await;
        assert!(matches!(refused, Err(Answer::Conflict(_))), "{refused:?}");
        assert!(!bench.backend.runs());
        let refused = bench.agent.remove("web", true).await;
        assert!(matches!(refused, Err(Answer::Conflict(_))), "{refused:?}");
        assert_eq!(bench.state(), Some(State::Stopped));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn those_who_look_do_not_pile_up_before_a_silent_keeper() {
        let bench = Bench::new();
        let web = bench.enter(State::Running);
        let silent = keeper(&bench.agent.place(&web));
        let looks = (0..8).map(|_| bench.agent.inspect("web"));
        for looked in futures_util::future::join_all(looks).await {
            assert_eq!(looked.expect("an entry").keeper, None);
        }
        bench.until("the end of the look", |bench| !bench.agent.asking.is_taken("web")).await;
        silent.set_nonblocking(true).expect("set");
        assert!(silent.accept().is_ok() && silent.accept().is_err(), "one has asked");
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
