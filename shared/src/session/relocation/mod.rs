//! Files of a workload that move to another place of the same host while it runs, phase by phase: copied in rounds as
//! memory is, and switched in an instant in which nothing is written to them. The workload never stops.
//!
//! Nothing changes hands here, so there is no peer, no fence and no token. Whose the files are, the keeper writes down
//! before the switch ([`crate::keeper::switched_for`]): whatever crashes, and whenever, that alone decides. How it is
//! copied is in `copier`, how long anything is waited for in `limits`; what the host's registry says of it is the agent's
//! business.

mod copier;
mod limits;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{interval, sleep_until};
use tokio_util::sync::CancellationToken;

use super::MoveOptions;
use super::error::{Result, SessionError, chain, fail_here};
use super::held::Held;
use super::policy::{Decision, Policy, Remaining};
use super::progress::{Phase, Progress, ProgressSender};
use super::report::{Outcome, PageCounts, Report, Round};
use super::source::{Halt, millis};
use crate::files::Landing;
use crate::keeper::switched_for;
use crate::pages::{PAGE_SIZE, PageSet};
use crate::workload::{self, Kind, Place, PlacedTree, SourceWorkload, WorkloadError};
use copier::Copier;
use limits::{Step, held_for, not_stored};

/// What holding and switching cost beside what is copied and stored.
const FIXED: Duration = Duration::from_millis(20);
/// Progress lines a second.
const TICKS: u32 = 10;
/// Bytes of a round below which its rate says nothing.
const MEASURABLE: u64 = 4 << 20;

/// Files that are to move.
pub struct Relocation {
    /// Its id, a UUID.
    pub migration: String,
    /// Name of this host.
    pub host: String,
    /// Which kind the workload is of.
    pub kind: Kind,
    /// Where the workload lives.
    pub place: Place,
    /// The workload, running.
    pub workload: Box<dyn SourceWorkload>,
    /// Each with its new path, at which nothing stands.
    pub files: Vec<PlacedTree>,
    /// What the user asked for.
    pub options: MoveOptions,
    /// Where it is noted what is made, until somebody says whether it stays ([`Landing::recover`]).
    pub landing: PathBuf,
    /// Where progress is told, but for the report.
    pub progress: ProgressSender,
    /// Cancelled when the user gives up.
    pub cancel: CancellationToken,
}

/// Moves files within this host. Whether they moved is for [`switched_for`] to say; the report says the same.
pub async fn relocate(request: Relocation) -> Report {
    let mut moving = Relocating::new(request);
    let result = moving.run().await;
    moving.end(result).await
}

/// A relocation under way.
struct Relocating {
    migration: String,
    place: Place,
    workload: Held<dyn SourceWorkload>,
    files: Vec<PlacedTree>,
    options: MoveOptions,
    landing: PathBuf,
    progress: ProgressSender,
    halt: Halt,
    report: Report,
    started: Instant,
    round: u32,
    /// Bytes a second, from the last round that was long enough to tell.
    rate: Option<f64>,
    /// A round that nobody waits for any more, and that may still write.
    left_behind: Option<Copying>,
}

/// A round under way: how much of it went into storing it.
type Copying = JoinHandle<workload::Result<Duration>>;

/// What one round measured.
struct Copied {
    took: Duration,
    /// How much of that went into storing it.
    storing: Duration,
    rate: f64,
}

impl Relocating {
    fn new(request: Relocation) -> Self {
        let options = request.options;
        let halt = Halt {
            cancel: request.cancel,
            deadline: tokio::time::Instant::now() + options.timeout(),
            timeout: options.timeout(),
            phase: Phase::Negotiate,
        };
        let mut report = Report::begun(&request.migration, &request.host, &request.host);
        report.workload = request.place.name.clone();
        report.kind = request.kind;
        report.mode = "pre-copy".to_owned();
        report.tracker = Some("the disk's device".to_owned());
        Self {
            migration: request.migration,
            place: request.place,
            workload: Held::new(Some(request.workload)),
            files: request.files,
            options,
            landing: request.landing,
            progress: request.progress,
            halt,
            report,
            started: Instant::now(),
            round: 0,
            rate: None,
            left_behind: None,
        }
    }

    /// The phases in order.
    async fn run(&mut self) -> Result<()> {
        self.enter(Phase::Negotiate);
        if self.options.dry_run {
            return Ok(());
        }
        self.enter(Phase::Prepare);
        fail_here!("relocate.prepare");
        let copier = Arc::new(self.prepare().await?);
        self.enter(Phase::PreCopy);
        fail_here!("relocate.pre-copy");
        let copied = self.copy(&copier).await;
        // Also of one that failed: how far it had come.
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let (zero, raw) = (count(&copier.counters.zero), count(&copier.counters.raw));
        self.report.pages = PageCounts { zero, raw, ..PageCounts::default() };
        copied
    }

    fn enter(&mut self, phase: Phase) {
        self.halt.phase = phase;
        self.progress.phase(phase);
    }

    async fn prepare(&mut self) -> Result<Copier> {
        self.halt.check()?;
        let (record, files) = (self.landing.clone(), self.files.clone());
        self.with(move |workload| {
            let landing = Landing::recorded(&record).map_err(|error| {
                WorkloadError::new(format!("Cannot make {}", record.display()), error)
            })?;
            Copier::make(workload, &landing, &files)
        })
        .await
    }

    async fn copy(&mut self, copier: &Arc<Copier>) -> Result<()> {
        let left = self.pre_copy(copier).await?;
        self.enter(Phase::Switch);
        fail_here!("relocate.pause");
        self.halt.check()?;
        let held = Instant::now();
        let held_for = held_for(self.options.max_downtime());
        self.within(held_for, Step::Hold, |workload| workload.hold()).await?;
        self.report.downtime.pause_ms = millis(held.elapsed());
        fail_here!("relocate.final");
        let copying = Instant::now();
        let last = self.within(held_for, Step::Harvest, |workload| harvest(workload, left)).await?;
        self.send_round(copier, last, Some(held_for)).await?;
        self.report.downtime.memory_ms = millis(copying.elapsed());
        fail_here!("relocate.commit");
        self.halt.check()?;
        let (switching, id) = (Instant::now(), self.migration.clone());
        let switched =
            self.within(held_for, Step::Switch, move |workload| workload.switch(&id)).await;
        self.report.downtime.switch_ms = millis(switching.elapsed());
        self.report.downtime_ms = Some(millis(held.elapsed()));
        switched?;
        fail_here!("relocate.switched");
        Ok(())
    }

    /// Rounds, until the policy says that what is left is little enough. Gives what the last harvest took and no
    /// round copied.
    async fn pre_copy(&mut self, copier: &Arc<Copier>) -> Result<PageSet> {
        let timeout = self.options.timeout();
        let mut policy = Policy::new(self.options.max_downtime(), timeout, FIXED).of_disks();
        let mut dirty = self.with(|workload| harvest(workload, PageSet::new())).await?;
        loop {
            self.halt.check()?;
            let copied = self.send_round(copier, dirty, None).await?;
            dirty = self.with(|workload| harvest(workload, PageSet::new())).await?;
            let remaining = Remaining {
                dirty_pages: dirty.len(),
                wire_ratio: 1.0,
                wire_rate: self.rate.unwrap_or(copied.rate),
                // What all that a disk holds took says nothing of what is left of it.
                look: if self.round > 1 { copied.storing } else { Duration::ZERO },
                elapsed: self.started.elapsed(),
                ..Remaining::default()
            };
            let predicted = millis(policy.predict(&remaining));
            let dirty_rate = remaining.dirty_pages as f64 / copied.took.as_secs_f64().max(1e-3);
            let rates = (remaining.wire_rate, Some(dirty_rate), Some(predicted));
            self.tell_pages(copier, 0, remaining.dirty_pages, rates);
            match policy.decide(&remaining) {
                Decision::Another => {}
                Decision::Throttle { percent } => self.throttle(percent, &mut policy).await,
                Decision::Stop => {
                    if policy.misses(&remaining) {
                        let text = format!(
                            "Neither further rounds nor less processor time for it make the hold of about {predicted:.0} ms \
                             shorter, which is more than is aimed at; --max-downtime makes it a promise"
                        );
                        self.progress.tell(Progress::Note { text });
                    }
                    self.report.predicted.downtime_ms = Some(predicted);
                    return Ok(dirty);
                }
                Decision::GiveUp { reason } => return Err(SessionError::NotConverging(reason)),
            }
        }
    }

    async fn throttle(&mut self, percent: u8, policy: &mut Policy) {
        let text =
            format!("It writes faster than is copied: taking {percent} % of its processor time");
        self.progress.tell(Progress::Note { text });
        if let Err(error) = self.with(move |workload| workload.throttle(percent)).await {
            policy.cannot_throttle();
            let text = format!("It cannot be slowed down here: {}", chain(&error));
            self.progress.tell(Progress::Note { text });
        }
    }

    /// Copies one round and has it stored; the last, which is `held_for` so long at most, with all that the files are.
    async fn send_round(
        &mut self,
        copier: &Arc<Copier>,
        pages: PageSet,
        held_for: Option<Duration>,
    ) -> Result<Copied> {
        let last = held_for.is_some();
        let due = tokio::time::Instant::now() + held_for.unwrap_or_default();
        self.round += 1;
        let (round, dirty_pages, begun) = (self.round, pages.len(), Instant::now());
        let before = copier.counters.read.load(Ordering::Relaxed);
        let worker = Arc::clone(copier);
        let mut copying = spawn_blocking(move || {
            worker.copy(&pages, round == 1)?;
            let storing = Instant::now();
            if last {
                worker.take_after()?;
            }
            worker.store(last)?;
            Ok::<_, WorkloadError>(storing.elapsed())
        });
        let mut ticks = interval(Duration::from_secs(1) / TICKS);
        let storing = loop {
            tokio::select! {
                copied = &mut copying => break copied??,
                error = self.halt.halted() => return Err(self.leave_behind(copier, copying, error)),
                () = sleep_until(due), if last => {
                    let error = not_stored(held_for.unwrap_or_default());
                    return Err(self.leave_behind(copier, copying, error));
                }
                _ = ticks.tick() => {
                    let done = copier.counters.read.load(Ordering::Relaxed) - before;
                    let rate = (done * PAGE_SIZE as u64) as f64 / begun.elapsed().as_secs_f64().max(1e-3);
                    self.tell_pages(copier, done, dirty_pages, (rate, None, None));
                }
            }
        };
        let took = begun.elapsed();
        let bytes = dirty_pages * PAGE_SIZE as u64;
        let rate = bytes as f64 / took.saturating_sub(storing).as_secs_f64().max(1e-6);
        if bytes >= MEASURABLE {
            self.rate = Some(rate);
        }
        self.report.rounds.push(Round { round, dirty_pages, wire_bytes: 0, ms: millis(took) });
        Ok(Copied { took, storing, rate })
    }

    /// Calls off the round that is being copied. The workload goes on before that has ended: what it is written to may
    /// stand still for as long as it likes.
    fn leave_behind(
        &mut self,
        copier: &Copier,
        copying: Copying,
        error: SessionError,
    ) -> SessionError {
        copier.stopped.store(true, Ordering::Relaxed);
        self.left_behind = Some(copying);
        error
    }

    fn tell_pages(
        &self,
        copier: &Copier,
        done_pages: u64,
        round_pages: u64,
        (rate, dirty_rate, predicted_downtime_ms): (f64, Option<f64>, Option<f64>),
    ) {
        self.progress.tell(Progress::Pages {
            round: self.round,
            done_pages,
            round_pages,
            wire_bytes: copier.counters.read.load(Ordering::Relaxed) * PAGE_SIZE as u64,
            rate,
            dirty_rate,
            predicted_downtime_ms,
        });
    }

    async fn with<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut dyn SourceWorkload) -> workload::Result<R> + Send + 'static,
    ) -> Result<R> {
        self.workload.with("The workload is no longer held by this move", |held| work(held)).await
    }

    /// As [`Relocating::with`], of what is asked while the disks stand still: no answer is waited for longer than
    /// `limit`. Whatever comes of it later [`Relocating::end`] undoes, or finds done.
    async fn within<R: Send + 'static>(
        &mut self,
        limit: Duration,
        step: Step,
        work: impl FnOnce(&mut dyn SourceWorkload) -> workload::Result<R> + Send + 'static,
    ) -> Result<R> {
        let begun = Instant::now();
        let done = self.with(move |workload| {
            workload.answer_within(Some(limit))?;
            let done = work(workload);
            workload.answer_within(None)?;
            done
        });
        match done.await {
            Err(SessionError::Workload(WorkloadError::KeeperGone { .. }))
                if begun.elapsed() >= limit =>
            {
                let late = step.late(limit);
                let text = format!("{}. Waiting for its keeper, so as to undo that", chain(&late));
                self.progress.tell(Progress::Note { text });
                Err(late)
            }
            done => done,
        }
    }

    /// The one way out: what slows the workload down, or follows it, ends here.
    async fn end(mut self, result: Result<()>) -> Report {
        let resumed = match self.options.dry_run {
            true => Ok(()),
            false => self.with(|workload| workload.resume()).await,
        };
        let gone = |error: &SessionError| {
            matches!(error, SessionError::Workload(WorkloadError::KeeperGone { .. }))
        };
        self.report.lost = resumed.as_ref().is_err_and(gone);
        if let Err(error) = &resumed {
            // Its keeper does that by itself as soon as it is left alone.
            tracing::warn!(
                migration = self.migration,
                error = chain(error),
                "Cannot undo a mirror"
            );
        }
        drop(self.workload.take());
        if let Some(copying) = self.left_behind.take() {
            // What it does is undone after it, and not beside it.
            let _ = copying.await;
        }
        let (place, id) = (self.place.clone(), self.migration.clone());
        let looked = spawn_blocking(move || switched_for(&place, &id)).await;
        let done = result.is_ok() && !self.options.dry_run;
        let switched = done || matches!(looked, Ok(Ok(true)));
        let (outcome, reason) = match &result {
            _ if switched => (Outcome::Completed, None),
            Ok(()) => {
                let text = "Dry run: nothing was touched; the new place would take it";
                (Outcome::Completed, Some(text.to_owned()))
            }
            Err(SessionError::Cancelled) => (Outcome::Cancelled, Some(self.advice(&result))),
            Err(_) => (Outcome::Failed, Some(self.advice(&result))),
        };
        if !switched {
            self.report.downtime_ms = None;
        } else if self.report.lost {
            // The disks moved; that is not all that there is to say.
            self.report.notes.push(self.is_gone());
        }
        self.report.outcome = outcome;
        self.report.reason = reason;
        self.report.total_ms = millis(self.started.elapsed());
        self.report
    }

    fn advice(&self, result: &Result<()>) -> String {
        let (name, host) = (&self.place.name, &self.report.from);
        let text = result.as_ref().err().map(|error| chain(error)).unwrap_or_default();
        let state = match self.report.lost {
            true => self.is_gone(),
            false => format!("{name} runs on at {host}, with the disks where they were"),
        };
        let stop = if text.ends_with(['.', '?', '!']) { "" } else { "." };
        format!("{text}{stop} {state}")
    }

    /// That the workload is no more.
    fn is_gone(&self) -> String {
        let name = &self.place.name;
        format!(
            "{name} ended, or its keeper was killed, while its disk was being moved: see `decamp inspect {name}` \
             and `decamp logs {name}`"
        )
    }
}

fn harvest(workload: &mut dyn SourceWorkload, mut into: PageSet) -> workload::Result<PageSet> {
    workload.harvest(&mut into)?;
    Ok(into)
}
