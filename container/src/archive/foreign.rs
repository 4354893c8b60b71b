//! A checkpoint that podman exported, as it reads to us: which workload it would be here. The container
//! becomes one of decamp's own: a bundle with the root file system in `rootfs`, its named volumes in
//! `volumes`, its shared memory file system in `shm`, under the runtime that it had.
//!
//! Nothing that it says is believed before it was checked; what cannot be restored is said all at once,
//! among what the container needs.

use std::collections::BTreeMap;
use std::path::Path;

use decamp_shared::archive::header::{Described, Tree};
use decamp_shared::archive::{ArchiveError, Foreign, Result};
use decamp_shared::workload::{FileRole, Kind};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::IMAGES;
use crate::confined::MOUNTS_CAP;
use crate::facts::{HostNeeds, Needs};
use crate::mounts::{ExternalKind, ExternalMount};
use crate::podman::found::place_of;
use crate::podman::image;
use crate::segments::message::Image;
use crate::spec::{ContainerSpec, Mac, Net};

pub(super) const CONFIG: &str = "config.dump";
const SPEC: &str = "spec.dump";
const NETWORK: &str = "network.status";
pub(super) const DELETED: &str = "deleted.files";
pub(super) const DESCRIPTORS: &str = "checkpoint/descriptors.json";
pub(super) const INVENTORY: &str = "checkpoint/inventory.img";
/// Root file system of the bundle.
pub(super) const ROOT: &str = "rootfs";
/// The shared memory file system.
pub(super) const SHM: &str = "shm";
/// Its named volumes.
pub(super) const VOLUMES: &str = "volumes";
/// Files that podman makes for each container, with what stands for them in the bundle: the container may
/// write in them, so they are not this host's.
pub(super) const OWN_FILES: [(&str, &str); 4] = [
    ("/etc/hostname", "hostname"),
    ("/etc/hosts", "hosts"),
    ("/etc/resolv.conf", "resolv.conf"),
    ("/run/.containerenv", "containerenv"),
];
/// File systems that a runtime makes for each container.
const FILE_SYSTEMS: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];
/// CRIU's second mark at the head of a list of mounts (CRIU's magic.h), and what an entry says (mnt.proto).
const MOUNTS_MAGIC: u32 = 0x5556_3928;
const MOUNT_PATH: u32 = 7;
const MOUNT_KIND: u32 = 8;
const MOUNT_OPTIONS: u32 = 9;
const MOUNT_NAME: u32 = 18;

/// Of podman's `ContainerConfig` what matters here.
#[derive(Debug, Deserialize)]
pub(super) struct Config {
    pub(super) name: String,
    #[serde(default, rename = "rootfsImageID")]
    pub(super) image: String,
    #[serde(default, rename = "rootfsImageName")]
    image_name: String,
    #[serde(default)]
    pub(super) rootfs: String,
    #[serde(default)]
    runtime: String,
    #[serde(default)]
    pod: String,
    #[serde(default, rename = "createNetNS")]
    network: bool,
    #[serde(default, rename = "namedVolumes")]
    volumes: Option<Vec<NamedVolume>>,
    #[serde(default, rename = "overlayVolumes")]
    overlays: Option<Vec<Value>>,
    #[serde(default, rename = "imageVolumes")]
    image_volumes: Option<Vec<Value>>,
}

#[derive(Debug, Deserialize)]
struct NamedVolume {
    #[serde(rename = "volumeName")]
    name: String,
    dest: String,
}

#[derive(Debug, Deserialize)]
struct Status {
    #[serde(default)]
    interfaces: BTreeMap<String, StatusInterface>,
}

#[derive(Debug, Deserialize)]
struct StatusInterface {
    #[serde(default)]
    subnets: Option<Vec<StatusAddress>>,
    #[serde(default)]
    mac_address: String,
}

#[derive(Debug, Deserialize)]
struct StatusAddress {
    ipnet: String,
    #[serde(default)]
    gateway: Option<std::net::Ipv4Addr>,
}

/// What CRIU's images need to be told, beside what is in them.
#[derive(Debug)]
pub(super) struct Told {
    /// Standard input, output and error.
    pub(super) descriptors: Vec<String>,
    pub(super) mounts: Vec<ExternalMount>,
}

/// Whether podman may have given that name.
fn is_plain_name(name: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    name.starts_with(|first: char| first.is_ascii_alphanumeric()) && name.bytes().all(good)
}

/// Which parts are read to know what it is.
pub(crate) fn wants(part: &str) -> bool {
    [CONFIG, SPEC, NETWORK, DELETED, DESCRIPTORS, INVENTORY].contains(&part) || is_mounts(part)
}

fn is_mounts(part: &str) -> bool {
    part.starts_with("checkpoint/mountpoints-") && part.ends_with(".img")
}

/// A part that has to be there and to be JSON of that form.
pub(super) fn json_of<T: DeserializeOwned>(found: &Foreign, part: &str) -> Result<T> {
    let bytes = found.kept(part).ok_or_else(|| {
        let what = "is missing: it is no checkpoint of podman's, nor of decamp's";
        ArchiveError::part(part, what)
    })?;
    serde_json::from_slice(bytes)
        .map_err(|error| ArchiveError::part(part, format!("cannot be read: {error}")))
}

/// The container of a checkpoint of podman's, under `name` if it is not to have its own.
pub(crate) fn describe(found: &Foreign, name: Option<&str>) -> Result<Described> {
    let config: Config = json_of(found, CONFIG)?;
    let oci: Value = json_of(found, SPEC)?;
    if found.kept(INVENTORY).is_none() {
        return Err(ArchiveError::part(INVENTORY, "is missing"));
    }
    let mut against = Vec::new();
    let oci = bundle_config(&config, oci, &mut against)?;
    if let Err(why) = told(found, &oci) {
        against.push(why.to_string());
    }
    let name = name.unwrap_or(&config.name);
    // It is to name a directory, and that alone.
    if !is_plain_name(name) {
        return Err(ArchiveError::part(CONFIG, format!("has a container of the name {name:?}")));
    }
    let place = place_of(name);
    if !config.rootfs.is_empty() {
        against.push(
            "It has a root file system of its own (--rootfs), which is not in the file".to_owned(),
        );
    } else {
        against.extend(image::obstacle(&config.image, &config.image_name));
    }
    let net = network(&config, found, &mut against)?;
    let runtime = config.runtime.rsplit('/').next().unwrap_or_default().to_owned();
    let spec = ContainerSpec {
        bundle: place.clone(),
        runtime,
        tty: false,
        adopted: None,
        podman: None,
        net,
        volumes: Vec::new(),
    };
    let size = |of: &dyn Fn(&str) -> bool| -> u64 {
        found.parts().iter().filter(|part| of(&part.name)).map(|part| part.size).sum()
    };
    let resident = size(&|name| name.starts_with("checkpoint/pages-"));
    let needs = Needs {
        config: oci.to_string(),
        resident,
        shared_huge: 0,
        on_tmpfs: 0,
        // Images say themselves whether a CRIU can read them.
        criu: (0, 0),
        obstacles: against,
        host: HostNeeds::default(),
        locks: Vec::new(),
    };
    let tree = Tree {
        id: 0,
        role: FileRole::Bundle.into(),
        path: place.display().to_string(),
        bytes: size(&|name| name.ends_with(".tar")),
        live: true,
    };
    let broken = |error| ArchiveError::part(CONFIG, format!("cannot be used: {error}"));
    Ok(Described {
        name: name.to_owned(),
        uuid: String::new(),
        kind: Kind::Container,
        memory_bytes: resident,
        spaces: Vec::new(),
        files: vec![tree],
        networks: spec.net.iter().map(|net| net.bridge.clone()).collect(),
        spec: serde_json::to_value(&spec).map_err(broken)?,
        needs: serde_json::to_value(&needs).map_err(broken)?,
    })
}

/// The configuration of the bundle that it becomes.
fn bundle_config(config: &Config, mut oci: Value, against: &mut Vec<String>) -> Result<Value> {
    // Its form is looked at here; what it says where everybody's is.
    crate::bundle::Bundle::parse(Path::new("/"), oci.to_string().as_bytes())
        .map_err(super::failed)?;
    if !config.pod.is_empty() {
        against.push("It is in a pod, whose namespaces others share".to_owned());
    }
    for (what, list) in [("overlay", &config.overlays), ("image", &config.image_volumes)] {
        if list.as_ref().is_some_and(|list| !list.is_empty()) {
            against.push(format!("It has {what} volumes, which are not in the file"));
        }
    }
    if oci.pointer("/process/terminal") == Some(&json!(true)) {
        against.push("It has a terminal of podman's (--tty), which is not restored yet".to_owned());
    }
    let devices = oci.pointer("/linux/devices").and_then(Value::as_array);
    if devices.is_some_and(|devices| !devices.is_empty()) {
        against.push("It has devices of the host (--device, --privileged)".to_owned());
    }
    let namespaces = oci.pointer("/linux/namespaces").and_then(Value::as_array);
    if namespaces.into_iter().flatten().any(|one| one["type"] == "cgroup") {
        against.push(
            "It has a cgroup namespace of its own, whose mounts are not restored from podman's files yet \
             (podman run --cgroupns=host)"
                .to_owned(),
        );
    }
    oci["root"]["path"] = json!(ROOT);
    if let Some(namespaces) = oci["linux"]["namespaces"].as_array_mut() {
        for namespace in namespaces.iter_mut().filter(|one| one["type"] == "network") {
            if let Some(namespace) = namespace.as_object_mut() {
                namespace.remove("path");
            }
        }
    }
    let volumes = config.volumes.as_deref().unwrap_or_default();
    for volume in volumes {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        if !volume.name.bytes().all(good) || volume.name.starts_with('.') || volume.name.is_empty()
        {
            return Err(ArchiveError::part(
                CONFIG,
                format!("has a volume of the name {:?}", volume.name),
            ));
        }
    }
    for mount in oci["mounts"].as_array_mut().into_iter().flatten() {
        let is_bind = mount["type"] == "bind"
            || mount["options"].as_array().is_some_and(|options| {
                options.iter().any(|option| option == "bind" || option == "rbind")
            });
        let destination = plain(mount["destination"].as_str().unwrap_or_default()).to_owned();
        // What the images, which have it so, are compared with.
        mount["destination"] = json!(destination);
        if !is_bind {
            let kind = mount["type"].as_str().unwrap_or_default();
            if !FILE_SYSTEMS.contains(&kind) {
                against
                    .push(format!("{destination} is a mount of {kind:?}, which is not restored"));
            }
            continue;
        }
        let own = OWN_FILES.iter().find(|(name, _)| *name == destination);
        let volume = volumes.iter().find(|volume| plain(&volume.dest) == destination);
        mount["source"] = if let Some((_, file)) = own {
            json!(file)
        } else if let Some(volume) = volume {
            json!(format!("{VOLUMES}/{}", volume.name))
        } else if destination == "/dev/shm" {
            json!(SHM)
        } else {
            against.push(format!(
                "{destination} is mounted from {} of the host where it ran, which is not in the file",
                mount["source"].as_str().unwrap_or("somewhere")
            ));
            // That is said once.
            json!("lost")
        };
    }
    Ok(oci)
}

/// A path without slashes at its end.
fn plain(path: &str) -> &str {
    let plain = path.trim_end_matches('/');
    if plain.is_empty() { path } else { plain }
}

/// The interface that it had, on the bridge of the same network here.
fn network(config: &Config, found: &Foreign, against: &mut Vec<String>) -> Result<Option<Net>> {
    if !config.network {
        return Ok(None);
    }
    let networks: Option<BTreeMap<String, Status>> = json_of(found, NETWORK)?;
    let networks: Vec<_> = networks.into_iter().flatten().collect();
    let [(name, status)] = &networks[..] else {
        against.push(format!("It is in {} networks of podman's, not in one", networks.len()));
        return Ok(None);
    };
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if name.is_empty() || name.starts_with('-') || !name.bytes().all(good) {
        return Err(ArchiveError::part(NETWORK, format!("has a network of the name {name:?}")));
    }
    let one = status.interfaces.get("eth0").filter(|_| status.interfaces.len() == 1);
    let addresses = one.and_then(|one| one.subnets.as_deref()).unwrap_or_default();
    let (Some(one), [address]) = (one, addresses) else {
        against.push("It has not one interface eth0 with one address".to_owned());
        return Ok(None);
    };
    let bad = |what: String| ArchiveError::part(NETWORK, what);
    let mac = Mac::try_from(one.mac_address.clone()).map_err(bad)?;
    match image::bridge_of(name) {
        Ok(bridge) => Ok(Some(Net {
            bridge,
            ip: address.ipnet.clone(),
            ip6: None,
            gateway: address.gateway,
            mac: Some(mac),
        })),
        Err(why) => {
            against.push(why);
            Ok(None)
        }
    }
}

/// What has to be told to CRIU when it restores a container of the configuration `oci`.
pub(super) fn told(found: &Foreign, oci: &Value) -> Result<Told> {
    let descriptors: Vec<String> = json_of(found, DESCRIPTORS)?;
    if descriptors.len() != 3 {
        return Err(ArchiveError::part(DESCRIPTORS, "does not name three standard streams"));
    }
    let mut lists = found.all_kept().filter(|(name, _)| is_mounts(name));
    let (Some((part, bytes)), None) = (lists.next(), lists.next()) else {
        let what = "has not one list of mounts";
        return Err(ArchiveError::part(IMAGES, what));
    };
    let bad = |what: String| ArchiveError::part(part, what);
    let image = Image::parse(bytes, MOUNTS_MAGIC)
        .ok_or_else(|| bad("is no list of mounts of CRIU's".to_owned()))?;
    if image.messages.len() > MOUNTS_CAP {
        return Err(bad(format!("has more than {MOUNTS_CAP} mounts")));
    }
    let masked = oci.pointer("/linux/maskedPaths").and_then(|paths| paths.get(0)?.as_str());
    let mounted = |destination: &str| {
        let mounts = oci["mounts"].as_array().into_iter().flatten();
        mounts.filter_map(|mount| mount["destination"].as_str()).any(|known| known == destination)
    };
    let mut mounts: Vec<ExternalMount> = Vec::new();
    for message in &image.messages {
        let text = |tag| {
            let bytes = message.bytes(tag).unwrap_or_default();
            std::str::from_utf8(bytes).map_err(|_| bad("is not in UTF-8".to_owned()))
        };
        let (name, path) = (text(MOUNT_NAME)?.to_owned(), text(MOUNT_PATH)?.to_owned());
        if name.is_empty() || mounts.iter().any(|known| known.name == name) {
            continue;
        }
        let (kind, destination) = match masked {
            Some(masked) if name == "/dev/null" => (ExternalKind::Masked, masked.to_owned()),
            _ if text(MOUNT_KIND)? == "cgroup" => {
                (ExternalKind::Cgroup(text(MOUNT_OPTIONS)?.to_owned()), path.clone())
            }
            _ if mounted(&name) => (ExternalKind::Bind, name.clone()),
            _ => return Err(bad(format!("has {path} from outside, which {SPEC} does not mount"))),
        };
        mounts.push(ExternalMount { destination, kind, name, mounted: path });
    }
    Ok(Told { descriptors, mounts })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_path() {
        for good in ["web", "Web_2.x-y"] {
            assert!(is_plain_name(good), "{good}");
        }
        for bad in ["", "..", ".web", "/etc", "a/b", "../../etc", "a\0", "a b"] {
            assert!(!is_plain_name(bad), "{bad}");
        }
    }

    #[test]
    fn a_cgroup_namespace_is_not_restored() {
        let config: Config =
            serde_json::from_value(json!({"name": "web"})).expect("a configuration");
        let against = |kind: &str| {
            let mut against = Vec::new();
            let oci = json!({"linux": {"namespaces": [{"type": kind}]}});
            bundle_config(&config, oci, &mut against).expect("a configuration");
            against
        };
        assert_eq!(against("pid"), Vec::<String>::new());
        assert!(against("cgroup")[0].contains("--cgroupns=host"));
    }

    #[test]
    fn a_slash_at_the_end_of_a_destination_says_nothing() {
        let config: Config = serde_json::from_value(json!({
            "name": "web",
            "namedVolumes": [{"volumeName": "data", "dest": "/data/"}],
        }))
        .expect("a configuration");
        let oci = json!({"mounts": [
            {"destination": "/data/", "type": "bind", "source": "/somewhere"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/somewhere"},
        ]});
        let mut against = Vec::new();
        let oci = bundle_config(&config, oci, &mut against).expect("a configuration");
        assert_eq!(against, Vec::<String>::new());
        assert_eq!(oci["mounts"][0]["destination"], "/data");
        assert_eq!(oci["mounts"][0]["source"], "volumes/data");
    }
}
