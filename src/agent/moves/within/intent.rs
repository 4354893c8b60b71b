//! What is noted before disks move within this host, and what has become of it after whatever end: of the move, of
//! the agent, of the keeper, of the host.
//!
//! The intent is on disk before the first file is made. Whether it was done the keeper's own record says, which it
//! writes while nothing is written to any of the files, before the new ones are in use
//! ([`decamp_shared::keeper::switched_for`]): with it the new files are the workload's, without it the old ones, and
//! what was made for the new ones goes.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use decamp_shared::files::Landing;
use decamp_shared::keeper::switched::write_durably;
use decamp_shared::keeper::{KeeperClient, forget_switch, is_kept, switched_for};
use decamp_shared::workload::{Place, PlacedTree, WorkloadError};
use serde::{Deserialize, Serialize};

use super::DOING;
use crate::agent::answer::{Answer, Result};
use crate::agent::moves::settling::NOTE_AGAIN;
use crate::agent::registry::Workload;
use crate::agent::workloads::blocking;
use crate::agent::{Agent, leftovers};
use crate::backend::moved_files;
use crate::messages::{FileEntry, State};

/// No intent is longer.
const CAP: u64 = 1 << 20;
/// How long a keeper may take to do what it was asked before.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// How long the agent's start waits for one of them.
const AT_START: Duration = Duration::from_secs(10);

/// Disks that are to move within this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Intent {
    migration: String,
    /// Old and new paths.
    files: Vec<(PathBuf, PathBuf)>,
    /// The old files go once the new ones are in use.
    remove_source: bool,
}

/// What became of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Settled {
    /// Whether the new files are the workload's; `None`: nothing was open.
    pub(super) switched: Option<bool>,
    /// What a person should know of it.
    pub(super) notes: Vec<String>,
}

impl Intent {
    pub(super) fn of(migration: &str, files: &[PlacedTree], remove_source: bool) -> Self {
        let pair = |placed: &PlacedTree| (PathBuf::from(&placed.tree.path), placed.path.clone());
        let (migration, files) = (migration.to_owned(), files.iter().map(pair).collect());
        Self { migration, files, remove_source }
    }

    /// On disk when this returns.
    pub(super) fn write(&self, place: &Place) -> Result<()> {
        let path = record(place);
        let failed = |error: io::Error| {
            Answer::Failed(format!(
                "Cannot write {}, so nothing was begun: {error}",
                path.display()
            ))
        };
        let text = serde_json::to_vec(self).map_err(|error| failed(error.into()))?;
        write_durably(&path, &text).inspect_err(|_| drop(fs::remove_file(&path))).map_err(failed)
    }

    fn read(place: &Place) -> io::Result<Option<Self>> {
        let mut text = Vec::new();
        match fs::File::open(record(place)) {
            Ok(file) => file.take(CAP).read_to_end(&mut text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Some(serde_json::from_slice(&text)?))
    }
}

/// Where it is noted what is made for a move of disks.
pub(super) fn landing_record(place: &Place) -> PathBuf {
    place.dir.join("moving-disks.made")
}

fn record(place: &Place) -> PathBuf {
    place.dir.join("moving-disks.json")
}

/// Nothing came of it.
pub(super) fn forget(place: &Place) {
    if let Err(error) = fs::remove_file(record(place)) {
        tracing::warn!(workload = place.name, %error, "Cannot remove an intent");
    }
}

/// Whether it is still open where the disks of the workload at `place` are.
pub(in crate::agent) fn is_open(place: &Place) -> bool {
    record(place).exists()
}

/// Finishes what an earlier agent left of a move of disks, if it left anything; what takes long goes on beside
/// everything else.
///
/// # Errors
/// When something else is being done to the workload.
pub(in crate::agent) async fn take_up(agent: &Arc<Agent>, workload: &Workload) -> Result<()> {
    if !is_open(&agent.place(workload)) {
        return Ok(());
    }
    let claim = agent.claim(&workload.name, DOING).await?;
    let (agent, name) = (Arc::clone(agent), workload.name.clone());
    let settling = tokio::spawn(async move {
        let _claim = claim;
        loop {
            let (asked, of) = (Arc::clone(&agent), name.clone());
            let settled = blocking(move || settle(&asked, &of)).await;
            match settled.and_then(|settled| settled) {
                Ok(settled) => {
                    return tracing::info!(workload = name, ?settled, "Settled its disks");
                }
                Err(answer) => tracing::error!(
                    workload = name,
                    "An earlier agent moved its disks, and it cannot be noted where they are: {answer}. \
                     Trying again"
                ),
            }
            tokio::time::sleep(NOTE_AGAIN).await;
        }
    });
    if tokio::time::timeout(AT_START, settling).await.is_err() {
        tracing::warn!(workload = workload.name, "Its keeper does not answer; goes on asking");
    }
    Ok(())
}

/// Notes where the disks of `name` are, and takes away what is not used. No connection to its keeper may be open, and
/// its claim must be held. Blocks.
///
/// # Errors
/// When the keeper does not say whether it is done with what was asked before, or it cannot be written down.
pub(super) fn settle(agent: &Agent, name: &str) -> Result<Settled> {
    let Some(workload) = agent.registry.get(name)? else { return Ok(Settled::default()) };
    let place = agent.place(&workload);
    let failed = |what: &str, error: io::Error| {
        Answer::Failed(format!("Cannot read {what} of {}: {error}", place.dir.display()))
    };
    let read = Intent::read(&place).map_err(|error| failed("the intent", error))?;
    let Some(intent) = read else { return Ok(Settled::default()) };
    // What was asked on another connection is done, or refused, before this one is answered.
    let phase = KeeperClient::connect_within(&place, ANSWER_WITHIN).and_then(|mut one| one.phase());
    match phase {
        Ok(_) => {}
        Err(WorkloadError::KeeperGone { .. }) if !is_kept(&place) => {}
        Err(error) => return Err(error.into()),
    }
    let switched = switched_for(&place, &intent.migration);
    let switched = switched.map_err(|error| failed("the keeper's record", error))?;
    let mut spec = None;
    if switched {
        spec = Some(agent.backends.of(workload.kind)?.relocated(&workload.spec, &intent.files)?);
    }
    agent.registry.change(name, |entry| {
        if let Some(spec) = spec {
            entry.spec = spec;
            entry.files = moved_files(&entry.files, &intent.files);
        }
        if entry.state == State::Migrating && entry.migration.as_deref() == Some(&intent.migration)
        {
            entry.state = State::Running;
            entry.moved_to = None;
        }
    })?;
    let landing = Landing::recover(&landing_record(&place))
        .map_err(|error| failed("what was made", error))?;
    let mut notes = Vec::new();
    if switched {
        // It knows which files were made, for as long as it is neither kept nor removed.
        notes = tell_old(agent, &intent, &landing)?;
        landing.keep();
    } else {
        landing.remove();
    }
    fs::remove_file(record(&place)).map_err(|error| failed("the intent", error))?;
    forget_switch(&place);
    Ok(Settled { switched: Some(switched), notes })
}

/// What becomes of the old files, for people. They go where that was asked for, and the new ones are whole.
fn tell_old(agent: &Agent, intent: &Intent, landing: &Landing) -> Result<Vec<String>> {
    let others = agent.registry.list()?;
    let mut notes = Vec::new();
    for (old, new) in &intent.files {
        let (was, is) = (old.display(), new.display());
        let stays = match (lacking(old, new, landing.made_at(new)), intent.remove_source) {
            (Some(why), _) => Some(format!("it may be needed, for {why}")),
            (None, false) => Some("remove it when it is not needed".to_owned()),
            (None, true) => removed(old, &others, &agent.config.state_dir),
        };
        notes.push(match stays {
            None => format!("The disk {was} is {is} now; {was} was removed"),
            Some(why) => format!("The disk {was} is {is} now; {was} stays as it was: {why}"),
        });
    }
    Ok(notes)
}

/// What `new` lacks of being the whole disk that `old` was, as far as can be seen without reading it; nothing if it is
/// that. `made`: the file that was switched to.
fn lacking(old: &Path, new: &Path, made: Option<(u64, u64)>) -> Option<String> {
    let shown = new.display();
    let is = match fs::symlink_metadata(new) {
        Ok(is) => is,
        Err(error) => return Some(format!("{shown} cannot be looked at: {error}")),
    };
    if !is.is_file() {
        return Some(format!("{shown} is no plain file"));
    }
    match made {
        // Whoever settled it before has taken the old one away, and come no further.
        None if fs::symlink_metadata(old).is_err() => {}
        None => return Some(format!("nothing says which file was made at {shown}")),
        Some(made) if made != (is.dev(), is.ino()) => {
            return Some(format!("{shown} is another file than was made there"));
        }
        Some(_) => {}
    }
    // One that is gone already was looked at before; a device has no length.
    let was = fs::metadata(old).ok().filter(fs::Metadata::is_file)?.len();
    (is.len() != was).then(|| format!("{shown} has {} bytes of {was}", is.len()))
}

/// Removes what was a disk; why not, if it stays.
fn removed(old: &Path, others: &[Workload], state_dir: &Path) -> Option<String> {
    match fs::symlink_metadata(old) {
        Ok(found) if !found.is_file() => return Some("it is no plain file".to_owned()),
        _ => {}
    }
    let file = FileEntry { role: "disk".to_owned(), path: old.to_owned(), shared: false };
    let answer = leftovers::remove(&[file], others, state_dir);
    answer.left.first().map(|left| left.why.clone())
}

#[cfg(test)]
mod tests {
    use decamp_shared::keeper::record_switch;
    use decamp_shared::workload::FileTree;

    use super::*;
    use crate::agent::supervise::adopt;
    use crate::agent::testing::{Bench, MIGRATION, deaf};

    /// A host where a disk of `web` was being moved when everything ended.
    struct Room {
        bench: Bench,
        dir: tempfile::TempDir,
        place: Place,
    }

    impl Room {
        fn new(switched: bool, remove_source: bool) -> Self {
            let (bench, dir) = (Bench::new(), tempfile::tempdir().expect("a directory"));
            let web = bench.enter(State::Migrating);
            let (old, new) = (dir.path().join("old"), dir.path().join("new"));
            fs::write(&old, "old").expect("written");
            let disk = FileEntry { role: "disk".into(), path: old.clone(), shared: false };
            bench.agent.registry.change("web", |web| web.files = vec![disk]).expect("written");
            let place = bench.agent.place(&web);
            let tree = FileTree { path: old.display().to_string(), ..FileTree::default() };
            let files = [PlacedTree { tree, path: new.clone() }];
            Intent::of(MIGRATION, &files, remove_source).write(&place).expect("written");
            let landing = Landing::recorded(&landing_record(&place)).expect("a record");
            landing.land_empty(&new, false).expect("made");
            fs::write(&new, "new").expect("written");
            if switched {
                record_switch(&place, MIGRATION).expect("noted");
            }
            Self { bench, dir, place }
        }

        fn settle(&self) -> Result<Settled> {
            settle(&self.bench.agent, "web")
        }

        /// Where the disk is, as the registry has it, after nothing is left of the move.
        fn path(&self) -> PathBuf {
            let left = fs::read_dir(&self.place.dir).expect("listed").count();
            assert_eq!(left, 0, "something is left");
            let web = self.bench.agent.find("web").expect("an entry");
            let path = web.files[0].path.clone();
            let is_new = path.ends_with("new");
            assert_eq!(web.spec["disks"][0]["path"].as_str().is_some(), is_new, "{web:?}");
            assert_eq!(self.dir.path().join("new").exists(), is_new);
            path
        }
    }

    #[test]
    fn without_the_keepers_word_the_old_file_is_the_disk() {
        let room = Room::new(false, true);
        let stayed = Settled { switched: Some(false), notes: Vec::new() };
        assert_eq!(room.settle().expect("settled"), stayed);
        assert_eq!(room.bench.state(), Some(State::Running));
        assert!(room.path().ends_with("old") && room.dir.path().join("old").exists());
        assert_eq!(room.settle().expect("nothing to do"), Settled::default());
    }

    #[test]
    fn with_it_the_new_one_is_and_the_old_one_goes_if_it_was_to() {
        for remove_source in [false, true] {
            let room = Room::new(true, remove_source);
            let Settled { switched, notes } = room.settle().expect("settled");
            assert_eq!(switched, Some(true));
            let says = if remove_source { "was removed" } else { "stays as it was" };
            assert!(notes.len() == 1 && notes[0].contains(says), "{notes:?}");
            assert_eq!(room.bench.state(), Some(State::Running));
            assert!(room.path().ends_with("new"));
            assert_eq!(room.dir.path().join("old").exists(), !remove_source);
        }
    }

    #[test]
    fn the_old_one_stays_where_the_new_one_is_not_whole() {
        type Change = fn(&Path);
        let cases: [(&str, Change); 5] = [
            ("has 2 bytes of 3", |new| fs::write(new, "ne").expect("cut")),
            ("cannot be looked at", |new| fs::remove_file(new).expect("removed")),
            ("is another file", |new| {
                fs::write(new.with_extension("x"), "new").expect("written");
                fs::rename(new.with_extension("x"), new).expect("replaced");
            }),
            ("is no plain file", |new| {
                fs::rename(new, new.with_extension("x")).expect("renamed");
                std::os::unix::fs::symlink(new.with_extension("x"), new).expect("linked");
            }),
            ("nothing says which", |_| {}),
        ];
        for (says, change) in cases {
            for remove_source in [false, true] {
                let room = Room::new(true, remove_source);
                change(&room.dir.path().join("new"));
                if says.starts_with("nothing") {
                    fs::remove_file(landing_record(&room.place)).expect("there was one");
                }
                let Settled { switched, notes } = room.settle().expect("settled");
                assert_eq!(switched, Some(true), "the keeper's word stands");
                assert!(
                    notes[0].contains("stays as it was: it may be needed")
                        && notes[0].contains(says),
                    "{notes:?}"
                );
                assert_eq!(fs::read(room.dir.path().join("old")).expect("there"), b"old");
                assert!(!is_open(&room.place));
                let web = room.bench.agent.find("web").expect("an entry");
                assert!(web.files[0].path.ends_with("new"), "{web:?}");
            }
        }
    }

    /// An agent that ended after the old file was gone, and before anything else was.
    #[test]
    fn what_was_removed_before_the_agent_ended_is_told_once_more() {
        for kept in [false, true] {
            let room = Room::new(true, true);
            fs::remove_file(room.dir.path().join("old")).expect("removed");
            if kept {
                Landing::recover(&landing_record(&room.place)).expect("a record").keep();
            }
            let notes = room.settle().expect("settled").notes;
            assert!(notes[0].ends_with("was removed"), "{notes:?}");
            assert!(room.path().ends_with("new"));
        }
    }

    #[test]
    fn nothing_is_removed_before_it_is_known_and_written_down() {
        let room = Room::new(true, true);
        let busy = deaf(&room.place);
        room.settle().expect_err("its keeper is there and does not answer");
        busy.join().expect("ends");
        fs::remove_file(room.place.socket()).expect("there was one");
        room.bench.fill_disk(State::Running);
        room.settle().expect_err("it cannot be written down");
        assert!(is_open(&room.place) && room.dir.path().join("old").exists());
        assert!(room.dir.path().join("new").exists());
        room.bench.free_disk();
        room.settle().expect("settled");
        assert!(room.path().ends_with("new"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_next_agent_settles_it_before_anything_else() {
        for switched in [false, true] {
            let room = Room::new(switched, false);
            adopt(&room.bench.agent).await.expect("adopts");
            // Its keeper is gone.
            assert_eq!(room.bench.state(), Some(State::Stopped));
            assert_eq!(room.path().ends_with("new"), switched);
        }
    }
}
