//! Finding keepers again after a restart of the agent, and noticing when they end.
//!
//! A keeper is known by its socket: somebody listens there, or it is gone. Asked are only keepers
//! that no session has to itself.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use decamp_shared::keeper::{ExitRecord, KeeperClient, Phase};
use decamp_shared::session::commit::Record;
use decamp_shared::session::journal::{Role, boot_id};
use decamp_shared::workload::Place;

use super::Agent;
use super::answer::{Result, chain};
use super::registry::Workload;
use super::workloads::blocking;
use crate::messages::State;

/// What a claim says while an end is noted.
pub(crate) const NOTING: &str = "ending";
/// How often keepers are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A keeper that wrote how its workload ended is gone soon after.
const GONE_WITHIN: Duration = Duration::from_secs(5);
/// An exit record is a line or two.
const RECORD_CAP: u64 = 64 << 10;

/// Whether a keeper listens at `place`.
pub(crate) fn is_kept(place: &Place) -> bool {
    UnixStream::connect(place.socket()).is_ok()
}

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
            tracing::error!(workload = name, "Cannot find out how it is: {answer}");
        }
    }
    Ok(())
}

async fn adopt_one(agent: &Arc<Agent>, workload: Workload) -> Result<()> {
    match workload.state {
        State::Running => settle_if_ended(agent, workload).await,
        State::Migrating => adopt_mover(agent, workload).await,
        State::Incoming => adopt_arrival(agent, workload).await,
        State::Starting => {
            let place = agent.place(&workload);
            if blocking(move || runs(&place)).await? {
                agent.registry.change(&workload.name, Workload::becomes_running)?;
                Ok(())
            } else {
                let text = "the agent ended while it was being started".to_owned();
                note_end(agent, &workload, ExitRecord { status: 1, text }).await
            }
        }
        State::Stopped | State::Moved | State::Unresolved => Ok(()),
    }
}

/// A move away was under way when the agent ended.
async fn adopt_mover(agent: &Arc<Agent>, workload: Workload) -> Result<()> {
    match record(agent, &workload, Role::Source)? {
        Some(Record::Released) => {
            let host = workload.moved_to.clone().unwrap_or_default();
            agent.registry.change(&workload.name, |entry| entry.becomes_moved(&host))?;
            Ok(())
        }
        Some(Record::Fenced) => Ok(()),
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
        _ => {
            let place = agent.place(&workload);
            let migration = workload.migration.clone().unwrap_or_default();
            let name = workload.name.clone();
            let agent = Arc::clone(agent);
            blocking(move || {
                if let Err(error) = discard(&place) {
                    tracing::warn!(workload = name, "Its keeper: {}", chain(&error));
                }
                agent.forget_arrival(&migration, &name)
            })
            .await?
        }
    }
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
            wait_until_gone(&place);
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
            false => "its keeper died".into(),
        },
    });
    note_end(agent, &workload, exit).await
}

async fn note_end(agent: &Arc<Agent>, workload: &Workload, exit: ExitRecord) -> Result<()> {
    tracing::info!(workload = workload.name, "Ended: {}", exit.text);
    let backend = agent.backends.of(workload.kind)?;
    let (spec, place) = (workload.spec.clone(), agent.place(workload));
    let swept = blocking(move || backend.sweep(&spec, &place)).await?;
    if let Err(error) = swept {
        tracing::warn!(workload = workload.name, "Cannot sweep after it: {}", chain(&error));
    }
    agent.registry.change(&workload.name, |entry| entry.becomes_stopped(exit))?;
    Ok(())
}

fn wait_until_gone(place: &Place) {
    let deadline = Instant::now() + GONE_WITHIN;
    while is_kept(place) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn runs(place: &Place) -> bool {
    let ask = || KeeperClient::connect(place)?.phase();
    matches!(ask(), Ok(Phase::Running))
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
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_keeper_is_known_by_its_socket() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
        assert!(!is_kept(&place));
        let listener = UnixListener::bind(place.socket()).expect("listens");
        assert!(is_kept(&place));
        drop(listener);
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
}
