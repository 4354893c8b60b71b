//! Files that a process holds, whether by a descriptor, as its directory or program, or mapped: whether CRIU
//! can find them again by a name, or take along what has none.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use super::mounts::Mounts;
use super::said::{Found, plain};
use crate::dump::GHOST_LIMIT;
use crate::sys::look::{FileFacts, file_facts};

/// What the kernel appends to the name of what has been removed.
const DELETED: &[u8] = b" (deleted)";

/// What is wrong with a file, and the remedy.
type Wrong = Option<(String, &'static str)>;

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

    /// Looks at what `path` below `/proc` leads to; nothing when that has just gone.
    pub(crate) fn facts(path: &Path) -> io::Result<Option<FileFacts>> {
        match file_facts(path) {
            Ok(facts) => Ok(Some(facts)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Judges a file with a name: what the kernel shows as `link`.
    pub(crate) fn judge(&mut self, who: &str, link: &OsStr, facts: &FileFacts, found: &mut Found) {
        let key = (facts.mount, facts.device, facts.inode);
        let wrong = match self.judged.get(&key) {
            Some(known) => known.clone(),
            None => {
                let wrong = self.wrong(link.as_bytes(), facts);
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
            return large.then(|| {
                (
                    format!(
                        "it has {shown} open, a deleted file of {} MiB; up to {} MiB can be taken along",
                        facts.taken >> 20,
                        GHOST_LIMIT >> 20
                    ),
                    "have it close or reopen the file (of a log: the signal to reopen it)",
                )
            });
        }
        self.wrong_name(link, &shown, facts)
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

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn judged(file: &File) -> Vec<String> {
        let me = std::process::id() as i32;
        let mounts = Mounts::of(me).expect("a table");
        let mut files = Files::new(&mounts, me);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let link = fs::read_link(&path).expect("a link");
        let facts = Files::facts(Path::new(&path)).expect("facts").expect("there");
        let mut found = Found::default();
        files.judge("It", link.as_os_str(), &facts, &mut found);
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
}
