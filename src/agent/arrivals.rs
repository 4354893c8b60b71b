//! Moves to this host that were left open: by a restart of the agent, or by a keeper that was lost while
//! it let its workload run. What is decided is decided in `decamp_shared::session::recovery`; here it
//! meets this host's keepers and registry.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use decamp_shared::session::commit::{Keep, Record, Sight};
use decamp_shared::session::error::chain;
use decamp_shared::session::journal::{Role, SessionRow};
use decamp_shared::session::recovery::{recover_arrival, resolve_arrival, settle_files};
use decamp_shared::workload::Place;

use super::Agent;
use super::answer::{Answer, Result};
use super::recovery::{concerned, see, until_settled};
use super::registry::Workload;
use super::supervise::{discard, is_kept};
use super::workloads::blocking;
use crate::messages::{ResolveAnswer, State};

/// Arrivals of which this host is still finding out what became of them, by migration. As long as one
/// is here, nobody is told that nobody knows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recovering(Arc<Mutex<BTreeSet<String>>>);

/// One of them, until this is dropped.
#[derive(Debug)]
pub(crate) struct Recovery {
    migration: String,
    of: Recovering,
}

impl Recovering {
    /// From now on it is being found out.
    pub(crate) fn begin(&self, migration: &str) -> Recovery {
        self.held().insert(migration.to_owned());
        Recovery { migration: migration.to_owned(), of: self.clone() }
    }

    /// Whether it still is.
    pub(crate) fn has(&self, migration: &str) -> bool {
        self.held().contains(migration)
    }

    fn held(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Recovery {
    fn drop(&mut self) {
        self.of.held().remove(&self.migration);
    }
}

/// Settles an arrival as far as this host can alone.
///
/// # Errors
/// When that could not be found out, or not be written down: it has to be tried again.
pub(super) async fn take_up(agent: &Arc<Agent>, row: SessionRow) -> Result<()> {
    let agent = Arc::clone(agent);
    blocking(move || recover(&agent, &row)).await?
}

/// The keeper of an arrival was lost while it let the workload run. When this returns, nothing of it
/// runs here any more, or the journal says that it does, or it is still being found out.
pub(super) fn look_after(agent: &Arc<Agent>, migration: &str) {
    let recovery = agent.recovering.begin(migration);
    let looked = match agent.journal.session(migration, Role::Destination) {
        Ok(Some(row)) => recover(agent, &row),
        Ok(None) => Ok(()),
        Err(error) => Err(error.into()),
    };
    let Err(answer) = looked else { return };
    tracing::error!(migration, "Cannot find out what became of it; trying again: {answer}");
    let (agent, migration) = (Arc::clone(agent), migration.to_owned());
    tokio::runtime::Handle::current().spawn(async move {
        until_settled(&agent, &migration, Role::Destination).await;
        drop(recovery);
    });
}

fn recover(agent: &Agent, row: &SessionRow) -> Result<()> {
    let workload = concerned(agent, row)?;
    let place = workload.as_ref().map(|workload| agent.place(workload));
    if row.record.is_final() {
        settle_files(&agent.journal, row, row.record);
        return finish(agent, row, workload.as_ref(), place.as_ref());
    }
    let sight = place.as_ref().map_or(Ok(Sight::Gone), see)?;
    tracing::info!(
        migration = row.migration,
        record = row.record.word(),
        ?sight,
        "Taking up an arrival that was left open"
    );
    let clear = || take_away(agent, place.as_ref(), row);
    let record = recover_arrival(&agent.journal, row, sight, clear)
        .map_err(|error| Answer::failed(&error))?;
    enter(agent, row, workload.as_ref(), record)
}

/// The journal says how it ended; the registry may not have been told.
fn finish(
    agent: &Agent,
    row: &SessionRow,
    workload: Option<&Workload>,
    place: Option<&Place>,
) -> Result<()> {
    let open = |workload: &&Workload| matches!(workload.state, State::Incoming | State::Unresolved);
    let Some(workload) = workload.filter(open) else { return Ok(()) };
    if row.record == Record::Aborted {
        take_away(agent, place, row);
    }
    enter(agent, row, Some(workload), row.record)
}

/// An operator's word on an arrival that nobody knows the end of.
pub(super) async fn resolve(
    agent: &Arc<Agent>,
    row: SessionRow,
    keep: Keep,
) -> Result<ResolveAnswer> {
    let workload = concerned(agent, &row)?;
    let is_open = workload.as_ref().is_some_and(|one| one.state != State::Unresolved);
    if is_open || agent.recovering.has(&row.migration) {
        return Err(Answer::Conflict(format!(
            "The move of {} is still under way here: try again in a moment",
            row.workload
        )));
    }
    let place = workload.as_ref().map(|workload| agent.place(workload));
    let owner = Arc::clone(agent);
    blocking(move || {
        let sight = place.as_ref().map_or(Ok(Sight::Gone), see)?;
        let clear = || take_away(&owner, place.as_ref(), &row);
        let record = resolve_arrival(&owner.journal, &row, sight, keep, clear)
            .map_err(|error| Answer::failed(&error))?;
        enter(&owner, &row, workload.as_ref(), record)?;
        let text = told(&row, &owner.config.name, record, sight, keep);
        Ok(ResolveAnswer { migration: row.migration.clone(), workload: row.workload.clone(), text })
    })
    .await?
}

/// What was done, whether that is what was asked for, and what is to be done at the other host.
fn told(row: &SessionRow, host: &str, record: Record, sight: Sight, keep: Keep) -> String {
    let (name, peer) = (&row.workload, &row.peer);
    let there =
        |side: &str| format!("Say `decamp resolve {} --keep {side}` at {peer}", row.migration);
    let not_followed = match keep {
        Keep::Source => ", so it was not given up",
        Keep::Destination => "",
    };
    match (record, sight) {
        (Record::Running, Sight::Running | Sight::Stopped | Sight::NeverStarted) => format!(
            "The keeper of {name} was found at {host} after all: it came to run there{not_followed}. {}",
            there("destination")
        ),
        (Record::Running, Sight::Ended) => format!(
            "{name} ran at {host} and ended there by itself{not_followed}. {}",
            there("destination")
        ),
        (Record::Running, Sight::Gone) => format!(
            "{name} belongs to {host} now. Its memory was lost with its keeper: `decamp start {name}` \
             starts it afresh. {} too",
            there("destination")
        ),
        _ if keep == Keep::Destination => format!(
            "{name} never ran at {host}, so it could not be kept there: it is given up. {}",
            there("source")
        ),
        _ => format!("{name} is given up at {host}. {} too", there("source")),
    }
}

/// A copy that never ran goes: its keeper, its leftovers, its entry.
fn take_away(agent: &Agent, place: Option<&Place>, row: &SessionRow) {
    if let Some(place) = place
        && let Err(error) = discard(place)
    {
        tracing::warn!(workload = row.workload, "Its keeper: {}", chain(&error));
    }
    if let Err(answer) = agent.forget_arrival(&row.migration, &row.workload) {
        tracing::error!(workload = row.workload, "Cannot take its entry back: {answer}");
    }
}

/// The registry says what the journal says of an arrival.
fn enter(
    agent: &Agent,
    row: &SessionRow,
    workload: Option<&Workload>,
    record: Record,
) -> Result<()> {
    let Some(workload) = workload else { return Ok(()) };
    match record {
        // Whether it still runs is seen by whoever looks after running workloads.
        Record::Running => {
            agent.registry.change(&row.workload, Workload::becomes_running)?;
        }
        Record::Committed => {
            sweep_unless_kept(agent, workload)?;
            agent.registry.change(&row.workload, |entry| entry.state = State::Unresolved)?;
            tracing::warn!(
                migration = row.migration,
                workload = row.workload,
                "Its keeper was lost while it was let run: nobody knows whether it did"
            );
        }
        _ => {}
    }
    Ok(())
}

/// Takes away what a keeper that is no more left on this host: processes of a container may outlive
/// their keeper, and run.
///
/// # Errors
/// When something may be left.
fn sweep_unless_kept(agent: &Agent, workload: &Workload) -> Result<()> {
    let place = agent.place(workload);
    if is_kept(&place) {
        return Ok(());
    }
    Ok(agent.backends.of(workload.kind)?.sweep(&workload.spec, &place)?)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::super::recovery;
    use super::super::testing::{Bench, MIGRATION, keeper};
    use super::*;
    use crate::messages::Side;

    fn row() -> SessionRow {
        SessionRow {
            migration: "3f2a".into(),
            role: Role::Destination,
            workload: "web".into(),
            uuid: "u-1".into(),
            peer: "alpha".into(),
            peer_address: String::new(),
            token: 1,
            record: Record::Committed,
            boot_id: String::new(),
            updated_ms: 0,
            manifest: Vec::new(),
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_outlived_its_keeper_is_ended_before_anybody_hears_that_nobody_knows() {
        let bench = Bench::new();
        bench.enter(State::Incoming);
        bench.journal(Role::Destination, Record::Committed);
        bench.backend.cannot_sweep.store(true, Ordering::SeqCst);
        let agent = Arc::clone(&bench.agent);
        blocking(move || look_after(&agent, MIGRATION)).await.expect("no panic");
        // Processes of it may still run: peers are told to ask again.
        assert!(bench.agent.recovering.has(MIGRATION));
        assert_eq!(bench.state(), Some(State::Incoming));
        let refused = recovery::resolve(&bench.agent, "web", Side::Source).await;
        assert!(matches!(refused, Err(Answer::Conflict(_))), "{refused:?}");
        bench.backend.cannot_sweep.store(false, Ordering::SeqCst);
        bench.until("another try", |bench| !bench.agent.recovering.has(MIGRATION)).await;
        assert_eq!(bench.state(), Some(State::Unresolved));
        assert!(bench.backend.swept.load(Ordering::SeqCst) >= 2);
        assert_eq!(bench.record(Role::Destination), Some(Record::Committed));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_next_agent_ends_it_too() {
        let bench = Bench::new();
        bench.enter(State::Incoming);
        bench.journal(Role::Destination, Record::Committed);
        recovery::at_start(&bench.agent).await.expect("settled");
        assert_eq!(bench.state(), Some(State::Unresolved));
        assert_eq!(bench.backend.swept.load(Ordering::SeqCst), 1);
        assert!(!bench.agent.recovering.has(MIGRATION));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nobody_is_told_that_nobody_knows_while_a_keeper_is_busy() {
        let bench = Bench::new();
        let web = bench.enter(State::Unresolved);
        bench.journal(Role::Destination, Record::Committed);
        let keeper = keeper(&bench.agent.place(&web));
        let agent = Arc::clone(&bench.agent);
        let starting = tokio::spawn(async move { recovery::at_start(&agent).await });
        bench.until("the start", |bench| bench.agent.recovering.has(MIGRATION)).await;
        let refused = recovery::resolve(&bench.agent, "web", Side::Source).await;
        assert!(matches!(refused, Err(Answer::Conflict(_))), "{refused:?}");
        // It ends, without a word of how.
        drop(keeper);
        starting.await.expect("no panic").expect("settled");
        bench.until("the end", |bench| !bench.agent.recovering.has(MIGRATION)).await;
        assert_eq!(bench.state(), Some(State::Unresolved));
        assert_eq!(bench.backend.swept.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_the_journal_knows_the_registry_is_told() {
        let bench = Bench::new();
        bench.enter(State::Unresolved);
        bench.journal(Role::Destination, Record::Running);
        recovery::at_start(&bench.agent).await.expect("settled");
        assert_eq!(bench.state(), Some(State::Running));
    }

    #[test]
    fn it_is_being_found_out_until_the_last_word() {
        let recovering = Recovering::default();
        assert!(!recovering.has("3f2a"));
        let recovery = recovering.begin("3f2a");
        assert!(recovering.has("3f2a") && !recovering.has("other"));
        drop(recovery);
        assert!(!recovering.has("3f2a"));
    }

    #[test]
    fn what_is_told_is_what_was_seen() {
        let text = |record, sight, keep| told(&row(), "beta", record, sight, keep);
        let lost = text(Record::Running, Sight::Gone, Keep::Destination);
        assert!(lost.contains("memory was lost") && lost.contains("decamp start web"), "{lost}");
        let found = text(Record::Running, Sight::Running, Keep::Source);
        assert!(found.contains("was not given up") && !found.contains("decamp start"), "{found}");
        assert!(found.contains("decamp resolve 3f2a --keep destination` at alpha"), "{found}");
        let kept = text(Record::Running, Sight::Running, Keep::Destination);
        assert!(!kept.contains("not given up") && !kept.contains("memory"), "{kept}");
        let ended = text(Record::Running, Sight::Ended, Keep::Source);
        assert!(ended.contains("ended there by itself, so it was not given up"), "{ended}");
        let never = text(Record::Aborted, Sight::NeverStarted, Keep::Destination);
        assert!(never.contains("could not be kept") && never.contains("--keep source"), "{never}");
        let given_up = text(Record::Aborted, Sight::Gone, Keep::Source);
        assert!(given_up.contains("is given up at beta") && given_up.contains("--keep source"));
    }
}
