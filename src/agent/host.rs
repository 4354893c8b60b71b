//! What this host says to workloads that want to come: where their files go, every reason against it,
//! and what the registry says while they arrive. How they arrive is the session's business.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use decamp_shared::files::{check_place, free_bytes};
use decamp_shared::session::DestinationHost;
use decamp_shared::workload::{
    DestinationWorkload, FileRole, Kind, Manifest, PlacedTree, Refusal, RefusalCode, Result,
    Storage, WorkloadError, is_plain_absolute,
};

use super::Agent;
use super::answer::chain;
use super::arrivals;
use super::config::PageEncryption;
use super::leftovers::{is_system, user_of};
use super::registry::{RegistryError, Workload};
use super::supervise::is_gone;
use super::workloads::blocking;
use crate::backend::{entry, role_word, still_shared};
use crate::messages::{FileEntry, State, is_workload_name};

/// A workload with more trees than this is not believed.
const TREES_MAX: usize = 64;

/// How long an arrival that was given up may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Between two tries to note how an arrival ended.
const NOTE_AGAIN: Duration = Duration::from_secs(5);

/// Notes how an arrival (its migration, its workload) ended.
type Note = fn(&Agent, &str, &str) -> super::answer::Result<()>;

/// This host as sessions see it.
pub(crate) struct ArrivalHost {
    agent: Arc<Agent>,
}

impl ArrivalHost {
    /// The host of this agent.
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    /// The entry of an earlier stay of this very workload: it moved away, and its files are here.
    fn earlier_stay(&self, manifest: &Manifest) -> Option<Workload> {
        let found = self.agent.registry.by_uuid(&manifest.uuid).ok().flatten()?;
        (found.state == State::Moved && found.name == manifest.name).then_some(found)
    }

    /// An arrival of this very workload that came to nothing may still be on its way out.
    fn let_it_go(&self, manifest: &Manifest) {
        let deadline = Instant::now() + GONE_WITHIN;
        let is_going = || {
            let found = self.agent.registry.by_uuid(&manifest.uuid).ok().flatten();
            found.is_some_and(|found| found.state == State::Incoming)
        };
        while is_going() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn check_identity(&self, manifest: &Manifest, refusals: &mut Vec<Refusal>) {
        let name = &manifest.name;
        if !is_workload_name(name) || uuid::Uuid::parse_str(&manifest.uuid).is_err() {
            refusals.push(Refusal::new(
                RefusalCode::Request,
                format!("{name:?} with identity {:?} cannot be a workload", manifest.uuid),
            ));
            return;
        }
        self.let_it_go(manifest);
        let host = &self.agent.config.name;
        let earlier = self.earlier_stay(manifest);
        if let Some(earlier) = earlier.filter(|_| !self.agent.claims.is_taken(name)) {
            // It listens where the new one would.
            if !is_gone(&self.agent.place(&earlier)) {
                refusals.push(Refusal::new(
                    RefusalCode::Busy,
                    format!(
                        "The old copy of {name} on {host} is still being taken away: try again in a \
                         moment"
                    ),
                ));
            }
            return;
        }
        let of_uuid = self.agent.registry.by_uuid(&manifest.uuid);
        match (self.agent.registry.get(name), of_uuid) {
            (Ok(Some(other)), _) => refusals.push(Refusal::new(
                RefusalCode::NameTaken,
                format!(
                    "The name {name} is taken on {host} by a {} that is {}",
                    other.kind.word(),
                    other.state
                ),
            )),
            (_, Ok(Some(other))) => refusals.push(Refusal::new(
                RefusalCode::NameTaken,
                format!("{name} is on {host} already, as {} ({})", other.name, other.state),
            )),
            (Err(error), _) | (_, Err(error)) => {
                refusals.push(Refusal::new(RefusalCode::Other, chain(&error)));
            }
            (Ok(None), Ok(None)) if self.agent.claims.is_taken(name) => {
                refusals.push(Refusal::new(
                    RefusalCode::Busy,
                    format!("Another workload of the name {name} is being started on {host}"),
                ))
            }
            (Ok(None), Ok(None)) => {}
        }
    }

    fn check_paths(&self, manifest: &Manifest, trees: &[PlacedTree], refusals: &mut Vec<Refusal>) {
        let mut others = self.agent.registry.list().unwrap_or_default();
        others.retain(|other| other.uuid != manifest.uuid);
        let host = &self.agent.config.name;
        // What nobody said a word of is refused for that.
        let unsaid = |placed: &&PlacedTree| {
            placed.tree.role().is_volume() && placed.tree.storage() == Storage::Unsaid
        };
        for placed in trees.iter().filter(|placed| !unsaid(placed)) {
            let path = placed.path.display();
            if placed.tree.storage() == Storage::Shared {
                if let Some(why) = unfit_to_share(placed, &others) {
                    let text = format!("{path} on {host} cannot be shared: {why}");
                    refusals.push(Refusal::new(RefusalCode::PathTaken, text));
                }
                continue;
            }
            let text = if let Some(other) = other_user_of(placed, &others) {
                format!("{path} on {host} is used by workload {}", other.name)
            } else if let Some(why) =
                check_place(&placed.tree, &placed.path, self.known_copy(manifest, placed))
            {
                format!("On {host}, {why}")
            } else {
                continue;
            };
            let text = format!("{text}. Map it with --path {}=NEW", placed.tree.path);
            refusals.push(Refusal::new(RefusalCode::PathTaken, text));
        }
    }

    /// New trees need room. What an earlier copy still lacks shows only when files are compared; a
    /// disk that fills up then ends the move with the workload running on.
    fn check_disk(&self, manifest: &Manifest, trees: &[PlacedTree], refusals: &mut Vec<Refusal>) {
        let mut needed: BTreeMap<u64, (u64, &Path)> = BTreeMap::new();
        let comes = |placed: &&PlacedTree| {
            placed.tree.storage() != Storage::Shared && !self.known_copy(manifest, placed)
        };
        for placed in trees.iter().filter(comes) {
            let device = device_of(&placed.path);
            let entry = needed.entry(device).or_insert((0, &placed.path));
            entry.0 = entry.0.saturating_add(placed.tree.bytes);
        }
        let host = &self.agent.config.name;
        for (bytes, path) in needed.into_values() {
            match free_bytes(path) {
                Ok(free) if free < bytes => refusals.push(Refusal::new(
                    RefusalCode::Disk,
                    format!(
                        "Not enough room at {} on {host}: {bytes} bytes needed, {free} free",
                        path.display()
                    ),
                )),
                Ok(_) => {}
                Err(error) => refusals.push(Refusal::new(
                    RefusalCode::Disk,
                    format!("Cannot tell how much room {} on {host} has: {error}", path.display()),
                )),
            }
        }
    }

    /// Enters the workload as arriving; the entry of an earlier stay is kept inside the new one. Since it
    /// was looked at, others may have been entered: two that want one place are told apart here.
    fn enter(&self, incoming: Workload, trees: &[PlacedTree]) -> Result<()> {
        let _one_at_a_time = self.agent.entering.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |error| WorkloadError::new("Cannot enter the workload in the registry", error);
        let registry = &self.agent.registry;
        let mut others = registry.list().map_err(failed)?;
        others.retain(|other| other.uuid != incoming.uuid);
        for placed in trees {
            if placed.tree.storage() == Storage::Shared {
                if let Some(why) = unfit_to_share(placed, &others) {
                    return Err(WorkloadError::plain(format!(
                        "{} cannot be shared: {why}",
                        placed.path.display()
                    )));
                }
            } else if let Some(other) = other_user_of(placed, &others) {
                return Err(WorkloadError::plain(format!(
                    "{} is used by workload {}, which has come in the meantime",
                    placed.path.display(),
                    other.name
                )));
            }
        }
        match registry.by_uuid(&incoming.uuid).map_err(failed)? {
            Some(earlier) if earlier.state == State::Moved && earlier.name == incoming.name => {
                registry
                    .change(&incoming.name.clone(), |entry| {
                        *entry = Workload { earlier: Some(Box::new(earlier)), ..incoming };
                    })
                    .map_err(failed)?;
            }
            _ => registry.create(&incoming).map_err(failed)?,
        }
        Ok(())
    }

    fn build(
        &self,
        manifest: &Manifest,
        spec: &serde_json::Value,
    ) -> Result<Box<dyn DestinationWorkload>> {
        let place = self.agent.state_dir.place(&manifest.name, &manifest.uuid);
        self.agent
            .state_dir
            .make_place(&place)
            .map_err(|error| WorkloadError::new("Cannot make room for the keeper", error))?;
        self.agent.backends.of(manifest.kind())?.prepare(manifest, spec, &place)
    }
}

impl DestinationHost for ArrivalHost {
    fn name(&self) -> &str {
        &self.agent.config.name
    }

    fn page_encryption(&self) -> bool {
        self.agent.config.page_encryption == PageEncryption::On
    }

    fn place_trees(
        &self,
        manifest: &Manifest,
        paths: &[(PathBuf, PathBuf)],
    ) -> std::result::Result<Vec<PlacedTree>, Vec<Refusal>> {
        place(manifest, paths, &self.agent.config.paths, &self.agent.config.state_dir)
    }

    fn preflight(&self, manifest: &Manifest, trees: &[PlacedTree]) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        self.check_identity(manifest, &mut refusals);
        match manifest.kind() {
            Kind::Unspecified => refusals.push(Refusal::new(
                RefusalCode::Unsupported,
                format!("This version knows no workload of kind {}", manifest.kind),
            )),
            kind => match self.agent.backends.of(kind) {
                Ok(backend) => refusals.extend(backend.preflight(manifest, trees)),
                Err(error) => refusals.push(Refusal::new(RefusalCode::Unsupported, chain(&error))),
            },
        }
        self.check_paths(manifest, trees, &mut refusals);
        self.check_disk(manifest, trees, &mut refusals);
        refusals
    }

    fn known_copy(&self, manifest: &Manifest, tree: &PlacedTree) -> bool {
        let role = role_word(tree.tree.role());
        self.earlier_stay(manifest).is_some_and(|earlier| {
            // What other hosts have too is nobody's copy, and nothing of it is replaced.
            let is_it = |file: &FileEntry| file.path == tree.path && file.role == role;
            earlier.files.iter().any(|file| is_it(file) && !file.shared)
        })
    }

    fn prepare(
        &self,
        migration: &str,
        manifest: &Manifest,
        trees: &[PlacedTree],
    ) -> Result<Box<dyn DestinationWorkload>> {
        let claim = self.agent.claims.take(&manifest.name, "arriving").map_err(|doing| {
            WorkloadError::plain(format!("{} is {doing} here right now", manifest.name))
        })?;
        let kind = manifest.kind();
        let spec = self.agent.backends.of(kind)?.respec(manifest, trees)?;
        let mut incoming =
            Workload::new(&manifest.name, &manifest.uuid, kind, spec.clone(), State::Incoming);
        incoming.migration = Some(migration.to_owned());
        let earlier = self.earlier_stay(manifest).map(|earlier| earlier.files).unwrap_or_default();
        let files = trees.iter().map(|placed| entry(&placed.tree, &placed.path)).collect();
        incoming.files = still_shared(files, &earlier);
        self.enter(incoming, trees)?;
        let built = self.build(manifest, &spec);
        drop(claim);
        built.inspect_err(|_| self.gone(migration, manifest))
    }

    fn running(&self, migration: &str, manifest: &Manifest) {
        match self.agent.enter_arrival(migration, &manifest.name) {
            Ok(()) => tracing::info!(migration, workload = manifest.name, "Runs here now"),
            Err(answer) => {
                tracing::error!(
                    migration,
                    workload = manifest.name,
                    "Runs here, but cannot be entered; the journal knows, and it is tried again: {answer}"
                );
                self.agent.try_again(migration, &manifest.name, Agent::enter_arrival);
            }
        }
    }

    fn undecided(&self, migration: &str, _manifest: &Manifest) {
        arrivals::look_after(&self.agent, migration);
    }

    fn recovers(&self, migration: &str) -> bool {
        self.agent.recovering.has(migration)
    }

    fn gone(&self, migration: &str, manifest: &Manifest) {
        if let Err(answer) = self.agent.forget_arrival(migration, &manifest.name) {
            tracing::error!(
                migration,
                workload = manifest.name,
                "Cannot take the entry of an arrival back; it is tried again: {answer}"
            );
            self.agent.try_again(migration, &manifest.name, Agent::forget_arrival);
        }
    }
}

impl Agent {
    /// The workload of an arrival runs here. Harmless when it was entered before.
    fn enter_arrival(&self, migration: &str, name: &str) -> super::answer::Result<()> {
        let entered = self.registry.change(name, |entry| {
            let arrives = matches!(entry.state, State::Incoming | State::Unresolved);
            if arrives && entry.migration.as_deref() == Some(migration) {
                entry.becomes_running();
            }
        });
        match entered {
            Ok(_) | Err(RegistryError::Unknown(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Goes on trying to note how an arrival ended, beside everything else: a disk that is full now may not
    /// stay so.
    fn try_again(self: &Arc<Self>, migration: &str, name: &str, note: Note) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (agent, migration, name) = (Arc::clone(self), migration.to_owned(), name.to_owned());
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(NOTE_AGAIN).await;
                let (asked, of, whose) = (Arc::clone(&agent), migration.clone(), name.clone());
                let noted = blocking(move || note(&asked, &of, &whose)).await;
                match noted.and_then(|noted| noted) {
                    Ok(()) => return,
                    Err(answer) => {
                        tracing::debug!(
                            migration,
                            workload = name,
                            "Still cannot note it: {answer}"
                        );
                    }
                }
            }
        });
    }

    /// Takes back what an arrival that came to nothing left: keeper's leftovers, directory, entry.
    /// An earlier stay's entry is put back. Harmless when there is nothing.
    pub(crate) fn forget_arrival(&self, migration: &str, name: &str) -> super::answer::Result<()> {
        let Some(workload) = self.registry.get(name)? else { return Ok(()) };
        // Unresolved is one whose host restarted at the wrong moment, until an operator gives it up.
        let arrives = matches!(workload.state, State::Incoming | State::Unresolved);
        if !arrives || workload.migration.as_deref() != Some(migration) {
            return Ok(());
        }
        let place = self.place(&workload);
        self.backends.of(workload.kind)?.sweep(&workload.spec, &place)?;
        super::restores::take_back_files(&place);
        self.state_dir.remove_place(&place)?;
        match workload.earlier {
            Some(earlier) => {
                self.registry.change(name, |entry| *entry = *earlier)?;
            }
            None => self.registry.remove(name)?,
        }
        Ok(())
    }
}

/// Where each tree of `manifest` goes: mapped by the longest fitting OLD=NEW of the user, else of the
/// configuration, else where it stood.
fn place(
    manifest: &Manifest,
    asked: &[(PathBuf, PathBuf)],
    configured: &[(PathBuf, PathBuf)],
    state_dir: &Path,
) -> std::result::Result<Vec<PlacedTree>, Vec<Refusal>> {
    let mut refusals = Vec::new();
    if manifest.files.len() > TREES_MAX {
        let text = format!("A workload with {} file trees", manifest.files.len());
        return Err(vec![Refusal::new(RefusalCode::Request, text)]);
    }
    let mut placed: Vec<PlacedTree> = Vec::new();
    for tree in &manifest.files {
        let old = Path::new(&tree.path);
        if !is_plain_absolute(old) {
            let text = format!("{:?} is not an absolute path without `..`", tree.path);
            refusals.push(Refusal::new(RefusalCode::Request, text));
            continue;
        }
        let named = mapped(old, asked).or_else(|| mapped(old, configured));
        let default = if tree.place.is_empty() { old } else { Path::new(&tree.place) };
        // Only people may name a place where the host itself looks for what it runs.
        let is_trap = named.is_none() && is_obeyed(default);
        let path = named.unwrap_or_else(|| default.to_owned());
        if let Some(why) = unfit(&path, tree.role(), &placed, state_dir) {
            let text = format!("{} cannot go to {}: {why}", tree.path, path.display());
            refusals.push(Refusal::new(RefusalCode::Request, text));
        } else if is_trap {
            let text = format!(
                "{0} does not go there unasked: the host runs, or believes, what it finds there. \
                 Map it with --path {0}=NEW, or name the place itself with --path {0}={0}",
                tree.path
            );
            refusals.push(Refusal::new(RefusalCode::Request, text));
        }
        placed.push(PlacedTree { tree: tree.clone(), path });
    }
    if refusals.is_empty() { Ok(placed) } else { Err(refusals) }
}

fn mapped(path: &Path, mappings: &[(PathBuf, PathBuf)]) -> Option<PathBuf> {
    let fits = |(old, new): &(PathBuf, PathBuf)| {
        let rest = path.strip_prefix(old).ok()?;
        // Joining nothing would leave a slash at the end.
        let new = if rest.as_os_str().is_empty() { new.clone() } else { new.join(rest) };
        Some((old.components().count(), new))
    };
    mappings.iter().filter_map(fits).max_by_key(|(length, _)| *length).map(|(_, new)| new)
}

/// Whether the host itself reads and obeys what is at `path`: programs, units, tables of jobs, keys of
/// those who may log in. A kernel in `/boot` is only booted by people.
fn is_obeyed(path: &Path) -> bool {
    let below = |top: &str| path.starts_with(top);
    let is_hidden =
        |part: std::path::Component<'_>| part.as_os_str().as_encoded_bytes().first() == Some(&b'.');
    let of_home = match path.components().nth(1) {
        Some(top) if top.as_os_str() == "root" => path.components().nth(2),
        Some(top) if top.as_os_str() == "home" => path.components().nth(3),
        _ => None,
    };
    (is_system(path) && !below("/boot"))
        || ["/var/spool", "/run/systemd", "/run/udev"].into_iter().any(below)
        || of_home.is_some_and(is_hidden)
}

fn unfit(
    path: &Path,
    role: FileRole,
    placed: &[PlacedTree],
    state_dir: &Path,
) -> Option<&'static str> {
    let below = |top: &str| path.starts_with(top);
    // What is mounted into a container is often mounted at the top.
    let depth = if role.is_volume() { 2 } else { 3 };
    if !is_plain_absolute(path) || path.components().count() < depth {
        return Some("files go at least one directory below the top");
    }
    if below("/proc") || below("/sys") || below("/dev") {
        return Some("that is no place for files");
    }
    if path.starts_with(state_dir) || state_dir.starts_with(path) {
        return Some("the agent's state is there");
    }
    let overlaps =
        |other: &PlacedTree| other.path.starts_with(path) || path.starts_with(&other.path);
    placed.iter().any(overlaps).then_some("another file of this workload goes there")
}

/// Why a tree that stands here cannot be used as it is by one more workload.
fn unfit_to_share(placed: &PlacedTree, others: &[Workload]) -> Option<String> {
    let overlaps = |file: &FileEntry| {
        file.path.starts_with(&placed.path) || placed.path.starts_with(&file.path)
    };
    let volumes = [FileRole::Volume, FileRole::VolumeFile].map(role_word);
    let owned = |file: &FileEntry| overlaps(file) && !volumes.contains(&file.role.as_str());
    if let Some(other) = others.iter().find(|other| other.files.iter().any(owned)) {
        return Some(format!("it is part of workload {}, or the other way round", other.name));
    }
    if !placed.tree.live {
        return None;
    }
    match nix::unistd::access(&placed.path, nix::unistd::AccessFlags::W_OK) {
        Ok(()) => None,
        Err(error) => Some(format!("it cannot be written there ({error})")),
    }
}

/// The workload among `others` that is in the way of a tree.
fn other_user_of<'a>(placed: &PlacedTree, others: &'a [Workload]) -> Option<&'a Workload> {
    let uses = |other: &&Workload| user_of(&placed.path, std::slice::from_ref(*other)).is_some();
    others.iter().find(|other| uses(other) && !is_shared_file(placed, other))
}

/// Whether the tree is a file that nobody writes and that `other` stands on too, as two machines on
/// one kernel. That it is the very same content is seen when it arrives.
fn is_shared_file(placed: &PlacedTree, other: &Workload) -> bool {
    let role = placed.tree.role();
    let is_file = matches!(role, FileRole::Kernel | FileRole::Initrd);
    let is_same =
        |file: &FileEntry| file.path == placed.path && file.role != role_word(FileRole::Bundle);
    is_file && !placed.tree.live && other.files.iter().any(is_same)
}

/// The device behind `path`, or behind the nearest directory above it that exists.
fn device_of(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    path.ancestors().find_map(|above| above.metadata().ok()).map_or(0, |found| found.dev())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::super::testing::{Bench, MIGRATION, UUID, keeper};
    use super::*;
    use decamp_shared::workload::FileTree;

    fn manifest(paths: &[&str]) -> Manifest {
        let tree = |(id, path): (usize, &&str)| FileTree {
            id: id as u32,
            role: FileRole::Bundle.into(),
            path: (*path).to_owned(),
            bytes: 1,
            live: true,
            ..FileTree::default()
        };
        Manifest { files: paths.iter().enumerate().map(tree).collect(), ..Manifest::default() }
    }

    fn placed(paths: &[&str], asked: &[(&str, &str)], configured: &[(&str, &str)]) -> Vec<String> {
        let pairs = |list: &[(&str, &str)]| -> Vec<(PathBuf, PathBuf)> {
            list.iter().map(|(old, new)| (old.into(), new.into())).collect()
        };
        let state = Path::new("/var/lib/decamp");
        match place(&manifest(paths), &pairs(asked), &pairs(configured), state) {
            Ok(placed) => placed.iter().map(|one| one.path.display().to_string()).collect(),
            Err(refusals) => refusals.into_iter().map(|one| one.text).collect(),
        }
    }

    #[test]
    fn nothing_comes_back_where_its_old_copy_is_still_kept() {
        let bench = Bench::new();
        let web = bench.enter(State::Moved);
        let host = ArrivalHost::new(Arc::clone(&bench.agent));
        let manifest = Manifest {
            name: "web".into(),
            uuid: UUID.into(),
            kind: Kind::Vm.into(),
            ..Manifest::default()
        };
        let keeper = keeper(&bench.agent.place(&web));
        let refusals = host.preflight(&manifest, &[]);
        assert_eq!(refusals.len(), 1, "{refusals:?}");
        assert_eq!(refusals[0].code(), RefusalCode::Busy);
        assert!(refusals[0].text.contains("still being taken away"), "{}", refusals[0].text);
        drop(keeper);
        assert!(host.preflight(&manifest, &[]).is_empty());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn how_it_ended_is_noted_when_that_is_possible_again() {
        let manifest = Manifest { name: "web".into(), ..Manifest::default() };
        let bench = Bench::new();
        let host = ArrivalHost::new(Arc::clone(&bench.agent));
        bench.enter(State::Incoming);
        bench.fill_disk(State::Running);
        host.running(MIGRATION, &manifest);
        assert_eq!(bench.state(), Some(State::Incoming));
        bench.free_disk();
        bench.until("another try", |bench| bench.state() == Some(State::Running)).await;

        let bench = Bench::new();
        let host = ArrivalHost::new(Arc::clone(&bench.agent));
        bench.enter(State::Incoming);
        bench.backend.cannot_sweep.store(true, Ordering::SeqCst);
        host.gone("another", &manifest);
        host.gone(MIGRATION, &manifest);
        assert_eq!(bench.state(), Some(State::Incoming));
        bench.backend.cannot_sweep.store(false, Ordering::SeqCst);
        bench.until("another try", |bench| bench.state().is_none()).await;
    }

    #[test]
    fn of_two_that_want_one_place_only_one_is_entered() {
        let bench = Bench::new();
        let host = ArrivalHost::new(Arc::clone(&bench.agent));
        let tree = manifest(&["/srv/a"]).files.remove(0);
        let trees = [PlacedTree { tree, path: "/srv/a".into() }];
        let enter = |name: &str, uuid: &str| {
            let spec = serde_json::json!({});
            let mut incoming = Workload::new(name, uuid, Kind::Vm, spec, State::Incoming);
            incoming.files = trees.iter().map(|placed| entry(&placed.tree, &placed.path)).collect();
            host.enter(incoming, &trees)
        };
        enter("web", UUID).expect("the first");
        let error = enter("mail", "another").expect_err("the second").to_string();
        assert!(error.contains("/srv/a is used by workload web"), "{error}");
        assert_eq!(bench.agent.registry.get("mail").expect("reads"), None);
    }

    #[test]
    fn files_keep_their_path_unless_mapped() {
        assert_eq!(placed(&["/srv/a"], &[], &[]), ["/srv/a"]);
        assert_eq!(placed(&["/srv/a"], &[("/srv", "/data")], &[]), ["/data/a"]);
        assert_eq!(placed(&["/srv/a"], &[("/srv/a", "/data/b")], &[]), ["/data/b"]);
        assert_eq!(placed(&["/srv/ab"], &[("/srv/a", "/data/b")], &[]), ["/srv/ab"]);
    }

    #[test]
    fn the_longest_mapping_wins_and_the_users_before_the_hosts() {
        let both = [("/srv", "/x"), ("/srv/a", "/y/z")];
        assert_eq!(placed(&["/srv/a/k"], &both, &[]), ["/y/z/k"]);
        assert_eq!(placed(&["/srv/a/k"], &[], &both), ["/y/z/k"]);
        assert_eq!(placed(&["/srv/a/k"], &[("/srv", "/mine")], &both), ["/mine/a/k"]);
    }

    #[test]
    fn a_peer_cannot_name_places_that_are_not_for_files() {
        for bad in ["relative", "/srv/../etc/x", "/", "/srv", "/proc/1", "/dev/shm/x", ""] {
            assert!(placed(&[bad], &[], &[])[0].contains(' '), "{bad}");
        }
        assert!(placed(&["/var/lib/decamp/registry.db"], &[], &[])[0].contains("agent's state"));
        assert!(placed(&["/var/lib"], &[], &[])[0].contains("agent's state"));
        assert!(placed(&["/srv/a", "/srv/a/b"], &[], &[])[0].contains("another file"));
        let many = vec!["/srv/a"; TREES_MAX + 1];
        assert!(placed(&many, &[], &[])[0].contains("file trees"));
    }

    #[test]
    fn what_the_host_obeys_is_only_put_where_people_said_so() {
        for obeyed in [
            "/etc/cron.d/x",
            "/usr/lib/systemd/system/x.service",
            "/root/.ssh/authorized_keys",
            "/home/ada/.bashrc",
            "/var/spool/cron/root",
        ] {
            assert!(placed(&[obeyed], &[], &[])[0].contains("--path"), "{obeyed}");
            assert_eq!(placed(&[obeyed], &[(obeyed, obeyed)], &[]), [obeyed]);
            assert_eq!(placed(&[obeyed], &[], &[(obeyed, "/srv/x")]), ["/srv/x"]);
        }
        for fit in ["/boot/vmlinuz", "/root/vm/kernel", "/home/ada/web", "/var/lib/web/a"] {
            assert_eq!(placed(&[fit], &[], &[]), [fit]);
        }
    }

    #[test]
    fn a_mapping_out_of_bounds_is_refused_too() {
        assert!(placed(&["/srv/a"], &[("/srv", "/proc/x")], &[])[0].contains("no place for files"));
    }
}
