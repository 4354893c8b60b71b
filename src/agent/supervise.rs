//! Finding keepers again after a restart of the agent, and noticing when they end.
//!
//! A keeper is known by its socket: somebody listens there, or it is gone. Asked are only keepers
//! that no session has to itself.

use std::fs;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use decamp_shared::keeper::{ExitRecord, KeeperClient, Phase};
pub(crate) use decamp_shared::keeper::{is_kept, listens};
use decamp_shared::session::commit::{Record, Sight};
use decamp_shared::session::journal::{Role, boot_id};
use decamp_shared::workload::Place;

use super::Agent;
use super::answer::{Result, chain};
use super::moves::within;
use super::recovery::see;
use super::registry::Workload;
use super::restores::{keep_files, landing_record};
use super::workloads::blocking;
use crate::backend::is_adopted;
use crate::messages::State;

/// What a claim says while an end is noted.
pub(crate) const NOTING: &str = "ending";
/// How often keepers are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A keeper that wrote how its workload ended, or was told to end, is gone soon after.
const GONE_WITHIN: Duration = Duration::from_secs(5);
/// An exit record is a line or two.
const RECORD_CAP: u64 = 64 << 10;

/// How the workload at `place` ended by itself, if it did.
pub(crate) fn exit_record(place: &Place) -> Option<ExitRecord> {
    let mut text = String::new();
    fs::File::open(place.exit_record()).ok()?.take(RECORD_CAP).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// Makes the registry agree with what is there when the agent starts. Sessions whose end is still
/// open are the business of [`super::recovery`], before and after this.
///
/// # Errors
/// When registry or journal cannot be read.
pub(crate) async fn adopt(agent: &Arc<Agent>) -> Result<()> {
    for workload in agent.registry.list()? {
        let name = workload.name.clone();
        if let Err(answer) = adopt_one(agent, workload).await {
            tracing::error!(
                workload = name,
                "Cannot find out how it is: {answer}. It is left as it is until the agent starts again"
            );
        }
    }
    Ok(())
}

async fn adopt_one(agent: &Arc<Agent>, workload: Workload) -> Result<()> {
    within::intent::take_up(agent, &workload).await?;
    if within::intent::is_open(&agent.place(&workload)) {
        // Whoever settles it says how it is; until then it is nobody's.
        return Ok(());
    }
    let workload = agent.find(&workload.name)?;
    match workload.state {
        State::Running => {
            super::fenced::take_up(agent, &workload.name).await?;
            settle_if_ended(agent, workload).await
        }
        State::Migrating => adopt_mover(agent, workload).await,
        State::Incoming => adopt_arrival(agent, workload).await,
        State::Starting => adopt_starter(agent, workload).await,
        State::Moved => {
            agent.sweep_moved(&workload).await;
            Ok(())
        }
        State::Stopped => super::fenced::take_up(agent, &workload.name).await,
        State::Unresolved => Ok(()),
    }
}

/// It was being started, or what came out of a file was being let run, when the agent ended.
async fn adopt_starter(agent: &Arc<Agent>, workload: Workload) -> Result<()> {
    let place = agent.place(&workload);
    let asked = place.clone();
    let sight = blocking(move || see(&asked)).await??;
    if sight == Sight::NeverStarted && landing_record(&place).exists() {
        let change = |entry: &mut Workload| entry.state = State::Incoming;
        let workload = agent.registry.change(&workload.name, change)?;
        return give_up_arrival(agent, workload).await;
    }
    // It may have run: what a restore put on the disk is its own now.
    keep_files(&place);
    if matches!(sight, Sight::Running | Sight::Stopped) {
        agent.registry.change(&workload.name, Workload::becomes_running)?;
        return Ok(());
    }
    let exit = exit_record(&place).unwrap_or_else(|| ExitRecord {
        status: 1,
        text: "the agent ended while it was being started".to_owned(),
    });
    note_end(agent, &workload, exit).await
}

/// A move away was under way when the agent ended.
async fn adopt_mover(agent: &Arc<Agent>, workload: Workload) -> Result<()> {
    match record(agent, &workload, Role::Source)? {
        Some(Record::Released) => {
            let host = workload.moved_to.clone().unwrap_or_default();
            let entry =
                agent.registry.change(&workload.name, |entry| entry.becomes_moved(&host))?;
            agent.sweep_moved(&entry).await;
            Ok(())
        }
        // It is still being taken up, and whoever does so says how it ends. Until then it is nobody's.
        Some(record) if !record.is_final() => Ok(()),
        _ => {
            let entry = agent.registry.change(&workload.name, Workload::becomes_running)?;
            settle_if_ended(agent, entry).await
        }
    }
}

/// A move to this host was under way when the agent ended.
async fn adopt_arrival(agent: &Arc<Agent>, workload: Workload) -> Result<()> {
    match record(agent, &workload, Role::Destination)? {
        Some(Record::Running) => {
            let entry = agent.registry.change(&workload.name, Workload::becomes_running)?;
            settle_if_ended(agent, entry).await
        }
        // Whether it runs is for the recovery to say.
        Some(Record::Building | Record::Committed) => Ok(()),
        Some(_) => give_up_arrival(agent, workload).await,
        // No session: it was being restored from a file, and nobody else has a say.
        None => {
            let place = agent.place(&workload);
            let asked = place.clone();
            match blocking(move || see(&asked)).await?? {
                Sight::NeverStarted | Sight::Gone => give_up_arrival(agent, workload).await,
                Sight::Running | Sight::Stopped | Sight::Ended => {
                    keep_files(&place);
                    let entry = agent.registry.change(&workload.name, Workload::becomes_running)?;
                    settle_if_ended(agent, entry).await
                }
            }
        }
    }
}

/// What never ran here goes.
async fn give_up_arrival(agent: &Arc<Agent>, workload: Workload) -> Result<()> {
    let agent = Arc::clone(agent);
    blocking(move || {
        if let Err(error) = discard(&agent.place(&workload)) {
            tracing::warn!(workload = workload.name, "Its keeper: {}", chain(&error));
        }
        agent.forget_arrival(&workload.migration.unwrap_or_default(), &workload.name)
    })
    .await?
}

fn record(agent: &Agent, workload: &Workload, role: Role) -> Result<Option<Record>> {
    let Some(migration) = &workload.migration else { return Ok(None) };
    Ok(agent.journal.session(migration, role)?.map(|row| row.record))
}

/// Looks at the keepers again and again, until the task is dropped.
pub(crate) async fn watch(agent: Arc<Agent>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let workloads = agent.registry.list().unwrap_or_default();
        for workload in workloads.into_iter().filter(|one| one.state == State::Running) {
            let name = workload.name.clone();
            // Whoever has it notes what becomes of it, and may have its keeper to itself.
            if agent.claims.is_taken(&name) {
                continue;
            }
            let place = agent.place(&workload);
            // Claimed only when there is something to note, so as not to be in anybody's way.
            let lives = blocking(move || exit_record(&place).is_none() && is_kept(&place)).await;
            if lives.unwrap_or(true) {
                continue;
            }
            let Ok(_claim) = agent.claims.take(&name, NOTING) else { continue };
            // It may have changed hands since the list was made.
            let same = agent.registry.get(&name).ok().flatten().as_ref() == Some(&workload);
            if same && let Err(answer) = settle_if_ended(&agent, workload).await {
                tracing::error!(workload = name, "Cannot note that it ended: {answer}");
            }
        }
    }
}

/// Writes down that a workload ended, if it did.
async fn settle_if_ended(agent: &Arc<Agent>, workload: Workload) -> Result<()> {
    let place = agent.place(&workload);
    let ended = blocking(move || match exit_record(&place) {
        Some(exit) => {
            is_gone(&place);
            Some(Some(exit))
        }
        // A keeper that writes its record as we look: asked once more.
        None if !is_kept(&place) => Some(exit_record(&place)),
        None => None,
    })
    .await?;
    let Some(exit) = ended else { return Ok(()) };
    let rebooted = workload.boot_id != boot_id();
    let exit = exit.unwrap_or_else(|| ExitRecord {
        status: 1,
        text: match rebooted {
            true => "this host was restarted".into(),
            false if is_adopted(&workload.spec) => {
                "its keeper died: it is no longer in the charge of decamp".into()
            }
            false => "its keeper died".into(),
        },
    });
    note_end(agent, &workload, exit).await
}

async fn note_end(agent: &Arc<Agent>, workload: &Workload, exit: ExitRecord) -> Result<()> {
    let (agent, workload) = (Arc::clone(agent), workload.clone());
    blocking(move || end_noted(&agent, &workload, exit)).await?
}

/// Sweeps after a workload that does not run any more, and writes down that it ended. Blocks.
///
/// # Errors
/// When it cannot be written down.
pub(super) fn end_noted(agent: &Agent, workload: &Workload, exit: ExitRecord) -> Result<()> {
    tracing::info!(workload = workload.name, "Ended: {}", exit.text);
    let backend = agent.backends.of(workload.kind)?;
    if let Err(error) = backend.sweep(&workload.spec, &agent.place(workload)) {
        tracing::warn!(workload = workload.name, "Cannot sweep after it: {}", chain(&error));
    }
    agent.registry.change(&workload.name, |entry| entry.becomes_stopped(exit))?;
    Ok(())
}

/// Whether no keeper listens at `place`. One that is on its way out is waited for.
pub(crate) fn is_gone(place: &Place) -> bool {
    let deadline = Instant::now() + GONE_WITHIN;
    while is_kept(place) {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Ends a keeper whose workload never ran here; it does not matter whether there is one.
pub(crate) fn discard(place: &Place) -> decamp_shared::workload::Result<()> {
    if !is_kept(place) {
        return Ok(());
    }
    let mut keeper = KeeperClient::connect(place)?;
    match keeper.phase()? {
        Phase::Incoming | Phase::Prepared => keeper.discard(),
        Phase::Running | Phase::Paused | Phase::Fenced { .. } => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, deaf, keeper, landed};
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_keeper_is_known_by_its_socket() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
        assert!(!is_kept(&place));
        let listener = UnixListener::bind(place.socket()).expect("listens");
        assert!(is_kept(&place));
        let ending = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(listener);
        });
        assert!(is_gone(&place), "one that is on its way out is waited for");
        ending.join().expect("ends");
        assert!(place.socket().exists() && !is_kept(&place), "a socket that nobody serves");
    }

    #[test]
    fn exit_records_are_read_if_they_make_sense() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
        assert_eq!(exit_record(&place), None);
        std::fs::write(place.exit_record(), "{\"status\":").expect("written");
        assert_eq!(exit_record(&place), None);
        let exit = ExitRecord { status: 3, text: "exited with 3".into() };
        let text = serde_json::to_vec(&exit).expect("JSON");
        std::fs::write(place.exit_record(), text).expect("written");
        assert_eq!(exit_record(&place), Some(exit));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_never_ran_goes_with_its_files() {
        let bench = Bench::new();
        let web = bench.enter(State::Incoming);
        let tree = landed(&bench.agent.place(&web));
        adopt(&bench.agent).await.expect("adopts");
        assert_eq!(bench.state(), None);
        assert!(!tree.exists());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_may_run_is_not_touched() {
        for state in [State::Incoming, State::Starting] {
            let bench = Bench::new();
            let web = bench.enter(state);
            let place = bench.agent.place(&web);
            let tree = landed(&place);
            let deaf = deaf(&place);
            adopt(&bench.agent).await.expect("adopts");
            deaf.join().expect("ends");
            assert_eq!(bench.state(), Some(state));
            assert!(tree.exists() && landing_record(&place).exists());
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_move_that_is_still_taken_up_keeps_its_entry() {
        for (record, state) in [
            (Some(Record::Begun), State::Migrating),
            (Some(Record::Fenced), State::Migrating),
            (Some(Record::RolledBack), State::Running),
            (None, State::Running),
        ] {
            let bench = Bench::new();
            let web = bench.enter(State::Migrating);
            let _keeper = keeper(&bench.agent.place(&web));
            if let Some(record) = record {
                bench.journal(Role::Source, record);
            }
            adopt(&bench.agent).await.expect("adopts");
            assert_eq!(bench.state(), Some(state), "{record:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_may_have_run_keeps_its_files() {
        let ran = Some(r#"{"status":0,"text":"powered off"}"#);
        for (state, record) in
            [(State::Starting, None), (State::Starting, ran), (State::Incoming, ran)]
        {
            let bench = Bench::new();
            let web = bench.enter(state);
            let place = bench.agent.place(&web);
            let tree = landed(&place);
            if let Some(record) = record {
                std::fs::write(place.exit_record(), record).expect("written");
            }
            adopt(&bench.agent).await.expect("adopts");
            let web = bench.agent.find("web").expect("an entry");
            assert_eq!(web.state, State::Stopped);
            assert_eq!(web.exit.is_some_and(|exit| exit.status == 0), record.is_some());
            assert!(tree.exists() && !landing_record(&place).exists());
        }
    }
}
