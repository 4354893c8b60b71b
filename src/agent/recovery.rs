//! Moves that a restart of the agent, a lost keeper or a silent peer left open: settled at the start
//! before anybody is served, then by trying for as long as it takes, or by an operator.
//!
//! Those that leave are in [`super::departures`], those that arrive in [`super::arrivals`].

use std::sync::Arc;
use std::time::Duration;

use decamp_shared::keeper::{KeeperClient, Phase};
use decamp_shared::session::commit::{Keep, Record, Sight};
use decamp_shared::session::journal::{Role, SessionRow};
use decamp_shared::workload::{Place, WorkloadError};

use super::Agent;
use super::answer::{Answer, Result};
use super::moves::begins_so;
use super::registry::Workload;
use super::supervise::{exit_record, is_kept};
use super::{arrivals, departures};
use crate::messages::{ResolveAnswer, Side};

/// How long the agent's start, or a report, waits for one session that was left open.
const AT_START: Duration = Duration::from_secs(10);
/// Pauses between two tries to settle what cannot be settled, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Settles every session that the journal says is open, as far as this host can alone, and goes on
/// asking for the rest.
///
/// # Errors
/// When the journal cannot be read.
pub(crate) async fn at_start(agent: &Arc<Agent>) -> Result<()> {
    for row in agent.journal.sessions()? {
        // Until it is settled no peer is told that nobody knows.
        let is_arriving = row.role == Role::Destination && !row.record.is_final();
        let recovery = is_arriving.then(|| agent.recovering.begin(&row.migration));
        let (owner, migration) = (Arc::clone(agent), row.migration.clone());
        let settling = tokio::spawn(async move {
            until_settled(&owner, &migration, row.role).await;
            drop(recovery);
        });
        // One that cannot be settled at once does not keep the others from being served.
        if tokio::time::timeout(AT_START, settling).await.is_err() {
            let migration = row.migration;
            tracing::warn!(migration, "Takes long to settle; goes on beside everything else");
        }
    }
    Ok(())
}

/// Goes on asking about a move that ended without an answer while this agent ran. Returns when an
/// operator may speak.
pub(crate) async fn go_on_asking(agent: &Arc<Agent>, migration: &str) {
    let (agent, id) = (Arc::clone(agent), migration.to_owned());
    let taking_up = tokio::spawn(async move { until_settled(&agent, &id, Role::Source).await });
    if tokio::time::timeout(AT_START, taking_up).await.is_err() {
        tracing::warn!(migration, "Cannot go on asking what became of it yet; trying again");
    }
}

/// Takes a session up, again and again until that succeeds.
pub(super) async fn until_settled(agent: &Arc<Agent>, migration: &str, role: Role) {
    let mut pause = PAUSES.0;
    loop {
        let taken_up = match role {
            Role::Source => departures::take_up(agent, migration).await,
            Role::Destination => match agent.journal.session(migration, role) {
                Ok(Some(row)) => arrivals::take_up(agent, row).await,
                Ok(None) => Ok(()),
                Err(error) => Err(error.into()),
            },
        };
        let Err(answer) = taken_up else { return };
        tracing::error!(migration, "Cannot settle what was left open; trying again: {answer}");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
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
        Role::Source => departures::resolve(agent, &row, keep).await,
        Role::Destination => arrivals::resolve(agent, row, keep).await,
    }
}

/// The one open session that `key` names: an id or a workload; else one whose id begins so.
fn open_row(agent: &Agent, key: &str) -> Result<SessionRow> {
    let mut rows: Vec<_> = agent.journal.sessions()?;
    rows.retain(|row| matches!(row.record, Record::Fenced | Record::Committed));
    let is_it = |row: &SessionRow| row.migration == key || row.workload == key;
    match rows.iter().any(is_it) {
        true => rows.retain(is_it),
        false => rows.retain(|row| begins_so(&row.migration, key)),
    }
    match rows.len() {
        0 => Err(Answer::UnknownMigration(key.to_owned(), "that is unresolved on this host")),
        1 => Ok(rows.remove(0)),
        several => Err(Answer::Request(format!(
            "{key} names {several} unresolved moves: give more of the id"
        ))),
    }
}

/// The workload that a session speaks of, if it is still the session's.
pub(super) fn concerned(agent: &Agent, row: &SessionRow) -> Result<Option<Workload>> {
    let workload = agent.registry.get(&row.workload)?;
    Ok(workload.filter(|workload| {
        workload.uuid == row.uuid && workload.migration.as_deref() == Some(&row.migration)
    }))
}

/// What is to be seen of the keeper at `place`; an error when that cannot be found out. One that
/// listens and does not answer is not gone: it may be busy, or serve somebody else.
pub(super) fn see(place: &Place) -> Result<Sight> {
    Ok(meet(place)?.0)
}

/// As [`see`], with the keeper that said so, and how it is: whoever acts on that asks for it over this
/// very connection, between whose questions nobody else is served.
pub(super) fn meet(place: &Place) -> Result<(Sight, Option<(KeeperClient, Phase)>)> {
    let met = KeeperClient::connect(place).and_then(|mut keeper| {
        let phase = keeper.phase()?;
        Ok((keeper, phase))
    });
    let (keeper, phase) = match met {
        Ok(met) => met,
        Err(WorkloadError::KeeperGone { .. }) if exit_record(place).is_some() => {
            return Ok((Sight::Ended, None));
        }
        Err(WorkloadError::KeeperGone { .. }) if !is_kept(place) => return Ok((Sight::Gone, None)),
        Err(error) => return Err(error.into()),
    };
    let sight = match phase {
        Phase::Running => Sight::Running,
        Phase::Paused | Phase::Fenced { .. } => Sight::Stopped,
        Phase::Incoming | Phase::Prepared => Sight::NeverStarted,
    };
    Ok((sight, Some((keeper, phase))))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, MIGRATION, UUID};
    use super::*;
    use decamp_shared::keeper::ExitRecord;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_workload_is_not_taken_for_the_beginning_of_an_id() {
        let bench = Bench::new();
        bench.journal(Role::Source, Record::Fenced);
        let named = &MIGRATION[..8];
        let other = SessionRow {
            migration: "another".to_owned(),
            workload: named.to_owned(),
            uuid: format!("{UUID}-2"),
            ..bench.agent.journal.session(MIGRATION, Role::Source).expect("reads").expect("a row")
        };
        let found = |key: &str| open_row(&bench.agent, key).map(|row| row.migration);
        assert_eq!(found(named), Ok(MIGRATION.to_owned()));
        assert_eq!(found("web"), Ok(MIGRATION.to_owned()));
        assert!(found(&MIGRATION[..5]).is_err(), "too little");
        bench.agent.journal.begin(&other).expect("written");
        assert_eq!(found(named), Ok("another".to_owned()));
    }

    #[test]
    fn a_keeper_that_does_not_answer_is_not_gone() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
        assert_eq!(see(&place), Ok(Sight::Gone));
        let listener = UnixListener::bind(place.socket()).expect("listens");
        let deaf = std::thread::spawn(move || {
            // The question, and the look whether anybody is there.
            for _ in 0..2 {
                drop(listener.accept().expect("accepts"));
            }
        });
        assert!(see(&place).is_err());
        deaf.join().expect("ends");
        assert_eq!(see(&place), Ok(Sight::Gone), "a socket that nobody serves");
        let exit = serde_json::to_vec(&ExitRecord { status: 0, text: "powered off".into() });
        std::fs::write(place.exit_record(), exit.expect("JSON")).expect("written");
        assert_eq!(see(&place), Ok(Sight::Ended));
    }
}
