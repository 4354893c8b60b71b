//! Files that a process holds, whether by a descriptor, as its directory or program, or mapped: whether CRIU
//! can find them again by a name, or take along what has none.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use super::mounts::Mounts;
use super::process::Who;
use super::said::{Found, plain};
use crate::confined::GhostImage;
use crate::dump::GHOST_LIMIT;
use crate::error::Result;
use crate::ghosts::{DELETED, Ghost, Ground, Stray, undeleted};
use crate::sys::look::{FileFacts, file_facts};

/// What is wrong with a file, and the remedy.
type Wrong = Option<(String, &'static str)>;

/// What a descriptor, a mapping, or another link below `/proc` leads to.
#[derive(Debug)]
pub(crate) struct Seen<'a> {
    path: &'a Path,
    /// How the kernel shows it.
    pub(crate) link: OsString,
    pub(crate) facts: FileFacts,
}

impl<'a> Seen<'a> {
    /// Looks at what `path` leads to; nothing when that has just gone.
    pub(crate) fn at(path: &'a Path) -> io::Result<Option<Self>> {
        // Held, so that its name and what it is are of one file: by the same number there may be another by then.
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let opened = open(path, flags, Mode::empty()).map_err(io::Error::from);
        let Some(file) = unless_gone(opened)? else { return Ok(None) };
        let held = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let link = fs::read_link(&held)?.into_os_string();
        Ok(Some(Self { path, link, facts: file_facts(&held)? }))
    }

    /// Whether it is still there, under that name.
    fn is_there(&self) -> bool {
        fs::read_link(self.path).is_ok_and(|link| link.as_os_str() == self.link)
    }
}

fn unless_gone<T>(looked: io::Result<T>) -> io::Result<Option<T>> {
    match looked {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Judges files, each once.
pub(crate) struct Files<'a> {
    mounts: &'a Mounts,
    /// The root of the container's first process.
    root: Option<OwnedFd>,
    judged: HashMap<(u64, (u32, u32), u64), Wrong>,
}

impl<'a> Files<'a> {
    /// For a container whose first process is `init`.
    pub(crate) fn new(mounts: &'a Mounts, init: i32) -> Self {
        let path = format!("/proc/{init}/root");
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(Path::new(&path), flags, Mode::empty()).ok();
        Self { mounts, root, judged: HashMap::new() }
    }

    /// Whether a file, when it is mapped, shows what this host's kernel or devices have.
    pub(crate) fn shows_host(&self, facts: &FileFacts) -> bool {
        self.mounts.shows_host(facts.mount)
    }

    /// Judges a file with a name.
    pub(crate) fn judge(&mut self, who: &Who<'_>, seen: &Seen<'_>, found: &mut Found) {
        let facts = &seen.facts;
        let key = (facts.mount, facts.device, facts.inode);
        let wrong = match self.judged.get(&key) {
            Some(known) => known.clone(),
            None => {
                let wrong = self.wrong(seen.link.as_bytes(), facts);
                // It may have been renamed or replaced by another while its name was looked up.
                if wrong.is_some() && !seen.is_there() {
                    return;
                }
                self.judged.insert(key, wrong.clone());
                wrong
            }
        };
        if let Some((what, remedy)) = wrong {
            found.say(who, &what, remedy);
        }
    }

    fn wrong(&self, link: &[u8], facts: &FileFacts) -> Wrong {
        let shown = plain(link);
        if !self.mounts.has(facts.mount) {
            return Some((
                format!("it has {shown}, which is on no mount of the container"),
                "have it close that; what it needs from outside has to be mounted by the container's \
                 configuration",
            ));
        }
        if self.mounts.is_covered(facts.mount) {
            return Some((
                format!("it has {shown}, over which something else is mounted"),
                "unmount what is over it, or have it close the file",
            ));
        }
        if self.mounts.is_of_kernel(facts.mount) {
            return None;
        }
        if facts.links == 0 {
            let large = facts.kind() == libc::S_IFREG && facts.taken > u64::from(GHOST_LIMIT);
            if large {
                return Some((
                    format!(
                        "it has {shown} open, a deleted file of {} MiB; up to {} MiB can be taken along",
                        facts.taken >> 20,
                        GHOST_LIMIT >> 20
                    ),
                    "have it close or reopen the file (of a log: the signal to reopen it)",
                ));
            }
            let stray = self.stray(undeleted(link), facts.mode, facts.mount)?;
            return Some((
                format!("it has {shown} open, which is deleted, and {stray}"),
                "have it close that, or leave that directory",
            ));
        }
        self.wrong_name(link, &shown, facts)
    }

    /// Why what is deleted cannot be made again, by the path that it had.
    fn stray(&self, path: &[u8], mode: u32, mount: u64) -> Option<Stray> {
        let (point, is_from_images) = self.mounts.ground(mount)?;
        let ghost = Ghost { path, point: point.as_os_str().as_bytes(), mode };
        if is_from_images && let Err(stray) = ghost.check(Ground::Unseen) {
            return Some(stray);
        }
        let root = self.root.as_ref().filter(|_| self.mounts.answers(mount))?;
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(
            ResolveFlag::RESOLVE_IN_ROOT
                | ResolveFlag::RESOLVE_NO_MAGICLINKS
                | ResolveFlag::RESOLVE_NO_SYMLINKS,
        );
        let tree = match openat2(root, point, how) {
            Ok(tree) => tree,
            // It has just been unmounted.
            Err(Errno::ENOENT) => return None,
            Err(errno) => return Some(errno.into()),
        };
        let facts = file_facts(Path::new(&format!("/proc/self/fd/{}", tree.as_raw_fd()))).ok()?;
        if facts.mount != mount {
            return Some(Stray::Mount);
        }
        ghost.check(Ground::Seen(tree.as_fd())).err()
    }

    /// Whether a file that is not deleted is found by the name that it was opened by.
    fn wrong_name(&self, link: &[u8], shown: &str, facts: &FileFacts) -> Wrong {
        let root = self.root.as_ref().filter(|_| self.mounts.answers(facts.mount))?;
        let path = link.strip_prefix(b"/")?;
        let path = if path.is_empty() { b"." } else { path };
        // What is shown has no links in it; whoever makes one meanwhile leads nowhere.
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let there = match openat2(root, OsStr::from_bytes(path), how) {
            Ok(there) => there,
            Err(Errno::ENOENT) if link.ends_with(DELETED) => {
                return Some((
                    format!("it has {shown} open, and the file goes on under another name"),
                    "have it close or reopen the file, or remove its other names",
                ));
            }
            // It has just been renamed, or the name is too long to be looked up.
            Err(_) => return None,
        };
        let there = file_facts(Path::new(&format!("/proc/self/fd/{}", there.as_raw_fd()))).ok()?;
        let same = (there.device, there.inode) == (facts.device, facts.inode);
        (!same && there.mount == facts.mount).then(|| {
            (
                format!("it has {shown} open, and that name belongs to another file by now"),
                "have it reopen the file",
            )
        })
    }
}

/// What of the deleted files that were dumped of the container whose first process is `init` cannot be made
/// again, as it stands still.
pub(crate) fn astray(ghosts: &[GhostImage], init: i32) -> Result<Vec<String>> {
    if ghosts.is_empty() {
        return Ok(Vec::new());
    }
    let mounts = Mounts::of(init)?;
    let files = Files::new(&mounts, init);
    let judged = ghosts.iter().filter_map(|ghost| {
        let stray = files.stray(&ghost.path, ghost.mode, ghost.mount.into())?;
        Some(format!("A process has {} open, which is deleted, and {stray}", plain(&ghost.path)))
    });
    Ok(judged.collect())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use nix::unistd::dup2;

    use super::*;

    fn judged(file: &File) -> Vec<String> {
        let me = std::process::id() as i32;
        let mounts = Mounts::of(me).expect("a table");
        let mut files = Files::new(&mounts, me);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let seen = Seen::at(Path::new(&path)).expect("facts").expect("there");
        let mut found = Found::default();
        files.judge(&Who::named("It"), &seen, &mut found);
        found.into_texts()
    }

    #[test]
    fn a_file_is_found_by_its_name_or_taken_along() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        let plain = File::create(path("plain")).expect("a file");
        assert_eq!(judged(&plain), [""; 0]);
        let deleted = File::create(path("deleted")).expect("a file");
        fs::remove_file(path("deleted")).expect("removed");
        assert_eq!(judged(&deleted), [""; 0]);
        nix::fcntl::posix_fallocate(&deleted, 0, i64::from(GHOST_LIMIT) + 4096).expect("room");
        assert!(judged(&deleted)[0].contains("64 MiB"), "{:?}", judged(&deleted));
        let linked = File::create(path("one")).expect("a file");
        fs::hard_link(path("one"), path("two")).expect("a link");
        fs::remove_file(path("one")).expect("removed");
        assert!(judged(&linked)[0].contains("another name"), "{:?}", judged(&linked));
    }
    /// What the kernel shows of a descriptor and what that leads to are asked for one after the other.
    #[test]
    fn what_is_seen_is_of_one_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let make = |name: &str| File::create(directory.path().join(name)).expect("a file");
        let files = [make("one"), make("two")];
        let mut number: OwnedFd = make("one").into();
        let path = format!("/proc/self/fd/{}", number.as_raw_fd());
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    for file in &files {
                        dup2(file, &mut number).expect("dup2");
                    }
                }
            });
            let mut seen_at_all = 0;
            let wrong = (0..20_000).filter(|_| {
                let Some(seen) = Seen::at(Path::new(&path)).expect("facts") else { return false };
                seen_at_all += 1;
                file_facts(Path::new(&seen.link)).expect("there").inode != seen.facts.inode
            });
            let wrong = wrong.count();
            over.store(true, Ordering::Relaxed);
            assert!(seen_at_all > 0);
            assert_eq!(wrong, 0, "of {seen_at_all}");
        });
    }
}
