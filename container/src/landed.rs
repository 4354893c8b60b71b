//! What of a bundle that came here is mounted: its root and the sources of its bind mounts, found below
//! the bundle by the kernel and held from then on. Whoever may write in the bundle can swap a name for
//! a link at any moment, but not what a descriptor holds.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use crate::bundle::{Bind, Bundle, is_host_file};
use crate::error::{ContainerError, Result};
use crate::mounts::{ExternalKind, ExternalMount};
use crate::store::Store;
use crate::volumes::Volume;

/// The parts of a bundle, held open.
struct Held {
    root: OwnedFd,
    /// By destination, in the order of the configuration.
    binds: Vec<(String, Source)>,
}

/// What is behind a bind mount.
enum Source {
    /// A file of this host's own that any container may mount.
    Host(PathBuf),
    /// Something in the bundle, or in a tree that came with it.
    Held(OwnedFd),
}

/// The parts of a bundle, mounted where nobody else sees them.
#[derive(Debug)]
pub(crate) struct Landed {
    root: PathBuf,
    /// By destination, in the order of the configuration.
    binds: Vec<(String, PathBuf)>,
    /// What the container has mounted once more of them, by the names for CRIU.
    parts: Vec<(String, PathBuf)>,
}

impl Landed {
    /// Mounts in `store` all that is mounted of `bundle`, now that its files are here.
    ///
    /// # Errors
    /// When something is missing, or lies elsewhere: by a symbolic link, for what it is called was
    /// checked before.
    pub(crate) fn mount(bundle: &Bundle, store: &Store) -> Result<Self> {
        let held = Held::take(bundle)?;
        let root = store.mount_part(&in_proc(&held.root), "root")?;
        let mut binds = Vec::new();
        for (number, (destination, source)) in held.binds.into_iter().enumerate() {
            let path = match source {
                Source::Host(path) => path,
                // By a mount, for CRIU restores in a namespace where a descriptor of ours is foreign.
                Source::Held(held) => {
                    store.mount_bind(&in_proc(&held), &format!("bind-{number}"))?
                }
            };
            binds.push((destination, path));
        }
        Ok(Self { root, binds, parts: Vec::new() })
    }

    /// Mounts in `store` those of `mounts`, a peer's, that are parts of bind mounts.
    ///
    /// # Errors
    /// When one is of none, or is not there: a link leads to it, which the container's own path had not.
    pub(crate) fn add_parts(&mut self, mounts: &[ExternalMount], store: &Store) -> Result<()> {
        for mount in mounts {
            let ExternalKind::Part(part) = &mount.kind else { continue };
            let failed = || format!("open {} of the mount {}", part.path, part.of);
            let of = self.source(&part.of).ok_or_else(|| {
                ContainerError::section(
                    "container/state",
                    format!("names a part of {}, which the configuration does not mount", part.of),
                )
            })?;
            let whole = opened(of, OFlag::O_PATH | OFlag::O_CLOEXEC)?;
            let held = match part.path.is_empty() {
                true => whole,
                false => within(whole.as_fd(), Path::new(&part.path))
                    .map_err(ContainerError::errno(failed()))?,
            };
            let name = format!("part-{}", self.parts.len());
            let place = store.mount_part(&in_proc(&held), &name)?;
            self.parts.push((mount.name.clone(), place));
        }
        Ok(())
    }

    /// The root file system.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The source of the bind mount on `destination`.
    pub(crate) fn source(&self, destination: &str) -> Option<&Path> {
        let mut binds = self.binds.iter();
        binds.find(|(name, _)| name == destination).map(|(_, path)| path.as_path())
    }

    /// The part that CRIU knows by this name.
    pub(crate) fn part(&self, name: &str) -> Option<&Path> {
        let mut parts = self.parts.iter();
        parts.find(|(known, _)| known == name).map(|(_, path)| path.as_path())
    }

    #[cfg(test)]
    pub(crate) fn with_bind(destination: &str, source: &str) -> Self {
        let binds = vec![(destination.into(), source.into())];
        Self { root: "/root".into(), binds, parts: Vec::new() }
    }
}

impl Held {
    fn take(bundle: &Bundle) -> Result<Self> {
        let directory = bundle.directory();
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let open = opened(directory, flags)?;
        let source = |bind: &Bind| match bundle.volume(&bind.written) {
            _ if is_host_file(&bind.source) => {
                let file = bundle.host_file(&bind.destination, bind.source.clone());
                Ok(Source::Host(file))
            }
            Some(volume) => held_in(volume).map(Source::Held),
            None => beneath(open.as_fd(), directory, &bind.source).map(Source::Held),
        };
        let binds = bundle.binds().into_iter();
        Ok(Self {
            root: beneath(open.as_fd(), directory, &bundle.rootfs())?,
            binds: binds
                .map(|bind| Ok((bind.destination.clone(), source(&bind)?)))
                .collect::<Result<_>>()?,
        })
    }
}

/// Why no destination would mount what is mounted of `bundle`, as it stands here.
pub(crate) fn obstacle(bundle: &Bundle) -> Option<String> {
    Held::take(bundle).err().map(|error| error.to_string())
}

/// Opens what a volume shows, where it really is in its tree: links to the tree itself are this host's.
fn held_in(volume: &Volume) -> Result<OwnedFd> {
    let tree = opened(&volume.tree, OFlag::O_PATH | OFlag::O_CLOEXEC)?;
    match volume.path == volume.tree {
        true => Ok(tree),
        false => beneath(tree.as_fd(), &volume.tree, &volume.path),
    }
}

fn opened(path: &Path, flags: OFlag) -> Result<OwnedFd> {
    open(path, flags, Mode::empty())
        .map_err(ContainerError::errno(format!("open {}", path.display())))
}

/// Opens `path`, which is called as if it were below `directory`, where it really is below `open`.
fn beneath(open: BorrowedFd<'_>, directory: &Path, path: &Path) -> Result<OwnedFd> {
    let out = || {
        ContainerError::State(format!(
            "{} leads out of the bundle {}",
            path.display(),
            directory.display()
        ))
    };
    let below = path.strip_prefix(directory).map_err(|_| out())?;
    // The bundle itself is below itself.
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    loop {
        match openat2(open, below, how) {
            Ok(held) => return Ok(held),
            // Something was renamed or mounted at that moment, and the kernel is not sure.
            Err(Errno::EAGAIN) => {}
            Err(Errno::EXDEV | Errno::ELOOP) => return Err(out()),
            Err(errno) => {
                return Err(ContainerError::errno(format!("open {}", path.display()))(errno));
            }
        }
    }
}

/// Opens `path` below `open`, in the same file system and by no link: a volume may be somebody else's too, who
/// makes links in it at any time.
fn within(open: BorrowedFd<'_>, path: &Path) -> nix::Result<OwnedFd> {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(
        ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_XDEV,
    );
    loop {
        match openat2(open, path, how) {
            // Something was renamed or mounted at that moment, and the kernel is not sure.
            Err(Errno::EAGAIN) => {}
            other => return other,
        }
    }
}

/// A path to what a descriptor of this process holds.
fn in_proc(held: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    const CONFIG: &[u8] = br#"{"mounts": [
        {"destination": "/data", "type": "bind", "source": "data"},
        {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts"}]}"#;

    #[test]
    fn links_out_of_the_bundle_are_noticed() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let bundle = Bundle::parse(directory.path(), CONFIG).expect("a bundle");
        assert!(Held::take(&bundle).is_err(), "nothing is there");
        fs::create_dir(at("rootfs")).expect("a directory");
        for out in ["/etc", "../..", "/proc/self/cwd"] {
            symlink(out, at("data")).expect("a link");
            let error = Held::take(&bundle).err().expect("it leads out");
            assert!(error.to_string().contains("leads out of the bundle"), "{out}: {error}");
            fs::remove_file(at("data")).expect("removed");
        }
        // Even there and back: on another host it may stand elsewhere.
        fs::create_dir(at("really")).expect("a directory");
        symlink(at("really"), at("data")).expect("a link");
        assert!(obstacle(&bundle).is_some_and(|text| text.contains("leads out")));
        fs::remove_file(at("data")).expect("removed");
        // Within it links are its own affair.
        symlink("really", at("data")).expect("a link");
        assert_eq!(obstacle(&bundle), None);
    }

    #[test]
    fn a_bundle_may_be_its_own_root() {
        let directory = tempfile::tempdir().expect("a directory");
        let config = br#"{"root": {"path": "."}, "mounts": [
            {"destination": "/all", "type": "bind", "source": "."}]}"#;
        let bundle = Bundle::parse(directory.path(), config).expect("a bundle");
        assert_eq!(obstacle(&bundle), None);
    }

    #[test]
    fn what_is_held_is_mounted_whatever_its_name_comes_to_mean() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        for name in ["rootfs", "data"] {
            fs::create_dir(at(name)).expect("a directory");
            fs::write(at(name).join("whose"), name).expect("written");
        }
        let bundle = Bundle::parse(directory.path(), CONFIG).expect("a bundle");
        let held = Held::take(&bundle).expect("inside");
        for name in ["rootfs", "data"] {
            fs::rename(at(name), at(&format!("{name}-away"))).expect("renamed");
            symlink("/etc", at(name)).expect("a link");
        }
        let whose = |path: PathBuf| fs::read_to_string(path.join("whose")).expect("still there");
        assert_eq!(whose(in_proc(&held.root)), "rootfs");
        let [(_, Source::Held(data)), (_, Source::Host(hosts))] = &held.binds[..] else {
            panic!("one of the bundle, one of the host");
        };
        assert_eq!(whose(in_proc(data)), "data");
        assert_eq!(hosts, Path::new("/etc/hosts"));
    }
}
