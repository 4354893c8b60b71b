//! What of the host a container may see but not change, or not see at all, stays so: the configuration's
//! read-only and hidden paths in `/proc` and `/sys`, and bind mounts and cgroups that are read only.
//!
//! Only a container that may mount (CAP_SYS_ADMIN) can have taken such a protection away by itself: from
//! any other one an image without it was forged, or made on a host that does not have the path.

use std::path::Path;

use serde_json::Value;

use super::origins::{Origin, parts};
use super::{Confined, Fault};
use crate::mountable::{CGROUP2, PROC, SYSFS, TMPFS};

/// Paths that each kernel has whose containers move: what else is protected need not exist everywhere, and is
/// not held to be there.
const READ_ONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
const HIDDEN: [&str; 3] = ["/proc/kcore", "/proc/keys", "/sys/firmware"];
/// File systems that show the host's kernel, by the name that a configuration has for them.
const OF_KERNEL: [(&str, u64); 2] = [("proc", PROC), ("sysfs", SYSFS)];
/// What stands behind a file that is hidden.
const NULL: &str = "/dev/null";

impl Confined<'_> {
    /// Whether nothing is less protected than the configuration wants.
    pub(super) fn protected(&self, mounts: &[Origin<'_>]) -> Result<(), Fault> {
        if may_mount(self.bundle.config()) {
            return Ok(());
        }
        for mount in mounts {
            let fine = match mount.key {
                Some(key) => mount.is_read_only || !self.is_read_only(key),
                // As the ones of the first version are, which are given. In a user namespace runc may have to bind
                // it instead, which can be written to then.
                None if mount.kind == CGROUP2 && self.bundle.mapped_root().is_none() => {
                    mount.is_read_only || !self.bundle.has_cgroups_read_only()
                }
                None => self.shows_kernel_rightly(mount),
            };
            if !fine {
                return Err(format!(
                    "has a mount at {:?} that would show more, or be written to, against its configuration",
                    mount.point
                ));
            }
        }
        let wanted = |list: &str, path: &str| {
            let listed = self.bundle.config()["linux"][list].as_array().into_iter().flatten();
            let mut listed = listed.filter_map(Value::as_str);
            listed.any(|listed| same(listed, path)) && Path::new(path).exists()
        };
        let read_only = READ_ONLY.iter().filter(|path| wanted("readonlyPaths", path));
        for path in read_only {
            self.covered(mounts, path, |over| over.is_read_only || self.is_hidden(over))?;
        }
        let hidden = HIDDEN.iter().filter(|path| wanted("maskedPaths", path));
        for path in hidden {
            self.covered(mounts, path, |over| self.is_hidden(over))?;
        }
        Ok(())
    }

    /// Whether what is given by that key is to be read only.
    fn is_read_only(&self, key: &str) -> bool {
        self.given.iter().any(|given| given.key == key && given.is_read_only)
    }

    /// Whether a file system of the kernel's is mounted where the configuration has it, and as it has it; a
    /// part of one is read only.
    fn shows_kernel_rightly(&self, mount: &Origin<'_>) -> bool {
        let Some((name, _)) = OF_KERNEL.iter().find(|(_, kind)| *kind == mount.kind) else {
            return true;
        };
        if parts(mount.root).next().is_some() {
            return mount.is_read_only;
        }
        let mounts = self.bundle.config()["mounts"].as_array().into_iter().flatten();
        let mut there = mounts.filter(|wanted| {
            let destination = wanted["destination"].as_str().unwrap_or_default();
            wanted["type"] == *name && same(destination, mount.point)
        });
        let is_writable = |wanted: &Value| !crate::bundle::is_read_only(wanted);
        there.next_back().is_some_and(|wanted| mount.is_read_only || is_writable(wanted))
    }

    /// Whether nothing of what was there is seen through that mount.
    fn is_hidden(&self, mount: &Origin<'_>) -> bool {
        match mount.key {
            Some(key) => {
                self.given.iter().any(|given| given.key == key && given.source == Path::new(NULL))
            }
            None => mount.kind == TMPFS,
        }
    }

    /// Whether what is at `path`, on a file system of the kernel's in the container, is behind a mount that is
    /// right, and no other is over that.
    fn covered(
        &self,
        mounts: &[Origin<'_>],
        path: &str,
        is_right: impl Fn(&Origin<'_>) -> bool,
    ) -> Result<(), Fault> {
        // From the nearest to the root.
        let mut around: Vec<_> =
            mounts.iter().filter(|mount| is_at_or_above(mount.point, path)).collect();
        around.sort_by_key(|mount| std::cmp::Reverse(parts(mount.point).count()));
        let is_shown = around.iter().any(|mount| {
            mount.key.is_none() && OF_KERNEL.iter().any(|(_, kind)| *kind == mount.kind)
        });
        if !is_shown {
            return Ok(());
        }
        let bad = |what: &str| Err(format!("has {path:?} {what}, against its configuration"));
        for pair in around.windows(2) {
            if same(pair[0].point, pair[1].point) || pair[0].parent != pair[1].number {
                return bad("below other mounts than it could be");
            }
        }
        match around.first() {
            Some(over) if same(over.point, path) && is_right(over) => Ok(()),
            // What is around it may be hidden as a whole.
            Some(over) if !same(over.point, path) && self.is_hidden(over) => Ok(()),
            _ => bad("unprotected"),
        }
    }
}

/// Whether the container may mount. Who says nothing of rights says nothing of protection either.
fn may_mount(config: &Value) -> bool {
    let bounding = &config["process"]["capabilities"]["bounding"];
    let has =
        |name: &Value| name.as_str().is_some_and(|name| name.eq_ignore_ascii_case("CAP_SYS_ADMIN"));
    bounding.as_array().is_none_or(|bounding| bounding.iter().any(has))
}

fn same(one: &str, other: &str) -> bool {
    parts(one).eq(parts(other))
}

fn is_at_or_above(point: &str, path: &str) -> bool {
    let mut wanted = parts(path);
    parts(point).all(|part| wanted.next() == Some(part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;
    use crate::mounts::Given;

    fn config(rights: &[&str]) -> Vec<u8> {
        let config = serde_json::json!({
            "process": {"capabilities": {"bounding": rights}},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/sys/", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"]},
            ],
            "linux": {
                "readonlyPaths": ["/proc/sys", "/proc/irq", "/proc/no-such"],
                "maskedPaths": ["/proc/keys", "/sys/firmware", "/proc/nobody-has-it"],
            },
        });
        config.to_string().into_bytes()
    }

    fn mount<'a>(number: u64, parent: u64, kind: u64, root: &'a str, point: &'a str) -> Origin<'a> {
        let is_read_only = !["/", "/proc"].contains(&point);
        Origin { number, parent, kind, device: kind, root, point, key: None, is_read_only }
    }

    fn honest<'a>() -> Vec<Origin<'a>> {
        vec![
            mount(1, 0, 0, "/", "/"),
            mount(2, 1, PROC, "/", "/proc"),
            mount(3, 2, PROC, "/sys", "/proc/sys"),
            mount(4, 2, PROC, "/irq", "/proc/irq"),
            Origin { key: Some("/dev/null"), ..mount(5, 2, 3, "/null", "/proc/keys") },
            mount(6, 1, SYSFS, "/", "/sys"),
            mount(7, 6, TMPFS, "/", "/sys/firmware"),
            Origin { key: Some("/v"), ..mount(8, 1, 0, "/v", "/v") },
            Origin { key: Some("/w"), is_read_only: false, ..mount(9, 1, 0, "/w", "/w") },
            mount(10, 6, CGROUP2, "/", "/sys/fs/cgroup"),
        ]
    }

    #[test]
    fn what_is_protected_stays_so() {
        let given = [("/dev/null", NULL, false), ("/v", "/srv/v", true), ("/w", "/srv/w", false)];
        let given = given.map(|(key, source, is_read_only)| Given {
            key: key.into(),
            source: source.into(),
            is_read_only,
        });
        let checked = |rights: &[&str], mounts: &[Origin<'_>]| {
            let bundle = Bundle::parse(Path::new("/b"), &config(rights)).expect("a bundle");
            Confined { bundle: &bundle, root: Path::new("/"), given: &given }.protected(mounts)
        };
        assert_eq!(checked(&["CAP_CHOWN"], &honest()), Ok(()));
        type Forge = fn(&mut Vec<Origin<'_>>);
        let forged: [(&str, Forge); 16] = [
            ("no /proc/sys", |all| all.retain(|mount| mount.number != 3)),
            ("no mask", |all| all.retain(|mount| mount.number != 5)),
            ("no mask of a directory", |all| all.retain(|mount| mount.number != 7)),
            ("/proc/sys can be written", |all| all[2].is_read_only = false),
            ("/sys can be written", |all| all[5].is_read_only = false),
            ("a volume can be written", |all| all[7].is_read_only = false),
            ("cgroups can be written", |all| all[9].is_read_only = false),
            ("a mask that is a volume", |all| all[4].key = Some("/v")),
            ("a mask that shows it", |all| all[4] = mount(5, 2, PROC, "/keys", "/proc/keys")),
            ("below /proc", |all| all[2].parent = 1),
            ("over it again", |all| all.push(mount(20, 3, PROC, "/sys", "/proc/sys"))),
            ("beside it again", |all| all.push(mount(20, 2, PROC, "/sys", "/proc/sys"))),
            ("/proc again", |all| all.push(mount(20, 2, PROC, "/", "/proc"))),
            ("/proc elsewhere", |all| all.push(mount(20, 1, PROC, "/", "/x"))),
            ("/sys elsewhere", |all| all.push(mount(20, 1, SYSFS, "/", "/proc/x"))),
            ("something over /proc", |all| all.push(mount(20, 1, 9, "/", "/proc"))),
        ];
        for (what, forge) in forged {
            let mut mounts = honest();
            forge(&mut mounts);
            assert!(checked(&["CAP_CHOWN"], &mounts).is_err(), "{what}");
            // It could have done that by itself.
            assert_eq!(checked(&["CAP_CHOWN", "CAP_SYS_ADMIN"], &mounts), Ok(()), "{what}");
        }
        // Hidden as a whole, or nothing of the kernel's there at all.
        let mut mounts = honest();
        mounts.retain(|mount| mount.number != 3);
        mounts.push(mount(20, 2, TMPFS, "/", "/proc/sys"));
        assert_eq!(checked(&[], &mounts), Ok(()));
        mounts.retain(|mount| !mount.point.starts_with("/proc"));
        assert_eq!(checked(&[], &mounts), Ok(()));
    }
}
