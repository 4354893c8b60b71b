//! A workload out of a file, as a new workload of this host: another identity each time, because a file
//! can be restored as often as somebody likes. What speaks against it is what speaks against an arrival.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Body;
use decamp_shared::archive::header::Described;
use decamp_shared::archive::restore::{Step, fill, verify};
use decamp_shared::archive::{Archive, ArchiveError, Foreign, Unpacking};
use decamp_shared::files::{Landing, free_bytes};
use decamp_shared::session::DestinationHost;
use decamp_shared::workload::{
    Backend, Kind, Manifest, Place, PlacedTree, Refusal, RefusalCode, is_plain_absolute,
};
use tokio::sync::mpsc;

use super::Agent;
use super::answer::{Answer, Result, chain};
use super::awakening::Awakening;
use super::checkpoints::{Teller, lines};
use super::host::ArrivalHost;
use crate::messages::{ArchiveEvent, RestoreRequest, WorkloadView, is_workload_name};

/// What landed, for the agent after this one.
const LANDING: &str = "landing.record";

/// A restore that was checked.
struct Job {
    agent: Arc<Agent>,
    host: ArrivalHost,
    archive: Archive,
    manifest: Manifest,
    trees: Vec<PlacedTree>,
    unpacking: Box<dyn Unpacking>,
    /// In the place of a session's.
    id: String,
}

impl Agent {
    /// Begins a restore and gives its events as lines; it goes on when nobody reads them.
    ///
    /// # Errors
    /// When the request makes no sense.
    pub(crate) fn begin_restore(self: &Arc<Self>, request: RestoreRequest) -> Result<Body> {
        if !is_plain_absolute(&request.file) {
            let text = format!("{} is not an absolute path without `..`", request.file.display());
            return Err(Answer::Request(text));
        }
        if let Some(name) = request.name.as_ref().filter(|name| !is_workload_name(name)) {
            return Err(Answer::Request(format!("{name:?} cannot be the name of a workload")));
        }
        let (tell, told) = mpsc::unbounded_channel();
        let agent = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let ended = match Job::check(agent, request, &tell).map(|job| job.run(&tell)) {
                Ok(Ok(view)) => ArchiveEvent::Restored(view),
                Ok(Err(answer)) => {
                    tracing::warn!("Not restored: {answer}");
                    ArchiveEvent::Failed(answer.body())
                }
                Err(answer) => {
                    tracing::info!("Not restored: {answer}");
                    ArchiveEvent::Refused(answer.body())
                }
            };
            let _ = tell.send(ended);
        });
        Ok(lines(told))
    }
}

/// Where it is written what landed for the workload at `place`, until that may stay.
pub(super) fn landing_record(place: &Place) -> PathBuf {
    place.dir.join(LANDING)
}

/// Removes what a restore that was cut short put on the disk.
pub(super) fn take_back_files(place: &Place) {
    with_landing(place, Landing::remove);
}

/// What it put there stays.
pub(super) fn keep_files(place: &Place) {
    with_landing(place, Landing::keep);
}

fn with_landing(place: &Place, act: fn(&Landing)) {
    let record = landing_record(place);
    match Landing::recover(&record) {
        Ok(landing) => act(&landing),
        Err(error) => tracing::error!(record = %record.display(), %error, "Cannot be read"),
    }
}

/// The file as it is found.
enum Source {
    /// One of decamp's.
    Ours(Box<Archive>),
    /// One that another program wrote, and what it is to us.
    Foreign(Box<(Foreign, Described)>),
}

impl Source {
    /// Only containers have such files.
    fn foreign(agent: &Agent, request: &RestoreRequest) -> Result<Self> {
        let (backend, file) = (agent.backends.of(Kind::Container)?, request.file.as_path());
        // Where it goes is known only from what is in it, and looked at again then.
        let places = request.paths.iter().map(|(_, to)| to.as_path()).chain([Path::new("/")]);
        let room = places.map(|place| free_bytes(place).unwrap_or(u64::MAX)).max();
        let most = room.unwrap_or(u64::MAX).saturating_add(available_memory());
        let found = Foreign::survey(file, most, &|part| backend.wants_of_foreign(part));
        let found = found.map_err(refused)?;
        let described =
            backend.describe_foreign(&found, request.name.as_deref()).map_err(|error| {
                let (path, what) = (file.to_owned(), chain(&error));
                refused(ArchiveError::Refused { path, what })
            })?;
        Ok(Self::Foreign(Box::new((found, described))))
    }

    fn manifest(&self) -> Manifest {
        match self {
            Self::Ours(archive) => archive.header().manifest(),
            Self::Foreign(foreign) => foreign.1.manifest(),
        }
    }

    /// Bytes of all its parts.
    fn bytes(&self) -> u64 {
        match self {
            Self::Ours(archive) => archive.header().bytes(),
            Self::Foreign(foreign) => foreign.0.parts().iter().map(|part| part.size).sum(),
        }
    }

    fn unpacked_by(
        self,
        backend: &dyn Backend,
        manifest: &Manifest,
        trees: &[PlacedTree],
    ) -> std::result::Result<(Archive, Box<dyn Unpacking>), ArchiveError> {
        match self {
            Self::Ours(archive) => Ok((*archive, backend.unpack(manifest, trees)?)),
            Self::Foreign(foreign) => {
                let (found, described) = *foreign;
                let unpacking = backend.unpack_foreign(manifest, trees, &found)?;
                Ok((found.into_archive(described)?, unpacking))
            }
        }
    }
}

impl Job {
    /// Looks at everything, and touches nothing.
    fn check(agent: Arc<Agent>, request: RestoreRequest, tell: &Teller) -> Result<Self> {
        let foreign = Foreign::is_at(&request.file).map_err(refused)?;
        let source = match foreign {
            true => Source::foreign(&agent, &request)?,
            false => Source::Ours(Box::new(Archive::open(&request.file).map_err(refused)?)),
        };
        let mut manifest = source.manifest();
        // Whatever the file says: it is another workload each time.
        manifest.uuid = uuid::Uuid::new_v4().to_string();
        manifest.name = request.name.unwrap_or(manifest.name);
        let host = ArrivalHost::new(Arc::clone(&agent));
        let what = format!("{} cannot be restored here", request.file.display());
        let refuse = |refusals: Vec<Refusal>| {
            Answer::refused_for(&what, refusals.into_iter().map(advised).collect())
        };
        let trees = host.place_trees(&manifest, &request.paths).map_err(refuse)?;
        let refusals = host.preflight(&manifest, &trees);
        if !refusals.is_empty() {
            return Err(refuse(refusals));
        }
        if let Some(refusal) = too_much(source.bytes(), &trees) {
            return Err(refuse(vec![refusal]));
        }
        let backend = agent.backends.of(manifest.kind())?;
        let (mut archive, mut unpacking) =
            source.unpacked_by(&*backend, &manifest, &trees).map_err(refused)?;
        let checked = verify(&mut archive, &mut *unpacking, &|step| say(tell, step));
        match checked {
            Err(ArchiveError::Unfit(refusals)) => return Err(refuse(refusals)),
            checked => checked.map_err(refused)?,
        }
        let id = uuid::Uuid::new_v4().to_string();
        Ok(Self { agent, host, archive, manifest, trees, unpacking, id })
    }

    fn run(self, tell: &Teller) -> Result<WorkloadView> {
        let (name, uuid) = (self.manifest.name.clone(), self.manifest.uuid.clone());
        tracing::info!(workload = name, file = %self.archive.path().display(), "Restores");
        let mut destination = self
            .host
            .prepare(&self.id, &self.manifest, &self.trees)
            .map_err(|error| unprepared(&self.agent, &self.id, &name, &chain(&error)))?;
        let record = landing_record(&self.agent.state_dir.place(&name, &uuid));
        let (landing, made) = match Landing::recorded(&record) {
            Ok(landing) => (landing, Ok(())),
            Err(error) => {
                (Landing::new(), Err(format!("Cannot make {}: {error}", record.display())))
            }
        };
        let Self { agent, archive, manifest, mut unpacking, id, .. } = self;
        let awakening = Awakening { agent, id, manifest, landing };
        let filled = made.and_then(|()| {
            let tell = |step| say(tell, step);
            fill(&archive, &mut *unpacking, &mut *destination, &awakening.landing, &tell)
                .map_err(|error| chain(&error))
        });
        match filled {
            Ok(()) => awakening.wake(destination),
            Err(why) => Err(awakening.give_up(&why, || destination.discard())),
        }
    }
}

/// What was prepared for it was taken away again, unless its entry says otherwise.
fn unprepared(agent: &Agent, id: &str, name: &str, why: &str) -> Answer {
    let is_left = match agent.registry.get(name) {
        Ok(found) => found.is_some_and(|entry| entry.migration.as_deref() == Some(id)),
        Err(_) => true,
    };
    Answer::Failed(match is_left {
        false => format!("{why}. {name} did not run, and nothing is left of it here"),
        true => format!(
            "{why}. {name} did not run, and what is left of it could not be taken away yet: that is tried \
             again"
        ),
    })
}

/// What says that it holds more than this host could is not even unpacked to be looked at.
fn too_much(bytes: u64, trees: &[PlacedTree]) -> Option<Refusal> {
    let disk = trees.iter().map(|tree| free_bytes(&tree.path).unwrap_or(u64::MAX));
    let room = disk.fold(available_memory(), u64::saturating_add);
    (bytes > room).then(|| {
        let text = format!("It holds {bytes} bytes, more than memory and disk here have room for");
        Refusal::new(RefusalCode::Disk, text)
    })
}

/// Bytes of memory that are available, as far as the kernel says.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

/// A refusal with what to do about it here.
fn advised(refusal: Refusal) -> Refusal {
    if refusal.code() != RefusalCode::NameTaken {
        return refusal;
    }
    let text = format!(
        "{}. Give another name with --name, or remove what has it with `decamp rm`",
        refusal.text
    );
    Refusal { text, ..refusal }
}

fn refused(error: ArchiveError) -> Answer {
    Answer::refused(format!("{}. Nothing was touched", chain(&error)))
}

fn say(tell: &Teller, step: Step) {
    let (phase, bytes, total) = match step {
        Step::Checking(bytes, total) => ("check", bytes, total),
        Step::Placing(bytes, total) => ("place", bytes, total),
        Step::Loading => ("load", 0, 0),
    };
    let _ = tell.send(ArchiveEvent::Step { phase: phase.to_owned(), bytes, total });
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, MIGRATION};
    use super::*;
    use crate::messages::State;

    #[test]
    fn what_is_left_is_not_denied() {
        let bench = Bench::new();
        let said = |id: &str| unprepared(&bench.agent, id, "web", "No").to_string();
        assert!(said(MIGRATION).contains("nothing is left"), "{}", said(MIGRATION));
        bench.enter(State::Incoming);
        assert!(said(MIGRATION).contains("tried again"), "{}", said(MIGRATION));
        assert!(said("another").contains("nothing is left"), "{}", said("another"));
    }
}
