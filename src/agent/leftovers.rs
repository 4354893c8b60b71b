//! Files that a workload left on this host when it moved away, and their removal. The only place in
//! decamp that deletes what users made, and only when they ask for it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use decamp_shared::workload::is_plain_absolute;

use super::Agent;
use super::registry::Workload;
use super::workloads::blocking;
use crate::backend;
use crate::messages::{FileEntry, LeftFile, RemoveAnswer};

/// What podman has removed is looked for after this.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// Directories of the system: whatever of them a workload used is not ours to delete.
const SYSTEM: [&str; 12] =
    ["bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "sys", "usr"];

/// Removes `files` where that is safe, and says of the others why they stay. `others` are all other
/// workloads of the host.
pub(crate) fn remove(files: &[FileEntry], others: &[Workload], state_dir: &Path) -> RemoveAnswer {
    let mounts = mount_points();
    let mut answer = RemoveAnswer::default();
    for file in files {
        let path = &file.path;
        let objection = match &mounts {
            _ if file.shared => Some("other hosts have the very same".to_owned()),
            Ok(mounts) => objection(path, others, state_dir, mounts),
            Err(error) => Some(format!("cannot tell what is mounted in it: {error}")),
        };
        let outcome = match objection {
            Some(why) => Err(why),
            None => delete(path).map_err(|error| format!("cannot remove it: {error}")),
        };
        match outcome {
            Ok(true) => answer.removed.push(path.clone()),
            Ok(false) => {}
            Err(why) => answer.left.push(LeftFile { path: path.clone(), why }),
        }
    }
    answer
}

/// Takes away what containers of podman's left here that neither podman nor anything of this agent's needs now.
pub(crate) fn clear_podmans(agent: &Agent) {
    let going = {
        // Nothing comes to use one meanwhile.
        let _one_at_a_time = agent.entering.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(workloads) = agent.registry.list() else { return };
        backend::clear_podmans(|path| user_of(path, &workloads).is_some())
    };
    for path in going {
        if let Err(error) = fs::remove_dir_all(&path) {
            tracing::warn!(%error, path = %path.display(), "Cannot remove what podman had");
        }
    }
}

/// Does that from time to time, for nobody says when podman removes a container.
pub(crate) async fn watch(agent: Arc<Agent>) {
    loop {
        let looked = Arc::clone(&agent);
        if let Err(answer) = blocking(move || clear_podmans(&looked)).await {
            tracing::warn!("Cannot look for what podman has left: {answer}");
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// The workload among `others` that uses `path`, something in it, or something that it is in.
pub(crate) fn user_of<'a>(path: &Path, others: &'a [Workload]) -> Option<&'a Workload> {
    let overlaps = |file: &FileEntry| file.path.starts_with(path) || path.starts_with(&file.path);
    others.iter().find(|other| other.files.iter().any(overlaps))
}

/// Whether `path` belongs to the operating system.
pub(crate) fn is_system(path: &Path) -> bool {
    match path.components().nth(1) {
        Some(Component::Normal(top)) => SYSTEM.iter().any(|name| OsStr::new(name) == top),
        _ => true,
    }
}

fn objection(
    path: &Path,
    others: &[Workload],
    state_dir: &Path,
    mounts: &[PathBuf],
) -> Option<String> {
    if !is_plain_absolute(path) || path.components().count() < 3 {
        return Some("decamp removes nothing at the top of the file system".into());
    }
    if is_system(path) {
        return Some("it belongs to the system".into());
    }
    if path.starts_with(state_dir) || state_dir.starts_with(path) {
        return Some("the agent's state is there".into());
    }
    if let Some(other) = user_of(path, others) {
        return Some(format!("workload {} uses it", other.name));
    }
    // Through a symbolic link it would be something else that is deleted.
    match path.canonicalize() {
        Ok(real) if real != path => {
            return Some(format!("it is reached through a symbolic link, as {}", real.display()));
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Some(format!("cannot look at it: {error}"));
        }
        _ => {}
    }
    let mount = mounts.iter().find(|mount| mount.starts_with(path))?;
    Some(format!("a file system is mounted at {}", mount.display()))
}

/// Whether there was anything to delete.
fn delete(path: &Path) -> io::Result<bool> {
    let gone = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match gone {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn mount_points() -> io::Result<Vec<PathBuf>> {
    let table = fs::read("/proc/self/mountinfo")?;
    let point = |line: &[u8]| line.split(|&byte| byte == b' ').nth(4).map(unescape);
    Ok(table.split(|&byte| byte == b'\n').filter_map(point).collect())
}

/// The kernel writes blanks and the like as three octal digits after a backslash.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsStr::from_bytes(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::State;
    use decamp_shared::workload::Kind;
    use serde_json::json;

    fn bundle(path: &Path) -> FileEntry {
        FileEntry { role: "bundle".into(), path: path.to_owned(), shared: false }
    }

    fn other(path: &Path) -> Workload {
        let mut workload =
            Workload::new("other", "u-2", Kind::Container, json!({}), State::Running);
        workload.files = vec![bundle(path)];
        workload
    }

    fn tree() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("web");
        fs::create_dir_all(path.join("rootfs/etc")).expect("made");
        fs::write(path.join("config.json"), "{}").expect("written");
        (dir, path)
    }

    fn reason(path: &Path, others: &[Workload], state: &Path) -> String {
        let answer = remove(&[bundle(path)], others, state);
        assert!(answer.removed.is_empty(), "{answer:?}");
        answer.left.first().map(|left| left.why.clone()).unwrap_or_default()
    }

    #[test]
    fn a_tree_is_removed_once() {
        let (_dir, path) = tree();
        let state = Path::new("/var/lib/decamp");
        let answer = remove(&[bundle(&path)], &[], state);
        assert_eq!(answer.removed, [path.as_path()]);
        assert!(!path.exists());
        let again = remove(&[bundle(&path)], &[], state);
        assert_eq!(again, RemoveAnswer::default());
    }

    #[test]
    fn what_is_shared_stays() {
        let (_dir, path) = tree();
        let shared = FileEntry { shared: true, ..bundle(&path) };
        let answer = remove(&[shared], &[], Path::new("/var/lib/decamp"));
        assert!(answer.removed.is_empty() && answer.left[0].why.contains("other hosts"));
        assert!(path.join("config.json").exists());
    }

    #[test]
    fn what_somebody_else_uses_stays() {
        let (dir, path) = tree();
        let state = Path::new("/var/lib/decamp");
        for used in [path.clone(), path.join("rootfs"), dir.path().to_owned()] {
            assert!(reason(&path, &[other(&used)], state).contains("workload other uses it"));
        }
        let beside = other(&dir.path().join("web-2"));
        assert!(user_of(&path, std::slice::from_ref(&beside)).is_none());
        assert!(reason(&path, &[], &path.join("state")).contains("the agent's state"));
        assert!(path.exists());
    }

    #[test]
    fn the_system_and_the_top_of_the_tree_stay() {
        let state = Path::new("/var/lib/decamp");
        assert!(reason(Path::new("/boot/vmlinuz"), &[], state).contains("the system"));
        for top in ["/", "/srv", "relative", "/srv/../etc/passwd"] {
            assert!(reason(Path::new(top), &[], state).contains("at the top"), "{top}");
        }
    }

    #[test]
    fn symbolic_links_and_mounts_keep_it() {
        let (dir, path) = tree();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("linked");
        assert!(reason(&link, &[], Path::new("/s")).contains("symbolic link"));
        let mounts = [path.join("rootfs")];
        let why = objection(&path, &[], Path::new("/s"), &mounts).expect("an objection");
        assert!(why.contains("is mounted at"), "{why}");
        assert!(path.exists());
    }

    #[test]
    fn mount_points_are_read_as_the_kernel_writes_them() {
        assert_eq!(unescape(b"/mnt/a\\040b"), Path::new("/mnt/a b"));
        assert_eq!(unescape(b"/mnt/a\\"), Path::new("/mnt/a\\"));
        assert!(mount_points().expect("readable").contains(&PathBuf::from("/")));
    }
}
