//! Moves away from this host that a restart of the agent, or a silent destination, left open: who holds
//! their keepers and asks the destination, and what an operator may say of them. What is decided is
//! decided in `decamp_shared::session::recovery`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use decamp_shared::keeper::ends::KeeperSource;
use decamp_shared::keeper::{KeeperClient, Phase};
use decamp_shared::session::Fate;
use decamp_shared::session::commit::{Keep, Record, Sight};
use decamp_shared::session::journal::{Role, SessionRow};
use decamp_shared::session::recovery::{OpenDeparture, Resolution};
use decamp_shared::workload::{Manifest, SourceWorkload, WorkloadError};

use super::Agent;
use super::answer::{Answer, Result, chain};
use super::recovery::{concerned, meet};
use super::registry::Workload;
use super::supervise::listens;
use super::workloads::blocking;
use crate::messages::{ResolveAnswer, State};

/// What a claim says while a session that was left open is looked into.
const LOOKING_INTO: &str = "being looked into after a move";
/// Between two tries to note where a workload is.
const NOTE_AGAIN: Duration = Duration::from_secs(5);

/// Source sessions that wait for their destination's word, by migration.
#[derive(Debug, Default)]
pub(crate) struct OpenMoves {
    slots: Mutex<BTreeMap<String, Slot>>,
    /// Held by whoever notes how one ended, so that a second one finds it noted.
    noting: tokio::sync::Mutex<()>,
}

enum Slot {
    /// Somebody is connecting to its keeper, which serves one at a time.
    BeingTakenUp,
    /// It is asked about.
    Open(Arc<OpenDeparture>),
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Slot::BeingTakenUp => "BeingTakenUp",
            Slot::Open(_) => "Open",
        })
    }
}

/// The right to take a session up; given back when dropped.
struct TakingUp<'a> {
    of: &'a OpenMoves,
    migration: String,
}

impl OpenMoves {
    fn held(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing when it is taken up already, or being so.
    fn begin(&self, migration: &str) -> Option<TakingUp<'_>> {
        let mut held = self.held();
        if held.contains_key(migration) {
            return None;
        }
        held.insert(migration.to_owned(), Slot::BeingTakenUp);
        Some(TakingUp { of: self, migration: migration.to_owned() })
    }

    /// What is known of a session; nothing when nobody has taken it up.
    fn find(&self, migration: &str) -> Option<Result<Arc<OpenDeparture>>> {
        Some(match self.held().get(migration)? {
            Slot::Open(open) => Ok(Arc::clone(open)),
            Slot::BeingTakenUp => Err(Answer::Conflict(format!(
                "Migration {migration} is just being looked into: try again in a moment"
            ))),
        })
    }

    fn forget(&self, migration: &str) {
        self.held().remove(migration);
    }
}

impl TakingUp<'_> {
    /// It is asked about from now on.
    fn done(self, open: &Arc<OpenDeparture>) {
        self.of.held().insert(self.migration.clone(), Slot::Open(Arc::clone(open)));
    }
}

impl Drop for TakingUp<'_> {
    fn drop(&mut self) {
        let mut held = self.of.held();
        if matches!(held.get(&self.migration), Some(Slot::BeingTakenUp)) {
            held.remove(&self.migration);
        }
    }
}

/// Takes up a session that was left open: does what can be done alone, and goes on asking for the
/// rest. Harmless when somebody did so already.
///
/// # Errors
/// When its keeper does not say how it is, or what became of it cannot be written down: it has to be
/// tried again.
pub(super) async fn take_up(agent: &Arc<Agent>, migration: &str) -> Result<()> {
    let Some(taking_up) = agent.open_moves.begin(migration) else { return Ok(()) };
    // Read when nobody else can change it any more.
    let Some(row) = agent.journal.session(migration, Role::Source)? else { return Ok(()) };
    if concerned(agent, &row)?.is_none() {
        return Ok(());
    }
    // Nobody begins to move or to stop it while its keeper may be told to let it run.
    let _claim = agent.claim(&row.workload, LOOKING_INTO).await?;
    let Some(workload) = concerned(agent, &row)? else { return Ok(()) };
    let leftover = row.record == Record::Released && listens(&agent.place(&workload));
    if row.record.is_final() && !leftover {
        return match workload.state {
            // The journal knows, and the registry was not told.
            State::Unresolved => note(agent, fate_of(row.record), &row).await,
            _ => Ok(()),
        };
    }
    let (sight, source) = look(agent, &workload, row.token).await?;
    tracing::info!(
        migration,
        workload = workload.name,
        record = row.record.word(),
        ?sight,
        "Taking up a move away that was left open"
    );
    let (open, fate) =
        OpenDeparture::take_up(agent.journal.clone(), agent.dialer.clone(), row, sight, source)
            .await;
    if let Some(fate) = fate {
        return note(agent, fate, open.row()).await;
    }
    let open = Arc::new(open);
    taking_up.done(&open);
    // The journal says FENCED: whatever the registry says, nobody lets it run.
    let unresolved = |entry: &mut Workload| entry.state = State::Unresolved;
    if let Err(error) = agent.registry.change(&workload.name, unresolved) {
        let error = chain(&error);
        tracing::warn!(migration, workload = workload.name, error, "Cannot note that it is open");
    }
    tokio::spawn(ask_until_settled(Arc::clone(agent), open));
    Ok(())
}

async fn ask_until_settled(agent: Arc<Agent>, open: Arc<OpenDeparture>) {
    let fate = open.settle().await;
    let row = open.row().clone();
    agent.open_moves.forget(&row.migration);
    // Its keeper is free again for others.
    drop(open);
    note_for_sure(&agent, fate, row).await;
}

/// As [`note`]; what cannot be written down now is tried again beside everything else.
async fn note_for_sure(agent: &Arc<Agent>, fate: Fate, row: SessionRow) {
    let Err(answer) = note(agent, fate, &row).await else { return };
    tracing::error!(
        migration = row.migration,
        workload = row.workload,
        "Cannot note where it is, and tries again; the journal knows: {answer}"
    );
    let agent = Arc::clone(agent);
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(NOTE_AGAIN).await;
            if note(&agent, fate, &row).await.is_ok() {
                return;
            }
        }
    });
}

/// An operator's word on a move away that nobody knows the end of.
pub(super) async fn resolve(
    agent: &Arc<Agent>,
    row: &SessionRow,
    keep: Keep,
) -> Result<ResolveAnswer> {
    let migration = &row.migration;
    if agent.open_moves.find(migration).is_none() {
        if agent.moves.has(migration) {
            return Err(Answer::Conflict(format!(
                "The move of {} is still under way: `decamp cancel {migration}` calls it off where \
                 that is possible",
                row.workload
            )));
        }
        // Whoever should have, could not: its keeper or the disk was in the way.
        take_up(agent, migration).await?;
    }
    let resolution = match agent.open_moves.find(migration) {
        Some(open) => {
            let open = open?;
            let resolution = open.resolve(keep).await;
            if let Some(fate) = resolution.fate() {
                agent.open_moves.forget(migration);
                note_for_sure(agent, fate, open.row().clone()).await;
            }
            resolution
        }
        None => settled_before(agent, migration)?,
    };
    let text = told(row, &agent.config.name, &resolution, keep)?;
    Ok(ResolveAnswer { migration: migration.clone(), workload: row.workload.clone(), text })
}

/// It needed nobody's word.
fn settled_before(agent: &Agent, migration: &str) -> Result<Resolution> {
    let row = agent.journal.session(migration, Role::Source)?;
    match row.map(|row| row.record) {
        Some(record) if record.is_final() => Ok(Resolution::Before(fate_of(record))),
        _ => Err(Answer::UnknownMigration(
            migration.to_owned(),
            "that concerns a workload of this host any more",
        )),
    }
}

fn fate_of(record: Record) -> Fate {
    if record == Record::Released { Fate::Moved } else { Fate::Here }
}

fn told(row: &SessionRow, here: &str, resolution: &Resolution, keep: Keep) -> Result<String> {
    let (name, there) = (&row.workload, &row.peer);
    Ok(match (resolution, keep) {
        (Resolution::Open(why), _) => {
            return Err(Answer::Conflict(format!(
                "Nothing was done, because {there} does not say yet what became of {name} ({why}): try \
                 again in a moment"
            )));
        }
        (Resolution::Before(Fate::Moved), _) => {
            format!("That was settled before: {name} moved to {there}")
        }
        (Resolution::Before(_), _) => {
            format!("That was settled before: {name} stayed at {here}")
        }
        (Resolution::Obeyed(Fate::Moved), _)
        | (Resolution::Known(Fate::Moved), Keep::Destination) => {
            format!("The copy of {name} at {here} was taken away; {there} has it")
        }
        (Resolution::Known(Fate::Moved), Keep::Source) => format!(
            "{there} says that {name} runs there, so it was not started twice: the copy at {here} \
             was taken away"
        ),
        (Resolution::Obeyed(_), _) | (Resolution::Known(_), Keep::Source) => {
            format!("{name} runs on at {here}, as you decided")
        }
        (Resolution::Known(_), Keep::Destination) => format!(
            "{there} says that {name} never ran there, so it was not given up: it runs on at {here}"
        ),
    })
}

/// What is to be seen of the keeper of a workload that may be fenced with `token`, and the keeper itself
/// if there is one.
async fn look(
    agent: &Agent,
    workload: &Workload,
    token: u64,
) -> Result<(Sight, Option<Box<dyn SourceWorkload>>)> {
    let place = agent.place(workload);
    let name = workload.name.clone();
    blocking(move || {
        let (sight, met) = meet(&place)?;
        let client = match met {
            None => return Ok((sight, None)),
            Some((_, Phase::Incoming | Phase::Prepared)) => {
                return Err(Answer::Failed(format!(
                    "The keeper of {name} is building one that arrives, not holding one that leaves"
                )));
            }
            Some((_, Phase::Fenced { token: held })) if held != token => {
                return Err(Answer::Failed(format!(
                    "{name} is fenced for another change of ownership (token {held}, not {token})"
                )));
            }
            Some((client, _)) => client,
        };
        let no_reader = |_: &mut KeeperClient, _: &[_]| {
            Err(WorkloadError::plain("A recovered workload is not read"))
        };
        let manifest = Manifest { name, ..Manifest::default() };
        let source = KeeperSource::new(client, manifest, Box::new(no_reader))?.fenced_with(token);
        Ok((sight, Some(Box::new(source) as Box<dyn SourceWorkload>)))
    })
    .await?
}

/// The registry says where a workload that was leaving is.
async fn note(agent: &Arc<Agent>, fate: Fate, row: &SessionRow) -> Result<()> {
    let _noting = agent.open_moves.noting.lock().await;
    let Some(workload) = concerned(agent, row)? else { return Ok(()) };
    let name = &workload.name;
    if !matches!(workload.state, State::Migrating | State::Unresolved) {
        // It was settled otherwise in the meantime.
        return Ok(());
    }
    if fate == Fate::Moved {
        // As long as the entry says so, nothing of that name can come here.
        agent.sweep_moved(&workload).await;
    }
    agent.registry.change(name, |workload| match fate {
        // Whether it still runs is seen by whoever looks after running workloads.
        Fate::Here => {
            workload.state = State::Running;
            workload.moved_to = None;
        }
        Fate::Moved => workload.becomes_moved(&row.peer),
        Fate::Unresolved => workload.state = State::Unresolved,
    })?;
    tracing::info!(migration = row.migration, workload = name, ?fate, "Settled");
    Ok(())
}

impl Agent {
    /// A workload that runs elsewhere leaves nothing behind but its files: a keeper that died while it
    /// was fenced took nothing away. Nothing of its name may be coming here meanwhile.
    pub(super) async fn sweep_moved(self: &Arc<Self>, workload: &Workload) {
        let (agent, moved) = (Arc::clone(self), workload.clone());
        let swept = blocking(move || -> Result<()> {
            let place = agent.place(&moved);
            // One that can be asked is asked to go. One that cannot any more, and lives, is ended by force.
            if listens(&place) {
                return Ok(());
            }
            Ok(agent.backends.of(moved.kind)?.sweep(&moved.spec, &place)?)
        })
        .await;
        if let Err(answer) = swept.and_then(|swept| swept) {
            tracing::warn!(workload = workload.name, "Cannot sweep after it moved: {answer}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::super::recovery;
    use super::super::testing::{Bench, MIGRATION, fenced, keeper};
    use super::*;
    use crate::messages::Side;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_full_registry_does_not_keep_anybody_from_asking_or_deciding() {
        let bench = Bench::new();
        bench.enter(State::Migrating);
        bench.journal(Role::Source, Record::Fenced);
        bench.fill_disk(State::Unresolved);
        recovery::go_on_asking(&bench.agent, MIGRATION).await;
        assert!(matches!(bench.agent.open_moves.find(MIGRATION), Some(Ok(_))), "it is asked about");
        assert_eq!(bench.state(), Some(State::Migrating));
        bench.free_disk();
        let answer = recovery::resolve(&bench.agent, "web", Side::Source).await.expect("decided");
        assert!(answer.text.contains("as you decided"), "{}", answer.text);
        assert_eq!(bench.record(Role::Source), Some(Record::RolledBack));
        assert_eq!(bench.state(), Some(State::Running));
        assert!(bench.agent.open_moves.find(MIGRATION).is_none());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn where_it_ran_on_is_noted_when_the_disk_has_room_again() {
        let bench = Bench::new();
        bench.enter(State::Unresolved);
        bench.journal(Role::Source, Record::Fenced);
        bench.fill_disk(State::Running);
        recovery::resolve(&bench.agent, "web", Side::Source).await.expect("decided");
        assert_eq!(bench.record(Role::Source), Some(Record::RolledBack));
        assert_eq!(bench.state(), Some(State::Unresolved));
        bench.free_disk();
        bench.until("another try", |bench| bench.state() == Some(State::Running)).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_session_that_nobody_took_up_is_taken_up_to_be_decided() {
        let bench = Bench::new();
        bench.enter(State::Migrating);
        bench.journal(Role::Source, Record::Fenced);
        let answer = recovery::resolve(&bench.agent, "web", Side::Destination).await;
        let answer = answer.expect("nobody listens at beta, and no move is under way");
        assert!(answer.text.contains("was taken away"), "{}", answer.text);
        assert_eq!(bench.record(Role::Source), Some(Record::Released));
        assert_eq!(bench.state(), Some(State::Moved));
        // Its keeper was gone: what that left is swept.
        assert_eq!(bench.backend.swept.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_is_taken_up_while_something_is_done_to_its_workload() {
        let bench = Bench::new();
        bench.enter(State::Migrating);
        bench.journal(Role::Source, Record::Begun);
        let claim = bench.agent.claims.take("web", "being moved").expect("free");
        let refused = take_up(&bench.agent, MIGRATION).await;
        assert!(matches!(refused, Err(Answer::Conflict(_))), "{refused:?}");
        assert_eq!(bench.record(Role::Source), Some(Record::Begun));
        drop(claim);
        take_up(&bench.agent, MIGRATION).await.expect("rolled back");
        assert_eq!(bench.record(Role::Source), Some(Record::RolledBack));
        assert_eq!(bench.state(), Some(State::Running));
        assert!(!bench.agent.claims.is_taken("web"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_fenced_for_another_move_is_left_alone() {
        let bench = Bench::new();
        let web = bench.enter(State::Migrating);
        bench.journal(Role::Source, Record::Begun);
        let keeper = fenced(&bench.agent.place(&web), 2);
        let refused = take_up(&bench.agent, MIGRATION).await.expect_err("not its own");
        assert!(refused.to_string().contains("token 2, not 1"), "{refused}");
        assert!(keeper.said().is_empty(), "nothing was asked of it");
        assert_eq!(bench.record(Role::Source), Some(Record::Begun));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_is_decided_while_a_keeper_listens_and_does_not_answer() {
        let bench = Bench::new();
        let web = bench.enter(State::Migrating);
        bench.journal(Role::Source, Record::Fenced);
        let listener = keeper(&bench.agent.place(&web));
        let deaf = std::thread::spawn(move || {
            // The question, and the look whether anybody is there.
            for _ in 0..2 {
                drop(listener.accept().expect("accepts"));
            }
            listener
        });
        let refused = recovery::resolve(&bench.agent, "web", Side::Source).await;
        assert!(matches!(refused, Err(Answer::Failed(_))), "{refused:?}");
        assert_eq!(bench.record(Role::Source), Some(Record::Fenced), "it stands there, fenced");
        assert_eq!(bench.state(), Some(State::Migrating));
        assert!(bench.agent.open_moves.find(MIGRATION).is_none(), "and may be tried again");
        drop(deaf.join().expect("ends"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_the_journal_knows_the_registry_is_told() {
        let bench = Bench::new();
        bench.enter(State::Unresolved);
        bench.journal(Role::Source, Record::RolledBack);
        recovery::at_start(&bench.agent).await.expect("settled");
        assert_eq!(bench.state(), Some(State::Running));
    }

    #[test]
    fn a_session_is_taken_up_by_one_at_a_time() {
        let moves = OpenMoves::default();
        let taking_up = moves.begin("3f2a").expect("free");
        assert!(moves.begin("3f2a").is_none());
        assert!(matches!(moves.find("3f2a"), Some(Err(Answer::Conflict(_)))));
        assert!(moves.find("other").is_none());
        drop(taking_up);
        assert!(moves.find("3f2a").is_none(), "one that failed can be tried again");
    }

    #[test]
    fn what_is_told_is_what_was_done() {
        let row = SessionRow {
            migration: "3f2a".into(),
            role: Role::Source,
            workload: "web".into(),
            uuid: "u-1".into(),
            peer: "beta".into(),
            peer_address: String::new(),
            token: 1,
            record: Record::Fenced,
            boot_id: String::new(),
            updated_ms: 0,
            manifest: Vec::new(),
        };
        for (resolution, keep, says) in [
            (Resolution::Obeyed(Fate::Here), Keep::Source, "runs on at alpha, as you decided"),
            (Resolution::Known(Fate::Here), Keep::Destination, "it was not given up"),
            (Resolution::Known(Fate::Moved), Keep::Source, "it was not started twice"),
            (Resolution::Obeyed(Fate::Moved), Keep::Destination, "was taken away; beta has it"),
            (Resolution::Before(Fate::Moved), Keep::Source, "settled before: web moved to beta"),
            (Resolution::Before(Fate::Here), Keep::Destination, "settled before: web stayed"),
        ] {
            let text = told(&row, "alpha", &resolution, keep).expect("it is settled");
            assert!(text.contains(says), "{text}");
        }
        let open = Resolution::Open("no answer within 30 s".into());
        let answer = told(&row, "alpha", &open, Keep::Source).expect_err("nothing was done");
        assert!(answer.to_string().contains("Nothing was done"), "{answer}");
    }
}
