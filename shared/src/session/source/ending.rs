//! The end of a move at its source, whichever it is: what is still ours to undo is undone, and the report
//! says what came of it.

use super::{Departing, SourceContext, millis};
use crate::session::commit::Source;
use crate::session::error::{Result, SessionError, chain};
use crate::session::link::Link;
use crate::session::progress::Phase;
use crate::session::report::{Outcome, Report};
use crate::workload::FileTree;

/// Where the workload is at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It runs on here.
    Here,
    /// It runs at the destination, and this copy is gone.
    Moved,
    /// It stands still here, fenced, until the destination or an operator says.
    Unresolved,
}

/// How a move ended.
#[derive(Clone, Debug)]
pub struct Ending {
    /// What was told.
    pub report: Report,
    /// Where the workload is.
    pub fate: Fate,
    /// Its file trees, for whoever takes the source's files away.
    pub trees: Vec<FileTree>,
}

impl Departing<'_> {
    /// The one way out: everything that is still ours to undo is undone here.
    pub(super) async fn end(mut self, result: Result<()>) -> Ending {
        if self.departure.machine().may_give_up() {
            // The destination lets go while the workload resumes.
            let farewell = self.link.as_ref().map(Link::aborter);
            let reason = result.as_ref().err().map(|error| chain(error)).unwrap_or_default();
            self.departure.give_up(farewell, &reason).await;
        }
        if let Some(link) = self.link.take() {
            link.close().await;
        }
        let lost = self.departure.is_lost();
        let fate = match self.departure.machine() {
            Source::Released | Source::Releasing => Fate::Moved,
            Source::Fenced | Source::Undecided => Fate::Unresolved,
            _ => Fate::Here,
        };
        let error = result.as_ref().err().map(|error| chain(error)).unwrap_or_default();
        let (outcome, reason) = match (fate, &result) {
            (Fate::Moved, _) => (Outcome::Completed, None),
            (Fate::Unresolved, _) => {
                (Outcome::Unresolved, Some(unresolved_advice(&self.report, &error)))
            }
            (Fate::Here, Ok(())) => (
                Outcome::Completed,
                Some(format!("Dry run: nothing was touched; {} would take it", self.report.to)),
            ),
            (Fate::Here, Err(error)) => {
                self.report.lost = lost;
                (outcome_of(error, self.halt.phase), Some(self.advice(error, lost)))
            }
        };
        self.report.total_ms = millis(self.started.elapsed());
        self.report.outcome = outcome;
        self.report.reason = reason;
        if let Err(SessionError::Refused(refusals)) = &result {
            self.report.refusals = refusals.clone();
        }
        let mut report = self.report;
        if report.outcome != Outcome::Completed {
            report.downtime_ms = None;
        }
        Ending { report, fate, trees: self.manifest.files }
    }

    fn advice(&self, error: &SessionError, lost: bool) -> String {
        let name = &self.manifest.name;
        let state = match self.stopped {
            _ if lost => format!(
                "{name} ended, or its keeper was killed, while it was being moved: see `decamp \
                 inspect {name}` and `decamp logs {name}`"
            ),
            None => format!("{name} was not touched and runs on at {}", self.context.host),
            Some(_) => format!("{name} was resumed and runs on at {}", self.context.host),
        };
        let text = chain(error);
        let stop = if text.ends_with(['.', '?', '!']) { "" } else { "." };
        format!("{text}{stop} {state}")
    }
}

fn outcome_of(error: &SessionError, phase: Phase) -> Outcome {
    match error {
        SessionError::Cancelled => Outcome::Cancelled,
        _ if phase == Phase::Negotiate => Outcome::Refused,
        _ => Outcome::Failed,
    }
}

fn unresolved_advice(report: &Report, why: &str) -> String {
    format!(
        "{why}. {name} stands still at {from}, fenced, and is never started twice: this agent goes \
         on asking {to}, and settles it when it answers. To decide by hand, look at both hosts with \
         `decamp ls`, then `decamp resolve {id} --keep destination` if it runs at {to}, or `decamp \
         resolve {id} --keep source` if it does not and never will",
        name = report.workload,
        from = report.from,
        to = report.to,
        id = report.migration,
    )
}

pub(super) fn empty_report(context: &SourceContext, migration: &str) -> Report {
    let begun = Report::begun(migration, &context.host, &context.peer.name);
    Report { encrypted: context.page_encryption, ..begun }
}

/// The workload could not even be described.
pub(super) fn nothing_moved(context: &SourceContext, migration: &str, reason: String) -> Ending {
    let mut report = empty_report(context, migration);
    report.outcome = Outcome::Refused;
    report.reason = Some(format!("{reason}. The workload was not touched"));
    Ending { report, fate: Fate::Here, trees: Vec::new() }
}
