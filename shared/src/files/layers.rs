//! A tree of two layers: one that stands on this host and what a tar says is different from it, as podman's
//! checkpoints have it. Both become one index, which is checked as a whole before anything is touched; the
//! same checks and the same hands as for any other tree.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::beneath::Root;
use super::error::{Doing, FileError, Result};
use super::index::{Entry, Gathering, Index, IndexPart, Type, path_fault, shown, split};
use super::landing::Landing;
use super::placing::Placing;
use super::tar_landing::{Raw, each};
use super::tar_tree::{TarTree, device_fault};

/// Links followed in one path at most.
const LINKS: usize = 40;

/// What a tar says is different.
#[derive(Debug, Default)]
pub struct Changes {
    entries: Vec<Entry>,
    /// For each of them, the number of the one that it is another name of.
    links: Vec<Option<usize>>,
}

/// A tree of two layers that is then to stand at its place.
#[derive(Debug)]
pub struct LayeredLander {
    path: PathBuf,
    index: Index,
    base: Root,
    /// Files whose content is the base's, by number, with their paths there.
    from_base: Vec<(usize, Vec<u8>)>,
    /// For each entry of the tar, as which number its content goes.
    from_changes: Vec<Option<usize>>,
    /// Files that are made empty.
    empty: Vec<usize>,
    changes: Changes,
    bytes: u64,
}

/// Where an entry is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Base(usize),
    Changes(usize),
    Made(Type),
}

impl Changes {
    /// Lists the changes to a tree that is to stand at `path`. Touches nothing.
    ///
    /// # Errors
    /// [`FileError::Hostile`] when the tar is none, or says what no honest one says.
    pub fn list(path: &Path, from: &mut dyn Read) -> Result<Self> {
        let mut changes = Self::default();
        let mut files: HashMap<Vec<u8>, usize> = HashMap::new();
        let mut seen = BTreeSet::new();
        // What each entry is by itself is looked at as it comes.
        let mut gathering = Gathering::default();
        each(from, &mut |Raw { mut entry, link }, _| {
            let shown = || shown(path, &entry.path);
            if !seen.insert(entry.path.clone()) {
                return Err(FileError::hostile(shown(), "a path twice"));
            }
            if let Some(what) = device_fault(&entry) {
                return Err(FileError::hostile(shown(), what));
            }
            let leader = match link {
                None => None,
                Some(target) => {
                    let what = "a hard link to what is no earlier file";
                    let leader =
                        files.get(&target).ok_or_else(|| FileError::hostile(shown(), what))?;
                    Some(*leader)
                }
            };
            if let Some(leader) = leader {
                entry.size = changes.entries[leader].size;
            } else if entry.kind() == Type::File {
                files.insert(entry.path.clone(), changes.entries.len());
            }
            let xattrs: usize = entry.xattrs.iter().map(|xattr| xattr.value.len()).sum();
            let length = entry.path.len() + entry.target.len() + xattrs + 64;
            gathering.add(
                IndexPart { entries: vec![entry.clone()], removed: Vec::new() },
                length,
                path,
            )?;
            changes.links.push(leader);
            changes.entries.push(entry);
            Ok(())
        })?;
        Ok(changes)
    }
}

impl LayeredLander {
    /// The tree at `base` with what `removed` names (paths below it) taken away and `changes` made, to stand
    /// at `path`. What `wanted` names is made where nothing is: a directory if it says so, else an empty
    /// file. Touches nothing.
    ///
    /// # Errors
    /// When the base cannot be read, or the whole makes no tree.
    pub fn of(
        path: &Path,
        base: &Path,
        changes: Changes,
        removed: &[Vec<u8>],
        wanted: &[(Vec<u8>, bool)],
    ) -> Result<Self> {
        let TarTree { root, entries: below, .. } = TarTree::scan(base, None)?;
        let mut tree: BTreeMap<Vec<u8>, From> = BTreeMap::new();
        for (number, entry) in below.iter().enumerate() {
            tree.insert(entry.path.clone(), From::Base(number));
        }
        for gone in removed {
            if let Some(fault) = path_fault(gone) {
                return Err(FileError::hostile(shown(path, gone), fault));
            }
            take_out(&mut tree, gone);
        }
        for (number, entry) in changes.entries.iter().enumerate() {
            if entry.kind() != Type::Directory {
                take_out(&mut tree, &entry.path);
            }
            make_parents(&mut tree, &entry.path);
            tree.insert(entry.path.clone(), From::Changes(number));
        }
        for (wanted, directory) in wanted {
            let target = |from: From| match from {
                From::Base(one) => below[one].target.as_slice(),
                From::Changes(one) => &changes.entries[one].target,
                From::Made(_) => &[],
            };
            let wanted = &resolve(&tree, target, wanted);
            if tree.contains_key(wanted) {
                continue;
            }
            make_parents(&mut tree, wanted);
            let kind = if *directory { Type::Directory } else { Type::File };
            tree.insert(wanted.clone(), From::Made(kind));
        }
        Self::number(path, root, &below, changes, &tree)
    }

    /// Numbers the entries of the whole, in the order of their paths: a directory stands before what is in
    /// it. Of several names of a file the first one has the content.
    fn number(
        path: &Path,
        base: Root,
        below: &[Entry],
        changes: Changes,
        tree: &BTreeMap<Vec<u8>, From>,
    ) -> Result<Self> {
        let mut gathering = Gathering::default();
        let mut leaders: HashMap<(bool, usize), usize> = HashMap::new();
        let (mut from_base, mut empty, mut bytes) = (Vec::new(), Vec::new(), 0u64);
        let mut from_changes = vec![None; changes.entries.len()];
        for (number, (at, from)) in tree.iter().enumerate() {
            let (mut entry, file) = match *from {
                From::Base(one) => {
                    (below[one].clone(), Some((false, below[one].leader().unwrap_or(one))))
                }
                From::Changes(one) => {
                    (changes.entries[one].clone(), Some((true, changes.links[one].unwrap_or(one))))
                }
                From::Made(kind) => (made(at, kind), None),
            };
            entry.link = 0;
            if entry.kind() == Type::File {
                match file.and_then(|file| leaders.get(&file)) {
                    Some(leader) => entry.link = *leader as u32 + 1,
                    None => {
                        bytes = bytes.saturating_add(entry.size);
                        match file {
                            None => empty.push(number),
                            Some((false, _)) => from_base.push((number, at.clone())),
                            Some((true, first)) => from_changes[first] = Some(number),
                        }
                        leaders.extend(file.map(|file| (file, number)));
                    }
                }
            }
            let length = entry.path.len() + entry.target.len() + 64;
            gathering.add(IndexPart { entries: vec![entry], removed: Vec::new() }, length, path)?;
        }
        let index = gathering.checked(false, path)?;
        if index.entries.first().is_none_or(|root| root.kind() != Type::Directory) {
            return Err(FileError::hostile(path, "a root that is no directory"));
        }
        let path = path.to_owned();
        Ok(Self { path, index, base, from_base, from_changes, empty, changes, bytes })
    }

    /// Bytes of all its files.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes the tree, with the same tar of changes, if there was one. When this returns, all of it is on
    /// the disk.
    ///
    /// # Errors
    /// When something stands in the way, the disk fails, the base was changed, or the tar is not the one
    /// that was listed.
    pub fn land(&self, landing: &Landing, changes: Option<&mut dyn Read>) -> Result<()> {
        let another =
            || FileError::hostile(&self.path, "another tree than when it was looked at first");
        let root = landing.land_directory(&self.path, false)?;
        let mut placing = Placing::new(&root, &self.index, landing, None);
        placing.make_nodes()?;
        for (number, path) in &self.from_base {
            let shown = self.base.shown(path);
            let changed = || FileError::ChangedWhilePaused { path: shown.clone() };
            let mut file = self.base.open_file(path).doing("open", &shown)?.ok_or_else(changed)?;
            placing.place_file(*number, &mut file)?;
        }
        for number in &self.empty {
            placing.place_file(*number, &mut io::empty())?;
        }
        let mut listed = self.changes.entries.iter().zip(&self.from_changes);
        if let Some(from) = changes {
            each(from, &mut |Raw { entry, link }, content| {
                let (known, goes) = listed.next().ok_or_else(another)?;
                let same_size = link.is_some() || known.size == entry.size;
                if known.path != entry.path || known.kind != entry.kind || !same_size {
                    return Err(another());
                }
                match goes {
                    Some(number) => placing.place_file(*number, content),
                    None => Ok(()),
                }
            })?;
        }
        if listed.next().is_some() {
            return Err(another());
        }
        placing.finish(true)
    }
}

/// Takes `path` and everything below it out of a tree.
fn take_out(tree: &mut BTreeMap<Vec<u8>, From>, path: &[u8]) {
    tree.remove(path);
    let below = [path, b"/"].concat();
    let inside: Vec<_> = tree
        .range(below.clone()..)
        .map(|(found, _)| found)
        .take_while(|found| found.starts_with(&below))
        .cloned()
        .collect();
    for found in inside {
        tree.remove(&found);
    }
}

/// Enters the directories around `path` that are not there.
fn make_parents(tree: &mut BTreeMap<Vec<u8>, From>, path: &[u8]) {
    let mut around = split(path).0;
    while !around.is_empty() && !tree.contains_key(around) {
        tree.insert(around.to_vec(), From::Made(Type::Directory));
        around = split(around).0;
    }
}

/// Where `path` is in the tree, by the links in it, as for one who has the tree for a root. `target` is what
/// an entry says that is a link, and empty for any other.
fn resolve<'a>(
    tree: &BTreeMap<Vec<u8>, From>,
    target: impl Fn(From) -> &'a [u8],
    path: &[u8],
) -> Vec<u8> {
    let parts = |path: &[u8]| -> Vec<Vec<u8>> {
        path.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect()
    };
    let (mut to_go, mut resolved, mut links) = (parts(path), Vec::<u8>::new(), 0);
    while let Some(part) = to_go.pop() {
        match &part[..] {
            b"" | b"." => continue,
            b".." => {
                resolved = split(&resolved).0.to_vec();
                continue;
            }
            _ if resolved.is_empty() => resolved = part,
            _ => resolved = [&resolved, &b"/"[..], &part].concat(),
        }
        let link = tree.get(&resolved).map_or(&[][..], |from| target(*from));
        // As many as the kernel follows; then it stays a link, and below one there is nothing.
        if link.is_empty() || links == LINKS {
            continue;
        }
        links += 1;
        resolved = if link.starts_with(b"/") { Vec::new() } else { split(&resolved).0.to_vec() };
        to_go.extend(parts(link));
    }
    resolved
}

fn made(path: &[u8], kind: Type) -> Entry {
    let mode = if kind == Type::Directory { 0o755 } else { 0o644 };
    Entry { path: path.to_vec(), kind: kind.into(), mode, ..Entry::default() }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// A name, a kind, and content or a target.
    type Told<'a> = (&'a str, tar::EntryType, &'a str);

    /// A tar of these entries.
    fn tar_of(entries: &[Told<'_>]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, text) in entries {
            let mut head = tar::Header::new_ustar();
            let ustar = head.as_ustar_mut().expect("ustar");
            ustar.name[..name.len()].copy_from_slice(name.as_bytes());
            head.set_entry_type(*kind);
            head.set_mode(0o755);
            head.set_uid(0);
            head.set_gid(0);
            head.set_mtime(1);
            let regular = *kind == tar::EntryType::Regular;
            if !regular {
                let ustar = head.as_ustar_mut().expect("ustar");
                ustar.linkname[..text.len()].copy_from_slice(text.as_bytes());
            }
            let content = if regular { text.as_bytes() } else { b"" };
            if *kind == tar::EntryType::Block {
                head.set_device_major(8).and_then(|()| head.set_device_minor(0)).expect("a device");
            }
            head.set_size(content.len() as u64);
            head.set_cksum();
            builder.append(&head, content).expect("written");
        }
        builder.into_inner().expect("finished")
    }

    fn base(directory: &Path) -> PathBuf {
        let base = directory.join("base");
        fs::create_dir_all(base.join("etc/deep")).expect("made");
        for (name, text) in
            [("etc/kept", "kept"), ("etc/old", "old"), ("etc/gone", "gone"), ("etc/deep/x", "x")]
        {
            fs::write(base.join(name), text).expect("written");
        }
        fs::hard_link(base.join("etc/kept"), base.join("etc/other-name")).expect("linked");
        std::os::unix::fs::symlink("/", base.join("out")).expect("linked");
        base
    }

    fn layered(
        directory: &Path,
        tar: &[u8],
        removed: &[&str],
        wanted: &[(&str, bool)],
    ) -> Result<PathBuf> {
        let path = directory.join("tree");
        let changes = Changes::list(&path, &mut &tar[..])?;
        let removed: Vec<_> = removed.iter().map(|gone| gone.as_bytes().to_vec()).collect();
        let wanted: Vec<_> =
            wanted.iter().map(|(name, dir)| (name.as_bytes().to_vec(), *dir)).collect();
        let lander = LayeredLander::of(&path, &base(directory), changes, &removed, &wanted)?;
        assert!(!path.exists(), "nothing is touched before");
        let landing = Landing::new();
        lander.land(&landing, Some(&mut &tar[..]))?;
        landing.keep();
        Ok(path)
    }

    #[test]
    fn both_layers_become_one_tree() {
        let directory = tempfile::tempdir().expect("a directory");
        use tar::EntryType::{Directory, Link, Regular, Symlink};
        let tar = tar_of(&[
            ("etc/old", Regular, "new"),
            ("etc/deep", Regular, "no directory any more"),
            ("var/", Directory, ""),
            ("var/a", Regular, "a"),
            ("var/A", Link, "var/a"),
            ("link", Symlink, "/nowhere"),
            ("var/run", Symlink, "../run"),
            ("loop", Symlink, "loop"),
        ]);
        let wanted = [
            ("proc", true),
            ("run/.containerenv", false),
            ("etc/kept", false),
            ("var/run/x", true),
            ("out/var/run/../y", true),
        ];
        let tree =
            layered(directory.path(), &tar, &["etc/gone", "etc/kept"], &wanted).expect("lands");
        let read = |name: &str| fs::read_to_string(tree.join(name)).expect("a file");
        assert_eq!(read("etc/old"), "new");
        assert_eq!(read("etc/deep"), "no directory any more");
        // Its other name has gone, and one that was wanted came.
        assert_eq!(read("etc/other-name"), "kept");
        assert_eq!(read("etc/kept"), "");
        assert_eq!(read("var/A"), "a");
        let inode = |name: &str| fs::metadata(tree.join(name)).expect("a file").ino();
        assert_eq!(inode("var/A"), inode("var/a"));
        assert!(!tree.join("etc/gone").exists() && tree.join("proc").is_dir());
        assert_eq!(read("run/.containerenv"), "");
        assert!(tree.join("run/x").is_dir() && tree.join("y").is_dir());
        assert_eq!(fs::read_link(tree.join("out")).expect("a link"), Path::new("/"));
    }

    #[test]
    fn changes_that_lie_are_refused_before_anything_is_touched() {
        use tar::EntryType::{Block, Link, Regular, Symlink};
        let lies: [(&[Told<'_>], &str); 9] = [
            (&[("../x", Regular, "x")], "leads upwards"),
            (&[("etc/../../x", Regular, "x")], "leads upwards"),
            (&[("/etc/x", Regular, "x")], "an absolute path"),
            (&[("out/x", Regular, "x")], "below something that is no directory"),
            (
                &[("s", Symlink, "/etc"), ("s/x", Regular, "x")],
                "below something that is no directory",
            ),
            (&[("h", Link, "/etc/passwd")], "a hard link"),
            (&[("h", Link, "etc/kept")], "a hard link"),
            (&[("b", Block, "")], "device node"),
            (&[("x", Regular, "x"), ("x", Regular, "y")], "a path twice"),
        ];
        for (entries, says) in lies {
            let directory = tempfile::tempdir().expect("a directory");
            let error = layered(directory.path(), &tar_of(entries), &[], &[]).expect_err(says);
            assert!(crate::session::error::chain(&error).contains(says), "{error}");
            assert!(!directory.path().join("tree").exists());
        }
        let directory = tempfile::tempdir().expect("a directory");
        let looped = tar_of(&[("loop", Symlink, "loop")]);
        assert!(layered(directory.path(), &looped, &[], &[("loop/x", true)]).is_err());
        let directory = tempfile::tempdir().expect("a directory");
        let mut cut = tar_of(&[("x", Regular, "some text")]);
        cut.truncate(520);
        assert!(layered(directory.path(), &cut, &[], &[]).is_err());
    }
}
