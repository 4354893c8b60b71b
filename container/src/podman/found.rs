//! A container that this host's podman has.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::ask;
use super::made::{Made, Named};
use super::volumes::{self, NamedVolume};
use crate::bundle::{Bind, Bundle, is_host_file};
use crate::runtime::RuntimeKind;

/// Where root file systems stand that came here.
pub(super) const HOME: &str = "/var/lib/containers/decamp";

/// What podman says of one.
#[derive(Debug)]
pub(crate) struct Found {
    /// Its name for the runtime: 64 hexadecimal digits.
    pub(crate) id: String,
    pub(crate) kind: RuntimeKind,
    /// What another podman is told to make of it.
    pub(crate) made: Made,
    /// Where people, or its image, have something mounted in it.
    mounted: Vec<String>,
}

impl Found {
    /// Why what podman itself mounts in it from this host, by the configuration in `bundle`, speaks against
    /// a move. What any podman mounts of its own does not.
    pub(crate) fn own_mounts(&self, bundle: &Bundle) -> Vec<String> {
        let is_own = |bind: &Bind| {
            let at = bind.destination.trim_end_matches('/');
            !is_host_file(&bind.source) && !self.mounted.iter().any(|known| known == at)
        };
        let reason = |bind: Bind| {
            format!(
                "podman itself mounts {} at {}, which is not known to be the same with another podman: start it \
                 without that (a time zone by --tz; what mounts.conf gives to all: an empty \
                 /etc/containers/mounts.conf)",
                bind.source.display(),
                bind.destination
            )
        };
        bundle.binds().into_iter().filter(is_own).map(reason).collect()
    }
}

/// The container that podman knows under `name`, or every reason why it cannot be adopted.
pub(crate) fn find(name: &str) -> std::result::Result<Found, Vec<String>> {
    let said =
        ask(&["container", "inspect", "--", name]).map_err(|error| vec![error.to_string()])?;
    let one = said.get(0).ok_or_else(|| vec![format!("podman has no container {name}")])?;
    read(one)
}

/// Whether podman has made the container and not started it yet.
pub(crate) fn awaits_start(name: &str) -> bool {
    let said = ask(&["container", "inspect", "--", name]).ok();
    let status = said.as_ref().and_then(|said| said.pointer("/0/State/Status")?.as_str());
    matches!(status, Some("configured" | "created" | "initialized"))
}

fn read(said: &Value) -> std::result::Result<Found, Vec<String>> {
    let text = |pointer: &str| said.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let is = |pointer: &str| said.pointer(pointer).and_then(Value::as_bool).unwrap_or_default();
    let name = text("/Name");
    let status = text("/State/Status");
    if status != "running" {
        let what = if status == "paused" { "paused: podman unpause it first" } else { status };
        return Err(vec![format!("Container {name} is {what}: only one that runs can be adopted")]);
    }
    let mut against = Vec::new();
    // A path, where it was given one.
    let runtime = text("/OCIRuntime").rsplit('/').next().unwrap_or_default();
    let kind = RuntimeKind::from_word(runtime);
    if kind.is_none() {
        against.push(format!("Its runtime {runtime:?} is neither runc nor crun"));
    }
    if !text("/Pod").is_empty() || is("/IsInfra") {
        against.push("It is in a pod, whose namespaces others share".to_owned());
    }
    if is("/HostConfig/Privileged") {
        against.push("It is privileged: all devices of this host are in it".to_owned());
    }
    if !matches!(text("/HostConfig/UsernsMode"), "" | "host") {
        against.push("It has a user namespace of podman's, which is not moved yet".to_owned());
    }
    let devices = said.pointer("/HostConfig/Devices").and_then(Value::as_array);
    if devices.is_some_and(|list| !list.is_empty()) {
        against.push("It has devices of this host, which are not moved yet".to_owned());
    }
    let volumes = volumes::of_container(said, &mut against);
    let network = network(said, &mut against);
    let id = text("/Id").to_owned();
    match kind {
        Some(kind) if against.is_empty() => {
            let mounts = said.pointer("/Mounts").and_then(Value::as_array).into_iter().flatten();
            let mounted = mounts.filter_map(|mount| mount["Destination"].as_str());
            let mounted = mounted.map(|at| at.trim_end_matches('/').to_owned()).collect();
            Ok(Found { id, kind, made: made(said, network, volumes), mounted })
        }
        _ => Err(against),
    }
}

/// The network that it is in.
fn network(said: &Value, against: &mut Vec<String>) -> Option<Named> {
    if said.pointer("/HostConfig/NetworkMode").and_then(Value::as_str) == Some("none") {
        return None;
    }
    let networks = said.pointer("/NetworkSettings/Networks").and_then(Value::as_object);
    match networks.map(|networks| networks.iter().collect::<Vec<_>>()).as_deref() {
        Some([(name, its)]) => {
            let text = |key: &str| its.get(key).and_then(Value::as_str).unwrap_or_default();
            let (ip, mac) = (text("IPAddress").to_owned(), text("MacAddress").to_owned());
            Some(Named { name: (*name).clone(), ip, mac })
        }
        Some([]) | None => {
            against.push("It is in no network of podman's, nor in none at all".to_owned());
            None
        }
        Some(many) => {
            against.push(format!("It is in {} networks of podman's, not in one", many.len()));
            None
        }
    }
}

fn made(said: &Value, network: Option<Named>, volumes: Vec<NamedVolume>) -> Made {
    let is = |pointer: &str| said.pointer(pointer).and_then(Value::as_bool).unwrap_or_default();
    let text = |pointer: &str| said.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let number = |pointer: &str| said.pointer(pointer).and_then(Value::as_u64);
    let ports = said.pointer("/HostConfig/PortBindings").and_then(Value::as_object);
    let ports = ports.into_iter().flatten().flat_map(|(inside, outside)| {
        let outside = outside.as_array().into_iter().flatten();
        outside.map(move |outside| {
            let text = |key: &str| outside.get(key).and_then(Value::as_str).unwrap_or_default();
            let (address, port) = (text("HostIp"), text("HostPort"));
            if address.is_empty() {
                format!("{port}:{inside}")
            } else {
                format!("{address}:{port}:{inside}")
            }
        })
    });
    let labels = said.pointer("/Config/Labels").and_then(Value::as_object);
    let labels = labels.into_iter().flatten();
    let policy = text("/HostConfig/RestartPolicy/Name");
    let restart = match number("/HostConfig/RestartPolicy/MaximumRetryCount").unwrap_or(0) {
        0 => policy.to_owned(),
        times => format!("{policy}:{times}"),
    };
    Made {
        name: text("/Name").to_owned(),
        image: text("/ImageName").to_owned(),
        restart,
        stop_timeout: number("/Config/StopTimeout"),
        stop_signal: number("/Config/StopSignal"),
        labels: labels
            .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
            .collect(),
        network,
        ports: ports.collect(),
        volumes,
        tty: is("/Config/Tty"),
        interactive: is("/Config/Tty") && is("/Config/OpenStdin"),
        remove: is("/HostConfig/AutoRemove"),
        // Its keeper looks, each time that it is to move.
        own: Vec::new(),
    }
}

/// The root file system of a container, where podman has mounted it.
pub(crate) fn is_mounted(rootfs: &Path) -> bool {
    rootfs.is_absolute() && rootfs.is_dir()
}

/// Where the root file system of a container called `name` goes by default on the next host.
pub(crate) fn place_of(name: &str) -> PathBuf {
    Path::new(HOME).join(name)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::podman::own::Own;

    #[test]
    fn what_podman_mounts_by_itself_stays() {
        let config = json!({"mounts": [
            {"destination": "/data", "type": "bind", "source": "/srv/data"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts"},
            {"destination": "/run/x/key", "type": "bind", "source": "/run/x/key"},
            {"destination": "/init", "type": "bind", "source": Own::Init.source()},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
        ]});
        let bundle = Bundle::parse(Path::new("/r"), config.to_string().as_bytes());
        let (id, mounted) = (String::new(), vec!["/data".to_owned()]);
        let found = Found { id, kind: RuntimeKind::Runc, made: Made::default(), mounted };
        let against = found.own_mounts(&bundle.expect("a bundle"));
        assert_eq!(against.len(), 1, "{against:?}");
        assert!(against[0].contains("/run/x/key at /run/x/key"), "{against:?}");
    }
}
