//! Moves that a restart of the agent, or a silent peer, left open: settled at the start before
//! anybody is served, then by asking the destination for as long as it takes, or by an operator.
//!
//! What is decided is decided in `decamp_shared::session::recovery`; here it meets this host's
//! keepers and registry.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use decamp_shared::keeper::ends::KeeperSource;
use decamp_shared::keeper::{KeeperClient, Phase};
use decamp_shared::session::Fate;
use decamp_shared::session::commit::{Keep, Record, Sight};
use decamp_shared::session::error::chain;
use decamp_shared::session::journal::{Role, SessionRow};
use decamp_shared::session::recovery::{
    OpenDeparture, recover_arrival, resolve_arrival, settle_files,
};
use decamp_shared::workload::{Manifest, Place, SourceWorkload, WorkloadError};

use super::Agent;
use super::answer::{Answer, Result};
use super::registry::Workload;
use super::supervise::{discard, exit_record, is_kept};
use super::workloads::blocking;
use crate::messages::{ResolveAnswer, Side, State};

/// How long the agent's start waits for one session that was left open.
const AT_START: Duration = Duration::from_secs(10);

/// Source sessions that wait for their destination's word, by migration.
#[derive(Default)]
pub(crate) struct OpenMoves(Mutex<BTreeMap<String, Arc<OpenDeparture>>>);

impl OpenMoves {
    fn held(&self) -> MutexGuard<'_, BTreeMap<String, Arc<OpenDeparture>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Settles every session that the journal says is open, as far as this host can alone, and goes on
/// asking for the rest.
///
/// # Errors
/// When the journal cannot be read.
pub(crate) async fn at_start(agent: &Arc<Agent>) -> Result<()> {
    for row in agent.journal.sessions()? {
        let migration = row.migration.clone();
        let agent = Arc::clone(agent);
        let taking_up = tokio::spawn(async move {
            let migration = row.migration.clone();
            let settled = match row.role {
                Role::Source => take_up_departure(&agent, row).await,
                Role::Destination => take_up_arrival(&agent, row).await,
            };
            if let Err(answer) = settled {
                tracing::error!(migration, "Cannot settle what an earlier agent left: {answer}");
            }
        });
        // One that cannot be settled at once does not keep the others from being served.
        if tokio::time::timeout(AT_START, taking_up).await.is_err() {
            tracing::warn!(migration, "Takes long to settle; goes on beside everything else");
        }
    }
    Ok(())
}

/// Goes on asking about a move that ended without an answer while this agent ran.
pub(crate) async fn go_on_asking(agent: &Arc<Agent>, migration: &str) {
    let taken_up = async {
        match agent.journal.session(migration, Role::Source)? {
            Some(row) => take_up_departure(agent, row).await,
            None => Ok(()),
        }
    };
    if let Err(answer) = taken_up.await {
        tracing::error!(migration, "Cannot go on asking what became of it: {answer}");
    }
}

async fn take_up_departure(agent: &Arc<Agent>, row: SessionRow) -> Result<()> {
    let Some(workload) = concerned(agent, &row)? else { return Ok(()) };
    let leftover = row.record == Record::Released && is_kept(&agent.place(&workload));
    if row.record.is_final() && !leftover {
        return Ok(());
    }
    let (sight, source) = look(agent, &workload).await?;
    tracing::info!(
        migration = row.migration,
        workload = workload.name,
        record = row.record.word(),
        ?sight,
        "Taking up a move away that was left open"
    );
    let (open, fate) =
        OpenDeparture::take_up(agent.journal.clone(), agent.dialer.clone(), row, sight, source)
            .await;
    if let Some(fate) = fate {
        return note(agent, fate, &open);
    }
    agent.registry.change(&workload.name, |entry| entry.state = State::Unresolved)?;
    let open = Arc::new(open);
    agent.open_moves.held().insert(open.row().migration.clone(), open.clone());
    let agent = Arc::clone(agent);
    tokio::spawn(async move {
        let Some(fate) = open.settle().await else { return };
        if fate != Fate::Unresolved {
            agent.open_moves.held().remove(&open.row().migration);
        }
        if let Err(answer) = note(&agent, fate, &open) {
            tracing::error!(workload = workload.name, "Cannot note where it runs: {answer}");
        }
    });
    Ok(())
}

async fn take_up_arrival(agent: &Arc<Agent>, row: SessionRow) -> Result<()> {
    if row.record.is_final() {
        let journal = Arc::clone(&agent.journal);
        return blocking(move || settle_files(&journal, &row, row.record)).await;
    }
    let workload = concerned(agent, &row)?;
    let place = workload.as_ref().map(|workload| agent.place(workload));
    let owner = Arc::clone(agent);
    blocking(move || {
        let sight = place.as_ref().map_or(Ok(Sight::Gone), see)?;
        tracing::info!(
            migration = row.migration,
            record = row.record.word(),
            ?sight,
            "Taking up an arrival that was left open"
        );
        let clear = || take_away(&owner, place.as_ref(), &row);
        let record = recover_arrival(&owner.journal, &row, sight, clear)
            .map_err(|error| Answer::failed(&error))?;
        enter(&owner, &row, workload.as_ref(), record)
    })
    .await?
}

/// An operator's word on a move that nobody knows the end of.
///
/// # Errors
/// When there is no such open move on this host.
pub(crate) async fn resolve(agent: &Arc<Agent>, key: &str, keep: Side) -> Result<ResolveAnswer> {
    let keep = match keep {
        Side::Source => Keep::Source,
        Side::Destination => Keep::Destination,
    };
    let row = open_row(agent, key)?;
    match row.role {
        Role::Source => resolve_departure(agent, &row, keep).await,
        Role::Destination => resolve_here(agent, row, keep).await,
    }
}

async fn resolve_departure(
    agent: &Arc<Agent>,
    row: &SessionRow,
    keep: Keep,
) -> Result<ResolveAnswer> {
    let open = agent.open_moves.held().get(&row.migration).cloned().ok_or_else(|| {
        Answer::Conflict(format!(
            "The move of {} is still under way: `decamp cancel {}` calls it off where that is \
             possible",
            row.workload, row.migration
        ))
    })?;
    let fate = open.resolve(keep).await;
    if fate == Fate::Unresolved {
        let open = agent.open_moves.held().remove(&row.migration);
        drop(open);
        go_on_asking(agent, &row.migration).await;
        return Err(Answer::Conflict(format!(
            "{} can be reached but does not say yet what became of {}: try again in a moment",
            row.peer, row.workload
        )));
    }
    agent.open_moves.held().remove(&row.migration);
    note(agent, fate, &open)?;
    let (name, here, there) = (&row.workload, &agent.config.name, &row.peer);
    let text = match (fate, keep) {
        (Fate::Here, Keep::Source) => format!("{name} runs on at {here}, as you decided"),
        (Fate::Here, Keep::Destination) => format!(
            "{there} says that {name} never ran there, so it was not given up: it runs on at {here}"
        ),
        (Fate::Moved, Keep::Destination) => {
            format!("The copy of {name} at {here} was taken away; {there} has it")
        }
        (Fate::Moved, Keep::Source) => format!(
            "{there} says that {name} runs there, so it was not started twice: the copy at {here} \
             was taken away"
        ),
        (Fate::Unresolved, _) => format!("{name} is still unresolved; see the agent's log"),
    };
    Ok(ResolveAnswer { migration: row.migration.clone(), workload: name.clone(), text })
}

async fn resolve_here(agent: &Arc<Agent>, row: SessionRow, keep: Keep) -> Result<ResolveAnswer> {
    let workload = concerned(agent, &row)?;
    if workload.as_ref().is_some_and(|workload| workload.state != State::Unresolved) {
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
        let (name, host) = (&row.workload, &owner.config.name);
        let text = match record {
            Record::Running => format!(
                "{name} belongs to {host} now. Its memory was lost with the restart: `decamp start \
                 {name}` starts it afresh. Say `--keep destination` at {} too",
                row.peer
            ),
            _ => format!(
                "{name} is given up at {host}. Say `decamp resolve {} --keep source` at {} too",
                row.migration, row.peer
            ),
        };
        Ok(ResolveAnswer { migration: row.migration.clone(), workload: name.clone(), text })
    })
    .await?
}

/// The one open session that `key` names: an id, the beginning of one, or a workload.
fn open_row(agent: &Agent, key: &str) -> Result<SessionRow> {
    let mut rows: Vec<_> = agent.journal.sessions()?;
    rows.retain(|row| {
        matches!(row.record, Record::Fenced | Record::Committed)
            && (row.migration.starts_with(key) || row.workload == key)
    });
    match rows.len() {
        0 => Err(Answer::UnknownMigration(key.to_owned(), "that is unresolved on this host")),
        1 => Ok(rows.remove(0)),
        several => Err(Answer::Request(format!(
            "{key} names {several} unresolved moves: give more of the id"
        ))),
    }
}

/// The workload that a session speaks of, if it is still the session's.
fn concerned(agent: &Agent, row: &SessionRow) -> Result<Option<Workload>> {
    let workload = agent.registry.get(&row.workload)?;
    Ok(workload.filter(|workload| {
        workload.uuid == row.uuid && workload.migration.as_deref() == Some(&row.migration)
    }))
}

/// What is to be seen of a workload's keeper, and the keeper itself.
async fn look(
    agent: &Agent,
    workload: &Workload,
) -> Result<(Sight, Option<Box<dyn SourceWorkload>>)> {
    let place = agent.place(workload);
    let name = workload.name.clone();
    blocking(move || {
        let sight = see(&place)?;
        if !matches!(sight, Sight::Running | Sight::Stopped) {
            return Ok((sight, None));
        }
        let no_reader = |_: &mut KeeperClient, _: &[_]| {
            Err(WorkloadError::plain("A recovered workload is not read"))
        };
        let manifest = Manifest { name, ..Manifest::default() };
        let client = KeeperClient::connect(&place)?;
        let source = KeeperSource::new(client, manifest, Box::new(no_reader))?;
        Ok((sight, Some(Box::new(source) as Box<dyn SourceWorkload>)))
    })
    .await?
}

/// What is to be seen of the keeper at `place`; an error when that cannot be found out.
fn see(place: &Place) -> Result<Sight> {
    let phase = KeeperClient::connect(place).and_then(|mut keeper| keeper.phase());
    Ok(match phase {
        Ok(Phase::Running) => Sight::Running,
        Ok(Phase::Paused | Phase::Fenced { .. }) => Sight::Stopped,
        Ok(Phase::Incoming | Phase::Prepared) => Sight::NeverStarted,
        Err(WorkloadError::KeeperGone { .. }) if exit_record(place).is_some() => Sight::Ended,
        Err(WorkloadError::KeeperGone { .. }) => Sight::Gone,
        Err(error) => return Err(error.into()),
    })
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
    if workload.is_none() {
        return Ok(());
    }
    match record {
        // Whether it still runs is seen by whoever looks after running workloads.
        Record::Running => {
            agent.registry.change(&row.workload, Workload::becomes_running)?;
        }
        Record::Committed => {
            agent.registry.change(&row.workload, |entry| entry.state = State::Unresolved)?;
        }
        _ => {}
    }
    Ok(())
}

/// The registry says where a workload that was leaving is.
fn note(agent: &Agent, fate: Fate, open: &OpenDeparture) -> Result<()> {
    let row = open.row();
    let Some(workload) = concerned(agent, row)? else { return Ok(()) };
    let name = &workload.name;
    if !matches!(workload.state, State::Migrating | State::Unresolved) {
        // It was settled otherwise in the meantime.
        return Ok(());
    }
    tracing::info!(migration = row.migration, workload = name, ?fate, "Settled");
    agent.registry.change(name, |workload| match fate {
        // Whether it still runs is seen by whoever looks after running workloads.
        Fate::Here => {
            workload.state = State::Running;
            workload.moved_to = None;
        }
        Fate::Moved => workload.becomes_moved(&row.peer),
        Fate::Unresolved => workload.state = State::Unresolved,
    })?;
    Ok(())
}
