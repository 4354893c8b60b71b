//! A workload of this host into a file. Until the file is complete and on the disk any failure means that
//! the workload runs on; how the file is written is the business of `decamp_shared::archive`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use decamp_shared::archive::ArchiveError;
use decamp_shared::archive::checkpoint::{Asked, Done, Failed, Step, checkpoint};
use decamp_shared::keeper::ExitRecord;
use decamp_shared::workload::{Backend, Place, SourceWorkload, WorkloadError, is_plain_absolute};
use futures_util::stream;
use tokio::sync::mpsc;

use super::Agent;
use super::answer::{Answer, Result, chain};
use super::claims::Claim;
use super::fenced;
use super::registry::Workload;
use super::workloads::blocking;
use crate::messages::{ArchiveEvent, CheckpointRequest, CheckpointView, RUNS_ON, State, now_ms};

/// Tells whoever asked how far it is. Nobody may listen any more.
pub(super) type Teller = mpsc::UnboundedSender<ArchiveEvent>;

/// A checkpoint that is about to be made.
struct Job {
    agent: Arc<Agent>,
    workload: Workload,
    place: Place,
    backend: Arc<dyn Backend>,
    request: CheckpointRequest,
    /// Nothing else is done to the workload meanwhile.
    claim: Claim,
    _counted: Counted,
}

/// One that is being written, until this is dropped.
struct Counted(Arc<Agent>);

impl Counted {
    fn new(agent: &Arc<Agent>) -> Self {
        agent.writing.send_modify(|count| *count += 1);
        Self(Arc::clone(agent))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.writing.send_modify(|count| *count -= 1);
    }
}

impl Agent {
    /// Begins a checkpoint and gives its events as lines; it goes on when nobody reads them.
    ///
    /// # Errors
    /// Every reason against it; the workload was not touched.
    pub(crate) async fn begin_checkpoint(
        self: &Arc<Self>,
        name: &str,
        request: CheckpointRequest,
    ) -> Result<Body> {
        let claim = self.claim(name, "being checkpointed").await?;
        let workload = self.find(name)?;
        if workload.state != State::Running {
            return Err(Answer::Conflict(format!(
                "{name} is {}: only a running workload can go into a checkpoint",
                workload.state
            )));
        }
        check_output(&request.output)?;
        self.check_place_of(&request.output)?;
        let job = Job {
            agent: Arc::clone(self),
            place: self.place(&workload),
            backend: self.backends.of(workload.kind)?,
            workload,
            request,
            claim,
            _counted: Counted::new(self),
        };
        let (job, source) = blocking(move || job.open()).await??;
        let (tell, told) = mpsc::unbounded_channel();
        tokio::task::spawn_blocking(move || {
            let (ended, settled) = job.run(source, &tell);
            let Job { agent, workload, claim, .. } = job;
            // Given back before anybody hears that it is over, unless something is left to do.
            match settled {
                true => drop(claim),
                false => drop(fenced::until_settled(&agent, &workload.name, claim)),
            }
            let _ = tell.send(ended);
        });
        Ok(lines(told))
    }
}

/// Waits for checkpoints to roll back, when they were told to.
pub(super) async fn end_all(agent: &Agent, within: Duration) {
    let mut writing = agent.writing.subscribe();
    let ended = writing.wait_for(|count| *count == 0);
    if tokio::time::timeout(within, ended).await.is_err() {
        tracing::warn!("A checkpoint did not end in time; its keeper lets its workload run on");
    }
}

/// Events as JSON lines, until nobody tells any more.
pub(super) fn lines(told: mpsc::UnboundedReceiver<ArchiveEvent>) -> Body {
    Body::from_stream(stream::unfold(told, |mut told| async move {
        let event = told.recv().await?;
        let line = serde_json::to_vec(&event).map(|mut line| {
            line.push(b'\n');
            line
        });
        Some((line, told))
    }))
}

impl Agent {
    /// Refuses a place where decamp may remove files one day, or a workload sees them.
    fn check_place_of(&self, output: &Path) -> Result<()> {
        // It was there a moment ago.
        let parent = output.parent().and_then(|parent| parent.canonicalize().ok());
        let Some(parent) = parent else { return Ok(()) };
        let state_dir = &self.config.state_dir;
        if parent.starts_with(state_dir.canonicalize().unwrap_or_else(|_| state_dir.clone())) {
            return Err(Answer::refused(format!(
                "{} is in the agent's own directory: name another place",
                output.display()
            )));
        }
        let all = self.registry.list()?;
        let is_among = |one: &&Workload| {
            // As they are reached, not as they were named.
            one.files.iter().any(|file| {
                parent.starts_with(&file.path)
                    || file.path.canonicalize().is_ok_and(|path| parent.starts_with(path))
            })
        };
        match all.iter().find(is_among) {
            Some(owner) => Err(Answer::refused(format!(
                "{} is among the files of {}, and goes where they go: name another place",
                output.display(),
                owner.name
            ))),
            None => Ok(()),
        }
    }
}

fn check_output(output: &Path) -> Result<()> {
    if !is_plain_absolute(output) || output.file_name().is_none() {
        let text = format!("{} is not an absolute path without `..`", output.display());
        return Err(Answer::Request(text));
    }
    if output.symlink_metadata().is_ok() {
        return Err(Answer::refused(ArchiveError::OutputTaken(output.to_owned()).to_string()));
    }
    match output.parent() {
        Some(directory) if directory.is_dir() => Ok(()),
        _ => Err(Answer::refused(format!(
            "There is no directory for {}: make it first",
            output.display()
        ))),
    }
}

impl Job {
    /// Looks at the workload, for every reason against it.
    fn open(self) -> Result<(Self, Box<dyn SourceWorkload>)> {
        let name = &self.workload.name;
        let mut source = self.backend.source_for_file(&self.workload.spec, &self.place)?;
        let manifest = source.manifest()?;
        let refusals = self.backend.pack_refusals(&manifest);
        if !refusals.is_empty() {
            let what = format!("{name} cannot go into a checkpoint, and runs on");
            return Err(Answer::refused_for(&what, refusals));
        }
        Ok((self, source))
    }

    /// What came of it, and whether the workload is let run, or taken away, as it should be.
    fn run(&self, mut source: Box<dyn SourceWorkload>, tell: &Teller) -> (ArchiveEvent, bool) {
        let name = &self.workload.name;
        let token = match self.agent.journal.next_token(&self.workload.uuid) {
            Ok(token) => token,
            Err(error) => return (ArchiveEvent::Refused(Answer::from(error).body()), true),
        };
        let asked = Asked {
            output: self.request.output.clone(),
            leave_running: self.request.leave_running,
            host: self.agent.config.name.clone(),
            now_ms: now_ms(),
            token,
            stop: self.agent.stopping().clone(),
        };
        tracing::info!(workload = name, output = %asked.output.display(), "Makes a checkpoint");
        let leaves = || self.leaves();
        let done = checkpoint(&mut *source, &*self.backend, &asked, &leaves, &|step| {
            let _ = tell.send(told(step));
        });
        // Its keeper serves one at a time.
        drop(source);
        match done {
            Ok(done) => {
                self.sweep();
                (ArchiveEvent::Checkpointed(self.view(&done)), true)
            }
            Err(failed) => {
                let settled = failed.stuck.is_none();
                (self.failed(&failed), settled)
            }
        }
    }

    /// From now on the file is all there is of it: an agent that finds it fenced takes it away, and does not
    /// let run what may be half gone.
    fn leaves(&self) -> std::result::Result<(), WorkloadError> {
        let text = format!("checkpointed to {}", self.request.output.display());
        let exit = ExitRecord { status: 0, text };
        let stopped = |entry: &mut Workload| entry.becomes_stopped(exit);
        match self.agent.registry.change(&self.workload.name, stopped) {
            Ok(_) => Ok(()),
            Err(error) => Err(WorkloadError::new("It cannot be noted as stopped", error)),
        }
    }

    /// What is left of a workload that is only in its file now.
    fn sweep(&self) {
        if self.request.leave_running {
            return;
        }
        if let Err(error) = self.backend.sweep(&self.workload.spec, &self.place) {
            tracing::warn!(workload = self.workload.name, "Cannot sweep: {}", chain(&error));
        }
    }

    fn failed(&self, failed: &Failed) -> ArchiveEvent {
        let name = &self.workload.name;
        let why = chain(&failed.error);
        tracing::warn!(workload = name, touched = failed.touched, "No checkpoint: {why}");
        if !failed.touched {
            let text = format!("{why}. {name} was not touched and runs on");
            return ArchiveEvent::Refused(Answer::refused(text).body());
        }
        let mut body = Answer::Failed(String::new()).body();
        let state = match &failed.stuck {
            None if failed.written => {
                format!("{name} was resumed and runs on; the file is complete all the same")
            }
            None => format!("{name} was resumed and runs on; nothing is left of the file"),
            Some(_) if failed.leaving => format!(
                "The file is complete: keep it, it is all that is left of {name}, which does not run \
                 here again. What could not be taken away yet is tried again until it is gone, by the next \
                 agent too"
            ),
            Some(stuck) => fenced::told(&self.agent, name, stuck),
        };
        if failed.stuck.is_none() {
            RUNS_ON.clone_into(&mut body.code);
        }
        body.message = format!("{why}. {state}");
        ArchiveEvent::Failed(body)
    }

    fn view(&self, done: &Done) -> CheckpointView {
        CheckpointView {
            workload: self.workload.name.clone(),
            kind: self.workload.kind,
            output: self.request.output.clone(),
            file_bytes: done.file_bytes,
            bytes: done.bytes,
            left_running: self.request.leave_running,
            stopped_ms: done.stopped_ms,
            advice: self.backend.advice_for_file(&self.request.output),
        }
    }
}

fn told(step: Step) -> ArchiveEvent {
    let (phase, bytes, total) = match step {
        Step::Pausing => ("pause", 0, 0),
        Step::Writing(bytes, total) => ("write", bytes, total),
        Step::Written => ("finish", 0, 0),
    };
    ArchiveEvent::Step { phase: phase.to_owned(), bytes, total }
}

#[cfg(test)]
mod tests {
    use decamp_shared::workload::FileRole;

    use super::super::testing::Bench;
    use super::*;
    use crate::backend::role_word;
    use crate::messages::FileEntry;

    #[test]
    fn no_file_goes_among_those_of_a_workload_however_they_are_named() {
        let bench = Bench::new();
        let dir = tempfile::tempdir().expect("a directory");
        let (bundle, link) = (dir.path().join("bundle"), dir.path().join("link"));
        std::fs::create_dir_all(bundle.join("rootfs")).expect("made");
        std::os::unix::fs::symlink(&bundle, &link).expect("linked");
        bench.enter(State::Running);
        for named in [&bundle, &link] {
            let role = role_word(FileRole::Bundle).to_owned();
            let files = vec![FileEntry { role, path: named.clone(), shared: false }];
            bench.agent.registry.change("web", |web| web.files = files).expect("written");
            for place in [&bundle, &link] {
                let output = place.join("rootfs/web.tar.zst");
                let refused = bench.agent.check_place_of(&output);
                assert!(refused.is_err_and(|why| why.to_string().contains("files of web")));
            }
            bench.agent.check_place_of(&dir.path().join("web.tar.zst")).expect("beside them");
        }
    }
}
