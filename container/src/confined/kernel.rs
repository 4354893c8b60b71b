//! What CRIU would ask of this host's kernel as its root, whatever the process may for which it asks. Honest
//! images have none of that: a container that has such things is not dumped.

use std::fs;
use std::path::Path;

use super::remaps::{self, FILES, FILES_MARKS};
use super::{Confined, Fault, HOST_IDS, number_of};
use crate::dump::NETWORK;
use crate::error::{ContainerError, Result};
use crate::segments::message::{Image, Message};

/// The number of a network namespace, in what a process has.
const NETWORK_ID: u32 = 6;
/// The second mark of an image of a network namespace, and the field with the key of one from outside.
const NETNS_MAGIC: u32 = 0x5593_3752;
const OUTSIDE_KEY: u32 = 8;

/// Images that have no message, and what one would bring.
const EMPTY: [(&str, &str); 5] = [
    // CRIU loads them before it has made a process.
    ("apparmor.img", "policies of AppArmor for this host's kernel"),
    // Where CRIU had in former times what is in the list of files now.
    ("packetsk.img", "a packet socket"),
    ("tunfile.img", "a network interface"),
    ("bpfmap-file.img", "a BPF map"),
    ("fanotify.img", "fanotify"),
];
/// Bytes of an image without a message at most: its marks.
const MARKS: u64 = 8;

/// Where CRIU had sockets in former times.
const OLD_SOCKETS: &str = "inetsk.img";
const OLD_SOCKETS_MARKS: &[u32] = &[0x5456_4319, 0x5644_3851];

/// Kinds of files of CRIU's `file_entry`, and what they are.
const NEVER: [(u64, &str); 4] =
    [(10, "a packet socket"), (12, "fanotify"), (15, "a network interface"), (19, "a BPF map")];
const IS_SOCKET: u64 = 4;
/// Its fields, and those of `inet_sk_entry`.
const KIND: u32 = 1;
const SOCKET: u32 = 4;
const FAMILY: u32 = 3;
const TYPE: u32 = 4;

impl Confined<'_> {
    /// Sees that the images in this directory make nothing that the rights of a process do not go for.
    pub(super) fn kernel(&self, images: &Path, inventory: &Message, ids: &[Message]) -> Result<()> {
        for (name, what) in EMPTY {
            let path = images.join(name);
            match fs::metadata(&path) {
                Ok(found) if found.len() > MARKS => {
                    return Err(ContainerError::malformed(path, format!("would bring {what}")));
                }
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(ContainerError::io(format!("look at {}", path.display()))(error));
                }
            }
        }
        let each = |name, marks, check: fn(&Message) -> std::result::Result<(), Fault>| {
            let all = remaps::read(images, name, marks)?.unwrap_or_default();
            let checked = all.iter().try_for_each(check);
            checked.map_err(|what| ContainerError::malformed(images.join(name), what))
        };
        each(FILES, FILES_MARKS, file)?;
        each(OLD_SOCKETS, OLD_SOCKETS_MARKS, socket)?;
        self.network(images, inventory, ids)
    }

    /// The processes are in the network namespace that the CRIU was in which dumped them, or in one that is
    /// given: of any other CRIU would make all that is in its images, rules of a firewall too. With a user
    /// namespace it makes one that is empty, and as root of that.
    fn network(&self, images: &Path, inventory: &Message, ids: &[Message]) -> Result<()> {
        let bad = |name: &str, what: &str| Err(ContainerError::malformed(images.join(name), what));
        let mut numbers = ids.iter().map(|own| number_of(own, NETWORK_ID));
        let first = numbers.next().unwrap_or(0);
        if numbers.any(|number| number != first) {
            return bad("inventory.img", "has processes in several network namespaces");
        }
        let mut host = inventory.each(HOST_IDS).flatten();
        let is_hosts = host.all(|host| number_of(&host, NETWORK_ID) == first);
        if is_hosts || self.bundle.mapped_root().is_some() {
            return Ok(());
        }
        let name = format!("netns-{first}.img");
        let image = Image::read(&images.join(&name), NETNS_MAGIC)?;
        let messages = image.map(|image| image.messages).unwrap_or_default();
        match &messages[..] {
            [netns] if netns.bytes(OUTSIDE_KEY) == Some(NETWORK.as_bytes()) => Ok(()),
            _ => bad(&name, "is of a network namespace that the container does not have"),
        }
    }
}

/// An open file is of no kind that takes rights to open.
fn file(file: &Message) -> std::result::Result<(), Fault> {
    let kind = number_of(file, KIND);
    if let Some((_, what)) = NEVER.iter().find(|(never, _)| *never == kind) {
        return Err(format!("would open {what}"));
    }
    if kind != IS_SOCKET {
        return Ok(());
    }
    // CRIU would put several together.
    let mut inner = file.each(SOCKET);
    match (inner.next(), inner.next()) {
        (Some(Some(inner)), None) => socket(&inner),
        _ => Err("has not one socket in one entry".to_owned()),
    }
}

/// A socket is of the internet's, and of no kind that takes rights to open.
fn socket(socket: &Message) -> std::result::Result<(), Fault> {
    let is = |tag, good: [i32; 2]| good.iter().any(|good| number_of(socket, tag) == *good as u64);
    if is(FAMILY, [libc::AF_INET, libc::AF_INET6])
        && is(TYPE, [libc::SOCK_STREAM, libc::SOCK_DGRAM])
    {
        return Ok(());
    }
    Err("would open a raw socket, or one of another kind".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::IDS_MARKS;
    use super::super::remaps::tests::{file as regular, write};
    use super::*;
    use crate::bundle::Bundle;

    fn ids(network: u64) -> Message {
        let mut ids = Message::default();
        ids.set_number(NETWORK_ID, network);
        ids
    }

    /// Holds images in `directory` to a configuration, of processes in these network namespaces that were
    /// dumped in number 2.
    fn checked(directory: &Path, config: &[u8], networks: &[u64]) -> Result<()> {
        let bundle = Bundle::parse(Path::new("/b"), config).expect("a bundle");
        let confined = Confined { bundle: &bundle, root: Path::new("/"), given: &[] };
        let mut inventory = Message::default();
        inventory.set_bytes(HOST_IDS, ids(2).to_bytes());
        let ids: Vec<_> = networks.iter().map(|network| ids(*network)).collect();
        confined.kernel(directory, &inventory, &ids)
    }

    fn inet(family: i32, kind: i32) -> Message {
        let mut socket = Message::default();
        socket.set_number(FAMILY, family as u64);
        socket.set_number(TYPE, kind as u64);
        socket
    }

    fn entry(kind: u64, socket: &[Message]) -> Message {
        let mut entry = Message::default();
        entry.set_number(KIND, kind);
        socket.iter().for_each(|socket| entry.add_bytes(SOCKET, socket.to_bytes()));
        entry
    }

    #[test]
    fn nothing_is_loaded_into_the_kernel() {
        let directory = tempfile::tempdir().expect("a directory");
        for (name, _) in EMPTY {
            write(directory.path(), name, IDS_MARKS, &[]);
            checked(directory.path(), b"{}", &[2]).expect("marks only");
            write(directory.path(), name, IDS_MARKS, &[Message::default()]);
            let error = checked(directory.path(), b"{}", &[2]).expect_err(name).to_string();
            assert!(error.contains(name) && error.contains("would bring"), "{error}");
            fs::remove_file(directory.path().join(name)).expect("removed");
        }
    }

    #[test]
    fn no_file_is_opened_that_takes_rights() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = directory.path();
        let (stream, raw) = (inet(libc::AF_INET6, libc::SOCK_STREAM), inet(libc::AF_INET, 3));
        let good = [
            regular(7, "/a", 1),
            entry(IS_SOCKET, std::slice::from_ref(&stream)),
            entry(IS_SOCKET, &[inet(libc::AF_INET, libc::SOCK_DGRAM)]),
            entry(13, &[]),
        ];
        write(at, FILES, FILES_MARKS, &good);
        checked(at, b"{}", &[2]).expect("usual files");
        for forged in [
            entry(10, &[]),
            entry(12, &[]),
            entry(15, &[]),
            entry(19, &[]),
            entry(19 | 1 << 32, &[]),
            entry(IS_SOCKET, &[]),
            entry(IS_SOCKET, std::slice::from_ref(&raw)),
            entry(IS_SOCKET, &[inet(libc::AF_INET, 3 | libc::SOCK_CLOEXEC)]),
            entry(IS_SOCKET, &[inet(libc::AF_PACKET, libc::SOCK_DGRAM)]),
            entry(IS_SOCKET, &[Message::default()]),
            entry(IS_SOCKET, &[stream.clone(), raw.clone()]),
        ] {
            write(at, FILES, FILES_MARKS, &[good[0].clone(), forged.clone()]);
            let error = checked(at, b"{}", &[2]).expect_err("forged").to_string();
            assert!(error.contains("files.img"), "{forged:?}: {error}");
        }
        fs::remove_file(at.join(FILES)).expect("removed");
        write(at, OLD_SOCKETS, OLD_SOCKETS_MARKS, &[stream]);
        checked(at, b"{}", &[2]).expect("usual sockets");
        write(at, OLD_SOCKETS, OLD_SOCKETS_MARKS, &[raw]);
        checked(at, b"{}", &[2]).expect_err("a raw socket");
    }

    #[test]
    fn no_network_is_made_from_images() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = directory.path();
        let check = |networks: &[u64]| checked(at, b"{}", networks);
        check(&[2, 2]).expect("the one that CRIU was in");
        check(&[2, 3]).expect_err("two");
        check(&[3, 3]).expect_err("one that is not there");
        let mut netns = Message::default();
        let marks = [IDS_MARKS[0], NETNS_MAGIC];
        for (key, is_fine) in [
            (None, false),
            (Some("other"), false),
            (Some("extRootNetNS\0x"), false),
            (Some(NETWORK), true),
        ] {
            netns.remove(OUTSIDE_KEY);
            if let Some(key) = key {
                netns.set_bytes(OUTSIDE_KEY, key.into());
            }
            write(at, "netns-3.img", &marks, std::slice::from_ref(&netns));
            assert_eq!(check(&[3, 3]).is_ok(), is_fine, "{key:?}");
        }
        // CRIU reads the first, and we do not know that of other versions.
        write(at, "netns-3.img", &marks, &[netns.clone(), Message::default()]);
        check(&[3]).expect_err("two in one");
        write(at, "netns-3.img", &marks, &[Message::default()]);
        let users = br#"{"linux": {"namespaces": [{"type": "user"}]}}"#;
        checked(at, users, &[3, 3]).expect("an empty one, made in the user namespace");
        checked(at, users, &[2, 3]).expect_err("two");
    }
}
