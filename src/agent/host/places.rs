//! Where the files of a workload go that comes: what a peer may name, and what only people may.

use std::path::{Path, PathBuf};

use decamp_shared::workload::{
    FileRole, Manifest, PlacedTree, Refusal, RefusalCode, is_plain_absolute,
};

use crate::agent::leftovers::is_system;

/// A workload with more trees than this is not believed.
const TREES_MAX: usize = 64;

/// Where each tree of `manifest` goes: mapped by the longest fitting OLD=NEW of the user, else of the
/// configuration, else where it stood.
pub(super) fn place(
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

/// Why nothing of that role may come to `path` beside what was `placed` before it.
pub(in crate::agent) fn unfit(
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

#[cfg(test)]
mod tests {
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
