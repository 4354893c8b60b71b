//! What a podman is told to make of a container that comes from another: all of its record that is not in
//! the OCI configuration, which travels too.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::own::{INIT, INIT_WORDS, Own, Seen};
use super::volumes::NamedVolume;

/// What podman knows of a container beside its OCI configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Made {
    /// Its name.
    pub name: String,
    /// The image that it was made of, for people: its root file system travels whole.
    pub image: String,
    /// Its restart policy, as `always` or `on-failure:3`; nothing for none.
    #[serde(default)]
    pub restart: String,
    /// Seconds that it has to stop in.
    #[serde(default)]
    pub stop_timeout: Option<u64>,
    /// The signal that asks it to.
    #[serde(default)]
    pub stop_signal: Option<u64>,
    /// Its labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The network that it is in; without one it has a loopback interface only.
    #[serde(default)]
    pub network: Option<Named>,
    /// Published ports, as `8080:80/tcp`.
    #[serde(default)]
    pub ports: Vec<String>,
    /// Volumes of podman's that are mounted in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<NamedVolume>,
    /// Whether `conmon` has a terminal for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tty: bool,
    /// Whether somebody may type into that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub interactive: bool,
    /// Whether podman removes it when it ends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub remove: bool,
    /// What podman itself mounts in it that has to be the same at the next host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub own: Vec<Seen>,
}

/// A network of podman's, and what a container is called in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// Its name: the destination has one of the same.
    pub name: String,
    /// IPv4 address.
    pub ip: String,
    /// Hardware address.
    pub mac: String,
}

/// Where the image stands in the labels of a container that has left it behind.
const IMAGE_LABEL: &str = "decamp.image";
/// Annotations that podman makes by itself.
const OWN_ANNOTATIONS: [&str; 4] =
    ["io.podman.", "io.container.manager", "io.kubernetes.cri-o.", "org.opencontainers.image."];
/// Files that podman makes for each container and mounts in it, and that any host has another of.
const OWN_FILES: [&str; 4] =
    ["/etc/resolv.conf", "/etc/hosts", "/etc/hostname", "/run/.containerenv"];

/// The configuration that podman has made for the container `id` as it could be run anywhere: its root file system
/// is the bundle, podman's own files are those of the host, or what any podman mounts by itself, `/dev/shm` is a
/// file system of its own, and hooks are every podman's own.
pub(crate) fn anywhere(mut config: Value, id: &str) -> Value {
    config["root"]["path"] = json!(".");
    if let Some(config) = config.as_object_mut() {
        config.remove("hooks");
    }
    let made = config.clone();
    let Some(mounts) = config["mounts"].as_array_mut() else { return config };
    for mount in mounts {
        let destination = mount["destination"].as_str().unwrap_or_default().to_owned();
        if OWN_FILES.contains(&destination.as_str()) && mount["type"] == "bind" {
            mount["source"] = json!(destination);
        } else if destination == "/dev/shm" && mount["type"] == "bind" {
            *mount = json!({
                "destination": destination, "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777"],
            });
        } else if let Some(own) = Own::of_mount(mount, &made, id) {
            mount["source"] = json!(own.source());
        }
    }
    config
}

/// What stands behind podman's own files in a configuration that it has made, by destination.
pub(crate) fn own_files(config: &Value) -> BTreeMap<String, std::path::PathBuf> {
    let mounts = config.get("mounts").and_then(Value::as_array).into_iter().flatten();
    let own = mounts.filter_map(|mount| {
        let destination = mount.get("destination")?.as_str()?;
        OWN_FILES.contains(&destination).then_some(())?;
        Some((destination.to_owned(), mount.get("source")?.as_str()?.into()))
    });
    own.collect()
}

impl Made {
    /// What makes no sense in it, whoever sent it.
    pub(crate) fn nonsense(&self) -> Option<String> {
        let network = self.network.as_ref()?;
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let name = !network.name.is_empty()
            && !network.name.starts_with('-')
            && network.name.bytes().all(good);
        let fine = name
            && network.ip.parse::<std::net::Ipv4Addr>().is_ok()
            && crate::spec::Mac::try_from(network.mac.clone()).is_ok();
        (!fine).then(|| format!("{network:?} is no network of podman's"))
    }

    /// The arguments of `podman create` for a container called `name` with that configuration, what is
    /// `mounted` in it from outside or by podman itself, and its root file system at `rootfs`. A seccomp profile of
    /// its own is in the file `seccomp`.
    pub(crate) fn arguments(
        &self,
        name: &str,
        config: &Value,
        mounted: &[String],
        rootfs: &Path,
        seccomp: &Path,
    ) -> Vec<String> {
        let mut all = vec!["create".to_owned()];
        let mut say = |word: &str, value: &str| all.push(format!("--{word}={value}"));
        say("name", name);
        say("http-proxy", "false");
        let namespaces = config["linux"]["namespaces"].as_array();
        let hides = namespaces.is_some_and(|all| all.iter().any(|one| one["type"] == "cgroup"));
        say("cgroupns", if hides { "private" } else { "host" });
        if let Some(hostname) = config["hostname"].as_str() {
            say("hostname", hostname);
        }
        let flags = [("tty", self.tty), ("interactive", self.interactive), ("rm", self.remove)];
        for (word, _) in flags.iter().filter(|(_, is_set)| *is_set) {
            say(word, "true");
        }
        for (key, value) in &self.labels {
            say("label", &format!("{key}={value}"));
        }
        if !self.labels.contains_key(IMAGE_LABEL) && !self.image.is_empty() {
            say("label", &format!("{IMAGE_LABEL}={}", self.image));
        }
        if !self.restart.is_empty() {
            say("restart", &self.restart);
        }
        if let Some(seconds) = self.stop_timeout {
            say("stop-timeout", &seconds.to_string());
        }
        if let Some(signal) = self.stop_signal {
            say("stop-signal", &signal.to_string());
        }
        match &self.network {
            None => say("network", "none"),
            Some(network) => {
                say("network", &format!("{}:ip={},mac={}", network.name, network.ip, network.mac));
            }
        }
        for port in &self.ports {
            say("publish", port);
        }
        for (key, value) in config["annotations"].as_object().into_iter().flatten() {
            let own = OWN_ANNOTATIONS.iter().any(|own| key.starts_with(own));
            if let Some(value) = value.as_str().filter(|_| !own) {
                say("annotation", &format!("{key}={value}"));
            }
        }
        process(&config["process"], &mut say);
        memory_file_systems(&config["mounts"], &mut say);
        limits(&config["linux"]["resources"], &mut say);
        for (key, value) in config["linux"]["sysctl"].as_object().into_iter().flatten() {
            say("sysctl", &format!("{key}={}", value.as_str().unwrap_or_default()));
        }
        if config["root"]["readonly"] == true {
            say("read-only", "true");
            say("read-only-tmpfs", "false");
        }
        let profile = seccomp.display().to_string();
        let profile = if config["linux"]["seccomp"].is_object() { &profile } else { "unconfined" };
        say("security-opt", &format!("seccomp={profile}"));
        if config["process"]["noNewPrivileges"] == true {
            say("security-opt", "no-new-privileges");
        }
        all.extend_from_slice(mounted);
        all.push("--rootfs".to_owned());
        all.push(rootfs.display().to_string());
        let added = if mounted.iter().any(|word| word == INIT) { INIT_WORDS } else { 0 };
        let arguments = config["process"]["args"].as_array().into_iter().flatten().skip(added);
        all.extend(arguments.filter_map(Value::as_str).map(str::to_owned));
        all
    }
}

fn process(process: &Value, say: &mut impl FnMut(&str, &str)) {
    say("unsetenv-all", "true");
    for variable in process["env"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        // Without a value it would be this host's.
        if !variable.contains('=') {
            continue;
        }
        say("env", variable);
    }
    if let Some(directory) = process["cwd"].as_str() {
        say("workdir", directory);
    }
    let number = |name: &str| process["user"][name].as_u64().unwrap_or(0);
    say("user", &format!("{}:{}", number("uid"), number("gid")));
    for group in process["user"]["additionalGids"].as_array().into_iter().flatten() {
        say("group-add", &group.to_string());
    }
    say("cap-drop", "all");
    let kept = process["capabilities"]["bounding"].as_array().into_iter().flatten();
    for capability in kept.filter_map(Value::as_str) {
        say("cap-add", capability);
    }
    for limit in process["rlimits"].as_array().into_iter().flatten() {
        let name = limit["type"].as_str().unwrap_or_default();
        let name = name.strip_prefix("RLIMIT_").unwrap_or(name).to_lowercase();
        say("ulimit", &format!("{name}={}:{}", limit["soft"], limit["hard"]));
    }
    if let Some(score) = process["oomScoreAdj"].as_i64() {
        say("oom-score-adj", &score.to_string());
    }
}

/// Those that podman does not make by itself.
fn memory_file_systems(mounts: &Value, say: &mut impl FnMut(&str, &str)) {
    let more = mounts.as_array().into_iter().flatten().filter(|mount| mount["type"] == "tmpfs");
    for mount in more {
        let destination = mount["destination"].as_str().unwrap_or_default();
        if ["/dev", "/dev/shm"].contains(&destination) {
            continue;
        }
        let options = mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let known = |option: &&str| {
            let name = option.split('=').next().unwrap_or_default();
            ["size", "mode", "rw", "ro", "exec", "noexec", "nosuid", "nodev"].contains(&name)
        };
        let options: Vec<_> = options.filter(known).collect();
        say("tmpfs", &[destination, &options.join(",")].join(":"));
    }
}

fn limits(resources: &Value, say: &mut impl FnMut(&str, &str)) {
    let all = [
        ("memory", "/memory/limit"),
        ("memory-reservation", "/memory/reservation"),
        ("memory-swap", "/memory/swap"),
        ("cpu-shares", "/cpu/shares"),
        ("cpu-quota", "/cpu/quota"),
        ("cpu-period", "/cpu/period"),
        ("pids-limit", "/pids/limit"),
    ];
    for (word, pointer) in all {
        if let Some(value) = resources.pointer(pointer).and_then(Value::as_i64) {
            say(word, &value.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> Made {
        let network = Named {
            name: "podman".into(),
            ip: "10.88.0.9".into(),
            mac: "02:00:00:00:00:09".into(),
        };
        Made { name: "web".into(), network: Some(network), ..Made::default() }
    }

    #[test]
    fn a_configuration_becomes_arguments() {
        let config = json!({
            "process": {
                "args": ["/bin/sh", "--privileged"], "cwd": "/data", "env": ["A=b c", "HOME"],
                "user": {"uid": 5, "gid": 6}, "capabilities": {"bounding": ["CAP_CHOWN"]},
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}],
            },
            "mounts": [{"destination": "/x", "type": "tmpfs", "options": ["size=1m", "rprivate"]}],
            "linux": {"resources": {"memory": {"limit": 1024}}, "seccomp": {}},
        });
        let made = Made { tty: true, ..made() };
        let mounted = ["--volume=data:/data:ro".to_owned()];
        let (rootfs, seccomp) = (Path::new("/r"), Path::new("/s.json"));
        let words = made.arguments("web", &config, &mounted, rootfs, seccomp);
        for word in [
            "--network=podman:ip=10.88.0.9,mac=02:00:00:00:00:09",
            "--env=A=b c",
            "--user=5:6",
            "--ulimit=nofile=1:2",
            "--tmpfs=/x:size=1m",
            "--memory=1024",
            "--tty=true",
            "--volume=data:/data:ro",
            "--security-opt=seccomp=/s.json",
        ] {
            assert!(words.iter().any(|found| found == word), "{word}: {words:#?}");
        }
        assert!(!words.iter().any(|word| word == "--env=HOME" || word.starts_with("--rm")));
        // What the program is called with is no option of podman's.
        assert_eq!(words[words.len() - 4..], ["--rootfs", "/r", "/bin/sh", "--privileged"]);
        // What podman puts before it is not put there twice.
        let config = json!({"process": {"args": ["/run/podman-init", "--", "/bin/sh"]}});
        let words = made.arguments("web", &config, &[INIT.to_owned()], rootfs, seccomp);
        assert_eq!(words[words.len() - 4..], [INIT, "--rootfs", "/r", "/bin/sh"]);
    }

    #[test]
    fn a_network_is_a_network_and_nothing_else() {
        assert_eq!(made().nonsense(), None);
        let changes: [fn(&mut Named); 4] = [
            |network| network.name = "ns:/proc/1/ns/net".into(),
            |network| network.name = "--privileged".into(),
            |network| network.ip = "10.0.0.1,alias=x".into(),
            |network| network.mac = String::new(),
        ];
        for change in changes {
            let mut made = made();
            made.network.as_mut().map(change);
            assert!(made.nonsense().is_some(), "{made:?}");
        }
    }

    #[test]
    fn podmans_own_files_are_those_of_any_host() {
        let config = json!({"root": {"path": "/merged"}, "hooks": {"poststop": []}, "mounts": [
            {"destination": "/etc/hosts", "type": "bind", "source": "/run/x/hosts"},
            {"destination": "/dev/shm", "type": "bind", "source": "/var/x/shm"},
            {"destination": "/run/secrets/k", "type": "bind", "source": "/run/7/userdata/secrets/k"},
            {"destination": "/data", "type": "bind", "source": "/srv/data"}]});
        let files = own_files(&config);
        assert_eq!(files.len(), 1);
        assert_eq!(files["/etc/hosts"], Path::new("/run/x/hosts"));
        let config = anywhere(config, "7");
        assert_eq!(config["mounts"][0]["source"], "/etc/hosts");
        assert_eq!(config["mounts"][1]["type"], "tmpfs");
        assert_eq!(config["mounts"][2]["source"], Own::Secret("k".into()).source());
        assert_eq!(config["mounts"][3]["source"], "/srv/data");
        assert!(config["hooks"].is_null() && config["root"]["path"] == ".");
    }
}
