//! Files and directories that are deleted and still open. CRIU makes each of them again for a moment, by the
//! path that it had, and from outside of the container: a symbolic link on that way would lead through this
//! host, whose files it would then make, or give another owner and mode (`create_ghost` in its `files-reg.c`).
//! So before a dump, after it, and before a restore the way is gone here, without following a link.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

/// What the kernel appends to the name of what has been removed.
pub(crate) const DELETED: &[u8] = b" (deleted)";
/// CRIU puts some fifty bytes before a path and twenty after it, and cuts off what is more than 4096 then.
const LONGEST: usize = 3800;
/// What the names end with that CRIU gives deleted files.
const SUFFIX: &[u8] = b".ghost";
const SET_IDS: u32 = libc::S_ISUID | libc::S_ISGID;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ghost<'a> {
    /// Its path in the container, as it was.
    pub(crate) path: &'a [u8],
    /// Where the mount that it is on is mounted.
    pub(crate) point: &'a [u8],
    /// With the kind, as `stat` has it.
    pub(crate) mode: u32,
}

/// What it is on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ground<'a> {
    /// A tree whose root is held open here. Other mounts in it are not gone through, for CRIU makes it without.
    Seen(BorrowedFd<'a>),
    /// A file system that CRIU makes from its images, whose links nobody has seen.
    Unseen,
}

/// Why one cannot be made again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stray {
    #[error("its path makes no sense, or is too long")]
    Path,
    #[error("it is what was mounted there, and gone from where it came")]
    Whole,
    #[error("the way to it leads over a symbolic link by now")]
    Link,
    #[error("the way to it leads over what is no directory by now")]
    NoDirectory,
    #[error("the way to it leads through another mount by now")]
    Mount,
    #[error("the way to it leads through {0:?}, a name that CRIU gives deleted files itself")]
    OfAnother(String),
    #[error("its name belongs to something else by now")]
    Taken,
    #[error(
        "it is a directory within another one of a file system in memory, whose links nobody sees"
    )]
    Unseen,
    #[error(
        "it is a device, or runs with others' rights, within a directory of a file system in memory"
    )]
    UnseenRights,
    #[error("the way to it cannot be gone: {0}")]
    Errno(Errno),
}

impl Ghost<'_> {
    /// Whether CRIU makes it where it says, and nothing else of this host is touched.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn check(&self, ground: Ground<'_>) -> Result<(), Stray> {
        let (last, parents) = self.parts()?;
        let is_directory = self.mode & libc::S_IFMT == libc::S_IFDIR;
        let tree = match ground {
            Ground::Seen(tree) => tree,
            // Whatever has that name is not followed.
            Ground::Unseen if parents.is_empty() => return Ok(()),
            Ground::Unseen if is_directory => return Err(Stray::Unseen),
            Ground::Unseen => {
                let is_device =
                    [libc::S_IFCHR, libc::S_IFBLK].contains(&(self.mode & libc::S_IFMT));
                let has_rights = is_device || self.mode & SET_IDS != 0;
                return if has_rights { Err(Stray::UnseenRights) } else { Ok(()) };
            }
        };
        let mut at: Option<OwnedFd> = None;
        for part in parents {
            let from = at.as_ref().map_or(tree, AsFd::as_fd);
            match step(from, part, OFlag::O_DIRECTORY) {
                Ok(next) => at = Some(next),
                // CRIU makes what is missing, or does without.
                Err(Errno::ENOENT) => return Ok(()),
                Err(errno) => return Err(Stray::from(errno)),
            }
        }
        if !is_directory {
            return Ok(());
        }
        // CRIU would take what is there for it, and remove it in the end.
        let from = at.as_ref().map_or(tree, AsFd::as_fd);
        match step(from, last, OFlag::O_NOFOLLOW) {
            Ok(_) | Err(Errno::EXDEV) => Err(Stray::Taken),
            Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(Stray::from(errno)),
        }
    }

    /// Its name, and those of the directories that lead to it from its mount.
    fn parts(&self) -> Result<(&[u8], Vec<&[u8]>), Stray> {
        let path = self.path.strip_prefix(b"/").ok_or(Stray::Path)?;
        if path.len() > LONGEST || path.contains(&0) {
            return Err(Stray::Path);
        }
        let mut parts = path.split(|byte| *byte == b'/');
        let point =
            self.point.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b"."));
        let mut left = Vec::new();
        for wanted in point {
            match parts.next() {
                Some(part) if part == wanted => {}
                _ => return Err(Stray::Path),
            }
        }
        for part in parts {
            if matches!(part, b"" | b"." | b"..") {
                return Err(if path.is_empty() { Stray::Whole } else { Stray::Path });
            }
            left.push(part);
        }
        let last = left.pop().ok_or(Stray::Whole)?;
        match left.iter().find(|part| part.ends_with(SUFFIX)) {
            Some(part) => Err(Stray::OfAnother(String::from_utf8_lossy(part).into_owned())),
            None => Ok((last, left)),
        }
    }
}

impl From<Errno> for Stray {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::ELOOP => Self::Link,
            Errno::ENOTDIR => Self::NoDirectory,
            Errno::EXDEV => Self::Mount,
            other => Self::Errno(other),
        }
    }
}

/// Opens what `from` calls `name`, if that is no link; with `O_NOFOLLOW` the link itself.
fn step(from: BorrowedFd<'_>, name: &[u8], flags: OFlag) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC | flags).resolve(
        ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_XDEV,
    );
    openat2(from, OsStr::from_bytes(name), how)
}

/// A name without what the kernel appends to that of what has been removed.
pub(crate) fn undeleted(name: &[u8]) -> &[u8] {
    name.strip_suffix(DELETED).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    use super::*;

    const DIRECTORY: u32 = libc::S_IFDIR | 0o777;
    const FILE: u32 = libc::S_IFREG | 0o600;

    fn checked(tree: &File, path: &str, point: &str, mode: u32) -> Result<(), Stray> {
        let ghost = Ghost { path: path.as_bytes(), point: point.as_bytes(), mode };
        ghost.check(Ground::Seen(tree.as_fd()))
    }

    #[test]
    fn the_way_to_what_is_deleted_leads_over_no_link() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("d/there")).expect("directories");
        fs::write(at("d/file"), "").expect("a file");
        symlink("/", at("d/a")).expect("a link");
        symlink("there", at("d/within")).expect("a link");
        let tree = File::open(directory.path()).expect("open");
        for mode in [DIRECTORY, FILE] {
            let checked = |path: &str, point: &str| checked(&tree, path, point, mode);
            for fine in ["/d/gone", "/gone", "/gone/deeper/etc", "/d/there/etc", "/d/there/a b"] {
                assert_eq!(checked(fine, "/"), Ok(()), "{fine}");
            }
            assert_eq!(checked("/v/d/gone", "/v"), Ok(()));
            for link in ["/d/a/etc", "/d/a/gone/etc", "/d/within/etc"] {
                assert_eq!(checked(link, "/"), Err(Stray::Link), "{link}");
            }
            assert_eq!(checked("/d/file/etc", "/"), Err(Stray::NoDirectory));
            // By names like these CRIU makes others, perhaps as links.
            let of_another = Err(Stray::OfAnother("x.cr.1.ghost".to_owned()));
            assert_eq!(checked("/x.cr.1.ghost/etc", "/"), of_another);
            for bad in
                ["", "d", "/d/../../etc", "/d/./etc", "/d//etc", "/d/", "/d/e\0/x", "/elsewhere"]
            {
                assert_eq!(checked(bad, "/v"), Err(Stray::Path), "{bad:?}");
                let refused = checked(bad, "/");
                assert!(refused.is_err() || bad == "/elsewhere", "{bad:?}");
            }
            assert_eq!(checked(&format!("/{}", "x/".repeat(2000)), "/"), Err(Stray::Path));
            for whole in [("/", "/"), ("/v", "/v"), ("/v/w", "/v/w")] {
                assert_eq!(checked(whole.0, whole.1), Err(Stray::Whole), "{whole:?}");
            }
        }
    }

    #[test]
    fn a_directory_is_not_taken_for_another() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("a")).expect("a directory");
        symlink("/etc", directory.path().join("b")).expect("a link");
        let tree = File::open(directory.path()).expect("open");
        for name in ["/a", "/b"] {
            assert_eq!(checked(&tree, name, "/", DIRECTORY), Err(Stray::Taken), "{name}");
            // Files have another name while they are made.
            assert_eq!(checked(&tree, name, "/", FILE), Ok(()), "{name}");
        }
    }

    #[test]
    fn what_nobody_sees_is_not_gone_through() {
        let checked = |path: &str, mode| {
            Ghost { path: path.as_bytes(), point: b"/tmp", mode }.check(Ground::Unseen)
        };
        assert_eq!(checked("/tmp/a", DIRECTORY), Ok(()));
        assert_eq!(checked("/tmp/a/b", FILE), Ok(()));
        assert_eq!(checked("/tmp/a/etc", DIRECTORY), Err(Stray::Unseen));
        for mode in [FILE | libc::S_ISUID, FILE | libc::S_ISGID, libc::S_IFBLK, libc::S_IFCHR] {
            assert_eq!(checked("/tmp/a/b", mode), Err(Stray::UnseenRights), "{mode:o}");
        }
        assert_eq!(checked("/tmp/x.cr.1.ghost/b", FILE).map_err(|_| ()), Err(()));
        assert_eq!(checked("/etc/b", FILE), Err(Stray::Path));
    }

    #[test]
    fn only_the_end_of_a_name_says_that_it_is_deleted() {
        assert_eq!(undeleted(b"/a (deleted)"), b"/a");
        assert_eq!(undeleted(b"/a (deleted)/b"), b"/a (deleted)/b");
    }
}
