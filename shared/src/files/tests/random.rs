//! Random trees, changed at random, are the same on both sides at the end.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use proptest::collection::vec;
use proptest::prelude::*;
use rustix::fs::{CWD, Mode, XattrFlags, lremovexattr, lsetxattr, mkfifoat};

use super::*;

/// Something that a workload may do. What is impossible at that moment does nothing.
#[derive(Clone, Debug)]
enum Act {
    Write(PathBuf, u64, usize),
    Append(PathBuf, u64),
    Directory(PathBuf),
    Symlink(PathBuf, String),
    Link(PathBuf, PathBuf),
    Fifo(PathBuf),
    Chmod(PathBuf, u32),
    Chown(PathBuf, u32, u32),
    Xattr(PathBuf, u8, Vec<u8>),
    NoXattr(PathBuf, u8),
    Time(PathBuf, u64, u32),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
    /// New content with size and modification time as before: only the change time tells.
    Sneak(PathBuf, u64),
}

fn some_path() -> impl Strategy<Value = PathBuf> {
    let name = prop_oneof![
        Just("a".to_owned()),
        Just("b".to_owned()),
        Just("c d".to_owned()),
        Just("ü\nx".to_owned()),
        Just("L".repeat(200)),
    ];
    vec(name, 1..4).prop_map(|names| names.into_iter().collect())
}

fn act() -> impl Strategy<Value = Act> {
    let size = prop_oneof![Just(0_usize), 1_usize..600, 60_000_usize..140_000];
    prop_oneof![
        4 => (some_path(), any::<u64>(), size).prop_map(|(p, s, n)| Act::Write(p, s, n)),
        2 => (some_path(), any::<u64>()).prop_map(|(p, s)| Act::Append(p, s)),
        3 => some_path().prop_map(Act::Directory),
        1 => (some_path(), "[a-z/.]{1,20}").prop_map(|(p, t)| Act::Symlink(p, t)),
        3 => (some_path(), some_path()).prop_map(|(a, b)| Act::Link(a, b)),
        1 => some_path().prop_map(Act::Fifo),
        2 => (some_path(), 0_u32..0o10000).prop_map(|(p, m)| Act::Chmod(p, m)),
        2 => (some_path(), 0_u32..70000, 0_u32..70000).prop_map(|(p, u, g)| Act::Chown(p, u, g)),
        2 => (some_path(), 0_u8..3, vec(any::<u8>(), 0..40)).prop_map(|(p, n, v)| Act::Xattr(p, n, v)),
        1 => (some_path(), 0_u8..3).prop_map(|(p, n)| Act::NoXattr(p, n)),
        1 => (some_path(), 0_u64..2_000_000_000, 0_u32..1_000_000_000).prop_map(|(p, s, n)| Act::Time(p, s, n)),
        2 => some_path().prop_map(Act::Remove),
        2 => (some_path(), some_path()).prop_map(|(a, b)| Act::Rename(a, b)),
        1 => (some_path(), any::<u64>()).prop_map(|(p, s)| Act::Sneak(p, s)),
    ]
}

fn perform(root: &Path, act: &Act) {
    // Links must not lead the test itself out of the tree.
    let plain = |path: &Path| {
        path.ancestors()
            .skip(1)
            .all(|part| !root.join(part).is_symlink() || part.as_os_str().is_empty())
    };
    let at = |path: &PathBuf| root.join(path);
    let file = |path: &PathBuf| {
        plain(path) && at(path).symlink_metadata().is_ok_and(|meta| meta.is_file())
    };
    let xattr = |number: u8| ["user.one", "trusted.two", "user.three"][number as usize];
    // What cannot be done now is not done: errors are part of a random walk.
    match act {
        Act::Write(path, seed, size)
            if plain(path) && !at(path).is_symlink() && (file(path) || !at(path).exists()) =>
        {
            let _ = fs::write(at(path), noise(*seed, *size));
        }
        Act::Append(path, seed) if file(path) => {
            let open = OpenOptions::new().append(true).open(at(path));
            let _ = open.and_then(|mut open| open.write_all(&noise(*seed, 100)));
        }
        Act::Directory(path) if plain(path) => drop(fs::create_dir(at(path))),
        Act::Symlink(path, target) if plain(path) => drop(symlink(target, at(path))),
        Act::Link(from, to) if file(from) && plain(to) => drop(fs::hard_link(at(from), at(to))),
        Act::Fifo(path) if plain(path) => {
            let _ = mkfifoat(CWD, at(path), Mode::RUSR);
        }
        Act::Chmod(path, mode)
            if plain(path) && at(path).symlink_metadata().is_ok_and(|m| !m.is_symlink()) =>
        {
            let _ = fs::set_permissions(at(path), fs::Permissions::from_mode(*mode));
        }
        Act::Chown(path, uid, gid) if plain(path) && !at(path).is_symlink() => {
            let _ = chown(at(path), Some(*uid), Some(*gid));
        }
        Act::Xattr(path, name, value) if plain(path) => {
            let _ = lsetxattr(at(path), xattr(*name), value, XattrFlags::empty());
        }
        Act::NoXattr(path, name) if plain(path) => {
            let _ = lremovexattr(at(path), xattr(*name));
        }
        Act::Time(path, s, ns) if file(path) => {
            let time = SystemTime::UNIX_EPOCH + Duration::new(*s, *ns);
            let _ = OpenOptions::new()
                .write(true)
                .open(at(path))
                .and_then(|open| open.set_modified(time));
        }
        Act::Remove(path) if plain(path) => {
            let _ = fs::remove_file(at(path)).or_else(|_| fs::remove_dir_all(at(path)));
        }
        Act::Rename(from, to) if plain(from) && plain(to) => drop(fs::rename(at(from), at(to))),
        Act::Sneak(path, seed) if file(path) => {
            let meta = at(path).metadata().expect("its metadata");
            let time = meta.modified().expect("a time");
            if File::options()
                .write(true)
                .open(at(path))
                .and_then(|mut open| {
                    open.write_all(&noise(*seed, meta.len() as usize))?;
                    open.set_modified(time)
                })
                .is_err()
            {
                // Then it is as it was.
            }
        }
        _ => {}
    }
}

fn perform_all(root: &Path, acts: &[Act]) {
    acts.iter().for_each(|act| perform(root, act));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn random_trees_arrive_and_return(
        before in vec(act(), 0..60),
        meanwhile in vec(act(), 0..12),
        later in vec(act(), 0..6),
        away in vec(act(), 0..12),
        settled in any::<bool>(),
    ) {
        let room = tempfile::tempdir().expect("a directory");
        let (source, destination) = (room.path().join("source"), room.path().join("new/destination"));
        fs::create_dir(&source).expect("the source");
        perform_all(&source, &before);
        if settled {
            settle();
        }
        let tree = bundle(&source);
        let landing = Landing::new();
        stream(vec![incoming(&tree, &destination, false)], &landing, |sender| {
            sender.send(&tree)?;
            assert_same(&source, &destination, "after the first pass");
            perform_all(&source, &meanwhile);
            sender.send_changes(&tree)?;
            assert_same(&source, &destination, "after the changes");
            perform_all(&source, &later);
            sender.send_changes(&tree)
        })
        .well();
        assert_same(&source, &destination, "at the end");
        landing.keep();
        drop(landing);
        super::tars::assert_comes_back(&source, &room.path().join("through-a-tar"));

        // And back, over what stayed there.
        perform_all(&destination, &away);
        let tree = bundle(&destination);
        let landing = Landing::new();
        stream(vec![incoming(&tree, &source, true)], &landing, |sender| {
            sender.send(&tree)?;
            sender.send_changes(&tree)
        })
        .well();
        drop(landing);
        assert_same(&destination, &source, "after the return");
    }
}
