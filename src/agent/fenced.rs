//! Workloads that a checkpoint left standing still: let run again, or taken away for good, whatever it takes.
//! Which of the two, their entry says: it is stopped as soon as the file is all that there is of one.

use std::sync::Arc;
use std::time::Duration;

use decamp_shared::keeper::{KeeperClient, Phase};
use decamp_shared::session::commit::Record;
use decamp_shared::session::journal::Role;
use decamp_shared::workload::WorkloadError;
use tokio::task::JoinHandle;

use super::Agent;
use super::answer::{Result, chain};
use super::claims::Claim;
use super::supervise::{is_kept, listens};
use super::workloads::blocking;
use crate::messages::State;

/// What a claim says meanwhile.
pub(super) const DOING: &str = "being let run again, or taken away, after a checkpoint";
/// How long the agent's start waits for one of them.
const AT_START: Duration = Duration::from_secs(10);
/// How long a keeper may take to release or resume.
const ANSWER_WITHIN: Duration = Duration::from_secs(300);
/// Pauses between two tries, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Finishes what an earlier agent left of a checkpoint, if it left anything; what takes long goes on beside
/// everything else.
pub(super) async fn take_up(agent: &Arc<Agent>, name: &str) -> Result<()> {
    let claim = agent.claim(name, DOING).await?;
    let settling = until_settled(agent, name, claim);
    if tokio::time::timeout(AT_START, settling).await.is_err() {
        tracing::warn!(workload = name, "Its keeper does not say how it is; goes on asking");
    }
    Ok(())
}

/// Tries for as long as it takes, and keeps everybody else off meanwhile.
pub(super) fn until_settled(agent: &Arc<Agent>, name: &str, claim: Claim) -> JoinHandle<()> {
    let (agent, name) = (Arc::clone(agent), name.to_owned());
    tokio::spawn(async move {
        let _claim = claim;
        let mut pause = PAUSES.0;
        loop {
            let (asked, of) = (Arc::clone(&agent), name.clone());
            let settled = blocking(move || settle(&asked, &of, ANSWER_WITHIN)).await;
            let Err(answer) = settled.and_then(|settled| settled) else { return };
            tracing::error!(
                workload = name,
                "A checkpoint left it standing; trying again: {answer}"
            );
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    })
}

/// Lets the workload run that a checkpoint left standing, or takes it away if its entry says that it is
/// only in its file. Nothing is done to one that no checkpoint left so. Its claim must be held. Blocks.
///
/// # Errors
/// When its keeper does not answer within `within`, or cannot do it.
pub(super) fn settle(agent: &Agent, name: &str, within: Duration) -> Result<()> {
    let Some(workload) = agent.registry.get(name)? else { return Ok(()) };
    let place = agent.place(&workload);
    let sweep =
        || -> Result<()> { Ok(agent.backends.of(workload.kind)?.sweep(&workload.spec, &place)?) };
    let met = KeeperClient::connect_within(&place, within).and_then(|mut keeper| {
        let phase = keeper.phase()?;
        Ok((keeper, phase))
    });
    let (mut keeper, phase) = match met {
        Ok(met) => met,
        Err(WorkloadError::KeeperGone { .. }) if !listens(&place) => {
            // One that ended in order took its socket away; one that died took nothing away. One that lives, and that
            // nobody can ask any more, is ended where its workload is only in a file, and otherwise left to who stops it.
            let is_left = || place.socket().exists() || is_kept(&place);
            if workload.state == State::Stopped && is_left() {
                sweep()?;
                let _ = std::fs::remove_file(place.socket());
            }
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    if let Phase::Fenced { .. } = phase
        && let Some(migration) = open_move(agent, workload.migration.as_deref())?
    {
        tracing::error!(workload = name, migration, "Is fenced for a move: left as it is");
        return Ok(());
    }
    match (workload.state, phase) {
        // Nobody was told that the file is complete, or that it would not come to be.
        (State::Running, Phase::Paused | Phase::Fenced { .. }) => {
            keeper.resume(token_of(phase))?;
            tracing::warn!(workload = name, "Was being checkpointed; it runs on");
        }
        (State::Stopped, Phase::Fenced { token }) => {
            match keeper.release(token) {
                Err(WorkloadError::KeeperGone { .. }) if !listens(&place) => {}
                released => released?,
            }
            sweep()?;
            tracing::info!(workload = name, "Was checkpointed; what was left of it is taken away");
        }
        _ => {}
    }
    Ok(())
}

/// What it was fenced with, if it was.
fn token_of(phase: Phase) -> u64 {
    match phase {
        Phase::Fenced { token } => token,
        _ => 0,
    }
}

/// The workload's last move, if it is one away that nobody knows the end of. Its entry would say so; but what
/// is at stake is that nothing runs twice.
fn open_move<'a>(agent: &Agent, migration: Option<&'a str>) -> Result<Option<&'a str>> {
    let Some(migration) = migration else { return Ok(None) };
    let row = agent.journal.session(migration, Role::Source)?;
    Ok(row.is_some_and(|row| row.record == Record::Fenced).then_some(migration))
}

/// What `name` is like for whoever waits for a failed checkpoint, and what is done about it.
pub(super) fn told(agent: &Agent, name: &str, stuck: &str) -> String {
    const SOON: Duration = Duration::from_secs(3);
    let Ok(workload) = agent.find(name) else { return format!("{name} is gone") };
    let place = agent.place(&workload);
    let phase = KeeperClient::connect_within(&place, SOON).and_then(|mut keeper| keeper.phase());
    match phase {
        Ok(Phase::Running) => format!("{name} runs on"),
        Ok(Phase::Paused) => format!(
            "{name} could not be resumed ({stuck}) and stands still: that is tried again, and its keeper \
             resumes it by itself when it hears nothing for a while"
        ),
        Ok(Phase::Fenced { .. }) => format!(
            "{name} could not be resumed ({stuck}) and stands still: the agent tries again until it runs, \
             and so does the next one"
        ),
        Err(WorkloadError::KeeperGone { .. }) if !is_kept(&place) => {
            format!("{name} ended meanwhile: see `decamp inspect {name}`")
        }
        Ok(Phase::Incoming | Phase::Prepared) | Err(_) => {
            if let Err(error) = &phase {
                tracing::warn!(workload = name, "Does not say how it is: {}", chain(error));
            }
            format!(
                "{name} could not be resumed ({stuck}), and its keeper does not say how it is: the agent \
                 goes on trying to let it run. See `decamp logs {name}`"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::super::supervise;
    use super::super::testing::{Bench, fenced};
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_not_given_up_runs_on() {
        let bench = Bench::new();
        let web = bench.enter(State::Running);
        let keeper = fenced(&bench.agent.place(&web), 7);
        // It takes more than one try.
        keeper.refuses.store(2, Ordering::SeqCst);
        supervise::adopt(&bench.agent).await.expect("adopts");
        assert_eq!(keeper.said(), ["resume", "resume", "resume"]);
        assert_eq!(bench.state(), Some(State::Running));
        assert!(!bench.agent.claims.is_taken("web"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_only_in_its_file_is_taken_away_and_never_runs() {
        let bench = Bench::new();
        let web = bench.enter(State::Stopped);
        let keeper = fenced(&bench.agent.place(&web), 7);
        // As one that is half gone.
        keeper.refuses.store(1, Ordering::SeqCst);
        supervise::adopt(&bench.agent).await.expect("adopts");
        assert_eq!(keeper.said(), ["release", "release"]);
        assert_eq!(bench.backend.swept.load(Ordering::SeqCst), 1);
        assert_eq!(bench.state(), Some(State::Stopped));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_move_fenced_is_left_alone() {
        for state in [State::Running, State::Stopped] {
            let bench = Bench::new();
            let web = bench.enter(state);
            bench.journal(Role::Source, Record::Fenced);
            let keeper = fenced(&bench.agent.place(&web), 7);
            supervise::adopt(&bench.agent).await.expect("adopts");
            assert!(keeper.said().is_empty());
            assert_eq!(bench.state(), Some(state));
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_removes_it_takes_it_away_too() {
        let bench = Bench::new();
        let web = bench.enter(State::Stopped);
        let keeper = fenced(&bench.agent.place(&web), 7);
        bench.agent.remove("web", true).await.expect("removed");
        assert_eq!(keeper.said(), ["release"]);
        assert_eq!(bench.state(), None);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_told_is_how_it_is() {
        let bench = Bench::new();
        let web = bench.enter(State::Running);
        let keeper = fenced(&bench.agent.place(&web), 7);
        let agent = Arc::clone(&bench.agent);
        let say = move || told(&agent, "web", "no room");
        assert!(say().contains("tries again until it runs"), "{}", say());
        let again = Arc::clone(&bench.agent);
        blocking(move || settle(&again, "web", ANSWER_WITHIN))
            .await
            .expect("no panic")
            .expect("runs");
        assert_eq!(say(), "web runs on");
        drop(keeper);
        assert!(say().contains("ended meanwhile"), "{}", say());
    }
}
