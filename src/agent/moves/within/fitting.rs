//! What speaks against moving disks to other places of this host. Touches nothing.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use decamp_shared::files::{check_place, free_bytes};
use decamp_shared::workload::{FileRole, FileTree, PlacedTree, Refusal, RefusalCode, Storage};

use crate::agent::Agent;
use crate::agent::answer::chain;
use crate::agent::host::{device_of, unfit};
use crate::agent::leftovers::user_of;
use crate::agent::registry::Workload;
use crate::messages::FileEntry;

/// Which of `trees`, the files of `workload`, go where by `paths`, old and new.
///
/// # Errors
/// Everything that speaks against it: of several disks all move, or none.
pub(super) fn fit(
    agent: &Agent,
    workload: &Workload,
    trees: &[FileTree],
    paths: &[(PathBuf, PathBuf)],
) -> Result<Vec<PlacedTree>, Vec<Refusal>> {
    let others = match agent.registry.list() {
        Ok(mut others) => {
            others.retain(|other| other.uuid != workload.uuid);
            others
        }
        Err(error) => return Err(vec![Refusal::new(RefusalCode::Other, chain(&error))]),
    };
    let (mut placed, mut refusals) = (Vec::<PlacedTree>::new(), Vec::new());
    for (old, new) in paths {
        let fits = disk(trees, old).and_then(|tree| {
            if placed.iter().any(|one| one.tree.path == tree.path) {
                let text = format!("{} cannot go to two places", old.display());
                return Err(Refusal::new(RefusalCode::Request, text));
            }
            may_leave(tree, &workload.files)?;
            may_come(tree, new, &placed, &others, &agent.config.state_dir)?;
            Ok(PlacedTree { tree: tree.clone(), path: new.clone() })
        });
        match fits {
            Ok(one) => placed.push(one),
            Err(refusal) => refusals.push(refusal),
        }
    }
    refusals.extend(lacking_room(&placed));
    if refusals.is_empty() { Ok(placed) } else { Err(refusals) }
}

/// The disk at `old`.
fn disk<'t>(trees: &'t [FileTree], old: &Path) -> Result<&'t FileTree, Refusal> {
    let disks = || trees.iter().filter(|tree| tree.role() == FileRole::Disk);
    let is_it = |tree: &&FileTree| Path::new(&tree.path).components().eq(old.components());
    disks().find(is_it).ok_or_else(|| {
        let known: Vec<_> = disks().map(|tree| tree.path.as_str()).collect();
        let known = match known.is_empty() {
            true => "it has no disk".to_owned(),
            false => format!("its disks are {}", known.join(", ")),
        };
        let text = format!(
            "{} is no disk of it, and only disks move within a host ({known})",
            old.display()
        );
        Refusal::new(RefusalCode::Request, text)
    })
}

/// Whether the disk of `tree` can leave its place, where `files` are what the registry knows of it.
fn may_leave(tree: &FileTree, files: &[FileEntry]) -> Result<(), Refusal> {
    let path = &tree.path;
    let shared = tree.storage() == Storage::Shared
        || files.iter().any(|file| file.shared && file.path == Path::new(path));
    if shared {
        let text = format!(
            "{path} is shared with other hosts, or may be: a copy of it here would be this host's \
             alone. Only disks that are not shared move within a host"
        );
        return Err(Refusal::new(RefusalCode::Unsupported, text));
    }
    if !tree.live {
        let text = format!(
            "{path} is only read by its guest: copy the file, and run the VM with the copy when it \
             is started next"
        );
        return Err(Refusal::new(RefusalCode::Unsupported, text));
    }
    Ok(())
}

/// Whether a file for `tree` can be made at `new`, beside what was `placed` before it.
fn may_come(
    tree: &FileTree,
    new: &Path,
    placed: &[PlacedTree],
    others: &[Workload],
    state_dir: &Path,
) -> Result<(), Refusal> {
    let refuse = |code: RefusalCode, text: String| Err(Refusal::new(code, text));
    let (old, shown) = (&tree.path, new.display());
    if let Ok(found) = fs::symlink_metadata(new) {
        let there = fs::metadata(new).unwrap_or(found);
        let same =
            fs::metadata(old).is_ok_and(|old| (old.dev(), old.ino()) == (there.dev(), there.ino()));
        if same {
            return refuse(RefusalCode::SameFile, format!("{shown} is where {old} is already"));
        }
        let what = if there.file_type().is_block_device() { " as a block device" } else { "" };
        let text = format!(
            "{shown} exists{what}: a disk moves to a new file, and nothing is overwritten. Name one that \
             does not exist"
        );
        return refuse(RefusalCode::PathTaken, text);
    }
    if let Some(why) = unfit(new, FileRole::Disk, placed, state_dir) {
        return refuse(RefusalCode::Request, format!("{old} cannot go to {shown}: {why}"));
    }
    let around = new.parent().unwrap_or(Path::new("/"));
    if !around.is_dir() {
        let text = format!("There is no directory {}: make it first", around.display());
        return refuse(RefusalCode::File, text);
    }
    if let Some(why) = check_place(tree, new, false) {
        return refuse(RefusalCode::File, why);
    }
    match user_of(new, others) {
        Some(other) => {
            refuse(RefusalCode::PathTaken, format!("{shown} is used by workload {}", other.name))
        }
        None => Ok(()),
    }
}

/// File systems that have no room for what is to come to them.
fn lacking_room(placed: &[PlacedTree]) -> Vec<Refusal> {
    let mut needed: BTreeMap<u64, (u64, &Path)> = BTreeMap::new();
    for one in placed {
        let entry = needed.entry(device_of(&one.path)).or_insert((0, &one.path));
        entry.0 = entry.0.saturating_add(one.tree.bytes);
    }
    let lacks = |(bytes, path): (u64, &Path)| {
        let shown = path.display();
        let text = match free_bytes(path) {
            Ok(free) if free >= bytes => return None,
            Ok(free) => format!("Not enough room at {shown}: {bytes} bytes needed, {free} free"),
            Err(error) => format!("Cannot tell how much room {shown} has: {error}"),
        };
        Some(Refusal::new(RefusalCode::Disk, text))
    };
    needed.into_values().filter_map(lacks).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::testing::Bench;
    use crate::messages::State;

    fn tree(path: &Path, change: impl FnOnce(&mut FileTree)) -> FileTree {
        let mut tree = FileTree {
            role: FileRole::Disk.into(),
            path: path.display().to_string(),
            live: true,
            bytes: 4096,
            space: 1,
            ..FileTree::default()
        };
        change(&mut tree);
        tree
    }

    #[test]
    fn what_speaks_against_it_is_said() {
        let (bench, dir) = (Bench::new(), tempfile::tempdir().expect("a directory"));
        let mut web = bench.enter(State::Running);
        let at = |name: &str| dir.path().join(name);
        for name in ["a", "b", "ro", "nas", "may", "kernel"] {
            fs::write(at(name), [1; 4096]).expect("written");
        }
        fs::hard_link(at("a"), at("same")).expect("linked");
        std::os::unix::fs::symlink(at("nowhere"), at("link")).expect("linked");
        let may = FileEntry { role: "disk".into(), path: at("may"), shared: true };
        web.files = vec![may];
        let trees = [
            tree(&at("a"), |_| {}),
            tree(&at("b"), |tree| tree.bytes = 1 << 60),
            tree(&at("ro"), |tree| tree.live = false),
            tree(&at("nas"), |tree| tree.storage = Storage::Shared.into()),
            tree(&at("may"), |_| {}),
            tree(&at("kernel"), |tree| tree.role = FileRole::Kernel.into()),
        ];
        let state = bench.agent.config.state_dir.display().to_string();
        let fit = |paths: &[(&str, &str)]| {
            let full = |name: &str| if name.starts_with('/') { name.into() } else { at(name) };
            let paths: Vec<_> = paths.iter().map(|(old, new)| (full(old), full(new))).collect();
            fit(&bench.agent, &web, &trees, &paths)
        };
        let placed = fit(&[("a", "new")]).expect("it fits");
        assert_eq!((placed.len(), &placed[0].path, placed[0].tree.space), (1, &at("new"), 1));
        for (paths, says) in [
            (&[("none", "new")][..], "its disks are"),
            (&[("kernel", "new")], "is no disk of it"),
            (&[("ro", "new")], "only read"),
            (&[("nas", "new")], "shared with other hosts"),
            (&[("may", "new")], "shared with other hosts"),
            (&[("a", "a")], "is already"),
            (&[("a", "same")], "is already"),
            (&[("a", "b")], "nothing is overwritten"),
            (&[("a", "link")], "nothing is overwritten"),
            (&[("a", "none/new")], "There is no directory"),
            (&[("a", "b/new")], "There is no directory"),
            (&[("a", "/new-disk")], "at least one directory"),
            (&[("a", "/proc/1/new")], "no place for files"),
            (&[("a", &format!("{state}/new"))], "the agent's state"),
            (&[("b", "new")], "Not enough room"),
            (&[("a", "new"), ("a", "newer")], "two places"),
            (&[("a", "new"), ("may", "newer")], "shared with other hosts"),
        ] {
            let refusals = fit(paths).expect_err(says);
            assert!(refusals.iter().any(|one| one.text.contains(says)), "{says}: {refusals:?}");
        }
        let both = fit(&[("a", "new"), ("b", "new")]).expect_err("one place");
        assert!(
            both.iter().any(|one| one.text.contains("another file of this workload")),
            "{both:?}"
        );
    }
}
