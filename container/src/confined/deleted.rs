//! What CRIU makes again by its path comes to lie in the container, and nowhere else on this host.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::origins::Origin;
use super::remaps::{self, GhostImage, REMAPS};
use super::{Confined, Fault};
use crate::error::{ContainerError, Result};
use crate::ghosts::{Ghost, Ground};

impl Confined<'_> {
    /// Looks at every file in the images that was deleted.
    pub(super) fn deleted(&self, images: &Path, mounts: &[Origin<'_>]) -> Result<()> {
        for ghost in remaps::ghosts(images)? {
            self.ghost(mounts, &ghost)
                .map_err(|what| ContainerError::malformed(images.join(REMAPS), what))?;
        }
        Ok(())
    }

    fn ghost(&self, mounts: &[Origin<'_>], ghost: &GhostImage) -> std::result::Result<(), Fault> {
        let shown = String::from_utf8_lossy(&ghost.path);
        let on = mounts.iter().find(|mount| mount.number == u64::from(ghost.mount));
        let on = on.ok_or_else(|| format!("has {shown:?}, which is on none of the mounts"))?;
        let open = match self.ground(mounts, on)? {
            Some(path) => Some(opened(&path).map_err(|error| {
                format!("has {shown:?}, and {} cannot be opened: {error}", path.display())
            })?),
            None => None,
        };
        let ground = open.as_ref().map_or(Ground::Unseen, |open| Ground::Seen(open.as_fd()));
        let (path, point) = (&ghost.path[..], on.point.as_bytes());
        Ghost { path, point, mode: ghost.mode }
            .check(ground)
            .map_err(|stray| format!("has {shown:?}, which is deleted: {stray}"))
    }

    /// Where that is which CRIU mounts; nothing when it comes out of images.
    fn ground(
        &self,
        mounts: &[Origin<'_>],
        mount: &Origin<'_>,
    ) -> std::result::Result<Option<PathBuf>, Fault> {
        if let Some(key) = mount.key {
            let given = self.given.iter().find(|given| given.key == key);
            return match given {
                Some(given) => Ok(Some(given.source.clone())),
                None => Err("has a mount from outside that is not given".to_owned()),
            };
        }
        let whole = mounts.iter().find(|whole| whole.is_root() && whole.makes(mount));
        Ok(whole.and_then(|whole| {
            let part = Path::new(mount.root).strip_prefix(whole.root).ok()?;
            Some(self.root.join(part))
        }))
    }
}

fn opened(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::super::remaps::tests::{contents, file, remap, write};
    use super::super::remaps::{FILES_MARKS, REMAPS_MARKS};
    use super::*;
    use crate::bundle::Bundle;
    use crate::mounts::Given;

    const DIRECTORY: u32 = libc::S_IFDIR | 0o777;
    const FILE: u32 = libc::S_IFREG | 0o600;

    /// A mount of that number, on a device of its own unless it is a part of the root.
    fn mount<'a>(number: u64, root: &'a str, point: &'a str, key: Option<&'a str>) -> Origin<'a> {
        let device = if root.starts_with("/b") { 1 } else { number };
        Origin { number, parent: 1, kind: 0, device, root, point, key, is_read_only: false }
    }

    #[test]
    fn nothing_is_made_again_outside_of_the_container() {
        let (tree, images) = (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("two"));
        let at = |name: &str| tree.path().join(name);
        for name in ["rootfs/d", "rootfs/part", "volume"] {
            fs::create_dir_all(at(name)).expect("a directory");
        }
        for name in ["rootfs/d/a", "rootfs/part/a", "volume/a"] {
            symlink("/", at(name)).expect("a link");
        }
        let bundle = Bundle::parse(Path::new("/b"), b"{}").expect("a bundle");
        let (root, given) =
            (at("rootfs"), [Given { key: "/v".into(), source: at("volume"), is_read_only: false }]);
        let confined = Confined { bundle: &bundle, root: &root, given: &given };
        let mounts = [
            mount(1, "/b", "/", None),
            mount(2, "/x", "/v", Some("/v")),
            mount(3, "/b/part", "/p", None),
            mount(4, "/", "/tmp", None),
            mount(5, "/x", "/other", Some("/other")),
        ];
        let checked = |path: &str, on: u64, mode| {
            let images = images.path();
            write(images, REMAPS, REMAPS_MARKS, &[remap(7, 1, Some(1))]);
            write(images, "files.img", FILES_MARKS, &[file(7, path, on)]);
            contents(images, 1, mode);
            confined.deleted(images, &mounts)
        };
        for mode in [DIRECTORY, FILE] {
            for (fine, on) in
                [("/d/etc", 1), ("/gone/etc", 1), ("/v/etc", 2), ("/p/etc", 3), ("/tmp/etc", 4)]
            {
                checked(fine, on, mode).unwrap_or_else(|error| panic!("{fine}: {error}"));
            }
            for (forged, on) in [
                ("/d/a/etc", 1),
                ("/v/a/etc", 2),
                ("/p/a/etc", 3),
                ("/v/etc", 3),
                ("/other/etc", 5),
                ("/etc", 6),
                ("/..", 1),
                ("/", 1),
            ] {
                let error = checked(forged, on, mode).expect_err(forged).to_string();
                assert!(error.contains("remap-fpath.img has "), "{error}");
            }
        }
        checked("/d", 1, FILE).expect("it has another name");
        checked("/d", 1, DIRECTORY).expect_err("it would get another mode");
        checked("/tmp/a/etc", 4, DIRECTORY).expect_err("nobody sees what is there");
    }
}
