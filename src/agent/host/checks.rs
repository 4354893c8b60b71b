//! Every reason against the coming of a workload that this host finds by itself: who it is, where its
//! files go, and the room for them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use decamp_shared::files::{check_place, free_bytes};
use decamp_shared::session::DestinationHost;
use decamp_shared::workload::{FileRole, Manifest, PlacedTree, Refusal, RefusalCode, Storage};

use super::ArrivalHost;
use crate::agent::answer::chain;
use crate::agent::leftovers::user_of;
use crate::agent::registry::Workload;
use crate::agent::supervise::is_gone;
use crate::backend::role_word;
use crate::messages::{FileEntry, State, is_workload_name};

/// How long an arrival that was given up may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(5);

impl ArrivalHost {
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

    pub(super) fn check_identity(&self, manifest: &Manifest, refusals: &mut Vec<Refusal>) {
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

    pub(super) fn check_paths(
        &self,
        manifest: &Manifest,
        trees: &[PlacedTree],
        refusals: &mut Vec<Refusal>,
    ) {
        let mut others = self.agent.registry.list().unwrap_or_default();
        others.retain(|other| other.uuid != manifest.uuid);
        let host = &self.agent.config.name;
        // What nobody said a word of is refused for that.
        let unsaid = |placed: &&PlacedTree| {
            placed.tree.role().is_storage() && placed.tree.storage() == Storage::Unsaid
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
    pub(super) fn check_disk(
        &self,
        manifest: &Manifest,
        trees: &[PlacedTree],
        refusals: &mut Vec<Refusal>,
    ) {
        let mut needed: BTreeMap<u64, (u64, &Path)> = BTreeMap::new();
        // An earlier copy of what comes as pages stays until the new one is whole.
        let stays =
            |placed: &PlacedTree| self.known_copy(manifest, placed) && !placed.tree.is_paged();
        let comes =
            |placed: &&PlacedTree| placed.tree.storage() != Storage::Shared && !stays(placed);
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
}

/// Why a tree that stands here cannot be used as it is by one more workload.
pub(super) fn unfit_to_share(placed: &PlacedTree, others: &[Workload]) -> Option<String> {
    let overlaps = |file: &FileEntry| {
        file.path.starts_with(&placed.path) || placed.path.starts_with(&file.path)
    };
    let volumes = [FileRole::Volume, FileRole::VolumeFile].map(role_word);
    let is_read = |file: &FileEntry| is_read_only_disk(placed) && file.path == placed.path;
    let owned = |file: &FileEntry| {
        overlaps(file) && !volumes.contains(&file.role.as_str()) && !is_read(file)
    };
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
pub(super) fn other_user_of<'a>(
    placed: &PlacedTree,
    others: &'a [Workload],
) -> Option<&'a Workload> {
    let uses = |other: &&Workload| user_of(&placed.path, std::slice::from_ref(*other)).is_some();
    others.iter().find(|other| uses(other) && !is_shared_file(placed, other))
}

/// Whether the tree is a file that nobody writes and that `other` stands on too, as two machines on
/// one kernel. That it is the very same content is seen when it arrives.
fn is_shared_file(placed: &PlacedTree, other: &Workload) -> bool {
    let role = placed.tree.role();
    let is_file = matches!(role, FileRole::Kernel | FileRole::Initrd | FileRole::Disk);
    let is_same =
        |file: &FileEntry| file.path == placed.path && file.role != role_word(FileRole::Bundle);
    is_file && !placed.tree.live && other.files.iter().any(is_same)
}

/// Whether it is a disk that the VM only reads: several may, and whoever writes it has a lock.
fn is_read_only_disk(placed: &PlacedTree) -> bool {
    placed.tree.role() == FileRole::Disk && !placed.tree.live
}

/// The device behind `path`, or behind the nearest directory above it that exists.
pub(in crate::agent) fn device_of(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    path.ancestors().find_map(|above| above.metadata().ok()).map_or(0, |found| found.dev())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use decamp_shared::workload::Kind;

    use super::*;
    use crate::agent::testing::{Bench, UUID, keeper};

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
}
