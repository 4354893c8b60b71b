//! Disks that move to another place of this host while their VM runs: what is asked for is checked, noted, and set
//! going like any other move.
//!
//! What speaks against it is in `fitting`; what is noted of it before anything is touched, and what that means after
//! it ended, however it ended, in `intent`.

mod fitting;
pub(in crate::agent) mod intent;

use std::sync::Arc;

use decamp_shared::session::relocation::{Relocation, relocate};
use decamp_shared::session::{Mode, MoveOptions, Outcome, Report};
use decamp_shared::workload::{Kind, PlacedTree, SourceWorkload, WorkloadError};

use super::beginning::{Whither, described};
use super::{DOING, Move};
use crate::agent::Agent;
use crate::agent::answer::{Answer, Result, chain};
use crate::agent::claims::Claim;
use crate::agent::registry::Workload;
use crate::agent::workloads::{blocking, not_in_state};
use crate::messages::{MigrationRequest, State};
use intent::{Intent, Settled};

impl Agent {
    /// Begins to move disks within this host and returns once that is under way; it goes on whoever listens.
    pub(super) async fn begin_within(
        self: &Arc<Self>,
        request: MigrationRequest,
    ) -> Result<Arc<Move>> {
        let name = request.workload.as_str();
        if request.options.paths.is_empty() {
            return Err(Answer::refused(format!(
                "{} is this very host: a workload is moved to another one. Disks of a VM alone move \
                 within it: name them with --path OLD=NEW",
                self.config.name
            )));
        }
        check_words(&request.options)?;
        if self.find(name)?.kind != Kind::Vm {
            return Err(Answer::refused(format!(
                "{name} is a container: only disks of VMs move alone, within a host"
            )));
        }
        let claim = self.claim(name, DOING).await?;
        let workload = self.find(name)?;
        if workload.state != State::Running {
            return Err(Answer::Conflict(not_in_state(&workload, "moved", "running")));
        }
        let (mut source, trees) = described(self, &workload, Whither::Within).await?;
        let (source, known) = blocking(move || {
            let known = source.can_mirror();
            (source, known)
        })
        .await?;
        check_keeper(name, known)?;
        let (agent, owned, paths) =
            (Arc::clone(self), workload.clone(), request.options.paths.clone());
        let fits = blocking(move || fitting::fit(&agent, &owned, &trees, &paths)).await?;
        let what = format!("Nothing of {name} can move so");
        let files = fits.map_err(|refusals| Answer::refused_for(&what, refusals))?;
        let id = uuid::Uuid::new_v4().to_string();
        if !request.options.dry_run {
            let intent = Intent::of(&id, &files, request.options.remove_source);
            intent.write(&self.place(&workload))?;
            let begun = self.registry.change(name, |entry| {
                entry.state = State::Migrating;
                entry.moved_to = Some(self.config.name.clone());
                entry.migration = Some(id.clone());
            });
            begun.inspect_err(|_| intent::forget(&self.place(&workload)))?;
        }
        Ok(self.launch_within(id, request, &workload, source, files, claim))
    }

    fn launch_within(
        self: &Arc<Self>,
        id: String,
        request: MigrationRequest,
        workload: &Workload,
        source: Box<dyn SourceWorkload>,
        files: Vec<PlacedTree>,
        claim: Claim,
    ) -> Arc<Move> {
        let to = self.config.name.clone();
        let begun = self.list_move(id.clone(), request.workload, to, workload.files.clone());
        let (moving, place) = (Arc::clone(&begun.listed.moving), self.place(workload));
        let relocation = Relocation {
            migration: id,
            host: self.config.name.clone(),
            kind: workload.kind,
            landing: intent::landing_record(&place),
            place,
            workload: source,
            files,
            options: request.options.clone(),
            progress: begun.progress,
            cancel: moving.cancel.clone(),
        };
        let (listed, told) = (begun.listed, begun.told);
        tokio::spawn(async move {
            let mut report = relocate(relocation).await;
            told.drained().await;
            if !request.options.dry_run {
                listed.agent.settle_within(&listed.moving, &mut report).await;
            }
            if let Err(error) = listed.agent.journal.save_report(&report) {
                tracing::warn!("Cannot keep the report: {}", chain(&error));
            }
            drop(claim);
            listed.end(report);
        });
        moving
    }

    /// Notes where the disks are now; tries for as long as it takes.
    async fn settle_within(self: &Arc<Self>, moving: &Move, report: &mut Report) {
        loop {
            let (agent, name) = (Arc::clone(self), moving.workload.clone());
            let settled = blocking(move || intent::settle(&agent, &name)).await;
            match settled.and_then(|settled| settled) {
                Ok(settled) => return follow(report, settled),
                Err(answer) => tracing::error!(
                    migration = moving.id,
                    workload = moving.workload,
                    "Cannot note where its disks are, and tries again: {answer}"
                ),
            }
            tokio::select! {
                () = tokio::time::sleep(super::settling::NOTE_AGAIN) => {}
                // The next agent finds the intent.
                () = self.stopping().cancelled() => return,
            }
        }
    }
}

/// What was found last is how it ended: whoever reported before may have heard no answer, and the keeper have done what
/// it was asked all the same.
fn follow(report: &mut Report, settled: Settled) {
    match (settled.switched, report.outcome) {
        (Some(true), outcome) if outcome != Outcome::Completed => {
            report.outcome = Outcome::Completed;
            // Where it is gone, its disks moved all the same, and somebody has to say so.
            let reason = report.reason.take();
            report.notes.extend(reason.filter(|_| report.lost));
        }
        (Some(false), Outcome::Completed) => {
            let text = "The keeper answered that the disks had moved, and no record of it is there: they count \
                        as not moved, and what was made for them is removed";
            (report.outcome, report.reason) = (Outcome::Failed, Some(text.to_owned()));
        }
        _ => {}
    }
    report.notes.extend(settled.notes);
}

/// That the keeper of `name` is not too old for that, where `known` is its answer.
fn check_keeper(name: &str, known: std::result::Result<bool, WorkloadError>) -> Result<()> {
    match known {
        Ok(true) => Ok(()),
        Ok(false) => Err(Answer::refused(format!(
            "The keeper of {name} was started by an older decamp, which cannot move disks alone. One of this build \
             comes with `decamp stop {name}` and `decamp start {name}`, or with a move to another host"
        ))),
        Err(error) => {
            Err(Answer::refused(format!("Disks of {name} cannot be moved: {}", chain(&error))))
        }
    }
}

/// That nothing was said which means nothing here.
fn check_words(options: &MoveOptions) -> Result<()> {
    let usual = MoveOptions::default();
    let words = [
        ("--storage", options.storage.is_some() || !options.storage_of.is_empty()),
        ("--mode stop-and-copy", options.mode == Mode::StopAndCopy),
        ("--streams", options.streams != usual.streams),
        ("--compress", options.compress != usual.compress),
        ("--no-network-check", options.no_network_check),
    ];
    match words.iter().find(|(_, said)| *said) {
        None => Ok(()),
        Some((word, _)) => Err(Answer::Request(format!(
            "{word} means nothing where disks move within a host: they are copied while their guest \
             runs, and nothing travels"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use decamp_shared::workload::Storage;

    #[test]
    fn the_report_follows_what_was_found_last() {
        use Outcome::{Cancelled, Completed, Failed};
        for (said, switched, outcome) in [
            (Failed, Some(true), Completed),
            (Cancelled, Some(true), Completed),
            (Completed, Some(true), Completed),
            (Failed, Some(false), Failed),
            (Cancelled, Some(false), Cancelled),
            (Completed, Some(false), Failed),
            (Completed, None, Completed),
            (Failed, None, Failed),
        ] {
            let mut report = crate::agent::moves::tests::report("m");
            report.outcome = said;
            report.reason = (said != Completed).then(|| "No answer".into());
            follow(&mut report, Settled { switched, notes: vec!["It is there".into()] });
            assert_eq!(report.outcome, outcome, "{said:?} {switched:?}");
            assert_eq!(report.reason.is_none(), outcome == Completed, "{:?}", report.reason);
            assert_eq!(report.notes, ["It is there"]);
        }
    }

    #[test]
    fn a_keeper_that_is_too_old_is_said_before_anything_is_touched() {
        check_keeper("web", Ok(true)).expect("fine");
        let gone = WorkloadError::KeeperGone { name: "web".into(), what: "asked".into() };
        for (known, says) in [(Ok(false), "decamp start web"), (Err(gone), "keeper")] {
            let refused = check_keeper("web", known).expect_err("refused");
            assert!(
                matches!(&refused, Answer::Refused { .. }) && refused.to_string().contains(says),
                "{refused}"
            );
        }
    }

    #[test]
    fn words_that_mean_nothing_are_refused_by_name() {
        check_words(&MoveOptions { mode: Mode::PreCopy, ..MoveOptions::default() }).expect("fine");
        for (word, options) in [
            ("--storage", MoveOptions { storage: Some(Storage::Copy), ..MoveOptions::default() }),
            ("--mode", MoveOptions { mode: Mode::StopAndCopy, ..MoveOptions::default() }),
            ("--streams", MoveOptions { streams: 4, ..MoveOptions::default() }),
        ] {
            let refused = check_words(&options).expect_err("refused");
            assert!(
                matches!(&refused, Answer::Request(text) if text.starts_with(word)),
                "{refused}"
            );
        }
    }
}
