//! Mounts of a container that CRIU takes as given from outside: it notes them by a name at the dump,
//! and is told at the restore what stands behind each name here. The names are those that runc gives them
//! (and crun, which follows it), so that either restores what the other has dumped.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat;
use serde::{Deserialize, Serialize};

use crate::bundle::{Bind, Bundle};
use crate::cgroup::Cgroups;
use crate::error::{ContainerError, Result};
use crate::landed::Landed;

/// What stands behind masked files, and what runc calls all of them.
const NULL: &str = "/dev/null";
/// Links followed in one path at most, as the kernel has it.
const LINKS: usize = 40;

/// Devices of the host that a runtime mounts where it may make none, in a user namespace, with their numbers.
const DEVICES: [(&str, (u64, u64)); 6] = [
    ("/dev/null", (1, 3)),
    ("/dev/zero", (1, 5)),
    ("/dev/full", (1, 7)),
    ("/dev/random", (1, 8)),
    ("/dev/urandom", (1, 9)),
    ("/dev/tty", (5, 0)),
];

/// A mount from outside, by where it appears in the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExternalMount {
    /// As the configuration, or the kernel, writes it.
    pub(crate) destination: String,
    pub(crate) kind: ExternalKind,
    /// Its name for CRIU.
    pub(crate) name: String,
    /// Where it really is mounted: links followed, no slash at the end. The source's to know.
    #[serde(skip)]
    pub(crate) mounted: String,
}

/// What CRIU is given at a restore, by a name that its images have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Given {
    pub(crate) key: String,
    /// What of this host is mounted there.
    pub(crate) source: PathBuf,
    /// Whether the configuration has it so that nothing can be written there.
    pub(crate) is_read_only: bool,
}

impl Given {
    /// How CRIU is told.
    pub(crate) fn told(&self) -> String {
        format!("mnt[{}]:{}", self.key, self.source.display())
    }
}

/// What stands behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ExternalKind {
    /// A bind mount of the configuration.
    Bind,
    /// A file hidden by the host's `/dev/null`.
    Masked,
    /// The container's directory of a v1 cgroup controller.
    Cgroup(String),
    /// One of the devices that every container has, the host's own.
    Device,
    /// What a process of the container has mounted once more of a bind mount of the configuration, in another
    /// place.
    Part(Part),
}

/// A part of a bind mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Part {
    /// The bind mount, by its destination in the configuration.
    pub(crate) of: String,
    /// Which part of it; empty for all.
    pub(crate) path: String,
}

/// The mounts from outside of the container whose first process is `init`.
pub(crate) fn external(bundle: &Bundle, init: i32) -> Result<Vec<ExternalMount>> {
    let mountinfo = mountinfo(init)?;
    let root = root_of(init);
    let mut found: Vec<ExternalMount> = Vec::new();
    for bind in bundle.binds() {
        let mounted = resolve(&root, &bind.destination);
        found.push(ExternalMount {
            destination: bind.destination,
            kind: ExternalKind::Bind,
            name: mounted.clone(),
            mounted,
        });
    }
    let mounts = mounts(&mountinfo);
    for destination in bundle.masked_paths() {
        let mounted = resolve(&root, &destination);
        // A masked directory is a tmpfs, which CRIU dumps like any other.
        if mounts.iter().any(|mount| mount.destination == mounted && mount.root == "/null") {
            let (kind, name) = (ExternalKind::Masked, NULL.to_owned());
            found.push(ExternalMount { destination, kind, name, mounted });
        }
    }
    let devices = DEVICES.iter().filter(|_| bundle.mapped_root().is_some());
    for (destination, numbers) in devices {
        let is_there = mounts.iter().any(|mount| mount.destination == *destination);
        if is_there && is_device(&root, &destination[1..], *numbers) {
            found.push(ExternalMount {
                destination: (*destination).to_owned(),
                kind: ExternalKind::Device,
                name: (*destination).to_owned(),
                mounted: (*destination).to_owned(),
            });
        }
    }
    let again = mounted_again(&mounts, &found);
    found.extend(again);
    for mount in mounts.into_iter().filter(|mount| mount.kind == "cgroup") {
        let controllers = mount.options.trim_start_matches("rw,").trim_start_matches("ro,");
        found.push(ExternalMount {
            destination: mount.destination.clone(),
            kind: ExternalKind::Cgroup(controllers.to_owned()),
            name: mount.destination.clone(),
            mounted: mount.destination,
        });
    }
    Ok(found)
}

/// What of the bind mounts in `found` is mounted once more. One that shares mounts with others is left out: CRIU
/// would have to know with whom.
fn mounted_again(mounts: &[Mount<'_>], found: &[ExternalMount]) -> Vec<ExternalMount> {
    let at = |destination: &str| mounts.iter().find(|mount| mount.destination == destination);
    let whole = at("/");
    let binds: Vec<_> = found
        .iter()
        .filter(|mount| mount.kind == ExternalKind::Bind)
        .filter_map(|bind| Some((bind, at(&bind.mounted)?)))
        .collect();
    let below = |mount: &Mount<'_>, whole: &Mount<'_>| -> Option<String> {
        let part = Path::new(&mount.root).strip_prefix(&whole.root).ok()?;
        let is_there = mount.device == whole.device && !mount.root.ends_with("//deleted");
        is_there.then(|| part.to_str().map(str::to_owned)).flatten()
    };
    let known = |mount: &Mount<'_>| found.iter().any(|known| known.mounted == mount.destination);
    let is_root = |mount: &Mount<'_>| whole.is_some_and(|whole| below(mount, whole).is_some());
    let fresh = mounts.iter().filter(|mount| {
        let is_own = mount.kind != "cgroup" && !mount.is_shared;
        is_own && !known(mount) && !is_root(mount)
    });
    let part = |mount: &Mount<'_>| {
        let (bind, path) =
            binds.iter().find_map(|(bind, whole)| Some((bind, below(mount, whole)?)))?;
        Some(ExternalMount {
            destination: mount.destination.clone(),
            kind: ExternalKind::Part(Part { of: bind.destination.clone(), path }),
            name: mount.destination.clone(),
            mounted: mount.destination.clone(),
        })
    };
    fresh.filter_map(part).collect()
}

/// Where the root file system and the bind mounts of `bundle` are in the container whose first process is
/// `init`, and what of the host they show.
pub(crate) fn sources(bundle: &Bundle, init: i32) -> Vec<(PathBuf, PathBuf)> {
    let root = root_of(init);
    let real = |source: PathBuf| match bundle.is_outside(&source) {
        true => fs::canonicalize(&source).unwrap_or(source),
        false => source,
    };
    let bind =
        |bind: crate::bundle::Bind| (resolve(&root, &bind.destination).into(), real(bind.source));
    let binds = bundle.binds().into_iter().map(bind);
    [(PathBuf::from("/"), bundle.rootfs())].into_iter().chain(binds).collect()
}

/// What is wrong with the bind mounts of the container whose first process is `init`: one that is
/// not where it should be CRIU would take for the container's own, and not know how to dump.
pub(crate) fn obstacles(bundle: &Bundle, init: i32) -> Result<Vec<String>> {
    let mountinfo = mountinfo(init)?;
    let mounts = mounts(&mountinfo);
    let root = root_of(init);
    let missing = |destination: &String| {
        let mounted = resolve(&root, destination);
        !mounts.iter().any(|mount| mount.destination == mounted)
    };
    let destinations = bundle.binds().into_iter().map(|bind| bind.destination);
    let said = |destination: String| {
        format!("The configuration mounts {destination}, but nothing is mounted there now")
    };
    Ok(destinations.filter(missing).map(said).collect())
}

/// What is mounted within the mounts at `destinations`, with the one that it is in, other than what the
/// configuration mounts.
pub(crate) fn within(
    bundle: &Bundle,
    init: i32,
    destinations: &[&str],
) -> Result<Vec<(String, String)>> {
    let mountinfo = mountinfo(init)?;
    let root = root_of(init);
    let outer: Vec<_> = destinations.iter().map(|outer| resolve(&root, outer)).collect();
    let known: Vec<_> = bundle.destinations().map(|known| resolve(&root, known)).collect();
    let found = mounts(&mountinfo).into_iter().filter_map(|mount| {
        let inner = mount.destination;
        let around = outer.iter().find(|outer| Path::new(&inner).starts_with(outer))?.clone();
        (!known.contains(&inner)).then_some((inner, around))
    });
    Ok(found.collect())
}

impl ExternalMount {
    /// How CRIU is told of it at the dump.
    pub(crate) fn at_dump(&self) -> String {
        format!("mnt[{}]:{}", self.mounted, self.name)
    }

    /// What CRIU is given at the restore to mount there.
    pub(crate) fn at_restore(
        &self,
        bundle: &Bundle,
        landed: &Landed,
        cgroups: &Cgroups,
    ) -> Result<Given> {
        // It is free text, and these would end it. Others than paths have a meaning of their own for CRIU.
        if self.name.contains([']', '\0']) || !self.name.starts_with('/') {
            return Err(self.unknown());
        }
        let source = self.source(bundle, landed, cgroups)?;
        let of = match &self.kind {
            ExternalKind::Bind => Some(&self.destination),
            ExternalKind::Part(part) => Some(&part.of),
            _ => None,
        };
        let is_of = |bind: &Bind| Some(&bind.destination) == of && !bind.writable;
        let is_read_only = match self.kind {
            ExternalKind::Cgroup(_) => bundle.has_cgroups_read_only(),
            _ => bundle.binds().iter().any(is_of),
        };
        Ok(Given { key: self.name.clone(), source, is_read_only })
    }

    fn unknown(&self) -> ContainerError {
        ContainerError::section(
            "container/state",
            format!("names mount {}, which the configuration does not have", self.destination),
        )
    }

    /// What of this host stands behind it.
    fn source(&self, bundle: &Bundle, landed: &Landed, cgroups: &Cgroups) -> Result<PathBuf> {
        let unknown = || self.unknown();
        match &self.kind {
            ExternalKind::Bind => {
                landed.source(&self.destination).map(Path::to_owned).ok_or_else(unknown)
            }
            ExternalKind::Part(_) => {
                landed.part(&self.name).map(Path::to_owned).ok_or_else(unknown)
            }
            ExternalKind::Masked if bundle.masked_paths().contains(&self.destination) => {
                Ok(Path::new(NULL).to_owned())
            }
            ExternalKind::Device if bundle.mapped_root().is_some() => {
                let known = DEVICES.iter().find(|(device, _)| *device == self.destination);
                known.map(|(device, _)| PathBuf::from(device)).ok_or_else(unknown)
            }
            // Free text too, not the configuration's.
            ExternalKind::Cgroup(_) if self.name.contains(':') => Err(unknown()),
            ExternalKind::Cgroup(controllers) if bundle.mounts_cgroups() => {
                // Mounted together (`cpu,cpuacct`), they share one directory.
                let mut each = controllers.split(',');
                let found = each.find_map(|name| cgroups.controller(name));
                found.map(Path::to_owned).ok_or_else(unknown)
            }
            _ => Err(unknown()),
        }
    }
}

/// Whether `path` in the tree at `root` is the character device of these numbers. The tree is the container's,
/// and no link of it leads out.
fn is_device(root: &Path, path: &str, (major, minor): (u64, u64)) -> bool {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let Ok(root) = File::open(root) else { return false };
    let there = openat2(&root, path, how).and_then(stat::fstat);
    there.is_ok_and(|there| {
        there.st_mode & libc::S_IFMT == libc::S_IFCHR
            && (stat::major(there.st_rdev), stat::minor(there.st_rdev)) == (major, minor)
    })
}

struct Mount<'a> {
    device: &'a str,
    root: String,
    destination: String,
    kind: &'a str,
    options: &'a str,
    /// Whether it gets mounts from others, or gives them any.
    is_shared: bool,
}

fn mountinfo(init: i32) -> Result<String> {
    let path = format!("/proc/{init}/mountinfo");
    fs::read_to_string(&path).map_err(ContainerError::io(format!("read {path}")))
}

fn root_of(init: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{init}/root"))
}

/// Where `destination` is in the tree at `root`: absolute, without links, dots and doubled slashes.
/// What does not exist counts as no link. The tree is the container's to change, so the result is
/// good for comparing, not for opening.
fn resolve(root: &Path, destination: &str) -> String {
    let mut to_go: Vec<OsString> = parts(Path::new(destination));
    let mut resolved = PathBuf::new();
    let mut links = 0;
    while let Some(part) = to_go.pop() {
        if part == ".." {
            resolved.pop();
            continue;
        }
        resolved.push(&part);
        let Ok(target) = fs::read_link(root.join(&resolved)) else { continue };
        links += 1;
        if links > LINKS {
            break;
        }
        resolved.pop();
        if target.is_absolute() {
            resolved = PathBuf::new();
        }
        to_go.extend(parts(&target));
    }
    format!("/{}", resolved.display())
}

/// The parts of a path, the first at the end.
fn parts(path: &Path) -> Vec<OsString> {
    let parts = path.components().rev().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    parts.collect()
}

/// A path of mountinfo, where blanks and the like are three octal digits.
fn unescaped(text: &str) -> String {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    // The backslash comes last, so that none is made that would begin an escape.
    escapes.iter().fold(text.to_owned(), |text, (escape, with)| text.replace(escape, with))
}

fn mounts(mountinfo: &str) -> Vec<Mount<'_>> {
    let mount = |line| -> Option<Mount<'_>> {
        let (left, right): (&str, &str) = str::split_once(line, " - ")?;
        let mut left = left.split(' ').skip(2);
        let mut right = right.split(' ');
        Some(Mount {
            device: left.next()?,
            root: unescaped(left.next()?),
            destination: unescaped(left.next()?),
            kind: right.next()?,
            options: right.nth(1)?,
            // Behind the options of the mount.
            is_shared: left.nth(1).is_some(),
        })
    };
    mountinfo.lines().filter_map(mount).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_resolved_as_the_runtime_does() {
        let root = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(root.path().join("run/deep")).expect("directories");
        let link = |target: &str, name: &str| {
            std::os::unix::fs::symlink(target, root.path().join(name)).expect("a link");
        };
        link("/run", "abs");
        link("../../run/deep", "run/rel");
        link("loop", "loop");
        let resolved = |destination| resolve(root.path(), destination);
        assert_eq!(resolved("/data/"), "/data");
        assert_eq!(resolved("data//x/."), "/data/x");
        assert_eq!(resolved("/abs/rel/x"), "/run/deep/x");
        assert_eq!(resolved("/../../abs/.."), "/");
        assert!(resolved("/loop/x").starts_with('/'));
        assert_eq!(unescaped("/a\\040b\\134040"), "/a b\\040");
    }

    #[test]
    fn what_is_mounted_once_more_of_a_volume_is_a_part_of_it() {
        let mountinfo = "\
            1 0 8:1 /b/rootfs / rw - ext4 d rw\n2 1 8:1 /vol /data rw - ext4 d rw\n\
            3 1 8:1 /vol/a\\040b /x rw - ext4 d rw\n4 1 8:1 /vol /y ro - ext4 d rw\n\
            5 1 8:1 /vol/z /s rw shared:7 - ext4 d rw\n6 1 8:1 /vol/gone//deleted /g rw - ext4 d rw\n\
            7 1 8:1 /b/rootfs/bin /bin2 rw - ext4 d rw\n8 1 8:1 /volumes /v rw - ext4 d rw\n\
            9 1 8:2 /vol/z /o rw - ext4 d rw\n";
        let bind = ExternalMount {
            destination: "/link/data".into(),
            kind: ExternalKind::Bind,
            name: "/data".into(),
            mounted: "/data".into(),
        };
        let found = mounted_again(&mounts(mountinfo), &[bind]);
        let found: Vec<_> =
            found.into_iter().map(|mount| (mount.mounted, mount.name, mount.kind)).collect();
        let part = |at: &str, path: &str| {
            let part = Part { of: "/link/data".into(), path: path.into() };
            (at.to_owned(), at.to_owned(), ExternalKind::Part(part))
        };
        assert_eq!(found, [part("/x", "a b"), part("/y", "")]);
    }

    #[test]
    fn a_peer_names_only_mounts_of_the_configuration() {
        let config = br#"{"mounts": [{"destination": "/data", "type": "bind", "source": "data"}]}"#;
        let bundle = Bundle::parse(Path::new("/b"), config).expect("a bundle");
        let landed = Landed::with_bind("/data", "/store/bind-0");
        let cgroups =
            Cgroups::from_state(&serde_json::json!({"": "/sys/fs/cgroup/x"})).expect("cgroups");
        let mount = |destination: &str, kind| ExternalMount {
            destination: destination.into(),
            kind,
            name: destination.into(),
            mounted: String::new(),
        };
        let good = mount("/data", ExternalKind::Bind).at_restore(&bundle, &landed, &cgroups);
        assert_eq!(good.expect("known").told(), "mnt[/data]:/store/bind-0");
        // What the source calls it, CRIU's images call it.
        let linked =
            ExternalMount { name: "/srv/data".into(), ..mount("/data", ExternalKind::Bind) };
        let good = linked.at_restore(&bundle, &landed, &cgroups);
        assert_eq!(good.expect("known").told(), "mnt[/srv/data]:/store/bind-0");
        // CRIU would mount what its image says, or what it finds.
        for name in ["/data]:/etc", "CRIU:EXTERNAL_DEV", "CRIU:AUTOGENERATED", "data", ""] {
            let forged = ExternalMount { name: name.into(), ..linked.clone() };
            assert!(forged.at_restore(&bundle, &landed, &cgroups).is_err(), "{name}");
        }
        for kind in
            [ExternalKind::Bind, ExternalKind::Masked, ExternalKind::Cgroup("memory".into())]
        {
            assert!(mount("/etc", kind).at_restore(&bundle, &landed, &cgroups).is_err());
        }
        // Devices of the host only where a runtime brings them, and only the common ones.
        let device = |destination: &str, bundle: &Bundle| {
            mount(destination, ExternalKind::Device).at_restore(bundle, &landed, &cgroups)
        };
        assert!(device("/dev/null", &bundle).is_err());
        let mapped = br#"{"linux": {"namespaces": [{"type": "user"}]}}"#;
        let mapped = Bundle::parse(Path::new("/b"), mapped).expect("a bundle");
        assert_eq!(device("/dev/null", &mapped).expect("known").told(), "mnt[/dev/null]:/dev/null");
        assert!(device("/dev/kmsg", &mapped).is_err());
        // Where cgroups are mounted is the source's to say, within the form that CRIU knows.
        let config = br#"{"mounts": [{"destination": "/sys/fs/cgroup", "type": "cgroup"}]}"#;
        let bundle = Bundle::parse(Path::new("/b"), config).expect("a bundle");
        let paths = serde_json::json!({"memory": "/cg/memory/x", "freezer": "/cg/freezer/x"});
        let cgroups = Cgroups::from_state(&paths).expect("cgroups");
        let mount_at = |destination| mount(destination, ExternalKind::Cgroup("memory".into()));
        let at = |destination| mount_at(destination).at_restore(&bundle, &landed, &cgroups);
        let good = at("/sys/fs/cgroup/memory").expect("known");
        assert!(!good.is_read_only, "the configuration does not say so");
        for (options, is_read_only) in [("ro", true), ("rw", false)] {
            let mount = serde_json::json!({
                "destination": "/c", "type": "cgroup", "options": ["nosuid", options],
            });
            let config = serde_json::json!({"mounts": [mount]}).to_string();
            let bundle = Bundle::parse(Path::new("/b"), config.as_bytes()).expect("a bundle");
            let mount = mount_at("/c/memory");
            let given = mount.at_restore(&bundle, &landed, &cgroups).expect("known");
            assert_eq!(given.is_read_only, is_read_only, "{options}");
        }
        assert_eq!(good.told(), "mnt[/sys/fs/cgroup/memory]:/cg/memory/x");
        for bad in ["/x]:/etc", "/x:/etc", "/x\0"] {
            assert!(at(bad).is_err(), "{bad:?}");
        }
    }
}
