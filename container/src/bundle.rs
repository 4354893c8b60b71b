//! An OCI bundle: reading `config.json`, what in it keeps a container from being run or moved by
//! this version, and the copy of it that the runtime is given.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use decamp_shared::workload::{Refusal, RefusalCode};
use serde_json::{Value, json};

use crate::error::{ContainerError, Result};
use crate::podman::own::Own;
use crate::volumes::Volume;

/// A `config.json` is never longer.
const CONFIG_CAP: u64 = 16 << 20;
/// Files of the host that any container may mount without being bound to its host by it.
const HOST_FILES: [&str; 4] =
    ["/etc/resolv.conf", "/etc/hosts", "/etc/hostname", "/run/.containerenv"];
const OVERLAY: &str = "The configuration mounts an overlay, whose directories are the host's: CRIU would put it \
                       together again from whatever its images say";
/// Namespaces that it may have beside those.
const OTHER_NAMESPACES: [&str; 2] = ["user", "cgroup"];
/// Namespaces that a container must have of its own.
const NEEDED_NAMESPACES: [&str; 5] = ["pid", "network", "ipc", "uts", "mount"];

/// What must have a certain form where it is there at all: what is read and changed here.
type Shape = (&'static str, &'static str, fn(&Value) -> bool);
const SHAPES: [Shape; 6] = [
    ("/root", "no object", Value::is_object),
    ("/process", "no object", Value::is_object),
    ("/linux", "no object", Value::is_object),
    ("/linux/namespaces", "no array", Value::is_array),
    ("/mounts", "no array", Value::is_array),
    ("/hooks", "no object", Value::is_object),
];

/// A bundle and its configuration.
#[derive(Clone, Debug)]
pub(crate) struct Bundle {
    directory: PathBuf,
    config: Value,
    /// What stands for files of the host here, by destination.
    stand_ins: BTreeMap<String, PathBuf>,
    /// Where sources of bind mounts stand on this host that are not where the configuration has them.
    volumes: Vec<Volume>,
}

/// A bind mount of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bind {
    /// Where it appears in the container.
    pub(crate) destination: String,
    /// What of the host it shows, absolute.
    pub(crate) source: PathBuf,
    /// The same as the configuration has it.
    pub(crate) written: String,
    /// Whether something in the container may write there.
    pub(crate) writable: bool,
    /// How it is mounted, as the configuration has it.
    pub(crate) options: Vec<String>,
}

impl Bundle {
    /// Reads `directory/config.json`.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        Self::read_from(directory, &directory.join("config.json"))
    }

    /// A bundle at `directory` whose configuration stands in `path`.
    pub(crate) fn read_from(directory: &Path, path: &Path) -> Result<Self> {
        let length = fs::metadata(path)
            .map_err(ContainerError::io(format!("read {}", path.display())))?
            .len();
        if length > CONFIG_CAP {
            return Err(ContainerError::malformed(path, "is longer than any configuration"));
        }
        let text =
            fs::read(path).map_err(ContainerError::io(format!("read {}", path.display())))?;
        Self::parse(directory, &text)
    }

    /// A bundle at `directory` whose configuration is `text`.
    pub(crate) fn parse(directory: &Path, text: &[u8]) -> Result<Self> {
        let path = directory.join("config.json");
        let config: Value = serde_json::from_slice(text)
            .map_err(|error| ContainerError::malformed(&path, format!("is no JSON: {error}")))?;
        if !config.is_object() {
            return Err(ContainerError::malformed(path, "is no JSON object"));
        }
        for (pointer, kind, is) in SHAPES {
            if config.pointer(pointer).is_some_and(|value| !value.is_null() && !is(value)) {
                return Err(ContainerError::malformed(
                    path,
                    format!("has {pointer} that is {kind}"),
                ));
            }
        }
        Ok(Self {
            directory: directory.to_owned(),
            config,
            stand_ins: BTreeMap::new(),
            volumes: Vec::new(),
        })
    }

    /// The same bundle, with what is mounted from outside of it where `volumes` say.
    pub(crate) fn with_volumes(self, volumes: &[Volume]) -> Self {
        Self { volumes: volumes.to_owned(), ..self }
    }

    /// Where it stands.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The root file system: the path in the configuration, relative to the bundle.
    pub(crate) fn rootfs(&self) -> PathBuf {
        let path = self.config.pointer("/root/path").and_then(Value::as_str).unwrap_or("rootfs");
        self.directory.join(path)
    }

    /// The configuration.
    pub(crate) fn config(&self) -> &Value {
        &self.config
    }

    /// The configuration as text, for the manifest.
    pub(crate) fn config_text(&self) -> Vec<u8> {
        self.config.to_string().into_bytes()
    }

    /// Bind mounts, sources made absolute.
    pub(crate) fn binds(&self) -> Vec<Bind> {
        let mounts = self.config.get("mounts").and_then(Value::as_array);
        mounts
            .into_iter()
            .flatten()
            .filter(|mount| is_bind(mount))
            .filter_map(|mount| {
                let written = mount.get("source")?.as_str()?;
                Some(Bind {
                    destination: mount.get("destination")?.as_str()?.to_owned(),
                    source: self.source(written),
                    written: written.to_owned(),
                    writable: is_writable(mount),
                    options: options(mount).map(str::to_owned).collect(),
                })
            })
            .collect()
    }

    /// What of this host the configuration means by `written`.
    fn source(&self, written: &str) -> PathBuf {
        match self.volume(written) {
            Some(volume) => volume.path.clone(),
            None => self.directory.join(written),
        }
    }

    /// Where the source that the configuration has as `written` stands, if it is noted.
    pub(crate) fn volume(&self, written: &str) -> Option<&Volume> {
        self.volumes.iter().find(|volume| volume.source == written)
    }

    /// Whether a source of a bind mount is something of the host that does not travel with the bundle,
    /// and is not the same on every host.
    pub(crate) fn is_outside(&self, source: &Path) -> bool {
        let below = is_plainly_below(source, &self.directory) || is_inside(source, &self.directory);
        !is_host_file(source) && !below
    }

    /// Where it mounts anything.
    pub(crate) fn destinations(&self) -> impl Iterator<Item = &str> {
        let mounts = self.config.get("mounts").and_then(Value::as_array);
        mounts.into_iter().flatten().filter_map(|mount| mount.get("destination")?.as_str())
    }

    /// Whether it mounts the cgroup hierarchies.
    pub(crate) fn mounts_cgroups(&self) -> bool {
        self.mounts_kind("cgroup")
    }

    fn mounts_kind(&self, kind: &str) -> bool {
        self.of_kind(kind).next().is_some()
    }

    fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Value> {
        let mounts = self.config.get("mounts").and_then(Value::as_array);
        let mounts = mounts.into_iter().flatten();
        mounts.filter(move |mount| mount.get("type").and_then(Value::as_str) == Some(kind))
    }

    /// Whether it mounts cgroups, and always so that nothing can be written there.
    pub(crate) fn has_cgroups_read_only(&self) -> bool {
        self.mounts_cgroups() && self.of_kind("cgroup").all(is_read_only)
    }

    /// Paths that are hidden in the container.
    pub(crate) fn masked_paths(&self) -> Vec<String> {
        let paths = self.config.pointer("/linux/maskedPaths").and_then(Value::as_array);
        paths.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// Whether it asks for a terminal.
    pub(crate) fn wants_terminal(&self) -> bool {
        self.config.pointer("/process/terminal").and_then(Value::as_bool) == Some(true)
    }

    /// The same bundle, with a terminal.
    pub(crate) fn with_terminal(mut self) -> Self {
        self.config["process"]["terminal"] = json!(true);
        self
    }

    /// A bundle at `directory` whose configuration is `changed` from this one's.
    pub(crate) fn moved_to(self, directory: &Path, changed: impl FnOnce(Value) -> Value) -> Self {
        Self { directory: directory.to_owned(), config: changed(self.config), ..self }
    }

    /// Has `files` mounted, by destination, where the configuration mounts files of the host.
    pub(crate) fn stand_in(&mut self, files: BTreeMap<String, PathBuf>) {
        self.stand_ins = files;
    }

    /// The file of this host that is mounted on `destination`, where the configuration says `source`.
    pub(crate) fn host_file(&self, destination: &str, source: PathBuf) -> PathBuf {
        self.stand_ins.get(destination).cloned().unwrap_or(source)
    }

    /// The same bundle as if its network namespace was its own: one that it joined by a path is made anew
    /// wherever it comes.
    pub(crate) fn with_own_network(mut self) -> Self {
        if let Some(namespaces) = self.config["linux"]["namespaces"].as_array_mut() {
            for namespace in namespaces.iter_mut().filter_map(Value::as_object_mut) {
                if namespace.get("type").and_then(Value::as_str) == Some("network") {
                    namespace.remove("path");
                }
            }
        }
        self
    }

    /// Why this version cannot run it under a keeper.
    pub(crate) fn run_refusals(&self) -> Vec<Refusal> {
        let mut found = Vec::new();
        let rootfs = self.rootfs();
        if !rootfs.is_dir() {
            found.push(Refusal::new(
                RefusalCode::File,
                format!("The bundle's root file system {} is no directory", rootfs.display()),
            ));
        } else if !is_inside(&rootfs, &self.directory) {
            found.push(Refusal::new(
                RefusalCode::Unsupported,
                format!(
                    "The root file system {} lies outside of the bundle, which is not supported in this version",
                    rootfs.display()
                ),
            ));
        }
        found.extend(self.config_refusals());
        found
    }

    /// The host's user and group that are root in its user namespace, if it has one.
    pub(crate) fn mapped_root(&self) -> Option<(u32, u32)> {
        self.namespace("user")?;
        let root = |kind: &str| {
            let mappings = self.config["linux"][kind].as_array()?;
            let first = mappings.iter().find(|mapping| mapping["containerID"] == 0)?;
            u32::try_from(first["hostID"].as_u64()?).ok()
        };
        Some((root("uidMappings").unwrap_or(0), root("gidMappings").unwrap_or(0)))
    }

    /// The host's user and group that are `owner` in the container; nothing where nobody is.
    pub(crate) fn outside(&self, owner: (u32, u32)) -> Option<(u32, u32)> {
        if self.namespace("user").is_none() {
            return Some(owner);
        }
        let outside = |kind: &str, inside: u32| {
            let mappings = self.config["linux"][kind].as_array()?;
            mappings.iter().find_map(|mapping| {
                let number = |key: &str| u32::try_from(mapping[key].as_u64()?).ok();
                let (first, size) = (number("containerID")?, number("size")?);
                let at = inside.checked_sub(first).filter(|at| *at < size)?;
                number("hostID")?.checked_add(at)
            })
        };
        Some((outside("uidMappings", owner.0)?, outside("gidMappings", owner.1)?))
    }

    /// The part of [`Bundle::run_refusals`] for which no file is looked at.
    pub(crate) fn config_refusals(&self) -> Vec<Refusal> {
        let mut found = Vec::new();
        for needed in NEEDED_NAMESPACES.iter().filter(|kind| self.namespace(kind).is_none()) {
            found.push(unsupported(&format!("The container has no {needed} namespace of its own")));
        }
        for kind in NEEDED_NAMESPACES.iter().chain(&OTHER_NAMESPACES) {
            let path = self.namespace(kind).and_then(|namespace| namespace.get("path"));
            if path.is_some_and(|path| path.as_str() != Some("")) {
                found.push(unsupported(&format!(
                    "The container joins a {kind} namespace by its path"
                )));
            }
        }
        if self.config.get("hooks").and_then(Value::as_object).is_some_and(has_foreign_hooks) {
            found.push(unsupported("The configuration has hooks"));
        }
        found
    }

    /// Why this version cannot move it, as far as the configuration tells.
    pub(crate) fn move_obstacles(&self) -> Vec<String> {
        self.mounts_kind("overlay").then(|| OVERLAY.to_owned()).into_iter().collect()
    }

    /// Whether it has a cgroup namespace of its own.
    pub(crate) fn hides_cgroups(&self) -> bool {
        self.namespace("cgroup").is_some()
    }

    /// Why it cannot come to its directory here, whose files may still be on their way: what only
    /// the destination can judge, whatever the source says.
    pub(crate) fn arrival_refusals(&self) -> Vec<Refusal> {
        let mut found = self.config_refusals();
        let mut refuse = |text| found.push(Refusal::new(RefusalCode::Unsupported, text));
        if self.mounts_kind("overlay") {
            refuse(OVERLAY.to_owned());
        }
        if !is_plainly_below(&self.rootfs(), &self.directory) {
            refuse(format!(
                "The root file system {} is not inside of the bundle as {}",
                self.rootfs().display(),
                self.directory.display()
            ));
        }
        for bind in self.binds() {
            let comes = self.volume(&bind.written).is_some_and(Volume::is_plain);
            let below = is_plainly_below(&bind.source, &self.directory);
            if !comes && !below && !is_host_file(&bind.source) {
                refuse(format!(
                    "{} is mounted from {}, which is neither inside of the bundle as {} nor comes along",
                    bind.destination,
                    bind.source.display(),
                    self.directory.display()
                ));
            }
        }
        found
    }

    /// The configuration that the runtime is given: root and bind sources absolute, the network
    /// namespace at `netns` (one that has a user namespace makes its own network namespace, to have rights
    /// over it), the cgroup at `cgroups_path`. Without hooks: the only ones that are not
    /// refused register a container with an agent, and one that decamp starts has an agent.
    pub(crate) fn for_runtime(&self, netns: &str, cgroups_path: &str) -> Value {
        let mut config = self.config.clone();
        if let Some(config) = config.as_object_mut() {
            config.remove("hooks");
        }
        config["root"]["path"] = json!(self.rootfs());
        config["linux"]["cgroupsPath"] = json!(cgroups_path);
        if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
            for namespace in namespaces.iter_mut().filter(|one| one["type"] == "network") {
                match self.mapped_root() {
                    None => namespace["path"] = json!(netns),
                    Some(_) => drop(namespace.as_object_mut().map(|one| one.remove("path"))),
                }
            }
        }
        if let Some(mounts) = config["mounts"].as_array_mut() {
            for mount in mounts.iter_mut().filter(|mount| is_bind(mount)) {
                if let Some(source) = mount.get("source").and_then(Value::as_str) {
                    mount["source"] = json!(self.source(source));
                }
            }
        }
        config
    }

    /// A configuration for a stand-in that only makes the cgroups and the runtime's state: the same
    /// limits, but an empty root at `root` and a program of no importance, `/stand-in`.
    pub(crate) fn for_stand_in(&self, netns: &str, cgroups_path: &str, root: &Path) -> Value {
        let mut config = self.for_runtime(netns, cgroups_path);
        config["root"]["path"] = json!(root);
        config["root"]["readonly"] = json!(false);
        config["process"]["args"] = json!(["/stand-in"]);
        config["process"]["cwd"] = json!("/");
        // Nobody would be there to take it.
        config["process"]["terminal"] = json!(false);
        config["process"]["user"] = json!({"uid": 0, "gid": 0});
        if let Some(mounts) = config["mounts"].as_array_mut() {
            // Their sources may still be on their way, and nobody will look at them.
            mounts.retain(|mount| !is_bind(mount));
        }
        config
    }

    fn namespace(&self, kind: &str) -> Option<&Value> {
        let namespaces = self.config.pointer("/linux/namespaces")?.as_array()?;
        namespaces
            .iter()
            .find(|namespace| namespace.get("type").and_then(Value::as_str) == Some(kind))
    }
}

/// Whether anything but `decamp hook oci` would be called. That one does nothing that would be missing
/// on another host, and is never called by what decamp starts.
fn has_foreign_hooks(hooks: &serde_json::Map<String, Value>) -> bool {
    let ours = |hook: &Value| {
        let words = hook.get("args").and_then(Value::as_array);
        let words: Vec<_> = words.into_iter().flatten().map(Value::as_str).collect();
        words.windows(2).any(|pair| pair == [Some("hook"), Some("oci")])
    };
    hooks
        .values()
        .filter(|stage| !stage.is_null())
        .any(|stage| stage.as_array().is_none_or(|hooks| !hooks.iter().all(ours)))
}

/// Whether `path` lies below `directory`, symbolic links followed where they exist.
fn is_inside(path: &Path, directory: &Path) -> bool {
    let resolve = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    resolve(path).starts_with(resolve(directory))
}

/// Whether `path` lies below `directory` by its name alone.
fn is_plainly_below(path: &Path, directory: &Path) -> bool {
    path.strip_prefix(directory)
        .is_ok_and(|rest| rest.components().all(|part| matches!(part, Component::Normal(_))))
}

/// Whether any container may mount it from any host, or podman mounts it by itself.
pub(crate) fn is_host_file(path: &Path) -> bool {
    HOST_FILES.iter().any(|file| Path::new(file) == path) || Own::of(path).is_some()
}

/// Whether nothing can be written through a mount of the configuration.
pub(crate) fn is_read_only(mount: &Value) -> bool {
    !is_writable(mount)
}

/// Whether what is mounted can be written.
fn is_writable(mount: &Value) -> bool {
    options(mount).filter(|word| matches!(*word, "ro" | "rw")).last() != Some("ro")
}

fn options(mount: &Value) -> impl Iterator<Item = &str> {
    let options = mount.get("options").and_then(Value::as_array);
    options.into_iter().flatten().filter_map(Value::as_str)
}

fn is_bind(mount: &Value) -> bool {
    let options = mount.get("options").and_then(Value::as_array);
    mount.get("type").and_then(Value::as_str) == Some("bind")
        || options
            .into_iter()
            .flatten()
            .any(|option| matches!(option.as_str(), Some("bind" | "rbind")))
}

fn unsupported(what: &str) -> Refusal {
    Refusal::new(
        RefusalCode::Unsupported,
        format!("{what}, which is not supported in this version"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: Value) -> Bundle {
        Bundle::parse(Path::new("/b"), config.to_string().as_bytes()).expect("a bundle")
    }

    #[test]
    fn bind_mounts_are_found_by_type_and_by_option() {
        let bundle = bundle(json!({"mounts": [
            {"destination": "/a", "type": "bind", "source": "data"},
            {"destination": "/c", "type": "none", "source": "/c", "options": ["rbind", "ro"]},
            {"destination": "/proc", "type": "proc", "source": "proc"},
        ]}));
        let sources: Vec<_> = bundle.binds().into_iter().map(|bind| bind.source).collect();
        assert_eq!(sources, [PathBuf::from("/b/data"), PathBuf::from("/c")]);
        let outside: Vec<_> =
            bundle.binds().iter().map(|bind| bundle.is_outside(&bind.source)).collect();
        assert_eq!(outside, [false, true]);
    }

    #[test]
    fn a_bundle_without_namespaces_is_refused_with_every_reason() {
        let refusals =
            bundle(json!({"process": {"terminal": true}, "hooks": {"poststop": [{"path": "/x"}]}}))
                .run_refusals();
        assert_eq!(refusals.len(), 1 + NEEDED_NAMESPACES.len() + 1);
    }

    #[test]
    fn a_configuration_of_the_wrong_form_is_refused() {
        for text in [
            r#"{"root": "rootfs"}"#,
            r#"{"linux": []}"#,
            r#"{"linux": {"namespaces": {}}}"#,
            r#"{"process": "x"}"#,
            r#"{"mounts": {}}"#,
            r#"{"hooks": "x"}"#,
        ] {
            let refused = Bundle::parse(Path::new("/b"), text.as_bytes());
            assert!(matches!(refused, Err(ContainerError::Malformed { .. })), "{text}");
        }
        // What is absent, empty or of a wrong kind further within is the runtime's to refuse.
        for text in [
            "{}",
            r#"{"root": null, "linux": null, "process": null, "mounts": null}"#,
            r#"{"linux": {"namespaces": ["x", 3]}, "mounts": ["x"], "root": {"path": 3}}"#,
        ] {
            let bundle = Bundle::parse(Path::new("/b"), text.as_bytes()).expect(text);
            bundle.for_stand_in("/n", "/c", Path::new("/r"));
        }
    }

    #[test]
    fn a_destination_judges_names_by_itself() {
        let namespaces: Vec<Value> =
            NEEDED_NAMESPACES.iter().map(|kind| json!({"type": kind})).collect();
        let with = |root: &str, source: &str| {
            bundle(json!({
                "root": {"path": root},
                "linux": {"namespaces": namespaces},
                "mounts": [{"destination": "/data", "type": "bind", "source": source}],
            }))
            .arrival_refusals()
            .len()
        };
        assert_eq!(with("./rootfs", "data"), 0);
        assert_eq!(with("/b/rootfs", "/etc/hosts"), 0);
        assert_eq!(with("rootfs/../../etc", "/etc"), 2);
        assert_eq!(with("/", "../b/data"), 2);
    }

    #[test]
    fn an_overlay_of_the_host_does_not_come() {
        let namespaces: Vec<Value> =
            NEEDED_NAMESPACES.iter().map(|kind| json!({"type": kind})).collect();
        let with = |kind: &str| {
            let options = ["lowerdir=/srv,upperdir=/etc,workdir=/srv/work"];
            let mount = json!({"destination": "/x", "type": kind, "options": options});
            bundle(json!({"linux": {"namespaces": namespaces}, "mounts": [mount]}))
        };
        assert_eq!(
            (with("tmpfs").arrival_refusals().len(), with("tmpfs").move_obstacles().len()),
            (0, 0)
        );
        let refused = with("overlay").arrival_refusals();
        assert!(refused.len() == 1 && refused[0].text.contains("an overlay"), "{refused:?}");
        assert_eq!(with("overlay").move_obstacles(), [OVERLAY]);
    }

    #[test]
    fn a_user_namespace_that_others_have_is_refused() {
        let refused = |user: Value| {
            let found = bundle(json!({"linux": {"namespaces": [user]}})).config_refusals();
            found.iter().any(|refusal| refusal.text.contains("joins a user namespace by its path"))
        };
        assert!(refused(json!({"type": "user", "path": "/proc/7/ns/user"})));
        assert!(!refused(json!({"type": "user"})));
    }

    #[test]
    fn our_own_hook_is_no_obstacle_and_others_are() {
        let ours = json!({"path": "/bin/decamp", "args": ["decamp", "hook", "oci"]});
        let other = json!({"path": "/bin/sh", "args": ["sh", "-c", "hook oci"]});
        for (hooks, refused) in [
            (json!({}), false),
            (json!({"poststart": [ours], "poststop": null, "prestart": []}), false),
            (json!({"poststart": [ours, other]}), true),
            (json!({"poststart": "decamp hook oci"}), true),
            (json!({"poststop": [{"path": "/bin/decamp"}]}), true),
            (json!({"poststop": [7]}), true),
        ] {
            let bundle = bundle(json!({"hooks": hooks}));
            let found = bundle.config_refusals();
            let said = found.iter().any(|refusal| refusal.text.contains("hooks"));
            assert_eq!(said, refused, "{hooks}");
            assert_eq!(bundle.for_runtime("/n", "/c").get("hooks"), None);
        }
    }

    #[test]
    fn a_stand_in_runs_no_hooks() {
        let hook = json!({"createRuntime": [{"path": "/bin/sh"}]});
        let config = bundle(json!({"hooks": hook})).for_stand_in("/n", "/c", Path::new("/r"));
        assert_eq!(config.get("hooks"), None);
    }

    #[test]
    fn the_runtime_gets_absolute_paths() {
        let bundle = bundle(json!({
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "network"}, {"type": "pid"}]},
        }));
        let config = bundle.for_runtime("/proc/1/fd/3", "/decamp/x");
        assert_eq!(config["root"]["path"], "/b/rootfs");
        assert_eq!(config["linux"]["namespaces"][0]["path"], "/proc/1/fd/3");
        assert_eq!(config["linux"]["namespaces"][1].get("path"), None);
    }

    #[test]
    fn who_has_a_user_namespace_makes_its_network_in_it() {
        let bundle = bundle(json!({"linux": {
            "namespaces": [{"type": "network", "path": ""}, {"type": "user"}],
            "uidMappings": [
                {"containerID": 0, "hostID": 1000, "size": 1},
                {"containerID": 1, "hostID": 5000, "size": 10},
            ],
            "gidMappings": [{"containerID": 0, "hostID": 7, "size": u32::MAX}],
        }}));
        let config = bundle.for_runtime("/proc/1/fd/3", "/decamp/x");
        assert_eq!(config["linux"]["namespaces"][0], json!({"type": "network"}));
        assert_eq!(bundle.mapped_root(), Some((1000, 7)));
        assert_eq!(bundle.outside((0, 0)), Some((1000, 7)));
        assert_eq!(bundle.outside((10, 3)), Some((5009, 10)));
        assert_eq!(bundle.outside((11, 0)), None);
        assert_eq!(bundle.outside((0, u32::MAX - 1)), None, "beyond all numbers");
    }
}
