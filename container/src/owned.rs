//! The network of a container that comes with a user namespace. Rights over a network namespace (to take
//! TCP connections up again, to mount a sysfs) has who is in the user namespace that it was made in, and
//! that is there only when CRIU has made it. So CRIU makes the network namespace too, empty, with its first
//! task; while that task waits, the interface is put into it. Until then CRIU is in a network namespace of
//! no use, so that nothing that images ask for is of the host.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rust_criu::rust_criu_protobuf::rpc::Criu_opts;

use crate::bundle::Bundle;
use crate::confined::{HOST_IDS, IDS_MARKS, IDS_MOST, INVENTORY_MARKS, read};
use crate::error::{ContainerError, Result};
use crate::network::{Network, namespace_of};
use crate::segments::message::{Image, Message};
use crate::spec::{Mac, Net};

/// CRIU's number of a network namespace, in what a process has.
const NETWORK_ID: u32 = 6;
/// The second mark of an image of a network namespace, and the field with the key of one from outside.
const NETNS_MAGIC: u32 = 0x5593_3752;
const OUTSIDE_KEY: u32 = 8;
/// Where settings of the network namespace are that one is in.
const SETTINGS: &str = "/proc/sys/net";
/// The one of them that names groups.
const GROUPS: &str = "ipv4/ping_group_range";
/// CRIU counts up from 1: no namespace has a number from here on.
const UNUSED: u64 = 0xffff_0000;

/// An interface, or none, for a namespace that is still to be made.
pub(crate) struct Planned {
    /// The interface.
    pub(crate) net: Option<(Net, Mac)>,
    /// Name of the host's end of it.
    pub(crate) outside: String,
    /// What the container's configuration sets in its network namespace.
    pub(crate) settings: Settings,
}

/// Files below `/proc/sys/net`, and what is to be in them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings(Vec<(PathBuf, String)>);

impl Settings {
    /// What `bundle` has below `net.` in `linux.sysctl`. Runtimes write that in a namespace of their own, and
    /// CRIU makes one where it is not.
    ///
    /// # Errors
    /// When a name is none of a file there, or a value no line of text: it came from another host.
    pub(crate) fn of(bundle: &Bundle) -> Result<Self> {
        let all = bundle.config().pointer("/linux/sysctl").and_then(|all| all.as_object());
        let mut settings = Vec::new();
        for (name, value) in all.into_iter().flatten() {
            let Some(below) =
                name.strip_prefix("net").and_then(|rest| rest.strip_prefix(['.', '/']))
            else {
                continue;
            };
            let parts: Vec<_> = below.split(['.', '/']).collect();
            let value = value.as_str().filter(|value| !value.contains(['\0', '\n']));
            let (true, Some(value)) = (parts.iter().all(|part| is_plain(part)), value) else {
                return Err(ContainerError::State(format!(
                    "The container's configuration sets {name:?} to {value:?}, which is no setting of a network \
                     that can be made here: linux.sysctl takes names like net.core.somaxconn"
                )));
            };
            let path: PathBuf = parts.iter().collect();
            let value = match path == Path::new(GROUPS) {
                true => outside(bundle, value).ok_or_else(|| {
                    ContainerError::State(format!(
                        "The container's configuration sets {name:?} to {value:?}, which are no two groups of its \
                         user namespace"
                    ))
                })?,
                false => value.to_owned(),
            };
            settings.push((path, value));
        }
        Ok(Self(settings))
    }

    /// Makes them where `network` is.
    fn make(&self, network: &Network) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        network.inside(|| {
            self.0.iter().try_for_each(|(below, value)| {
                let path = Path::new(SETTINGS).join(below);
                let written = File::options().write(true).open(&path);
                let written = written.and_then(|mut file| file.write_all(value.as_bytes()));
                let what =
                    || format!("set {} to {value:?}, as its configuration says", path.display());
                written.map_err(|error| ContainerError::io(what())(error))
            })
        })
    }
}

/// Two groups as whoever writes them on the host has to say them: the kernel takes them as the writer's.
fn outside(bundle: &Bundle, groups: &str) -> Option<String> {
    let groups = groups.split_ascii_whitespace().map(|group| {
        let inside = group.parse().ok()?;
        // Of the two numbers of an owner the first is a user, and some user is root.
        bundle.outside((0, inside)).map(|(_, outside)| outside.to_string())
    });
    let groups: Option<Vec<String>> = groups.collect();
    groups.filter(|groups| groups.len() == 2).map(|groups| groups.join(" "))
}

/// Whether it is one part of a setting's name and leads nowhere else.
fn is_plain(part: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    !part.is_empty() && part.bytes().all(plain)
}

impl Planned {
    /// Puts it into the network namespace of process `pid`, off the network, and makes the settings there.
    ///
    /// # Errors
    /// When the process has gone, or the interface or a setting cannot be made; then nothing of it is left.
    pub(crate) fn make(&self, pid: i32) -> Result<Network> {
        let net = self.net.as_ref().map(|(net, mac)| (net, *mac));
        let network = Network::within(namespace_of(pid)?, net, &self.outside, false)?;
        self.settings.make(&network)?;
        Ok(network)
    }

    /// Has a restore with these options make an empty network namespace.
    pub(crate) fn ask(options: &mut Criu_opts) {
        options.set_empty_ns(CloneFlags::CLONE_NEWNET.bits() as u32);
    }
}

/// Has the restore that `images` are of make the network namespace, whether its processes had one that CRIU
/// was in itself when it dumped, or one that it was to be given.
///
/// # Errors
/// When the images make no sense, or are of processes in several network namespaces.
pub(crate) fn enter(images: &Path) -> Result<()> {
    let list = || format!("list {}", images.display());
    let mut theirs = BTreeSet::new();
    for entry in fs::read_dir(images).map_err(ContainerError::io(list()))? {
        let path = entry.map_err(ContainerError::io(list()))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !name.ends_with(".img") {
            continue;
        }
        if name.starts_with("ids-") {
            let image = read(&path, IDS_MOST, IDS_MARKS)?;
            theirs.extend(image.messages.iter().map(|ids| ids.number(NETWORK_ID).unwrap_or(0)));
        } else if name.starts_with("netns-") {
            make_anew(&path)?;
        }
    }
    let mut theirs = theirs.into_iter();
    match (theirs.next(), theirs.next()) {
        (Some(1..UNUSED), None) => set_apart(&images.join("inventory.img")),
        _ => Err(ContainerError::malformed(images, "are not of one network namespace")),
    }
}

/// Has CRIU make the namespace of this image, and not take it from outside.
fn make_anew(path: &Path) -> Result<()> {
    if let Some(mut image) = Image::read(path, NETNS_MAGIC)? {
        image.messages.iter_mut().for_each(|message| message.remove(OUTSIDE_KEY));
        image.write(path)?;
    }
    Ok(())
}

/// Has the CRIU that dumped have been in another namespace than anybody else.
fn set_apart(path: &Path) -> Result<()> {
    let mut image = read(path, IDS_MOST, INVENTORY_MARKS)?;
    let set = |ids: &mut Message| ids.set_number(NETWORK_ID, UNUSED);
    if !image.messages.iter_mut().all(|inventory| inventory.change_each(HOST_IDS, set)) {
        return Err(ContainerError::malformed(path, "does not say which namespaces the host had"));
    }
    image.write(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(sysctl: serde_json::Value) -> Result<Settings> {
        let config = serde_json::json!({"linux": {"sysctl": sysctl}});
        Settings::of(&Bundle::parse(Path::new("/r"), config.to_string().as_bytes())?)
    }

    #[test]
    fn settings_of_the_network_are_taken_and_lead_nowhere_else() {
        let taken = settings(serde_json::json!({"net.core.somaxconn": "77",
            "net/ipv4/ip_local_port_range": "1025 2000", "kernel.shmmax": "1", "network.x": "1"}));
        let expected = [("core/somaxconn", "77"), ("ipv4/ip_local_port_range", "1025 2000")];
        let expected = expected.map(|(path, value)| (PathBuf::from(path), value.to_owned()));
        assert_eq!(taken.expect("honest"), Settings(expected.into()));
        for bad in
            ["net.", "net/../kernel/core_pattern", "net.a..b", "net.core/", "net.a\0b", "net.ä"]
        {
            let error = settings(serde_json::json!({ bad: "1" })).expect_err(bad).to_string();
            assert!(error.contains("no setting of a network"), "{error}");
        }
        for bad in [serde_json::json!("1\0"), serde_json::json!("1\n2"), serde_json::json!(1)] {
            assert!(settings(serde_json::json!({"net.core.somaxconn": bad})).is_err(), "{bad}");
        }
    }

    #[test]
    fn groups_are_those_of_the_user_namespace() {
        let range = |groups: &str| {
            let mapping =
                serde_json::json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
            let config = serde_json::json!({"linux": {
                "namespaces": [{"type": "user"}], "uidMappings": mapping, "gidMappings": mapping,
                "sysctl": {"net.ipv4.ping_group_range": groups},
            }});
            let bundle = Bundle::parse(Path::new("/r"), config.to_string().as_bytes());
            Settings::of(&bundle.expect("a bundle")).map(|settings| settings.0[0].1.clone())
        };
        assert_eq!(range("0 65535").expect("its own"), "100000 165535");
        assert_eq!(range("1\t0").expect("none, as the kernel has it"), "100001 100000");
        for bad in ["0 65536", "0", "0 1 2", "all"] {
            assert!(range(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn settings_are_made_in_the_namespace_alone() {
        let path = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
        let Ok(namespace) = crate::network::fresh_namespace() else {
            return eprintln!("skipped: needs root");
        };
        let before = fs::read_to_string(path).expect("a setting");
        let network = Network::found(namespace, None).expect("a network");
        let made = settings(serde_json::json!({"net.ipv4.ip_unprivileged_port_start": "77"}));
        made.expect("honest").make(&network).expect("made");
        let read = || fs::read_to_string(path).map_err(ContainerError::io("read it"));
        assert_eq!(network.inside(read).expect("there").trim(), "77");
        assert_eq!(fs::read_to_string(path).expect("a setting"), before);
        let none = settings(serde_json::json!({"net.ipv4.no_such_thing": "77"})).expect("honest");
        let error = none.make(&network).expect_err("there is none").to_string();
        assert!(error.contains("/proc/sys/net/ipv4/no_such_thing"), "{error}");
    }

    fn ids(network: u64) -> Message {
        let mut ids = Message::default();
        ids.set_number(1, 5);
        ids.set_number(NETWORK_ID, network);
        ids
    }

    fn write(directory: &Path, name: &str, marks: &[u32], message: &Message) {
        let mut bytes: Vec<u8> = marks.iter().flat_map(|mark| mark.to_le_bytes()).collect();
        let message = message.to_bytes();
        bytes.extend((message.len() as u32).to_le_bytes());
        bytes.extend(message);
        fs::write(directory.join(name), bytes).expect("written");
    }

    fn images(networks: &[u64]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a directory");
        let mut inventory = Message::default();
        inventory.set_number(1, 2);
        inventory.set_bytes(HOST_IDS, ids(2).to_bytes());
        write(directory.path(), "inventory.img", INVENTORY_MARKS, &inventory);
        for (number, network) in networks.iter().enumerate() {
            write(directory.path(), &format!("ids-{number}.img"), IDS_MARKS, &ids(*network));
        }
        directory
    }

    #[test]
    fn criu_is_told_that_it_was_elsewhere() {
        // As if it had been in theirs, and as if not.
        for theirs in [2, 7] {
            let images = images(&[theirs, theirs]);
            let mut netns = Message::default();
            netns.set_bytes(OUTSIDE_KEY, b"extRootNetNS".to_vec());
            write(images.path(), "netns-7.img", &[IDS_MARKS[0], NETNS_MAGIC], &netns);
            enter(images.path()).expect("honest images");
            let inventory = read(&images.path().join("inventory.img"), IDS_MOST, INVENTORY_MARKS);
            let [inventory] = &inventory.expect("an inventory").messages[..] else { panic!("one") };
            assert_eq!(inventory.each(HOST_IDS).collect::<Vec<_>>(), [Some(ids(UNUSED))]);
            assert_eq!(inventory.number(1), Some(2), "the rest is as it was");
            let netns = Image::read(&images.path().join("netns-7.img"), NETNS_MAGIC);
            assert_eq!(netns.expect("read").expect("there").messages, [Message::default()]);
        }
    }

    #[test]
    fn processes_of_several_networks_or_none_are_refused() {
        for networks in [&[][..], &[2, 7], &[0], &[UNUSED]] {
            assert!(enter(images(networks).path()).is_err(), "{networks:?}");
        }
        let images = images(&[7]);
        write(images.path(), "inventory.img", INVENTORY_MARKS, &{
            let mut forged = Message::default();
            forged.set_bytes(HOST_IDS, vec![0xff]);
            forged
        });
        assert!(enter(images.path()).is_err());
    }
}
