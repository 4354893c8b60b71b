//! What becomes of each file tree of a move: copied, or shared by both hosts. The source enters what the
//! user said; the destination judges it, for only it can see whether both mean the very same storage.

use std::path::{Path, PathBuf};

use super::MoveOptions;
use crate::files::{has_probe, is_same_place, is_within_probed, looks_the_same, tree_bytes};
use crate::protocol::manifest::FileRole;
use crate::workload::{FileTree, PlacedTree, Refusal, RefusalCode, Storage};

/// `trees` with what `options` say of each.
///
/// # Errors
/// Every word that fits no tree, or not the tree that it is said of.
pub fn said(
    mut trees: Vec<FileTree>,
    options: &MoveOptions,
) -> std::result::Result<Vec<FileTree>, Vec<Refusal>> {
    let mut refusals = Vec::new();
    let mut refuse = |text: String| refusals.push(Refusal::new(RefusalCode::Request, text));
    // What is said of a tree where it was made counts for less than what is said of the move.
    if let Some(word) = options.storage {
        let spoken_of = trees.iter_mut().filter(|tree| tree.role().is_storage());
        spoken_of.for_each(|tree| tree.storage = word.into());
    }
    let mut named = vec![None; trees.len()];
    for (path, word) in &options.storage_of {
        let Some(number) = trees.iter().position(|tree| is_called(tree, path)) else {
            let known = mounts(&trees);
            refuse(format!("--storage {}: nothing is mounted there ({known})", path.display()));
            continue;
        };
        let tree = &mut trees[number];
        let fixed = !(tree.role().is_storage() || tree.role() == FileRole::Bundle);
        if fixed && *word != Storage::Copy {
            refuse(format!("{} is always copied", tree.path));
        } else if named[number].is_some_and(|before| before != *word) {
            refuse(format!(
                "--storage says two things of {}, which is one tree to whoever moves it ({})",
                tree.path,
                tree.mounts.join(", ")
            ));
        }
        named[number] = Some(*word);
        tree.storage = (*word).into();
    }
    if refusals.is_empty() { Ok(trees) } else { Err(refusals) }
}

/// Counts what is to be copied and was not counted yet.
///
/// # Errors
/// Every tree that cannot be copied.
pub(super) fn measure(trees: &mut [FileTree]) -> std::result::Result<(), Vec<Refusal>> {
    let mut refusals = Vec::new();
    // A disk has said what it holds.
    let copied = |tree: &&mut FileTree| tree.role().is_volume() && tree.storage() == Storage::Copy;
    for tree in trees.iter_mut().filter(copied) {
        match tree_bytes(Path::new(&tree.path)) {
            Ok(bytes) => tree.bytes = bytes,
            Err(error) => {
                let text = super::error::chain(&error);
                refusals.push(Refusal::new(RefusalCode::File, format!("{text} ({})", shown(tree))));
            }
        }
    }
    if refusals.is_empty() { Ok(()) } else { Err(refusals) }
}

/// What the destination did not object to: what nobody spoke of is shared.
pub(super) fn accepted(trees: &mut [FileTree]) {
    let unsaid =
        |tree: &&mut FileTree| tree.role().is_storage() && tree.storage() == Storage::Unsaid;
    for tree in trees.iter_mut().filter(unsaid) {
        tree.storage = Storage::Shared.into();
    }
}

/// Decides for each tree what becomes of it at `host`. `probes` are what the source left to be found.
/// Gives what speaks against it.
pub(super) fn judge(trees: &mut [PlacedTree], probes: &[String], host: &str) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    for (number, placed) in trees.iter_mut().enumerate() {
        let probe = probes.get(number).map_or("", String::as_str);
        match decide(placed, probe, host) {
            Ok(storage) => placed.tree.storage = storage.into(),
            Err(refusal) => refusals.push(refusal),
        }
    }
    refusals
}

fn decide(placed: &PlacedTree, probe: &str, host: &str) -> std::result::Result<Storage, Refusal> {
    let (tree, there) = (&placed.tree, placed.path.display());
    let path = &placed.path;
    // What nobody writes may be told by what it looks like, where no probe could be left.
    let alike = !tree.live && looks_the_same(path, probe);
    let (same, within) = match tree.role() {
        FileRole::Volume => (alike || has_probe(path, probe), is_within_probed(path, probe)),
        _ => (alike || is_same_place(path, probe), false),
    };
    let refuse = |code, text| Err(Refusal::new(code, text));
    let volume = tree.role().is_storage();
    let word = tree.mounts.first().unwrap_or(&tree.path);
    match (Storage::try_from(tree.storage), volume) {
        (Err(_), _) => refuse(
            RefusalCode::Unsupported,
            format!("{} is to be stored in a way that {host} does not know", tree.path),
        ),
        (Ok(Storage::Shared), _) | (Ok(Storage::Unsaid), true) if same => Ok(Storage::Shared),
        (Ok(Storage::Shared), _) => refuse(
            RefusalCode::File,
            format!(
                "{there} at {host} is not seen to be the same storage as {} at the source: mount it \
                 there, or copy it with --storage {word}=copy",
                shown(tree)
            ),
        ),
        (Ok(Storage::Unsaid), true) => refuse(
            RefusalCode::Request,
            format!(
                "Nothing says what becomes of {}: --storage {word}=copy copies it; --storage \
                 {word}=shared is for what both hosts have mounted from the same storage",
                shown(tree)
            ),
        ),
        // A file that nobody writes is used as it is.
        (Ok(_), _) if (same || within) && (tree.live || volume) => refuse(
            RefusalCode::SameFile,
            format!(
                "{there} at {host} is the very same place as at the source: it would be written onto \
                 itself. Say --storage {word}=shared, or give another with --path {}=NEW",
                tree.path
            ),
        ),
        // The source has a device there, and the copy would take memory of this host's.
        (Ok(_), _) if tree.role() == FileRole::Disk && is_among_devices(path) => refuse(
            RefusalCode::File,
            format!(
                "{there} at {host} would be a file among devices: give the copy another place with \
                 --path {}=NEW",
                tree.path
            ),
        ),
        (Ok(_), _) => Ok(Storage::Copy),
    }
}

fn is_among_devices(path: &Path) -> bool {
    path.starts_with("/dev") && !path.starts_with("/dev/shm")
}

/// A tree and where it is seen, for people.
fn shown(tree: &FileTree) -> String {
    match &tree.mounts[..] {
        [] => tree.path.clone(),
        mounts => format!("{}, mounted at {}", tree.path, mounts.join(", ")),
    }
}

fn mounts(trees: &[FileTree]) -> String {
    let known: Vec<_> = trees.iter().filter(|tree| tree.role().is_storage()).map(shown).collect();
    match known.is_empty() {
        true => "nothing from outside is mounted into it".to_owned(),
        false => format!("it has {}", known.join("; ")),
    }
}

/// Whether `path` names the tree, in whichever way. A slash at its end says nothing.
fn is_called(tree: &FileTree, path: &Path) -> bool {
    let plain = |text: &str| {
        text.parse::<PathBuf>().is_ok_and(|own| own.components().eq(path.components()))
    };
    plain(&tree.path) || tree.mounts.iter().any(|mount| plain(mount))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(role: FileRole, path: &str, mounts: &[&str]) -> FileTree {
        FileTree {
            role: role.into(),
            path: path.into(),
            live: true,
            mounts: mounts.iter().map(|mount| (*mount).to_owned()).collect(),
            ..FileTree::default()
        }
    }

    fn trees() -> Vec<FileTree> {
        vec![
            tree(FileRole::Bundle, "/srv/web", &[]),
            tree(FileRole::Volume, "/mnt/data", &["/data", "/again/"]),
            tree(FileRole::VolumeFile, "/mnt/conf", &["/etc/conf"]),
        ]
    }

    fn options(all: Option<Storage>, of: &[(&str, Storage)]) -> MoveOptions {
        MoveOptions {
            storage: all,
            storage_of: of.iter().map(|(path, word)| (path.into(), *word)).collect(),
            ..MoveOptions::default()
        }
    }

    fn words(options: &MoveOptions) -> Vec<Storage> {
        said(trees(), options).expect("understood").iter().map(FileTree::storage).collect()
    }

    fn refused(options: &MoveOptions) -> String {
        said(trees(), options).expect_err("refused").remove(0).text
    }

    #[test]
    fn the_nearest_word_counts() {
        use Storage::{Copy, Shared, Unsaid};
        assert_eq!(words(&options(None, &[])), [Unsaid; 3]);
        assert_eq!(words(&options(Some(Shared), &[])), [Unsaid, Shared, Shared]);
        assert_eq!(words(&options(Some(Shared), &[("/again", Copy)])), [Unsaid, Copy, Shared]);
        assert_eq!(words(&options(None, &[("/mnt/data/", Copy)])), [Unsaid, Copy, Unsaid]);
        assert_eq!(words(&options(None, &[("/srv/web", Shared)])), [Shared, Unsaid, Unsaid]);
        let twice = [("/data", Copy), ("/again", Copy)];
        assert_eq!(words(&options(None, &twice)), [Unsaid, Copy, Unsaid]);
    }

    #[test]
    fn a_disk_has_a_word_of_its_own_and_is_told_of_all_others() {
        use Storage::{Copy, Shared, Unsaid};
        let own = FileTree {
            storage: Shared.into(),
            space: 1,
            ..tree(FileRole::Disk, "/srv/own.img", &[])
        };
        let other = FileTree { space: 2, ..tree(FileRole::Disk, "/srv/other.img", &[]) };
        let words = |options: &MoveOptions| {
            let said = said(vec![own.clone(), other.clone()], options).expect("understood");
            said.iter().map(|tree| (tree.storage(), tree.is_paged())).collect::<Vec<_>>()
        };
        assert_eq!(words(&options(None, &[])), [(Shared, false), (Unsaid, false)]);
        assert_eq!(words(&options(Some(Copy), &[])), [(Copy, true), (Copy, true)]);
        let one = [("/srv/own.img", Copy)];
        assert_eq!(words(&options(None, &one)), [(Copy, true), (Unsaid, false)]);
        let placed = PlacedTree { tree: other, path: "/srv/other.img".into() };
        let refused = decide(&placed, "", "beta").expect_err("nobody said");
        assert!(refused.text.contains("--storage /srv/other.img=copy"), "{}", refused.text);
    }

    #[test]
    fn a_copy_of_a_device_goes_to_a_file() {
        let copy = |path: &str| {
            let tree = FileTree {
                storage: Storage::Copy.into(),
                space: 1,
                ..tree(FileRole::Disk, "/dev/vg/web", &[])
            };
            decide(&PlacedTree { tree, path: path.into() }, "", "beta")
        };
        let refused = copy("/dev/vg/web").expect_err("there are devices");
        assert!(refused.text.contains("--path /dev/vg/web=NEW"), "{}", refused.text);
        for path in ["/srv/web.img", "/dev/shm/web.img", "/devices/web.img"] {
            assert_eq!(copy(path).expect("a file"), Storage::Copy, "{path}");
        }
    }

    #[test]
    fn a_word_for_no_mount_and_two_words_for_one_are_refused() {
        use Storage::{Copy, Shared};
        let text = refused(&options(None, &[("/date", Copy)]));
        assert!(text.contains("/date") && text.contains("/mnt/data, mounted at /data"), "{text}");
        let text = refused(&options(None, &[("/data", Copy), ("/again", Shared)]));
        assert!(text.contains("two things"), "{text}");
    }

    fn placed(role: FileRole, path: &Path, storage: i32) -> PlacedTree {
        let tree = FileTree { storage, ..tree(role, "/mnt/data", &["/data"]) };
        PlacedTree { tree, path: path.to_owned() }
    }

    #[test]
    fn the_destination_believes_its_eyes() {
        use crate::files::Probe;
        let directory = tempfile::tempdir().expect("a directory");
        let here = directory.path().join("here");
        let elsewhere = directory.path().join("elsewhere");
        std::fs::create_dir(&here).and_then(|()| std::fs::create_dir(&elsewhere)).expect("made");
        let probe = Probe::inside(&here).expect("a probe");
        let decided = |path: &Path, storage: i32| {
            decide(&placed(FileRole::Volume, path, storage), probe.name(), "beta")
                .map_err(|refusal| refusal.code())
        };
        let number = i32::from;
        for word in [Storage::Shared, Storage::Unsaid] {
            assert_eq!(decided(&here, number(word)), Ok(Storage::Shared));
        }
        assert_eq!(decided(&here, number(Storage::Copy)), Err(RefusalCode::SameFile));
        // Into itself would be no better.
        assert_eq!(decided(&here.join("in"), number(Storage::Copy)), Err(RefusalCode::SameFile));
        assert_eq!(decided(&here.join("in"), number(Storage::Shared)), Err(RefusalCode::File));
        assert_eq!(decided(&elsewhere, number(Storage::Copy)), Ok(Storage::Copy));
        assert_eq!(decided(&elsewhere, number(Storage::Shared)), Err(RefusalCode::File));
        assert_eq!(decided(&elsewhere, number(Storage::Unsaid)), Err(RefusalCode::Request));
        assert_eq!(decided(&elsewhere, 7), Err(RefusalCode::Unsupported));
        let nothing = decide(&placed(FileRole::Volume, &here, 2), "", "beta");
        assert!(nothing.is_err(), "without a probe nothing is proved");
    }
}
